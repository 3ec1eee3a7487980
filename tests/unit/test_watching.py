"""Are the histories of a watch those that every look at every queue would give?

Also: who may heal a machine, and what does a watcher that comes back remember?
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kickcall.diagnose.states import QueueFixed, QueueRole, Sample
from kickcall.diagnose.track import advance, start
from kickcall.diagnosis import Watch
from kickcall.model import BackendKind, Layout
from kickcall.vmm.sampler import Look
from kickcall.watch import lock
from kickcall.watch.book import Book
from kickcall.watch.daemon import Daemon
from kickcall.watch.healer import Healer, recall
from kickcall.watch.lock import HealLock
from kickcall.watch.policy import Queue, Rules
from kickcall.watch.rows import InjectionRow
from kickcall.watch.settings import Settings
from witness import until

if TYPE_CHECKING:
    from pathlib import Path

    from kickcall.vmm.sampler import Sampler

FIXED = QueueFixed(
    "/machine/peripheral/blk0", 0, 8, Layout.SPLIT, True, BackendKind.QEMU, QueueRole.REQUEST,
    calls_when_idle=True,
)  # fmt: skip
REST = Sample(0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class PlayedSampler:
    """Gives the samples of a story, and tells of each look what moved and what waits."""

    def __init__(self, story: list[list[Sample]]) -> None:
        self.story = story
        self.queues = (FIXED,) * len(story[0])
        self.devices = self.queues
        self.at = -1

    def sample(self) -> list[Sample]:
        self.at += 1
        return self.story[self.at]

    def look(self) -> Look:
        before = self.story[self.at]
        now = self.sample()
        moved = [
            number
            for number, (was, one) in enumerate(zip(before, now, strict=True))
            if replace(was, at=0.0) != replace(one, at=0.0)
        ]
        waiting = [
            number
            for number, one in enumerate(now)
            if one.avail_idx != one.used_idx or one.used_event != one.used_idx or one.kick_count
        ]
        return Look(now[0].at, tuple(moved), tuple(waiting))

    def latest(self, number: int) -> Sample:
        return self.story[self.at][number]


@st.composite
def stories(draw: st.DrawFn) -> list[list[Sample]]:
    """What three queues do: publish, fetch, complete, reap, be kicked, or rest."""
    now = [REST] * 3
    story = [list(now)]
    for at in range(1, draw(st.integers(2, 25))):
        for number in range(3):
            one = replace(now[number], at=float(at))
            assert one.avail_idx is not None
            match draw(st.sampled_from(["rest", "rest", "publish", "take", "finish", "reap"])):
                case "publish":
                    one = replace(one, avail_idx=one.avail_idx + 1, kick_count=1)
                case "take":
                    one = replace(one, last_avail_idx=one.avail_idx, kick_count=0)
                case "finish":
                    one = replace(one, used_idx=one.last_avail_idx, avail_event=one.avail_idx)
                case "reap":
                    one = replace(one, used_event=one.used_idx)
            now[number] = one
        story.append(list(now))
    return story


@given(stories())
def test_a_queue_at_rest_has_the_history_that_every_look_would_have_given(
    story: list[list[Sample]],
) -> None:
    watch = Watch(cast("Sampler", PlayedSampler(story)))
    eager = [start(sample) for sample in story[0]]
    for samples in story[1:]:
        active = watch.look()
        eager = [advance(one, new, FIXED) for one, new in zip(eager, samples, strict=True)]
        for number in active:
            # How often a queue at rest was looked at is the only thing that is not counted.
            assert without_looks(watch.track(number)) == without_looks(eager[number])
    assert [without_looks(one) for one in watch.tracks] == [without_looks(one) for one in eager]


def without_looks(track: Any) -> Any:
    return replace(track, device_looks=0, driver_looks=0)


def test_a_queue_that_is_settled_is_left_out_until_it_moves() -> None:
    waits = replace(REST, avail_idx=1)
    moves = replace(REST, avail_idx=2)
    seen = [REST, waits, waits, waits, moves]
    story = [[replace(one, at=float(at))] for at, one in enumerate(seen)]
    watch = Watch(cast("Sampler", PlayedSampler(story)))
    assert watch.look() == [0]
    assert watch.look() == [0]
    watch.settle(0)
    assert watch.look() == []
    assert watch.look() == [0]


# --- one healer ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lock, "runtime_folder", lambda: tmp_path / "run")
    return tmp_path / "run"


def test_one_watcher_at_a_time_may_heal_a_machine(folder: Path) -> None:
    first = HealLock.take(1, 2)
    assert first is not None
    assert HealLock.take(1, 2) is None
    other = HealLock.take(1, 3)
    assert other is not None
    first.close()
    second = HealLock.take(1, 2)
    assert second is not None
    second.close()
    other.close()
    assert list(folder.iterdir()) == []


def test_a_healer_that_is_killed_gives_the_right_back(folder: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time, pathlib\n"
            "from kickcall.watch import lock\n"
            "lock.runtime_folder = lambda: pathlib.Path(sys.argv[1])\n"
            "held = lock.HealLock.take(1, 2)\n"
            "print(held is not None, flush=True)\n"
            "time.sleep(60)\n",
            str(folder),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    assert HealLock.take(1, 2) is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    taken = HealLock.take(1, 2)
    assert taken is not None
    taken.close()


def test_a_folder_that_others_may_write_to_holds_no_locks(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(PermissionError):
        HealLock.take(1, 2)


# --- what is remembered ---


def row(at: float, outcome: str | None, helped: bool | None, by: str = "kickcall watch") -> Any:
    fields = dict.fromkeys(InjectionRow.__slots__)
    named = {"pid": 1, "start_time": 2, "device": "d", "queue": 0, "by_command": by}
    return SimpleNamespace(**{**fields, **named, "at": at, "outcome": outcome, "helped": helped})


def test_a_watcher_that_comes_back_remembers_what_was_injected() -> None:
    rules, which = Rules(), Queue(1, 2, "d", 0)
    state = recall([row(1000.0, "ok", True), row(1010.0, None, None)], rules, -900.0, 110.5)
    assert state.queues[which].times == (100.0, 110.0)
    assert state.queues[which].failures == 1
    assert state.pending == frozenset()
    assert state.host.failures == 0


def test_what_was_refused_or_done_by_hand_is_no_injection_of_the_watchers() -> None:
    rows = [row(1.0, "refused", None), row(2.0, "ok", None, by="kickcall kick")]
    assert recall(rows, Rules(), 0.0, 10.0).queues == {}


def test_a_clock_that_was_set_back_makes_no_injection_of_the_future() -> None:
    state = recall([row(5000.0, "ok", True)], Rules(), 0.0, 10.0)
    assert state.host.times == (10.0,)


# --- the loop ---


class Greedy:
    """A machine whose every look takes longer than what lies between two of them."""

    came = False
    state = "watched"
    due = 0.0

    def look(self) -> bool:
        time.sleep(0.002)
        self.due = time.monotonic()
        return False

    def close(self, *, gone: bool) -> None:
        pass


def test_a_loop_with_more_to_look_at_than_time_still_hears_of_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book, pulses, done = Book(tmp_path / "journal.db", print), list[float](), list[str]()
    healer = Healer(book, Rules(), enabled=False)
    daemon = Daemon([], Settings(), healer, print, pulse=lambda: pulses.append(time.monotonic()))
    monkeypatch.setattr(daemon, "_scan", lambda: None)
    for _ in range(3):
        daemon._schedule(cast("Any", Greedy()))
    daemon.soon(lambda: done.append("obeyed"))
    running = threading.Thread(target=daemon.run, daemon=True)
    running.start()
    until(lambda: done and len(pulses) > 3, "the loop obeys, and pulses go on")
    daemon.stop()
    running.join(20)
    assert not running.is_alive()
    assert done == ["obeyed"]
    book.close()
