"""Who waits for whom on a queue: what the number of a queue means for each kind of device.

From the queue numbering in the virtio specification (1.4, chapter 5), and from what Linux's drivers
do with each queue. What is not listed is an inbox on which calls may be off: then nothing that
waits there is ever taken for a stall.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kickcall.diagnose.states import QueueRole

if TYPE_CHECKING:
    from kickcall.model import Device


class Use(NamedTuple):
    """How a queue is used."""

    role: QueueRole
    calls_when_idle: bool
    """The driver keeps its calls on while it is idle, and reaps when it is called."""


REQUEST = Use(QueueRole.REQUEST, True)
LAZY = Use(QueueRole.REQUEST, False)
"""The driver asks, and reaps when it gets around to it, or polls."""
INBOX = Use(QueueRole.INBOX, True)
UNKNOWN = Use(QueueRole.INBOX, False)


_BY_NUMBER: dict[str, tuple[tuple[Use, ...], Use]] = {
    # kind: (uses of queues 0, 1, …), use of all that follow
    "blk": ((), REQUEST),  # 5.2.2: requestq1 …
    "scsi": ((REQUEST, INBOX), REQUEST),  # 5.6.2: controlq, eventq, requestq …
    # 5.5.2: inflateq, deflateq, statsq (the device keeps the driver's buffer until it wants to
    # know more, 5.5.6.3), free_page_vq (without a callback in Linux) and reporting_vq.
    "balloon": ((REQUEST, REQUEST, UNKNOWN), UNKNOWN),
    # 5.4.2: the driver keeps a buffer with the device, whose rate may be limited (QEMU's
    # max-bytes and period): a full second without an answer is then as it should be.
    "rng": ((INBOX,), UNKNOWN),
    "input": ((INBOX, REQUEST), UNKNOWN),  # 5.8.2: eventq, statusq
    "vsock": ((INBOX, REQUEST, INBOX), UNKNOWN),  # 5.10.2: rx, tx, event
    "fs": ((), REQUEST),  # 5.11.2: hiprio, notification queue (not in Linux), request …
    "gpu": ((REQUEST, REQUEST), UNKNOWN),  # 5.7.2: controlq, cursorq
    # 5.14.2: controlq, eventq, txq, rxq. PCM buffers stay with the device as long as they sound.
    "sound": ((REQUEST, INBOX), UNKNOWN),
    "9p": ((), REQUEST),
    "pmem": ((REQUEST,), UNKNOWN),  # 5.19.2
    "mem": ((REQUEST,), UNKNOWN),  # 5.15.2
    # 5.13.2: requestq (Linux polls it with calls off), eventq
    "iommu": ((LAZY, INBOX), UNKNOWN),
    "i2c": ((REQUEST,), UNKNOWN),  # 5.17.2
    "gpio": ((REQUEST, UNKNOWN), UNKNOWN),  # 5.18.2: requestq; eventq waits for an interrupt
}
_ALIASES = {
    "keyboard": "input",
    "mouse": "input",
    "tablet": "input",
    "multitouch": "input",
    "snd": "sound",
}


def use_of(device: Device, queue: int) -> Use:
    """Return how the driver uses queue number `queue` of `device`."""
    kind = _subject(device.kind)
    if kind == "net":
        return _net(device, queue)
    if kind == "crypto":
        # 5.9.2: dataq1 …, controlq last.
        return LAZY if queue == device.num_queues - 1 else REQUEST
    if kind == "serial":
        return _serial(queue)
    first, rest = _BY_NUMBER.get(kind, ((), UNKNOWN))
    return first[queue] if queue < len(first) else rest


def _subject(kind: str) -> str:
    """Return what a QOM type is about: `blk` of virtio-blk-device and of vhost-user-blk."""
    words = [
        word
        for word in kind.split("-")
        if word
        not in ("virtio", "vhost", "user", "vdpa", "device", "host", "base", "gl", "rutabaga")
    ]
    return _ALIASES.get(words[0], words[0]) if words else ""


def _net(device: Device, queue: int) -> Use:
    """5.1.2: receiveq1, transmitq1, … and the control queue last, where it was offered.

    Linux takes completed transmissions back when it sends more (drivers/net/virtio_net.c,
    start_xmit), and polls the control queue.
    """
    if queue == device.num_queues - 1 and device.num_queues % 2:
        return LAZY
    return LAZY if queue % 2 else INBOX


def _serial(queue: int) -> Use:
    """5.3.2: of each port a receiveq (even) and a transmitq (odd); queues 2 and 3 are control.

    Linux takes what it sent back when it sends more (drivers/char/virtio_console.c,
    reclaim_consumed_buffers).
    """
    return LAZY if queue % 2 else INBOX
