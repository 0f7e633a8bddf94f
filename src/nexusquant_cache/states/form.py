"""How states have been reshaped on their way from `update` to attention."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

Args = tuple[object, ...]
Kwargs = Mapping[str, object]

_TOKENS, _CHANNELS = 2, 3
_AXES = 4
_SPLIT = 5  # axes, with a copy for each query head of a group as the third


class Form(NamedTuple):
    """What models do to keys and values before they attend: one copy for each query head, and the keys transposed.

    Attributes:
        repeats: How many copies of each KV head follow one another.
        is_split: Whether the copies have an axis of their own, the third.
        is_transposed: Whether the last two axes are exchanged.
    """

    repeats: int = 1
    is_split: bool = False
    is_transposed: bool = False

    def shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of states ``[batch, kv_heads, tokens, channels]`` in this form."""
        batch, heads, tokens, channels = stored
        vectors = (channels, tokens) if self.is_transposed else (tokens, channels)
        return (batch, heads, self.repeats, *vectors) if self.is_split else (batch, heads * self.repeats, *vectors)

    def after(self, name: str, stored: Sequence[int], args: Args, kwargs: Kwargs) -> "Form | None":
        """Return the form that a torch function makes of this one; None if it makes something else of it.

        Args:
            name: The function's.
            stored: Shape of the states as the cache has them.
            args: What it is given behind the states.
            kwargs: What it is given by name.
        """
        found = None
        if name == "__getitem__":
            found = self._indexed(args[0])
        elif name in _TRANSPOSES:
            found = self._transposed(name, args, kwargs)
        elif name == "expand":
            found = self._expanded(_sizes(args, kwargs), stored)
        elif name in _RESHAPES:
            sizes = _sizes(args, kwargs)
            found = self._joined(sizes, stored) if all(isinstance(size, int) for size in sizes) else None
        elif name == "unsqueeze":
            found = self._split() if (*args, *kwargs.values()) == (_TOKENS,) else None
        elif name == "flatten":
            is_joined = self.is_split and (*args, *kwargs.values()) == (1, 2)
            found = self._replace(is_split=False) if is_joined else None
        elif name == "repeat_interleave":
            found = self._repeated(args, kwargs)
        return found

    def _transposed(self, name: str, args: Args, kwargs: Kwargs) -> "Form | None":
        if self.is_split:
            return None
        axes = _sizes(args, kwargs)
        if axes in _LAST_TWO and name != "permute":
            return Form(self.repeats, is_transposed=not self.is_transposed)
        order = list(range(_AXES))
        if name == "permute":
            asked = [axis % _AXES for axis in axes]
            order = asked if len(asked) == _AXES else order
        elif all(isinstance(axis, int) for axis in axes):
            first, second = (axis % _AXES for axis in axes)
            order[first], order[second] = order[second], order[first]
        if order == [0, 1, _CHANNELS, _TOKENS]:
            return self._replace(is_transposed=not self.is_transposed)
        return self if order == [*range(_AXES)] else None

    def _split(self) -> "Form | None":
        return Form(1, is_split=True, is_transposed=self.is_transposed) if self[:2] == (1, False) else None

    def _indexed(self, index: object) -> "Form | None":
        """Follow ``x[:, :, None]``, and indices that choose everything."""
        if index == _SPLITS:
            return self._split()
        if not isinstance(index, tuple) or not all(part is None or _is_all(part) for part in index):
            return None
        added = [place for place, part in enumerate(index) if part is None]
        return self if not added else self._split() if added == [_TOKENS] else None

    def _expanded(self, sizes: tuple[int, ...], stored: Sequence[int]) -> "Form | None":
        if len(sizes) != (_SPLIT if self.is_split else _AXES):
            return None
        wanted = Form(sizes[2], *self[1:]) if self.is_split and self.repeats == 1 and sizes[2] > 0 else self
        shape = wanted.shape(stored)
        return (
            wanted if sizes == shape or all(size in {-1, own} for size, own in zip(sizes, shape, strict=True)) else None
        )

    def _joined(self, sizes: tuple[int, ...], stored: Sequence[int]) -> "Form | None":
        """Follow a reshape that leaves everything as it is, or puts the copies behind one another."""
        joined = Form(self.repeats, is_transposed=self.is_transposed)
        if sizes == joined.shape(stored):
            return joined
        for form in (self, joined):
            shape = form.shape(stored)
            fits = len(sizes) == len(shape) and all(a in {-1, b} for a, b in zip(sizes, shape, strict=True))
            if fits and sizes.count(-1) <= 1:
                return form
        return None

    def _repeated(self, args: Args, kwargs: Kwargs) -> "Form | None":
        given = dict(zip(("repeats", "dim"), args, strict=False)) | dict(kwargs)
        repeats = given.get("repeats")
        if self.is_split or self.repeats > 1 or given.get("dim") not in {1, -3} or not isinstance(repeats, int):
            return None
        return self._replace(repeats=repeats)


def _is_all(index: object) -> bool:
    return isinstance(index, slice) and index == slice(None)


# What nearly all models ask for.
_SPLITS = (slice(None), slice(None), None, slice(None), slice(None))
_LAST_TWO = {(2, 3), (3, 2), (-1, -2), (-2, -1)}

_RESHAPES = frozenset({"reshape", "view"})
_TRANSPOSES = frozenset({"transpose", "swapaxes", "swapdims", "permute"})


def _sizes(args: Args, kwargs: Kwargs) -> tuple[int, ...]:
    """Return numbers that are given one by one or as one sequence."""
    given = (*args, *kwargs.values())
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], Sequence) else given  # type: ignore[return-value]
