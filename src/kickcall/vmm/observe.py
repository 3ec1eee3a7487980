"""One look at a queue: its rings in guest memory and its notifiers, with no help from QEMU."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kickcall.host import eventfds, memory
from kickcall.model import Counters, Layout, QueueState
from kickcall.virtio import packed, split
from kickcall.vmm import layout as layouts

if TYPE_CHECKING:
    from kickcall.model import Notifier, NotifierState, QueueMap
    from kickcall.vmm.session import MappedDevice, VmmSession

_NUM_MAX = 1 << 15
"""The largest queue (virtio 1.4, 2.7 and 2.8)."""
_BIG_ENDIAN = re.compile(r"qemu-system-(s390x|ppc|ppc64|sparc|sparc64|m68k|mips|mips64|hppa)$")
"""Where legacy rings may have the guest's own byte order (virtio 1.4, 2.6.3)."""


@dataclass(frozen=True, slots=True)
class RingView:
    """What the rings say, in the terms of QueueState."""

    avail_idx: int | None = None
    used_idx: int | None = None
    last_avail_idx: int | None = None
    outstanding: int | None = None
    avail_flags: int | None = None
    used_flags: int | None = None
    used_event: int | None = None
    avail_event: int | None = None
    notes: tuple[str, ...] = ()


_UNREADABLE = RingView(notes=("guest RAM could not be read",))


def queue_state(session: VmmSession, device: MappedDevice, queue: QueueMap) -> QueueState:
    """Return the queue's state now. Reads only; a guest that changes it meanwhile is no error."""
    view = ring_view(session, device, queue)
    return QueueState(
        device=device.device.path,
        queue=queue.index,
        layout=queue.layout,
        size=queue.rings.num,
        backend=device.device.backend,
        avail_idx=view.avail_idx,
        used_idx=view.used_idx,
        last_avail_idx=view.last_avail_idx,
        outstanding=view.outstanding,
        avail_flags=view.avail_flags,
        used_flags=view.used_flags,
        used_event=view.used_event,
        avail_event=view.avail_event,
        kick=notifier_state(session, queue.kick),
        call=notifier_state(session, queue.call),
        notes=view.notes,
    )


def counters(
    session: VmmSession, device: MappedDevice, queue: QueueMap, notifier: Notifier | None
) -> Counters:
    """Return the three numbers that an injection through `notifier` is judged by."""
    view = ring_view(session, device, queue)
    state = notifier_state(session, notifier)
    return Counters(None if state is None else state.count, view.avail_idx, view.used_idx)


def notifier_state(session: VmmSession, notifier: Notifier | None) -> NotifierState | None:
    """Return what the kernel says of a notifier; None where it is not the one that was mapped."""
    if notifier is None:
        return None
    state = eventfds.read_eventfd(session.process.pid, notifier.fd)
    return state if state is not None and state.eventfd_id == notifier.eventfd_id else None


def ring_view(session: VmmSession, device: MappedDevice, queue: QueueMap) -> RingView:
    """Return what the queue's rings say. Every value in them may be the guest's lie."""
    where, problem = locate(session, device, queue)
    if problem:
        return RingView(notes=(problem,))
    if queue.layout is Layout.PACKED:
        return _packed_view(session, device, queue, where)
    return _split_view(session, device, queue, where)


def locate(
    session: VmmSession, device: MappedDevice, queue: QueueMap
) -> tuple[list[tuple[int, int]], str]:
    """Return where the queue's fields lie in the VMM (address, length), or why they are not read.

    Split: as `split.fields` has them. Packed: the descriptors, the driver's event area, and the
    device's.
    """
    rings = queue.rings
    if not 0 < rings.num <= _NUM_MAX:
        return [], f"a queue of {rings.num} entries cannot be: not read"
    if session.has_iommu and "VIRTIO_F_IOMMU_PLATFORM" in device.device.features:
        return [], "behind a virtual IOMMU its rings cannot be located: not read"
    features = device.device.features
    program = os.path.basename(session.machine.command[0]) if session.machine.command else ""
    if "VIRTIO_F_VERSION_1" not in features and _BIG_ENDIAN.search(program):
        return [], "a legacy queue of a guest that may be big-endian: not read"
    if queue.layout is Layout.PACKED:
        ranges = [(rings.desc, rings.num * packed.DESC_SIZE), (rings.avail, 4), (rings.used, 4)]
    else:
        ranges = split.fields(rings.avail, rings.used, rings.num, device.device.event_idx)
    found = []
    for gpa, length in ranges:
        hva = session.memory.translate(gpa, length)
        if hva is None:
            return [], (
                f"its rings (desc {rings.desc:#x}, avail {rings.avail:#x}, used {rings.used:#x}) "
                "do not lie in guest RAM: not read"
            )
        found.append((hva, length))
    return found, ""


def _split_view(
    session: VmmSession, device: MappedDevice, queue: QueueMap, where: list[tuple[int, int]]
) -> RingView:
    rings = queue.rings
    parts = memory.read_many(session.process.pid, [*where, *session.position_ranges(device, queue)])
    fields = [part for part in parts[: len(where)] if part is not None]
    if len(fields) < len(where):
        return _UNREADABLE
    ring = split.parse(fields)
    position = layouts.parse_positions(parts[-1]) if len(parts) > len(where) else None
    waiting = split.outstanding(ring.avail_idx, ring.used_idx)
    notes: tuple[str, ...] = ()
    if waiting > rings.num:
        notes = (f"{waiting} entries outstanding in a ring of {rings.num}: no driver does that",)
    return RingView(
        avail_idx=ring.avail_idx,
        used_idx=ring.used_idx,
        last_avail_idx=None if position is None else position.last_avail_idx,
        outstanding=waiting,
        avail_flags=ring.avail_flags,
        used_flags=ring.used_flags,
        used_event=ring.used_event,
        avail_event=ring.avail_event,
        notes=notes,
    )


def _packed_view(
    session: VmmSession, device: MappedDevice, queue: QueueMap, where: list[tuple[int, int]]
) -> RingView:
    rings = queue.rings
    parts = memory.read_many(session.process.pid, [*where, *session.position_ranges(device, queue)])
    if parts[0] is None or parts[1] is None or parts[2] is None:
        return _UNREADABLE
    driver, of_device = packed.parse_event(parts[1]), packed.parse_event(parts[2])
    view = RingView(
        avail_flags=driver.mode,
        used_flags=of_device.mode,
        used_event=driver.desc,
        avail_event=of_device.desc,
    )
    position = layouts.parse_positions(parts[3]) if len(parts) > 3 else None
    if position is None or max(position.last_avail_idx, position.used_idx) >= rings.num:
        return replace(
            view,
            notes=("a packed ring tells no position, and neither does the device's back-end",),
        )
    published, fetched, used = packed_positions(parts[0], position, rings.num)
    return replace(
        view,
        avail_idx=published.encode(),
        used_idx=used.encode(),
        last_avail_idx=fetched.encode(),
        outstanding=packed.distance(used, published, rings.num),
    )


def packed_positions(
    ring: bytes, stored: layouts.StoredPositions, num: int
) -> tuple[packed.Position, packed.Position, packed.Position]:
    """Return how far the driver has published, and the device has fetched and used.

    The driver's position stands nowhere: it is where the available descriptors end.
    """
    fetched = packed.Position(stored.last_avail_idx, stored.last_avail_wrap)
    used = packed.Position(stored.used_idx, stored.used_wrap)
    return fetched.advance(packed.count_available(ring, fetched), num), fetched, used
