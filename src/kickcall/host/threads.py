"""What do the threads of a process do, and who serves its vhost queues in the kernel?"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kickcall.host.processes import comm, pids

if TYPE_CHECKING:
    from collections.abc import Iterable

_TFD = re.compile(r"^tfd:\s*(\d+)", re.M)
_NSPID = re.compile(r"^NSpid:.*?(\d+)$", re.M)
_X86_64 = (
    "read=0 poll=7 select=23 pause=34 nanosleep=35 accept=43 recvfrom=45 recvmsg=47 wait4=61 "
    "rt_sigtimedwait=128 futex=202 restart_syscall=219 clock_nanosleep=230 epoll_wait=232 "
    "waitid=247 pselect6=270 ppoll=271 epoll_pwait=281 accept4=288 io_uring_enter=426 "
    "epoll_pwait2=441"
)
"""arch/x86/entry/syscalls/syscall_64.tbl"""
_GENERIC = (
    "epoll_pwait=22 read=63 pselect6=72 ppoll=73 waitid=95 futex=98 nanosleep=101 "
    "clock_nanosleep=115 restart_syscall=128 rt_sigtimedwait=137 accept=202 recvfrom=207 "
    "recvmsg=212 accept4=242 wait4=260 io_uring_enter=426 epoll_pwait2=441"
)
"""include/uapi/asm-generic/unistd.h"""
_TABLES = {"x86_64": _X86_64, "aarch64": _GENERIC, "riscv64": _GENERIC}
_WAITS = {
    number: name
    for name, _, number in (
        entry.partition("=") for entry in _TABLES.get(platform.machine(), "").split()
    )
}
"""The system calls in which threads sleep that wait for something to do, by number."""
_EPOLL = "anon_inode:[eventpoll]"


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread as /proc/PID/task/TID/stat shows it (proc(5))."""

    pid: int
    tid: int
    comm: str
    state: str
    """The letter: R running, S sleeping, D disk sleep, T stopped, t traced, Z zombie, X dead,
    I idle, P parked. Empty where the thread is gone."""
    waits_in: str = ""
    """The system call that it sleeps in, as `ppoll`, or its number; empty where it is in none, or
    that is not told."""


def thread(pid: int, tid: int) -> Thread:
    """Return what thread `tid` of process `pid` does now. A thread that ended has no state."""
    try:
        stat = Path(f"/proc/{pid}/task/{tid}/stat").read_text(errors="replace")
    except OSError:
        return Thread(pid, tid, "", "")
    # The name stands in parentheses and may hold any byte, `)` included.
    head, _, rest = stat.rpartition(")")
    state = rest.split()[0]
    waits = _system_call(pid, tid) if state == "S" else ""
    return Thread(pid, tid, head.partition("(")[2], state, waits)


def _system_call(pid: int, tid: int) -> str:
    """Return what /proc/PID/task/TID/syscall says: `running`, or a number and arguments (proc(5)).

    Needs PTRACE_MODE_ATTACH, and a kernel with CONFIG_HAVE_ARCH_TRACEHOOK.
    """
    try:
        number = Path(f"/proc/{pid}/task/{tid}/syscall").read_text().split()[0]
    except (OSError, IndexError):
        return ""
    if not number.isdigit():
        return ""
    return _WAITS.get(number, number)


def threads_of(pid: int) -> tuple[Thread, ...]:
    """Return all threads of process `pid`, by number; none where it ended."""
    try:
        names = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return ()
    return tuple(thread(pid, tid) for tid in sorted(map(int, names)))


def inner_tids(pid: int) -> dict[int, int]:
    """Return the threads of process `pid`: by the number that it has itself for each, ours.

    The two differ in a container: the process counts in a pid namespace of its own. The last field
    of `NSpid` is the number in the innermost one (proc(5), Linux 4.1).
    """
    found: dict[int, int] = {}
    try:
        names = os.listdir(f"/proc/{pid}/task")
        if os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid"):
            return {int(name): int(name) for name in names}
    except OSError:
        return found
    for name in names:
        try:
            status = Path(f"/proc/{pid}/task/{name}/status").read_text(errors="replace")
        except OSError:  # it ended while we looked
            continue
        if match := _NSPID.search(status):
            found[int(match[1])] = int(name)
    return found


def as_here(pid: int, told: Iterable[int]) -> list[int]:
    """Return our numbers of threads that process `pid` told its own of, in ascending order."""
    inner = inner_tids(pid)
    return sorted({inner.get(tid, tid) for tid in told})


def vhost_workers(pid: int) -> tuple[Thread, ...]:
    """Return the kernel's threads that serve vhost queues for process `pid`.

    They are called `vhost-PID`: kernel threads up to Linux 6.3, threads of the process itself since
    (drivers/vhost/vhost.c, vhost_worker_create).
    """
    name = f"vhost-{pid}"[:15]  # TASK_COMM_LEN less the closing NUL
    own = tuple(one for one in threads_of(pid) if one.comm == name)
    if own:
        return own
    return tuple(thread(other, other) for other in pids() if comm(other) == name)


def in_epoll(pid: int, fd: int) -> bool | None:
    """Tell whether descriptor `fd` of process `pid` is in an epoll set of that process.

    None where the process has no epoll set with anything in it, or cannot be looked at: it may poll
    by other means, as QEMU does for few descriptors (util/fdmon-epoll.c). `tfd:` in the fdinfo of
    an epoll descriptor: proc(5).
    """
    folder = Path(f"/proc/{pid}/fd")
    targets: set[int] = set()
    try:
        for name in os.listdir(folder):
            try:
                if os.readlink(folder / name) == _EPOLL:
                    text = Path(f"/proc/{pid}/fdinfo/{name}").read_text()
                    targets.update(int(found) for found in _TFD.findall(text))
            except FileNotFoundError:  # closed while we looked
                continue
    except OSError:
        return None
    return fd in targets if targets else None
