"""The bounds of loops that a kernel learns at run time: loaded numbers and arguments."""

import os

import triton

# The interpreter's range() needs a Python integer, and Triton 3.6's cannot make one of such a number (NumPy ≥ 2.4).
if os.environ.get("TRITON_INTERPRET") == "1":

    def bound(n):
        return int(n.handle.data.item())

else:

    @triton.jit
    def bound(n):
        return n
