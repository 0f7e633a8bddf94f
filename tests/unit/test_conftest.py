"""The guards of conftest.py hold: a guard that does nothing would go unnoticed."""

from __future__ import annotations

import socket

import pytest
import torch
from jaxtyping import TypeCheckError

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.errors import suggest


def test_fresh_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.empty(2, dtype=torch.float16).isnan().all()
    assert (torch.empty(2, dtype=torch.int16) == torch.iinfo(torch.int16).max).all()
    assert torch.ones(2).new_empty(4).isnan().all()


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "example.invalid"])
def test_no_test_reaches_another_machine(host):
    # 192.0.2.0/24, 2001:db8::/32 and .invalid are reserved for documentation: nobody is there.
    with pytest.raises(BaseException, match="must not use the network"):
        socket.create_connection((host, 9), timeout=0.1)
    with socket.socket() as client, pytest.raises(BaseException, match="must not use the network"):
        client.connect((host, 9))


def test_loopback_stays_open():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


def codes(*shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)


def test_annotations_are_checked_at_run_time():
    PackedVectors(codes(1, 2, 3, 16), codes(1, 2, 3))
    with pytest.raises(TypeCheckError):
        PackedVectors(codes(1, 2, 3, 16), codes(1, 2, 3, dtype=torch.float32))
    with pytest.raises(TypeCheckError):
        PackedVectors(codes(1, 2, 3, 16), codes(1, 2, 4))  # each is right, but they do not fit together
    with pytest.raises(TypeCheckError):
        suggest(3, ["three"])


@pytest.mark.usefixtures("unchecked")
def test_checks_can_be_switched_off():
    PackedVectors(codes(1, 2, 3, 16), codes(1, 2, 4))
