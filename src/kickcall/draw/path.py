"""What is in the picture of the path: ten hops, the break marked, the evidence beneath."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.diagnose.path import HopState, path_of
from kickcall.draw.text import duration, printable, short
from kickcall.draw.tones import Tone, mark_of, tone_of
from kickcall.model import DeviceEvent, VerdictKind

if TYPE_CHECKING:
    from kickcall.model import Confidence, Verdict


class Step(enum.StrEnum):
    """How far the request came, hop by hop."""

    TAKEN = "taken"
    BROKEN = "broken"
    NOT_REACHED = "not reached"
    UNKNOWN = "unknown"
    """The verdict says nothing of the path."""


STEP_MARKS: dict[Step, str] = {
    Step.TAKEN: "✓",
    Step.BROKEN: "✗",
    Step.NOT_REACHED: "·",
    Step.UNKNOWN: "?",
}
STEP_TONES: dict[Step, Tone] = {
    Step.TAKEN: Tone.GOOD,
    Step.BROKEN: Tone.BAD,
    Step.NOT_REACHED: Tone.FAINT,
    Step.UNKNOWN: Tone.UNSURE,
}

_SEEN_ON: dict[int, tuple[str, ...]] = {
    1: ("avail.idx",),
    2: ("avail_event", "used.flags"),
    3: ("kick notifier count", "last kick that the kernel saw"),
    4: ("other holders of the kick notifier", "kick notifier in an epoll set"),
    5: ("last_avail_idx",),
    6: ("used.idx",),
    7: ("used_event", "avail.flags"),
    8: ("call notifier count", "last call that the kernel saw"),
    9: ("MSI-X vector", "MSI-X vector masked", "MSI-X vector pending"),
    10: (),
}
"""The evidence that is written at a hop, the most telling first."""
_SHORTER = {
    "used.flags": "flags",
    "avail.flags": "flags",
    "kick notifier count": "count",
    "call notifier count": "count",
    "last kick that the kernel saw": "last",
    "last call that the kernel saw": "last",
    "other holders of the kick notifier": "holders",
    "kick notifier in an epoll set": "polled",
    "MSI-X vector": "vector",
    "MSI-X vector masked": "masked",
    "MSI-X vector pending": "pending",
}
_NOTHING_PENDING = ("MSI-X vector pending", "no")
"""Says nothing, and there is little room."""
_NOT_OF_THE_PATH = frozenset(
    {VerdictKind.UNKNOWN, VerdictKind.DEVICE_NOT_READY, VerdictKind.VM_NOT_RUNNING}
)
_THREADS = 6


@dataclass(frozen=True, slots=True)
class HopPicture:
    """One hop as it is drawn."""

    number: int
    name: str
    by: str
    """Who takes the step."""
    seen_in: str
    """What shows it on the host."""
    step: Step
    values: str
    """What was read there, as `avail.idx 302`; empty where nothing was."""


@dataclass(frozen=True, slots=True)
class PathPicture:
    """The path of one queue's requests. Every text in it is printable; none is escaped for XML."""

    machine: str
    device: str
    queue: int
    verdict: VerdictKind
    tone: Tone
    mark: str
    hop: int
    """0 where no hop is broken, or none can be named."""
    confidence: Confidence
    since_s: float
    because: str
    hops: tuple[HopPicture, ...]
    evidence: tuple[tuple[str, str], ...]
    """What was read and its value, the reason left out."""
    remedy: str
    event: DeviceEvent | None
    """What a probe would inject."""

    @property
    def where(self) -> str:
        """The queue in words."""
        machine = f"{self.machine} " if self.machine else ""
        return f"{machine}{self.device} queue {self.queue}"

    @property
    def word(self) -> str:
        """The verdict in words, with its hop."""
        return f"{self.verdict} on hop {self.hop}" if self.hop else str(self.verdict)

    @property
    def lasting(self) -> str:
        """How sure and for how long, in words."""
        return f"{self.confidence}, for {duration(self.since_s)}"

    @property
    def told(self) -> str:
        """All of the picture in one sentence, for who does not see it."""
        return f"{self.where}: {self.word}, {self.lasting}. {self.because}"


def path_picture(verdict: Verdict, machine: str = "") -> PathPicture:
    """Return the picture of a verdict. `machine` is its name, where that is to be shown."""
    values: dict[str, object] = {}
    for one in verdict.evidence[1:]:
        values.setdefault(one.what, one.value)
    unknown = verdict.verdict in _NOT_OF_THE_PATH and not verdict.hop
    hops = tuple(
        HopPicture(
            number=hop.number,
            name=hop.name,
            by=hop.by,
            seen_in=hop.seen_in,
            step=Step.UNKNOWN if unknown else _STEPS[state],
            values=_values(hop.number, values),
        )
        for hop, state in path_of(verdict)
    )
    return PathPicture(
        machine=printable(machine) if machine else "",
        device=short(verdict.device),
        queue=verdict.queue,
        verdict=verdict.verdict,
        tone=tone_of(verdict.verdict),
        mark=mark_of(verdict.verdict),
        hop=verdict.hop,
        confidence=verdict.confidence,
        since_s=verdict.since_s,
        because=printable(verdict.evidence[0].value) if verdict.evidence else "",
        hops=hops,
        evidence=tuple(_evidence(verdict)),
        remedy=printable(verdict.remedy, 600),
        event=verdict.event,
    )


_STEPS = {
    HopState.TAKEN: Step.TAKEN,
    HopState.BROKEN: Step.BROKEN,
    HopState.NOT_REACHED: Step.NOT_REACHED,
}


def _values(number: int, values: dict[str, object]) -> str:
    return ", ".join(
        f"{_SHORTER.get(what, what)} {printable(values[what], 40)}"
        for what in _SEEN_ON[number]
        if what in values and (what, values[what]) != _NOTHING_PENDING
    )


def _evidence(verdict: Verdict) -> list[tuple[str, str]]:
    """Return what was read; of a back-end with very many threads only the first."""
    rows: list[tuple[str, str]] = []
    threads = 0
    for one in verdict.evidence[1:]:
        if " thread " in one.what:
            threads += 1
            if threads > _THREADS:
                continue
        rows.append((printable(one.what), printable(one.value)))
    if threads > _THREADS:
        rows.append((f"{threads - _THREADS} more threads", "diagnose --json has all"))
    return rows
