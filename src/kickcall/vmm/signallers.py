"""Whose thread raised a notification: the guest's, vhost's, QEMU's, another process's, ours?"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kickcall.errors import MonitorError
from kickcall.host import threads
from kickcall.host.tracefs import in_initial_pid_namespace
from kickcall.model import DeviceEvent, Signaller

if TYPE_CHECKING:
    from collections.abc import Callable

    from kickcall.vmm.session import VmmSession

_OURSELVES = "kickcall"
_VCPU = re.compile(r"CPU \d+/\w+")
"""What QEMU calls its virtual CPUs' threads with `-name …,debug-threads=on` (cpus.c)."""
_STATUS = re.compile(r"^(Name|Tgid):\t(.*)$", re.M)


class Thread(NamedTuple):
    """What is known of a thread that signalled."""

    pid: int | None
    comm: str


class Signallers:
    """Tells who a thread is. Remembers it, for when the thread has ended."""

    def __init__(
        self, vmm: int, ask_vcpus: Callable[[], frozenset[int]], *, ids_are_ours: bool = True
    ) -> None:
        self._vmm = vmm
        self._ask_vcpus = ask_vcpus
        self._ids_are_ours = ids_are_ours
        self._seen: dict[int, Thread] = {}
        # Kernel threads up to Linux 6.3, threads of the VMM since (vhost_worker_create).
        self._vhost = f"vhost-{vmm}"[:15]

    @functools.cached_property
    def _vcpus(self) -> frozenset[int]:
        return self._ask_vcpus()

    def thread(self, tid: int, comm: str | None = None) -> Thread:
        """Return a thread's process and name; `comm` is its name where the kernel recorded one."""
        known = self._seen.get(tid)
        if known is None or (comm is not None and comm != known.comm):
            pid, name = _look_up(tid) if self._ids_are_ours else (None, "")
            known = Thread(pid, name if comm is None else comm)
            self._seen[tid] = known
        return known

    def who(self, tid: int, event: DeviceEvent, *, in_kernel: bool) -> Signaller:
        """Return who the thread is, from what it did: signal from within the kernel, or write."""
        if not self._ids_are_ours:
            return Signaller.UNKNOWN
        pid, comm = self.thread(tid)
        own = pid == self._vmm
        if in_kernel:
            if comm == self._vhost and pid in (self._vmm, tid, None):
                return Signaller.VHOST
            # KVM signals a doorbell's eventfd in the thread of the CPU that wrote to it
            # (virt/kvm/eventfd.c, ioeventfd_write); nothing else in the kernel kicks.
            if event is DeviceEvent.KICK and own:
                return Signaller.GUEST
            return Signaller.KERNEL
        if own:
            # Without KVM QEMU passes the doorbell on, in the CPU's thread.
            is_guest = event is DeviceEvent.KICK and (
                _VCPU.fullmatch(comm) is not None or tid in self._vcpus
            )
            return Signaller.GUEST if is_guest else Signaller.QEMU
        if pid == os.getpid() or comm == _OURSELVES:
            return Signaller.KICKCALL
        return Signaller.PROCESS


def signallers_of(session: VmmSession) -> Signallers:
    """Return who is who for a machine.

    Its monitor is asked which threads run the guest, once, and only if a thread of the VMM writes
    kicks (under KVM none does). Where it does not answer, they are taken for others of QEMU's.
    """

    def ask() -> frozenset[int]:
        try:
            with session.borrow() as monitor:
                answer = monitor.execute("query-cpus-fast")
        except MonitorError:
            return frozenset()
        pid = session.process.pid
        return frozenset(threads.as_here(pid, (int(cpu["thread-id"]) for cpu in answer)))

    return Signallers(session.process.pid, ask, ids_are_ours=in_initial_pid_namespace())


def _look_up(tid: int) -> tuple[int | None, str]:
    try:
        text = Path(f"/proc/{tid}/status").read_text(errors="replace")
    except OSError:
        return None, ""
    found = dict(_STATUS.findall(text))
    return int(found["Tgid"]), found["Name"]
