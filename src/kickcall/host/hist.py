"""What does a histogram of the kernel's tracing say: who signalled which eventfd, how often, when?

Pure: the bytes of a `hist` file in, values out. The format: Documentation/trace/histogram.rst.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

SIZE_MIN = 512
SIZE_MAX = 65536
"""Entries of one histogram; the kernel allows 128 to 131072 (TRACING_MAP_BITS, tracing_map.h)."""

# A thread may call itself anything, newlines and text of this very format included. But its name
# has 15 bytes at most and is padded to 16 (kernel/trace/trace_events_hist.c, `%-16s[%10llu]`): an
# entry that is taken by its widths cannot be forged from within a name.
_ENTRY = re.compile(
    rb"^\{ id: *(\d{1,10}), common_pid: (.{16})\[ *(\d{1,20})\] \}"
    rb" hitcount: *(\d{1,20})[^\n]*\n\s+max: *(\d{1,20})",
    re.DOTALL | re.MULTILINE,
)
_DROPPED = re.compile(rb"^    Dropped: (\d{1,20})$", re.MULTILINE)


class Hits(NamedTuple):
    """How often one thread signalled one eventfd."""

    eventfd_id: int
    tid: int
    comm: str
    """The thread's name when it did so first; what is no UTF-8 in it is replaced."""
    total: int
    last_ns: int
    """When it did so last, by the clock of the tracing instance."""


class Counted(NamedTuple):
    """What was counted since the counting began."""

    in_kernel: list[Hits]
    by_write: list[Hits]
    dropped: int
    """At most so many signals were not counted: they found no room, or came in the midst of
    another that was being counted."""


def parse_hist(text: bytes) -> tuple[list[Hits], int]:
    """Return the entries of a `hist` file, and how many hits found no room in it.

    A file holds one histogram for each trigger; an entry may be there more than once.
    """
    hits = [
        Hits(int(eventfd), int(tid), thread_name(comm), int(total), int(last))
        for eventfd, comm, tid, total, last in _ENTRY.findall(text)
    ]
    return hits, sum(int(dropped) for dropped in _DROPPED.findall(text))


def thread_name(raw: bytes) -> str:
    """Return a thread's name from its padded bytes."""
    return raw.partition(b"\0")[0].rstrip(b" \n").decode(errors="replace")


def size_for(entries: int) -> int:
    """Return a histogram's size for so many entries: a power of two, with room for twice as many.

    The kernel allocates all of it when the trigger is set, some 200 bytes an entry.
    """
    size = SIZE_MIN
    while size < 2 * entries and size < SIZE_MAX:
        size *= 2
    return size


def filter_text(ids: set[int], most: int = 16) -> str:
    """Return a filter that passes eventfds of `ids`: `id == 5 || (id >= 7 && id <= 9)`.

    Eventfds get the lowest number that is free (fs/eventfd.c, ida_alloc), so a machine's lie close
    together. With more than `most` runs those that are nearest each other become one: then a few
    eventfds pass that are not of `ids`.
    """
    runs: list[list[int]] = []
    for one in sorted(ids):
        if runs and one <= runs[-1][1] + 1:
            runs[-1][1] = one
        else:
            runs.append([one, one])
    while len(runs) > most:
        gaps = [later[0] - earlier[1] for earlier, later in itertools.pairwise(runs)]
        nearest = gaps.index(min(gaps))
        runs[nearest : nearest + 2] = [[runs[nearest][0], runs[nearest + 1][1]]]
    return " || ".join(
        f"id == {first}" if first == last else f"(id >= {first} && id <= {last})"
        for first, last in runs
    )
