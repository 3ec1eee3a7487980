"""The packed virtqueue: positions, descriptor flags and event areas (virtio 1.4, 2.8)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

DESC_SIZE = 16
DESC_F_AVAIL = 1 << 7
DESC_F_USED = 1 << 15

EVENT_FLAGS_ENABLE = 0
EVENT_FLAGS_DISABLE = 1
EVENT_FLAGS_DESC = 2

_EVENT = struct.Struct("<HH")
_DESC_FLAGS = struct.Struct("<14xH")


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a packed ring: a descriptor's offset and the wrap counter there (2.8.1)."""

    offset: int
    wrap: bool

    def encode(self) -> int:
        """Return it as an event area holds one: offset in bits 0 to 14, wrap in 15 (2.8.10)."""
        return self.offset | self.wrap << 15

    def advance(self, count: int, num: int) -> Position:
        """Return the position `count` descriptors on, in a ring of `num`."""
        laps, offset = divmod(self.offset + count, num)
        return Position(offset, self.wrap ^ bool(laps & 1))


@dataclass(frozen=True, slots=True)
class EventArea:
    """`struct pvirtq_event_suppress` (2.8.10)."""

    desc: int
    """Offset in bits 0 to 14 and wrap counter in bit 15; counts only with EVENT_FLAGS_DESC."""
    flags: int
    """0 enable, 1 disable, 2 at a descriptor; 3 is reserved. The upper 14 bits are reserved."""

    @property
    def mode(self) -> int:
        """The two bits of `flags` that mean something."""
        return self.flags & 3


def parse_event(raw: bytes) -> EventArea:
    """Return the event area in the first 4 bytes of `raw`."""
    desc, flags = _EVENT.unpack_from(raw)
    return EventArea(desc, flags)


def available(flags: int, wrap: bool) -> bool:
    """Tell whether a descriptor with `flags` is available where the wrap counter is `wrap`.

    AVAIL equals the driver's wrap counter, and USED does not (2.8.1).
    """
    return bool(flags & DESC_F_AVAIL) == wrap and bool(flags & DESC_F_USED) != wrap


def count_available(ring: bytes, start: Position) -> int:
    """Return how many descriptors from `start` on are available, at the most the whole ring.

    `ring` is the descriptor area. The driver makes descriptors available in ring order, so the
    first one that is not ends the count (2.8.6).
    """
    num = len(ring) // DESC_SIZE
    if not 0 <= start.offset < num:
        return 0
    at = start
    for count in range(num):
        (flags,) = _DESC_FLAGS.unpack_from(ring, at.offset * DESC_SIZE)
        if not available(flags, at.wrap):
            return count
        at = at.advance(1, num)
    return num


def distance(start: Position, end: Position, num: int) -> int:
    """Return how many descriptors lie from `start` to `end`: 0 to 2 * num - 1."""
    laps = num if start.wrap != end.wrap else 0
    return (end.offset - start.offset + laps) % (2 * num)
