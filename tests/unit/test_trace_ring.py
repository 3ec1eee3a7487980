"""Are events in the pages of a trace buffer read with their times, threads and eventfds?

The pages are a Linux 6.1's, as trace_pipe_raw gave them: two CPUs, threads that wrote to eventfd 0.
"""

from __future__ import annotations

import base64
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kickcall.host.trace_ring import Format, RawEvent, parse_format, parse_page

FORMAT_TEXT = """name: write
ID: 1360
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:unsigned long __probe_ip;\toffset:8;\tsize:8;\tsigned:0;
\tfield:u32 id;\toffset:16;\tsize:4;\tsigned:0;

print fmt: "(%lx) id=%u", REC->__probe_ip, REC->id
"""
FORMATS = {
    1359: Format(kind=1359, tid=4, eventfd_id=16, size=20),
    1360: Format(kind=1360, tid=4, eventfd_id=16, size=20),
}
CPU0 = base64.b64decode(
    "V8g5mAgAAADAAQAAAAAAAAUAAABQBQAAewAAAMC63I7/////AQAAAGVZFOVPBQAAewAAAGDD3I7/////AQAAAP6+"
    "A84BAAAABQAAAFAFAAB9AAAAwLrcjv////8AAAAAZVIfBVAFAAB9AAAAwLrcjv////8AAAAApckIAFAFAAB9AAAA"
    "wLrcjv////8AAAAAfiKqrAEAAAAFAAAAUAUAAIEAAADAutyO/////wAAAAAloCkAUAUAAIEAAADAutyO/////wAA"
    "AADFCAQAUAUAAIEAAADAutyO/////wAAAADFjacqUAUAAIIAAADAutyO/////wAAAAAFeCkAUAUAAIIAAADAutyO"
    "/////wAAAABljwMAUAUAAIIAAADAutyO/////wAAAAClsmAUUAUAAIMAAADAutyO/////wAAAAAF1RgAUAUAAIMA"
    "AADAutyO/////wAAAAAlkwMAUAUAAIMAAADAutyO/////wAAAAAF1W4IUAUAAIQAAADAutyO/////wAAAABlbhQA"
    "UAUAAIQAAADAutyO/////wAAAABligMAUAUAAIQAAADAutyO/////wAAAABFmEtHTwUAAHsAAABgw9yO/////wAA"
    "AAA="
)
CPU1 = base64.b64decode(
    "PWVCtAgAAAAgAQAAAAAAAAUAAABQBQAAfgAAAMC63I7/////AAAAAEXK/yFQBQAAfgAAAMC63I7/////AAAAAKUY"
    "CwBQBQAAfgAAAMC63I7/////AAAAAIWAhlxQBQAAfwAAAMC63I7/////AAAAAOXwLgBQBQAAfwAAAMC63I7/////"
    "AAAAAIXBAwBQBQAAfwAAAMC63I7/////AAAAAKXTTEtQBQAAgAAAAMC63I7/////AAAAAGWvnQRQBQAAgAAAAMC6"
    "3I7/////AAAAAOXOIgBQBQAAgAAAAMC63I7/////AAAAAAXAAWpQBQAAhQAAAMC63I7/////AAAAACUL+ARQBQAA"
    "hQAAAMC63I7/////AAAAAAXiBQBQBQAAhQAAAMC63I7/////AAAAAA=="
)


def page(events: bytes, now: int = 1000, flags: int = 0) -> bytes:
    return struct.pack("=QQ", now, len(events) | flags) + events


def event(delta: int, tid: int, eventfd: int, kind: int = 1360) -> bytes:
    data = struct.pack("=HBBiQI", kind, 0, 0, tid, 0, eventfd)
    return struct.pack("=I", len(data) // 4 | delta << 5) + data


def test_a_format_says_where_thread_and_eventfd_are() -> None:
    assert parse_format(FORMAT_TEXT) == FORMATS[1360]


def test_a_format_without_an_eventfd_id_is_refused() -> None:
    with pytest.raises(ValueError, match="no eventfd id"):
        parse_format(FORMAT_TEXT.replace("u32 id;", "u32 other;"))


def test_a_real_page_has_each_write_with_its_thread_and_time() -> None:
    events, lost = parse_page(CPU0, FORMATS)
    assert not lost
    # The histogram of the same run: thread 123 wrote once to eventfd 1, at 36913662039 ns.
    assert events[0] == RawEvent(36913662039, 123, 1, 1360)
    # Then the kernel signalled it, 66 ms later (its kprobe's number is 1359).
    assert (events[1].tid, events[1].eventfd_id, events[1].kind) == (123, 1, 1359)
    by_thread: dict[int, list[int]] = {}
    for one in events[2:-1]:
        assert (one.eventfd_id, one.kind) == (0, 1360)
        by_thread.setdefault(one.tid, []).append(one.ns)
    # Each thread wrote three times; the histogram has these times of the last of each.
    last = {tid: times[-1] for tid, times in by_thread.items()}
    assert last == {
        125: 37278697977,
        129: 37503535187,
        130: 37525990652,
        131: 37536732626,
        132: 37541203008,
    }
    assert {len(times) for times in by_thread.values()} == {3}


def test_the_other_cpus_page_has_the_other_threads() -> None:
    events, _ = parse_page(CPU1, FORMATS)
    last = {one.tid: one.ns for one in events}
    assert last == {126: 37401836628, 127: 37450450411, 128: 37492420730, 133: 37550616035}


def test_time_that_passes_the_headers_27_bits_is_an_event_of_its_own() -> None:
    extend = struct.pack("=II", 30 | 5 << 5, 3)
    events, _ = parse_page(page(extend + event(7, 1, 2)), FORMATS)
    assert events[0].ns == 1000 + (3 << 27) + 5 + 7


def test_an_absolute_time_keeps_the_top_bits_of_the_time_before_it() -> None:
    before = 1 << 60 | 1000
    stamp = struct.pack("=II", 31 | 9 << 5, 4)
    events, _ = parse_page(page(stamp + event(1, 1, 2), now=before), FORMATS)
    assert events[0].ns == (1 << 60) + (4 << 27) + 9 + 1


def test_what_was_discarded_is_stepped_over() -> None:
    discarded = struct.pack("=II", 29 | 4 << 5, 12) + bytes(8)
    events, _ = parse_page(page(discarded + event(6, 1, 2)), FORMATS)
    assert events == [RawEvent(1010, 1, 2, 1360)]


def test_an_event_that_says_its_length_in_a_word_of_its_own_is_read() -> None:
    data = struct.pack("=HBBiQI", 1360, 0, 0, 5, 0, 6)
    long = struct.pack("=II", 0 | 3 << 5, len(data) + 4) + data
    events, _ = parse_page(page(long + event(1, 7, 8)), FORMATS)
    assert [(one.ns, one.tid, one.eventfd_id) for one in events] == [(1003, 5, 6), (1004, 7, 8)]


def test_a_page_before_which_events_were_overwritten_says_so() -> None:
    assert parse_page(page(event(1, 2, 3), flags=1 << 31), FORMATS)[1]
    assert not parse_page(page(event(1, 2, 3)), FORMATS)[1]


def test_events_of_others_are_left_out() -> None:
    events, _ = parse_page(page(event(1, 2, 3, kind=77) + event(1, 4, 5)), FORMATS)
    assert [one.tid for one in events] == [4]


@given(st.binary(max_size=300))
def test_any_bytes_end_in_some_events(noise: bytes) -> None:
    events, _ = parse_page(struct.pack("=QQ", 0, len(noise)) + noise, FORMATS)
    assert len(events) <= len(noise) // 8
