"""Which eventfds interrupt for an assigned device? QEMU's record of its vectors, found and proved.

The host's kernel signals an eventfd for each interrupt of an assigned device (drivers/vfio/pci/
vfio_pci_intrs.c, vfio_msihandler), and KVM turns that into the guest's (irqfd); where KVM does not,
QEMU reads another one and interrupts by itself. QEMU's record is taken only if it leads back to the
device, whose canonical path (a string in QEMU's DeviceState) is its QOM path, and if every eventfd
in it is one that the process has open.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.host import eventfds, memory
from kickcall.model import Notifier
from kickcall.vmm.own_memory import addresses_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kickcall.model import NotifierState
    from kickcall.vmm.pci_devices import MappedPci
    from kickcall.vmm.session import VmmSession

# hw/vfio/pci.h, struct VFIOMSIVector, 6.0 to 10.1: `interrupt` and `kvm_interrupt` (two
# EventNotifiers: rfd, wfd, initialized), vdev, virq, use
_VECTOR = struct.Struct("<ii?3xii?3xQi?3x")
_PATH_OFFSETS = range(40, 128, 8)
"""Where DeviceState may keep its canonical path: behind its Object (include/hw/qdev-core.h)."""
_DEVICE_BYTES = 32 << 10
"""As many bytes of `struct VFIOPCIDevice` are looked at; it has a few thousand."""
_USER_SPACE = range(0x1000, 1 << 47)
_STRINGS_MAX = 100


@dataclass(frozen=True, slots=True)
class AssignedVector:
    """A vector that the driver uses, and the eventfd whose signal is its interrupt."""

    number: int
    notifier: Notifier
    by_kvm: bool
    """KVM interrupts the guest (irqfd); else QEMU does."""
    address: int
    """Where QEMU's record of it is."""
    record: bytes
    """What stood there."""


def vectors_of(session: VmmSession, mapped: MappedPci, count: int) -> dict[int, AssignedVector]:
    """Return the vectors of an assigned device that can have `count`; none where none is proved."""
    pid = session.process.pid
    states = eventfds.eventfds_of(pid)
    for owner in _owners(session, mapped.device.path):
        raw = _readable(pid, owner, _DEVICE_BYTES)
        for (pointer,) in struct.iter_unpack("<Q", raw):
            if pointer in _USER_SPACE and pointer % 8 == 0 and pointer != owner:
                found = _vectors(pid, owner, pointer, count, states)
                if found:
                    return found
    return {}


def still_is(session: VmmSession, vector: AssignedVector) -> bool:
    """Tell whether QEMU's record of the vector, and its eventfd, are what was found."""
    pid = session.process.pid
    if memory.read(pid, vector.address, _VECTOR.size) != vector.record:
        return False
    state = eventfds.read_eventfd(pid, vector.notifier.fd)
    return state is not None and state.eventfd_id == vector.notifier.eventfd_id


def _vectors(
    pid: int, owner: int, base: int, count: int, states: Mapping[int, NotifierState]
) -> dict[int, AssignedVector]:
    """Return the vectors of the array at `base`, if that is the array of the device `owner`."""
    raw = memory.read(pid, base, count * _VECTOR.size)
    if raw is None:
        return {}
    found = {}
    for number, fields in enumerate(_VECTOR.iter_unpack(raw)):
        rfd, wfd, initialized, kvm_rfd, kvm_wfd, kvm_initialized, vdev, virq, used = fields
        if not vdev and not used:
            continue
        if vdev != owner:
            return {}
        if not used:
            continue
        # virq is the MSI route's number in KVM; -1 where KVM has none.
        by_kvm = virq >= 0
        fd, other, has = (kvm_rfd, kvm_wfd, kvm_initialized) if by_kvm else (rfd, wfd, initialized)
        if not has or fd != other or fd not in states or states[fd].eventfd_id < 0:
            return {}
        at = number * _VECTOR.size
        found[number] = AssignedVector(
            number,
            Notifier(fd, states[fd].eventfd_id),
            by_kvm,
            base + at,
            raw[at : at + _VECTOR.size],
        )
    return found


def _owners(session: VmmSession, path: str) -> Iterator[int]:
    """Yield where an object may begin that says that `path` is its canonical path."""
    for number, text in enumerate(addresses_of(session, path.encode() + b"\0")):
        if number == _STRINGS_MAX:
            return
        for pointer in addresses_of(session, struct.pack("<Q", text)):
            if pointer % 8 == 0:
                yield from (pointer - offset for offset in _PATH_OFFSETS)


def _readable(pid: int, start: int, length: int) -> bytes:
    """Return what can be read of `length` bytes: an object may lie at the end of the heap."""
    while length >= 4096:
        raw = memory.read(pid, start, length)
        if raw is not None:
            return raw
        length //= 2
    return b""
