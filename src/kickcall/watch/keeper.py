"""Which stalls get a bundle, and what does the watcher know that goes into it?

An onlooker: it keeps the latest looks at what moves or waits, and when a stall is found it reads
what the threads do, before anything is healed.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from kickcall.diagnose.states import ThreadState
from kickcall.diagnosis import on_the_wall
from kickcall.incident.facts import line_of
from kickcall.incident.seen import Seen
from kickcall.incident.threads import shots_of, threads_text
from kickcall.watch.happenings import What, of_queue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kickcall.diagnose.states import QueueFixed, Sample, SlowFacts
    from kickcall.diagnosis import Watch
    from kickcall.incident.shelf import Shelf, Written
    from kickcall.model import Verdict
    from kickcall.vmm.session import VmmSession
    from kickcall.watch.happenings import Happening
    from kickcall.watch.machine import WatchedMachine

_LOOKS_KEPT = 1024
"""Of one machine: of each queue that moved or waited, at each look. Some 300 bytes each."""

_THREADS_MOST = 64
"""Of a process: reading what they do delays the healing, by some milliseconds."""


class Keeper:
    """Has bundles written of stalls. `report_s`: one that may be the driver's own haste lasts so
    long first."""

    pace_s = 0.0

    def __init__(self, shelf: Shelf, report_s: float) -> None:
        self._shelf = shelf
        self._report_s = report_s
        self._looks: dict[WatchedMachine, deque[tuple[QueueFixed, Sample]]] = {}

    def mapped(
        self, machine: WatchedMachine, session: VmmSession, watch: Watch, *, paused: bool
    ) -> None:
        """Begin anew, or keep what is there."""
        self._looks.setdefault(machine, deque(maxlen=_LOOKS_KEPT))

    def looked(
        self, machine: WatchedMachine, watch: Watch, active: Iterable[int], at: float
    ) -> None:
        """Keep what moved, and what waits."""
        if (kept := self._looks.get(machine)) is not None:
            queues = watch.sampler.queues
            kept.extend((queues[number], watch.track(number).now) for number in active)

    def judged(
        self, machine: WatchedMachine, number: int, verdict: Verdict, slow: SlowFacts
    ) -> None:
        """Have a bundle written where the verdict is a stall that nobody's haste explains."""
        if not verdict.verdict.stalled:
            return
        busy = any(one.state is ThreadState.RUNNING for one in slow.vcpu_threads)
        if busy and verdict.since_s < self._report_s:
            return

        def take() -> Seen:
            offset = time.time() - time.monotonic()
            pids = {one.pid for one in slow.backend_threads} - {machine.machine.pid}
            kept = list(self._looks.get(machine, ()))
            return Seen(
                found=(on_the_wall(verdict, offset),),
                lines=tuple(line_of(fixed, sample, offset) for fixed, sample in kept),
                threads=threads_text(
                    shots_of(machine.machine.pid, sorted(pids), most=_THREADS_MOST)
                ),
            )

        self._shelf.offer(machine.machine, verdict, take)

    def lost(self, machine: WatchedMachine, why: str) -> None:
        """Nothing: what was seen before may explain it."""

    def close(self) -> None:
        """Write no more bundles."""
        self._shelf.close()

    def gone(self, machine: WatchedMachine) -> None:
        """Forget the machine."""
        self._looks.pop(machine, None)


def happening_of(written: Written) -> Happening:
    """Return what is told of a bundle."""
    verdict = written.verdict
    if written.path is None:
        text = f"no bundle could be written: {written.why}"
        return of_queue(written.machine, What.ALERT, verdict.device, verdict.queue, text)
    text = f"all that is known of it: {written.path}"
    return of_queue(
        *(written.machine, What.BUNDLE, verdict.device, verdict.queue, text),
        file=str(written.path),
    )


def teller(tell: Callable[[Happening], None]) -> Callable[[Written], None]:
    """Return what tells of bundles."""
    return lambda written: tell(happening_of(written))
