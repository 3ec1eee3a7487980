"""virtio devices that another process serves over a vhost-user socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.devices import ways
from kickcall.devices.base import DeviceClass
from kickcall.model import BackendKind

if TYPE_CHECKING:
    from kickcall.devices.base import Offer
    from kickcall.model import Device, DeviceEvent, QueueMap, Via


class VhostUser(DeviceClass):
    """The back-end process holds both notifiers: it reads the kick's and writes the call's.

    A kick count above 0 means that the back-end has not looked yet. It must never be asked for
    its position: GET_VRING_BASE stops the ring (vhost-user protocol, "Ring states").
    """

    name = "vhost-user"

    @classmethod
    def claims(cls, device: Device) -> bool:
        """Claim every device whose queues a vhost-user process has."""
        return device.backend is BackendKind.VHOST_USER

    def ways(self, event: DeviceEvent, queue: QueueMap) -> dict[Via, Offer]:
        """The VMM's own command, the notifier, and for a kick the legacy port."""
        return ways.virtio_ways(self.session, self.mapped, queue, event)
