"""What must stand on the host before vhost in its kernel can serve a guest, and go after it?

vhost-scsi needs a target in configfs (Linux, Documentation/target/tcm_mod_builder.rst and
drivers/vhost/scsi.c), made and removed here. vhost-net's tap is QEMU's and ends with it; it only
gets its address here. All names are made up before anything is made, and saved with the machine:
so whoever takes the machine down, be it after a crash of its owner, knows what to remove.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import random
import secrets
import socket
import struct
import time
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING

from kickcall.errors import LabError
from kickcall.lab.spec import VHOST_NET_PREFIX_LENGTH, VhostNet, VhostScsi, VhostVsock

if TYPE_CHECKING:
    from collections.abc import Callable

    from kickcall.lab.spec import AnyDevice, MachineSpec

_TARGETS = Path("/sys/kernel/config/target")
_NEEDED = {
    VhostScsi: {Path("/dev/vhost-scsi"): "vhost_scsi", _TARGETS: "target_core_mod"},
    VhostNet: {Path("/dev/vhost-net"): "vhost_net", Path("/dev/net/tun"): "tun"},
    VhostVsock: {Path("/dev/vhost-vsock"): "vhost_vsock"},
}
_OTHERWISE = "or use the lab's own KVM host: kickcall lab host run -- COMMAND"
# RFC 6890 has no network for tests that no host routes to; the upper half of 10/8 is rarely used.
_TAPS = IPv4Network("10.128.0.0/9")
_PAGES_PER_MIB = 256
_PATIENCE = 10.0
"""Seconds in which the kernel lets go of what a process used that has ended."""

# linux/sockios.h, linux/if.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8913, 0x8914, 0x8916, 0x891C
_IFF_UP = 1


def check(spec: MachineSpec) -> None:
    """Raise LabError where this host has not what the machine's devices need."""
    for device in spec.devices:
        needed = _NEEDED.get(type(device), {})
        if needed and os.geteuid() != 0:
            raise LabError(f"a {device.kind} device needs root: use sudo, {_OTHERWISE}")
        for path, module in needed.items():
            if not path.exists():
                raise LabError(
                    f"a {device.kind} device needs {path}, which this machine has not: "
                    f"modprobe {module}, {_OTHERWISE}"
                )
        # One that is there is somebody else's, and must not be removed with our machine.
        if isinstance(device, VhostScsi) and device.wwpn and _group(device).parent.exists():
            raise LabError(f"a vhost-scsi target called {device.wwpn} is there: give another name")


def named(spec: MachineSpec) -> MachineSpec:
    """Return the machine with names that nothing else on the host has, where it has none."""
    return dataclasses.replace(spec, devices=tuple(_named(device) for device in spec.devices))


def _named(device: AnyDevice) -> AnyDevice:
    match device:
        case VhostScsi(wwpn=""):
            # NAA 5, and the OUI under which LIO names its own targets.
            return dataclasses.replace(device, wwpn=f"naa.5001405{secrets.randbits(36):09x}")
        case VhostNet():
            tap = device.tap or f"kcl{secrets.token_hex(5)}"
            address = device.address or str(_address())
            return dataclasses.replace(device, tap=tap, address=address)
        case VhostVsock(guest_cid=0):
            # 0 to 2 are taken, 2^32 - 1 is "any" (vsock(7)).
            return dataclasses.replace(device, guest_cid=random.randint(1000, 0x7FFFFFFF))
    return device


def _address() -> IPv4Address:
    length = 32 - VHOST_NET_PREFIX_LENGTH
    network = secrets.randbelow(_TAPS.num_addresses >> length)
    return _TAPS[(network << length) + 1]


def set_up(spec: MachineSpec) -> None:
    """Make the targets of the machine's vhost-scsi devices. Raises LabError."""
    for device in spec.devices:
        if isinstance(device, VhostScsi):
            try:
                _make_target(device)
            except OSError as error:
                raise LabError(
                    f"the target of {device.id} cannot be made at {error.filename}: "
                    f"{error.strerror}"
                ) from error


def take_down(spec: MachineSpec) -> None:
    """Remove the targets again, as far as they are there. Raises LabError for one that stays."""
    for device in spec.devices:
        if isinstance(device, VhostScsi):
            _remove_target(device)


def give_addresses(spec: MachineSpec) -> None:
    """Bring up the taps of the machine's vhost-net devices, once QEMU has made them."""
    for device in spec.devices:
        if isinstance(device, VhostNet):
            try:
                _bring_up(device)
            except OSError as error:
                raise LabError(
                    f"the interface {device.tap} of {device.id} cannot be brought up: "
                    f"{error.strerror}"
                ) from error


def _disk(device: VhostScsi) -> Path:
    # A backstore is in an HBA of its own; its number only has to be unlike any other's.
    return _TARGETS / "core" / f"rd_mcp_{int(device.wwpn[-7:], 16)}" / f"kickcall-{device.id}"


def _group(device: VhostScsi) -> Path:
    return _TARGETS / "vhost" / device.wwpn / "tpgt_1"


def _make_target(device: VhostScsi) -> None:
    disk, group = _disk(device), _group(device)
    for folder in (disk.parent, disk):
        folder.mkdir()
    (disk / "control").write_text(f"rd_pages={device.size_mib * _PAGES_PER_MIB}\n")
    (disk / "enable").write_text("1\n")
    # The kernel makes `lun` with the group.
    group.parent.parent.mkdir(exist_ok=True)
    for folder in (group.parent, group, group / "lun" / "lun_0"):
        folder.mkdir()
    (group / "lun" / "lun_0" / "disk").symlink_to(disk)
    # The initiator, who is not on any wire: the target's own name will do.
    (group / "nexus").write_text(f"{device.wwpn}\n")


def _remove_target(device: VhostScsi) -> None:
    disk, group = _disk(device), _group(device)
    lun = group / "lun" / "lun_0"
    deadline = time.monotonic() + _PATIENCE
    _until_free((lun / "disk").unlink, lun, deadline)
    # The kernel ends no nexus as long as the group has a disk (drivers/vhost/scsi.c,
    # vhost_scsi_drop_nexus).
    _until_free(lambda: (group / "nexus").write_text("NULL\n"), group / "nexus", deadline)
    for folder in (lun, group, group.parent, disk, disk.parent):
        _until_free(folder.rmdir, folder, deadline)


def _until_free(step: Callable[[], object], path: Path, deadline: float) -> None:
    """Take a step that the kernel refuses as long as the ended QEMU's vhost is in use."""
    while True:
        try:
            step()
            return
        except OSError as error:
            # ENODEV: the group has no nexus, because its making was cut short.
            if error.errno in (errno.ENOENT, errno.ENODEV):
                return
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise LabError(f"{path} cannot be removed: {error.strerror}") from error
        time.sleep(0.05)


def _bring_up(device: VhostNet) -> None:
    name = device.tap.encode()
    mask = IPv4Network((0, VHOST_NET_PREFIX_LENGTH)).netmask
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for request, address in (
            (_SIOCSIFADDR, IPv4Address(device.address)),
            (_SIOCSIFNETMASK, mask),
        ):
            # struct ifreq with a sockaddr_in: netdevice(7).
            ifreq = struct.pack("16sHH4s16x", name, socket.AF_INET, 0, address.packed)
            fcntl.ioctl(any_socket, request, ifreq)
        # An interface without IPv6 sends nothing by itself. (Its folder is there once the kernel
        # has let go of the lock under which QEMU makes the interface, and on which the ioctls
        # wait: not before.)
        with contextlib.suppress(FileNotFoundError):
            Path(f"/proc/sys/net/ipv6/conf/{device.tap}/disable_ipv6").write_text("1\n")
        ifreq = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16s24x", name))
        (flags,) = struct.unpack_from("H", ifreq, 16)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", name, flags | _IFF_UP))
