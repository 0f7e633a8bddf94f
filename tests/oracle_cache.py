"""A slow model of `NexusQuantCache` that keeps every exact token for ever.

`OracleCache` packs nothing into buffers and plans nothing ahead.  It remembers, for each token, what came in, what
attention shall read of it, and which heads still have it.  Attention over what its `update` returns must give what it
gives over what the real cache returns, whatever the mask, and the real cache must store the same tokens, bit for bit,
after any sequence of updates and operations.  Codec, rotary phase and the scores of policies are trusted here; they
have tests of their own.

A layer's *sinks* are exact, its *body* is coded, its *tail* is exact.  Rows are modelled one by one, since no row may
depend on its neighbours.  Positions count from the first column of the batch, pads included.  Layers are modelled one
by one too: what one has seen of attention, and so what it evicts, is nothing to another.
"""

import copy
from collections.abc import Callable
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from nexusquant_cache import DEFAULT_BESIDE_WINDOWS, DEFAULT_POLICY, CacheConfig, NexusQuantCache
from nexusquant_cache.cache.rotary import rotary_phase
from nexusquant_cache.codec.base import PackedVectors, VectorCodec
from nexusquant_cache.codec.held import HeldTokens
from nexusquant_cache.codec.rotation import PrincipalRotation
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.layer import observations
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

    def for_tokens(self, vectors: Tensor, kept: int) -> VectorCodec:
        chosen = copy.copy(self)
        chosen.inner = self.inner.for_tokens(vectors, kept)
        return chosen

    def with_more_bits(self, bits: float = 1.0) -> VectorCodec | None:
        more, chosen = self.inner.with_more_bits(bits), copy.copy(self)
        if more is None:
            return None
        chosen.inner = more
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


def spread(held: HeldTokens) -> list[Tensor]:
    """Return keys and values of all tokens seen, 0 where there are none, in order of position."""
    found = []
    for decoded in (held.decoded_keys(), held.decoded_values()):
        places = held.columns.expand(decoded.shape[:3])
        if held.visible is not None:
            places = places.masked_fill(~held.visible[:, :, 0, 0], held.seen)
        out = decoded.new_zeros(*decoded.shape[:2], held.seen + 1, decoded.shape[3])
        found.append(out.scatter_(2, places[..., None].expand(decoded.shape), decoded)[:, :, : held.seen])
    return found


# What attention gets


class MarkedKeys(Tensor):
    """Keys of all tokens seen, of which those that a head has evicted are NaN; and whatever is computed from them.

    So nothing has to be known of the way to attention: a logit is NaN where its key is, however the keys have been
    repeated, transposed, cast or joined, and whatever is added to the logits.  A softmax takes it for minus infinity,
    and its weights are plain tensors.  `scaled_dot_product_attention` is written out here.
    """

    update: "Update"

    @staticmethod
    def of(keys: Tensor, update: "Update") -> "MarkedKeys":
        marked = keys.as_subclass(MarkedKeys)
        marked.update = update
        return marked

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        del types
        given = args, kwargs or {}
        marked = next(x for x in tree_flatten(given)[0] if isinstance(x, cls))
        plain_args, plain_kwargs = tree_map_only(cls, lambda x: x.as_subclass(Tensor), given)
        name = func.__name__
        if name == "scaled_dot_product_attention":
            return marked.update.attention(func, plain_args[:3], *plain_args[3:], **plain_kwargs)
        if name == "softmax" and marked.update.queries is not None:
            marked.update.note_logits(plain_args[0])
        if name in {"softmax", "max", "amax", "logsumexp"}:
            return func(without_marks(plain_args[0]), *plain_args[1:], **plain_kwargs)
        if (
            name in {"matmul", "__matmul__"}
            and not isinstance(args[0], cls)
            and marked.update.returned(plain_args[1].mT)
        ):
            marked.update.queries = plain_args[0]
        if name in {"mul", "__mul__", "div", "__truediv__"}:
            marked.update.note_factor(args[1] if "mul" in name else 1 / args[1])
        result = func(*plain_args, **plain_kwargs)
        floating = lambda x: cls.of(x, marked.update) if x.is_floating_point() else x  # noqa: E731 - short, used once
        return tree_map_only(Tensor, floating, result)


def without_marks(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits.isnan(), -torch.inf)


class Update:
    """One update of a layer, which attention may still see."""

    def __init__(self, layer: "OracleLayer", fresh: int) -> None:
        self.layer, self.fresh, self.is_seen = layer, fresh, False
        self.queries: Tensor | None = None  # of attention that is computed in steps
        self.scale: float | None = None

    def returned(self, keys: Tensor) -> bool:
        """Tell whether these may be the keys that the update has returned, and not what a model has made of them."""
        width = self.layer.rows[0].exact[0].shape[-1]
        return keys.ndim >= 4 and keys.shape[-2:] == (self.layer.seen, width)

    def note_factor(self, factor: float) -> None:
        """Take note of the first number that logits are multiplied with."""
        if self.queries is not None and self.scale is None:
            self.scale = float(factor)

    def see(self, queries: Tensor | None, visible: Tensor | None, scale: float | None) -> None:
        """Let the layer see the attention to the new tokens, once.

        Args:
            queries: Those of the new tokens.
            visible: Which of the new tokens which query attends to, ``[b or 1, heads or 1, queries, fresh]``.
            scale: What logits are multiplied with; by default that of the head's width.
        """
        if self.is_seen:
            return
        self.is_seen = True
        pads = None
        if visible is not None and self.fresh > 1:
            pads = ~visible.flatten(1, 2).any(1)
        if queries is not None and queries.shape[2] != self.fresh:  # query heads of a group, one behind the other
            queries = queries.flatten(1, 2)[:, :, None]
        if queries is not None and scale is not None:
            queries = queries * (scale * queries.shape[-1] ** 0.5)
        self.layer.see(self.fresh, queries, pads)

    def note_logits(self, logits: Tensor) -> None:
        """See what the softmax of a model gets, perhaps with logits of no token behind the others."""
        seen = self.layer.seen
        newest = logits[..., seen - self.fresh : seen]
        self.see(self.queries, newest > torch.finfo(newest.dtype).min / 2, self.scale or 1.0)

    def attention(
        self, func: Any, states: tuple[Tensor, ...], mask: Tensor | None = None, dropout: float = 0.0, **how: Any
    ) -> Tensor:
        """Stand for `scaled_dot_product_attention`: it is left to torch as long as nothing has been evicted."""
        assert dropout == how.pop("dropout_p", 0.0) == 0.0
        (q, k, v), mask, scale = states, how.pop("attn_mask", mask), how.get("scale")
        if not self.returned(k):
            return func(q, k, v, mask, 0.0, **how)
        visible = mask if mask is None or mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        self.see(q, None if visible is None else visible[..., -self.fresh :], scale)
        if not bool(k.isnan().any()):
            return func(q, k, v, mask, 0.0, **how)
        if how.get("is_causal"):
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        logits = without_marks(q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale))
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        return (logits.softmax(-1).nan_to_num(0.0) @ v.float()).to(q.dtype)


# What is held


class Row:
    """One row of the batch in one layer: all tokens ever seen and not cropped, ``[kv_heads, seen, ...]``."""

    def __init__(self, keys: Tensor, values: Tensor, code_bytes: int = 0) -> None:
        self.exact = [keys, values]  # as they came
        self.shown = [keys, values]  # as attention sees them
        self.alive = torch.ones(keys.shape[:2], dtype=torch.bool)  # what each head still attends to
        self.pads = [False] * keys.shape[1]  # as the mask has said, of each token
        self.codes = torch.zeros(*keys.shape[:2], code_bytes, dtype=torch.uint8)  # of coded tokens: words and scale
        self.sinks: list[int] = []  # their positions
        self.transforms: list[VectorTransform] = []  # of keys and values; none before the first compression

    def append(self, keys: Tensor, values: Tensor) -> None:
        new = Row(keys, values, self.codes.shape[-1])
        self.exact = [torch.cat(pair, 1) for pair in zip(self.exact, new.exact, strict=True)]
        self.shown = [torch.cat(pair, 1) for pair in zip(self.shown, new.shown, strict=True)]
        for name in ("alive", "codes"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(new, name)], 1))
        self.pads = self.pads + new.pads

    def crop(self, stop: int) -> None:
        self.exact, self.shown = ([x[:, :stop] for x in each] for each in (self.exact, self.shown))
        for name in ("alive", "codes"):
            setattr(self, name, getattr(self, name)[:, :stop])
        self.pads = self.pads[:stop]

    @property
    def origin(self) -> int:
        """The position from which the row's rotary positions count."""
        return self.sinks[0] if self.sinks else 0


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
        self.longest = self.shorter = 0  # tokens of the longest update, and how many in a row were shorter
        self.before: dict[str, Any] = {}  # all that was there before the last update
        self.tail_from = 0  # position of the first token of the tail
        self.first = True  # nothing is coded yet
        self.is_padded = False  # there were pads among the first tokens that were coded
        self.phase: Any = None
        self.seen_attention = (0, 0)  # to which tokens attention was seen
        self.queries: Tensor | None = None  # [batch, query_heads, seen, head_dim], of unknown ones anything
        self.known = self.known_before = (0, 0)  # of which tokens the queries are known, and were before the update
        self.far: dict[tuple[int, int, int], float] = {}  # by row, head and position: the greatest attention from afar
        self.far_before = self.far

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
    def policy(self) -> EvictionPolicy:
        return self.owner.make_policy(self.layer_idx)

    @property
    def seen(self) -> int:
        return self.rows[0].alive.shape[1] if self.rows else 0

    @property
    def kept(self) -> int:
        """Tokens kept, on average over rows and heads."""
        return round(float(self.alive().double().sum(-1).mean())) if self.rows else 0

    @property
    def is_whole(self) -> bool:
        """Whether all heads attend to all tokens."""
        return all(bool(row.alive.all()) for row in self.rows)

    def is_exact(self) -> bool:
        """Tell whether codes decode to the same bits whatever they are decoded with: a product with axes does not."""
        return not any(isinstance(each.rotation, PrincipalRotation) for row in self.rows for each in row.transforms)

    def visible(self) -> list[Tensor]:
        """Return keys and values of all tokens as attention sees them, 0 for those that are gone."""
        shown = [torch.stack([row.shown[side] for row in self.rows]) for side in (0, 1)]
        return [x.masked_fill(~self.alive()[..., None], 0) for x in shown]

    def positions(self) -> Tensor:
        """Return the positions of all kept tokens, as `tiny.kept_positions` does."""
        order = torch.arange(self.seen).expand(self.alive().shape).masked_fill(~self.alive(), -1)
        return order.sort(-1).values[..., -int(self.alive().sum(-1).max()) :]

    def alive(self) -> Tensor:
        """Return what each head attends to, ``[batch, kv_heads, seen]``."""
        return torch.stack([row.alive for row in self.rows])

    def body_positions(self) -> list[list[list[int]]]:
        """Return the positions of the coded tokens of each row and head."""
        return [
            [[at for at in range(self.tail_from) if kept[at] and at not in row.sinks] for kept in row.alive.tolist()]
            for row in self.rows
        ]

    def body_codes(self) -> Tensor:
        """Return the codes that the cache must hold, as first written, head after head: ``[coded, bytes]``."""
        return torch.cat(
            [
                codes[positions]
                for row, heads in zip(self.rows, self.body_positions(), strict=True)
                for codes, positions in zip(row.codes, heads, strict=True)
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
        """Return the number of all tokens, kept or not: the mask has a column for each."""
        return self.seen + query_length, 0

    # Updates

    @property
    def recording(self) -> bool:
        return self.record_past and not self.updated_since_crop

    def activate_past_recording(self) -> None:
        self.record_past = self.expects_prompt = True
        self.updated_since_crop = False
        self.shorter = 0

    def is_step(self, tokens: int) -> bool:
        """Tell whether an update of so many tokens generates: one token, or the second in a row of shorter updates."""
        return tokens == 1 or (self.shorter > 0 and tokens < self.longest)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the tokens, and return all that were ever seen."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        self.prepare(tokens)
        self.note_update(tokens)
        for row, *new in zip(self.rows, key_states.detach().clone(), value_states.detach().clone(), strict=True):
            row.append(*new)
        keys, values = (torch.stack([row.shown[side] for row in self.rows]) for side in (0, 1))
        return MarkedKeys.of(keys.masked_fill(~self.alive()[..., None], torch.nan), Update(self, tokens)), values

    def prepare(self, tokens: int) -> None:
        """Compress what an update of so many tokens begins with, which stays if the update fails."""
        self.known_before, self.far_before = self.known, self.far
        if self.is_due(tokens) and self.pending_from is not None:
            waiting = [each for each in self.owner.used if each.pending_from is not None and each.is_due(tokens)]
            self.owner.compress_together(waiting)
        elif self.is_due(tokens):
            self.encode_waiting()
        elif not self.is_due(tokens) and self.seen:
            self.encode_early()

    def is_due(self, tokens: int) -> bool:
        """Tell whether an update of so many tokens begins with a compression."""
        return self.seen > 0 and not self.recording and self.is_step(tokens)

    def note_update(self, tokens: int) -> None:
        self.before = copy.deepcopy({name: x for name, x in vars(self).items() if name not in {"owner", "before"}})
        self.record_past = self.updated_since_crop = self.recording
        if self.seen == 0:
            self.longest = self.shorter = 0
        is_step = tokens == 1 if self.record_past else self.is_step(tokens)
        if not self.record_past and tokens > 1:
            self.shorter = self.shorter + 1 if tokens < self.longest else 0
        elif not self.record_past and self.shorter < 2:
            self.shorter = 0  # one alone was a turn
        self.longest = max(self.longest, tokens)
        if not is_step and self.pending_from is None:
            self.pending_from = 0 if self.first else self.seen

    def see(self, fresh: int, queries: Tensor | None, pads: Tensor | None) -> None:
        """See the attention to the newest tokens."""
        before = self.seen - fresh
        start, stop = self.seen_attention
        self.seen_attention = (start if stop == before else before, self.seen)
        if pads is not None:
            for row, of_row in zip(self.rows, pads.expand(len(self.rows), -1).tolist(), strict=True):
                row.pads[before:] = of_row
        waits = self.pending_from is not None and self.owner.cache_config.keep_ratio < 1
        if queries is not None and waits and self.policy.wants_far_attention:
            self.far = self.farthest(queries)
        wanted = self.pending_from is not None and self.owner.cache_config.keep_ratio < 1 and self.policy.wants_queries
        if queries is not None and wanted:
            old = queries.new_zeros(*queries.shape[:2], 0, queries.shape[3]) if self.queries is None else self.queries
            self.queries = torch.cat([F.pad(old[:, :, :before], (0, 0, 0, max(before - old.shape[2], 0))), queries], 2)
            start = self.known[0] if self.known[1] == before else before
            self.known = (max(start, self.seen - self.policy.most_queries), self.seen)

    def farthest(self, queries: Tensor) -> dict[tuple[int, int, int], float]:
        """Return the greatest attention so far to each token of the prompt, with that of new queries.

        A query's softmax is over the tokens of the prompt, up to its own, without pads; of these it looks at those that
        are some tokens before it.  Not every query is asked.
        """
        found = dict(self.far)
        for index, row in enumerate(self.rows):
            group = queries.shape[1] // len(row.alive)
            for place in range(queries.shape[2]):
                own = self.seen - queries.shape[2] + place
                visible = [at for at in range(self.prompt_from, own + 1) if not row.pads[at]]
                every = observations.query_step(self.owner.cache_config.keep_ratio)
                if row.pads[own] or (len(visible) - 1) % every:
                    continue
                for head in range(queries.shape[1]):
                    keys = row.shown[0][head // group, visible].float()
                    weights = (keys @ queries[index, head, place].float() * keys.shape[-1] ** -0.5).softmax(0)
                    far = max(len(visible) - observations.FAR, 0)
                    for at, weight in zip(visible[:far], weights[:far].tolist(), strict=True):
                        key = index, head // group, at
                        found[key] = max(found.get(key, 0.0), weight)
        return found

    @property
    def prompt_from(self) -> int:
        """Position of the first token of the prompt that waits; of the next token if none does."""
        return self.seen if self.pending_from is None else self.pending_from

    @property
    def may_evict(self) -> bool:
        """Whether the attention to all tokens of the prompt, and of the tail, was seen."""
        start = min(self.prompt_from, self.tail_from)
        return 0 < self.seen == self.seen_attention[1] and self.seen_attention[0] <= start

    def stop_waiting(self) -> None:
        self.pending_from = None
        self.known = self.known_before = (0, 0)
        self.far = self.far_before = {}

    # Compression

    def candidates(self) -> int:
        settings = self.owner.cache_config
        sinks = settings.sink_tokens if self.first else 0
        return self.seen - self.tail_from - settings.residual_length - sinks

    def are_enough(self) -> bool:
        """Tell whether enough tokens wait to be encoded."""
        settings = self.owner.cache_config
        return self.candidates() >= (settings.min_tokens if self.first else settings.flush_length)

    def encode_waiting(self) -> None:
        """Encode what the tail need not hold, if that is enough."""
        if self.are_enough():
            self.encode()

    def has_choice(self) -> bool:
        """Tell whether some of the prompt that waits is dropped now."""
        is_coded = self.pending_from is not None and self.tail_from > self.pending_from
        if not is_coded or self.owner.cache_config.keep_ratio == 1:
            return False
        if all(self.budget(row) == len(self.real(row)) for row in self.rows):
            return False
        if not self.may_evict:
            self.owner.note_refused_eviction()
        return self.may_evict

    def should_compress_early(self) -> bool:
        """Tell whether enough tokens wait during a prefill, and of every row some that are no padding."""
        if self.owner.when != "during_prefill" or self.pending_from is None:
            return False
        settings = self.owner.cache_config
        has_text = all(row.pads.count(False) > settings.sink_tokens for row in self.rows)
        if self.first and settings.keep_ratio < 1 and self.candidates() <= settings.min_kept:
            return False  # it may be a short text
        return self.are_enough() and (has_text or not self.first)

    def encode_early(self) -> None:
        """Encode before the update of another layer, or before a past is recorded."""
        if not self.record_past and self.should_compress_early():
            self.encode()

    def encode(self) -> None:
        """Take tokens out of the tail, encoded."""
        settings = self.owner.cache_config
        start, stop = self.tail_from, self.seen - settings.residual_length
        if self.first:
            self.phase = self.owner.make_phase(self.layer_idx, self.seen)
            self.is_padded = settings.sink_tokens > 0 and any(any(row.pads[:stop]) for row in self.rows)
            for row in self.rows:
                row.sinks = sinks_of(row.pads[:stop], settings.sink_tokens)
        coded = [[at for at in range(start, stop) if at not in row.sinks] for row in self.rows]
        if self.first:
            self.codecs = self.chosen_codecs(coded)
            code_bytes = sum(codec.bytes_per_vector for codec in self.codecs)
            for row in self.rows:
                row.codes = torch.zeros(*row.alive.shape, code_bytes, dtype=torch.uint8)
        self.owner.encoded_vectors += sum(2 * len(self.rows[0].alive) * len(of_row) for of_row in coded)
        for row, of_row in zip(self.rows, coded, strict=True):
            self.show_decoded(row, of_row)
        self.first, self.tail_from = False, stop

    def chosen_codecs(self, coded: list[list[int]]) -> list[VectorCodec]:
        """Return the codecs for a first encoding of these tokens of each row."""
        settings, codecs = self.owner.cache_config, self.asked
        counts = [sum(not row.pads[at] for at in of_row) for row, of_row in zip(self.rows, coded, strict=True)]
        budgets = [self.budget_of(count, 0) for count in counts]
        evicts = settings.keep_ratio < 1 and budgets != counts
        if not evicts and settings.short_text_bits:
            codecs = [codec.with_more_bits(settings.short_text_bits) or codec for codec in codecs]
        kept = max(budgets) if evicts and self.may_evict else len(coded[0])
        longest = [
            self.vectors_to_fit(row, of_row)
            for row, of_row, count in zip(self.rows, coded, counts, strict=True)
            if count == max(counts)
        ]
        most = max(keys.shape[2] for keys, _ in longest)  # they differ where all to encode is padding
        sides = [torch.cat(side) for side in zip(*(each for each in longest if each[0].shape[2] == most), strict=True)]
        return [codec.for_tokens(side, kept) for codec, side in zip(codecs, sides, strict=True)]

    def drop(self, chosen: list[list[list[int]]]) -> None:
        """Let go of the coded tokens of the prompt that are not chosen."""
        for row, heads in zip(self.rows, chosen, strict=True):
            for head, positions in enumerate(heads):
                row.alive[head, self.free(row)] = False
                row.alive[head, positions] = True

    def free(self, row: Row) -> list[int]:
        """Return the positions of the coded tokens of the prompt."""
        return [at for at in range(self.prompt_from, self.tail_from) if at not in row.sinks]

    def real(self, row: Row) -> list[int]:
        """Return the positions that a policy chooses from: the free ones without pads."""
        return [at for at in self.free(row) if not row.pads[at]]

    def budget(self, row: Row) -> int:
        """Return how many tokens a head of a row keeps, on average."""
        return self.budget_of(len(self.real(row)), max(self.prompt_from - row.origin, 0))

    def budget_of(self, count: int, before: int) -> int:
        """Return how many of so many tokens a head keeps, on average, behind so many others."""
        settings = self.owner.cache_config
        if count < settings.min_tokens:
            return count
        return max(ceil(settings.keep_ratio * count), min(settings.min_kept - before, count))

    def scores(self, row: Row) -> list[list[float]]:
        """Return the scores of what a policy chooses from, by head; all alike if there is nothing to choose."""
        real = self.real(row)
        if self.budget(row) == len(real):
            return [[0.0] * len(real)] * len(row.alive)
        text = [at for at in range(self.prompt_from, self.seen) if not row.pads[at]]
        inputs = ScoreInputs(
            keys=row.shown[0][None, :, text],
            values=row.shown[1][None, :, text],
            positions=torch.arange(len(text)) + max(self.prompt_from - row.origin, 0),
            protected=torch.tensor([at not in real for at in text]),
            layer_idx=self.layer_idx,
            queries=self.known_queries(row, text),
            far_attention=self.known_far(row, text),
            phase=self.phase,
        )
        scores = self.policy.score(inputs)[0].double().tolist()
        return [[each[text.index(at)] for at in real] for each in scores]

    def known_far(self, row: Row, text: list[int]) -> Tensor | None:
        """Return the far attention to these tokens, if the policy wants it."""
        if not self.policy.wants_far_attention:
            return None
        index, heads = self.rows.index(row), range(len(row.alive))
        return torch.tensor([[[self.far.get((index, head, at), 0.0) for at in text] for head in heads]])

    def known_queries(self, row: Row, text: list[int]) -> Tensor | None:
        """Return those of the last tokens that are text, if they are known."""
        known = [at for at in text if self.known[0] <= at < self.known[1]]
        if self.known[1] != self.seen or not known:
            return None
        assert self.queries is not None
        return self.queries[self.rows.index(row)][None, :, known]

    def show_decoded(self, row: Row, coded: list[int]) -> None:
        """Encode tokens of a row, and let attention see what the codes say."""
        if not coded:
            return
        heads = len(row.alive)
        if self.first:
            pairs = zip(self.codecs, self.vectors_to_fit(row, coded), strict=True)
            row.transforms = [codec.fit(vectors) for codec, vectors in pairs]
            self.owner.fitted_rows += len(row.transforms)
        codes, decoded = [], []
        for codec, transform, vectors in zip(self.codecs, row.transforms, self.pick(row, [coded] * heads), strict=True):
            packed = codec.encode(vectors, transform)
            codes += [packed.words[0], packed.scales[0, :, :, None]]
            decoded.append(codec.decode(packed, transform))
        if self.phase is not None:
            decoded[0] = self.phase.rotate(decoded[0], self.turned(row, [coded] * heads))
        for side in (0, 1):
            row.shown[side] = row.shown[side].clone()
            row.shown[side][:, coded] = decoded[side][0].to(row.shown[side].dtype)
        row.codes[:, coded] = torch.cat(codes, -1)

    def vectors_to_fit(self, row: Row, coded: list[int]) -> list[Tensor]:
        """Return those of the tokens to encode that are text; if none is, all text there is."""
        text = [at for at in coded if not row.pads[at]] or [at for at in range(self.seen) if not row.pads[at]]
        return self.pick(row, [text or coded] * len(row.alive))

    def pick(self, row: Row, positions: list[list[int]]) -> list[Tensor]:
        """Return exact keys (without their rotary phase) and values at these positions, ``[1, kv_heads, n, ...]``."""
        keys, values = (
            torch.stack([x[head, at] for head, at in enumerate(positions)]).contiguous()[None] for x in row.exact
        )
        if self.phase is not None:
            keys = self.phase.rotate(keys.float(), self.turned(row, positions), inverse=True)
        return [keys, values]

    def turned(self, row: Row, positions: list[list[int]]) -> Tensor:
        """Return by how many steps the keys at these positions are turned: what is before the text is at step 0."""
        return (torch.tensor(positions, dtype=torch.int64) - row.origin).clamp_min(0)[None]

    # Cache operations

    def check_crop(self, stop: int) -> None:
        """Refuse to cut into the sinks of padded rows, which stand in different places."""
        if self.is_padded and 0 < stop <= max(at for row in self.rows for at in row.sinks):
            msg = f"{stop} tokens end before the sinks of each row do"
            raise UnsupportedError(msg)

    def crop_to(self, stop: int) -> None:
        """Forget the tokens from ``stop`` on."""
        for row in self.rows:
            row.crop(stop)
        if stop < self.tail_from and stop <= (0 if self.is_padded else self.owner.cache_config.sink_tokens):
            self.tail_from, self.first, self.phase, self.is_padded = 0, True, None, False
            for row in self.rows:
                row.transforms, row.sinks = [], []
                assert row.alive.all(), "sinks are never evicted"
        self.tail_from = min(self.tail_from, stop)
        seen = self.seen_attention[0], min(self.seen_attention[1], stop)
        self.seen_attention = seen if seen[0] < seen[1] else (0, 0)
        if stop < self.known[1]:
            undone = self.known_before[1] == stop
            far = self.far_before if undone else self.far
            self.far = {key: attention for key, attention in far.items() if key[2] < stop}
            self.known = self.known_before if undone else (min(self.known[0], stop), stop)
            self.known_before = self.known
        if self.pending_from is not None and stop <= self.pending_from:
            self.stop_waiting()

    def take_back(self, stop: int) -> None:
        """Undo the last update, after which so many tokens are left; what it has begun with stays."""
        del stop
        vars(self).update(self.before)

    def after_crop(self) -> None:
        """Do what waited for the crop, if a past is recorded."""
        if not self.is_initialized:
            return  # the prompt is still to come
        self.updated_since_crop = False
        if self.record_past:
            if not self.expects_prompt:
                self.stop_waiting()  # no prompt: candidates were verified
            self.expects_prompt = False
            self.owner.compress_together([self])

    def take_rows(self, rows: list[int]) -> None:
        self.rows = [copy.deepcopy(self.rows[row]) for row in rows] if self.rows else []
        self.queries = None if self.queries is None else self.queries[rows]
        far, before = (
            {(new, *key[1:]): x for new, row in enumerate(rows) for key, x in each.items() if key[0] == row}
            for each in (self.far, self.far_before)
        )
        self.far, self.far_before = far, before


def sinks_of(pads: list[bool], count: int) -> list[int]:
    """Return the positions of the first tokens that are no padding; where there are too few, of the last pads too."""
    real = [at for at, is_pad in enumerate(pads) if not is_pad]
    padding = [at for at, is_pad in enumerate(pads) if is_pad]
    missing = max(count - len(real), 0)
    return sorted(real[:count] + padding[len(padding) - missing :])


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
        when: str = "during_prefill",
        make_codec: MakeCodec | None = None,
        **overrides: Any,
    ) -> None:
        del attention_mask  # the model's own is seen
        self.cache_config = resolve_preset(preset).override(overrides)
        self.policy, self.when = policy, when
        self.model_config = None if config is None else config.get_text_config(decoder=True)
        self.make_codec = make_codec or NexusQuantCache(self.cache_config).make_codec
        self.encoded_vectors = self.fitted_rows = 0
        self.warned: list[str] = []
        self.has_refused = False  # said once for each prompt
        self.asked_to_record = False
        Cache.__init__(self, layers=self.make_layers())

    def make_layers(self) -> list[Any]:
        if self.model_config is None:
            return []
        return [
            OracleLayer(self, index) if type(layer) is DynamicLayer else layer
            for index, layer in enumerate(DynamicCache(config=self.model_config).layers)
        ]

    def make_policy(self, layer_idx: int) -> EvictionPolicy:
        del layer_idx
        return self.policy or (DEFAULT_BESIDE_WINDOWS if any(self.is_sliding) else DEFAULT_POLICY)

    def make_phase(self, layer_idx: int, seen: int) -> Any:
        if self.model_config is None or not self.cache_config.remove_rope:
            return None
        return rotary_phase(self.model_config, layer_idx, seen)

    def note_refused_eviction(self) -> None:
        """Warn that tokens stay because attention was not seen."""
        if not self.has_refused:
            self.has_refused = True
            self.warned.append("attention")

    @property
    def compressed(self) -> list[OracleLayer]:
        """The layers of our kind."""
        return [layer for layer in self.layers if isinstance(layer, OracleLayer)]

    @property
    def used(self) -> list[OracleLayer]:
        """Those of them that have seen tokens."""
        return [layer for layer in self.compressed if layer.seen]

    # The interface of transformers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        while self.model_config is None and len(self.layers) <= layer_idx:
            self.layers.append(OracleLayer(self, len(self.layers)))
            if self.asked_to_record:
                self.layers[-1].activate_past_recording()
        self.compress_others(layer_idx, key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def compress_others(self, layer_idx: int, tokens: int) -> None:
        """Compress what other layers than the one to be updated need not wait with."""
        if isinstance(self.layers[layer_idx], OracleLayer) and tokens > 1:
            for other in self.compressed:
                if other.layer_idx != layer_idx:
                    other.encode_early()

    def compress(self) -> None:
        self.compress_together([layer for layer in self.used if layer.pending_from is not None])

    def compress_together(self, layers: list[OracleLayer]) -> None:
        """Compress layers that wait, which share what they keep."""
        for layer in layers:
            layer.encode_waiting()
        choosing = [layer for layer in layers if layer.has_choice()]
        sharing = [layer for layer in choosing if layer.policy.scores_are_comparable]
        for group in (sharing, *([layer] for layer in choosing if layer not in sharing)):
            for layer, chosen in zip(group, self.choose_together(group), strict=True):
                layer.drop(chosen)
        for layer in layers:
            layer.stop_waiting()

    @staticmethod
    def choose_together(layers: list[OracleLayer]) -> "list[list[list[list[int]]]]":
        """Return the positions that layers keep of each row and head.

        Where scores can be compared, a fifth of an equal share is certain to each head, and the rest goes to the best
        of all that are left, in any head and layer.
        """
        chosen: list[list[list[list[int]]]] = [[] for _ in layers]
        for index in range(len(layers[0].rows) if layers else 0):
            heads, left, rest = [], [], 0
            for place, layer in enumerate(layers):
                row = layer.rows[index]
                budget, real, of_row = layer.budget(row), layer.real(row), layer.scores(row)
                ranked = [
                    [real[at] for at in sorted(range(len(real)), key=lambda at, each=each: (-each[at], at))]
                    for each in of_row
                ]
                is_shared = layer.policy.scores_are_comparable
                certain = ceil(budget / 5) if is_shared else budget
                chosen[place].append([positions[:certain] for positions in ranked])
                for head, (positions, scores) in enumerate(zip(ranked, of_row, strict=True)):
                    rest += budget - certain
                    heads.append(chosen[place][-1][head])
                    left += [(-scores[real.index(at)], len(heads) - 1, at) for at in positions[certain:]]
            for _, head, at in sorted(left)[:rest]:
                heads[head].append(at)
        return chosen

    def activate_past_recording(self) -> None:
        for layer in self.used:
            layer.encode_early()  # the last layer may still have been waiting
        self.asked_to_record = True
        super().activate_past_recording()

    def reset(self) -> None:
        self.asked_to_record = self.has_refused = False
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
        tried = copy.deepcopy(self)  # so that nothing has changed if this raises
        tried._crop(tokens_to_remove)
        windows = [layer for layer in tried.layers if layer.is_sliding and layer.is_initialized]
        if any(layer.keys.shape[-2] < min(tried.get_seq_length(), layer.sliding_window - 1) for layer in windows):
            msg = "a window would lack tokens"
            raise UnsupportedError(msg)
        self._crop(tokens_to_remove)

    def _crop(self, tokens_to_remove: int) -> None:
        seen = max((layer.seen for layer in self.used), default=0)
        stop = max(seen + tokens_to_remove, 0)
        for layer in self.used:
            layer.check_crop(stop)
        for layer in self.used:
            layer.crop_to(stop)
        self.compress_together([layer for layer in self.used if layer.record_past and layer.expects_prompt])
        for layer in self.layers:
            if isinstance(layer, OracleLayer):
                layer.after_crop()
            else:
                layer.crop(tokens_to_remove)

    def take_rows(self, rows: list[int]) -> None:
        """Let the batch consist of these rows."""
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
