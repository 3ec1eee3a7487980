"""Is every verdict, and its hop, what the virtio specification says of what was seen?

Each test is a conversation: what was seen of the queue, sample by sample, then the verdict.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from kickcall.diagnose.judge import is_undecided, judge, looks_stalled, wants_slow_facts
from kickcall.diagnose.rules import RULES
from kickcall.diagnose.states import (
    BackendThread,
    InterruptPath,
    QueueFixed,
    QueueRole,
    Sample,
    SlowFacts,
    ThreadState,
    Thresholds,
)
from kickcall.diagnose.track import Track, advance, start
from kickcall.model import BackendKind, DeviceEvent, Layout, VerdictKind

if TYPE_CHECKING:
    from kickcall.model import Verdict

V = VerdictKind
SIZE = 8
LIMITS = Thresholds(notification_s=0.5, device_s=5.0)
ENABLE, DISABLE, DESC, RESERVED = 0, 1, 2, 3
WELL = SlowFacts(
    at=0.0,
    vm_running=True,
    run_state="running",
    driver_ok=True,
    broken=False,
    interrupts=InterruptPath(
        msix_enabled=True,
        function_masked=False,
        vector=1,
        vector_masked=False,
        vector_pending=False,
        bus_master=True,
        intx_disabled=True,
    ),
)


def blk(
    layout: Layout = Layout.SPLIT,
    *,
    event_idx: bool = True,
    backend: BackendKind = BackendKind.QEMU,
    size: int = SIZE,
) -> QueueFixed:
    """A request queue whose driver keeps its calls on."""
    return QueueFixed(
        "/machine/peripheral/blk0", 0, size, layout, event_idx, backend, QueueRole.REQUEST,
        calls_when_idle=True,
    )  # fmt: skip


def net_tx(layout: Layout = Layout.SPLIT, *, event_idx: bool = True) -> QueueFixed:
    """A request queue whose driver reaps when it gets around to it, or polls."""
    return replace(blk(layout, event_idx=event_idx, size=64), calls_when_idle=False)


def net_rx(layout: Layout = Layout.SPLIT, *, event_idx: bool = True) -> QueueFixed:
    """An inbox."""
    return replace(blk(layout, event_idx=event_idx), role=QueueRole.INBOX)


def split(
    avail: int,
    used: int,
    last: int | None = None,
    *,
    used_event: int | None = None,
    avail_event: int | None = None,
    avail_flags: int = 0,
    used_flags: int = 0,
    kick: int = 0,
    call: int = 0,
) -> Sample:
    """What was seen of a split ring; indices may be given beyond 2^16."""

    def u16(index: int | None) -> int | None:
        return None if index is None else index & 0xFFFF

    return Sample(
        0.0, u16(avail), u16(used), u16(last), avail_flags, used_flags,
        u16(used_event), u16(avail_event), kick, call,
    )  # fmt: skip


def packed(
    avail: int | None,
    used: int | None,
    last: int | None,
    *,
    calls: int = DESC,
    used_event: int = 0,
    kicks: int = DESC,
    avail_event: int = 0,
    kick: int = 0,
    call: int = 0,
) -> Sample:
    """What was seen of a packed ring of SIZE. Positions count descriptors from the first lap on,
    whose wrap counter is 1 (virtio 1.4, 2.8.1)."""

    def encode(at: int | None) -> int | None:
        return None if at is None else at % SIZE | (not at // SIZE & 1) << 15

    return Sample(
        0.0, encode(avail), encode(used), encode(last), calls, kicks,
        encode(used_event), encode(avail_event), kick, call,
    )  # fmt: skip


def verdict(
    fixed: QueueFixed,
    *seen: tuple[float, Sample],
    slow: SlowFacts | None = WELL,
    step_s: float = 0.1,
) -> Verdict:
    """Judge a queue that was seen as in each pair's sample for as many seconds as it says."""
    at, track = 0.0, None
    for seconds, sample in seen:
        until = at + seconds
        while True:
            sample = replace(sample, at=at)
            track = start(sample) if track is None else advance(track, sample, fixed)
            at += step_s
            if at >= until:
                break
    assert track is not None
    # The shell looks up the slow facts only where that may change the verdict.
    said = judge(fixed, track, None, LIMITS, machine="vm0")
    if slow is None:
        return said
    if wants_slow_facts(said) or looks_stalled(fixed, track, LIMITS):
        said = judge(fixed, track, slow, LIMITS, machine="vm0")
    return said


def thread(state: ThreadState, waits_in: str = "") -> BackendThread:
    return BackendThread(100, 101, "iothread0", state, waits_in)


def backend(state: ThreadState, waits_in: str = "") -> SlowFacts:
    return replace(WELL, backend_threads=(thread(state, waits_in),))


def switched(**switches: Any) -> SlowFacts:
    """All is well but for these switches on the interrupt's way."""
    return replace(WELL, interrupts=replace(WELL.interrupts, **switches))


IN_ITS_LOOP = backend(ThreadState.SLEEPING, "ppoll")


def says(said: Verdict) -> tuple[VerdictKind, int]:
    return said.verdict, said.hop


# --- hop 2 to 4: the kick ---


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


# --- hop 5 and 6: the device ---


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


# --- hop 7 to 10: the call ---

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


# --- healthy queues ---


@pytest.mark.parametrize(
    ("fixed", "sample"),
    [
        pytest.param(blk(), split(11, 11, 11, avail_event=11, used_event=11), id="split"),
        pytest.param(
            blk(), split(65536, 65536, 65536, avail_event=0, used_event=0), id="split, at 65536"
        ),
        pytest.param(blk(), split(0, 0, 0, avail_event=0, used_event=0), id="never used"),
        pytest.param(
            blk(Layout.PACKED), packed(16, 16, 16, used_event=16, avail_event=16), id="packed"
        ),
        pytest.param(
            net_rx(), split(18, 10, 10, avail_event=10, used_event=10), id="net RX, all empty"
        ),
        pytest.param(
            net_rx(event_idx=False), split(18, 10, 10, avail_flags=1), id="net RX, NAPI"
        ),
        pytest.param(net_rx(), split(418, 410, 410, avail_event=410, used_event=0),
            id="net RX, NAPI, event index"),
        pytest.param(
            net_rx(Layout.PACKED), packed(18, 10, 10, calls=DISABLE, avail_event=10),
            id="net RX, NAPI, packed",
        ),
        pytest.param(
            net_tx(), split(500, 500, 500, avail_event=500, used_event=500), id="net TX, NAPI"
        ),
        pytest.param(
            net_tx(), split(500, 500, 500, avail_event=500, used_event=0), id="net TX, calls off"
        ),
        pytest.param(
            net_tx(event_idx=False), split(500, 500, 500, avail_flags=1), id="net TX, calls off"
        ),
        # drivers/virtio/virtio_ring.c, event_triggered: once called, used_event stays where it was.
        pytest.param(
            net_tx(), split(505, 505, 505, avail_event=505, used_event=500), id="net TX, lazy"
        ),
        pytest.param(
            net_tx(), split(40500, 40500, 40500, avail_event=40500, used_event=500),
            id="net TX, lazy, long ago",
        ),
        # virtqueue_enable_cb_delayed: at 3/4 of what was outstanding, and not yet there.
        pytest.param(
            net_tx(), split(516, 510, 516, avail_event=516, used_event=512),
            id="net TX, three quarters ahead",
        ),
        # virtio-net's control queue has no callback: used_event is 0 for ever.
        pytest.param(
            replace(blk(), calls_when_idle=False),
            split(140, 140, 140, avail_event=140, used_event=0), id="control queue",
        ),
    ],
)  # fmt: skip
def test_a_queue_at_rest_is_well(fixed: QueueFixed, sample: Sample) -> None:
    said = verdict(fixed, (4.0, sample))
    assert said.verdict in (V.IDLE, V.PROGRESSING)
    assert said.event is None


@pytest.mark.parametrize(
    ("fixed", "sample"),
    [
        (blk(), split(140, 140, 140, avail_event=140, used_event=0)),
        (blk(event_idx=False), split(140, 140, 140, avail_flags=1)),
        (blk(Layout.PACKED), packed(14, 14, 14, calls=DISABLE, avail_event=14)),
    ],
)
def test_a_queue_without_a_vector_is_polled(fixed: QueueFixed, sample: Sample) -> None:
    """blk poll queues, firmware, DPDK."""
    said = verdict(fixed, (60.0, sample), slow=switched(vector=None))
    assert says(said) == (V.IDLE, 0)


def test_a_lazy_driver_that_left_much_behind_may_have_lost_its_call() -> None:
    sample = split(564, 564, 564, avail_event=564, used_event=548)
    said = verdict(net_tx(), (60.0, sample))
    assert (says(said), said.event) == ((V.UNKNOWN, 0), DeviceEvent.CALL)


def test_a_queue_whose_use_nobody_knows_is_never_stalled_by_what_it_leaves_behind() -> None:
    fixed = replace(net_rx(), calls_when_idle=False)
    sample = split(18, 15, 15, avail_event=15, used_event=11)
    assert says(verdict(fixed, (60.0, sample))) == (V.IDLE, 0)


def test_a_busy_queue_is_never_still() -> None:
    looks = [
        (0.25, split(n + 5, n, n + 2, avail_event=n + 2, used_event=n, kick=1))
        for n in range(65500, 65600)
    ]
    assert says(verdict(blk(), *looks, step_s=0.25)) == (V.PROGRESSING, 0)


def test_a_driver_that_goes_on_publishing_is_no_sign_that_the_device_looks() -> None:
    looks = [(0.1, split(n, 10, 10, avail_event=10, used_event=10)) for n in range(11, 11 + SIZE)]
    assert says(verdict(blk(), *looks)) == (V.LOST_KICK, 3)


def test_reads_that_do_not_belong_together_are_no_damage() -> None:
    """`used` was read after `avail`, and meanwhile one more was published and completed: -1."""
    torn = split(10, 11, 10, avail_event=10, used_event=10)
    after = split(11, 11, 11, avail_event=11, used_event=11)
    before = split(10, 10, 10, avail_event=10, used_event=10)
    assert not verdict(blk(), (3.0, before), (0.1, torn)).verdict.stalled
    assert not verdict(blk(), (3.0, before), (0.1, torn), (3.0, after)).verdict.stalled


def test_a_paused_machine_is_not_stalled() -> None:
    paused = replace(WELL, vm_running=False, run_state="paused")
    sample = split(11, 10, 10, avail_event=10, used_event=10, kick=1)
    assert says(verdict(blk(), (60.0, sample), slow=paused)) == (V.VM_NOT_RUNNING, 0)


# --- no ring ---


def test_a_driver_that_is_not_ready_has_no_ring() -> None:
    """A guest that reboots uses the memory for something else."""
    not_ready = replace(WELL, driver_ok=False)
    for garbage in (split(7, 0x4242, 7), split(11, 10, 10, avail_event=10)):
        assert says(verdict(blk(), (3.0, garbage), slow=not_ready)) == (V.DEVICE_NOT_READY, 0)


def test_a_device_that_gave_up_needs_a_reset() -> None:
    broken = replace(WELL, broken=True)
    sample = split(11, 10, 10, avail_event=10, used_event=10)
    assert says(verdict(blk(), (3.0, sample), slow=broken)) == (V.DEVICE_NOT_READY, 0)


@pytest.mark.parametrize(
    ("fixed", "sample", "hop"),
    [
        # 2.7.13.3.1: no more than the queue's size may be outstanding.
        (blk(), split(19, 10, 10, avail_event=10, used_event=10), 1),
        (blk(backend=BackendKind.VHOST_USER), split(19, 10, avail_event=10, used_event=10), 1),
        (blk(), split(11, 12, 11, avail_event=10, used_event=10), 6),
        # 2.8.10: mode 3 is reserved.
        (blk(Layout.PACKED), packed(10, 10, 10, calls=RESERVED, avail_event=10), 1),
        (blk(Layout.PACKED), packed(10, 10, 10, kicks=RESERVED, used_event=10), 6),
    ],
)
@pytest.mark.parametrize("broken", [False, True])
def test_indices_that_cannot_be_are_damage(
    fixed: QueueFixed, sample: Sample, hop: int, broken: bool
) -> None:
    slow = replace(WELL, broken=broken)
    assert says(verdict(fixed, (1.0, sample), slow=slow)) == (V.RING_CORRUPT, hop)


def test_a_ring_that_cannot_be_read_says_why() -> None:
    sample = Sample(0.0, None, None, None, None, None, None, None, 0, 0, "behind a virtual IOMMU")
    said = verdict(blk(), (60.0, sample))
    assert says(said) == (V.UNKNOWN, 0)
    assert "behind a virtual IOMMU" in {one.value for one in said.evidence}


# --- the table ---


def test_every_verdict_has_a_rule() -> None:
    assert {rule.verdict for rule in RULES} == set(VerdictKind)


def test_every_stall_names_its_hop_and_nothing_else_does() -> None:
    assert all(bool(rule.hop) == rule.verdict.stalled for rule in RULES)


def test_evidence_shows_what_was_read_and_since_when() -> None:
    said = verdict(blk(), (2.0, split(11, 10, 10, avail_event=10, used_event=10)), slow=IN_ITS_LOOP)
    values = {one.what: one.value for one in said.evidence}
    assert values["avail.idx"] == 11
    assert values["last_avail_idx"] == 10
    assert values["kick notifier count"] == 0
    assert values["back-end thread 101 (iothread0)"] == "sleeping"
    assert said.since_s == pytest.approx(1.9)


# --- how long it is worth waiting ---


def history(fixed: QueueFixed, sample: Sample, seconds: float) -> Track:
    """Return the history of a queue that was seen as in `sample` for as long."""
    track = start(replace(sample, at=0.0))
    for step in range(1, round(seconds / 0.1) + 1):
        track = advance(track, replace(sample, at=step * 0.1), fixed)
    return track


IN_HAND = split(11, 10, 11, avail_event=11, used_event=10)
NOT_SEEN = split(11, 10, avail_event=10, used_event=10)


@pytest.mark.parametrize(
    ("fixed", "sample", "slow", "seconds", "undecided"),
    [
        pytest.param(blk(), IN_HAND, WELL, 0.0, False, id="just seen"),
        pytest.param(blk(), IN_HAND, WELL, 0.3, True, id="the device has it"),
        pytest.param(blk(), IN_HAND, WELL, 5.3, False, id="and is stuck"),
        pytest.param(blk(), NOT_SEEN, WELL, 0.3, True, id="not fetched"),
        pytest.param(blk(), NOT_SEEN, IN_ITS_LOOP, 0.6, False, id="kick lost"),
        pytest.param(
            blk(backend=BackendKind.VHOST_USER), NOT_SEEN, None, 0.6, True, id="by the rings alone"
        ),
        pytest.param(
            blk(backend=BackendKind.VHOST_USER), NOT_SEEN, IN_ITS_LOOP, 0.6, False, id="by threads"
        ),
        pytest.param(
            blk(backend=BackendKind.VHOST_USER, event_idx=False), split(11, 10), WELL, 0.6, False,
            id="time tells nothing",
        ),
        pytest.param(net_rx(), split(128, 0, 0, avail_event=0, used_event=0), WELL, 9.0, False,
            id="an inbox"),
    ],
)  # fmt: skip
def test_only_a_queue_that_time_tells_something_of_is_worth_waiting_for(
    fixed: QueueFixed, sample: Sample, slow: SlowFacts | None, seconds: float, undecided: bool
) -> None:
    assert is_undecided(fixed, history(fixed, sample, seconds), slow, LIMITS) is undecided


@pytest.mark.parametrize("layout", Layout)
def test_calls_that_stay_off_without_msix_may_be_firmware(layout: Layout) -> None:
    sample = split(11, 11, 11, avail_flags=1)
    if layout is Layout.PACKED:
        sample = packed(11, 11, 11, calls=DISABLE)
    fixed = blk(layout, event_idx=False)
    intx = switched(msix_enabled=False, intx_disabled=False, vector=None)
    said = verdict(fixed, (1.0, sample), slow=intx)
    assert (says(said), said.event) == ((V.UNKNOWN, 0), DeviceEvent.CALL)
    # With no interrupt at all it polls.
    said = verdict(
        fixed, (1.0, sample), slow=switched(msix_enabled=False, intx_disabled=True, vector=None)
    )
    assert says(said) == (V.IDLE, 0)


# --- what the kernel saw of the notifications ---

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
