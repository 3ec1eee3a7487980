"""Does who opens a queue see how often it is kicked and called, and is nothing left of it after?

On QEMU without a guest: there the test is the driver, and nothing else kicks or calls.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.diagnosis import Watch
from kickcall.lab.qtest import Qtest, boot_without_guest
from kickcall.lab.spec import MachineSpec, VirtioBlk
from kickcall.vmm.sampler import Sampler
from kickcall.watch import counting
from kickcall.watch.live import LiveMachine

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.rig, pytest.mark.long, pytest.mark.timeout(3600)]

PATIENCE_S = 240.0
INSTANCES = Path("/sys/kernel/tracing/instances")


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)


def test_a_queue_that_is_looked_at_has_its_kicks_and_calls_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(counting, "_WANTED_S", 5.0)
    before = set(INSTANCES.iterdir())
    spec = MachineSpec(devices=(VirtioBlk(id="blk0", queues=2, iothread=True),))
    with boot_without_guest(spec) as machine, Qtest(machine) as qtest:
        disk = qtest.device("blk0")
        disk.set_up(event_idx=False)  # every request is a kick and a call
        with attach(machine.name, timeout=60.0) as attached, Sampler(attached._session) as sampler:
            live = LiveMachine(attached.info)
            live.map(attached._session, Watch(sampler), paused=False)
        busy, idle = live.queues
        counter = counting.Counting()
        requests = 0

        def counted() -> bool:
            nonlocal requests
            assert counter.want(live) == ""
            requests += 1
            disk.queues[0].publish_request()
            disk.queues[0].kick()
            disk.queues[0].wait_completed(requests, timeout=PATIENCE_S)
            # The queues get their counts one after the other.
            return bool(busy.kicks_s and busy.calls_s and idle.calls_s is not None)

        wait_until(counted)
        assert (idle.kicks_s, idle.calls_s) == (0.0, 0.0)
        # Nobody asks any more: the kernel stops counting, and keeps nothing.
        wait_until(lambda: busy.kicks_s is None)
        wait_until(lambda: set(INSTANCES.iterdir()) <= before)
        counter.close()
