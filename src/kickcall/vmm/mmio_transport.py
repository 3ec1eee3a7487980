"""Where are the registers of a virtio device that is not on PCI, and what may be written to them?

A virtio-mmio device has one page of registers (virtio 1.4, 4.2.2). The driver kicks by writing a
queue's number to QueueNotify. The device interrupts by a line that all its queues share, and says
in InterruptStatus that it did: no driver can write that, and one that reads 0 there takes the
interrupt for somebody else's (Linux 6.1: drivers/virtio/virtio_mmio.c, vm_interrupt). So there is
no call to be written here. Setting the line pending in the interrupt controller would not be one,
and QEMU's GICv2 does not survive an access by anybody but a processor: it takes the accessing one's
number from a null pointer (hw/intc/arm_gic.c, gic_get_current_cpu; 7.2 with two processors ends).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kickcall.errors import QmpCommandError
from kickcall.model import DeviceEvent
from kickcall.vmm.pause import Check, RegisterWrite

if TYPE_CHECKING:
    from kickcall.model import QueueMap
    from kickcall.vmm.interrupts import Region
    from kickcall.vmm.monitor import Monitor
    from kickcall.vmm.session import MappedDevice

# virtio 1.4, 4.2.2, table "MMIO Device Register Layout"
_MAGIC, _STATUS, QUEUE_NOTIFY = 0x00, 0x70, 0x50
_MAGIC_VALUE = 0x74726976
_DRIVER_OK = 4

NO_CALL = (
    "virtio-mmio has no register that raises its interrupt, and a driver that finds nothing in "
    "InterruptStatus takes an interrupt for another's (a queue with a call notifier has `eventfd`)"
)
_CCW = (
    "its transport is virtio-ccw, where a kick is an instruction (DIAGNOSE 0x500) and a call an "
    "interrupt of the channel subsystem: neither is a register"
)


def registers_at(monitor: Monitor, mapped: MappedDevice, memory: list[Region]) -> int | str:
    """Return the guest-physical address of a virtio-mmio device's registers, or why there is none.

    `memory` is what the processors see.
    """
    name = mapped.device.id
    neither = f"{name} is no PCI device with an id: its registers are not known"
    try:
        proxy = mapped.device.path
        if proxy == mapped.facts.backend_path:
            # Given as `-device virtio-blk-device`: it is plugged straight into its transport.
            bus = str(monitor.execute("qom-get", {"path": proxy, "property": "parent_bus"}))
            proxy = bus.rpartition("/")[0]
        kind = str(monitor.execute("qom-get", {"path": proxy, "property": "type"}))
        if kind.endswith("-ccw"):
            return _CCW
        if kind != "virtio-mmio":
            return neither
        asked = {"path": f"{proxy}/virtio-mmio[0]", "property": "addr"}
        address = int(monitor.execute("qom-get", asked))
    except (QmpCommandError, ValueError, TypeError):
        return neither
    if not any(one.name == "virtio-mmio" and one.start == address for one in memory):
        return f"the registers of {name} are not where QEMU's record of them is ({address:#x})"
    return address


def register_write(
    monitor: Monitor,
    mapped: MappedDevice,
    memory: list[Region],
    queue: QueueMap,
    event: DeviceEvent,
) -> tuple[RegisterWrite, str] | str:
    """Return what to write to raise `event`, and where that is in words; or why it cannot be."""
    at = registers_at(monitor, mapped, memory)
    if isinstance(at, str):
        return at
    if event is DeviceEvent.CALL:
        return NO_CALL
    if "VIRTIO_F_NOTIFICATION_DATA" in mapped.device.features:
        # virtio 1.4, 4.2.3.3: QEMU takes the upper half for the driver's word on the ring.
        return "its kicks carry the ring's position (VIRTIO_F_NOTIFICATION_DATA): only the driver"
    checks = (
        Check(at + _MAGIC, (1 << 32) - 1, _MAGIC_VALUE),
        Check(at + _STATUS, _DRIVER_OK, _DRIVER_OK),
    )
    address = at + QUEUE_NOTIFY
    write = RegisterWrite(address, struct.pack("<I", queue.index), checks)
    return write, f"the device's register QueueNotify at {address:#x}"
