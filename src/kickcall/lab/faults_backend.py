"""How does a back-end sleep, die, or never finish? Faults on the hops 4 to 6 (docs/path.md)."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from kickcall.errors import LabError
from kickcall.lab.ptrace import HeldThread
from kickcall.lab.spec import VhostUserBlk, VirtioBlk, VirtioNet, VirtioScsi

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.lab.faults_target import Target

_LARGE = "256k"
_UNIT = 512
"""Bytes that count as one operation: after one read of `_LARGE` the next waits 512 s."""
_NO_LIMIT = {"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0}


def cannot_leave_unread(target: Target) -> str:
    if target.server == "main loop":
        return "the main loop reads its kicks: see main-loop-stuck"
    return target.cannot_wait_for_kick


def cannot_stop_main_loop(target: Target) -> str:
    if target.server != "main loop":
        return "the main loop does not read its kicks"
    return target.cannot_wait_for_kick


@contextlib.contextmanager
def kick_unread(target: Target) -> Iterator[str]:
    """Keep the back-end from reading a kick.

    While it is QEMU's main loop that is held, no monitor answers, and no timer of the guest ticks
    without KVM.
    """
    notifier = target.kick_notifier
    with target.kick_waiting() as command:
        yield f"the kick notifier's count stays {target.count(notifier)}"
    target.finish(command)


def cannot_lose_backend(target: Target) -> str:
    return target.cannot_request if target.is_vhost_user else "QEMU itself is its back-end"


@contextlib.contextmanager
def backend_killed(target: Target) -> Iterator[str]:
    """Kill the process that QEMU's socket leads to; the machine is of no use afterwards."""
    os.kill(target.backend, signal.SIGKILL)

    def started() -> bool:
        said = target.machine.qmp("x-query-virtio-status", path=target.qom_path)
        return bool(said["vhost-started"])

    target.until(lambda: not started(), "QEMU does not notice that its back-end is gone")
    command = target.request()
    published = target.published
    target.until(lambda: target.published != published or not command.done, "no request")
    yield "QEMU stopped vhost, since its socket was closed, and the guest's request hangs"


@contextlib.contextmanager
def ring_stopped(target: Target) -> Iterator[str]:
    """Have QEMU send GET_VRING_BASE: the back-end stops the ring and closes its notifiers.

    (docs/interop/vhost-user.rst, "Ring states"; QEMU: hw/virtio/vhost.c, vhost_virtqueue_stop)
    """
    published = target.published
    target.machine.qmp("x-query-virtio-queue-status", path=target.qom_path, queue=target.number)
    target.request()
    target.until_published(published)
    target.until(
        lambda: target.has_relay or target.count(target.kick_notifier) > 0, "the guest did not kick"
    )
    if not target.stays_incomplete():
        raise LabError(f"{target.device}'s back-end serves the ring all the same")
    yield "the back-end was sent GET_VRING_BASE, and the guest's request hangs"


def cannot_be_stuck(target: Target) -> str:
    spec = target.spec
    if isinstance(spec, VhostUserBlk) and spec.disk != "file":
        return "only a disk with disk=file is read by threads that can be held"
    return _cannot_limit(target)


def cannot_be_slow(target: Target) -> str:
    if target.is_vhost_user:
        return "the lab's qemu-storage-daemon has no monitor to ask for a limit"
    return _cannot_limit(target)


def _cannot_limit(target: Target) -> str:
    if isinstance(target.spec, VirtioNet):
        return "it has no storage behind it"
    return target.cannot_request


@contextlib.contextmanager
def device_stuck(target: Target) -> Iterator[str]:
    """Let the device fetch a request that its storage does not complete."""
    if target.is_vhost_user:
        with _workers_held(target) as how:
            yield how
        return
    _limit(target, iops=1, iops_size=_UNIT)
    command = None
    try:
        status, output = target.machine.guest.run(target.request_command(_LARGE))
        if status:
            raise LabError(f"the guest cannot read {_LARGE} at once: {output.strip()}")
        published = target.published
        command = target.request()
        target.until_published(published)
        if not target.stays_incomplete():
            raise LabError(f"{target.device} is not throttled")
        yield "its storage may do the next operation in some minutes"
    finally:
        # Taking the limit away lets everything go that waited for it.
        _limit(target)
        if command is not None:
            target.finish(command)


@contextlib.contextmanager
def _workers_held(target: Target) -> Iterator[str]:
    """Hold the threads of qemu-storage-daemon that read its file; its event loop runs on."""
    daemon = target.machine.backend_pid(target.device)
    with contextlib.ExitStack() as held:
        # The thread pool keeps an idle thread for 10 s, and gives it the next request
        # (util/thread-pool.c).
        target.finish(target.request())
        threads = [int(thread.name) for thread in Path(f"/proc/{daemon}/task").iterdir()]
        # All but the event loop: the daemon does not name its threads.
        workers = [thread for thread in threads if thread != daemon]
        if not workers:
            raise LabError(f"the back-end of {target.device} has no thread that reads its file")
        for worker in workers:
            held.enter_context(HeldThread(worker))
        published = target.published
        command = target.request()
        target.until_published(published)
        if not target.stays_incomplete():
            raise LabError(f"the back-end of {target.device} found another thread")
        yield "the threads that read its file are held"
    target.finish(command)


@contextlib.contextmanager
def device_slow(target: Target) -> Iterator[str]:
    """Let every request take a second."""
    _limit(target, iops=1)
    reader = target.machine.guest.start(f"while :; do {target.request_command()}; done")
    try:
        completed = target.completed
        target.until_completed(completed)
        yield "its storage does one operation a second"
    finally:
        _limit(target)
        reader.kill()


def _limit(target: Target, **limits: int) -> None:
    """Throttle the storage behind a device of QEMU, or lift the limit."""
    spec = target.spec
    assert isinstance(spec, VirtioBlk | VirtioScsi)
    device = f"{target.device}-hd" if isinstance(spec, VirtioScsi) else target.qom_path
    target.machine.qmp("block_set_io_throttle", {"id": device, **_NO_LIMIT, **limits})
