"""The ways to inject that virtio devices share: `qmp`, `eventfd`, `ioport`, `mmio`."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from kickcall.devices.base import Way
from kickcall.errors import MonitorGoneError, MonitorTimeoutError, QmpCommandError
from kickcall.host import eventfds
from kickcall.model import Counters, DeviceEvent, Via
from kickcall.vmm import observe, pause, pci, registers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.devices.base import Offer
    from kickcall.model import Notifier, QueueMap
    from kickcall.vmm.session import MappedDevice, VmmSession

COMMAND = "x-debug-device-event"
"""The RFC's QMP command."""


def virtio_ways(
    session: VmmSession, mapped: MappedDevice, number: int, event: DeviceEvent
) -> dict[Via, Offer]:
    """Return the ways that every virtio device has, best first. Raises what `queue_map` does."""
    queue = mapped.queue_map(number)
    ways: dict[Via, Offer] = {
        Via.QMP: partial(via_qmp, session, mapped, queue, event),
        Via.EVENTFD: partial(via_eventfd, session, mapped, queue, event),
        Via.IOPORT: partial(via_ioport, session, mapped, queue, event),
        Via.MMIO: partial(via_mmio, session, mapped, queue, event),
    }
    if session.monitor_is_ours:
        # There the RFC's command is kickcall's own, and would only come back here.
        ways[Via.QMP] = ways.pop(Via.QMP)
    return ways


def via_qmp(
    session: VmmSession, mapped: MappedDevice, queue: QueueMap, event: DeviceEvent
) -> Way | str:
    """The VMM raises the event itself, where it has the RFC's command."""
    if not session.has_command(COMMAND):
        return f"this QEMU has no {COMMAND}"

    def write() -> None:
        with session.borrow() as monitor:
            session.check_running(monitor)
            arguments = {"dev": mapped.device.path, "event": str(event), "queue": queue.index}
            with _maybe_written():
                monitor.execute(COMMAND, arguments)

    notifier = _notifier(queue, event)
    return Way(
        f"{COMMAND} on the monitor",
        write,
        partial(observe.counters, session, mapped, queue, notifier),
        None if notifier is None else notifier.eventfd_id,
        check=partial(session.verify, mapped, queue, event),
        layout=queue.layout,
    )


def via_eventfd(
    session: VmmSession, mapped: MappedDevice, queue: QueueMap, event: DeviceEvent
) -> Way | str:
    """Write 1 to the queue's own notifier: what the guest's doorbell, or the back-end, does."""
    notifier = _notifier(queue, event)
    if notifier is None:
        return f"the queue has no {event} notifier (QEMU does it without an eventfd)"
    ours = session.hold(mapped, queue, notifier)

    def counters() -> Counters:
        # Our own descriptor is the same open eventfd, whatever the VMM does with its number.
        view = observe.ring_view(session, mapped, queue)
        state = eventfds.read_eventfd(os.getpid(), ours)
        return Counters(None if state is None else state.count, view.avail_idx, view.used_idx)

    return Way(
        f"eventfd {notifier.eventfd_id} (fd {notifier.fd} of process {session.process.pid})",
        partial(eventfds.signal, ours),
        counters,
        notifier.eventfd_id,
        check=partial(session.verify, mapped, queue, event),
        layout=queue.layout,
    )


def via_ioport(
    session: VmmSession, mapped: MappedDevice, queue: QueueMap, event: DeviceEvent
) -> Way | str:
    """Ring the legacy notify port of a transitional virtio-pci device: HMP `o`, no pause."""
    if event is not DeviceEvent.KICK:
        return "an I/O port is a doorbell: it can only kick"
    with session.borrow() as monitor:
        port = pci.legacy_notify_port(monitor, mapped.device)
    if port is None:
        return "the device has no legacy I/O BAR that the guest has mapped"

    def write() -> None:
        with session.borrow() as monitor:
            session.check_running(monitor)
            # The guest may have moved the BAR since: a port is only as good as its last look-up.
            if pci.legacy_notify_port(monitor, mapped.device) != port:
                raise QmpCommandError(f"the I/O BAR of {mapped.device.id} moved: nothing written")
            with _maybe_written():
                pci.write_port(monitor, port, queue.index)

    return Way(
        f"I/O port {port:#x}",
        write,
        partial(observe.counters, session, mapped, queue, queue.kick),
        None if queue.kick is None else queue.kick.eventfd_id,
        check=partial(session.verify, mapped, queue, event),
        layout=queue.layout,
    )


def via_mmio(
    session: VmmSession, mapped: MappedDevice, queue: QueueMap, event: DeviceEvent
) -> Way | str:
    """Write the doorbell, or the interrupt's message, through the gdb stub: that pauses."""
    with session.borrow() as monitor:
        found = registers.register_write(session, monitor, mapped, queue, event)
    if isinstance(found, str):
        return found
    write, target = found

    def counters() -> Counters:
        # After the pause the machine is mapped anew, and the queue has other notifiers.
        now = session.device_at(mapped.device.path)
        queue_now = now.queue_map(queue.index)
        return observe.counters(session, now, queue_now, _notifier(queue_now, event))

    notifier = _notifier(queue, event)
    return Way(
        target,
        partial(pause.write_paused, session, write),
        counters,
        None if notifier is None else notifier.eventfd_id,
        check=partial(session.verify, mapped, queue, event),
        layout=queue.layout,
    )


@contextmanager
def _maybe_written() -> Iterator[None]:
    """Say so where a monitor took a command and gave no answer: it may have been carried out."""
    try:
        yield
    except (MonitorTimeoutError, MonitorGoneError) as exc:
        raise type(exc)(f"{exc}; the event may have been raised all the same") from exc


def _notifier(queue: QueueMap, event: DeviceEvent) -> Notifier | None:
    return queue.kick if event is DeviceEvent.KICK else queue.call
