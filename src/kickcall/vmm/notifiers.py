"""Where this QEMU keeps the notifiers of each queue: found in its memory, and proved.

A device's array of `struct VirtQueue` is taken only if all of this agrees: the three ring addresses
and the size of a queue as the monitor tells them; the queues' numbers, counting up through the
array; one owner pointer in all of them; that owner points back at the array, and its canonical path
(a string in QEMU's DeviceState) is the device's QOM path; every notifier in use is an eventfd that
the process has open now. Copies of the addresses elsewhere in the heap fail these tests.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kickcall.errors import MapError
from kickcall.host import eventfds, memory
from kickcall.vmm import layout as layouts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from kickcall.model import NotifierState, Rings
    from kickcall.vmm.layout import Element, Layout
    from kickcall.vmm.virtio import DeviceFacts

    _Read = Callable[[int, int], bytes | None]

_SLAB = 4 << 20
_HITS_MAX = 2000
"""A guest chooses where its rings are, and may choose numbers that stand everywhere."""
_MMAPPED_DESC = 16 + 16
"""malloc's header, then what precedes `desc` in a VRing (num, num_default, align, padding)."""
_PATH_POINTERS = 256
"""Bytes of the owner in which its canonical path is looked for: `DeviceState` begins with an Object
(40 bytes), `id` and `canonical_path` (include/hw/qdev-core.h, 5.2 to 10.1)."""


@dataclass(frozen=True, slots=True)
class QueueArray:
    """The proved array of one device."""

    address: int
    owner: int
    layout: Layout
    elements: tuple[Element, ...]
    """One for each queue of the device, as they were when the array was proved."""
    eventfd_ids: Mapping[int, int]
    """Kernel ids of the eventfds that the elements name, by descriptor number."""

    def element_address(self, queue: int) -> int:
        """Return where the `struct VirtQueue` of `queue` lies."""
        return self.address + queue * self.layout.stride


def find_arrays(
    pid: int,
    devices: Sequence[DeviceFacts],
    guest_ram: Sequence[tuple[int, int]],
    known: Layout | None = None,
) -> dict[str, QueueArray | MapError]:
    """Return the array of each device that has a queue, by QOM path, or why it was refused.

    `guest_ram` holds the (start, end) addresses of guest memory in the process: it is not searched,
    as all in it is the guest's word. `known` is the exact layout where debug symbols told it.
    """
    wanted = {facts.backend_path: facts for facts in devices if facts.queues}
    found: dict[str, QueueArray | MapError] = {}
    if not wanted:
        return found
    states = eventfds.eventfds_of(pid)
    looked_at: Counter[str] = Counter()
    for hit, queue, facts in _hits(pid, wanted, guest_ram):
        if facts.backend_path not in wanted or looked_at[facts.backend_path] >= _HITS_MAX:
            continue
        looked_at[facts.backend_path] += 1
        outcome = _prove(pid, hit, queue, facts, states, known)
        if outcome is None:
            continue
        found[facts.backend_path] = outcome
        wanted.pop(facts.backend_path)
        if isinstance(outcome, QueueArray) and known is None and outcome.eventfd_ids:
            known = outcome.layout
    for path, facts in wanted.items():
        found[path] = MapError(
            f"{facts.device.id}: QEMU's record of its queues was not found in QEMU's memory"
        )
    return found


def _allocations(
    pid: int, guest_ram: Sequence[tuple[int, int]]
) -> tuple[list[memory.Mapping], list[memory.Mapping]]:
    """Return the process's heap, and the other anonymous memory that is not the guest's."""
    heap, others = [], []
    for mapping in memory.mappings(pid):
        if not (mapping.anonymous and mapping.permissions.startswith("rw-")):
            continue
        if any(start < mapping.end and mapping.start < end for start, end in guest_ram):
            continue
        if mapping.name == "[heap]":
            heap.append(mapping)
        elif not mapping.name:
            others.append(mapping)
    return heap, others


def _hits(
    pid: int, wanted: Mapping[str, DeviceFacts], guest_ram: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, DeviceFacts]]:
    """Yield each address where the ring addresses of one queue of a device stand, and its number.

    `wanted` may shrink while this runs: who is no longer in it is no longer searched for.
    """
    heap, others = _allocations(pid, guest_ram)
    yield from _hits_at_page_starts(pid, wanted, others)
    for mappings in (heap, others):
        yield from _hits_anywhere(pid, wanted, mappings)


def _pattern(rings: Rings) -> bytes:
    return struct.pack("<3Q", rings.desc, rings.avail, rings.used)


def _hits_at_page_starts(
    pid: int, wanted: Mapping[str, DeviceFacts], where: Sequence[memory.Mapping]
) -> Iterator[tuple[int, int, DeviceFacts]]:
    """An array is 150 KB: glibc gives it a mapping of its own as long as its threshold is low.

    Then it starts 16 bytes into a page, and one look at each page is enough (malloc(3),
    M_MMAP_THRESHOLD).
    """
    if not wanted or not where:
        return
    texts = {
        _pattern(facts.queues[0].rings): facts for facts in wanted.values() if 0 in facts.queues
    }
    runs = memory.present_runs(pid, where)
    for start, slab in memory.slabs(pid, runs, _SLAB, 0):
        for at in range(_MMAPPED_DESC, len(slab), mmap.PAGESIZE):
            facts_here = texts.get(slab[at : at + 24])
            if facts_here is not None:
                yield start + at, 0, facts_here


def _hits_anywhere(
    pid: int, wanted: Mapping[str, DeviceFacts], where: Sequence[memory.Mapping]
) -> Iterator[tuple[int, int, DeviceFacts]]:
    """Search for the queue of each device whose addresses have the fewest zero bytes.

    The zero bytes at the ends are not searched for: most memory is zero, and the search would stop
    at each.
    """
    if not wanted or not where:
        return
    needles = {}
    for path, facts in wanted.items():
        patterns = {number: _pattern(told.rings) for number, told in facts.queues.items()}
        queue = min(patterns, key=lambda number: patterns[number].count(0))
        text = patterns[queue]
        needles[path] = (queue, text, text.strip(b"\0"), len(text) - len(text.lstrip(b"\0")))
    for start, slab in memory.slabs(pid, memory.present_runs(pid, where), _SLAB, 24):
        for path in list(wanted):
            facts = wanted[path]
            queue, text, needle, offset = needles[path]
            at = slab.find(needle)
            while at >= 0:
                found = at - offset
                if found >= 0 and found % 8 == 0 and slab.startswith(text, found):
                    yield start + found, queue, facts
                    if path not in wanted:
                        break
                at = slab.find(needle, at + 1)
        if not wanted:
            return


def _prove(
    pid: int,
    hit: int,
    queue: int,
    facts: DeviceFacts,
    states: Mapping[int, NotifierState],
    known: Layout | None,
) -> QueueArray | MapError | None:
    """Return the array that has queue number `queue` at `hit`; None where that is no such array.

    A MapError says that it is the device's array, and that something in it is not as it must be.
    """

    def read(address: int, length: int) -> bytes | None:
        return memory.read(pid, address, length)

    rings = facts.queues[queue].rings
    if known is not None:
        candidates = _with_layout(known, hit, queue, read)
    else:
        window = read(hit, layouts.WINDOW) or read(hit, layouts.WINDOW // 2)
        candidates = list(layouts.derive(window, hit, queue, rings, read)) if window else []
    own = [
        (layout, base)
        for layout, base in candidates
        if path_matches(pid, _owner(layout, base, read), facts.backend_path)
    ]
    if not own:
        return None
    name = facts.device.id
    if len(own) > 1:
        return MapError(f"{name}: {len(own)} layouts of QEMU's queue record fit: ambiguous")
    layout, base = own[0]
    count = facts.device.num_queues
    raw = read(base, count * layout.stride)
    if raw is None:
        return None
    parts = [raw[k * layout.stride : (k + 1) * layout.stride] for k in range(count)]
    if not layout.notifier_size:
        size = layouts.notifier_size(parts, layout.owner, states)
        if size is None:
            return MapError(
                f"{name}: what stands where its queues' notifiers should is no open eventfd of QEMU"
            )
        layout = replace(layout, notifier_size=size)
    elements = tuple(layouts.decode(layout, part) for part in parts)
    if (problem := _disagreement(elements, facts, states)) is not None:
        return MapError(f"{name}: {problem}")
    used = {
        slot.rfd: states[slot.rfd].eventfd_id
        for element in elements
        for slot in (element.kick, element.call)
        if slot.initialized
    }
    return QueueArray(base, elements[0].owner, layout, elements, used)


def _with_layout(layout: Layout, hit: int, queue: int, read: _Read) -> list[tuple[Layout, int]]:
    """Return the array at `hit` if a layout that is known already fits there."""
    base = hit - layout.desc - queue * layout.stride
    owner = _owner(layout, base, read)
    back = read(owner + layout.owner_vq, 8) if owner else None
    return [(layout, base)] if back == struct.pack("<Q", base) else []


def _owner(layout: Layout, base: int, read: _Read) -> int:
    raw = read(base + layout.owner, 8)
    return int(struct.unpack("<Q", raw)[0]) if raw else 0


def path_matches(pid: int, owner: int, path: str) -> bool:
    """Tell whether one of the owner's first pointers leads to the string `path`."""
    raw = memory.read(pid, owner, _PATH_POINTERS)
    if raw is None:
        return False
    text = path.encode() + b"\0"
    return any(
        memory.read(pid, pointer, len(text)) == text
        for pointer in struct.unpack(f"<{_PATH_POINTERS // 8}Q", raw)
        if 0x1000 <= pointer < 1 << 47
    )


def _disagreement(
    elements: Iterable[Element], facts: DeviceFacts, states: Mapping[int, NotifierState]
) -> str | None:
    """Return in what the array differs from what else is known, or None."""
    owners = set()
    seen: dict[int, str] = {}
    for number, element in enumerate(elements):
        owners.add(element.owner)
        told = facts.queues.get(number)
        if element.index != number:
            return f"queue {number} calls itself {element.index}"
        if told is not None and told.rings != element.rings:
            return f"queue {number} changed while it was mapped: try again"
        for event, slot in (("call", element.call), ("kick", element.kick)):
            if not slot.initialized:
                continue
            if slot.rfd != slot.wfd or slot.rfd not in states:
                return f"the {event} notifier of queue {number} is no open eventfd of QEMU"
            if states[slot.rfd].eventfd_id < 0:
                return "this kernel does not tell eventfds apart: Linux 5.6 or newer is needed"
            me = f"the {event} notifier of queue {number}"
            if slot.rfd in seen:
                return f"{me} and {seen[slot.rfd]} are the same descriptor, {slot.rfd}"
            seen[slot.rfd] = me
    return None if len(owners) == 1 else "its queues have different owners"
