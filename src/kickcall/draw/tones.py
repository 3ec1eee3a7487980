"""Which colour and which mark goes with a verdict, and with a hop? Never the colour alone."""

from __future__ import annotations

import enum

from kickcall.model import VerdictKind


class Tone(enum.StrEnum):
    """How something is meant; colours follow from it, by light and dark."""

    PLAIN = "plain"
    STRONG = "strong"
    FAINT = "faint"
    GOOD = "good"
    BUSY = "busy"
    UNSURE = "unsure"
    BAD = "bad"


_UNSURE = frozenset({VerdictKind.UNKNOWN, VerdictKind.DEVICE_NOT_READY, VerdictKind.VM_NOT_RUNNING})


def tone_of(verdict: VerdictKind) -> Tone:
    """Return the tone of a verdict."""
    if verdict.stalled:
        return Tone.BAD
    if verdict in _UNSURE:
        return Tone.UNSURE
    return Tone.GOOD if verdict is VerdictKind.PROGRESSING else Tone.FAINT


MARKS: dict[Tone, str] = {Tone.BAD: "✗", Tone.UNSURE: "?", Tone.GOOD: "✓", Tone.FAINT: "·"}


def mark_of(verdict: VerdictKind) -> str:
    """Return the mark that stands before a verdict's word."""
    return MARKS[tone_of(verdict)]


def severity(verdict: VerdictKind) -> int:
    """Return how bad a verdict is: 3 stalled, 2 not known, 1 moving, 0 at rest."""
    return {Tone.BAD: 3, Tone.UNSURE: 2, Tone.GOOD: 1}.get(tone_of(verdict), 0)
