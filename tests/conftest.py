"""What every test runs under: fixed seeds, poisoned memory, no network, checked shapes and types."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
from collections.abc import Iterator
from typing import Any

# Before transformers is imported: its hub client reads these once.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import checks
import hypothesis
import jaxtyping
import pytest
import torch

# Before nexusquant_cache is imported: every annotation of it is checked while the tests run.
checks.install()

# `ci` gives the same verdict on every run; `thorough` (nox -s property) goes looking for new examples.
hypothesis.settings.register_profile("ci", max_examples=40, derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("thorough", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("ci")


class NetworkBlockedError(BaseException):
    """A test tried to leave this machine.  No `Exception`, so that no library can swallow it."""


def _refuse_remote(host: Any) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return
    try:
        allowed = ipaddress.ip_address(name).is_loopback
    except ValueError:  # a host name
        allowed = False
    if not allowed:
        msg = f"tests must not use the network, but one asked for {name!r}"
        raise NetworkBlockedError(msg)


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuse every connection and name look-up that leaves this machine."""

    def guarded(original: Any) -> Any:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                _refuse_remote(address[0])
            return original(self, address)

        return connect

    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_remote(host)
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


@pytest.fixture(scope="session", autouse=True)
def _plain_torch_defines_the_truth() -> Iterator[None]:
    """Let `auto` be plain torch on CPUs: it is exact, where compiled functions round.  Their own tests choose them."""
    from nexusquant_cache.codec.cpu import support  # noqa: PLC0415 - after `checks.install`

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "is_wanted", lambda _device: False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill fresh tensors (`torch.empty` and its kin) with NaN, so that reading unwritten memory shows.

    Integers get their largest value.  torch does so only while deterministic algorithms are on.
    """
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(mode=False)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Switch off the checks of annotations, which users do not have, to reach the errors of our own."""
    jaxtyping.config.update("jaxtyping_disable", value=True)
    yield
    jaxtyping.config.update("jaxtyping_disable", value=False)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Start each test from the same random state, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)
