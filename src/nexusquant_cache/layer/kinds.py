"""What the tensors of a layer are, in words for reports."""

_BY_KIND = {
    "codes": "codes",
    "key words": "codes",
    "value words": "codes",
    "scales": "scales",
    "positions": "positions",
    "transform": "axes and means",
    "transforms": "axes and means",
}
_EXACT = ("sinks", "tail")


def kind_of(name: str, kind: str) -> str:
    """Return what a tensor of a compressed layer is.

    Args:
        name: Its name, as in `layer.state.TENSORS` or in a file.
        kind: Its kind there.

    Returns:
        ``"codes"``, ``"scales"``, ``"axes and means"`` (of the transforms), ``"positions"`` of kept tokens,
        ``"sinks"``, ``"tail"``, or ``"waiting queries"``, with what attention has shown of a prompt that waits.
    """
    last = name.rpartition(".")[2]
    return _BY_KIND.get(kind) or (last if last in _EXACT else "waiting queries")
