"""How is one thread of another process held, alone, at an exact place? (ptrace(2), x86-64)

The thread's siblings run on. Where the tracer ends, the kernel lets go of what it held: no fault
outlives the process that made it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kickcall.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Callable

# linux/ptrace.h
_PTRACE_SYSCALL = 24
_PTRACE_DETACH = 17
_PTRACE_SEIZE = 0x4206
_PTRACE_INTERRUPT = 0x4207
_PTRACE_LISTEN = 0x4208
_PTRACE_GET_SYSCALL_INFO = 0x420E
_O_TRACESYSGOOD = 1
_EVENT_STOP = 128
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_WALL = 0x40000000  # linux/wait.h, __WALL: threads that are no children of ours, too
_INFO_ENTRY = 1

# asm/unistd_64.h
READ = 0
WAITS = frozenset({7, 232, 271, 281, 426})
"""poll, epoll_wait, ppoll, epoll_pwait, io_uring_enter: where a thread that serves queues sleeps.
QEMU's main loop gives up the big lock for it (util/main-loop.c, os_host_main_loop_wait)."""

_PAUSE = 0.0003
"""Seconds between two looks at a traced thread. waitpid(2) has no timeout."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class _SyscallInfo(ctypes.Structure):
    """`struct ptrace_syscall_info` (Linux 5.3): its head, and its largest arm."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction_pointer", ctypes.c_uint64),
        ("stack_pointer", ctypes.c_uint64),
        # entry: nr, args[6]; exit: rval, is_error
        ("words", ctypes.c_uint64 * 8),
    )


@dataclass(frozen=True, slots=True)
class Syscall:
    """A thread that enters a system call, or leaves one."""

    number: int
    first: int
    """The first argument: for read(2) the descriptor."""
    entering: bool

    def reads(self, fd: int) -> bool:
        """Tell whether the thread is about to read `fd`."""
        return self.entering and self.number == READ and self.first == fd

    @property
    def wakes(self) -> bool:
        """Whether the thread comes out of a sleep: it holds no lock of its program then."""
        return not self.entering and self.number in WAITS


class HeldThread:
    """A thread that is held, or will be when it comes by.

    `at` picks the place among the system calls that the thread makes; without `at` it is held
    where it is. Entering the block returns when the thread is traced, `wait` when it is held, and
    leaving the block lets it go.

        with HeldThread(tid, at=lambda call: call.reads(fd)) as held:
            ...
            held.wait()
    """

    def __init__(self, tid: int, at: Callable[[Syscall], bool] | None = None) -> None:
        self.tid = tid
        self._at = at
        self._traced = threading.Event()
        self._held = threading.Event()
        self._let_go = threading.Event()
        self._error: BaseException | None = None
        # Only the thread that seized may go on with ptrace: so it has one of its own.
        self._tracer = threading.Thread(target=self._trace, name=f"holds-{tid}", daemon=True)

    def __enter__(self) -> Self:
        self._tracer.start()
        self._traced.wait()
        self._raise()
        if self._at is None:
            self.wait()
        return self

    def wait(self, timeout: float = 20.0) -> None:
        """Return when the thread is held. Raises LabError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self._held.wait(0.05):
            self._raise()
            if time.monotonic() > deadline:
                raise LabError(f"thread {self.tid} did not come to where it was to be held")
        self._raise()

    @property
    def is_held(self) -> bool:
        """Whether the thread is held now."""
        return self._held.is_set() and self._error is None and not self._let_go.is_set()

    def release(self) -> None:
        """Let the thread go on. Nothing happens if it was let go before."""
        self._let_go.set()
        if self._tracer.ident is not None:
            self._tracer.join()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _trace(self) -> None:
        try:
            self._request(_PTRACE_SEIZE, data=_O_TRACESYSGOOD)
        except OSError as error:
            self._error = LabError(f"cannot trace thread {self.tid}: {error.strerror}")
            self._traced.set()
            return
        try:
            self._request(_PTRACE_INTERRUPT)
            self._follow()
        except OSError as error:
            self._error = LabError(f"thread {self.tid} was lost while traced: {error.strerror}")
        except LabError as error:
            # From `at`. The kernel lets the thread go when this one ends.
            self._error = error
        finally:
            self._traced.set()
            self._held.set()

    def _follow(self) -> None:
        number = first = -1
        while True:
            stop = self._next_stop()
            if stop is None:
                raise OSError(errno.ESRCH, "it ended")
            deliver = 0
            if stop == _SYSCALL_STOP:
                info = self._syscall_info()
                if info.op == _INFO_ENTRY:
                    number, first = info.words[0], info.words[1] & 0xFFFFFFFF
                call = Syscall(number, first, info.op == _INFO_ENTRY)
                if self._at is not None and not self._let_go.is_set() and self._at(call):
                    self._hold()
            elif stop >> 8 == _EVENT_STOP:
                if stop & 0xFF != signal.SIGTRAP:
                    # The whole process was stopped, by SIGSTOP or the like: let it be.
                    self._request(_PTRACE_LISTEN)
                    continue
                if self._at is None and not self._let_go.is_set():
                    self._hold()
            else:
                deliver = stop
            if self._let_go.is_set():
                self._request(_PTRACE_DETACH, data=deliver)
                return
            self._request(_PTRACE_SYSCALL, data=deliver)
            self._traced.set()

    def _hold(self) -> None:
        self._traced.set()
        self._held.set()
        self._let_go.wait()

    def _next_stop(self) -> int | None:
        """Return the signal (and event) of the thread's next stop; None if it ended."""
        interrupted = False
        while True:
            pid, status = os.waitpid(self.tid, _WALL | os.WNOHANG)
            if pid:
                return (status >> 8) & 0xFFFF if os.WIFSTOPPED(status) else None
            if self._let_go.is_set() and not interrupted:
                # It sleeps in the kernel: only a stopped thread can be detached.
                self._request(_PTRACE_INTERRUPT)
                interrupted = True
            time.sleep(_PAUSE)

    def _syscall_info(self) -> _SyscallInfo:
        info = _SyscallInfo()
        self._request(_PTRACE_GET_SYSCALL_INFO, ctypes.sizeof(info), ctypes.addressof(info))
        return info

    def _request(self, request: int, address: int = 0, data: int = 0) -> None:
        if _libc.ptrace(request, self.tid, address, data) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
