"""Which stall on the way of a call, or in the driver, is what was seen?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from judging import (
    DISABLE,
    ENABLE,
    WELL,
    V,
    blk,
    net_rx,
    packed,
    says,
    split,
    switched,
    thread,
    verdict,
)
from kickcall.diagnose.judge import wants_slow_facts
from kickcall.diagnose.states import (
    QueueFixed,
    Sample,
    ThreadState,
)
from kickcall.model import BackendKind, DeviceEvent, Layout, VerdictKind

UNREAPED = [
    pytest.param(blk(), split(11, 11, 11, avail_event=11, used_event=10), id="split"),
    pytest.param(
        blk(), split(65536, 65536, 65536, avail_event=65536, used_event=65535),
        id="split, past 65535",
    ),
    pytest.param(
        blk(backend=BackendKind.VHOST_KERNEL), split(11, 11, avail_event=11, used_event=10),
        id="vhost",
    ),
    pytest.param(
        blk(Layout.PACKED), packed(16, 16, 16, avail_event=16, used_event=15), id="packed"
    ),
    pytest.param(net_rx(), split(18, 12, 12, avail_event=12, used_event=11), id="net RX"),
]  # fmt: skip


@pytest.mark.parametrize(("fixed", "sample"), UNREAPED)
def test_work_that_is_done_and_not_reaped_has_lost_its_call(
    fixed: QueueFixed, sample: Sample
) -> None:
    said = verdict(fixed, (1.0, sample))
    assert says(said) == (V.LOST_CALL, 8)
    assert said.event is DeviceEvent.CALL
    assert said.remedy == "kickcall call vm0 blk0 --queue 0"
    assert not verdict(fixed, (0.4, sample)).verdict.stalled


@pytest.mark.parametrize(("fixed", "sample"), UNREAPED)
@pytest.mark.parametrize(
    ("switches", "said"),
    [
        ({"vector_masked": True}, (V.INTERRUPT_BLOCKED, 9)),
        ({"function_masked": True}, (V.INTERRUPT_BLOCKED, 9)),
        ({"bus_master": False}, (V.INTERRUPT_BLOCKED, 9)),
        ({"msix_enabled": False, "vector": None}, (V.INTERRUPT_BLOCKED, 9)),
        ({"msix_enabled": False, "intx_disabled": False}, (V.LOST_CALL, 8)),
        ({"vector_pending": True}, (V.LOST_CALL, 9)),
    ],
)
def test_a_call_that_does_not_arrive_is_traced_further(
    fixed: QueueFixed, sample: Sample, switches: dict[str, Any], said: tuple[VerdictKind, int]
) -> None:
    assert says(verdict(fixed, (1.0, sample), slow=switched(**switches))) == said


@pytest.mark.parametrize(("fixed", "sample"), UNREAPED)
def test_a_driver_whose_processor_is_stopped_is_stuck(fixed: QueueFixed, sample: Sample) -> None:
    slow = replace(WELL, vcpu_threads=(thread(ThreadState.STOPPED),))
    assert says(verdict(fixed, (1.0, sample), slow=slow)) == (V.DRIVER_STUCK, 10)


def test_a_guest_that_is_busy_gets_a_slow_devices_time() -> None:
    sample = split(11, 11, 11, avail_event=11, used_event=10)
    busy = replace(WELL, vcpu_threads=(thread(ThreadState.RUNNING),))
    assert not verdict(blk(), (4.0, sample), slow=busy).verdict.stalled
    assert says(verdict(blk(), (5.3, sample), slow=busy)) == (V.LOST_CALL, 8)


@pytest.mark.parametrize(
    ("fixed", "sample"),
    [
        (blk(), split(11, 11, 11, avail_event=11, used_event=10, call=1)),
        # Without the event index every call matters to a driver that reaps when it is called.
        (blk(event_idx=False), split(11, 11, 11, call=1)),
    ],
)
def test_a_call_that_nobody_takes_from_the_notifier_is_lost_on_its_way(
    fixed: QueueFixed, sample: Sample
) -> None:
    said = verdict(fixed, (1.0, sample))
    assert (says(said), said.event) == ((V.LOST_CALL, 9), DeviceEvent.CALL)


@pytest.mark.parametrize(
    ("fixed", "sample"),
    [
        (blk(event_idx=False), split(11, 11, 11)),
        (
            blk(Layout.PACKED, event_idx=False),
            packed(11, 11, 11, calls=ENABLE, kicks=ENABLE),
        ),
    ],
)
def test_without_event_index_nobody_knows_whether_the_driver_reaped(
    fixed: QueueFixed, sample: Sample
) -> None:
    said = verdict(fixed, (60.0, sample))
    assert (says(said), said.event) == ((V.UNKNOWN, 0), DeviceEvent.CALL)


@pytest.mark.parametrize(
    ("fixed", "sample"),
    [
        pytest.param(blk(), split(11, 11, 11, avail_event=11, used_event=13), id="too late"),
        pytest.param(
            blk(), split(40000, 40000, 40000, avail_event=40000, used_event=11), id="far behind"
        ),
        pytest.param(blk(event_idx=False), split(11, 11, 11, avail_flags=1), id="flag"),
        pytest.param(
            blk(), split(111, 111, 111, avail_event=111, used_event=0), id="Linux's 0 for silence"
        ),
        pytest.param(
            blk(Layout.PACKED), packed(11, 11, 11, calls=DISABLE, avail_event=11), id="packed"
        ),
        pytest.param(
            blk(Layout.PACKED), packed(11, 11, 11, used_event=13, avail_event=11),
            id="packed, too late",
        ),
    ],
)  # fmt: skip
def test_a_driver_that_sleeps_with_its_calls_off_suppresses_them(
    fixed: QueueFixed, sample: Sample
) -> None:
    said = verdict(fixed, (1.0, sample))
    assert (says(said), said.event) == ((V.CALL_SUPPRESSED, 7), DeviceEvent.CALL)


@pytest.mark.parametrize(
    ("fixed", "sample"),
    [
        pytest.param(blk(event_idx=False), split(11, 11, 11, avail_flags=1), id="off"),
        pytest.param(blk(), split(11, 11, 11, avail_event=11, used_event=13), id="too late"),
    ],
)
def test_a_busy_guest_that_has_its_calls_off_gets_a_slow_devices_time(
    fixed: QueueFixed, sample: Sample
) -> None:
    """Till then it is no idle queue: whoever diagnoses it goes on looking."""
    busy = replace(WELL, vcpu_threads=(thread(ThreadState.RUNNING),))
    said = verdict(fixed, (4.0, sample), slow=busy)
    assert says(said) == (V.PROGRESSING, 0)
    assert says(verdict(fixed, (5.3, sample), slow=busy)) == (V.CALL_SUPPRESSED, 7)


@pytest.mark.parametrize(
    ("fixed", "sample"),
    [
        pytest.param(blk(), split(0, 0, 0, avail_event=0, used_event=0), id="event index"),
        pytest.param(blk(event_idx=False), split(0, 0, 0, avail_flags=1), id="flag"),
    ],
)
def test_a_queue_of_which_nothing_was_ever_asked_is_idle_by_its_ring_alone(
    fixed: QueueFixed, sample: Sample
) -> None:
    """Of thousands of them the monitor need not be asked."""
    said = verdict(fixed, (60.0, sample), slow=None)
    assert says(said) == (V.IDLE, 0)
    assert not wants_slow_facts(said)


def test_a_driver_whose_processor_stopped_with_its_calls_off_is_stuck() -> None:
    stopped = replace(WELL, vcpu_threads=(thread(ThreadState.STOPPED),))
    sample = split(11, 11, 11, avail_flags=1)
    assert says(verdict(blk(event_idx=False), (1.0, sample), slow=stopped)) == (
        V.DRIVER_STUCK,
        10,
    )
