"""What must a diagnosis say of every fault, and how is what it said shown?

`EXPECTED` is the matrix; tests/rig/test_fault_matrix.py makes each fault on real machines. What a
test saw travels with its report, so that the four machines may be in processes of their own.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kickcall.lab.faults import FAULTS

if TYPE_CHECKING:
    import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "fault-matrix.md"

# What is broken, by the names of the table.
QUEUES = {
    "blk": ("blk0", 0, "virtio-blk, main loop"),
    "blk iothread": ("iot0", 0, "virtio-blk, iothread"),
    "blk INTx": ("intx0", 0, "virtio-blk without MSI-X"),
    "scsi": ("scsi0", 2, "virtio-scsi, first request queue"),
    "net tx": ("net0", 1, "virtio-net, transmit queue"),
    "net rx": ("net0", 0, "virtio-net, receive queue"),
    "vhost-user": ("direct0", 0, "vhost-user-blk, qemu-storage-daemon"),
    "vhost-user relay": ("vub0", 0, "vhost-user-blk, through the lab's relay"),
}
IN_QEMU = "blk, blk iothread, blk INTx, scsi"
VHOST_USER = "vhost-user, vhost-user relay"
DISKS = f"{IN_QEMU}, {VHOST_USER}"
MSIX = f"blk, blk iothread, scsi, {VHOST_USER}"
MAIN_LOOP = "blk, blk INTx, scsi, net tx"

WITH, WITHOUT, ANY = "with", "without", "any"

HEALTHY = "healthy"
"""Any verdict that is no stall: what a queue at work looks like depends on the moment."""


@dataclass(frozen=True)
class Row:
    """One row: what a diagnosis has to say of a fault, on these queues."""

    fault: str
    queues: str
    event_index: str
    verdict: str
    hop: int
    probed: str = ""
    """Where the host cannot know: what the probe turns the verdict into."""


# fmt: off
EXPECTED = tuple(Row(*row) for row in (
    # fault              queues                  event idx  verdict               hop  by the probe
    ("lost-kick",        f"{IN_QEMU}, net tx",   ANY,       "lost-kick",           3),
    ("lost-kick",        VHOST_USER,             WITH,      "lost-kick",           3),
    ("lost-kick",        VHOST_USER,             WITHOUT,   "unknown",             0, "lost-kick"),
    ("lost-call",        DISKS,                  WITH,      "lost-call",           8),
    ("lost-call",        DISKS,                  WITHOUT,   "unknown",             0, "lost-call"),
    ("kick-suppressed",  f"{DISKS}, net tx",     ANY,       "kick-suppressed",     2),
    ("call-suppressed",  DISKS,                  WITH,      "call-suppressed",     7),
    ("call-suppressed",  MSIX,                   WITHOUT,   "call-suppressed",     7),
    # Without a vector a driver with its calls off may as well be firmware, which polls.
    ("call-suppressed",  "blk INTx",             WITHOUT,   "unknown",   0, "call-suppressed"),
    ("kick-unread",      "blk iothread",         ANY,       "kick-unread",         4),
    ("kick-unread",      VHOST_USER,             ANY,       "kick-unread",         4),
    ("main-loop-stuck",  MAIN_LOOP,              ANY,       "kick-unread",         4),
    ("device-stuck",     IN_QEMU,                ANY,       "device-stuck",        6),
    ("device-stuck",     VHOST_USER,             WITH,      "device-stuck",        6),
    ("device-stuck",     VHOST_USER,             WITHOUT,   "unknown",             0, "unknown"),
    ("device-slow",      IN_QEMU,                ANY,       HEALTHY,               0),
    # (Packets that come go on moving the receive queue, whether the driver takes them or not.)
    ("vector-masked",    f"{MSIX}, net rx",      WITH,      "interrupt-blocked",   9),
    ("vector-masked",    MSIX,                   WITHOUT,   "unknown",             0),
    ("vector-masked",    "net rx",               WITHOUT,   HEALTHY,               0),
    ("function-masked",  f"{MSIX}, net rx",      WITH,      "interrupt-blocked",   9),
    ("function-masked",  MSIX,                   WITHOUT,   "unknown",             0),
    ("function-masked",  "net rx",               WITHOUT,   HEALTHY,               0),
    ("intx-disabled",    "blk INTx",             WITH,      "interrupt-blocked",   9),
    ("intx-disabled",    "blk INTx",             WITHOUT,   "unknown",             0),
    ("driver-stuck",     DISKS,                  WITH,      "driver-stuck",       10),
    ("driver-stuck",     DISKS,                  WITHOUT,   "unknown",             0),
    ("ring-corrupt",     f"{DISKS}, net tx",     ANY,       "ring-corrupt",        1),
    ("vm-paused",        f"{DISKS}, net tx",     ANY,       "vm-not-running",      0),
    ("driver-unbound",   f"{DISKS}, net tx",     ANY,       "device-not-ready",    0),
    ("load",             f"{DISKS}, net tx",     ANY,       HEALTHY,               0),
    ("idle",             f"{DISKS}, net tx",     ANY,       HEALTHY,               0),
    # Only a reboot helps after these, so they come last.
    ("bus-master-off",   f"{DISKS}, net tx",     ANY,       "device-not-ready",    0),
    ("backend-killed",   VHOST_USER,             ANY,       "backend-gone",        4),
    ("ring-stopped",     VHOST_USER,             ANY,       "backend-gone",        4),
))
# fmt: on

LAYOUTS = ("split", "packed")
ONLY_SPLIT = ("bus-master-off",)
COMBINATIONS = [(layout, event_index) for layout in LAYOUTS for event_index in (WITH, WITHOUT)]


@dataclass(frozen=True)
class Cell:
    """One pair of the matrix: a fault on a queue of a layout, with or without event index."""

    row: Row
    queue: str
    layout: str
    event_index: str

    def __str__(self) -> str:
        return f"{self.row.fault} on {self.queue}, {self.layout}, {self.event_index} event index"


def cells(fault: str, layout: str, event_index: str) -> list[Cell]:
    return [
        Cell(row, queue, layout, event_index)
        for row in EXPECTED
        if row.fault == fault and row.event_index in (ANY, event_index)
        for queue in row.queues.split(", ")
        if layout == "split" or not (queue.startswith("vhost-user") or fault in ONLY_SPLIT)
    ]


class Record:
    """Writes what one test saw into its report, as plain values."""

    def __init__(self, properties: list[tuple[str, object]]) -> None:
        self._properties = properties

    def saw(self, cell: Cell, right: bool) -> None:
        at = EXPECTED.index(cell.row)
        where = [cell.queue, cell.layout, cell.event_index]
        self._properties.append(("saw", [at, *where, right]))

    def cannot(self, fault: str, queue: str, reason: str) -> None:
        self._properties.append(("cannot", [fault, queue, reason]))


class Matrix:
    """What was seen, cell by cell, and why other cells cannot exist."""

    def __init__(self) -> None:
        self.seen: dict[Cell, list[bool]] = defaultdict(list)
        self.cannot: dict[tuple[str, str], set[str]] = defaultdict(set)

    def take(self, name: str, values: Any) -> None:
        """Add one property of a report."""
        if name == "saw":
            at, queue, layout, event_index, right = values
            self.seen[Cell(EXPECTED[at], queue, layout, event_index)].append(right)
        elif name == "cannot":
            fault, queue, reason = values
            self.cannot[(fault, reason)].add(queue)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table: one line for each row and layout that ran."""
        lines: list[tuple[str, ...]] = []
        for row in EXPECTED:
            for layout in LAYOUTS:
                mine = {c: s for c, s in self.seen.items() if c.row == row and c.layout == layout}
                looks = [right for seen in mine.values() for right in seen]
                if not looks:
                    continue
                names = {cell.queue: None for cell in mine}
                hop = str(row.hop) if row.hop else ""
                lines.append(
                    (
                        row.fault,
                        ", ".join(names),
                        layout,
                        row.event_index,
                        row.verdict,
                        hop,
                        row.probed,
                        f"{sum(looks)} of {len(looks)}",
                    )
                )
        return lines


HEADER = ("fault", "queues", "layout", "event index", "verdict", "hop", "with --probe", "right")


def is_impossible(item: pytest.Item) -> bool:
    """Tell whether the test of a fault is one that no queue of its layout can have."""
    params: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return {"name", "rig"} <= params.keys() and not cells(params["name"], *params["rig"])


def summarize(terminal: pytest.TerminalReporter) -> None:
    """Print the matrix when pytest is done, and write it into the documentation if asked to."""
    matrix = Matrix()
    for reports in terminal.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for name, values in report.user_properties:
                    matrix.take(name, values)
    rows = matrix.rows()
    if not rows:
        return
    widths = [max(len(row[at]) for row in (HEADER, *rows)) for at in range(len(HEADER))]
    terminal.section("fault matrix")
    for row in (HEADER, *rows):
        line = "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True))
        terminal.write_line(line.rstrip())
    if os.environ.get("KICKCALL_WRITE_DOCS"):
        PAGE.write_text(page(matrix))


def page(matrix: Matrix) -> str:
    """Return docs/fault-matrix.md."""
    rows = matrix.rows()
    table = [
        "| " + " | ".join(HEADER) + " |",
        "| " + " | ".join("---" for _ in HEADER) + " |",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    faults = [f"| `{fault.name}` | {fault.what} |" for fault in FAULTS.values()]
    cannot = [
        f"| `{name}` | {', '.join(q for q in QUEUES if q in queues)} | {reason} |"
        for (name, reason), queues in matrix.cannot.items()
    ]
    queues = [f"| {name} | {what} |" for name, (_, _, what) in QUEUES.items()]
    return "\n".join(
        (
            "# Fault matrix",
            "",
            "Every fault is made on a real QEMU with a real Linux guest, on every kind of queue",
            "where it can exist, and diagnosed as an admin would diagnose it. The last column is",
            "what came of it. This page is written by `tests/rig/test_fault_matrix.py`:",
            "",
            "    KICKCALL_REPEAT=10 KICKCALL_WRITE_DOCS=1 make matrix",
            "",
            *table,
            "",
            "`unknown` is the right verdict where nothing that can be read from the host tells:",
            "without the event index the driver's progress is invisible, and so is that of a",
            "back-end outside QEMU. The column *with --probe* says what an injection makes of it",
            "(`unknown` there: it did not help, which is said, too). `healthy` is any verdict that",
            "is no stall.",
            "",
            "## The faults",
            "",
            "| fault | what is broken |",
            "| --- | --- |",
            *faults,
            "",
            "## The queues",
            "",
            "| queue | of |",
            "| --- | --- |",
            *queues,
            "",
            "## What cannot exist",
            "",
            "| fault | queues | because |",
            "| --- | --- | --- |",
            *cannot,
            "",
        )
    )
