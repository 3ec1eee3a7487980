"""A mapped machine: what was proved about it, kept, and re-checked before every use."""

from __future__ import annotations

import os
import re
import struct
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self, TypeVar

from kickcall.errors import (
    DeviceNotFoundError,
    KickcallError,
    MachineGoneError,
    MapError,
    MonitorGoneError,
    QueueNotFoundError,
    QueueNotReadyError,
    StaleMapError,
)
from kickcall.host import eventfds, memory
from kickcall.host.processes import Process
from kickcall.model import BackendKind, DeviceEvent, Layout, Notifier, QueueMap
from kickcall.vmm import layout as layouts
from kickcall.vmm import notifiers, symbols, virtio
from kickcall.vmm.guest_memory import GuestMemory, read_guest_memory
from kickcall.vmm.monitor import CONNECT_TIMEOUT
from kickcall.vmm.pci_devices import MappedPci, list_pci_devices

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.model import Device, Machine
    from kickcall.vmm.layout import Slot
    from kickcall.vmm.monitor import BorrowMonitor, Monitor

_IOMMU = re.compile(r"\b(intel-iommu|amd-iommu|virtio-iommu|smmuv3|riscv-iommu)")
_ENDING_S = 0.2
"""Seconds that a process which closed its monitor is given to end."""
_MAPPING_TRIES = 3
"""How often a device is asked for again whose queues changed between two questions."""


@dataclass(frozen=True, slots=True)
class MappedDevice:
    """One device with the array of its queues, or the reason why that was refused."""

    facts: virtio.DeviceFacts
    array: notifiers.QueueArray | None
    refusal: str = ""

    @property
    def device(self) -> Device:
        """What the monitor says of the device."""
        return self.facts.device

    def queue_map(self, queue: int) -> QueueMap:
        """Return the proved map of queue number `queue`.

        Raises QueueNotFoundError, QueueNotReadyError or MapError with the reason.
        """
        device = self.device
        if not 0 <= queue < device.num_queues:
            raise QueueNotFoundError(
                f"{device.id} has no queue {queue}: its queues are 0 to {device.num_queues - 1}"
            )
        if not device.driver_ok:
            raise QueueNotReadyError(
                f"{device.id}: no driver in the guest has set this device up (no DRIVER_OK)"
            )
        if self.array is None:
            if queue not in self.facts.queues:
                raise QueueNotReadyError(
                    self.refusal or f"{device.id}: the driver never set queue {queue} up"
                )
            raise MapError(self.refusal)
        element = self.array.elements[queue]
        if not element.rings.desc:
            raise QueueNotReadyError(f"{device.id}: the driver never set queue {queue} up")
        return QueueMap(
            index=queue,
            rings=element.rings,
            layout=device.layout,
            kick=self._notifier(element.kick),
            call=self._notifier(element.call),
            virtqueue_address=self.array.element_address(queue),
        )

    def _notifier(self, slot: Slot) -> Notifier | None:
        assert self.array is not None
        if not slot.initialized:
            return None
        return Notifier(slot.rfd, self.array.eventfd_ids[slot.rfd])


_M = TypeVar("_M", MappedDevice, MappedPci)


class VmmSession:
    """One VMM process, mapped once. Holds a pidfd and no monitor.

    Raises the errors of `borrow` and MapError where guest memory cannot be found.
    """

    def __init__(
        self,
        machine: Machine,
        borrow: BorrowMonitor,
        *,
        monitor_is_ours: bool = False,
        timeout: float = CONNECT_TIMEOUT,
    ) -> None:
        self.machine = machine
        self._borrow = borrow
        self._timeout = timeout
        self.monitor_is_ours = monitor_is_ours
        """The monitor is a `kickcall qmp`, not the VMM's own."""
        self.has_iommu = any(_IOMMU.search(argument) for argument in machine.command)
        """Whether the machine has a virtual IOMMU: then ring addresses may be virtual."""
        self.process = Process(machine.pid)
        self._duplicates: dict[int, int] = {}
        try:
            if self.process.start_time != machine.start_time:
                raise MachineGoneError(f"process {machine.pid} ended, and its pid is another's now")
            self.refresh()
        except BaseException:
            self.process.close()
            raise

    @contextmanager
    def borrow(self, timeout: float | None = None) -> Iterator[Monitor]:
        """Open a monitor of the machine for as long as the block lasts.

        Waits for one for `timeout` seconds (None: as long as was said when it was attached to).
        Raises the errors of `vmm.monitor.borrow`, and MachineGoneError where it went away with the
        machine.
        """
        try:
            with self._borrow(self._timeout if timeout is None else timeout) as monitor:
                yield monitor
        except MonitorGoneError:
            # The sockets of a killed process are closed a little before it has ended.
            self.process.check_alive(_ENDING_S)
            raise

    def refresh(self) -> None:
        """Map the machine anew, as after a reboot."""
        self.process.check_alive()
        self._forget_duplicates()
        with self.borrow() as monitor:
            status = monitor.execute("query-status")
            self.run_state = str(status["status"])
            self.running = bool(status["running"])
            version = monitor.execute("query-version")
            self._commands = {entry["name"] for entry in monitor.execute("query-commands")}
            self.machine = replace(self.machine, version=_version(version))
            self.memory: GuestMemory = read_guest_memory(monitor)
            self.devices = self._map(monitor)
            self._positions_proved = self._prove_positions(monitor)

    def device_at(self, path: str) -> MappedDevice:
        """Return the device with that QOM path, as it is mapped now. Raises DeviceNotFoundError."""
        for mapped in self.devices:
            if mapped.device.path == path:
                return mapped
        raise DeviceNotFoundError(f"{self.machine.name} has no device {path} any more")

    def pci_devices(self) -> tuple[MappedPci, ...]:
        """Return every PCI device that is no virtio device, by QOM path, as it is now."""
        virtio_paths = {mapped.device.path for mapped in self.devices}
        with self.borrow() as monitor:
            found = list_pci_devices(monitor)
        return tuple(
            one
            for one in found
            # One that was plugged in since the machine was mapped is a virtio device, too.
            if one.device.path not in virtio_paths
            and not one.device.kind.startswith(("virtio-", "vhost-"))
        )

    def again(self, mapped: _M) -> _M:
        """Return the same device as it is mapped now. Raises DeviceNotFoundError."""
        path = mapped.device.path
        if isinstance(mapped, MappedDevice):
            return self.device_at(path)
        for found in self.pci_devices():
            if found.device.path == path:
                return found
        raise DeviceNotFoundError(f"{self.machine.name} has no device {path} any more")

    def has_command(self, name: str) -> bool:
        """Tell whether the monitor knows the QMP command `name`."""
        return name in self._commands

    def _prove_positions(self, monitor: Monitor) -> bool:
        """Tell whether QEMU's record of a device's progress is where `parse_positions` reads it.

        The monitor's answer must lie between two readings, for the queue that has moved most: a
        place that holds anything else would not.
        """
        best: tuple[int, MappedDevice, int] | None = None
        for device in self.devices:
            for number, facts in device.facts.queues.items():
                moved = facts.positions.last_avail_idx if facts.positions else 0
                if device.array is not None and moved > (best[0] if best else 0):
                    best = (moved, device, number)
        if best is None:
            return False
        _, device, number = best
        for _ in range(_MAPPING_TRIES):
            before = self._read_positions(device, number)
            told = virtio.ask_positions(monitor, device.facts, number)
            after = self._read_positions(device, number)
            if before is None or told is None or after is None:
                return False
            num = 1 << 16
            if device.device.layout is Layout.PACKED:
                num = device.facts.queues[number].rings.num
            if (
                all(
                    (now - start) % num <= (end - start) % num
                    for start, now, end in (
                        (before.last_avail_idx, told.last_avail_idx, after.last_avail_idx),
                        (before.used_idx, told.used_idx, after.used_idx),
                    )
                )
                and (after.last_avail_idx - before.last_avail_idx) % num <= num // 4
            ):
                return True
        return False

    def _position_range(self, device: MappedDevice, queue: int) -> tuple[int, int]:
        assert device.array is not None
        index = device.array.element_address(queue) + device.array.layout.index
        return index - layouts.POSITIONS_BEFORE_INDEX, layouts.POSITIONS_SIZE

    def _read_positions(self, device: MappedDevice, queue: int) -> layouts.StoredPositions | None:
        where = self._position_range(device, queue)
        return layouts.parse_positions(memory.read(self.process.pid, *where))

    def position_ranges(self, device: MappedDevice, queue: QueueMap) -> list[tuple[int, int]]:
        """Return the (address, length) of QEMU's own position in the queue, if that means anything.

        For a queue that vhost serves QEMU's record is stale (none is returned), and so it is as
        long as it could not be proved to be where it is expected.
        """
        if device.device.backend is not BackendKind.QEMU or not self._positions_proved:
            return []
        return [self._position_range(device, queue.index)]

    def _map(self, monitor: Monitor) -> tuple[MappedDevice, ...]:
        ram = [(run.hva, run.hva + run.length) for run in self.memory.ranges]
        exact = symbols.virtqueue_layout(self.machine.pid)
        mapped: dict[str, MappedDevice] = {}
        pending = virtio.list_devices(monitor)
        for attempt in range(_MAPPING_TRIES):
            told = [
                facts
                for path in pending
                if (facts := virtio.read_device(monitor, path)) is not None
            ]
            arrays = notifiers.find_arrays(self.machine.pid, told, ram, exact)
            pending = []
            for facts in told:
                array = arrays.get(facts.backend_path)
                if isinstance(array, notifiers.QueueArray):
                    mapped[facts.backend_path] = MappedDevice(facts, array)
                else:
                    mapped[facts.backend_path] = MappedDevice(
                        facts, None, str(array) if array else self._unknown(facts)
                    )
                    if array is not None and self.running and attempt < _MAPPING_TRIES - 1:
                        pending.append(facts.backend_path)
            if not pending:
                break
        return tuple(mapped[path] for path in sorted(mapped))

    def _unknown(self, facts: virtio.DeviceFacts) -> str:
        """Return why no queue of the device could be asked for."""
        device = facts.device
        if not device.driver_ok:
            return f"{device.id}: no driver in the guest has set this device up (no DRIVER_OK)"
        if facts.queues:
            return ""
        if not self.running and device.backend is not BackendKind.QEMU:
            return (
                f"{device.id} ({device.kind}): {self.machine.name} is not running "
                f"(QEMU: {self.run_state}), and its back-end has its queues only while it does"
            )
        return (
            f"{device.id} ({device.kind}): its back-end has not started, or is of a kind that "
            "cannot be asked for its rings without touching it"
        )

    def verify(self, device: MappedDevice, queue: QueueMap, event: DeviceEvent) -> None:
        """Check that `queue`, and its notifier for `event`, are still what was mapped.

        Raises StaleMapError, MachineGoneError or, where the machine is paused, QueueNotReadyError.
        """
        self.process.check_alive()
        reason = self._difference(device, queue, event)
        if reason is not None:
            raise self._refusal(device, queue, reason)

    def _refusal(
        self, device: MappedDevice, queue: QueueMap, reason: str
    ) -> StaleMapError | QueueNotReadyError:
        """Return the error for a queue that is not what was mapped. Raises MachineGoneError."""
        self.process.check_alive()
        if (paused := self._paused()) is not None:
            return QueueNotReadyError(f"{self.machine.name} is {paused}: nothing was written")
        return StaleMapError(
            f"queue {queue.index} of {device.device.id} is not what was mapped: {reason}; nothing "
            "was written (the guest rebooted, reset or lost the device, or was paused: map the "
            "machine again)"
        )

    def _difference(self, device: MappedDevice, queue: QueueMap, event: DeviceEvent) -> str | None:
        array = device.array
        assert array is not None
        pid = self.process.pid
        raw, back = memory.read_many(
            pid,
            [
                (array.element_address(queue.index), array.layout.stride),
                (array.owner + array.layout.owner_vq, 8),
            ],
        )
        if raw is None or back is None:
            return "QEMU's record of it is gone"
        if back != struct.pack("<Q", array.address):
            return "QEMU's device has another array of queues"
        now = layouts.decode(array.layout, raw)
        was = array.elements[queue.index]
        if now.rings != was.rings:
            return "its rings were set up anew" if now.rings.desc else "it was reset"
        if (now.owner, now.index) != (was.owner, was.index):
            return "QEMU's record of it belongs to another device"
        if now.kick != was.kick or now.call != was.call:
            return "its notifiers were replaced"
        notifier = queue.kick if event is DeviceEvent.KICK else queue.call
        if notifier is not None:
            state = eventfds.read_eventfd(pid, notifier.fd)
            if state is None or state.eventfd_id != notifier.eventfd_id:
                return f"its {event} notifier (fd {notifier.fd}) is another file now"
        return None

    def check_running(self, monitor: Monitor | None = None) -> None:
        """Raise QueueNotReadyError where the machine does not run, so far as is known unasked.

        `monitor`, where one is borrowed anyway, is asked. A machine that was mapped while it was
        paused and runs by now raises StaleMapError: it has other notifiers.
        """
        paused = None
        if not self.running:
            paused = self._paused()
            if paused is None:
                raise StaleMapError(
                    f"{self.machine.name} was not running when it was mapped (QEMU: "
                    f"{self.run_state}): nothing was written; map the machine again"
                )
        elif monitor is not None:
            paused = _not_running(monitor)
        if paused is not None:
            raise QueueNotReadyError(f"{self.machine.name} is {paused}: nothing was written")

    def _paused(self) -> str | None:
        """Return the run state if the machine does not run; None if it does, or cannot be asked."""
        try:
            with self.borrow() as monitor:
                return _not_running(monitor)
        except KickcallError:
            return None

    def hold(self, device: MappedDevice, queue: QueueMap, notifier: Notifier) -> int:
        """Return our own descriptor of `notifier`, a queue's own, checked to be that eventfd.

        It is kept until the session is refreshed or closed: as long as it is open the kernel cannot
        give its eventfd id to another one. Raises StaleMapError where the VMM's descriptor is
        another file by now.
        """
        ours = self._duplicates.get(notifier.eventfd_id)
        if ours is not None:
            return ours
        which = f"fd {notifier.fd} of process {self.process.pid}"
        try:
            ours = self.process.duplicate_fd(notifier.fd)
        except OSError as exc:
            raise self._refusal(device, queue, f"{which} is closed") from exc
        state = eventfds.read_eventfd(os.getpid(), ours)
        if state is None or state.eventfd_id != notifier.eventfd_id:
            os.close(ours)
            raise self._refusal(
                device, queue, f"{which} is no longer eventfd {notifier.eventfd_id}"
            )
        self._duplicates[notifier.eventfd_id] = ours
        return ours

    def _forget_duplicates(self) -> None:
        for fd in self._duplicates.values():
            os.close(fd)
        self._duplicates.clear()

    def close(self) -> None:
        """Let go of the process and of every duplicated notifier."""
        self._forget_duplicates()
        self.process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _not_running(monitor: Monitor) -> str | None:
    status = monitor.execute("query-status")
    return None if status["running"] else f"not running (QEMU: {status['status']})"


def _version(answer: dict[str, dict[str, int] | str]) -> str:
    numbers = answer["qemu"]
    assert isinstance(numbers, dict)
    package = str(answer.get("package", ""))
    text = f"{numbers['major']}.{numbers['minor']}.{numbers['micro']}"
    return f"{text} ({package})" if package else text
