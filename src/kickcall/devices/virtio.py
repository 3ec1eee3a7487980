"""What have all classes of virtio devices in common? Queues that were mapped, and the same ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.devices import ways
from kickcall.devices.base import DeviceClass
from kickcall.errors import KickcallError
from kickcall.model import DeviceEvent, Via
from kickcall.vmm.session import MappedDevice

if TYPE_CHECKING:
    from kickcall.devices.base import Offer


class VirtioClass(DeviceClass[MappedDevice]):
    """A kind of virtio device. Its queues are virtqueues, by the virtio specification's numbers."""

    def queues(self) -> dict[int, str]:
        """Return every queue that the driver set up and that could be mapped."""
        if self.mapped.array is None or not self.mapped.device.driver_ok:
            return {}
        elements = enumerate(self.mapped.array.elements)
        return {index: "" for index, element in elements if element.rings.desc}

    def ways(self, event: DeviceEvent, queue: int) -> dict[Via, Offer]:
        """The VMM's own command, the notifier, the legacy port for a kick, and the registers."""
        return ways.virtio_ways(self.session, self.mapped, queue, event)

    def way_now(self, event: DeviceEvent, queue: int) -> Via | str:
        """Return the same as for any device, at once where the queue has a notifier.

        To make it ready would take a descriptor for each of some hundred queues.
        """
        own = ways.COMMAND
        if self.session.monitor_is_ours or not self.session.has_command(own):
            try:
                found = self.mapped.queue_map(queue)
            except KickcallError as exc:
                return str(exc)
            if (found.kick if event is DeviceEvent.KICK else found.call) is not None:
                return Via.EVENTFD
        return super().way_now(event, queue)
