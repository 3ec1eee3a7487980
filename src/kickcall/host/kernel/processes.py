"""Which process of the kernel that is looked at, and which files does it have open?"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kickcall.errors import KernelViewError, MachineGoneError
from kickcall.host.kernel.program import LIST_MAX, bounded, reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.host.kernel.program import Kernel

_ANONYMOUS = "anon_inodefs"
"""The file system of eventfds and of KVM's machines (fs/anon_inodes.c)."""
_MODE_TYPE, _MODE_CHAR_DEVICE = 0o170000, 0o020000
_TICK_NS = 10_000_000
"""Nanoseconds in a tick of /proc/PID/stat (USER_HZ is 100 on every Linux since 2.6)."""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file of a process: a `struct file`."""

    fd: int
    name: str
    """The last part of its path: `[eventfd]`, `kvm-vm`, `vhost-scsi`."""
    anonymous: bool
    character_device: bool
    private: int
    """`file->private_data`: what the file is to those who made it."""


def find_task(kernel: Kernel, pid: int, start_time: int | None = None) -> Any:
    """Return the `struct task_struct *` of process `pid`.

    With `start_time` (proc(5), field 22 of /proc/PID/stat) it must have been started then: in a
    container with pids of its own `pid` is another process to the kernel. Raises MachineGoneError,
    or KernelViewError where it is another one.
    """
    from drgn.helpers.linux.pid import find_task as by_pid

    with reading(f"process {pid}"):
        task = by_pid(kernel.variable("init_pid_ns").address_of_(), pid)
        if not task:
            raise MachineGoneError(f"there is no process {pid} in Linux {kernel.release}")
        if start_time is None:
            return task
        # Called real_start_time before Linux 5.5.
        if int(task.start_boottime) // _TICK_NS != start_time:
            raise KernelViewError(
                f"process {pid} is another one to the kernel: kickcall runs in a container with "
                "pids of its own, and the kernel's view needs the host's (--pid=host)"
            )
        return task


def open_files(kernel: Kernel, task: Any) -> Iterator[OpenFile]:
    """Yield the files that a process has open, by descriptor."""
    with reading("a process's open files"):
        table = task.files.fdt
        count = min(int(table.max_fds), LIST_MAX)
        raw = kernel.program.read(table.fd.value_(), 8 * count)
        opened = [
            (fd, address) for fd, (address,) in enumerate(struct.iter_unpack("<Q", raw)) if address
        ]
    for fd, address in opened:
        found = _open_file(kernel, fd, address)
        if found is not None:
            yield found


def _open_file(kernel: Kernel, fd: int, address: int) -> OpenFile | None:
    """Return what a `struct file` is; None where it was closed while we looked."""
    import drgn

    try:
        file = drgn.Object(kernel.program, "struct file", address=address)
        inode = file.f_inode
        name = file.f_path.dentry.d_name
        length = min(int(name.len), 255)
        return OpenFile(
            fd,
            kernel.program.read(name.name.value_(), length).decode(errors="replace"),
            inode.i_sb.s_type.name.string_().decode(errors="replace") == _ANONYMOUS,
            int(inode.i_mode) & _MODE_TYPE == _MODE_CHAR_DEVICE,
            file.private_data.value_(),
        )
    except drgn.FaultError:
        return None


def processes_with_machines(kernel: Kernel) -> list[Any]:
    """Return the tasks of all processes that made a virtual machine with KVM, by pid."""
    import drgn
    from drgn.helpers.linux.list import list_for_each_entry

    with reading("KVM's list of machines"):
        head = drgn.Object(
            kernel.program, "struct list_head", address=kernel.module_variable("kvm", "vm_list")
        )
        pids = {
            int(vm.userspace_pid)
            for vm in bounded(
                list_for_each_entry("struct kvm", head.address_of_(), "vm_list"), "machines"
            )
        }
        found = []
        for pid in sorted(pids):
            try:
                found.append(find_task(kernel, pid))
            except MachineGoneError:
                continue
        return found


def command_line(task: Any) -> tuple[str, ...]:
    """Return a process's command line; empty where a vmcore left its pages out."""
    import drgn
    from drgn.helpers.linux.mm import cmdline

    try:
        return tuple(part.decode(errors="replace") for part in cmdline(task) or ())
    except (drgn.FaultError, LookupError, ValueError):
        return ()


def read_process_memory(task: Any, address: int, length: int) -> bytes | None:
    """Return bytes of a process's own memory; None where they are not in a vmcore, or nowhere."""
    import drgn
    from drgn.helpers.linux.mm import access_process_vm

    try:
        return access_process_vm(task, address, length)
    except (drgn.FaultError, LookupError, ValueError):
        return None
