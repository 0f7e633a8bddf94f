"""Triton kernels that read and write packed tokens on a GPU; importing this package does not import triton.

- `operands`: what the kernels are given, in plain torch;
- `codes`: device functions that turn packed rows into float16 numbers;
- `attention`: attention of a few queries over packed tokens;
- `dense`: packed tokens decoded into a tensor;
- `positions`: positions of the kept tokens;
- `encode`: the way back.

Everything here can run in the interpreter of triton too (``TRITON_INTERPRET=1``), which is how it is tested without a
GPU.
"""
