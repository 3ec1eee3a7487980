"""Do counts of kicks and calls become rates of the right queues, for as long as somebody looks?

The kernel's own counting is tested where there is one that counts: tests/kvm/test_trace.py.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import PrivilegeError
from kickcall.model import DeviceEvent, NotificationCount
from kickcall.vmm.recorder import Which
from kickcall.watch import counting
from kickcall.watch.counting import Counting
from recorded import RecordedMachine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEVICE = "/machine/peripheral/blk0"
PATIENCE_S = 20.0


class Recording:
    """Counts 10 kicks of queue 1 at every look, and no call."""

    def __init__(self) -> None:
        self.looks = 0

    def counts(self) -> dict[Which, NotificationCount]:
        self.looks += 1
        totals = {
            Which(DEVICE, 1, DeviceEvent.KICK): 10 * self.looks,
            Which(DEVICE, 1, DeviceEvent.CALL): 0,
        }
        return {
            which: NotificationCount(*which, 1, total, None, ()) for which, total in totals.items()
        }

    def follow(self) -> tuple[str, ...]:
        return ()


class Attached:
    """A machine whose kernel counts, until `over`."""

    over = 0

    @contextlib.contextmanager
    def record(self) -> Iterator[Recording]:
        yield Recording()
        Attached.over += 1


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> RecordedMachine:
    monkeypatch.setattr(counting, "attach", lambda _: contextlib.nullcontext(Attached()))
    monkeypatch.setattr(counting, "_EVERY_S", 0.05)
    monkeypatch.setattr(counting, "_WANTED_S", 10 * PATIENCE_S)
    return RecordedMachine(0, 4)


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_rates_are_those_of_the_queue_that_was_kicked(machine: RecordedMachine) -> None:
    live = machine.live
    counter = Counting()
    assert counter.want(live) == ""
    # One is set after the other.
    wait_until(lambda: live.queues[1].kicks_s and live.queues[1].calls_s is not None)
    assert (live.queues[1].kicks_s or 0) <= 10 / 0.05 * 1.1
    assert live.queues[1].calls_s == 0.0
    assert live.queues[0].kicks_s is None  # it has no notifier that is counted
    counter.close()


def test_counting_ends_when_nobody_looks_any_more(
    machine: RecordedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, before = machine.live, Attached.over
    counter = Counting()
    counter.want(live)
    wait_until(lambda: live.queues[1].kicks_s)
    with monkeypatch.context() as soon:
        soon.setattr(counting, "_WANTED_S", 0.3)
        wait_until(lambda: live.queues[1].kicks_s is None)
    assert Attached.over == before + 1
    # The thread that counted ends a moment after its counts.
    wait_until(lambda: (counter.want(live), live.queues[1].kicks_s)[1])
    counter.close()
    assert Attached.over == before + 2


def test_why_it_cannot_be_counted_is_said_and_tried_again_after_a_while(
    machine: RecordedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def refuse(pid: int) -> None:
        tried.append(pid)
        raise PrivilegeError("needs root\x1b")

    monkeypatch.setattr(counting, "attach", refuse)
    counter = Counting()
    counter.want(machine.live)
    wait_until(lambda: counter.want(machine.live) == "needs root�")
    assert len(tried) == 1
    monkeypatch.setattr(counting, "_RETRY_S", 0.0)
    counter.want(machine.live)
    wait_until(lambda: (counter.want(machine.live), len(tried))[1] > 1)
    counter.close()
