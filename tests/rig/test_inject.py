"""Do kick and call do what the hardware does, by every way, and repair what was really lost?"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.errors import (
    CounterFullError,
    DeviceNotFoundError,
    EventNotSupportedError,
    QueueNotFoundError,
    UsageError,
)
from kickcall.host.eventfds import COUNT_MAX
from kickcall.host.processes import Process
from kickcall.lab.faults_target import stopped
from kickcall.model import DeviceEvent, Via
from served import serving
from witness import (
    NotifyTrace,
    StoppedIothread,
    eventfd_counts,
    interrupt_line,
    interrupts,
    never,
    own_io,
    raised_by,
    rise,
    undisturbed,
    until,
    virtio_device_address,
    within,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kickcall.attached import AttachedMachine, AttachedQueue
    from kickcall.lab.guest import Command
    from kickcall.lab.machine import LabMachine
    from kickcall.model import Injection, Notifier
    from witness import Line

pytestmark = pytest.mark.rig


@contextlib.contextmanager
def our_own(pid: int, notifier: Notifier | None) -> Iterator[int]:
    """Hold a descriptor of the eventfd, to do to it what kickcall never would."""
    assert notifier is not None
    with Process(pid) as process:
        ours = process.duplicate_fd(notifier.fd)
    try:
        yield ours
    finally:
        os.close(ours)


def hangs(command: Command) -> None:
    never(lambda: command.done, f"the guest's request needs no help: {command.command}")


def finishes(command: Command) -> None:
    status, output = command.wait(timeout=60)
    assert status == 0, output


# What was really lost is repaired


@pytest.mark.parametrize("number", [0, 1])
def test_a_kick_that_the_relay_lost_is_repaired(
    zoo: LabMachine, attached: AttachedMachine, number: int
) -> None:
    command, relay = own_io(zoo, "vub0", cpu=number), zoo.relay("vub0")
    queue = attached.device("vub0").queue(number)
    lost = relay.carried("kick", number).dropped
    relay.drop("kick", queue=number)
    reader = zoo.guest.start(command)
    relay.wait_for("kick", number, dropped=lost + 1)
    hangs(reader)
    state = queue.state()
    assert state.outstanding == 1
    assert state.kick is not None
    assert state.kick.count == 0

    result = queue.kick(watch_s=within(0.3))

    finishes(reader)
    assert (result.event, result.via, result.queue) == (DeviceEvent.KICK, Via.EVENTFD, number)
    assert result.before.used_idx == state.used_idx
    assert result.after.used_idx == result.before.avail_idx
    assert queue.state().outstanding == 0


@pytest.mark.parametrize("number", [0, 1])
def test_a_call_that_the_relay_lost_is_repaired(
    zoo: LabMachine, attached: AttachedMachine, number: int
) -> None:
    command, relay = own_io(zoo, "vub0", cpu=number), zoo.relay("vub0")
    queue = attached.device("vub0").queue(number)
    lost = relay.carried("call", number).dropped
    relay.drop("call", queue=number)
    reader = zoo.guest.start(command)
    relay.wait_for("call", number, dropped=lost + 1)
    hangs(reader)
    assert queue.state().outstanding == 0
    before = interrupts(zoo)

    result = queue.call()

    finishes(reader)
    assert (result.event, result.via) == (DeviceEvent.CALL, Via.EVENTFD)
    assert rise(before, interrupts(zoo))[interrupt_line(zoo, "vub0", number)] >= 1


@pytest.mark.parametrize("name", ["iot0", "packediot0"])
def test_a_kick_that_an_iothread_lost_is_repaired(
    zoo: LabMachine, attached: AttachedMachine, name: str
) -> None:
    command, queue = own_io(zoo, name, cpu=1), attached.device(name).queue(1)
    notifier = queue.map.kick
    assert notifier is not None
    with our_own(zoo.pid, notifier) as ours:
        with StoppedIothread(zoo, name):
            reader = zoo.guest.start(command)
            until(lambda: eventfd_counts(zoo.pid)[notifier.fd] == 1, "the guest kicks")
            os.read(ours, 8)
        hangs(reader)
        queue.kick()
        finishes(reader)


def test_a_kick_that_a_vhost_user_back_end_lost_is_repaired(
    zoo: LabMachine, attached: AttachedMachine
) -> None:
    command, queue = own_io(zoo, "direct0", cpu=1), attached.device("direct0").queue(1)
    notifier = queue.map.kick
    assert notifier is not None
    with our_own(zoo.pid, notifier) as ours:
        with stopped(zoo.backend_pid("direct0")):
            reader = zoo.guest.start(command)
            until(lambda: eventfd_counts(zoo.pid)[notifier.fd] == 1, "the guest kicks")
            os.read(ours, 8)
        hangs(reader)
        queue.kick()
        finishes(reader)


# Every way


@pytest.mark.parametrize("name", ["blk0", "iot0", "scsi0", "net0", "slow0"])
def test_an_io_port_kicks_a_transitional_device(
    zoo: LabMachine, attached: AttachedMachine, name: str
) -> None:
    address = virtio_device_address(zoo, name)
    for queue in attached.device(name).queues():

        def kicked(queue: AttachedQueue = queue) -> tuple[Injection, set[tuple[str, int]]]:
            with NotifyTrace(zoo) as trace:
                result = queue.kick(via="ioport")
                until(trace.seen, f"QEMU looks at queue {queue.map.index} of {name}")
                interrupts(zoo)
                return result, set(trace.seen())

        result, looked_at = undisturbed(attached, kicked)
        # QEMU tells it twice: of the doorbell, and of the notifier that it then signals.
        assert looked_at == {(address, queue.map.index)}
        assert result.via is Via.IOPORT
        assert result.target.startswith("I/O port 0x")


def test_an_io_port_kicks_a_vhost_user_device(zoo: LabMachine, attached: AttachedMachine) -> None:
    relay = zoo.relay("vub0")
    before = relay.carried("kick", 1).passed
    attached.device("vub0").queue(1).kick(via=Via.IOPORT)
    until(lambda: relay.carried("kick", 1).passed == before + 1, "the relay carries the kick")


@pytest.mark.parametrize("name", ["packed0", "scsipk0"])
def test_a_modern_device_has_no_io_port(attached: AttachedMachine, name: str) -> None:
    with pytest.raises(EventNotSupportedError, match="no legacy I/O BAR"):
        attached.device(name).queue(0).kick(via="ioport")


def test_an_io_port_cannot_call(attached: AttachedMachine) -> None:
    with pytest.raises(EventNotSupportedError, match="can only kick"):
        attached.device("blk0").queue(0).call(via="ioport")


def test_a_queue_without_notifiers_is_kicked_by_its_io_port(
    zoo: LabMachine, attached: AttachedMachine
) -> None:
    queue = attached.device("slow0").queue(1)
    with NotifyTrace(zoo) as trace:
        result = queue.kick()
        trace.wait_for(1)
    assert result.via is Via.IOPORT
    assert result.eventfd_id is None
    with pytest.raises(EventNotSupportedError, match="no kick notifier"):
        queue.kick(via="eventfd")


@pytest.mark.parametrize("name", ["net0", "slow0"])
def test_a_queue_without_a_call_notifier_cannot_be_called(
    zoo: LabMachine, attached: AttachedMachine, name: str
) -> None:
    def raised() -> dict[Line, int]:
        before = interrupts(zoo)
        with pytest.raises(EventNotSupportedError, match="no call notifier"):
            attached.device(name).queue(0).call()
        return rise(before, interrupts(zoo))

    assert undisturbed(attached, raised) == {}


@pytest.mark.parametrize("event", list(DeviceEvent))
def test_qmp_is_refused_where_qemu_lacks_the_command(
    attached: AttachedMachine, event: DeviceEvent
) -> None:
    with pytest.raises(EventNotSupportedError, match="this QEMU has no x-debug-device-event"):
        attached.device_event("blk0", event, 0, via="qmp")


def test_qmp_raises_both_events_where_the_monitor_has_the_command(
    zoo: LabMachine, tmp_path: Path
) -> None:
    listen = tmp_path / "served"
    with serving(zoo, listen), attach(f"qmp:{listen}") as attached:
        queue = attached.device("scsi0").queue(3)
        address = virtio_device_address(zoo, "scsi0")

        def kicked() -> list[tuple[str, int]]:
            with NotifyTrace(zoo) as trace:
                assert queue.kick(via="qmp").via is Via.QMP
                until(trace.seen, "QEMU looks at a queue")
                return trace.seen()

        assert undisturbed(attached, kicked) == [(address, 3)]

        def called() -> None:
            result = queue.call(via="qmp")
            assert result.via is Via.QMP
            assert queue.map.call is not None
            assert result.eventfd_id == queue.map.call.eventfd_id

        assert raised_by(zoo, attached, called) == {interrupt_line(zoo, "scsi0", 3): 1}
        # On its own account kickcall writes the notifier: that command would only come back here.
        assert queue.call().via is Via.EVENTFD


# What is refused, and what is not done


@pytest.mark.parametrize("event", list(DeviceEvent))
def test_a_dry_run_checks_everything_and_writes_nothing(
    zoo: LabMachine, attached: AttachedMachine, event: DeviceEvent
) -> None:
    command, relay = own_io(zoo, "vub0", cpu=0), zoo.relay("vub0")
    queue = attached.device("vub0").queue(0)
    lost = relay.carried(event, 0).dropped
    relay.drop(event, queue=0)
    reader = zoo.guest.start(command)
    relay.wait_for(event, 0, dropped=lost + 1)
    result = queue.raise_event(event, dry_run=True, watch_s=0.1)
    assert result.dry_run
    notifier = queue.map.kick if event is DeviceEvent.KICK else queue.map.call
    assert notifier is not None
    assert result.eventfd_id == notifier.eventfd_id
    hangs(reader)
    queue.raise_event(event)
    finishes(reader)


def test_what_is_not_there_is_refused_by_name(attached: AttachedMachine) -> None:
    with pytest.raises(DeviceNotFoundError, match="no virtio device 'blk9'; it has: blk0, direct0"):
        attached.device("blk9")
    with pytest.raises(QueueNotFoundError, match="blk0 has no queue 2: its queues are 0 to 1"):
        attached.device("blk0").queue(2)
    with pytest.raises(QueueNotFoundError):
        attached.device("blk0").queue(-1)
    with pytest.raises(UsageError, match="'poke' is no device event"):
        attached.device_event("blk0", "poke", 0)
    with pytest.raises(UsageError, match="'luck' is no way"):
        attached.device_event("blk0", "kick", 0, via="luck")


@pytest.mark.parametrize("dev", ["blk0", "/machine/peripheral/blk0"])
def test_a_device_is_named_by_its_id_or_its_qom_path(attached: AttachedMachine, dev: str) -> None:
    result = attached.device_event(dev, "kick", 0, dry_run=True)
    assert result.device == "/machine/peripheral/blk0"
    assert attached.device(dev + "/virtio-backend" if "/" in dev else dev).info.id == "blk0"


def test_a_full_counter_is_refused_and_blocks_nobody(
    zoo: LabMachine, attached: AttachedMachine
) -> None:
    cases = (
        ("direct0", stopped(zoo.backend_pid("direct0"))),
        ("vub0", stopped(zoo.relay_pid("vub0"))),
        ("iot0", StoppedIothread(zoo, "iot0")),
    )
    for name, reader_stands_still in cases:
        command, queue = own_io(zoo, name, cpu=0), attached.device(name).queue(0)
        notifier = queue.map.kick
        assert notifier is not None
        with our_own(zoo.pid, notifier) as ours, reader_stands_still:
            os.write(ours, COUNT_MAX.to_bytes(8, "little"))
            began = time.monotonic()
            with pytest.raises(CounterFullError):
                queue.kick()
            assert time.monotonic() - began < 10
            assert eventfd_counts(zoo.pid)[notifier.fd] == COUNT_MAX
            os.read(ours, 8)
        finishes(zoo.guest.start(command))


def test_the_notifiers_flags_are_left_alone(zoo: LabMachine, attached: AttachedMachine) -> None:
    for name in ("blk0", "packediot0", "direct0"):
        queue = attached.device(name).queue(0)
        before = queue.state()
        queue.kick()
        queue.call()
        after = queue.state()
        assert before.kick is not None
        assert after.kick is not None
        assert after.kick.flags == before.kick.flags
        assert before.call is not None
        assert after.call is not None
        assert after.call.flags == before.call.flags
