"""Do the clocks of a queue's history start, stop and start again when they should?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kickcall.diagnose.states import QueueFixed, QueueRole, Sample
from kickcall.diagnose.track import (
    Track,
    advance,
    all_fetched,
    forgive,
    outstanding,
    span,
    start,
    unfetched,
)
from kickcall.model import BackendKind, Layout

SPLIT = QueueFixed(
    "/machine/peripheral/blk0", 0, 8, Layout.SPLIT, True, BackendKind.QEMU, QueueRole.REQUEST,
    calls_when_idle=True,
)  # fmt: skip
PACKED = replace(SPLIT, layout=Layout.PACKED)
IDLE = Sample(0.0, 10, 10, 10, 0, 0, 10, 10, 0, 0)
WORK = replace(IDLE, avail_idx=11)


def watch(*seen: Sample, fixed: QueueFixed = SPLIT) -> Track:
    """Return the history of what was seen, a second after the other."""
    track = start(replace(seen[0], at=0.0))
    for at, sample in enumerate(seen[1:], 1):
        track = advance(track, replace(sample, at=float(at)), fixed)
    return track


def test_work_in_an_idle_queue_starts_the_devices_clock() -> None:
    track = watch(IDLE, IDLE, IDLE, WORK, WORK, WORK)
    assert track.device_still_since == track.unfetched_since == 3.0
    assert track.device_looks == 3


def test_more_work_does_not_start_it_again() -> None:
    track = watch(IDLE, WORK, replace(WORK, avail_idx=12), replace(WORK, avail_idx=13))
    assert track.device_still_since == track.unfetched_since == 1.0


@pytest.mark.parametrize(
    "progress", [{"used_idx": 11}, {"last_avail_idx": 11}, {"used_flags": 1}, {"avail_event": 11}]
)
def test_whatever_the_device_writes_starts_its_clock_and_the_drivers(
    progress: dict[str, Any],
) -> None:
    many = replace(WORK, avail_idx=15)
    moved = replace(many, **progress)
    track = watch(many, many, moved, moved)
    assert track.device_still_since == track.unfetched_since == 2.0
    assert track.driver_still_since == track.moved_at == 2.0
    assert track.device_looks == track.driver_looks == 2


@pytest.mark.parametrize(
    "progress", [{"avail_idx": 12}, {"used_event": 11}, {"avail_flags": 1}]
)  # fmt: skip
def test_what_the_driver_writes_starts_only_the_drivers_clock(progress: dict[str, Any]) -> None:
    moved = replace(WORK, **progress)
    track = watch(WORK, WORK, moved, moved)
    assert track.driver_still_since == track.moved_at == 2.0
    assert track.device_still_since == 0.0


COMPLETED = replace(IDLE, avail_idx=20, last_avail_idx=20, used_idx=11, used_event=10)
"""The driver wanted its call when `used` passed 10, and has not reaped."""


@pytest.mark.parametrize(
    ("fixed", "sample"),
    [(SPLIT, COMPLETED), (PACKED, replace(COMPLETED, avail_flags=2))],
    ids=["split", "packed"],
)
def test_more_to_reap_does_not_start_the_drivers_clock_again(
    fixed: QueueFixed, sample: Sample
) -> None:
    more = [replace(sample, used_idx=used) for used in (11, 12, 13, 14)]
    track = watch(*more, fixed=fixed)
    assert track.driver_still_since == 0.0
    assert track.device_still_since == 3.0


@pytest.mark.parametrize(
    ("fixed", "sample"),
    [
        # Nothing was to be reaped before, or it cannot be seen whether, or no call was wanted.
        (SPLIT, replace(COMPLETED, used_event=11)),
        (SPLIT, replace(COMPLETED, used_event=0)),
        (SPLIT, replace(COMPLETED, used_event=100)),
        (replace(SPLIT, event_idx=False), replace(COMPLETED, used_event=None)),
        (PACKED, replace(COMPLETED, avail_flags=0)),
    ],
)
def test_something_to_reap_starts_the_drivers_clock_where_there_was_none(
    fixed: QueueFixed, sample: Sample
) -> None:
    track = watch(sample, sample, replace(sample, used_idx=12), fixed=fixed)
    assert track.driver_still_since == 2.0


def test_new_work_behind_old_has_a_clock_of_its_own() -> None:
    """The device is long at what it fetched; nobody has had time to look at the rest."""
    at_it = replace(WORK, last_avail_idx=11)
    more = replace(at_it, avail_idx=12)
    track = watch(at_it, at_it, at_it, more, more)
    assert track.device_still_since == 0.0
    assert track.unfetched_since == 3.0


def test_nothing_is_still_where_the_first_look_found_it_so() -> None:
    track = start(replace(WORK, at=7.0, kick_count=1))
    assert track.device_still_since == track.driver_still_since == track.unread_since == 7.0


def test_a_count_waits_since_it_left_zero() -> None:
    kicked = replace(WORK, kick_count=1, call_count=2)
    track = watch(WORK, kicked, replace(kicked, kick_count=3), kicked, WORK, kicked)
    assert track.unread_since == 5.0
    assert track.untaken_since == 5.0


def test_a_count_that_grows_still_waits() -> None:
    track = watch(WORK, *(replace(WORK, kick_count=count) for count in (1, 1, 2, 5)))
    assert track.unread_since == 1.0


def test_a_count_that_falls_was_read() -> None:
    track = watch(*(replace(WORK, kick_count=count) for count in (3, 4, 2, 3)))
    assert track.unread_since == 2.0


@pytest.mark.parametrize("count", [None, 0])
def test_an_empty_notifier_has_nothing_that_waits(count: int | None) -> None:
    sample = replace(WORK, kick_count=count, call_count=count)
    track = watch(sample, sample)
    assert track.unread_since is None
    assert track.untaken_since is None


def test_forgiven_time_is_on_no_clock_and_never_in_the_future() -> None:
    track = watch(*[replace(WORK, kick_count=1)] * 4)
    late = forgive(track, 2.0)
    assert late.device_still_since == late.driver_still_since == late.unfetched_since == 2.0
    assert late.unread_since == 2.0
    assert late.untaken_since is None
    assert forgive(track, 60.0).device_still_since == 3.0


def test_a_queue_whose_positions_are_not_known_is_not_taken_for_idle() -> None:
    unknown = replace(IDLE, avail_idx=None, used_idx=None, last_avail_idx=None)
    track = watch(unknown, unknown, unknown)
    assert track.device_still_since == 0.0


@pytest.mark.parametrize(
    ("fixed", "used", "avail", "count"),
    [
        (SPLIT, 10, 10, 0),
        (SPLIT, 65535, 2, 3),  # 2.7.6: indices run freely modulo 2^16
        (SPLIT, 11, 10, 65535),  # two reads that do not belong together
        # 2.8.1: a position is an offset and a wrap counter, here 1 in bit 15 on the first lap.
        (PACKED, 0x8000 | 2, 0x8000 | 5, 3),
        (PACKED, 0x8000 | 6, 1, 3),
        (PACKED, 0x8000, 0, 8),
        (PACKED, 1, 0x8000, 7),
    ],
)
def test_entries_are_counted_from_used_to_avail(
    fixed: QueueFixed, used: int, avail: int, count: int
) -> None:
    sample = replace(IDLE, used_idx=used, last_avail_idx=used, avail_idx=avail)
    assert outstanding(fixed, sample) == unfetched(fixed, sample) == count
    assert span(fixed, used, avail) == count


@pytest.mark.parametrize(
    ("fixed", "changes", "fetched"),
    [
        (SPLIT, {}, True),
        (SPLIT, {"last_avail_idx": 9}, False),
        (SPLIT, {"last_avail_idx": None}, True),  # re-armed at the driver's index
        (SPLIT, {"last_avail_idx": None, "avail_event": 9}, False),
        (replace(SPLIT, event_idx=False), {"last_avail_idx": None}, False),
        (PACKED, {"last_avail_idx": None, "used_flags": 2}, True),
        (PACKED, {"last_avail_idx": None, "used_flags": 1}, False),  # the position is stale then
        (SPLIT, {"last_avail_idx": None, "avail_idx": None, "avail_event": None}, False),
    ],
)
def test_all_is_fetched_where_the_device_or_its_wish_for_kicks_says_so(
    fixed: QueueFixed, changes: dict[str, Any], fetched: bool
) -> None:
    assert all_fetched(fixed, replace(IDLE, **changes)) is fetched
