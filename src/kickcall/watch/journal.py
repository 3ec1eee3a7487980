"""What was seen and what was done, kept: stalls, and injections with the intent before the write.

An intent is on the disk before anything is written to a machine, so that a crash leaves an intent
without an outcome, and never a write without an intent.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Final

from kickcall.watch.database import Bounds, Database, default_path
from kickcall.watch.rows import InjectionRow, StallRow

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kickcall.model import Counters, Evidence, Injection, Machine, Verdict
    from kickcall.watch.rows import Who

_EVIDENCE_MAX: Final = 16 << 10
"""Bytes of one row's evidence that are kept."""


class Journal:
    """The journal at `path`, made where there is none. For the one thread that opened it.

    Every method raises JournalError where the file cannot be read or written.
    """

    def __init__(
        self, path: Path | None = None, *, bounds: Bounds | None = None, reading: bool = False
    ) -> None:
        self.path = path or default_path()
        self._database = Database(self.path, bounds or Bounds(), reading=reading)

    # --- injections ---

    def intend(
        self,
        machine: Machine,
        planned: Injection,
        who: Who,
        *,
        evidence: Sequence[Evidence] = (),
        stall: int | None = None,
        at: float | None = None,
    ) -> int:
        """Put down that `planned` is about to be written; return its number.

        When this returns it is on the disk.
        """
        return self._database.insert(
            "injections",
            stall=stall,
            machine=machine.name,
            pid=machine.pid,
            start_time=machine.start_time,
            device=planned.device,
            queue=planned.queue,
            event=str(planned.event),
            via=str(planned.via),
            target=planned.target,
            eventfd_id=planned.eventfd_id,
            by_uid=who.uid,
            by_pid=who.pid,
            by_command=who.command,
            at=time.time() if at is None else at,
            evidence=_evidence_json(evidence),
            **_counters("before", planned.before),
        )

    def done(self, number: int, result: Injection, *, at: float | None = None) -> None:
        """Put down that the injection was written."""
        self._database.update(
            "injections",
            number,
            outcome="ok",
            done_at=time.time() if at is None else at,
            **_counters("before", result.before),
            **_counters("after", result.after),
        )

    def failed(
        self, number: int, error: str, *, maybe_written: bool, at: float | None = None
    ) -> None:
        """Put down that the injection was refused, or that nobody knows whether it was written."""
        self._database.update(
            "injections",
            number,
            outcome="unknown" if maybe_written else "refused",
            error=error,
            done_at=time.time() if at is None else at,
        )

    def watched(self, number: int, helped: bool | None) -> None:
        """Put down whether the queue moved after the injection."""
        self._database.update("injections", number, helped=helped)

    # --- stalls ---

    def stalled(
        self, machine: Machine, verdict: Verdict, began: float, watcher: tuple[int, int]
    ) -> int:
        """Put down a stall that began at `began`; return its number.

        `watcher` is the pid and the start time of who watches it.
        """
        return self._database.insert(
            "stalls",
            machine=machine.name,
            pid=machine.pid,
            start_time=machine.start_time,
            device=verdict.device,
            queue=verdict.queue,
            verdict=str(verdict.verdict),
            hop=verdict.hop,
            began=began,
            evidence=_evidence_json(verdict.evidence),
            watcher_pid=watcher[0],
            watcher_start_time=watcher[1],
        )

    def became(self, number: int, verdict: Verdict) -> None:
        """Put down that a stall that lasts is another one than it looked."""
        self._database.update(
            "stalls",
            number,
            verdict=str(verdict.verdict),
            hop=verdict.hop,
            evidence=_evidence_json(verdict.evidence),
        )

    def adopt(self, number: int, watcher: tuple[int, int]) -> None:
        """Put down that another watcher goes on with a stall."""
        self._database.update(
            "stalls", number, watcher_pid=watcher[0], watcher_start_time=watcher[1]
        )

    def ended(self, number: int, ending: str, *, at: float | None = None) -> None:
        """Put down that a stall is over, and how."""
        self._database.update(
            "stalls", number, ended=time.time() if at is None else at, ending=ending
        )

    # --- reading ---

    def stalls(
        self, *, since: float = 0.0, machine: str | None = None, limit: int = -1
    ) -> list[StallRow]:
        """Return the stalls that lasted at `since` or began later, the latest `limit`, oldest
        first."""
        where, values = "(ended IS NULL OR ended >= ?)", [since]
        return [
            StallRow(**{**row, "evidence": json.loads(row["evidence"])})
            for row in self._database.latest("stalls", "began", where, values, machine, limit)
        ]

    def open_stalls(self) -> list[StallRow]:
        """Return the stalls that last, as far as anybody put down."""
        rows = self._database.latest("stalls", "began", "ended IS NULL", [], None, -1)
        return [StallRow(**{**row, "evidence": json.loads(row["evidence"])}) for row in rows]

    def injections(
        self, *, since: float = 0.0, machine: str | None = None, limit: int = -1
    ) -> list[InjectionRow]:
        """Return the injections since `since`, the latest `limit`, oldest first."""
        return [
            InjectionRow(
                **{
                    **row,
                    "evidence": json.loads(row["evidence"]),
                    "helped": None if row["helped"] is None else bool(row["helped"]),
                }
            )
            for row in self._database.latest("injections", "at", "at >= ?", [since], machine, limit)
        ]

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()


def _counters(when: str, counters: Counters) -> dict[str, int | None]:
    # An eventfd counts to 2^64-2 (eventfd(2)), an integer of SQLite to 2^63-1.
    count = None if counters.count is None else min(counters.count, (1 << 63) - 1)
    return {
        f"count_{when}": count,
        f"avail_{when}": counters.avail_idx,
        f"used_{when}": counters.used_idx,
    }


def _evidence_json(evidence: Sequence[Evidence]) -> str:
    """Return evidence as JSON; as much of it as there is room for, the first being the reason."""
    kept: list[str] = []
    size = 2
    for one in evidence:
        text = json.dumps({"what": one.what, "value": one.value, "at": one.at})
        size += len(text) + 1
        if size > _EVIDENCE_MAX:
            break
        kept.append(text)
    return f"[{','.join(kept)}]"
