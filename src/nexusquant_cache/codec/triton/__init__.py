"""The codec in Triton kernels on a GPU; importing this package does not import triton.

- `support`: where the kernels run, and why not;
- `encode`, `decode`, `attend`: what `codec.impl` calls, with the signatures of plain torch;
- `kernels_encode`, `kernels_decode`, `kernels_attend`, `kernels_positions`: kernels and their launches;
- `kernels_greatest`: what `layer.observations.greatest_attention` calls by way of `codec.impl`;
- `kernels_codes`: device functions that turn packed rows into float16 numbers;
- `compile_case`: specialisations to compile without a GPU.

Everything here can run in the interpreter of triton too (``TRITON_INTERPRET=1``), which is how it is tested without a
GPU.
"""
