"""How are the lab's processes started, found again, and ended by their pid and nothing else?"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kickcall.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Sequence

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class LabProcess:
    """A process that the lab started: its pid, and its start time because pids are reused."""

    what: str
    pid: int
    start_time: int

    @property
    def alive(self) -> bool:
        return running_since(self.pid) == self.start_time


def running_since(pid: int) -> int | None:
    """Return field 22 of /proc/PID/stat (proc(5)), or None if the process ended.

    A child that ended and that nobody waited for has ended, too.
    """
    try:
        # The name (field 2) may contain spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def start(what: str, command: Sequence[str], log: Path, *, outlives: bool) -> LabProcess:
    """Start a process that writes to `log`.

    It is in its own session, so that a Ctrl-C at a terminal does not reach it, and any process
    of the same user may ptrace it even under Yama's restricted mode (ptrace_scope 1): what
    kickcall does needs that. Unless it `outlives` us it is killed when our thread ends.
    """
    # The kernel ties this signal to the thread that started the process, not to the process:
    # a short-lived thread would take the machine with it.
    dies_with_us = not outlives and threading.current_thread() is threading.main_thread()

    def in_child() -> None:
        _libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
        if dies_with_us:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    with log.open("ab") as output:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=in_child,
            )
        except OSError as error:
            raise LabError(f"the lab cannot start {command[0]}: {error.strerror}") from error
    started = LabProcess(what, child.pid, running_since(child.pid) or 0)
    # Popen would warn that the process still runs; end() collects it.
    child.returncode = 0
    return started


def end(processes: Sequence[LabProcess], timeout: float = 10.0) -> None:
    """Kill processes and wait until they are gone. One that has ended is no error."""
    for process in processes:
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            continue
        try:
            # The pidfd is open, so from here on the pid cannot become another process.
            if process.alive:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], timeout)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)
        finally:
            os.close(pidfd)


def thread_states(pid: int) -> set[str]:
    """Return the states of all threads of a process, as `T` for stopped (proc(5))."""
    states = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it ended since it was listed
            states.add((task / "stat").read_text().rpartition(")")[2].split()[0])
    return states


def listens(path: Path) -> bool:
    """Tell whether somebody listens at a socket, which is there a moment before that.

    Who bound it may have a root of its own, or have named it from where it was: the end of the path
    decides.
    """
    ours = (str(path), os.path.realpath(path))
    # The flag is __SO_ACCEPTCON (Linux, net/unix/af_unix.c: unix_seq_show).
    lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
    listed = (line.split(maxsplit=7) for line in lines)
    bound = (words[7] for words in listed if len(words) == 8 and words[3] == "00010000")
    return any(one.endswith(name) for name in bound for one in ours)
