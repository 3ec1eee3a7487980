"""What do /proc and /sys say of a process, its threads and this host, for who reads it elsewhere?

Reading these files stops nobody: the kernel walks the stack of a thread as it sleeps (proc(5)).
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from kickcall.host.threads import thread

_FILE_MOST = 256 << 10
_MODULES = ("kvm", "kvm_intel", "kvm_amd", "vhost", "vhost_net", "vhost_scsi", "vhost_vsock")
_SWITCHES = re.compile(r"^\w*voluntary_ctxt_switches:\s*(\d+)$", re.M)
_OF_PROCESS = ("status", "sched", "schedstat", "limits", "cgroup", "oom_score_adj")
_OF_HOST = ("version", "uptime", "loadavg", "meminfo", "pressure/cpu", "pressure/io")
_INTERRUPTS = ("kvm", "vhost", "virtio", "RES:", "CAL:", "PIN:", "NPI:", "PIW:", "LOC:")
"""Lines of /proc/interrupts that say something of virtual machines: posted interrupts, and the
inter-processor interrupts that wake virtual CPUs (arch/x86/kernel/irq.c)."""


@dataclass(frozen=True, slots=True)
class ThreadShot:
    """One thread at one moment, as /proc/PID/task/TID shows it (proc(5))."""

    pid: int
    tid: int
    comm: str
    state: str
    """The letter of `stat`; empty where the thread is gone."""
    waits_in: str
    """The system call that it sleeps in, by name."""
    stat: str
    wchan: str
    """The kernel's function that it sleeps in; empty where it runs, or that is not told."""
    syscall: str
    stack: str
    """The kernel's own stack, or why it could not be read."""
    switches: tuple[str, ...]
    """How often it gave up its processor and was made to: it ran where these changed."""


def file_text(path: str | Path, most: int = _FILE_MOST) -> str:
    """Return the beginning of a file of /proc or /sys. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        parts = []
        while most > 0 and (part := file.read(min(most, 1 << 16))):
            parts.append(part)
            most -= len(part)
    return b"".join(parts).decode(errors="replace")


def text_or_why(path: str | Path) -> str:
    """Return the beginning of a file, or why it cannot be read."""
    try:
        return file_text(path)
    except OSError as exc:
        return f"(not readable: {exc.strerror})\n"


def command_of(pid: int) -> tuple[str, ...]:
    """Return the command line of a process, secrets and all; nothing where it ended."""
    try:
        raw = file_text(f"/proc/{pid}/cmdline", 4 << 20)
    except OSError:
        return ()
    return tuple(raw.removesuffix("\0").split("\0"))


def thread_shots(pid: int, most: int) -> tuple[ThreadShot, ...]:
    """Return what the first `most` threads of process `pid` do, by number; none where it ended.

    A thread takes some hundred microseconds. Stacks need CAP_SYS_ADMIN, `syscall` needs
    CAP_SYS_PTRACE.
    """
    try:
        tids = sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return ()
    return tuple(_shot(pid, tid) for tid in tids[:most])


def _shot(pid: int, tid: int) -> ThreadShot:
    folder = Path(f"/proc/{pid}/task/{tid}")
    told = thread(pid, tid)
    wchan = text_or_why(folder / "wchan").strip()
    return ThreadShot(
        pid=pid,
        tid=tid,
        comm=told.comm,
        state=told.state,
        waits_in=told.waits_in,
        stat=text_or_why(folder / "stat").strip(),
        wchan="" if wchan == "0" else wchan,
        syscall=text_or_why(folder / "syscall").strip(),
        stack=text_or_why(folder / "stack").strip(),
        switches=tuple(_SWITCHES.findall(text_or_why(folder / "status"))),
    )


def process_text(pid: int) -> str:
    """Return what /proc says of a process as a whole."""
    return _sections({name: f"/proc/{pid}/{name}" for name in _OF_PROCESS})


def host_text() -> str:
    """Return what this host says of itself: kernel, load, memory, modules of virtualization.

    Not its kernel's command line, which may have secrets.
    """
    files = {f"/proc/{name}": f"/proc/{name}" for name in _OF_HOST}
    files["/etc/os-release"] = "/etc/os-release"
    for module in _MODULES:
        folder = Path("/sys/module") / module
        names = [folder / "version", folder / "srcversion"]
        with contextlib.suppress(OSError):
            names += sorted((folder / "parameters").iterdir())
        files.update((str(name), str(name)) for name in names if name.exists())
    return f"uname: {' '.join(os.uname())}\n\n{_sections(files)}"


def interrupts_text() -> str:
    """Return the lines of /proc/interrupts that say something of virtual machines."""
    head, *lines = file_text("/proc/interrupts", 4 << 20).splitlines()
    wanted = [line for line in lines if any(word in line for word in _INTERRUPTS)]
    return "\n".join([head, *wanted]) + "\n"


def host_words() -> tuple[str, str, int]:
    """Return kernel, distribution and number of processors of this host, in words."""
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        distribution = ""
    name = os.uname()
    return f"{name.sysname} {name.release} {name.machine}", distribution, os.cpu_count() or 0


def _sections(files: dict[str, str]) -> str:
    return "\n".join(f"== {name}\n{text_or_why(path).rstrip()}\n" for name, path in files.items())
