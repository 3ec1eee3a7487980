"""Which tables tell of an incident, and what stands in their cells? The same in text and in HTML.

Pure. Cells are printable; whoever shows them escapes them for what he shows them in.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kickcall.draw.ring import ring_picture
from kickcall.draw.text import duration, printable, short

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kickcall.incident.facts import Facts, NotifierFacts, QueueFacts, ThreadFacts

_ROWS_MOST = 60
_THREADS_MOST = 24
_JOURNAL_MOST = 20


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under their columns. Columns whose name starts with `#` are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    """What is to be said below, as how many rows were left out."""


def moment(at: float | None) -> str:
    """Return a time as people anywhere read it: UTC, to the millisecond."""
    if at is None:
        return "-"
    try:
        return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3] + " UTC"
    except (ValueError, OverflowError, OSError):
        return "-"


def environment(facts: Facts) -> tuple[tuple[str, str], ...]:
    """Return what the machine and its host are, as names and values."""
    machine, host = facts.machine, facts.host
    return tuple(
        (name, printable(value))
        for name, value in (
            ("machine", f"{machine.name}, pid {machine.pid}"),
            ("state", machine.run_state or "could not be asked"),
            ("runs for", duration(machine.running_s)),
            ("QEMU", machine.version or "-"),
            ("host's kernel", host.kernel),
            ("distribution", host.distribution or "-"),
            ("processors", host.cpus),
            ("seen at", moment(facts.at)),
            ("by", f"{facts.by} (kickcall {facts.kickcall}), in {facts.took_s:.1f} s"),
        )
    )


def in_order(facts: Facts) -> tuple[Table, ...]:
    """Return every table, in the order in which a report has them."""
    return (
        queues(facts),
        notifiers(facts),
        counted(facts),
        threads(facts),
        backends(facts),
        journal(facts),
        missing(facts),
    )


def queues(facts: Facts) -> Table:
    """Return where each queue stands, those that are stalled first."""
    words = {(one.device, one.queue): one for one in (*facts.verdicts, *facts.stalls)}
    stalled = {(one.device, one.queue) for one in facts.stalls}
    every = [
        (one, words.get((one.fixed.device, one.fixed.queue)))
        for device in facts.devices
        for one in device.queues
    ]
    every.sort(key=lambda two: (two[0].fixed.device, two[0].fixed.queue) not in stalled)
    rows = [_queue_row(one, "-" if said is None else f"{said.verdict}") for one, said in every]
    return _table(
        "Queues",
        (
            *("device", "#queue", "back-end", "layout", "#size"),
            *("#published", "#fetched", "#completed", "#outstanding"),
            *("#kicks", "#calls", "verdict"),
        ),
        rows,
        "kicks, calls: the counts of the notifiers at the end.",
    )


def _queue_row(one: QueueFacts, word: str) -> tuple[str, ...]:
    fixed, state = one.fixed, one.state
    positions = ("-", "-", "-")
    if one.last is not None:
        named = dict(ring_picture(fixed, one.last).positions())
        positions = (named["published"], named["fetched"], named["completed"])
    return (
        short(fixed.device),
        str(fixed.queue),
        str(fixed.backend),
        str(fixed.layout) + (", event index" if fixed.event_idx else ""),
        str(fixed.size),
        *positions,
        printable(state.outstanding),
        "-" if state.kick is None else str(state.kick.count),
        "-" if state.call is None else str(state.call.count),
        word,
    )


def notifiers(facts: Facts) -> Table:
    """Return each notifier and who holds it, those of stalled queues first."""
    stalled = {(one.device, one.queue) for one in facts.stalls}
    every = sorted(facts.notifiers, key=lambda one: (one.device, one.queue) not in stalled)
    note = ""
    if facts.hidden_processes:
        note = f"{facts.hidden_processes} processes could not be looked at."
    return _table(
        "Notifiers",
        ("device", "#queue", "event", "#eventfd id", "#fd", "#count", "flags", "held by"),
        [_notifier_row(one) for one in every],
        note,
    )


def _notifier_row(one: NotifierFacts) -> tuple[str, ...]:
    held = ", ".join(f"{holder.comm}[{holder.pid}] fd {holder.fd}" for holder in one.holders)
    return (
        short(one.device),
        str(one.queue),
        str(one.event),
        str(one.eventfd_id),
        str(one.fd),
        str(one.count),
        f"{one.flags:#o}",
        printable(held),
    )


def threads(facts: Facts) -> Table:
    """Return what the threads do, those named in the evidence of a stall first."""
    said = " ".join(evidence.what for one in facts.stalls for evidence in one.evidence)
    named = {word for word in said.split() if word.isdigit()}
    every = sorted(facts.threads, key=lambda one: str(one.tid) not in named)
    rows = [_thread_row(one) for one in every]
    note = "ran: between the first look and the last, some seconds later."
    if len(rows) > _THREADS_MOST:
        note += f" {len(rows) - _THREADS_MOST} more are left out."
    return Table(
        "Threads",
        ("#process", "thread", "state", "waits in", "ran", "kernel stack, innermost first"),
        tuple(rows[:_THREADS_MOST]),
        note,
    )


_STATES = {"R": "running", "S": "sleeping", "D": "disk sleep", "T": "stopped", "t": "traced"}


def _thread_row(one: ThreadFacts) -> tuple[str, ...]:
    return (
        str(one.pid),
        printable(f"{one.comm}[{one.tid}]"),
        _STATES.get(one.state, printable(one.state) or "gone"),
        printable(one.waits_in) or "-",
        "yes" if one.moved else "no",
        printable(" < ".join(one.stack) or one.wchan) or "-",
    )


def backends(facts: Facts) -> Table:
    """Return the processes that serve queues from outside."""
    return _table(
        "Back-ends",
        ("#pid", "name", "command line"),
        [
            (str(one.pid), printable(one.comm), printable(" ".join(one.command), 1000))
            for one in facts.backends
        ],
    )


def counted(facts: Facts) -> Table:
    """Return what the kernel counted."""
    return _table(
        "Counted by the kernel",
        ("device", "#queue", "event", "#count", "last", "by"),
        [
            (
                short(one.device),
                str(one.queue),
                str(one.event),
                str(one.total),
                moment(one.last_at),
                printable(one.by),
            )
            for one in facts.counts or ()
        ],
    )


def journal(facts: Facts) -> Table:
    """Return what the journal has of the machine, the latest last."""
    entries = facts.journal or ()
    note = ""
    if len(entries) > _JOURNAL_MOST:
        note = f"{len(entries) - _JOURNAL_MOST} earlier ones are left out."
    return Table(
        "What was seen and done before",
        ("when", "device", "#queue", "what", "outcome"),
        tuple(
            (
                moment(_number(one.get("at"))),
                short(str(one.get("device", ""))),
                printable(one.get("queue")),
                printable(one.get("what")),
                printable(one.get("outcome")),
            )
            for one in entries[-_JOURNAL_MOST:]
        ),
        note,
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def missing(facts: Facts) -> Table:
    """Return what could not be had, and why."""
    rows = [(printable(one.part), printable(one.why)) for one in facts.missing]
    return _table("What could not be had", ("part", "why"), rows)


def _table(
    title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]], note: str = ""
) -> Table:
    every = tuple(rows)
    if len(every) > _ROWS_MOST:
        note = f"{note} {len(every) - _ROWS_MOST} more are left out.".strip()
    return Table(title, columns, every[:_ROWS_MOST], note)
