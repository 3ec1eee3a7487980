"""What do the threads do that serve a machine: those of its VMM, of vhost, and of its back-ends?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.host.snapshot import thread_shots
from kickcall.host.threads import vhost_workers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kickcall.host.snapshot import ThreadShot

MOST = 256


def shots_of(
    pid: int, others: Iterable[int], *, workers: bool = False, most: int = MOST
) -> list[ThreadShot]:
    """Return what all threads of a VMM and of other processes do, `most` of each process.

    With `workers` vhost's threads in the kernel are looked for: all processes are asked their name.
    """
    shots = list(thread_shots(pid, most))
    own = {one.tid for one in shots}
    found = {one.pid for one in vhost_workers(pid) if one.tid not in own} if workers else set()
    for other in dict.fromkeys((*sorted(found), *others)):
        shots += thread_shots(other, most)
    return shots


def threads_text(shots: list[ThreadShot]) -> str:
    """Return what threads do, for people."""
    return "\n".join(
        f"== {one.comm} pid {one.pid} tid {one.tid}  state {one.state or 'gone'}  "
        f"in {one.waits_in or '-'}  wchan {one.wchan or '-'}\n"
        f"stat:    {one.stat}\nsyscall: {one.syscall}\nstack:\n{one.stack}\n"
        for one in shots
    )
