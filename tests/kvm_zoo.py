"""Which machine has every kind of device that a KVM host serves, and what makes traffic there?"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from kickcall.lab.qemu import usable_kvm
from kickcall.lab.spec import (
    MachineSpec,
    VhostNet,
    VhostScsi,
    VhostUserBlk,
    VhostVsock,
    VirtioBlk,
    VirtioScsi,
)
from kickcall.model import BackendKind
from witness import eventfd_counts

if TYPE_CHECKING:
    from kickcall.attached import AttachedMachine
    from kickcall.lab.machine import LabMachine

KVM_ZOO = MachineSpec(
    devices=(
        VhostScsi(id="vscsi0", queues=2),
        VhostNet(id="vnet0", queues=2),
        VhostNet(id="vnetplain0", event_idx=False),
        VhostVsock(id="vsock0"),
        VirtioBlk(id="iot0", queues=2, iothread=True),
        VirtioScsi(id="scsi0", queues=2),
        VhostUserBlk(id="vub0", queues=2, relay=True, disk="file"),
    ),
    monitors=2,
    # Without IPv6 an idle guest sends nothing, so no interrupt comes that no test asked for.
    kernel_arguments="ipv6.disable=1",
)

NOTIFIERS = {
    "vscsi0": (BackendKind.VHOST_KERNEL, 4, 4),
    "vnet0": (BackendKind.VHOST_KERNEL, 5, 4),
    "vnetplain0": (BackendKind.VHOST_KERNEL, 3, 2),
    "vsock0": (BackendKind.VHOST_KERNEL, 3, 2),
    "iot0": (BackendKind.QEMU, 2, 2),
    "scsi0": (BackendKind.QEMU, 4, 4),
    "vub0": (BackendKind.VHOST_USER, 2, 2),
}
"""Who serves each device, how many queues it has, and how many of them, from 0 on, have notifiers.

The control queue of vhost-net and the event queue of vhost-vsock are QEMU's, and while vhost serves
the others it takes their kicks in the doorbell itself (QEMU, hw/virtio/vhost.c:
vhost_dev_enable_notifiers grabs the device's ioeventfds).
"""
QEMUS_OWN = {"vnet0": 4, "vnetplain0": 2, "vsock0": 2}
"""The queue of each device that QEMU keeps to itself."""
DISKS = ("vscsi0", "iot0", "scsi0", "vub0")
NETS = ("vnet0", "vnetplain0")

# linux/sockios.h, linux/if_arp.h
_SIOCSARP, _ETHER, _ATF_COM, _ATF_PERM = 0x8955, 1, 0x02, 0x04

_NEEDED = {
    "vhost_scsi": Path("/dev/vhost-scsi"),
    "vhost_net": Path("/dev/vhost-net"),
    "vhost_vsock": Path("/dev/vhost-vsock"),
    "tun": Path("/dev/net/tun"),
    "target_core_mod": Path("/sys/kernel/config/target"),
}


def missing() -> str:
    """Return what this machine lacks to be a KVM host for these tests; nothing if it is one."""
    if os.geteuid() != 0:
        return "root"
    if not usable_kvm():
        return "a usable /dev/kvm"
    for module, path in _NEEDED.items():
        if not path.exists():
            return f"{path} (modprobe {module})"
    return ""


def interrupt_lines(machine: LabMachine, device: str, queue: int) -> str:
    """Return the driver's name for the line of a queue's interrupt."""
    match machine.device(device).kind:
        case "virtio-scsi" | "vhost-scsi":  # drivers/scsi/virtio_scsi.c: virtscsi_init
            return ("control", "event")[queue] if queue < 2 else f"request.{queue - 2}"
        case "virtio-net" | "vhost-net":  # drivers/net/virtio_net.c: virtnet_find_vqs
            return f"{('input', 'output')[queue % 2]}.{queue // 2}"
        case "vhost-vsock":
            # QEMU gives it three vectors, so Linux shares one (virtio_pci_common.c: vp_find_vqs).
            return "virtqueues"
        case _:  # drivers/block/virtio_blk.c: init_vq
            return f"req.{queue}"


def know_each_other(machine: LabMachine, device: str) -> None:
    """Let guest and host know each other's MAC address for good, so that nobody asks again.

    A question would be a packet that no test asked for, and could heal a queue.
    """
    spec = machine.device(device)
    assert isinstance(spec, VhostNet)
    ours = Path(f"/sys/class/net/{spec.tap}/address").read_text().strip()
    status, output = machine.guest.run(f"arp -s {spec.address} {ours}")
    assert status == 0, output
    # struct arpreq: two addresses, flags, a netmask that is not used, the interface (arp(7)).
    guest = socket.inet_aton(spec.guest_address)
    mac = bytes.fromhex(spec.mac.replace(":", ""))
    request = struct.pack("=H2x4s8x", socket.AF_INET, guest) + struct.pack("=H6s8x", _ETHER, mac)
    request += struct.pack("=i16x16s", _ATF_COM | _ATF_PERM, spec.tap.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSARP, request)


_ON_ONE_PROCESSOR = """
for irq in $(ls /sys/bus/pci/devices/{address}/msi_irqs); do
    for line in /proc/irq/$irq/virtio*put.*; do
        [ -e "$line" ] || continue
        printf %x $((1 << ${{line##*.}})) > /proc/irq/$irq/smp_affinity && echo ${{line#*-}}
    done
done
"""


def on_one_processor(machine: LabMachine, device: str) -> None:
    """Let the guest take both interrupts of a network's queue pair on the processor of its number.

    Linux may give each to another processor. One that is not scheduled then takes the calls for
    many sent packets as one interrupt, while the other goes on with their answers.
    """
    queues = NOTIFIERS[device][2]
    command = _ON_ONE_PROCESSOR.format(address=machine.address(device))
    told = machine.guest.run(command).output.split()
    assert sorted(told) == sorted(interrupt_lines(machine, device, one) for one in range(queues))


def notifier_counts(attached: AttachedMachine) -> dict[int, int]:
    """Return the count of every queue's notifiers, by descriptor.

    QEMU has eventfds beside them, with which its threads wake each other at any time.
    """
    counts = eventfd_counts(attached.info.pid)
    return {
        notifier.fd: counts[notifier.fd]
        for device in attached.devices()
        for queue in device.queues()
        for notifier in (queue.map.kick, queue.map.call)
        if notifier is not None
    }


def kick_handler(device: str, queue: int) -> str:
    """Return the function of vhost that runs when a queue is kicked, as MODULE:FUNCTION."""
    match device:
        case "vscsi0":  # drivers/vhost/scsi.c: vhost_scsi_open
            word = {0: "ctl_", 1: "evt_"}.get(queue, "")
            return f"vhost_scsi:vhost_scsi_{word}handle_kick"
        case "vsock0":  # drivers/vhost/vsock.c: vhost_vsock_dev_open
            return f"vhost_vsock:vhost_vsock_handle_{('rx', 'tx')[queue]}_kick"
        case _:  # drivers/vhost/net.c: vhost_net_open
            return f"vhost_net:handle_{('rx', 'tx')[queue % 2]}_kick"


class HandlerHits:
    """How often vhost ran each of its kick handlers, counted by kprobes of our own.

    `with HandlerHits(functions) as hits:` and then `hits.counts()`.
    """

    _TRACING = Path("/sys/kernel/tracing")
    _GROUP = "kickcall_test"

    def __init__(self, functions: set[str]) -> None:
        self._functions = {name.replace(":", "_"): name for name in functions}
        self._instance = self._TRACING / "instances" / f"kickcall-test-{os.getpid()}"

    def __enter__(self) -> Self:
        self._instance.mkdir()
        for event, function in self._functions.items():
            self._define(f"p:{self._GROUP}/{event} {function}")
            (self._instance / "events" / self._GROUP / event / "enable").write_text("1")
        return self

    def __exit__(self, *_: object) -> None:
        for event in self._functions:
            with contextlib.suppress(OSError):
                (self._instance / "events" / self._GROUP / event / "enable").write_text("0")
        self._instance.rmdir()
        for event in self._functions:
            with contextlib.suppress(OSError):
                self._define(f"-:{self._GROUP}/{event}")

    def counts(self) -> dict[str, int]:
        """Return the hits of each function since the block began."""
        # Documentation/trace/kprobetrace.rst: name, hits, misses.
        rows = map(str.split, (self._TRACING / "kprobe_profile").read_text().splitlines())
        return {self._functions[row[0]]: int(row[1]) for row in rows if row[0] in self._functions}

    def _define(self, line: str) -> None:
        # Not open(): to append it would seek, which the kernel refuses here.
        events = os.open(self._TRACING / "kprobe_events", os.O_WRONLY | os.O_APPEND)
        try:
            os.write(events, f"{line}\n".encode())
        finally:
            os.close(events)


def knock(machine: LabMachine, device: str = "vsock0", timeout: float = 60.0) -> None:
    """Send the guest one vsock packet and wait for its answer.

    Nobody listens there, so the guest's kernel says no: one packet each way, and no program.
    """
    deadline = time.monotonic() + timeout
    while True:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as one:
            one.settimeout(timeout)
            try:
                one.connect((machine.guest_cid(device), 1))
                return
            except OSError as error:
                if error.errno == errno.ECONNRESET:
                    return
                # The kernel waits 2 s for the answer (net/vmw_vsock/af_vsock.c): a busy host's
                # guest may take longer.
                if error.errno != errno.ETIMEDOUT or time.monotonic() > deadline:
                    raise


class Knocking:
    """vsock packets to and fro while the block lasts."""

    def __init__(self, machine: LabMachine) -> None:
        self._machine = machine
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answered = 0

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            knock(self._machine)
            self.answered += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
