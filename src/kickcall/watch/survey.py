"""Did devices come, go, or get set up since a machine was mapped? Asked of its monitor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.errors import QmpCommandError
from kickcall.vmm import virtio

if TYPE_CHECKING:
    from kickcall.vmm.monitor import Monitor
    from kickcall.vmm.session import VmmSession


def has_changed(session: VmmSession, monitor: Monitor) -> bool:
    """Tell whether mapping the machine anew would find more, or less. Some milliseconds.

    Of devices that are mapped nothing is asked: looking at them tells when they change.
    """
    paths = set(virtio.list_devices(monitor))
    if paths != {mapped.facts.backend_path for mapped in session.devices}:
        return True
    for mapped in session.devices:
        if mapped.array is not None and mapped.device.driver_ok:
            continue
        path = mapped.facts.backend_path
        try:
            said = monitor.execute("x-query-virtio-status", {"path": path})
        except QmpCommandError:
            return True
        ready = any("DRIVER_OK" in one for one in said["status"].get("statuses", ()))
        if ready != mapped.device.driver_ok:
            return True
        if ready and not mapped.device.vhost_started and said["vhost-started"]:
            return True
    return False
