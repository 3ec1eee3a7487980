"""How does somebody in the guest keep a device's interrupts from the driver? Its PCI registers.

Written from inside the guest, behind its kernel's back: /sys/bus/pci/devices/…/config for the
configuration space, /dev/mem for the MSI-X table. Offsets are those of PCI Local Bus 3.0
(6.2 header, 6.8.2 MSI-X).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.errors import LabError

if TYPE_CHECKING:
    from kickcall.lab.guest import Guest

_COMMAND = 0x04
BUS_MASTER = 1 << 2
INTX_DISABLE = 1 << 10
_CAPABILITIES = 0x34
_MSIX = 0x11
_MSIX_FUNCTION_MASK = 1 << 14
_ENTRY_SIZE = 16
_VECTOR_CONTROL = 12
_VECTOR_MASKED = 1


@dataclass(frozen=True, slots=True)
class MsixCapability:
    """Where a function's MSI-X capability is, and what it says."""

    offset: int
    control: int
    table_bar: int
    table_offset: int


def find_msix(config: bytes) -> MsixCapability | None:
    """Return the MSI-X capability in 256 bytes of configuration space, or None."""
    at = config[_CAPABILITIES] & ~3
    # Each capability takes 4 bytes or more, so a list that loops ends, too.
    for _ in range(len(config) // 4):
        if not at:
            return None
        if config[at] == _MSIX:
            table = int.from_bytes(config[at + 4 : at + 8], "little")
            control = int.from_bytes(config[at + 2 : at + 4], "little")
            return MsixCapability(at, control, table & 7, table & ~7)
        at = config[at + 1] & ~3
    return None


class Registers:
    """The PCI registers of one device, seen from the guest."""

    def __init__(self, guest: Guest, pci_address: str) -> None:
        self._guest = guest
        self._folder = f"/sys/bus/pci/devices/{pci_address}"

    def mask_vector(self, vector: int, masked: bool) -> None:
        """Mask or unmask one MSI-X vector in the table."""
        msix = self._msix()
        bars = self._run(f"cat {self._folder}/resource").split("\n")
        start = int(bars[msix.table_bar].split()[0], 16)
        control = start + msix.table_offset + vector * _ENTRY_SIZE + _VECTOR_CONTROL
        self._run(f"devmem {control:#x} 32 {_VECTOR_MASKED if masked else 0}")
        said = int(self._run(f"devmem {control:#x} 32"), 16)
        if bool(said & _VECTOR_MASKED) != masked:
            raise LabError(f"vector {vector} did not take the mask: its control says {said:#x}")

    def mask_function(self, masked: bool) -> None:
        """Mask or unmask all MSI-X vectors of the device at once."""
        msix = self._msix()
        self._write_u16(msix.offset + 2, _with(msix.control, _MSIX_FUNCTION_MASK, masked))

    def set_command(self, bit: int, on: bool) -> None:
        """Set or clear a bit of the command register: BUS_MASTER, INTX_DISABLE."""
        command = int.from_bytes(self._config()[_COMMAND : _COMMAND + 2], "little")
        self._write_u16(_COMMAND, _with(command, bit, on))

    def _msix(self) -> MsixCapability:
        msix = find_msix(self._config())
        if msix is None:
            raise LabError(f"{self._folder} has no MSI-X")
        return msix

    def _config(self) -> bytes:
        return bytes.fromhex(self._run(f"hexdump -v -e '1/1 \"%02x\"' {self._folder}/config"))

    def _write_u16(self, offset: int, value: int) -> None:
        low, high = value & 0xFF, value >> 8
        # One write of two bytes: the kernel makes one 16-bit access of it.
        self._run(
            f"printf '\\{low:03o}\\{high:03o}' | "
            f"dd of={self._folder}/config bs=2 seek={offset // 2} conv=notrunc 2>/dev/null"
        )
        said = int.from_bytes(self._config()[offset : offset + 2], "little")
        if said != value:
            raise LabError(f"register {offset:#x} of {self._folder} says {said:#x}, not {value:#x}")

    def _run(self, command: str) -> str:
        status, output = self._guest.run(command)
        if status:
            raise LabError(f"in the guest, {command!r} failed: {output.strip()}")
        return output.strip()


def _with(value: int, bit: int, on: bool) -> int:
    return value | bit if on else value & ~bit
