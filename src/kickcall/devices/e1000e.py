"""e1000e: Intel's 82574L, as QEMU has it (hw/net/e1000e.c, e1000e_core.c).

By MSI-X each ring has an interrupt of its own, which register IVAR gives a vector; by MSI and INTx
all have one (82574 datasheet, 7.4 and 10.2.4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.devices.e1000 import ICS, IMS, RXDMT0, RXSEQ, RXT0, TXDW
from kickcall.devices.intel_nic import RCTL, TCTL, Cause, IntelNic, Ring, other_cause
from kickcall.vmm.pci_view import Interrupts

if TYPE_CHECKING:
    from collections.abc import Mapping

_IVAR = 0xE4
_IVAR_VALID = 1 << 3
# Datasheet 10.2.4.2: ICS bits 20 to 23; 10.2.4.9: nibbles of IVAR. By queue number.
_CAUSES = (1 << 20, 1 << 22, 1 << 21, 1 << 23)
_IVAR_SHIFTS = (0, 8, 4, 12)


class E1000e(IntelNic):
    """Two receive and two transmit rings; Linux uses the first of each."""

    name = "e1000e"
    kinds = frozenset({"e1000e"})
    region = "e1000e-mmio"
    rings = (
        Ring("receive 0", length=0x2808, tail=0x2818, control=RCTL),
        Ring("transmit 0", length=0x3808, tail=0x3818, control=TCTL),
        Ring("receive 1", length=0x2908, tail=0x2918, control=RCTL),
        Ring("transmit 1", length=0x3908, tail=0x3918, control=TCTL),
    )
    reads = (ICS, IMS, _IVAR)

    def cause(self, queue: int, registers: Mapping[int, int]) -> Cause | str:
        """Return the ring's own cause by MSI-X, and a common one otherwise."""
        refusal = self.cannot_interrupt()
        if refusal:
            return refusal
        if self.view.interrupts is Interrupts.MSIX:
            shift = _IVAR_SHIFTS[queue]
            entry = registers[_IVAR] >> shift & 0xF
            if not entry & _IVAR_VALID:
                return f"the driver gave {self.rings[queue].name} no vector (IVAR)"
            check = (_IVAR, 0xF << shift, entry << shift)
            return Cause(ICS, _CAUSES[queue], entry & ~_IVAR_VALID, (check,))
        wanted = TXDW if queue % 2 else RXT0
        others = TXDW | RXSEQ | RXDMT0 | RXT0
        return Cause(ICS, other_cause(wanted, others, registers[ICS], registers[IMS]), None)
