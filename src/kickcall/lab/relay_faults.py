"""What happens to the next notification that passes the relay?

Pure: no clock, no fds. Faults are asked for, notifications arrive, and each gets its fate.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kickcall.lab.vhost_user import Notification


class Action(enum.StrEnum):
    PASS = "pass"
    DROP = "drop"
    DELAY = "delay"
    DOUBLE = "double"


@dataclass(frozen=True, slots=True)
class Fate:
    """What to do with one notification. `seconds` is how late a delayed one comes."""

    action: Action
    seconds: float = 0.0


@dataclass(slots=True)
class Counters:
    """What became of one queue's kicks or calls.

    Eventfds add up: two writes between two reads of the relay are one notification here, as
    they are for the back-end.
    """

    passed: int = 0
    """Forwarded, delayed and doubled ones included (a doubled one counts once)."""
    dropped: int = 0
    delayed: int = 0
    doubled: int = 0


@dataclass(slots=True)
class _Fault:
    fate: Fate
    left: int


def _by_queue(key: tuple[Notification, int | None]) -> tuple[int, str]:
    notification, queue = key
    return (-1 if queue is None else queue, notification)


@dataclass(slots=True)
class FaultPlan:
    """The faults still to come and the counters, for one relay."""

    counters: dict[tuple[Notification, int], Counters] = field(default_factory=dict)
    _faults: dict[tuple[Notification, int | None], deque[_Fault]] = field(default_factory=dict)

    def add(self, notification: Notification, queue: int | None, fate: Fate, count: int) -> None:
        """Plan a fate for the next `count` notifications of a queue (None: of any queue)."""
        if count > 0:
            self._faults.setdefault((notification, queue), deque()).append(_Fault(fate, count))

    def clear(self) -> None:
        """Forget all faults that have not happened yet."""
        self._faults.clear()

    def arrived(self, notification: Notification, queue: int) -> Fate:
        """Return the fate of a notification that just arrived, and count it."""
        fate = self._next(notification, queue)
        counters = self.counters.setdefault((notification, queue), Counters())
        match fate.action:
            case Action.DROP:
                counters.dropped += 1
                return fate
            case Action.DELAY:
                counters.delayed += 1
            case Action.DOUBLE:
                counters.doubled += 1
        counters.passed += 1
        return fate

    def pending(self, notification: Notification, queue: int | None) -> int:
        """Return how many faults of exactly this queue are still to come."""
        return sum(fault.left for fault in self._faults.get((notification, queue), ()))

    def report(self) -> list[dict[str, object]]:
        """Return one row for each queue and direction that ever carried or awaits something."""
        keys = {*self.counters, *(key for key, faults in self._faults.items() if faults)}
        rows: list[dict[str, object]] = []
        for notification, queue in sorted(keys, key=_by_queue):
            counters = (
                self.counters.get((notification, queue), Counters())
                if queue is not None
                else Counters()
            )
            rows.append(
                {
                    "queue": queue,
                    "event": notification,
                    **asdict(counters),
                    "pending": self.pending(notification, queue),
                }
            )
        return rows

    def _next(self, notification: Notification, queue: int) -> Fate:
        # A fault of this very queue goes before one of any queue.
        for key in ((notification, queue), (notification, None)):
            waiting = self._faults.get(key)
            if waiting:
                fault = waiting[0]
                fault.left -= 1
                if not fault.left:
                    waiting.popleft()
                return fault.fate
        return Fate(Action.PASS)
