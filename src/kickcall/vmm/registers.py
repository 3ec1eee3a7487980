"""Which register is a virtio queue's kick, and which message its call, to write them by hand?

Answered with what proves it at the moment of the write (`vmm/pause.py`), or with the reason why a
write by a processor, which is what it will look like, would not be what the device does.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kickcall.model import DeviceEvent
from kickcall.vmm import interrupts, mmio_transport
from kickcall.vmm.pause import RegisterWrite
from kickcall.vmm.pci_view import entry_check
from kickcall.vmm.wiring import device_views, wiring_of

if TYPE_CHECKING:
    from kickcall.model import QueueMap
    from kickcall.vmm.interrupts import Region
    from kickcall.vmm.monitor import Monitor
    from kickcall.vmm.session import MappedDevice, VmmSession
    from kickcall.vmm.wiring import Message, QueueWiring

_CONTROLLERS = ("apic-msi", "kvm-apic-msi", "gicv2m")
"""Regions that take a message from whoever writes it (hw/intc/apic.c, hw/i386/kvm/apic.c,
hw/intc/arm_gicv2m.c). Others ask which device it was (GICv3 ITS), or are no controllers."""
_REMAPPABLE = 1 << 4
"""The message is an index into a remapping table (Intel VT-d 4.1, 5.1.2.2: interrupt format)."""
_EXTENDED_DESTINATION = 0xFE0
"""Bits of a processor's number beyond the 8 that a message has room for (Linux 6.1:
arch/x86/kernel/apic/apic.c, __irq_msi_compose_msg). Where processors write, they name a register
of the APIC (hw/intc/apic.c, apic_mem_write)."""


def register_write(
    session: VmmSession,
    monitor: Monitor,
    mapped: MappedDevice,
    queue: QueueMap,
    event: DeviceEvent,
) -> tuple[RegisterWrite, str] | str:
    """Return what to write to raise `event`, and where that is in words; or why it cannot be."""
    function = interrupts.pci_function(monitor, mapped)
    memory, ports = device_views(monitor)
    if function is None:
        return mmio_transport.register_write(monitor, mapped, memory, queue, event)
    found = wiring_of(session, monitor, mapped, memory, ports)
    wiring = next(one for one in found if one.queue == queue.index)
    if event is DeviceEvent.KICK:
        kick = doorbell_write(wiring, queue.index, mapped.device.features)
        if isinstance(kick, str):
            return kick
        address, data = kick
        return (
            RegisterWrite(address, data, (), function),
            f"the queue's notify register at {address:#x}",
        )
    path = interrupts.interrupt_path(session, monitor, mapped, queue.index)
    if path.bus_master is False:
        return "bus mastering is off: the device cannot send messages now"
    table = interrupts.region_in_bars(function, memory, "msix-table")
    if path.msix_enabled is False or table is None:
        return (
            "the device has INTx, and no register of it raises that line "
            "(a queue with a call notifier has `eventfd`)"
        )
    if wiring.message is None:
        return wiring.no_message
    message = wiring.message
    refusal = message_refusal(message, memory, session.machine.command)
    if refusal:
        return refusal
    data = struct.pack("<I", message.data)
    check = entry_check(table, message)
    return (
        RegisterWrite(message.address, data, (check,), function),
        f"MSI-X vector {message.vector}: {message.data:#x} to {message.address:#x}",
    )


def doorbell_write(
    wiring: QueueWiring, queue: int, features: frozenset[str]
) -> tuple[int, bytes] | str:
    """Return the address and the data of a kick, or why there is none."""
    address = next((bell.address for bell in wiring.doorbells if bell.bus == "mmio"), None)
    if address is None:
        return wiring.no_doorbell or "its doorbell is an I/O port, and no memory"
    if "VIRTIO_F_NOTIFICATION_DATA" in features:
        # virtio 1.4, 4.1.5.2.1: QEMU takes the data for the driver's word on the ring.
        return "its kicks carry the ring's position (VIRTIO_F_NOTIFICATION_DATA): only the driver"
    return address, struct.pack("<H", queue)


def message_refusal(
    message: Message, memory: list[Region], command: tuple[str, ...], kind: str = "MSI-X"
) -> str:
    """Return why a processor's write of `message` would not be its interrupt; empty where it is."""
    what = f"{kind} vector {message.vector}"
    if message.masked:
        return (
            f"{what} is masked: the driver does not want it now (a call meanwhile is kept pending, "
            "and comes when the driver unmasks the vector)"
        )
    if not message.address:
        return f"{what} has no message: the driver assigned none"
    if any(word.startswith("amd-iommu") for word in command):
        return "a virtual IOMMU (amd-iommu) may remap interrupts: the message is not what is sent"
    region = next((one for one in memory if one.start <= message.address <= one.end), None)
    if region is None or region.name not in _CONTROLLERS:
        there = "nothing" if region is None else region.name
        return (
            f"{what} goes to {message.address:#x}, where {there} is: only a device may write there"
        )
    if region.name.endswith("apic-msi"):
        if message.address & _REMAPPABLE:
            return f"{what} is remapped by a virtual IOMMU: its message is no destination"
        if message.address & _EXTENDED_DESTINATION:
            return (
                f"{what} goes to a processor whose number has more than 8 bits (x2APIC): written "
                f"by a processor, {message.address:#x} is a register of its own APIC"
            )
    return ""
