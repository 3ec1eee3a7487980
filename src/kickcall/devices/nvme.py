"""NVMe controllers as QEMU has them (hw/nvme/ctrl.c): queue N is submission and completion queue N.

A call is the message of the vector that the driver gave completion queue N. A kick is a write to
the tail doorbell of submission queue N. Whoever writes that has to know the tail, and only the
driver does; unless it uses shadow doorbells (NVMe 1.3, 5.7): then the tail stands in memory, and
QEMU takes it from there.
"""

from __future__ import annotations

import os
import struct
from functools import cached_property, partial
from typing import TYPE_CHECKING

from kickcall.devices.base import Way
from kickcall.devices.pci import PciClass, message_write
from kickcall.errors import QueueNotFoundError, QueueNotReadyError, StaleMapError
from kickcall.host import eventfds, memory
from kickcall.model import Counters, DeviceEvent, PciDevice, Via
from kickcall.vmm import nvme
from kickcall.vmm.interrupts import region_in_bars
from kickcall.vmm.pause import Check, RegisterWrite

if TYPE_CHECKING:
    from kickcall.devices.base import Offer
    from kickcall.model import AnyDevice, Notifier
    from kickcall.vmm.nvme import Completion, Queues, Submission

_NO_SHADOW = (
    "a kick writes the queue's tail, which only the driver knows: it uses no shadow doorbells "
    "(NVMe 1.3; QEMU 7.1)"
)


class Nvme(PciClass):
    """Queue 0 is the pair of admin queues. Linux has a pair of I/O queues for each processor."""

    name = "NVMe"
    priority = 0

    @classmethod
    def claims(cls, device: AnyDevice) -> bool:
        """Claim QEMU's own controller."""
        return isinstance(device, PciDevice) and device.kind == "nvme"

    @cached_property
    def base(self) -> int | None:
        """Where the registers are in memory; None while the guest has not mapped them."""
        found = region_in_bars(self.view.function, self.view.memory, "nvme")
        return None if found is None else found.start

    @cached_property
    def found(self) -> Queues | str:
        """QEMU's record of the queues, or why it is not known."""
        if self.base is None:
            return "its registers are not mapped"
        with self.session.borrow() as monitor:
            return nvme.queues_of(self.session, monitor, self.mapped, self.base)

    def _queues(self) -> Queues:
        """Return the queues. Raises QueueNotReadyError where they are not known."""
        if isinstance(self.found, str):
            raise QueueNotReadyError(f"{self.mapped.device.id}: {self.found}")
        return self.found

    def queues(self) -> dict[int, str]:
        """Return the pairs of queues that the driver made."""
        if isinstance(self.found, str):
            return {}
        numbers = sorted({*self.found.submissions, *self.found.completions})
        return {number: "I/O" if number else "admin" for number in numbers}

    def ways(self, event: DeviceEvent, queue: int) -> dict[Via, Offer]:
        """The vector's message; the doorbell's eventfd, or the doorbell itself."""
        known = self._queues()
        identity = self.mapped.device.id
        has: dict[int, Submission] | dict[int, Completion]
        has = known.submissions if event is DeviceEvent.KICK else known.completions
        if queue not in has:
            kind = "submission" if event is DeviceEvent.KICK else "completion"
            raise QueueNotFoundError(
                f"{identity} has no {kind} queue {queue}: it has "
                + (", ".join(map(str, sorted(has))) or "none")
            )
        if event is DeviceEvent.CALL:
            return {Via.MMIO: partial(self._call, known.completions[queue])}
        submission = known.submissions[queue]
        return {
            Via.EVENTFD: partial(self._signal, submission),
            Via.MMIO: partial(self._ring, submission),
        }

    def _call(self, queue: Completion) -> Way | str:
        """Send the message of the completion queue's vector."""
        if not queue.interrupts:
            return "the driver polls this completion queue, and asked for no interrupts"
        found = message_write(self.view, queue.vector, self.session.machine.command)
        if isinstance(found, str):
            return found
        return self._checked(self.register(*found), queue)

    def _signal(self, queue: Submission) -> Way | str:
        """Signal what the doorbell signals: QEMU then takes the tail from the shadow doorbell."""
        notifier = queue.notifier
        if notifier is None:
            return "its doorbell has no eventfd (QEMU 7.2 has one with ioeventfd=on)"
        if not queue.shadow:
            return _NO_SHADOW
        return Way(
            f"eventfd {notifier.eventfd_id} (fd {notifier.fd} of process "
            f"{self.session.process.pid})",
            partial(self._write_eventfd, notifier),
            partial(self._counters, notifier),
            notifier.eventfd_id,
            check=partial(self._check, queue),
        )

    def _ring(self, queue: Submission) -> Way | str:
        """Write the tail that stands in the shadow doorbell to the doorbell."""
        assert self.base is not None
        if not queue.number:
            return "the tail of the admin queue is known to the driver alone"
        if not queue.shadow:
            return _NO_SHADOW
        if self.session.has_iommu:
            return "behind a virtual IOMMU its shadow doorbell cannot be located"
        at = self.session.memory.translate(queue.shadow, 4)
        raw = None if at is None else memory.read(self.session.process.pid, at, 4)
        if raw is None:
            return "its shadow doorbell does not lie in guest RAM"
        (tail,) = struct.unpack("<I", raw)
        if tail >= queue.size:
            return (
                f"its shadow doorbell holds {tail}, in a queue of {queue.size}: no driver does that"
            )
        doorbell = self.base + self._queues().doorbell(queue.number)
        checks = (
            Check(queue.shadow, 0xFFFFFFFF, tail),
            Check(self.base + nvme.CSTS, nvme.READY, nvme.READY),
        )
        write = RegisterWrite(doorbell, raw, checks, self.view.function)
        target = f"tail {tail} to the doorbell of submission queue {queue.number} at {doorbell:#x}"
        return self._checked(self.register(write, target), queue)

    def _checked(self, way: Way, queue: Submission | Completion) -> Way:
        """Have a way ask last whether the queue is still the one that was found."""
        return Way(way.target, way.write, way.counters, check=partial(self._check, queue))

    def _check(self, queue: Submission | Completion) -> None:
        self.session.process.check_alive()
        if not nvme.still_is(self.session.process.pid, queue):
            raise StaleMapError(
                f"queue {queue.number} of {self.mapped.device.id} is not what was found: nothing "
                "was written (the guest rebooted, or reset the controller)"
            )

    def _write_eventfd(self, notifier: Notifier) -> None:
        ours = self.session.process.duplicate_fd(notifier.fd)
        try:
            state = eventfds.read_eventfd(os.getpid(), ours)
            if state is None or state.eventfd_id != notifier.eventfd_id:
                raise StaleMapError(
                    f"fd {notifier.fd} of process {self.session.process.pid} is no longer eventfd "
                    f"{notifier.eventfd_id}: nothing was written"
                )
            eventfds.signal(ours)
        finally:
            os.close(ours)

    def _counters(self, notifier: Notifier) -> Counters:
        state = eventfds.read_eventfd(self.session.process.pid, notifier.fd)
        same = state is not None and state.eventfd_id == notifier.eventfd_id
        return Counters(state.count if state is not None and same else None, None, None)
