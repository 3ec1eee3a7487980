"""The questions that the rules ask of a queue, answered from its history and the slow facts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from kickcall.diagnose.states import BackendThread, QueueRole, SlowFacts, ThreadState
from kickcall.diagnose.track import (
    Track,
    all_fetched,
    kick_is_owed,
    outstanding,
    span,
    unfetched,
)
from kickcall.model import BackendKind, Layout

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kickcall.diagnose.states import QueueFixed, Thresholds

PACKED_ENABLE, PACKED_DISABLE, PACKED_DESC = 0, 1, 2
"""Modes of an event suppression area (virtio 1.4, 2.8.10); 3 is reserved."""

_LOOKS = 3
"""Looks that a stall needs at the least: one or two may find a busy queue at the same place."""

_HESITATION_S = 0.1
"""Busy queues seldom stand still for longer, and none that did matters yet."""

_EVENT_WAITS = frozenset(
    {"poll", "ppoll", "select", "pselect6"}
    | {"epoll_wait", "epoll_pwait", "epoll_pwait2", "io_uring_enter"}
)
"""System calls in which an event loop with nothing to do sleeps."""
_IDLE_WAITS = _EVENT_WAITS | frozenset(
    {"futex", "read", "recvfrom", "recvmsg", "accept", "accept4", "rt_sigtimedwait", "pause"}
    | {"wait4", "waitid", "nanosleep", "clock_nanosleep", "restart_syscall"}
)
"""The same, and those in which threads sleep that wait for other threads or for orders."""


@dataclass
class View:
    """One queue at one moment. Every property is a question in the words of the rules."""

    fixed: QueueFixed
    track: Track
    slow: SlowFacts | None
    limits: Thresholds

    # --- how long ---

    @property
    def device_still_s(self) -> float:
        """Seconds since the device last moved, or since there has been work for it."""
        return self.track.now.at - self.track.device_still_since

    @property
    def driver_still_s(self) -> float:
        """Seconds since driver and device last moved."""
        return self.track.now.at - self.track.driver_still_since

    @property
    def device_should_have_looked(self) -> bool:
        """A notification had time enough to be noticed by the device."""
        track = self.track
        return (
            track.now.at - track.unfetched_since >= self.limits.notification_s
            and track.device_looks >= _LOOKS
        )

    @property
    def device_should_have_finished(self) -> bool:
        """Even a slow device had time enough."""
        return self.device_still_s >= self.limits.device_s and self.track.device_looks >= _LOOKS

    @property
    def driver_should_have_looked(self) -> bool:
        """A notification had time enough to be noticed by the driver."""
        return (
            self.driver_still_s >= self.limits.notification_s and self.track.driver_looks >= _LOOKS
        )

    @property
    def nothing_moves(self) -> bool:
        """The ring has been found as it is for longer than a notification takes.

        Its fields are read one after the other: of a ring that moves they may not fit each other.
        """
        track = self.track
        still_s = track.now.at - track.moved_at
        return still_s >= self.limits.notification_s and track.driver_looks >= _LOOKS

    @property
    def driver_had_every_chance(self) -> bool:
        """The driver would have looked by now even if it is busy.

        A virtual CPU that could run may be at other work, or wait for a processor of the host: then
        the driver gets a slow device's time.
        """
        if not self.driver_should_have_looked:
            return False
        busy = self.slow is not None and any(
            thread.state is ThreadState.RUNNING for thread in self.slow.vcpu_threads
        )
        return not busy or self.driver_still_s >= self.limits.device_s

    @property
    def moved_lately(self) -> bool:
        """Some index moved while the queue was watched, less than a notification's time ago."""
        track = self.track
        moved = track.moved_at > track.first.at
        return moved and track.now.at - track.moved_at < self.limits.notification_s

    @property
    def hesitates_s(self) -> float:
        """Seconds for which whose turn it is has not moved; 0 where it is nobody's."""
        return max(
            self.device_still_s if self.work_waits else 0.0,
            self.driver_still_s if self.drivers_turn else 0.0,
        )

    @property
    def hesitates(self) -> bool:
        """Whose turn it is has not moved for so long that it is worth waiting for a verdict."""
        return self.hesitates_s >= _HESITATION_S

    # --- what waits ---

    @cached_property
    def waiting(self) -> int:
        """Entries published and not completed; 0 where that is unknown or makes no sense."""
        count = outstanding(self.fixed, self.track.now)
        return count if count is not None and count <= self.fixed.size else 0

    @property
    def positions_known(self) -> bool:
        """Both indices could be read."""
        return outstanding(self.fixed, self.track.now) is not None

    @property
    def work_waits(self) -> bool:
        """The driver asked for something and has no answer."""
        return self.fixed.role is QueueRole.REQUEST and self.waiting > 0

    @property
    def too_many_outstanding(self) -> bool:
        """More is outstanding than the queue can hold."""
        count = outstanding(self.fixed, self.track.now)
        return count is not None and count > self.fixed.size

    @property
    def published_impossible(self) -> bool:
        """What the driver wrote cannot be: its index is further ahead than the queue is long, or
        its event area is in the reserved mode."""
        left = unfetched(self.fixed, self.track.now)
        ran_away = self.too_many_outstanding and (left is None or left > self.fixed.size)
        return ran_away or self._reserved(self.track.now.avail_flags)

    @property
    def completed_impossible(self) -> bool:
        """What the device wrote cannot be."""
        return self.too_many_outstanding or self._reserved(self.track.now.used_flags)

    def _reserved(self, mode: int | None) -> bool:
        return self.fixed.layout is Layout.PACKED and mode == 3

    # --- kicks ---

    @cached_property
    def fetched(self) -> bool:
        """The device has certainly seen all that was published."""
        return all_fetched(self.fixed, self.track.now)

    @property
    def position_known(self) -> bool:
        """Whether the device fetched can be told at all."""
        return self.track.now.last_avail_idx is not None or self.fixed.event_idx

    @property
    def nothing_in_flight(self) -> bool:
        """The device holds no entry that it fetched and did not complete, as far as is known."""
        now = self.track.now
        if now.last_avail_idx is None or now.used_idx is None:
            return True
        return span(self.fixed, now.used_idx, now.last_avail_idx) == 0

    @cached_property
    def kick_was_owed(self) -> bool:
        """The driver had to kick for what the device has not fetched."""
        return kick_is_owed(self.fixed, self.track.now)

    @property
    def kick_recorded(self) -> bool:
        """The kernel saw the kick that was owed, on its notifier."""
        return self.slow is not None and _came_after(
            self.slow.kicked_at, self.track.kick_owed.since
        )

    @property
    def kick_missing(self) -> bool:
        """The kernel counted all the time, and saw no kick since it was owed."""
        slow, after = self.slow, self.track.kick_owed.after
        if slow is None or slow.recorded_since is None or after is None:
            return False
        return slow.recorded_since <= after and not _came_after(slow.kicked_at, after)

    @property
    def drained_by_reading(self) -> bool:
        """Who serves the queue reads the kick's count back to 0; vhost in the kernel never does."""
        return self.fixed.backend is not BackendKind.VHOST_KERNEL

    @property
    def count_stays(self) -> bool:
        """The kick notifier was not seen empty for longer than anybody healthy needs to read it."""
        since = self.track.unread_since
        return (
            self.drained_by_reading
            and since is not None
            and self.track.now.at - since >= self.limits.notification_s
        )

    @property
    def kick_unread(self) -> bool:
        """A kick stays in the notifier, and somebody waits for what it tells.

        A back-end that polls the ring asks for no kicks and may leave one unread for ever. A queue
        that keeps its positions to itself gets a slow device's time.
        """
        if not self.count_stays:
            return False
        if not self.positions_known:
            return self.track.now.used_flags != PACKED_DISABLE and (
                self.device_should_have_finished or self.backend_stopped
            )
        if self.fixed.role is QueueRole.INBOX:
            return self.backend_stopped
        if not self.work_waits or self.fetched or not self.kick_was_owed:
            return False
        return self.device_should_have_looked and not (self.may_yet_look or self.may_be_at_work)

    @property
    def kick_waits(self) -> bool:
        """There is a kick in a notifier that is read."""
        return self.drained_by_reading and self.track.unread_since is not None

    @property
    def backend_left(self) -> bool:
        """No process but the VMM holds the kick notifier of a vhost-user queue."""
        return (
            self.fixed.backend is BackendKind.VHOST_USER
            and self.slow is not None
            and self.slow.kick_holders == 0
        )

    @property
    def backend_busy(self) -> bool:
        """A thread that may serve the queue runs or waits for a disk: it may yet get to it."""
        return self.slow is not None and any(
            thread.state in (ThreadState.RUNNING, ThreadState.DISK)
            for thread in self.slow.backend_threads
        )

    @property
    def backend_stopped(self) -> bool:
        """All threads that may serve the queue are stopped or gone."""
        return self.slow is not None and _all_stopped(self.slow.backend_threads)

    @property
    def may_yet_look(self) -> bool:
        """A thread that may serve the queue is busy, and has not been for too long."""
        return self.backend_busy and not self.device_should_have_finished

    @property
    def may_be_at_work(self) -> bool:
        """The device may be in the middle of the work, and slow, for all that can be seen."""
        return (
            self.work_may_be_in_hand
            and not self.backend_at_rest
            and not self.backend_stopped
            and not self.device_should_have_finished
        )

    @property
    def work_may_be_in_hand(self) -> bool:
        """The device fetched something that it has not completed, or keeps to itself whether.

        A vhost worker in the kernel does not sleep at its work (drivers/vhost/vhost.c,
        vhost_worker): if it sleeps, it has nothing to do.
        """
        if self.track.now.last_avail_idx is not None:
            return not self.nothing_in_flight
        return self.fixed.backend is not BackendKind.VHOST_KERNEL

    @property
    def backend_at_rest(self) -> bool:
        """All threads that may serve the queue sleep where they wait for events or orders."""
        threads = self.slow.backend_threads if self.slow is not None else ()
        waits = {thread.waits_in for thread in threads}
        return bool(waits & _EVENT_WAITS) and waits <= _IDLE_WAITS

    @property
    def backend_elsewhere(self) -> bool:
        """A thread that may serve the queue sleeps in something that is no wait for events."""
        threads = self.slow.backend_threads if self.slow is not None else ()
        return any(
            thread.state is ThreadState.DISK
            or (thread.state is ThreadState.SLEEPING and thread.waits_in not in _IDLE_WAITS | {""})
            for thread in threads
        )

    @property
    def stuck_at_work(self) -> bool:
        """The back-end is found at work, and no kick that it missed explains what waits."""
        if self.backend_elsewhere and self.work_may_be_in_hand:
            return True
        return self.backend_busy and not self.kick_was_owed

    # --- calls ---

    @property
    def reaping_visible(self) -> bool:
        """The driver's progress can be seen: it says at which index it wants its next call."""
        now = self.track.now
        if self.fixed.layout is Layout.PACKED:
            return now.avail_flags == PACKED_DESC
        return self.fixed.event_idx and now.used_event is not None

    @property
    def calls_off(self) -> bool:
        """The driver asked for no calls at all (2.7.7; packed: 2.8.10).

        With event indices Linux writes 0 to `used_event` for that (drivers/virtio/virtio_ring.c,
        virtqueue_disable_cb_split), which a driver that has reaped nothing yet has there, too.
        """
        now = self.track.now
        if self.fixed.layout is Layout.PACKED:
            return now.avail_flags == PACKED_DISABLE
        if self.fixed.event_idx:
            return now.used_event == 0 and not self._call_expected_at_zero
        return bool((now.avail_flags or 0) & 1)

    @property
    def _call_expected_at_zero(self) -> bool:
        """`used_event` 0 is where the driver waits for its first completion, not silence."""
        used = self.track.now.used_idx or 0
        return self.fixed.calls_when_idle and self.has_vector and used <= self.fixed.size

    @cached_property
    def unreaped(self) -> int:
        """How far `used` is past the index at which the driver wanted its call, or 0."""
        now = self.track.now
        if not self.reaping_visible or self.calls_off:
            return 0
        if now.used_event is None or now.used_idx is None:
            return 0
        passed = span(self.fixed, now.used_event, now.used_idx)
        return passed if passed <= self.fixed.size else 0

    @property
    def call_was_owed(self) -> bool:
        """The device had to call for what it completed (virtio 1.4, 2.7.7.2 and 2.8.10), and the
        driver is one that reaps when it is called."""
        return self.fixed.calls_when_idle and self.unreaped > 0

    @property
    def much_unreaped(self) -> bool:
        """A driver that reaps when it gets around to it has left much behind.

        Its `used_event` says little: Linux leaves it where it was once it has been called
        (drivers/virtio/virtio_ring.c, virtqueue_disable_cb_split, `event_triggered`). A driver that
        waits for room in a full ring asks for its call after 3/4 of what is outstanding
        (virtqueue_enable_cb_delayed), and so leaves an eighth or more.
        """
        lazy = self.fixed.role is QueueRole.REQUEST and not self.fixed.calls_when_idle
        return lazy and self.unreaped >= max(1, self.fixed.size // 8)

    @property
    def call_asked_too_late(self) -> bool:
        """The driver wants its call at an index that nothing published can reach.

        Only one that lies ahead: Linux leaves `used_event` behind, as far as it pleases, while it
        polls (drivers/virtio/virtio_ring.c, virtqueue_disable_cb_split, `event_triggered`).
        """
        now = self.track.now
        if not self.fixed.calls_when_idle or not self.reaping_visible or self.calls_off:
            return False
        if now.used_event is None or now.used_idx is None or not self.positions_known:
            return False
        ahead = span(self.fixed, now.used_idx, now.used_event)
        return self.waiting < ahead <= self._half_a_lap and not self.unreaped

    @property
    def _half_a_lap(self) -> int:
        """Indices that are further ahead than this are rather behind."""
        return 1 << 15 if self.fixed.layout is Layout.SPLIT else self.fixed.size

    @property
    def calls_off_at_rest(self) -> bool:
        """A driver that reaps when it is called, and asks for work, has its calls off.

        An inbox may be polled for as long as somebody listens (net RX: NAPI, SO_PREFER_BUSY_POLL).
        Where nothing was completed yet there is nothing that a call could have told.
        """
        request = self.fixed.role is QueueRole.REQUEST
        used = bool(self.track.now.used_idx)
        return used and self.calls_off and self.fixed.calls_when_idle and request

    @property
    def has_vector(self) -> bool:
        """The driver gave the queue an interrupt of its own.

        Without one it may poll: firmware, blk poll queues, DPDK.
        """
        return self.slow is not None and self.slow.interrupts.vector is not None

    @property
    def may_use_intx(self) -> bool:
        """The device can raise INTx, and no vector tells whether the driver wants interrupts."""
        slow = self.slow
        return (
            slow is not None
            and slow.interrupts.msix_enabled is False
            and slow.interrupts.intx_disabled is False
        )

    @property
    def calls_left_off(self) -> bool:
        """A driver that has an interrupt sleeps with its calls off."""
        return self.calls_off_at_rest and self.has_vector

    @property
    def drivers_turn(self) -> bool:
        """The driver is to move: a call was owed to it, or it does not listen where it should."""
        return self.call_was_owed or self.calls_left_off or self.call_asked_too_late

    @property
    def call_expected(self) -> bool:
        """Every call is somebody's business: the driver reaps when it is called, its progress is
        invisible, and it has an interrupt."""
        return self.fixed.calls_when_idle and not self.reaping_visible and self.has_vector

    @property
    def call_recorded(self) -> bool:
        """The kernel saw the call that was owed, on its notifier."""
        return self.slow is not None and _came_after(
            self.slow.called_at, self.track.call_owed.since
        )

    @property
    def call_untaken(self) -> bool:
        """A call has been waiting in the notifier: irqfd and QEMU take it at once."""
        since = self.track.untaken_since
        return since is not None and self.track.now.at - since >= self.limits.notification_s

    @property
    def interrupt_barrier(self) -> str:
        """What keeps the queue's interrupt from the driver, in words; empty if nothing seen."""
        if self.slow is None:
            return ""
        path = self.slow.interrupts
        if path.bus_master is False:
            return "bus master enable is off"
        if path.msix_enabled:
            if path.function_masked:
                return "the MSI-X function mask is set"
            if path.vector_masked:
                return "the queue's MSI-X vector is masked"
        if path.msix_enabled is False and path.intx_disabled:
            return "INTx is disabled and MSI-X is off"
        return ""

    @property
    def cpus_stopped(self) -> bool:
        """A virtual CPU's thread is stopped: the driver may be on it."""
        return self.slow is not None and any(
            thread.state is ThreadState.STOPPED for thread in self.slow.vcpu_threads
        )


def _came_after(at: float | None, since: float | None) -> bool:
    return at is not None and since is not None and at > since


def _all_stopped(threads: Iterable[BackendThread]) -> bool:
    states = [thread.state for thread in threads]
    return bool(states) and all(
        state in (ThreadState.STOPPED, ThreadState.GONE) for state in states
    )
