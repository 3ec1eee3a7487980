"""How far is vhost in the kernel with each queue? (drivers/vhost/vhost.h)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kickcall.host.kernel.eventfds import KernelEventfd, read_eventfd
from kickcall.host.kernel.processes import open_files
from kickcall.host.kernel.program import reading

if TYPE_CHECKING:
    from kickcall.host.kernel.program import Kernel

_DEVICES = {
    "vhost-net": "struct vhost_net",
    "vhost-scsi": "struct vhost_scsi",
    "vhost-vsock": "struct vhost_vsock",
}
"""What an open /dev/NAME is (`private_data`); each has its `struct vhost_dev` as member `dev`."""
_QUEUES_MAX = 2048
_RING_MAX = 1 << 15


@dataclass(frozen=True, slots=True)
class KernelVhostQueue:
    """A `struct vhost_virtqueue`, its members by their own names."""

    index: int
    """Which of the vhost device's queues."""
    num: int
    last_avail_idx: int
    """How far vhost has fetched."""
    avail_idx: int
    """What vhost read last of the ring's avail.idx."""
    last_used_idx: int
    """How far vhost has completed."""
    used_flags: int
    signalled_used: int
    """What last_used_idx was when vhost called last (with event index)."""
    signalled_used_valid: bool
    features: int
    """What driver and device agreed on (`acked_features`)."""
    running: bool
    """vhost has a back-end for the queue (`private_data`): without one a kick does nothing."""
    kick: KernelEventfd | None
    call: KernelEventfd | None
    worker: int | None
    """The pid of the thread that serves the queue."""
    worker_comm: str
    desc: int
    """Where the rings are, in the process's address space."""
    avail: int
    used: int


@dataclass(frozen=True, slots=True)
class KernelVhost:
    """A vhost device that a process has open."""

    fd: int
    kind: str
    queues: tuple[KernelVhostQueue, ...]


def vhosts_of(kernel: Kernel, task: Any) -> tuple[KernelVhost, ...]:
    """Return the vhost devices of a process, by descriptor."""
    return tuple(
        KernelVhost(file.fd, file.name, _queues(kernel, _DEVICES[file.name], file.private))
        for file in open_files(kernel, task)
        if file.character_device and file.name in _DEVICES and file.private
    )


def _queues(kernel: Kernel, kind: str, address: int) -> tuple[KernelVhostQueue, ...]:
    import drgn

    with reading(f"a {kind}"):
        device = drgn.Object(kernel.program, kind, address=address).dev
        found = []
        for index in range(min(int(device.nvqs), _QUEUES_MAX)):
            queue = device.vqs[index]
            worker = worker_of(device, queue)
            found.append(
                KernelVhostQueue(
                    index=index,
                    num=int(queue.num),
                    last_avail_idx=int(queue.last_avail_idx),
                    avail_idx=int(queue.avail_idx),
                    last_used_idx=int(queue.last_used_idx),
                    used_flags=int(queue.used_flags),
                    signalled_used=int(queue.signalled_used),
                    signalled_used_valid=bool(queue.signalled_used_valid),
                    features=int(queue.acked_features),
                    running=bool(queue.private_data),
                    kick=_eventfd(kernel, queue.kick.private_data) if queue.kick else None,
                    call=_eventfd(kernel, call_context(queue)),
                    worker=int(worker.pid) if worker else None,
                    worker_comm=worker.comm.string_().decode(errors="replace") if worker else "",
                    desc=queue.desc.value_(),
                    avail=queue.avail.value_(),
                    used=queue.used.value_(),
                )
            )
        return tuple(found)


def _eventfd(kernel: Kernel, pointer: Any) -> KernelEventfd | None:
    return read_eventfd(kernel, pointer.value_()) if pointer else None


def call_context(queue: Any) -> Any:
    """Return the `struct eventfd_ctx *` that vhost calls with.

    It is in a struct of its own since Linux 5.9 ("vhost: introduce vhost_vring_call").
    """
    call = queue.call_ctx
    return call.ctx if _has(call, "ctx") and not _is_pointer(call) else call


def _is_pointer(value: Any) -> bool:
    import drgn

    return bool(value.type_.kind == drgn.TypeKind.POINTER)


def _has(value: Any, member: str) -> bool:
    return any(one == member for one in dir(value))


def worker_of_poll(poll: Any) -> Any:
    """Return the task that a `struct vhost_poll` wakes, or None."""
    # A poll has its queue since Linux 6.5 ("vhost: convert poll work to be vq based").
    return worker_of(poll.dev, poll.vq if _has(poll, "vq") else None)


def worker_of(device: Any, queue: Any) -> Any:
    """Return the task that serves a queue, or None.

    Until Linux 6.3 `worker` is the device's `struct task_struct *`; in 6.4 a `struct vhost_worker`
    of the device ("vhost: move worker thread fields to new struct"); since 6.5 one of the queue
    ("vhost: replace single worker pointer with xarray"). Its thread is `vtsk`, a `struct
    vhost_task` ("vhost: use vhost_tasks for worker threads", 6.4), or `kthread_task` ("vhost:
    Reintroduce kthread API and add mode selection", 6.17, and in Debian's 6.12.107): one is NULL.
    """
    if queue and _has(queue, "worker"):
        worker = queue.worker
    elif _has(device, "worker"):
        worker = device.worker
    else:
        return None
    if not worker:
        return None
    if _has(worker, "comm"):
        return worker
    for thread in ("vtsk", "kthread_task", "task"):
        if _has(worker, thread) and (found := getattr(worker, thread)):
            return found.task if thread == "vtsk" else found
    return None
