"""The questions that the rules ask of a queue, answered from its history and the slow facts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from kickcall.diagnose.states import BackendThread, QueueRole, SlowFacts, ThreadState
from kickcall.diagnose.track import Track, outstanding, span, unfetched
from kickcall.model import BackendKind, Layout

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kickcall.diagnose.states import QueueFixed, Thresholds

_SPLIT_HALF = 1 << 15

PACKED_ENABLE, PACKED_DISABLE, PACKED_DESC = 0, 1, 2
"""Modes of an event suppression area (virtio 1.4, 2.8.10)."""


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
        return self.device_still_s >= self.limits.notification_s

    @property
    def device_should_have_finished(self) -> bool:
        """Even a slow device had time enough."""
        return self.device_still_s >= self.limits.device_s

    @property
    def driver_should_have_looked(self) -> bool:
        """A notification had time enough to be noticed by the driver."""
        return self.driver_still_s >= self.limits.notification_s

    @property
    def moved_lately(self) -> bool:
        """Some index moved while the queue was watched, less than a notification's time ago."""
        track = self.track
        moved = track.moved_at > track.first.at
        return moved and track.now.at - track.moved_at < self.limits.notification_s

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

    @cached_property
    def indices_impossible(self) -> bool:
        """More is outstanding than the queue can hold, or an event area has a reserved mode."""
        now = self.track.now
        count = outstanding(self.fixed, now)
        if count is not None and count > self.fixed.size:
            return True
        return self.fixed.layout is Layout.PACKED and 3 in (now.avail_flags, now.used_flags)

    @property
    def avail_ran_away(self) -> bool:
        """The driver's index is further ahead of the device's position than the queue is long."""
        count = unfetched(self.fixed, self.track.now)
        return count is None or count > self.fixed.size

    # --- kicks ---

    @cached_property
    def fetched(self) -> bool:
        """The device has seen all that was published.

        Its own position says so; where that is not known, a device that re-armed its kick at the
        driver's index has looked that far (virtio 1.4, 2.7.10 and 2.8.10).
        """
        left = unfetched(self.fixed, self.track.now)
        if left is not None:
            return left == 0
        now = self.track.now
        return self.fixed.event_idx and now.avail_event == now.avail_idx

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
        """The driver had to kick for what the device has not fetched.

        With event indices: the index that the device asked for lies in the part that is not
        fetched (virtio 1.4, 2.7.10.2 and 2.8.10). Without: the device did not ask for silence.
        """
        now = self.track.now
        if now.avail_idx is None or now.used_idx is None:
            return False
        if self.fixed.layout is Layout.PACKED and now.used_flags != PACKED_DESC:
            return now.used_flags == PACKED_ENABLE
        if not self.fixed.event_idx or now.avail_event is None:
            return not (now.used_flags or 0) & 1
        start = now.used_idx if now.last_avail_idx is None else now.last_avail_idx
        behind = span(self.fixed, now.avail_event, now.avail_idx)
        return 0 < behind <= span(self.fixed, start, now.avail_idx)

    @property
    def drained_by_reading(self) -> bool:
        """Who serves the queue reads the kick's count back to 0; vhost in the kernel never does."""
        return self.fixed.backend is not BackendKind.VHOST_KERNEL

    @property
    def kick_unread(self) -> bool:
        """A kick has been waiting in the notifier for longer than anybody healthy needs."""
        since = self.track.unread_since
        return (
            self.drained_by_reading
            and since is not None
            and self.track.now.at - since >= self.limits.notification_s
            and self._device_did_nothing
        )

    @property
    def _device_did_nothing(self) -> bool:
        track = self.track
        return track.now.used_idx == track.first.used_idx or self.device_should_have_looked

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
        has_vector = self.slow is not None and self.slow.vector is not None
        return self.fixed.calls_when_idle and has_vector and used <= self.fixed.size

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
        """The device had to call for what it completed (virtio 1.4, 2.7.7.2 and 2.8.10).

        A driver that reaps lazily (net TX) leaves a few completions for later; a full ring it
        cannot leave.
        """
        least = 1
        if not self.fixed.calls_when_idle and self.fixed.role is QueueRole.REQUEST:
            least = max(1, self.fixed.size // 8)
        return self.unreaped >= least

    @property
    def call_asked_too_late(self) -> bool:
        """The driver wants its call at an index that nothing published can reach."""
        now = self.track.now
        if not self.reaping_visible or self.calls_off or not self.positions_known:
            return False
        if now.used_event is None or now.used_idx is None or now.avail_idx is None:
            return False
        ahead = span(self.fixed, now.used_idx, now.used_event)
        if self.fixed.layout is Layout.SPLIT:
            far_behind = self.fixed.calls_when_idle and ahead >= _SPLIT_HALF
            return (self.waiting < ahead < _SPLIT_HALF or far_behind) and not self.unreaped
        return ahead > self.waiting and not self.unreaped

    @property
    def call_untaken(self) -> bool:
        """A call has been waiting in the notifier: irqfd and QEMU take it at once."""
        since = self.track.untaken_since
        return since is not None and self.track.now.at - since >= self.limits.notification_s

    @property
    def interrupt_barrier(self) -> str:
        """What keeps the queue's interrupt from the driver, in words; empty if nothing seen."""
        slow = self.slow
        if slow is None:
            return ""
        if slow.bus_master is False:
            return "bus master enable is off"
        if slow.msix_enabled:
            if slow.function_masked:
                return "the MSI-X function mask is set"
            if slow.vector_masked:
                return "the queue's MSI-X vector is masked"
        if slow.msix_enabled is False and slow.intx_disabled:
            return "INTx is disabled and MSI-X is off"
        return ""

    @property
    def cpus_stopped(self) -> bool:
        """A virtual CPU's thread is stopped: the driver may be on it."""
        return self.slow is not None and any(
            thread.state is ThreadState.STOPPED for thread in self.slow.vcpu_threads
        )


def _all_stopped(threads: Iterable[BackendThread]) -> bool:
    states = [thread.state for thread in threads]
    return bool(states) and all(
        state in (ThreadState.STOPPED, ThreadState.GONE) for state in states
    )
