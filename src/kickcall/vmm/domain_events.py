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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kickcall.errors import KickcallError
from kickcall.host import processes
from kickcall.vmm import domains

if TYPE_CHECKING:
    from collections.abc import Callable

    from kickcall.model import Machine
    from kickcall.vmm.domains import Address

_AGAIN_S = 0.3
_RETRY_MOST_S = 5.0
"""Between two looks for the libvirt that has a machine."""
_ALIVE_S = 5
"""Every so many seconds a silent daemon is asked whether it is there; three times."""


class Turn(enum.StrEnum):
    """What became of a domain."""

    CAME = "came"
    LEAVES = "leaves"
    """It is on its way out; its process is there yet. libvirt tells WENT when all is cleared up."""
    STAYS = "stays"
    """It runs on: the migration failed at the last moment."""
    WENT = "went"
    REBOOTED = "rebooted"
    OTHER = "other"
    """Paused, defined, …: what its process tells, too."""


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


# libvirt-domain.h: virDomainEventType, virDomainEventSuspendedDetailType,
# virDomainEventStartedDetailType, virDomainEventStoppedDetailType.
_STARTED, _SUSPENDED, _RESUMED, _STOPPED = 2, 3, 4, 5
_SUSPENDED_MIGRATED = 1
_AWAY = "it migrated away"
_CAME = {0: "it booted", 1: "it migrated here", 2: "it was restored", 3: "from a snapshot"}
_WENT = {
    0: "it shut down",
    1: "it was destroyed",
    2: "it crashed",
    3: _AWAY,
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


@dataclass(slots=True)
class _LookedFor:
    """A machine whose libvirt was not found, or went away."""

    machine: Machine
    at: float = 0.0
    wait_s: float = _AGAIN_S


class DomainEvents:
    """Follows the libvirts of the machines that it was given. `tell` is called in other threads.

    Calls return at once: a thread of its own connects, and connects again where a daemon was
    restarted. A machine that libvirt does not know is passed over in silence: whoever asks its
    monitor hears why.
    """

    def __init__(self, tell: Callable[[DomainEvent], None]) -> None:
        self._tell = tell
        self._work: queue.SimpleQueue[Machine | Address | None] = queue.SimpleQueue()
        self._followed: dict[tuple[Address, str], Machine] = {}
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
        looked_for: list[_LookedFor] = []
        while True:
            try:
                item = self._work.get(timeout=_AGAIN_S if looked_for else None)
            except queue.Empty:
                looked_for = [one for one in looked_for if not self._found(one)]
                continue
            match item:
                case None:
                    break
                case domains.Address():
                    # When it is there again it has another socket.
                    for place, machine in list(self._followed.items()):
                        if place[0] == item:
                            self._followed.pop(place, None)
                            looked_for.append(_LookedFor(machine))
                    if (opened := self._open.pop(item, None)) is not None:
                        domains.close(opened)
                case machine if not self._follow(machine):
                    # Its process is there before libvirt has started it.
                    looked_for.append(_LookedFor(machine))
        for opened in self._open.values():
            domains.close(opened)

    def _found(self, one: _LookedFor) -> bool:
        """Follow a machine that is looked for, if it is time; tell whether that is over."""
        if time.monotonic() < one.at:
            return False
        one.wait_s = min(one.wait_s * 2, _RETRY_MOST_S)
        one.at = time.monotonic() + one.wait_s
        return not _runs(one.machine) or self._follow(one.machine)

    def _follow(self, machine: Machine) -> bool:
        assert machine.domain is not None
        try:
            _, address = domains.locate(machine)
        except KickcallError:
            return False
        for place, one in list(self._followed.items()):
            if not _runs(one):
                self._followed.pop(place, None)
        self._followed[address, machine.domain.uuid] = machine
        return address in self._open or self._connect(address)

    def _connect(self, address: Address) -> bool:
        libvirt, _ = domains.binding()

        def of(domain: Any, turn: Turn, why: str = "") -> None:
            uuid = domain.UUIDString()
            machine = self._followed.get((address, uuid))
            key = None if machine is None else (machine.pid, machine.start_time)
            self._tell(DomainEvent(turn, domain.name(), uuid, why, key))

        def lifecycle(_: Any, domain: Any, event: int, detail: int, __: Any) -> None:
            if event == _STARTED:
                of(domain, Turn.CAME, _CAME.get(detail, ""))
            elif event == _SUSPENDED and detail == _SUSPENDED_MIGRATED:
                of(domain, Turn.LEAVES, _AWAY)
            elif event == _RESUMED:
                of(domain, Turn.STAYS)
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
        except (libvirt.libvirtError, KickcallError):
            return False
        self._open[address] = opened
        return True


def _runs(machine: Machine) -> bool:
    """Tell whether the machine's process still runs."""
    return processes.start_time(machine.pid) == machine.start_time
