"""Where in the VMM's own memory, not the guest's, do some bytes stand?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.host import memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.vmm.session import VmmSession

_SLAB = 4 << 20


def addresses_of(session: VmmSession, pattern: bytes) -> Iterator[int]:
    """Yield each address where `pattern` stands in memory that the VMM allocated for itself.

    The heap comes first. Guest memory is left out: all in it is the guest's word.
    """
    pid = session.process.pid
    ram = [(run.hva, run.hva + run.length) for run in session.memory.ranges]
    own = [
        one
        for one in memory.mappings(pid)
        if one.anonymous
        and one.permissions.startswith("rw-")
        and not any(start < one.end and one.start < end for start, end in ram)
    ]
    own.sort(key=lambda one: one.name != "[heap]")
    overlap = len(pattern) - 1
    for start, slab in memory.slabs(pid, memory.present_runs(pid, own), _SLAB, overlap):
        at = slab.find(pattern)
        while at >= 0:
            yield start + at
            at = slab.find(pattern, at + 1)
