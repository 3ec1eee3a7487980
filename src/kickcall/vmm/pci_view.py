"""How does a PCI device interrupt, and with which messages? One look, while the machine runs.

The configuration space is memory on machines with ECAM (q35, arm virt), and HMP `xp` reads it
there; on others (i440fx) it stays unknown, and only MSI-X, whose table is in the device's own
memory, can be seen. Layouts: PCI 3.0, 6.2 and 6.8; names: include/uapi/linux/pci_regs.h.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kickcall.errors import DeviceNotFoundError
from kickcall.vmm.interrupts import (
    MSIX_ENABLE,
    MSIX_ENTRY_SIZE,
    MSIX_MASKALL,
    configuration_address,
    read_words,
    region_in_bars,
)
from kickcall.vmm.pause import Check
from kickcall.vmm.pci import functions
from kickcall.vmm.wiring import Message, device_views, read_table

if TYPE_CHECKING:
    from kickcall.vmm.interrupts import Region
    from kickcall.vmm.monitor import Monitor
    from kickcall.vmm.pci_devices import MappedPci

_COMMAND, _CAPABILITIES = 0x04, 0x34
COMMAND_MEMORY, COMMAND_MASTER, COMMAND_INTX_DISABLE = 1 << 1, 1 << 2, 1 << 10
_STATUS_CAP_LIST = 1 << 4 + 16
_MSI, _MSIX = 0x05, 0x11
_MSI_ENABLE, _MSI_64BIT, _MSI_MASKBIT = 1 << 0 + 16, 1 << 7 + 16, 1 << 8 + 16
_MSI_CAPABLE, _MSI_ASKED = 1 + 16, 4 + 16
"""How many messages, as powers of 2: where the two numbers of 3 bits begin."""
_MSI_WORDS = 6
_MSIX_SIZE = 0x7FF
_CAPABILITIES_MAX = 48
"""Room in 256 bytes less the header, at 4 bytes each."""
_ASKS_WHEN_READ = ("ivshmem",)
"""Kinds whose device acts on a read of its pending bits (hw/misc/ivshmem.c, msix poll notifier)."""


class Interrupts(enum.StrEnum):
    """How a PCI device interrupts now."""

    MSIX = "msi-x"
    MSI = "msi"
    INTX = "intx"
    UNKNOWN = "unknown"
    """Its configuration space cannot be read, and no MSI-X table is mapped."""


@dataclass(frozen=True, slots=True)
class Vector:
    """One message that a device may send."""

    message: Message
    pending: bool | None
    """Its interrupt waits until it is unmasked; None: not known."""
    check: Check
    """What must still stand where the message is kept when it is written."""


@dataclass(frozen=True, slots=True)
class PciView:
    """A PCI device as its registers stood."""

    function: dict[str, Any]
    """What `query-pci` said of it."""
    memory: list[Region]
    """What is where in the memory that processors see."""
    interrupts: Interrupts
    vectors: tuple[Vector, ...]
    """The messages that it has now, by number; none in INTx."""
    capable: int
    """How many messages it could have; 0: it has neither MSI nor MSI-X, or that is not known."""
    command: int | None
    """The command register; None where it cannot be read."""
    masked: bool
    """MSI-X is masked for the whole device."""
    checks: tuple[Check, ...]
    """What must still stand in the configuration space when a message is written."""


def look(monitor: Monitor, mapped: MappedPci) -> PciView:
    """Return the device as it stands now. Raises DeviceNotFoundError where it was unplugged."""
    device = mapped.device
    function = _function(monitor, mapped)
    memory, _ = device_views(monitor)
    at, command, heads = _configuration(monitor, function, memory)
    (msix, msix_head), (msi, msi_head) = (heads.get(one, (0, 0)) for one in (_MSIX, _MSI))
    mode = Interrupts.UNKNOWN if command is None else Interrupts.INTX
    vectors: tuple[Vector, ...] = ()
    capable, own = 0, None
    if msi:
        capable = 1 << (msi_head >> _MSI_CAPABLE & 7)
        if msi_head & _MSI_ENABLE:
            mode, own = Interrupts.MSI, Check(at + msi, _MSI_ENABLE, _MSI_ENABLE)
            vectors = _msi_vectors(monitor, at + msi)
    table = region_in_bars(function, memory, "msix-table")
    if msix:
        capable = (msix_head >> 16 & _MSIX_SIZE) + 1
    if table is not None and (command is None or msix_head & MSIX_ENABLE):
        mode, vectors = (
            Interrupts.MSIX,
            _msix_vectors(monitor, function, memory, table, device.kind),
        )
        capable = len(vectors)
        if msix:
            own = Check(at + msix, MSIX_ENABLE | MSIX_MASKALL, MSIX_ENABLE)
    master = Check(at + _COMMAND, COMMAND_MASTER, COMMAND_MASTER)
    return PciView(
        function=function,
        memory=memory,
        interrupts=mode,
        vectors=vectors,
        capable=capable,
        command=command,
        masked=mode is Interrupts.MSIX and bool(msix_head & MSIX_MASKALL),
        checks=() if own is None else (master, own),
    )


def _function(monitor: Monitor, mapped: MappedPci) -> dict[str, Any]:
    """Return what `query-pci` says of the device now."""
    device = mapped.device
    for entry in functions(monitor.execute("query-pci")):
        place = (entry["bus"], entry["slot"], entry["function"])
        if place == (device.bus, device.slot, device.function) and all(
            entry.get(key) == mapped.function.get(key) for key in ("qdev_id", "id")
        ):
            return entry
    raise DeviceNotFoundError(f"{device.id} is no longer at {device.address}")


def _configuration(
    monitor: Monitor, function: dict[str, Any], memory: list[Region]
) -> tuple[int, int | None, dict[int, tuple[int, int]]]:
    """Return where the configuration space is, the command register, and the capabilities.

    A capability is its offset and its first word, by id. The register is None where the space
    cannot be read.
    """
    at = configuration_address(function, memory)
    header = None if at is None else read_words(monitor, at, 16)
    identity = function["id"]
    if at is None or header is None or header[0] != identity["device"] << 16 | identity["vendor"]:
        return 0, None, {}
    command = header[_COMMAND // 4]
    heads: dict[int, tuple[int, int]] = {}
    offset = header[_CAPABILITIES // 4] & 0xFC if command & _STATUS_CAP_LIST else 0
    for _ in range(_CAPABILITIES_MAX):
        head = read_words(monitor, at + offset, 1) if offset else None
        if head is None:
            break
        heads.setdefault(head[0] & 0xFF, (offset, head[0]))
        offset = head[0] >> 8 & 0xFC
    return at, command, heads


def _msi_vectors(monitor: Monitor, at: int) -> tuple[Vector, ...]:
    """Return the messages of an MSI capability (PCI 3.0, 6.8.1): one, with numbers in its data."""
    words = read_words(monitor, at, _MSI_WORDS)
    if words is None:
        return ()
    head = words[0]
    wide = 1 if head & _MSI_64BIT else 0
    address = words[1] | (words[2] << 32 if wide else 0)
    data = words[2 + wide] & 0xFFFF
    masks, waiting = words[3 + wide : 5 + wide] if head & _MSI_MASKBIT else (0, 0)
    count = 1 << min(head >> _MSI_ASKED & 7, 5)
    vectors = []
    for number in range(count):
        masked = bool(masks >> number & 1)
        # Address and data follow each other, and the mask bits follow them, 32 bits further on.
        mask = (1 << 48 + 32 * wide) - 1
        value = address | data << 32 + 32 * wide
        if head & _MSI_MASKBIT:
            mask |= 1 << 64 + 32 * wide + number
        message = Message(number, address, data & ~(count - 1) | number, masked)
        vectors.append(Vector(message, bool(waiting >> number & 1), Check(at + 4, mask, value)))
    return tuple(vectors)


def _msix_vectors(
    monitor: Monitor, function: dict[str, Any], memory: list[Region], table: Region, kind: str
) -> tuple[Vector, ...]:
    messages = read_table(monitor, table) or []
    pending: list[bool | None] = [None] * len(messages)
    bits = region_in_bars(function, memory, "msix-pba")
    if bits is not None and not kind.startswith(_ASKS_WHEN_READ):
        words = read_words(monitor, bits.start, -(-len(messages) // 32))
        if words is not None:
            pending = [
                bool(words[number // 32] >> number % 32 & 1) for number in range(len(messages))
            ]
    return tuple(
        Vector(message, waits, entry_check(table, message))
        for message, waits in zip(messages, pending, strict=True)
    )


def entry_check(table: Region, message: Message) -> Check:
    """Return what proves that an entry still holds `message`: address, data and the mask bit.

    PCI 3.0, 6.8.2.6 to 6.8.2.9.
    """
    at = table.start + message.vector * MSIX_ENTRY_SIZE
    return Check(at, (1 << 97) - 1, message.address | message.data << 64)
