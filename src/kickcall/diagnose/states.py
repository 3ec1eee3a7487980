"""What a judge is given: samples of one queue over time, what is fixed about it, and slow facts.

All of it is plain data. Whoever samples says when; the judge has no clock.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kickcall.model import BackendKind, Layout


class QueueRole(enum.Enum):
    """Who waits for whom on a queue: it decides whether outstanding work means anything."""

    REQUEST = "request"
    """The driver asks and the device answers when it can: blk, a SCSI request queue, net TX."""
    INBOX = "inbox"
    """The driver leaves empty buffers for the device to fill when something happens: net RX, a
    SCSI event queue. Outstanding work there is normal, however long."""


@dataclass(frozen=True, slots=True)
class QueueFixed:
    """What does not change as long as the map holds."""

    device: str
    queue: int
    size: int
    layout: Layout
    event_idx: bool
    backend: BackendKind
    role: QueueRole
    calls_when_idle: bool
    """The driver keeps its calls switched on while it is idle (blk, scsi), where others may switch
    them off and reap later (net TX)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at one queue. `at` is in seconds on any clock that never goes back.

    Split: free-running 16-bit indices; `avail_flags`, `used_flags` as in the rings; `used_event`
    and `avail_event` with VIRTIO_F_EVENT_IDX only. Packed: positions encoded as offset | wrap << 15
    (virtio 1.4, 2.8.10); `avail_flags` and `used_flags` are the two bits of the driver's and the
    device's event area, `used_event` and `avail_event` their descriptor positions.
    `last_avail_idx` is the device's own position where it is known. A count is None where the
    notifier does not exist or is no longer the one that was mapped.
    """

    at: float
    avail_idx: int | None
    used_idx: int | None
    last_avail_idx: int | None
    avail_flags: int | None
    used_flags: int | None
    used_event: int | None
    avail_event: int | None
    kick_count: int | None
    call_count: int | None
    unreadable: str = ""
    """Why the rings could not be read; empty where they were."""


class ThreadState(enum.StrEnum):
    """What a thread does, from /proc/PID/task/TID/stat (proc(5)) and what it waits in."""

    RUNNING = "running"
    SLEEPING = "sleeping"
    DISK = "disk sleep"
    """Uninterruptible: state D."""
    STOPPED = "stopped"
    """By a signal or a tracer: states T and t."""
    GONE = "gone"
    """Ended, or a zombie."""


@dataclass(frozen=True, slots=True)
class BackendThread:
    """One thread that may serve the queue, or all threads of the process that does."""

    pid: int
    tid: int
    comm: str
    state: ThreadState
    waits_in: str = ""
    """The system call that it sleeps in, as `ppoll` (/proc/PID/task/TID/syscall, proc(5)); empty
    where that is not known."""


@dataclass(frozen=True, slots=True)
class InterruptPath:
    """The switches between a queue's call and the driver. None: could not be known."""

    msix_enabled: bool | None = None
    function_masked: bool | None = None
    vector: int | None = None
    """The queue's MSI-X vector; None where it has none, too."""
    vector_masked: bool | None = None
    vector_pending: bool | None = None
    bus_master: bool | None = None
    intx_disabled: bool | None = None


@dataclass(frozen=True, slots=True)
class SlowFacts:
    """What is looked up only when a queue looks stalled. None: could not be known."""

    at: float
    vm_running: bool | None = None
    run_state: str = ""
    driver_ok: bool | None = None
    broken: bool | None = None
    kick_holders: int | None = None
    """Processes other than the VMM that hold the kick notifier (vhost-user only)."""
    kick_polled: bool | None = None
    """Who reads the kick notifier has it in an epoll set; None where it has no such set, and may
    poll by other means."""
    backend_threads: tuple[BackendThread, ...] = ()
    """Who should read the kick notifier: the iothread or main loop, or the back-end's threads."""
    vcpu_threads: tuple[BackendThread, ...] = ()
    interrupts: InterruptPath = InterruptPath()
    recorded_since: float | None = None
    """Since when the kernel has counted the queue's notifications; None where it does not."""
    kicked_at: float | None = None
    """When the kernel saw its last kick; None: none since then."""
    called_at: float | None = None
    """The same for the call."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """How long, in seconds, a queue may stand still before it is called stalled."""

    notification_s: float = 0.5
    """For a notification that was owed: nothing that is healthy takes this long to look."""
    device_s: float = 5.0
    """For a device that has fetched the work and does not complete it: slow is not stuck."""
