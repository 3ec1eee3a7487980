"""What does the flight recorder take from a guest's throughput, and how long does a look take?

On a KVM host only (`kickcall lab host run -- .venv/bin/python -m pytest bench/test_trace.py`).
Pairs: the same reads with and without the recorder, one right after the other and by turns first,
so that a busy host is busy for both. One pair may be off by 10 % under TCG: KICKCALL_TRACE_PAIRS
sets how many there are, and what remains of that in their mean is printed.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bench.comparison import Comparison

import kickcall
from kickcall.host.eventfd_trace import EventfdTrace
from kickcall.host.eventfds import read_eventfd
from kickcall.lab.boot import boot
from kickcall.lab.spec import MachineSpec, VhostScsi, VirtioBlk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.comparison import Compare

    from kickcall.lab.machine import LabMachine

PAIRS = int(os.environ.get("KICKCALL_TRACE_PAIRS", "30"))
READS = int(os.environ.get("KICKCALL_TRACE_READS", "3000"))
LIMIT = 1.02
DEVICES = MachineSpec(devices=(VhostScsi(id="vscsi0"), VirtioBlk(id="iot0", iothread=True)))

pytestmark = [
    pytest.mark.skipif(
        not Path("/dev/vhost-scsi").exists() or os.geteuid() != 0,
        reason="needs a KVM host: kickcall lab host run -- …",
    ),
    pytest.mark.timeout(3600),
]


@pytest.fixture(scope="module")
def kvm_machine() -> Iterator[LabMachine]:
    with boot(DEVICES, timeout=300) as machine:
        yield machine


def reads(machine: LabMachine, device: str, count: int = READS) -> float:
    """Return the seconds that the guest needs for its reads, by its own clock."""
    read = f"dd if={machine.disk(device)} of=/dev/null bs=4k count={count} iflag=direct"
    # Of the two clocks that busybox has, this one counts hundredths of a second.
    script = f"cat /proc/uptime; {read} 2>/dev/null; cat /proc/uptime"
    status, output = machine.guest.run(script, timeout=600)
    assert status == 0, output
    began, ended = (float(found) for found in re.findall(r"^(\d+\.\d+) ", output, re.M))
    return ended - began


@pytest.mark.parametrize("device", ["vscsi0", "iot0"])
def test_reads_with_the_recorder_on(
    kvm_machine: LabMachine, device: str, results: list[Comparison]
) -> None:
    reads(kvm_machine, device)
    pairs: list[tuple[float, float]] = []
    with kickcall.attach(kvm_machine.pid) as machine:
        for number in range(PAIRS):
            took = {}
            for recorded in (True, False) if number % 2 else (False, True):
                with machine.record() if recorded else nullcontext():
                    # To begin makes a host under TCG slow for some 40 ms.
                    reads(kvm_machine, device, READS // 5)
                    took[recorded] = reads(kvm_machine, device)
            pairs.append((took[True], took[False]))
    logs = [math.log(ours / theirs) for ours, theirs in pairs]
    ratio, error = math.exp(statistics.mean(logs)), statistics.stdev(logs) / math.sqrt(PAIRS)
    theirs = statistics.median(off for _, off in pairs)
    results.append(
        Comparison(
            f"{READS} reads of {device}, recorded (mean of {PAIRS} pairs)",
            theirs * ratio,
            "the same, not recorded",
            theirs,
            theirs * LIMIT,
        )
    )
    sys.stderr.write(
        f"\n{device}: recorded {ratio - 1:+.2%} (standard error {error:.2%}, {PAIRS} pairs); "
        f"{theirs / READS * 1e6:.0f} µs a read\n"
    )


def test_a_signal_that_is_counted(compare: Compare) -> None:
    """A write to an eventfd that is counted, beside one that is not: what each signal costs."""
    eventfd, other = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    state = read_eventfd(os.getpid(), eventfd)
    assert state is not None
    with EventfdTrace([state.eventfd_id]):
        compare(
            "write to an eventfd that is counted",
            lambda: os.eventfd_write(eventfd, 1),
            "to one that a filter leaves out",
            lambda: os.eventfd_write(other, 1),
            rounds=50,
            repeat=1000,
        )
    for fd in (eventfd, other):
        os.close(fd)


def test_a_look_at_the_counts(kvm_machine: LabMachine, compare: Compare) -> None:
    """`counts()` beside one look at all rings."""
    with kickcall.attach(kvm_machine.pid) as machine, machine.record() as recording:
        reads(kvm_machine, "vscsi0")
        queues = [queue for device in machine.devices() for queue in device.queues()]
        compare(
            f"counts() of {len(queues)} queues",
            recording.counts,
            "state() of each",
            lambda: [queue.state() for queue in queues],
            rounds=100,
        )
