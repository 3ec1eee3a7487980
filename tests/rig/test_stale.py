"""Is a map that the machine outgrew noticed before anything is written to what it names?"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.errors import (
    DeviceNotFoundError,
    KickcallError,
    LabError,
    MachineGoneError,
    QueueNotReadyError,
    StaleMapError,
)
from kickcall.lab.boot import boot
from kickcall.lab.guest import reboot_command
from kickcall.lab.qtest import Qtest, boot_without_guest
from kickcall.lab.spec import MachineSpec, VhostUserBlk, VirtioBlk, VirtioScsi
from kickcall.model import DeviceEvent
from witness import (
    NotifyTrace,
    eventfd_counts,
    interrupt_line,
    interrupts,
    interrupts_after,
    look_over,
    own_io,
    rise,
    until,
    virtio_device_address,
    watch_queues,
    within,
)
from zoo import QEMUS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kickcall.attached import AttachedMachine, AttachedQueue
    from kickcall.lab.image import GuestImage
    from kickcall.lab.machine import LabMachine
    from kickcall.model import Notifier, Rings

pytestmark = pytest.mark.rig

DEVICES = ("blk0", "iot0", "packed0", "scsi0", "vub0")


@pytest.fixture(scope="module", params=QEMUS)
def machine(request: pytest.FixtureRequest, guest_image_built: GuestImage) -> Iterator[LabMachine]:
    """A machine to reboot, to pause and to plug devices into."""
    spec = MachineSpec(
        qemu=request.param,
        devices=(
            VirtioBlk(id="blk0", queues=2),
            VirtioBlk(id="iot0", queues=2, iothread=True),
            VirtioBlk(id="packed0", queues=2, packed=True, legacy="off"),
            VirtioScsi(id="scsi0", queues=2),
            VhostUserBlk(id="vub0", queues=2, relay=True, disk="file"),
        ),
        hotplug_ports=1,
        kernel_arguments="ipv6.disable=1",
    )
    with boot(spec) as booted:
        watch_queues(booted)
        yield booted


@contextlib.contextmanager
def nothing_written(machine: LabMachine) -> Iterator[None]:
    """Check that QEMU, the guest and the relay saw no notification while the block lasted."""
    before, counts = interrupts(machine), eventfd_counts(machine.pid)
    # After the guest came to rest: QEMU itself kicks a back-end that it starts.
    kicks = machine.relay("vub0").report()
    empty = {fd for fd, count in counts.items() if count == 0}
    with NotifyTrace(machine) as trace:
        yield
        assert interrupts(machine) == before
        assert trace.seen() == []
    assert machine.relay("vub0").report() == kicks
    # QEMU's own wake-ups come and go; what was written and is read by nobody would stay.
    until(
        lambda: all(eventfd_counts(machine.pid).get(fd) == 0 for fd in empty),
        "every eventfd that was empty is empty",
    )


def own_kicks_are_taken(machine: LabMachine) -> bool:
    """Tell whether nobody has a kick left to read of those with which QEMU starts its devices."""
    with attach(machine.name) as attached:
        kicks = [queue.state().kick for device in attached.devices() for queue in device.queues()]
    return all(kick is not None and kick.count == 0 for kick in kicks)


def last_queues(attached: AttachedMachine) -> list[AttachedQueue]:
    """Return one queue of each device."""
    return [attached.device(name).queues()[-1] for name in DEVICES]


def notifier(queue: AttachedQueue, event: DeviceEvent) -> tuple[Rings, Notifier | None]:
    """Return all that a write of this event is based on."""
    found = queue.map.kick if event is DeviceEvent.KICK else queue.map.call
    return queue.map.rings, found


def refuse(queue: AttachedQueue, error: type[KickcallError], *events: DeviceEvent) -> None:
    for event in events or DeviceEvent:
        with pytest.raises(error, match="nothing was written") as caught:
            queue.raise_event(event)
        assert "\n" not in str(caught.value)


def works(machine: LabMachine, attached: AttachedMachine, name: str) -> None:
    """Check that the last queue of a device can be kicked and called, as the machine sees it."""
    queue = attached.device(name).queues()[-1]
    if name == "vub0":
        relay = machine.relay(name)
        carried = relay.carried("kick", queue.map.index).passed
        queue.kick(via="eventfd")
        until(
            lambda: relay.carried("kick", queue.map.index).passed == carried + 1,
            "the relay carries the kick",
        )
    else:
        address = virtio_device_address(machine, name)
        with NotifyTrace(machine) as trace:
            queue.kick(via="eventfd")
            until(trace.seen, "QEMU looks at the queue")
            assert trace.seen() == [(address, queue.map.index)]
    before = interrupts(machine)
    queue.call(via="eventfd")
    after = interrupts_after(machine, before)
    assert rise(before, after) == {interrupt_line(machine, name, queue.map.index): 1}


def rebind(machine: LabMachine, name: str, *verbs: str) -> None:
    slot = machine.device(name).slot
    status, output = machine.guest.run(
        f"cd /sys/bus/pci/devices/0000:00:{slot:02x}.0/virtio*/ && name=$(basename $(pwd -P)) && "
        f"driver=$(readlink -f driver) && echo $driver >/run/{name}-driver; "
        + " && ".join(f"echo $name >$(cat /run/{name}-driver)/{verb}" for verb in verbs)
    )
    assert status == 0, output


def reset_drivers(machine: LabMachine) -> None:
    for name in DEVICES:
        rebind(machine, name, "unbind", "bind")
    look_over(machine, "scsi0")


def reload_modules(machine: LabMachine) -> None:
    status, output = machine.guest.run(
        "for module in virtio_blk virtio_scsi; do "
        "rmmod $module && insmod /modules/$module.ko || exit 1; done"
    )
    assert status == 0, output
    look_over(machine, "scsi0")


def reboot(machine: LabMachine) -> None:
    machine.guest.reboot()
    look_over(machine, "scsi0")


def stop_and_go(machine: LabMachine) -> None:
    machine.qmp("stop")
    machine.qmp("cont")


@pytest.mark.parametrize(
    "change", [reset_drivers, reload_modules, reboot, stop_and_go], ids=lambda f: f.__name__
)
def test_a_map_that_the_machine_outgrew_is_not_written_to(
    machine: LabMachine, change: Callable[[LabMachine], None]
) -> None:
    with attach(machine.name) as attached:
        used = last_queues(attached)
        unused = [attached.device(name).queues()[-2] for name in DEVICES]
        for queue in used:
            queue.kick()
            queue.call()
        change(machine)
        interrupts(machine)
        with attach(machine.name) as fresh:
            now = {
                notifier(queue, event)
                for name in DEVICES
                for queue in fresh.device(name).queues()
                for event in DeviceEvent
            }
        until(lambda: own_kicks_are_taken(machine), "QEMU's own kicks are taken")
        # What was used is held open, so nothing new can have its id. Of the others chance may bring
        # back all that makes a map: rings, descriptor and id. Then it is right.
        gone = [
            (queue, event)
            for queue in (*used, *unused)
            for event in DeviceEvent
            if notifier(queue, event) not in now
        ]
        assert {(queue, event) for queue in used for event in DeviceEvent} <= set(gone)
        with nothing_written(machine):
            for queue, event in gone:
                refuse(queue, StaleMapError, event)
            attached.refresh()
            for queue, event in gone:
                refuse(queue, StaleMapError, event)
        for name in DEVICES:
            works(machine, attached, name)


def test_a_device_that_lost_its_driver_is_not_written_to(machine: LabMachine) -> None:
    with attach(machine.name) as attached:
        old = last_queues(attached)
        for name in DEVICES:
            rebind(machine, name, "unbind")
        try:
            with nothing_written(machine):
                for queue in old:
                    refuse(queue, StaleMapError)
                attached.refresh()
                for name in DEVICES:
                    assert attached.device(name).queues() == ()
                    with pytest.raises(QueueNotReadyError, match=f"^{name}: no driver"):
                        attached.device_event(name, "kick", 0)
        finally:
            for name in DEVICES:
                slot = machine.device(name).slot
                machine.guest.run(
                    f"cd /sys/bus/pci/devices/0000:00:{slot:02x}.0/virtio*/ && "
                    f"basename $(pwd -P) >$(cat /run/{name}-driver)/bind"
                )
            look_over(machine, "scsi0")
        attached.refresh()
        works(machine, attached, "iot0")


def plug(machine: LabMachine) -> None:
    machine.qmp("device_add", driver="virtio-blk-pci", id="plug0", bus="hot0", drive="plug0-disk")
    until(
        lambda: "req.0" in machine.interrupts("hot0"),
        "the guest sets the new device up",
        within(20),
    )
    look_over(machine, "hot0")


def unplug(machine: LabMachine) -> None:
    machine.qmp("device_del", id="plug0")
    until(
        lambda: (
            "plug0"
            not in {entry["name"] for entry in machine.qmp("qom-list", path="/machine/peripheral")}
        ),
        "the guest lets go of the device",
        within(20),
    )


def test_a_device_that_was_unplugged_and_plugged_again_is_not_written_to_by_its_old_map(
    machine: LabMachine,
) -> None:
    disk = {"driver": "null-co", "node-name": "plug0-disk", "size": 1 << 20, "read-zeroes": True}
    machine.qmp("blockdev-add", disk)
    with attach(machine.name) as attached:
        with pytest.raises(DeviceNotFoundError):
            attached.device("plug0")
        plug(machine)
        with pytest.raises(DeviceNotFoundError):
            attached.device("plug0")
        attached.refresh()
        old = attached.device("plug0").queue(0)
        old.call()
        unplug(machine)
        with nothing_written(machine):
            refuse(old, StaleMapError)
        plug(machine)
        with nothing_written(machine):
            refuse(old, StaleMapError)
            attached.refresh()
            refuse(old, StaleMapError)
        new = attached.device("plug0").queue(0)
        before = machine.interrupts("hot0")["req.0"]
        new.call()
        until(lambda: machine.interrupts("hot0")["req.0"] == before + 1, "the guest is called")
        unplug(machine)
        attached.refresh()
        with pytest.raises(DeviceNotFoundError):
            attached.device("plug0")
    machine.qmp("blockdev-del", {"node-name": "plug0-disk"})


def test_a_paused_machine_is_shown_and_not_written_to(machine: LabMachine) -> None:
    with attach(machine.name) as before_pause:
        old = last_queues(before_pause)
        old[1].kick()
        machine.qmp("stop")
        try:
            for queue in old:
                refuse(queue, QueueNotReadyError)
            with attach(machine.name) as in_pause:
                assert in_pause.run_state == "paused"
                for name in ("blk0", "iot0", "packed0", "scsi0"):
                    for queue in in_pause.device(name).queues():
                        assert queue.state().outstanding is not None
                        refuse(queue, QueueNotReadyError)
                assert in_pause.device("vub0").queues() == ()
                assert f"{machine.name} is not running" in in_pause.device("vub0").refusal
                with pytest.raises(QueueNotReadyError, match="is not running"):
                    in_pause.device_event("vub0", "kick", 0)
                machine.qmp("cont")
                until(lambda: own_kicks_are_taken(machine), "QEMU's own kicks are taken")
                with nothing_written(machine):
                    for name in ("blk0", "iot0", "packed0", "scsi0"):
                        refuse(in_pause.device(name).queues()[-1], StaleMapError)
                in_pause.refresh()
                works(machine, in_pause, "vub0")
                works(machine, in_pause, "iot0")
        finally:
            machine.qmp("cont")


def test_kicks_and_calls_all_through_a_reboot_harm_nothing(machine: LabMachine) -> None:
    """Whatever moment of the reset they meet: done, or refused for a reason that kickcall knows."""
    boot_id = machine.guest.boot_id()
    refused: set[type[KickcallError]] = set()
    done = 0
    with attach(machine.name) as attached:
        # Not before it has said that it will.
        machine.guest.start(f"sleep 0.2; {reboot_command(boot_id)}")
        ends = time.monotonic() + within(20)
        while time.monotonic() < ends:
            for name in DEVICES:
                for event in DeviceEvent:
                    try:
                        attached.device_event(name, event, 1)
                        done += 1
                    except KickcallError as error:
                        refused.add(type(error))
            try:
                attached.refresh()
            except KickcallError as error:
                refused.add(type(error))
            with contextlib.suppress(LabError):
                # The first round may come so late that only the new boot takes anything.
                if machine.guest.boot_id(timeout=within(0.2)) != boot_id and done:
                    break
        else:
            pytest.fail("the guest did not come back")
    assert done > 0
    assert QueueNotReadyError in refused
    machine.disk("scsi0")
    for name in DEVICES:
        status, output = machine.guest.run(own_io(machine, name, cpu=1))
        assert status == 0, output
    log = machine.guest.run("dmesg").output
    # drivers/virtio/virtio_ring.c says the last two of a device that completes what it must not.
    complaints = r".*(?:BUG:|Oops|Call Trace|nobody cared|is not a head|out of range).*"
    assert re.findall(complaints, log) == []


@pytest.mark.parametrize("qemu", QEMUS)
def test_a_machine_that_was_killed_is_gone(qemu: str) -> None:
    spec = MachineSpec(qemu=qemu, devices=(VirtioBlk(id="blk0", queues=2),))
    with boot_without_guest(spec) as killed:
        with Qtest(killed) as qtest:
            qtest.device("blk0").set_up()
        with attach(killed.name) as attached:
            queue = attached.device("blk0").queue(1)
            queue.kick()
            os.kill(killed.pid, signal.SIGKILL)
            until(lambda: not killed.alive, "QEMU ends")
            began = time.monotonic()
            for event in DeviceEvent:
                with pytest.raises(MachineGoneError, match="ended"):
                    queue.raise_event(event)
            with pytest.raises(MachineGoneError):
                queue.state()
            with pytest.raises(MachineGoneError):
                attached.refresh()
            assert time.monotonic() - began < 10
