"""HTML pages that need no other file, no network and no script."""

import importlib.util
from collections.abc import Collection, Iterable, Sequence
from html import escape
from importlib import resources


def why_no_pictures(what: str) -> str:
    """Return why no picture can be drawn, for an error; an empty text if matplotlib is there.

    Args:
        what: What needs it.
    """
    if importlib.util.find_spec("matplotlib") is not None:
        return ""
    return f'{what} needs matplotlib: pip install "nexusquant-cache[cli]"'


def printable(text: str, but: str = "") -> str:
    """Return a text with escapes in place of all that is no visible character: what a file says may be anything.

    Control characters would reach a terminal, and half a surrogate pair could not be written.

    Args:
        text: The text.
        but: Characters that stay as they are.
    """
    return "".join(x if x.isprintable() or x in but else x.encode("unicode_escape").decode() for x in text)


def page(title: str, parts: Iterable[str]) -> str:
    """Return a page.

    Args:
        title: Its title, as plain text.
        parts: What it shows, as HTML.
    """
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    top = f'<!doctype html>\n<html lang="en">\n<head>{head}\n<style>\n{style}</style></head>'
    return "\n".join((top, "<body>", *parts, "</body>\n</html>\n"))


def table(
    head: Sequence[str], lines: Iterable[Sequence[str]], *, words: bool = False, texts: Collection[str] = ()
) -> str:
    """Return a table.

    Args:
        head: The headings, as plain text.
        lines: The cells of each line, as HTML.
        words: Whether all cells hold texts, which wrap, and no numbers.
        texts: Headings of columns that hold texts, which begin on the left, as those of the first column do.
    """
    kinds = [' class="text"' if name in texts else "" for name in head]

    def row(tag: str, cells: Iterable[str]) -> str:
        parts = (f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    top = f"<thead>{row('th', map(escape, head))}</thead>" if any(head) else ""
    body = "".join(row("td", line) for line in lines)
    kind = ' class="words"' if words else ""
    return f'<div class="scroll"><table{kind}>{top}<tbody>{body}</tbody></table></div>'


def details(title: str, inside: str) -> str:
    """Return something that opens with a click.

    Args:
        title: What is seen before, as plain text.
        inside: The rest, as HTML.
    """
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def figure(picture: str, caption: str) -> str:
    """Return a picture with a caption.

    Args:
        picture: The picture, as SVG.
        caption: The caption, as plain text.
    """
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"
