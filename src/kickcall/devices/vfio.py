"""Assigned devices (vfio-pci): a call signals the eventfd that the host's kernel signals for one.

A queue is a vector, as with any PCI device. Nothing stops for it: KVM turns the signal into the
interrupt. What a kick would be only the device's driver knows.
"""

from __future__ import annotations

import os
from functools import cached_property, partial
from typing import TYPE_CHECKING

from kickcall.devices.base import Way
from kickcall.devices.pci import PciClass, message_write
from kickcall.errors import StaleMapError
from kickcall.host import eventfds
from kickcall.model import Counters, DeviceEvent, PciDevice, Via
from kickcall.vmm import vfio
from kickcall.vmm.pci_view import COMMAND_MASTER, Interrupts

if TYPE_CHECKING:
    from kickcall.devices.base import Offer
    from kickcall.model import AnyDevice
    from kickcall.vmm.vfio import AssignedVector


class Vfio(PciClass):
    """A device of the host that the guest has as its own."""

    name = "vfio"
    priority = 0

    @classmethod
    def claims(cls, device: AnyDevice) -> bool:
        """Claim what is assigned through vfio-pci."""
        return isinstance(device, PciDevice) and device.kind.startswith("vfio-pci")

    @cached_property
    def vectors(self) -> dict[int, AssignedVector]:
        """The vectors whose eventfds are known."""
        return vfio.vectors_of(self.session, self.mapped, self.view.capable)

    def ways(self, event: DeviceEvent, queue: int) -> dict[Via, Offer]:
        """The vector's eventfd, or its message."""
        if event is DeviceEvent.KICK:
            return {Via.MMIO: lambda: "its doorbells are the hardware's, known to its driver alone"}
        return {Via.EVENTFD: partial(self._signal, queue), Via.MMIO: partial(self.message, queue)}

    def _signal(self, vector: int) -> Way | str:
        """Signal the vector's eventfd, where the device could send the interrupt itself."""
        refused = self._held_back(vector)
        if refused:
            return refused
        found = self.vectors.get(vector)
        if found is None:
            return "QEMU's record of the vector's eventfd was not found in QEMU's memory"
        fd, pid = found.notifier.fd, self.session.process.pid
        who = "KVM" if found.by_kvm else "QEMU"
        return Way(
            f"eventfd {found.notifier.eventfd_id} (fd {fd} of process {pid}), which {who} turns "
            f"into vector {vector}",
            partial(self._write, found),
            partial(self._counters, found),
            found.notifier.eventfd_id,
            check=partial(self._check, found),
        )

    def _held_back(self, vector: int) -> str:
        """Return why the device could not send that vector now; empty where it could.

        Where the message goes does not matter: KVM has its route, through a virtual IOMMU, too.
        """
        view = self.view
        if view.interrupts not in (Interrupts.MSIX, Interrupts.MSI) or vector >= len(view.vectors):
            return str(message_write(view, vector, ()))
        if view.command is not None and not view.command & COMMAND_MASTER:
            return "bus mastering is off: the device cannot send messages now"
        message = view.vectors[vector].message
        if view.masked or message.masked:
            return "the vector is masked: the driver does not want it now"
        return "" if message.address else "the driver assigned the vector no message"

    def _check(self, vector: AssignedVector) -> None:
        self.session.process.check_alive()
        if not vfio.still_is(self.session, vector):
            raise StaleMapError(
                f"vector {vector.number} of {self.mapped.device.id} is not what was found: nothing "
                "was written (the guest rebooted, or its driver changed the vector)"
            )

    def _write(self, vector: AssignedVector) -> None:
        ours = self.session.process.duplicate_fd(vector.notifier.fd)
        try:
            state = eventfds.read_eventfd(os.getpid(), ours)
            if state is None or state.eventfd_id != vector.notifier.eventfd_id:
                raise StaleMapError(
                    f"fd {vector.notifier.fd} of process {self.session.process.pid} is no longer "
                    f"eventfd {vector.notifier.eventfd_id}: nothing was written"
                )
            eventfds.signal(ours)
        finally:
            os.close(ours)

    def _counters(self, vector: AssignedVector) -> Counters:
        state = eventfds.read_eventfd(self.session.process.pid, vector.notifier.fd)
        same = state is not None and state.eventfd_id == vector.notifier.eventfd_id
        return Counters(state.count if state is not None and same else None, None, None)
