"""What does the watcher make of what libvirt tells: who came, who went and why, who rebooted?

All of it but the telling itself happens in the watcher's own loop.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kickcall.host import processes
from kickcall.vmm.domain_events import DomainEvent, DomainEvents, Turn

if TYPE_CHECKING:
    from collections.abc import Callable

    from kickcall.model import Machine

_WHY_S = 5.0
"""How long libvirt is given to say why a process ended: it does when it has cleared up."""
_Key = tuple[int, int]


class Domains:
    """Follows the libvirt domains among the machines that are watched.

    `soon` has something done in the watcher's loop, `came` is done there when a domain started, and
    `rebooted` is told whose guest did.
    """

    def __init__(
        self,
        soon: Callable[[Callable[[], None]], None],
        came: Callable[[], None],
        rebooted: Callable[[_Key], None],
    ) -> None:
        self._soon = soon
        self._came = came
        self._rebooted = rebooted
        self._events = DomainEvents(lambda event: soon(lambda: self._heard(event)))
        self._followed: set[_Key] = set()
        self._why: dict[_Key, str] = {}
        self._waiting: dict[_Key, Callable[[str], None]] = {}

    def follow(self, machine: Machine) -> None:
        """Hear of this machine from now on, if it is libvirt's."""
        if machine.domain is not None:
            self._followed.add((machine.pid, machine.start_time))
            self._events.follow(machine)

    def farewell(self, machine: Machine, otherwise: str, say: Callable[[str], None]) -> None:
        """Say why a machine went: as libvirt tells it, now or within seconds, or `otherwise`."""
        key = (machine.pid, machine.start_time)
        runs = processes.start_time(machine.pid) == machine.start_time
        why = self._why.pop(key, None)
        if key not in self._followed or runs or why is not None:
            self._followed.discard(key)
            say(why or otherwise)
            return
        self._followed.discard(key)
        self._waiting[key] = say
        timer = threading.Timer(_WHY_S, lambda: self._soon(lambda: self._say(key, otherwise)))
        timer.daemon = True
        timer.start()

    def _say(self, key: _Key, why: str) -> None:
        if (say := self._waiting.pop(key, None)) is not None:
            say(why)

    def _heard(self, event: DomainEvent) -> None:
        match event.turn:
            case Turn.CAME:
                self._came()
            case Turn.STAYS if event.machine is not None:
                self._why.pop(event.machine, None)
            case Turn.LEAVES | Turn.WENT if event.machine is not None and event.why:
                if event.machine in self._waiting:
                    self._say(event.machine, event.why)
                elif event.machine in self._followed:
                    self._why[event.machine] = event.why
            case Turn.REBOOTED if event.machine is not None:
                self._rebooted(event.machine)
            case _:
                pass

    def close(self, otherwise: str) -> None:
        """Stop; whoever waited for a reason hears `otherwise`."""
        self._events.close()
        for key in list(self._waiting):
            self._say(key, otherwise)
