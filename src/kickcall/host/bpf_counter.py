"""How are eventfds' signals counted in the kernel at the least cost? By a program of its own.

At the entry of each function that signals an eventfd a program of some 40 instructions counts, in a
map, by eventfd and thread. A kprobe with a histogram (`host/hist_counter.py`) counts the same for
several times the instructions, on kernels that cannot have such programs.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, Self

from kickcall.errors import KernelViewError
from kickcall.host.bpf import R0, R1, R2, R3, R4, R6, R7, R8, STACK, Attached, Map, Program
from kickcall.host.btf import kernel_types
from kickcall.host.hist import Counted, Hits, size_for, thread_name
from kickcall.host.signal_sites import IN_KERNEL, signal_sites

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kickcall.host.signal_sites import Sites

# include/uapi/linux/bpf.h, ___BPF_FUNC_MAPPER
_LOOKUP, _UPDATE, _NOW, _CURRENT, _COMM, _READ_KERNEL = 1, 2, 5, 14, 16, 113
_NOEXIST: Final = 1

_KEY: Final = struct.Struct("=II")
"""The eventfd's id, and the thread's."""
_VALUE: Final = struct.Struct("=QQ16s")
"""How often, when last (ns of CLOCK_MONOTONIC), and the thread's name when it did so first."""
_WANTED: Final = 0xFFFFFFFF
"""No thread's id: that this element is there says that its eventfd is counted. It counts the
signals that found no room."""
_AT_ID, _AT_TID, _AT_TOTAL, _AT_LAST, _AT_COMM = -8, -4, -40, -32, -24
"""Key and value on the program's stack."""


class BpfCounter:
    """Programs of ours count the signals of some eventfds, from now on until this is closed.

    Raises PrivilegeError, or KernelViewError where this kernel cannot do it: Linux before 5.6, or
    without BTF, or (arm64) before 6.0. If this process is killed the kernel takes all away.
    """

    def __init__(self, ids: Iterable[int], threads: int) -> None:
        self._threads = threads
        self._sites = signal_sites()
        self._tables: list[_Table] = []
        self._room = 0
        missed = kernel_types().struct("bpf_prog_info").find("recursion_misses")
        self._missed_at = None if missed is None else missed.offset
        try:
            self.add(ids)
        except BaseException:
            self.close()
            raise

    def add(self, ids: Iterable[int]) -> None:
        """Count these eventfds, too, from now on."""
        new = set(ids)
        entries = len(new) * (self._threads + 1)
        if self._room < entries:
            most = size_for(entries)
            for site in self._sites.functions:
                self._tables.append(_Table(self._sites, site, most))
            self._room = most
        self._room -= entries
        for table in self._tables[-len(self._sites.functions) :]:
            table.want(new)

    def counts(self) -> Counted:
        """Return what was counted so far. Signals go on meanwhile."""
        found = Counted([], [], 0)
        dropped = 0
        for table in self._tables:
            hits = found.in_kernel if table.site == IN_KERNEL else found.by_write
            for key, value in table.counted.items():
                eventfd, tid = _KEY.unpack(key)
                total, last, comm = _VALUE.unpack(value)
                if tid == _WANTED:
                    dropped += total
                else:
                    hits.append(Hits(eventfd, tid, thread_name(comm), total, last))
            if self._missed_at is not None:
                dropped += table.attached.missed(self._missed_at)
        return found._replace(dropped=dropped)

    def close(self) -> None:
        """Have nothing counted any more."""
        while self._tables:
            self._tables.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Table:
    """What is counted at one site."""

    def __init__(self, sites: Sites, site: str, most: int) -> None:
        function, number = sites.functions[site].function, sites.functions[site].number
        if number is None:
            raise KernelViewError(f"the kernel's BTF does not tell of {function}")
        self.site = site
        self.counted = Map(_KEY.size, _VALUE.size, most)
        try:
            self.attached = Attached(counting(sites, site, self.counted.fd), number)
        except BaseException:
            self.counted.close()
            raise

    def want(self, ids: set[int]) -> None:
        for one in ids:
            self.counted.update(_KEY.pack(one, _WANTED), _VALUE.pack(0, 0, b""))

    def close(self) -> None:
        self.attached.close()
        self.counted.close()


def counting(sites: Sites, site: str, counted: int) -> bytes:
    """Return the program that counts at `site` in the map of that descriptor."""
    program = Program()
    _take_id(program, sites, site)
    program.call(_CURRENT)  # R0: the process in the upper half, the thread in the lower
    program.store(STACK, _AT_TID, R0, 4)
    _look_up(program, counted)
    program.jump_if_zero(R0, "first")
    program.label("count")
    program.copy(R7, R0)
    program.set(R1, 1)
    program.add_atomically(R7, 0, R1)
    program.call(_NOW)
    program.store(R7, 8, R0, 8)
    program.label("end")
    program.end()

    program.label("first")
    program.load(R8, STACK, _AT_TID, 4)
    program.store_number(STACK, _AT_TID, -1, 4)  # _WANTED
    _look_up(program, counted)
    program.jump_if_zero(R0, "end")
    program.copy(R6, R0)
    program.store(STACK, _AT_TID, R8, 4)
    program.store_number(STACK, _AT_TOTAL, 1, 8)
    program.call(_NOW)
    program.store(STACK, _AT_LAST, R0, 8)
    _point(program, R1, _AT_COMM)
    program.set(R2, 16)
    program.call(_COMM)
    program.set_map(R1, counted)
    _point(program, R2, _AT_ID)
    _point(program, R3, _AT_TOTAL)
    program.set(R4, _NOEXIST)
    program.call(_UPDATE)
    program.jump_if_zero(R0, "end")
    # An interrupt came between and was first; or there is no room.
    _look_up(program, counted)
    program.jump_unless_zero(R0, "count")
    program.set(R1, 1)
    program.add_atomically(R6, 0, R1)
    program.end()
    return program.code


def _take_id(program: Program, sites: Sites, site: str) -> None:
    """Put the eventfd's id on the stack, from the function's first parameter."""
    program.load(R6, R1, 0, 8)
    if site == IN_KERNEL:
        program.load(R1, R6, sites.id_offset, 4)
        program.store(STACK, _AT_ID, R1, 4)
    else:
        # Only by the helper: for the verifier `void *private_data` is a number.
        program.load(R3, R6, sites.private_offset, 8)
        program.add(R3, sites.id_offset)
        _point(program, R1, _AT_ID)
        program.set(R2, 4)
        program.call(_READ_KERNEL)
        program.jump_unless_zero(R0, "end")


def _look_up(program: Program, counted: int) -> None:
    """Let R0 be where the value of the key on the stack is, or 0."""
    program.set_map(R1, counted)
    _point(program, R2, _AT_ID)
    program.call(_LOOKUP)


def _point(program: Program, register: int, offset: int) -> None:
    program.copy(register, STACK)
    program.add(register, offset)
