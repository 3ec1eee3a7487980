"""What driver and device share: a split or a packed ring in memory, and what each access does.

A position is a free-running number of entries (split) or descriptors (packed) here; the ring holds
what the specification says: an index modulo 2^16, or an offset and a wrap counter.
"""

from __future__ import annotations

import struct
from typing import Protocol

_U16 = 0xFFFF
_DESC = struct.Struct("<14xH")
_AVAIL, _USED = 1 << 7, 1 << 15

ENABLE, DISABLE, AT = 0, 1, 2


def need_event(event: int, new: int, old: int) -> bool:
    """`vring_need_event` of virtio 1.4, 2.7.10.2."""
    return (new - event - 1) & _U16 < (new - old) & _U16


class Ring(Protocol):
    """A ring as both sides see it. Every method is one memory access."""

    num: int
    event_idx: bool

    def publish(self, at: int, count: int) -> None: ...
    def chain(self, at: int) -> int: ...
    def complete(self, at: int, count: int) -> None: ...
    def is_used(self, at: int) -> bool: ...
    def kick_wanted(self, new: int, old: int) -> bool: ...
    def call_wanted(self, new: int, old: int) -> bool: ...
    def set_calls(self, on: bool) -> None: ...
    def set_used_event(self, at: int) -> None: ...
    def zero_used_event(self) -> None: ...
    def set_kicks(self, on: bool) -> None: ...
    def set_avail_event(self, at: int) -> None: ...
    def encode(self, at: int) -> int: ...


class SplitRing:
    """virtio 1.4, 2.7."""

    def __init__(self, num: int, event_idx: bool, start: int) -> None:
        self.num, self.event_idx = num, event_idx
        self.avail_idx = self.used_idx = start & _U16
        self.avail_flags = self.used_flags = 0
        self.used_event = self.avail_event = start & _U16

    def publish(self, at: int, count: int) -> None:
        self.avail_idx = (at + count) & _U16

    def chain(self, at: int) -> int:
        """Return how many entries the one at `at` takes, 0 where none is available."""
        return 1 if self.avail_idx != at & _U16 else 0

    def complete(self, at: int, count: int) -> None:
        self.used_idx = (at + count) & _U16

    def is_used(self, at: int) -> bool:
        return self.used_idx != at & _U16

    def kick_wanted(self, new: int, old: int) -> bool:
        if self.event_idx:
            return need_event(self.avail_event, new, old)
        return not self.used_flags & 1

    def call_wanted(self, new: int, old: int) -> bool:
        if self.event_idx:
            return need_event(self.used_event, new, old)
        return not self.avail_flags & 1

    def set_calls(self, on: bool) -> None:
        """`avail.flags`: only without event indices (2.7.7)."""
        if not self.event_idx:
            self.avail_flags = 0 if on else 1

    def set_used_event(self, at: int) -> None:
        self.used_event = at & _U16

    def zero_used_event(self) -> None:
        """Linux's way to ask for no calls (virtqueue_disable_cb_split)."""
        self.used_event = 0

    def set_kicks(self, on: bool) -> None:
        if not self.event_idx:
            self.used_flags = 0 if on else 1

    def set_avail_event(self, at: int) -> None:
        self.avail_event = at & _U16

    def encode(self, at: int) -> int:
        return at & _U16


class PackedRing:
    """virtio 1.4, 2.8. Entries are used in the order in which they were made available."""

    def __init__(self, num: int, event_idx: bool, start: int) -> None:
        self.num, self.event_idx = num, event_idx
        self.flags = [0] * num
        for back in range(1, num + 1):  # the lap before: all used
            at = start - back
            wrap = self._wrap(at)
            self.flags[at % num] = (_AVAIL | _USED) if wrap else 0
        self.counts: dict[int, int] = {}
        on = AT if event_idx else ENABLE
        self.driver_flags = self.device_flags = on
        self.driver_desc = self.device_desc = self.encode(start)

    def _wrap(self, at: int) -> bool:
        return not (at // self.num) & 1

    def encode(self, at: int) -> int:
        return at % self.num | self._wrap(at) << 15

    def publish_tail(self, at: int) -> None:
        """Write a descriptor that is not the first of its chain."""
        self.flags[at % self.num] = _AVAIL if self._wrap(at) else _USED

    def publish(self, at: int, count: int) -> None:
        """Write the first descriptor of a chain of `count`: it is written last (2.8.21.1)."""
        self.counts[at % self.num] = count
        self.publish_tail(at)

    def chain(self, at: int) -> int:
        flags, wrap = self.flags[at % self.num], self._wrap(at)
        available = bool(flags & _AVAIL) == wrap and bool(flags & _USED) != wrap
        return self.counts[at % self.num] if available else 0

    def complete(self, at: int, count: int) -> None:
        self.flags[at % self.num] = (_AVAIL | _USED) if self._wrap(at) else 0

    def is_used(self, at: int) -> bool:
        flags, wrap = self.flags[at % self.num], self._wrap(at)
        return bool(flags & _AVAIL) == bool(flags & _USED) == wrap

    def _wanted(self, flags: int, desc: int, new: int, old: int) -> bool:
        if flags != AT:
            return flags == ENABLE
        # Linux: virtqueue_kick_prepare_packed. The event is of this lap or of the one before.
        event = desc & 0x7FFF
        if bool(desc >> 15) != self._wrap(new):
            event -= self.num
        offset = new % self.num
        return need_event(event, offset, offset - (new - old))

    def kick_wanted(self, new: int, old: int) -> bool:
        return self._wanted(self.device_flags, self.device_desc, new, old)

    def call_wanted(self, new: int, old: int) -> bool:
        return self._wanted(self.driver_flags, self.driver_desc, new, old)

    def set_calls(self, on: bool) -> None:
        self.driver_flags = (AT if self.event_idx else ENABLE) if on else DISABLE

    def set_used_event(self, at: int) -> None:
        self.driver_desc = self.encode(at)

    def zero_used_event(self) -> None:
        self.driver_flags = DISABLE

    def set_kicks(self, on: bool) -> None:
        self.device_flags = (AT if self.event_idx else ENABLE) if on else DISABLE

    def set_avail_event(self, at: int) -> None:
        self.device_desc = self.encode(at)

    def raw(self) -> bytes:
        """Return the descriptor area as it stands in memory."""
        return b"".join(_DESC.pack(flags) for flags in self.flags)
