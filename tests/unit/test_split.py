"""Is a split ring read as virtio 1.4, 2.7 lays it out?"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kickcall.virtio import split

U16 = st.integers(0, 0xFFFF)
SIZES = st.integers(0, 15).map(lambda power: 1 << power)


def test_the_fields_of_a_ring_of_256_lie_where_the_specification_puts_them() -> None:
    # 2.7.6: u16 flags, idx, ring[256], used_event.
    # 2.7.8: u16 flags, idx, 256 elements of 8 bytes, avail_event.
    assert split.fields(0x1000, 0x2000, 256, event_idx=True) == [
        (0x1000, 4),
        (0x2000, 4),
        (0x1000 + 516, 2),
        (0x2000 + 2052, 2),
    ]


def test_without_event_idx_no_byte_behind_the_rings_is_read() -> None:
    assert split.fields(0x1000, 0x2000, 256, event_idx=False) == [(0x1000, 4), (0x2000, 4)]


def test_flags_come_before_the_index_in_little_endian() -> None:
    ring = split.parse([b"\x01\x00\x34\x12", b"\x00\x00\xff\xff"])
    assert (ring.avail_flags, ring.avail_idx) == (split.AVAIL_F_NO_INTERRUPT, 0x1234)
    assert (ring.used_flags, ring.used_idx) == (0, 0xFFFF)
    assert ring.used_event is None
    assert ring.avail_event is None


def test_the_driver_writes_used_event_and_the_device_avail_event() -> None:
    ring = split.parse([b"\0\0\0\0", b"\0\0\0\0", b"\x01\x02", b"\x03\x04"])
    assert ring.used_event == 0x0201
    assert ring.avail_event == 0x0403


@given(SIZES, U16, U16, U16, U16, U16, U16)
def test_a_ring_in_memory_is_read_back(
    num: int,
    avail_flags: int,
    avail: int,
    used_flags: int,
    used: int,
    want_call: int,
    want_kick: int,
) -> None:
    # The two structs of 2.7.6 and 2.7.8, with a poison byte wherever nothing may be read.
    driver = struct.pack("<HH", avail_flags, avail) + b"\xaa" * 2 * num
    driver += struct.pack("<H", want_call)
    device = struct.pack("<HH", used_flags, used) + b"\xbb" * 8 * num
    device += struct.pack("<H", want_kick)
    memory = driver + device
    where = split.fields(0, len(driver), num, event_idx=True)
    ring = split.parse([memory[at : at + length] for at, length in where])
    assert ring == split.SplitRing(avail_flags, avail, used_flags, used, want_call, want_kick)


@pytest.mark.parametrize(
    ("avail", "used", "waiting"),
    [
        (0, 0, 0),
        (12, 11, 1),
        (256, 0, 256),
        (0, 0xFFFF, 1),  # idx wraps at 2^16, whatever the size
        (3, 0xFFFE, 5),
        (0x8000, 0, 0x8000),
        (11, 12, 0xFFFF),  # used ahead of avail: more than any ring holds
    ],
)
def test_what_is_outstanding_is_counted_modulo_2_to_the_16(
    avail: int, used: int, waiting: int
) -> None:
    assert split.outstanding(avail, used) == waiting


@given(U16, st.integers(0, 0x8000))
def test_as_much_is_outstanding_as_was_published_wherever_the_index_stands(
    used: int, published: int
) -> None:
    assert split.outstanding((used + published) % 65536, used) == published
