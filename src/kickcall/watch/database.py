"""Where is the journal's file, who else may use it, and how large does it grow?

SQLite in WAL mode with `synchronous=FULL`: a commit survives power loss. Several processes may
write to one file.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kickcall.errors import KickcallError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SCHEMA: Final = 1
ENVIRONMENT: Final = "KICKCALL_JOURNAL"
_ROOTS: Final = Path("/var/lib/kickcall/journal.db")
_BUSY_S: Final = 2.0
"""How long another process may hold the journal."""
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


class Database:
    """The file at `path`, made where there is none. For the one thread that opened it.

    Every method raises JournalError where the file cannot be read or written.
    """

    def __init__(self, path: Path, bounds: Bounds, *, reading: bool) -> None:
        self.path = path
        self._bounds = bounds
        self._written = 0
        with self._told():
            self.connection = self._open_to_read() if reading else self._open()

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

    def latest(
        self,
        table: str,
        when: str,
        where: str,
        values: Sequence[object],
        machine: str | None,
        limit: int,
    ) -> list[dict[str, Any]]:
        """Return the latest `limit` rows for which `where` holds, oldest by `when` first."""
        if machine is not None:
            where, values = f"{where} AND machine = ?", [*values, machine]
        with self._told():
            if not self._check_version(self.connection):
                return []
            found = self.connection.execute(
                f"SELECT * FROM {table} WHERE {where} ORDER BY {when} DESC, id DESC LIMIT ?",
                [*values, limit],
            )
            names = [column[0] for column in found.description]
            return [dict(zip(names, row, strict=True)) for row in found][::-1]

    def insert(self, table: str, **values: object) -> int:
        """Add a row and return its number."""
        names = ", ".join(values)
        marks = ", ".join("?" * len(values))
        with self._told():
            done = self.connection.execute(
                f"INSERT INTO {table} ({names}) VALUES ({marks})", list(values.values())
            )
            number = done.lastrowid
            assert number is not None
            self._written += 1
            if self._written % _PRUNE_EVERY == 1:
                self._prune()
        return number

    def update(self, table: str, number: int, **values: object) -> None:
        """Change some of a row's values."""
        names = ", ".join(f"{name} = ?" for name in values)
        with self._told():
            self.connection.execute(
                f"UPDATE {table} SET {names} WHERE id = ?", [*values.values(), number]
            )

    def _prune(self) -> None:
        """Remove the oldest rows while there are too many, or they take too much room."""
        rows = {table: self._rows(table) for table in ("stalls", "injections")}
        if max(rows.values()) <= self._bounds.rows and self._used() <= self._bounds.size:
            return
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            for table, count in rows.items():
                if count > self._bounds.rows:
                    self._remove_oldest(table, count - self._bounds.rows * 9 // 10)
            while self._used() > self._bounds.size and any(map(self._rows, rows)):
                for table in rows:
                    self._remove_oldest(table, max(1, self._rows(table) // 10))
            self.connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.connection.execute("ROLLBACK")
            raise
        # As many steps as it returns rows: each gives one page back.
        self.connection.execute("PRAGMA incremental_vacuum").fetchall()

    def _rows(self, table: str) -> int:
        return int(self.connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    def _remove_oldest(self, table: str, count: int) -> None:
        self.connection.execute(
            f"DELETE FROM {table} WHERE id IN (SELECT id FROM {table} ORDER BY id LIMIT ?)",
            [count],
        )

    def _used(self) -> int:
        """Return how many bytes of the file are in use."""
        pages, free, size = (
            self.connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    def close(self) -> None:
        """Let go of the file."""
        with contextlib.suppress(sqlite3.Error):
            self.connection.close()


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
