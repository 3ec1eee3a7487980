"""How is a fixed set of another process's fields read again and again, at the least cost?

process_vm_readv(2) costs by the remote range and by the page, not by the byte. So fields that lie
near each other are one remote range, and the bytes between them go into one place that stays in
the cache; what is wanted lands side by side in `buffer`. Nothing is allocated while reading.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
from typing import TYPE_CHECKING

from kickcall.host.memory import IOV_MAX, Iovec, readv, refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    Field = tuple[int, int]
    """Address and length in the other process."""


class _Call:
    """One system call, prepared: `fields[k]` are the numbers of the fields in remote range k."""

    def __init__(
        self, remote: list[Field], local: list[Field], fields: list[list[int]], total: int
    ) -> None:
        self.remote = (Iovec * len(remote))(*(Iovec(*one) for one in remote))
        self.local = (Iovec * len(local))(*(Iovec(*one) for one in local))
        self.arguments = (self.local, len(local), self.remote, len(remote), 0)
        self.fields = fields
        self.total = total


class Gather:
    """Reads `fields` of process `pid` into `buffer`, one behind the other, in their order.

    A gap between two fields that is shorter than a page is read with them: it touches no page that
    the fields do not touch. With `merge=False` the fields are read one by one, in their order.
    """

    def __init__(self, pid: int, fields: Sequence[Field], *, merge: bool = True) -> None:
        self.pid = pid
        self.fields = list(fields)
        self.missing: set[int] = set()
        """Numbers of the fields that were not mapped when they were last read."""
        self._merge = merge
        self.offsets: list[int] = []
        total = 0
        for _, length in fields:
            self.offsets.append(total)
            total += length
        self._buffer = ctypes.create_string_buffer(max(total, 1))
        self._junk = ctypes.create_string_buffer(mmap.PAGESIZE)
        self.address = ctypes.addressof(self._buffer)
        self.buffer = memoryview(self._buffer).cast("B")[:total]
        """What `read` found: field k from `offsets[k]` on."""
        self._calls = list(self._plan(range(len(fields)), merge))

    def move(self, number: int, address: int) -> None:
        """Read field `number` from `address` from now on. Only without merging."""
        assert not self._merge
        self.fields[number] = (address, self.fields[number][1])
        call, at = divmod(number, IOV_MAX)
        self._calls[call].remote[at].base = address

    def read(self) -> None:
        """Read all fields. Those that are not mapped keep their old bytes and are in `missing`.

        Raises MachineGoneError or PrivilegeError.
        """
        if self.missing:
            self.missing = set()
        for call in self._calls:
            if readv(self.pid, *call.arguments) != call.total:
                self._one_by_one(call)

    def _one_by_one(self, call: _Call) -> None:
        """The kernel stops at the first range that it cannot read: find out which ones."""
        for number in itertools.chain.from_iterable(call.fields):
            (alone,) = self._plan([number], merge=False)
            done = readv(self.pid, *alone.arguments)
            code = ctypes.get_errno()
            if done < 0 and code != errno.EFAULT:
                raise refused(self.pid, OSError(code, os.strerror(code)))
            if done != alone.total:
                self.missing.add(number)

    def _plan(self, numbers: Iterable[int], merge: bool) -> Iterator[_Call]:
        remote: list[Field] = []
        local: list[Field] = []
        fields: list[list[int]] = []
        for group in self._groups(numbers, merge):
            start = self.fields[group[0]][0]
            pieces: list[Field] = []
            at = start
            for number in group:
                address, length = self.fields[number]
                if address > at:
                    pieces.append((ctypes.addressof(self._junk), address - at))
                target = self.address + self.offsets[number]
                if pieces and sum(pieces[-1]) == target:
                    pieces[-1] = (pieces[-1][0], pieces[-1][1] + length)
                else:
                    pieces.append((target, length))
                at = address + length
            if len(remote) == IOV_MAX or len(local) + len(pieces) > IOV_MAX:
                yield _Call(remote, local, fields, sum(length for _, length in remote))
                remote, local, fields = [], [], []
            remote.append((start, at - start))
            local += pieces
            fields.append(group)
        if remote:
            yield _Call(remote, local, fields, sum(length for _, length in remote))

    def _groups(self, numbers: Iterable[int], merge: bool) -> Iterator[list[int]]:
        if not merge:
            yield from ([number] for number in numbers)
            return
        group: list[int] = []
        end = 0
        for number in sorted(numbers, key=lambda number: self.fields[number]):
            address, length = self.fields[number]
            near = 0 <= address - end < mmap.PAGESIZE
            if group and not (near and len(group) < IOV_MAX // 2):
                yield group
                group = []
            group.append(number)
            end = address + length
        if group:
            yield group
