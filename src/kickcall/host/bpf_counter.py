"""How are eventfds' signals counted in the kernel at the least cost? By a program of its own.

At the entry of each function that signals an eventfd a program of some 40 instructions counts, by
eventfd and thread. An eventfd's id is a small number (fs/eventfd.c, ida_alloc): it says at once
where the count is, or that nobody wants it. What other threads than the first signal is looked up
in a map. A kprobe with a histogram (`host/hist_counter.py`) counts the same for several times the
instructions, on kernels that cannot have such programs.
"""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING, Final, Self

from kickcall.errors import KernelViewError
from kickcall.host.bpf import R0, R1, R2, R3, R4, R6, R7, R8, STACK, Area, Attached, Map, Program
from kickcall.host.btf import kernel_types
from kickcall.host.hist import Counted, Hits, size_for, thread_name
from kickcall.host.signal_sites import IN_KERNEL, signal_sites

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kickcall.host.signal_sites import Sites

# include/uapi/linux/bpf.h, ___BPF_FUNC_MAPPER
_LOOKUP, _UPDATE, _NOW, _CURRENT, _COMM, _READ_KERNEL = 1, 2, 5, 14, 16, 113
_NOEXIST: Final = 1

_COUNT: Final = struct.Struct("=QQ16s")
"""How often, when last (ns of CLOCK_MONOTONIC), and the thread's name when it did so first."""
_LAST_AT, _COMM_AT = 8, 16

# An eventfd's slot: a word that says who signalled it first, the count of that thread, and how many
# signals of others found no room. It is a line of the processor's cache, so that who kicks a queue
# never waits for who calls it.
_SLOT_BITS: Final = 6
_COUNT_AT, _DROPPED_AT = 8, 40
_NOBODY, _SOMEBODY = 1, 2
"""The lower half of the first word, 0 where nothing is counted. Above is the first thread's id."""
_SLOTS_MIN, _SLOTS_MAX = 1024, 65536
"""The kernel makes no larger element of a map than 4 MiB (KMALLOC_MAX_SIZE)."""
_SPARE_IDS: Final = 256
"""A guest that reboots gets other eventfds, while those that it had are still held."""
_KEY: Final = struct.Struct("=II")
"""Of a count in the map: the eventfd's id, and the thread's."""
_AT_ID, _AT_TID, _AT_COUNT = -8, -4, -40
"""Key and count on the program's stack."""


class BpfCounter:
    """Programs of ours count the signals of some eventfds, from now on until this is closed.

    Raises PrivilegeError, or KernelViewError where this kernel cannot do it: Linux before 5.12, or
    without BTF, or (arm64) before 6.0; or eventfds' ids beyond 65535. If this process is killed
    the kernel takes all away.
    """

    def __init__(self, ids: Iterable[int], threads: int) -> None:
        self._threads = threads
        self._sites = signal_sites()
        self._tables: list[_Table] = []
        self._room = 0
        self._slots = 0
        self._missed_at = kernel_types().struct("bpf_prog_info").member("recursion_misses").offset
        try:
            self.add(ids)
        except BaseException:
            self.close()
            raise

    def add(self, ids: Iterable[int]) -> None:
        """Count these eventfds, too, from now on."""
        new = set(ids)
        entries, highest = len(new) * self._threads, max(new, default=0)
        if self._room < entries or self._slots <= highest:
            self._slots, self._room = _slots_for(highest), size_for(entries)
            for site in self._sites.functions:
                self._tables.append(_Table(self._sites, site, self._slots, self._room))
        self._room -= entries
        for table in self._tables[-len(self._sites.functions) :]:
            table.want(new)

    def counts(self) -> Counted:
        """Return what was counted so far. Signals go on meanwhile."""
        found = Counted([], [], 0)
        dropped = 0
        for table in self._tables:
            hits = found.in_kernel if table.site == IN_KERNEL else found.by_write
            hits.extend(table.hits())
            dropped += table.dropped(self._missed_at)
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
    """What is counted at one site, of eventfds whose ids are below `slots`.

    There is room for so many counts of threads that are not the first to signal an eventfd.
    """

    def __init__(self, sites: Sites, site: str, slots: int, room: int) -> None:
        function, number = sites.functions[site].function, sites.functions[site].number
        if number is None:
            raise KernelViewError(f"the kernel's BTF does not tell of {function}")
        self.site = site
        self._ids: set[int] = set()
        with contextlib.ExitStack() as stack:
            self._slots = Area(slots << _SLOT_BITS)
            stack.callback(self._slots.close)
            self._others = Map(_KEY.size, _COUNT.size, room)
            stack.callback(self._others.close)
            code = counting(sites, site, self._slots.fd, slots, self._others.fd)
            self._attached = Attached(code, number)
            stack.callback(self._attached.close)
            self._all = stack.pop_all()

    def want(self, ids: set[int]) -> None:
        for one in ids - self._ids:
            self._slot(one)[0] = _NOBODY
        self._ids |= ids

    def hits(self) -> Iterator[Hits]:
        for one in self._ids:
            slot = self._slot(one)
            first, total, last = slot[:3]
            if total:
                yield Hits(one, first >> 32, thread_name(slot[3:5].tobytes()), total, last)
        for key, count in self._others.items():
            total, last, comm = _COUNT.unpack(count)
            eventfd_id, tid = _KEY.unpack(key)
            yield Hits(eventfd_id, tid, thread_name(comm), total, last)

    def dropped(self, missed_at: int) -> int:
        without_room = sum(self._slot(one)[_DROPPED_AT // 8] for one in self._ids)
        return without_room + self._attached.missed(missed_at)

    def _slot(self, eventfd_id: int) -> memoryview[int]:
        """Return the words of an eventfd's slot."""
        at = (eventfd_id << _SLOT_BITS) // 8
        return self._slots.words[at : at + (1 << _SLOT_BITS) // 8]

    def close(self) -> None:
        self._all.close()


def _slots_for(highest: int) -> int:
    """Return for how many eventfds there are slots where this id is the highest."""
    slots = _SLOTS_MIN
    while slots < highest + _SPARE_IDS and slots < _SLOTS_MAX:
        slots *= 2
    if slots <= highest:
        raise KernelViewError(f"an eventfd has the id {highest}: kickcall counts to {slots - 1}")
    return slots


def counting(sites: Sites, site: str, slots: int, most: int, others: int) -> bytes:
    """Return the program that counts at `site`.

    It counts in the area of descriptor `slots`, which has `most` slots, and where a slot is of
    another thread in the map of descriptor `others`.
    """
    program = Program()
    _take_id(program, sites, site)
    program.load(R7, STACK, _AT_ID, 4)
    program.jump_if_at_least(R7, most, "end")
    program.shift(R7, _SLOT_BITS)
    program.set_area(R6, slots)
    program.add_register(R6, R7)
    program.load(R7, R6, 0, 8)
    program.jump_if(R7, 0, "end")
    program.call(_CURRENT)  # R0: the process in the upper half, the thread in the lower
    program.copy(R8, R0)
    program.shift(R8, 32)
    program.add(R8, _SOMEBODY)
    program.jump_if_same(R7, R8, "of the first")
    program.set(R0, _NOBODY)
    program.swap_if_r0(R6, 0, R8)
    program.jump_unless(R0, _NOBODY, "of another")
    _take_name(program, R6, _COUNT_AT + _COMM_AT)

    program.label("of the first")
    program.copy(R7, R6)
    program.add(R7, _COUNT_AT)
    program.label("count")
    program.set(R1, 1)
    program.add_atomically(R7, 0, R1)
    program.call(_NOW)
    program.store(R7, _LAST_AT, R0, 8)
    program.label("end")
    program.end()

    program.label("of another")
    program.shift(R8, -32)
    program.store(STACK, _AT_TID, R8, 4)
    _look_up(program, others)
    program.copy(R7, R0)
    program.jump_unless(R0, 0, "count")
    program.store_number(STACK, _AT_COUNT, 1, 8)
    program.call(_NOW)
    program.store(STACK, _AT_COUNT + _LAST_AT, R0, 8)
    _take_name(program, STACK, _AT_COUNT + _COMM_AT)
    program.set_map(R1, others)
    _point(program, R2, _AT_ID)
    _point(program, R3, _AT_COUNT)
    program.set(R4, _NOEXIST)
    program.call(_UPDATE)
    program.jump_if(R0, 0, "end")
    # An interrupt came between and was first; or there is no room.
    _look_up(program, others)
    program.copy(R7, R0)
    program.jump_unless(R0, 0, "count")
    program.set(R1, 1)
    program.add_atomically(R6, _DROPPED_AT, R1)
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
        program.jump_unless(R0, 0, "end")


def _take_name(program: Program, at: int, offset: int) -> None:
    """Put the thread's name `offset` bytes behind register `at`."""
    program.copy(R1, at)
    program.add(R1, offset)
    program.set(R2, 16)
    program.call(_COMM)


def _look_up(program: Program, others: int) -> None:
    """Let R0 be where the count of the key on the stack is, or 0."""
    program.set_map(R1, others)
    _point(program, R2, _AT_ID)
    program.call(_LOOKUP)


def _point(program: Program, register: int, offset: int) -> None:
    program.copy(register, STACK)
    program.add(register, offset)
