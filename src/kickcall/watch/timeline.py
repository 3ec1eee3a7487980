"""What happened, and when: stalls and injections from the journal, and the stalls seen just now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.draw.text import duration, printable, short
from kickcall.draw.tones import Tone
from kickcall.watch.database import JournalError
from kickcall.watch.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from kickcall.watch.rows import InjectionRow, StallRow

_SAME_S = 2.0
"""Two watchers see the same stall begin at most so far apart."""


@dataclass(frozen=True, slots=True)
class Moment:
    """One stall, or one injection. Every text in it is printable."""

    at: float
    """In seconds since the epoch."""
    until: float | None
    """When a stall was over; None: it lasts, or this is an injection."""
    stall: bool
    machine: str
    pid: int
    device: str
    queue: int
    what: str
    """`lost-kick on hop 3`, `kick via eventfd`."""
    outcome: str
    by: str
    tone: Tone


def timeline(
    path: Path | None, seen: Iterable[Moment], *, since: float, limit: int = 200
) -> tuple[list[Moment], str]:
    """Return the latest moments, oldest first; and why the journal could not be read, if so.

    A stall that was `seen` here and is in the journal, too, is told once.
    """
    problem = ""
    kept: list[Moment] = []
    try:
        journal = Journal(path, reading=True)
        try:
            kept += map(of_stall, journal.stalls(since=since, limit=limit))
            kept += map(of_injection, journal.injections(since=since, limit=limit))
        finally:
            journal.close()
    except JournalError as exc:
        problem = printable(exc)
    known = {(one.pid, one.device, one.queue): one.at for one in kept if one.stall}
    for one in seen:
        at = known.get((one.pid, one.device, one.queue))
        if one.at >= since and (at is None or abs(at - one.at) > _SAME_S):
            kept.append(one)
    return sorted(kept, key=lambda one: one.at)[-limit:], problem


def of_stall(row: StallRow) -> Moment:
    """Return a stall of the journal."""
    if row.ended is None:
        outcome = "lasts"
    else:
        outcome = f"{row.ending} after {duration(max(0.0, row.ended - row.began))}"
    return Moment(
        at=row.began,
        until=row.ended,
        stall=True,
        machine=printable(row.machine),
        pid=row.pid,
        device=short(row.device),
        queue=row.queue,
        what=printable(f"{row.verdict} on hop {row.hop}" if row.hop else row.verdict),
        outcome=printable(outcome),
        by="kickcall watch",
        tone=Tone.BAD if row.ended is None else Tone.FAINT,
    )


def of_injection(row: InjectionRow) -> Moment:
    """Return an injection of the journal."""
    moved = None not in (row.used_before, row.used_after) and row.used_before != row.used_after
    if row.outcome is None or row.outcome == "unknown":
        outcome, tone = "unknown outcome", Tone.UNSURE
    elif row.outcome != "ok":
        outcome, tone = f"{row.outcome}: {row.error}", Tone.UNSURE
    elif row.helped or (row.helped is None and moved):
        outcome, tone = "helped", Tone.GOOD
    else:
        outcome = "did not help" if row.helped is False else "written"
        tone = Tone.UNSURE
    if moved:
        outcome += f", used.idx {row.used_before} to {row.used_after}"
    return Moment(
        at=row.at,
        until=None,
        stall=False,
        machine=printable(row.machine),
        pid=row.pid,
        device=short(row.device),
        queue=row.queue,
        what=printable(f"{row.event} via {row.via}"),
        outcome=printable(outcome),
        by=printable(f"{row.by_command}[{row.by_pid}]"),
        tone=tone,
    )
