"""Is the journal whole, whatever happens to who writes it, bounded, and readable?"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from kickcall.cli import main
from kickcall.errors import KickcallError
from kickcall.model import (
    Counters,
    DeviceEvent,
    Evidence,
    Injection,
    Machine,
    Verdict,
    VerdictKind,
    Via,
)
from kickcall.watch import database
from kickcall.watch.database import SCHEMA, Bounds, JournalError, default_path
from kickcall.watch.journal import Journal
from kickcall.watch.rows import Who
from kickcall.watch.witness import JournalWitness

if TYPE_CHECKING:
    from pathlib import Path

KILLS = int(os.environ.get("KICKCALL_KILLS", "4"))
VM0 = Machine(4711, 99, "vm0", "", (), ())
VM1 = Machine(4712, 99, "vm1", "", (), ())
ME = Who(0, 12, "kickcall kick")


def injection(**other: object) -> Injection:
    fields = {
        "machine": "vm0",
        "device": "/machine/peripheral/vub0",
        "queue": 3,
        "event": DeviceEvent.KICK,
        "via": Via.EVENTFD,
        "eventfd_id": 42,
        "before": Counters(0, 5, 4),
        "after": Counters(0, 5, 5),
        "target": "eventfd 42",
    }
    return Injection(**{**fields, **other})  # type: ignore[arg-type]


def verdict(kind: VerdictKind = VerdictKind.LOST_KICK, values: int = 1) -> Verdict:
    evidence = tuple(Evidence("avail.idx", number, 1.5) for number in range(values))
    return Verdict("/machine/peripheral/vub0", 3, kind, 3, 0.2, evidence, "")


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "folder" / "journal.db")


def test_an_intent_without_an_outcome_is_an_unknown_one(journal: Journal) -> None:
    journal.intend(VM0, injection(), ME, at=100.0)
    (row,) = journal.injections()
    assert (row.machine, row.pid, row.start_time) == ("vm0", 4711, 99)
    assert (row.device, row.queue, row.event, row.via) == (
        "/machine/peripheral/vub0",
        3,
        "kick",
        "eventfd",
    )
    assert (row.by_uid, row.by_pid, row.by_command) == (0, 12, "kickcall kick")
    assert (row.at, row.outcome, row.helped) == (100.0, None, None)
    assert (row.count_before, row.avail_before, row.used_before) == (0, 5, 4)
    assert row.used_after is None


def test_an_outcome_is_added_to_its_intent(journal: Journal) -> None:
    done, refused, unsure = (journal.intend(VM0, injection(), ME) for _ in range(3))
    journal.done(done, injection(), at=101.0)
    journal.watched(done, True)
    journal.failed(refused, "it was reset", maybe_written=False)
    journal.failed(unsure, "no answer", maybe_written=True)
    rows = {row.id: row for row in journal.injections()}
    assert (rows[done].outcome, rows[done].done_at, rows[done].used_after) == ("ok", 101.0, 5)
    assert rows[done].helped is True
    assert (rows[refused].outcome, rows[refused].error) == ("refused", "it was reset")
    assert rows[unsure].outcome == "unknown"


def test_a_stall_lasts_until_it_is_ended(journal: Journal) -> None:
    number = journal.stalled(VM0, verdict(), 100.0, (7, 8))
    journal.became(number, verdict(VerdictKind.DEVICE_STUCK))
    (row,) = journal.open_stalls()
    assert (row.verdict, row.began, row.ended) == ("device-stuck", 100.0, None)
    assert row.evidence == [{"what": "avail.idx", "value": 0, "at": 1.5}]
    journal.ended(number, "it moved", at=103.0)
    assert journal.open_stalls() == []
    assert journal.stalls()[0].ending == "it moved"


def test_what_is_asked_for_is_what_is_told(journal: Journal) -> None:
    for at in (10.0, 20.0, 30.0):
        journal.intend(VM0, injection(), ME, at=at)
        journal.intend(VM1, injection(), ME, at=at)
    assert [row.at for row in journal.injections(machine="vm1")] == [10.0, 20.0, 30.0]
    assert [row.at for row in journal.injections(since=15.0, machine="vm0")] == [20.0, 30.0]
    assert [row.at for row in journal.injections(limit=2)] == [30.0, 30.0]
    lasting = journal.stalled(VM0, verdict(), 5.0, (7, 8))
    over = journal.stalled(VM0, verdict(), 5.0, (7, 8))
    journal.ended(over, "", at=6.0)
    assert [row.id for row in journal.stalls(since=15.0)] == [lasting]


def test_a_count_that_sqlite_cannot_hold_is_kept_as_the_largest_it_can(journal: Journal) -> None:
    journal.intend(VM0, injection(before=Counters(2**64 - 2, None, None)), ME)
    assert journal.injections()[0].count_before == 2**63 - 1


def test_a_journal_is_bounded_in_rows_and_the_oldest_go(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.db", bounds=Bounds(rows=50))
    for at in range(200):
        journal.intend(VM0, injection(), ME, at=float(at))
    kept = [row.at for row in journal.injections()]
    assert 45 <= len(kept) <= 50 + 64
    assert kept == [float(at) for at in range(200 - len(kept), 200)]


def test_a_journal_is_bounded_in_bytes_and_gives_room_back(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    journal = Journal(path, bounds=Bounds(size=1 << 19))
    for at in range(150):
        # 16 KiB of evidence at most, however much there is.
        journal.stalled(VM0, verdict(values=1_000), float(at), (7, 8))
    journal.close()
    # The size is looked at every 64 rows.
    assert path.stat().st_size < (1 << 19) + 64 * (20 << 10)
    assert Journal(path).stalls()[-1].began == 149.0


def test_the_file_is_its_users_alone(journal: Journal) -> None:
    journal.intend(VM0, injection(), ME)
    for path in journal.path.parent.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path
    assert journal.path.parent.stat().st_mode & 0o777 == 0o700


def test_two_may_write_to_one_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j.db"
    monkeypatch.setattr(database, "_BUSY_S", 60.0)  # nobody is first in line, and disks may be slow

    def write() -> None:
        journal = Journal(path)
        for _ in range(15):
            journal.intend(VM0, injection(), ME)
        journal.close()

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(Journal(path).injections()) == 45


def test_a_newer_journal_is_left_alone(journal: Journal) -> None:
    with sqlite3.connect(journal.path) as other:
        other.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    with pytest.raises(JournalError, match="written by a newer kickcall"):
        Journal(journal.path)


def test_what_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    path.write_text("something else, and longer than a header of SQLite's is: " * 40)
    before = path.read_bytes()
    with pytest.raises(JournalError, match="not a database"):
        Journal(path)
    assert path.read_bytes() == before


def test_a_reader_makes_no_journal(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="there is no journal"):
        Journal(tmp_path / "j.db", reading=True)
    assert not (tmp_path / "j.db").exists()


def test_each_user_has_a_journal_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KICKCALL_JOURNAL")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert str(default_path()) == "/state/kickcall/journal.db"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert str(default_path()) == "/var/lib/kickcall/journal.db"


WRITER = """
import sys
from kickcall.model import *
from kickcall.watch.journal import Journal
from kickcall.watch.rows import Who
journal = Journal()
vm = Machine(1, 2, "vm0", "", (), ())
one = Injection("vm0", "/machine/d", 0, DeviceEvent.KICK, Via.EVENTFD, 1,
                Counters(0, 1, 1), Counters(1, 1, 1))
while True:
    number = journal.intend(vm, one, Who(0, 0, "w"))
    print("intent", number, flush=True)
    journal.done(number, one)
    print("done", number, flush=True)
"""


def test_who_writes_is_killed_at_any_instant_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    said: list[tuple[str, int]] = []
    for _ in range(KILLS):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "KICKCALL_JOURNAL": str(path)},
        )
        assert writer.stdout is not None
        said.append(_word(writer.stdout.readline()))
        killer = threading.Timer(random.uniform(0.0, 0.1), writer.send_signal, [signal.SIGKILL])
        killer.start()
        said += [_word(line) for line in writer.stdout if line.endswith("\n")]
        writer.wait()
        writer.stdout.close()
    with sqlite3.connect(path) as written:
        assert written.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    outcomes = {row.id: row.outcome for row in Journal(path).injections()}
    for what, number in said:
        assert number in outcomes
        if what == "done":
            assert outcomes[number] == "ok"
    # Of each writer one intent at most has no outcome, or was not said.
    assert sum(outcome is None for outcome in outcomes.values()) <= KILLS
    assert len(outcomes) <= len({number for _, number in said}) + KILLS


def _word(line: str) -> tuple[str, int]:
    what, number = line.split()
    return what, int(number)


# --- by hand ---


def test_an_injection_by_hand_is_put_down(tmp_path: Path) -> None:
    path, warned = tmp_path / "j.db", list[str]()
    witness = JournalWitness("kickcall call", warned.append, path=path)
    witness.before(VM0, injection())
    assert Journal(path).injections()[0].outcome is None
    witness.written(injection())
    witness.before(VM0, injection())
    witness.failed(KickcallError("it was reset"), maybe_written=False)
    witness.close()
    rows = Journal(path).injections()
    assert [row.outcome for row in rows] == ["ok", "refused"]
    assert {(row.by_uid, row.by_pid, row.by_command) for row in rows} == {
        (os.geteuid(), os.getpid(), "kickcall call")
    }
    assert warned == []


def test_a_journal_that_cannot_be_written_is_one_warning_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    warned: list[str] = []
    witness = JournalWitness("kickcall kick", warned.append, path=tmp_path / "file" / "j.db")
    for _ in range(2):
        witness.before(VM0, injection())
        witness.written(injection())
    assert len(warned) == 1
    assert "not journaled" in warned[0]


def test_a_full_disk_is_one_warning_and_no_more(tmp_path: Path) -> None:
    path, warned = tmp_path / "j.db", list[str]()
    witness = JournalWitness("kickcall kick", warned.append, path=path)
    witness.before(VM0, injection())
    witness.written(injection())
    assert witness._journal is not None
    # SQLite says SQLITE_FULL at this limit as at a full disk.
    witness._journal._database.connection.execute("PRAGMA max_page_count = 1")
    while not warned:
        witness.before(VM0, injection(target="x" * 4000))
    witness.written(injection())
    assert len(warned) == 1
    assert "full" in warned[0]


# --- the command ---


def command(*arguments: str) -> str:
    result = CliRunner().invoke(main.app, ["journal", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_prints_the_newest_last(journal: Journal) -> None:
    stall = journal.stalled(VM0, verdict(), 1000.0, (7, 8))
    number = journal.intend(VM0, injection(), ME, at=1000.2, stall=stall)
    journal.done(number, injection())
    journal.watched(number, True)
    journal.ended(stall, "it moved", at=1000.25)
    journal.intend(VM1, injection(), ME, at=1001.0)
    text = command("--journal", str(journal.path))
    places = [text.index(word) for word in ("lost-kick", "helped", "unknown outcome")]
    assert places == sorted(places)
    assert "it moved after 0.25 s" in text
    assert "vm1" not in command("--journal", str(journal.path), "--machine", "vm0")
    assert "nothing in" in command(
        "--journal", str(journal.path), "--since", "1h", "--machine", "vm1"
    )


def test_the_command_prints_json(journal: Journal) -> None:
    stall = journal.stalled(VM0, verdict(), 1000.0, (7, 8))
    journal.intend(VM0, injection(), ME, at=1000.2, stall=stall)
    said = json.loads(command("--journal", str(journal.path), "--json"))
    assert said["journal"] == str(journal.path)
    first, second = said["entries"]
    assert (first["entry"], first["verdict"], first["ended"]) == ("stall", "lost-kick", None)
    assert (second["entry"], second["stall"], second["outcome"]) == ("injection", stall, "unknown")
    assert second["by"] == {"uid": 0, "pid": 12, "command": "kickcall kick"}
    assert second["before"] == {"count": 0, "avail_idx": 5, "used_idx": 4}
