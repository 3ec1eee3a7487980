"""Which queue is to be broken, who serves it, and how does the guest use it?"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Self

from kickcall.attached import attach
from kickcall.errors import LabError
from kickcall.host.eventfds import read_eventfd
from kickcall.host.processes import Process
from kickcall.lab.guest_ram import RingFields
from kickcall.lab.process import thread_states
from kickcall.lab.ptrace import HeldThread
from kickcall.lab.registers import Registers
from kickcall.lab.spec import VhostUserBlk, VirtioBlk, VirtioNet, VirtioScsi
from kickcall.vmm.guest_memory import read_guest_memory
from kickcall.vmm.monitor import borrow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kickcall.attached import AttachedMachine
    from kickcall.lab.guest import Command
    from kickcall.lab.machine import LabMachine
    from kickcall.lab.ptrace import Syscall
    from kickcall.model import DeviceEvent, Notifier, QueueState

_HOST, _HOST_MAC = "10.0.2.2", "52:55:0a:00:02:02"
"""How QEMU's user network answers (libslirp: src/slirp.h, special_ethaddr)."""
_PATIENCE = 20.0
"""Seconds for what takes milliseconds on an idle machine."""
_TRIES = 5
_SCSI_REQUEST = 2
"""virtio-scsi's queues are control, event, then the request queues (virtio 1.4, 5.6.2)."""
_NET_RECEIVE, _NET_TRANSMIT = 0, 1
"""virtio-net's queues are receive, transmit, … (virtio 1.4, 5.1.2)."""


class Target:
    """One queue of a lab machine. Use it in a `with` block, or call `close`.

    `attached` is the machine as it was mapped by the caller; without it the machine is mapped
    through the lab's own monitor.
    """

    def __init__(
        self,
        machine: LabMachine,
        device: str,
        queue: int | None = None,
        attached: AttachedMachine | None = None,
    ) -> None:
        self.machine = machine
        self.device = device
        self.spec = machine.device(device)
        self.number = default_queue(self.spec) if queue is None else queue
        self._monitor = borrow([str(machine.folder / "lab-monitor")])
        self._ours = attached is None
        self.attached = attached or attach(machine.pid, monitor=self._monitor, timeout=_PATIENCE)
        self._map()
        self.registers = Registers(machine.guest, f"0000:00:{self.spec.slot:02x}.0")

    def _map(self) -> None:
        self.queue = self.attached.device(self.device).queue(self.number)
        with self._monitor(_PATIENCE) as monitor:
            self.fields = RingFields(self.machine.pid, read_guest_memory(monitor), self.queue.map)

    def refresh(self) -> None:
        """Map the machine anew, as after the driver set the device up again."""
        self.attached.refresh()
        self._map()

    # --- who serves it ---

    @property
    def event_idx(self) -> bool:
        """Whether driver and device agreed on event indices."""
        return self.attached.device(self.device).info.event_idx

    @property
    def is_vhost_user(self) -> bool:
        return isinstance(self.spec, VhostUserBlk)

    @property
    def has_relay(self) -> bool:
        return isinstance(self.spec, VhostUserBlk) and self.spec.relay

    @property
    def has_iothread(self) -> bool:
        return isinstance(self.spec, VirtioBlk | VirtioScsi) and self.spec.iothread

    @property
    def server(self) -> str:
        """Who serves the queue, in words."""
        if self.is_vhost_user:
            return "vhost-user, relay" if self.has_relay else "vhost-user"
        return "iothread" if self.has_iothread else "main loop"

    @property
    def thread(self) -> int:
        """The thread of QEMU that reads the kick notifier. Raises LabError for vhost-user."""
        if self.is_vhost_user:
            raise LabError(f"{self.device} is not served by QEMU")
        if not self.has_iothread:
            return self.machine.pid
        for told in self.machine.qmp("query-iothreads"):
            if told["id"] == f"{self.device}-iothread":
                return int(told["thread-id"])
        raise LabError(f"QEMU has no iothread for {self.device}")

    @property
    def cpu_threads(self) -> list[int]:
        """QEMU's threads that run the guest's CPUs."""
        return [int(cpu["thread-id"]) for cpu in self.machine.qmp("query-cpus-fast")]

    @property
    def backend(self) -> int:
        """The process that reads the kicks of a vhost-user device."""
        if self.has_relay:
            return self.machine.relay_pid(self.device)
        return self.machine.backend_pid(self.device)

    @property
    def qom_path(self) -> str:
        """Where QEMU has the virtio device itself."""
        return f"/machine/peripheral/{self.device}/virtio-backend"

    # --- its notifiers ---

    @property
    def kick_notifier(self) -> Notifier:
        return _present(self.queue.map.kick, f"{self.device} has no kick notifier")

    @property
    def call_notifier(self) -> Notifier:
        return _present(self.queue.map.call, f"{self.device} has no call notifier")

    def count(self, notifier: Notifier) -> int:
        """Return a notifier's count now."""
        state = read_eventfd(self.machine.pid, notifier.fd)
        if state is None or state.eventfd_id != notifier.eventfd_id:
            raise LabError(f"a notifier of {self.device} is not what was mapped")
        return state.count

    def empty(self, notifier: Notifier) -> int:
        """Read a notifier that is not 0 and return what was lost. Raises LabError where it is 0.

        Only while its reader is held: a read of an eventfd at 0 blocks.
        """
        with Process(self.machine.pid) as qemu:
            ours = qemu.duplicate_fd(notifier.fd)
        try:
            if not self.count(notifier):
                raise LabError(f"no notification of {self.device} was there to lose")
            return int.from_bytes(os.read(ours, 8), "little")
        finally:
            os.close(ours)

    def inject(self, event: DeviceEvent) -> None:
        """Write the event that repairs the queue."""
        self.queue.raise_event(event, watch_s=0.0)

    # --- its back-end, held ---

    @contextlib.contextmanager
    def kick_waiting(self) -> Iterator[Command]:
        """Let the guest make a request, and keep the back-end from reading its kick.

        Yields the request. A vhost-user process is stopped; of QEMU only the thread that serves
        the queue is held, as it wakes up for the kick.
        """
        notifier = self.kick_notifier
        if self.is_vhost_user:
            with stopped(self.backend):
                command = self.request()
                self.until(lambda: self.count(notifier) > 0, "the guest did not kick")
                yield command
            return
        for attempt in range(_TRIES):
            before = self.completed
            armed = threading.Event()

            def at_kick(call: Syscall, armed: threading.Event = armed) -> bool:
                return armed.is_set() and call.wakes and self.count(notifier) > 0

            with HeldThread(self.thread, at_kick) as held:
                if self.has_iothread:
                    armed.set()
                    command = self.request()
                else:
                    # The guest's answer to this comes by the main loop: it is held after that.
                    command = self.request(after_s=0.3 * 2**attempt)
                    armed.set()
                self._until_held_or_completed(held, before)
                if held.is_held:
                    yield command
                    return
            self.finish(command)
        raise LabError(f"{self.device} read every kick before it could be held")

    def _until_held_or_completed(self, held: HeldThread, before: int) -> None:
        self.until(lambda: held.is_held or self.completed != before, "the guest did not kick")

    # --- its work ---

    @property
    def cannot_request(self) -> str:
        """Why the guest cannot be made to use exactly this queue; empty where it can."""
        spec = self.spec
        if isinstance(spec, VirtioNet):
            known = (_NET_RECEIVE, _NET_TRANSMIT)
            return "" if self.number in known else "it carries no packets"
        if not isinstance(spec, VirtioBlk | VirtioScsi | VhostUserBlk):
            return f"the lab does not know how the guest uses {self.device}"
        first = _SCSI_REQUEST if isinstance(spec, VirtioScsi) else 0
        if not first <= self.number < first + spec.queues:
            return "not a request queue"
        if spec.queues not in (1, self.machine.spec.cpus):
            # blk-mq gives CPU N queue N only where there are as many.
            return "its disk has fewer queues than the machine has CPUs, and more than one"
        return ""

    @property
    def cannot_wait_for_kick(self) -> str:
        """Why no request of the guest waits for the device to be kicked; empty where one does."""
        if isinstance(self.spec, VirtioNet) and self.number == _NET_RECEIVE:
            return "the driver puts buffers there long before they are needed"
        return self.cannot_request

    @property
    def cannot_wait_for_call(self) -> str:
        """Why no request of the guest waits for the driver to be called; empty where one does."""
        if isinstance(self.spec, VirtioNet) and self.number == _NET_TRANSMIT:
            return "the driver takes back what was sent when it sends more, called or not"
        return self.cannot_request

    def request_command(self, size: str = "4k", reads: int = 1) -> str:
        """Return a shell command that makes one request on exactly this queue.

        With `reads` a disk gets that many, each after the one before is done.
        """
        if reason := self.cannot_request:
            raise LabError(f"{self.device} queue {self.number}: {reason}")
        spec = self.spec
        if isinstance(spec, VirtioNet):
            # One packet and no other: a guest that asks for the host's address now and then would
            # kick what it is to find unkicked. In vain for ever, rather than over after 10 s.
            return f"arp -s {_HOST} {_HOST_MAC}; ping -c 1 -W 1000 {_HOST} >/dev/null"
        assert isinstance(spec, VirtioBlk | VirtioScsi | VhostUserBlk)
        disk = self.machine.disk(self.device)
        read = f"dd if={disk} of=/dev/null bs={size} count={reads} iflag=direct"
        if spec.queues == 1:
            return read
        first = _SCSI_REQUEST if isinstance(spec, VirtioScsi) else 0
        return f"taskset -c {self.number - first} {read}"

    def request(self, after_s: float = 0.0, reads: int = 1) -> Command:
        """Let the guest make one request on exactly this queue: see `request_command`."""
        wait = f"sleep {after_s:g}; " if after_s else ""
        return self.machine.guest.start(wait + self.request_command(reads=reads))

    def finish(self, *commands: Command) -> None:
        """Return when the guest's requests are done. Raises LabError if they hang."""
        for command in commands:
            status, output = command.wait(_PATIENCE)
            if status:
                raise LabError(f"in the guest, {command.command!r} failed: {output.strip()}")

    def state(self) -> QueueState:
        return self.queue.state()

    @property
    def completed(self) -> int:
        """How far the device has completed: a value that changes with each completion."""
        state = self.queue.state()
        if state.used_idx is None:
            raise LabError(f"{self.device}'s queue tells no position: {state.notes}")
        return state.used_idx

    @property
    def published(self) -> int:
        """How far the driver has published: a value that changes with each request."""
        state = self.queue.state()
        if state.avail_idx is None:
            raise LabError(f"{self.device}'s queue tells no position: {state.notes}")
        return state.avail_idx

    def until_published(self, before: int) -> None:
        """Return when the guest published something since `published` was `before`."""
        self.until(lambda: self.published != before, "the guest published nothing")

    def until_completed(self, before: int) -> None:
        """Return when the device completed something since `completed` was `before`."""
        self.until(lambda: self.completed != before, "the device completed nothing")

    def stays_incomplete(self, seconds: float = 0.1) -> bool:
        """Watch whether the device leaves outstanding work alone."""
        before = self.completed
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.completed != before:
                return False
            time.sleep(0.01)
        return bool(self.state().outstanding)

    def until(self, happened: Callable[[], bool], otherwise: str) -> None:
        """Return when it `happened`. Raises LabError that says `otherwise`."""
        deadline = time.monotonic() + _PATIENCE
        while not happened():
            if time.monotonic() > deadline:
                raise LabError(f"{self.device} queue {self.number}: {otherwise}")
            time.sleep(0.002)

    def close(self) -> None:
        if self._ours:
            self.attached.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def default_queue(spec: object) -> int:
    """Return the first queue on which the guest can be made to work."""
    if isinstance(spec, VirtioScsi):
        return _SCSI_REQUEST
    return _NET_TRANSMIT if isinstance(spec, VirtioNet) else 0


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a whole process with SIGSTOP, as long as the block runs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + _PATIENCE
        while thread_states(pid) - {"T"}:
            if time.monotonic() > deadline:
                raise LabError(f"process {pid} does not stop")
            time.sleep(0.001)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _present(notifier: Notifier | None, otherwise: str) -> Notifier:
    if notifier is None:
        raise LabError(otherwise)
    return notifier
