"""The towers and the pair that they make."""
