"""virtio devices that QEMU serves itself, in its main loop or in an iothread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.devices.virtio import VirtioClass
from kickcall.model import BackendKind, Device

if TYPE_CHECKING:
    from kickcall.model import AnyDevice


class VirtioPci(VirtioClass):
    """virtio-blk, virtio-scsi, virtio-net and kin, with ioeventfd.

    QEMU drains both notifiers: a count that stays above 0 means that nobody looks. Devices without
    a host-side fast path for interrupts (virtio-net without vhost, virtio-serial, virtio-rng) have
    no call notifier.
    """

    name = "virtio (QEMU)"

    @classmethod
    def claims(cls, device: AnyDevice) -> bool:
        """Claim every virtio device that is not handed to a back-end outside QEMU."""
        return isinstance(device, Device) and device.backend is BackendKind.QEMU
