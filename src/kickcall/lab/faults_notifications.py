"""How is a notification lost, or never sent? Faults on the hops 2, 3, 7 and 8 (docs/path.md)."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from kickcall.errors import LabError
from kickcall.lab.ptrace import HeldThread
from kickcall.lab.qemu import usable_kvm
from kickcall.model import DeviceEvent, Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.lab.faults_target import Target
    from kickcall.lab.guest import Command
    from kickcall.lab.ptrace import Syscall
    from kickcall.model import Notifier

_TRIES = 5
_READS = 2
"""The guest goes on to another request when it is called: that shows that the call helped, also
where the driver does not say at which index it wants the next call."""
_RESERVED_EVENT_MODE = 3
"""Of a packed queue's event area (virtio 1.4, 2.8.10)."""


@contextlib.contextmanager
def repaired(
    target: Target,
    event: DeviceEvent,
    command: Command,
    undone: contextlib.ExitStack | None = None,
) -> Iterator[None]:
    """When the block is left, undo, write the missing event, and wait for the guest's request."""
    try:
        yield
    finally:
        if undone is not None:
            undone.close()
        target.inject(event)
        target.finish(command)


@contextlib.contextmanager
def lost_kick(target: Target) -> Iterator[str]:
    """Lose one kick: the back-end wakes up for it, and finds the notifier empty."""
    for _ in range(_TRIES):
        command, how = _lose_kick(target)
        with repaired(target, DeviceEvent.KICK, command):
            # A back-end that polls its rings may find the work by itself.
            if target.stays_incomplete():
                yield how
                return
    raise LabError(f"{target.device} found the work without its kick, {_TRIES} times")


def _lose_kick(target: Target) -> tuple[Command, str]:
    if target.has_relay:
        relay = target.machine.relay(target.device)
        before = relay.carried("kick", target.number).dropped
        relay.drop("kick", target.number)
        command = target.request()
        relay.wait_for("kick", target.number, dropped=before + 1)
        return command, "the relay read one kick and passed none on"
    if target.is_vhost_user:
        # qemu-storage-daemon drops the ring where it polls a kick and then reads none
        # (util/vhost-user-server.c): stopped before the kick comes, it never polls it.
        with target.kick_waiting() as command:
            lost = target.empty(target.kick_notifier)
        return command, f"{lost} kick read from the notifier of the stopped back-end"
    return _read_first(target, target.thread, target.kick_notifier)


def _read_first(
    target: Target, thread: int, notifier: Notifier, *, reads: int = 1
) -> tuple[Command, str]:
    """Read a notification of the guest's next request before `thread` of QEMU does.

    QEMU's eventfds are non-blocking: its own read finds nothing and nothing happens
    (util/event_notifier-posix.c, event_notifier_test_and_clear).
    """
    lost: list[int] = []

    def read_first(call: Syscall) -> bool:
        if call.reads(notifier.fd) and not lost:
            lost.append(target.empty(notifier))
        return False

    with HeldThread(thread, read_first):
        command = target.request(reads=reads)
        target.until(lambda: bool(lost), "no notification came")
    return command, f"a count of {lost[0]} was read from the notifier just before QEMU read it"


def cannot_lose_call(target: Target) -> str:
    if target.queue.map.call is None:
        return "it has no call notifier: QEMU raises the interrupt itself, in one go"
    if not target.has_relay and usable_kvm():
        return "KVM's irqfd takes each call at once: nobody can read it first"
    return target.cannot_wait_for_call


@contextlib.contextmanager
def lost_call(target: Target) -> Iterator[str]:
    """Lose one call: the device completes and calls, and no interrupt is raised."""
    completed = target.completed
    if target.has_relay:
        relay = target.machine.relay(target.device)
        before = relay.carried("call", target.number).dropped
        relay.drop("call", target.number)
        command = target.request(reads=_READS)
        relay.wait_for("call", target.number, dropped=before + 1)
        how = "the relay read one call and passed none on"
    else:
        # Without KVM it is QEMU's main loop that turns a call into an interrupt.
        command, how = _read_first(target, target.machine.pid, target.call_notifier, reads=_READS)
    with repaired(target, DeviceEvent.CALL, command):
        target.until_completed(completed)
        _expect_hang(command)
        yield how


@contextlib.contextmanager
def _written(target: Target, values: dict[str, int]) -> Iterator[str]:
    """Write fields of the queue in guest memory, and give back what is still ours at the end."""
    before = {field: target.fields.read(field) for field in values}
    for field, value in values.items():
        target.fields.write(field, value)
    try:
        yield ", ".join(f"{field} {value:#x} in guest memory" for field, value in values.items())
    finally:
        target.fields.restore(before, values)


@contextlib.contextmanager
def kick_suppressed(target: Target) -> Iterator[str]:
    """Let the driver publish without a kick."""
    published = target.published
    silence = target.fields.no_kick_wanted(target.event_idx, published)
    with contextlib.ExitStack() as undone:
        wrote = undone.enter_context(_written(target, silence))
        command = target.request()
        # The field first: not every back-end asks for its next kick by itself.
        with repaired(target, DeviceEvent.KICK, command, undone):
            target.until_published(published)
            if not target.stays_incomplete():
                raise LabError(f"{target.device} found the work without a kick")
            yield f"the driver published and did not kick: {wrote}"


def cannot_suppress_call(target: Target) -> str:
    if target.queue.map.call is None:
        return "it has no call notifier, by which the lab could repair it"
    return target.cannot_wait_for_call


@contextlib.contextmanager
def call_suppressed(target: Target) -> Iterator[str]:
    """Let the device complete without a call."""
    # Its first call after a start a device sends whatever the driver asks for
    # (QEMU: hw/virtio/virtio.c and libvhost-user.c, signalled_used_valid).
    target.finish(target.request())
    completed = target.completed
    silence = target.fields.no_call_wanted(target.event_idx, completed)
    with contextlib.ExitStack() as undone:
        wrote = undone.enter_context(_written(target, silence))
        command = target.request()
        with repaired(target, DeviceEvent.CALL, command, undone):
            target.until_completed(completed)
            _expect_hang(command)
            yield f"the device completed and did not call: {wrote}"


def _expect_hang(command: Command) -> None:
    # Asked through the guest's serial port, which takes longer than a call that was not lost.
    if command.done:
        raise LabError(f"the guest's request was done all the same: {command.command}")


@contextlib.contextmanager
def ring_corrupt(target: Target) -> Iterator[str]:
    """Let the ring say what cannot be; nobody is kicked, so the device does not see it."""
    fields = target.fields
    if fields.layout is Layout.PACKED:
        values = {"avail_flags": _RESERVED_EVENT_MODE}
    else:
        ahead = fields.read("used_idx") + fields.size + 1000
        values = {"avail_idx": ahead & 0xFFFF}
    with _written(target, values) as wrote:
        yield wrote
