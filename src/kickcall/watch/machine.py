"""One machine under watch: look often and cheaply, ask the monitor only about what hesitates, heal.

`look` takes microseconds and is for the watcher's loop. `work` may take as long as a monitor does,
and is for a thread of the pool. They are never called at the same time.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kickcall.attached import attach
from kickcall.diagnose.judge import decide, judge
from kickcall.diagnose.view import View
from kickcall.diagnosis import Watch
from kickcall.errors import KickcallError, MachineGoneError, MonitorError
from kickcall.host import processes
from kickcall.model import VerdictKind
from kickcall.vmm.sampler import Sampler
from kickcall.vmm.slow_facts import facts_unasked
from kickcall.watch.asking import FIRST_AGAIN_S, HELP_LOOK_S, Asking
from kickcall.watch.happenings import What, of_machine
from kickcall.watch.stalls import Stalls
from kickcall.watch.survey import has_changed
from kickcall.watch.treatment import Treatment

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from kickcall.attached import AttachedMachine
    from kickcall.diagnose.states import SlowFacts
    from kickcall.diagnose.track import Track
    from kickcall.model import Machine, QueueMap, Verdict
    from kickcall.watch.happenings import Happening
    from kickcall.watch.healer import Healer
    from kickcall.watch.onlooker import Onlooker
    from kickcall.watch.settings import Settings

_MONITOR_S = 0.4
"""Waited for a monitor while something waits."""
_ATTACH_S = 1.8
_ASKED_AT_ONCE = 16
"""Queues that one visit to the monitor asks about: 10 ms each."""
_SURVEY_FIRST_S = 0.5
_SURVEY_MOST_S = 15.0
"""Between two questions to the monitor whether devices came or were set up."""
_REMAP_FIRST_S = 0.05
_REMAP_MOST_S = 5.0
_PAUSED_S = 0.5
"""Between two questions whether a machine that was paused runs again."""
_RETRY_MOST_S = 30.0
_SHARE = 25
"""A machine's looks take one part in so many of a processor at most, however many queues it has."""


class WatchedMachine:
    """One machine. `due` says when `look` wants to be called next, on time.monotonic()'s clock.

    Both raise MachineGoneError when it ended, and no other KickcallError.
    """

    def __init__(
        self,
        machine: Machine,
        settings: Settings,
        healer: Healer,
        tell: Callable[[Happening], None],
        onlooker: Onlooker | None = None,
    ) -> None:
        self.machine = machine
        self.due = 0.0
        self._released = False
        self.ending = "it ended"
        """Why it is not watched any more, once it is not."""
        self._onlooker = onlooker
        self._settings = settings
        self._healer = healer
        self._tell = tell
        self._attached: AttachedMachine | None = None
        self._sampler: Sampler | None = None
        self._watch: Watch | None = None
        self._came = False
        self._trouble = ""
        self._retry_s = 0.5
        self._paused = False
        self._stale = False
        self._remap_s = _REMAP_FIRST_S
        self._survey_s = _SURVEY_FIRST_S
        self._survey_at = 0.0
        self._orphans_at: float | None = None
        self._suspects: list[int] = []
        self._seen_at_work: set[int] = set()
        """Queues that a look in `work` found moved, or waiting: the next `look` considers them."""
        self._asking = Asking()
        self._stalls = Stalls(machine, healer, tell, settings.report_s)
        self._treatment = Treatment(machine, healer, self._stalls)

    @property
    def came(self) -> bool:
        """Whether it was told that the machine is watched."""
        return self._came

    @property
    def queues(self) -> int:
        """How many queues are watched."""
        return 0 if self._sampler is None else len(self._sampler.queues)

    # --- for whoever asks, in any thread ---

    @property
    def state(self) -> str:
        """How it is watched: `watched`, `paused` or `not-watched`."""
        if self._sampler is None:
            return "not-watched"
        return "paused" if self._paused else "watched"

    @property
    def stalls(self) -> list[VerdictKind]:
        """What is wrong with the queues that are stalled."""
        return self._stalls.lasting

    def waits(self, now: float) -> list[tuple[str, int, float]]:
        """Return each queue's device, number, and the seconds that its oldest request has waited.

        At least so long: who is to answer has not moved since. 0 where nothing waits.
        """
        sampler = self._sampler
        if sampler is None or self._paused:
            return []
        since = self._asking.waiting_since
        return [
            (fixed.device, fixed.queue, max(0.0, now - since.get((fixed.device, fixed.queue), now)))
            for fixed in sampler.queues
        ]

    @property
    def doubtful(self) -> Container[int]:
        """The queues that stand still, by their numbers: the monitor is asked about them."""
        return self._asking

    # --- in the loop ---

    def release(self, why: str) -> None:
        """Heal it no more: it runs on, and is let go of."""
        self._released, self.ending = True, why

    def obey(self, settings: Settings) -> None:
        """Be watched otherwise from now on."""
        self._settings = settings
        self._stalls.report_s = settings.report_s

    def look(self) -> bool:
        """Look at all queues and set `due`; tell whether `work` is wanted now."""
        watch, sampler = self._watch, self._sampler
        if watch is None or sampler is None or self._paused:
            return True
        started = time.thread_time()
        try:
            active = {*watch.look(self.due), *self._seen_at_work}
        except MachineGoneError:
            raise
        except KickcallError as exc:
            self._lost(exc)
            return True
        now = time.monotonic()
        self._seen_at_work.clear()
        considered = self._asking.consider(watch, active, now, self._settings, self._treatment)
        self._suspects = considered.suspects
        for number in considered.going:
            self._clear(number, "it moved")
        self._follow_injections(watch, now)
        if self._orphans_at is not None and now >= self._orphans_at:
            self._orphans_at = None
            self._healer.close_orphans(self.machine, time.time())
        cost = time.thread_time() - started
        interval = max(self._settings.interval_s, cost * _SHARE)
        if self._treatment:
            interval = HELP_LOOK_S
        if self._onlooker is not None:
            self._onlooker.looked(self, watch, active, now)
            interval = max(interval, self._onlooker.pace_s)
        self.due = min(now + interval, max(considered.look_at, now + cost * 4))
        if sampler.stale and not self._stale:
            self._stale = True
            self._survey_at, self._survey_s = now, _SURVEY_FIRST_S
        return bool(self._suspects) or now >= self._survey_at

    def _follow_injections(self, watch: Watch, now: float) -> None:
        for number, ending in self._treatment.follow(watch, now, self._asking).items():
            self._asking.drop(number)
            if ending:
                self._clear(number, ending)

    # --- in a thread of the pool ---

    def work(self) -> None:
        """Do what takes its time: attach, map anew, ask the monitor, heal."""
        try:
            if self._watch is None:
                self._attach()
            elif self._paused:
                self._poll_paused()
            else:
                self._visit()
        except MachineGoneError:
            raise
        except (KickcallError, OSError) as exc:
            self._lost(exc)

    def _attach(self) -> None:
        self._let_go()
        if processes.start_time(self.machine.pid) != self.machine.start_time:
            raise MachineGoneError(f"process {self.machine.pid} ended")
        self._attached = attach(self.machine.pid, timeout=_ATTACH_S)
        session = self._attached._session
        self._sampler = Sampler(session)
        self._watch = Watch(self._sampler)
        now = time.monotonic()
        self.due = now
        self._paused = not session.running
        self._survey_s, self._survey_at = _SURVEY_FIRST_S, now + _SURVEY_FIRST_S
        self._orphans_at = now + 2 * self._settings.report_s
        self._trouble, self._retry_s = "", 0.5
        self._show_map()
        if not self._came:
            self._came = True
            text = f"watching {self.queues} queues of {len(session.devices)} devices"
            self._tell(of_machine(self.machine, What.CAME, text, queues=self.queues))

    def _lost(self, exc: Exception) -> None:
        """Take note that the machine cannot be looked at, and when to try again."""
        if self._attached is not None:
            self._attached._session.process.check_alive()
        self._tell_trouble(exc)
        if not isinstance(exc, MonitorError) or self._attached is None:
            self._let_go()
            self._stalls.end_all("it was lost from sight")
            if self._onlooker is not None:
                self._onlooker.lost(self, str(exc))
        self.due = time.monotonic() + self._retry_s
        self._survey_at = self.due
        self._retry_s = min(self._retry_s * 2, _RETRY_MOST_S)

    def _tell_trouble(self, exc: Exception) -> None:
        if str(exc) != self._trouble:
            self._trouble = str(exc)
            self._tell(of_machine(self.machine, What.NOT_WATCHED, str(exc)))

    def _poll_paused(self) -> None:
        assert self._attached is not None
        session = self._attached._session
        with session.borrow(_MONITOR_S) as monitor:
            running = bool(monitor.execute("query-status")["running"])
        self.due = time.monotonic() + _PAUSED_S
        if running:
            # Its notifiers may be others, and time stood still for everybody.
            self._map_anew(keep=False)
            self._paused = not session.running
            self._show_map()

    def _visit(self) -> None:
        """Ask the monitor what is wanted, and act on it."""
        assert self._attached is not None and self._watch is not None
        session, watch = self._attached._session, self._watch
        now = time.monotonic()
        suspects = self._asking.in_order(self._suspects)[:_ASKED_AT_ONCE]
        survey = now >= self._survey_at
        slow: dict[int, SlowFacts] = {}
        changed = False
        try:
            with session.borrow(_MONITOR_S) as monitor:
                for number in suspects:
                    slow[number] = watch.slow_facts(session, number, monitor)
                if survey:
                    changed = has_changed(session, monitor)
        except MonitorError:
            for number in suspects:
                slow.setdefault(number, facts_unasked(session, watch.sampler.devices[number]))
        if any(facts.vm_running is False for facts in slow.values()):
            self._pause()
            return
        if slow:
            # What was read is newer than the last look.
            self._seen_at_work.update(watch.look())
            for number, facts in slow.items():
                self._judge(number, facts)
        self.due = time.monotonic()
        if survey:
            self._survey_s = min(self._survey_s * 2, _SURVEY_MOST_S)
            self._survey_at = time.monotonic() + self._survey_s
            if changed or self._stale:
                self._map_anew(keep=True)
                self.due = time.monotonic()

    def _pause(self) -> None:
        self._paused = True
        self.due = time.monotonic() + _PAUSED_S
        self._stalls.end_all("the machine was paused")
        self._treatment.forget()
        self._show_map()

    def _show_map(self) -> None:
        if self._onlooker is not None and self._attached is not None and self._watch is not None:
            self._onlooker.mapped(self, self._attached._session, self._watch, paused=self._paused)

    def _map_anew(self, *, keep: bool) -> None:
        """Map the machine anew, and go on with the histories of the queues that stayed."""
        assert self._sampler is not None and self._watch is not None
        sampler = self._sampler
        kept: dict[tuple[str, int], tuple[QueueMap, Track]] = {}
        if keep:
            kept = {
                (fixed.device, fixed.queue): (sampler.maps[n], self._watch.track(n))
                for n, fixed in enumerate(sampler.queues)
                if n not in sampler.stale
            }
        self._treatment.forget()
        self._asking.renumber(kept)
        self._suspects = []
        self._seen_at_work.clear()
        try:
            sampler.refresh()
        except MonitorError as exc:
            # The map is as it was, and its stale queues refuse every write by themselves.
            self._tell_trouble(exc)
            self._survey_at = time.monotonic() + self._remap_s
            self._remap_s = min(self._remap_s * 2, _REMAP_MOST_S)
            return
        self._trouble = ""
        self._watch = Watch(sampler)
        there = set()
        for number, fixed in enumerate(sampler.queues):
            key = (fixed.device, fixed.queue)
            before = kept.get(key)
            if before is not None and before[0] == sampler.maps[number]:
                self._watch.adopt(number, before[1])
                there.add(key)
        self._stalls.end_all("the queue was set up anew, or went", but=there)
        self._show_map()
        self._asking.renumber(there)
        self._stale = bool(sampler.stale)
        if self._stale:
            self._survey_at = time.monotonic() + self._remap_s
            self._remap_s = min(self._remap_s * 2, _REMAP_MOST_S)
        else:
            self._remap_s = _REMAP_FIRST_S
            self._survey_s = _SURVEY_FIRST_S
            self._survey_at = time.monotonic() + _SURVEY_FIRST_S

    # --- judging and healing, in a thread of the pool ---

    def _judge(self, number: int, slow: SlowFacts) -> None:
        assert self._watch is not None
        watch = self._watch
        fixed, track = watch.sampler.queues[number], watch.track(number)
        limits = self._settings.limits
        view = View(fixed, track, slow, limits)
        verdict = judge(fixed, track, slow, limits, machine=self.machine.name)
        if self._onlooker is not None:
            self._onlooker.judged(self, number, verdict, slow)
        now = time.monotonic()
        before, put_off = self._asking.put_off(number), self._asking.next_put_off(number, view)
        if not verdict.verdict.stalled:
            self._asking.again(number, now, put_off)
            settled = not decide(view).time_will_tell and verdict.verdict in (
                VerdictKind.UNKNOWN,
                VerdictKind.IDLE,
            )
            if settled and (not view.work_waits or before >= 1.0):
                watch.settle(number)
                self._asking.drop(number)
                self._clear(number, "it is no stall, on a closer look")
            return
        self._stalls.persists(verdict)
        self._treat(number, verdict, slow, put_off)

    def _treat(self, number: int, verdict: Verdict, slow: SlowFacts, put_off: float) -> None:
        """Have a stall healed if that may be; `put_off` is when to ask about it again if not."""
        assert self._attached is not None and self._watch is not None
        if self._released:
            return
        treated = self._treatment.treat(number, verdict, slow, self._watch, self._attached._session)
        self._seen_at_work.update(treated.seen)
        now = time.monotonic()
        if treated.injected:
            self._asking.again(number, now, 0.0)
            return
        if treated.map_is_wrong:
            self._stale, self._survey_at = True, 0.0
        if treated.retry_at is not None:
            put_off = max(min(put_off, treated.retry_at - now), FIRST_AGAIN_S)
        self._asking.again(number, now, put_off)

    # --- both ---

    def _clear(self, number: int, how: str) -> None:
        assert self._sampler is not None
        fixed = self._sampler.queues[number]
        if number not in self._treatment:
            self._stalls.end((fixed.device, fixed.queue), how)

    def _let_go(self) -> None:
        if self._sampler is not None:
            self._treatment.forget()
            self._sampler.close()
        if self._attached is not None:
            self._attached.close()
        self._sampler = self._watch = self._attached = None
        self._asking.renumber(())
        self._suspects = []
        self._seen_at_work.clear()
        self._stale = self._paused = False

    def close(self, *, gone: bool) -> None:
        """Let go of the machine. `gone`: it ended."""
        if gone:
            self._stalls.end_all(self.ending.replace("it", "the machine", 1))
        self._let_go()
        self._treatment.close()
        machine = self.machine
        if gone and processes.start_time(machine.pid) != machine.start_time:
            self._healer.forget(machine)
