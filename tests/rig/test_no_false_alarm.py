"""Is a loaded, healthy machine ever called stalled?

KICKCALL_SOAK_S sets how long it is watched: 30 s by default, 1800 for the full claim.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import kickcall
from kickcall.diagnose.judge import judge
from kickcall.diagnose.states import Thresholds
from kickcall.diagnosis import Watch
from kickcall.lab.spec import MachineSpec, VhostUserBlk, VirtioBlk, VirtioNet, VirtioScsi
from kickcall.vmm.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kickcall.lab.machine import LabMachine
    from kickcall.model import Verdict

SOAK_S = float(os.environ.get("KICKCALL_SOAK_S", "30"))

DISKS = ("blk0", "iot0", "packed0", "plain0", "scsi0", "vub0", "direct0")
SPEC = MachineSpec(
    devices=(
        VirtioBlk(id="blk0", queues=2, disk="file"),
        VirtioBlk(id="iot0", queues=2, iothread=True, disk="file"),
        VirtioBlk(id="packed0", queues=2, packed=True, disk="file"),
        VirtioBlk(id="plain0", event_idx=False, disk="file"),
        VirtioScsi(id="scsi0", queues=2, disk="file"),
        VirtioNet(id="net0"),
        VhostUserBlk(id="vub0", queues=2, relay=True, disk="file"),
        VhostUserBlk(id="direct0", relay=False, disk="file"),
    ),
)
# Bursts of random reads and writes, with pauses, so that queues fall idle and wake again.
LOAD = """
while :; do
  at=$(( (RANDOM * 32768 + RANDOM) % 2000 ))
  dd if={disk} of=/dev/null bs=4k count=$((RANDOM % 32 + 1)) skip=$at iflag=direct 2>/dev/null
  dd if=/dev/zero of={disk} bs=4k count=$((RANDOM % 8 + 1)) seek=$at oflag=direct 2>/dev/null
  [ $((RANDOM % 8)) = 0 ] && usleep $((RANDOM * 20))
done
"""

# Ends by itself when the test is killed.
HOG = """
import os, sys, time
while os.getppid() == int(sys.argv[1]):
    end = time.time() + 0.3
    while time.time() < end:
        pass
    time.sleep(0.2)
"""


@contextmanager
def a_busy_host() -> Iterator[None]:
    """Take the host's processors away now and then, as neighbours do."""
    hogs = [subprocess.Popen([sys.executable, "-c", HOG, str(os.getpid())]) for _ in range(2)]
    try:
        yield
    finally:
        for one in hogs:
            one.kill()
            one.wait()


def load(machine: LabMachine) -> list[object]:
    started: list[object] = [
        machine.guest.start(LOAD.format(disk=machine.disk(disk))) for disk in DISKS
    ]
    started.append(machine.guest.start("while :; do ping -q -c 50 -i 0.01 -s 1000 10.0.2.2; done"))
    return started


def test_a_healthy_machine_under_load_is_never_called_stalled(
    boot_machine: Callable[[MachineSpec], LabMachine],
) -> None:
    machine = boot_machine(SPEC)
    limits = Thresholds()
    alarms: list[Verdict] = []
    samples = 0
    with kickcall.attach(machine.name) as attached, a_busy_host():
        load(machine)
        session = attached._session
        with Sampler(session) as sampler:
            assert len(sampler.queues) >= 15
            watch = Watch(sampler)
            first = list(watch.tracks)
            until = time.monotonic() + SOAK_S
            while time.monotonic() < until:
                watch.look_after(0.0)
                samples += len(sampler.queues)
                for number, verdict, _ in watch.judged(limits):
                    if not verdict.verdict.stalled:
                        continue
                    with session.borrow() as monitor:
                        slow = watch.slow_facts(session, number, monitor)
                    watch.look_after(0.0)
                    verdict = judge(sampler.queues[number], watch.tracks[number], slow, limits)
                    if verdict.verdict.stalled:
                        print(verdict, watch.tracks[number], flush=True)
                        alarms.append(verdict)
            moved = [
                fixed.device
                for fixed, before, after in zip(sampler.queues, first, watch.tracks, strict=True)
                if before.now.used_idx != after.now.used_idx
            ]
    assert alarms == [], "\n".join(str(alarm) for alarm in alarms[:5])
    # Only a loaded machine shows anything: every disk and the network moved.
    assert {device.rpartition("/")[2] for device in moved} >= {*DISKS, "net0"}
    print(f"{samples} samples of {len(first)} queues in {SOAK_S:.0f} s, no stall verdict")
