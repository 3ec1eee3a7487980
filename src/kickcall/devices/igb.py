"""igb: Intel's 82576, as QEMU has it from 8.0 on (hw/net/igb.c, igb_core.c).

By MSI-X a vector is a cause of its own, which array IVAR gives to rings: Linux gives receive and
transmit ring k the same one. Without MSI-X all rings have one interrupt (82576 datasheet, 7.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.devices.e1000 import RXDMT0, RXSEQ, RXT0, TXDW
from kickcall.devices.intel_nic import RCTL, TCTL, Cause, IntelNic, Ring, other_cause
from kickcall.vmm.pci_view import Interrupts

if TYPE_CHECKING:
    from collections.abc import Mapping

# Datasheet 8.8; names as in Linux 6.1, drivers/net/ethernet/intel/igb/e1000_regs.h
_ICS, _IMS, _GPIE, _EICS, _IVAR0 = 0x1504, 0x1508, 0x1514, 0x1520, 0x1700
_MSIX_MODE = 1 << 4
_IVAR_VALID = 1 << 7
_RINGS = 16


def _ring(number: int, transmit: bool) -> Ring:
    # E1000_RDLEN, E1000_TDLEN: the first four are where the 82574 has them.
    if number < 4:
        at = (0x3800 if transmit else 0x2800) + number * 0x100
    else:
        at = (0xE000 if transmit else 0xC000) + number * 0x40
    word, control = ("transmit", TCTL) if transmit else ("receive", RCTL)
    return Ring(f"{word} {number}", length=at + 0x08, tail=at + 0x18, control=control)


class Igb(IntelNic):
    """16 receive and 16 transmit rings; Linux uses as many as the machine has processors."""

    name = "igb"
    kinds = frozenset({"igb"})
    region = "igb-mmio"
    rings = tuple(_ring(number // 2, bool(number % 2)) for number in range(2 * _RINGS))
    reads = (_ICS, _IMS, _GPIE, *range(_IVAR0, _IVAR0 + 4 * 8, 4))

    def cause(self, queue: int, registers: Mapping[int, int]) -> Cause | str:
        """Return the cause of the ring's vector by MSI-X, and a common one otherwise."""
        refusal = self.cannot_interrupt()
        if refusal:
            return refusal
        if self.view.interrupts is Interrupts.MSIX:
            if not registers[_GPIE] & _MSIX_MODE:
                return "the driver enabled MSI-X and did not set GPIE for it"
            # 8.8.15: register n has rings n and n + 8, a byte each for receive and transmit.
            ring = queue // 2
            register = _IVAR0 + 4 * (ring % 8)
            shift = 16 * (ring // 8) + 8 * (queue % 2)
            entry = registers[register] >> shift & 0xFF
            if not entry & _IVAR_VALID:
                return f"the driver gave {self.rings[queue].name} no vector (IVAR)"
            vector = entry & 0x1F
            return Cause(_EICS, 1 << vector, vector, ((register, 0xFF << shift, entry << shift),))
        wanted = TXDW if queue % 2 else RXT0
        others = TXDW | RXSEQ | RXDMT0 | RXT0
        return Cause(_ICS, other_cause(wanted, others, registers[_ICS], registers[_IMS]), None)
