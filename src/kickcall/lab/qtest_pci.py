"""How does a PCI function become usable without firmware? (PCI 3.0, 6.2.5, 6.7, 6.8.2)"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kickcall.errors import LabError

if TYPE_CHECKING:
    from kickcall.lab.qtest import Qtest

_ADDRESS_PORT, _DATA_PORT = 0xCF8, 0xCFC
_COMMAND, _BAR0, _CAPABILITIES = 0x04, 0x10, 0x34
_IO_MEMORY_MASTER = 0b111
_CAP_MSIX = 0x11
_MSIX_ENABLE = 1 << 15
_MSIX_ENTRY = 16

# Each slot gets a window of its own, in space that q35 gives to PCI when the machine has less
# than 2 GiB of RAM; I/O ports from 0xc000 are free on every PC.
_MEMORY_WINDOWS, _MEMORY_WINDOW = 0xC000_0000, 1 << 24
_IO_WINDOWS, _IO_WINDOW = 0xC000, 0x100


class Capability(NamedTuple):
    id: int
    offset: int
    """Where it stands in configuration space."""


@dataclass(frozen=True, slots=True)
class PciFunction:
    """Function 0 of a slot on the root bus."""

    qtest: Qtest
    slot: int

    def config(self, offset: int, size: int = 4) -> int:
        """Return a field of configuration space (1, 2 or 4 bytes, aligned)."""
        self.qtest.batch([self._select(offset)])
        letter = {1: "b", 2: "w", 4: "l"}[size]
        return self.qtest.number(f"in{letter} {_DATA_PORT + offset % 4:#x}")

    def set_config(self, offset: int, value: int, size: int = 4) -> None:
        letter = {1: "b", 2: "w", 4: "l"}[size]
        port = _DATA_PORT + offset % 4
        self.qtest.batch([self._select(offset), f"out{letter} {port:#x} {value:#x}"])

    def enable(self) -> dict[int, int]:
        """Give every BAR an address, switch the function on, and return the addresses by BAR."""
        memory = _MEMORY_WINDOWS + self.slot * _MEMORY_WINDOW
        port = _IO_WINDOWS + self.slot * _IO_WINDOW
        bars: dict[int, int] = {}
        number = 0
        while number < 6:
            offset = _BAR0 + 4 * number
            self.set_config(offset, 0xFFFF_FFFF)
            kind = self.config(offset)
            if kind == 0:
                number += 1
                continue
            is_io, is_wide = bool(kind & 1), kind & 0b111 == 0b100
            size = (~(kind & (~3 if is_io else ~0xF)) & 0xFFFF_FFFF) + 1
            if is_io:
                size &= 0xFFFF
                port = -(-port // size) * size
                bars[number], port = port, port + size
            else:
                memory = -(-memory // size) * size
                bars[number], memory = memory, memory + size
            self.set_config(offset, bars[number])
            if is_wide:
                self.set_config(offset + 4, 0)
            number += 2 if is_wide else 1
        self.set_config(_COMMAND, _IO_MEMORY_MASTER, 2)
        return bars

    def capabilities(self) -> list[Capability]:
        found: list[Capability] = []
        offset = self.config(_CAPABILITIES, 1)
        # The list cannot be longer than the space: a loop in it must not hang us.
        while offset and len(found) < 48:
            head = self.config(offset & ~3, 4)
            found.append(Capability(head & 0xFF, offset))
            offset = head >> 8 & 0xFF
        return found

    def enable_msix(self, bars: dict[int, int], landing: int) -> int:
        """Unmask all MSI-X vectors and return how many there are.

        An MSI is a write to memory. Vector N's goes to the RAM at `landing` + 4 * N, where it
        leaves 1: so whoever looks there sees that it came.
        """
        for capability in self.capabilities():
            if capability.id == _CAP_MSIX:
                break
        else:
            return 0
        control = self.config(capability.offset, 4) >> 16
        table = self.config(capability.offset + 4)
        vectors = (control & 0x7FF) + 1
        base = bars[table & 0b111] + (table & ~0b111)
        commands: list[str] = []
        for vector in range(vectors):
            message = (landing + 4 * vector, 0, 1, 0)
            commands += [
                f"writel {base + vector * _MSIX_ENTRY + 4 * field:#x} {value:#x}"
                for field, value in enumerate(message)
            ]
        self.qtest.batch(commands)
        self.set_config(capability.offset + 2, control | _MSIX_ENABLE, 2)
        return vectors

    def check(self, vendor: int) -> None:
        """Raise LabError unless the slot holds a function of this vendor."""
        found = self.config(0, 2)
        if found != vendor:
            raise LabError(f"PCI slot {self.slot:#x} holds vendor {found:#06x}, not {vendor:#06x}")

    def _select(self, offset: int) -> str:
        address = 1 << 31 | self.slot << 11 | offset & ~3
        return f"outl {_ADDRESS_PORT:#x} {address:#x}"


def landed(qtest: Qtest, address: int) -> bool:
    """Return whether an MSI came to this landing since the last look."""
    (value,) = struct.unpack("<I", qtest.read(address, 4))
    if value:
        qtest.batch([f"writel {address:#x} 0"])
    return bool(value)
