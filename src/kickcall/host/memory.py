"""Another process's memory, read without stopping it: what is mapped, what is present, bytes."""

from __future__ import annotations

import array
import ctypes
import errno
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.errors import KickcallError, MachineGoneError, PrivilegeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

IOV_MAX = 1024  # limits.h; process_vm_readv(2) takes no more on either side
_PAGEMAP_PIECE = 1 << 17
"""Pages that are asked about at once: 1 MiB of /proc/PID/pagemap."""
_libc = ctypes.CDLL(None, use_errno=True)
readv = _libc.process_vm_readv
readv.restype = ctypes.c_ssize_t
readv.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
]


class Iovec(ctypes.Structure):
    """`struct iovec` (readv(2))."""

    _fields_ = (("base", ctypes.c_size_t), ("len", ctypes.c_size_t))


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/PID/maps."""

    start: int
    end: int
    permissions: str
    inode: int
    name: str
    device: str = ""
    """Of the file, as `major:minor` in hexadecimal."""
    offset: int = 0
    """Where in the file the mapping begins, in bytes."""

    @property
    def shared(self) -> bool:
        """What is written there is seen by others who map the same file."""
        return self.permissions.endswith("s")

    @property
    def anonymous(self) -> bool:
        """Private memory with no file behind it: where a program keeps its heap."""
        return self.inode == 0 and self.permissions.endswith("p")


def refused(pid: int, exc: OSError) -> KickcallError:
    """Return the error for what the kernel said to a look into process `pid`."""
    if exc.errno in (errno.EPERM, errno.EACCES):
        return PrivilegeError(
            f"not permitted to read the memory of process {pid}: "
            "run as root, or with CAP_SYS_PTRACE"
        )
    if exc.errno in (errno.ESRCH, errno.ENOENT):
        return MachineGoneError(f"process {pid} ended")
    return KickcallError(f"cannot read the memory of process {pid}: {exc.strerror}")


def mappings(pid: int) -> list[Mapping]:
    """Return what process `pid` has mapped, in ascending order."""
    found = []
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            for line in file:
                parts = line.decode(errors="replace").split(None, 5)
                start, _, end = parts[0].partition("-")
                name = parts[5].rstrip("\n") if len(parts) > 5 else ""
                found.append(
                    Mapping(
                        start=int(start, 16),
                        end=int(end, 16),
                        permissions=parts[1],
                        inode=int(parts[4]),
                        name=name,
                        device=parts[3],
                        offset=int(parts[2], 16),
                    )
                )
    except OSError as exc:
        raise refused(pid, exc) from exc
    return found


def present_runs(pid: int, where: Sequence[Mapping]) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) address ranges in `where` that hold data, in RAM or in swap.

    Reading a page that was never touched would make the kernel map one, so those are left out:
    bits 63 (present) and 62 (swapped) of /proc/PID/pagemap (admin-guide/mm/pagemap.rst).
    """
    page = mmap.PAGESIZE
    try:
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise refused(pid, exc) from exc
    try:
        for mapping in where:
            begin = None
            address = mapping.start
            # A mapping may be terabytes of nothing (a sanitizer's shadow): never ask for it whole.
            for piece in range(mapping.start // page, mapping.end // page, _PAGEMAP_PIECE):
                count = min(_PAGEMAP_PIECE, mapping.end // page - piece)
                raw = os.pread(pagemap, count * 8, piece * 8)
                for entry in array.array("Q", raw[: len(raw) // 8 * 8]):
                    if entry >> 62:
                        if begin is None:
                            begin = address
                    elif begin is not None:
                        yield begin, address
                        begin = None
                    address += page
                if len(raw) < count * 8:
                    break  # the process ended
            if begin is not None:
                yield begin, address
    finally:
        os.close(pagemap)


def read_many(pid: int, ranges: Sequence[tuple[int, int]]) -> list[bytes | None]:
    """Read all (address, length) `ranges` of process `pid` in as few system calls as possible.

    Returns the bytes of each range, or None for a range that is not mapped as a whole.
    """
    found: list[bytes | None] = []
    while len(found) < len(ranges):
        batch = ranges[len(found) : len(found) + IOV_MAX]
        found.extend(_read_batch(pid, batch))
    return found


def _read_batch(pid: int, ranges: Sequence[tuple[int, int]]) -> list[bytes | None]:
    total = sum(length for _, length in ranges)
    buffer = ctypes.create_string_buffer(max(total, 1))
    local = Iovec(ctypes.addressof(buffer), total)
    remote = (Iovec * len(ranges))(*(Iovec(*one) for one in ranges))
    done = readv(pid, ctypes.byref(local), 1, remote, len(ranges), 0)
    if done < 0:
        code = ctypes.get_errno()
        if code != errno.EFAULT:
            raise refused(pid, OSError(code, os.strerror(code)))
        done = 0
    found: list[bytes | None] = []
    raw = memoryview(buffer)
    offset = 0
    for _, length in ranges:
        if offset + length > done:
            # The kernel stops at the first range it cannot read; the caller goes on behind it.
            found.append(None)
            break
        found.append(bytes(raw[offset : offset + length]))
        offset += length
    return found


def read(pid: int, address: int, length: int) -> bytes | None:
    """Return `length` bytes at `address` of process `pid`, or None where that is not mapped."""
    return read_many(pid, [(address, length)])[0]


def slabs(
    pid: int, ranges: Iterable[tuple[int, int]], size: int, overlap: int
) -> Iterator[tuple[int, bytes]]:
    """Yield (address, bytes) of the (start, end) `ranges` of process `pid`, `size` bytes at a time.

    Each slab goes on for `overlap` bytes, so that nothing that long is cut. For large ranges: one
    pread(2) of /proc/PID/mem a slab copies once, where `read_many` copies twice.
    """
    try:
        mem = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise refused(pid, exc) from exc
    try:
        for start, end in ranges:
            for at in range(start, end, size):
                try:
                    yield at, os.pread(mem, min(size + overlap, end - at), at)
                except OSError:
                    continue  # unmapped since it was listed
    finally:
        os.close(mem)
