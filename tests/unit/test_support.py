"""When kernels are used, and what is said where they cannot be."""

import importlib.util
import logging
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from feeding import feed

from nexusquant_cache import NexusQuantCache
from nexusquant_cache.codec import impl
from nexusquant_cache.codec import transform as transform_module
from nexusquant_cache.codec.cpu import ahead
from nexusquant_cache.codec.cpu import support as cpu
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.rotation import HadamardRotation
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.codec.triton import support
from nexusquant_cache.errors import OptionError, UnsupportedError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
IS_WANTED = cpu.is_wanted  # before tests begin, see conftest.py


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with triton and without its interpreter, and nothing said so far."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(support, "_has_triton", lambda: True)
    for cached in (support.why_not_on, impl._say_once):
        cached.cache_clear()
    yield
    for cached in (support.why_not_on, impl._say_once):
        cached.cache_clear()


def card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


def test_a_card_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, (9, 0))
    assert support.why_not_on(CUDA) is None
    assert support.is_wanted(CUDA)
    assert not support.is_wanted(CPU)


def test_amd_cards_have_kernels_whatever_they_call_their_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, (7, 0), hip="6.3")
    assert support.why_not_on(CUDA) is None


@pytest.mark.parametrize(
    ("capability", "has_triton", "head_dim", "device", "reason"),
    [
        ((7, 5), True, 64, CUDA, r"need compute capability 8\.0, this card has 7\.5"),
        ((9, 0), False, 64, CUDA, r"triton is not installed \(pip install 'nexusquant-cache\[triton\]'\)"),
        ((9, 0), True, 264, CUDA, r"cover head dimensions up to 256, not 264"),
        ((9, 0), True, 64, torch.device("xpu"), r"a xpu device has no Triton kernels"),
    ],
)
def test_says_why_not(  # noqa: PLR0917 - the columns of the table
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    has_triton: bool,
    head_dim: int,
    device: torch.device,
    reason: str,
) -> None:
    """`auto` goes on in plain torch and says so once; `triton` refuses."""
    card(monkeypatch, capability)
    monkeypatch.setattr(support, "_has_triton", lambda: has_triton)
    transform = VectorTransform(HadamardRotation(head_dim), None, torch.ones(1, 1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(support, "why_not_on", lambda _cpu, of=support.why_not_on: of(device))
        found = support.why_not((CodeLayout.uniform(head_dim, 2),), transform)
    with pytest.raises(UnsupportedError, match=rf"impl='triton' was asked for, but .*{reason}\. impl='auto'"):
        impl.refuse("triton", str(found))
    with caplog.at_level(logging.WARNING, "nexusquant_cache"):
        impl.refuse("auto", str(found))
        impl.refuse("auto", str(found))
    assert len(caplog.messages) == 1
    assert "computed in plain torch, which is slower: " in caplog.messages[0]


@pytest.mark.parametrize(("has_numba", "expected"), [(True, "cpu"), (False, "torch")])
def test_a_cpu_has_compiled_functions_where_numba_is(
    has_numba: bool, expected: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without it, one line says what to do; who asks for plain torch is told nothing."""
    monkeypatch.setattr(cpu, "_has_numba", lambda: has_numba)
    codec = E8Codec(CodeLayout.uniform(16, 2))
    transform = codec.fit(torch.randn(1, 1, 20, 16))
    monkeypatch.setattr(cpu, "is_wanted", IS_WANTED)
    assert impl.choose(replace(codec, impl="torch"), transform) == "torch"
    assert not caplog.messages
    for _ in range(2):
        assert impl.choose(codec, transform) == expected
    assert len(caplog.messages) == (not has_numba)
    if not has_numba:
        assert "numba is not installed (pip install 'nexusquant-cache[cpu]')" in caplog.text
        with pytest.raises(UnsupportedError, match="impl='cpu' was asked for, but numba is not installed"):
            impl.choose(replace(codec, impl="cpu"), transform)
    assert cpu.why_not_on(CUDA) == "functions that numba compiles run on a CPU, not on a cuda device"


def test_triton_needs_a_card() -> None:
    codec = E8Codec(CodeLayout.uniform(16, 2))
    transform = codec.fit(torch.randn(1, 1, 20, 16))
    with pytest.raises(UnsupportedError, match="a cpu device has no Triton kernels"):
        impl.choose(replace(codec, impl="triton"), transform)


def test_the_interpreter_runs_kernels_on_a_cpu_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert support.why_not_on(torch.device("xpu")) == "a xpu device has no Triton kernels"
    codec = E8Codec(CodeLayout.uniform(16, 2))
    transform = codec.fit(torch.randn(1, 1, 20, 16))
    assert impl.choose(replace(codec, impl="triton"), transform) == "triton"
    assert impl.choose(codec, transform) != "triton"


class TestIsRight:
    """The first use of each specialisation is compared with plain torch."""

    @pytest.fixture(autouse=True)
    def forget_errors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(impl, "_ERRORS", {})

    def test_compares_once_for_each_specialisation(self) -> None:
        asked: list[str] = []

        def error(key: str) -> float:
            asked.append(key)
            return 0.01

        for key in ("a", "b", "a", "b"):
            assert impl.is_right("auto", key, lambda key=key: error(key), 0.02)
        assert asked == ["a", "b"]

    @pytest.mark.parametrize("error", [0.5, float("nan")])
    def test_a_wrong_kernel_is_not_used(self, error: float, caplog: pytest.LogCaptureFixture) -> None:
        for _ in range(2):
            assert not impl.is_right("auto", ("attend", 64), lambda: error, 0.02)
        assert len(caplog.messages) == 1
        assert re.search(r"differs from plain torch on this device, by (0\.5|nan) for \('attend', 64\)", caplog.text)
        with pytest.raises(UnsupportedError, match="impl='triton' was asked for, but a kernel differs"):
            impl.is_right("triton", ("attend", 64), lambda: error, 0.02)

    def test_distance_is_relative(self) -> None:
        assert impl.distance(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0])) == pytest.approx(0.08)
        assert impl.distance(torch.zeros(3), torch.zeros(3)) == 0
        assert impl.distance(torch.full((2,), 1e30), torch.full((2,), 1e30)) == 0


def test_rotations_of_users_are_for_plain_torch() -> None:
    class Turned(HadamardRotation):
        def axes(self, device: torch.device) -> None:
            del device

    transform = VectorTransform(Turned(16), None, torch.ones(1, 1, 1))
    layouts = (CodeLayout.uniform(16, 2),)
    assert support.why_not(layouts, transform) == "a cpu device has no Triton kernels"
    support.why_not_on.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        assert support.why_not(layouts, transform) == "Turned is not written as whole numbers (Rotation.axes)"


def test_a_cache_that_insists_refuses_before_it_loses_anything() -> None:
    cache = NexusQuantCache("quant", impl="triton")
    keys = torch.randn(1, 2, 300, 16)
    feed(cache, keys, keys, 0)
    with pytest.raises(UnsupportedError, match="impl='triton' was asked for, but a cpu device has no Triton kernels"):
        cache.compress()
    assert torch.equal(cache.layers[0].keys, keys)


@pytest.mark.usefixtures("unchecked")
def test_unknown_implementations_are_named() -> None:
    with pytest.raises(OptionError, match=r"unknown impl 'trition'.*triton"):
        NexusQuantCache(impl="trition")


def test_codecs_of_either_implementation_are_equal() -> None:
    """Transforms of a cache can be used by another one whatever computes them."""
    layout = CodeLayout.uniform(16, 2)
    assert E8Codec(layout, impl="triton") == E8Codec(layout, impl="torch")


def test_rotations_are_found_where_they_were_at_first():
    from nexusquant_cache.codec.transform import HadamardRotation as Found  # noqa: PLC0415 - what is tested

    assert Found is HadamardRotation
    with pytest.raises(AttributeError, match="no attribute 'Hadamard'"):
        _ = transform_module.Hadamard


def test_a_cpu_gets_its_functions_ahead_of_their_use(monkeypatch):
    imported = []
    monkeypatch.setattr(ahead, "import_module", imported.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ahead, "why_not_on", lambda _device: None)
    ahead.compile_ahead()()
    assert len(imported) == 2
    assert all(importlib.util.find_spec(name) for name in imported)
    monkeypatch.setattr(ahead, "why_not_on", lambda _device: "numba is not installed")
    ahead.compile_ahead()()
    assert len(imported) == 2
