"""The loop: when is which machine looked at, who does the slow work, and when does it end?

One thread looks at all machines, each when it is due. Whatever may take its time (a monitor, a map,
the journal's disk) is done by a few others, one machine by one of them at a time.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from kickcall.errors import KickcallError, MachineGoneError
from kickcall.host import processes
from kickcall.watch.domains import Domains
from kickcall.watch.finder import Finder
from kickcall.watch.happenings import Happening, What, of_machine
from kickcall.watch.machine import WatchedMachine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kickcall.watch.healer import Healer
    from kickcall.watch.onlooker import Onlooker
    from kickcall.watch.settings import Settings

_SCAN_S = 0.5
_WORKERS = 8
_TROUBLE_S = 10.0


class Daemon:
    """Watches machines until it is told to stop. `tell` is called in the thread of `run`."""

    def __init__(
        self,
        wanted: Iterable[str],
        settings: Settings,
        healer: Healer,
        tell: Callable[[Happening], None],
        onlooker: Onlooker | None = None,
        *,
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        self._onlooker = onlooker
        self._finder = Finder(wanted)
        self._settings = settings
        self.healer = healer
        self._tell_on = tell
        self._pulse = pulse
        self._inbox: queue.SimpleQueue[Happening | WatchedMachine | Callable[[], None] | None] = (
            queue.SimpleQueue()
        )
        self._stopping = False
        self._blind = ""
        """Why /proc could not be read, as it was told."""
        self._machines: dict[tuple[int, int], WatchedMachine] = {}
        self._gone: set[WatchedMachine] = set()
        self._busy: set[WatchedMachine] = set()
        self._due: list[tuple[float, int, WatchedMachine]] = []
        self._order = itertools.count()
        self._domains = Domains(self.soon, self._scan, self._rebooted)

    @property
    def machines(self) -> list[WatchedMachine]:
        """The machines that run now; may be asked for in any thread."""
        return list(self._machines.values())

    def tell(self, happening: Happening) -> None:
        """Have something told, from any thread."""
        self._inbox.put(happening)

    def soon(self, work: Callable[[], None]) -> None:
        """Have something done in the thread of `run`: for signal handlers, too."""
        self._inbox.put(work)

    def obey(self, wanted: Iterable[str], settings: Settings) -> None:
        """Watch others, or otherwise, from now on. In the thread of `run`."""
        self._finder = Finder(wanted)
        self._settings = settings
        for machine in self._machines.values():
            machine.obey(settings)
        self._scan()

    def stop(self) -> None:
        """End `run` soon: for signal handlers, too (SimpleQueue.put is reentrant)."""
        self._stopping = True
        self._inbox.put(None)

    def run(self) -> None:
        """Watch until `stop`."""
        scan_at = 0.0
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="machine") as pool:
            try:
                while not self._stopping:
                    now = time.monotonic()
                    if now >= scan_at:
                        self._scan()
                        scan_at = now + _SCAN_S
                    self._pulse()
                    self._look(pool)
                    self._receive(scan_at)
            finally:
                self._stopping = True
                pool.shutdown(cancel_futures=True)
                self._domains.close("it ended")
                for machine in {*self._machines.values(), *self._gone}:
                    with contextlib.suppress(KickcallError, OSError):
                        machine.close(gone=machine in self._gone)
                while not self._inbox.empty():
                    if isinstance(item := self._inbox.get(), Happening):
                        self._tell(item)

    def _tell(self, happening: Happening) -> None:
        self.healer.tally.happened(happening)
        self._tell_on(happening)

    def _scan(self) -> None:
        try:
            found = {(one.pid, one.start_time): one for one in self._finder.scan()}
        except OSError as exc:  # no descriptors left, for instance
            if str(exc) != self._blind:
                self._blind = str(exc)
                self.tell(Happening(What.ALERT, f"cannot look for machines: {exc}"))
            return
        self._blind = ""
        for key in [key for key in self._machines if key not in found]:
            if processes.start_time(key[0]) == key[1]:
                self._machines[key].release("it is not to be watched any more")
            self._end(self._machines[key])
        for key, machine in found.items():
            if key not in self._machines:
                watched = WatchedMachine(
                    machine, self._settings, self.healer, self.tell, self._onlooker
                )
                self._machines[key] = watched
                self._schedule(watched)
                self._domains.follow(machine)

    def _rebooted(self, key: tuple[int, int]) -> None:
        if key in self._machines and self._machines[key].came:
            machine = self._machines[key].machine
            self.tell(of_machine(machine, What.REBOOTED, "its guest rebooted"))

    def _schedule(self, machine: WatchedMachine) -> None:
        heapq.heappush(self._due, (machine.due, next(self._order), machine))

    def _look(self, pool: ThreadPoolExecutor) -> None:
        # No machine twice: all else has its turn, however long looks take.
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            machine = heapq.heappop(self._due)[2]
            if machine in self._gone:
                self._close(machine)
                continue
            started, looks = time.monotonic(), machine.state == "watched"
            try:
                wants_work = machine.look()
                if looks:
                    self.healer.tally.looked(time.monotonic() - started)
            except MachineGoneError:
                self._end(machine)
                self._close(machine)
                continue
            except Exception as exc:
                self._in_trouble(machine, exc)
                wants_work = False
            if wants_work:
                self._busy.add(machine)
                pool.submit(self._work, machine)
            else:
                self._schedule(machine)

    def _work(self, machine: WatchedMachine) -> None:
        try:
            machine.work()
        except MachineGoneError:
            self._gone.add(machine)
        except Exception as exc:
            self._in_trouble(machine, exc)
        self._inbox.put(machine)

    def _in_trouble(self, machine: WatchedMachine, exc: Exception) -> None:
        """Leave a machine alone for a while: its trouble is not to be everybody's."""
        self.tell(of_machine(machine.machine, What.ALERT, f"{type(exc).__name__}: {exc}"))
        machine.due = time.monotonic() + _TROUBLE_S

    def _receive(self, until: float) -> None:
        """Tell what happened and take back machines, until something is due."""
        while True:
            if self._due:
                until = min(until, self._due[0][0])
            try:
                item = self._inbox.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return
            if isinstance(item, Happening):
                self._tell(item)
            elif isinstance(item, WatchedMachine):
                self._busy.discard(item)
                if item in self._gone:
                    self._end(item)
                    self._close(item)
                else:
                    self._schedule(item)
            elif item is not None:
                item()
            elif self._stopping:
                return

    def _end(self, machine: WatchedMachine) -> None:
        """Take a machine off the list; it is closed by whoever has it."""
        key = (machine.machine.pid, machine.machine.start_time)
        if self._machines.pop(key, None) is not None:
            self._gone.add(machine)

    def _close(self, machine: WatchedMachine) -> None:
        self._gone.discard(machine)
        with contextlib.suppress(KickcallError, OSError):
            machine.close(gone=True)
        if self._onlooker is not None:
            self._onlooker.gone(machine)

        def say(why: str) -> None:
            if machine.came:
                self.tell(of_machine(machine.machine, What.WENT, why))

        self._domains.farewell(machine.machine, machine.ending, say)
