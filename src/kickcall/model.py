"""The nouns: what was seen of a machine, as plain frozen values.

Every value is a snapshot. Nothing here reads, writes, waits or knows how it was obtained.
Field names are the virtio specification's (1.4, chapter 2) and QEMU's.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class DeviceEvent(enum.StrEnum):
    """An event that an admin raises on purpose on a device (QEMU RFC of 2021)."""

    KICK = "kick"
    """Driver to device: the available buffer notification (virtio 1.4, 2.9)."""
    CALL = "call"
    """Device to driver: the used buffer notification (virtio 1.4, 2.3)."""


class Via(enum.StrEnum):
    """The ways to inject an event, best first."""

    QMP = "qmp"
    EVENTFD = "eventfd"
    IOPORT = "ioport"
    MMIO = "mmio"
    """Pauses the machine, for milliseconds."""


class Layout(enum.StrEnum):
    """How a virtqueue lies in guest memory (virtio 1.4, 2.7 and 2.8)."""

    SPLIT = "split"
    PACKED = "packed"


class BackendKind(enum.StrEnum):
    """Who serves a queue."""

    QEMU = "qemu"
    VHOST_KERNEL = "vhost-kernel"
    VHOST_USER = "vhost-user"


@dataclass(frozen=True, slots=True)
class MonitorAddress:
    """One QMP monitor of a VMM process.

    `path` is where this process can open the socket, already resolved against the VMM's own
    working directory and root; `written` is what the VMM's command line says.
    """

    path: str
    written: str


@dataclass(frozen=True, slots=True)
class Domain:
    """A machine's libvirt domain: libvirt holds a monitor of it, and passes commands on."""

    name: str
    uuid: str
    monitor: MonitorAddress
    """libvirt's own. Nobody else connects to it: after a restart libvirt would find it taken."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A running VM: one VMM process."""

    pid: int
    start_time: int
    """Field 22 of /proc/PID/stat, in clock ticks since boot: tells a reused pid (proc(5))."""
    name: str
    """QEMU's `-name` (its `guest=` part), or `pid-N` where it has none."""
    version: str
    """QEMU's version as its monitor or its binary says it; empty where neither could be asked."""
    monitors: tuple[MonitorAddress, ...]
    """Those that anybody may use: libvirt's is not among them."""
    command: tuple[str, ...]
    domain: Domain | None = None
    """None where libvirt did not start the machine."""
    number: str = ""
    """Proxmox VE's VMID; empty elsewhere."""


@dataclass(frozen=True, slots=True)
class Notifier:
    """One eventfd that carries kicks or calls of one queue."""

    fd: int
    """The descriptor's number in the VMM process."""
    eventfd_id: int
    """The kernel's id of the eventfd, the same in every process that holds it (Linux 5.2+)."""


@dataclass(frozen=True, slots=True)
class NotifierState:
    """A notifier as /proc/PID/fdinfo/FD shows it."""

    eventfd_id: int
    count: int
    flags: int
    """Open file status flags, as in fcntl(2)."""
    semaphore: bool | None = None
    """EFD_SEMAPHORE; None on kernels that do not tell (before 6.5)."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds an eventfd open."""

    pid: int
    comm: str
    fd: int


@dataclass(frozen=True, slots=True)
class Rings:
    """Where a queue lies, as guest-physical addresses (bytes), and how many entries it has.

    For a packed queue `avail` is the driver event suppression area and `used` the device event
    suppression area, as in QEMU's VRing (virtio 1.4, 2.8.14).
    """

    desc: int
    avail: int
    used: int
    num: int


@dataclass(frozen=True, slots=True)
class QueueMap:
    """A queue whose notifiers were proved: what a write may be based on."""

    index: int
    rings: Rings
    layout: Layout
    kick: Notifier | None
    call: Notifier | None
    virtqueue_address: int
    """Where the VMM keeps its `struct VirtQueue`, in the VMM's address space."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Device:
    """A virtio device: something in the machine with virtqueues."""

    path: str
    """QOM path, as `/machine/peripheral/vscsi0`."""
    kind: str
    """QOM type of the virtio device, as `virtio-blk-device`, `vhost-scsi` or `vhost-user-blk`."""
    backend: BackendKind
    num_queues: int
    """Queues that the device has, set up or not."""
    features: frozenset[str]
    """What driver and device agreed on, by QEMU's names, as `VIRTIO_RING_F_EVENT_IDX`."""
    driver_ok: bool
    """The driver finished its set-up (DRIVER_OK in the device status, virtio 1.4, 2.1)."""
    broken: bool
    """The device gave up on the driver (DEVICE_NEEDS_RESET, virtio 1.4, 2.1.2)."""
    vhost_started: bool
    """A back-end outside QEMU serves the queues right now."""

    @property
    def layout(self) -> Layout:
        """How the device's queues lie in memory."""
        return Layout.PACKED if "VIRTIO_F_RING_PACKED" in self.features else Layout.SPLIT

    @property
    def event_idx(self) -> bool:
        """Whether driver and device suppress notifications by index (VIRTIO_F_EVENT_IDX)."""
        return "VIRTIO_RING_F_EVENT_IDX" in self.features

    @property
    def id(self) -> str:
        """The id the user gave the device, or the last parts of its QOM path."""
        return _id(self.path)


@dataclass(frozen=True, slots=True)
class PciDevice:
    """A PCI device that is no virtio device: it has registers and interrupts, and no virtqueues."""

    path: str
    """QOM path, as `/machine/peripheral/nic0`."""
    kind: str
    """QOM type, as `e1000e`."""
    bus: int
    slot: int
    function: int

    @property
    def address(self) -> str:
        """Its place on the guest's PCI, as `00:03.0`."""
        return f"{self.bus:02x}:{self.slot:02x}.{self.function}"

    @property
    def id(self) -> str:
        """The id the user gave the device, or the last parts of its QOM path."""
        return _id(self.path)


AnyDevice = Device | PciDevice
"""Something in the machine that can take an event."""


def _id(path: str) -> str:
    prefix = "/machine/peripheral/"
    if path.startswith(prefix):
        return path[len(prefix) :].split("/", 1)[0]
    return path.removeprefix("/machine/")


@dataclass(frozen=True, slots=True)
class QueueState:
    """One look at one queue. None means: could not be known, and `notes` says why.

    Split indices are the free-running 16-bit values in the ring. Packed positions are encoded as
    the event areas encode them (virtio 1.4, 2.8.10): offset in bits 0 to 14, wrap counter in 15.
    """

    device: str
    queue: int
    layout: Layout
    size: int
    backend: BackendKind
    avail_idx: int | None
    used_idx: int | None
    last_avail_idx: int | None
    """How far the device has fetched; only a device in QEMU tells without being touched."""
    outstanding: int | None
    """Entries that the driver published and the device has not completed."""
    avail_flags: int | None
    used_flags: int | None
    used_event: int | None
    avail_event: int | None
    kick: NotifierState | None
    call: NotifierState | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Counters:
    """The three numbers that an injection is judged by. None: unknown, or the device has none."""

    count: int | None
    avail_idx: int | None
    used_idx: int | None


@dataclass(frozen=True, slots=True)
class Injection:
    """One event that was raised, or would be (`dry_run`)."""

    machine: str
    device: str
    queue: int
    event: DeviceEvent
    via: Via
    eventfd_id: int | None
    before: Counters
    after: Counters
    layout: Layout | None = Layout.SPLIT
    """What the indices in the counters mean: see QueueState. None: the device has no virtqueues."""
    dry_run: bool = False
    target: str = ""
    """What was written to, in words: `eventfd 1234 (fd 27)`, `I/O port 0xc010`."""
    pause_ms: float | None = None
    """For how many milliseconds the machine was paused; None where it ran on."""


@dataclass(frozen=True, slots=True)
class EventOffer:
    """Whether an event can be raised on a queue of a device now."""

    queue: int
    name: str
    """What the queue is, in words; empty for a virtqueue."""
    event: DeviceEvent
    via: Via | None
    """The way that would be taken where a pause is allowed; None: it cannot be raised."""
    reason: str
    """Why it cannot be raised; empty where it can."""


class Signaller(enum.StrEnum):
    """Who raised a notification."""

    GUEST = "guest"
    """A virtual CPU of the machine wrote to the doorbell."""
    VHOST = "vhost"
    """A worker of vhost in the kernel, for this machine."""
    QEMU = "qemu"
    """Another thread of the VMM: its main loop or an iothread."""
    KICKCALL = "kickcall"
    PROCESS = "process"
    """Another process, as a vhost-user back-end."""
    KERNEL = "kernel"
    """The kernel itself, as in an interrupt: the thread is the one that was interrupted."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Signalled:
    """How often one thread raised one notification."""

    by: Signaller
    pid: int | None
    """Its process; None where it ended before it could be asked."""
    tid: int
    comm: str
    """The thread's name: it may call itself anything."""
    total: int
    last_at: float
    """When it did so last, in seconds of CLOCK_MONOTONIC (`time.monotonic()`)."""


@dataclass(frozen=True, slots=True)
class NotificationCount:
    """How often the kick, or the call, of a queue was raised while it was recorded."""

    device: str
    queue: int
    event: DeviceEvent
    eventfd_id: int | None
    """None: its notifier is gone."""
    total: int
    last_at: float | None
    """When it was raised last, in seconds of CLOCK_MONOTONIC; None: never since the recording
    began."""
    by: tuple[Signalled, ...]
    """Who raised it, the most frequent first."""


@dataclass(frozen=True, slots=True)
class Notification:
    """One kick or call that was recorded."""

    at: float
    """In seconds of CLOCK_MONOTONIC."""
    device: str
    queue: int
    event: DeviceEvent
    by: Signaller
    pid: int | None
    tid: int
    comm: str
    after_kick_s: float | None
    """For a call: seconds since the first kick that no call had followed. None: there was none."""


class VerdictKind(enum.StrEnum):
    """What can be said of a queue. See docs/verdicts/."""

    IDLE = "idle"
    PROGRESSING = "progressing"
    VM_NOT_RUNNING = "vm-not-running"
    DEVICE_NOT_READY = "device-not-ready"
    UNKNOWN = "unknown"
    KICK_SUPPRESSED = "kick-suppressed"
    LOST_KICK = "lost-kick"
    KICK_UNREAD = "kick-unread"
    BACKEND_GONE = "backend-gone"
    DEVICE_STUCK = "device-stuck"
    CALL_SUPPRESSED = "call-suppressed"
    LOST_CALL = "lost-call"
    INTERRUPT_BLOCKED = "interrupt-blocked"
    DRIVER_STUCK = "driver-stuck"
    RING_CORRUPT = "ring-corrupt"

    @property
    def stalled(self) -> bool:
        """Whether the verdict says that something is wrong."""
        return self not in _HEALTHY


_HEALTHY = frozenset(
    {
        VerdictKind.IDLE,
        VerdictKind.PROGRESSING,
        VerdictKind.VM_NOT_RUNNING,
        VerdictKind.DEVICE_NOT_READY,
        VerdictKind.UNKNOWN,
    }
)


class Confidence(enum.StrEnum):
    """How a verdict was reached."""

    OBSERVED = "observed"
    CONFIRMED = "confirmed"
    """The event that the verdict names was injected, and the queue moved."""
    REFUTED = "refuted"
    """The event that the verdict names was injected, and nothing moved."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One value that a verdict rests on."""

    what: str
    """As the spec or the kernel calls it: `avail.idx`, `eventfd-count of the kick notifier`."""
    value: int | str | None
    at: float
    """When it was read, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong with a queue, on which hop of the path, and why we say so."""

    device: str
    queue: int
    verdict: VerdictKind
    hop: int
    """1 to 10 (docs/path.md); 0 where no hop is broken, or none can be named."""
    since_s: float
    """Seconds for which the queue has been seen in this state."""
    evidence: tuple[Evidence, ...]
    remedy: str
    """What to do next, as a command or a sentence."""
    confidence: Confidence = Confidence.OBSERVED
    event: DeviceEvent | None = None
    """The event that a probe would inject; None where none would help or tell anything."""
