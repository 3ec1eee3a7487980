"""The split virtqueue: where its fields lie and what they say (virtio 1.4, 2.7)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

AVAIL_F_NO_INTERRUPT = 1
"""`avail.flags`: the driver wants no call (2.7.7; means nothing with VIRTIO_F_EVENT_IDX)."""
USED_F_NO_NOTIFY = 1
"""`used.flags`: the device wants no kick (2.7.10; means nothing with VIRTIO_F_EVENT_IDX)."""

_U16X2 = struct.Struct("<HH")
_U16 = struct.Struct("<H")


@dataclass(frozen=True, slots=True)
class SplitRing:
    """The indices, flags and event fields of one split queue, as read."""

    avail_flags: int
    avail_idx: int
    used_flags: int
    used_idx: int
    used_event: int | None
    """Where the driver wants its next call (2.7.7); None where event indices are not in use."""
    avail_event: int | None
    """Where the device wants its next kick (2.7.10); None where event indices are not in use."""


def fields(avail: int, used: int, num: int, event_idx: bool) -> list[tuple[int, int]]:
    """Return the (address, length) ranges that `parse` wants, in its order.

    `struct virtq_avail` is flags, idx, ring[num] of u16, used_event (2.7.6);
    `struct virtq_used` is flags, idx, ring[num] of 8 bytes, avail_event (2.7.8).
    """
    ranges = [(avail, 4), (used, 4)]
    if event_idx:
        ranges += [(avail + 4 + 2 * num, 2), (used + 4 + 8 * num, 2)]
    return ranges


def parse(parts: list[bytes]) -> SplitRing:
    """Return the ring's fields from the bytes of the ranges that `fields` named."""
    avail_flags, avail_idx = _U16X2.unpack(parts[0])
    used_flags, used_idx = _U16X2.unpack(parts[1])
    events = [_U16.unpack(part)[0] for part in parts[2:4]] or [None, None]
    return SplitRing(avail_flags, avail_idx, used_flags, used_idx, events[0], events[1])


def outstanding(avail_idx: int, used_idx: int) -> int:
    """Return how many entries the driver published that the device has not completed.

    Both indices run freely modulo 2^16 (2.7.6, 2.7.8). More than the queue's size is no ring that
    a driver made.
    """
    return (avail_idx - used_idx) & 0xFFFF
