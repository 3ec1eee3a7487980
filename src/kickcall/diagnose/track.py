"""What samples of one queue add up to over time: who moved last, and since when something waits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kickcall.model import Layout
from kickcall.virtio import packed, split

if TYPE_CHECKING:
    from collections.abc import Callable

    from kickcall.diagnose.states import QueueFixed, Sample


@dataclass(frozen=True, slots=True)
class Owed:
    """When a notification came to be owed, as far as looks can tell. It is None where it was owed
    at the first look, or is not."""

    after: float | None = None
    """It was not owed then: no notification before is the one."""
    since: float | None = None
    """Every notification after is the one, as nobody took any other meanwhile."""


@dataclass(frozen=True, slots=True)
class Track:
    """The history of one queue, as far as a judge needs it. Times are those of the samples."""

    first: Sample
    now: Sample
    device_still_since: float
    """Since when the device has shown no progress while work was outstanding."""
    device_looks: int
    """Looks since then. Positions repeat (packed: every two laps), and a busy queue may be found at
    the same place twice."""
    unfetched_since: float
    """Since when there has been something for the device to look at, and it has not moved."""
    driver_still_since: float
    """Since when the driver has shown no progress while there was something to reap, as far as that
    can be seen."""
    driver_looks: int
    """Looks since then."""
    unread_since: float | None
    """Since when the kick notifier's count has not been 0, nor less than before, at any look; None
    while it is 0."""
    untaken_since: float | None
    """The same for the call notifier."""
    moved_at: float
    """When any index last moved; the time of the first sample where none has."""
    kick_owed: Owed = Owed()
    """Between which looks the driver came to owe the device a kick."""
    call_owed: Owed = Owed()
    """Between which looks the device came to owe the driver a call."""


def start(sample: Sample) -> Track:
    """Return the history that begins with `sample`: everything counts from there."""
    at = sample.at
    return Track(
        first=sample,
        now=sample,
        device_still_since=at,
        device_looks=1,
        unfetched_since=at,
        driver_still_since=at,
        driver_looks=1,
        unread_since=at if sample.kick_count else None,
        untaken_since=at if sample.call_count else None,
        moved_at=at,
    )


def advance(track: Track, sample: Sample, fixed: QueueFixed) -> Track:
    """Return the history with one more sample, which must be no older than the last."""
    was = track.now
    device = _device_side(sample) != _device_side(was)
    driver = _driver_side(sample) != _driver_side(was)
    # A driver that only published has taken no call: it would have asked for its next one.
    reaped = (sample.avail_flags, sample.used_event) != (was.avail_flags, was.used_event)
    # Work that appears in an empty queue starts the device's clock; more of it does not: a driver
    # that goes on publishing is no sign that the device looks. A device that is still at what it
    # fetched long ago has all the time of a notification for what is published now.
    device_restarts = device or outstanding(fixed, was) == 0
    # A device that goes on completing (packets come in) is no sign that the driver reaps.
    driver_restarts = driver or (device and not _is_called_for(fixed, was))
    at = sample.at
    return replace(
        track,
        now=sample,
        device_still_since=at if device_restarts else track.device_still_since,
        device_looks=1 if device_restarts else track.device_looks + 1,
        unfetched_since=(
            at if device_restarts or all_fetched(fixed, was) else track.unfetched_since
        ),
        driver_still_since=at if driver_restarts else track.driver_still_since,
        driver_looks=1 if driver_restarts else track.driver_looks + 1,
        unread_since=_since(track.unread_since, was.kick_count, sample.kick_count, at),
        untaken_since=_since(track.untaken_since, was.call_count, sample.call_count, at),
        moved_at=at if device or driver else track.moved_at,
        kick_owed=_owed(track.kick_owed, kick_is_owed, fixed, was, sample, taken=device),
        call_owed=_owed(track.call_owed, _is_called_for, fixed, was, sample, taken=reaped),
    )


def _owed(
    owed: Owed,
    is_owed: Callable[[QueueFixed, Sample], bool],
    fixed: QueueFixed,
    was: Sample,
    now: Sample,
    *,
    taken: bool,
) -> Owed:
    """`taken`: who is to be notified moved between the two looks, and so may have taken another
    notification between them."""
    if not is_owed(fixed, now):
        return Owed()
    if is_owed(fixed, was):
        return owed
    return Owed(after=was.at, since=now.at if taken else was.at)


def forgive(track: Track, seconds: float) -> Track:
    """Return the history with `seconds` less on every clock.

    For a watcher that did not get to run when it should have: who else did not run in that time
    cannot be blamed for it.
    """

    def later(since: float | None) -> float | None:
        return None if since is None else min(since + seconds, track.now.at)

    return replace(
        track,
        device_still_since=min(track.device_still_since + seconds, track.now.at),
        unfetched_since=min(track.unfetched_since + seconds, track.now.at),
        driver_still_since=min(track.driver_still_since + seconds, track.now.at),
        unread_since=later(track.unread_since),
        untaken_since=later(track.untaken_since),
    )


def _device_side(sample: Sample) -> tuple[object, ...]:
    """What only the device writes: its positions and the device event area."""
    return (
        sample.used_idx,
        sample.last_avail_idx,
        sample.used_flags,
        sample.avail_event,
        sample.unreadable,
    )


def _driver_side(sample: Sample) -> tuple[object, ...]:
    """What only the driver writes."""
    return (sample.avail_idx, sample.avail_flags, sample.used_event)


def _since(since: float | None, was: int | None, count: int | None, at: float) -> float | None:
    if not count:
        return None
    # A notifier only counts up until it is read: less than before means that somebody did.
    read_between = was is not None and count < was
    return at if since is None or read_between else since


def outstanding(fixed: QueueFixed, sample: Sample) -> int | None:
    """Return how many entries are published and not completed; None where that cannot be known.

    More than the queue's size means that the two indices do not belong together: memory that is
    no ring, or two reads between which the device completed what was published meanwhile.
    """
    if sample.avail_idx is None or sample.used_idx is None:
        return None
    return span(fixed, sample.used_idx, sample.avail_idx)


def unfetched(fixed: QueueFixed, sample: Sample) -> int | None:
    """Return how many entries the device has not fetched; None where its position is unknown."""
    if sample.avail_idx is None or sample.last_avail_idx is None:
        return None
    return span(fixed, sample.last_avail_idx, sample.avail_idx)


def all_fetched(fixed: QueueFixed, sample: Sample) -> bool:
    """Tell whether the device has certainly seen all that was published.

    Its own position says so; where that is not known, a device that re-armed its kick at the
    driver's index has looked that far (virtio 1.4, 2.7.10 and 2.8.10).
    """
    left = unfetched(fixed, sample)
    if left is not None:
        return left == 0
    return fixed.event_idx and sample.avail_idx is not None and _rearmed(fixed, sample)


def _is_called_for(fixed: QueueFixed, sample: Sample) -> bool:
    """Tell whether the driver has certainly something to reap that it wanted to be called for.

    `used` is past the index of its event (virtio 1.4, 2.7.7.2 and 2.8.10). For a split queue 0 may
    be Linux's way to want no calls (drivers/virtio/virtio_ring.c, virtqueue_disable_cb_split).
    """
    if sample.used_event is None or sample.used_idx is None:
        return False
    if fixed.layout is Layout.PACKED:
        if sample.avail_flags != packed.EVENT_FLAGS_DESC:
            return False
    elif not fixed.event_idx or sample.used_event == 0:
        return False
    return 0 < span(fixed, sample.used_event, sample.used_idx) <= fixed.size


def kick_is_owed(fixed: QueueFixed, sample: Sample) -> bool:
    """Tell whether the driver had to kick for what the device has not fetched.

    With event indices: the index that the device asked for lies in the part that is not fetched
    (virtio 1.4, 2.7.10.2 and 2.8.10). Without: the device did not ask for silence.
    """
    if sample.avail_idx is None or sample.used_idx is None:
        return False
    start_idx = sample.used_idx if sample.last_avail_idx is None else sample.last_avail_idx
    left = span(fixed, start_idx, sample.avail_idx)
    if not left:
        return False
    if fixed.layout is Layout.PACKED and sample.used_flags != packed.EVENT_FLAGS_DESC:
        return sample.used_flags == packed.EVENT_FLAGS_ENABLE
    if not fixed.event_idx or sample.avail_event is None:
        return not (sample.used_flags or 0) & 1
    return 0 < span(fixed, sample.avail_event, sample.avail_idx) <= left


def _rearmed(fixed: QueueFixed, sample: Sample) -> bool:
    if fixed.layout is Layout.PACKED and sample.used_flags != packed.EVENT_FLAGS_DESC:
        return False
    return sample.avail_event == sample.avail_idx


def span(fixed: QueueFixed, start_idx: int, end_idx: int) -> int:
    """Return how many entries lie from `start_idx` up to `end_idx` in the terms of the layout."""
    if fixed.layout is Layout.SPLIT:
        return split.outstanding(end_idx, start_idx)
    return packed.distance(_position(start_idx), _position(end_idx), max(fixed.size, 1))


def _position(encoded: int) -> packed.Position:
    return packed.Position(encoded & 0x7FFF, bool(encoded & 0x8000))
