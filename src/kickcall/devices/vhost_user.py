"""virtio devices that another process serves over a vhost-user socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.devices.virtio import VirtioClass
from kickcall.model import BackendKind, Device

if TYPE_CHECKING:
    from kickcall.model import AnyDevice


class VhostUser(VirtioClass):
    """The back-end process holds both notifiers: it reads the kick's and writes the call's.

    A kick count above 0 means that the back-end has not looked yet. It must never be asked for
    its position: GET_VRING_BASE stops the ring (vhost-user protocol, "Ring states").
    """

    name = "vhost-user"

    @classmethod
    def claims(cls, device: AnyDevice) -> bool:
        """Claim every device whose queues a vhost-user process has."""
        return isinstance(device, Device) and device.backend is BackendKind.VHOST_USER
