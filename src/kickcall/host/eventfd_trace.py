"""How often is each eventfd signalled, by which thread, and when? Counted by the kernel itself.

A kprobe where the kernel signals an eventfd, another where a process writes to one, and a histogram
at each: nothing is recorded and nobody woken until somebody reads. Needs root and tracefs.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import platform
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

from kickcall.errors import KernelViewError
from kickcall.host.btf import Kind, kernel_types
from kickcall.host.eventfds import read_eventfd
from kickcall.host.hist import Hits, filter_text, parse_hist, size_for
from kickcall.host.trace_ring import parse_format, parse_page
from kickcall.host.tracefs import Instance

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kickcall.host.trace_ring import Format, RawEvent

IN_KERNEL = "signal"
"""Somebody signalled from within the kernel: KVM's ioeventfd, vhost, an interrupt."""
BY_WRITE = "write"
"""A process wrote to the eventfd: write(2) and its kin."""

_COUNTING_KIB = 64
_RECORDING_KIB = 512
"""Of trace buffer for each CPU. Recording takes some 28 bytes a notification."""
_SETTLED_NS = 2_000_000
"""An event gets its time a little before it can be read: so long is waited for others before it."""
_AIO = {"x86_64": (206, 207, 209), "aarch64": (0, 1, 2), "riscv64": (0, 1, 2)}
"""io_setup, io_destroy, io_submit: syscall_64.tbl, asm-generic/unistd.h."""
_IOCB = struct.Struct("=QIIHhIQQqQII")
"""struct iocb, include/uapi/linux/aio_abi.h."""
_IOCB_FLAG_RESFD = 1
_PROOF_S = 0.5
_libc = ctypes.CDLL(None, use_errno=True)


class Counted(NamedTuple):
    """What was counted since the trace began."""

    in_kernel: list[Hits]
    by_write: list[Hits]
    dropped: int
    """Signals that found no room in the histograms: counted nowhere else."""


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
        self._threads = threads
        self._record = record
        self._covered: set[int] = set()
        self._triggers = itertools.count()
        self._buffers: list[int] = []
        self._formats: dict[int, Format] = {}
        self._pending: list[RawEvent] = []
        self._lost = False
        # Held until the end, so that no other eventfd gets its id.
        self._own = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            state = read_eventfd(os.getpid(), self._own)
            if state is None or state.eventfd_id < 0:
                raise KernelViewError("this kernel tells no eventfd's id: Linux 5.2 or newer")
            self._own_id = state.eventfd_id
            self._instance = Instance(
                probes(), buffer_kib=_RECORDING_KIB if record else _COUNTING_KIB
            )
        except BaseException:
            os.close(self._own)
            raise
        try:
            self.add({*ids, self._own_id})
            if record:
                self._kinds = {name: self._format(name) for name in (IN_KERNEL, BY_WRITE)}
                self._formats = {one.kind: one for one in self._kinds.values()}
                self._buffers = self._instance.raw_buffers()
            self._prove()
        except BaseException:
            self.close()
            raise

    def _format(self, event: str) -> Format:
        try:
            return parse_format(self._instance.format(event))
        except ValueError as exc:
            raise KernelViewError(f"the kernel's trace cannot be read: {exc}") from exc

    def add(self, ids: Iterable[int]) -> None:
        """Count these eventfds, too, from now on."""
        new = set(ids) - self._covered
        if not new:
            return
        # A histogram sets the instance's clock, and that empties the buffer (tracing_set_clock).
        self._drain()
        which = filter_text(new)
        size = size_for(len(new) * self._threads)
        number = next(self._triggers)
        # max() of the time is the time of the last one. A variable's name may be used once.
        trigger = (
            f"hist:keys=id,common_pid.execname:ts{number}=common_timestamp:size={size}:clock=mono:"
            f"onmax($ts{number}).save(id) if {which}"
        )
        for event in (IN_KERNEL, BY_WRITE):
            self._instance.set_trigger(event, trigger)
        self._covered |= new
        if self._record:
            everything = filter_text(self._covered)
            for event in (IN_KERNEL, BY_WRITE):
                self._instance.record(event, everything)

    def counts(self) -> Counted:
        """Return what was counted so far. Signals go on meanwhile."""
        in_kernel, dropped = parse_hist(self._instance.hist(IN_KERNEL))
        by_write, dropped_writes = parse_hist(self._instance.hist(BY_WRITE))
        return Counted(in_kernel, by_write, dropped + dropped_writes)

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
        kernel = self._kinds[IN_KERNEL].kind if self._record else -1
        return [
            Signal(one.ns, one.eventfd_id, one.tid, one.kind == kernel)
            for one in ready
            if one.eventfd_id in self._covered and one.eventfd_id != self._own_id
        ], lost

    def _drain(self) -> None:
        for fd in self._buffers:
            while page := _read_page(fd):
                events, lost = parse_page(page, self._formats)
                self._pending.extend(events)
                self._lost = self._lost or lost

    def _prove(self) -> None:
        """Signal an eventfd of our own in both ways and look whether both were counted.

        Kprobes may be switched off (debugfs, kprobes/enabled), or an offset be wrong.
        """
        os.eventfd_write(self._own, 1)
        wanted = [BY_WRITE]
        if _signal_by_aio(self._own):
            wanted.append(IN_KERNEL)
        until = time.monotonic() + _PROOF_S
        for event in wanted:
            while True:
                hits, _ = parse_hist(self._instance.hist(event))
                if any(one.eventfd_id == self._own_id for one in hits):
                    break
                if time.monotonic() > until:
                    raise KernelViewError(
                        "the kernel did not count a notification that kickcall made to see whether "
                        f"it would ({event}): are kprobes switched off, in "
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
        self._instance.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def probes() -> dict[str, str]:
    """Return what to probe on the running kernel, and how the eventfd's id is found there.

    `$arg1` is the first parameter, on every architecture. Raises KernelViewError.
    """
    types = kernel_types()
    eventfd_id = types.struct("eventfd_ctx").member("id").offset
    private = types.struct("file").member("private_data").offset
    # Linux 6.8 (120ae5859363, "eventfd: make eventfd_signal{_mask}() void") made eventfd_signal an
    # inline function around eventfd_signal_mask(ctx, mask). Before, eventfd_signal is a function,
    # eventfd_signal_mask took (ctx, n, mask) and was io_uring's alone (03e02acda8e2, Linux 6.2 and
    # stable kernels), or was not there: to probe both would count twice.
    mask = types.find("eventfd_signal_mask", (Kind.FUNC,))
    inline = mask is not None and mask.parameters == 2
    function = "eventfd_signal_mask" if inline else "eventfd_signal"
    return {
        IN_KERNEL: f"{function} id=+{eventfd_id}($arg1):u32",
        # eventfd_write(struct file *, …): fs/eventfd.c.
        BY_WRITE: f"eventfd_write id=+{eventfd_id}(+{private}($arg1)):u32",
    }


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
