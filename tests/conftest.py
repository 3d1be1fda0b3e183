"""What all tests share."""

import os

# What they compare with was made on a CPU; `python -m tests.benchmarks.exactness --gpu` compares on GPUs.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
