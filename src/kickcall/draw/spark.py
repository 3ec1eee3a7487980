"""How is a row of numbers drawn small: as blocks in a terminal, as a line in SVG?"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int, *, most: float | None = None) -> str:
    """Return the latest `width` values as blocks, the newest at the right.

    0 is a dot, so that a line of nothing is no line of little. `most` is what fills a block; the
    largest value if not given.
    """
    shown = list(values)[-width:]
    top = max(most or 0.0, max(shown, default=0.0))
    blocks = "".join(_block(value, top) for value in shown)
    return blocks.rjust(width)


def _block(value: float, top: float) -> str:
    if value <= 0 or top <= 0:
        return "·"
    return _BLOCKS[min(len(_BLOCKS) - 1, int(value / top * (len(_BLOCKS) - 0.01)))]


def spark_points(values: Sequence[float], width: float, height: float, count: int) -> str:
    """Return the points of an SVG polyline: `count` places over `width`, the newest at the right.

    Values that are missing are so at the left.
    """
    shown = list(values)[-count:]
    top = max(shown, default=0.0) or 1.0
    step = width / max(count - 1, 1)
    left = width - step * (len(shown) - 1)
    return " ".join(
        f"{left + step * place:.1f},{height - max(value, 0.0) / top * height:.1f}"
        for place, value in enumerate(shown)
    )
