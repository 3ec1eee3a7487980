"""What does the kernel itself keep of a queue: notifiers, doorbell, interrupt, vhost's indices?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.errors import StaleMapError
from kickcall.host.kernel.eventfds import eventfds_of
from kickcall.host.kernel.kvm import vms_of
from kickcall.host.kernel.processes import find_task
from kickcall.host.kernel.vhost import vhosts_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kickcall.host.kernel.eventfds import KernelEventfd
    from kickcall.host.kernel.kvm import Ioeventfd, Irqfd, KernelVm
    from kickcall.host.kernel.program import Kernel
    from kickcall.host.kernel.vhost import KernelVhost, KernelVhostQueue
    from kickcall.model import Notifier, QueueMap
    from kickcall.vmm.session import MappedDevice, VmmSession


@dataclass(frozen=True, slots=True)
class VhostOfQueue:
    """The kernel's vhost queue that serves a queue of the machine."""

    fd: int
    kind: str
    queue: KernelVhostQueue


@dataclass(frozen=True, slots=True)
class QueueInKernel:
    """One queue of a machine, as the kernel has it."""

    device: str
    id: str
    queue: int
    kick: KernelEventfd | None
    ioeventfds: tuple[Ioeventfd, ...]
    """Which writes of the guest signal the kick notifier."""
    call: KernelEventfd | None
    irqfds: tuple[Irqfd, ...]
    """Which interrupts the call notifier raises."""
    vhost: VhostOfQueue | None


def queues_in_kernel(
    session: VmmSession, kernel: Kernel, chosen: Sequence[tuple[MappedDevice, QueueMap]]
) -> tuple[QueueInKernel, ...]:
    """Return what the kernel keeps of the queues `chosen`.

    Raises KernelViewError, MachineGoneError, or StaleMapError where a notifier is another file than
    the one that was mapped.
    """
    task = find_task(kernel, session.machine.pid, session.machine.start_time)
    fds = [notifier.fd for _, queue in chosen for notifier in (queue.kick, queue.call) if notifier]
    contexts = eventfds_of(kernel, task, fds)
    vms, vhosts = vms_of(kernel, task), vhosts_of(kernel, task)
    return tuple(
        QueueInKernel(
            device=mapped.device.path,
            id=mapped.device.id,
            queue=queue.index,
            kick=_context(contexts, queue.kick, mapped, queue),
            ioeventfds=ioeventfds_of(vms, queue.kick.eventfd_id) if queue.kick else (),
            call=_context(contexts, queue.call, mapped, queue),
            irqfds=irqfds_of(vms, queue.call.eventfd_id) if queue.call else (),
            vhost=vhost_of(vhosts, queue.kick.eventfd_id) if queue.kick else None,
        )
        for mapped, queue in chosen
    )


def _context(
    contexts: dict[int, KernelEventfd],
    notifier: Notifier | None,
    mapped: MappedDevice,
    queue: QueueMap,
) -> KernelEventfd | None:
    if notifier is None:
        return None
    context = contexts.get(notifier.fd)
    if context is None or context.id != notifier.eventfd_id:
        raise StaleMapError(
            f"queue {queue.index} of {mapped.device.id}: fd {notifier.fd} is no longer eventfd "
            f"{notifier.eventfd_id} (the guest rebooted, or reset the device): ask again"
        )
    return context


def ioeventfds_of(vms: Sequence[KernelVm], eventfd_id: int) -> tuple[Ioeventfd, ...]:
    """Return the ioeventfds that signal an eventfd."""
    return tuple(one for vm in vms for one in vm.ioeventfds if one.eventfd_id == eventfd_id)


def irqfds_of(vms: Sequence[KernelVm], eventfd_id: int) -> tuple[Irqfd, ...]:
    """Return the irqfds that listen to an eventfd."""
    return tuple(one for vm in vms for one in vm.irqfds if one.eventfd_id == eventfd_id)


def vhost_of(vhosts: Sequence[KernelVhost], kick_id: int) -> VhostOfQueue | None:
    """Return the vhost queue that an eventfd kicks, if there is one."""
    for vhost in vhosts:
        for queue in vhost.queues:
            if queue.kick is not None and queue.kick.id == kick_id:
                return VhostOfQueue(vhost.fd, vhost.kind, queue)
    return None
