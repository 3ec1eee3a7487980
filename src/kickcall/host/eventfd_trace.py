"""How often is each eventfd signalled, by which thread, and when? Counted by the kernel itself.

A program where the kernel signals an eventfd, another where a process writes to one; or, where it
takes none and to record each signal, a kprobe and a histogram at each. Nobody is woken until
somebody reads. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import platform
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from kickcall.errors import KernelViewError, KickcallError, PrivilegeError
from kickcall.host.bpf_counter import BpfCounter
from kickcall.host.eventfds import read_eventfd
from kickcall.host.hist_counter import HistCounter
from kickcall.host.signal_sites import BY_WRITE, IN_KERNEL
from kickcall.host.trace_ring import parse_format, parse_page
from kickcall.host.tracefs import folder, sweep

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kickcall.host.hist import Counted
    from kickcall.host.trace_ring import Format, RawEvent

_SETTLED_NS = 2_000_000
"""An event gets its time a little before it can be read: so long is waited for others before it."""
_AIO = {"x86_64": (206, 207, 209), "aarch64": (0, 1, 2), "riscv64": (0, 1, 2)}
"""io_setup, io_destroy, io_submit: syscall_64.tbl, asm-generic/unistd.h."""
_IOCB = struct.Struct("=QIIHhIQQqQII")
"""struct iocb, include/uapi/linux/aio_abi.h."""
_IOCB_FLAG_RESFD = 1
_PROOF_S = 0.5
_log = logging.getLogger("kickcall.trace")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Signal:
    """One signal of one eventfd."""

    ns: int
    """CLOCK_MONOTONIC, in nanoseconds."""
    eventfd_id: int
    tid: int
    in_kernel: bool


class EventfdTrace:
    """The kernel counts the signals of some eventfds, from now on until this is closed.

    `threads` is about how many threads signal each of them. With `record` every signal is recorded,
    too: `signals` returns them. Raises PrivilegeError, or KernelViewError where this kernel cannot
    do it.
    """

    def __init__(self, ids: Iterable[int], *, threads: int = 16, record: bool = False) -> None:
        self._buffers: list[int] = []
        self._kinds: dict[str, Format] = {}
        self._pending: list[RawEvent] = []
        self._lost = False
        # Held until the end, so that no other eventfd gets its id.
        self._own = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            state = read_eventfd(os.getpid(), self._own)
            if state is None or state.eventfd_id < 0:
                raise KernelViewError("this kernel tells no eventfd's id: Linux 5.2 or newer")
            self._own_id = state.eventfd_id
            self._covered = {*ids, self._own_id}
            self._counter = self._start(threads, record=record)
        except BaseException:
            os.close(self._own)
            raise

    def _start(self, threads: int, *, record: bool) -> BpfCounter | HistCounter:
        """Let the kernel count, in the cheapest way that it has; only tracefs records."""
        with contextlib.suppress(KickcallError):
            sweep(folder())
        if not record:
            try:
                with contextlib.ExitStack() as stack:
                    program = stack.enter_context(BpfCounter(self._covered, threads))
                    self._prove(program)
                    stack.pop_all()
                    return program
            except (KernelViewError, PrivilegeError) as exc:
                _log.debug("counted by histograms: %s", exc)
        with contextlib.ExitStack() as stack:
            counter = stack.enter_context(HistCounter(self._covered, threads, record=record))
            self._prove(counter)
            if record:
                self._kinds = {name: _format(counter, name) for name in (IN_KERNEL, BY_WRITE)}
                self._buffers = counter.instance.raw_buffers()
            stack.pop_all()
            return counter

    def add(self, ids: Iterable[int]) -> None:
        """Count these eventfds, too, from now on."""
        new = set(ids) - self._covered
        if new:
            # A histogram sets the instance's clock, and that empties the buffer.
            self._drain()
            self._counter.add(new)
            self._covered |= new

    def counts(self) -> Counted:
        """Return what was counted so far. Signals go on meanwhile."""
        return self._counter.counts()

    def signals(self, *, last: bool = False) -> tuple[list[Signal], bool]:
        """Return what was recorded since the last call, oldest first, and whether some were lost.

        What is only milliseconds old is kept back until the next time, for older ones that other
        CPUs have not shown yet; unless it is the `last` time.
        """
        until = time.monotonic_ns() - _SETTLED_NS
        self._drain()
        self._pending.sort()
        ready = [one for one in self._pending if last or one.ns < until]
        lost, self._lost = self._lost, False
        del self._pending[: len(ready)]
        kernel = self._kinds[IN_KERNEL].kind if self._kinds else -1
        return [
            Signal(one.ns, one.eventfd_id, one.tid, one.kind == kernel)
            for one in ready
            if one.eventfd_id in self._covered and one.eventfd_id != self._own_id
        ], lost

    def _drain(self) -> None:
        formats = {one.kind: one for one in self._kinds.values()}
        for fd in self._buffers:
            while page := _read_page(fd):
                events, lost = parse_page(page, formats)
                self._pending.extend(events)
                self._lost = self._lost or lost

    def _prove(self, counter: BpfCounter | HistCounter) -> None:
        """Signal an eventfd of our own in both ways and look whether both were counted.

        Kprobes may be switched off (debugfs, kprobes/enabled), or an offset be wrong.
        """
        os.eventfd_write(self._own, 1)
        in_kernel = _signal_by_aio(self._own)
        until = time.monotonic() + _PROOF_S
        while True:
            counted = counter.counts()
            missing = [
                name
                for name, hits, wanted in (
                    (IN_KERNEL, counted.in_kernel, in_kernel),
                    (BY_WRITE, counted.by_write, True),
                )
                if wanted and all(one.eventfd_id != self._own_id for one in hits)
            ]
            if not missing:
                return
            if time.monotonic() > until:
                raise KernelViewError(
                    "the kernel did not count a notification that kickcall made to see whether it "
                    f"would ({missing[0]}): are kprobes switched off, in "
                    "/sys/kernel/debug/kprobes/enabled?"
                )
            time.sleep(0.002)

    def close(self) -> None:
        """Have nothing counted any more, and remove all of it from the kernel."""
        while self._buffers:
            os.close(self._buffers.pop())
        if self._own >= 0:
            os.close(self._own)
            self._own = -1
        self._counter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _format(counter: HistCounter, event: str) -> Format:
    try:
        return parse_format(counter.instance.format(event))
    except ValueError as exc:
        raise KernelViewError(f"the kernel's trace cannot be read: {exc}") from exc


def _read_page(fd: int) -> bytes:
    try:
        return os.read(fd, mmap.PAGESIZE)
    except BlockingIOError:
        return b""
    except OSError as exc:
        raise KernelViewError(f"the kernel's trace cannot be read: {exc.strerror}") from exc


def _signal_by_aio(eventfd: int) -> bool:
    """Have the kernel signal an eventfd of ours: at the end of an asynchronous read (io_submit(2)).

    Return whether it will; a kernel may have no AIO left, or none at all.
    """
    if platform.machine() not in _AIO:
        return False
    setup, destroy, submit = _AIO[platform.machine()]
    context = ctypes.c_ulong(0)
    if _libc.syscall(setup, 1, ctypes.byref(context)) < 0:
        return False
    # A file in memory of one byte: reading it never waits.
    file = os.memfd_create("kickcall-proof", os.MFD_CLOEXEC)
    try:
        os.write(file, b"\0")
        buffer = ctypes.create_string_buffer(1)
        request = ctypes.create_string_buffer(
            _IOCB.pack(
                *(0, 0, 0, 0, 0, file, ctypes.addressof(buffer), 1),
                *(0, 0, _IOCB_FLAG_RESFD, eventfd),
            )
        )
        requests = (ctypes.c_void_p * 1)(ctypes.addressof(request))
        return bool(_libc.syscall(submit, context, ctypes.c_long(1), requests) == 1)
    finally:
        # Waits until the read has ended: its buffer is ours.
        _libc.syscall(destroy, context)
        os.close(file)
