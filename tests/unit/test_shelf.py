"""Are the watcher's bundles bounded in number and size, whatever machines are called?"""

from __future__ import annotations

import os
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from incident_facts import verdict
from kickcall.incident.seen import Seen
from kickcall.incident.shelf import Bounds, Shelf, Written
from kickcall.model import Machine
from nasty import NASTY

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Above what Linux gives to any process (pid_max, proc(5)): nobody has it.
NOBODY = 1 << 23


def machine(name: str = "vm0") -> Machine:
    return Machine(NOBODY, 1, name, "7.2.22", (), ("qemu-system-x86_64",))


class Told:
    """What a shelf told."""

    def __init__(self) -> None:
        self.all: list[Written] = []
        self._arrived = threading.Condition()

    def __call__(self, written: Written) -> None:
        with self._arrived:
            self.all.append(written)
            self._arrived.notify_all()

    def wait(self, count: int) -> None:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.all) >= count, 60), self.all


def nothing() -> Seen:
    return Seen()


def put(folder: Path, key: str, *, ago_s: float, size: int = 10) -> Path:
    made = datetime.fromtimestamp(time.time() - ago_s, UTC)
    path = folder / f"{made:%Y%m%dT%H%M%SZ}-vm0-vub0-q0-{key}.tar.gz"
    path.write_bytes(bytes(size))
    return path


@pytest.fixture
def offers(tmp_path: Path) -> Callable[..., list[bool]]:
    """Offer stalls to a shelf that is busy with the first of them, and return which it takes."""

    def offer(*stalls: tuple[str, int], bounds: Bounds) -> list[bool]:
        shelf = Shelf(tmp_path, Told(), bounds=bounds)
        try:
            return [
                shelf.offer(machine(name), verdict("vub0", queue=queue), nothing)
                for name, queue in stalls
            ]
        finally:
            shelf.close()

    return offer


def test_a_queue_gets_so_many_a_day_and_others_theirs(offers: Callable[..., list[bool]]) -> None:
    bounds = Bounds(queue=2, host=100, waiting=100)
    stalls = [("vm0", 0), ("vm0", 0), ("vm0", 0), ("vm0", 1), ("vm1", 0)]
    assert offers(*stalls, bounds=bounds) == [True, True, False, True, True]


def test_the_host_gets_so_many_a_day(offers: Callable[..., list[bool]]) -> None:
    stalls = [("vm0", queue) for queue in range(5)]
    assert offers(*stalls, bounds=Bounds(host=3, waiting=100)) == [True] * 3 + [False] * 2


def test_what_would_wait_too_long_is_not_taken(offers: Callable[..., list[bool]]) -> None:
    stalls = [("vm0", queue) for queue in range(5)]
    assert offers(*stalls, bounds=Bounds(waiting=2))[2:] == [False] * 3


def test_a_shelf_that_is_opened_anew_counts_what_is_there(tmp_path: Path) -> None:
    first = Shelf(tmp_path, told := Told(), bounds=Bounds(queue=1))
    assert first.offer(machine(), verdict("vub0"), nothing)
    told.wait(1)
    first.close()
    # Its process found no such machine, so nothing is there. Had there been one:
    assert told.all[0].path is None
    assert "there is no process" in told.all[0].why
    assert os.listdir(tmp_path) == []
    key = "0123456789ab"
    for ago_s, expected in ((3600.0, False), (2 * 86400.0, True)):
        put(tmp_path, key, ago_s=ago_s)
        shelf = Shelf(tmp_path, Told(), bounds=Bounds(host=1))
        assert shelf.offer(machine(), verdict("vub0"), nothing) is expected
        shelf.close()
        for left in tmp_path.iterdir():
            left.unlink()


def test_the_oldest_go_where_there_are_too_many_bytes(tmp_path: Path) -> None:
    old = put(tmp_path, "000000000000", ago_s=3000, size=600)
    new = put(tmp_path, "111111111111", ago_s=2000, size=600)
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    shelf = Shelf(tmp_path, told := Told(), bounds=Bounds(size=1000))
    assert shelf.offer(machine(), verdict("vub0"), nothing)
    told.wait(1)
    shelf.close()
    assert not old.exists()
    assert new.exists()
    assert other.exists()


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    shelf = Shelf(tmp_path, told := Told())
    assert shelf.offer(machine(), verdict("vub0"), nothing)
    told.wait(1)
    shelf.close()
    assert "others may write to it" in told.all[0].why


def test_what_was_seen_and_cannot_be_taken_costs_nothing_else(tmp_path: Path) -> None:
    def gone() -> Seen:
        raise OSError("it went away")

    shelf = Shelf(tmp_path, told := Told())
    assert shelf.offer(machine(), verdict("vub0"), gone)
    told.wait(1)
    shelf.close()
    assert "there is no process" in told.all[0].why


def test_a_nasty_name_leads_nowhere(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, Told(), bounds=Bounds(host=1000, waiting=1000))
    taken = [shelf.offer(machine(name), verdict(name), nothing) for name in NASTY]
    shelf.close()
    assert all(taken)
    assert all(path.parent == tmp_path for path in tmp_path.rglob("*"))
