"""Does every fault, on every device and layout where it can exist, get the right verdict and hop?

`EXPECTED` is the matrix. Each test breaks all queues of one machine on which the row's fault can
exist, diagnoses the machine as an admin would, compares, repairs, and asks the guest whether its
requests are done. KICKCALL_REPEAT=10 does it ten times; KICKCALL_WRITE_DOCS=1 writes what was seen
to docs/fault-matrix.md. The four machines may be in processes of their own (`pytest -n 4 --dist
loadgroup`): what each test saw travels with its report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from typing import TYPE_CHECKING

import pytest

from fault_matrix import COMBINATIONS, EXPECTED, HEALTHY, QUEUES, WITH, Record, cells
from kickcall.attached import attach
from kickcall.diagnose.states import Thresholds
from kickcall.lab.boot import boot
from kickcall.lab.faults import FAULTS
from kickcall.lab.faults_target import Target
from kickcall.lab.spec import MachineSpec, VhostUserBlk, VirtioBlk, VirtioNet, VirtioScsi
from kickcall.model import Confidence, VerdictKind
from witness import was_asked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fault_matrix import Cell
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


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    return Record(request.node.user_properties)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(pair, id="-".join(pair), marks=pytest.mark.xdist_group("-".join(pair)))
        for pair in COMBINATIONS
    ],
)
def rig(request: pytest.FixtureRequest, guest_image_built: object) -> Iterator[Rig]:
    rig = Rig(*request.param)
    yield rig
    rig.discard()


@pytest.mark.parametrize("name", dict.fromkeys(row.fault for row in EXPECTED))
def test_a_fault_gets_the_right_verdict(name: str, rig: Rig, record: Record) -> None:
    fault = FAULTS[name]
    chosen = cells(name, rig.layout, rig.event_index)
    # What stops the machine is done to one queue at a time.
    one_by_one = fault.disturbs == "machine" and name != "vm-paused"
    rounds = [[cell] for cell in chosen] if one_by_one else [chosen]
    wrong: list[str] = []
    for _ in range(REPEAT):
        for together in rounds:
            try:
                wrong += one_round(fault, together, rig.machine, record)
            except BaseException:
                rig.discard()
                raise
            if fault.undone_by == "reboot":
                rig.discard()
    assert not wrong, "\n".join(wrong)


def one_round(fault: Fault, together: list[Cell], machine: LabMachine, record: Record) -> list[str]:
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
                if fault.name != "main-loop-stuck" and not all(map(has_what_it_needs, verdicts)):
                    verdicts = attached.diagnose(duration_s=watch(together))
                # The first is served by QEMU, the last by another process where there is one.
                ends = dict.fromkeys((together[0], together[-1]))
                wrong += filter(None, (told_late(attached, cell) for cell in ends))
                for cell in together:
                    verdict = find(verdicts, cell)
                    right, words = compare(cell, verdict, attached)
                    record.saw(cell, right)
                    if not right:
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


def has_what_it_needs(verdict: Verdict) -> bool:
    """Tell whether QEMU was asked for a verdict, where that needs it."""
    needs = verdict.verdict.stalled or verdict.verdict is VerdictKind.UNKNOWN
    return not needs or was_asked(verdict)


def told_late(attached: AttachedMachine, cell: Cell) -> str:
    """Watch one queue anew; return what is wrong if its verdict comes too late, else nothing."""
    if cell.row.verdict in ("device-stuck", "unknown", HEALTHY):
        return ""
    device, queue, _ = QUEUES[cell.queue]
    took = []
    # Whoever shares the processors may be in the way of one look, not of all.
    for _ in range(10):
        started = time.monotonic()
        verdicts = attached.diagnose(device, queue, duration_s=LIMITS.notification_s + 0.1)
        took.append(time.monotonic() - started)
        if took[-1] <= LIMITS.notification_s + WITHIN_S:
            return "" if compare(cell, find(verdicts, cell), attached)[0] else f"{cell}: late"
    return f"{cell}: told after {min(took):.2f} s"


def find(verdicts: tuple[Verdict, ...], cell: Cell) -> Verdict:
    device, queue, _ = QUEUES[cell.queue]
    mine = [one for one in verdicts if one.device == f"/machine/peripheral/{device}"]
    for one in mine:
        # A device without a driver has no queues: then one verdict is on all of it.
        if one.queue == queue or len(mine) == 1:
            return one
    raise AssertionError(f"no verdict on {cell}: {verdicts}")


def compare(cell: Cell, verdict: Verdict, attached: AttachedMachine) -> tuple[bool, str]:
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
    return right, words


def tell(verdict: Verdict) -> str:
    evidence = ", ".join(f"{one.what} = {one.value}" for one in verdict.evidence)
    return f"{verdict.verdict}, hop {verdict.hop}, {verdict.confidence} ({evidence})"


def test_the_matrix_is_whole(rig: Rig, record: Record) -> None:
    """Each fault is expected exactly where the lab can make it."""
    can, expected = set(), set()
    for name, (device, queue, _) in QUEUES.items():
        if device not in [one.id for one in rig.machine.spec.devices]:
            continue
        with Target(rig.machine, device, queue) as target:
            for fault in FAULTS.values():
                reason = fault.cannot(target)
                if reason:
                    record.cannot(fault.name, name, reason)
                elif name != "net rx" or fault.name in ("vector-masked", "function-masked"):
                    # The receive queue is watched where the transmit queue tells nothing.
                    can.add((fault.name, name))
    for fault_name in FAULTS:
        mine = cells(fault_name, rig.layout, rig.event_index)
        expected |= {(fault_name, cell.queue) for cell in mine}
    assert expected == can


def test_all_verdicts_are_expected_somewhere() -> None:
    told = {row.verdict for row in EXPECTED} | {row.probed for row in EXPECTED}
    healthy = {VerdictKind.IDLE, VerdictKind.PROGRESSING}
    assert {kind for kind in VerdictKind if kind not in told} == healthy
