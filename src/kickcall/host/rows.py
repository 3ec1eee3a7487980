"""Which rows of another process's fields changed since the last look?

A row is some fields that belong together. Rows are compared in blocks, so that a look at rows that
rest costs next to nothing beyond the reading.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from kickcall.host.gather import Gather

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kickcall.host.gather import Field
    from kickcall.host.shared_memory import SharedRun

_BLOCK = 64
"""Rows that are compared at once."""
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Rows(Protocol):
    """Rows that can be looked at again and again."""

    def read(self) -> list[int]:
        """Look, and return the numbers of the rows that changed, or that could not be read."""
        ...

    def row(self, number: int) -> bytes | None:
        """Return a row's fields as they were at the last look; None where it could not be read."""
        ...


class ReadRows:
    """Rows that are read with process_vm_readv(2)."""

    def __init__(self, pid: int, rows: Sequence[Sequence[Field]]) -> None:
        self._gather = Gather(pid, [one for row in rows for one in row])
        self._starts = [0]
        self._row_of: list[int] = []
        for number, row in enumerate(rows):
            self._starts.append(self._starts[-1] + sum(length for _, length in row))
            self._row_of += [number] * len(row)
        self._missing: set[int] = set()
        size = max(self._starts[-1], 1)
        self._before = ctypes.create_string_buffer(size)
        self._at_before = ctypes.addressof(self._before)
        self._blocks = [
            (first, min(first + _BLOCK, len(rows))) for first in range(0, len(rows), _BLOCK)
        ]

    def read(self) -> list[int]:
        """Look, and return the numbers of the rows that changed, or that could not be read."""
        self._gather.read()
        self._missing = {self._row_of[one] for one in self._gather.missing}
        changed = list(self._missing)
        now, before, starts = self._gather.address, self._at_before, self._starts
        if not _memcmp(now, before, starts[-1]):
            return changed
        for first, last in self._blocks:
            start, size = starts[first], starts[last] - starts[first]
            if not _memcmp(now + start, before + start, size):
                continue
            for number in range(first, last):
                at = starts[number]
                if _memcmp(now + at, before + at, starts[number + 1] - at):
                    changed.append(number)
            ctypes.memmove(before + start, now + start, size)
        return changed

    def row(self, number: int) -> bytes | None:
        """Return a row's fields as they were at the last look; None where it could not be read."""
        if number in self._missing:
            return None
        return bytes(self._gather.buffer[self._starts[number] : self._starts[number + 1]])


@dataclass(slots=True)
class _Chunk:
    """Some rows of one mapping, in ascending order, that one `struct` takes in at once."""

    view: memoryview
    base: int
    rows: list[int] = field(default_factory=list)
    fields: list[list[tuple[int, int]]] = field(default_factory=list)
    """For each row (address, length), ascending."""
    slices: list[tuple[int, int]] = field(default_factory=list)
    layout: struct.Struct = field(default_factory=lambda: struct.Struct(""))
    values: tuple[int, ...] = ()

    def prepare(self) -> None:
        """Work out the format: every gap is padding, and no field is read byte by byte.

        `=` takes the native access where the size is the native one (CPython, Modules/_struct.c),
        so an aligned field is read at once.
        """
        words, at, count = ["="], self.base, 0
        for row in self.fields:
            for address, length in row:
                words.append(f"{address - at}x{_CODES[length]}")
                at = address + length
            self.slices.append((count, count + len(row)))
            count += len(row)
        self.layout = struct.Struct("".join(words))


_CODES = {2: "H", 4: "I"}


class MappedRows:
    """Rows of 2 and 4 byte fields that lie in memory which is mapped here: read with no call."""

    def __init__(self, runs: Sequence[SharedRun], rows: Sequence[Sequence[Field]]) -> None:
        self.unfit: list[int] = []
        """Numbers of the rows that must be read another way: outside `runs`, or entangled."""
        self._home: dict[int, tuple[_Chunk, int, tuple[int, ...], struct.Struct]] = {}
        self._chunks = list(self._plan(runs, rows))

    def _plan(self, runs: Sequence[SharedRun], rows: Sequence[Sequence[Field]]) -> Iterator[_Chunk]:
        chunk: _Chunk | None = None
        run_of_chunk: SharedRun | None = None
        end = 0
        for number in sorted(range(len(rows)), key=lambda number: min(rows[number])):
            ascending = sorted(rows[number])
            first, last = ascending[0][0], sum(ascending[-1])
            run = next((run for run in runs if run.start <= first and last <= run.end), None)
            apart = all(
                sum(one) <= following[0] for one, following in itertools.pairwise(ascending)
            )
            if run is None or not apart or (run is run_of_chunk and first < end):
                self.unfit.append(number)
                continue
            if chunk is None or run is not run_of_chunk or len(chunk.rows) == _BLOCK:
                if chunk is not None:
                    chunk.prepare()
                    yield chunk
                run_of_chunk = run
                view = memoryview(run.view)[first - run.start :]
                chunk = _Chunk(view, first)
            order = tuple(ascending.index(one) for one in rows[number])
            packer = struct.Struct("=" + "".join(_CODES[length] for _, length in rows[number]))
            self._home[number] = (chunk, len(chunk.rows), order, packer)
            chunk.rows.append(number)
            chunk.fields.append(ascending)
            end = last
        if chunk is not None:
            chunk.prepare()
            yield chunk

    def read(self) -> list[int]:
        """Look, and return the numbers of the rows that changed."""
        changed = []
        for chunk in self._chunks:
            now = chunk.layout.unpack_from(chunk.view)
            before = chunk.values
            if now != before:
                for number, (start, end) in zip(chunk.rows, chunk.slices, strict=True):
                    if now[start:end] != before[start:end]:
                        changed.append(number)
                chunk.values = now
        return changed

    def row(self, number: int) -> bytes:
        """Return a row's fields as they were at the last look."""
        chunk, at, order, packer = self._home[number]
        start, end = chunk.slices[at]
        values = chunk.values[start:end]
        return packer.pack(*(values[k] for k in order))

    def close(self) -> None:
        """Let go of the views of the mappings, so that those can be closed."""
        for chunk in self._chunks:
            chunk.view.release()
        self._chunks = []
