"""What was seen and what was done, kept: stalls, and injections with the intent before the write.

One SQLite file. An intent is on the disk before anything is written to a machine (WAL with
`synchronous=FULL`: a commit survives power loss), so that a crash leaves an intent without an
outcome, and never a write without an intent. Several processes may write to one journal.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kickcall.errors import KickcallError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kickcall.model import Counters, Evidence, Injection, Machine, Verdict

SCHEMA: Final = 1
ENVIRONMENT: Final = "KICKCALL_JOURNAL"
_ROOTS: Final = Path("/var/lib/kickcall/journal.db")
_BUSY_S: Final = 2.0
"""How long another process may hold the journal."""
_EVIDENCE_MAX: Final = 16 << 10
"""Bytes of one row's evidence that are kept."""
_PRUNE_EVERY: Final = 64
"""Rows written between two looks at the size."""

_TABLES: Final = """
CREATE TABLE stalls (
    id INTEGER PRIMARY KEY,
    machine TEXT NOT NULL, pid INTEGER NOT NULL, start_time INTEGER NOT NULL,
    device TEXT NOT NULL, queue INTEGER NOT NULL,
    verdict TEXT NOT NULL, hop INTEGER NOT NULL,
    began REAL NOT NULL, ended REAL, ending TEXT,
    evidence TEXT NOT NULL,
    watcher_pid INTEGER NOT NULL, watcher_start_time INTEGER NOT NULL
);
CREATE TABLE injections (
    id INTEGER PRIMARY KEY,
    stall INTEGER,
    machine TEXT NOT NULL, pid INTEGER NOT NULL, start_time INTEGER NOT NULL,
    device TEXT NOT NULL, queue INTEGER NOT NULL,
    event TEXT NOT NULL, via TEXT NOT NULL, target TEXT NOT NULL, eventfd_id INTEGER,
    by_uid INTEGER NOT NULL, by_pid INTEGER NOT NULL, by_command TEXT NOT NULL,
    at REAL NOT NULL, evidence TEXT NOT NULL,
    outcome TEXT, done_at REAL, error TEXT,
    count_before INTEGER, avail_before INTEGER, used_before INTEGER,
    count_after INTEGER, avail_after INTEGER, used_after INTEGER,
    helped INTEGER
);
CREATE INDEX injections_at ON injections (at);
CREATE INDEX stalls_began ON stalls (began);
CREATE INDEX stalls_open ON stalls (ended) WHERE ended IS NULL;
"""


class JournalError(KickcallError):
    """The journal cannot be opened, read or written; the message names the file and the reason."""


@dataclass(frozen=True, slots=True)
class Who:
    """Who injects."""

    uid: int
    pid: int
    command: str


@dataclass(frozen=True, slots=True)
class StallRow:
    """A stall as it was observed. Times in seconds since the epoch."""

    id: int
    machine: str
    pid: int
    start_time: int
    device: str
    queue: int
    verdict: str
    hop: int
    began: float
    ended: float | None
    ending: str | None
    """How it ended, in words; None while it lasts."""
    evidence: list[dict[str, Any]]
    watcher_pid: int
    watcher_start_time: int


@dataclass(frozen=True, slots=True)
class InjectionRow:
    """An injection. `outcome` None: unknown, whoever was to write it down crashed."""

    id: int
    stall: int | None
    machine: str
    pid: int
    start_time: int
    device: str
    queue: int
    event: str
    via: str
    target: str
    eventfd_id: int | None
    by_uid: int
    by_pid: int
    by_command: str
    at: float
    evidence: list[dict[str, Any]]
    outcome: str | None
    """`ok`: written. `refused`: nothing was written. `unknown`: it may have been written."""
    done_at: float | None
    error: str | None
    count_before: int | None
    avail_before: int | None
    used_before: int | None
    count_after: int | None
    avail_after: int | None
    used_after: int | None
    helped: bool | None
    """Whether the queue moved after it; None: not watched, or not known."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How large a journal may grow; the oldest rows go first."""

    rows: int = 100_000
    """Of stalls, and of injections."""
    size: int = 64 << 20
    """Bytes of the file."""


def default_path() -> Path:
    """Return where the journal is: $KICKCALL_JOURNAL, else root's or the user's own place."""
    if named := os.environ.get(ENVIRONMENT):
        return Path(named)
    if os.geteuid() == 0:
        return _ROOTS
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "kickcall" / "journal.db"


class Journal:
    """The journal at `path`, made where there is none. For the one thread that opened it.

    Every method raises JournalError where the file cannot be read or written.
    """

    def __init__(
        self, path: Path | None = None, *, bounds: Bounds | None = None, reading: bool = False
    ) -> None:
        self.path = path or default_path()
        self._bounds = bounds or Bounds()
        self._written = 0
        with self._told():
            self._database = self._open_to_read() if reading else self._open()

    def _open(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite gives its files the mode of the database.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as exc:
            raise JournalError(f"cannot open the journal {self.path}: {exc.strerror}") from exc
        database = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)
        try:
            # Before the first table: it cannot be changed later without writing all anew.
            database.execute("PRAGMA auto_vacuum = INCREMENTAL")
            _use_wal(database)
            database.execute("PRAGMA synchronous = FULL")
            database.execute(f"PRAGMA journal_size_limit = {4 << 20}")
            self._set_up(database)
        except BaseException:
            database.close()
            raise
        return database

    def _open_to_read(self) -> sqlite3.Connection:
        try:
            self.path.stat()
        except FileNotFoundError:
            raise JournalError(
                f"there is no journal {self.path}: nothing was journaled yet"
            ) from None
        except OSError as exc:
            raise JournalError(f"cannot open the journal {self.path}: {exc.strerror}") from exc
        # Not `mode=ro`: a reader of a WAL takes part in its shared memory, and may have to make it.
        database = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)
        try:
            database.execute("PRAGMA query_only = ON")
            self._check_version(database)
        except BaseException:
            database.close()
            raise
        return database

    def _set_up(self, database: sqlite3.Connection) -> None:
        if self._check_version(database):
            return
        database.execute("BEGIN IMMEDIATE")
        try:
            # Another process may have been faster.
            if not self._check_version(database):
                for statement in _TABLES.split(";")[:-1]:
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {SCHEMA}")
            database.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                database.execute("ROLLBACK")
            raise

    def _check_version(self, database: sqlite3.Connection) -> int:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA:
            raise JournalError(
                f"the journal {self.path} was written by a newer kickcall (schema {version}, this "
                f"one knows {SCHEMA}): use that one, or name another with ${ENVIRONMENT}"
            )
        return int(version)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise JournalError(f"the journal {self.path} cannot be used: {exc}") from exc

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
        return self._insert(
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
        self._update(
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
        self._update(
            "injections",
            number,
            outcome="unknown" if maybe_written else "refused",
            error=error,
            done_at=time.time() if at is None else at,
        )

    def watched(self, number: int, helped: bool | None) -> None:
        """Put down whether the queue moved after the injection."""
        self._update("injections", number, helped=helped)

    # --- stalls ---

    def stalled(
        self, machine: Machine, verdict: Verdict, began: float, watcher: tuple[int, int]
    ) -> int:
        """Put down a stall that began at `began`; return its number.

        `watcher` is the pid and the start time of who watches it.
        """
        return self._insert(
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
        self._update(
            "stalls",
            number,
            verdict=str(verdict.verdict),
            hop=verdict.hop,
            evidence=_evidence_json(verdict.evidence),
        )

    def adopt(self, number: int, watcher: tuple[int, int]) -> None:
        """Put down that another watcher goes on with a stall."""
        self._update("stalls", number, watcher_pid=watcher[0], watcher_start_time=watcher[1])

    def ended(self, number: int, ending: str, *, at: float | None = None) -> None:
        """Put down that a stall is over, and how."""
        self._update("stalls", number, ended=time.time() if at is None else at, ending=ending)

    # --- reading ---

    def stalls(
        self, *, since: float = 0.0, machine: str | None = None, limit: int = -1
    ) -> list[StallRow]:
        """Return the stalls that lasted at `since` or began later, the latest `limit`, oldest
        first."""
        where, values = "(ended IS NULL OR ended >= ?)", [since]
        return [
            StallRow(**{**row, "evidence": json.loads(row["evidence"])})
            for row in self._latest("stalls", "began", where, values, machine, limit)
        ]

    def open_stalls(self) -> list[StallRow]:
        """Return the stalls that last, as far as anybody put down."""
        rows = self._latest("stalls", "began", "ended IS NULL", [], None, -1)
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
            for row in self._latest("injections", "at", "at >= ?", [since], machine, limit)
        ]

    def _latest(
        self,
        table: str,
        when: str,
        where: str,
        values: Sequence[object],
        machine: str | None,
        limit: int,
    ) -> list[dict[str, Any]]:
        if machine is not None:
            where, values = f"{where} AND machine = ?", [*values, machine]
        with self._told():
            if not self._check_version(self._database):
                return []
            found = self._database.execute(
                f"SELECT * FROM {table} WHERE {where} ORDER BY {when} DESC, id DESC LIMIT ?",
                [*values, limit],
            )
            names = [column[0] for column in found.description]
            return [dict(zip(names, row, strict=True)) for row in found][::-1]

    # --- writing ---

    def _insert(self, table: str, **values: object) -> int:
        names = ", ".join(values)
        marks = ", ".join("?" * len(values))
        with self._told():
            done = self._database.execute(
                f"INSERT INTO {table} ({names}) VALUES ({marks})", list(values.values())
            )
            number = done.lastrowid
            assert number is not None
            self._written += 1
            if self._written % _PRUNE_EVERY == 1:
                self._prune()
        return number

    def _update(self, table: str, number: int, **values: object) -> None:
        names = ", ".join(f"{name} = ?" for name in values)
        with self._told():
            self._database.execute(
                f"UPDATE {table} SET {names} WHERE id = ?", [*values.values(), number]
            )

    def _prune(self) -> None:
        """Remove the oldest rows while there are too many, or they take too much room."""
        rows = {table: self._rows(table) for table in ("stalls", "injections")}
        if max(rows.values()) <= self._bounds.rows and self._used() <= self._bounds.size:
            return
        self._database.execute("BEGIN IMMEDIATE")
        try:
            for table, count in rows.items():
                if count > self._bounds.rows:
                    self._remove_oldest(table, count - self._bounds.rows * 9 // 10)
            while self._used() > self._bounds.size and any(map(self._rows, rows)):
                for table in rows:
                    self._remove_oldest(table, max(1, self._rows(table) // 10))
            self._database.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            raise
        # As many steps as it returns rows: each gives one page back.
        self._database.execute("PRAGMA incremental_vacuum").fetchall()

    def _rows(self, table: str) -> int:
        return int(self._database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    def _remove_oldest(self, table: str, count: int) -> None:
        self._database.execute(
            f"DELETE FROM {table} WHERE id IN (SELECT id FROM {table} ORDER BY id LIMIT ?)",
            [count],
        )

    def _used(self) -> int:
        """Return how many bytes of the file are in use."""
        pages, free, size = (
            self._database.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    def close(self) -> None:
        """Let go of the file."""
        with contextlib.suppress(sqlite3.Error):
            self._database.close()


def _use_wal(database: sqlite3.Connection) -> None:
    """Have the journal write ahead.

    Two that switch a new file to that at once find it locked without waiting for each other
    (SQLite 3.40), unlike with all else.
    """
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)


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
