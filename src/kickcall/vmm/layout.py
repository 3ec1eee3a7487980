"""How this QEMU build lays out `struct VirtQueue`: derived from its memory, assumed nowhere. Pure.

The struct is private to QEMU and differs between versions, so nothing but what has held in every
version is taken from the source (hw/virtio/virtio.c, 2.6 to 10.1): a queue begins with its
`VRing`, whose first member is `num` and whose `desc`, `avail` and `used` are adjacent; the queues
of a device are one array of 1,024 (VIRTIO_QUEUE_MAX); each has its `queue_index` and a pointer to
its `VirtIODevice`; right behind that pointer stand `guest_notifier` and `host_notifier`, in this
order; and the `VirtIODevice` points back at the array.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.model import Rings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

VIRTIO_QUEUE_MAX = 1024  # include/hw/virtio/virtio.h

WINDOW = 8192
"""Bytes behind a hit that `derive` wants: enough for its series at the largest stride."""
OWNER_BYTES = 1024
"""Bytes of a `VirtIODevice` in which its pointer to the array is looked for (it is at 0xe0 to 0xe8
in 7.2 to 10.0)."""
_SERIES = 8
_STRIDES = range(96, 520, 8)
_USER_SPACE = range(0x1000, 1 << 47)


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets in bytes within one element of the array, unless it says otherwise."""

    stride: int
    desc: int
    owner: int
    index: int
    notifier_size: int
    """8 for `{int rfd, wfd}`, 12 with `bool initialized` behind (QEMU 6.0 and newer)."""
    owner_vq: int
    """Offset of the pointer to the array within the owner, a `VirtIODevice`."""
    source: str = "derived"

    @property
    def call(self) -> int:
        """Offset of `guest_notifier`."""
        return self.owner + 8

    @property
    def kick(self) -> int:
        """Offset of `host_notifier`."""
        return self.call + self.notifier_size


@dataclass(frozen=True, slots=True)
class StoredPositions:
    """How far a device in QEMU got with a queue. Wrap counters count for packed queues only."""

    last_avail_idx: int
    last_avail_wrap: bool
    used_idx: int
    used_wrap: bool


POSITIONS_BEFORE_INDEX = 16
POSITIONS_SIZE = 16
_POSITIONS = struct.Struct("<H?xH?xH?x4x")


def parse_positions(raw: bytes | None) -> StoredPositions | None:
    """Return the positions in the POSITIONS_SIZE bytes that precede `queue_index`.

    `last_avail_idx`, `last_avail_wrap_counter`, `shadow_avail_idx` and its counter, `used_idx`,
    `used_wrap_counter`, `signalled_used` and its flag, `notification` (hw/virtio/virtio.c, 4.2 to
    10.1). Whether it is so in a given binary is proved by `VmmSession` before it is relied on.
    """
    if raw is None:
        return None
    last, last_wrap, _, _, used, used_wrap = _POSITIONS.unpack(raw)
    return StoredPositions(last, last_wrap, used, used_wrap)


@dataclass(frozen=True, slots=True)
class Slot:
    """An `EventNotifier` as it stands in memory."""

    rfd: int
    wfd: int
    initialized: bool


@dataclass(frozen=True, slots=True)
class Element:
    """One `struct VirtQueue`, decoded."""

    rings: Rings
    owner: int
    index: int
    call: Slot
    kick: Slot


def decode(layout: Layout, raw: bytes) -> Element:
    """Return what the bytes of one element say."""
    desc, avail, used = struct.unpack_from("<3Q", raw, layout.desc)
    (num,) = struct.unpack_from("<I", raw, 0)
    (owner,) = struct.unpack_from("<Q", raw, layout.owner)
    (index,) = struct.unpack_from("<H", raw, layout.index)
    return Element(
        Rings(desc, avail, used, num),
        owner,
        index,
        _slot(raw, layout.call, layout.notifier_size),
        _slot(raw, layout.kick, layout.notifier_size),
    )


def _slot(raw: bytes, offset: int, size: int) -> Slot:
    rfd, wfd = struct.unpack_from("<ii", raw, offset)
    if size == 8:
        # Before `initialized` existed, an unused notifier was all zero or -1.
        return Slot(rfd, wfd, rfd > 0)
    return Slot(rfd, wfd, raw[offset + 8] == 1)


def derive(
    window: bytes, hit: int, queue: int, rings: Rings, read: Callable[[int, int], bytes | None]
) -> Iterator[tuple[Layout, int]]:
    """Yield every (layout, address of the array) that agrees with the memory behind `hit`.

    `hit` is the address where `rings` of queue number `queue` were found, `window` the bytes from
    there on, `read` reads the process (address, length). The notifiers' size is left 0: only
    the state of the queues tells it (see `notifier_size`).
    """
    words = struct.unpack(f"<{len(window) // 8}Q", window[: len(window) // 8 * 8])
    owners: dict[int, tuple[int, ...] | None] = {}
    for stride in _STRIDES:
        step = stride // 8
        if len(words) < (_SERIES + 1) * step:
            continue
        for at in range(3, step):
            owner = words[at]
            if owner != words[at + step] or owner not in _USER_SPACE:
                continue
            if any(words[at + k * step] != owner for k in range(2, _SERIES)):
                continue
            if owner not in owners:
                raw = read(owner, OWNER_BYTES)
                owners[owner] = struct.unpack(f"<{OWNER_BYTES // 8}Q", raw) if raw else None
            yield from _with_owner(window, hit, queue, rings, stride, at * 8, owners[owner], read)


def _with_owner(
    window: bytes,
    hit: int,
    queue: int,
    rings: Rings,
    stride: int,
    owner_at: int,
    owner_words: Iterable[int] | None,
    read: Callable[[int, int], bytes | None],
) -> Iterator[tuple[Layout, int]]:
    bases = set()
    for position, base in enumerate(owner_words or ()):
        desc = hit - queue * stride - base
        if not 16 <= desc <= 64 or desc % 8:
            continue
        if base in bases:
            # The device's own struct follows its VirtIODevice and may hold the pointer again:
            # VirtIORNG keeps its only queue, so `&vdev->vq[0]`, there (hw/virtio/virtio-rng.h).
            continue
        bases.add(base)
        num = read(base + queue * stride, 4)
        if num is None or struct.unpack("<I", num)[0] != rings.num:
            continue
        last = read(base + (VIRTIO_QUEUE_MAX - 1) * stride, stride)
        if last is None or last[desc + owner_at :][:8] != window[owner_at : owner_at + 8]:
            continue
        for index_at in range(24, min(stride - desc, owner_at), 2):
            series = (
                struct.unpack_from("<H", window, index_at + k * stride)[0] for k in range(_SERIES)
            )
            # A guest may number its queues' MSI-X vectors like the queues, but not all 1,024.
            (final,) = struct.unpack_from("<H", last, desc + index_at)
            if final == VIRTIO_QUEUE_MAX - 1 and all(
                value == queue + k for k, value in enumerate(series)
            ):
                yield (
                    Layout(
                        stride=stride,
                        desc=desc,
                        owner=desc + owner_at,
                        index=desc + index_at,
                        notifier_size=0,
                        owner_vq=position * 8,
                    ),
                    base,
                )


def notifier_size(raw: list[bytes], owner_at: int, open_eventfds: Iterable[int]) -> int | None:
    """Return the size of an EventNotifier that all elements in `raw` agree with; None if not one.

    In every element both notifiers must be either unused or two equal numbers of an open eventfd.
    Where none is in use (ioeventfd=off, or a machine that is paused) the size does not matter.
    """
    fds = set(open_eventfds)
    fitting = []
    for size in (12, 8):
        slots = [
            _slot(element, owner_at + 8 + which * size, size) for element in raw for which in (0, 1)
        ]
        used = [slot for slot in slots if slot.initialized]
        unused = [slot for slot in slots if not slot.initialized]
        if all(slot.rfd == slot.wfd and slot.rfd in fds for slot in used) and all(
            (slot.rfd, slot.wfd) in ((0, 0), (-1, -1)) for slot in unused
        ):
            fitting.append(size)
    unused_anyway = len(fitting) == 2 and not any(
        _slot(element, owner_at + 8, 8).initialized for element in raw
    )
    return fitting[0] if len(fitting) == 1 or unused_anyway else None
