"""Every PCI device with MSI or MSI-X: its messages are written as it would send them itself.

A queue is here a vector: the number of a message in the device's MSI-X table, or of an MSI message.
A class for one kind of PCI device (`e1000e.py`) extends `PciClass`, and offers registers of the
device's own where it has some.
"""

from __future__ import annotations

import struct
from functools import cached_property, partial
from typing import TYPE_CHECKING

from kickcall.devices.base import DeviceClass, Way
from kickcall.errors import QueueNotFoundError
from kickcall.model import Counters, DeviceEvent, PciDevice, Via
from kickcall.vmm import pause, pci_view
from kickcall.vmm.pause import RegisterWrite
from kickcall.vmm.pci_devices import MappedPci
from kickcall.vmm.pci_view import Interrupts, PciView
from kickcall.vmm.registers import message_refusal

if TYPE_CHECKING:
    from kickcall.devices.base import Offer
    from kickcall.model import AnyDevice


class PciClass(DeviceClass[MappedPci]):
    """A PCI device: a call is the message of a vector. A kind with registers overrides this."""

    name = "PCI"
    priority = -10  # any class that knows the device goes first

    @classmethod
    def claims(cls, device: AnyDevice) -> bool:
        """Claim every PCI device that is no virtio device."""
        return isinstance(device, PciDevice)

    @cached_property
    def view(self) -> PciView:
        """The device's registers as they stood when they were first needed.

        Whatever is written is checked against them once more, with the machine paused.
        """
        with self.session.borrow() as monitor:
            return pci_view.look(monitor, self.mapped)

    def queues(self) -> dict[int, str]:
        """Return the vectors for which the driver has set up a message."""
        return {
            one.message.vector: f"{self.view.interrupts} vector"
            for one in self.view.vectors
            if one.message.address
        }

    def ways(self, event: DeviceEvent, queue: int) -> dict[Via, Offer]:
        """A call is the vector's message. What its kick would be is not known."""
        if event is DeviceEvent.KICK:
            return {}
        return {Via.MMIO: partial(self.message, queue)}

    def message(self, vector: int) -> Way | str:
        """Write the message of a vector to its address: what the device itself does."""
        found = message_write(self.view, vector, self.session.machine.command)
        return found if isinstance(found, str) else self.register(*found)

    def register(self, write: RegisterWrite, target: str) -> Way:
        """Write one register, called `target`, with the machine paused."""
        return Way(
            target,
            partial(pause.write_paused, self.session, write),
            lambda: Counters(None, None, None),
            check=self.session.process.check_alive,
        )


def message_write(
    view: PciView, vector: int, command: tuple[str, ...]
) -> tuple[RegisterWrite, str] | str:
    """Return what to write to send the message of a vector, and its name; or why it cannot be.

    Raises QueueNotFoundError for a vector that the device does not have.
    """
    identity = view.function.get("qdev_id") or "the device"
    if view.interrupts is Interrupts.UNKNOWN:
        return (
            "its interrupts are not known: this machine type has no configuration space in memory, "
            "and no MSI-X table of the device is mapped"
        )
    if view.interrupts is Interrupts.INTX:
        has = "and has no messages" if not view.capable else "the driver enabled no messages"
        return f"the device has INTx now ({has}), and no register is known that raises that line"
    if vector >= len(view.vectors):
        raise QueueNotFoundError(
            f"{identity} has no vector {vector}: its {view.interrupts} vectors are 0 to "
            f"{len(view.vectors) - 1}"
        )
    if view.command is not None and not view.command & pci_view.COMMAND_MASTER:
        return "bus mastering is off: the device cannot send messages now"
    if view.masked:
        return "MSI-X is masked for the whole device"
    found = view.vectors[vector]
    message, kind = found.message, view.interrupts.upper()
    refusal = message_refusal(message, view.memory, command, kind)
    if refusal:
        waits = "; one is pending" if message.masked and found.pending else ""
        return refusal + waits
    return (
        RegisterWrite(
            message.address,
            struct.pack("<I", message.data),
            (*view.checks, found.check),
            view.function,
        ),
        f"{kind} vector {vector}: {message.data:#x} to {message.address:#x}",
    )
