"""Host memory: copies to and from it, beside the computation where that is possible."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

HOST = torch.device("cpu")


def to_host(x: Tensor) -> Tensor:
    """Return a tensor in host memory, complete when this returns; pinned if it comes from a CUDA device."""
    if x.device.type != "cuda":
        return x.to(HOST)
    # Blocking: nothing else would tell when the CPU may read it, and codes make this trip once.
    return torch.empty(x.shape, dtype=x.dtype, device=HOST, pin_memory=True).copy_(x)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; on CUDA the copy may be under way still, in the order of the current stream."""
    return x.to(device, non_blocking=device.type == "cuda")


def pinned_for(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host pinned, if that lets copies to the device run beside the computation."""
    return x.pin_memory() if device.type == "cuda" and x.device == HOST and not x.is_pinned() else x


def empty_beside(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return an uninitialized tensor in the memory in which ``x`` is, pinned if that is."""
    pinned = x.device.type == "cpu" and x.is_pinned()
    return torch.empty(shape, dtype=x.dtype, device=HOST, pin_memory=True) if pinned else x.new_empty(tuple(shape))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def beside(stream: torch.cuda.Stream | None, device: torch.device) -> Iterator[None]:
    """Let copies to a device run in a stream of their own, behind all that has been asked of the device before."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream for `beside`; None for devices that have one stream only."""
    return _side_stream(device) if device.type == "cuda" else None


def arrive(stream: torch.cuda.Stream, device: torch.device, tensors: Iterable[Tensor]) -> None:
    """Let what is asked of a device from now on wait for the copies made in a stream.

    Args:
        stream: The stream.
        device: The device.
        tensors: What may have been made in it; others do no harm.
    """
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    for tensor in tensors:
        if tensor.device == device:
            tensor.record_stream(current)  # else its memory could be written to while it is still read
