"""What does the kernel keep of an eventfd, and who waits on it? (fs/eventfd.c)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kickcall.host.kernel.processes import open_files
from kickcall.host.kernel.program import bounded, reading

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kickcall.host.kernel.program import Kernel

_WAITERS_MAX = 64
_NAME = "[eventfd]"


@dataclass(frozen=True, slots=True)
class Waiter:
    """Who is on an eventfd's wait queue, and so is told when it is signalled."""

    function: str
    """What is called then, as `irqfd_wakeup` or `vhost_poll_wakeup`."""
    who: str
    """Whom that wakes, in words."""
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class KernelEventfd:
    """A `struct eventfd_ctx`, its members by their own names."""

    address: int
    kref: int
    """References: one for each open file and for each user in the kernel."""
    wqh: tuple[Waiter, ...]
    count: int
    flags: int
    id: int


def eventfds_of(kernel: Kernel, task: Any, fds: Iterable[int]) -> dict[int, KernelEventfd]:
    """Return the eventfds among a process's descriptors `fds`, by descriptor."""
    wanted = set(fds)
    return {
        file.fd: read_eventfd(kernel, file.private)
        for file in open_files(kernel, task)
        if file.fd in wanted and file.anonymous and file.name == _NAME
    }


def all_eventfds_of(kernel: Kernel, task: Any) -> dict[int, KernelEventfd]:
    """Return every eventfd that a process has open, by its id."""
    found = (
        read_eventfd(kernel, file.private)
        for file in open_files(kernel, task)
        if file.anonymous and file.name == _NAME
    )
    return {context.id: context for context in found}


def read_eventfd(kernel: Kernel, address: int) -> KernelEventfd:
    """Return the `struct eventfd_ctx` at `address`."""
    import drgn

    with reading("an eventfd"):
        context = drgn.Object(kernel.program, "struct eventfd_ctx", address=address)
        return KernelEventfd(
            address=address,
            kref=int(context.kref.refcount.refs.counter),
            wqh=_waiters(kernel, context.wqh),
            count=int(context.count),
            flags=int(context.flags),
            id=int(context.id),
        )


def read_eventfd_id(kernel: Kernel, context: Any) -> int | None:
    """Return the id of the eventfd that a `struct eventfd_ctx *` points to; None for NULL."""
    return int(context.id) if context else None


def _waiters(kernel: Kernel, queue: Any) -> tuple[Waiter, ...]:
    from drgn.helpers.linux.list import list_for_each_entry

    entries = list_for_each_entry("struct wait_queue_entry", queue.head.address_of_(), "entry")
    found: list[Waiter] = []
    for entry in bounded(entries, "waiters"):
        if len(found) == _WAITERS_MAX:
            break
        found.append(_waiter(kernel, entry))
    return tuple(found)


def _waiter(kernel: Kernel, entry: Any) -> Waiter:
    """Tell whom an entry of the wait queue wakes, by the function that does it."""
    from drgn import cast, container_of

    function = kernel.function(entry.func.value_())
    match function:
        case "irqfd_wakeup":  # virt/kvm/eventfd.c
            irqfd = container_of(entry, "struct kvm_kernel_irqfd", "wait")
            return Waiter(function, f"KVM irqfd, gsi {int(irqfd.gsi)}")
        case "vhost_poll_wakeup":  # drivers/vhost/vhost.c
            from kickcall.host.kernel.vhost import worker_of_poll

            poll = container_of(entry, "struct vhost_poll", "wait")
            return _task(function, "vhost worker", worker_of_poll(poll))
        case "ep_poll_callback":  # fs/eventpoll.c
            epoll = container_of(entry, "struct eppoll_entry", "wait").base.ep
            return _task(function, "epoll", _first_sleeper(epoll.wq))
        case "pollwake":  # fs/select.c
            waiting = cast("struct poll_wqueues *", entry.private)
            return _task(function, "poll", waiting.polling_task)
        case "default_wake_function" | "autoremove_wake_function":
            return _task(function, "read", cast("struct task_struct *", entry.private))
        case "io_poll_wake":  # io_uring/poll.c
            return Waiter(function, "io_uring")
    return Waiter(function, function)


def _task(function: str, how: str, task: Any) -> Waiter:
    if not task:
        return Waiter(function, how)
    comm = task.comm.string_().decode(errors="replace")
    pid = int(task.pid)
    return Waiter(function, f"{how}: {comm}[{pid}]", pid)


def _first_sleeper(queue: Any) -> Any:
    """Return the task that sleeps on a wait queue, if one does right now."""
    from drgn import cast
    from drgn.helpers.linux.list import list_for_each_entry

    for entry in list_for_each_entry("struct wait_queue_entry", queue.head.address_of_(), "entry"):
        return cast("struct task_struct *", entry.private)
    return None
