"""What is who draws told of every look at every machine?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kickcall.diagnose.states import SlowFacts
    from kickcall.diagnosis import Watch
    from kickcall.model import Verdict
    from kickcall.vmm.session import VmmSession
    from kickcall.watch.machine import WatchedMachine


class Onlooker(Protocol):
    """Sees what a watcher sees. Called by its threads, for one machine by one of them at a time: it
    must come back at once."""

    pace_s: float
    """Looks at a machine need come no more often than that."""

    def mapped(
        self, machine: WatchedMachine, session: VmmSession, watch: Watch, *, paused: bool
    ) -> None:
        """A machine was mapped, or mapped anew, or paused: queue numbers mean others from now."""

    def looked(
        self, machine: WatchedMachine, watch: Watch, active: Iterable[int], at: float
    ) -> None:
        """All queues were looked at; those that are `active` moved, or wait."""

    def judged(
        self, machine: WatchedMachine, number: int, verdict: Verdict, slow: SlowFacts
    ) -> None:
        """A queue that stands still was judged with all that can be known."""

    def lost(self, machine: WatchedMachine, why: str) -> None:
        """A machine cannot be looked at, for now."""

    def gone(self, machine: WatchedMachine) -> None:
        """A machine ended."""
