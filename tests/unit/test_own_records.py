"""Are QEMU's records of NVMe queues and of assigned devices proved, and doubtful ones refused?

The process is this one: records as QEMU has them are laid out in its memory, with real eventfds.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kickcall.errors import QmpCommandError
from kickcall.host import eventfds
from kickcall.model import PciDevice
from kickcall.vmm import nvme, vfio
from kickcall.vmm.pci_devices import MappedPci

ME = os.getpid()
PATH = "/machine/peripheral/made-up-device"
BASE = 0xFEBF0000
ASQ, ACQ = 0x6B69636B1000, 0x6B69636B2000
"""Addresses that stand nowhere else in this process by chance."""
SESSION = cast(
    "Any", SimpleNamespace(process=SimpleNamespace(pid=ME), memory=SimpleNamespace(ranges=()))
)
DEVICE = MappedPci(PciDevice(PATH, "nvme", 0, 2, 0), {})


class MadeUpMemory:
    """Memory of this process, written as QEMU writes its own."""

    def __init__(self) -> None:
        self.maps: list[mmap.mmap] = []
        self.owner = self.allocate(64 << 10)
        name = self.allocate(4096)
        self.write(name, PATH.encode() + b"\0")
        self.write(self.owner + 48, struct.pack("<Q", name))  # DeviceState.canonical_path

    def allocate(self, size: int) -> int:
        one = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.maps.append(one)
        return ctypes.addressof(ctypes.c_char.from_buffer(one))

    def write(self, address: int, raw: bytes) -> None:
        ctypes.memmove(address, raw, len(raw))


class MadeUpNvme(MadeUpMemory):
    """A controller with its admin queues and one pair of I/O queues, as hw/nvme/nvme.h has them."""

    def __init__(self) -> None:
        super().__init__()
        self.fd = os.eventfd(0)
        self.registers = [0] * 14
        self.registers[1] = 1  # CAP.DSTRD, in bits 35:32: doorbells are 8 bytes apart
        self.registers[0x14 // 4] = self.registers[0x1C // 4] = 1  # CC.EN, CSTS.RDY
        self.registers[0x24 // 4] = 31 << 16 | 15  # AQA: 32 completions, 16 submissions, less 1
        for at, value in ((0x28, ASQ), (0x30, ACQ)):
            self.registers[at // 4 : at // 4 + 2] = value & 0xFFFFFFFF, value >> 32
        self.admin, self.admin_done = self.owner + 0x400, self.owner + 0x500
        self.io, self.io_done = self.allocate(4096), self.allocate(4096)
        arrays = self.allocate(4096)
        self.write(arrays, struct.pack("<QQ", self.admin, self.io))
        self.write(arrays + 2048, struct.pack("<QQ", self.admin_done, self.io_done))
        self.write(self.admin - 16, struct.pack("<QQ", arrays, arrays + 2048))
        self.submission(self.admin, 0, size=16, address=ASQ)
        self.submission(self.io, 1, size=1024, address=0x1000, shadow=0x5008, fd=self.fd)
        self.completion(self.admin_done, 0, size=32, address=ACQ, vector=0)
        self.completion(self.io_done, 1, size=1024, address=0x9000, vector=3)

    def submission(
        self, at: int, number: int, *, size: int, address: int, shadow: int = 0, fd: int = 0
    ) -> None:
        head = struct.pack("<QHHIII", self.owner, number, number, 5, 7, size)
        tail = struct.pack("<QQQQ", address, shadow, 0, 0x7F00)
        self.write(at, head + tail + struct.pack("<iiB3xB3x", fd, fd, bool(fd), bool(fd)))

    def completion(self, at: int, number: int, *, size: int, address: int, vector: int) -> None:
        head = struct.pack("<QBxHHxx", self.owner, 1, number, 1)
        self.write(at, head + struct.pack("<IIIIQ", 0, 0, vector, size, address))

    def execute(self, _command: str, _arguments: object) -> object:
        raise QmpCommandError("Property not found")

    def hmp(self, _line: str) -> str:
        words = "".join(f" 0x{word:08x}" for word in self.registers)
        return f"{BASE:016x}:{words}\r\n"

    def find(self) -> nvme.Queues | str:
        return nvme.queues_of(SESSION, cast("Any", self), DEVICE, BASE)


@pytest.fixture
def controller() -> MadeUpNvme:
    return MadeUpNvme()


def test_the_queues_of_a_controller_are_what_its_record_says(controller: MadeUpNvme) -> None:
    found = controller.find()
    assert isinstance(found, nvme.Queues)
    assert sorted(found.submissions) == sorted(found.completions) == [0, 1]
    queue = found.submissions[1]
    assert (queue.completion, queue.size, queue.head, queue.shadow) == (1, 1024, 5, 0x5008)
    state = eventfds.read_eventfd(ME, controller.fd)
    assert state is not None
    assert queue.notifier is not None
    assert (queue.notifier.fd, queue.notifier.eventfd_id) == (controller.fd, state.eventfd_id)
    assert (found.completions[1].vector, found.completions[1].interrupts) == (3, True)
    # NVMe 1.4, 3.1.24: 1000h + (2y) * (4 << CAP.DSTRD)
    assert found.doorbell(1) == 0x1000 + 2 * 8
    assert nvme.still_is(ME, queue)
    assert nvme.still_is(ME, found.completions[1])


def test_a_queue_that_was_made_anew_is_no_longer_the_one_that_was_found(
    controller: MadeUpNvme,
) -> None:
    found = controller.find()
    assert isinstance(found, nvme.Queues)
    controller.submission(controller.io, 1, size=1024, address=0x1000, shadow=0x6008)
    controller.completion(controller.io_done, 1, size=1024, address=0x9000, vector=2)
    assert not nvme.still_is(ME, found.submissions[1])
    assert not nvme.still_is(ME, found.completions[1])


def test_an_eventfd_that_is_not_open_is_no_notifier(controller: MadeUpNvme) -> None:
    controller.submission(controller.io, 1, size=1024, address=0x1000, shadow=0x5008, fd=900)
    found = controller.find()
    assert isinstance(found, nvme.Queues)
    assert found.submissions[1].notifier is None


@pytest.mark.parametrize(
    ("at", "raw"),
    [
        (48, struct.pack("<Q", 0)),  # the owner has no path
        (0x400 + 8, struct.pack("<H", 1)),  # the admin queue has another number
        (0x400 + 20, struct.pack("<I", 32)),  # and another size than AQA says
        (0x400 - 16, struct.pack("<Q", 0)),  # no array leads to it
        (0x500 + 32, struct.pack("<Q", ASQ)),  # its completion queue is another's
    ],
)
def test_a_record_that_does_not_agree_is_refused(
    controller: MadeUpNvme, at: int, raw: bytes
) -> None:
    controller.write(controller.owner + at, raw)
    assert controller.find() == "QEMU's record of its queues was not found in QEMU's memory"


@pytest.mark.parametrize(
    ("register", "value", "reason"),
    [
        (0x14, 0, "no driver in the guest has enabled"),
        (0x1C, 0, "no driver in the guest has enabled"),
        (0x1C, 1 | 2 << 2, "shut the controller down"),
    ],
)
def test_a_controller_that_is_not_in_use_is_refused(
    controller: MadeUpNvme, register: int, value: int, reason: str
) -> None:
    controller.registers[register // 4] = value
    found = controller.find()
    assert isinstance(found, str)
    assert reason in found


class MadeUpAssigned(MadeUpMemory):
    """An assigned device with three vectors, of which the second is not used (hw/vfio/pci.h)."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = self.allocate(4096)
        self.write(self.owner + 0x900, struct.pack("<Q", self.vectors))
        self.fds = [os.eventfd(0) for _ in range(4)]
        by_qemu, by_kvm, third, _ = self.fds
        self.vector(0, by_qemu, by_kvm, virq=24)
        self.vector(2, third, 0, virq=-1)

    def vector(self, number: int, by_qemu: int, by_kvm: int, *, virq: int) -> None:
        notifiers = struct.pack("<iiB3xiiB3x", by_qemu, by_qemu, 1, by_kvm, by_kvm, bool(by_kvm))
        raw = notifiers + struct.pack("<QiB3x", self.owner, virq, 1)
        self.write(self.vectors + 40 * number, raw)

    def find(self) -> dict[int, vfio.AssignedVector]:
        return vfio.vectors_of(SESSION, DEVICE, 3)


def test_an_assigned_devices_vector_is_signalled_where_kvm_or_qemu_takes_it() -> None:
    made = MadeUpAssigned()
    found = made.find()
    assert {number: (one.notifier.fd, one.by_kvm) for number, one in found.items()} == {
        0: (made.fds[1], True),
        2: (made.fds[2], False),
    }
    assert vfio.still_is(SESSION, found[0])
    made.vector(0, made.fds[0], made.fds[3], virq=24)
    assert not vfio.still_is(SESSION, found[0])


@pytest.mark.parametrize("fd", [900, -1])
def test_an_assigned_device_whose_eventfd_is_not_open_is_not_believed(fd: int) -> None:
    made = MadeUpAssigned()
    made.vector(0, made.fds[0], fd, virq=24)
    assert made.find() == {}
    made.vector(0, made.fds[0], made.fds[1], virq=24)
    assert sorted(made.find()) == [0, 2]
