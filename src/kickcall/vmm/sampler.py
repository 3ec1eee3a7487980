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
from typing import TYPE_CHECKING, NamedTuple, Self

from kickcall.diagnose.states import QueueFixed, QueueRole, Sample
from kickcall.errors import KickcallError
from kickcall.host import memory
from kickcall.host.counts import Counts
from kickcall.host.gather import Gather
from kickcall.host.rows import MappedRows, ReadRows
from kickcall.host.shared_memory import map_shared
from kickcall.model import BackendKind, Layout
from kickcall.virtio import packed, split
from kickcall.vmm import layout as layouts
from kickcall.vmm.observe import locate, packed_positions
from kickcall.vmm.roles import use_of

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
_UNMAPPED = "its memory is no longer mapped in QEMU"
_ANEW = "the driver set it up anew"
_RESET = "the driver reset it"
_MOVED = "QEMU's record of it belongs to another device"
_RENEWED = "its notifiers were replaced"


def next_interval(stalled: bool, last: float = COARSE_S) -> float:
    """Return how many seconds to wait until the next sample.

    `stalled`: something looks stalled, or nearly so. `last` is the interval before: once all is
    well again the steps grow twofold, so that a queue that stumbles is not lost from sight.
    """
    return FINE_S if stalled else min(COARSE_S, max(last, FINE_S) * 2)


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


@dataclass(frozen=True, slots=True)
class Look:
    """What one look found. Numbers are positions in `Sampler.queues`."""

    at: float
    moved: tuple[int, ...]
    """Queues of which something changed since the look before."""
    waiting: tuple[int, ...]
    """Queues that are not at rest: work is outstanding, or not reaped, or a notifier is not empty.
    All others can be neither stalled nor about to be."""


@dataclass(slots=True, eq=False)
class _Queue:
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
            queue.number: queue.problem or _RENEWED
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
        self._records = ReadRows(pid, [[_record(queue)] for queue in self._queues])
        owners: dict[int, tuple[bytes, list[_Queue]]] = {}
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

    def _queue(self, number: int, mapped: MappedDevice, queue: QueueMap) -> _Queue:
        device = mapped.device
        use = use_of(device, queue.index)
        where, cannot = locate(self._session, mapped, queue)
        positions = self._session.position_ranges(mapped, queue)
        return _Queue(
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
                has_kick_notifier=queue.kick is not None,
                has_call_notifier=queue.call is not None,
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
                queue.problem = _UNMAPPED
                continue
            was = array.elements[queue.map.index]
            now = layouts.decode(array.layout, raw)
            if now == was:
                queue.expected = _fixed_parts(array.layout, raw)
            else:
                _note_difference(queue, was, now)

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

    def _check_record(self, queue: _Queue) -> None:
        raw = self._records.row(queue.number)
        array = queue.mapped.array
        assert array is not None
        if raw is None:
            queue.problem = _UNMAPPED
        elif _fixed_parts(array.layout, raw) != queue.expected and not queue.problem:
            was = array.elements[queue.map.index]
            _note_difference(queue, was, layouts.decode(array.layout, raw))

    def _check_owner(self, k: int, moved: set[int]) -> None:
        back, queues = self._owners[k]
        if self._owner_rows.row(k) != back:
            for queue in queues:
                queue.problem = queue.problem or _MOVED
                moved.add(queue.number)

    def _take_rings(self, queues: list[_Queue]) -> None:
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
                queue.problem = _UNMAPPED
                continue
            if queue.fixed.layout is Layout.PACKED:
                _take_event_areas(queue, raw)
                continue
            parts = [raw[:4], raw[4:8]]
            if queue.fixed.event_idx:
                avail_event = avail_events.get(queue.number) or raw[10:]
                if not avail_event:
                    queue.problem = _UNMAPPED
                    continue
                parts += [raw[8:10], avail_event]
            queue.values = _split_values(split.parse(parts), self._position(queue))
            if not _fits(queue.values, queue.fixed.size):
                odd.append(queue)
        if odd:
            self._read_in_order(odd)

    def _position(self, queue: _Queue) -> layouts.StoredPositions | None:
        if queue.position_at is None:
            return None
        raw = self._records.row(queue.number)
        if raw is None:
            return None
        return layouts.parse_positions(
            raw[queue.position_at : queue.position_at + layouts.POSITIONS_SIZE]
        )

    def _read_in_order(self, queues: list[_Queue]) -> None:
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
                queue.problem = _UNMAPPED
            else:
                queue.values = _split_values(split.parse(parts), layouts.parse_positions(position))

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
                queue.problem = _UNMAPPED
                moved.add(queue.number)
            elif position is None:
                queue.values = queue.values._replace(
                    avail_idx=None, used_idx=None, last_avail_idx=None
                )
            elif packed.available(int.from_bytes(flags, "little"), position.last_avail_wrap):
                rings.append(queue)
            elif _take_positions(queue, b"", position):
                moved.add(queue.number)
        self._heads_before = heads
        return moved | self._read_packed_rings(rings)

    def _packed_position(self, queue: _Queue) -> layouts.StoredPositions | None:
        """Return the device's position; None where it lies outside the ring."""
        found = self._position(queue)
        if found is None or max(found.last_avail_idx, found.used_idx) >= queue.fixed.size:
            return None
        return found

    def _read_packed_rings(self, queues: list[_Queue]) -> set[int]:
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
                queue.problem = _UNMAPPED
                moved.add(queue.number)
            elif _take_positions(queue, ring, position):
                moved.add(queue.number)
        return moved

    # --- notifiers ---

    def _settle(self, queue: _Queue) -> None:
        """Read the counts of a queue that moved or is not at rest, and tell which it is."""
        queue.kick_count = self._count(queue, queue.map.kick)
        queue.call_count = self._count(queue, queue.map.call)
        queue.waiting = not (queue.cannot or queue.problem) and _waiting(queue)
        if queue.waiting:
            self._waiting.add(queue.number)
        else:
            self._waiting.discard(queue.number)

    def _count(self, queue: _Queue, notifier: Notifier | None) -> int | None:
        if notifier is None:
            return None
        state = self._counts.read(notifier.fd)
        if state is None or state.eventfd_id != notifier.eventfd_id:
            queue.renewed = True
            return None
        return state.count


def _record(queue: _Queue) -> Field:
    assert queue.mapped.array is not None
    return queue.map.virtqueue_address, queue.mapped.array.layout.stride


def _fixed_parts(layout: layouts.Layout, raw: bytes) -> tuple[bytes, ...]:
    """Return what of QEMU's record stays as long as the map holds: rings, number, notifiers."""
    return (
        raw[:4],
        raw[layout.desc : layout.desc + 24],
        raw[layout.index : layout.index + 2],
        raw[layout.owner : layout.kick + layout.notifier_size],
    )


def _note_difference(queue: _Queue, was: layouts.Element, now: layouts.Element) -> None:
    if now.rings != was.rings:
        queue.problem = _ANEW if now.rings.desc else _RESET
    elif (now.owner, now.index) != (was.owner, was.index):
        queue.problem = _MOVED
    elif (now.kick, now.call) != (was.kick, was.call):
        queue.renewed = True


def _split_values(ring: split.SplitRing, position: layouts.StoredPositions | None) -> Values:
    return Values(
        ring.avail_idx,
        ring.used_idx,
        None if position is None else position.last_avail_idx,
        ring.avail_flags,
        ring.used_flags,
        ring.used_event,
        ring.avail_event,
    )


def _fits(values: Values, size: int) -> bool:
    """Tell whether used, fetched and published follow each other within the size of the ring."""
    assert values.avail_idx is not None
    assert values.used_idx is not None
    whole = (values.avail_idx - values.used_idx) & 0xFFFF
    if whole > size:
        return False
    last = values.last_avail_idx
    return last is None or (last - values.used_idx) & 0xFFFF <= whole


def _take_event_areas(queue: _Queue, raw: bytes) -> None:
    driver, of_device = packed.parse_event(raw), packed.parse_event(raw[4:])
    queue.values = queue.values._replace(
        avail_flags=driver.mode,
        used_flags=of_device.mode,
        used_event=driver.desc,
        avail_event=of_device.desc,
    )


def _take_positions(queue: _Queue, ring: bytes, position: layouts.StoredPositions) -> bool:
    """Take over the positions of a packed queue; tell whether they changed."""
    published, fetched, used = packed_positions(ring, position, queue.fixed.size)
    before = queue.values
    queue.values = before._replace(
        avail_idx=published.encode(), used_idx=used.encode(), last_avail_idx=fetched.encode()
    )
    return queue.values != before


def _waiting(queue: _Queue) -> bool:
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
