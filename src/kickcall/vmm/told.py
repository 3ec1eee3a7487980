"""What does the monitor say of a machine, in its own words? Only what no back-end notices.

Every answer is QEMU's own view, kept for who knows QEMU. `x-query-virtio-queue-status` goes to
devices that QEMU serves itself, and to no other: elsewhere it stops the ring (vmm/virtio.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kickcall.errors import QmpCommandError
from kickcall.model import BackendKind
from kickcall.vmm.virtio import list_devices, may_be_asked

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kickcall.vmm.monitor import Monitor
    from kickcall.vmm.session import MappedDevice

_QMP = (
    "query-status",
    "query-version",
    "query-kvm",
    "query-target",
    "query-cpus-fast",
    "query-iothreads",
    "query-migrate",
    "x-query-virtio",
)
_HMP = ("info mtree -f", "info irq", "info pic", "info pci", "info network")
"""Not `info qtree`, `info block` and `info chardev`: they tell files, addresses and passwords."""
_QUEUES_MOST = 64
"""Queues that are asked about: each takes a millisecond of QEMU's main loop."""


def told(
    monitor: Monitor, devices: Iterable[MappedDevice], first: Iterable[tuple[str, int]] = ()
) -> Iterator[tuple[str, Any]]:
    """Yield each question with its answer, or with the error that QEMU gave.

    A text is what the human monitor said, anything else what QMP returned. Of thousands of queues
    some are asked about: those in `first` (by QOM path) before all others. Raises MonitorError
    where the monitor went away.
    """
    for command in _QMP:
        yield command, _ask(monitor, command)
    mapped = {one.facts.backend_path: one for one in devices}
    started: dict[str, bool] = {}
    for path in list_devices(monitor):
        said = _ask(monitor, "x-query-virtio-status", {"path": path})
        yield f"x-query-virtio-status {path}", said
        started[path] = bool(isinstance(said, dict) and said.get("vhost-started", True))
    wanted = {queue: rank for rank, queue in enumerate(first)}
    queues = [
        (one, number)
        for path, one in mapped.items()
        if path in started
        for number in one.facts.queues
    ]
    queues.sort(key=lambda two: wanted.get((two[0].device.path, two[1]), len(wanted)))
    for one, number in queues[:_QUEUES_MOST]:
        path = one.facts.backend_path
        command = _queue_command(one, vhost_started=started[path])
        if command:
            arguments = {"path": path, "queue": number}
            yield f"{command} {path} {number}", _ask(monitor, command, arguments)
    for line in _HMP:
        try:
            yield line, monitor.hmp(line)
        except QmpCommandError as exc:
            yield line, {"error": str(exc)}


def _queue_command(one: MappedDevice, *, vhost_started: bool) -> str:
    """Return what may be asked about a queue, by who serves its device right now."""
    if vhost_started:
        return "x-query-virtio-vhost-queue-status"
    if one.device.backend is not BackendKind.QEMU:
        return ""
    return "x-query-virtio-queue-status" if may_be_asked(one.device) else ""


def _ask(monitor: Monitor, command: str, arguments: dict[str, object] | None = None) -> Any:
    try:
        return monitor.execute(command, arguments)
    except QmpCommandError as exc:
        return {"error": str(exc)}
