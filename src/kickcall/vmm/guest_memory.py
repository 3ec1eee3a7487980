"""Where guest-physical memory lies in the VMM's address space."""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.errors import MapError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kickcall.vmm.monitor import Monitor

_RAM = re.compile(r"^\s*([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ram\): ")
_HVA = re.compile(r"is (0x[0-9a-f]+)")


@dataclass(frozen=True, slots=True)
class RamRange:
    """A run of guest-physical RAM that is one run in the VMM, too. All in bytes."""

    gpa: int
    hva: int
    length: int


class GuestMemory:
    """The guest's RAM as the flat view has it, for translating guest-physical addresses."""

    def __init__(self, ranges: Sequence[RamRange]) -> None:
        self.ranges = tuple(sorted(ranges, key=lambda run: run.gpa))
        self._starts = [run.gpa for run in self.ranges]

    def translate(self, gpa: int, length: int) -> int | None:
        """Return the VMM's address of `length` bytes at `gpa`; None where they are not all RAM.

        An area that crosses from one run into the next is taken only if the VMM has them adjacent.
        """
        index = bisect.bisect_right(self._starts, gpa) - 1
        if index < 0 or length <= 0:
            return None
        first = run = self.ranges[index]
        while gpa + length > run.gpa + run.length:
            index += 1
            if index >= len(self.ranges):
                return None
            following = self.ranges[index]
            adjacent = (run.gpa + run.length, run.hva + run.length)
            if (following.gpa, following.hva) != adjacent:
                return None
            run = following
        offset = gpa - first.gpa
        return first.hva + offset if offset < first.length else None


def parse_flat_view(text: str) -> list[tuple[int, int]]:
    """Return the (guest-physical start, length) of every RAM range in `info mtree -f`.

    Only the flat view of the address space "memory" counts: it is what the CPUs see
    (QEMU: softmmu/memory.c, mtree_print_flatview).
    """
    for view in text.split("FlatView #")[1:]:
        lines = view.splitlines()
        if any(line.startswith(' AS "memory",') for line in lines):
            return [
                (int(found[1], 16), int(found[2], 16) - int(found[1], 16) + 1)
                for line in lines
                if (found := _RAM.match(line))
            ]
    return []


def read_guest_memory(monitor: Monitor) -> GuestMemory:
    """Ask the human monitor where guest RAM is: `info mtree -f`, then `gpa2hva` once a range.

    Both only read QEMU's own tables. Raises MapError where the answers make no sense.
    """
    runs = []
    for gpa, length in parse_flat_view(monitor.hmp("info mtree -f")):
        said = monitor.hmp(f"gpa2hva {gpa:#x}")
        found = _HVA.search(said)
        if found is None:
            continue  # a range that went away between the two questions is no RAM now
        runs.append(RamRange(gpa, int(found[1], 16), length))
    if not runs:
        raise MapError("QEMU's `info mtree -f` shows no guest RAM")
    return GuestMemory(runs)
