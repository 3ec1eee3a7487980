"""Does a live view say of a queue what is so: how much waits, for how long, what is wrong?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kickcall.diagnose.states import QueueFixed, QueueRole, Sample
from kickcall.diagnose.track import Track, advance, start
from kickcall.draw.tones import Tone
from kickcall.model import (
    BackendKind,
    Counters,
    DeviceEvent,
    Evidence,
    Injection,
    Layout,
    Machine,
    Verdict,
    VerdictKind,
    Via,
)
from kickcall.watch.journal import Journal
from kickcall.watch.live import HISTORY, LiveQueue
from kickcall.watch.rows import Who
from kickcall.watch.timeline import Moment, timeline
from recorded import Recorded

if TYPE_CHECKING:
    from pathlib import Path

DISK = QueueFixed(
    "/machine/peripheral/blk0",
    1,
    8,
    Layout.SPLIT,
    True,
    BackendKind.QEMU,
    QueueRole.REQUEST,
    True,
)
INBOX = replace(DISK, role=QueueRole.INBOX)
MACHINE = Machine(42, 7, "vm0", "7.2", (), ())


def look(at: float, avail: int, used: int) -> Sample:
    return Sample(at, avail, used, used, 0, 0, used, used, 0, 0)


class History:
    """A queue that is looked at."""

    def __init__(self, fixed: QueueFixed = DISK, avail: int = 0, used: int = 0) -> None:
        self.track: Track = start(look(0.0, avail, used))
        self.queue = LiveQueue(0, fixed, self.track)

    def at(self, at: float, avail: int, used: int) -> LiveQueue:
        self.track = advance(self.track, look(at, avail, used), self.queue.fixed)
        self.queue.take(self.track, at)
        return self.queue


def stalled(at: float, since_s: float) -> Verdict:
    because = Evidence("because", "so", at)
    return Verdict(DISK.device, 1, VerdictKind.LOST_KICK, 3, since_s, (because,), "kick it")


def test_the_age_is_that_of_the_oldest_request_that_waits() -> None:
    history = History()
    history.at(1.0, 2, 0)
    history.at(2.0, 3, 1)
    assert history.queue.age(5.0) == 4.0  # the second of the first two waits
    history.at(6.0, 3, 2)
    assert history.queue.age(7.0) == 5.0
    assert history.at(8.0, 3, 3).age(9.0) is None


def test_what_waited_before_the_first_look_waits_at_least_since_then() -> None:
    assert History(avail=5, used=3).queue.age(2.0) == 2.0


def test_buffers_that_wait_for_what_may_come_have_no_age() -> None:
    queue = History(INBOX, avail=8).queue
    assert (queue.outstanding, queue.age(9.0), queue.kind(9.0)) == (8, None, VerdictKind.IDLE)


def test_rates_are_counted_across_the_end_of_the_index() -> None:
    history = History(avail=0xFFFE, used=0xFFFE)
    history.at(0.4, 3, 2)
    assert history.queue.tick(0.5, 0.5)
    assert (history.queue.requests_s, history.queue.completions_s) == (10.0, 8.0)
    assert list(history.queue.works) == [1]
    history.queue.tick(1.0, 0.5)
    assert history.queue.requests_s == 0.0


def test_histories_end() -> None:
    queue = History().queue
    for tick in range(3 * HISTORY):
        queue.tick(tick * 0.5, 0.5)
    assert len(queue.works) == len(queue.ages) == HISTORY


def test_a_stall_is_shown_as_soon_as_diagnose_would_call_it_one() -> None:
    queue = History().at(1.0, 1, 0)
    queue.verdict = stalled(1.2, 0.2)
    assert queue.kind(1.4) is VerdictKind.PROGRESSING
    assert queue.kind(1.5) is VerdictKind.LOST_KICK
    queue.verdict = None
    assert queue.kind(1.6) is VerdictKind.PROGRESSING


def test_a_queue_that_says_nonsense_has_no_nonsensical_counts() -> None:
    queue = History().at(1.0, 40000, 3)
    assert queue.outstanding == 0
    assert queue.age(2.0) is None


def test_a_stall_that_the_journal_has_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = Journal(path)
    journal.stalled(MACHINE, stalled(1.0, 0.5), 100.0, (1, 1))
    before, after = Counters(0, 12, 11), Counters(0, 12, 12)
    planned = Injection(
        "vm0", DISK.device, 1, DeviceEvent.KICK, Via.EVENTFD, 5, before, before, target="fd"
    )
    number = journal.intend(MACHINE, planned, Who(0, 9, "kickcall serve"), at=102.0)
    journal.done(number, replace(planned, after=after))
    journal.close()
    seen = Moment(100.4, None, True, "vm0", 42, "blk0", 1, "lost-kick", "lasts", "x", Tone.BAD)
    moments, problem = timeline(path, [seen, replace(seen, at=150.0)], since=0.0)
    assert problem == ""
    assert [(one.at, one.stall) for one in moments] == [
        (100.0, True),
        (102.0, False),
        (150.0, True),
    ]
    assert moments[1].outcome == "helped, used.idx 11 to 12"
    assert moments[1].by == "kickcall serve[9]"


def test_a_time_line_without_a_journal_tells_what_was_seen(tmp_path: Path) -> None:
    seen = Moment(100.4, None, True, "vm0", 42, "blk0", 1, "lost-kick", "lasts", "x", Tone.BAD)
    moments, problem = timeline(tmp_path / "none.db", [seen], since=0.0)
    assert moments == [seen]
    assert "there is no journal" in problem


def test_a_machine_that_nobody_looks_at_any_more_is_not_known() -> None:
    source = Recorded()
    (recorded,) = source.recorded
    at = recorded.live.looked_at
    recorded.stall(1, at)
    queue = recorded.live.queues[1]
    at = recorded.live.looked_at
    assert recorded.live.kind(queue, at + 4.0) is VerdictKind.LOST_KICK
    assert recorded.live.kind(queue, at + 6.0) is VerdictKind.UNKNOWN
    assert recorded.live.state(at + 6.0) == "not looked at for 6.0 s"
    verdict = recorded.live.verdict(queue, at + 6.0)
    assert (verdict.verdict, verdict.hop, verdict.event) == (VerdictKind.UNKNOWN, 0, None)
    assert verdict.evidence[0].value == "not looked at for 6.0 s: nothing is known"
