"""virtio devices that vhost in the host's kernel serves: vhost-scsi, vhost-net, vhost-vsock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.devices.virtio import VirtioClass
from kickcall.model import BackendKind, Device

if TYPE_CHECKING:
    from kickcall.model import AnyDevice


class VhostKernel(VirtioClass):
    """A vhost worker in the kernel polls the kick notifier and never reads it.

    So the kick notifier's count only grows: it is the number of kicks since the device started
    (drivers/vhost/vhost.c, vhost_poll_wakeup). The call notifier's is drained by irqfd at once.
    """

    name = "vhost (kernel)"

    @classmethod
    def claims(cls, device: AnyDevice) -> bool:
        """Claim every device whose queues are in the kernel."""
        return isinstance(device, Device) and device.backend is BackendKind.VHOST_KERNEL
