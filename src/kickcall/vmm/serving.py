"""Which threads serve a queue, and which run the guest: found by the monitor and by /proc."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kickcall.diagnose.states import BackendThread, ThreadState
from kickcall.errors import KickcallError, QmpCommandError
from kickcall.host import eventfds, threads
from kickcall.model import BackendKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kickcall.host.threads import Thread
    from kickcall.model import Notifier
    from kickcall.vmm.monitor import Monitor
    from kickcall.vmm.session import MappedDevice, VmmSession

_STATES = {
    "R": ThreadState.RUNNING,
    "D": ThreadState.DISK,
    "T": ThreadState.STOPPED,
    "t": ThreadState.STOPPED,
    "Z": ThreadState.GONE,
    "X": ThreadState.GONE,
    "": ThreadState.GONE,
}
"""All other letters are ways to sleep."""
_SETTLE_LOOKS = 5
_SETTLE_S = 0.002
_OURSELVES = "kickcall"
"""What a kickcall is called that holds duplicates of notifiers: it serves nothing."""


def vcpu_threads(monitor: Monitor, pid: int) -> tuple[BackendThread, ...]:
    """Return the threads that run the guest's processors."""
    answer = monitor.execute("query-cpus-fast")
    return _looked_at(pid, threads.as_here(pid, (int(cpu["thread-id"]) for cpu in answer)))


def main_loop(pid: int) -> tuple[BackendThread, ...]:
    """Return QEMU's main thread, which serves every device without an iothread."""
    return _looked_at(pid, [pid])


def iothread(monitor: Monitor, mapped: MappedDevice, queue: int) -> str | None:
    """Return the id of the iothread that serves a queue; None where it is the main loop.

    From the device's properties `iothread` (a QOM path) and, since QEMU 9.0,
    `iothread-vq-mapping`.
    """
    mapping = _property(monitor, mapped.facts.backend_path, "iothread-vq-mapping")
    if isinstance(mapping, list):
        for number, entry in enumerate(mapping):
            # Without lists of queues they are dealt out in turn (hw/virtio/iothread-vq-mapping.c).
            queues = entry.get("vqs")
            if queue in queues if queues else queue % len(mapping) == number:
                return str(entry["iothread"]).rpartition("/")[2]
    path = _property(monitor, mapped.facts.backend_path, "iothread")
    return path.rpartition("/")[2] if isinstance(path, str) and path else None


def _property(monitor: Monitor, path: str, name: str) -> Any:
    try:
        return monitor.execute("qom-get", {"path": path, "property": name})
    except QmpCommandError:
        return None


def qemu_threads(
    monitor: Monitor, pid: int, mapped: MappedDevice, queue: int
) -> tuple[BackendThread, ...]:
    """Return the thread of QEMU that reads the queue's kicks: an iothread, or the main loop's."""
    name = iothread(monitor, mapped, queue)
    if name is None:
        return main_loop(pid)
    for entry in monitor.execute("query-iothreads"):
        if entry["id"] == name:
            return _looked_at(pid, threads.as_here(pid, [int(entry["thread-id"])]))
    return ()


class Holders:
    """Who holds which eventfd beside the VMM; remembers where it was found.

    To find out, all descriptors of all processes are looked at. A process that was found is asked
    first the next time.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, ...]] = {}

    def of(self, vmm: int, notifier: Notifier) -> tuple[tuple[int, ...], bool]:
        """Return the pids of all other processes that hold `notifier`, and whether that is all.

        It is not where processes could not be looked at.
        """
        wanted = notifier.eventfd_id
        still = tuple(pid for pid in self._known.get(wanted, ()) if _holds(pid, wanted))
        if still:
            return still, True
        found, hidden = eventfds.holders_of({wanted})
        pids = sorted(
            {
                holder.pid
                for holder in found[wanted]
                if holder.pid not in (vmm, os.getpid()) and holder.comm != _OURSELVES
            }
        )
        self._known[wanted] = tuple(pids)
        return tuple(pids), not hidden


def _holds(pid: int, eventfd_id: int) -> bool:
    return bool(_descriptors(pid, eventfd_id))


def _descriptors(pid: int, eventfd_id: int) -> list[int]:
    """Return which descriptors of process `pid` are that eventfd; none where it cannot be seen."""
    try:
        states = eventfds.eventfds_of(pid)
    except KickcallError:
        return []
    return [fd for fd, state in states.items() if state.eventfd_id == eventfd_id]


@dataclass(frozen=True, slots=True)
class Serving:
    """Who serves a queue, and reads its kick notifier if it has one."""

    holders: int | None = None
    """How many other processes hold the kick notifier (vhost-user only)."""
    polled: bool | None = None
    """One of them has it in an epoll set. None: not known."""
    threads: tuple[BackendThread, ...] = ()


def serving(
    session: VmmSession,
    monitor: Monitor,
    mapped: MappedDevice,
    queue: int,
    holders: Holders,
) -> Serving:
    """Return who serves a queue.

    One without a kick notifier is served by whichever virtual CPU kicks it: no threads.
    """
    pid = session.process.pid
    kick = mapped.queue_map(queue).kick
    if kick is None:
        return Serving()
    match mapped.device.backend:
        case BackendKind.QEMU:
            return Serving(threads=qemu_threads(monitor, pid, mapped, queue))
        case BackendKind.VHOST_KERNEL:
            return Serving(threads=_as_backend(threads.vhost_workers(pid)))
        case BackendKind.VHOST_USER:
            pids, all_seen = holders.of(pid, kick)
            found = [one for holder in pids for one in threads.threads_of(holder)]
            return Serving(
                holders=len(pids) if pids or all_seen else None,
                polled=_polled(pids, kick),
                threads=_as_backend(found),
            )


def _polled(pids: Iterable[int], kick: Notifier) -> bool | None:
    """Tell whether one of the processes has the notifier in an epoll set; None: not known."""
    answers = {
        threads.in_epoll(pid, fd) for pid in pids for fd in _descriptors(pid, kick.eventfd_id)
    }
    return None if answers <= {None} else True in answers


def _looked_at(pid: int, tids: Iterable[int]) -> tuple[BackendThread, ...]:
    """Return what the threads do; one that runs only because we asked is given time to finish.

    QEMU's main loop answers the monitor, and wakes the processors' threads for some answers.
    """
    found = {tid: threads.thread(pid, tid) for tid in tids}
    for _ in range(_SETTLE_LOOKS):
        runs = [tid for tid, one in found.items() if one.state == "R"]
        if not runs:
            break
        time.sleep(_SETTLE_S)
        found.update((tid, threads.thread(pid, tid)) for tid in runs)
    return _as_backend(found.values())


def _as_backend(found: Iterable[Thread]) -> tuple[BackendThread, ...]:
    return tuple(
        BackendThread(
            one.pid,
            one.tid,
            one.comm,
            _STATES.get(one.state, ThreadState.SLEEPING),
            one.waits_in,
        )
        for one in found
    )
