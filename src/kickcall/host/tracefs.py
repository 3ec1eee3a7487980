"""How does kickcall use the kernel's tracing so that nothing of it stays behind?

Everything is done in an instance of our own (Documentation/trace/ftrace.rst, "Instances"): buffers,
clock and triggers of others are not touched. Kprobe events stand in one list for the whole host.
So instance and events carry the name of the process that made them, and what a process left that
was killed is removed by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from kickcall.errors import KernelViewError, KickcallError, PrivilegeError
from kickcall.host.processes import pids, start_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_NAME = re.compile(r"kickcall_(\d{1,10})_(\d{1,20})_(\d{1,20})_\d+")
_KPROBE = re.compile(r"^p\d*:(\w+)/(\w+) ", re.M)
_TYPE = "tracefs"
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""Its inode number on every kernel (include/linux/proc_ns.h, PROC_PID_INIT_INO)."""
_BUSY_TRIES = 50
_BUSY_S = 0.02

_log = logging.getLogger("kickcall.trace")
_numbers = itertools.count()


class Instance:
    """An instance of ours with kprobe events, both gone again when it is closed.

    `probes` are the events by name: what is probed and what is fetched there, as kprobe_events
    takes it (Documentation/trace/kprobetrace.rst). None of them does anything before a trigger is
    set or it is recorded. Raises PrivilegeError or KernelViewError.
    """

    def __init__(self, probes: dict[str, str], *, buffer_kib: int) -> None:
        self._tracefs = folder()
        sweep(self._tracefs)
        own = f"{os.getpid()}_{start_time(os.getpid())}_{_pid_namespace()}"
        self.name = f"kickcall_{own}_{next(_numbers)}"
        self._path = self._tracefs / "instances" / self.name
        try:
            for event, probed in probes.items():
                _write(self._tracefs / "kprobe_events", f"p:{self.name}/{event} {probed}\n")
            _make(self._path)
            # The clock of time.monotonic(). Set first: it empties the buffer.
            _write(self._path / "trace_clock", "mono")
            _write(self._path / "buffer_size_kb", str(buffer_kib))
        except BaseException:
            self.close()
            raise

    def _event(self, event: str, file: str) -> Path:
        return self._path / "events" / self.name / event / file

    def set_trigger(self, event: str, trigger: str) -> None:
        """Have the kernel do something at each `event`."""
        _write(self._event(event, "trigger"), trigger)

    def hist(self, event: str) -> bytes:
        """Return the histograms of an event."""
        return _read(self._event(event, "hist"))

    def format(self, event: str) -> str:
        """Return how an event lies in the buffer."""
        return _read(self._event(event, "format")).decode(errors="replace")

    def record(self, event: str, which: str) -> None:
        """Have events that pass the filter `which` written to the buffer, too."""
        _write(self._event(event, "filter"), which)
        _write(self._event(event, "enable"), "1")

    def raw_buffers(self) -> list[int]:
        """Return descriptors of the buffers, one for each CPU: reads never block."""
        opened: list[int] = []
        try:
            for cpu in sorted((self._path / "per_cpu").iterdir()):
                fd = os.open(cpu / "trace_pipe_raw", os.O_RDONLY | os.O_NONBLOCK)
                opened.append(fd)
        except OSError as exc:
            for fd in opened:
                os.close(fd)
            raise _refused("open the trace buffers", self._path, exc) from exc
        return opened

    def close(self) -> None:
        """Remove the instance and the events. Files of the instance must be closed before.

        What cannot be removed, as somebody looks into it, is left for the next sweep.
        """
        try:
            _remove(self._tracefs, self.name)
        except KickcallError as exc:
            _log.warning("%s", exc)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def folder(mounts: str | None = None) -> Path:
    """Return where tracefs is mounted. Raises KernelViewError or PrivilegeError."""
    if mounts is None:
        mounts = Path("/proc/self/mounts").read_text(errors="replace")
    found = [
        Path(fields[1])
        for fields in (line.split() for line in mounts.splitlines())
        if len(fields) > 2 and fields[2] == _TYPE
    ]
    if not found:
        raise KernelViewError(
            "tracefs is not mounted, and only there the kernel counts notifications: "
            "mount -t tracefs tracefs /sys/kernel/tracing"
        )
    path = found[0]
    try:
        names = os.listdir(path)
    except PermissionError as exc:
        raise PrivilegeError(f"not permitted to use tracefs at {path}: run as root") from exc
    except OSError as exc:
        raise _refused("look into tracefs", path, exc) from exc
    if not {"kprobe_events", "instances"} <= set(names):
        raise KernelViewError(
            "this kernel cannot count notifications: it has no kprobe events "
            "(it was built without CONFIG_KPROBES or CONFIG_KPROBE_EVENTS)"
        )
    return path


def in_initial_pid_namespace() -> bool:
    """Tell whether the thread ids that the kernel records are those that this process sees."""
    return _pid_namespace() == _INITIAL_PID_NAMESPACE


def sweep(tracefs: Path) -> list[str]:
    """Remove what kickcalls left that were killed; return its names.

    What belongs to a process that lives is left alone, and so is what was made in another pid
    namespace (a container) that still has processes, as far as can be seen from here.
    """
    left = sorted({name for name in _names(tracefs) if _is_orphan(name)})
    for name in left:
        # Where somebody looks into it just now it stays for the next time.
        with contextlib.suppress(KernelViewError):
            _remove(tracefs, name)
    return left


def _names(tracefs: Path) -> Iterator[str]:
    try:
        yield from os.listdir(tracefs / "instances")
        for group, _ in _KPROBE.findall(_read(tracefs / "kprobe_events").decode(errors="replace")):
            yield group
    except OSError as exc:
        raise _refused("look into tracefs", tracefs, exc) from exc


def _is_orphan(name: str) -> bool:
    found = _NAME.fullmatch(name)
    if found is None:
        return False
    pid, started, namespace = map(int, found.groups())
    ours = _pid_namespace()
    if namespace == ours:
        return start_time(pid) != started
    # Only from the initial namespace all processes are seen.
    return ours == _INITIAL_PID_NAMESPACE and all(
        _pid_namespace(one) != namespace for one in pids()
    )


def _pid_namespace(pid: int | str = "self") -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        return 0


def _remove(tracefs: Path, name: str) -> None:
    """Remove instance and events of that name, as far as they are there."""
    path = tracefs / "instances" / name
    for event in _listed(path / "events" / name):
        # A histogram keeps its instance in use: triggers go first.
        file = path / "events" / name / event / "trigger"
        with contextlib.suppress(OSError, KernelViewError):
            for line in _read(file).decode(errors="replace").splitlines():
                if not line.startswith("#"):
                    _write(file, "!" + line.removesuffix(" [active]"))
        with contextlib.suppress(KernelViewError):
            _write(path / "events" / name / event / "enable", "0")
    _patiently(f"remove the tracing instance {name}", path, path.rmdir)
    with contextlib.suppress(OSError):
        events = _KPROBE.findall(_read(tracefs / "kprobe_events").decode(errors="replace"))
        for group, event in events:
            if group == name:
                file = tracefs / "kprobe_events"
                remove = functools.partial(_append, file, f"-:{group}/{event}\n")
                _patiently(f"remove the probe {group}/{event}", file, remove)


def _listed(path: Path) -> Iterable[str]:
    """Return the folders in `path`; none where it is not there."""
    try:
        return [entry.name for entry in os.scandir(path) if entry.is_dir()]
    except OSError:
        return ()


def _patiently(what: str, path: Path, do: Callable[[], None]) -> None:
    """Do what the kernel may refuse for a moment, as somebody else looks into it (EBUSY)."""
    for attempt in range(_BUSY_TRIES):
        try:
            do()
        except FileNotFoundError:  # another kickcall has swept it
            return
        except OSError as exc:
            if exc.errno != errno.EBUSY or attempt == _BUSY_TRIES - 1:
                raise _refused(what, path, exc) from exc
            time.sleep(_BUSY_S)
        else:
            return


def _make(path: Path) -> None:
    try:
        path.mkdir()
    except OSError as exc:
        raise _refused("make a tracing instance", path, exc) from exc


def _append(path: Path, text: str) -> None:
    # kprobe_events is emptied by an open for writing that does not append.
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _write(path: Path, text: str) -> None:
    try:
        _append(path, text)
    except OSError as exc:
        raise _refused(f"take {text.strip()!r}", path, exc) from exc


def _read(path: Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _refused(what: str, path: Path, exc: OSError) -> KernelViewError | PrivilegeError:
    if exc.errno in (errno.EACCES, errno.EPERM):
        # As root, too: where the kernel is locked down (kernel_lockdown(7), confidentiality).
        return PrivilegeError(
            f"the kernel does not let kickcall {what} ({path}: {exc.strerror}): run as root, and "
            "not under kernel lockdown"
        )
    return KernelViewError(f"the kernel did not {what}: {path}: {exc.strerror}")
