"""A slow model of `NexusQuantCache` that keeps every exact token for ever.

`OracleCache` packs nothing into buffers and plans nothing ahead.  It remembers, for each token, what came in,
what attention shall see of it, and which heads still have it.  The real cache must return the same keys and
values, bit for bit, after any sequence of updates and operations.  Codec, rotary phase and the scores of
policies are trusted here; they have tests of their own.

A layer's *sinks* are exact, its *body* is coded, its *tail* is exact.  Rows are modelled one by one, since no
row may depend on its neighbours.  Positions count from the first column of the batch, pads included.
"""

import copy
from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from nexusquant_cache import DEFAULT_POLICY, CacheConfig, NexusQuantCache
from nexusquant_cache.cache.rotary import rotary_phase
from nexusquant_cache.codec.base import PackedVectors, VectorCodec
from nexusquant_cache.codec.rotation import PrincipalRotation
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.policy import EvictionPolicy, ScoreInputs
from nexusquant_cache.presets import resolve_preset

MakeCodec = Callable[[str, int, int], VectorCodec]


class Counter:
    """How many vectors were encoded, and how many rows fitted, by all codecs of a cache."""

    def __init__(self) -> None:
        self.encoded_vectors = self.fitted_rows = 0


class CountingCodec(VectorCodec):
    """Counts what is given to the codec it wraps."""

    def __init__(self, inner: VectorCodec, counter: Counter) -> None:
        self.inner, self.counter = inner, counter

    def fit(self, vectors: Tensor) -> VectorTransform:
        self.counter.fitted_rows += vectors.shape[0]
        return self.inner.fit(vectors)

    def encode(self, vectors: Tensor, transform: VectorTransform) -> PackedVectors:
        packed = self.inner.encode(vectors, transform)
        self.counter.encoded_vectors += packed.scales.numel()
        return packed

    def decode(self, packed: PackedVectors, transform: VectorTransform) -> Tensor:
        return self.inner.decode(packed, transform)

    def for_tokens(self, tokens: int) -> VectorCodec:
        chosen = copy.copy(self)
        chosen.inner = self.inner.for_tokens(tokens)
        return chosen

    @property
    def bytes_per_vector(self) -> int:
        return self.inner.bytes_per_vector


class CountingCache(NexusQuantCache):
    """The real cache, counting what it encodes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.counter = Counter()
        super().__init__(*args, **options)

    def make_codec(self, side: str, head_dim: int, layer_idx: int) -> VectorCodec:
        return CountingCodec(super().make_codec(side, head_dim, layer_idx), self.counter)


class Row:
    """One row of the batch in one layer: all tokens ever seen and not cropped, ``[kv_heads, seen, ...]``."""

    def __init__(self, keys: Tensor, values: Tensor, code_bytes: int = 0) -> None:
        self.exact = [keys, values]  # as they came
        self.shown = [keys, values]  # as attention sees them
        self.alive = torch.ones(keys.shape[:2], dtype=torch.bool)  # what each head still has
        self.codes = torch.zeros(*keys.shape[:2], code_bytes, dtype=torch.uint8)  # of coded tokens: words and scale
        self.sinks_from = 0
        self.transforms: list[VectorTransform] = []  # of keys and values; none before the first compression

    def append(self, keys: Tensor, values: Tensor) -> None:
        new = Row(keys, values, self.codes.shape[-1])
        self.exact = [torch.cat(pair, 1) for pair in zip(self.exact, new.exact, strict=True)]
        self.shown = [torch.cat(pair, 1) for pair in zip(self.shown, new.shown, strict=True)]
        self.alive = torch.cat([self.alive, new.alive], 1)
        self.codes = torch.cat([self.codes, new.codes], 1)

    def crop(self, stop: int) -> None:
        self.exact, self.shown = ([x[:, :stop] for x in each] for each in (self.exact, self.shown))
        self.alive, self.codes = self.alive[:, :stop], self.codes[:, :stop]

    def of_alive(self, x: Tensor) -> Tensor:
        """Return the part of ``x`` that the heads still have, ``[kv_heads, alive, ...]``."""
        return torch.stack([x[head, alive] for head, alive in enumerate(self.alive)])


class OracleLayer(CacheLayerMixin):
    """One full-attention layer of the slow model."""

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, owner: "OracleCache", layer_idx: int) -> None:
        self.owner, self.layer_idx = owner, layer_idx
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self.rows: list[Row] = []
        self.asked: list[VectorCodec] = []  # may leave something open until the first tokens are coded
        self.codecs: list[VectorCodec] = []
        self.record_past = self.expects_prompt = self.updated_since_crop = False
        self.pending_from: int | None = None  # tokens seen before the first uncompressed update of several
        self.tail_from = 0  # position of the first token of the tail
        self.first = True  # nothing is coded yet
        self.phase: Any = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        sides = (("keys", key_states), ("values", value_states))
        self.asked = [self.owner.make_codec(side, states.shape[-1], self.layer_idx) for side, states in sides]
        self.rows = [Row(*pair) for pair in zip(key_states[:, :, :0], value_states[:, :, :0], strict=True)]
        self.is_initialized = True

    # What is there

    @property
    def state(self) -> "OracleLayer":
        """What it holds, under the name that the real layer has for it."""
        return self

    @property
    def seen(self) -> int:
        return self.rows[0].alive.shape[1] if self.rows else 0

    @property
    def kept(self) -> int:
        counts = {int(head.sum()) for row in self.rows for head in row.alive}
        assert len(counts) <= 1, f"transformers has one mask for all, but these numbers are kept: {counts}"
        return counts.pop() if counts else 0

    def is_exact(self) -> bool:
        """Tell whether codes decode to the same bits whatever they are decoded with: a product with axes does not."""
        return not any(isinstance(each.rotation, PrincipalRotation) for row in self.rows for each in row.transforms)

    def visible(self) -> list[Tensor]:
        """Return keys and values as attention sees them, in order of position."""
        return [torch.stack([row.of_alive(row.shown[side]) for row in self.rows]) for side in (0, 1)]

    def positions(self) -> Tensor:
        """Return the positions of all kept tokens, ``[batch, kv_heads, kept]``."""
        order = torch.arange(self.seen)
        return torch.stack([row.of_alive(order.expand(row.alive.shape)) for row in self.rows])

    def is_sink(self, row: Row, position: int) -> bool:
        return not self.first and 0 <= position - row.sinks_from < self.owner.cache_config.sink_tokens

    def body_positions(self) -> list[list[list[int]]]:
        """Return the positions of the coded tokens of each row and head."""
        return [
            [
                [at for at in range(self.tail_from) if alive[at] and not self.is_sink(row, at)]
                for alive in row.alive.tolist()
            ]
            for row in self.rows
        ]

    def body_codes(self) -> Tensor:
        """Return the codes that the cache must hold, as first written, ``[batch, kv_heads, coded, bytes]``."""
        return torch.stack(
            [
                torch.stack([codes[positions] for codes, positions in zip(row.codes, heads, strict=True)])
                for row, heads in zip(self.rows, self.body_positions(), strict=True)
            ]
        )

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return self.visible()[0] if self.rows else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return self.visible()[1] if self.rows else None

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """Return the same, under the name in older transformers."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return what will be kept and what will be gone in the coming update."""
        candidates, count = 0, 0
        if not self.recording and self.seen > 0 and (query_length == 1 or self.should_compress_early()):
            candidates, count = self.plan()
        kept = self.kept - (candidates - count)
        return kept + query_length, self.seen - kept

    # Updates

    @property
    def recording(self) -> bool:
        return self.record_past and not self.updated_since_crop

    def activate_past_recording(self) -> None:
        self.record_past = self.expects_prompt = True
        self.updated_since_crop = False

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        if self.record_past and self.updated_since_crop:
            self.record_past = False  # whoever asked for it does not crop any more
        if not self.recording and self.seen > 0:
            if tokens == 1:
                self.make_room()
            else:
                self.early_compress()
        if tokens > 1 and self.pending_from is None:
            self.pending_from = self.seen
        for row, *new in zip(self.rows, key_states.detach().clone(), value_states.detach().clone(), strict=True):
            row.append(*new)
        self.updated_since_crop = self.record_past
        keys, values = self.visible()
        return keys, values

    def compress(self) -> None:
        if self.pending_from is not None:
            self.make_room()

    # Compression

    def candidates(self) -> int:
        settings = self.owner.cache_config
        sinks = settings.sink_tokens if self.first else 0
        return self.seen - self.tail_from - settings.residual_length - sinks

    def plan(self) -> tuple[int, int]:
        """Return how many tokens would be taken out of the tail now, and how many of them encoded."""
        settings, candidates = self.owner.cache_config, self.candidates()
        if self.pending_from is not None and candidates >= settings.min_tokens:
            return candidates, ceil(self.keep_ratio() * candidates)
        if self.pending_from is None and candidates >= (settings.min_tokens if self.first else settings.flush_length):
            return candidates, candidates
        return 0, 0

    def keep_ratio(self) -> float:
        """Return the part of a prompt to keep: all of it while it is unknown, or still kept, what of it is padding."""
        if not self.owner.knows_padding(self.seen):
            return 1
        still_padded = not self.first and self.seen - self.kept < max(self.owner.pads)
        return 1 if still_padded else self.owner.cache_config.keep_ratio

    def make_room(self) -> None:
        candidates, count = self.plan()
        if candidates > 0:
            self.owner.note_refused_eviction(self, candidates)
            self.encode(candidates, count)
        self.pending_from = None

    def should_compress_early(self) -> bool:
        """Tell whether enough tokens wait during a prefill; the first time they must take all pads with them."""
        candidates = self.candidates()
        if self.owner.when != "during_prefill" or self.pending_from is None:
            return False
        if candidates < self.owner.cache_config.min_tokens or not self.owner.has_text_in_all_rows(self.seen):
            return False
        evicted = candidates - ceil(self.keep_ratio() * candidates)
        return not self.first or self.keep_ratio() == 1 or evicted >= max(self.owner.pads)

    def early_compress(self) -> None:
        candidates_wait = self.record_past and not self.expects_prompt
        if not candidates_wait and self.should_compress_early():
            self.make_room()

    def encode(self, candidates: int, count: int) -> None:
        """Take tokens out of the tail: encode the best of them, evict the others."""
        settings = self.owner.cache_config
        if self.first:
            self.phase = self.owner.make_phase(self.layer_idx, self.seen)
            self.owner.settle_padding(len(self.rows))
            self.codecs = [codec.for_tokens(count) for codec in self.asked]
            code_bytes = sum(codec.bytes_per_vector for codec in self.codecs)
            for row in self.rows:
                row.codes = torch.zeros(*row.alive.shape, code_bytes, dtype=torch.uint8)
        stop = self.seen - settings.residual_length
        assert self.owner.pads is not None
        for row, pads in zip(self.rows, self.owner.pads, strict=True):
            if self.first:
                row.sinks_from = min(pads, candidates)
            sinks = range(row.sinks_from, row.sinks_from + settings.sink_tokens) if self.first else ()
            free = [at for at in range(self.tail_from, stop) if at not in sinks]
            assert len(free) == candidates
            chosen = self.choose(row, pads, free, count)
            for head, positions in enumerate(chosen):
                row.alive[head, free] = False
                row.alive[head, positions] = True
            self.show_decoded(row, pads, chosen)
        self.first, self.tail_from = False, stop

    def choose(self, row: Row, pads: int, free: list[int], count: int) -> list[list[int]]:
        """Return the positions that each head keeps of the free ones: pads go first, then what scores least."""
        heads = row.alive.shape[0]
        evicted = len(free) - count
        evicted_pads = [at for at in free if at < pads][:evicted]
        left = [at for at in free if at not in evicted_pads]
        if len(left) == count:
            return [left] * heads
        real = [at for at in left if at >= pads]
        kept_pads = [at for at in left if at < pads]
        assert not kept_pads, "no text is evicted before the last pad"
        start = max(pads, self.tail_from)
        order = range(start, self.seen)
        inputs = ScoreInputs(
            keys=row.exact[0][None, :, start:],
            values=row.exact[1][None, :, start:],
            positions=torch.tensor(order) - pads,
            protected=torch.tensor([at not in real for at in order]),
            layer_idx=self.layer_idx,
            phase=self.phase,
        )
        scores = self.owner.make_policy(self.layer_idx).score(inputs)[0].tolist()
        return [sorted(sorted(real, key=lambda at: (-each[at - start], at))[:count]) for each in scores]

    def show_decoded(self, row: Row, pads: int, chosen: list[list[int]]) -> None:
        """Encode the chosen tokens of each head, and let attention see what their codes say."""
        sides = self.pick(row, pads, chosen)
        if self.first:
            real = [[at for at in positions if at >= pads] for positions in chosen]
            if not any(real):
                recent = range(self.seen - self.owner.cache_config.residual_length, self.seen)
                real = [[at for at in recent if at >= pads]] * len(chosen)
            if not any(real):
                real = chosen  # a row of pads alone
            pairs = zip(self.codecs, self.pick(row, pads, real), strict=True)
            row.transforms = [codec.fit(vectors) for codec, vectors in pairs]
            self.owner.fitted_rows += len(row.transforms)
        codes, decoded = [], []
        for codec, transform, vectors in zip(self.codecs, row.transforms, sides, strict=True):
            packed = codec.encode(vectors, transform)
            codes += [packed.words[0], packed.scales[0, :, :, None]]
            decoded.append(codec.decode(packed, transform))
            self.owner.encoded_vectors += packed.scales.numel()
        if self.phase is not None:
            decoded[0] = self.phase.rotate(decoded[0], self.turned(pads, chosen))
        for head, positions in enumerate(chosen):
            for side in (0, 1):
                row.shown[side] = row.shown[side].clone()
                row.shown[side][head, positions] = decoded[side][0, head].to(row.shown[side].dtype)
            row.codes[head, positions] = torch.cat(codes, -1)[head]

    def pick(self, row: Row, pads: int, positions: list[list[int]]) -> list[Tensor]:
        """Return exact keys (without their rotary phase) and values at these positions, ``[1, kv_heads, n, ...]``."""
        keys, values = (
            torch.stack([x[head, at] for head, at in enumerate(positions)]).contiguous()[None] for x in row.exact
        )
        if self.phase is not None:
            keys = self.phase.rotate(keys.float(), self.turned(pads, positions), inverse=True)
        return [keys, values]

    def turned(self, pads: int, positions: list[list[int]]) -> Tensor:
        """Return by how many steps the keys at these positions are turned: all pads are at step 0."""
        return (torch.tensor(positions, dtype=torch.int64) - pads).clamp_min(0)[None]

    # Cache operations

    def crop_to(self, stop: int, body: int) -> None:
        """Forget the tokens from ``stop`` on; if this reaches the body, leave each head its newest ``body`` codes."""
        for row, heads in zip(self.rows, self.body_positions(), strict=True):
            if stop < self.tail_from:
                for head, positions in enumerate(heads):
                    below = [at for at in positions if at < stop]
                    row.alive[head, below[: len(below) - body]] = False
            row.crop(stop)
        self.tail_from = min(self.tail_from, stop)
        if stop <= self.owner.cache_config.sink_tokens:  # never within the sinks of padded rows, see `OracleCache`
            self.tail_from, self.first, self.phase = 0, True, None
            for row in self.rows:
                row.transforms, row.sinks_from = [], 0
                assert row.alive.all(), "sinks are never evicted"
        if self.pending_from is not None and stop <= self.pending_from:
            self.pending_from = None

    def after_crop(self) -> None:
        """Do what waited for the crop, if a past is recorded."""
        if not self.is_initialized:
            return  # the prompt is still to come
        self.updated_since_crop = False
        if self.record_past:
            if not self.expects_prompt:
                self.pending_from = None  # no prompt: candidates were verified
            self.expects_prompt = False
            self.make_room()

    def take_rows(self, rows: list[int]) -> None:
        self.rows = [copy.deepcopy(self.rows[row]) for row in rows] if self.rows else []


class OracleCache(DynamicCache):
    """The slow model of a whole cache; made from the same arguments as `NexusQuantCache`.

    Args:
        make_codec: In place of `NexusQuantCache.make_codec`.
    """

    def __init__(
        self,
        preset: str | CacheConfig = "balanced",
        *,
        config: PreTrainedConfig | None = None,
        policy: EvictionPolicy | None = None,
        attention_mask: Tensor | None = None,
        when: str = "post_prefill",
        make_codec: MakeCodec | None = None,
        **overrides: Any,
    ) -> None:
        self.cache_config = resolve_preset(preset).override(overrides)
        self.policy, self.when = policy, when
        self.model_config = None if config is None else config.get_text_config(decoder=True)
        self.make_codec = make_codec or NexusQuantCache(self.cache_config).make_codec
        self.encoded_vectors = self.fitted_rows = 0
        self.warned: list[str] = []
        self.asked_to_record = False
        self.forget_padding()
        Cache.__init__(self, layers=self.make_layers())
        if attention_mask is not None:
            self.set_attention_mask(attention_mask)

    def make_layers(self) -> list[Any]:
        if self.model_config is None:
            return []
        return [
            OracleLayer(self, index) if type(layer) is DynamicLayer else layer
            for index, layer in enumerate(DynamicCache(config=self.model_config).layers)
        ]

    def make_policy(self, layer_idx: int) -> EvictionPolicy:
        del layer_idx
        return self.policy or DEFAULT_POLICY

    def make_phase(self, layer_idx: int, seen: int) -> Any:
        if self.model_config is None or not self.cache_config.remove_rope:
            return None
        return rotary_phase(self.model_config, layer_idx, seen)

    @property
    def compressed(self) -> list[OracleLayer]:
        """The layers of our kind."""
        return [layer for layer in self.layers if isinstance(layer, OracleLayer)]

    @property
    def used(self) -> list[OracleLayer]:
        """Those of them that have seen tokens."""
        return [layer for layer in self.compressed if layer.seen]

    # Padding

    def forget_padding(self) -> None:
        self.stated: list[int] | None = None  # pads of each row of the mask
        self.pads: list[int] | None = None  # pads of each row of the batch, once known
        self.known_from = 0  # tokens seen when that became known
        self.beginning: list[Tensor] = []  # the keys of each row at the first attention layer, while unknown
        self.is_certain = True
        self.has_warned = False  # once for each prompt

    def set_attention_mask(self, attention_mask: Tensor) -> None:
        self.stated = [row.index(1) for row in attention_mask.long().tolist()]
        self.pads, self.known_from, self.beginning, self.is_certain = None, 0, [], True
        if self.used:
            self.state_pads(len(self.used[0].rows))

    def state_pads(self, batch: int) -> None:
        """Let each row of the mask stand for as many rows of the batch as it takes."""
        assert self.stated is not None
        self.pads = [pads for pads in self.stated for _ in range(batch // len(self.stated))]

    def settle_padding(self, batch: int) -> None:
        """Treat all tokens as text from now on if nothing is known when the first ones are coded."""
        if self.pads is None:
            self.pads, self.beginning, self.is_certain = [0] * batch, [], False

    def note_refused_eviction(self, layer: OracleLayer, candidates: int) -> None:
        """Warn if tokens stay only because the padding is unknown."""
        would_evict = layer.pending_from is not None and ceil(self.cache_config.keep_ratio * candidates) < candidates
        if would_evict and self.stated is None and not self.knows_padding(layer.seen) and not self.has_warned:
            self.has_warned = True
            self.warned.append("padding")

    def observe(self, key_states: Tensor) -> None:
        """Find out how many pads the rows begin with; all layers go by the keys of the first."""
        if self.stated is not None:
            if self.pads is None:
                self.state_pads(len(key_states))
        elif self.pads is None:
            new = list(key_states.detach().clone())
            pairs = zip(self.beginning, new, strict=True)
            self.beginning = [torch.cat(pair, 1) for pair in pairs] if self.beginning else new
            self.recognise()

    def has_text_in_all_rows(self, seen: int) -> bool:
        """Tell whether no row consisted of pads alone when so many tokens had been seen."""
        return self.pads is not None and seen >= self.known_from and seen > max(self.pads)

    def knows_padding(self, seen: int) -> bool:
        """Tell whether it was known when so many tokens had been seen where the text begins in each row."""
        return self.is_certain and self.has_text_in_all_rows(seen)

    def recognise(self) -> None:
        """Take equal leading keys for pads: those share token and position, and text does not.

        Without a run of them nothing can be told, unless there is one row only, or all rows begin alike.  A single pad
        next to a row with more is not modelled here: give the mask.
        """
        runs = [int((row == row[:, :1]).all(-1).all(0).long().cumprod(0).sum()) for row in self.beginning]
        seen = self.beginning[0].shape[1]
        if seen in runs:
            return  # the row may go on with pads
        firsts = [row[:, 0] for row in self.beginning]
        pad_keys = [first for first, run in zip(firsts, runs, strict=True) if run > 1]
        one_pad = all(torch.equal(key, pad_keys[0]) for key in pad_keys)
        alike = all(torch.equal(first, firsts[0]) for first in firsts)
        self.is_certain = one_pad if pad_keys else alike
        self.pads = [run if pad_keys and one_pad and run > 1 else 0 for run in runs]
        self.known_from, self.beginning = seen, []

    # The interface of transformers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        while self.model_config is None and len(self.layers) <= layer_idx:
            self.layers.append(OracleLayer(self, len(self.layers)))
            if self.asked_to_record:
                self.layers[-1].activate_past_recording()
        layer = self.layers[layer_idx]
        if layer_idx == min(index for index, each in enumerate(self.layers) if isinstance(each, CacheLayerMixin)):
            self.observe(key_states)
        if isinstance(layer, OracleLayer) and key_states.shape[2] > 1:
            for earlier in self.compressed[: self.compressed.index(layer)]:
                earlier.early_compress()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def compress(self) -> None:
        for layer in self.used:
            layer.compress()

    def activate_past_recording(self) -> None:
        for layer in self.used:
            layer.early_compress()  # the last layer may still have been waiting
        self.asked_to_record = True
        super().activate_past_recording()

    def reset(self) -> None:
        self.forget_padding()
        self.asked_to_record = False
        fresh = self.make_layers() or self.layers
        self.layers = [
            old if isinstance(old, OracleLayer) else new for old, new in zip(self.layers, fresh, strict=True)
        ]
        for layer in self.compressed:
            layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding of older transformers gives a tensor
        if tokens_to_remove > 0:
            msg = f"the number of tokens to remove is given as 0 or negative, not {tokens_to_remove}"
            raise ValueError(msg)
        copy.deepcopy(self)._crop(tokens_to_remove)  # so that nothing has changed if this raises
        self._crop(tokens_to_remove)

    def _crop(self, tokens_to_remove: int) -> None:
        if len({layer.pending_from is None for layer in self.used}) > 1:  # the last layer waits, the others did not
            for layer in self.used:
                layer.early_compress()
        if self.used:
            seen = self.used[0].seen
            self._crop_to(max(seen + tokens_to_remove, 0))
        for layer in self.layers:
            if isinstance(layer, OracleLayer):
                layer.after_crop()
            else:
                layer.crop(tokens_to_remove)

    def _crop_to(self, stop: int) -> None:
        used, body = self.used, 0
        assert len({(layer.seen, layer.tail_from, layer.first) for layer in used}) == 1
        if stop < used[0].tail_from:
            sinks = self.cache_config.sink_tokens
            padded = self.pads is not None and any(self.pads)
            if stop and padded and any(stop < row.sinks_from + sinks for row in used[0].rows):
                msg = f"{stop} tokens end before the sinks of each row do"
                raise UnsupportedError(msg)
            below = [
                len([at for at in positions if at < stop])
                for layer in used
                for heads in layer.body_positions()
                for positions in heads
            ]
            body = min(below)
            if max(below) > body:
                self.warned.append("crop")
        for layer in used:
            layer.crop_to(stop, body)
        self.known_from = min(self.known_from, stop)
        if self.beginning:
            self.beginning = [keys[:, :stop] for keys in self.beginning] if stop else []
        if stop == 0:  # as new, but for what the user said of these rows
            self.stated = None if self.stated is None else self.pads
            self.pads, self.known_from, self.is_certain = None, 0, True

    def take_rows(self, rows: list[int]) -> None:
        """Let the batch consist of these rows."""
        if self.pads is not None:
            self.pads = [self.pads[row] for row in rows]
        self.beginning = [self.beginning[row] for row in rows] if self.beginning else []
        for layer in self.compressed:
            layer.take_rows(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.take_rows(beam_idx.tolist())
        for layer in self.layers:
            if not isinstance(layer, OracleLayer):
                layer.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.take_rows(indices.tolist())
        for layer in self.layers:
            if not isinstance(layer, OracleLayer):
                layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.used:
            self.take_rows([row for row in range(len(self.used[0].rows)) for _ in range(repeats)])
        for layer in self.layers:
            if not isinstance(layer, OracleLayer):
                layer.batch_repeat_interleave(repeats)
