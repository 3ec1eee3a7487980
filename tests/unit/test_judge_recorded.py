"""What is a stall called where the kernel counted the kicks and the calls?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from judging import WELL, V, blk, packed, says, split, verdict
from kickcall.model import BackendKind, DeviceEvent, Layout, VerdictKind

if TYPE_CHECKING:
    from kickcall.diagnose.states import (
        QueueFixed,
        Sample,
        SlowFacts,
    )

BEFORE = 0.3
REST = split(10, 10, 10, avail_event=10, used_event=10)
WORK = split(11, 10, 10, avail_event=10, used_event=10)
REST_PACKED = packed(10, 10, 10, avail_event=10, used_event=10)
WORK_PACKED = packed(11, 10, 10, avail_event=10, used_event=10)
DONE = split(11, 11, 11, avail_event=11, used_event=10)
DONE_PACKED = packed(11, 11, 11, avail_event=11, used_event=10)


def recorded(**at: float | None) -> SlowFacts:
    return replace(WELL, at=9.0, recorded_since=0.0, **at)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fixed", "rest", "work"),
    [
        pytest.param(blk(), REST, WORK, id="split"),
        pytest.param(blk(Layout.PACKED), REST_PACKED, WORK_PACKED, id="packed"),
        pytest.param(
            blk(backend=BackendKind.VHOST_KERNEL), replace(REST, last_avail_idx=None),
            replace(WORK, last_avail_idx=None), id="vhost",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("kicked_at", "expected"),
    [
        pytest.param(None, (V.LOST_KICK, 3), id="never kicked"),
        pytest.param(0.1, (V.LOST_KICK, 3), id="kicked for what was before"),
        pytest.param(0.25, (V.KICK_UNREAD, 4), id="kicked between the two looks"),
        pytest.param(0.6, (V.KICK_UNREAD, 4), id="kicked since"),
    ],
)
def test_a_kick_that_the_kernel_saw_was_lost_behind_its_notifier(
    fixed: QueueFixed,
    rest: Sample,
    work: Sample,
    kicked_at: float | None,
    expected: tuple[VerdictKind, int],
) -> None:
    slow = recorded(kicked_at=kicked_at)
    said = verdict(fixed, (BEFORE, rest), (1.0, work), slow=slow)
    assert (says(said), said.event) == (expected, DeviceEvent.KICK)
    seen = {one.what: one.value for one in said.evidence}["last kick that the kernel saw"]
    assert seen == ("none yet" if kicked_at is None else f"{9.0 - kicked_at:.3f} s ago")


def test_a_kick_between_two_looks_tells_nothing_where_the_device_took_one_meanwhile() -> None:
    was = split(11, 10, 10, avail_event=11, used_event=10)
    work = split(12, 11, 11, avail_event=11, used_event=11)
    said = verdict(blk(), (BEFORE, was), (1.0, work), slow=recorded(kicked_at=0.25))
    assert says(said) == (V.LOST_KICK, 3)


def test_without_the_event_index_a_missing_kick_is_lost_and_a_seen_one_tells_nothing() -> None:
    fixed = blk(event_idx=False, backend=BackendKind.VHOST_USER)
    seen = ((BEFORE, split(10, 10)), (1.0, split(11, 10)))
    assert says(verdict(fixed, *seen, slow=recorded(kicked_at=None))) == (V.LOST_KICK, 3)
    assert says(verdict(fixed, *seen, slow=recorded(kicked_at=0.6))) == (V.UNKNOWN, 0)
    late = replace(recorded(kicked_at=None), recorded_since=0.6)
    assert says(verdict(fixed, *seen, slow=late)) == (V.UNKNOWN, 0)


@pytest.mark.parametrize(
    ("fixed", "rest", "done"),
    [
        pytest.param(blk(), WORK, DONE, id="split"),
        pytest.param(blk(Layout.PACKED), WORK_PACKED, DONE_PACKED, id="packed"),
    ],
)
@pytest.mark.parametrize(
    ("called_at", "hop"),
    [
        pytest.param(None, 8, id="never called"),
        pytest.param(0.1, 8, id="called for what was before"),
        pytest.param(0.25, 9, id="called between the two looks"),
        pytest.param(0.6, 9, id="called since"),
    ],
)
def test_a_call_that_the_kernel_saw_was_lost_behind_its_notifier(
    fixed: QueueFixed, rest: Sample, done: Sample, called_at: float | None, hop: int
) -> None:
    said = verdict(fixed, (BEFORE, rest), (1.0, done), slow=recorded(called_at=called_at))
    assert (says(said), said.event) == ((V.LOST_CALL, hop), DeviceEvent.CALL)


def test_a_request_that_was_published_and_done_between_two_looks_has_a_call_of_its_own() -> None:
    was = split(10, 10, 10, avail_event=10, used_event=10)
    done = split(11, 11, 11, avail_event=11, used_event=10)
    seen = ((BEFORE, was), (1.0, done))
    assert says(verdict(blk(), *seen, slow=recorded(called_at=0.25))) == (V.LOST_CALL, 9)
    assert says(verdict(blk(), *seen, slow=recorded(called_at=None))) == (V.LOST_CALL, 8)


def test_a_call_between_two_looks_tells_nothing_where_the_driver_reaped_meanwhile() -> None:
    was = split(11, 10, 11, avail_event=11, used_event=10)
    done = split(12, 12, 12, avail_event=12, used_event=11)
    said = verdict(blk(), (BEFORE, was), (1.0, done), slow=recorded(called_at=0.25))
    assert says(said) == (V.LOST_CALL, 8)
