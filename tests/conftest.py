"""What all tests share."""

import os
import signal

# What they compare with was made on a CPU; `python -m tests.benchmarks.exactness --gpu` compares on GPUs.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A shell starts background jobs with INT ignored, nohup does so with HUP; whatever a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
