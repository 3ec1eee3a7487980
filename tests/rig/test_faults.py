"""Does a fault really happen, is it over when it is undone, and what do the oddest of them do?

What a diagnosis says of each is tests/rig/test_fault_matrix.py.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import LabError
from kickcall.lab.boot import boot
from kickcall.lab.faults import FAULTS
from kickcall.lab.faults_target import Target
from kickcall.lab.spec import MachineSpec, VhostUserBlk, VirtioBlk, VirtioNet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import BootMachine
    from kickcall.lab.machine import LabMachine

pytestmark = pytest.mark.rig


@pytest.fixture(scope="module")
def machine(guest_image_built: object) -> Iterator[LabMachine]:
    spec = MachineSpec(
        devices=(
            VirtioBlk(id="blk0", queues=2),
            VirtioBlk(id="packed0", queues=2, packed=True, legacy="off", iothread=True),
            VirtioNet(id="net0"),
            VhostUserBlk(id="direct0", queues=2, relay=False, disk="file"),
        ),
        kernel_arguments="ipv6.disable=1",
    )
    with boot(spec) as booted:
        yield booted


HANGS_THE_GUEST = (
    "lost-kick",
    "lost-call",
    "kick-suppressed",
    "call-suppressed",
    "device-stuck",
    "vector-masked",
    "function-masked",
)


@pytest.mark.parametrize("device", ["blk0", "packed0", "direct0"])
@pytest.mark.parametrize("name", HANGS_THE_GUEST)
def test_the_guest_hangs_until_the_fault_is_undone(
    machine: LabMachine, name: str, device: str
) -> None:
    fault = FAULTS[name]
    with Target(machine, device) as target:
        before = machine.interrupts(device)["req.0"]
        with fault.on(target):
            # Its disk cannot be read on this queue by anybody; one on another is not touched.
            reader = target.request()
            other = Target(machine, device, 1, attached=target.attached)
            if name not in ("device-stuck", "function-masked"):
                other.finish(other.request())
            time.sleep(0.3)
            if name in ("vector-masked", "function-masked", "device-stuck"):
                assert not reader.done
        target.finish(reader)
        assert machine.interrupts(device)["req.0"] > before
        target.finish(target.request())


def test_a_lost_kick_is_lost_by_the_notifier_and_not_by_the_driver(machine: LabMachine) -> None:
    with Target(machine, "blk0") as target:
        before = target.state()
        with FAULTS["lost-kick"].on(target) as proof:
            state = target.state()
            # It kicked (the count was 1), and QEMU saw nothing of it.
            assert re.match("a count of 1 was read", proof)
            assert state.kick is not None
            assert state.kick.count == 0
            assert state.last_avail_idx == before.last_avail_idx
            assert state.outstanding == 1


def test_a_stuck_main_loop_answers_no_monitor(machine: LabMachine) -> None:
    with Target(machine, "blk0") as target:
        with FAULTS["main-loop-stuck"].on(target):
            assert target.count(target.kick_notifier) == 1
            with open(f"/proc/{machine.pid}/task/{machine.pid}/stat") as stat:
                assert stat.read().rpartition(")")[2].split()[0] == "t"
        assert machine.qmp("query-status")["running"]


def test_a_slow_device_completes_about_once_a_second(machine: LabMachine) -> None:
    with Target(machine, "blk0") as target, FAULTS["device-slow"].on(target):
        begun, before = time.monotonic(), target.completed
        time.sleep(3.2)
        target.until_completed(before)
        completed = (target.completed - before) & 0xFFFF
        assert completed <= time.monotonic() - begun + 2


def test_qemu_marks_a_device_broken_that_is_kicked_with_a_corrupt_ring(
    boot_machine: BootMachine,
) -> None:
    machine = boot_machine(MachineSpec(devices=(VirtioBlk(id="blk0"),)))
    with Target(machine, "blk0") as target:
        target.finish(target.request())
        with FAULTS["ring-corrupt"].on(target):
            target.queue.kick()
            path = target.qom_path
            target.until(
                lambda: bool(machine.qmp("x-query-virtio-status", path=path)["broken"]),
                "QEMU took the ring for a good one",
            )


def test_what_cannot_exist_says_why(machine: LabMachine) -> None:
    with (
        Target(machine, "net0") as target,
        pytest.raises(LabError, match="lost-call cannot exist on net0: it has no call notifier"),
    ):
        FAULTS["lost-call"].on(target)


def test_a_fault_from_the_command_line_lasts_until_it_is_interrupted(machine: LabMachine) -> None:
    command = [sys.executable, "-m", "kickcall", "lab", "break", machine.name, "blk0"]
    with (
        Target(machine, "blk0") as target,
        subprocess.Popen(
            [*command, "--fault", "kick-suppressed"], stdout=subprocess.PIPE, text=True
        ) as breaking,
    ):
        assert breaking.stdout is not None
        assert breaking.stdout.readline().startswith("queue 0 of blk0 is broken: the driver")
        assert target.stays_incomplete(0.3)
        os.kill(breaking.pid, signal.SIGINT)
        assert breaking.wait(60) == 0
        assert breaking.stdout.read() == "queue 0 of blk0: repaired\n"
        target.finish(target.request())


def test_an_unknown_fault_is_refused(machine: LabMachine) -> None:
    command = [sys.executable, "-m", "kickcall", "lab", "break", machine.name, "blk0"]
    done = subprocess.run([*command, "--fault", "gremlins"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no fault is called gremlins: kickcall lab faults lists them" in done.stderr
