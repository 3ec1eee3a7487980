"""Does the watcher say why a domain went, whichever comes first: the word or the end?"""

from __future__ import annotations

import os
import queue
from typing import TYPE_CHECKING

from kickcall.host.processes import start_time
from kickcall.model import Domain, Machine, MonitorAddress
from kickcall.vmm.domain_events import DomainEvent, Turn
from kickcall.watch.domains import Domains

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

DOMAIN = Domain("web", "9728432e", MonitorAddress("/m", "/m"))
ENDED = Machine(2**22 + 1, 99, "web", "", (), (), DOMAIN)
KEY = (ENDED.pid, ENDED.start_time)
MIGRATED = DomainEvent(Turn.WENT, "web", "9728432e", "it migrated away", KEY)


class Loop:
    """A watcher's loop that the test turns by hand, and what was said in it."""

    def __init__(self) -> None:
        self.work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.said: list[str] = []
        self.scans = 0
        self.rebooted: list[tuple[int, int]] = []
        self.domains = Domains(self.work.put, self.came, self.rebooted.append)

    def came(self) -> None:
        self.scans += 1

    def turn(self) -> None:
        self.work.get(timeout=5.0)()

    def followed(self) -> None:
        self.domains._followed.add(KEY)


def test_the_word_may_come_before_the_end() -> None:
    loop = Loop()
    loop.followed()
    loop.domains._heard(MIGRATED)
    loop.domains.farewell(ENDED, "it ended", loop.said.append)
    assert loop.said == ["it migrated away"]


def test_the_word_may_come_after_the_end() -> None:
    loop = Loop()
    loop.followed()
    loop.domains.farewell(ENDED, "it ended", loop.said.append)
    assert loop.said == []
    loop.domains._heard(MIGRATED)
    assert loop.said == ["it migrated away"]
    loop.domains._heard(MIGRATED)
    assert loop.said == ["it migrated away"]


def test_a_migration_that_failed_at_last_is_no_reason() -> None:
    loop = Loop()
    loop.followed()
    loop.domains._heard(DomainEvent(Turn.LEAVES, "web", "9728432e", "it migrated away", KEY))
    loop.domains._heard(DomainEvent(Turn.STAYS, "web", "9728432e", "", KEY))
    loop.domains.farewell(ENDED, "it ended", loop.said.append)
    loop.domains._heard(DomainEvent(Turn.WENT, "web", "9728432e", "it was destroyed", KEY))
    assert loop.said == ["it was destroyed"]


def test_without_a_word_it_is_said_a_little_later_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kickcall.watch.domains._WHY_S", 0.01)
    loop = Loop()
    loop.followed()
    loop.domains.farewell(ENDED, "it ended", loop.said.append)
    loop.turn()
    loop.domains._heard(MIGRATED)
    assert loop.said == ["it ended"]


def test_a_machine_that_is_no_domain_or_still_runs_is_not_waited_for() -> None:
    loop = Loop()
    loop.domains.farewell(ENDED, "it ended", loop.said.append)
    started = start_time(os.getpid())
    assert started is not None
    runs = Machine(os.getpid(), started, "web", "", (), (), DOMAIN)
    loop.domains._followed.add((runs.pid, runs.start_time))
    loop.domains.farewell(runs, "it is not to be watched any more", loop.said.append)
    assert loop.said == ["it ended", "it is not to be watched any more"]


def test_who_waits_when_the_watcher_ends_is_told() -> None:
    loop = Loop()
    loop.followed()
    loop.domains.farewell(ENDED, "it ended", loop.said.append)
    loop.domains.close("it ended")
    assert loop.said == ["it ended"]


def test_a_start_is_looked_for_and_a_reboot_is_told() -> None:
    loop = Loop()
    loop.domains._heard(DomainEvent(Turn.CAME, "other", "1"))
    loop.domains._heard(DomainEvent(Turn.REBOOTED, "web", "9728432e", "", KEY))
    loop.domains._heard(DomainEvent(Turn.REBOOTED, "unwatched", "2"))
    loop.domains._heard(DomainEvent(Turn.OTHER, "web", "9728432e", "", KEY))
    assert (loop.scans, loop.rebooted) == (1, [KEY])
