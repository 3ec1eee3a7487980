"""How are eventfds' signals counted, and recorded one by one, by tracefs alone?

A kprobe at each function that signals an eventfd, and a histogram at each of them.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Self

from kickcall.host.hist import Counted, filter_text, parse_hist, size_for
from kickcall.host.signal_sites import BY_WRITE, IN_KERNEL, signal_sites
from kickcall.host.tracefs import Instance

if TYPE_CHECKING:
    from collections.abc import Iterable

_COUNTING_KIB = 64
_RECORDING_KIB = 512
"""Of trace buffer for each CPU. Recording takes some 28 bytes a notification."""


class HistCounter:
    """Histograms count the signals of some eventfds, from now on until this is closed.

    With `record` each is written to the buffers of `instance`, too.
    Raises PrivilegeError, or KernelViewError where this kernel cannot do it.
    """

    def __init__(self, ids: Iterable[int], threads: int, *, record: bool = False) -> None:
        self._threads = threads
        self._record = record
        self._covered: set[int] = set()
        self._triggers = itertools.count()
        self.instance = Instance(probes(), buffer_kib=_RECORDING_KIB if record else _COUNTING_KIB)
        try:
            self.add(ids)
        except BaseException:
            self.close()
            raise

    def add(self, ids: Iterable[int]) -> None:
        """Count these eventfds, too, from now on. What is in the buffers is lost by that."""
        new = set(ids)
        which = filter_text(new)
        size = size_for(len(new) * self._threads)
        number = next(self._triggers)
        # max() of the time is the time of the last one. A variable's name may be used once.
        trigger = (
            f"hist:keys=id,common_pid.execname:ts{number}=common_timestamp:size={size}:clock=mono:"
            f"onmax($ts{number}).save(id) if {which}"
        )
        for event in (IN_KERNEL, BY_WRITE):
            self.instance.set_trigger(event, trigger)
        self._covered |= new
        if self._record:
            everything = filter_text(self._covered)
            for event in (IN_KERNEL, BY_WRITE):
                self.instance.record(event, everything)

    def counts(self) -> Counted:
        """Return what was counted so far. Signals go on meanwhile."""
        in_kernel, dropped = parse_hist(self.instance.hist(IN_KERNEL))
        by_write, dropped_writes = parse_hist(self.instance.hist(BY_WRITE))
        return Counted(in_kernel, by_write, dropped + dropped_writes)

    def close(self) -> None:
        """Have nothing counted any more, and remove all of it from the kernel."""
        self.instance.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def probes() -> dict[str, str]:
    """Return what to probe on the running kernel, and how the eventfd's id is found there.

    `$arg1` is the first parameter, on every architecture. Raises KernelViewError.
    """
    sites = signal_sites()
    found = {
        IN_KERNEL: f"+{sites.id_offset}($arg1)",
        BY_WRITE: f"+{sites.id_offset}(+{sites.private_offset}($arg1))",
    }
    return {
        site: f"{sites.functions[site].function} id={where}:u32" for site, where in found.items()
    }
