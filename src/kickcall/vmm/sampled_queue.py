"""What is known of one queue between two looks, and what follows from what a look read of it?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kickcall.diagnose.states import QueueFixed, QueueRole, Sample
from kickcall.model import BackendKind, Layout
from kickcall.virtio import packed, split
from kickcall.vmm.observe import packed_positions

if TYPE_CHECKING:
    from kickcall.host.gather import Field
    from kickcall.model import QueueMap
    from kickcall.vmm import layout as layouts
    from kickcall.vmm.session import MappedDevice

UNMAPPED = "its memory is no longer mapped in QEMU"
_ANEW = "the driver set it up anew"
_RESET = "the driver reset it"
MOVED = "QEMU's record of it belongs to another device"
RENEWED = "its notifiers were replaced"


class Values(NamedTuple):
    """What the rings and QEMU's record of the queue say, in the order of a `Sample`."""

    avail_idx: int | None = None
    used_idx: int | None = None
    last_avail_idx: int | None = None
    avail_flags: int | None = None
    used_flags: int | None = None
    used_event: int | None = None
    avail_event: int | None = None


_NOTHING = Values()


@dataclass(slots=True, eq=False)
class SampledQueue:
    """What is known of one queue between two looks."""

    number: int
    mapped: MappedDevice
    map: QueueMap
    fixed: QueueFixed
    where: list[Field]
    """As `observe.locate` has them."""
    position_at: int | None
    """Where in QEMU's record of the queue its own position stands; None where it means nothing."""
    cannot: str
    """Why the rings cannot be read at all."""
    expected: tuple[bytes, ...] = ()
    """What in QEMU's record must stay as it is."""
    problem: str = ""
    """Why the queue is no longer what was mapped."""
    renewed: bool = False
    """Its notifiers are no longer those that were mapped."""
    head: int | None = None
    """Number of the field that holds the flags of the next descriptor (packed)."""
    values: Values = _NOTHING
    kick_count: int | None = None
    call_count: int | None = None
    waiting: bool = True

    def state(self) -> tuple[object, ...]:
        """Return what makes two looks at the queue differ."""
        return self.values, self.problem, self.renewed, self.kick_count, self.call_count

    def sample(self, at: float) -> Sample:
        """Return what is known as a Sample."""
        reason = self.cannot or self.problem
        values = _NOTHING if reason else self.values
        return Sample(at, *values, self.kick_count, self.call_count, reason)


def record_field(queue: SampledQueue) -> Field:
    assert queue.mapped.array is not None
    return queue.map.virtqueue_address, queue.mapped.array.layout.stride


def fixed_parts(layout: layouts.Layout, raw: bytes) -> tuple[bytes, ...]:
    """Return what of QEMU's record stays as long as the map holds: rings, number, notifiers."""
    return (
        raw[:4],
        raw[layout.desc : layout.desc + 24],
        raw[layout.index : layout.index + 2],
        raw[layout.owner : layout.kick + layout.notifier_size],
    )


def note_difference(queue: SampledQueue, was: layouts.Element, now: layouts.Element) -> None:
    if now.rings != was.rings:
        queue.problem = _ANEW if now.rings.desc else _RESET
    elif (now.owner, now.index) != (was.owner, was.index):
        queue.problem = MOVED
    elif (now.kick, now.call) != (was.kick, was.call):
        queue.renewed = True


def split_values(ring: split.SplitRing, position: layouts.StoredPositions | None) -> Values:
    return Values(
        ring.avail_idx,
        ring.used_idx,
        None if position is None else position.last_avail_idx,
        ring.avail_flags,
        ring.used_flags,
        ring.used_event,
        ring.avail_event,
    )


def fits(values: Values, size: int) -> bool:
    """Tell whether used, fetched and published follow each other within the size of the ring."""
    assert values.avail_idx is not None
    assert values.used_idx is not None
    whole = (values.avail_idx - values.used_idx) & 0xFFFF
    if whole > size:
        return False
    last = values.last_avail_idx
    return last is None or (last - values.used_idx) & 0xFFFF <= whole


def take_event_areas(queue: SampledQueue, raw: bytes) -> None:
    driver, of_device = packed.parse_event(raw), packed.parse_event(raw[4:])
    queue.values = queue.values._replace(
        avail_flags=driver.mode,
        used_flags=of_device.mode,
        used_event=driver.desc,
        avail_event=of_device.desc,
    )


def take_positions(queue: SampledQueue, ring: bytes, position: layouts.StoredPositions) -> bool:
    """Take over the positions of a packed queue; tell whether they changed."""
    published, fetched, used = packed_positions(ring, position, queue.fixed.size)
    before = queue.values
    queue.values = before._replace(
        avail_idx=published.encode(), used_idx=used.encode(), last_avail_idx=fetched.encode()
    )
    return queue.values != before


def is_waiting(queue: SampledQueue) -> bool:
    values, fixed = queue.values, queue.fixed
    if values.avail_idx is None or values.used_idx is None:
        return True
    if fixed.role is QueueRole.REQUEST and values.avail_idx != values.used_idx:
        return True
    tells = fixed.layout is Layout.SPLIT or values.avail_flags == packed.EVENT_FLAGS_DESC
    if tells and values.used_event is not None and values.used_event != values.used_idx:
        return True
    unread = queue.kick_count and fixed.backend is not BackendKind.VHOST_KERNEL
    return bool(unread or queue.call_count)
