"""What QEMU's monitor says of virtio devices, asked so that no back-end is ever touched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kickcall.errors import MonitorError, QmpCommandError
from kickcall.model import BackendKind, Device, Rings

if TYPE_CHECKING:
    from kickcall.vmm.monitor import Monitor

_IN_QEMU = frozenset(
    {
        "virtio-9p-device",
        "virtio-balloon-device",
        "virtio-blk-device",
        "virtio-gpu-device",
        "virtio-iommu-device",
        "virtio-keyboard-device",
        "virtio-mem",
        "virtio-mouse-device",
        "virtio-net-device",
        "virtio-pmem",
        "virtio-rng-device",
        "virtio-scsi-device",
        "virtio-serial-device",
        "virtio-sound-device",
        "virtio-tablet-device",
    }
)
"""Types that QEMU serves itself (virtio-net: unless its peer is vhost). Only these may be sent
`x-query-virtio-queue-status`: for a device that vhost serves, QEMU asks the back-end for
GET_VRING_BASE, and by the vhost-user protocol that stops the ring."""

_NET_LINE = re.compile(r"^( \\ )?(.+?): index=\d+,type=([\w-]+)")


@dataclass(frozen=True, slots=True)
class QueueFacts:
    """What the monitor knows of one queue that the driver set up."""

    rings: Rings
    positions: Positions | None


@dataclass(frozen=True, slots=True)
class Positions:
    """How far a device in QEMU itself got with a queue (QEMU: struct VirtQueue)."""

    last_avail_idx: int
    used_idx: int


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """One virtio device as the monitor describes it."""

    backend_path: str
    """QOM path of the virtio device itself; `device.path` is that of what it is plugged into."""
    device: Device
    queues: dict[int, QueueFacts]
    """What could be asked without touching a back-end; a queue that is missing may still exist."""


def list_devices(monitor: Monitor) -> list[str]:
    """Return the QOM paths of all virtio devices, by path.

    Raises MonitorError on a QEMU without `x-query-virtio` (before 7.2).
    """
    try:
        answer = monitor.execute("x-query-virtio")
    except QmpCommandError as exc:
        if exc.qmp_class == "CommandNotFound":
            raise MonitorError(
                "this QEMU has no x-query-virtio: QEMU 7.2 or newer is needed"
            ) from exc
        if "No virtio devices" in str(exc):  # QEMU 7.2: an empty list is an error there
            return []
        raise
    return sorted(entry["path"] for entry in answer)


def read_device(monitor: Monitor, path: str) -> DeviceFacts | None:
    """Return what the monitor says of the virtio device at `path`; None where it just went away."""
    try:
        kind = str(monitor.execute("qom-get", {"path": path, "property": "type"}))
        status = monitor.execute("x-query-virtio-status", {"path": path})
    except QmpCommandError:
        return None
    vhost = bool(status["vhost-started"])
    backend = _backend(monitor, kind, vhost, path)
    device = Device(
        path=path.removesuffix("/virtio-backend"),
        kind=kind,
        backend=backend,
        num_queues=int(status["num-vqs"]),
        features=_feature_names(status["guest-features"]),
        driver_ok=any("DRIVER_OK" in said for said in status["status"].get("statuses", ())),
        broken=bool(status["broken"]),
        vhost_started=vhost,
    )
    queues = {}
    if device.driver_ok:
        for index in range(device.num_queues):
            facts = _read_queue(monitor, path, index, device, status.get("vhost-dev"))
            if facts is not None:
                queues[index] = facts
    return DeviceFacts(path, device, queues)


def _feature_names(features: dict[str, Any]) -> frozenset[str]:
    """Return the names before the colon of `NAME: what it means`, plus unknown bits as `bit-N`."""
    said = [*features.get("transports", ()), *features.get("dev-features", ())]
    names = {text.partition(":")[0] for text in said}
    unknown = int(features.get("unknown-dev-features", 0))
    return frozenset(names | {f"bit-{bit}" for bit in range(64) if unknown >> bit & 1})


def _backend(monitor: Monitor, kind: str, vhost_started: bool, path: str) -> BackendKind:
    """Return who serves the device's queues, from its type and, for a NIC, its peers' types.

    The virtio device *name* is no help: vhost-user-blk is called `virtio-blk` there.
    """
    if kind.startswith(("vhost-user", "vhost-vdpa")):
        return BackendKind.VHOST_USER
    if kind.startswith("vhost-"):
        return BackendKind.VHOST_KERNEL
    if kind == "virtio-net-device" and "vhost-user" in peer_types(
        monitor.hmp("info network"), path.removesuffix("/virtio-backend").rpartition("/")[2]
    ):
        return BackendKind.VHOST_USER
    return BackendKind.VHOST_KERNEL if vhost_started else BackendKind.QEMU


def peer_types(info_network: str, nic: str) -> set[str]:
    """Return the types of the back-ends that `info network` lists under the NIC of that name.

    A NIC without an id has a name that its QOM path does not tell: then all back-ends count, as a
    device must never be taken for one that may be asked for its queues.
    """
    peers: dict[str, set[str]] = {}
    current = ""
    for line in info_network.splitlines():
        found = _NET_LINE.match(line)
        if found is None:
            continue
        if found[1] is None:
            current = found[2]
        peers.setdefault(current, set()).add(found[3])
    return peers.get(nic) or set().union(*peers.values())


def _read_queue(
    monitor: Monitor, path: str, index: int, device: Device, vhost: dict[str, Any] | None
) -> QueueFacts | None:
    if device.vhost_started:
        first = int(vhost["vq-index"]) if vhost else 0
        count = int(vhost["nvqs"]) if vhost else 0
        if not first <= index < first + count:
            return None
        return _ask_vhost_queue(monitor, path, index)
    return _ask_queue(monitor, path, index) if may_be_asked(device) else None


def _ask_vhost_queue(monitor: Monitor, path: str, index: int) -> QueueFacts | None:
    """`x-query-virtio-vhost-queue-status` reads QEMU's own `struct vhost_virtqueue`, no more."""
    try:
        said = monitor.execute("x-query-virtio-vhost-queue-status", {"path": path, "queue": index})
    except QmpCommandError:
        return None
    rings = Rings(
        int(said["desc-phys"]), int(said["avail-phys"]), int(said["used-phys"]), int(said["num"])
    )
    return QueueFacts(rings, None) if rings.desc else None


def _ask_queue(monitor: Monitor, path: str, index: int) -> QueueFacts | None:
    """Ask for a queue that QEMU serves itself; for another kind this would reach its back-end."""
    try:
        said = monitor.execute("x-query-virtio-queue-status", {"path": path, "queue": index})
    except QmpCommandError:
        return None
    rings = Rings(
        int(said["vring-desc"]),
        int(said["vring-avail"]),
        int(said["vring-used"]),
        int(said["vring-num"]),
    )
    if not rings.desc:
        return None
    # QEMU leaves the avail positions out only where vhost holds the queue.
    positions = Positions(int(said.get("last-avail-idx", 0)), int(said["used-idx"]))
    return QueueFacts(rings, positions)


def ask_positions(monitor: Monitor, facts: DeviceFacts, index: int) -> Positions | None:
    """Return how far the device is with queue `index` now; None where it may not be asked."""
    if not may_be_asked(facts.device):
        return None
    told = _ask_queue(monitor, facts.backend_path, index)
    return None if told is None else told.positions


def may_be_asked(device: Device) -> bool:
    """Tell whether `x-query-virtio-queue-status` of the device reads QEMU's own record only."""
    return (
        device.backend is BackendKind.QEMU and not device.vhost_started and device.kind in _IN_QEMU
    )
