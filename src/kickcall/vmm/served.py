"""Which machines' monitors does a `kickcall qmp` hold, and where can they be reached instead?

A QMP monitor serves one client. While `kickcall qmp` is that client, every other command has to
go through its socket; so it leaves a note, one JSON file per machine, in a folder that only its
own user (or root) can write to. A note says who wrote it; one whose writer is dead counts for
nothing and is swept away by whoever finds it.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from kickcall.errors import KickcallError
from kickcall.host import processes

_ROOT: Final = 0
_MAX_NOTE: Final = 64 << 10


class RuntimeFolderError(KickcallError):
    """The folder for the notes could be written to by somebody else: nothing in it is believed."""


def runtime_folder() -> Path:
    """Return this user's folder for notes, whether it exists or not."""
    if os.geteuid() == _ROOT:
        return Path("/run/kickcall")
    of_session = os.environ.get("XDG_RUNTIME_DIR")
    if of_session:
        return Path(of_session) / "kickcall"
    return Path(f"/tmp/kickcall-{os.geteuid()}")


def _is_trusted(status: os.stat_result) -> bool:
    return status.st_uid in (_ROOT, os.geteuid()) and not status.st_mode & 0o022


def _note(folder: Path, pid: int, start_time: int) -> Path:
    return folder / f"{pid}-{start_time}.json"


def advertise(pid: int, start_time: int, listen: str, upstream: str) -> None:
    """Note that this process serves the machine's monitor at `listen`.

    Raises RuntimeFolderError, and OSError where the folder cannot be written.
    """
    folder = runtime_folder()
    folder.mkdir(mode=0o700, parents=False, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or not _is_trusted(status):
        raise RuntimeFolderError(
            f"{folder} belongs to uid {status.st_uid} or others may write to it: "
            "remove it, or set XDG_RUNTIME_DIR"
        )
    sweep(folder)
    server_pid = os.getpid()
    note = {
        "listen": str(Path(listen).absolute()),
        "server_pid": server_pid,
        "server_start_time": processes.start_time(server_pid),
        "upstream": upstream,
    }
    # Renamed into place, so that no reader finds half a note.
    descriptor, temporary = tempfile.mkstemp(prefix=".note-", dir=folder)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(note, file)
        Path(temporary).replace(_note(folder, pid, start_time))
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def withdraw(pid: int, start_time: int) -> None:
    """Remove this process's note on the machine. One that another process wrote stays."""
    path = _note(runtime_folder(), pid, start_time)
    note = _read(path)
    if note is not None and note.get("server_pid") == os.getpid():
        path.unlink(missing_ok=True)


def served_monitor(pid: int, start_time: int, *, own: bool = False) -> str | None:
    """Return the socket of the `kickcall qmp` that holds this machine's monitor, or None.

    The calling process's own note is returned only with `own`: whoever holds the monitor need not
    ask itself, but another process on its behalf has to.
    """
    for folder in _folders():
        note = _read(_note(folder, pid, start_time))
        if note is None or not _is_alive(note):
            continue
        listen = note.get("listen")
        if isinstance(listen, str) and (own or note["server_pid"] != os.getpid()):
            return listen
    return None


def machine_served_at(path: str) -> int | None:
    """Return the pid of the machine whose `kickcall qmp` listens at `path`, or None."""
    try:
        wanted = os.stat(path)
    except OSError:
        return None
    for folder in _folders():
        for name in folder.glob("[0-9]*-[0-9]*.json"):
            note = _read(name)
            if note is None or not _is_alive(note):
                continue
            try:
                listens = os.stat(str(note.get("listen")))
            except OSError:
                continue
            pid, _, started = name.stem.partition("-")
            if not (pid.isdecimal() and started.isdecimal()):
                continue
            if os.path.samestat(wanted, listens) and processes.start_time(int(pid)) == int(started):
                return int(pid)
    return None


def _folders() -> list[Path]:
    """Return where notes may be: one's own folder, and root's, which root's servers write."""
    own, roots = runtime_folder(), Path("/run/kickcall")
    return [own] if own == roots else [own, roots]


def sweep(folder: Path) -> None:
    """Remove the notes of dead servers."""
    for path in folder.glob("*.json"):
        note = _read(path)
        if note is not None and not _is_alive(note):
            path.unlink(missing_ok=True)


def _is_alive(note: dict[str, object]) -> bool:
    pid, start_time = note.get("server_pid"), note.get("server_start_time")
    return (
        isinstance(pid, int)
        and isinstance(start_time, int)
        and processes.start_time(pid) == start_time
    )


def _read(path: Path) -> dict[str, object] | None:
    """Return a note that can be believed, or None."""
    try:
        folder = path.parent.lstat()
        if not stat.S_ISDIR(folder.st_mode) or not _is_trusted(folder):
            return None
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or not _is_trusted(status):
                return None
            note = json.loads(file.read(_MAX_NOTE))
    except (OSError, ValueError, RecursionError):
        return None
    return note if isinstance(note, dict) else None
