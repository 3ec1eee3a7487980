"""How does a virtio driver set up a device's queues and use them? (virtio 1.2, 3.1 and 4.1)

The smallest driver that is correct, for machines without a guest: modern virtio-pci, split and
packed queues. It never suppresses notifications by itself; tests write the fields they want.
"""

from __future__ import annotations

import struct
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from kickcall.errors import LabError
from kickcall.host.eventfds import eventfds_of
from kickcall.lab.qtest_pci import PciFunction, landed

if TYPE_CHECKING:
    from kickcall.lab.qtest import Qtest

_VENDOR = 0x1AF4
_CAP_VENDOR = 0x09
_CFG_COMMON, _CFG_NOTIFY = 1, 2  # virtio 1.2, 4.1.4

# struct virtio_pci_common_cfg, virtio 1.2, 4.1.4.3
_DEVICE_FEATURE_SELECT, _DEVICE_FEATURE = 0x00, 0x04
_DRIVER_FEATURE_SELECT, _DRIVER_FEATURE = 0x08, 0x0C
_NUM_QUEUES, _STATUS = 0x12, 0x14
_QUEUE_SELECT, _QUEUE_SIZE, _QUEUE_VECTOR, _QUEUE_ENABLE = 0x16, 0x18, 0x1A, 0x1C
_QUEUE_NOTIFY_OFF, _QUEUE_DESC, _QUEUE_DRIVER, _QUEUE_DEVICE = 0x1E, 0x20, 0x28, 0x30

_ACKNOWLEDGE, _DRIVER, _DRIVER_OK, _FEATURES_OK = 1, 2, 4, 8  # virtio 1.2, 2.1

RING_EVENT_IDX, VERSION_1, RING_PACKED = 29, 32, 34
"""Feature bits, virtio 1.2, 6."""

_DESC_NEXT, _DESC_WRITE = 1, 2
_DESC_AVAIL, _DESC_USED = 1 << 7, 1 << 15

_TAKEN_WITHIN = 5.0
"""Seconds until a notifier that QEMU wrote at the start of a device counts as nobody's to read."""
_LANDING_SIZE = 4 * 2048
"""Room for the most vectors that MSI-X has (PCI 3.0, 6.8.2)."""


class Buffer(NamedTuple):
    """A piece of guest memory in a request. `writable`: by the device."""

    address: int
    length: int
    writable: bool


@dataclass(slots=True)
class _Queue(ABC):
    """What a virtqueue that was set up is and does in either layout."""

    qtest: Qtest
    index: int
    size: int
    desc: int
    avail: int
    used: int
    notify: int
    """Address of the queue's doorbell register."""
    landing: int
    """Where the queue's MSI lands; 0 without MSI-X."""
    kind: str = ""

    @abstractmethod
    def publish(self, buffers: list[Buffer]) -> None:
        """Make one request available."""

    @abstractmethod
    def completed(self) -> int:
        """Return how many requests the device has completed."""

    def publish_request(self) -> None:
        """Make a harmless request of the device's own kind available."""
        self.publish(request_buffers(self.qtest, self.kind))

    def kick(self) -> None:
        """Write the doorbell."""
        self.qtest.batch([f"writew {self.notify:#x} {self.index:#x}"])

    def called(self) -> bool:
        """Return whether the queue's interrupt came since the last look."""
        return bool(self.landing) and landed(self.qtest, self.landing)

    def wait_completed(self, count: int, timeout: float = 5.0) -> None:
        """Return when `count` requests have completed. Raises LabError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.completed() < count:
            if time.monotonic() > deadline:
                raise LabError(
                    f"queue {self.index} completed {self.completed()} of {count} requests "
                    f"in {timeout:g} s"
                )
            time.sleep(0.001)


@dataclass(slots=True)
class SplitQueue(_Queue):
    """A split virtqueue that was set up: its rings' addresses, and the driver's position."""

    avail_idx: int = 0

    def publish(self, buffers: list[Buffer]) -> None:
        """Make one request available. The descriptors of an older one are used again."""
        start = self.avail_idx * len(buffers) % (self.size - len(buffers) + 1)
        commands = []
        for number, buffer in enumerate(buffers):
            last = number == len(buffers) - 1
            flags = (0 if last else _DESC_NEXT) | (_DESC_WRITE if buffer.writable else 0)
            position = start + number
            entry = struct.pack(
                "<QIHH", buffer.address, buffer.length, flags, 0 if last else position + 1
            )
            commands.append(write_command(self.desc + 16 * position, entry))
        slot = self.avail + 4 + 2 * (self.avail_idx % self.size)
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        commands.append(write_command(slot, struct.pack("<H", start)))
        commands.append(f"writew {self.avail + 2:#x} {self.avail_idx:#x}")
        self.qtest.batch(commands)

    def used_idx(self) -> int:
        """Return used.idx, as the device wrote it."""
        return self.qtest.number(f"readw {self.used + 2:#x}")

    def completed(self) -> int:
        """Return how many requests the device has completed, modulo 2^16."""
        return self.used_idx()

    def set_used_event(self, value: int) -> None:
        """Say after which used index the driver wants a call (RING_EVENT_IDX)."""
        self.qtest.batch([f"writew {self.avail + 4 + 2 * self.size:#x} {value:#x}"])


@dataclass(slots=True)
class PackedQueue(_Queue):
    """A packed virtqueue that was set up.

    `avail` is the driver's event suppression area, `used` the device's.
    """

    position: int = 0
    """Offset in the ring where the driver writes next."""
    wrap: int = 1
    """The driver's wrap counter, 1 at first (virtio 1.2, 2.8.1)."""
    _in_flight: list[tuple[int, int, int]] = field(default_factory=list)
    _completed: int = 0

    def publish(self, buffers: list[Buffer]) -> None:
        """Make one request available."""
        first, commands = "", []
        identifier = self.position
        used_at, used_wrap = self.position, self.wrap
        for number, buffer in enumerate(buffers):
            flags = _DESC_AVAIL if self.wrap else _DESC_USED
            flags |= 0 if number == len(buffers) - 1 else _DESC_NEXT
            flags |= _DESC_WRITE if buffer.writable else 0
            entry = struct.pack("<QIHH", buffer.address, buffer.length, identifier, flags)
            command = write_command(self.desc + 16 * self.position, entry)
            if number == 0:
                first = command
            else:
                commands.append(command)
            self.position += 1
            if self.position == self.size:
                self.position, self.wrap = 0, self.wrap ^ 1
        # The first descriptor last: it makes the whole list available (virtio 1.2, 2.8.6).
        self.qtest.batch([*commands, first])
        self._in_flight.append((used_at, used_wrap, len(buffers)))

    def completed(self) -> int:
        """Return how many requests the device has completed, in order, since the set-up."""
        while self._in_flight:
            position, wrap, _ = self._in_flight[0]
            flags = self.qtest.number(f"readw {self.desc + 16 * position + 14:#x}")
            # Used when both bits equal the wrap counter (virtio 1.2, 2.8.1).
            if bool(flags & _DESC_AVAIL) != bool(wrap) or bool(flags & _DESC_USED) != bool(wrap):
                break
            self._in_flight.pop(0)
            self._completed += 1
        return self._completed


class VirtioPciDriver:
    """A modern virtio-pci device, driven over qtest."""

    def __init__(self, qtest: Qtest, slot: int, kind: str) -> None:
        self.kind = kind
        self.queues: list[SplitQueue | PackedQueue] = []
        self._qtest = qtest
        self._pci = PciFunction(qtest, slot)
        self._pci.check(_VENDOR)
        self._bars = self._pci.enable()
        self._notify_multiplier = 1
        self._common, self._notify = 0, 0
        for capability in self._pci.capabilities():
            if capability.id != _CAP_VENDOR:
                continue
            at = capability.offset
            structure, bar = self._pci.config(at + 3, 1), self._pci.config(at + 4, 1)
            if structure == _CFG_COMMON:
                self._common = self._bars[bar] + self._pci.config(at + 8)
            elif structure == _CFG_NOTIFY and not self._notify:
                # A second one may follow, for the notify BAR in I/O space.
                self._notify = self._bars[bar] + self._pci.config(at + 8)
                self._notify_multiplier = self._pci.config(at + 16)
        if not self._common:
            raise LabError(f"the device in slot {slot:#x} has no modern virtio-pci interface")

    def reset(self) -> None:
        """Reset the device and wait until it is done (virtio 1.2, 4.1.4.3.2)."""
        self._qtest.batch([f"writeb {self._common + _STATUS:#x} 0"])
        while self._qtest.number(f"readb {self._common + _STATUS:#x}"):
            pass
        self.queues = []

    def offered(self) -> int:
        """Return the device's feature bits."""
        bits = 0
        for word in (0, 1):
            select = f"writel {self._common + _DEVICE_FEATURE_SELECT:#x} {word}"
            _, value = self._qtest.batch([select, f"readl {self._common + _DEVICE_FEATURE:#x}"])
            bits |= int(value, 16) << 32 * word
        return bits

    def set_up(
        self,
        *,
        queues: int | None = None,
        size: int | None = None,
        packed: bool = False,
        event_idx: bool = False,
        settle: float = 0.05,
    ) -> None:
        """Reset the device, agree on features, and set up its queues with a vector each.

        QEMU kicks every queue once by itself when a driver is ready (hw/virtio/virtio.c,
        virtio_device_start_ioeventfd_impl); this returns `settle` seconds after iothreads and
        other processes took that kick, so that it is not taken for ours.

        `queues`: how many, from 0 on (None: all). `size`: entries (None: the device's largest).
        Raises LabError for a feature that the device does not offer.
        """
        self.reset()
        wanted = 1 << VERSION_1
        wanted |= 1 << RING_PACKED if packed else 0
        wanted |= 1 << RING_EVENT_IDX if event_idx else 0
        if missing := wanted & ~self.offered():
            raise LabError(f"the device does not offer feature bits {missing:#x}")
        common = self._common
        self._set_status(_ACKNOWLEDGE | _DRIVER)
        self._qtest.batch(
            f"writel {common + register:#x} {value:#x}"
            for word in (0, 1)
            for register, value in (
                (_DRIVER_FEATURE_SELECT, word),
                (_DRIVER_FEATURE, wanted >> 32 * word & 0xFFFF_FFFF),
            )
        )
        self._set_status(_ACKNOWLEDGE | _DRIVER | _FEATURES_OK)
        if not self._qtest.number(f"readb {common + _STATUS:#x}") & _FEATURES_OK:
            raise LabError(f"the device refused the features {wanted:#x}")
        has = self._qtest.number(f"readw {common + _NUM_QUEUES:#x}")
        count = has if queues is None else queues
        if count > has:
            raise LabError(f"the device has {has} queues, not {count}")
        landing = self._qtest.allocate(_LANDING_SIZE, 4096)
        vectors = self._pci.enable_msix(self._bars, landing)
        self.queues = self._set_up_queues(count, size, packed, vectors, landing)
        before = {state.eventfd_id for state in eventfds_of(self._qtest.pid).values()}
        self._set_status(_ACKNOWLEDGE | _DRIVER | _FEATURES_OK | _DRIVER_OK)
        deadline = time.monotonic() + _TAKEN_WITHIN
        while self._is_notified(before) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(settle)
        # A vhost-user back-end also calls at its start, needed or not.
        self._qtest.batch([f"memset {landing:#x} {_LANDING_SIZE:#x} 0"])

    def _is_notified(self, before: set[int]) -> bool:
        """Tell whether an eventfd that is none of those `before` waits to be read."""
        return any(
            state.count and state.eventfd_id not in before
            for state in eventfds_of(self._qtest.pid).values()
        )

    def _set_up_queues(
        self, count: int, size: int | None, packed: bool, vectors: int, landing: int
    ) -> list[SplitQueue | PackedQueue]:
        common = self._common
        facts = self._qtest.batch(
            command
            for index in range(count)
            for command in (
                f"writew {common + _QUEUE_SELECT:#x} {index:#x}",
                f"readw {common + _QUEUE_SIZE:#x}",
                f"readw {common + _QUEUE_NOTIFY_OFF:#x}",
            )
        )
        layout = PackedQueue if packed else SplitQueue
        queues: list[SplitQueue | PackedQueue] = []
        commands: list[str] = []
        for index in range(count):
            largest, notify_off = (int(value, 16) for value in facts[3 * index + 1 : 3 * index + 3])
            entries = size or largest
            # virtio 1.2, 2.7 and 2.8.10: sizes and alignments of the three parts.
            desc = self._qtest.allocate(16 * entries, 16)
            avail = self._qtest.allocate(4 if packed else 6 + 2 * entries, 4)
            used = self._qtest.allocate(4 if packed else 6 + 8 * entries, 4)
            # Vector 0 is for configuration changes, as in Linux; too few are shared.
            vector = min(index + 1, vectors - 1) if vectors else 0xFFFF
            queues.append(
                layout(
                    qtest=self._qtest,
                    index=index,
                    size=entries,
                    desc=desc,
                    avail=avail,
                    used=used,
                    notify=self._notify + notify_off * self._notify_multiplier,
                    landing=landing + 4 * vector if vectors else 0,
                    kind=self.kind,
                )
            )
            commands += [
                f"writew {common + _QUEUE_SELECT:#x} {index:#x}",
                f"writew {common + _QUEUE_SIZE:#x} {entries:#x}",
                f"writew {common + _QUEUE_VECTOR:#x} {vector:#x}",
                f"writel {common + _QUEUE_DESC:#x} {desc:#x}",
                f"writel {common + _QUEUE_DRIVER:#x} {avail:#x}",
                f"writel {common + _QUEUE_DEVICE:#x} {used:#x}",
                f"writew {common + _QUEUE_ENABLE:#x} 1",
            ]
        self._qtest.batch(commands)
        return queues

    def _set_status(self, status: int) -> None:
        self._qtest.batch([f"writeb {self._common + _STATUS:#x} {status:#x}"])


def request_buffers(qtest: Qtest, kind: str) -> list[Buffer]:
    """Return a harmless request: read a sector, ask whether a disk is ready, ask for entropy."""
    if kind in ("virtio-blk", "vhost-user-blk"):
        # struct virtio_blk_req: VIRTIO_BLK_T_IN is 0, sector 0 (virtio 1.2, 5.2.6).
        header, data, status = qtest.allocate(16), qtest.allocate(512), qtest.allocate(1)
        return [Buffer(header, 16, False), Buffer(data, 512, True), Buffer(status, 1, True)]
    if kind == "virtio-scsi":
        # struct virtio_scsi_req_cmd, 19 bytes and a CDB of 32; LUN 0 of target 0 (5.6.6.1).
        # A CDB of zeroes is TEST UNIT READY.
        command, response = qtest.allocate(51), qtest.allocate(108)
        qtest.write(command, b"\x01\x00\x40\x00")
        return [Buffer(command, 51, False), Buffer(response, 108, True)]
    return [Buffer(qtest.allocate(64), 64, True)]


def write_command(address: int, data: bytes) -> str:
    """Return the qtest command that writes guest-physical memory."""
    return f"write {address:#x} {len(data):#x} 0x{data.hex()}"
