"""The stalls of one machine: each told once, put down once, and ended once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.diagnosis import on_the_wall
from kickcall.watch.happenings import What, of_queue

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from kickcall.model import Machine, Verdict, VerdictKind
    from kickcall.watch.happenings import Happening
    from kickcall.watch.healer import Healer

Key = tuple[str, int]
"""A queue of the machine: device and number."""


@dataclass(slots=True)
class Stall:
    """A stall that was told."""

    verdict: Verdict
    number: Future[int]
    """In the journal."""
    began: float
    """Monotonic."""
    said: str = ""
    """What was told last of why it is not healed."""


class Stalls:
    """The stalls of `machine` that last. One that is not healed is told after `report_s`."""

    def __init__(
        self,
        machine: Machine,
        healer: Healer,
        tell: Callable[[Happening], None],
        report_s: float,
    ) -> None:
        self._machine = machine
        self._healer = healer
        self._tell = tell
        self.report_s = report_s
        self._lasting: dict[Key, Stall] = {}

    @property
    def lasting(self) -> list[VerdictKind]:
        """What is wrong with the queues that are stalled; may be asked for in any thread."""
        return [stall.verdict.verdict for stall in list(self._lasting.values())]

    def report(self, verdict: Verdict) -> Stall:
        """Tell a stall and put it down, unless that was done already; return it."""
        key = (verdict.device, verdict.queue)
        stall = self._lasting.get(key)
        if stall is None or (stall.number.done() and stall.number.exception() is not None):
            number = self._healer.stalled(
                self._machine, _walled(verdict), time.time() - verdict.since_s
            )
            if stall is None:
                where = f" on hop {verdict.hop}" if verdict.hop else ""
                why = verdict.evidence[0].value
                text = f"{verdict.verdict}{where} for {verdict.since_s:.2f} s: {why}"
                self.say(What.STALL, verdict, text, since_s=round(verdict.since_s, 4))
            stall = Stall(verdict, number, time.monotonic() - verdict.since_s)
            self._lasting[key] = stall
        return stall

    def persists(self, verdict: Verdict) -> None:
        """Take note that a queue is stalled, and of what is wrong with it by now."""
        stall = self._lasting.get((verdict.device, verdict.queue))
        if stall is None:
            if verdict.since_s >= self.report_s:
                self.report(verdict)
        elif stall.verdict.verdict is not verdict.verdict:
            stall.verdict = verdict
            self._healer.book.became(stall.number, _walled(verdict))

    def not_healed(self, verdict: Verdict, because: str, *, alert: bool = False) -> None:
        """Tell why a stall that has lasted is not healed."""
        if verdict.since_s >= self.report_s:
            self._say_once(What.ALERT if alert else What.NOT_HEALED, verdict, because)

    def would_inject(self, verdict: Verdict) -> None:
        """Tell what would be injected if this were no dry run."""
        self._say_once(What.WOULD_INJECT, verdict, f"would {verdict.event} it (dry run)")

    def _say_once(self, what: What, verdict: Verdict, text: str) -> None:
        stall = self.report(verdict)
        if stall.said != text:
            stall.said = text
            self.say(what, verdict, text)

    def end(self, key: Key, how: str) -> None:
        """Tell that a stall is over, if there was one, and put that down."""
        stall = self._lasting.pop(key, None)
        if stall is None:
            return
        lasted = time.monotonic() - stall.began
        self._healer.book.ended(stall.number, how, time.time())
        text = f"{how} after {lasted:.2f} s"
        self.say(What.CLEARED, stall.verdict, text, lasted_s=round(lasted, 4))

    def end_all(self, how: str, *, but: set[Key] | frozenset[Key] = frozenset()) -> None:
        """The same for all, or for all but some."""
        for key in [key for key in self._lasting if key not in but]:
            self.end(key, how)

    def say(self, what: What, verdict: Verdict, text: str, **more: object) -> None:
        """Tell what happened to a queue."""
        more = {"verdict": str(verdict.verdict), "hop": verdict.hop, **more}
        if verdict.event is not None:
            more["event"] = str(verdict.event)
        self._tell(of_queue(self._machine, what, verdict.device, verdict.queue, text, **more))


def _walled(verdict: Verdict) -> Verdict:
    """Return the verdict with the time of day in its evidence."""
    return on_the_wall(verdict, time.time() - time.monotonic())
