"""What does the flight recorder take from a guest's throughput, and how long does a look take?

On a KVM host only (`kickcall lab host run -- .venv/bin/python -m pytest bench/test_trace.py`).
Pairs: a guest reads all the time, and its reads of half a second are counted with the recorder on,
and of another one with it off, right after each other and by turns first, so that a busy host is
busy for both. One pair may be off by 10 % under TCG: KICKCALL_TRACE_PAIRS sets how many there are,
and what remains of that in their mean is printed.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bench.comparison import Comparison

import kickcall
from kickcall.host.bpf_counter import BpfCounter
from kickcall.host.eventfd_trace import EventfdTrace
from kickcall.host.eventfds import read_eventfd
from kickcall.lab.boot import boot
from kickcall.lab.spec import MachineSpec, VhostScsi, VirtioBlk

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from bench.comparison import Compare

    from kickcall.attached import AttachedQueue
    from kickcall.lab.machine import LabMachine

PAIRS = int(os.environ.get("KICKCALL_TRACE_PAIRS", "100"))
WINDOW_S = 0.5
SETTLE_S = 0.15
"""To begin makes a host under TCG slow for some 40 ms: that is no part of the window."""
LOADS = {"4k": ("4k", 1), "64k": ("64k", 1), "1m": ("1M", 1), "8x4k": ("4k", 8)}
"""How much a read asks for, and how many readers there are; each asks for one after the other."""
LIMIT = 1.02
DEVICES = MachineSpec(
    devices=(
        VhostScsi(id="vscsi0", size_mib=1024),
        VirtioBlk(id="iot0", iothread=True, size_mib=1 << 16),
    )
)
"""Large disks: a reader that is at the end begins anew, and to begin a process takes its time."""

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


@contextmanager
def reading(machine: LabMachine, device: str, load: str = "4k") -> Iterator[None]:
    """The guest reads without an end: see LOADS."""
    size, readers = LOADS[load]
    read = f"dd if={machine.disk(device)} of=/dev/null bs={size} iflag=direct"
    loop = f"(while [ -e /reading ]; do {read} 2>/dev/null; done) &"
    machine.guest.start(f"touch /reading; {loop * readers} wait")
    try:
        yield
    finally:
        machine.guest.run("rm /reading; killall dd")


def seconds_a_read(queue: AttachedQueue) -> float:
    """Return what one request of `queue` takes, by its used index over a window."""

    def look() -> tuple[float, int]:
        used = queue.state().used_idx
        assert used is not None
        return time.monotonic(), used

    time.sleep(SETTLE_S)
    began, first = look()
    time.sleep(WINDOW_S)
    ended, last = look()
    return (ended - began) / ((last - first) & 0xFFFF)


@contextmanager
def counted(ids: Collection[int]) -> Iterator[None]:
    """What a recorder of these eventfds has in the kernel, without what it looks up to begin."""
    with BpfCounter(ids, threads=32) as counter:
        yield
        assert sum(one.total for one in counter.counts().in_kernel)


@pytest.mark.parametrize("load", list(LOADS))
@pytest.mark.parametrize("device", ["vscsi0", "iot0"])
def test_reads_with_the_recorder_on(
    kvm_machine: LabMachine, device: str, load: str, results: list[Comparison]
) -> None:
    pairs: list[tuple[float, float]] = []
    with reading(kvm_machine, device, load), kickcall.attach(kvm_machine.pid) as machine:
        with machine.record() as recording:
            found = (one.eventfd_id for one in recording.counts().values())
            ids = {one for one in found if one is not None}
        queue = machine.device(device).queues()[-1]
        seconds_a_read(queue)
        for number in range(PAIRS):
            took = {}
            for recorded in (True, False) if number % 2 else (False, True):
                with counted(ids) if recorded else nullcontext():
                    took[recorded] = seconds_a_read(queue)
            pairs.append((took[True], took[False]))
    middle, error = trimmed_mean([math.log(ours / theirs) for ours, theirs in pairs])
    ratio = math.exp(middle)
    theirs = statistics.median(off for _, off in pairs)
    results.append(
        Comparison(
            f"a read of {device}, {load}, recorded (middle of {PAIRS} pairs)",
            theirs * ratio,
            "the same, not recorded",
            theirs,
            theirs * LIMIT,
        )
    )
    sys.stderr.write(
        f"\n{device}, {load}: recorded {ratio - 1:+.2%} (standard error {error:.2%}, {PAIRS} pairs)"
        f"; {theirs * 1e6:.0f} µs a read\n"
    )


def trimmed_mean(values: list[float]) -> tuple[float, float]:
    """Return the mean of the middle 60 %, and its standard error (Tukey and McLaughlin, 1963).

    A host under TCG stands still for 20 ms now and then: that is no pair's own.
    """
    ordered, cut = sorted(values), len(values) // 5
    middle = ordered[cut : len(ordered) - cut]
    pulled_in = [middle[0]] * cut + middle + [middle[-1]] * cut
    error = statistics.stdev(pulled_in) / (len(middle) / len(ordered) * math.sqrt(len(ordered)))
    return statistics.mean(middle), error


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
        with reading(kvm_machine, "vscsi0"):
            seconds_a_read(machine.device("vscsi0").queues()[-1])
        queues = [queue for device in machine.devices() for queue in device.queues()]
        compare(
            f"counts() of {len(queues)} queues",
            recording.counts,
            "state() of each",
            lambda: [queue.state() for queue in queues],
            rounds=100,
        )
