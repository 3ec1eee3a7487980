"""The journal of a watcher: written in a thread of its own, so that no look waits for a disk.

Only an intent is waited for. What cannot be written is lost and said once; and as long as nothing
can be written nothing is healed.
"""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, TypeVar

from kickcall.host.processes import start_time
from kickcall.watch.database import JournalError
from kickcall.watch.journal import Journal
from kickcall.watch.rows import Who

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kickcall.model import Evidence, Injection, Machine, Verdict
    from kickcall.watch.rows import InjectionRow, StallRow

COMMAND = "kickcall watch"
_INTENT_S = 2.0
"""How long a write to a machine waits for its intent to be on the disk."""
_WAITING_MOST = 1000
"""Entries that wait for a disk that does not take them; more are not kept."""

T = TypeVar("T")


class Book:
    """The journal at `path`, written behind the watcher's back. `complain` is told of failures.

    With `kept=False` nothing is put down: for who only looks on.
    """

    def __init__(
        self, path: Path | None, complain: Callable[[str], None], *, kept: bool = True
    ) -> None:
        self._path = path
        self._kept = kept
        self._complain = complain
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._journal: Journal | None = None
        self._waiting = threading.BoundedSemaphore(_WAITING_MOST)
        self._failing = False
        self.me = (os.getpid(), start_time(os.getpid()) or 0)
        self._who = Who(os.geteuid(), os.getpid(), COMMAND)

    @property
    def failing(self) -> bool:
        """Whether the last that was to be written could not be."""
        return self._failing

    # --- in the journal's thread ---

    def _opened(self) -> Journal:
        if self._journal is None:
            self._journal = Journal(self._path)
        return self._journal

    def _do(self, work: Callable[[Journal], T]) -> T:
        try:
            done = work(self._opened())
        except JournalError as exc:
            if not self._failing:
                self._complain(str(exc))
            self._failing = True
            if self._journal is not None:
                # Opened anew the next time: the file may have been replaced.
                self._journal.close()
                self._journal = None
            raise
        self._failing = False
        return done

    # --- in anybody's ---

    def _submit(self, work: Callable[[Journal], T]) -> Future[T]:
        if not self._kept or not self._waiting.acquire(blocking=False):
            failed: Future[T] = Future()
            why = "the journal's disk does not keep up" if self._kept else "nothing is put down"
            failed.set_exception(JournalError(why))
            return failed
        future = self._pool.submit(self._do, work)
        future.add_done_callback(lambda _: self._waiting.release())
        return future

    def past(self, since: float) -> tuple[list[StallRow], list[InjectionRow]]:
        """Return the stalls that last and the injections since `since`. Raises JournalError."""
        return self._submit(
            lambda journal: (journal.open_stalls(), journal.injections(since=since))
        ).result()

    def stalled(self, machine: Machine, verdict: Verdict, began: float) -> Future[int]:
        """Put a stall down; the number will be the answer."""
        return self._submit(lambda journal: journal.stalled(machine, verdict, began, self.me))

    def adopt(self, number: int) -> Future[int]:
        """Go on with a stall that another watcher put down."""

        def work(journal: Journal) -> int:
            journal.adopt(number, self.me)
            return number

        return self._submit(work)

    def became(self, stall: Future[int], verdict: Verdict) -> None:
        """Put down that a stall is another one than it looked."""
        self._submit(lambda journal: journal.became(stall.result(0), verdict))

    def ended(self, stall: Future[int] | int, ending: str, at: float) -> None:
        """Put down that a stall is over."""

        def work(journal: Journal) -> None:
            number = stall if isinstance(stall, int) else stall.result(0)
            journal.ended(number, ending, at=at)

        self._submit(work)

    def intend(
        self,
        machine: Machine,
        planned: Injection,
        evidence: Sequence[Evidence],
        stall: Future[int],
    ) -> int:
        """Put an intent down, and return its number when it is on the disk.

        Raises JournalError where it is not, or not soon enough.
        """

        def work(journal: Journal) -> int:
            return journal.intend(
                machine, planned, self._who, evidence=evidence, stall=stall.result(0)
            )

        intent = self._submit(work)
        try:
            return intent.result(_INTENT_S)
        except FutureTimeoutError:
            # It may be written yet: then it is one of which nothing came.
            if not intent.cancel():
                self._submit(
                    lambda journal: journal.failed(
                        intent.result(0), "the journal was too slow", maybe_written=False
                    )
                )
            raise JournalError(f"the journal did not take an intent in {_INTENT_S:g} s") from None

    def done(self, number: int, result: Injection) -> None:
        """Put down that an injection was written."""
        self._submit(lambda journal: journal.done(number, result))

    def failed(self, number: int, error: str, *, maybe_written: bool) -> None:
        """Put down that it was not, or that nobody knows."""
        self._submit(lambda journal: journal.failed(number, error, maybe_written=maybe_written))

    def watched(self, number: int, helped: bool | None) -> None:
        """Put down whether it helped."""
        self._submit(lambda journal: journal.watched(number, helped))

    def close(self) -> None:
        """Write what waits, and let go of the file."""

        def close() -> None:
            if self._journal is not None:
                self._journal.close()
                self._journal = None

        with contextlib.suppress(RuntimeError):
            self._pool.submit(close)
        self._pool.shutdown()
