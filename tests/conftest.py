"""Variables that must be set before torch and triton are imported.

TRITON_INTERPRET: triton reads it once, at its first import; its kernels then run on CPU tensors, in its interpreter, so that test_kernels.py
can check them without a GPU. Everything else still takes the plain torch path. On a GPU: TRITON_INTERPRET=0 pytest tests/test_kernels.py.
CUDA_VISIBLE_DEVICES: a suite that interprets hides the GPUs, or the scripts' kernels would be interpreted on them, for hours.
OMP_NUM_THREADS: a sum over two threads ends in other last digits than a sum over one, so a test that compares a killed process bit for bit
with its own must run both alike; and two test processes with one thread each are faster here than one with two."""

import os

if os.environ.setdefault("TRITON_INTERPRET", "1") == "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
