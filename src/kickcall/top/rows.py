"""Which queues does the table show, in which order, and what stands in their lines?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import set_cell_size

from kickcall.draw.lines import Line, Span
from kickcall.draw.spark import sparkline
from kickcall.draw.text import duration, printable, rate, short
from kickcall.draw.tones import Tone, mark_of, severity, tone_of
from kickcall.model import VerdictKind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kickcall.watch.live import LiveMachine, LiveQueue

_BUSY_S = 10.0
"""A queue that moved no longer ago stands before those that rest, so that lines do not jump."""


class Row:
    """One line of the table: a queue, or why a machine or a device has none that is watched."""

    __slots__ = ("device", "id", "kind", "machine", "name", "queue", "stalled_s", "text", "why")

    def __init__(
        self,
        machine: LiveMachine,
        device: str = "",
        queue: LiveQueue | None = None,
        kind: VerdictKind = VerdictKind.UNKNOWN,
        why: str = "",
    ) -> None:
        self.machine = machine
        self.device = device
        self.queue = queue
        self.kind = kind
        self.stalled_s = 0.0
        self.why = why
        number = "" if queue is None else f":{queue.fixed.queue}"
        self.id = (machine.key, device, -1 if queue is None else queue.fixed.queue)
        self.name = f"{short(device)}{number}" if device else ""
        self.text = f"{printable(machine.name)} {self.name}".lower()
        """What a filter looks into, besides the verdict."""


@dataclass(frozen=True, slots=True)
class Order:
    """One way to sort."""

    name: str
    key: Callable[[Row, float], tuple[object, ...]]


def _by_name(row: Row) -> tuple[object, ...]:
    return (row.machine.name, row.device, row.id[2])


def _worst(row: Row, at: float) -> tuple[object, ...]:
    queue = row.queue
    busy = queue is not None and at - queue.moved_at < _BUSY_S
    rank = severity(row.kind)
    return (-rank if rank > 1 else -busy, -round(row.stalled_s), *_by_name(row))


ORDERS: tuple[Order, ...] = (
    Order("worst first", _worst),
    Order("by name", lambda row, at: _by_name(row)),
    Order(
        "most outstanding",
        lambda row, at: (-(row.queue.outstanding if row.queue else -1), *_by_name(row)),
    ),
    Order(
        "oldest request",
        lambda row, at: (-((row.queue.age(at) or 0.0) if row.queue else -1.0), *_by_name(row)),
    ),
    Order(
        "most requests",
        lambda row, at: (-(row.queue.requests_s if row.queue else -1.0), *_by_name(row)),
    ),
)


class Rows:
    """The rows of all machines; those of a machine are made anew only when it was mapped anew."""

    def __init__(self) -> None:
        self._of: dict[LiveMachine, tuple[object, list[Row]]] = {}
        self.all = 0
        self.stalled = 0

    def chosen(
        self, machines: Sequence[LiveMachine], at: float, order: Order, words: str = ""
    ) -> list[Row]:
        """Return the rows that hold every one of `words`, in order; count all."""
        rows: list[Row] = []
        kept: dict[LiveMachine, tuple[object, list[Row]]] = {}
        for machine in machines:
            state = (machine.queues, machine.devices, machine.why_not)
            before = self._of.get(machine)
            if before is None or any(
                a is not b
                for a, b in zip(before[0], state, strict=True)  # type: ignore[call-overload]
            ):
                before = (state, list(_rows(machine)))
            kept[machine] = before
            of_all = machine.of_all(at)
            for row in before[1]:
                if row.queue is not None:
                    row.kind = of_all or row.queue.kind(at)
                    row.stalled_s = row.queue.stalled_for(at) if row.kind.stalled else 0.0
            rows += before[1]
        self._of = kept
        self.all = sum(row.queue is not None for row in rows)
        self.stalled = sum(row.kind.stalled for row in rows)
        wanted = words.lower().split()
        if wanted:
            rows = [
                row for row in rows if all(word in row.text or word in row.kind for word in wanted)
            ]
        rows.sort(key=lambda row: order.key(row, at))
        return rows


def _rows(machine: LiveMachine) -> list[Row]:
    if machine.why_not:
        return [Row(machine, why=machine.why_not)]
    rows = [Row(machine, queue.fixed.device, queue) for queue in machine.queues]
    for device in machine.devices:
        verdict = device.without_queues
        if verdict is not None:
            why = printable(verdict.evidence[0].value).removeprefix(f"{short(device.path)}: ")
            rows.append(Row(machine, device.path, None, verdict.verdict, why))
    return rows or [Row(machine, kind=VerdictKind.IDLE, why="it has no virtio device")]


@dataclass(frozen=True, slots=True)
class Columns:
    """How wide the columns are on a terminal of that width."""

    machine: int
    name: int
    spark: int
    counted: bool
    """Whether there is room for kicks and calls."""


_VERDICT, _RATE, _WORK, _AGE = 19, 5, 4, 6


def columns(width: int) -> Columns:
    """Return what fits: at 80 all but the kicks and calls."""
    counted = width >= 100
    rates = (4 if counted else 2) * (_RATE + 1)
    # Three spaces between names and numbers, one before each sparkline and one between them.
    left = max(width - _VERDICT - rates - _WORK - _AGE - 6, 24)
    spark = min(max((left - 20) // 4, 6), 30)
    names = max(left - 2 * spark, 12)
    machine = min(max(names // 2, 6), 28)
    return Columns(machine, max(names - machine, 6), spark, counted)


def head_line(plan: Columns) -> Line:
    """Return the line above the table."""
    counted = f"{'kick/s':>{_RATE + 1}} {'call/s':>{_RATE}}" if plan.counted else ""
    text = (
        f"  {'VERDICT':<{_VERDICT - 2}} {'MACHINE':<{plan.machine}} {'QUEUE':<{plan.name}} "
        f"{'req/s':>{_RATE}} {'done/s':>{_RATE + 1}}{counted}{'out':>{_WORK}}"
        f"{'':<{plan.spark + 2}}{'age':>{_AGE}}"
    )
    return (Span(text, Tone.STRONG),)


def row_line(row: Row, plan: Columns, at: float) -> Line:
    """Return the line of a row."""
    tone = tone_of(row.kind)
    verdict = Span(f"{mark_of(row.kind)} {row.kind:<{_VERDICT - 2}} ", tone)
    machine = set_cell_size(printable(row.machine.name), plan.machine)
    queue = row.queue
    if queue is None:
        name = set_cell_size(row.name, plan.name)
        return (verdict, Span(f"{machine} {name} "), Span(row.why, Tone.FAINT))
    age = queue.age(at)
    spans = [
        verdict,
        Span(f"{machine} {set_cell_size(row.name, plan.name)} "),
        Span(f"{rate(queue.requests_s, at_least=queue.at_least):>{_RATE}} "),
        Span(f"{rate(queue.completions_s, at_least=queue.at_least):>{_RATE}} "),
    ]
    if plan.counted:
        spans.append(Span(f"{rate(queue.kicks_s):>{_RATE}} {rate(queue.calls_s):>{_RATE}} "))
    work = queue.outstanding
    faint = queue.inbox or not work
    bad = tone is Tone.BAD
    if bad:
        # What the driver does not reap is no longer outstanding, and waits all the same.
        age = max(age or 0.0, row.stalled_s)
    spans += [
        Span(f"{work:>{_WORK}}", Tone.FAINT if faint else Tone.PLAIN),
        Span(
            f" {sparkline(tuple(queue.works), plan.spark)} ",
            Tone.FAINT if queue.inbox else Tone.BUSY,
        ),
        Span(
            f"{duration(age):>{_AGE}} ", tone if bad else Tone.FAINT if age is None else Tone.PLAIN
        ),
        Span(sparkline(tuple(queue.ages), plan.spark, most=1.0), tone if bad else Tone.BUSY),
    ]
    return tuple(spans)
