"""How often was each queue of a machine kicked and called, by whom, and when last?

The kernel counts where it happens (host/eventfd_trace.py); here its eventfds become queues. So is
seen what no look at a notifier shows: calls, which irqfd and QEMU take away at once.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

from kickcall.errors import KickcallError
from kickcall.host.eventfd_trace import EventfdTrace
from kickcall.host.eventfds import read_eventfd
from kickcall.model import DeviceEvent, Notification, NotificationCount, Signalled
from kickcall.vmm.signallers import signallers_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kickcall.host.hist import Hits
    from kickcall.vmm.session import MappedDevice, VmmSession

_RETRY_S = 1.0
_RETRY_MOST_S = 8.0
"""Seconds between two questions to the monitor while something has no notifiers to be counted."""
_HELD_SHARE = 2
"""At most one in so many of this process's descriptors is a notifier that is held."""


class Which(NamedTuple):
    """Which notification of a machine."""

    device: str
    """QOM path."""
    queue: int
    event: DeviceEvent


@dataclass(frozen=True, slots=True)
class _Target:
    which: Which
    fd: int
    """In the VMM process."""
    eventfd_id: int


class Recording:
    """The kernel counts the kicks and calls of a machine's queues, until this is closed.

    `only` names devices, each with one queue or (None) all of them. With `events` every single one
    is recorded, too. Counts are 0 at first. Raises PrivilegeError, or KernelViewError where the
    kernel cannot do it: then nothing was changed.
    """

    def __init__(
        self,
        session: VmmSession,
        only: Iterable[tuple[MappedDevice, int | None]] | None = None,
        *,
        events: bool = False,
    ) -> None:
        self._session = session
        # By path: a session that is mapped anew has other values for the same devices.
        self._only = (
            None
            if only is None
            else [(mapped.device.path, mapped.device.id, queue) for mapped, queue in only]
        )
        self._signallers = signallers_of(session)
        self._targets: dict[Which, _Target] = {}
        self._which: dict[int, Which] = {}
        self._base: dict[tuple[int, int, bool], int] = {}
        self._held: list[int] = []
        self._missing: set[Which] = set()
        self._said: tuple[str, ...] = ()
        self._unanswered: dict[tuple[str, int], float] = {}
        self._retry_at = 0.0
        self._retry_s = _RETRY_S
        self.dropped = 0
        """At most so many notifications the last `counts` missed: see `Counted`."""
        found = list(self._find())
        self._take(found)
        try:
            self._trace = EventfdTrace(
                (target.eventfd_id for target in found),
                threads=_threads(session.process.pid) + 8,
                record=events,
            )
        except BaseException:
            self._let_go()
            raise
        self.started_at = time.monotonic()
        """When the counting began, in seconds of CLOCK_MONOTONIC."""

    @property
    def notifications(self) -> tuple[Which, ...]:
        """What is counted now, by device and queue, the kick before the call."""
        return tuple(self._targets)

    def counts(self) -> dict[Which, NotificationCount]:
        """Return how often each was raised since the recording began: a look of under 1 ms."""
        counted = self._trace.counts()
        self.dropped = counted.dropped
        by: dict[Which, list[Signalled]] = {which: [] for which in self._which.values()}
        for hits, in_kernel in ((counted.in_kernel, True), (counted.by_write, False)):
            for one in hits:
                if (which := self._which.get(one.eventfd_id)) is not None:
                    total = one.total - self._base.get((one.eventfd_id, one.tid, in_kernel), 0)
                    if total > 0:
                        by[which].append(self._signalled(one, which.event, in_kernel, total))
        return {which: self._count(which, signalled) for which, signalled in by.items()}

    def _signalled(self, hits: Hits, event: DeviceEvent, in_kernel: bool, total: int) -> Signalled:
        pid, comm = self._signallers.thread(hits.tid, hits.comm)
        who = self._signallers.who(hits.tid, event, in_kernel=in_kernel)
        return Signalled(who, pid, hits.tid, comm, total, hits.last_ns / 1e9)

    def _count(self, which: Which, signalled: list[Signalled]) -> NotificationCount:
        target = self._targets.get(which)
        return NotificationCount(
            *which,
            eventfd_id=None if target is None else target.eventfd_id,
            total=sum(one.total for one in signalled),
            last_at=max((one.last_at for one in signalled), default=None),
            by=tuple(sorted(signalled, key=lambda one: (-one.total, one.tid))),
        )

    def events(self, *, last: bool = False) -> tuple[list[Notification], bool]:
        """Return the notifications since the last call, oldest first, and whether some were lost.

        Only of a recording with `events`. Ask some times a second: the kernel keeps some thousands
        for each CPU. The latest milliseconds are kept for the next time, unless it is the `last`.
        """
        signals, lost = self._trace.signals(last=last)
        found = []
        for signal in signals:
            if (which := self._which.get(signal.eventfd_id)) is None:
                continue
            who = self._signallers.who(signal.tid, which.event, in_kernel=signal.in_kernel)
            pid, comm = self._signallers.thread(signal.tid)
            at = signal.ns / 1e9
            after = self._after_kick(which, at)
            found.append(Notification(at, *which, who, pid, signal.tid, comm, after))
        return found, lost

    def _after_kick(self, which: Which, at: float) -> float | None:
        queue = (which.device, which.queue)
        if which.event is DeviceEvent.KICK:
            self._unanswered.setdefault(queue, at)
            return None
        kicked = self._unanswered.pop(queue, None)
        return None if kicked is None else at - kicked

    def follow(self) -> tuple[str, ...]:
        """Map the machine anew if its notifiers were replaced; return what was done, in words.

        A guest that reboots or resets a device gets other eventfds. What was counted stays; what
        is raised before the change is noticed is not counted. Some times a second is enough: a
        look at a notifier takes 10 µs. Raises MachineGoneError where the machine ended.
        """
        self._session.process.check_alive()
        gone = [one for one in self._targets.values() if not self._is_live(one)]
        if not (gone or self._missing) and self._targets:
            return ()
        now = time.monotonic()
        if now < self._retry_at:
            return ()
        self._retry_at = now + self._retry_s
        self._retry_s = min(self._retry_s * 2, _RETRY_MOST_S)
        before, self._said = self._said, self._map_anew(gone)
        return self._said if self._said != before else ()

    def _map_anew(self, gone: list[_Target]) -> tuple[str, ...]:
        try:
            self._session.refresh()
        except KickcallError as exc:
            self._session.process.check_alive()
            return (f"notifiers were replaced, and the machine cannot be mapped now: {exc}",)
        found = {target.which: target for target in self._find()}
        for one in gone:
            del self._targets[one.which]
            self._missing.add(one.which)
        new = [one for which, one in found.items() if self._targets.get(which) != one]
        said = []
        if new:
            self._retry_s = _RETRY_S
            self._missing.difference_update(found)
            self._forget_earlier(new)
            self._take(new)
            what = f"{_devices(one.which for one in new)}: new notifiers"
            try:
                self._trace.add(one.eventfd_id for one in new)
            except KickcallError as exc:
                said.append(f"{what}, and they cannot be counted: {exc}")
            else:
                said.append(f"{what}, counted from now on")
        if self._missing:
            said.append(f"{_devices(self._missing)}: some notifiers are gone")
        return tuple(said)

    def _is_live(self, target: _Target) -> bool:
        state = read_eventfd(self._session.process.pid, target.fd)
        return state is not None and state.eventfd_id == target.eventfd_id

    def _forget_earlier(self, new: list[_Target]) -> None:
        """Do not count what other eventfds of the same ids did: filters may pass more than ours."""
        ids = {one.eventfd_id for one in new if one.eventfd_id not in self._which}
        counted = self._trace.counts()
        for hits, in_kernel in ((counted.in_kernel, True), (counted.by_write, False)):
            for one in hits:
                if one.eventfd_id in ids:
                    self._base[one.eventfd_id, one.tid, in_kernel] = one.total

    def _find(self) -> Iterator[_Target]:
        """Find what is to be counted, as the session has it mapped now."""
        for mapped in self._session.devices:
            queues = self._wanted(mapped)
            if mapped.array is None or not mapped.device.driver_ok:
                continue
            for index, element in enumerate(mapped.array.elements):
                if not element.rings.desc or (queues is not None and index not in queues):
                    continue
                queue = mapped.queue_map(index)
                for event, notifier in (
                    (DeviceEvent.KICK, queue.kick),
                    (DeviceEvent.CALL, queue.call),
                ):
                    if notifier is not None:
                        which = Which(mapped.device.path, index, event)
                        yield _Target(which, notifier.fd, notifier.eventfd_id)

    def _wanted(self, mapped: MappedDevice) -> set[int] | None:
        """Return which queues of a device are to be counted; None: all."""
        if self._only is None:
            return None
        queues: set[int] = set()
        for path, _, queue in self._only:
            if path == mapped.device.path:
                if queue is None:
                    return None
                queues.add(queue)
        return queues

    def _take(self, targets: list[_Target]) -> None:
        """Count these for their queues, and hold them: their ids then stay theirs.

        Where there are not enough descriptors for it, an id may come to mean another eventfd after
        the machine has closed its own.
        """
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _HELD_SHARE
        for target in targets:
            self._targets[target.which] = target
            self._which[target.eventfd_id] = target.which
            if len(self._held) >= most:
                continue
            with contextlib.suppress(OSError, KickcallError):
                self._held.append(self._session.process.duplicate_fd(target.fd))

    def _let_go(self) -> None:
        while self._held:
            os.close(self._held.pop())

    def close(self) -> None:
        """Have nothing counted any more, and remove all of it from the kernel."""
        self._let_go()
        self._trace.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _devices(which: Iterable[Which]) -> str:
    return ", ".join(sorted({one.device.removeprefix("/machine/peripheral/") for one in which}))


def _threads(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/task"))
    return 0
