"""Can a guest that writes what it likes crash a look at its rings, hang it, or lead it elsewhere?

`KICKCALL_CASES` says how many random cases to run (a million in the long run).
"""

from __future__ import annotations

import os
import random
import struct
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from kickcall.diagnose.judge import judge, looks_stalled, wants_slow_facts
from kickcall.diagnose.states import (
    BackendThread,
    InterruptPath,
    QueueFixed,
    QueueRole,
    Sample,
    SlowFacts,
    ThreadState,
    Thresholds,
)
from kickcall.diagnose.track import advance, forgive, start
from kickcall.host import memory
from kickcall.model import BackendKind, Device, Layout, QueueMap, Rings
from kickcall.virtio import packed, split
from kickcall.vmm.guest_memory import GuestMemory, RamRange
from kickcall.vmm.layout import POSITIONS_SIZE
from kickcall.vmm.observe import ring_view

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = int(os.environ.get("KICKCALL_CASES", "4000"))
SHARDS = 4
LONGEST_S = 2.0
"""No case may take more of a processor. A ring of 32,768 takes some ten milliseconds."""

U16 = (0, 1, 2, 3, 7, 8, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8007, 0xFFFE, 0xFFFF)
SIZES = (0, 1, 2, 3, 4, 7, 8, 16, 256)
LARGE = (1024, 32767, 32768, 32769, 65535, 1 << 31, (1 << 32) - 1)
LIMITS = Thresholds()
MIB = 1 << 20
RAM = GuestMemory(
    [
        RamRange(0, 0x7F00_0000_0000, 0xA0000),
        RamRange(0x100000, 0x7F00_0010_0000, MIB),
        RamRange(0x200000, 0x7F00_0020_0000, MIB),  # goes on where the one before ends
        RamRange(0x300000, 0x5500_0000_0000, MIB),  # goes on in the guest only
        RamRange(1 << 32, 0x5500_4000_0000, MIB),
    ]
)
EDGES = (0, 0x9FFF0, 0xA0000, 0x100000, 0x1FFFFE, 0x2FFFF8, 0x300000, 0x3FFFF0, 1 << 32)


def u16(rng: random.Random) -> int:
    return rng.choice(U16) if rng.random() < 0.7 else rng.randrange(1 << 16)


def maybe(rng: random.Random) -> int | None:
    return None if rng.random() < 0.1 else u16(rng)


def size(rng: random.Random) -> int:
    return rng.choice(LARGE if rng.random() < 0.1 else SIZES)


def address(rng: random.Random) -> int:
    """Where a hostile driver says that a ring is: 64 bits."""
    chance = rng.random()
    if chance < 0.6:
        return max(0, rng.choice(EDGES) + rng.randrange(-64, 64))
    if chance < 0.9:
        return rng.randrange(4 * MIB)
    return rng.choice((rng.randrange(1 << 64), (1 << 64) - 1, 1 << 63, (1 << 64) - 16))


def hostile_sample(rng: random.Random, at: float) -> Sample:
    return Sample(
        at,
        maybe(rng),
        maybe(rng),
        maybe(rng),
        maybe(rng) if rng.random() < 0.5 else rng.randrange(4),
        maybe(rng) if rng.random() < 0.5 else rng.randrange(4),
        maybe(rng),
        maybe(rng),
        rng.choice((None, 0, 1, 275, (1 << 64) - 2)),
        rng.choice((None, 0, 1, (1 << 64) - 2)),
        "gone" if rng.random() < 0.05 else "",
    )


def hostile_facts(rng: random.Random) -> SlowFacts | None:
    if rng.random() < 0.3:
        return None
    yes_no: tuple[bool | None, ...] = (None, False, True, True)
    threads = tuple(
        BackendThread(1, 2, "x", rng.choice(list(ThreadState)), rng.choice(("", "ppoll", "read")))
        for _ in range(rng.randrange(3))
    )
    return SlowFacts(
        0.0,
        vm_running=rng.choice(yes_no),
        driver_ok=rng.choice(yes_no),
        broken=rng.choice((None, False, False, True)),
        kick_holders=rng.choice((None, 0, 1)),
        kick_polled=rng.choice(yes_no),
        recorded_since=rng.choice((None, 0.0, 1.0)),
        kicked_at=rng.choice((None, 0.5, 99.0)),
        called_at=rng.choice((None, 0.5, 99.0)),
        backend_threads=threads,
        vcpu_threads=threads[:1],
        interrupts=InterruptPath(
            msix_enabled=rng.choice(yes_no),
            function_masked=rng.choice(yes_no),
            vector=rng.choice((None, 0, 1, 0xFFFE)),
            vector_masked=rng.choice(yes_no),
            vector_pending=rng.choice(yes_no),
            bus_master=rng.choice(yes_no),
            intx_disabled=rng.choice(yes_no),
        ),
    )


def judge_hostile_samples(rng: random.Random) -> None:
    fixed = QueueFixed(
        "/machine/peripheral/x{evil}",
        u16(rng),
        size(rng),
        rng.choice(list(Layout)),
        rng.random() < 0.5,
        rng.choice(list(BackendKind)),
        rng.choice(list(QueueRole)),
        rng.random() < 0.5,
    )
    sample = hostile_sample(rng, 0.0)
    track = start(sample)
    for step in range(rng.randrange(6)):
        sample = sample if rng.random() < 0.6 else hostile_sample(rng, 0.0)
        at = (step + 1) * rng.choice((0.0, 0.1, 3.0))
        sample = Sample(max(at, track.now.at), *_values(sample))
        track = advance(track, sample, fixed)
        if rng.random() < 0.1:
            track = forgive(track, 1.0)
    said = judge(fixed, track, hostile_facts(rng), LIMITS, machine="{0}")
    assert said.since_s >= 0
    assert bool(said.hop) == said.verdict.stalled
    wants_slow_facts(said)
    looks_stalled(fixed, track, LIMITS)


def _values(sample: Sample) -> tuple[Any, ...]:
    return tuple(getattr(sample, name) for name in Sample.__slots__[1:])


def ask_hostile_rings(rng: random.Random) -> None:
    """`virtio.split` and `virtio.packed`, of what came out of guest memory."""
    num = rng.choice(SIZES[1:]) if rng.random() < 0.999 else 32768
    at = packed.Position(u16(rng) & 0x7FFF, rng.random() < 0.5)
    to = packed.Position(u16(rng) & 0x7FFF, rng.random() < 0.5)
    assert 0 <= packed.distance(at, to, num) < 2 * num
    assert 0 <= at.advance(num, num).offset < num
    ring = ring_bytes(rng, num * packed.DESC_SIZE + rng.randrange(-3, 3))
    assert 0 <= packed.count_available(ring, at) <= num
    packed.count_available(b"", at)
    assert packed.parse_event(rng.randbytes(4)).mode in range(4)
    parts = [rng.randbytes(4), rng.randbytes(4)]
    if rng.random() < 0.5:
        parts += [rng.randbytes(2), rng.randbytes(2)]
    view = split.parse(parts)
    assert 0 <= split.outstanding(view.avail_idx, view.used_idx) <= 0xFFFF


def ring_bytes(rng: random.Random, length: int) -> bytes:
    """Descriptors that are all available, none, or anything."""
    length = max(length, 0)
    if rng.random() < 0.5:
        flags = rng.choice((0, 0x80, 0x8000, 0x8080))
        one = struct.pack("<14xH", flags)
        return (one * (length // 16 + 1))[:length]
    return rng.randbytes(length)


def look_at_hostile_rings(rng: random.Random) -> None:
    """vmm/observe, with memory that answers as it likes, and addresses that the guest chose."""
    layout = rng.choice(list(Layout))
    features = {"VIRTIO_F_VERSION_1"}
    features |= {"VIRTIO_F_RING_PACKED"} if layout is Layout.PACKED else set()
    features |= {"VIRTIO_RING_F_EVENT_IDX"} if rng.random() < 0.5 else set()
    device = Device(
        "/machine/peripheral/x", "virtio-blk-device", rng.choice(list(BackendKind)), 1,
        frozenset(features), True, False, False,
    )  # fmt: skip
    rings = Rings(address(rng), address(rng), address(rng), size(rng))
    queue = QueueMap(0, rings, layout, None, None, 0x1000)
    position = [(0x6000_0000, POSITIONS_SIZE)] if rng.random() < 0.7 else []
    allowed = [
        (rings.desc, 16 * rings.num),  # 2.7.5, 2.8.13
        (rings.avail, 6 + 2 * rings.num),  # 2.7.6
        (rings.used, 6 + 8 * rings.num),  # 2.7.8
    ]

    def read_many(pid: int, ranges: list[tuple[int, int]]) -> list[bytes | None]:
        assert pid == 42
        assert sum(length for _, length in ranges) <= 16 * 32768 + 64
        parts: list[bytes | None] = []
        for at, length in ranges:
            if (at, length) not in position:
                assert any(_within(at, length, area) for area in allowed), (hex(at), length)
            parts.append(None if rng.random() < 0.02 else ring_bytes(rng, length))
        return parts

    session = SimpleNamespace(
        memory=RAM,
        has_iommu=False,
        process=SimpleNamespace(pid=42),
        machine=SimpleNamespace(command=("qemu-system-x86_64",)),
        position_ranges=lambda device, queue: position,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "read_many", read_many)
        view = ring_view(cast("Any", session), cast("Any", SimpleNamespace(device=device)), queue)
    for value in (view.avail_idx, view.used_idx, view.used_event, view.avail_event):
        assert value is None or 0 <= value <= 0xFFFF
    assert view.outstanding is None or view.outstanding <= 0xFFFF
    assert view.notes or view.avail_idx is not None


def _within(hva: int, length: int, area: tuple[int, int]) -> bool:
    """Whether the VMM's `length` bytes at `hva` are guest RAM, and inside the guest's `area`."""
    return any(
        run.hva <= hva < run.hva + run.length
        and area[0] <= run.gpa + hva - run.hva
        and run.gpa + hva - run.hva + length <= area[0] + area[1]
        for run in RAM.ranges
    )


def translate_hostile_addresses(rng: random.Random) -> None:
    gpa, length = address(rng), rng.choice((0, -1, 1, 2, 16, 4096, MIB, 1 << 40, 1 << 64))
    hva = RAM.translate(gpa, length)
    if hva is None:
        return
    # Every byte of it is RAM, and the guest's byte.
    for at in (0, length // 2, length - 1):
        assert any(
            run.gpa <= gpa + at < run.gpa + run.length and hva + at - run.hva == gpa + at - run.gpa
            for run in RAM.ranges
        )


@pytest.mark.timeout(0)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_no_ring_that_a_guest_writes_harms_who_looks_at_it(
    shard: int, record_property: Callable[[str, object], None]
) -> None:
    slowest, started, at = 0.0, time.perf_counter(), time.process_time()
    for number in range(shard, CASES, SHARDS):
        rng = random.Random(number)
        try:
            judge_hostile_samples(rng)
            ask_hostile_rings(rng)
            look_at_hostile_rings(rng)
            translate_hostile_addresses(rng)
        except Exception as exc:
            raise AssertionError(f"case {number}") from exc
        now = time.process_time()
        slowest, at = max(slowest, now - at), now
    assert slowest < LONGEST_S
    record_property("cases_per_s", round(CASES / SHARDS / (time.perf_counter() - started)))
