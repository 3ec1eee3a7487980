"""Can the interrupt of a queue reach its driver? PCI's and MSI-X's switches, read while it runs.

QMP reads no PCI registers. On machines with ECAM (q35, arm virt) the configuration space is memory
that HMP `xp` reads; on others (i440fx) it is behind a pair of ports that would have to be written,
so what stands there stays unknown. The MSI-X table is memory everywhere.

Two registers are never read, as QEMU acts on that. The window `pci_cfg_data` of a virtio
capability: reading it reads a BAR (virtio 1.4, 4.1.4.9), and the ISR that may be there is cleared
by that. The pending bits, while another vector in use is masked: QEMU then takes that vector's call
from its notifier (hw/virtio/virtio-pci.c, virtio_pci_vector_poll).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kickcall.diagnose.states import InterruptPath
from kickcall.errors import QmpCommandError
from kickcall.host import memory
from kickcall.vmm.pci import functions

if TYPE_CHECKING:
    from kickcall.vmm.monitor import Monitor
    from kickcall.vmm.session import MappedDevice, VmmSession

# include/uapi/linux/pci_regs.h
_COMMAND, _CAPABILITY_LIST = 0x04, 0x34
_COMMAND_MASTER, _COMMAND_INTX_DISABLE = 1 << 2, 1 << 10
_STATUS_CAP_LIST = 1 << 4 + 16
_CAP_ID_MSIX = 0x11
MSIX_ENABLE, MSIX_MASKALL = 1 << 15 + 16, 1 << 14 + 16
MSIX_ENTRY_SIZE = 16
MSIX_ENTRY_MASKED = 1
_CAPS_MAX = 48
"""Room for capabilities in 256 bytes less the header, at 4 bytes each."""
_NO_VECTOR = 0xFFFF
"""VIRTIO_MSI_NO_VECTOR (virtio 1.4, 4.1.5.1.2)."""
_VECTORS_MAX = 2048

_REGION = re.compile(r"^\s*([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (?:i/o|ram)\): (\S+)")
_DUMP = re.compile(r"^[0-9a-f]+:((?: 0x[0-9a-f]{8})+)\s*$", re.M)


@dataclass(frozen=True, slots=True)
class Region:
    """A range of a flat view."""

    start: int
    end: int
    """The last address."""
    name: str


def interrupt_path(
    session: VmmSession, monitor: Monitor, mapped: MappedDevice, queue: int
) -> InterruptPath:
    """Return how the interrupt of a queue stands. Nothing is known of devices that are not PCI."""
    function = pci_function(monitor, mapped)
    if function is None:
        return InterruptPath()
    told = monitor.hmp("info mtree -f")
    regions = flat_view(told, "memory")
    vector = queue_vector(session, mapped, queue)
    command, msix = read_configuration(monitor, function, regions)
    masked, pending = (
        (None, None) if vector is None else _vector(monitor, function, regions, vector)
    )
    if command is not None:
        bus_master: bool | None = bool(command & _COMMAND_MASTER)
    else:
        bus_master = _bus_master_by_view(_views(told), _pci_type(monitor, mapped))
    return InterruptPath(
        # A configuration space that can be read and has no such capability has no MSI-X to enable.
        msix_enabled=None if command is None else bool((msix or 0) & MSIX_ENABLE),
        function_masked=None if msix is None else bool(msix & MSIX_MASKALL),
        vector=vector,
        vector_masked=masked,
        vector_pending=pending,
        bus_master=bus_master,
        intx_disabled=None if command is None else bool(command & _COMMAND_INTX_DISABLE),
    )


def queue_vector(session: VmmSession, mapped: MappedDevice, queue: int) -> int | None:
    """Return the queue's MSI-X vector from QEMU's record; None where it has none, or unproved.

    `queue_index`, `unsigned int inuse`, `uint16_t vector`, `handle_output`, `vdev` follow each
    other in `struct VirtQueue` (hw/virtio/virtio.c, 4.2 to 10.1). Believed only where the two
    known ones have that distance, and all queues of the device have a vector that can be.
    """
    array = mapped.array
    if array is None:
        return None
    layout = array.layout
    vector_at = _aligned(layout.index + 2, 4) + 4
    if _aligned(vector_at + 2, 8) + 8 != layout.owner:
        return None
    found = memory.read_many(
        session.process.pid,
        [
            (array.element_address(number) + vector_at - 4, 6)
            for number in range(len(array.elements))
        ],
    )
    vectors = []
    for raw, element in zip(found, array.elements, strict=True):
        if raw is None:
            return None
        in_use, vector = struct.unpack("<IH", raw)
        if in_use > max(element.rings.num, 1) or _VECTORS_MAX <= vector != _NO_VECTOR:
            return None
        vectors.append(vector)
    return None if vectors[queue] == _NO_VECTOR else vectors[queue]


def _aligned(offset: int, to: int) -> int:
    return -(-offset // to) * to


def pci_function(monitor: Monitor, mapped: MappedDevice) -> dict[str, Any] | None:
    """Return what `query-pci` says of the device; None where it is not on PCI, or has no id."""
    try:
        buses = monitor.execute("query-pci")
    except QmpCommandError:
        return None
    wanted = mapped.device.id
    return next((entry for entry in functions(buses) if entry.get("qdev_id") == wanted), None)


def _pci_type(monitor: Monitor, mapped: MappedDevice) -> str:
    try:
        return str(monitor.execute("qom-get", {"path": mapped.device.path, "property": "type"}))
    except QmpCommandError:
        return ""


def flat_view(info_mtree: str, address_space: str) -> list[Region]:
    """Return what an address space (`memory`, `I/O`) holds, by the answer of `info mtree -f`."""
    views = _views(info_mtree)
    return regions_of(next((view for view in views if f' AS "{address_space}",' in view), ""))


def _views(info_mtree: str) -> list[str]:
    return info_mtree.split("FlatView #")[1:]


def regions_of(view: str) -> list[Region]:
    """Return the regions of one flat view that devices or memory answer for."""
    return [
        Region(int(found[1], 16), int(found[2], 16), found[3])
        for line in view.splitlines()
        if (found := _REGION.match(line))
    ]


def read_words(monitor: Monitor, address: int, count: int) -> list[int] | None:
    """Return `count` 32-bit words at a guest-physical address; None where there are none."""
    said = monitor.hmp(f"xp /{count}wx {address:#x}")
    words = [int(word, 16) for line in _DUMP.findall(said) for word in line.split()]
    return words if len(words) == count else None


def read_configuration(
    monitor: Monitor, function: dict[str, Any], regions: list[Region]
) -> tuple[int | None, int | None]:
    """Return the command register and the head of the MSI-X capability; None where unknown."""
    at = configuration_address(function, regions)
    header = None if at is None else read_words(monitor, at, 16)
    identity = function["id"]
    if at is None or header is None or header[0] != identity["device"] << 16 | identity["vendor"]:
        return None, None
    command = header[_COMMAND // 4]
    offset = header[_CAPABILITY_LIST // 4] & 0xFC if command & _STATUS_CAP_LIST else 0
    for _ in range(_CAPS_MAX):
        if not offset:
            break
        head = read_words(monitor, at + offset, 1)
        if head is None:
            break
        if head[0] & 0xFF == _CAP_ID_MSIX:
            return command, head[0]
        offset = head[0] >> 8 & 0xFC
    return command, None


def configuration_address(function: dict[str, Any], regions: list[Region]) -> int | None:
    """Return where a function's configuration space is in memory; None without ECAM."""
    ecam = next((one for one in regions if one.name in ("pcie-mmcfg-mmio", "pcie-ecam")), None)
    if ecam is None:
        return None
    at = function["bus"] << 20 | function["slot"] << 15 | function["function"] << 12
    return ecam.start + at if ecam.start + at + 4096 <= ecam.end + 1 else None


def _vector(
    monitor: Monitor, function: dict[str, Any], regions: list[Region], vector: int
) -> tuple[bool | None, bool | None]:
    """Return whether a vector is masked and whether it is pending; None where unknown."""
    table = region_in_bars(function, regions, "msix-table")
    if table is None or table.start + (vector + 1) * MSIX_ENTRY_SIZE > table.end + 1:
        return None, None
    # The pending bits are read by 32, and so is the table.
    first = vector & ~31
    count = min(32, (table.end + 1 - table.start) // MSIX_ENTRY_SIZE - first)
    words = read_words(monitor, table.start + first * MSIX_ENTRY_SIZE, count * 4)
    if words is None:
        return None, None
    entries = [words[4 * k : 4 * k + 4] for k in range(count)]
    masked = bool(entries[vector - first][3] & MSIX_ENTRY_MASKED)
    pending_bits = region_in_bars(function, regions, "msix-pba")
    any_masked = any(entry[3] & MSIX_ENTRY_MASKED and entry[0] for entry in entries)
    if pending_bits is None or any_masked:
        return masked, None
    bits = read_words(monitor, pending_bits.start + first // 8, 1)
    return masked, None if bits is None else bool(bits[0] >> vector - first & 1)


def region_in_bars(function: dict[str, Any], regions: list[Region], name: str) -> Region | None:
    """Return the region of that name in one of the device's BARs, if the guest has it mapped."""
    for bar in function["regions"]:
        if bar["type"] == "memory" and bar["address"] > 0:
            start, end = bar["address"], bar["address"] + bar["size"] - 1
            for region in regions:
                if region.name == name and start <= region.start <= region.end <= end:
                    return region
    return None


def _bus_master_by_view(views: list[str], pci_type: str) -> bool | None:
    """Return whether devices of that type reach memory, by what QEMU lets them see.

    A device whose bus mastering is off has an empty address space (hw/pci/pci.c,
    bus_master_enable_region), called as its type is. None where devices of a type differ.
    """
    if not pci_type:
        return None
    sees = {
        bool(regions_of(view))
        for view in views
        for line in view.splitlines()
        if line.startswith(f' AS "{pci_type}", root: bus master container')
    }
    return sees.pop() if len(sees) == 1 else None
