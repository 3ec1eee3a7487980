"""Where a device's PCI registers are, as the monitor says, and writing an I/O port through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kickcall.errors import QmpCommandError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.model import Device
    from kickcall.vmm.monitor import Monitor

_VIRTIO_VENDOR = 0x1AF4
_TRANSITIONAL = range(0x1000, 0x1040)
"""Device ids of transitional virtio-pci devices (virtio 1.4, 4.1.2.1)."""
LEGACY_QUEUE_NOTIFY = 16
"""Offset of Queue Notify in the legacy registers, a u16 (virtio 1.4, 4.1.4.10)."""


def legacy_notify_port(monitor: Monitor, device: Device) -> int | None:
    """Return the I/O port that kicks `device`, or None where it has none that is mapped.

    Only a transitional device has one: BAR 0, in I/O space. On machines whose processors have no
    ports (arm virt) that space is memory, which HMP `o` does not reach: there it is none, either.
    """
    from kickcall.vmm.interrupts import flat_view  # which needs `functions` itself

    try:
        buses = monitor.execute("query-pci")
    except QmpCommandError:
        return None
    for entry in functions(buses):
        if entry.get("qdev_id") != device.id:
            continue
        identity = entry["id"]
        if identity["vendor"] != _VIRTIO_VENDOR or identity["device"] not in _TRANSITIONAL:
            return None
        for region in entry["regions"]:
            if region["bar"] == 0 and region["type"] == "io" and region["address"] > 0:
                start = int(region["address"])
                ports = flat_view(monitor.hmp("info mtree -f"), "I/O")
                if any(one.start == start and one.name == "virtio-pci" for one in ports):
                    return start + LEGACY_QUEUE_NOTIFY
    return None


def functions(buses: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield every function in the answer of `query-pci`, behind bridges, too."""
    for bus in buses:
        for entry in bus.get("devices", ()):
            yield entry
            if "pci_bridge" in entry:
                yield from functions([entry["pci_bridge"]])


def write_port(monitor: Monitor, port: int, value: int) -> None:
    """Write the u16 `value` to I/O port `port`, as a CPU of the guest would.

    HMP `o` does it without stopping the machine (QEMU: monitor/misc.c, hmp_ioport_write).
    """
    said = monitor.hmp(f"o /2 {port:#x} {value}")
    if said.strip():
        raise QmpCommandError(f"QEMU refused to write I/O port {port:#x}: {said.strip()}")
