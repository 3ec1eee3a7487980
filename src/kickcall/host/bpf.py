"""How does a program of some instructions get into the kernel, without a toolchain?

The system call bpf(2), as include/uapi/linux/bpf.h declares it. What is made here lives as long as
a descriptor of it is open: of a process that is killed the kernel keeps nothing.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
import sys
from typing import TYPE_CHECKING, Final

from kickcall.errors import KernelViewError, PrivilegeError

if TYPE_CHECKING:
    from collections.abc import Iterator

_SYSCALL: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280}
"""syscall_64.tbl, asm-generic/unistd.h."""

# enum bpf_cmd
_MAP_CREATE, _PROG_LOAD = 0, 5
_OBJ_GET_INFO_BY_FD, _RAW_TRACEPOINT_OPEN, _MAP_LOOKUP_BATCH = 15, 17, 24
_MAP_TYPE_HASH, _MAP_TYPE_ARRAY = 1, 2
_F_MMAPABLE: Final = 1 << 10
_PROG_TYPE_TRACING: Final = 26
_TRACE_FENTRY: Final = 24
_LOG_BYTES: Final = 1 << 16

# The parts of union bpf_attr that these commands read.
_MAP: Final = struct.Struct("=5I8x16s")
_PROGRAM: Final = struct.Struct("=IIQQIIQ8x16s4xI36xI4x")
_BATCH: Final = struct.Struct("=QQQQIIQQ")
_INFO: Final = struct.Struct("=IIQ")
_TRACEPOINT: Final = struct.Struct("=QI4x")

_INSTRUCTION: Final = struct.Struct("=BBhi")
_libc = ctypes.CDLL(None, use_errno=True)

_NAME: Final = b"kickcall"
_LICENSE: Final = ctypes.create_string_buffer(b"GPL and additional rights")
"""The kernel gives some helpers to programs under the GPL alone (include/linux/license.h). Those of
kickcall may be used under GPL-2.0 as well as under its own licence."""


class Map:
    """A hash map in the kernel: keys and values of fixed sizes, in bytes."""

    def __init__(self, key: int, value: int, most: int) -> None:
        self.key, self.value, self.most = key, value, most
        self.fd = _bpf(_MAP_CREATE, _MAP.pack(_MAP_TYPE_HASH, key, value, most, 0, _NAME), "a map")

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield all keys with their values; those that come meanwhile may be missing."""
        keys = ctypes.create_string_buffer(self.key * self.most)
        values = ctypes.create_string_buffer(self.value * self.most)
        token = ctypes.c_uint32()
        attr = ctypes.create_string_buffer(
            _BATCH.pack(
                *(0, ctypes.addressof(token), ctypes.addressof(keys), ctypes.addressof(values)),
                *(self.most, self.fd, 0, 0),
            ),
            _BATCH.size,
        )
        try:
            _bpf(_MAP_LOOKUP_BATCH, attr, "a look into a map")
        except KernelViewError as exc:
            # That is how it says that these were all.
            if not isinstance(exc.__cause__, FileNotFoundError):
                raise
        (count,) = struct.unpack_from("=I", attr, 32)
        found, theirs = memoryview(keys), memoryview(values)
        for at in range(count):
            yield (
                bytes(found[at * self.key : (at + 1) * self.key]),
                bytes(theirs[at * self.value : (at + 1) * self.value]),
            )

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)


class Area:
    """Memory that programs in the kernel and this process share (Linux 5.5): zeroes at first."""

    def __init__(self, size: int) -> None:
        self.fd = _bpf(
            _MAP_CREATE, _MAP.pack(_MAP_TYPE_ARRAY, 4, size, 1, _F_MMAPABLE, _NAME), "a map"
        )
        try:
            self._memory = mmap.mmap(self.fd, size)
        except OSError as exc:
            os.close(self.fd)
            raise KernelViewError(f"a map cannot be mapped: {exc.strerror}") from exc
        self.words = memoryview(self._memory).cast("Q")
        """All of it, in words of 8 bytes as the kernel writes them: no value is ever torn."""

    def close(self) -> None:
        """Let go of it."""
        self.words.release()
        self._memory.close()
        os.close(self.fd)


class Attached:
    """A program that runs wherever the kernel enters a function, until this is closed.

    `function` is the function's number in the kernel's BTF. Raises PrivilegeError, or
    KernelViewError where the kernel does not take the program or cannot have it there.
    """

    def __init__(self, instructions: bytes, function: int) -> None:
        self.program = _load(instructions, function)
        try:
            self._link = _bpf(
                _RAW_TRACEPOINT_OPEN, _TRACEPOINT.pack(0, self.program), "a program at a function"
            )
        except BaseException:
            os.close(self.program)
            raise

    def missed(self, at: int) -> int:
        """Return how often the program was not run, as it ran already on that processor.

        `at` is where `struct bpf_prog_info` has its recursion_misses (Linux 5.12).
        """
        info = ctypes.create_string_buffer(at + 8)
        attr = _INFO.pack(self.program, len(info), ctypes.addressof(info))
        _bpf(_OBJ_GET_INFO_BY_FD, attr, "what became of a program")
        return int(struct.unpack_from("=Q", info, at)[0])

    def close(self) -> None:
        """Take it away from the function."""
        os.close(self._link)
        os.close(self.program)


def _load(instructions: bytes, function: int) -> int:
    code = ctypes.create_string_buffer(instructions, len(instructions))
    log = ctypes.create_string_buffer(_LOG_BYTES)
    attr = _PROGRAM.pack(
        *(_PROG_TYPE_TRACING, len(instructions) // 8, ctypes.addressof(code)),
        *(ctypes.addressof(_LICENSE), 1, len(log), ctypes.addressof(log)),
        *(_NAME, _TRACE_FENTRY, function),
    )
    try:
        return _bpf(_PROG_LOAD, attr, "a program")
    except KernelViewError as exc:
        # The verifier's last words, before its statistics, are what it objects to.
        said = [line for line in log.value.decode(errors="replace").splitlines() if line]
        why = [line for line in said if not line.startswith("processed ")][-1:]
        raise KernelViewError(": ".join([str(exc), *why])) from exc


def _bpf(command: int, attr: bytes | ctypes.Array[ctypes.c_char], what: str) -> int:
    """Call bpf(2); return what it returns, a descriptor if it makes something."""
    number = _SYSCALL.get(platform.machine())
    if number is None or sys.byteorder != "little":
        raise KernelViewError(f"kickcall has no BPF program for {platform.machine()}")
    taken = ctypes.create_string_buffer(attr, len(attr)) if isinstance(attr, bytes) else attr
    result = int(_libc.syscall(number, command, taken, len(taken)))
    if result >= 0:
        return result
    exc = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    kind = PrivilegeError if exc.errno in (errno.EPERM, errno.EACCES) else KernelViewError
    raise kind(f"the kernel did not take {what} (bpf(2)): {exc.strerror}") from exc


# Instructions (Documentation/bpf/standardization/instruction-set.rst)

R0, R1, R2, R3, R4, R6, R7, R8, STACK = 0, 1, 2, 3, 4, 6, 7, 8, 10
"""Registers: a result, arguments, what a call leaves alone, and the end of the stack."""


class Program:
    """Instructions, put together one by one; `code` is all of them."""

    def __init__(self) -> None:
        self._lines: list[tuple[int, int, int, int | str, int]] = []
        self._labels: dict[str, int] = {}

    def load(self, into: int, at: int, offset: int, size: int) -> None:
        """Let register `into` be what stands `offset` bytes behind register `at`: 4 or 8 bytes."""
        self._add({4: 0x61, 8: 0x79}[size], into, at, offset)

    def store(self, at: int, offset: int, value: int, size: int) -> None:
        """Store register `value`, 4 or 8 bytes of it, `offset` bytes behind register `at`."""
        self._add({4: 0x63, 8: 0x7B}[size], at, value, offset)

    def store_number(self, at: int, offset: int, number: int, size: int) -> None:
        """Store a number in 4 or 8 bytes."""
        self._add({4: 0x62, 8: 0x7A}[size], at, 0, offset, number)

    def add_atomically(self, at: int, offset: int, value: int) -> None:
        """Add register `value` to the 8 bytes there."""
        self._add(0xDB, at, value, offset)

    def swap_if_r0(self, at: int, offset: int, value: int) -> None:
        """If the 8 bytes there are R0, let them be `value`; R0 is what they were (Linux 5.12)."""
        self._add(0xDB, at, value, offset, 0xF1)

    def copy(self, into: int, value: int) -> None:
        """Let a register be another one."""
        self._add(0xBF, into, value)

    def set(self, into: int, number: int) -> None:
        """Let a register be a number."""
        self._add(0xB7, into, imm=number)

    def add(self, into: int, number: int) -> None:
        """Add a number to a register."""
        self._add(0x07, into, imm=number)

    def add_register(self, into: int, value: int) -> None:
        """Add a register to another one."""
        self._add(0x0F, into, value)

    def shift(self, into: int, bits: int) -> None:
        """Shift a register's bits to the left; to the right if `bits` is negative."""
        self._add(0x67 if bits > 0 else 0x77, into, imm=abs(bits))

    def set_area(self, into: int, fd: int) -> None:
        """Let a register be where the area of this descriptor begins."""
        self._set_wide(into, 2, fd)  # BPF_PSEUDO_MAP_VALUE

    def set_map(self, into: int, fd: int) -> None:
        """Let a register be the map of this descriptor."""
        self._set_wide(into, 1, fd)  # BPF_PSEUDO_MAP_FD

    def _set_wide(self, into: int, kind: int, fd: int) -> None:
        self._add(0x18, into, kind, imm=fd)
        self._add(0)

    def call(self, helper: int) -> None:
        """Call a helper: R1 to R5 are gone then, and R0 is what it returns."""
        self._add(0x85, imm=helper)

    def jump_if(self, value: int, number: int, label: str) -> None:
        """Go on at `label` if a register is that number."""
        self._add(0x15, value, 0, label, number)

    def jump_unless(self, value: int, number: int, label: str) -> None:
        """Go on at `label` if a register is not that number."""
        self._add(0x55, value, 0, label, number)

    def jump_if_at_least(self, value: int, number: int, label: str) -> None:
        """Go on at `label` if a register, taken as unsigned, is that number or more."""
        self._add(0x35, value, 0, label, number)

    def jump_if_same(self, one: int, other: int, label: str) -> None:
        """Go on at `label` if two registers are equal."""
        self._add(0x1D, one, other, label)

    def label(self, name: str) -> None:
        """Let `name` be the place of the next instruction."""
        self._labels[name] = len(self._lines)

    def end(self) -> None:
        """End the program; a program at the start of a function returns 0."""
        self.set(R0, 0)
        self._add(0x95)

    def _add(
        self, code: int, into: int = 0, value: int = 0, offset: int | str = 0, imm: int = 0
    ) -> None:
        self._lines.append((code, into, value, offset, imm))

    @property
    def code(self) -> bytes:
        """The program as bpf(2) takes it."""
        return b"".join(
            _INSTRUCTION.pack(
                code,
                into | value << 4,
                self._labels[offset] - number - 1 if isinstance(offset, str) else offset,
                imm,
            )
            for number, (code, into, value, offset, imm) in enumerate(self._lines)
        )
