"""Are the queues of a machine without a guest real ones: split and packed, kicked and called?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import LabError
from kickcall.lab.qtest import Qtest, boot_without_guest
from kickcall.lab.spec import (
    MachineSpec,
    OtherDevice,
    VhostUserBlk,
    VirtioBlk,
    VirtioNet,
    VirtioScsi,
)
from witness import within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kickcall.lab.machine import LabMachine
    from kickcall.lab.qtest_virtio import PackedQueue, SplitQueue

pytestmark = pytest.mark.rig

DEVICES = (
    VirtioBlk(id="blk0", queues=4),
    VirtioBlk(id="iot0", queues=2, iothread=True),
    VirtioBlk(id="packed0", queues=4, packed=True),
    VirtioScsi(id="scsi0", queues=2),
    VirtioScsi(id="scsipk0", queues=2, packed=True, iothread=True),
    VhostUserBlk(id="vub0", queues=2),
    VirtioNet(id="net0"),
    VirtioBlk(id="legacy0", legacy="only"),
    OtherDevice(id="rng0", driver="virtio-rng-pci"),
)


@pytest.fixture(scope="module")
def machine() -> Iterator[LabMachine]:
    with boot_without_guest(MachineSpec(devices=DEVICES)) as booted:
        yield booted


@pytest.fixture
def qtest(machine: LabMachine) -> Iterator[Qtest]:
    with Qtest(machine) as connected:
        yield connected


def comes(what: Callable[[], bool], timeout: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def test_the_machine_is_running_with_nobody_in_it(machine: LabMachine) -> None:
    assert machine.qmp("query-status")["status"] == "running"


@pytest.mark.parametrize(
    ("device", "number", "packed"),
    [
        ("blk0", 3, False),
        ("iot0", 1, False),
        ("packed0", 2, True),
        ("packed0", 2, False),
        ("scsi0", 3, False),
        ("scsipk0", 2, True),
        ("vub0", 1, False),
        ("rng0", 0, False),
    ],
)
def test_a_request_completes_after_its_kick_and_calls_once(
    qtest: Qtest, device: str, number: int, packed: bool
) -> None:
    driver = qtest.device(device)
    # An iothread or a back-end that waits for a processor takes QEMU's own kick late.
    driver.set_up(packed=packed, settle=within(0.2))
    queue = driver.queues[number]
    queue.publish_request()
    time.sleep(0.02)
    # No kick: the device does not look, and the request stands there like after a lost kick.
    assert queue.completed() == 0
    assert not queue.called()
    queue.kick()
    queue.wait_completed(1)
    assert comes(queue.called)
    assert not queue.called()


@pytest.mark.parametrize("packed", [False, True])
def test_a_ring_goes_round_many_times(qtest: Qtest, packed: bool) -> None:
    driver = qtest.device("packed0")
    driver.set_up(packed=packed, size=8, event_idx=not packed)
    queue = driver.queues[0]
    for done in range(1, 51):
        queue.publish_request()
        queue.kick()
        queue.wait_completed(done)


def test_only_the_queue_that_is_kicked_works(qtest: Qtest) -> None:
    driver = qtest.device("blk0")
    driver.set_up()
    for queue in driver.queues:
        queue.publish_request()
    driver.queues[2].kick()
    driver.queues[2].wait_completed(1)
    time.sleep(0.02)
    assert [queue.completed() for queue in driver.queues] == [0, 0, 1, 0]


def test_a_call_that_the_driver_did_not_ask_for_does_not_come(qtest: Qtest) -> None:
    driver = qtest.device("blk0")
    driver.set_up(event_idx=True)
    queue = driver.queues[0]
    assert hasattr(queue, "set_used_event")
    # QEMU always calls after the first request: it has not called before.
    for completed, wanted_after, call_expected in ((1, 0, True), (2, 2, False), (3, 2, True)):
        queue.set_used_event(wanted_after)
        queue.publish_request()
        queue.kick()
        queue.wait_completed(completed)
        time.sleep(0.02)
        assert queue.called() is call_expected


def test_a_reset_forgets_the_queues(qtest: Qtest) -> None:
    driver = qtest.device("iot0")
    driver.set_up()
    queue = driver.queues[0]
    driver.reset()
    assert driver.queues == []
    queue.publish_request()
    queue.kick()
    time.sleep(0.05)
    assert queue.completed() == 0
    driver.set_up()
    again: SplitQueue | PackedQueue = driver.queues[0]
    again.publish_request()
    again.kick()
    again.wait_completed(1)


@pytest.mark.parametrize(
    ("device", "settings", "complaint"),
    [
        ("blk0", {"packed": True}, "does not offer feature bits 0x400000000"),
        ("blk0", {"queues": 5}, "has 4 queues, not 5"),
    ],
)
def test_what_the_device_does_not_have_is_refused(
    qtest: Qtest, device: str, settings: dict[str, int], complaint: str
) -> None:
    with pytest.raises(LabError, match=complaint):
        qtest.device(device).set_up(**settings)  # type: ignore[arg-type]


def test_a_legacy_device_is_refused_by_name(qtest: Qtest) -> None:
    with pytest.raises(LabError, match="no modern virtio-pci interface"):
        qtest.device("legacy0")


def test_hundreds_of_queues_are_set_up_and_served() -> None:
    spec = MachineSpec(devices=(VirtioBlk(queues=256), VirtioBlk(queues=256, packed=True)))
    with boot_without_guest(spec) as machine, Qtest(machine) as qtest:
        split, packed = qtest.device("blk0"), qtest.device("blk1")
        split.set_up()
        packed.set_up(packed=True)
        for queue in (*split.queues[::50], *packed.queues[::50]):
            queue.publish_request()
            queue.kick()
            queue.wait_completed(1)
