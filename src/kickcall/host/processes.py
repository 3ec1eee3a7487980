"""Which process is it, and is it still the same one? Handles on other processes of this host."""

from __future__ import annotations

import ctypes
import errno
import os
import select
from pathlib import Path
from typing import Self

from kickcall.errors import KickcallError, MachineGoneError, PrivilegeError

_SYS_PIDFD_GETFD = 438  # asm-generic/unistd.h, Linux 5.6
_libc = ctypes.CDLL(None, use_errno=True)


def start_time(pid: int) -> int | None:
    """Return when `pid` started, in clock ticks since boot, or None where there is no such process.

    A zombie is none: its memory and its files are gone. Field 22 of /proc/PID/stat (proc(5));
    together with the pid it names one process for good.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The second field is the command's name in parentheses and may hold any byte, `)` included.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in ("Z", "X") else int(fields[18])


def comm(pid: int) -> str:
    """Return the process's short name, or an empty string where it cannot be read."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return ""


def pids() -> list[int]:
    """Return the pids of all processes that this /proc shows, in ascending order."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


class Process:
    """One process, held by a pidfd: it can end, and its pid can never mean another one.

    Raises MachineGoneError where there is no such process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError as exc:
            raise MachineGoneError(f"there is no process {pid}") from exc
        except OSError as exc:
            raise KickcallError(
                f"cannot hold process {pid} by a pidfd: {exc.strerror} (needs Linux 5.3 or newer)"
            ) from exc
        started = start_time(pid)
        if started is None or not self.alive():
            os.close(self._pidfd)
            raise MachineGoneError(f"process {pid} ended")
        self.start_time = started

    def alive(self, wait_s: float = 0.0) -> bool:
        """Tell whether the process still runs: the pidfd of an ended one polls readable.

        `wait_s` is how many seconds it is given to end.
        """
        poll = select.poll()  # of this call's own: one poll object serves one thread at a time
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(wait_s * 1000)

    def check_alive(self, wait_s: float = 0.0) -> None:
        """Raise MachineGoneError where the process ended, or does so within `wait_s` seconds."""
        if not self.alive(wait_s):
            raise MachineGoneError(f"process {self.pid} ended since it was attached")

    def duplicate_fd(self, fd: int) -> int:
        """Return a descriptor of ours for the process's `fd`: the same open file (pidfd_getfd(2)).

        Neither stops the process nor shows in it. Needs PTRACE_MODE_ATTACH and Linux 5.6.
        """
        new = _libc.syscall(
            _SYS_PIDFD_GETFD, ctypes.c_int(self._pidfd), ctypes.c_int(fd), ctypes.c_uint(0)
        )
        if new >= 0:
            return int(new)
        code = ctypes.get_errno()
        if code == errno.ESRCH:
            raise MachineGoneError(f"process {self.pid} ended since it was attached")
        if code == errno.EPERM:
            raise PrivilegeError(
                f"not permitted to duplicate fd {fd} of process {self.pid}: "
                "run as root, or with CAP_SYS_PTRACE"
            )
        if code == errno.ENOSYS:
            raise KickcallError("this kernel has no pidfd_getfd(2): Linux 5.6 or newer is needed")
        raise OSError(code, os.strerror(code))

    def close(self) -> None:
        """Let go of the process."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
