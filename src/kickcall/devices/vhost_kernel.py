"""virtio devices that vhost in the host's kernel serves: vhost-scsi, vhost-net, vhost-vsock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.devices import ways
from kickcall.devices.base import DeviceClass
from kickcall.model import BackendKind

if TYPE_CHECKING:
    from kickcall.devices.base import Offer
    from kickcall.model import Device, DeviceEvent, QueueMap, Via


class VhostKernel(DeviceClass):
    """A vhost worker in the kernel polls the kick notifier and never reads it.

    So the kick notifier's count only grows: it is the number of kicks since the device started
    (drivers/vhost/vhost.c, vhost_poll_wakeup). The call notifier's is drained by irqfd at once.
    """

    name = "vhost (kernel)"

    @classmethod
    def claims(cls, device: Device) -> bool:
        """Claim every device whose queues are in the kernel."""
        return device.backend is BackendKind.VHOST_KERNEL

    def ways(self, event: DeviceEvent, queue: QueueMap) -> dict[Via, Offer]:
        """The VMM's own command, the notifier, and for a kick the legacy port."""
        return ways.virtio_ways(self.session, self.mapped, queue, event)
