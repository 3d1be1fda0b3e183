"""The two towers, their loss, the step and the loop."""
