"""Which interrupts and disks has each device in the guest? (Linux's /proc and /sys, read)"""

from __future__ import annotations

import re
from collections import Counter


def parse_interrupts(listing: str, address: str) -> dict[str, int]:
    """Return the counts of a virtio device's interrupts, summed over CPUs, by the driver's name.

    `listing` is /proc/interrupts with `ls -l /sys/bus/virtio/devices`; the device is the one that
    sysfs calls `address` (as `0000:00:02.0`), or behind the bridge there. Names that repeat
    (virtio-scsi calls each of its request queues `request`) are numbered. A line that all queues
    share (INTx, virtio-mmio) is called `intx`.
    """
    device = re.search(rf"/{re.escape(address)}/(?:\S*/)?(virtio\d+)$", listing, re.MULTILINE)
    if device is None:
        return {}
    found: list[tuple[str, int]] = []
    for line in listing.splitlines():
        words = line.split()
        if len(words) < 3 or not re.fullmatch(r"\d+:", words[0]):
            continue
        counts = 0
        for word in words[1:]:
            if not word.isdigit():
                break
            counts += int(word)
        # A shared line ends with several names, comma separated.
        actions = re.findall(rf"\b{device[1]}\b(?:-([\w.]+))?", line)
        found.extend((action or "intx", counts) for action in actions)
    times = Counter(name for name, _ in found)
    numbers: Counter[str] = Counter()
    result: dict[str, int] = {}
    for name, count in found:
        if times[name] > 1 or name == "request":
            numbers[name] += 1
            name = f"{name}.{numbers[name] - 1}"
        result[name] = count
    return result


def parse_disks(listing: str, address: str) -> list[str]:
    """Return the disks behind the device that sysfs calls `address`, from `ls -l /sys/block`."""
    return re.findall(rf"/{re.escape(address)}/\S*/block/(\w+)$", listing, re.MULTILINE)
