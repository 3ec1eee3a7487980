"""What is known of every queue right now: who reads it may draw at any time and waits for nobody.

Written by the watcher's threads, one machine by one of them at a time; read by whoever draws. Each
value is replaced as a whole: a reader may see one that is a look old, and never half of one.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kickcall.diagnose.judge import judge
from kickcall.diagnose.states import QueueRole, Thresholds
from kickcall.diagnose.track import advance, outstanding, span
from kickcall.diagnosis import not_watched, on_the_wall
from kickcall.draw.ring import ring_picture
from kickcall.draw.text import duration
from kickcall.model import Evidence, Layout, VerdictKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kickcall.diagnose.states import QueueFixed, SlowFacts
    from kickcall.diagnose.track import Track
    from kickcall.diagnosis import Watch
    from kickcall.draw.ring import RingPicture
    from kickcall.model import BackendKind, Machine, Verdict
    from kickcall.vmm.session import VmmSession
    from kickcall.watch.machine import WatchedMachine

TICK_S = 0.5
"""Rates and histories have a value for so many seconds."""
HISTORY = 60
"""Values of a history."""
_MOVED_S = 1.5
"""A queue that moved no longer ago is moving."""
_STALL_S = 0.5
"""What stands still for less is no stall yet: `kickcall diagnose` waits as long."""
_LATE_S = 5.0
"""A machine that was not looked at for so long is not known any more."""
_MARKS = 64
"""Moments of publishing that are remembered, to tell how long the oldest request has waited."""

_BECAUSE = {
    VerdictKind.IDLE: "Nothing is outstanding.",
    VerdictKind.PROGRESSING: "The queue moves.",
    VerdictKind.VM_NOT_RUNNING: "The machine does not run: no queue can move.",
    VerdictKind.UNKNOWN: "What is wrong cannot be told.",
}


class LiveQueue:
    """One queue. Totals count since it was first seen."""

    __slots__ = (
        "_before",
        "_marks",
        "ages",
        "at_least",
        "calls_s",
        "completed",
        "completions_s",
        "fixed",
        "kicks_s",
        "known_as",
        "moved_at",
        "number",
        "published",
        "requests_s",
        "slow",
        "track",
        "verdict",
        "works",
    )

    def __init__(self, number: int, fixed: QueueFixed, track: Track) -> None:
        self.number = number
        """Its number in the sampler."""
        self.fixed = fixed
        self.track = track
        self.published = self.completed = 0
        self.at_least = fixed.layout is Layout.PACKED
        """Rates may be larger: a packed ring's positions repeat, and count descriptors."""
        self.requests_s = self.completions_s = 0.0
        self.kicks_s: float | None = None
        self.calls_s: float | None = None
        """None: not counted."""
        self.works: deque[int] = deque(maxlen=HISTORY)
        """Outstanding entries, every TICK_S."""
        self.ages: deque[float] = deque(maxlen=HISTORY)
        self.moved_at = float("-inf")
        self.verdict: Verdict | None = None
        """As it was judged with slow facts; None while the queue moves, or rests."""
        self.slow: SlowFacts | None = None
        self.known_as = VerdictKind.IDLE
        self._marks: deque[tuple[int, float]] = deque()
        self._before = (0, 0)
        if work := outstanding(fixed, track.now):
            self.published = work
            self._before = (work, 0)
            self._marks.append((work, track.now.at))

    def take(self, track: Track, at: float) -> None:
        """Take over what a look found."""
        was, now = self.track.now, track.now
        self.track = track
        fixed = self.fixed
        if (now.avail_idx, now.used_idx) == (was.avail_idx, was.used_idx):
            return
        if was.avail_idx is not None and now.avail_idx is not None:
            if step := span(fixed, was.avail_idx, now.avail_idx):
                self.published += step
                if len(self._marks) < _MARKS:
                    self._marks.append((self.published, at))
            self.moved_at = at
        if was.used_idx is not None and now.used_idx is not None:
            self.completed += span(fixed, was.used_idx, now.used_idx)
        work = self.outstanding
        while self._marks and self._marks[0][0] <= self.published - work:
            self._marks.popleft()

    def tick(self, at: float, seconds: float) -> bool:
        """Work out rates and add to the histories; tell whether anything but nothing was added."""
        published, completed = self._before
        self._before = (self.published, self.completed)
        self.requests_s = (self.published - published) / seconds
        self.completions_s = (self.completed - completed) / seconds
        work, age = self.outstanding, self.age(at)
        self.works.append(work)
        self.ages.append(age or 0.0)
        return bool(work or self.requests_s or self.completions_s)

    @property
    def inbox(self) -> bool:
        """Outstanding work is normal here."""
        return self.fixed.role is QueueRole.INBOX

    @property
    def outstanding(self) -> int:
        """Entries that are published and not completed; 0 where that is not known."""
        work = outstanding(self.fixed, self.track.now) or 0
        return work if work <= self.fixed.size else 0

    def age(self, at: float) -> float | None:
        """Return how long the oldest request has waited, at the least; None where none waits."""
        if self.inbox or not self._marks or not self.outstanding:
            return None
        return max(0.0, at - self._marks[0][1])

    def stalled_for(self, at: float) -> float:
        """Return for how long the queue has been stalled; 0 where it is not."""
        verdict = self.verdict
        if verdict is None or not verdict.verdict.stalled:
            return 0.0
        lasted = verdict.since_s + max(0.0, at - verdict.evidence[0].at)
        return lasted if lasted >= _STALL_S else 0.0

    def kind(self, at: float) -> VerdictKind:
        """Return the verdict on the queue at that moment."""
        verdict = self.verdict
        if verdict is not None and self.stalled_for(at):
            return verdict.verdict
        if self.track.now.unreadable:
            return VerdictKind.UNKNOWN
        if verdict is not None and verdict.verdict is VerdictKind.UNKNOWN:
            return VerdictKind.UNKNOWN
        if at - self.moved_at < _MOVED_S or (not self.inbox and self.outstanding):
            return VerdictKind.PROGRESSING
        return VerdictKind.IDLE

    def ring(self) -> RingPicture:
        """Return the picture of the ring."""
        return ring_picture(self.fixed, self.track.now)


@dataclass(frozen=True, slots=True)
class LiveDevice:
    """One device of a machine."""

    path: str
    id: str
    kind: str
    backend: BackendKind
    num_queues: int
    without_queues: Verdict | None
    """Why none of its queues is watched."""


class LiveMachine:
    """One machine with its queues. `key` names it in addresses: a pid is used again."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.key = f"{machine.pid}-{machine.start_time}"
        self.devices: tuple[LiveDevice, ...] = ()
        self.queues: tuple[LiveQueue, ...] = ()
        self.why_not = "it is being mapped"
        """Why it is not watched; empty where it is."""
        self.paused = False
        self.looked_at = time.monotonic()
        self._lively: set[LiveQueue] = set()
        self._quiet: dict[LiveQueue, int] = {}
        self._ticked_at = self.looked_at

    # --- written by the watcher's threads ---

    def map(self, session: VmmSession, watch: Watch, *, paused: bool) -> None:
        """Take over a map; queues that stayed keep what was counted."""
        before = {(one.fixed.device, one.fixed.queue): one for one in self.queues}
        queues = []
        for number, fixed in enumerate(watch.sampler.queues):
            queue = before.get((fixed.device, fixed.queue))
            if queue is None or queue.fixed != fixed:
                queue = LiveQueue(number, fixed, watch.track(number))
            queue.number = number
            queue.verdict = None
            queues.append(queue)
        there = {fixed.device for fixed in watch.sampler.queues}
        offset = time.time() - time.monotonic()
        devices = []
        for mapped in session.devices:
            info = mapped.device
            unseen = None
            if info.path not in there:
                unseen = on_the_wall(not_watched(session, mapped), offset)
            devices.append(
                LiveDevice(info.path, info.id, info.kind, info.backend, info.num_queues, unseen)
            )
        self._lively = set(queues)
        self._quiet = {}
        self.queues, self.devices = tuple(queues), tuple(devices)
        self.why_not, self.paused = "", paused

    def look(self, watched: WatchedMachine, watch: Watch, active: Iterable[int], at: float) -> None:
        """Take over a look."""
        queues = self.queues
        for number in active:
            queue = queues[number]
            queue.take(watch.track(number), at)
            self._lively.add(queue)
            if queue.verdict is not None and number not in watched.doubtful:
                queue.verdict = None
        self.looked_at = at
        if (passed := at - self._ticked_at) >= TICK_S:
            self._ticked_at = at
            for queue in list(self._lively):
                if queue.tick(at, passed):
                    self._quiet.pop(queue, None)
                elif self._quiet.setdefault(queue, 0) < HISTORY:
                    self._quiet[queue] += 1
                else:
                    # Nothing but nothing in its histories: it need not be added to.
                    self._lively.discard(queue)
                    del self._quiet[queue]
                if queue.verdict is not None and queue.number not in watched.doubtful:
                    queue.verdict = None

    def judge(self, number: int, verdict: Verdict, slow: SlowFacts) -> None:
        """Take over what was judged of a queue that stands still."""
        queue = self.queues[number]
        queue.slow = slow
        queue.verdict = verdict

    def lose(self, why: str) -> None:
        """Take note that it cannot be looked at."""
        self.queues, self.devices, self._lively = (), (), set()
        self.why_not = why

    # --- read by whoever draws ---

    @property
    def name(self) -> str:
        """Its name, as it says itself."""
        return self.machine.name

    def state(self, at: float) -> str:
        """Return how it is watched, in words."""
        if self.why_not:
            return "not watched"
        if self.paused:
            return "paused"
        if (late := at - self.looked_at) > _LATE_S:
            return f"not looked at for {duration(late)}"
        return "running"

    def of_all(self, at: float) -> VerdictKind | None:
        """Return the verdict on all of its queues, where there is one; else each has its own.

        What was seen last says nothing of a machine that is not looked at any more.
        """
        if self.paused:
            return VerdictKind.VM_NOT_RUNNING
        if self.why_not or at - self.looked_at > _LATE_S:
            return VerdictKind.UNKNOWN
        return None

    def kind(self, queue: LiveQueue, at: float) -> VerdictKind:
        """Return the verdict on a queue at that moment."""
        return self.of_all(at) or queue.kind(at)

    def verdict(self, queue: LiveQueue, at: float) -> Verdict:
        """Return the verdict on a queue at that moment, with its evidence."""
        kind, fixed, track, known = self.kind(queue, at), queue.fixed, queue.track, queue.verdict
        if track.now.at < self.looked_at:
            # It was at rest: every look since has found it as it is.
            track = advance(track, replace(track.now, at=self.looked_at), fixed)
        slow = queue.slow if known is not None else None
        fresh = judge(fixed, track, slow, Thresholds(_STALL_S / 2), machine=self.name)
        if fresh.verdict is not kind:
            if known is not None and known.verdict is kind:
                fresh = replace(known, since_s=queue.stalled_for(at) or known.since_s)
            else:
                late = self.of_all(at) is VerdictKind.UNKNOWN
                why = f"{self.state(at)}: nothing is known" if late else _BECAUSE.get(kind, "")
                because = Evidence("because", why, self.looked_at)
                evidence = (because, *fresh.evidence[1:])
                fresh = replace(
                    fresh, verdict=kind, hop=0, evidence=evidence, remedy="Nothing.", event=None
                )
        elif kind.stalled:
            fresh = replace(fresh, since_s=max(fresh.since_s, queue.stalled_for(at)))
        return on_the_wall(fresh, time.time() - time.monotonic())
