"""What the kernel says of an eventfd, who holds it, and how one notification is written to it."""

from __future__ import annotations

import os
import re
import select
import struct
from pathlib import Path

from kickcall.errors import CounterFullError, MachineGoneError, PrivilegeError
from kickcall.host.processes import comm, pids
from kickcall.model import Holder, NotifierState

COUNT_MAX = 2**64 - 2
"""A write that would pass this value blocks (eventfd(2))."""

_LINK = "anon_inode:[eventfd]"
_ONE = struct.pack("=Q", 1)
_FIELD = re.compile(r"^(flags|eventfd-[a-z]+):\s*([0-9a-f]+)\s*$", re.M)


def parse_fdinfo(text: str) -> NotifierState | None:
    """Return what /proc/PID/fdinfo/FD says, or None where it is no eventfd's.

    `eventfd-count` is hexadecimal, `flags` octal, `eventfd-id` decimal
    (fs/eventfd.c, eventfd_show_fdinfo; the id since Linux 5.2, `eventfd-semaphore` since 6.5).
    """
    fields = dict(_FIELD.findall(text))
    if "eventfd-count" not in fields:
        return None
    semaphore = fields.get("eventfd-semaphore")
    return NotifierState(
        eventfd_id=int(fields.get("eventfd-id", "-1")),
        count=int(fields["eventfd-count"], 16),
        flags=int(fields.get("flags", "0"), 8),
        semaphore=None if semaphore is None else semaphore != "0",
    )


def read_eventfd(pid: int, fd: int) -> NotifierState | None:
    """Return the state of descriptor `fd` of process `pid`; None where it is no open eventfd."""
    try:
        with open(f"/proc/{pid}/fdinfo/{fd}", "rb", buffering=0) as file:
            text = file.read(4096).decode()
    except PermissionError as exc:
        raise PrivilegeError(
            f"not permitted to look at the descriptors of process {pid}: "
            "run as root, or with CAP_SYS_PTRACE"
        ) from exc
    except OSError:  # no such fd, or no such process: either way no open eventfd
        return None
    return parse_fdinfo(text)


def eventfds_of(pid: int) -> dict[int, NotifierState]:
    """Return every eventfd of process `pid`, by descriptor number."""
    folder = Path(f"/proc/{pid}/fd")
    try:
        names = os.listdir(folder)
    except PermissionError as exc:
        raise PrivilegeError(
            f"not permitted to look at the descriptors of process {pid}: "
            "run as root, or with CAP_SYS_PTRACE"
        ) from exc
    except OSError as exc:
        raise MachineGoneError(f"process {pid} ended") from exc
    found = {}
    for name in names:
        try:
            if os.readlink(folder / name) != _LINK:
                continue
        except OSError:  # closed while we looked
            continue
        if (state := read_eventfd(pid, int(name))) is not None:
            found[int(name)] = state
    return found


def holders_of(ids: set[int]) -> tuple[dict[int, tuple[Holder, ...]], int]:
    """Return who holds each eventfd of `ids`, and how many processes could not be looked at."""
    found: dict[int, list[Holder]] = {eventfd_id: [] for eventfd_id in ids}
    hidden = 0
    for pid in pids():
        try:
            states = eventfds_of(pid)
        except PrivilegeError:
            hidden += 1
            continue
        except MachineGoneError:
            continue
        for fd, state in sorted(states.items()):
            if state.eventfd_id in found:
                found[state.eventfd_id].append(Holder(pid, comm(pid), fd))
    return {eventfd_id: tuple(held) for eventfd_id, held in found.items()}, hidden


def signal(fd: int) -> None:
    """Write 1 to our descriptor `fd` of an eventfd. Raises CounterFullError rather than block.

    O_NONBLOCK belongs to the open file that all holders share, so it is never changed here.
    """
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    if not poller.poll(0):
        raise CounterFullError(
            f"the eventfd's count is at its maximum, {COUNT_MAX:#x}: nothing was written"
        )
    os.write(fd, _ONE)
