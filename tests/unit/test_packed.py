"""Is a packed ring read as virtio 1.4, 2.8 states it, also when its bytes are hostile?"""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kickcall.virtio import packed
from kickcall.virtio.packed import Position

AVAIL, USED = 1 << 7, 1 << 15  # 2.8: VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED
NUMS = st.integers(1, 40)


def ring_of(flags: list[int]) -> bytes:
    """Return a descriptor area: le64 addr, le32 len, le16 id, le16 flags each (2.8.13)."""
    return b"".join(struct.pack("<QIHH", 0xAAAA, 0xBBBB, 0xCCCC, one) for one in flags)


class Driver:
    """A driver as 2.8.21.1 tells it to behave, on a ring of its own."""

    def __init__(self, num: int, laps: int = 0) -> None:
        self.flags = [0] * num
        self.next = 0
        self.wrap = True  # 2.8.1: both counters start at 1
        for _ in range(laps * num):
            self.publish()
            self.use_last()

    def publish(self) -> None:
        self.flags[self.next] = AVAIL if self.wrap else USED
        self.last = (self.next, self.wrap)
        self.next += 1
        if self.next == len(self.flags):
            self.next, self.wrap = 0, not self.wrap

    def use_last(self) -> None:
        at, wrap = self.last
        self.flags[at] = AVAIL | USED if wrap else 0


@pytest.mark.parametrize(
    ("flags", "wrap", "is_available"),
    [
        (AVAIL, True, True),
        (USED, False, True),
        (0, True, False),  # never touched
        (AVAIL | USED, True, False),  # used in this lap
        (0, False, False),
        (AVAIL | USED, False, False),
        (USED, True, False),  # available in the other lap
        (AVAIL, False, False),
        (AVAIL | 0x7, True, True),  # NEXT, WRITE and INDIRECT say nothing of it
    ],
)
def test_a_descriptor_is_available_when_avail_is_the_wrap_counter_and_used_is_not(
    flags: int, wrap: bool, is_available: bool
) -> None:
    assert packed.available(flags, wrap) is is_available


@pytest.mark.parametrize(
    ("position", "encoded"),
    [
        (Position(0, True), 0x8000),
        (Position(0, False), 0),
        (Position(5, True), 0x8005),
        (Position(0x7FFF, False), 0x7FFF),
        (Position(0x7FFF, True), 0xFFFF),
    ],
)
def test_a_position_is_encoded_as_an_event_area_holds_it(position: Position, encoded: int) -> None:
    assert position.encode() == encoded


@pytest.mark.parametrize(
    ("start", "count", "num", "end"),
    [
        (Position(0, True), 1, 8, Position(1, True)),
        (Position(7, True), 1, 8, Position(0, False)),
        (Position(7, False), 1, 8, Position(0, True)),
        (Position(6, True), 5, 8, Position(3, False)),
        (Position(3, True), 8, 8, Position(3, False)),
        (Position(3, True), 16, 8, Position(3, True)),
        (Position(2, True), 1, 3, Position(0, False)),  # a size need not be a power of 2 (2.8)
        (Position(0, True), 1, 1, Position(0, False)),
        (Position(32767, True), 1, 32768, Position(0, False)),
    ],
)
def test_the_wrap_counter_flips_at_the_end_of_the_ring(
    start: Position, count: int, num: int, end: Position
) -> None:
    assert start.advance(count, num) == end


@pytest.mark.parametrize(
    ("start", "end", "num", "between"),
    [
        (Position(3, True), Position(3, True), 8, 0),
        (Position(3, True), Position(7, True), 8, 4),
        (Position(6, True), Position(1, False), 8, 3),
        (Position(6, False), Position(1, True), 8, 3),
        (Position(3, True), Position(3, False), 8, 8),  # the whole ring
        (Position(7, True), Position(3, True), 8, 12),  # the wrong way round: more than the ring
    ],
)
def test_the_distance_counts_through_the_end_of_the_ring(
    start: Position, end: Position, num: int, between: int
) -> None:
    assert packed.distance(start, end, num) == between


@given(NUMS, st.integers(0, 200), st.integers(0, 40))
def test_the_distance_is_what_was_advanced(num: int, from_start: int, count: int) -> None:
    start = Position(0, True).advance(from_start, num)
    count %= 2 * num
    assert packed.distance(start, start.advance(count, num), num) == count


@given(NUMS, st.integers(0, 3), st.integers(0, 40), st.integers(0, 40))
@example(num=1, laps=1, done=0, published=1)
def test_exactly_what_the_driver_published_is_counted(
    num: int, laps: int, done: int, published: int
) -> None:
    driver = Driver(num, laps)
    for _ in range(done % num):
        driver.publish()
        driver.use_last()
    start = Position(driver.next, driver.wrap)
    published %= num + 1
    for _ in range(published):
        driver.publish()
    assert packed.count_available(ring_of(driver.flags), start) == published


def test_a_full_ring_counts_once_though_it_never_ends() -> None:
    driver = Driver(4)
    for _ in range(4):
        driver.publish()
    assert packed.count_available(ring_of(driver.flags), Position(0, True)) == 4


def test_a_ring_that_looks_available_in_every_lap_ends_the_count_at_its_size() -> None:
    # From offset 2: two entries of this lap, then two that say they are of the next one.
    flags = [USED, USED, AVAIL, AVAIL]
    assert packed.count_available(ring_of(flags), Position(2, True)) == 4


@given(st.binary(max_size=300), st.integers(-5, 70000), st.booleans())
@example(b"", 0, True)
@example(b"\xff" * 15, 0, True)
@example(b"\0" * 16, 1, False)
def test_no_bytes_and_no_position_lead_outside_the_ring_or_on_for_ever(
    ring: bytes, offset: int, wrap: bool
) -> None:
    count = packed.count_available(ring, Position(offset, wrap))
    assert 0 <= count <= len(ring) // 16
    if not 0 <= offset < len(ring) // 16:
        assert count == 0


@pytest.mark.parametrize(
    ("raw", "desc", "mode"),
    [
        (b"\x00\x00\x00\x00", 0, packed.EVENT_FLAGS_ENABLE),
        (b"\x00\x00\x01\x00", 0, packed.EVENT_FLAGS_DISABLE),
        (b"\x05\x80\x02\x00", 0x8005, packed.EVENT_FLAGS_DESC),
        (b"\x05\x80\xfe\xff", 0x8005, packed.EVENT_FLAGS_DESC),  # the upper 14 bits are reserved
        (b"\x00\x00\x03\x00", 0, 3),
    ],
)
def test_an_event_area_is_an_offset_with_a_wrap_counter_then_flags(
    raw: bytes, desc: int, mode: int
) -> None:
    area = packed.parse_event(raw)
    assert (area.desc, area.mode) == (desc, mode)
