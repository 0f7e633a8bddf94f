"""Growing buffers, original positions, and the two together."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors, is_there
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.positions import PositionMap
from nexusquant_cache.layer.state import LayerState
from nexusquant_cache.layer.tokens import Buffer, PackedSide, PackedTokens, RaggedBuffer, TokenBuffer, chosen

CPU = torch.device("cpu")

steps = st.lists(st.sampled_from([1, 1, 16, 16, 17, 64, 300]), max_size=40)


def storage_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


class TestTokenBuffer:
    @given(st.integers(0, 50), steps, st.sampled_from([(1, 1), (2, 3)]), st.sampled_from([(), (24,)]))
    def test_appending_is_concatenation(self, first, lengths, heads, rest) -> None:
        """The view after some appends is the concatenation of all parts."""
        parts = [torch.randint(0, 255, (*heads, n, *rest), dtype=torch.uint8) for n in (first, *lengths)]
        buffer = TokenBuffer.of(parts[0])
        for part in parts[1:]:
            buffer.append(part)
        assert buffer.tokens == sum(part.shape[2] for part in parts)
        assert torch.equal(buffer.view(), torch.cat(parts, 2))

    @given(st.integers(0, 40_000), steps)
    def test_unused_room_is_small(self, first, lengths) -> None:
        """Held and not used: at most 32 tokens or 1/256 (below 0.4 %) of what is stored, after every append."""
        buffer = TokenBuffer.of(torch.zeros(1, 1, first, 2, dtype=torch.uint8))
        assert buffer.data.shape[2] == first
        for length in lengths:
            buffer.append(torch.zeros(1, 1, length, 2, dtype=torch.uint8))
            held = buffer.data.untyped_storage().nbytes() // 2
            assert held == buffer.data.shape[2]
            assert held - buffer.tokens <= max(32, buffer.tokens // 256)

    def test_most_appends_copy_nothing(self) -> None:
        """Token by token, 32k tokens are moved once in 128 appends."""
        buffer = TokenBuffer.of(torch.zeros(1, 1, 32768, 1, dtype=torch.uint8))
        moves = 0
        for _ in range(512):
            before = buffer.data
            buffer.append(torch.ones(1, 1, 1, 1, dtype=torch.uint8))
            moves += buffer.data is not before
        assert moves == 4

    def test_view_shares_memory(self) -> None:
        buffer = TokenBuffer.of(torch.zeros(1, 2, 3, 4))
        buffer.append(torch.ones(1, 2, 1, 4))
        assert buffer.view().data_ptr() == buffer.data.data_ptr()

    def test_appending_leaves_the_given_tensor_alone(self) -> None:
        given_tensor = torch.zeros(1, 2, 3, 4)
        buffer = TokenBuffer.of(given_tensor)
        buffer.append(torch.ones(1, 2, 2, 4))
        assert torch.equal(given_tensor, torch.zeros(1, 2, 3, 4))

    def test_appending_nothing(self) -> None:
        buffer = TokenBuffer.of(torch.ones(1, 2, 3))
        before = buffer.data
        buffer.append(torch.ones(1, 2, 0))
        assert buffer.data is before
        assert buffer.tokens == 3

    @pytest.mark.parametrize("shape", [(2, 3, 10, 4), (1, 1, 10, 4)])
    def test_map_drops_unused_room(self, shape) -> None:
        """Also where the function returns what it was given, as ``.to`` on the same device does."""
        buffer = TokenBuffer.of(torch.rand(shape))
        buffer.append(torch.rand(*shape[:2], 1, 4))
        stored = buffer.view().clone()
        buffer.move(lambda x: x)
        assert torch.equal(buffer.view(), stored)
        assert storage_bytes(buffer.data) == 4 * stored.numel()

    def test_map_reorders_the_batch_and_appending_goes_on(self) -> None:
        first, second = torch.rand(2, 1, 5, 4), torch.rand(3, 1, 2, 4)
        buffer = TokenBuffer.of(first)
        buffer.append(first[:, :, :1])
        order = torch.tensor([1, 0, 1])
        buffer.map_rows(lambda x: x.index_select(0, order))
        buffer.append(second)
        expected = torch.cat([torch.cat([first, first[:, :, :1]], 2)[order], second], 2)
        assert torch.equal(buffer.view(), expected)


def ragged(draw: st.DrawFn) -> tuple[RaggedBuffer, list[list[Tensor]]]:
    """Draw a buffer of which each row and head has its own number of tokens, and what is in it."""
    batch, heads, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([(), (4,)]))
    counts = torch.tensor(draw(st.lists(st.integers(0, 6), min_size=batch * heads, max_size=batch * heads)))
    rows = torch.rand(int(counts.sum()), *width)
    parts = rows.split(counts.tolist())
    return RaggedBuffer.of(rows, counts.view(batch, heads)), [
        list(parts[row * heads : (row + 1) * heads]) for row in range(batch)
    ]


def contents(buffer: Buffer) -> list[Tensor]:
    """Return what each row and head has, one behind the other."""
    if isinstance(buffer, TokenBuffer):
        return list(buffer.stored().flatten(0, 1))
    return list(buffer.stored().split((buffer.counts.flatten() + buffer.rest.tokens).tolist()))


class TestRaggedBuffer:
    @given(st.data())
    def test_agrees_with_lists(self, data) -> None:
        """After any appends, choices, cuts of what was appended and changes of rows, heads have what lists have."""
        buffer, lists = data.draw(st.composite(ragged)())
        for _ in range(data.draw(st.integers(1, 4))):
            batch, heads, tokens = len(lists), len(lists[0]), buffer.tokens
            step = data.draw(st.sampled_from(["append", "choose", "rows", "crop", "file", "move"]))
            if step == "append":
                new = torch.rand(batch, heads, data.draw(st.integers(0, 40)), *lists[0][0].shape[1:])
                buffer.append(new)
                lists = [[torch.cat([x, new[b, h]]) for h, x in enumerate(row)] for b, row in enumerate(lists)]
            elif step == "choose":
                generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
                stay = (torch.rand(batch, heads, tokens, generator=generator) < 0.6) & places_of(buffer)
                whole = buffer.rectangle().clone()
                counts = stay.sum(-1)
                buffer = chosen(buffer, stay, None if bool((counts == counts.max()).all()) else counts)
                lists = [[whole[b, h][stay[b, h]] for h in range(heads)] for b in range(batch)]
            elif step == "rows":
                rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3)))
                counts = buffer.counts[rows] if isinstance(buffer, RaggedBuffer) else None
                buffer.map_rows(lambda x: x.index_select(0, rows), counts)  # noqa: B023 - called at once
                lists = [lists[row] for row in rows.tolist()]
            elif step == "crop" and isinstance(buffer, RaggedBuffer):
                gone = data.draw(st.integers(0, buffer.rest.tokens))
                buffer.crop(tokens - gone)
                lists = [[x[: len(x) - gone] for x in row] for row in lists]
            elif step == "file" and isinstance(buffer, RaggedBuffer):
                buffer = RaggedBuffer.of(buffer.stored(), buffer.counts, buffer.rest.tokens)
            elif step == "move":
                buffer.move(torch.clone)
            assert all(
                torch.equal(*pair) for pair in zip(contents(buffer), [x for row in lists for x in row], strict=True)
            )

    def test_holds_no_more_than_it_has(self) -> None:
        """Heads with 5, 1, 0 and 2 tokens of 8 bytes hold 64 bytes, in one piece."""
        whole = torch.rand(1, 4, 9, 2)
        counts = torch.tensor([[5, 1, 0, 2]])
        buffer = chosen(TokenBuffer.of(whole), torch.arange(9) < counts[..., None], counts)
        assert isinstance(buffer, RaggedBuffer)
        assert sum(storage_bytes(x) for x in buffer.on_the_way) == 64


def places_of(buffer: Buffer) -> Tensor:
    """Return which places of a buffer hold tokens."""
    if isinstance(buffer, TokenBuffer):
        return torch.ones((*buffer.data.shape[:2], buffer.tokens), dtype=torch.bool)
    return F.pad(is_there(buffer.counts, CPU), (0, buffer.rest.tokens), value=True)


class NaivePositions:
    """A list of kept positions per head: what a `PositionMap` must agree with."""

    def __init__(self, start: int, batch: int, heads: int) -> None:
        self.next = start
        self.kept: list[list[list[int]]] = [[[] for _ in range(heads)] for _ in range(batch)]

    def append(self, keep: Tensor) -> None:
        for kept, bits in zip(self.kept, keep.tolist(), strict=True):
            for head, row in zip(kept, bits, strict=True):
                head += [self.next + i for i, bit in enumerate(row) if bit]
        self.next += keep.shape[-1]


def keep_mask(batch: int, heads: int, tokens: int, count: int, *, seed: int, spread: int = 0) -> Tensor:
    """Return a mask with ``count`` tokens kept in every head, other ones in each, or up to ``spread`` fewer."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, heads, tokens, generator=generator).argsort(-1)
    return order < count - torch.randint(0, spread + 1, (batch, heads, 1), generator=generator)


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, int, list[tuple[int, Tensor | None]]]:
    """Draw a start, batch, heads, and appends: a mask, or None where all tokens are kept."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    appends = []
    for _ in range(draw(st.integers(0, 6))):
        tokens = draw(st.sampled_from([1, 2, 7, 8, 9, 16, 33]))
        mask = None
        if draw(st.booleans()):
            count, seed = draw(st.integers(0, tokens)), draw(st.integers(0, 2**16))
            mask = keep_mask(batch, heads, tokens, count, seed=seed, spread=draw(st.integers(0, 3)))
        appends.append((tokens, mask))
    return draw(st.sampled_from([0, 4, 100_000])), batch, heads, appends


def reorder(positions: PositionMap, rows: Tensor) -> None:
    positions.map_rows(lambda x: x.index_select(0, rows))


def listed(positions: PositionMap, batch: int, heads: int) -> list[list[list[int]]]:
    """Return the kept positions of each row and head."""
    found, visible = positions.positions(CPU).expand(batch, heads, -1), positions.visible()
    visible = torch.ones_like(found, dtype=torch.bool) if visible is None else visible
    return [[x[there].tolist() for x, there in zip(*row, strict=True)] for row in zip(found, visible, strict=True)]


class TestPositionMap:
    @given(histories())
    def test_agrees_with_a_list(self, history) -> None:
        """After any appends the positions are those of the kept tokens, ascending, per head."""
        start, batch, heads, appends = history
        positions, naive, evicted = PositionMap(start), NaivePositions(start, batch, heads), False
        for tokens, mask in appends:
            if mask is None:
                positions.append_all(tokens)
                mask = torch.ones(batch, heads, tokens, dtype=torch.bool)  # noqa: PLW2901 - all are kept
            else:
                evicted = True
                positions.append(mask)
            naive.append(mask)
            found = positions.positions(CPU)
            assert found.ndim == (3 if evicted else 1)
            assert listed(positions, batch, heads) == naive.kept
            assert positions.tokens == found.shape[-1]
            assert positions.mean_tokens == pytest.approx(
                sum(len(head) for row in naive.kept for head in row) / (batch * heads)
            )
            assert positions.start + positions.covered + positions.dense == naive.next

    @given(histories(), st.data())
    def test_the_bitmap_follows_the_batch(self, history, data) -> None:
        """Reordering the batch and appending afterwards is appending and reordering."""
        start, batch, _, appends = history
        rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3)))
        before, after = PositionMap(start), PositionMap(start)
        cut = len(appends) // 2
        for i, (tokens, mask) in enumerate(appends):
            if i == cut:
                reorder(before, rows)
            for positions, moved in ((before, i >= cut), (after, False)):
                if mask is None:
                    positions.append_all(tokens)
                else:
                    positions.append(mask[rows] if moved else mask)
        if cut == len(appends):
            reorder(before, rows)
        reorder(after, rows)
        assert torch.equal(before.positions(CPU), after.positions(CPU))
        assert before.tokens == after.tokens

    @given(histories(), st.data())
    def test_crops(self, history, data) -> None:
        """What is left is what stood before the end, and the places that stay are its places."""
        start, batch, heads, appends = history
        positions = PositionMap(start)
        for tokens, mask in appends:
            if mask is None:
                positions.append_all(tokens)
            else:
                positions.append(mask)
        end = data.draw(st.integers(start + (0 if positions.bitmap is not None else positions.covered), positions.end))
        before = positions.positions(CPU).expand(batch, heads, -1)
        expected = [[[at for at in head if at < end] for head in row] for row in listed(positions, batch, heads)]
        stay = positions.crop(end)
        assert listed(positions, batch, heads) == expected
        if isinstance(stay, int):
            stay = torch.arange(before.shape[-1]).expand_as(before) < stay
            stay = stay if positions.visible() is None else stay & before.lt(end)
        places = [[x[there].tolist() for x, there in zip(*row, strict=True)] for row in zip(before, stay, strict=True)]
        assert [[list(dict.fromkeys(head)) for head in row] for row in places] == expected

    def test_a_bit_per_token_and_head(self) -> None:
        positions = PositionMap(4)
        positions.append(keep_mask(2, 3, 1000, 400, seed=0))
        assert positions.bitmap is not None
        assert storage_bytes(positions.bitmap) == 2 * 3 * 125
        positions.append_all(5000)
        assert storage_bytes(positions.bitmap) == 2 * 3 * 125

    def test_nothing_is_held_while_all_tokens_are_kept(self) -> None:
        positions = PositionMap(4)
        positions.append_all(100)
        positions.append_all(28)
        assert positions.bitmap is None
        assert torch.equal(positions.positions(CPU), torch.arange(4, 132))

    def test_bits_by_hand(self) -> None:
        """Token ``start + i`` is bit ``i % 8`` of byte ``i // 8``."""
        positions = PositionMap(2)
        positions.append_all(3)
        positions.append(torch.tensor([[[0, 1, 0, 0, 0, 1, 0, 0, 1]]], dtype=torch.bool))
        assert positions.bitmap is not None
        assert positions.bitmap.tolist() == [[[0b00010111, 0b00001001]]]
        assert positions.positions(CPU).tolist() == [[[2, 3, 4, 6, 10, 13]]]


def packed_layer(tokens: int = 20) -> tuple[E8Codec, PackedTokens, Tensor]:
    codec = E8Codec(CodeLayout.uniform(16, 3), center=True)
    x = torch.randn(3, 2, tokens, 16)
    transform = codec.fit(x)
    sides = [PackedSide.of(codec.encode(x, transform), transform) for _ in range(2)]
    positions = PositionMap(4)
    positions.append(keep_mask(3, 2, 2 * tokens, tokens, seed=1))
    return codec, PackedTokens(*sides, positions), x


class TestPackedTokens:
    def test_side_appends_codes(self) -> None:
        codec, body, x = packed_layer()
        transform, more = body.keys.transform, torch.randn(3, 2, 7, 16)
        body.keys.append(codec.encode(more, transform))
        expected = PackedVectors.cat([codec.encode(part, transform) for part in (x, more)])
        assert torch.equal(body.keys.packed().words, expected.words)
        assert torch.equal(body.keys.packed().scales, expected.scales)
        assert body.keys.packed().tokens == 27

    def test_map_follows_the_batch_everywhere(self) -> None:
        codec, body, _ = packed_layer()
        rows = torch.tensor([2, 0, 0, 1])
        before = [codec.decode(side.packed(), side.transform)[rows] for side in (body.keys, body.values)]
        kept = body.positions.positions(CPU)[rows]
        LayerState(0, body=body).map_rows(lambda x: x.index_select(0, rows))
        after = [codec.decode(side.packed(), side.transform) for side in (body.keys, body.values)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert torch.equal(body.positions.positions(CPU), kept)
