"""The style of all pictures; needs matplotlib."""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

INK = "#1f2328"
"""Colour of writing and axes; becomes the colour of the surrounding text in a page."""

STYLE: Any = {  # matplotlib spells out every key it allows
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    "svg.fonttype": "none",
    "svg.hashsalt": "nexusquant_cache",
    "font.size": 9,
}
"""What pictures are drawn and written with."""


class ShownFigure(Figure):
    """A figure that a notebook shows even where nothing has imported pyplot."""

    def _repr_png_(self) -> bytes:
        target = io.BytesIO()
        with mpl.rc_context(STYLE):
            self.savefig(target, format="png", dpi=100)
        return target.getvalue()


def save_png(figure: Figure, path: Path) -> None:
    """Write a picture on white ground, in a folder that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})


def save_picture(figure: Figure, path: Path) -> None:
    """Write a picture in the format that the ending of its name asks for."""
    with mpl.rc_context(STYLE):
        figure.savefig(path, dpi=130)


def svg_of(figure: Figure, name: str) -> str:
    """Return a picture as SVG to stand in a page: transparent, with the page's own colour of text."""
    with mpl.rc_context(STYLE):
        target = io.StringIO()
        # None of what matplotlib would say about the picture: it names addresses, which a page shall not.
        figure.savefig(target, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = target.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # Several pictures share a page: names inside a picture become its own.
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
