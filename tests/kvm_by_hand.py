"""A virtual machine that never runs, made by ioctls: all that the kernel has of it is known.

`python tests/kvm_by_hand.py -name guest=NAME` makes it, prints the ids of its eventfds as JSON, and
holds it until it is killed. Needs root, /dev/kvm and /dev/vhost-vsock.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import signal
import struct
from pathlib import Path

# include/uapi/linux/kvm.h
KVM_CREATE_VM, KVM_CREATE_IRQCHIP = 0xAE01, 0xAE60
KVM_SET_GSI_ROUTING, KVM_IRQFD, KVM_IOEVENTFD = 0x4008AE6A, 0x4020AE76, 0x4040AE79
KVM_IRQ_ROUTING_MSI = 2
DATAMATCH, PIO = 1, 2
# include/uapi/linux/vhost.h
VHOST_SET_OWNER, VHOST_SET_VRING_NUM, VHOST_SET_VRING_ADDR = 0xAF01, 0x4008AF10, 0x4028AF11
VHOST_SET_VRING_BASE, VHOST_SET_VRING_KICK = 0x4008AF12, 0x4008AF20
VHOST_SET_VRING_CALL = 0x4008AF21

MMIO, PORT, GSI = 0xFEBE3004, 0xC190, 30
MSI_ADDRESS, MSI_DATA = 0xFEE01000, 0x4025
COUNT, CALLS = 30, 2
QUEUE, NUM, LAST_AVAIL = 1, 128, 41
AVAIL_IDX, USED_IDX = 42, 40
"""The driver is one ahead of what vhost fetched: as after a lost kick."""


def main() -> None:
    """Make the machine, tell its eventfds, and wait."""
    kick, call = os.eventfd(COUNT), os.eventfd(CALLS)
    machine = fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), KVM_CREATE_VM, 0)
    fcntl.ioctl(machine, KVM_CREATE_IRQCHIP, 0)
    route = struct.pack("=4I", GSI, KVM_IRQ_ROUTING_MSI, 0, 0)
    route += struct.pack("=3I20x", MSI_ADDRESS, 0, MSI_DATA)
    fcntl.ioctl(machine, KVM_SET_GSI_ROUTING, struct.pack("=2I", 1, 0) + route)
    for address, length, value, flags in ((MMIO, 0, 0, 0), (PORT, 2, QUEUE, DATAMATCH | PIO)):
        asked = struct.pack("=QQIiI36x", value, address, length, kick, flags)
        fcntl.ioctl(machine, KVM_IOEVENTFD, asked)
    fcntl.ioctl(machine, KVM_IRQFD, struct.pack("=IIII16x", call, GSI, 0, 0))

    rings = mmap.mmap(-1, 3 * 4096)
    desc = ctypes.addressof(ctypes.c_char.from_buffer(rings))
    avail, used = desc + 4096, desc + 8192
    rings[4096:4100] = struct.pack("<HH", 0, AVAIL_IDX)
    rings[8192:8196] = struct.pack("<HH", 0, USED_IDX)
    vhost = os.open("/dev/vhost-vsock", os.O_RDWR)
    fcntl.ioctl(vhost, VHOST_SET_OWNER, 0)
    for request, value in (
        (VHOST_SET_VRING_NUM, NUM),
        (VHOST_SET_VRING_BASE, LAST_AVAIL),
        (VHOST_SET_VRING_KICK, kick),
        (VHOST_SET_VRING_CALL, call),
    ):
        fcntl.ioctl(vhost, request, struct.pack("=Ii", QUEUE, value))
    rings_at = struct.pack("=IIQQQQ", QUEUE, 0, desc, used, avail, 0)
    fcntl.ioctl(vhost, VHOST_SET_VRING_ADDR, rings_at)
    print(
        json.dumps({"pid": os.getpid(), "kick": _id(kick), "call": _id(call), "vhost": vhost}),
        flush=True,
    )
    signal.pause()


def _id(fd: int) -> int:
    text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    return int(text.split("eventfd-id:")[1].split()[0])


if __name__ == "__main__":
    main()
