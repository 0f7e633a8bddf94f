"""What a compressed layer holds: every tensor declared once, and the one walk over them.

Moving rows of a batch, cutting tokens off, copies, the memory report, host memory and files all go by `TENSORS`.  A new
tensor is a line there and a field of `LayerState`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from operator import attrgetter
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nexusquant_cache.codec.base import VectorCodec
from nexusquant_cache.codec.held import Side
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.layer.observations import Observations
from nexusquant_cache.layer.tokens import Buffer, PackedTokens, own
from nexusquant_cache.policy import EvictionPolicy

Kind = Literal["exact", "codes", "scales", "positions", "transform"]
"""What a tensor is: tokens or queries in full precision, packed codes, their scales, which tokens are kept, or what all
tokens of a side share."""

Facts: TypeAlias = Mapping[str, Any]
"""Lengths of axes, dtypes and counts of a layer, by name; None for what it has not."""

Codecs: TypeAlias = tuple[VectorCodec, VectorCodec]
Pair: TypeAlias = tuple[Tensor, Tensor]
Check: TypeAlias = Callable[[Tensor, Facts], str | None]

SIDES: tuple[Side, Side] = ("keys", "values")
_PART = 1 << 20  # bytes of a bitmap that are counted at once


# What the values of a tensor must satisfy; each check returns what is wrong.


def finite(x: Tensor, facts: Facts) -> str | None:
    """Say whether a tensor holds something else than numbers."""
    del facts
    if not x.numel() or all(isfinite(float(bound)) for bound in x.aminmax()):  # NaN would be both bounds
        return None
    return "holds NaN or infinity"


def _positive(x: Tensor, facts: Facts) -> str | None:
    wrong = finite(x, facts)
    return wrong or ("holds a scale that is not positive" if x.numel() and float(x.min()) <= 0 else None)


def _bitmap(x: Tensor, facts: Facts) -> str | None:
    """Every head keeps as many tokens as the layer says, all of them covered; where heads differ, no more than that."""
    if not facts["covered"]:
        return None
    differ = facts["counts"] is not None
    used = (facts["covered"] - 1) % 8 + 1  # bits of the last byte
    counts = kept_of(x)
    wrong = counts > facts["kept"] if differ else counts != facts["kept"]
    is_right = not bool((x[..., -1].int() >> used).any()) and not bool(wrong.any())
    return None if is_right else f"does not keep {facts['kept']} tokens in every head"


def kept_of(bitmap: Tensor) -> Int[Tensor, "b h"]:
    """Return how many tokens each head keeps, by a bitmap."""
    heads = bitmap.flatten(0, 1)
    # In parts: a bitmap that says little is small in a file, and what is made of it here must not be large.
    some_heads = heads.split(max(_PART // max(heads.shape[1], 1), 1))
    counts = [sum(_count_bits(part).sum(1, dtype=torch.int64) for part in some.split(_PART, 1)) for some in some_heads]
    return torch.cat([torch.as_tensor(count) for count in counts]).view(bitmap.shape[:2])


def _counts(x: Tensor, facts: Facts) -> str | None:
    """Say whether heads keep other numbers of tokens than there are in all."""
    is_right = int(x.min()) >= 0 and int(x.max()) == facts["kept"]
    total = int(x.sum()) + x.numel() * facts["dense"]
    return None if is_right and (total,) == facts["packed"] else "does not count the tokens that there are"


def _count_bits(x: Tensor) -> Tensor:
    """Return the number of ones in each byte: of pairs of bits, then of four, then of all."""
    x = x - (x >> 1 & 0x55)
    x = (x & 0x33) + (x >> 2 & 0x33)
    return x + (x >> 4) & 0x0F


def _origins(x: Tensor, facts: Facts) -> str | None:
    """Say whether a row begins to count where it has not been."""
    is_right = not x.numel() or 0 <= int(x.min()) <= int(x.max()) <= facts["seen"]
    return None if is_right else f"must hold numbers from 0 to {facts['seen']}"


def are_places(x: Tensor, facts: Facts) -> str | None:
    """Say whether sinks do not stand one behind the other, or some behind the packed tokens."""
    if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < max(facts["packed_end"], 1):
        return "lies behind the packed tokens"
    return "is not ascending" if bool((x[:, 1:] <= x[:, :-1]).any()) else None


def _plans(x: Tensor, facts: Facts, layouts: str) -> str | None:
    known = facts[layouts]  # None: what plans are to a codec of the user's, it alone knows
    is_wrong = known is not None and bool(x.numel()) and int(x.max()) >= known
    return "names a plan of bits that the codec does not have" if is_wrong else None


def _key_plans(x: Tensor, facts: Facts) -> str | None:
    return _plans(x, facts, "key_layouts")


def _value_plans(x: Tensor, facts: Facts) -> str | None:
    return _plans(x, facts, "value_layouts")


@dataclass(frozen=True)
class Declared:
    """One tensor of a layer.

    Attributes:
        name: What files call it.
        path: Where a `LayerState` has it: attributes, and places in tuples.
        axes: Names of its axes in the layer's facts, or lengths.  The fact may be several lengths in a tuple.
        dtype: Torch's name of its dtype, or the name of a fact that is one.  A layer has no such tensor where a fact
            that it asks for is None.  If this is the tensor's own name, a file says of each layer whether it is there.
        kind: What it is.
        check: What its values must satisfy; None if all are possible.
        stays: Whether it is on the CPU wherever the layer is.
        listed_as: The dtype that a file must list it with; None if any will do.
    """

    name: str
    path: str
    axes: tuple[str | int, ...]
    dtype: str
    kind: Kind
    check: Check | None = finite
    stays: bool = False
    listed_as: str | None = None

    @property
    def is_listed(self) -> bool:
        """Whether a file says of each layer whether it has the tensor."""
        return self.dtype == self.name

    def shape(self, facts: Facts) -> tuple[int, ...] | None:
        """Return the shape that the tensor has in a layer of these facts; None if there is no such tensor."""
        lengths = [axis if isinstance(axis, int) else facts[axis] for axis in self.axes]
        if self.dtype_in(facts) is None or None in lengths:
            return None
        return tuple(n for length in lengths for n in (length if isinstance(length, tuple) else (length,)))

    def dtype_in(self, facts: Facts) -> str | None:
        """Return the name of its dtype in a layer of these facts."""
        found: str | None = facts.get(self.dtype, self.dtype)
        return found


def transform_tensors(side: Side, path: str, prefix: str = "") -> tuple[Declared, ...]:
    """Declare the tensors of a transform.

    Args:
        side: Whose transform.
        path: Where it is.
        prefix: What the names begin with.
    """
    one, name = side[:-1], f"{prefix}{side}"
    lead, dim, axes = (f"{one}_rows", "heads"), f"{one}_dim", f"{one}_axes"
    plans = _key_plans if side == "keys" else _value_plans
    return (
        Declared(f"{name}.basis", f"{path}.rotation.basis", (*lead, axes, axes), "int8", "transform"),
        Declared(f"{name}.step", f"{path}.rotation.step", (*lead, axes, 1), "float32", "transform", _positive),
        Declared(f"{name}.mean", f"{path}.mean", (*lead, 1, dim), f"{one}_mean", "transform"),
        Declared(f"{name}.reference", f"{path}.reference", (*lead, 1), "float32", "transform", _positive),
        Declared(f"{name}.plans", f"{path}.plans", lead, f"{one}_plans", "transform", plans, stays=True),
    )


def _tokens(place: int, side: Side) -> tuple[Declared, ...]:
    one, lead = side[:-1], ("batch", "heads")
    dim, dtype, packed = f"{one}_dim", f"{one}_dtype", f"body.{side}"
    return (
        Declared(f"{side}.tail", f"tail.{place}", (*lead, "tail", dim), dtype, "exact"),
        Declared(f"{side}.sinks", f"sinks.{place}", (*lead, "sinks", dim), dtype, "exact"),
        # Batch, heads and tokens; where heads keep different numbers, all tokens, one head behind the other.
        Declared(f"{side}.words", f"{packed}.words", ("packed", f"{one}_bytes"), "uint8", "codes", None),
        Declared(f"{side}.scales", f"{packed}.scales", ("packed",), "uint8", "scales", None),
        *transform_tensors(side, f"{packed}.transform"),
    )


def _listed(name: str, path: str, axes: tuple[str | int, ...], dtype: str, check: Check | None) -> Declared:
    """Declare a tensor that says which tokens are where, and that not every layer has."""
    return Declared(name, path, axes, name, "positions", check, listed_as=dtype)


TENSORS: tuple[Declared, ...] = (
    *_tokens(0, "keys"),
    *_tokens(1, "values"),
    Declared("kept", "body.positions.bitmap", ("batch", "heads", "bitmap_bytes"), "uint8", "positions", _bitmap),
    replace(_listed("counts", "body.positions.counts", ("batch", "heads"), "int64", _counts), stays=True),
    _listed("sink_positions", "sink_positions", ("batch", "sinks"), "int64", are_places),
    _listed("origins", "origins", ("batch",), "int64", _origins),
    _listed("pads", "pads", ("batch", "waiting"), "bool", None),
    Declared("queries", "observed.queries", ("batch", "query_heads", "queries", "key_dim"), "query_dtype", "exact"),
    Declared(
        "queries_before",
        "observed.before.0",
        ("batch", "query_heads_before", "queries_before", "key_dim"),
        "query_dtype_before",
        "exact",
    ),
    Declared("far", "observed.far", ("batch", "heads", "far"), "float32", "exact"),
    Declared("far_before", "observed.before.2", ("batch", "heads", "far_before"), "float32", "exact"),
    Declared("reconstruction", "observed.reconstruction", ("batch", "heads", "reconstruction"), "float32", "exact"),
)
"""Every tensor of a compressed layer."""


def expected(facts: Facts) -> Iterator[tuple[Declared, tuple[int, ...]]]:
    """Yield the tensors of a layer of these facts, each with its shape."""
    for declared in TENSORS:
        shape = declared.shape(facts)
        if shape is not None:
            yield declared, shape


def listed() -> dict[str, Declared]:
    """Return the tensors, by name, of which a file says for each layer whether they are there."""
    return {declared.name: declared for declared in TENSORS if declared.is_listed}


_BODY = "body."
_KINDS: tuple[Kind, ...] = ("exact", "codes", "scales", "positions", "transform")


LOOP = 2
"""So many short updates in a row are a loop."""


@dataclass
class Turn:
    """Where a layer stands between updates: what it waits for, and since which token.

    A loop of one's own that checks several candidates in each forward, and never brings a single token, is known by two
    updates in a row that are shorter than the longest one so far.  From the second on such updates count as generated
    tokens, until one comes that is as long as the longest.

    Attributes:
        pending_from: Seen tokens before the first multi-token update that was not compressed yet, 0 if none was packed
            before; None if none waits.
        record_past: Whether a `crop` is expected after each update.
        expects_prompt: Whether the next multi-token update is a prompt, and not candidates that may be taken back.
        updated_since_crop: Whether there was an update that no crop has followed.
        longest: Tokens of the longest update so far.
        short_updates: How many multi-token updates in a row were shorter; 2 if more, which is a loop.
        undo: How all but ``expects_prompt`` stood before the last update.
    """

    pending_from: int | None = None
    record_past: bool = False
    expects_prompt: bool = False
    updated_since_crop: bool = False
    longest: int = 0
    short_updates: int = 0
    undo: tuple[int | None, bool, bool, int, int] = (None, False, False, 0, 0)

    @property
    def is_pending(self) -> bool:
        """Whether a prompt, or a later turn, waits for its compression."""
        return self.pending_from is not None

    @property
    def is_recording(self) -> bool:
        """Whether what comes now may be taken back by a `crop`."""
        return self.record_past and not self.updated_since_crop

    def is_step(self, tokens: int) -> bool:
        """Tell whether an update of so many tokens is a generation step, and no prompt."""
        return tokens == 1 or (self.short_updates > 0 and tokens < self.longest)

    def start_recording(self) -> None:
        """Expect a `crop` after each update from now on."""
        self.record_past = self.expects_prompt = True
        self.updated_since_crop = False
        self.short_updates = 0

    def note_update(self, seen: int, tokens: int, *, is_first: bool) -> None:
        """Take note of an update of so many tokens behind those seen; it ends a recording that no crop has followed.

        Args:
            seen: Tokens seen before.
            tokens: How many come.
            is_first: Whether nothing is packed yet: then all that was seen waits with a prompt.
        """
        self.undo = (self.pending_from, self.record_past, self.updated_since_crop, self.longest, self.short_updates)
        self.record_past = self.updated_since_crop = self.is_recording
        if seen == 0:  # everything may have been taken back
            self.longest = self.short_updates = 0
        if self.record_past:  # crops tell candidates from prompts
            is_step = tokens == 1
        else:
            is_step = self.is_step(tokens)
            self._count(tokens)
        self.longest = max(self.longest, tokens)
        if not is_step and self.pending_from is None:
            self.pending_from = 0 if is_first else seen

    def _count(self, tokens: int) -> None:
        """Count updates that are shorter than the longest; a single token ends the count, but no loop."""
        if tokens > 1:
            self.short_updates = min(self.short_updates + 1, LOOP) if tokens < self.longest else 0
        elif self.short_updates < LOOP:
            self.short_updates = 0

    def take_back_update(self) -> None:
        """Stand where it stood before the last update."""
        self.pending_from, self.record_past, self.updated_since_crop, self.longest, self.short_updates = self.undo


@dataclass(eq=False)
class LayerState:
    """Everything that a compressed layer holds and counts.

    Attributes:
        layer_idx: Index of the layer in the model.
        seen: Tokens seen.
        tail: Newest tokens, exact; None before the first update.
        sinks: First tokens of each row, exact, once anything is packed.
        body: Packed tokens.
        phase: The rotary phase that was taken off the packed keys.
        sink_positions: Original positions of the sinks, ascending; None if they are the first tokens of every row.
        origins: Position from which the rotary positions of each row count; None if all count from 0.
        pads: Which of the `waiting_tokens` are padding, as the prefill's mask has it; None if none are.
        observed: What attention has shown of the prompt that waits.
        turn: What the layer waits for.
        code_error: How much encoding the first tokens changed attention, see `probe.attention_error`; None before.
        codecs: Of keys and values, as used; the first compression may choose others than were asked for.
        asked: Those that the cache was asked for.
        policy: Which tokens to keep.
        device: Where attention needs everything.
        shown: From which token to which the attention to new tokens has been shown, without a gap.
        shown_before: The same before the last update.
        is_detached: Whether gradients would have flowed to the first tokens, had they not been stored without.
    """

    layer_idx: int
    seen: int = 0
    tail: Pair | None = None
    sinks: Pair | None = None
    body: PackedTokens | None = None
    phase: RotaryPhase | None = None
    sink_positions: Int[Tensor, "b s"] | None = None
    origins: Int[Tensor, " b"] | None = None
    pads: Bool[Tensor, "b tail"] | None = None
    observed: Observations = field(default_factory=Observations)
    turn: Turn = field(default_factory=Turn)
    code_error: float | None = None
    codecs: Codecs | None = None
    asked: Codecs | None = None
    policy: EvictionPolicy | None = None
    device: torch.device | None = None
    shown: tuple[int, int] = (0, 0)
    shown_before: tuple[int, int] = (0, 0)
    is_detached: bool = False

    @property
    def exact(self) -> Pair:
        """The tail of a layer that has been updated."""
        assert self.tail is not None
        return self.tail

    @property
    def home(self) -> torch.device:
        """The device of a layer that has been updated."""
        assert self.device is not None
        return self.device

    @property
    def tail_tokens(self) -> int:
        """Tokens in the exact tail."""
        return 0 if self.tail is None else self.tail[0].shape[2]

    @property
    def waiting_tokens(self) -> int:
        """Newest tokens that are in the tail, or of a prompt that waits: coded ones among them may still be dropped."""
        if self.turn.pending_from is None:
            return self.tail_tokens
        return max(self.seen - self.turn.pending_from, self.tail_tokens)

    @property
    def sink_tokens(self) -> int:
        """Exact first tokens."""
        return 0 if self.sinks is None else self.sinks[0].shape[2]

    @property
    def packed_tokens(self) -> int:
        """Packed tokens of each head; the most that a head has where they differ."""
        return 0 if self.body is None else self.body.positions.tokens

    @property
    def kept(self) -> int:
        """Tokens stored, exact or packed, on average over rows and heads."""
        packed = 0.0 if self.body is None else self.body.positions.mean_tokens
        return round(self.sink_tokens + packed + self.tail_tokens)

    @property
    def evicted(self) -> int:
        """Tokens seen that are not stored, of all rows and heads together."""
        if self.body is None:
            return 0
        positions, heads = self.body.positions, self.exact[0].shape[0] * self.exact[0].shape[1]
        packed = positions.kept * heads if positions.counts is None else int(positions.counts.sum())
        return heads * (self.seen - self.sink_tokens - positions.dense - self.tail_tokens) - packed

    @property
    def is_whole(self) -> bool:
        """Whether every token seen is kept."""
        return self.evicted == 0

    @property
    def is_shown(self) -> bool:
        """Whether attention to the newest tokens could be seen: then it can be answered from codes."""
        return 0 < self.seen == self.shown[1]

    @property
    def may_evict(self) -> bool:
        """Whether tokens that wait may go: only where the model's own mask is at hand, so that it can leave them out.

        Where attention cannot be seen, all tokens stay, and the decoded states fit any mask.
        """
        return self.is_shown and self.shown[0] <= self.seen - self.waiting_tokens

    @property
    def is_shown_whole(self) -> bool:
        """Whether attention has been seen from the first token on."""
        return self.is_shown and self.shown[0] == 0

    def note_shown(self, fresh: int) -> None:
        """Take note that the attention to the newest tokens was shown."""
        before = self.seen - fresh
        start = self.shown[0] if self.shown[1] == before else before
        self.shown = (start, self.seen)

    def forget_shown_from(self, end: int) -> None:
        """Let the attention to tokens from position ``end`` on count as not shown."""
        start, stop = self.shown[0], min(self.shown[1], end)
        self.shown = (start, stop) if start < stop else (0, 0)

    def note_pads(self, fresh: Bool[Tensor, "#b fresh"]) -> None:
        """Take note of which of the newest tokens are padding."""
        if self.pads is None:
            rows, waiting = len(self.exact[0]), self.waiting_tokens
            self.pads = torch.zeros(rows, waiting, dtype=torch.bool, device=self.home)
        self.pads[:, self.pads.shape[1] - fresh.shape[1] :] = fresh

    def trim_pads(self) -> None:
        """Forget of tokens that no longer wait whether they are padding."""
        if self.pads is None:
            return
        waiting = self.pads[:, self.pads.shape[1] - self.waiting_tokens :]
        self.pads = own(waiting) if bool(waiting.any()) else None

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add exact tokens to the tail."""
        fresh = keys.shape[2]
        pads = None if self.pads is None else torch.nn.functional.pad(self.pads, (0, fresh))
        self.tail = (_joined(self.exact[0], keys), _joined(self.exact[1], values))
        self.pads = pads
        self.seen += fresh

    def snapshot(self) -> dict[str, Any]:
        """Return all that the layer holds and counts, by reference, for `restore` to undo what is done meanwhile."""
        saved = vars(self) | self.snapshot_of_update()
        if self.body is not None:
            saved["body"] = self.body.shallow()
        return saved

    def snapshot_of_update(self) -> dict[str, Any]:
        """Return what an update may change that compresses nothing."""
        return {
            "seen": self.seen,
            "tail": self.tail,
            "pads": self.pads,
            "is_detached": self.is_detached,
            "turn": vars(self.turn).copy(),
            "observed": vars(self.observed).copy(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Hold and count what a `snapshot` has, all at once: an interrupt finds the one or the other."""
        whole = saved | {"turn": Turn(**saved["turn"]), "observed": Observations(**saved["observed"])}
        vars(self).update(whole)

    def holders(self, *kinds: Kind) -> Iterator[object]:
        """Yield the tensors of these kinds, and what holds them where that holds more: buffers and transforms."""
        yield from (found for _, found in self.declared_holders(*kinds))
        if "transform" in kinds and self.body is not None:
            yield from (self.body.keys.transform, self.body.values.transform)

    def declared_holders(self, *kinds: Kind) -> Iterator[tuple[Declared, object]]:
        """Yield the same but for transforms, each with its declaration."""
        for declared in _of(kinds, but="transform"):
            found = find(self, declared.path)
            if found is not None:
                yield declared, found

    def tensors(self, *kinds: Kind) -> Iterator[tuple[Declared, Tensor]]:
        """Yield the tensors of these kinds that there are, all by default, where they are stored."""
        for declared in _of(kinds or _KINDS):
            found = find(self, declared.path)
            if found is not None:
                yield declared, found.stored() if isinstance(found, Buffer) else found

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by what ``function`` makes of the rows of the batch; it keeps the other axes."""
        for declared in _of(_KINDS, but="transform"):
            found = None if declared.path.startswith(_BODY) else find(self, declared.path)
            if found is not None:
                put(self, declared.path, function(found))
        if self.body is not None:
            self.body.map_rows(function)
            self._map_transforms(function)

    def move(self, function: Callable[[Tensor], Tensor], *kinds: Kind) -> None:
        """Put the tensors of these kinds, all by default, where ``function`` moves them; some stay on the CPU."""
        for declared in _of(kinds or _KINDS, but="transform"):
            found = find(self, declared.path)
            if isinstance(found, Buffer):
                found.move(function)
            elif found is not None and not declared.stays:
                put(self, declared.path, function(found))
        if "transform" in (kinds or _KINDS):
            self._map_transforms(function)

    def _map_transforms(self, function: Callable[[Tensor], Tensor]) -> None:
        for side in () if self.body is None else (self.body.keys, self.body.values):  # which puts plans back on the CPU
            side.transform = side.transform.map_batch(function)

    def cut_tail(self, start: int, stop: int) -> None:
        """Keep these tokens of the tail, without a view of the others."""
        keys, values = (own(x[:, :, start:stop]) for x in self.exact)
        self.tail = (keys, values)

    def forget_packed(self) -> None:
        """Become a layer that has never packed anything; its tail stays."""
        self.sinks = self.body = self.phase = self.sink_positions = self.origins = self.code_error = None
        self.codecs = self.asked

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """What grows with the packed tokens."""
        return () if self.body is None else _buffers_of(self)


# Asked for at each step.
_buffers_of: Callable[[LayerState], tuple[Buffer, ...]] = attrgetter(
    *(declared.path for declared in TENSORS if "packed" in declared.axes)
)


def _joined(stored: Tensor, new: Tensor) -> Tensor:
    return own(new) if stored.shape[2] == 0 else torch.cat([stored, new.detach()], 2)


def _of(kinds: tuple[Kind, ...], *, but: Kind | None = None) -> list[Declared]:
    return [declared for declared in TENSORS if declared.kind in kinds and declared.kind != but]


def find(holder: Any, path: str) -> Any:  # noqa: ANN401 - whatever the path leads to
    """Return what is at the end of a path; None if the path ends before."""
    for name in path.split("."):
        if holder is None:
            return None
        holder = holder[int(name)] if name.isdecimal() else getattr(holder, name, None)
    return holder


def put(holder: Any, path: str, value: Any) -> Any:  # noqa: ANN401 - as above
    """Put something at the end of a path; return the holder, or another tuple in its place."""
    name, _, rest = path.partition(".")
    if name.isdecimal():
        place = int(name)
        return (*holder[:place], put(holder[place], rest, value) if rest else value, *holder[place + 1 :])
    setattr(holder, name, put(getattr(holder, name), rest, value) if rest else value)
    return holder
