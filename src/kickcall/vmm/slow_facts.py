"""What else bears on a queue that looks stalled: run state, status, interrupts, threads.

All of it is read, none of it is written, and no back-end is asked for its rings. It takes some
dozens of monitor commands' worth of milliseconds, so it is asked for only when a queue looks bad.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kickcall.diagnose.states import SlowFacts
from kickcall.errors import QmpCommandError
from kickcall.model import BackendKind
from kickcall.vmm.interrupts import interrupt_path
from kickcall.vmm.serving import Holders, main_loop, serving, vcpu_threads

if TYPE_CHECKING:
    from kickcall.vmm.monitor import Monitor
    from kickcall.vmm.session import MappedDevice, VmmSession


def slow_facts(
    session: VmmSession,
    mapped: MappedDevice,
    queue: int,
    monitor: Monitor,
    *,
    holders: Holders | None = None,
    at: float | None = None,
) -> SlowFacts:
    """Return the slow facts of one queue. `at` is their time (None: time.monotonic()).

    `holders` remembers who holds vhost-user notifiers from one call to the next. What cannot be
    known is None. Raises MonitorError, and MapError or its kin for a queue that is not mapped.
    """
    session.process.check_alive()
    status = monitor.execute("query-status")
    driver_ok, broken = _status(monitor, mapped)
    server = serving(session, monitor, mapped, queue, holders or Holders())
    return SlowFacts(
        at=time.monotonic() if at is None else at,
        vm_running=bool(status["running"]),
        run_state=str(status["status"]),
        driver_ok=driver_ok,
        broken=broken,
        kick_holders=server.holders,
        kick_polled=server.polled,
        backend_threads=server.threads,
        vcpu_threads=vcpu_threads(monitor, session.process.pid),
        interrupts=interrupt_path(session, monitor, mapped, queue),
    )


def facts_unasked(session: VmmSession, mapped: MappedDevice) -> SlowFacts:
    """Return what /proc alone tells, for a machine whose monitor does not answer.

    Which iothread serves a device only the monitor tells; a main loop that hangs explains a device
    of its own, and the silence of the monitor, too.
    """
    session.process.check_alive()
    of_qemu = mapped.device.backend is BackendKind.QEMU
    return SlowFacts(
        at=time.monotonic(),
        backend_threads=main_loop(session.process.pid) if of_qemu else (),
    )


def _status(monitor: Monitor, mapped: MappedDevice) -> tuple[bool | None, bool | None]:
    """Return DRIVER_OK and `broken`; reads QEMU's own structures only, for vhost, too."""
    try:
        said = monitor.execute("x-query-virtio-status", {"path": mapped.facts.backend_path})
    except QmpCommandError:  # unplugged meanwhile
        return None, None
    statuses = said["status"].get("statuses", ())
    return any("DRIVER_OK" in one for one in statuses), bool(said["broken"])
