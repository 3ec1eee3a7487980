"""Which machines came, and which went? /proc is read some times a second, and cheaply."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.errors import KickcallError
from kickcall.host import processes
from kickcall.vmm import find

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kickcall.model import Machine

_YOUNG = 20
"""Scans for which a process that is no QEMU is looked at again: it may become one (execve(2))."""
_WHOLE = 60
"""Every so many scans all processes are looked at again, whatever they were."""


class Finder:
    """Finds the machines that `wanted` names: by name, pid, `libvirt:DOMAIN` or `qmp:PATH`.

    All where it is empty.
    """

    def __init__(self, wanted: Iterable[str]) -> None:
        self._wanted = set(wanted)
        self._known: dict[int, Machine] = {}
        self._others: dict[int, int] = {}
        self._scans = 0

    def scan(self) -> list[Machine]:
        """Return the machines that run now."""
        self._scans += 1
        if self._scans % _WHOLE == 0:
            self._others.clear()
        there = processes.pids()
        others: dict[int, int] = {}
        known: dict[int, Machine] = {}
        for pid in there:
            seen = self._others.get(pid, 0)
            if seen > _YOUNG:
                others[pid] = seen
                continue
            machine = self._known.get(pid)
            if machine is None or processes.start_time(pid) != machine.start_time:
                machine = find.inspect(pid)
            if machine is None:
                others[pid] = seen + 1
            else:
                known[pid] = machine
        self._known, self._others = known, others
        return [machine for machine in known.values() if self._is_wanted(machine)]

    def _is_wanted(self, machine: Machine) -> bool:
        if not self._wanted or str(machine.pid) in self._wanted:
            return True
        if any(find.is_called(machine, one) for one in self._wanted):
            return True
        return any(
            one.removeprefix("qmp:") in {address.path for address in machine.monitors}
            or self._serves(one.removeprefix("qmp:"), machine)
            for one in self._wanted
            if one.startswith("qmp:")
        )

    def _serves(self, path: str, machine: Machine) -> bool:
        from kickcall.vmm.served import machine_served_at

        try:
            return machine_served_at(path) == machine.pid
        except KickcallError:
            return False
