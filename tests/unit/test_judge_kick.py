"""Which stall on the way of a kick, or in the device, is what was seen?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from judging import (
    DISABLE,
    ENABLE,
    IN_ITS_LOOP,
    SIZE,
    WELL,
    V,
    backend,
    blk,
    net_rx,
    packed,
    says,
    split,
    verdict,
)
from kickcall.diagnose.states import (
    QueueFixed,
    QueueRole,
    Sample,
    ThreadState,
)
from kickcall.model import BackendKind, DeviceEvent, Layout


@pytest.mark.parametrize(
    ("fixed", "sample"),
    [
        # 2.7.10.2: the driver passed avail_event, which is what the device has not fetched.
        pytest.param(
            blk(), split(11, 10, 10, avail_event=10, used_event=10), id="split, event index"
        ),
        pytest.param(
            blk(), split(65536 + 2, 65535, 65535, avail_event=65535, used_event=65535),
            id="split, event index, past 65535",
        ),
        # 2.7.10: the device did not ask for silence.
        pytest.param(blk(event_idx=False), split(11, 10, 10), id="split"),
        # 2.8.10: at a descriptor, or always.
        pytest.param(
            blk(Layout.PACKED), packed(11, 10, 10, avail_event=10, used_event=10),
            id="packed, event index",
        ),
        pytest.param(
            blk(Layout.PACKED), packed(17, 15, 15, avail_event=15, used_event=15),
            id="packed, event index, past the lap",
        ),
        pytest.param(
            blk(Layout.PACKED, event_idx=False), packed(11, 10, 10, kicks=ENABLE, calls=ENABLE),
            id="packed",
        ),
    ],
)  # fmt: skip
def test_a_kick_that_was_owed_and_is_not_in_the_notifier_is_lost(
    fixed: QueueFixed, sample: Sample
) -> None:
    said = verdict(fixed, (1.0, sample))
    assert says(said) == (V.LOST_KICK, 3)
    assert said.event is DeviceEvent.KICK
    assert said.remedy == "kickcall kick vm0 blk0 --queue 0"


def test_vhost_in_the_kernel_never_reads_the_count_so_its_value_says_nothing() -> None:
    fixed = blk(backend=BackendKind.VHOST_KERNEL)
    asleep = split(11, 10, avail_event=10, used_event=10, kick=276)
    assert says(verdict(fixed, (1.0, asleep))) == (V.LOST_KICK, 3)


def test_a_lost_kick_is_not_said_before_its_time() -> None:
    sample = split(11, 10, 10, avail_event=10, used_event=10)
    assert says(verdict(blk(), (0.5, sample))) == (V.PROGRESSING, 0)
    assert says(verdict(blk(), (0.7, sample))) == (V.LOST_KICK, 3)


def test_two_looks_far_apart_are_no_stall() -> None:
    """A busy packed queue is at the same place every two laps."""
    sample = packed(11, 10, 10, avail_event=10, used_event=10)
    said = verdict(blk(Layout.PACKED), (1.9, sample), step_s=1.0)
    assert says(said) == (V.PROGRESSING, 0)


def test_a_vhost_user_back_end_in_its_event_loop_has_missed_the_kick() -> None:
    fixed = blk(backend=BackendKind.VHOST_USER)
    sample = split(11, 10, avail_event=10, used_event=10)
    assert says(verdict(fixed, (1.0, sample), slow=IN_ITS_LOOP)) == (V.LOST_KICK, 3)


def test_a_vhost_user_back_end_at_work_may_have_its_kicks_off() -> None:
    """With event indices nobody writes anything for that: avail_event stays where it was."""
    fixed = blk(backend=BackendKind.VHOST_USER)
    sample = split(11, 10, avail_event=10, used_event=10)
    at_work = backend(ThreadState.SLEEPING, "pread64")
    said = verdict(fixed, (4.0, sample), slow=at_work)
    assert (says(said), said.event) == ((V.UNKNOWN, 0), DeviceEvent.KICK)
    assert says(verdict(fixed, (5.3, sample), slow=at_work)) == (V.DEVICE_STUCK, 5)
    # Where nothing tells what it does, it is most likely that it does nothing.
    assert says(verdict(fixed, (4.0, sample))) == (V.UNKNOWN, 0)
    assert says(verdict(fixed, (5.3, sample))) == (V.LOST_KICK, 3)


@pytest.mark.parametrize("kind", [BackendKind.VHOST_KERNEL, BackendKind.VHOST_USER])
def test_without_event_index_nobody_outside_knows_whether_the_device_looked(
    kind: BackendKind,
) -> None:
    said = verdict(blk(event_idx=False, backend=kind), (60.0, split(11, 10)), slow=IN_ITS_LOOP)
    assert (says(said), said.event) == ((V.UNKNOWN, 0), DeviceEvent.KICK)
    assert said.remedy.endswith("kickcall diagnose vm0 blk0 --queue 0 --probe")


def test_a_packed_queue_of_vhost_keeps_its_positions_to_itself() -> None:
    fixed = blk(Layout.PACKED, backend=BackendKind.VHOST_USER)
    said = verdict(fixed, (60.0, packed(None, None, None)))
    assert (says(said), said.event) == ((V.UNKNOWN, 0), DeviceEvent.KICK)


@pytest.mark.parametrize(
    ("fixed", "sample"),
    [
        # The device fetched 11 and did not ask for the kick of 11: avail_event is behind.
        (blk(), split(12, 11, 11, avail_event=10, used_event=11)),
        (blk(event_idx=False), split(12, 11, 11, used_flags=1)),
        (blk(Layout.PACKED), packed(12, 11, 11, kicks=DISABLE, used_event=11)),
        (blk(backend=BackendKind.VHOST_KERNEL), split(12, 11, avail_event=10, used_event=11)),
        (blk(event_idx=False, backend=BackendKind.VHOST_KERNEL), split(12, 11, used_flags=1)),
    ],
)
def test_a_device_that_asked_for_silence_and_sleeps_suppresses_the_kick(
    fixed: QueueFixed, sample: Sample
) -> None:
    said = verdict(fixed, (1.0, sample))
    assert (says(said), said.event) == ((V.KICK_SUPPRESSED, 2), DeviceEvent.KICK)


@pytest.mark.parametrize(
    ("fixed", "sample"),
    [
        (blk(), split(11, 10, 10, avail_event=10, used_event=10, kick=1)),
        (blk(event_idx=False), split(11, 10, 10, kick=3)),
        (
            blk(event_idx=False, backend=BackendKind.VHOST_USER),
            split(11, 10, kick=1),
        ),
        (blk(Layout.PACKED), packed(11, 10, 10, avail_event=10, used_event=10, kick=1)),
        (
            blk(Layout.PACKED, backend=BackendKind.VHOST_USER),
            packed(None, None, None, kick=1),
        ),
    ],
)
@pytest.mark.parametrize("state", [ThreadState.SLEEPING, ThreadState.STOPPED])
def test_a_kick_that_stays_in_the_notifier_is_unread(
    fixed: QueueFixed, sample: Sample, state: ThreadState
) -> None:
    assert says(verdict(fixed, (6.0, sample), slow=backend(state))) == (V.KICK_UNREAD, 4)
    if state is ThreadState.STOPPED:
        assert says(verdict(fixed, (1.0, sample), slow=backend(state))) == (V.KICK_UNREAD, 4)


def test_a_kick_that_is_read_again_and_again_is_read() -> None:
    """The count is above 0 at every look, and falls."""
    fixed = blk(Layout.PACKED, backend=BackendKind.VHOST_USER)
    looks = [(0.1, packed(None, None, None, kick=count)) for count in (3, 5, 2, 6, 1) * 20]
    assert says(verdict(fixed, *looks)) == (V.UNKNOWN, 0)


@pytest.mark.parametrize("fixed", [blk(event_idx=False), net_rx(event_idx=False)])
def test_a_kick_that_a_polling_back_end_left_unread_for_ever_harms_nobody(
    fixed: QueueFixed,
) -> None:
    """SPDK and DPDK ask for no kicks, and never read the one that came before they did."""
    fixed = replace(fixed, backend=BackendKind.VHOST_USER)
    ahead = 0 if fixed.role is QueueRole.REQUEST else SIZE - 1
    idle = split(10 + ahead, 10, used_flags=1, kick=1)
    said = verdict(fixed, (60.0, idle), slow=backend(ThreadState.RUNNING))
    assert not said.verdict.stalled
    at_work = split(11 + ahead, 10, used_flags=1, kick=1)
    said = verdict(fixed, (60.0, idle), (4.0, at_work), slow=backend(ThreadState.RUNNING))
    assert not said.verdict.stalled


def test_a_back_end_that_closed_its_notifier_is_gone() -> None:
    fixed = blk(backend=BackendKind.VHOST_USER)
    gone = replace(WELL, kick_holders=0)
    sample = split(11, 10, avail_event=10, used_event=10, kick=1)
    assert says(verdict(fixed, (1.0, sample), slow=gone)) == (V.BACKEND_GONE, 4)
    # While it comes back nobody holds it, either: that takes less than a notification's time.
    assert not verdict(fixed, (0.3, sample), slow=gone).verdict.stalled
    packed_queue = replace(fixed, layout=Layout.PACKED)
    unread = packed(None, None, None, kick=2)
    assert says(verdict(packed_queue, (1.0, unread), slow=gone)) == (V.BACKEND_GONE, 4)


@pytest.mark.parametrize(
    ("fixed", "sample"),
    [
        (blk(), split(11, 10, 11, avail_event=11, used_event=10)),
        (blk(backend=BackendKind.VHOST_USER), split(11, 10, avail_event=11, used_event=10)),
        (blk(event_idx=False), split(11, 10, 11)),
        (blk(Layout.PACKED), packed(11, 10, 11, avail_event=11, used_event=10)),
    ],
)
def test_a_device_that_fetched_is_slow_at_first_and_stuck_after_its_time(
    fixed: QueueFixed, sample: Sample
) -> None:
    assert says(verdict(fixed, (4.9, sample))) == (V.PROGRESSING, 0)
    assert says(verdict(fixed, (5.3, sample))) == (V.DEVICE_STUCK, 6)


def test_work_in_front_of_a_device_that_is_long_at_older_work_is_no_lost_kick() -> None:
    """Its kick is on the way: nobody has had time to look at it yet."""
    long_at_it = split(11, 10, 11, avail_event=11, used_event=10)
    one_more = split(12, 10, 11, avail_event=11, used_event=10)
    said = verdict(blk(), (4.0, long_at_it), (0.1, one_more), slow=IN_ITS_LOOP)
    assert says(said) == (V.PROGRESSING, 0)
    said = verdict(blk(), (4.0, long_at_it), (1.0, one_more), slow=IN_ITS_LOOP)
    assert says(said) == (V.LOST_KICK, 3)


def test_a_device_that_works_on_the_spot_and_slowly_is_not_asleep_on_its_kick() -> None:
    """It re-arms at each entry that it pops, so the next kick waits while it is at this one."""
    sample = split(12, 10, 11, avail_event=11, used_event=10, kick=1)
    at_work = backend(ThreadState.SLEEPING, "pread64")
    assert not verdict(blk(), (4.0, sample), slow=at_work).verdict.stalled
    assert says(verdict(blk(), (5.3, sample), slow=at_work)) == (V.KICK_UNREAD, 4)


@pytest.mark.parametrize("state", [ThreadState.RUNNING, ThreadState.DISK])
def test_a_busy_back_end_gets_a_slow_devices_time(state: ThreadState) -> None:
    fixed = blk(event_idx=False, backend=BackendKind.VHOST_USER)
    polling = split(11, 10, used_flags=1)
    assert says(verdict(fixed, (4.0, polling), slow=backend(state))) == (V.PROGRESSING, 0)
    assert says(verdict(fixed, (5.3, polling), slow=backend(state))) == (V.DEVICE_STUCK, 5)


def test_a_kick_is_lost_also_in_front_of_a_thread_that_serves_others() -> None:
    sample = split(11, 10, 10, avail_event=10, used_event=10)
    busy = backend(ThreadState.RUNNING)
    assert says(verdict(blk(), (4.0, sample), slow=busy)) == (V.PROGRESSING, 0)
    assert says(verdict(blk(), (5.3, sample), slow=busy)) == (V.LOST_KICK, 3)


def test_a_back_end_that_was_stopped_after_it_took_the_kick_is_stuck() -> None:
    fixed = blk(backend=BackendKind.VHOST_USER)
    sample = split(11, 10, avail_event=10, used_event=10)
    said = verdict(fixed, (1.0, sample), slow=backend(ThreadState.STOPPED))
    assert says(said) == (V.DEVICE_STUCK, 5)


def test_entries_in_hand_and_more_behind_them_with_kicks_off_are_a_stuck_device() -> None:
    sample = split(14, 10, 12, avail_event=9, used_event=10)
    assert says(verdict(blk(), (4.0, sample), slow=IN_ITS_LOOP)) == (V.PROGRESSING, 0)
    assert says(verdict(blk(), (5.3, sample), slow=IN_ITS_LOOP)) == (V.DEVICE_STUCK, 5)
