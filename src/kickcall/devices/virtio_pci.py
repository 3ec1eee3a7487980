"""virtio devices that QEMU serves itself, in its main loop or in an iothread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.devices import ways
from kickcall.devices.base import DeviceClass
from kickcall.model import BackendKind

if TYPE_CHECKING:
    from kickcall.devices.base import Offer
    from kickcall.model import Device, DeviceEvent, QueueMap, Via


class VirtioPci(DeviceClass):
    """virtio-blk, virtio-scsi, virtio-net and kin, with ioeventfd.

    QEMU drains both notifiers: a count that stays above 0 means that nobody looks. Devices without
    a host-side fast path for interrupts (virtio-net without vhost, virtio-serial, virtio-rng) have
    no call notifier.
    """

    name = "virtio (QEMU)"

    @classmethod
    def claims(cls, device: Device) -> bool:
        """Claim every virtio device that is not handed to a back-end outside QEMU."""
        return device.backend is BackendKind.QEMU

    def ways(self, event: DeviceEvent, queue: QueueMap) -> dict[Via, Offer]:
        """The VMM's own command, the notifier, and for a kick the legacy port."""
        return ways.virtio_ways(self.session, self.mapped, queue, event)
