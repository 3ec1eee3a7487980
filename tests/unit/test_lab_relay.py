"""Does the relay read vhost-user as its specification says, and break what it was told to?"""

from __future__ import annotations

import struct

import pytest

from kickcall.lab.relay_faults import Action, Fate, FaultPlan
from kickcall.lab.vhost_user import (
    Header,
    Notification,
    SetNotifier,
    StopQueue,
    parse_header,
    parse_request,
)

KICK, CALL = Notification.KICK, Notification.CALL
VERSION, REPLY = 1, 1 | 1 << 2


def test_a_header_is_request_flags_and_size() -> None:
    assert parse_header(struct.pack("<III", 12, VERSION, 8)) == Header(12, VERSION, 8)


def test_a_size_beyond_any_message_is_refused() -> None:
    with pytest.raises(ValueError, match="claims 4294967295 bytes"):
        parse_header(struct.pack("<III", 12, VERSION, 0xFFFF_FFFF))


@pytest.mark.parametrize(
    ("request_id", "payload", "meaning"),
    [
        (12, struct.pack("<Q", 3), SetNotifier(KICK, 3, True)),
        (13, struct.pack("<Q", 3), SetNotifier(CALL, 3, True)),
        # Bit 8: no fd comes, the queue is polled.
        (13, struct.pack("<Q", 3 | 1 << 8), SetNotifier(CALL, 3, False)),
        (11, struct.pack("<II", 7, 0), StopQueue(7)),
        (1, b"", None),
    ],
)
def test_messages_about_notifications_are_understood(
    request_id: int, payload: bytes, meaning: object
) -> None:
    assert parse_request(Header(request_id, VERSION, len(payload)), payload) == meaning


def test_a_reply_is_no_request() -> None:
    assert parse_request(Header(11, REPLY, 8), struct.pack("<II", 7, 0)) is None


def test_a_message_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="only 4 bytes"):
        parse_request(Header(12, VERSION, 4), b"\0\0\0\0")


def test_without_faults_everything_passes_and_is_counted() -> None:
    plan = FaultPlan()
    assert [plan.arrived(KICK, 0).action for _ in range(2)] == [Action.PASS] * 2
    assert plan.report() == [
        {
            "queue": 0,
            "event": "kick",
            "passed": 2,
            "dropped": 0,
            "delayed": 0,
            "doubled": 0,
            "pending": 0,
        }
    ]


def test_only_the_next_n_of_that_queue_and_event_are_dropped() -> None:
    plan = FaultPlan()
    plan.add(KICK, 1, Fate(Action.DROP), count=2)
    assert plan.arrived(KICK, 0).action is Action.PASS
    assert plan.arrived(CALL, 1).action is Action.PASS
    assert [plan.arrived(KICK, 1).action for _ in range(3)] == [
        Action.DROP,
        Action.DROP,
        Action.PASS,
    ]


def test_a_fault_of_any_queue_takes_whichever_comes_first() -> None:
    plan = FaultPlan()
    plan.add(CALL, None, Fate(Action.DROP), count=1)
    assert plan.pending(CALL, None) == 1
    assert plan.arrived(CALL, 5).action is Action.DROP
    assert plan.arrived(CALL, 5).action is Action.PASS
    assert [row["queue"] for row in plan.report()] == [5]


def test_faults_happen_in_the_order_in_which_they_were_asked_for() -> None:
    plan = FaultPlan()
    plan.add(KICK, 0, Fate(Action.DOUBLE), count=1)
    plan.add(KICK, 0, Fate(Action.DELAY, 0.5), count=1)
    fates = [plan.arrived(KICK, 0) for _ in range(3)]
    assert fates == [Fate(Action.DOUBLE), Fate(Action.DELAY, 0.5), Fate(Action.PASS)]
    (row,) = plan.report()
    assert (row["passed"], row["doubled"], row["delayed"]) == (3, 1, 1)


def test_faults_that_were_cleared_do_not_happen() -> None:
    plan = FaultPlan()
    plan.add(KICK, 0, Fate(Action.DROP), count=9)
    plan.clear()
    assert plan.arrived(KICK, 0).action is Action.PASS
