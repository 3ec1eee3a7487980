"""Is every mapped notifier the one of that queue of that device, and of no other?

Nothing here trusts what kickcall read in QEMU's memory. For a call the guest's own count of
interrupts says which queue it was; for a kick QEMU's trace, the vhost-user relay, or the notifier
that the guest itself rang.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.lab.boot import boot
from kickcall.lab.faults_target import stopped
from kickcall.lab.spec import MachineSpec, OtherDevice
from kickcall.model import BackendKind, Layout
from kickcall.vmm.notifiers import QueueArray, find_arrays
from witness import (
    NotifyTrace,
    eventfd_counts,
    interrupt_line,
    interrupts,
    own_io,
    raised_by,
    undisturbed,
    until,
    virtio_device_address,
    watch_queues,
)
from zoo import QEMUS

if TYPE_CHECKING:
    from collections.abc import Callable

    from kickcall.attached import AttachedMachine, AttachedQueue
    from kickcall.lab.machine import LabMachine
    from kickcall.model import Notifier

pytestmark = pytest.mark.rig

QUEUES = {
    "blk0": 2,
    "iot0": 2,
    "packed0": 2,
    "packediot0": 2,
    "slow0": 2,
    "scsi0": 4,
    "scsipk0": 4,
    "net0": 3,
    "vub0": 2,
    "direct0": 2,
}
NO_NOTIFIER = {"slow0"}
"""`ioeventfd=off`: QEMU takes the doorbell and raises the interrupt by itself."""
KICK_ONLY = {"net0"}
"""In QEMU, and without a call notifier: QEMU raises the interrupt by itself."""
PACKED = {"packed0", "packediot0", "scsipk0"}
VHOST_USER = {"vub0", "direct0"}
IN_QEMU_DISKS = [name for name in QUEUES if name not in KICK_ONLY | VHOST_USER | NO_NOTIFIER]


def test_every_queue_that_a_driver_set_up_is_mapped(attached: AttachedMachine) -> None:
    assert {one.info.id: one.refusal for one in attached.devices() if one.refusal} == {}
    assert {one.info.id: len(one.queues()) for one in attached.devices()} == QUEUES
    for one in attached.devices():
        name = one.info.id
        assert one.info.layout is (Layout.PACKED if name in PACKED else Layout.SPLIT)
        assert one.info.backend is (
            BackendKind.VHOST_USER if name in VHOST_USER else BackendKind.QEMU
        )
        for queue in one.queues():
            assert (queue.map.kick is None) == (name in NO_NOTIFIER)
            assert (queue.map.call is None) == (name in KICK_ONLY | NO_NOTIFIER)


def mapped_notifiers(attached: AttachedMachine) -> list[Notifier]:
    return [
        notifier
        for one in attached.devices()
        for queue in one.queues()
        for notifier in (queue.map.kick, queue.map.call)
        if notifier is not None
    ]


def test_no_two_queues_share_a_notifier(attached: AttachedMachine) -> None:
    notifiers = mapped_notifiers(attached)
    assert len(notifiers) == 23 + 20
    assert len({notifier.fd for notifier in notifiers}) == len(notifiers)
    assert len({notifier.eventfd_id for notifier in notifiers}) == len(notifiers)


@pytest.mark.parametrize("name", [*IN_QEMU_DISKS, *sorted(VHOST_USER)])
def test_each_call_notifier_raises_its_queues_interrupt_once_and_no_other(
    zoo: LabMachine, attached: AttachedMachine, name: str
) -> None:
    for queue in attached.device(name).queues():
        raised = raised_by(zoo, attached, partial(queue.call, via="eventfd"))
        assert raised == {interrupt_line(zoo, name, queue.map.index): 1}


@pytest.mark.parametrize("name", [*IN_QEMU_DISKS, *sorted(KICK_ONLY)])
def test_each_kick_notifier_makes_qemu_look_at_its_queue_and_no_other(
    zoo: LabMachine, attached: AttachedMachine, name: str
) -> None:
    address = virtio_device_address(zoo, name)
    interrupts(zoo)
    for queue in attached.device(name).queues():
        looks = undisturbed(attached, partial(looks_after_kick, zoo, queue))
        assert looks == [(address, queue.map.index)]


def looks_after_kick(machine: LabMachine, queue: AttachedQueue) -> list[tuple[str, int]]:
    """Return what QEMU looks at once a queue is kicked, until the guest is at rest."""
    with NotifyTrace(machine) as trace:
        queue.kick(via="eventfd")
        until(trace.seen, f"QEMU looks at queue {queue.map.index}")
        interrupts(machine)
        return trace.seen()


def test_the_guests_own_requests_move_the_queue_that_is_mapped(
    zoo: LabMachine, attached: AttachedMachine
) -> None:
    """The rings are the right ones, too: Linux gives each CPU a queue of its own."""
    for name in ("blk0", "iot0", "packed0", "packediot0", "scsi0", "scsipk0", "vub0", "direct0"):
        first = 2 if name.startswith("scsi") else 0
        for cpu in (0, 1):
            before = [queue.state().used_idx for queue in attached.device(name).queues()]
            status, output = zoo.guest.run(own_io(zoo, name, cpu))
            assert status == 0, output
            after = [queue.state().used_idx for queue in attached.device(name).queues()]
            moved = [index for index, used in enumerate(after) if used != before[index]]
            assert moved == [first + cpu], name


def differs(look: Callable[[], object], before: object) -> bool:
    return look() != before


def test_each_kick_notifier_of_a_relayed_device_reaches_the_relay_as_its_queues_kick(
    zoo: LabMachine, attached: AttachedMachine
) -> None:
    relay = zoo.relay("vub0")

    def carried() -> Counter[tuple[int | None, str]]:
        return Counter({(row.queue, row.event): row.passed for row in relay.report()})

    for queue in attached.device("vub0").queues():
        before = carried()
        queue.kick(via="eventfd")
        until(partial(differs, carried, before), f"the relay carries queue {queue.map.index}")
        interrupts(zoo)
        assert carried() - before == Counter({(queue.map.index, "kick"): 1})


def kicked(pid: int, fd: int) -> bool:
    return eventfd_counts(pid)[fd] == 1


def test_each_kick_notifier_of_a_direct_device_is_the_one_that_the_guest_rings(
    zoo: LabMachine, attached: AttachedMachine
) -> None:
    """With its reader stopped, a kick stays in the counter of the notifier that carried it."""
    backend = zoo.backend_pid("direct0")
    kicks = [queue.map.kick for queue in attached.device("direct0").queues()]
    mapped = [notifier.fd for notifier in mapped_notifiers(attached)]
    for cpu in (0, 1):
        command = own_io(zoo, "direct0", cpu)
        before = eventfd_counts(zoo.pid)
        with stopped(backend):
            reader = zoo.guest.start(command)
            mine = kicks[cpu]
            assert mine is not None
            until(partial(kicked, zoo.pid, mine.fd), "the guest rings its doorbell")
            now = eventfd_counts(zoo.pid)
            assert [fd for fd in mapped if now[fd] != before[fd]] == [mine.fd]
        assert reader.wait().status == 0


def test_each_device_alone_tells_the_layout_that_all_of_them_tell(
    attached: AttachedMachine,
) -> None:
    """Once one device has told it, the others are only compared with it: so ask each anew."""
    session = attached._session
    ram = [(run.hva, run.hva + run.length) for run in session.memory.ranges]
    for mapped in session.devices:
        path = mapped.facts.backend_path
        alone = find_arrays(attached.info.pid, [mapped.facts], ram)[path]
        assert mapped.array is not None
        assert isinstance(alone, QueueArray), alone
        assert alone.address == mapped.array.address
        if alone.eventfd_ids:
            assert alone.layout == mapped.array.layout


@pytest.mark.parametrize("qemu", QEMUS)
def test_devices_of_one_queue_and_of_64_are_mapped(qemu: str) -> None:
    """virtio-rng holds a pointer to its only queue beside QEMU's own. A serial device has two
    queues for each of its 31 ports and two for control (virtio 1.4, 5.3.2). A balloon has no
    notifiers: it is kicked by its I/O port.
    """
    drivers = {"rng0": "virtio-rng-pci", "bal0": "virtio-balloon-pci", "ser0": "virtio-serial-pci"}
    devices = tuple(OtherDevice(id=name, driver=driver) for name, driver in drivers.items())
    with (
        boot(MachineSpec(qemu=qemu, devices=devices)) as machine,
        attach(machine.name) as attached,
    ):
        watch_queues(machine)
        found = {name: attached.device(name) for name in drivers}
        assert {name: one.refusal for name, one in found.items()} == dict.fromkeys(drivers, "")
        assert {name: len(one.queues()) for name, one in found.items()} == {
            "rng0": 1,
            "bal0": 3,
            "ser0": 64,
        }
        test_each_device_alone_tells_the_layout_that_all_of_them_tell(attached)
        for name in ("ser0", "bal0", "rng0"):
            address = ""
            # The last queue first: no other device here has one of that number.
            for queue in reversed(found[name].queues()):
                number, looks = queue.map.index, set[int]()
                # The guest uses its other queues whenever it likes: then once more.
                for _ in range(5):
                    with NotifyTrace(machine) as trace:
                        queue.kick(via="ioport" if name == "bal0" else "eventfd")
                        address = address or trace.wait_for(number)
                        until(partial(saw, trace, address, number), f"QEMU looks at {name}")
                        looks = {looked for vdev, looked in trace.seen() if vdev == address}
                    if looks == {number}:
                        break
                assert looks == {number}


def saw(trace: NotifyTrace, address: str, queue: int) -> bool:
    return (address, queue) in trace.seen()
