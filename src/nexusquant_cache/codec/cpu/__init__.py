"""The codec on a CPU, compiled by numba; see `codec.impl` for what is in here."""
