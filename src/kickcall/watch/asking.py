"""Which queues of a machine is its monitor asked about, and when?

Only those that stand still for as long as makes a stall, and ever more rarely. What hesitates is
looked at some times before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kickcall.diagnose.judge import decide, wants_slow_facts
from kickcall.diagnose.view import View
from kickcall.model import VerdictKind

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from kickcall.diagnosis import Watch
    from kickcall.watch.settings import Settings

HELP_LOOK_S = 0.01
"""Between two looks while it is watched whether an injection helps; no two come faster."""
FIRST_AGAIN_S = 0.03
_AGAIN_MOST_S = 5.0
_AGAIN_SOON_S = 0.1
_PATIENCE_S = 2.0
"""For so long a queue that stands still is asked about so often."""
_LATE_S = 0.001
"""A look at a threshold comes so much later, for the clocks of two looks to differ enough."""

Key = tuple[str, int]
"""A queue of the machine: device and number."""


@dataclass(slots=True)
class Considered:
    """What follows from a look."""

    look_at: float
    """When to look again at the latest."""
    suspects: list[int] = field(default_factory=list)
    """The monitor is to be asked about these now."""
    going: list[int] = field(default_factory=list)
    """These do not stand still, or not for long enough to count."""


class Asking:
    """The queues that stand still, by their numbers in the sampler."""

    def __init__(self) -> None:
        self._at: dict[int, tuple[float, float]] = {}
        """When the monitor is asked about a queue next, and how long that was put off."""
        self._waiting_since: dict[Key, float] = {}
        """Since when whose turn it is at a queue has not moved; without those where nobody's is."""

    def __contains__(self, number: object) -> bool:
        """Tell whether a queue stands still."""
        return number in self._at

    @property
    def waiting_since(self) -> dict[Key, float]:
        """Since when queues have waited; may be asked for in any thread."""
        return dict(self._waiting_since)

    def consider(
        self,
        watch: Watch,
        active: Iterable[int],
        now: float,
        settings: Settings,
        followed: Container[int],
    ) -> Considered:
        """Sort out the queues that a look found `active`. Those `followed` were injected into."""
        limits = settings.limits
        considered = Considered(now + settings.interval_s * 1000)

        def look_by(at: float) -> None:
            considered.look_at = min(considered.look_at, at)

        for number in sorted(active):
            fixed, track = watch.sampler.queues[number], watch.track(number)
            key = (fixed.device, fixed.queue)
            if track.now.unreadable:
                self._waiting_since.pop(key, None)
                continue
            view = View(fixed, track, None, limits)
            still = view.hesitates_s
            if still:
                self._waiting_since[key] = track.now.at - still
            else:
                self._waiting_since.pop(key, None)
            rule = decide(view)
            if wants_slow_facts(rule):
                at, _ = self._at.setdefault(number, (now, 0.0))
                if number in followed:
                    continue
                if now >= at:
                    considered.suspects.append(number)
                else:
                    look_by(at)
                continue
            self._at.pop(number, None)
            considered.going.append(number)
            if limits.notification_s / 2 <= still < limits.notification_s:
                ready_at = now + limits.notification_s - still + _LATE_S
                look_by(max(ready_at, now + HELP_LOOK_S))
            elif limits.notification_s <= still < 2 * limits.notification_s:
                look_by(now + limits.notification_s / 6)
            elif rule.verdict is VerdictKind.IDLE and not (
                track.now.kick_count or track.now.call_count
            ):
                watch.settle(number)
        return considered

    def in_order(self, numbers: Iterable[int]) -> list[int]:
        """Return queues in the order in which they are to be asked about."""
        return sorted(numbers, key=lambda number: self._at.get(number, (0.0, 0.0))[0])

    def put_off(self, number: int) -> float:
        """Return how long asking about a queue was put off the last time."""
        return self._at.get(number, (0.0, 0.0))[1]

    def next_put_off(self, number: int, view: View) -> float:
        """Return how long to put it off now."""
        put_off = min(max(self.put_off(number) * 2, FIRST_AGAIN_S), _AGAIN_MOST_S)
        if max(view.device_still_s, view.driver_still_s) < _PATIENCE_S and view.hesitates:
            # A thread that runs now may sleep in a moment, and then it is clear.
            put_off = min(put_off, _AGAIN_SOON_S)
        return put_off

    def again(self, number: int, now: float, put_off: float) -> None:
        """Ask about a queue again after `put_off` seconds."""
        self._at[number] = (now + put_off, put_off)

    def drop(self, number: int) -> None:
        """Ask no more about a queue until it stands still anew."""
        self._at.pop(number, None)

    def renumber(self, there: Container[Key]) -> None:
        """Forget numbers, which mean others now, and all queues but those that are `there`."""
        self._at.clear()
        self._waiting_since = {
            key: since for key, since in self._waiting_since.items() if key in there
        }
