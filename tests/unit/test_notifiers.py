"""Is a device's array of queues proved in a real process's memory, and a doubtful one refused?

The process is this one: an array as QEMU has it is laid out in its memory, with real eventfds.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import MapError
from kickcall.host import eventfds
from kickcall.model import BackendKind, Device, Rings
from kickcall.vmm.layout import Layout
from kickcall.vmm.notifiers import QueueArray, find_arrays
from kickcall.vmm.virtio import DeviceFacts, QueueFacts

if TYPE_CHECKING:
    from collections.abc import Iterator

ME = os.getpid()
PATH = "/machine/peripheral/made-up0/virtio-backend"
LAYOUT = Layout(stride=152, desc=16, owner=96, index=72, notifier_size=12, owner_vq=0xE0)
_UNIQUE = 0x6B69_636B_0000
"""Addresses that stand nowhere else in this process by chance."""


class MadeUpQemu:
    """One array of 1,024 queues, its owner and the owner's name, in memory of their own."""

    def __init__(self, queues: int = 3, offset: int = 16) -> None:
        self.count = queues
        self.maps: list[mmap.mmap] = []
        self.fds = [(os.eventfd(0), os.eventfd(0)) for _ in range(queues)]
        self.array = self.allocate(152 * 1024 + 4096) + offset
        self.owner = self.allocate(4096)
        name = self.allocate(4096)
        self.write(name, PATH.encode() + b"\0")
        self.write(self.owner + 48, struct.pack("<Q", name))  # DeviceState.canonical_path
        self.write(self.owner + LAYOUT.owner_vq, struct.pack("<Q", self.array))
        for number in range(1024):
            at = self.element(number)
            self.write(at + LAYOUT.index, struct.pack("<HxxiH", number, 0, 0xFFFF))
            self.write(at + LAYOUT.owner, struct.pack("<Q", self.owner))
        for number, (call, kick) in enumerate(self.fds):
            at, rings = self.element(number), self.rings(number)
            self.write(at, struct.pack("<II", rings.num, rings.num))
            self.write(at + LAYOUT.desc, struct.pack("<3Q", rings.desc, rings.avail, rings.used))
            self.notifiers(number, call, kick)

    def allocate(self, size: int) -> int:
        one = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.maps.append(one)
        return ctypes.addressof(ctypes.c_char.from_buffer(one))

    def write(self, address: int, raw: bytes) -> None:
        ctypes.memmove(address, raw, len(raw))

    def element(self, queue: int) -> int:
        return self.array + queue * LAYOUT.stride

    def notifiers(self, queue: int, call: int, kick: int) -> None:
        raw = struct.pack("<iiBxxxiiBxxx", call, call, 1, kick, kick, 1)
        self.write(self.element(queue) + LAYOUT.call, raw)

    @staticmethod
    def rings(queue: int) -> Rings:
        at = _UNIQUE + queue * 0x10000
        return Rings(at + 0x1000, at + 0x2000, at + 0x3000, 128)

    def facts(self, path: str = PATH) -> DeviceFacts:
        device = Device(
            path=path.removesuffix("/virtio-backend"),
            kind="virtio-blk-device",
            backend=BackendKind.QEMU,
            num_queues=self.count,
            features=frozenset(),
            driver_ok=True,
            broken=False,
            vhost_started=False,
        )
        queues = {number: QueueFacts(self.rings(number), None) for number in range(self.count)}
        return DeviceFacts(path, device, queues)

    def find(self, known: Layout | None = None) -> QueueArray | MapError:
        return find_arrays(ME, [self.facts()], [], known)[PATH]

    def refusal(self, known: Layout | None = None) -> str:
        found = self.find(known)
        assert isinstance(found, MapError)
        return str(found)

    def close(self) -> None:
        for pair in self.fds:
            for fd in pair:
                os.close(fd)
        # The ctypes views keep the maps exported; unmapping is left to the garbage collector.
        self.write(self.array, bytes(152 * 1024))


@pytest.fixture
def qemu() -> Iterator[MadeUpQemu]:
    made = MadeUpQemu()
    yield made
    made.close()


def test_the_array_is_found_with_every_queues_own_eventfds(qemu: MadeUpQemu) -> None:
    found = qemu.find()
    assert isinstance(found, QueueArray)
    assert found.address == qemu.array
    assert found.owner == qemu.owner
    assert found.layout == LAYOUT
    assert [element.rings for element in found.elements] == [qemu.rings(n) for n in range(3)]
    assert [(e.call.rfd, e.kick.rfd) for e in found.elements] == qemu.fds
    for pair in qemu.fds:
        for fd in pair:
            state = eventfds.read_eventfd(ME, fd)
            assert state is not None
            assert found.eventfd_ids[fd] == state.eventfd_id
    assert found.element_address(2) == qemu.element(2)


@pytest.mark.parametrize("offset", [16, 1040, 40])
def test_the_array_is_found_wherever_malloc_put_it(offset: int) -> None:
    made = MadeUpQemu(offset=offset)
    try:
        found = made.find()
        assert isinstance(found, QueueArray)
        assert found.address == made.array
    finally:
        made.close()


def test_symbols_are_believed_only_where_memory_agrees(qemu: MadeUpQemu) -> None:
    found = qemu.find(replace(LAYOUT, source="symbols"))
    assert isinstance(found, QueueArray)
    assert found.layout.source == "symbols"
    assert isinstance(qemu.find(replace(LAYOUT, stride=160, source="symbols")), MapError)


def test_copies_of_the_array_and_of_the_addresses_are_passed_over(qemu: MadeUpQemu) -> None:
    whole = ctypes.string_at(qemu.array, 152 * 1024)
    copies = [qemu.allocate(152 * 1024 + 4096) for _ in range(3)]
    for copy, at in zip(copies, (16, 24, 512), strict=True):
        qemu.write(copy + at, whole)
    rings = qemu.rings(0)
    addresses = struct.pack("<3Q", rings.desc, rings.avail, rings.used)
    qemu.write(qemu.allocate(8192) + 32, addresses)
    found = qemu.find()
    assert isinstance(found, QueueArray)
    assert found.address == qemu.array
    for copy in copies:
        qemu.write(copy, bytes(152 * 1024 + 4096))


def test_what_lies_in_guest_memory_is_not_looked_at(qemu: MadeUpQemu) -> None:
    ram = [(qemu.array & ~0xFFF, (qemu.array & ~0xFFF) + 152 * 1024 + 4096)]
    found = find_arrays(ME, [qemu.facts()], ram)[PATH]
    assert isinstance(found, MapError)
    assert "was not found" in str(found)


def test_an_owner_with_another_devices_path_is_not_the_owner(qemu: MadeUpQemu) -> None:
    other = "/machine/peripheral/made-up1/virtio-backend"
    found = find_arrays(ME, [qemu.facts(other)], [])[other]
    assert isinstance(found, MapError)
    assert "made-up1" in str(found)


def test_two_layouts_that_fit_are_refused_as_ambiguous(qemu: MadeUpQemu) -> None:
    for number in range(1024):  # a second field that counts through the whole array
        qemu.write(qemu.element(number) + 80, struct.pack("<H", number))
    assert "ambiguous" in qemu.refusal()


def test_a_descriptor_that_is_not_open_is_refused(qemu: MadeUpQemu) -> None:
    qemu.notifiers(1, 30000, 30001)
    assert "no open eventfd" in qemu.refusal()
    assert "no open eventfd" in qemu.refusal(LAYOUT)


def test_a_descriptor_that_is_no_eventfd_is_refused(qemu: MadeUpQemu) -> None:
    with open(os.devnull) as file:
        qemu.notifiers(1, file.fileno(), qemu.fds[1][1])
        assert "no open eventfd" in qemu.refusal(LAYOUT)


def test_a_kernel_that_gives_eventfds_no_ids_is_refused(
    qemu: MadeUpQemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before Linux 5.2: nothing would tell whether a descriptor is still the eventfd it was.
    real = eventfds.eventfds_of(ME)
    without = {fd: replace(state, eventfd_id=-1) for fd, state in real.items()}
    monkeypatch.setattr(eventfds, "eventfds_of", lambda pid: without)
    assert "this kernel" in qemu.refusal()


def test_one_eventfd_for_two_notifiers_is_refused(qemu: MadeUpQemu) -> None:
    qemu.notifiers(1, *qemu.fds[0])
    assert "are the same descriptor" in qemu.refusal()


def test_a_queue_that_moved_while_it_was_mapped_is_refused(qemu: MadeUpQemu) -> None:
    qemu.write(qemu.element(2) + LAYOUT.desc, struct.pack("<Q", 0xDEAD000))
    assert "changed while it was mapped" in qemu.refusal()


def test_a_size_that_is_not_the_monitors_is_refused(qemu: MadeUpQemu) -> None:
    qemu.write(qemu.element(2), struct.pack("<I", 64))
    assert "changed while it was mapped" in qemu.refusal()


def test_queues_with_different_owners_are_refused(qemu: MadeUpQemu) -> None:
    qemu.write(qemu.element(1) + LAYOUT.owner, struct.pack("<Q", qemu.owner + 8))
    assert isinstance(qemu.find(LAYOUT), MapError)
    assert isinstance(qemu.find(), MapError)


def test_a_device_without_notifiers_in_use_is_mapped_without_any(qemu: MadeUpQemu) -> None:
    for number in range(3):
        qemu.write(qemu.element(number) + LAYOUT.call, bytes(24))
    found = qemu.find()
    assert isinstance(found, QueueArray)
    assert found.eventfd_ids == {}
    assert not any(e.call.initialized or e.kick.initialized for e in found.elements)


def test_nothing_is_searched_for_devices_without_queues() -> None:
    assert find_arrays(ME, [], []) == {}
