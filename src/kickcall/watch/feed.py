"""What do `kickcall top` and `kickcall serve` draw from? A watcher that only looks, in a thread.

It samples at its own rate, and never waits for who draws.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, Self

from kickcall.attached import attach
from kickcall.draw.text import printable, short
from kickcall.draw.tones import Tone
from kickcall.errors import MachineGoneError
from kickcall.watch.book import Book
from kickcall.watch.counting import Counting
from kickcall.watch.daemon import Daemon
from kickcall.watch.happenings import What
from kickcall.watch.healer import Healer
from kickcall.watch.live import LiveMachine
from kickcall.watch.policy import Rules
from kickcall.watch.settings import Settings
from kickcall.watch.timeline import Moment, timeline
from kickcall.watch.witness import JournalWitness

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from kickcall.diagnose.states import SlowFacts
    from kickcall.diagnosis import Watch
    from kickcall.model import DeviceEvent, Injection, Verdict
    from kickcall.vmm.session import VmmSession
    from kickcall.watch.happenings import Happening
    from kickcall.watch.machine import WatchedMachine

_PACE_S, _PACE_MOST_S, _PACE_EACH_S = 0.1, 0.5, 0.0025
"""Between two looks at a machine: more with many machines, so that all together cost little."""
_SEEN_MOST = 500
_INJECTED_S = 0.1
"""How long a queue is watched after an event, as `kickcall kick` does."""


class Source(Protocol):
    """Where what is drawn comes from."""

    @property
    def machines(self) -> Sequence[LiveMachine]:
        """All machines, in no order."""

    @property
    def problem(self) -> str:
        """What somebody should know of how machines are looked at; empty where all is well."""

    @property
    def now(self) -> float:
        """The time of the clock that the machines' times are of."""

    def timeline(self, since: float, limit: int = 200) -> tuple[list[Moment], str]:
        """Return what happened since, oldest first; and why the journal could not be read."""

    def raise_event(
        self, machine: LiveMachine, device: str, queue: int, event: DeviceEvent, *, dry_run: bool
    ) -> Injection:
        """Raise an event, or say what would be written. Takes its time. Raises KickcallError."""

    def count(self, machine: LiveMachine) -> str:
        """Have kicks and calls counted for some seconds; return why they cannot be, if so."""


class Feed:
    """Looks at the machines that `wanted` names, all of this host where it names none.

    `command` is what injections are journaled under. Use it in a `with` block.
    """

    def __init__(self, wanted: Iterable[str], command: str, journal: Path | None = None) -> None:
        self.pace_s = _PACE_S
        self.problem = ""
        """What the watcher said last that somebody should look at; empty where nothing was."""
        self._command = command
        self._path = journal
        self._machines: dict[WatchedMachine, LiveMachine] = {}
        self._seen: deque[Moment] = deque(maxlen=_SEEN_MOST)
        self._lasting: dict[tuple[int, str, int], Moment] = {}
        self._counting = Counting()
        book = Book(None, lambda _: None, kept=False)
        healer = Healer(book, Rules(), enabled=False)
        self._daemon = Daemon(wanted, Settings(), healer, self._hear, onlooker=self)
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._daemon.stop()
        self._counting.close()
        self._thread.join(5.0)

    def _run(self) -> None:
        try:
            self._daemon.run()
        except BaseException as exc:
            # Who draws goes on, and must not show the past as if it were now.
            self._complain(f"the watcher ended, nothing is looked at any more: {exc!r}")
            raise

    # --- for who draws ---

    @property
    def machines(self) -> list[LiveMachine]:
        """All machines, in no order."""
        return list(self._machines.values())

    @property
    def now(self) -> float:
        """The time of the clock that the machines' times are of."""
        return time.monotonic()

    def timeline(self, since: float, limit: int = 200) -> tuple[list[Moment], str]:
        """Return what happened since, oldest first; and why the journal could not be read."""
        seen = [*list(self._seen), *list(self._lasting.values())]
        return timeline(self._path, seen, since=since, limit=limit)

    def raise_event(
        self, machine: LiveMachine, device: str, queue: int, event: DeviceEvent, *, dry_run: bool
    ) -> Injection:
        """Raise an event, or say what would be written; never pauses the machine.

        Takes as long as mapping the machine does. Raises KickcallError and its kin.
        """
        witness = JournalWitness(self._command, self._complain, path=self._path)
        try:
            with attach(machine.machine.pid) as attached:
                if attached.info.start_time != machine.machine.start_time:
                    raise MachineGoneError(f"{printable(machine.name)} ended")
                return attached.device_event(
                    device,
                    event,
                    queue,
                    dry_run=dry_run,
                    watch_s=0.0 if dry_run else _INJECTED_S,
                    witness=witness,
                )
        finally:
            witness.close()

    def count(self, machine: LiveMachine) -> str:
        """Have kicks and calls counted for some seconds; return why they cannot be, if so."""
        return self._counting.want(machine)

    def _complain(self, text: str) -> None:
        self.problem = printable(text)

    # --- what the watcher tells ---

    def _hear(self, one: Happening) -> None:
        if one.what is What.ALERT:
            self._complain(one.text)
        if one.device is None or one.queue is None or one.pid is None:
            return
        key = (one.pid, one.device, one.queue)
        if one.what is What.STALL:
            hop = one.more.get("hop")
            word = str(one.more.get("verdict", "stall"))
            self._lasting[key] = Moment(
                at=one.at - float(one.more.get("since_s", 0.0)),
                until=None,
                stall=True,
                machine=printable(one.machine),
                pid=one.pid,
                device=short(one.device),
                queue=one.queue,
                what=f"{word} on hop {hop}" if hop else word,
                outcome="lasts",
                by=self._command,
                tone=Tone.BAD,
            )
        elif one.what is What.CLEARED and (moment := self._lasting.pop(key, None)) is not None:
            over = replace(moment, until=one.at, outcome=printable(one.text), tone=Tone.FAINT)
            self._seen.append(over)

    # --- what it sees (Onlooker) ---

    def mapped(
        self, machine: WatchedMachine, session: VmmSession, watch: Watch, *, paused: bool
    ) -> None:
        self._live(machine).map(session, watch, paused=paused)

    def looked(
        self, machine: WatchedMachine, watch: Watch, active: Iterable[int], at: float
    ) -> None:
        self._live(machine).look(machine, watch, active, at)

    def judged(
        self, machine: WatchedMachine, number: int, verdict: Verdict, slow: SlowFacts
    ) -> None:
        self._live(machine).judge(number, verdict, slow)

    def lost(self, machine: WatchedMachine, why: str) -> None:
        self._live(machine).lose(printable(why))

    def gone(self, machine: WatchedMachine) -> None:
        live = self._machines.pop(machine, None)
        if live is not None:
            self._counting.forget(live)
        self._set_pace()

    def _live(self, machine: WatchedMachine) -> LiveMachine:
        live = self._machines.get(machine)
        if live is None:
            live = self._machines[machine] = LiveMachine(machine.machine)
            self._set_pace()
        return live

    def _set_pace(self) -> None:
        self.pace_s = min(max(_PACE_S, len(self._machines) * _PACE_EACH_S), _PACE_MOST_S)
