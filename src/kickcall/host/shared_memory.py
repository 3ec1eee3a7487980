"""Which of another process's memory can be mapped here, read-only and without danger?

A mapping of a file that shrinks kills its reader (SIGBUS, mmap(2)), and so does a hole in hugetlbfs
when no huge page is left. So only a memfd is taken that is sealed against shrinking
(F_SEAL_SHRINK, memfd_create(2)) and that lies in tmpfs. QEMU seals what `memory-backend-memfd`
makes (backends/hostmem-memfd.c, `seal=on`, 2.12 to 10.1). All else is read with
process_vm_readv(2).

A page that the process gave back (a balloon) reads as zeroes and is allocated by that; a page with
a hardware memory error kills whoever reads it, the owner included.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.host.memory import mappings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kickcall.host.memory import Mapping

_F_GET_SEALS = 1034  # include/uapi/linux/fcntl.h: F_LINUX_SPECIFIC_BASE + 10
_F_SEAL_SHRINK = 0x0002
_TMPFS_MAGIC = 0x01021994  # include/uapi/linux/magic.h
_MEMFD = "/memfd:"
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class SharedRun:
    """A run of another process's memory that is mapped here, too: at `view[0]` stands `start`."""

    start: int
    end: int
    view: mmap.mmap


def map_shared(pid: int, where: Sequence[tuple[int, int]]) -> tuple[SharedRun, ...]:
    """Map those mappings of process `pid` that overlap the (start, end) ranges, where it is safe.

    Raises the errors of `mappings`. What cannot be mapped is left out without a word: it can still
    be read. Close each `view`: as long as it is open the memory outlives its process.
    """
    wanted = [
        mapping
        for mapping in mappings(pid)
        if mapping.shared
        and mapping.name.startswith(_MEMFD)
        and any(start < mapping.end and mapping.start < end for start, end in where)
    ]
    found: list[SharedRun] = []
    if not wanted:
        return ()
    files = _memfds(pid, {(mapping.device, mapping.inode) for mapping in wanted})
    try:
        for mapping in wanted:
            file = files.get((mapping.device, mapping.inode))
            if file is not None and _cannot_shrink(file, mapping):
                with contextlib.suppress(OSError, ValueError):
                    found.append(SharedRun(mapping.start, mapping.end, _map(file, mapping)))
    finally:
        for file in files.values():
            os.close(file)
    return tuple(found)


def _map(file: int, mapping: Mapping) -> mmap.mmap:
    return mmap.mmap(
        file,
        mapping.end - mapping.start,
        flags=mmap.MAP_SHARED,
        prot=mmap.PROT_READ,
        offset=mapping.offset,
    )


def _memfds(pid: int, wanted: Iterable[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """Return a read-only descriptor of ours for each memfd of process `pid`, by device and inode.

    Opening it anew, and not duplicating it, is what keeps it read-only: it is another open file.
    """
    left = set(wanted)
    found: dict[tuple[str, int], int] = {}
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return found
    for name in names:
        path = f"/proc/{pid}/fd/{name}"
        try:
            if not os.readlink(path).startswith(_MEMFD):
                continue
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        status = os.fstat(file)
        key = (f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", status.st_ino)
        if key in left:
            left.discard(key)
            found[key] = file
        else:
            os.close(file)
        if not left:
            break
    return found


def _cannot_shrink(file: int, mapping: Mapping) -> bool:
    try:
        seals = fcntl.fcntl(file, _F_GET_SEALS)
        # A seal holds for good, so the size is what it will at least be.
        long_enough = os.fstat(file).st_size >= mapping.offset + mapping.end - mapping.start
    except OSError:
        return False
    return bool(seals & _F_SEAL_SHRINK) and long_enough and _file_system(file) == _TMPFS_MAGIC


def _file_system(file: int) -> int:
    """Return `f_type`, the first member of `struct statfs` (statfs(2))."""
    raw = (ctypes.c_long * 64)()
    if _libc.fstatfs(file, ctypes.byref(raw)) != 0:
        return 0
    return int(raw[0])
