"""Raising what a verdict names: asked of the policy, put down before, watched after.

One healer for all machines of a watcher, as the host has one budget. Its methods are called from
several threads.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from kickcall.devices.base import device_class
from kickcall.diagnosis import on_the_wall
from kickcall.errors import EventNotSupportedError, KickcallError
from kickcall.host import processes
from kickcall.watch.book import COMMAND
from kickcall.watch.policy import (
    NEUTRAL,
    Decision,
    Queue,
    Rules,
    State,
    decide,
    forget,
    inject,
    settle,
    withdraw,
)
from kickcall.watch.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from kickcall.model import DeviceEvent, Injection, Machine, Verdict
    from kickcall.vmm.session import MappedDevice, VmmSession
    from kickcall.watch.book import Book
    from kickcall.watch.rows import InjectionRow, StallRow


class MovedError(KickcallError):
    """The queue moved while its injection was put down: there is nothing to heal any more."""


class Healer:
    """Heals within the bounds of `rules`; with `dry_run` it only decides."""

    def __init__(self, book: Book, rules: Rules, *, enabled: bool, dry_run: bool = False) -> None:
        self.enabled = enabled
        self.dry_run = dry_run
        self.rules = rules
        self.book = book
        self.tally = Tally()
        self._state = State()
        self._lock = threading.Lock()
        self._orphans: dict[Queue, StallRow] = {}

    def obey(self, rules: Rules, *, enabled: bool, dry_run: bool) -> None:
        """Heal within other bounds from now on, or not any more."""
        with self._lock:
            self.rules, self.enabled, self.dry_run = rules, enabled, dry_run

    @property
    def mode(self) -> str:
        """What it does: `on`, `dry-run` or `off`."""
        if not self.enabled:
            return "off"
        return "dry-run" if self.dry_run else "on"

    def remember(self) -> None:
        """Take over what the journal knows of the time before: what was injected, what lasts.

        Raises JournalError.
        """
        now, wall = time.monotonic(), time.time()
        stalls, injections = self.book.past(wall - self.rules.memory_s)
        self._state = recall(injections, self.rules, now - wall, now)
        for row in stalls:
            if processes.start_time(row.watcher_pid) == row.watcher_start_time:
                continue  # another watcher's, which is alive
            if processes.start_time(row.pid) == row.start_time:
                which = Queue(row.pid, row.start_time, row.device, row.queue)
                self._orphans[which] = row
            else:
                self.book.ended(row.id, "the machine ended while nobody watched", wall)

    def stalled(self, machine: Machine, verdict: Verdict, began: float) -> Future[int]:
        """Put a stall down, or go on with the same one of a watcher before."""
        which = Queue(machine.pid, machine.start_time, verdict.device, verdict.queue)
        orphan = self._orphans.pop(which, None)
        if orphan is not None:
            return self.book.adopt(orphan.id)
        return self.book.stalled(machine, verdict, began)

    def close_orphans(self, machine: Machine, at: float) -> None:
        """Put down that what a watcher before put down of a machine is over."""
        mine = (machine.pid, machine.start_time)
        for which in [one for one in self._orphans if (one.pid, one.start_time) == mine]:
            row = self._orphans.pop(which)
            self.book.ended(row.id, "it ended while nobody watched", at)

    def decide(self, which: Queue, verdict: Verdict, *, busy: bool) -> Decision:
        """Return whether to inject now. If so (and this is no dry run) it counts from now on."""
        now = time.monotonic()
        with self._lock:
            decision = decide(self._state, self.rules, which, verdict, busy=busy, now=now)
            if decision.heal and not self.dry_run:
                self._state = inject(self._state, self.rules, which, now)
        return decision

    def settle(self, which: Queue, event: DeviceEvent, helped: bool | None) -> None:
        """Take note of whether an injection helped."""
        outcomes = {True: "helped", False: "refuted", None: "unknown"}
        self.tally.injected(event, outcomes[helped])
        with self._lock:
            self._state = settle(self._state, self.rules, which, helped, time.monotonic())

    def withdraw(self, which: Queue, event: DeviceEvent) -> None:
        """Take note that an injection was not written."""
        self.tally.injected(event, "refused")
        with self._lock:
            self._state = withdraw(self._state, which)

    def forget(self, machine: Machine) -> None:
        """Take note that a machine ended."""
        with self._lock:
            self._state = forget(self._state, machine.pid, machine.start_time)

    def raise_event(
        self,
        session: VmmSession,
        mapped: MappedDevice,
        verdict: Verdict,
        stall: Future[int],
        unmoved: Callable[[], bool],
    ) -> tuple[int, Injection]:
        """Raise what `verdict` names; return the intent's number in the journal, and the result.

        Takes only ways that do not stop the machine. `unmoved` is asked last, after the intent is
        on the disk. Raises KickcallError where nothing was written, or nobody knows.
        """
        verdict = on_the_wall(verdict, time.time() - time.monotonic())
        assert verdict.event is not None
        kind = device_class(session, mapped)
        refusals = []
        for via in NEUTRAL:
            witness = _Put(self.book, verdict, stall, unmoved)
            event, queue = verdict.event, verdict.queue
            try:
                result = kind.device_event(event, queue, via=via, witness=witness)
            except EventNotSupportedError as exc:
                refusals.append(str(exc))
                continue
            assert witness.number is not None
            return witness.number, result
        raise EventNotSupportedError("; ".join(refusals))


class _Put:
    """Puts one injection of the healer down."""

    def __init__(
        self, book: Book, verdict: Verdict, stall: Future[int], unmoved: Callable[[], bool]
    ) -> None:
        self._book = book
        self._verdict = verdict
        self._stall = stall
        self._unmoved = unmoved
        self.number: int | None = None

    def before(self, machine: Machine, planned: Injection) -> None:
        self.number = self._book.intend(machine, planned, self._verdict.evidence, self._stall)
        # A disk takes its time, and a healthy queue is never written to.
        if not self._unmoved():
            error = MovedError("the queue moved by itself meanwhile")
            self._book.failed(self.number, str(error), maybe_written=False)
            raise error

    def written(self, result: Injection) -> None:
        assert self.number is not None
        self._book.done(self.number, result)

    def failed(self, error: KickcallError, *, maybe_written: bool) -> None:
        assert self.number is not None
        self._book.failed(self.number, str(error), maybe_written=maybe_written)


def recall(
    injections: Iterable[InjectionRow], rules: Rules, to_monotonic: float, now: float
) -> State:
    """Return the state that a watcher has who made these injections, oldest first.

    `to_monotonic` is what turns their times into those of `now`. One without an outcome may have
    been written: its queue backs off as after a failure.
    """
    state = State()
    for row in injections:
        if row.by_command != COMMAND or row.outcome == "refused":
            continue
        # A clock that was set back must not make injections of the future.
        at = min(row.at + to_monotonic, now)
        which = Queue(row.pid, row.start_time, row.device, row.queue)
        state = settle(inject(state, rules, which, at), rules, which, row.helped, at)
    return state
