"""The cache in host memory: between the updates of its layers (`offloading=True`), or until it is needed (`offload`).

**The law.**  Where the cache is changes no token and no stored bit.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from feeding import attended, feed
from integration.families import FAMILIES, build, inputs
from integration.simulated import CPU, MODES, Placed, SimulatedDevices, SpreadCache, stored
from integration.tiny import SMALL, balanced, fingerprint, generate, logits, prompt, random_states, tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer

from grids import combined
from nexusquant_cache import (
    NexusQuantCache,
    OptionError,
    ReconstructionPolicy,
    WindowAttentionPolicy,
    attention,
    compressed_generation,
)
from nexusquant_cache.cache.report import storage_bytes
from nexusquant_cache.layer import host
from nexusquant_cache.layer import residency as residency_module
from nexusquant_cache.layer import tokens as tokens_module
from nexusquant_cache.layer.host import to_device
from nexusquant_cache.layer.tokens import RaggedBuffer, TokenBuffer
from nexusquant_cache.releases import CACHE


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


def codes_of(layer: Any) -> list[Tensor]:
    """Return the tensors in which codes and scales are stored."""
    parts = ([b.front, b.rest.data] if isinstance(b, RaggedBuffer) else [b.data] for b in layer.state.buffers)
    return [x for part in parts for x in part]


def code_bytes(cache: NexusQuantCache) -> int:
    return sum(x.numel() for layer in cache.layers for x in codes_of(layer))


class TestOffloading:
    """`offloading=True`."""

    @pytest.mark.usefixtures("fresh_tables")
    @combined(mode=MODES, when=["post_prefill", "during_prefill"])
    def test_changes_no_token_and_no_code(self, model, mode, when):
        away, alone = (
            make("balanced", config=model.config, when=when, offloading=make is SpreadCache, **SMALL)
            for make in (SpreadCache, NexusQuantCache)
        )
        texts = []
        for cache, devices in ((away, SimulatedDevices()), (alone, nullcontext())):
            torch.manual_seed(1)
            with devices:
                texts.append(mode(model, cache))
                cache.compress()
                assert {x.device for layer in cache.layers for x in codes_of(layer)} == {CPU}
                cache.offload()
        assert torch.equal(*texts)
        assert all(layer.state.kept < layer.state.seen for layer in alone.layers)
        assert fingerprint(away) == fingerprint(alone)

    @pytest.mark.usefixtures("fresh_tables")
    def test_codes_are_on_the_device_for_the_layer_at_work_and_the_next_only(self, model):
        cache = SpreadCache("balanced", config=model.config, offloading=True, **SMALL)
        with SimulatedDevices():
            logits(model, prompt(60), cache)
            first, last = cache.layers
            assert last.state.tail[0].device == CPU, "the prompt waits in host memory"
            assert first.state.tail[0].device.type == "xpu", "and the first layer is on its way already"
            for _ in range(3):
                logits(model, prompt(1), cache)
                assert [layer.state.tail[0].device.index for layer in cache.layers] == [0, 1]
                assert [buffer.fetched is None for buffer in last.state.buffers] == [True] * 4
                assert [buffer.fetched is None for buffer in first.state.buffers] == [False] * 4
                assert {x.device for layer in cache.layers for x in codes_of(layer)} == {CPU}

    @pytest.mark.usefixtures("fresh_tables")
    def test_a_step_fetches_the_codes_and_sends_new_ones_alone(self, model):
        cache = SpreadCache("balanced", config=model.config, offloading=True, **SMALL)
        with SimulatedDevices() as bus:
            logits(model, prompt(60), cache)
            logits(model, prompt(1), cache)
            flush = cache.cache_config.flush_length
            for _ in range(3 * flush):
                before, fetched, sent = code_bytes(cache), bus.fetched, bus.sent
                tokens = [layer.state.body.positions.tokens for layer in cache.layers]
                logits(model, prompt(1), cache)
                new = [
                    layer.state.body.positions.tokens - count for layer, count in zip(cache.layers, tokens, strict=True)
                ]
                assert new in ([0, 0], [flush, flush])
                per_token = sum(buffer.rectangle()[0, :, 0].numel() for x in cache.layers for buffer in x.state.buffers)
                assert bus.sent - sent == per_token * new[0]
                counts = 512  # how many tokens heads have, which is asked a few times
                assert before <= bus.fetched - fetched <= code_bytes(cache) + counts

    def test_grown_buffers_agree_in_both_places(self):
        data = torch.arange(24, dtype=torch.uint8).view(1, 2, 12)[..., :5].contiguous()
        buffer = TokenBuffer.of(data)
        buffer.fetched = buffer.data.clone()
        for count in (1, 40, 2):
            buffer.append(torch.randint(0, 256, (1, 2, count), dtype=torch.uint8))
            assert buffer.fetched.data_ptr() != buffer.data.data_ptr()
            assert torch.equal(buffer.view(), buffer.stored())
            assert buffer.tokens == buffer.view().shape[2]
        assert torch.equal(buffer.stored()[:, :, :5], data)

    def test_a_cut_buffer_has_no_copy_of_what_it_was(self):
        data = torch.arange(24, dtype=torch.uint8).view(1, 2, 12)
        for cut in (lambda buffer: buffer.crop(7), lambda buffer: buffer.map_rows(lambda x: x.flip(1))):
            buffer = TokenBuffer.of(data)
            buffer.fetched = buffer.data.clone()
            cut(buffer)
            assert torch.equal(buffer.view(), buffer.stored())

    def test_on_the_cpu_nothing_is_copied(self, model):
        cache = balanced(model, offloading=True)
        generate(model, prompt(60), cache, 4)
        pointers = [x.data_ptr() for layer in cache.layers for x in codes_of(layer)]
        cache.prefetch()
        cache.offload()
        assert [x.data_ptr() for layer in cache.layers for x in codes_of(layer)] == pointers
        assert cache.memory_report().host_bytes == 0

    @pytest.mark.parametrize("only_non_sliding", [False, True])
    def test_sliding_windows_leave_if_they_may(self, only_non_sliding):
        kinds = ["sliding_attention", "full_attention"]
        config = Qwen2Config(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=20,
            layer_types=kinds,
        )
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).eval().requires_grad_(requires_grad=False)
        options = {"offloading": True, "offload_only_non_sliding": only_non_sliding}
        away, alone = SpreadCache(config=config, **options, **SMALL), NexusQuantCache(config=config, **SMALL)
        with SimulatedDevices():
            text = generate(model, prompt(60), away, 6)
            window = away.layers[0]
            assert type(window) is DynamicSlidingWindowLayer
            assert window.keys.device.type == ("xpu" if only_non_sliding else "cpu")
            away.offload()
            assert window.keys.device == CPU
            assert away.memory_report().layers[0].host_bytes == storage_bytes(window.keys, window.values)
            away.prefetch(only_non_sliding=True)
            assert window.keys.device == CPU
            away.prefetch(0)
            assert window.keys.device.type == "xpu"
            more = generate(model, torch.cat([text, prompt(9, seed=1)], 1), away, 4)
        assert torch.equal(text, generate(model, prompt(60), alone, 6))
        assert torch.equal(more, generate(model, torch.cat([text, prompt(9, seed=1)], 1), alone, 4))

    def test_layers_made_on_demand(self, model):
        """Without a config."""
        away, alone = SpreadCache(offloading=True, **SMALL), NexusQuantCache(**SMALL)
        with SimulatedDevices():
            text = generate(model, prompt(60), away, 6)
        assert torch.equal(text, generate(model, prompt(60), alone, 6))

    def test_a_drop_in_may_offload(self, model):
        with compressed_generation(model, offloading=True, **SMALL) as compressed:
            model.generate(prompt(40), max_new_tokens=3, do_sample=False)
        assert compressed.cache.offloading

    def test_a_loaded_cache_may_offload(self, model, tmp_path):
        cache = balanced(model)
        generate(model, prompt(60), cache, 4)
        cache.save(tmp_path / "cache")
        loaded = NexusQuantCache.load(tmp_path / "cache", config=model.config, offloading=True)
        assert loaded.offloading
        assert fingerprint(loaded) == fingerprint(cache)

    def test_a_subclass_without_the_option_is_loaded(self, model, tmp_path):
        class Plain(NexusQuantCache):
            def __init__(self, preset: Any, *, config: Any, policy: Any, when: Any) -> None:
                super().__init__(preset, config=config, policy=policy, when=when)

        cache = balanced(model)
        generate(model, prompt(60), cache, 4)
        cache.save(tmp_path / "cache")
        for offloading in (False, True):
            loaded = Plain.load(tmp_path / "cache", config=model.config, offloading=offloading)
            assert loaded.offloading is loaded.shared.offloading is offloading

    @pytest.mark.usefixtures("fresh_tables")
    def test_loading_fetches_what_stays_on_the_device_alone(self, model, tmp_path):
        for waiting in (False, True):
            cache = balanced(model)
            logits(model, prompt(60), cache)
            if not waiting:
                cache.compress()
            cache.save(tmp_path / "cache")
            with SimulatedDevices() as bus:
                loaded = NexusQuantCache.load(
                    tmp_path / "cache", config=model.config, offloading=True, device=torch.device("xpu", 0)
                )
                assert bus.sent == 0
                for layer in loaded.layers:
                    assert layer.state.device == torch.device("xpu", 0)
                    assert layer.state.tail[0].device.type == ("cpu" if waiting else "xpu")
                    assert waiting or {x.device for x in codes_of(layer)} == {CPU}
                report = loaded.memory_report()
                away = sum(x.code_bytes for x in report.layers)
                if waiting:  # queries stay
                    away += sum(sum(x.nbytes for x in layer.state.tail) for layer in loaded.layers)
                assert report.host_bytes == away

    @pytest.mark.usefixtures("fresh_tables")
    def test_nothing_stays_fetched(self, model):
        cache = SpreadCache("balanced", config=model.config, offloading=True, **SMALL)
        last = cache.layers[1]
        keys, values = random_states((1, 2, 1, 16), 0)

        def failing() -> None:
            feed(cache, keys, values, 0)
            with pytest.raises(ValueError, match="head_dim"):
                feed(cache, keys, values[..., :8], 1)

        with SimulatedDevices() as bus:
            logits(model, prompt(60), cache)
            logits(model, prompt(1), cache)
            for act in (cache.compress, lambda: look(cache), cache.prefetch, failing):
                act()
                assert [buffer.fetched for buffer in last.state.buffers] == [None] * 4
            logits(model, prompt(60), cache)
            assert last.state.turn.is_pending
            before = bus.fetched
            cache.prefetch()
            assert last.state.tail[0].device == CPU, "a prompt waits in host memory"
            assert bus.fetched == before

    @pytest.mark.usefixtures("fresh_tables")
    def test_encoding_after_a_rejected_guess_fetches_no_codes(self, model, monkeypatch):
        cache = SpreadCache("balanced", config=model.config, offloading=True, **SMALL)
        keys, values = random_states((1, 2, 9, 16), 0)
        with SimulatedDevices():
            logits(model, prompt(60), cache)
            logits(model, prompt(1), cache)
            cache.activate_past_recording()
            logits(model, prompt(1), cache)
            cache.crop(0)
            for index in range(2):
                feed(cache, keys, values, index)
            tokens = cache.layers[1].state.body.positions.tokens
            with monkeypatch.context() as patch:
                patch.delattr(TokenBuffer, "fetch")
                cache.crop(-1)
            assert cache.layers[1].state.body.positions.tokens > tokens

    @pytest.mark.usefixtures("fresh_tables")
    def test_a_failed_forward_leaves_no_trace(self, model):
        cache = SpreadCache("balanced", config=model.config, offloading=True, **SMALL)
        with SimulatedDevices():
            logits(model, prompt(60), cache)
            logits(model, prompt(1), cache)
            cache.offload()
            before = fingerprint(cache)
            keys, values = random_states((1, 2, 1, 16), 0)
            feed(cache, keys, values, 0)
            with pytest.raises(ValueError, match="head_dim"):
                feed(cache, keys[..., :8], values, 1)
            cache.offload()
            assert fingerprint(cache) == before


def crop(cache: NexusQuantCache) -> object:
    cache.crop(-3)
    return cache


def reorder(cache: NexusQuantCache) -> object:
    cache.reorder_cache(torch.tensor([0], device=CPU))
    return cache


def repeat(cache: NexusQuantCache) -> object:
    cache.batch_repeat_interleave(2)
    return cache


def select(cache: NexusQuantCache) -> object:
    cache.batch_select_indices(torch.tensor([0, 0], device=CPU))
    return cache


def look(cache: NexusQuantCache) -> object:
    return [x.as_subclass(Tensor).tolist() for layer in cache.layers for x in (layer.keys, layer.values)]


def transforms(cache: NexusQuantCache) -> object:
    return [x and (x.keys.reference.tolist(), x.values.reference.tolist()) for x in cache.transforms]


def compress(cache: NexusQuantCache) -> object:
    cache.compress()
    return cache


def save(cache: NexusQuantCache, folder: Any) -> object:
    cache.save(folder / "cache")
    return NexusQuantCache.load(folder / "cache", config=cache.model_config)


def deep_copy(cache: NexusQuantCache) -> object:
    return copy.deepcopy(cache)


def pickled(cache: NexusQuantCache) -> object:
    return pickle.loads(pickle.dumps(cache))  # noqa: S301 - our own


def recording(cache: NexusQuantCache) -> object:
    cache.activate_past_recording()
    keys, values = random_states((1, 2, 3, 16), 3)
    for index in range(2):
        feed(cache, keys, values, index)
    cache.crop(-1)
    return cache


def step(cache: NexusQuantCache) -> object:
    keys, values = random_states((1, 2, 1, 16), 3)
    return [attended(cache, keys, values, index).tolist() for index in range(2)]


CHANGING = [crop, reorder, repeat, select]
OPERATIONS: list[Callable[[NexusQuantCache], object]]
OPERATIONS = [*CHANGING, look, transforms, compress, deep_copy, pickled, recording, step]


def layer_states(cache: NexusQuantCache) -> object:
    """Do as a copy or a pickle does."""
    return [layer.__getstate__() for layer in cache.layers]


def lengths(cache: NexusQuantCache) -> object:
    """Ask what can be told without looking at a tensor."""
    return [cache.get_seq_length(), cache.get_mask_sizes(1, 0), cache.memory_report()]


def result_of(thing: object) -> object:
    """Return what a cache holds, or what is no cache."""
    if not isinstance(thing, NexusQuantCache):
        return thing
    thing.prefetch()
    return fingerprint(thing)


class TestOffload:
    """`cache.offload()`."""

    @pytest.mark.usefixtures("fresh_tables")
    def test_everything_leaves_the_device_and_comes_back_by_itself(self, model):
        """Out after every forward: nothing else changes."""
        spread, alone = SpreadCache("balanced", config=model.config, **SMALL), balanced(model)
        for seed, tokens in enumerate([60, 1, 1, 7, 1, 1, 1, 1, 1]):
            expected = logits(model, prompt(tokens, seed=seed), alone)
            with SimulatedDevices():
                given = logits(model, prompt(tokens, seed=seed), spread)
                for index, layer in enumerate(spread.layers):
                    assert {x.device for x in stored(layer)} == {torch.device("xpu", index)}
                spread.offload()
                assert {x.device for layer in spread.layers for x in stored(layer)} == {CPU}
            assert torch.equal(given, expected)
        with SimulatedDevices():
            spread.prefetch()
            homes = [{x.device for x in stored(layer)} for layer in spread.layers]
            spread.offload()
        assert homes == [{torch.device("xpu", 0)}, {torch.device("xpu", 1)}]
        assert fingerprint(spread) == fingerprint(alone)

    @pytest.mark.usefixtures("fresh_tables")
    def test_one_layer_alone(self, model):
        cache = SpreadCache("balanced", config=model.config, **SMALL)
        with SimulatedDevices():
            generate(model, prompt(60), cache, 4)
            cache.offload(1)
            assert {x.device.type for x in stored(cache.layers[0])} == {"xpu"}
            assert {x.device.type for x in stored(cache.layers[1])} == {"cpu"}
            cache.offload(0)
            cache.prefetch(1)
            assert {x.device.type for x in stored(cache.layers[0])} == {"cpu"}
            assert {x.device.type for x in stored(cache.layers[1])} == {"xpu"}

    @pytest.mark.usefixtures("fresh_tables")
    def test_an_offloading_cache_can_be_sent_away_whole(self, model):
        cache, alone = SpreadCache("balanced", config=model.config, offloading=True, **SMALL), balanced(model)
        with SimulatedDevices():
            text = generate(model, prompt(60), cache, 4)
            cache.offload()
            assert {x.device for layer in cache.layers for x in stored(layer)} == {CPU}
            cache.prefetch()
            for layer in cache.layers:
                assert layer.state.tail[0].device.type == "xpu"
                assert {x.device for x in codes_of(layer)} == {CPU}
                assert all(buffer.fetched is None for buffer in layer.state.buffers)
            more = generate(model, torch.cat([text, prompt(9, seed=1)], 1), cache, 4)
        assert torch.equal(text, generate(model, prompt(60), alone, 4))
        assert torch.equal(more, generate(model, torch.cat([text, prompt(9, seed=1)], 1), alone, 4))

    @pytest.mark.parametrize("waiting", [False, True])
    @pytest.mark.parametrize("operation", [*OPERATIONS, "save"])
    def test_whatever_touches_a_cache_that_is_away_finds_it_whole(self, model, operation, waiting, tmp_path):
        results = []
        for is_away in (False, True):
            cache = balanced(model)
            logits(model, prompt(60), cache)
            for seed in range(0 if waiting else 12):
                logits(model, prompt(1, seed=seed), cache)
            if is_away:
                cache.offload()
                assert all(layer.residency.is_away for layer in cache.layers)
            results.append(result_of(save(cache, tmp_path) if operation == "save" else operation(cache)))
        assert results[0] == results[1]

    @pytest.mark.usefixtures("fresh_tables")
    def test_the_report_tells_host_from_device(self, model):
        cache = SpreadCache("balanced", config=model.config, **SMALL)
        with SimulatedDevices():
            generate(model, prompt(60), cache, 4)
            held = cache.memory_report()
            assert held.host_bytes == 0
            cache.offload(1)
            report = cache.memory_report()
        assert [layer.host_bytes for layer in report.layers] == [0, report.layers[1].held_bytes]
        assert report.host_bytes == report.layers[1].held_bytes
        assert report.held_bytes <= held.held_bytes

    def test_sent_away_twice(self, model):
        cache, alone = balanced(model), balanced(model)
        for each in (cache, alone):
            generate(model, prompt(60), each, 4)
        cache.offload()
        cache.offload()
        assert fingerprint(cache) == fingerprint(alone)

    def test_an_empty_cache(self):
        cache = NexusQuantCache()
        cache.offload()
        cache.prefetch()
        cache = NexusQuantCache(config=tiny_llama().config)
        cache.offload()
        cache.prefetch()
        assert cache.get_seq_length() == 0

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("level", [None, 3])
    def test_compression_there_was_removed(self, model, level):
        with pytest.raises(OptionError, match=r"removed: use save\(\)"):
            balanced(model).offload(level=level)

    @pytest.mark.usefixtures("unchecked")
    def test_other_options(self, model):
        with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
            balanced(model).offload(depth=3)

    def test_reconstruction_reads_a_prompt_that_was_sent_away(self, model):
        cache, alone = (balanced(model, policy=ReconstructionPolicy()) for _ in range(2))
        texts = []
        for each in (cache, alone):
            logits(model, prompt(60), each)
            if each is cache:
                each.offload()
            attention.reconstruct(model, each, prompt(60))
            if each is cache:
                each.offload()
            texts.append(generate(model, torch.cat([prompt(60), prompt(5, seed=1)], 1), each, 6))
        assert torch.equal(*texts)
        assert fingerprint(cache) == fingerprint(alone)

    @pytest.mark.parametrize("name", sorted(FAMILIES))
    def test_a_conversation_of_every_family(self, name):
        """Also of those whose layers have states that stay on the device."""
        model = build(name, FAMILIES[name].attentions[0])
        texts = []
        for is_sent_away in (False, True):
            cache = NexusQuantCache("quant", config=model.config, **SMALL)
            given = inputs(model, 48)
            first = model.generate(**given, **{CACHE: cache}, max_new_tokens=5, do_sample=False)
            if is_sent_away:
                cache.offload()
            for _ in range(3):
                out = model(input_ids=first[:, -1:], **{CACHE: cache}, use_cache=True)
            texts.append(out.logits)
        assert torch.equal(*texts)


class TestStreams:
    """What is asked of CUDA, in which order; there is none here."""

    class Stream:
        __class__ = torch.cuda.Stream  # for the checks of types

        def __init__(self, name: str, log: list[str]) -> None:
            self.name, self.log = name, log

        def wait_stream(self, other: Any) -> None:
            self.log.append(f"{self.name} waits for {other.name}")

        def __enter__(self) -> None:
            self.log.append(f"in {self.name}")

        def __exit__(self, *_: object) -> None:
            self.log.append(f"out of {self.name}")

    @pytest.fixture
    def log(self, monkeypatch):
        log: list[str] = []
        current = self.Stream("current", log)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        return log

    def test_copies_wait_for_the_computation_and_it_for_them(self, log):
        device, side = torch.device("cuda", 0), self.Stream("side", log)

        class Copy(Placed):
            def record_stream(self, stream: Any) -> None:
                log.append(f"memory is kept for {stream.name}")

        copied = torch.zeros(2).as_subclass(Copy)
        copied.place = device
        with host.beside(side, device):
            log.append("copy")
        host.arrive(side, device, [torch.zeros(2), copied])
        expected = ["side waits for current", "in side", "copy", "out of side", "current waits for side"]
        assert log == [*expected, "memory is kept for current"]

    def test_other_devices_have_one_stream(self, log):
        assert host.side_stream(CPU) is None
        with host.beside(None, CPU):
            log.append("copy")
        assert log == ["copy"]

    @pytest.fixture
    def watched(self, monkeypatch):
        """Note what is copied beside the computation, and what waits for it: layers have the number of their device."""
        notes: list[tuple[str, int]] = []

        @contextmanager
        def beside(stream: Any, device: torch.device) -> Iterator[None]:
            assert stream == f"side {device.index}"
            copies = [to_device]

            def copied(x: Tensor, device: torch.device) -> Tensor:
                notes.append(("beside", device.index))
                return copies[0](x, device)

            with monkeypatch.context() as patch:
                patch.setattr(tokens_module, "to_device", copied)
                patch.setattr(residency_module, "to_device", copied)
                yield

        def arrive(stream: str, device: torch.device, tensors: list[Tensor]) -> None:
            assert stream == f"side {device.index}"
            assert any(x.device == device for x in tensors) or not notes
            notes.append(("arrives", device.index))

        monkeypatch.setattr(residency_module, "side_stream", lambda device: f"side {device.index}")
        monkeypatch.setattr(residency_module, "beside", beside)
        monkeypatch.setattr(residency_module, "arrive", arrive)
        return notes

    def on_its_way(self, model: LlamaForCausalLM) -> NexusQuantCache:
        cache = SpreadCache("balanced", config=model.config, offloading=True, **SMALL)
        logits(model, prompt(60), cache)
        logits(model, prompt(1), cache)
        assert [layer.residency.coming for layer in cache.layers] == ["side 0", None]
        return cache

    @pytest.mark.usefixtures("fresh_tables")
    def test_in_a_step_each_layer_is_fetched_beside_the_one_before(self, model, watched):
        with SimulatedDevices():
            cache = self.on_its_way(model)
            watched.clear()
            logits(model, prompt(1), cache)
        # The first has been on its way since the last step; four buffers each, of two parts.
        assert watched == [*[("beside", 1)] * 8, ("arrives", 0), *[("beside", 0)] * 8, ("arrives", 1)]

    @pytest.mark.usefixtures("fresh_tables")
    @pytest.mark.parametrize("operation", [*CHANGING, look, transforms, step, recording, layer_states, lengths])
    def test_whatever_uses_a_layer_on_its_way_waits(self, operation, model, watched):
        with SimulatedDevices():
            cache = self.on_its_way(model)
            watched.clear()
            operation(cache)
        assert (("arrives", 0) in watched) is (operation is not lengths)

    @pytest.mark.usefixtures("fresh_tables")
    def test_copies_that_fail_on_the_way_are_waited_for(self, model, watched, monkeypatch):
        with SimulatedDevices():
            cache = self.on_its_way(model)
            cache.compress()
            cache.offload()
            layer = cache.layers[0]

            def full(_x: Tensor, _device: torch.device) -> Tensor:
                raise MemoryError

            with monkeypatch.context() as patch:
                patch.setattr(residency_module, "beside", lambda *_: nullcontext())
                patch.setattr(residency_module, "to_device", full)
                with pytest.raises(MemoryError):
                    layer.residency.fetch_beside()
            watched.clear()
            look(cache)
        assert watched[0] == ("arrives", 0)


class TestFailures:
    """An error on the way loses nothing, and the next attempt brings everything."""

    def cache_and_print(self, model: LlamaForCausalLM) -> tuple[NexusQuantCache, object]:
        cache = SpreadCache("balanced", config=model.config, **SMALL)
        logits(model, prompt(60), cache)
        for seed in range(12):
            logits(model, prompt(1, seed=seed), cache)
        cache.offload()
        before = fingerprint(cache)
        cache.prefetch()
        return cache, before

    @pytest.mark.usefixtures("fresh_tables")
    @pytest.mark.parametrize("way", ["to_host", "to_device"])
    @pytest.mark.parametrize("number", range(1, 26, 4))
    def test_any_copy_may_fail(self, model, way, number, monkeypatch):
        with SimulatedDevices():
            cache, before = self.cache_and_print(model)
            if way == "to_device":
                cache.offload()
            left, copy_ = iter(range(number)), getattr(host, way)

            def failing(*args: Any) -> Tensor:
                if next(left, None) is None:
                    raise MemoryError
                return copy_(*args)

            def there_and_back() -> None:
                for _ in range(20):
                    cache.offload()
                    cache.prefetch()

            with monkeypatch.context() as patch:
                for module in (residency_module, tokens_module):
                    patch.setattr(module, way, failing)
                with pytest.raises(MemoryError):
                    there_and_back()
            assert cache.get_seq_length() == 72
            cache.prefetch()
            homes = [{x.device for x in stored(layer)} for layer in cache.layers]
            assert homes == [{torch.device("xpu", 0)}, {torch.device("xpu", 1)}]
            cache.offload()
        assert fingerprint(cache) == before

    @pytest.mark.usefixtures("fresh_tables")
    def test_a_refused_chunk_leaves_the_queries_of_the_first_layer(self, model):
        """Its codes are fetched again before the last layer refuses."""
        policies = WindowAttentionPolicy()
        cache = SpreadCache("balanced", config=model.config, offloading=True, policy=policies, **SMALL)
        keys, values = random_states((1, 2, 60, 16), 0)
        with SimulatedDevices():
            for index in range(2):
                feed(cache, keys, values, index)
            before = cache.layers[0].state.observed.queries.as_subclass(Tensor).clone()
            feed(cache, keys[:, :, :30], values[:, :, :30], 0)
            with pytest.raises(ValueError, match="head_dim"):
                feed(cache, keys[:, :, :30, :8], values[:, :, :30], 1)
        assert torch.equal(cache.layers[0].state.observed.queries.as_subclass(Tensor), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    """Host memory is pinned, and copies beside the computation change no token."""
    model = tiny_llama().cuda()
    ids, turn = prompt(200).cuda(), prompt(30, seed=1).cuda()
    texts = []
    for offloading in (False, True):
        cache = NexusQuantCache("balanced", config=model.config, offloading=offloading, **SMALL)
        text = generate(model, ids, cache, 40)
        if offloading:
            assert all(x.is_pinned() for layer in cache.layers for x in codes_of(layer))
            cache.offload()
        texts.append(generate(model, torch.cat([text, turn], 1), cache, 40))
    assert torch.equal(*texts)
