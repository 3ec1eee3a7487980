"""Which PCI devices does the machine have, and by which QOM path is each known?

`query-pci` names a device by the id that the user gave it. One without an id (as QEMU's built-in
ones) is found in the QOM tree by the bus and the place that it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kickcall.errors import QmpCommandError
from kickcall.model import PciDevice
from kickcall.vmm.pci import functions

if TYPE_CHECKING:
    from kickcall.vmm.monitor import Monitor

_WITH_ID = "/machine/peripheral"
_WITHOUT = ("/machine/peripheral-anon", "/machine/unattached")
_CHILD = "child<"
_Place = tuple[int, int, int]
"""Bus, slot, function."""


@dataclass(frozen=True, slots=True)
class MappedPci:
    """A PCI device, and where its registers are."""

    device: PciDevice
    function: dict[str, Any]
    """What `query-pci` said of it."""


def list_pci_devices(monitor: Monitor) -> tuple[MappedPci, ...]:
    """Return every PCI device of the machine that QOM knows, by QOM path, virtio's too."""
    try:
        found = list(functions(monitor.execute("query-pci")))
    except QmpCommandError:  # a machine without PCI
        return ()
    named = _children(monitor, _WITH_ID)
    anonymous: dict[_Place, tuple[str, str]] | None = None
    mapped = []
    for entry in found:
        place = (int(entry["bus"]), int(entry["slot"]), int(entry["function"]))
        path = f"{_WITH_ID}/{entry.get('qdev_id')}"
        kind = named.get(path)
        if kind is None:
            if anonymous is None:
                anonymous = _anonymous(monitor, found)
            if place not in anonymous:
                continue
            path, kind = anonymous[place]
        mapped.append(MappedPci(PciDevice(path, kind, *place), entry))
    return tuple(sorted(mapped, key=lambda one: one.device.path))


def _children(monitor: Monitor, folder: str) -> dict[str, str]:
    """Return the QOM paths and the types of the objects in `folder`."""
    try:
        listed = monitor.execute("qom-list", {"path": folder})
    except QmpCommandError:
        return {}
    return {
        f"{folder}/{entry['name']}": entry["type"].removeprefix(_CHILD).removesuffix(">")
        for entry in listed
        if entry["type"].startswith(_CHILD)
    }


def _anonymous(monitor: Monitor, found: list[dict[str, Any]]) -> dict[_Place, tuple[str, str]]:
    """Return path and type of the PCI devices without an id, by their places.

    Their bus is the root bus, or lies behind a bridge; bridges without an id come first or last,
    so their buses are looked up until no more are found.
    """
    types = {
        entry["name"] for entry in monitor.execute("qom-list-types", {"implements": "pci-device"})
    }
    waiting: dict[str, tuple[str, str, int]] = {}
    for folder in _WITHOUT:
        for path, kind in _children(monitor, folder).items():
            if kind not in types:
                continue
            try:
                bus = monitor.execute("qom-get", {"path": path, "property": "parent_bus"})
                place = monitor.execute("qom-get", {"path": path, "property": "addr"})
            except QmpCommandError:
                continue
            waiting[path] = (kind, str(bus).rpartition("/")[0], int(place))
    secondary = {
        (int(one["bus"]), int(one["slot"]), int(one["function"])): int(
            one["pci_bridge"]["bus"]["secondary"]
        )
        for one in found
        if "pci_bridge" in one
    }
    named = {
        f"{_WITH_ID}/{one['qdev_id']}": (int(one["bus"]), int(one["slot"]), int(one["function"]))
        for one in found
        if one.get("qdev_id")
    }
    buses = {path: secondary[place] for path, place in named.items() if place in secondary}
    placed: dict[_Place, tuple[str, str]] = {}
    while waiting:
        known = {
            path: (kind, buses.get(owner, 0), devfn)
            for path, (kind, owner, devfn) in waiting.items()
            if owner in buses or (owner not in waiting and owner not in named)
        }
        if not known:
            break
        for path, (kind, bus, devfn) in known.items():
            place = (bus, devfn >> 3, devfn & 7)
            placed[place] = (path, kind)
            if place in secondary:
                buses[path] = secondary[place]
            del waiting[path]
    return placed
