"""What attention shows of a prompt until it is decided what is kept of it."""

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from jaxtyping import Bool, Float
from torch import Tensor

from nexusquant_cache.codec import impl
from nexusquant_cache.codec.impl import Impl
from nexusquant_cache.layer.tokens import own
from nexusquant_cache.presets import CacheConfig

FAR = 64
"""So many tokens before a query its attention is far: what is nearer, every token gets from those that follow it."""
_ENOUGH = 1 / 3  # of the tokens kept: then half of the queries say as much
_BLOCK = 1 << 19  # logits computed at once: 2 MiB in float32
_LARGE_BLOCK = 1 << 24  # likewise on an accelerator, which takes longer to begin
_ROWS, _COLUMNS = 128, 2048  # queries of each query head, and tokens, where one KV head follows the other


@dataclass
class Observations:
    """What is known of a prompt that waits, besides its keys and values.

    Attributes:
        queries: Those of the newest tokens, as many as the policy looks at, as attention sees them.
        end: Tokens seen when the newest of them came.
        far: The greatest attention that a query has paid to each token of the prompt, `FAR` or more before it.
        before: The same three as they were before the last update, so that it can be taken back.
        reconstruction: The greatest attention paid to each token in a second reading, see
            `nexusquant_cache.attention.reconstruct`.
    """

    queries: Float[Tensor, "b q w d"] | None = None
    end: int = 0
    far: Float[Tensor, "b h m"] | None = None
    before: tuple[Float[Tensor, "b q w2 d"] | None, int, Float[Tensor, "b h m2"] | None] | None = None
    reconstruction: Float[Tensor, "b h n"] | None = None

    def start_update(self) -> None:
        """Forget how it was before the last update, which can no longer be taken back."""
        self.before = None

    def append(self, queries: Float[Tensor, "b q new d"], seen: int, most: int) -> None:
        """Take the queries of the newest of ``seen`` tokens; those of earlier tokens stay if these join on.

        The newest ``most`` are kept.

        Queries of tokens whose queries were taken already, since the last update, take their place.
        """
        self._save()
        assert self.before is not None
        earlier, end, _ = self.before
        if earlier is not None and end == seen - queries.shape[2]:
            queries = torch.cat([earlier.to(queries.device), queries], 2)
        self.queries, self.end = own(queries[:, :, -most:]), seen

    def append_far(
        self,
        queries: Float[Tensor, "b q new d"],
        keys: Float[Tensor, "b h n d"],
        real: Bool[Tensor, "b n"],
        settings: CacheConfig,
        log_sums: Float[Tensor, "b q new"] | None = None,
    ) -> None:
        """Look at the attention that the queries of the newest tokens pay to the prompt.

        Args:
            queries: Scaled as `ScoreInputs.queries`.
            keys: Of all its tokens.
            real: Which of them are not padding.
            settings: Those of the cache.
            log_sums: See `greatest_attention`.
        """
        self._save()
        every = query_step(settings.keep_ratio)
        found = greatest_attention(
            queries, keys, real, least_distance=FAR, every=every, log_sums=log_sums, by=settings.impl
        )
        if self.far is not None:
            torch.maximum(found[..., : self.far.shape[2]], self.far, out=found[..., : self.far.shape[2]])
        self.far = found

    def _save(self) -> None:
        """Let what is known now be what was known before the last update, unless that is saved already."""
        self.before = self.before or (self.queries, self.end, self.far)

    def crop(self, end: int, left: int) -> None:
        """Forget what is known of the tokens from position ``end`` on, before which ``left`` of the prompt are left."""
        if self.reconstruction is not None:
            self.reconstruction = own(self.reconstruction[:, :, :end])
        if self.far is not None:
            is_undone = self.before is not None and self.before[1] == end
            far = self.before[2] if self.before is not None and is_undone else self.far
            self.far = None if far is None else own(far[:, :, :left])
        if self.end <= end:
            return
        if self.before is not None and self.before[1] == end:
            self.queries = self.before[0]
        elif self.queries is not None:
            known = self.queries.shape[2] - (self.end - end)
            self.queries = own(self.queries[:, :, :known]) if known > 0 else None
        self.end, self.before = end, None

    def begin_at(self, start: int, seen: int) -> None:
        """Forget the far attention to tokens before this position, which files of earlier releases hold."""
        if self.far is not None:
            self.far = self.far[:, :, max(self.far.shape[2] - (seen - start), 0) :]
        queries, end, far = self.before or (None, 0, None)
        if far is not None:
            self.before = queries, end, far[:, :, max(far.shape[2] - max(end - start, 0), 0) :]

    def last_queries(self, count: int, seen: int) -> Float[Tensor, "b q w d"] | None:
        """Return up to ``count`` queries of the last of ``seen`` tokens, if they are known."""
        return None if self.queries is None or self.end != seen else self.queries[:, :, -count:]

    def attention_to(self, tokens: int) -> Float[Tensor, "b h n"] | None:
        """Return the attention paid to the first ``tokens`` tokens; those that came later count as fully attended."""
        if self.reconstruction is None:
            return None
        return F.pad(self.reconstruction, (0, tokens - self.reconstruction.shape[2]), value=1.0)


def query_step(keep_ratio: float) -> int:
    """Return the step from one query that is asked for far attention to the next; 1 asks all.

    Where more than a third is kept, every second query chooses as well as all (`benchmarks/eviction.py`).
    """
    return 2 if keep_ratio > _ENOUGH else 1


def scaled(queries: Float[Tensor, "b q w d"], scaling: float | None) -> Float[Tensor, "b q w d"]:
    """Return queries that give the model's logits at the usual scaling, ``head_dim ** -0.5``."""
    factor = 1.0 if scaling is None else scaling * queries.shape[-1] ** 0.5
    return queries if abs(factor - 1) < 1e-6 else queries * factor  # noqa: PLR2004 - a rounding


def greatest_attention(  # noqa: PLR0913 - half of them have defaults
    queries: Float[Tensor, "b q m d"],
    keys: Float[Tensor, "b h n d"],
    real: Bool[Tensor, "b n"],
    *,
    least_distance: int = 0,
    every: int = 1,
    log_sums: Float[Tensor, "b q m"] | None = None,
    by: Impl = "torch",
) -> Float[Tensor, "b h n"]:
    """Return the greatest attention weight that a token gets from any query, over the query heads of its KV head.

    The queries are those of the last tokens, and attend to what comes before them.

    Args:
        queries: Scaled as `ScoreInputs.queries`.
        keys: All keys.
        real: Which tokens are not padding; others neither attend nor are attended to, and have no place.
        least_distance: Attention of a query to a token counts that is so many tokens before it.  All of it is in the
            softmax.
        every: Of so many tokens one is asked: those whose place among the keys is a multiple of it.
        log_sums: The logarithm of the sum that each query's softmax divides by, where it is known already: then no
            softmax has to be computed.
        by: Which implementation may compute, see `codec.impl`.
    """
    real = real.to(keys.device)
    if not bool(real.all()):
        found = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
        for row, is_real in enumerate(real):  # each as if it were alone
            if bool(is_real.any()):
                own_queries = queries[row : row + 1, :, is_real[keys.shape[2] - queries.shape[2] :]]
                own_keys, own_real = keys[row : row + 1, :, is_real], real[row : row + 1, is_real]
                found[row, :, is_real] = greatest_attention(
                    own_queries, own_keys, own_real, least_distance=least_distance, every=every, by=by
                )[0]
        return found
    with torch.autocast(keys.device.type, enabled=False):
        # How products of half precision are rounded on a CPU depends on the processor.
        if keys.device.type == "cpu" or queries.dtype != keys.dtype or keys.dtype == torch.float64:
            queries, keys = queries.float(), keys.float()
        tokens, count = keys.shape[2], queries.shape[2]
        first = (count - tokens) % every
        queries, asked = queries[:, :, first::every], range(tokens - count + first, tokens, every)
        if log_sums is None:
            return impl.greatest_attention(by, queries, keys, asked, least_distance, _by_softmax)
        return _by_sums(queries, keys, log_sums[:, :, first::every], asked, least_distance)


def _by_softmax(
    queries: Float[Tensor, "b q m d"], keys: Float[Tensor, "b h n d"], asked: range, least_distance: int
) -> Float[Tensor, "b h n"]:
    """Return what `greatest_attention` does, from the weights of some queries after the other.

    Args:
        queries: Those that are asked.
        keys: All keys; none is of padding.
        asked: The places of the queries.
        least_distance: See there.
    """
    batch, heads, tokens, head_dim = keys.shape
    groups = (queries * head_dim**-0.5).unflatten(1, (heads, -1))
    greatest = torch.zeros(batch, heads, tokens, dtype=torch.float32, device=keys.device)
    block = _BLOCK if keys.device.type == "cpu" else _LARGE_BLOCK
    step = max(block // max(batch * queries.shape[1] * tokens, 1), 1)
    for at in range(0, len(asked), step):
        part, places = groups[:, :, :, at : at + step], asked[at : at + step]
        start, stop = places[0], places[-1] + 1
        logits = (part.flatten(2, 3) @ keys[:, :, :stop].mT).float().unflatten(2, part.shape[2:4])
        comes_later = _is_near(places, range(start, stop), 0, keys.device)
        logits[..., start:].masked_fill_(comes_later, -torch.inf)
        weights = logits.softmax(-1)
        # What is far from the first of these queries is far from all, and needs no mask.
        far = max(start - least_distance + 1, 0)
        weights[..., far:].masked_fill_(_is_near(places, range(far, stop), least_distance, keys.device), 0.0)
        torch.maximum(greatest[..., :stop], weights.amax((2, 3)), out=greatest[..., :stop])
    return greatest


def _by_sums(
    queries: Float[Tensor, "b q m d"],
    keys: Float[Tensor, "b h n d"],
    log_sums: Float[Tensor, "b q m"],
    asked: range,
    least_distance: int,
) -> Float[Tensor, "b h n"]:
    """Return what `greatest_attention` does: where sums are known, the greatest logarithm is enough.

    A sum is one more channel of its query, so that products are logarithms of weights.  Near tokens are left out of
    them, and blocks are small enough to stay in a core's cache.
    """
    (batch, heads, tokens, head_dim), device = keys.shape, keys.device
    queries = torch.cat([queries * head_dim**-0.5, -log_sums[..., None]], -1)
    queries = queries.unflatten(1, (heads, -1)).flatten(0, 1)
    keys = F.pad(keys, (0, 1), value=1.0).flatten(0, 1)
    greatest = torch.full((batch * heads, tokens), -torch.inf, dtype=torch.float32, device=device)
    for head, at in product(range(batch * heads), range(0, len(asked), _ROWS)):
        some, places = queries[head, :, at : at + _ROWS].flatten(0, 1), asked[at : at + _ROWS]
        end = max(places[-1] + 1 - least_distance, 0)
        for left in range(0, end, _COLUMNS):
            right = min(left + _COLUMNS, end)
            logs = some @ keys[head, left:right].T
            near = max(places[0] - least_distance + 1, left)
            if near < right:
                is_near = _is_near(places, range(near, right), least_distance, device)
                logs.unflatten(0, (-1, len(places)))[..., near - left :].masked_fill_(is_near, -torch.inf)
            place = greatest[head, left:right]
            torch.maximum(place, logs.amax(0), out=place)
    # Of huge logits a rounding makes no weight larger than 1.
    return greatest.clamp_(max=0.0).exp_().view(batch, heads, tokens)


def _is_near(
    queries: range, tokens: range, least_distance: int, device: torch.device
) -> Bool[Tensor, "queries tokens"]:
    """Return which tokens are less than a distance before which queries, or after them."""
    query, token = (torch.arange(each.start, each.stop, each.step, device=device) for each in (queries, tokens))
    return query[:, None] - token < least_distance
