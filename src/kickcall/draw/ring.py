"""What is in the picture of a ring: published, fetched, completed and reaped around a circle."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.diagnose.states import QueueRole
from kickcall.diagnose.track import span
from kickcall.model import Layout

if TYPE_CHECKING:
    from kickcall.diagnose.states import QueueFixed, Sample

_SEEN_PERCENT = 1.5
"""An arc of one entry in a large ring is drawn at least so long (in percent of the circle)."""


class Part(enum.StrEnum):
    """Whose turn it is with the entries of an arc."""

    REAP = "reap"
    """Completed by the device; the driver has not reaped them."""
    DEVICE = "device"
    """Fetched, and not completed: the device works on them."""
    FETCH = "fetch"
    """Published; the device has not fetched them."""
    OUTSTANDING = "outstanding"
    """Published and not completed, where nobody tells how far the device has fetched."""


PART_WORDS: dict[Part, str] = {
    Part.REAP: "to reap",
    Part.DEVICE: "in the device",
    Part.FETCH: "to fetch",
    Part.OUTSTANDING: "outstanding",
}


@dataclass(frozen=True, slots=True)
class Arc:
    """One arc of the circle. `start` and `length` in percent of it, clockwise from the top."""

    part: Part
    count: int
    start: float
    length: float


@dataclass(frozen=True, slots=True)
class RingPicture:
    """A ring at one moment."""

    size: int
    layout: Layout
    inbox: bool
    """The driver leaves empty buffers here: outstanding work is normal."""
    arcs: tuple[Arc, ...]
    """In the order of the ring; those without entries are left out."""
    published: int | None
    """Positions as the ring counts them: free-running for split, OFFSET w WRAP for packed."""
    fetched: int | None
    completed: int | None
    reaped: int | None
    """As far as the driver's `used_event` tells."""
    head: float
    """Where the next entry will be published, in percent of the circle."""
    problem: str = ""
    """Why nothing can be drawn; empty where it can."""

    def count(self, part: Part) -> int:
        """Return how many entries are in that part."""
        return sum(arc.count for arc in self.arcs if arc.part is part)

    @property
    def outstanding(self) -> int:
        """How many are published and not completed."""
        return sum(arc.count for arc in self.arcs if arc.part is not Part.REAP)

    @property
    def told(self) -> str:
        """The picture in words, for who does not see it."""
        if self.problem:
            return self.problem
        counts = ", ".join(f"{arc.count} {PART_WORDS[arc.part]}" for arc in reversed(self.arcs))
        return f"{counts or 'empty'}; size {self.size}"

    def positions(self) -> tuple[tuple[str, str], ...]:
        """Return the four positions with their names, as people read them."""
        return tuple(
            (name, "-" if value is None else _position_text(self.layout, value))
            for name, value in (
                ("published", self.published),
                ("fetched", self.fetched),
                ("completed", self.completed),
                ("reaped", self.reaped),
            )
        )


def ring_picture(fixed: QueueFixed, sample: Sample) -> RingPicture:
    """Return the picture of a queue as a look found it. Never raises, whatever the ring says."""
    inbox = fixed.role is QueueRole.INBOX
    if sample.unreadable or sample.avail_idx is None or sample.used_idx is None or fixed.size < 1:
        why = sample.unreadable or "the ring's positions are not known"
        return RingPicture(fixed.size, fixed.layout, inbox, (), *_NOTHING, 0.0, why)
    published, completed = sample.avail_idx, sample.used_idx
    outstanding = span(fixed, completed, published)
    if outstanding > fixed.size:
        why = "more is published than the ring holds"
        return RingPicture(fixed.size, fixed.layout, inbox, (), *_NOTHING, 0.0, why)
    fetched = sample.last_avail_idx
    unfetched = None if fetched is None else span(fixed, fetched, published)
    if unfetched is not None and unfetched > outstanding:
        fetched = unfetched = None
    reaped = _reaped(fixed, sample, outstanding)
    to_reap = 0 if reaped is None else span(fixed, reaped, completed)
    counts: list[tuple[Part, int]] = [(Part.REAP, to_reap)]
    if unfetched is None:
        counts.append((Part.OUTSTANDING, outstanding))
    else:
        counts += [(Part.DEVICE, outstanding - unfetched), (Part.FETCH, unfetched)]
    start = _place(fixed, completed if reaped is None else reaped)
    arcs = _arcs(fixed, counts, start)
    return RingPicture(
        fixed.size,
        fixed.layout,
        inbox,
        arcs,
        published,
        fetched,
        completed,
        reaped,
        _place(fixed, published),
    )


_NOTHING = (None, None, None, None)


def _arcs(fixed: QueueFixed, counts: list[tuple[Part, int]], start: float) -> tuple[Arc, ...]:
    arcs = []
    for part, count in counts:
        if count:
            length = 100.0 * count / fixed.size
            arcs.append(Arc(part, count, round(start % 100.0, 2), round(_seen(length), 2)))
            start += length
    return tuple(arcs)


def _seen(length: float) -> float:
    return min(100.0, max(length, _SEEN_PERCENT))


def _reaped(fixed: QueueFixed, sample: Sample, outstanding: int) -> int | None:
    """Return how far the driver has reaped, where its `used_event` may say so.

    A driver that wants the next call asks for it at the entry that it will reap next (virtio 1.4,
    2.7.7.1). One that wants none leaves it behind, or far ahead: then nothing is known.
    """
    if sample.used_event is None or sample.used_idx is None or not fixed.event_idx:
        return None
    if fixed.layout is Layout.PACKED and sample.avail_flags != 2:
        return None
    behind = span(fixed, sample.used_event, sample.used_idx)
    if behind > fixed.size - outstanding:
        return None
    return sample.used_event


def _place(fixed: QueueFixed, position: int) -> float:
    entry = position & 0x7FFF if fixed.layout is Layout.PACKED else position
    return round(100.0 * (entry % fixed.size) / fixed.size, 2)


def _position_text(layout: Layout, value: int) -> str:
    return str(value) if layout is Layout.SPLIT else f"{value & 0x7FFF}w{value >> 15}"
