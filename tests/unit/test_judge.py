"""Is every verdict, and its hop, what the virtio specification says of what was seen?

Each test is a conversation: what was seen of the queue, sample by sample, then the verdict.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from judging import (
    DISABLE,
    IN_ITS_LOOP,
    LIMITS,
    RESERVED,
    SIZE,
    WELL,
    V,
    blk,
    net_rx,
    net_tx,
    packed,
    says,
    split,
    switched,
    verdict,
)
from kickcall.diagnose.judge import is_undecided
from kickcall.diagnose.rules import RULES
from kickcall.diagnose.states import (
    QueueFixed,
    Sample,
    SlowFacts,
)
from kickcall.diagnose.track import Track, advance, start
from kickcall.model import BackendKind, DeviceEvent, Layout, VerdictKind

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
