"""Is our map of a machine's notifiers what the kernel has? KVM's doorbells and interrupts, vhost.

A kick notifier must be what KVM signals when the guest writes to the queue's doorbell, and nothing
else may signal it. A call notifier must be what KVM turns into the queue's own MSI-X message. What
vhost in the kernel holds of a queue must be the same two.
"""

from __future__ import annotations

import enum
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.errors import KernelViewError
from kickcall.host.kernel.kvm import vms_of
from kickcall.host.kernel.processes import find_task
from kickcall.host.kernel.vhost import vhosts_of
from kickcall.model import DeviceEvent
from kickcall.vmm.wiring import wiring

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kickcall.host.kernel.kvm import Ioeventfd, Irqfd, KernelVm
    from kickcall.host.kernel.program import Kernel
    from kickcall.host.kernel.vhost import KernelVhost, KernelVhostQueue
    from kickcall.vmm.session import VmmSession
    from kickcall.vmm.wiring import Doorbell, QueueWiring

_TRIES = 3
_PAUSE_S = 0.1
"""A guest may set a queue up anew, or move an interrupt to another CPU, between two looks."""


class Outcome(enum.StrEnum):
    """What came out of comparing a notifier."""

    SAME = "same"
    DIFFERENT = "different"
    NOT_COMPARABLE = "not-comparable"


@dataclass(frozen=True, slots=True)
class Check:
    """One notifier of our map, compared with the kernel's."""

    device: str
    id: str
    queue: int
    event: DeviceEvent
    eventfd_id: int | None
    outcome: Outcome
    says: str
    """What the kernel has, in what it differs, or why it cannot be compared."""


def verify(session: VmmSession, kernel: Kernel) -> tuple[Check, ...]:
    """Compare the whole map of a machine with the kernel's.

    Differences that are gone when everything is read again are none. Raises KernelViewError where
    the kernel cannot be read.
    """
    checks: tuple[Check, ...] = ()
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_S)
            session.refresh()
        with session.borrow() as monitor:
            queues = wiring(session, monitor)
        try:
            task = find_task(kernel, session.machine.pid, session.machine.start_time)
            vms, vhosts = vms_of(kernel, task), vhosts_of(kernel, task)
        except KernelViewError:  # a list that changed under us reads as damage
            if attempt == _TRIES - 1:
                raise
            continue
        checks = compare(queues, vms, vhosts, session.machine.command)
        if not any(check.outcome is Outcome.DIFFERENT for check in checks):
            break
    return checks


def compare(
    queues: Sequence[QueueWiring],
    vms: Sequence[KernelVm],
    vhosts: Sequence[KernelVhost],
    command: Sequence[str] = (),
) -> tuple[Check, ...]:
    """Compare the notifiers of `queues` with what KVM and vhost have. `command` is QEMU's own."""
    no_irqfds = ""
    if any("kernel-irqchip=off" in word or "kernel_irqchip=off" in word for word in command):
        no_irqfds = "QEMU emulates the interrupt controller (kernel-irqchip=off): no irqfds"
    elif any("intremap=on" in word or word.startswith("amd-iommu") for word in command):
        no_irqfds = "a virtual IOMMU remaps its interrupts: the message is not the one of its table"
    ioeventfds = [one for vm in vms for one in vm.ioeventfds]
    irqfds: defaultdict[int | None, list[Irqfd]] = defaultdict(list)
    for vm in vms:
        for irqfd in vm.irqfds:
            irqfds[irqfd.eventfd_id].append(irqfd)
    served = {
        queue.kick.id: queue for vhost in vhosts for queue in vhost.queues if queue.kick is not None
    }
    checks = []
    for queue in queues:
        if not vms:
            kick = call = (Outcome.NOT_COMPARABLE, "the machine has no KVM: QEMU does it itself")
        else:
            kick = _kick(queue, ioeventfds)
            call = (
                (Outcome.NOT_COMPARABLE, no_irqfds)
                if no_irqfds
                else _call(queue, irqfds[queue.call])
            )
        vhost = served.get(queue.kick) if queue.kick is not None else None
        if vhost is not None:
            call = _with_vhost(queue, call, vhost)
        for event, eventfd_id, (outcome, says) in (
            (DeviceEvent.KICK, queue.kick, kick),
            (DeviceEvent.CALL, queue.call, call),
        ):
            checks.append(
                Check(queue.device, queue.id, queue.queue, event, eventfd_id, outcome, says)
            )
    return tuple(checks)


def _kick(queue: QueueWiring, ioeventfds: Iterable[Ioeventfd]) -> tuple[Outcome, str]:
    if not queue.doorbells:
        return Outcome.NOT_COMPARABLE, queue.no_doorbell
    at_doorbells = []
    problems = []
    known = list(ioeventfds)
    for doorbell in queue.doorbells:
        here = [one for one in known if _is_at(one, doorbell)]
        at_doorbells.extend(here)
        where = f"{doorbell.bus} {doorbell.address:#x}"
        if doorbell.datamatch is not None:
            where += f" value {doorbell.datamatch}"
        if not here and queue.kick is not None:
            problems.append(f"KVM has no ioeventfd at its doorbell {where}")
        for one in here:
            if one.eventfd_id != queue.kick:
                ours = "no kick notifier" if queue.kick is None else f"eventfd {queue.kick}"
                problems.append(
                    f"a write to its doorbell {where} signals eventfd {one.eventfd_id}, and our "
                    f"map has {ours}"
                )
            elif one.length not in doorbell.lengths:
                problems.append(f"the ioeventfd at {where} is for writes of {one.length} bytes")
            elif doorbell.datamatch is None and one.datamatch is not None:
                problems.append(f"the ioeventfd at {where} is for the value {one.datamatch} only")
    if queue.kick is not None:
        problems.extend(
            f"a write to {one.bus} {one.address:#x} signals it, and that is not its doorbell"
            for one in known
            if one.eventfd_id == queue.kick and one not in at_doorbells
        )
    if problems:
        return Outcome.DIFFERENT, "; ".join(problems)
    if queue.kick is None:
        return Outcome.NOT_COMPARABLE, "it has no kick notifier, and KVM none at its doorbell"
    places = dict.fromkeys(
        f"{doorbell.bus} {doorbell.address:#x}"
        + ("" if doorbell.datamatch is None else f" value {doorbell.datamatch}")
        for doorbell in queue.doorbells
    )
    return Outcome.SAME, f"ioeventfd at {', '.join(places)}"


def _is_at(one: Ioeventfd, doorbell: Doorbell) -> bool:
    """Tell whether an ioeventfd listens to a doorbell.

    For a length of 0 KVM keeps it twice, on the bus `fast-mmio`, too (virt/kvm/eventfd.c,
    kvm_assign_ioeventfd).
    """
    bus = "mmio" if one.bus == "fast-mmio" else one.bus
    if (bus, one.address) != (doorbell.bus, doorbell.address):
        return False
    return doorbell.datamatch is None or one.datamatch in (None, doorbell.datamatch)


def _call(queue: QueueWiring, irqfds: Sequence[Irqfd]) -> tuple[Outcome, str]:
    if queue.call is None:
        return Outcome.NOT_COMPARABLE, "it has no call notifier: QEMU raises its interrupt itself"
    message = queue.message
    if message is None:
        return Outcome.NOT_COMPARABLE, queue.no_message
    if message.masked:
        return Outcome.NOT_COMPARABLE, f"vector {message.vector} is masked: its calls are held back"
    if not irqfds:
        return Outcome.DIFFERENT, "KVM has no irqfd for it"
    problems = []
    for irqfd in irqfds:
        if irqfd.msi is None:
            problems.append(f"the irqfd's gsi {irqfd.gsi} is no message")
        elif (irqfd.msi.address, irqfd.msi.data) != (message.address, message.data):
            problems.append(
                f"the irqfd's gsi {irqfd.gsi} sends {irqfd.msi.data:#x} to "
                f"{irqfd.msi.address:#x}, and vector {message.vector} is {message.data:#x} to "
                f"{message.address:#x}"
            )
    if problems:
        return Outcome.DIFFERENT, "; ".join(problems)
    gsis = ", ".join(str(irqfd.gsi) for irqfd in irqfds)
    return Outcome.SAME, (
        f"irqfd, gsi {gsis}, sends vector {message.vector}: {message.data:#x} to "
        f"{message.address:#x}"
    )


def _with_vhost(
    queue: QueueWiring, call: tuple[Outcome, str], vhost: KernelVhostQueue
) -> tuple[Outcome, str]:
    """Add what vhost calls with, for a queue that vhost serves."""
    called = None if vhost.call is None else vhost.call.id
    if called == queue.call or call[0] is Outcome.DIFFERENT:
        return call
    if queue.message is not None and not queue.message.masked:
        return (
            Outcome.DIFFERENT,
            f"vhost calls with eventfd {called}, and our map has {queue.call}",
        )
    # hw/virtio/vhost.c, vhost_virtqueue_mask: QEMU has vhost call a masked notifier.
    return Outcome.NOT_COMPARABLE, f"{call[1]} (vhost calls with eventfd {called} meanwhile)"
