"""What happens to the machines of libvirt: who comes, goes, migrates away, reboots?

libvirt tells it to whoever keeps a connection and runs its event loop: one thread of this process,
for all connections. Nothing here is needed to watch a machine (its process tells when it ends);
events come sooner than the next look at /proc, and say why.
"""

from __future__ import annotations

import enum
import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kickcall.errors import KickcallError
from kickcall.host import processes
from kickcall.vmm import domains

if TYPE_CHECKING:
    from collections.abc import Callable

    from kickcall.model import Machine
    from kickcall.vmm.domains import Address

_RETRY_S = 5.0
_ALIVE_S = 5
"""Every so many seconds a silent daemon is asked whether it is there; three times."""


class Turn(enum.StrEnum):
    """What became of a domain."""

    CAME = "came"
    WENT = "went"
    REBOOTED = "rebooted"
    OTHER = "other"
    """Paused, resumed, defined, …: what its process tells, too."""


@dataclass(frozen=True, slots=True)
class DomainEvent:
    """Something that libvirt told of a domain."""

    turn: Turn
    name: str
    uuid: str
    why: str = ""
    """In words: `it migrated away`."""
    machine: tuple[int, int] | None = None
    """Pid and start time, where the domain is one that is followed."""


# libvirt: virDomainEventType, virDomainEventStartedDetailType, virDomainEventStoppedDetailType
# (libvirt-domain.h).
_STARTED, _STOPPED = 2, 5
_CAME = {0: "it booted", 1: "it migrated here", 2: "it was restored", 3: "from a snapshot"}
_WENT = {
    0: "it shut down",
    1: "it was destroyed",
    2: "it crashed",
    3: "it migrated away",
    4: "it was saved",
    5: "libvirt says that it failed",
}

_running = threading.Lock()
_started = False


def run_loop() -> None:
    """Run libvirt's event loop in a thread, if none runs yet. Connections come after it."""
    global _started
    libvirt, _ = domains.binding()
    with _running:
        if _started:
            return
        libvirt.virEventRegisterDefaultImpl()
        # A loop without a timer would not notice what another thread adds to it.
        libvirt.virEventAddTimeout(1000, lambda *_: None, None)
        _started = True

    def run() -> None:
        while True:
            try:
                libvirt.virEventRunDefaultImpl()
            except libvirt.libvirtError:
                time.sleep(0.1)

    threading.Thread(target=run, name="kickcall-libvirt-events", daemon=True).start()


def open_told(address: Address, closed: Callable[[], None]) -> Any:
    """Return a connection of its own that tells events; `closed` is called when it broke."""
    run_loop()
    opened = domains.connect(address, fresh=True)
    opened.registerCloseCallback(lambda *_: closed(), None)
    opened.setKeepAlive(_ALIVE_S, 3)
    return opened


class DomainEvents:
    """Follows the libvirts of the machines that it was given. `tell` is called in other threads.

    Calls return at once: a thread of its own connects, and connects again where a daemon was
    restarted. A machine that libvirt does not know is passed over in silence: whoever asks its
    monitor hears why.
    """

    def __init__(self, tell: Callable[[DomainEvent], None]) -> None:
        self._tell = tell
        self._work: queue.SimpleQueue[Machine | Address | None] = queue.SimpleQueue()
        self._followed: dict[tuple[Address, str], tuple[int, int]] = {}
        self._open: dict[Address, Any] = {}
        self._thread: threading.Thread | None = None

    def follow(self, machine: Machine) -> None:
        """Tell of this machine from now on, if it is libvirt's; and of all that its libvirt has."""
        if machine.domain is None:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kickcall-domains", daemon=True)
            self._thread.start()
        self._work.put(machine)

    def close(self) -> None:
        """Stop telling."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join(1.0)

    def _run(self) -> None:
        lost: dict[Address, float] = {}
        while True:
            try:
                item = self._work.get(timeout=1.0 if lost else None)
            except queue.Empty:
                item = None
                for address in [one for one, at in lost.items() if at <= time.monotonic()]:
                    lost[address] = time.monotonic() + _RETRY_S
                    if self._connect(address):
                        del lost[address]
                continue
            if item is None:
                break
            if isinstance(item, domains.Address):
                self._open.pop(item, None)
                lost[item] = time.monotonic() + 1.0
            else:
                self._follow(item)
        for opened in self._open.values():
            with suppress(Exception):
                opened.close()

    def _follow(self, machine: Machine) -> None:
        assert machine.domain is not None
        try:
            _, address = domains.locate(machine)
        except KickcallError:
            return
        self._followed = {
            place: one
            for place, one in self._followed.items()
            if processes.start_time(one[0]) == one[1]
        }
        self._followed[address, machine.domain.uuid] = (machine.pid, machine.start_time)
        if address not in self._open:
            self._connect(address)

    def _connect(self, address: Address) -> bool:
        libvirt, _ = domains.binding()

        def of(domain: Any, turn: Turn, why: str = "") -> None:
            uuid = domain.UUIDString()
            machine = self._followed.get((address, uuid))
            self._tell(DomainEvent(turn, domain.name(), uuid, why, machine))

        def lifecycle(_: Any, domain: Any, event: int, detail: int, __: Any) -> None:
            if event == _STARTED:
                of(domain, Turn.CAME, _CAME.get(detail, ""))
            elif event == _STOPPED:
                of(domain, Turn.WENT, _WENT.get(detail, ""))
                self._followed.pop((address, domain.UUIDString()), None)
            else:
                of(domain, Turn.OTHER)

        def rebooted(_: Any, domain: Any, __: Any) -> None:
            of(domain, Turn.REBOOTED)

        try:
            opened = open_told(address, lambda: self._work.put(address))
            for number, callback in (
                (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
                (libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, rebooted),
            ):
                opened.domainEventRegisterAny(None, number, callback, None)
        except libvirt.libvirtError:
            return False
        self._open[address] = opened
        return True
