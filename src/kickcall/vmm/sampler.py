"""One look at all queues of a machine, again and again, with no help from QEMU and no pause.

What does not change is worked out once: where every field lies. A look then is some
process_vm_readv(2) calls, and for split rings in shared memory that can be mapped not even that.
Only what changed is decoded, and a `Sample` is built only for who asks for it: thousands of queues
that rest cost a microsecond each or less.

Order matters, as driver and device go on meanwhile. A queue whose values do not fit each other is
read once more, in the order used, fetched, published: what is read later can then only be further
on, so the values fit unless the ring is broken.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kickcall.diagnose.states import QueueFixed, Sample
from kickcall.errors import KickcallError
from kickcall.host import memory
from kickcall.host.counts import Counts
from kickcall.host.gather import Gather
from kickcall.host.rows import MappedRows, ReadRows
from kickcall.host.shared_memory import map_shared
from kickcall.model import Layout
from kickcall.virtio import packed, split
from kickcall.vmm import layout as layouts
from kickcall.vmm.observe import locate
from kickcall.vmm.roles import use_of
from kickcall.vmm.sampled_queue import (
    MOVED,
    RENEWED,
    UNMAPPED,
    SampledQueue,
    fits,
    fixed_parts,
    is_waiting,
    note_difference,
    record_field,
    split_values,
    take_event_areas,
    take_positions,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kickcall.host.gather import Field
    from kickcall.host.shared_memory import SharedRun
    from kickcall.model import Notifier, QueueMap
    from kickcall.vmm.session import MappedDevice, VmmSession

FINE_S = 0.01
"""Seconds between samples while something looks stalled."""
COARSE_S = 0.25
"""Seconds between samples while all is well."""

_DESC_FLAGS_AT = 14
"""Offset of `flags` in `struct pvirtq_desc` (virtio 1.4, 2.8.13)."""


def next_interval(stalled: bool, last: float = COARSE_S) -> float:
    """Return how many seconds to wait until the next sample.

    `stalled`: something looks stalled, or nearly so. `last` is the interval before: once all is
    well again the steps grow twofold, so that a queue that stumbles is not lost from sight.
    """
    return FINE_S if stalled else min(COARSE_S, max(last, FINE_S) * 2)


@dataclass(frozen=True, slots=True)
class Look:
    """What one look found. Numbers are positions in `Sampler.queues`."""

    at: float
    moved: tuple[int, ...]
    """Queues of which something changed since the look before."""
    waiting: tuple[int, ...]
    """Queues that are not at rest: work is outstanding, or not reaped, or a notifier is not empty.
    All others can be neither stalled nor about to be."""


class Sampler:
    """Looks at the mapped queues of a machine. Use it in a `with` block, or call `close`.

    `only` names the queues wanted, as (device, queue number); None for a number means all queues of
    that device, and no `only` means all of the machine. Queues that could not be mapped are left
    out. Reads only, and holds no monitor; holds memory of the VM mapped until it is closed, or
    until a look finds that the VM ended.
    """

    queues: tuple[QueueFixed, ...]
    """The queues, with what is fixed about them. All else is parallel to this."""
    maps: tuple[QueueMap, ...]
    devices: tuple[MappedDevice, ...]

    def __init__(
        self,
        session: VmmSession,
        only: Iterable[tuple[MappedDevice, int | None]] | None = None,
        *,
        map_memory: bool = True,
    ) -> None:
        self._session = session
        self._only = (
            None if only is None else {(device.facts.backend_path, queue) for device, queue in only}
        )
        self._map_memory = map_memory
        self._runs: tuple[SharedRun, ...] = ()
        self._mapped: MappedRows | None = None
        self._first = True
        self._waiting: set[int] = set()
        """Queues that are not at rest."""
        self._lingering: set[int] = set()
        """Queues that moved at the last look."""
        self._counts = Counts(session.process.pid)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    # --- looking ---

    def look(self, at: float | None = None) -> Look:
        """Look at all queues. `at` is the time of the look (None: time.monotonic()).

        Raises MachineGoneError where the VM ended; its memory is let go of then.
        """
        if self._mapped is None:
            raise KickcallError(f"the sampler of {self._session.machine.name} was closed")
        try:
            self._session.process.check_alive()
            self._at = time.monotonic() if at is None else at
            moved = self._read()
        except KickcallError:
            self.close()
            raise
        first, self._first = self._first, False
        # What moved is looked at once more after it came to rest: the device arms its kick last.
        active = set(range(len(self._queues))) if first else moved | self._waiting | self._lingering
        looked_at = [self._queues[number] for number in sorted(active)]
        before = [queue.state() for queue in looked_at]
        self._take_rings(looked_at)
        crept = self._take_packed(active)
        for number in crept - active:
            looked_at.append(self._queues[number])
            before.append(())
        for queue in looked_at:
            self._settle(queue)
        moved = {
            queue.number
            for queue, was in zip(looked_at, before, strict=True)
            if first or queue.state() != was
        }
        self._lingering = moved
        return Look(self._at, tuple(sorted(moved)), tuple(sorted(self._waiting)))

    def latest(self, number: int) -> Sample:
        """Return queue `number` as the last look found it."""
        return self._queues[number].sample(self._at)

    def sample(self, at: float | None = None) -> list[Sample]:
        """Look, and return all queues. For thousands of queues `look` and `latest` are cheaper."""
        self.look(at)
        return [queue.sample(self._at) for queue in self._queues]

    @property
    def stale(self) -> dict[int, str]:
        """The queues that are no longer what was mapped, and why: time for `refresh`."""
        return {
            queue.number: queue.problem or RENEWED
            for queue in self._queues
            if queue.problem or queue.renewed
        }

    @property
    def mapped(self) -> int:
        """How many queues are read in memory that is mapped here."""
        return self._mapped_rows

    def refresh(self) -> None:
        """Map the machine anew, and all that follows from it: `queues` may be others then."""
        self._session.refresh()
        self.prepare()

    def prepare(self) -> None:
        """Take over the session's map after somebody else refreshed it."""
        self.close()
        self._prepare()

    def close(self) -> None:
        """Let go of the VM's memory and of all descriptors."""
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None
        for run in self._runs:
            run.view.close()
        self._runs = ()
        self._counts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- working out what to read ---

    def _prepare(self) -> None:
        pid = self._session.process.pid
        self._queues = [
            self._queue(number, device, queue)
            for number, (device, queue) in enumerate(self._chosen())
        ]
        self.queues = tuple(queue.fixed for queue in self._queues)
        self.maps = tuple(queue.map for queue in self._queues)
        self.devices = tuple(queue.mapped for queue in self._queues)
        self._first = True
        self._at = time.monotonic()
        self._waiting = set()
        self._lingering = set()
        self._records = ReadRows(pid, [[record_field(queue)] for queue in self._queues])
        owners: dict[int, tuple[bytes, list[SampledQueue]]] = {}
        for queue in self._queues:
            array = queue.mapped.array
            assert array is not None
            back = struct.pack("<Q", array.address)
            owners.setdefault(array.owner + array.layout.owner_vq, (back, []))[1].append(queue)
        self._owners = list(owners.values())
        self._owner_rows = ReadRows(pid, [[(address, 8)] for address in owners])
        self._prepare_rings(pid)
        self._expect()

    def _chosen(self) -> Iterator[tuple[MappedDevice, QueueMap]]:
        for device in self._session.devices:
            if device.array is None or not device.device.driver_ok:
                continue
            path = device.facts.backend_path
            for number, element in enumerate(device.array.elements):
                if self._only is not None and not self._only & {(path, None), (path, number)}:
                    continue
                if element.rings.desc:
                    yield device, device.queue_map(number)

    def _queue(self, number: int, mapped: MappedDevice, queue: QueueMap) -> SampledQueue:
        device = mapped.device
        use = use_of(device, queue.index)
        where, cannot = locate(self._session, mapped, queue)
        positions = self._session.position_ranges(mapped, queue)
        return SampledQueue(
            number=number,
            mapped=mapped,
            map=queue,
            fixed=QueueFixed(
                device=device.path,
                queue=queue.index,
                size=queue.rings.num,
                layout=queue.layout,
                event_idx=device.event_idx,
                backend=device.backend,
                role=use.role,
                calls_when_idle=use.calls_when_idle,
            ),
            where=where,
            position_at=positions[0][0] - queue.virtqueue_address if positions else None,
            cannot=cannot.removesuffix(": not read"),
        )

    def _prepare_rings(self, pid: int) -> None:
        readable = [queue for queue in self._queues if not queue.cannot]
        splits = [queue for queue in readable if queue.map.layout is Layout.SPLIT]
        packeds = [queue for queue in readable if queue.map.layout is Layout.PACKED]
        if self._map_memory and splits:
            ram = [(run.hva, run.hva + run.length) for run in self._session.memory.ranges]
            self._runs = map_shared(pid, ram)
        self._mapped = MappedRows(self._runs, [queue.where for queue in splits])
        unfit = set(self._mapped.unfit)
        self._mapped_rows = len(splits) - len(unfit)
        self._mapped_queues = splits
        self._read_queues = [queue for k, queue in enumerate(splits) if k in unfit] + packeds
        # Of a packed queue only the event areas stand still.
        self._rings = ReadRows(
            pid,
            [
                # The last of a split ring stands behind all of the used ring, where reading costs
                # most. It is wanted only of queues that are not at rest.
                queue.where[:3] if queue.map.layout is Layout.SPLIT else queue.where[1:]
                for queue in self._read_queues
            ],
        )
        self._ring_of: dict[int, tuple[MappedRows | ReadRows, int]] = {}
        for k, queue in enumerate(splits):
            if k not in unfit:
                self._ring_of[queue.number] = (self._mapped, k)
        for k, queue in enumerate(self._read_queues):
            self._ring_of[queue.number] = (self._rings, k)
        self._packed = [queue for queue in packeds if queue.position_at is not None]
        for k, queue in enumerate(self._packed):
            queue.head = k
        self._heads = Gather(
            pid,
            [(queue.where[0][0] + _DESC_FLAGS_AT, 2) for queue in self._packed],
            merge=False,
        )
        self._heads_before = bytes(2 * len(self._packed))

    def _expect(self) -> None:
        """Remember how QEMU's records look now, and check that they are still what was mapped."""
        self._records.read()
        for queue in self._queues:
            raw = self._records.row(queue.number)
            array = queue.mapped.array
            assert array is not None
            if raw is None:
                queue.problem = UNMAPPED
                continue
            was = array.elements[queue.map.index]
            now = layouts.decode(array.layout, raw)
            if now == was:
                queue.expected = fixed_parts(array.layout, raw)
            else:
                note_difference(queue, was, now)

    # --- reading ---

    def _read(self) -> set[int]:
        """Read everything that stands at a fixed place; return the queues that changed."""
        moved = set()
        # The device's position before the rings: what it has fetched was published before.
        for number in self._records.read():
            moved.add(number)
            self._check_record(self._queues[number])
        for k in self._owner_rows.read():
            self._check_owner(k, moved)
        if self._first:
            for k in range(len(self._owners)):
                self._check_owner(k, moved)
        moved.update(self._read_queues[k].number for k in self._rings.read())
        if self._mapped is not None:
            moved.update(self._mapped_queues[k].number for k in self._mapped.read())
        return moved

    def _check_record(self, queue: SampledQueue) -> None:
        raw = self._records.row(queue.number)
        array = queue.mapped.array
        assert array is not None
        if raw is None:
            queue.problem = UNMAPPED
        elif fixed_parts(array.layout, raw) != queue.expected and not queue.problem:
            was = array.elements[queue.map.index]
            note_difference(queue, was, layouts.decode(array.layout, raw))

    def _check_owner(self, k: int, moved: set[int]) -> None:
        back, queues = self._owners[k]
        if self._owner_rows.row(k) != back:
            for queue in queues:
                queue.problem = queue.problem or MOVED
                moved.add(queue.number)

    def _take_rings(self, queues: list[SampledQueue]) -> None:
        """Take over what was read of split rings and of event areas."""
        odd = []
        readable = [queue for queue in queues if not (queue.cannot or queue.problem)]
        late = [
            queue
            for queue in readable
            if queue.fixed.layout is Layout.SPLIT
            and queue.fixed.event_idx
            and self._ring_of[queue.number][0] is self._rings
        ]
        found = memory.read_many(self._session.process.pid, [queue.where[3] for queue in late])
        avail_events = dict(zip((queue.number for queue in late), found, strict=True))
        for queue in readable:
            rows, k = self._ring_of[queue.number]
            raw = rows.row(k)
            if raw is None:
                queue.problem = UNMAPPED
                continue
            if queue.fixed.layout is Layout.PACKED:
                take_event_areas(queue, raw)
                continue
            parts = [raw[:4], raw[4:8]]
            if queue.fixed.event_idx:
                avail_event = avail_events.get(queue.number) or raw[10:]
                if not avail_event:
                    queue.problem = UNMAPPED
                    continue
                parts += [raw[8:10], avail_event]
            queue.values = split_values(split.parse(parts), self._position(queue))
            if not fits(queue.values, queue.fixed.size):
                odd.append(queue)
        if odd:
            self._read_in_order(odd)

    def _position(self, queue: SampledQueue) -> layouts.StoredPositions | None:
        if queue.position_at is None:
            return None
        raw = self._records.row(queue.number)
        if raw is None:
            return None
        return layouts.parse_positions(
            raw[queue.position_at : queue.position_at + layouts.POSITIONS_SIZE]
        )

    def _read_in_order(self, queues: list[SampledQueue]) -> None:
        """Read split queues whose values did not fit, from downstream to upstream."""
        ranges: list[Field] = []
        for queue in queues:
            avail, used, *events = queue.where
            ranges += [*events[:1], used]
            if queue.position_at is not None:
                at = queue.map.virtqueue_address + queue.position_at
                ranges.append((at, layouts.POSITIONS_SIZE))
            ranges += [*events[1:], avail]
        found = memory.read_many(self._session.process.pid, ranges)
        at = 0
        for queue in queues:
            has_events, has_position = len(queue.where) > 2, queue.position_at is not None
            count = 2 + 2 * has_events + has_position
            answer, at = found[at : at + count], at + count
            position = answer.pop(1 + has_events) if has_position else None
            # Downstream first, as asked; `split.parse` has avail, used, used_event, avail_event.
            order = (3, 1, 0, 2) if has_events else (1, 0)
            parts = [part for k in order if (part := answer[k]) is not None]
            if len(parts) < len(order):
                queue.problem = UNMAPPED
            else:
                queue.values = split_values(split.parse(parts), layouts.parse_positions(position))

    def _take_packed(self, look_at: set[int]) -> set[int]:
        """Read how far packed queues are, and take it over; return those that moved.

        Where the device goes on, one descriptor tells whether anything is available; only then the
        whole ring is read.
        """
        for queue in self._packed:
            if queue.number in look_at and (position := self._packed_position(queue)) is not None:
                assert queue.head is not None
                at = queue.where[0][0] + position.last_avail_idx * packed.DESC_SIZE
                self._heads.move(queue.head, at + _DESC_FLAGS_AT)
        self._heads.read()
        heads = bytes(self._heads.buffer)
        moved, rings = set(), []
        for queue in self._packed:
            assert queue.head is not None
            at = 2 * queue.head
            flags = heads[at : at + 2]
            if queue.number not in look_at and flags == self._heads_before[at : at + 2]:
                continue
            if queue.problem:
                continue
            position = self._packed_position(queue)
            if queue.head in self._heads.missing:
                queue.problem = UNMAPPED
                moved.add(queue.number)
            elif position is None:
                queue.values = queue.values._replace(
                    avail_idx=None, used_idx=None, last_avail_idx=None
                )
            elif packed.available(int.from_bytes(flags, "little"), position.last_avail_wrap):
                rings.append(queue)
            elif take_positions(queue, b"", position):
                moved.add(queue.number)
        self._heads_before = heads
        return moved | self._read_packed_rings(rings)

    def _packed_position(self, queue: SampledQueue) -> layouts.StoredPositions | None:
        """Return the device's position; None where it lies outside the ring."""
        found = self._position(queue)
        if found is None or max(found.last_avail_idx, found.used_idx) >= queue.fixed.size:
            return None
        return found

    def _read_packed_rings(self, queues: list[SampledQueue]) -> set[int]:
        moved = set()
        ranges: list[Field] = []
        for queue in queues:
            assert queue.position_at is not None
            at = queue.map.virtqueue_address + queue.position_at
            ranges += [(at, layouts.POSITIONS_SIZE), queue.where[0]]
        found = memory.read_many(self._session.process.pid, ranges)
        for k, queue in enumerate(queues):
            position, ring = layouts.parse_positions(found[2 * k]), found[2 * k + 1]
            if position is None or ring is None:
                queue.problem = UNMAPPED
                moved.add(queue.number)
            elif take_positions(queue, ring, position):
                moved.add(queue.number)
        return moved

    # --- notifiers ---

    def _settle(self, queue: SampledQueue) -> None:
        """Read the counts of a queue that moved or is not at rest, and tell which it is."""
        queue.kick_count = self._count(queue, queue.map.kick)
        queue.call_count = self._count(queue, queue.map.call)
        queue.waiting = not (queue.cannot or queue.problem) and is_waiting(queue)
        if queue.waiting:
            self._waiting.add(queue.number)
        else:
            self._waiting.discard(queue.number)

    def _count(self, queue: SampledQueue, notifier: Notifier | None) -> int | None:
        if notifier is None:
            return None
        state = self._counts.read(notifier.fd)
        if state is None or state.eventfd_id != notifier.eventfd_id:
            queue.renewed = True
            return None
        return state.count
