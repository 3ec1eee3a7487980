"""What is a lab machine made of? Its devices as values, each with the arguments that it means."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from kickcall.errors import LabError
from kickcall.lab.board import BOARDS, BoardName

if TYPE_CHECKING:
    from collections.abc import Sequence

Legacy = Literal["auto", "off", "only"]
"""Which virtio-pci interface a device offers: auto is transitional on the root bus (modern and
legacy, QEMU's default there), off is modern only, only is legacy only."""
Disk = Literal["null", "file"]
"""What is behind a disk: null-co (reads zeroes, forgets writes) or a file of the machine."""

FIRST_SLOT = 0x02
"""Slot 0 of q35's root bus is the host bridge."""
VHOST_NET_PREFIX_LENGTH = 30
"""The network of a tap has two addresses, the host's and the guest's."""
FIRST_HOTPLUG_SLOT = 0x18
"""Root ports for hot-plug take the slots from here up to 0x1e; 0x1f is the ICH9 bridge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """What all devices have. `id` and `slot` are filled in by the machine where left out."""

    kind: ClassVar[str] = ""
    prefix: ClassVar[str] = "dev"

    id: str = ""
    packed: bool = False
    legacy: Legacy = "auto"
    event_idx: bool = True
    options: tuple[str, ...] = ()
    """More properties for -device, as `vectors=0`."""
    slot: int = 0
    """The device's slot on the root PCI bus, or its virtio-mmio transport."""
    mmio: bool = False
    """Whether its transport is virtio-mmio, as on boards without PCI it always is."""

    def properties(self, driver: str, *own: str) -> str:
        """Return the value of -device."""
        words = [driver, f"id={self.id}", f"addr={self.slot:#x}", *own]
        if self.mmio:
            words[0] = driver.replace("-pci", "-device")
            words[2] = f"bus=virtio-mmio-bus.{self.slot}"
            words = [word for word in words if word != "romfile="]
        if self.packed:
            words.append("packed=on")
        if not self.event_idx:
            words.append("event_idx=off")
        if self.mmio:
            pass  # for all of a machine's: -global virtio-mmio.force-legacy
        elif self.legacy == "off":
            words.append("disable-legacy=on")
        elif self.legacy == "only":
            words += ["disable-modern=on", "disable-legacy=off"]
        return ",".join((*words, *self.options))


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtioBlk(DeviceSpec):
    """virtio-blk, served by QEMU's main loop or by an iothread of its own."""

    kind: ClassVar[str] = "virtio-blk"
    prefix: ClassVar[str] = "blk"

    queues: int = 1
    iothread: bool = False
    disk: Disk = "null"
    size_mib: int = 64

    def arguments(self, folder: str, poll_ns: int) -> list[str]:
        own = [f"drive={self.id}-disk", f"num-queues={self.queues}"]
        if self.iothread:
            own.append(f"iothread={self.id}-iothread")
        return [
            *_iothread(self.id, self.iothread, poll_ns),
            *_blockdev(self.id, self.disk, self.size_mib, folder),
            *("-device", self.properties("virtio-blk-pci", *own)),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtioScsi(DeviceSpec):
    """virtio-scsi with one disk. Its queues are control, event and `queues` request queues."""

    kind: ClassVar[str] = "virtio-scsi"
    prefix: ClassVar[str] = "scsi"

    queues: int = 1
    iothread: bool = False
    disk: Disk = "null"
    size_mib: int = 64

    def arguments(self, folder: str, poll_ns: int) -> list[str]:
        own = [f"num_queues={self.queues}"]
        if self.iothread:
            own.append(f"iothread={self.id}-iothread")
        return [
            *_iothread(self.id, self.iothread, poll_ns),
            *_blockdev(self.id, self.disk, self.size_mib, folder),
            *("-device", self.properties("virtio-scsi-pci", *own)),
            *("-device", f"scsi-hd,id={self.id}-hd,bus={self.id}.0,drive={self.id}-disk"),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtioNet(DeviceSpec):
    """virtio-net without vhost, on QEMU's user network, cut off from the world.

    The guest is 10.0.2.15; QEMU answers as 10.0.2.2.
    """

    kind: ClassVar[str] = "virtio-net"
    prefix: ClassVar[str] = "net"

    def arguments(self, folder: str, poll_ns: int) -> list[str]:
        own = [f"netdev={self.id}-user", "romfile="]
        return [
            *("-netdev", f"user,id={self.id}-user,restrict=on"),
            *("-device", self.properties("virtio-net-pci", *own)),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class VhostUserBlk(DeviceSpec):
    """vhost-user-blk served by qemu-storage-daemon, through the lab's relay or directly.

    (qemu-storage-daemon offers no packed queues.)
    """

    kind: ClassVar[str] = "vhost-user-blk"
    prefix: ClassVar[str] = "vub"

    queues: int = 1
    relay: bool = True
    disk: Disk = "null"
    size_mib: int = 64
    reconnect: int = 0
    """QEMU's `reconnect` for the socket, in seconds (QEMU before 9.2)."""

    def socket_name(self) -> str:
        """Return the socket that QEMU connects to, in the machine's folder."""
        return f"{self.id}.relay" if self.relay else f"{self.id}.backend"

    def backend_arguments(self, folder: str) -> list[str]:
        """Return the arguments of the qemu-storage-daemon that serves this device."""
        return [
            "--blockdev",
            _blockdev(self.id, self.disk, self.size_mib, folder)[1],
            "--export",
            f"type=vhost-user-blk,id={self.id}-export,node-name={self.id}-disk,writable=on,"
            f"addr.type=unix,addr.path={folder}/{self.id}.backend,num-queues={self.queues}",
        ]

    def arguments(self, folder: str, poll_ns: int) -> list[str]:
        reconnect = f",reconnect={self.reconnect}" if self.reconnect else ""
        own = [f"chardev={self.id}-socket", f"num-queues={self.queues}"]
        path = f"{folder}/{self.socket_name()}"
        return [
            *("-chardev", f"socket,id={self.id}-socket,path={path}{reconnect}"),
            *("-device", self.properties("vhost-user-blk-pci", *own)),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class VhostScsi(DeviceSpec):
    """vhost-scsi: one disk in the memory of the host, served by vhost in the host's kernel.

    Its queues are control, event and `queues` request queues. What has no name when the machine
    is booted gets one that nothing else on the host has.
    """

    kind: ClassVar[str] = "vhost-scsi"
    prefix: ClassVar[str] = "vscsi"

    queues: int = 1
    size_mib: int = 16
    wwpn: str = ""
    """The target's name in configfs, as naa.5001405123456789."""

    def arguments(self, folder: str, poll_ns: int) -> list[str]:
        own = [f"wwpn={self.wwpn}", f"num_queues={self.queues}"]
        return ["-device", self.properties("vhost-scsi-pci", *own)]


@dataclass(frozen=True, slots=True, kw_only=True)
class VhostNet(DeviceSpec):
    """virtio-net on a tap, served by vhost in the host's kernel.

    Its queues are receive and transmit of each of `queues` pairs, then control (QEMU's own).
    """

    kind: ClassVar[str] = "vhost-net"
    prefix: ClassVar[str] = "vnet"

    queues: int = 1
    tap: str = ""
    """The interface on the host. QEMU makes it, so it ends with QEMU."""
    address: str = ""
    """The host's IPv4 address on it, in a network of two hosts; the guest has the next one."""

    @property
    def guest_address(self) -> str:
        return str(IPv4Address(self.address) + 1)

    @property
    def mac(self) -> str:
        return f"52:54:00:6b:63:{self.slot:02x}"

    def arguments(self, folder: str, poll_ns: int) -> list[str]:
        own = [f"netdev={self.id}-tap", "romfile=", f"mac={self.mac}"]
        if self.queues > 1:
            # QEMU's documentation of -device virtio-net-pci: 2 * queues + 2.
            own += ["mq=on", f"vectors={2 * self.queues + 2}"]
        return [
            "-netdev",
            f"tap,id={self.id}-tap,ifname={self.tap},script=no,downscript=no,vhost=on,"
            f"queues={self.queues}",
            *("-device", self.properties("virtio-net-pci", *own)),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class VhostVsock(DeviceSpec):
    """vhost-vsock. Its queues are receive, transmit (vhost's) and event (QEMU's)."""

    kind: ClassVar[str] = "vhost-vsock"
    prefix: ClassVar[str] = "vsock"

    guest_cid: int = 0
    """The guest's address, unique on the host."""

    def arguments(self, folder: str, poll_ns: int) -> list[str]:
        return ["-device", self.properties("vhost-vsock-pci", f"guest-cid={self.guest_cid}")]


@dataclass(frozen=True, slots=True, kw_only=True)
class E1000e(DeviceSpec):
    """Intel's 82574L on a user network of its own, cut off from the world.

    The network is 10.1.SLOT.0: QEMU answers as .2, the guest is .15, and what TCP brings to port 7
    of .100 comes back.
    """

    kind: ClassVar[str] = "e1000e"
    prefix: ClassVar[str] = "e1000e-"

    @property
    def guest_address(self) -> str:
        return f"10.1.{self.slot}.15"

    @property
    def host_address(self) -> str:
        return f"10.1.{self.slot}.2"

    @property
    def echo_address(self) -> str:
        return f"10.1.{self.slot}.100"

    @property
    def mac(self) -> str:
        return f"52:54:00:6b:64:{self.slot:02x}"

    def arguments(self, folder: str, poll_ns: int) -> list[str]:
        own = [f"netdev={self.id}-user", f"mac={self.mac}", "romfile="]
        return [
            "-netdev",
            f"user,id={self.id}-user,net=10.1.{self.slot}.0/24,restrict=on,"
            f"guestfwd=tcp:{self.echo_address}:7-cmd:cat",
            *("-device", self.properties(self.kind, *own)),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class E1000(E1000e):
    """Intel's 82540EM on the same."""

    kind: ClassVar[str] = "e1000"
    prefix: ClassVar[str] = "e1000-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Igb(E1000e):
    """Intel's 82576 on the same (QEMU 8.0 and newer)."""

    kind: ClassVar[str] = "igb"
    prefix: ClassVar[str] = "igb"


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherDevice(DeviceSpec):
    """Any other PCI device that needs only `-device`: `OtherDevice(driver="virtio-rng-pci")`."""

    kind: ClassVar[str] = "other"
    prefix: ClassVar[str] = "other"

    driver: str

    def arguments(self, folder: str, poll_ns: int) -> list[str]:
        return ["-device", self.properties(self.driver)]


AnyDevice = (
    VirtioBlk
    | VirtioScsi
    | VirtioNet
    | VhostUserBlk
    | VhostScsi
    | VhostNet
    | VhostVsock
    | E1000e
    | E1000
    | Igb
    | OtherDevice
)
KINDS: dict[str, type[AnyDevice]] = {kind.kind: kind for kind in get_args(AnyDevice)}


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSpec:
    """A lab machine, before it is booted."""

    name: str = ""
    """Made up where left out."""
    devices: tuple[AnyDevice, ...] = ()
    memory_mib: int = 256
    cpus: int = 2
    board: BoardName = "q35"
    qemu: str = "system"
    """`system`, or a Debian suite whose QEMU to use: `trixie` (10.0), `bookworm` (7.2)."""
    monitors: int = 1
    """QMP sockets for users; their paths are `machine.qmp_paths`."""
    lab_monitor: bool = True
    """One more QMP socket, for `machine.qmp()`: so that the lab and a test do not fight."""
    hotplug_ports: int = 0
    """PCIe root ports hot0, hot1, … to plug devices into."""
    iothread_poll_ns: int = 0
    """How long an iothread polls before it sleeps. Polling hides lost kicks; QEMU's own default
    is 32768."""
    shared_memory: bool = False
    """Guest memory as a shared memfd. Always so when there is a vhost-user device."""
    arguments: tuple[str, ...] = field(default=())
    """More arguments for QEMU, as they are."""
    kernel_arguments: str = ""
    """For a module, as `e1000e.IntMode=0`, too."""
    full_kernel: bool = False
    """The distribution's whole kernel in place of the small one. Always so for a real card."""

    def complete(self) -> MachineSpec:
        """Return the same machine with an id and a PCI slot for every device.

        Raises LabError for two devices of one id or one slot.
        """
        board = BOARDS[self.board]
        if not board.mmio_base and any(device.mmio for device in self.devices):
            raise LabError(f"the board {self.board} has no virtio-mmio: take microvm or virt")
        given = [device.id for device in self.devices if device.id]
        taken_slots = {device.slot for device in self.devices if device.slot}
        numbers: Counter[str] = Counter()
        free_slots = (s for s in range(FIRST_SLOT, FIRST_HOTPLUG_SLOT) if s not in taken_slots)
        devices: list[AnyDevice] = []
        for device in self.devices:
            name = device.id
            while not name or (not device.id and name in given):
                name = f"{device.prefix}{numbers[device.prefix]}"
                numbers[device.prefix] += 1
            slot = device.slot or next(free_slots, 0)
            if not slot:
                raise LabError("a lab machine has room for 22 devices")
            mmio = device.mmio or not board.has_pci
            devices.append(replace(device, id=name, slot=slot, mmio=mmio))
        for what, values in (
            ("id", [device.id for device in devices]),
            ("slot", [f"{device.slot:#x}" for device in devices]),
        ):
            twice = [value for value, times in Counter(values).items() if times > 1]
            if twice:
                raise LabError(f"two devices of the lab machine have the same {what}: {twice[0]}")
        return replace(self, devices=tuple(devices))

    @property
    def needs_full_kernel(self) -> bool:
        return self.full_kernel or any(isinstance(d, E1000e) for d in self.devices)

    @property
    def memory_is_shared(self) -> bool:
        return self.shared_memory or any(isinstance(d, VhostUserBlk) for d in self.devices)


def _iothread(device_id: str, wanted: bool, poll_ns: int) -> Sequence[str]:
    if not wanted:
        return ()
    return ("-object", f"iothread,id={device_id}-iothread,poll-max-ns={poll_ns}")


def _blockdev(device_id: str, disk: Disk, size_mib: int, folder: str) -> tuple[str, str]:
    node = f"node-name={device_id}-disk"
    if disk == "null":
        # qemu-storage-daemon takes no suffix as in 64M.
        return "-blockdev", f"driver=null-co,{node},size={size_mib << 20},read-zeroes=on"
    return "-blockdev", f"driver=file,{node},filename={folder}/{device_id}.img"
