"""e1000: Intel's 82540EM and kin, as QEMU has them (hw/net/e1000.c).

They have INTx alone, and one ring each way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.devices.intel_nic import RCTL, TCTL, Cause, IntelNic, Ring, other_cause

if TYPE_CHECKING:
    from collections.abc import Mapping

ICS, IMS = 0xC8, 0xD0
# PCI/PCI-X Family of Gigabit Ethernet Controllers, Software Developer's Manual, 13.4.20: ICS
TXDW, RXSEQ, RXDMT0, RXT0 = 1 << 0, 1 << 3, 1 << 4, 1 << 7
_HARMLESS = TXDW | RXSEQ | RXDMT0 | RXT0
"""Causes that a driver takes for "look at your rings" (Linux 6.1: e1000.h, IMS_ENABLE_MASK)."""


class E1000(IntelNic):
    """One receive and one transmit ring."""

    name = "e1000"
    kinds = frozenset({"e1000", "e1000-82544gc", "e1000-82545em"})
    region = "e1000-mmio"
    rings = (
        Ring("receive 0", length=0x2808, tail=0x2818, control=RCTL),
        Ring("transmit 0", length=0x3808, tail=0x3818, control=TCTL),
    )
    reads = (ICS, IMS)

    def cause(self, queue: int, registers: Mapping[int, int]) -> Cause | str:
        """Return the receiver's timer or the transmitter's write-back."""
        refusal = self.cannot_interrupt()
        if refusal:
            return refusal
        wanted = TXDW if queue % 2 else RXT0
        bits = other_cause(wanted, _HARMLESS, registers[ICS], registers[IMS])
        return Cause(ICS, bits, None)
