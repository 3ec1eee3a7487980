"""How are path and ring drawn as SVG? Shapes carry class names; one style sheet colours them.

With `styled` a drawing carries that style sheet itself and stands alone: in a report, a document, a
ticket. Without it has no style at all, so that a page with a strict content security policy can
show it beside its own copy of `STYLE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.draw.path import STEP_MARKS, HopPicture, PathPicture, Step
from kickcall.draw.text import clipped, duration, escaped
from kickcall.draw.tones import Tone
from kickcall.model import DeviceEvent

if TYPE_CHECKING:
    from kickcall.draw.ring import RingPicture

_LIGHT = """
--kc-paper:#ffffff;--kc-ink:#1f2328;--kc-faint:#59636e;--kc-line:#d1d9e0;--kc-box:#f6f8fa;
--kc-good:#116329;--kc-busy:#0550ae;--kc-unsure:#6639ba;--kc-bad:#b3121d;--kc-bad-box:#ffebe9;
--kc-fetch:#bc4c00;--kc-device:#0969da;--kc-reap:#8250df;--kc-track:#e6eaef;
"""
_DARK = """
--kc-paper:#0d1117;--kc-ink:#f0f6fc;--kc-faint:#9198a1;--kc-line:#3d444d;--kc-box:#151b23;
--kc-good:#56d364;--kc-busy:#79c0ff;--kc-unsure:#d2a8ff;--kc-bad:#ff8b81;--kc-bad-box:#3c1618;
--kc-fetch:#ffa657;--kc-device:#58a6ff;--kc-reap:#bc8cff;--kc-track:#262c36;
"""
COLOURS = (
    f":root{{color-scheme:light dark;{_LIGHT}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    f':root[data-theme="light"]{{color-scheme:light;{_LIGHT}}}'
    f':root[data-theme="dark"]{{color-scheme:dark;{_DARK}}}'
).replace("\n", "")
"""The colours, for light and for dark; every text has a contrast of 4.5 to 1 or more."""
STYLE = """
.kc text{font-family:system-ui,"Segoe UI","DejaVu Sans",sans-serif;fill:var(--kc-ink)}
.kc .mono{font-family:ui-monospace,"DejaVu Sans Mono",monospace}
.kc .lane{font-size:12px;font-weight:600;fill:var(--kc-faint);letter-spacing:.04em}
.kc .inject{font-size:11px;fill:var(--kc-faint)}
.kc .inject.wanted{fill:var(--kc-bad);font-weight:700}
.kc .box{fill:var(--kc-box);stroke:var(--kc-line);stroke-width:1.2}
.kc .name{font-size:14px;font-weight:600}
.kc .seen{font-size:11px;fill:var(--kc-faint)}
.kc .mark{font-size:13px;font-weight:700}
.kc .edge{fill:none;stroke:var(--kc-line);stroke-width:2}
.kc .tip{fill:var(--kc-line)}
.kc .taken .mark{fill:var(--kc-good)}
.kc .taken.edge{stroke:var(--kc-good)}
.kc .taken.tip{fill:var(--kc-good)}
.kc .unknown .mark{fill:var(--kc-unsure)}
.kc .unknown .box,.kc .not-reached .box{stroke-dasharray:4 4;fill:none}
.kc .not-reached.edge,.kc .unknown.edge{stroke-dasharray:4 5}
.kc .not-reached .name,.kc .not-reached .mark{fill:var(--kc-faint);font-weight:400}
.kc .broken .box{fill:var(--kc-bad-box);stroke:var(--kc-bad);stroke-width:2.6}
.kc .broken .name,.kc .broken .mark,.kc .broken .seen,.kc .cut{fill:var(--kc-bad)}
.kc .broken.edge{stroke:var(--kc-bad);stroke-width:2.6;stroke-dasharray:7 5}
.kc .broken.tip{fill:var(--kc-bad)}
.kc .cut{font-size:12px;font-weight:700}
.kc .word{font-size:17px;font-weight:700}
.kc .bad.word{fill:var(--kc-bad)}.kc .good.word{fill:var(--kc-good)}
.kc .unsure.word{fill:var(--kc-unsure)}.kc .faint.word{fill:var(--kc-faint)}
.kc .lasting{font-size:12px;fill:var(--kc-faint)}
.kc .track{fill:none;stroke:var(--kc-track);stroke-width:13}
.kc .arc{fill:none}
.kc .arc.fetch{stroke:var(--kc-fetch);stroke-width:15}
.kc .arc.device,.kc .arc.outstanding{stroke:var(--kc-device);stroke-width:10}
.kc .arc.reap{stroke:var(--kc-reap);stroke-width:5}
.kc.inbox .arc{stroke:var(--kc-faint);stroke-opacity:.45}
.kc .head{fill:var(--kc-ink)}
.kc .number{font-size:26px;font-weight:700;text-anchor:middle}
.kc .unit{font-size:10px;fill:var(--kc-faint);text-anchor:middle}
"""
"""The style sheet of every drawing; its colours come from `COLOURS`."""

_BOX_W, _BOX_H = 226, 46


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where the hops lie, and how each is reached from the one before."""

    width: int
    height: int
    places: tuple[tuple[int, int], ...]
    edges: tuple[str, ...]
    """For hops 2 to 10: a path's points, the last with the direction that the tip points in."""
    box_width: int = _BOX_W


_X = (4, 287, 570)
_Y = (34, 98, 162, 226, 290)


def _right(x: int, to: int, y: int) -> str:
    return f"M{x} {y}H{to}>"


_WIDE = _Plan(
    800,
    368,
    (
        (_X[0], _Y[0]),
        (_X[0], _Y[1]),
        (_X[1], _Y[1]),
        (_X[2], _Y[1]),
        (_X[2], _Y[2]),
        (_X[2], _Y[3]),
        (_X[2], _Y[4]),
        (_X[1], _Y[4]),
        (_X[1], _Y[3]),
        (_X[0], _Y[3]),
    ),
    (
        f"M{_X[0] + 113} {_Y[0] + _BOX_H}V{_Y[1]}v",
        _right(_X[0] + _BOX_W, _X[1], _Y[1] + 23),
        _right(_X[1] + _BOX_W, _X[2], _Y[1] + 23),
        f"M{_X[2] + 113} {_Y[1] + _BOX_H}V{_Y[2]}v",
        f"M{_X[2] + 113} {_Y[2] + _BOX_H}V{_Y[3]}v",
        f"M{_X[2] + 113} {_Y[3] + _BOX_H}V{_Y[4]}v",
        f"M{_X[2]} {_Y[4] + 23}H{_X[1] + _BOX_W}<",
        f"M{_X[1] + 113} {_Y[4]}V{_Y[3] + _BOX_H}^",
        f"M{_X[1]} {_Y[3] + 23}H{_X[0] + _BOX_W}<",
    ),
)
_TALL_BOX = 330
_TALL = _Plan(
    340,
    44 + 10 * 62,
    tuple((5, 44 + 62 * row) for row in range(10)),
    tuple(f"M170 {44 + 62 * row + _BOX_H}V{44 + 62 * (row + 1)}v" for row in range(9)),
    _TALL_BOX,
)


def path_svg(picture: PathPicture, *, styled: bool = False, tall: bool = False) -> str:
    """Return the path of one queue, the break marked. `tall` is for narrow screens."""
    plan = _TALL if tall else _WIDE
    parts = [_open(plan.width, plan.height, f"The path: {picture.told}", styled)]
    for hop, edge in zip(picture.hops[1:], plan.edges, strict=True):
        parts.append(_edge(edge, _css(hop.step)))
    for hop, (x, y) in zip(picture.hops, plan.places, strict=True):
        parts.append(_hop(hop, x, y, plan.box_width))
    if tall:
        parts.append(_headline(picture, 5, 18))
    else:
        parts.append(_lanes())
        parts.append(_headline(picture, _X[2], _Y[0] + 18))
        parts.append(_injections(picture))
    parts.append("</svg>")
    return "".join(parts)


def _open(width: int, height: int, told: str, styled: bool, css: str = "kc") -> str:
    style = f"<style>{COLOURS}{STYLE}</style>" if styled else ""
    size = f' width="{width}" height="{height}"' if styled else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{css}" '
        f'viewBox="0 0 {width} {height}"{size} '
        f'role="img" aria-label="{escaped(told, 600)}">{style}'
    )


def _css(step: Step) -> str:
    return step.value.replace(" ", "-")


def _hop(hop: HopPicture, x: int, y: int, width: int) -> str:
    broken = hop.step is Step.BROKEN
    seen = hop.values or hop.seen_in
    cut = ""
    if broken:
        cut = f'<text class="cut" x="{x + width - 10}" y="{y + 18}" text-anchor="end">broken</text>'
    return (
        f'<g class="{_css(hop.step)}" data-hop="{hop.number}">'
        f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{_BOX_H}" rx="9"/>'
        f'<text class="mark" x="{x + 10}" y="{y + 19}">{STEP_MARKS[hop.step]}</text>'
        f'<text class="name" x="{x + 28}" y="{y + 19}">{hop.number} {escaped(hop.name)}</text>'
        f'<text class="seen mono" x="{x + 28}" y="{y + 37}">'
        f"{escaped(clipped(seen, (width - 36) * 10 // 67))}</text>{cut}</g>"
    )


_TIPS = {
    ">": "-9 -5 L0 0 -9 5",
    "<": "9 -5 L0 0 9 5",
    "v": "-5 -9 L0 0 5 -9",
    "^": "-5 9 L0 0 5 9",
}


def _edge(edge: str, css: str) -> str:
    line, way = edge[:-1], edge[-1]
    start, end = line.replace("V", "H").removeprefix("M").split("H")
    x, y = start.split()
    at = (end, y) if way in "<>" else (x, end)
    return (
        f'<path class="edge {css}" d="{line}"/>'
        f'<path class="tip {css}" transform="translate({at[0]} {at[1]})" d="M{_TIPS[way]}Z"/>'
    )


def _lanes() -> str:
    names = ((_X[0], "GUEST · driver"), (_X[1], "BETWEEN · notifiers"), (_X[2], "HOST · back-end"))
    return "".join(f'<text class="lane" x="{x}" y="18">{name}</text>' for x, name in names)


def _headline(picture: PathPicture, x: int, y: int) -> str:
    more = f"{picture.confidence}, for {duration(picture.since_s)}"
    tone = picture.tone if picture.tone is not Tone.PLAIN else Tone.FAINT
    return (
        f'<text class="word {tone}" x="{x}" y="{y}">{picture.mark} {escaped(picture.word)}</text>'
        f'<text class="lasting" x="{x}" y="{y + 18}">{escaped(more)}</text>'
    )


def _injections(picture: PathPicture) -> str:
    """Where an injected event would enter."""
    middle = _X[1] + _BOX_W // 2
    texts = []
    for event, y, text in (
        (DeviceEvent.KICK, _Y[1] - 12, "▼ kickcall kick enters here"),
        (DeviceEvent.CALL, _Y[4] + _BOX_H + 20, "▲ kickcall call enters here"),
    ):
        wanted = " wanted" if picture.event is event and picture.verdict.stalled else ""
        texts.append(
            f'<text class="inject{wanted}" x="{middle}" y="{y}" text-anchor="middle">{text}</text>'
        )
    return "".join(texts)


_RADIUS = 43


def ring_svg(picture: RingPicture, *, styled: bool = False) -> str:
    """Return a ring. Arcs are 100 long, so that a page moves one by two attributes:
    `stroke-dasharray` (its length) and `stroke-dashoffset` (minus its start)."""
    css = "kc inbox" if picture.inbox else "kc"
    parts = [_open(120, 120, f"The ring: {picture.told}", styled, css)]
    circle = f'cx="60" cy="60" r="{_RADIUS}"'
    parts.append(f'<circle class="track" {circle}/><g transform="rotate(-90 60 60)">')
    parts += [
        f'<circle class="arc {arc.part}" {circle} pathLength="100" '
        f'stroke-dasharray="{arc.length:g} 100" stroke-dashoffset="{-arc.start:g}"/>'
        for arc in picture.arcs
    ]
    parts.append("</g>")
    if picture.problem:
        parts.append('<text class="number" x="60" y="68">?</text></svg>')
        return "".join(parts)
    unit = "waiting buffers" if picture.inbox else "outstanding"
    parts.append(
        f'<path class="head" d="M60 9 54 0 66 0Z" transform="rotate({picture.head * 3.6:.1f} '
        f'60 60)"/>'
        f'<text class="number" x="60" y="66">{picture.outstanding}</text>'
        f'<text class="unit" x="60" y="80">{unit}</text></svg>'
    )
    return "".join(parts)
