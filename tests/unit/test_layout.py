"""Is QEMU's private layout of `struct VirtQueue` derived from what memory shows, and only then?

The images here are made by hand: as in the QEMU versions that exist, and as others might have it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kickcall.model import Rings
from kickcall.vmm import layout as layouts
from kickcall.vmm.layout import Layout

ARRAY = 0x7F00_0000_0010
OWNER = 0x5555_0000_4000
RINGS = Rings(desc=0x1234_5000, avail=0x1234_6000, used=0x1234_7000, num=128)


@dataclass(frozen=True)
class Shape:
    """Where one build of QEMU has the fields of a queue."""

    stride: int
    desc: int
    index: int
    vector: int
    owner: int
    notifier: int
    owner_vq: int


# hw/virtio/virtio.c: VRing is num, num_default, align, desc, avail, used, caches; then used_elems,
# 6 words of positions, queue_index, inuse, vector, handlers, vdev, guest_notifier, host_notifier.
QEMU_7_2 = Shape(stride=152, desc=16, index=72, vector=80, owner=96, notifier=12, owner_vq=0xE0)
SHAPES = {
    "QEMU 7.2 to 10.0": QEMU_7_2,
    "QEMU 5.2, one handler more": Shape(168, 16, 72, 80, 104, 8, 0xE0),
    "a larger element": replace(QEMU_7_2, stride=512, owner=400),
    "the smallest element": Shape(96, 16, 48, 54, 56, 12, 0x40),
    "a longer VRing": replace(QEMU_7_2, stride=192, desc=40, index=104, vector=112, owner=128),
    "a longer VirtIODevice": replace(QEMU_7_2, owner_vq=0x3F8),
}


class Image:
    """A process's memory with one device's array of queues in it."""

    def __init__(self, shape: Shape, queues: int = 4, array: int = ARRAY) -> None:
        self.shape = shape
        self.blocks: dict[int, bytearray] = {}
        self.array = array
        elements = self.blocks[array] = bytearray(shape.stride * 1024)
        for number in range(1024):
            at = number * shape.stride
            struct.pack_into("<Q", elements, at + shape.owner, OWNER)
            struct.pack_into("<H", elements, at + shape.index, number)
            struct.pack_into("<H", elements, at + shape.vector, 0xFFFF)  # VIRTIO_NO_VECTOR
            if number < queues:
                rings = self.rings(number)
                struct.pack_into("<I", elements, at, rings.num)
                struct.pack_into(
                    "<3Q", elements, at + shape.desc, rings.desc, rings.avail, rings.used
                )
                struct.pack_into("<H", elements, at + shape.vector, number + 1)
        owner = self.blocks[OWNER] = bytearray(2048)
        struct.pack_into("<Q", owner, shape.owner_vq, array)

    @staticmethod
    def rings(queue: int) -> Rings:
        at = RINGS.desc + queue * 0x10000
        return Rings(at, at + 0x1000, at + 0x2000, RINGS.num)

    def hit(self, queue: int = 0) -> int:
        return self.array + queue * self.shape.stride + self.shape.desc

    def put(self, queue: int, offset: int, form: str, *values: int) -> None:
        at = queue * self.shape.stride + offset
        struct.pack_into(form, self.blocks[self.array], at, *values)

    def read(self, address: int, length: int) -> bytes | None:
        for start, block in self.blocks.items():
            if start <= address and address + length <= start + len(block):
                return bytes(block[address - start : address - start + length])
        return None

    def derive(self, queue: int = 0, hit: int | None = None) -> list[tuple[Layout, int]]:
        hit = self.hit(queue) if hit is None else hit
        window = self.read(hit, layouts.WINDOW)
        assert window is not None
        return list(layouts.derive(window, hit, queue, self.rings(queue), self.read))


def expected(shape: Shape) -> Layout:
    return Layout(
        stride=shape.stride,
        desc=shape.desc,
        owner=shape.owner,
        index=shape.index,
        notifier_size=0,
        owner_vq=shape.owner_vq,
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("queue", [0, 1, 3])
def test_the_layout_is_derived_from_any_queue(shape: Shape, queue: int) -> None:
    assert Image(shape).derive(queue) == [(expected(shape), ARRAY)]


@settings(max_examples=60)
@given(st.data())
def test_a_layout_that_no_qemu_has_is_derived_as_well(data: st.DataObject) -> None:
    desc = data.draw(st.sampled_from([16, 24, 32, 40, 48, 56, 64]), "desc")
    index = data.draw(st.integers(desc + 24, desc + 100).map(lambda at: at & ~1), "index")
    owner = data.draw(st.integers(index + 10, index + 120).map(lambda at: at + 7 & ~7), "owner")
    stride = data.draw(
        st.integers(max(96, owner + 32), owner + 120).map(lambda at: at + 7 & ~7), "stride"
    )
    vector = index + 4
    shape = Shape(
        stride, desc, index, vector, owner, 12, data.draw(st.integers(5, 127), "owner_vq") * 8
    )
    assert Image(shape).derive() == [(expected(shape), ARRAY)]


def test_a_guest_that_numbers_its_vectors_like_its_queues_causes_no_doubt() -> None:
    image = Image(QEMU_7_2, queues=16)
    for queue in range(16):
        image.put(queue, QEMU_7_2.vector, "<H", queue)
    assert image.derive() == [(expected(QEMU_7_2), ARRAY)]


def test_a_device_that_keeps_its_array_twice_has_one_layout() -> None:
    image = Image(QEMU_7_2)
    struct.pack_into("<Q", image.blocks[OWNER], 0x208, ARRAY)
    assert image.derive() == [(expected(QEMU_7_2), ARRAY)]


def test_a_copy_of_the_whole_array_is_not_taken_for_it() -> None:
    image = Image(QEMU_7_2)
    copy = 0x7F11_0000_0010
    image.blocks[copy] = bytearray(image.blocks[ARRAY])
    assert image.derive(hit=copy + QEMU_7_2.desc) == []
    assert image.derive() == [(expected(QEMU_7_2), ARRAY)]


def test_the_three_addresses_alone_are_no_array() -> None:
    image = Image(QEMU_7_2)
    decoy = 0x7F22_0000_0000
    image.blocks[decoy] = bytearray(struct.pack("<3Q", RINGS.desc, RINGS.avail, RINGS.used))
    image.blocks[decoy] += bytes(layouts.WINDOW)
    assert image.derive(hit=decoy) == []


def test_addresses_among_random_bytes_are_no_array() -> None:
    image = Image(QEMU_7_2)
    decoy = 0x7F33_0000_0000
    noise = bytes((k * 2654435761 >> 7) & 0xFF for k in range(layouts.WINDOW))
    image.blocks[decoy] = bytearray(struct.pack("<3Q", RINGS.desc, RINGS.avail, RINGS.used) + noise)
    assert image.derive(hit=decoy) == []


def test_an_owner_that_points_to_another_array_is_none() -> None:
    image = Image(QEMU_7_2)
    struct.pack_into("<Q", image.blocks[OWNER], QEMU_7_2.owner_vq, ARRAY + 0x100000)
    assert image.derive() == []


def test_an_owner_that_cannot_be_read_is_none() -> None:
    image = Image(QEMU_7_2)
    del image.blocks[OWNER]
    assert image.derive() == []


def test_a_queue_of_another_size_is_another_queue() -> None:
    image = Image(QEMU_7_2)
    image.put(0, 0, "<I", 256)
    assert image.derive() == []


@pytest.mark.parametrize("queue", [1, 7, 1023])
def test_queues_that_belong_to_different_devices_are_no_array(queue: int) -> None:
    image = Image(QEMU_7_2)
    image.put(queue, QEMU_7_2.owner, "<Q", OWNER + 0x1000)
    assert image.derive() == []


@pytest.mark.parametrize("queue", [0, 1, 7, 1023])
def test_queues_that_do_not_count_up_are_no_array(queue: int) -> None:
    image = Image(QEMU_7_2)
    image.put(queue, QEMU_7_2.index, "<H", 5555)
    assert image.derive() == []


def test_an_array_that_ends_too_early_is_none() -> None:
    image = Image(QEMU_7_2)
    del image.blocks[ARRAY][152 * 1000 :]
    assert image.derive() == []


def test_two_fields_that_count_through_the_whole_array_are_two_layouts() -> None:
    # The caller refuses more than one: which of the two is the queue's number cannot be known.
    image = Image(QEMU_7_2)
    for queue in range(1024):
        image.put(queue, QEMU_7_2.vector, "<H", queue)
    assert {layout.index for layout, _ in image.derive()} == {QEMU_7_2.index, QEMU_7_2.vector}


def test_a_hit_at_the_end_of_what_can_be_read_is_no_array() -> None:
    image = Image(QEMU_7_2)
    short = struct.pack("<3Q", RINGS.desc, RINGS.avail, RINGS.used)
    assert list(layouts.derive(short, image.hit(), 0, RINGS, image.read)) == []
    assert list(layouts.derive(b"", image.hit(), 0, RINGS, image.read)) == []


@given(st.binary(max_size=2048), st.integers(0, 2**64 - 1), st.integers(0, 1023))
def test_no_memory_makes_it_fail(window: bytes, hit: int, queue: int) -> None:
    def read(address: int, length: int) -> bytes | None:
        return (window * (length // max(len(window), 1) + 1))[:length] if window else None

    list(layouts.derive(window, hit, queue, RINGS, read))


# notifiers


def element(shape: Shape, call: tuple[int, int, int], kick: tuple[int, int, int]) -> bytes:
    raw = bytearray(shape.stride)
    for at, (rfd, wfd, initialized) in (
        (shape.owner + 8, call),
        (shape.owner + 8 + shape.notifier, kick),
    ):
        struct.pack_into("<ii", raw, at, rfd, wfd)
        if shape.notifier == 12:
            raw[at + 8] = initialized
    return bytes(raw)


OPEN = {30, 31, 32, 33}
UNUSED = (-1, -1, 0)
NEVER = (0, 0, 0)
OLD = replace(QEMU_7_2, notifier=8)


@pytest.mark.parametrize("shape", [QEMU_7_2, OLD], ids=["with initialized", "without"])
@pytest.mark.parametrize(
    "slots",
    [
        [((30, 30, 1), (31, 31, 1)), ((32, 32, 1), (33, 33, 1))],
        [((30, 30, 1), (31, 31, 1)), (NEVER, NEVER)],
        [((30, 30, 1), (31, 31, 1)), (UNUSED, UNUSED)],
        [(UNUSED, UNUSED), ((30, 30, 1), (31, 31, 1))],
    ],
)
def test_the_size_of_a_notifier_is_told_by_those_in_use(
    shape: Shape, slots: list[tuple[tuple[int, int, int], tuple[int, int, int]]]
) -> None:
    raw = [element(shape, call, kick) for call, kick in slots]
    assert layouts.notifier_size(raw, shape.owner, OPEN) == shape.notifier


def test_a_device_with_kick_notifiers_only_is_told_too() -> None:
    # virtio-net without vhost: QEMU raises the interrupt by itself.
    raw = [element(QEMU_7_2, NEVER, (30, 30, 1)), element(QEMU_7_2, NEVER, (31, 31, 1))]
    assert layouts.notifier_size(raw, QEMU_7_2.owner, OPEN) == 12


@pytest.mark.parametrize(
    "slot",
    [(30, 31, 1), (99, 99, 1), (30, -1, 1)],
    ids=["a pipe's two ends", "no open eventfd", "half closed"],
)
def test_what_is_no_open_eventfd_is_no_notifier(slot: tuple[int, int, int]) -> None:
    for pair in ((slot, (31, 31, 1)), ((31, 31, 1), slot)):
        assert layouts.notifier_size([element(QEMU_7_2, *pair)], QEMU_7_2.owner, OPEN) is None


def test_an_element_reads_as_it_was_written() -> None:
    image = Image(QEMU_7_2)
    at = QEMU_7_2.owner + 8
    image.put(2, at, "<iiBxxxiiBxxx", 40, 40, 1, 41, 41, 1)
    layout = replace(expected(QEMU_7_2), notifier_size=12)
    raw = image.read(ARRAY + 2 * 152, 152)
    assert raw is not None
    found = layouts.decode(layout, raw)
    assert found.rings == Image.rings(2)
    assert (found.owner, found.index) == (OWNER, 2)
    assert (found.call.rfd, found.kick.rfd) == (40, 41)
    assert found.call.initialized
    assert found.kick.initialized
    nothing = layouts.decode(layout, bytes(152))
    assert not nothing.call.initialized
    assert not nothing.kick.initialized


def test_positions_precede_the_number_of_the_queue() -> None:
    # last_avail_idx, its wrap counter, shadow_avail_idx, its own, used_idx, its own, ...
    raw = struct.pack("<HBxHBxHBxHBB", 0x1234, 1, 0xAAAA, 1, 0x5678, 0, 0xBBBB, 1, 1)
    assert layouts.parse_positions(raw) == layouts.StoredPositions(0x1234, True, 0x5678, False)
    assert layouts.parse_positions(None) is None
