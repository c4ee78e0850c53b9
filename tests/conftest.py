"""Triton reads this variable once, when it is first imported: its kernels then run on CPU tensors, in Triton's interpreter, so that
test_kernels.py can check them without a GPU. Everything else still takes the plain torch path. On a GPU: TRITON_INTERPRET=0 pytest."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
