"""Is a device that is not on PCI written to only where its registers are, and refused elsewhere?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from kickcall.errors import QmpCommandError
from kickcall.model import (
    BackendKind,
    Device,
    DeviceEvent,
    Layout,
    QueueMap,
    Rings,
)
from kickcall.vmm.interrupts import Region
from kickcall.vmm.mmio_transport import register_write
from kickcall.vmm.session import MappedDevice
from kickcall.vmm.virtio import DeviceFacts

# As a microvm of QEMU 7.2 says it, with `-device virtio-blk-device,id=blk0,bus=virtio-mmio-bus.2`.
PROXY = "/machine/unattached/device[11]"
TOLD = {
    ("/machine/peripheral/blk0", "parent_bus"): f"{PROXY}/virtio-mmio-bus.2",
    (PROXY, "type"): "virtio-mmio",
    (f"{PROXY}/virtio-mmio[0]", "addr"): 0xFEB00400,
}
MEMORY = [Region(0xFEB00400, 0xFEB005FF, "virtio-mmio")]
QUEUE = QueueMap(1, Rings(0x1000, 0x2000, 0x3000, 256), Layout.SPLIT, None, None, 0x7F0000000000)


@dataclass
class SaidMonitor:
    """Answers `qom-get` with what a machine said."""

    told: dict[tuple[str, str], object] = field(default_factory=lambda: dict(TOLD))

    def execute(self, command: str, arguments: dict[str, Any]) -> object:
        assert command == "qom-get"
        try:
            return self.told[arguments["path"], arguments["property"]]
        except KeyError:
            raise QmpCommandError("Property not found") from None


def blk0(*features: str, backend: str = "") -> MappedDevice:
    path = "/machine/peripheral/blk0"
    device = Device(
        path=path,
        kind="virtio-blk-device",
        backend=BackendKind.QEMU,
        num_queues=2,
        features=frozenset(features),
        driver_ok=True,
        broken=False,
        vhost_started=False,
    )
    return MappedDevice(DeviceFacts(path + backend, device, {}), None)


def asked(
    mapped: MappedDevice,
    event: DeviceEvent,
    monitor: SaidMonitor | None = None,
    memory: list[Region] = MEMORY,
) -> Any:
    said = cast("Any", monitor or SaidMonitor())
    return register_write(said, mapped, memory, QUEUE, event)


def test_a_kick_is_the_queues_number_in_32_bits_at_queue_notify() -> None:
    write, target = asked(blk0(), DeviceEvent.KICK)
    # virtio 1.4, 4.2.2: QueueNotify is 0x050
    assert (write.address, write.data) == (0xFEB00450, b"\x01\0\0\0")
    assert target.endswith("0xfeb00450")
    # MagicValue is "virt"; DRIVER_OK is 4 in Status, 0x070
    assert [(check.address, check.mask & check.value) for check in write.checks] == [
        (0xFEB00400, int.from_bytes(b"virt", "little")),
        (0xFEB00470, 4),
    ]


def test_a_call_is_refused_since_no_register_is_one() -> None:
    assert "finds nothing in InterruptStatus" in asked(blk0(), DeviceEvent.CALL)


def test_a_kick_that_carries_the_rings_position_is_the_drivers_alone() -> None:
    mapped = blk0("VIRTIO_F_NOTIFICATION_DATA")
    assert "only the driver" in asked(mapped, DeviceEvent.KICK)


@pytest.mark.parametrize("event", list(DeviceEvent))
def test_a_ccw_device_is_refused_with_what_its_notifications_are(event: DeviceEvent) -> None:
    monitor = SaidMonitor({("/machine/peripheral/blk0", "type"): "virtio-blk-ccw"})
    refused = asked(blk0(backend="/virtio-backend"), event, monitor)
    assert "virtio-ccw" in refused
    assert "DIAGNOSE 0x500" in refused


@pytest.mark.parametrize(
    ("changes", "memory", "reason"),
    [
        ({}, [], "not where QEMU's record of them is"),
        ({}, [Region(0xFEB00400, 0xFEB005FF, "serial")], "not where QEMU's record of them is"),
        ({(PROXY, "type"): "virtio-blk-pci"}, MEMORY, "no PCI device with an id"),
        ({(f"{PROXY}/virtio-mmio[0]", "addr"): None}, MEMORY, "no PCI device with an id"),
    ],
)
def test_registers_that_are_not_certain_are_not_written_to(
    changes: dict[tuple[str, str], object], memory: list[Region], reason: str
) -> None:
    monitor = SaidMonitor(TOLD | changes)
    assert reason in asked(blk0(), DeviceEvent.KICK, monitor, memory)


def test_a_device_that_just_went_away_is_refused() -> None:
    assert "no PCI device" in asked(blk0(), DeviceEvent.KICK, SaidMonitor({}))
