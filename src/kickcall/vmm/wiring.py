"""Where is each queue's doorbell, and which message is its interrupt, as QEMU and the guest say?

The doorbell of a queue is where the driver's kick is written to: in the notify BAR at the queue's
notify offset times the multiplier (virtio 1.4, 4.1.4.4), which in QEMU are the queue's number and
4, or 4096 with `page-per-vq` (hw/virtio/virtio-pci.c, virtio_pci_queue_mem_mult); and for a
transitional device in the legacy registers, too. The message is the queue's entry of the MSI-X
table. A virtio-mmio device has one doorbell for all queues, and a line in place of messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kickcall.errors import KickcallError, QmpCommandError
from kickcall.vmm import interrupts, mmio_transport
from kickcall.vmm.pci import LEGACY_QUEUE_NOTIFY

if TYPE_CHECKING:
    from kickcall.vmm.interrupts import Region
    from kickcall.vmm.monitor import Monitor
    from kickcall.vmm.session import MappedDevice, VmmSession

_MULTIPLIER, _PAGE_PER_QUEUE = 4, 4096
_WRITE = 2
"""Bytes of a kick: the queue's number as a u16 (virtio 1.4, 4.1.5.2)."""
_WORDS_AT_ONCE = 128
_TABLE_MAX = 2048


@dataclass(frozen=True, slots=True)
class Doorbell:
    """A write of the guest that is a kick."""

    bus: str
    """`mmio` or `pio`."""
    address: int
    lengths: tuple[int, ...]
    """How many bytes KVM may have been told that the write has; 0 is any."""
    datamatch: int | None
    """The value that tells the queue, where all queues have one register; None otherwise."""


@dataclass(frozen=True, slots=True)
class Message:
    """An entry of the MSI-X table."""

    vector: int
    address: int
    data: int
    masked: bool


@dataclass(frozen=True, slots=True)
class QueueWiring:
    """What a queue's notifiers are, and what they have to be connected with."""

    device: str
    """QOM path."""
    id: str
    queue: int
    kick: int | None
    """The kick notifier's eventfd id; None where the queue has none."""
    call: int | None
    doorbells: tuple[Doorbell, ...]
    no_doorbell: str
    """Why no doorbell is known."""
    message: Message | None
    no_message: str
    """Why the queue's interrupt is no message, or which is not known."""


def wiring(session: VmmSession, monitor: Monitor) -> tuple[QueueWiring, ...]:
    """Return the wiring of every queue that is mapped, as it is now."""
    memory, ports = device_views(monitor)
    found: list[QueueWiring] = []
    for mapped in session.devices:
        if mapped.array is not None and mapped.device.driver_ok:
            found.extend(wiring_of(session, monitor, mapped, memory, ports))
    return tuple(found)


def device_views(monitor: Monitor) -> tuple[list[Region], list[Region]]:
    """Return what is where in memory and among the I/O ports, as the processors see it."""
    told = monitor.hmp("info mtree -f")
    return interrupts.flat_view(told, "memory"), interrupts.flat_view(told, "I/O")


def wiring_of(
    session: VmmSession,
    monitor: Monitor,
    mapped: MappedDevice,
    memory: list[Region],
    ports: list[Region],
) -> list[QueueWiring]:
    """Return the wiring of a device's queues that are mapped, by those views."""
    function = interrupts.pci_function(monitor, mapped)
    table, no_table = _table(monitor, function, memory)
    notify = None if function is None else _notify_region(function, memory)
    legacy = None if function is None else _legacy_port(function, ports)
    multiplier = _multiplier(monitor, mapped) if notify is not None else 0
    registers: int | str = "on PCI"
    if function is None:
        registers = mmio_transport.registers_at(monitor, mapped, memory)
        if isinstance(registers, int):
            no_table = "its interrupt is a line that all its queues share (virtio-mmio)"
    found = []
    for number in range(mapped.device.num_queues):
        try:
            queue = mapped.queue_map(number)
        except KickcallError:  # the driver does not use it
            continue
        doorbells = []
        if notify is not None and notify.start + number * multiplier < notify.end:
            # Length 0 where KVM takes any (KVM_CAP_IOEVENTFD_ANY_LENGTH; virtio-pci.c, `fast_mmio`)
            at = notify.start + number * multiplier
            doorbells.append(Doorbell("mmio", at, (0, _WRITE), None))
        if legacy is not None:
            doorbells.append(Doorbell("pio", legacy, (_WRITE,), number))
        if isinstance(registers, int):
            # hw/virtio/virtio-mmio.c, virtio_mmio_ioeventfd_assign
            at = registers + mmio_transport.QUEUE_NOTIFY
            doorbells.append(Doorbell("mmio", at, (4,), number))
        vector = interrupts.queue_vector(session, mapped, number)
        message, no_message = _message(table, no_table, vector)
        found.append(
            QueueWiring(
                device=mapped.device.path,
                id=mapped.device.id,
                queue=number,
                kick=queue.kick.eventfd_id if queue.kick else None,
                call=queue.call.eventfd_id if queue.call else None,
                doorbells=tuple(doorbells),
                no_doorbell=""
                if doorbells
                else "its doorbell is not known (not on PCI, or its BARs are not mapped)",
                message=message,
                no_message=no_message,
            )
        )
    return found


def _notify_region(function: dict[str, Any], memory: list[Region]) -> Region | None:
    """Return the region `virtio-pci-notify-TYPE` of the device (before 5.2 without the type)."""
    for bar in function["regions"]:
        if bar["type"] == "memory" and bar["address"] > 0:
            start, end = bar["address"], bar["address"] + bar["size"] - 1
            for region in memory:
                if start <= region.start <= region.end <= end and (
                    region.name.startswith("virtio-pci-notify")
                    and not region.name.startswith("virtio-pci-notify-pio")
                ):
                    return region
    return None


def _legacy_port(function: dict[str, Any], ports: list[Region]) -> int | None:
    """Return the port of Queue Notify; None where the device has no legacy registers mapped."""
    for bar in function["regions"]:
        if bar["bar"] == 0 and bar["type"] == "io" and bar["address"] > 0:
            for region in ports:
                if region.start == bar["address"] and region.name == "virtio-pci":
                    return int(bar["address"]) + LEGACY_QUEUE_NOTIFY
    return None


def _multiplier(monitor: Monitor, mapped: MappedDevice) -> int:
    asked = {"path": mapped.device.path, "property": "page-per-vq"}
    try:
        return _PAGE_PER_QUEUE if monitor.execute("qom-get", asked) else _MULTIPLIER
    except QmpCommandError:
        return _MULTIPLIER


def _table(
    monitor: Monitor, function: dict[str, Any] | None, memory: list[Region]
) -> tuple[list[Message], str]:
    """Return the device's MSI-X table, or none and why."""
    if function is None:
        return [], "its interrupts are not known (not on PCI)"
    command, head = interrupts.read_configuration(monitor, function, memory)
    if command is not None and not (head or 0) & interrupts.MSIX_ENABLE:
        return [], "it has INTx: MSI-X is not enabled"
    if (head or 0) & interrupts.MSIX_MASKALL:
        return [], "MSI-X is masked for the whole device"
    region = interrupts.region_in_bars(function, memory, "msix-table")
    if region is None:
        return [], "it has INTx: its MSI-X table is not mapped"
    messages = read_table(monitor, region)
    return (messages, "") if messages is not None else ([], "its MSI-X table could not be read")


def read_table(monitor: Monitor, region: Region) -> list[Message] | None:
    """Return every entry of the MSI-X table in `region`; None where it cannot be read."""
    size = region.end + 1 - region.start
    count = min(size // interrupts.MSIX_ENTRY_SIZE, _TABLE_MAX) * 4
    words: list[int] = []
    while len(words) < count:
        at = region.start + 4 * len(words)
        more = interrupts.read_words(monitor, at, min(_WORDS_AT_ONCE, count - len(words)))
        if more is None:
            return None
        words.extend(more)
    return [
        Message(
            number,
            words[4 * number + 1] << 32 | words[4 * number],
            words[4 * number + 2],
            bool(words[4 * number + 3] & interrupts.MSIX_ENTRY_MASKED),
        )
        for number in range(len(words) // 4)
    ]


def _message(table: list[Message], no_table: str, vector: int | None) -> tuple[Message | None, str]:
    if no_table:
        return None, no_table
    if vector is None:
        return None, "the driver gave it no vector, or QEMU's record of it could not be proved"
    if vector >= len(table):
        return None, f"its vector {vector} is not in the MSI-X table"
    return table[vector], ""
