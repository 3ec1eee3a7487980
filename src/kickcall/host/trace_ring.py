"""What lies in the pages of a tracing ring buffer: which event, when, by which thread?

Pure: pages and format descriptions in, values out. The layout of a page and of an event's header:
include/linux/ring_buffer.h and kernel/trace/ring_buffer.c (also events/header_page and
events/header_event in tracefs). Read as binary, because in the text a thread's name could forge
a line.
"""

from __future__ import annotations

import re
import struct
import sys
from dataclasses import dataclass
from typing import NamedTuple

_PAGE_HEADER = 16
"""Bytes before the events: the page's time (u64) and how much of it is filled (local_t)."""
_LENGTH = (1 << 20) - 1
_MISSED = 1 << 31
"""RB_MISSED_EVENTS: events were overwritten before this page. How many is told only in a page that
happens to have room for it, so it is not asked here."""
_PADDING, _TIME_EXTEND, _TIME_STAMP = 29, 30, 31
"""RINGBUF_TYPE_*; below them the length of the data in words of four bytes, or 0."""
_TIME_STAMP_BITS = (1 << 59) - 1
_FIELD = re.compile(r"^\tfield:[^;]*?(\w+);\toffset:(\d+);\tsize:(\d+);", re.M)
_LITTLE = sys.byteorder == "little"


class RawEvent(NamedTuple):
    """One notification, as the kernel recorded it."""

    ns: int
    """By the clock of the tracing instance."""
    tid: int
    eventfd_id: int
    kind: int
    """Which probe: the number of the event's format."""


@dataclass(frozen=True, slots=True)
class Format:
    """At which offsets an event of number `kind` has its thread (i32) and its eventfd (u32)."""

    kind: int
    tid: int
    eventfd_id: int
    size: int


def parse_format(text: str) -> Format:
    """Return what a `format` file says. Raises ValueError where it is of another kind."""
    found = re.search(r"^ID: (\d+)$", text, re.M)
    fields = {name: (int(offset), int(size)) for name, offset, size in _FIELD.findall(text)}
    wanted = [fields.get(name) for name in ("common_pid", "id")]
    if found is None or any(one is None or one[1] != 4 for one in wanted):
        raise ValueError("the format of a probe has no thread or no eventfd id")
    tid, eventfd_id = (one[0] for one in wanted if one is not None)
    return Format(int(found[1]), tid, eventfd_id, max(tid, eventfd_id) + 4)


def parse_page(page: bytes, formats: dict[int, Format]) -> tuple[list[RawEvent], bool]:
    """Return a page's events of the kinds in `formats`, oldest first, and whether some before them
    were lost. A page that ends in the middle of an event ends there.
    """
    if len(page) < _PAGE_HEADER:
        return [], False
    now, commit = struct.unpack_from("=QQ", page)
    end = min(_PAGE_HEADER + (commit & _LENGTH), len(page))
    events = []
    at = _PAGE_HEADER
    while at + 8 <= end:
        head, word = struct.unpack_from("=II", page, at)
        # The bit field's first member is in the lowest bits on little-endian machines only.
        length, delta = (head & 31, head >> 5) if _LITTLE else (head >> 27, head & 0x7FFFFFF)
        at += 4
        if length == _PADDING:
            if not delta:  # the rest of the page is empty
                break
            now += delta
            at += word
        elif length == _TIME_EXTEND:
            now += delta + (word << 27)
            at += 4
        elif length == _TIME_STAMP:
            # The top bits of a time stamp are those of the time before it (since Linux 5.18).
            now = (now & ~_TIME_STAMP_BITS) | delta + (word << 27)
            at += 4
        else:
            now += delta
            size = 4 * length
            if length == 0:  # the length comes first, and counts itself
                size, at = word - 4, at + 4
            kind = struct.unpack_from("=H", page, at)[0] if size >= 8 and at + size <= end else -1
            if (known := formats.get(kind)) is not None and known.size <= size:
                (tid,) = struct.unpack_from("=i", page, at + known.tid)
                (eventfd_id,) = struct.unpack_from("=I", page, at + known.eventfd_id)
                events.append(RawEvent(now, tid, eventfd_id, kind))
            at += max(size, 0)
    return events, bool(commit & _MISSED)
