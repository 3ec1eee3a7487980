"""Does every fault, on every device and layout where it can exist, get the right verdict and hop?

`EXPECTED` is the matrix. Each test breaks all queues of one machine on which the row's fault can
exist, diagnoses the machine as an admin would, compares, repairs, and asks the guest whether its
requests are done. KICKCALL_REPEAT=10 does it ten times; KICKCALL_WRITE_DOCS=1 writes what was seen
to docs/fault-matrix.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.diagnose.states import Thresholds
from kickcall.lab.boot import boot
from kickcall.lab.faults import FAULTS
from kickcall.lab.faults_target import Target
from kickcall.lab.spec import MachineSpec, VhostUserBlk, VirtioBlk, VirtioNet, VirtioScsi
from kickcall.model import Confidence, VerdictKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.attached import AttachedMachine
    from kickcall.lab.faults import Fault
    from kickcall.lab.machine import LabMachine
    from kickcall.lab.spec import AnyDevice
    from kickcall.model import Verdict

pytestmark = [pytest.mark.rig, pytest.mark.timeout(900)]

REPEAT = int(os.environ.get("KICKCALL_REPEAT", "1"))
LIMITS = Thresholds()
WITHIN_S = 1.0
"""How long after its threshold a stall may be told."""
PAGE = Path(__file__).resolve().parents[2] / "docs" / "fault-matrix.md"

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
    ("call-suppressed",  DISKS,                  ANY,       "call-suppressed",     7),
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


def devices(layout: str, event_index: str) -> tuple[AnyDevice, ...]:
    """Return the devices of one machine. Their first queues are those of `QUEUES`."""
    packed, event_idx = layout == "packed", event_index == WITH
    in_qemu: tuple[AnyDevice, ...] = (
        VirtioBlk(id="blk0", queues=2),
        VirtioBlk(id="iot0", queues=2, iothread=True),
        VirtioBlk(id="intx0", options=("vectors=0",)),
        VirtioScsi(id="scsi0", queues=2),
        VirtioNet(id="net0"),
    )
    vhost_user: tuple[AnyDevice, ...] = (
        VhostUserBlk(id="direct0", queues=2, relay=False, disk="file"),
        VhostUserBlk(id="vub0", queues=2, relay=True, disk="file"),
    )
    # qemu-storage-daemon offers no packed queues.
    chosen = in_qemu if packed else in_qemu + vhost_user
    return tuple(
        dataclasses.replace(
            one, packed=packed, event_idx=event_idx, legacy="off" if packed else "auto"
        )
        for one in chosen
    )


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


@dataclass(frozen=True)
class Seen:
    """What a diagnosis said of a cell, and whether that was right."""

    verdict: str
    hop: int
    right: bool


class Matrix:
    """What was seen, cell by cell, and why other cells cannot exist."""

    def __init__(self) -> None:
        self.seen: dict[Cell, list[Seen]] = defaultdict(list)
        self.cannot: dict[tuple[str, str], set[str]] = defaultdict(set)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table: one line for each row and layout that ran."""
        lines: list[tuple[str, ...]] = []
        for row in EXPECTED:
            for layout in LAYOUTS:
                mine = {c: s for c, s in self.seen.items() if c.row == row and c.layout == layout}
                looks = [one for seen in mine.values() for one in seen]
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
                        f"{sum(one.right for one in looks)} of {len(looks)}",
                    )
                )
        return lines


HEADER = ("fault", "queues", "layout", "event index", "verdict", "hop", "with --probe", "right")


class Printed:
    """Prints the matrix when pytest is done, and writes it into the documentation."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        rows = self._matrix.rows()
        widths = [max(len(row[at]) for row in (HEADER, *rows)) for at in range(len(HEADER))]
        terminalreporter.section("fault matrix")
        for row in (HEADER, *rows):
            line = "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True))
            terminalreporter.write_line(line.rstrip())
        if os.environ.get("KICKCALL_WRITE_DOCS"):
            PAGE.write_text(page(self._matrix))


@pytest.fixture(scope="session")
def matrix(request: pytest.FixtureRequest) -> Matrix:
    matrix = Matrix()
    request.config.pluginmanager.register(Printed(matrix), "fault-matrix")
    return matrix


class Rig:
    """The machine of one layout and event index; a new one after a fault that cannot be undone."""

    def __init__(self, layout: str, event_index: str) -> None:
        self.layout = layout
        self.event_index = event_index
        self._spec = MachineSpec(
            devices=devices(layout, event_index),
            # Without IPv6 an idle guest sends nothing, so no queue moves that no test uses.
            kernel_arguments="ipv6.disable=1",
        )
        self._machine: LabMachine | None = None

    @property
    def machine(self) -> LabMachine:
        if self._machine is None:
            self._machine = boot(self._spec)
            # A queue that was never used tells less than one that was.
            for name, (device, queue, _) in QUEUES.items():
                if name != "net rx" and device in [one.id for one in self._machine.spec.devices]:
                    with Target(self._machine, device, queue) as target:
                        target.finish(target.request())
        return self._machine

    def discard(self) -> None:
        if self._machine is not None:
            self._machine.close()
            self._machine = None


@pytest.fixture(scope="module", params=COMBINATIONS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def rig(request: pytest.FixtureRequest, guest_image_built: object) -> Iterator[Rig]:
    rig = Rig(*request.param)
    yield rig
    rig.discard()


@pytest.mark.parametrize("name", dict.fromkeys(row.fault for row in EXPECTED))
def test_a_fault_gets_the_right_verdict(name: str, rig: Rig, matrix: Matrix) -> None:
    fault = FAULTS[name]
    chosen = cells(name, rig.layout, rig.event_index)
    if not chosen:
        pytest.skip("it cannot exist on a packed queue of the lab")
    # What stops the machine is done to one queue at a time.
    one_by_one = fault.disturbs == "machine" and name != "vm-paused"
    rounds = [[cell] for cell in chosen] if one_by_one else [chosen]
    wrong: list[str] = []
    for _ in range(REPEAT):
        for together in rounds:
            try:
                wrong += one_round(fault, together, rig.machine, matrix)
            except BaseException:
                rig.discard()
                raise
            if fault.undone_by == "reboot":
                rig.discard()
    assert not wrong, "\n".join(wrong)


def one_round(fault: Fault, together: list[Cell], machine: LabMachine, matrix: Matrix) -> list[str]:
    """Break the queues, diagnose, repair, use them again. Returns what was wrong."""
    wrong: list[str] = []
    with contextlib.ExitStack() as opened:
        ours = {
            cell: opened.enter_context(Target(machine, *QUEUES[cell.queue][:2]))
            for cell in together
        }
        # QEMU's main loop may be what stands still: then it is too late to ask its monitor.
        before = opened.enter_context(attach(machine.name))
        with contextlib.ExitStack() as broken:
            proofs = {cell: broken.enter_context(fault.on(ours[cell])) for cell in together}
            with contextlib.ExitStack() as looking:
                attached = before
                if fault.name != "main-loop-stuck":
                    attached = looking.enter_context(attach(machine.name))
                verdicts = attached.diagnose(duration_s=watch(together))
                # The first is served by QEMU, the last by another process where there is one.
                ends = dict.fromkeys((together[0], together[-1]))
                wrong += filter(None, (told_late(attached, cell) for cell in ends))
                for cell in together:
                    verdict = find(verdicts, cell)
                    seen, words = compare(cell, verdict, attached)
                    matrix.seen[cell].append(seen)
                    if not seen.right:
                        wrong.append(f"{cell} ({proofs[cell]}): {words}")
            if fault.undone_by == "reboot":
                broken.pop_all()
                return wrong
        for target in ours.values():
            target.finish(target.request())
    return wrong


def watch(together: list[Cell]) -> float:
    """Return for how long a machine has to be watched until all thresholds are reached."""
    stuck = any(cell.row.verdict == "device-stuck" for cell in together)
    return (LIMITS.device_s if stuck else LIMITS.notification_s) + 0.3


def told_late(attached: AttachedMachine, cell: Cell) -> str:
    """Watch one queue anew; return what is wrong if its verdict comes too late, else nothing."""
    if cell.row.verdict in ("device-stuck", "unknown", HEALTHY):
        return ""
    device, queue, _ = QUEUES[cell.queue]
    took = []
    # Whoever shares the processors may be in the way of one look, not of all.
    for _ in range(3):
        started = time.monotonic()
        verdicts = attached.diagnose(device, queue, duration_s=LIMITS.notification_s + 0.1)
        took.append(time.monotonic() - started)
        if took[-1] <= LIMITS.notification_s + WITHIN_S:
            return "" if compare(cell, find(verdicts, cell), attached)[0].right else f"{cell}: late"
    return f"{cell}: told after {min(took):.2f} s"


def find(verdicts: tuple[Verdict, ...], cell: Cell) -> Verdict:
    device, queue, _ = QUEUES[cell.queue]
    mine = [one for one in verdicts if one.device == f"/machine/peripheral/{device}"]
    for one in mine:
        # A device without a driver has no queues: then one verdict is on all of it.
        if one.queue == queue or len(mine) == 1:
            return one
    raise AssertionError(f"no verdict on {cell}: {verdicts}")


def compare(cell: Cell, verdict: Verdict, attached: AttachedMachine) -> tuple[Seen, str]:
    """Return whether the verdict is right, and in words what it says."""
    row = cell.row
    words = tell(verdict)
    if row.verdict == HEALTHY:
        right = not verdict.verdict.stalled
    else:
        right = (verdict.verdict, verdict.hop) == (row.verdict, row.hop)
    if right and row.probed:
        device, queue, _ = QUEUES[cell.queue]
        (probed,) = attached.diagnose(
            device, queue, duration_s=LIMITS.notification_s + 0.3, probe=True
        )
        helped = row.probed != VerdictKind.UNKNOWN
        confidence = Confidence.CONFIRMED if helped else Confidence.REFUTED
        right = (probed.verdict, probed.confidence) == (row.probed, confidence)
        words = f"with --probe {tell(probed)}"
    return Seen(verdict.verdict, verdict.hop, right), words


def tell(verdict: Verdict) -> str:
    evidence = ", ".join(f"{one.what} = {one.value}" for one in verdict.evidence)
    return f"{verdict.verdict}, hop {verdict.hop}, {verdict.confidence} ({evidence})"


def test_the_matrix_is_whole(rig: Rig, matrix: Matrix) -> None:
    """Each fault is expected exactly where the lab can make it."""
    can, expected = set(), set()
    for name, (device, queue, _) in QUEUES.items():
        if device not in [one.id for one in rig.machine.spec.devices]:
            continue
        with Target(rig.machine, device, queue) as target:
            for fault in FAULTS.values():
                reason = fault.cannot(target)
                if reason:
                    matrix.cannot[(fault.name, reason)].add(name)
                elif name != "net rx" or fault.name in ("vector-masked", "function-masked"):
                    # The receive queue is watched where the transmit queue tells nothing.
                    can.add((fault.name, name))
    for fault_name in FAULTS:
        mine = cells(fault_name, rig.layout, rig.event_index)
        expected |= {(fault_name, cell.queue) for cell in mine}
    assert expected == can


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
            "    KICKCALL_REPEAT=10 KICKCALL_WRITE_DOCS=1 pytest tests/rig/test_fault_matrix.py",
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


def test_all_verdicts_are_expected_somewhere() -> None:
    told = {row.verdict for row in EXPECTED} | {row.probed for row in EXPECTED}
    healthy = {VerdictKind.IDLE, VerdictKind.PROGRESSING}
    assert {kind for kind in VerdictKind if kind not in told} == healthy
