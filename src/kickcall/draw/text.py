"""How is text that comes from a machine made harmless: in a terminal, in HTML, in SVG, in a log?"""

from __future__ import annotations

import unicodedata
from xml.sax.saxutils import escape

MOST = 300
"""Characters of one text that are shown."""
_MARKS = 2
"""Combining marks that one character may carry; more of them pile up over the lines around."""


def printable(value: object, most: int = MOST) -> str:
    """Return `value` as one line that cannot steer a terminal or turn its neighbours around.

    Left out are control and format characters (escape sequences, newlines, bidirectional marks,
    zero-width characters), surrogates, and all but the first combining marks of a character.
    None is `-`.
    """
    if value is None:
        return "-"
    text = str(value)
    cut = len(text) > most
    kept: list[str] = []
    marks = 0
    for char in text[:most]:
        if char.isascii():
            kept.append(char if char.isprintable() else "�")
            marks = 0
        elif unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me"):
            marks += 1
            if marks <= _MARKS and kept:
                kept.append(char)
        else:
            kept.append(char if char.isprintable() else "�")
            marks = 0
    return "".join(kept) + ("…" if cut else "")


def escaped(value: object, most: int = MOST) -> str:
    """Return `value` for HTML and SVG: printable, and never markup, in content or in attributes."""
    return escape(printable(value, most), {'"': "&quot;", "'": "&#39;"})


def short(device: str) -> str:
    """Return the short name of a device: its id, for one that the user named."""
    return printable(device.removeprefix("/machine/peripheral/").removeprefix("/machine/"))


def clipped(text: str, width: int) -> str:
    """Return `text` in at most `width` characters, with an ellipsis where some are left out."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def duration(seconds: float | None) -> str:
    """Return a duration as people read it: `0.4 s`, `12 s`, `3 min`, `2 h`."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def rate(per_second: float | None, *, at_least: bool = False) -> str:
    """Return a rate as people read it: `0`, `0.5`, `12`, `3.4k`."""
    if per_second is None:
        return "-"
    mark = "≥" if at_least and per_second else ""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if per_second >= size:
            scaled = per_second / size
            return f"{mark}{scaled:.0f}{unit}" if scaled >= 100 else f"{mark}{scaled:.1f}{unit}"
    if 0 < per_second < 9.95:
        return f"{mark}{per_second:.1f}"
    return f"{mark}{per_second:.0f}"
