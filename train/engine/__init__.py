"""Backward passes and optimizer steps, alike under one process, DDP and DeepSpeed ZeRO."""
