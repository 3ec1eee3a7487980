"""How are path and ring drawn in text: lines of spans, with a tone each, or plain?

Whoever has a terminal turns tones into colours (`kickcall top`); without, `plain` gives the text.
Words and marks say all that the colours say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.draw.path import STEP_MARKS, STEP_TONES, PathPicture, Step
from kickcall.draw.ring import PART_WORDS, Part, RingPicture
from kickcall.draw.text import clipped
from kickcall.draw.tones import Tone

if TYPE_CHECKING:
    from collections.abc import Iterable

BROKEN_HERE = "◀── broken here"
_CELLS: dict[Part, str] = {
    Part.REAP: "░",
    Part.DEVICE: "▓",
    Part.FETCH: "█",
    Part.OUTSTANDING: "▓",
}
PART_TONES: dict[Part, Tone] = {
    Part.REAP: Tone.UNSURE,
    Part.DEVICE: Tone.BUSY,
    Part.FETCH: Tone.STRONG,
    Part.OUTSTANDING: Tone.BUSY,
}


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of text with one tone."""

    text: str
    tone: Tone = Tone.PLAIN


Line = tuple[Span, ...]


def plain(lines: Iterable[Line]) -> str:
    """Return lines as text without colours."""
    return "\n".join("".join(span.text for span in line).rstrip() for line in lines)


def path_lines(picture: PathPicture, width: int = 80) -> list[Line]:
    """Return the headline, why, and the ten hops with the break marked."""
    lines: list[Line] = [
        (
            Span(f"{picture.where}: "),
            Span(f"{picture.mark} {picture.word}", picture.tone),
            Span(f", {picture.lasting}", Tone.FAINT),
        )
    ]
    lines += [(Span(f"  {text}"),) for text in wrapped(picture.because, width - 2)]
    return lines + hop_lines(picture, width)


def hop_lines(picture: PathPicture, width: int = 80) -> list[Line]:
    """Return the ten hops, one a line."""
    lines: list[Line] = []
    for hop in picture.hops:
        tone = STEP_TONES[hop.step]
        mark = f" {STEP_MARKS[hop.step]} {hop.number:2} "
        where = f"{hop.name:<11}{hop.by:<10}"
        broken = hop.step is Step.BROKEN
        told = hop.values or f"({hop.seen_in})"
        room = width - len(mark) - len(where) - (len(BROKEN_HERE) + 2 if broken else 0)
        told = clipped(told, max(room, 8))
        quiet = tone if broken else Tone.FAINT
        if broken:
            lines.append(
                (
                    Span(mark, tone),
                    Span(where, tone),
                    Span(told, tone),
                    Span(f"  {BROKEN_HERE}", tone),
                )
            )
        elif hop.step is Step.TAKEN:
            value = Tone.PLAIN if hop.values else Tone.FAINT
            lines.append((Span(mark, tone), Span(where), Span(told, value)))
        else:
            lines.append((Span(mark, quiet), Span(where, quiet), Span(told, quiet)))
    return lines


def evidence_lines(picture: PathPicture, width: int = 80) -> list[Line]:
    """Return what to do next, and what was read."""
    lines: list[Line] = []
    if picture.remedy and picture.tone is Tone.BAD:
        first, *more = wrapped(picture.remedy, width - 8)
        lines.append((Span("  next: ", Tone.STRONG), Span(first, Tone.STRONG)))
        lines += [(Span(f"        {text}", Tone.STRONG),) for text in more]
    name = min(max((len(what) for what, _ in picture.evidence), default=0), width // 2)
    lines += [
        (
            Span(f"  {clipped(what, name):<{name}}  ", Tone.FAINT),
            Span(clipped(value, max(width - name - 4, 8))),
        )
        for what, value in picture.evidence
    ]
    return lines


def ring_line(picture: RingPicture, width: int = 32) -> Line:
    """Return the ring, cut open where the oldest entry lies, and what the parts mean in words."""
    if picture.problem:
        return (Span(f"ring: {picture.problem}", Tone.UNSURE),)
    spans = [Span("[")]
    left = width
    for arc in picture.arcs:
        cells = min(left, max(1, round(arc.count * width / picture.size)))
        spans.append(Span(_CELLS[arc.part] * cells, PART_TONES[arc.part]))
        left -= cells
    spans += [Span("·" * left, Tone.FAINT), Span("] ")]
    for number, arc in enumerate(picture.arcs):
        comma = ", " if number else ""
        text = f"{comma}{arc.count} {PART_WORDS[arc.part]}"
        spans.append(Span(text, PART_TONES[arc.part]))
    if not picture.arcs:
        spans.append(Span("empty", Tone.FAINT))
    return (*spans, Span(f" of {picture.size}", Tone.FAINT))


def wrapped(text: str, width: int) -> list[str]:
    """Return `text` in lines of at most `width` characters."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
        while len(lines[-1]) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return lines
