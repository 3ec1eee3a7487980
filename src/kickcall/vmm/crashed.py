"""What does a vmcore tell of the machines that ran on a host when it crashed?

There is no monitor to ask and, in most dumps, no page of QEMU's own: makedumpfile leaves out what
belongs to processes. The kernel's structures are enough to put each queue together again: KVM's
ioeventfd is the doorbell, the eventfd behind it the kick notifier, the vhost queue that listens to
that has the positions and the call notifier, and its irqfd the interrupt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kickcall.errors import MachineNotFoundError
from kickcall.host.kernel.eventfds import all_eventfds_of
from kickcall.host.kernel.kvm import vms_of
from kickcall.host.kernel.processes import (
    command_line,
    processes_with_machines,
    read_process_memory,
)
from kickcall.host.kernel.vhost import vhosts_of
from kickcall.virtio import split
from kickcall.vmm import cmdline
from kickcall.vmm.kernel_view import ioeventfds_of, irqfds_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kickcall.host.kernel.eventfds import KernelEventfd
    from kickcall.host.kernel.kvm import Ioeventfd, Irqfd
    from kickcall.host.kernel.program import Kernel
    from kickcall.host.kernel.vhost import KernelVhostQueue
    from kickcall.virtio.split import SplitRing

_EVENT_IDX = 1 << 29
"""VIRTIO_RING_F_EVENT_IDX (virtio 1.4, 6)."""


@dataclass(frozen=True, slots=True)
class CrashedMachine:
    """A process that had made a virtual machine."""

    pid: int
    comm: str
    name: str
    """QEMU's `-name`, or `pid-N` where the vmcore has not the page with the command line."""
    task: Any
    """The `struct task_struct *`."""


@dataclass(frozen=True, slots=True)
class CrashedQueue:
    """A queue that vhost in the kernel served."""

    device: str
    """Kind and descriptor of the vhost device, as `vhost-scsi-36`: what QEMU called it is lost."""
    queue: KernelVhostQueue
    ioeventfds: tuple[Ioeventfd, ...]
    irqfds: tuple[Irqfd, ...]
    ring: SplitRing | None
    """The ring as the guest left it; None where the vmcore has not its pages."""


@dataclass(frozen=True, slots=True)
class CrashedNotifier:
    """An eventfd between KVM and who served a queue in user space: QEMU, or vhost-user."""

    context: KernelEventfd
    ioeventfds: tuple[Ioeventfd, ...]
    irqfds: tuple[Irqfd, ...]


def crashed_machines(kernel: Kernel) -> list[CrashedMachine]:
    """Return the machines of a crashed host, by pid."""
    found = []
    for task in processes_with_machines(kernel):
        pid = int(task.pid)
        command = command_line(task)
        name = cmdline.parse(list(command)).name if command else ""
        comm = task.comm.string_().decode(errors="replace")
        found.append(CrashedMachine(pid, comm, name or f"pid-{pid}", task))
    return found


def crashed_machine(kernel: Kernel, target: str) -> CrashedMachine:
    """Return the machine of that name or pid. Raises MachineNotFoundError."""
    machines = crashed_machines(kernel)
    chosen = [one for one in machines if target in (one.name, str(one.pid))]
    if len(chosen) == 1:
        return chosen[0]
    known = ", ".join(f"{one.name} (pid {one.pid})" for one in machines) or "none"
    if chosen:
        raise MachineNotFoundError(f"several machines are called {target}; it has: {known}")
    raise MachineNotFoundError(f"the vmcore has no machine {target!r}; it has: {known}")


def crashed_queues(kernel: Kernel, machine: CrashedMachine) -> tuple[CrashedQueue, ...]:
    """Return the queues that vhost served for a machine, by vhost's descriptor."""
    vms = vms_of(kernel, machine.task)
    return tuple(
        CrashedQueue(
            device=f"{vhost.kind}-{vhost.fd}",
            queue=queue,
            ioeventfds=ioeventfds_of(vms, queue.kick.id),
            irqfds=irqfds_of(vms, queue.call.id) if queue.call else (),
            ring=_ring(machine, queue),
        )
        for vhost in vhosts_of(kernel, machine.task)
        for queue in vhost.queues
        if queue.kick is not None
    )


def crashed_notifiers(
    kernel: Kernel, machine: CrashedMachine, served: Iterable[CrashedQueue]
) -> tuple[CrashedNotifier, ...]:
    """Return the machine's other notifiers: those of queues that vhost did not serve."""
    vms = vms_of(kernel, machine.task)
    ours = {
        context.id
        for one in served
        for context in (one.queue.kick, one.queue.call)
        if context is not None
    }
    found = []
    for number, context in sorted(all_eventfds_of(kernel, machine.task).items()):
        ioeventfds, irqfds = ioeventfds_of(vms, number), irqfds_of(vms, number)
        if number not in ours and (ioeventfds or irqfds):
            found.append(CrashedNotifier(context, ioeventfds, irqfds))
    return tuple(found)


def _ring(machine: CrashedMachine, queue: KernelVhostQueue) -> SplitRing | None:
    """Read a split ring from the process's memory; vhost in the kernel serves no other."""
    ranges = split.fields(queue.avail, queue.used, queue.num, bool(queue.features & _EVENT_IDX))
    parts = [read_process_memory(machine.task, address, length) for address, length in ranges]
    whole = [part for part in parts if part is not None]
    return split.parse(whole) if len(whole) == len(parts) else None
