"""What have Intel's network cards in common? Rings with a tail register, and causes of interrupts.

The driver moves a ring's tail, which is the kick; the device looks at its ring at each write of it,
so the value that stands there is written once more. A bit in an interrupt cause set register is the
call: the device then interrupts as it does by itself, by INTx, MSI or MSI-X.

Queues are numbered as virtio-net's are: 2k is receive ring k, 2k+1 is transmit ring k.
"""

from __future__ import annotations

import struct
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, ClassVar

from kickcall.devices.pci import PciClass
from kickcall.errors import QueueNotFoundError, QueueNotReadyError
from kickcall.model import DeviceEvent, PciDevice, Via
from kickcall.vmm.interrupts import read_words, region_in_bars
from kickcall.vmm.pause import Check, RegisterWrite
from kickcall.vmm.pci_view import COMMAND_INTX_DISABLE, COMMAND_MASTER, Interrupts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kickcall.devices.base import Offer, Way
    from kickcall.model import AnyDevice

RCTL, TCTL = 0x100, 0x400
_ENABLE = 1 << 1
"""RCTL.RXEN and TCTL.EN: the interface is up (82574 datasheet, 10.2.5.1 and 10.2.6.1)."""


@dataclass(frozen=True, slots=True)
class Ring:
    """A ring of descriptors: offsets of its registers."""

    name: str
    length: int
    """How long it is, in bytes; 0: the driver does not use it."""
    tail: int
    control: int
    """RCTL or TCTL."""


@dataclass(frozen=True, slots=True)
class Cause:
    """What makes the device interrupt for a ring."""

    register: int
    """An interrupt cause set register."""
    bits: int
    vector: int | None
    """The MSI-X vector that the interrupt comes by; None outside MSI-X mode."""
    checks: tuple[tuple[int, int, int], ...] = ()
    """Registers that must still stand so: offset, mask, value."""


class IntelNic(PciClass):
    """An Intel card. A kind says where its registers are."""

    priority = 0
    kinds: ClassVar[frozenset[str]]
    """QOM types."""
    region: ClassVar[str]
    """QEMU's name of the registers in `info mtree`."""
    rings: ClassVar[tuple[Ring, ...]]
    """By queue number."""
    reads: ClassVar[tuple[int, ...]] = ()
    """More registers that `cause` wants to know. None may change by being read."""

    @classmethod
    def claims(cls, device: AnyDevice) -> bool:
        """Claim the devices of its types."""
        return isinstance(device, PciDevice) and device.kind in cls.kinds

    @abstractmethod
    def cause(self, queue: int, registers: Mapping[int, int]) -> Cause | str:
        """Return what to set for an interrupt of that queue, or why nothing can be."""

    @cached_property
    def base(self) -> int | None:
        """Where the registers are in memory; None while the guest has not mapped them."""
        found = region_in_bars(self.view.function, self.view.memory, self.region)
        return None if found is None else found.start

    @cached_property
    def registers(self) -> dict[int, int]:
        """The registers as they stood, by offset. Raises QueueNotReadyError where none is."""
        base = self.base
        if base is None:
            raise QueueNotReadyError(f"{self.mapped.device.id}: its registers are not mapped")
        offsets = {RCTL, TCTL, *self.reads, *(ring.length for ring in self.rings)}
        found = {}
        with self.session.borrow() as monitor:
            for offset in sorted(offsets):
                words = read_words(monitor, base + offset, 1)
                if words is None:
                    raise QueueNotReadyError(
                        f"{self.mapped.device.id}: its register {offset:#x} cannot be read"
                    )
                found[offset] = words[0]
        return found

    def queues(self) -> dict[int, str]:
        """Return the rings that the driver uses, where the interface is up."""
        if self.base is None:
            return {}
        return {
            number: ring.name
            for number, ring in enumerate(self.rings)
            if self._unused(ring) is None
        }

    def _unused(self, ring: Ring) -> str | None:
        """Return why the ring cannot be used now."""
        if not self.registers[ring.control] & _ENABLE:
            return f"the interface is down: no {ring.name.split()[0]} is enabled"
        if not self.registers[ring.length]:
            return f"the driver does not use {ring.name}"
        return None

    def ways(self, event: DeviceEvent, queue: int) -> dict[Via, Offer]:
        """The device's own register, with the machine paused."""
        identity = self.mapped.device.id
        if not 0 <= queue < len(self.rings):
            raise QueueNotFoundError(
                f"{identity} has no queue {queue}: its queues are 0 to {len(self.rings) - 1} "
                "(even: receive, odd: transmit)"
            )
        unused = self._unused(self.rings[queue])
        if unused is not None:
            raise QueueNotReadyError(f"{identity}: {unused}")
        way = self._kick if event is DeviceEvent.KICK else self._call
        return {Via.MMIO: partial(way, queue)}

    def _kick(self, queue: int) -> Way | str:
        """Write the ring's tail as it is: the device looks at what the driver put before it."""
        assert self.base is not None
        ring = self.rings[queue]
        at = self.base + ring.tail
        write = RegisterWrite(at, 4, self._in_use(ring), self.view.function)
        return self.register(write, f"the tail register of {ring.name} at {at:#x}, as it stands")

    def _call(self, queue: int) -> Way | str:
        """Set the ring's interrupt cause."""
        assert self.base is not None
        ring = self.rings[queue]
        found = self.cause(queue, self.registers)
        if isinstance(found, str):
            return found
        checks = [Check(self.base + offset, mask, value) for offset, mask, value in found.checks]
        if found.vector is not None:
            try:
                vector = self.view.vectors[found.vector]
            except IndexError:
                return f"its interrupt has vector {found.vector}, which is not in the MSI-X table"
            if vector.message.masked:
                return (
                    f"its MSI-X vector {found.vector} is masked: the driver does not want it now "
                    "(a call meanwhile is kept pending, and comes when the driver unmasks it)"
                )
            checks.append(vector.check)
        checks += self.view.checks
        at = self.base + found.register
        write = RegisterWrite(
            at,
            struct.pack("<I", found.bits),
            (*self._in_use(ring), *checks),
            self.view.function,
        )
        return self.register(write, f"interrupt cause {found.bits:#x} to {at:#x}")

    def _in_use(self, ring: Ring) -> tuple[Check, ...]:
        assert self.base is not None
        return (
            Check(self.base + ring.control, _ENABLE, _ENABLE),
            Check(self.base + ring.length, 0xFFFFFFFF, self.registers[ring.length]),
        )

    def cannot_interrupt(self) -> str:
        """Return why no interrupt of the device gets out now; empty where nothing holds it."""
        view = self.view
        if view.masked:
            return "MSI-X is masked for the whole device"
        if view.interrupts in (Interrupts.MSIX, Interrupts.MSI):
            # Without the configuration space that is not known, and the check is left out.
            if view.command is not None and not view.command & COMMAND_MASTER:
                return "bus mastering is off: the device cannot send messages now"
        elif view.command is not None and view.command & COMMAND_INTX_DISABLE:
            return "INTx is switched off in the device's command register"
        return ""


def other_cause(wanted: int, others: int, pending: int, enabled: int) -> int:
    """Return the cause to set outside MSI-X: `wanted`, or another where that is set already.

    There the driver looks at everything at each interrupt; and from QEMU 8.1 on a cause that is set
    raises none when it is set once more (hw/net/e1000e_core.c, e1000e_raise_interrupts), as after
    an interrupt that was lost.
    """
    if not pending & enabled & wanted:
        return wanted
    free = others & enabled & ~pending
    return free & -free or wanted
