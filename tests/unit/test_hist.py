"""Is a kernel's histogram read right, whatever the threads in it call themselves?

The texts are a Linux 6.1's.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kickcall.host.hist import SIZE_MAX, Hits, filter_text, parse_hist, size_for

# Each thread wrote three times to eventfd 0 under a name that is to lead a reader astray.
HOSTILE = (
    b"# event histogram\n#\n# trigger info: hist:keys=id,common_pid.execname:vals=hitcount:"
    b"ts0=common_timestamp:sort=hitcount:size=512:clock=mono:onmax($ts0).save(id) "
    b"if (id >= 0 && id <= 1) [active]\n#\n\n"
    b"{ id:          1, common_pid: python          [       123] } hitcount:          1\n"
    b"\tmax: 36913662039  id:          1\n"
    b"{ id:          0, common_pid: } hitcount:  9  [       127] } hitcount:          3\n"
    b"\tmax: 37450450411  id:          0\n"
    b"{ id:          0, common_pid: x [ 12] } hitc  [       132] } hitcount:          3\n"
    b"\tmax: 37541203008  id:          0\n"
    b"{ id:          0, common_pid: a\n{ id: 1, c    [       129] } hitcount:          3\n"
    b"\tmax: 37503535187  id:          0\n"
    b"{ id:          0, common_pid: \xff\xfe\x80             [       130] } hitcount:          3\n"
    b"\tmax: 37525990652  id:          0\n"
    b"{ id:          0, common_pid:                 [       131] } hitcount:          3\n"
    b"\tmax: 37536732626  id:          0\n"
    b"{ id:          0, common_pid: { id: 7, common [       128] } hitcount:          3\n"
    b"\tmax: 37492420730  id:          0\n"
    b"{ id:          0, common_pid: \n    Dropped: 9 [       133] } hitcount:          3\n"
    b"\tmax: 37550616035  id:          0\n"
    b"{ id:          0, common_pid: CPU 0/KVM       [       126] } hitcount:          3\n"
    b"\tmax: 37401836628  id:          0\n"
    b"{ id:          0, common_pid: plain           [       125] } hitcount:          3\n"
    b"\tmax: 37278697977  id:          0\n"
    b"\nTotals:\n    Hits: 28\n    Entries: 10\n    Dropped: 0\n"
)
EMPTY = (
    b"# event histogram\n#\n# trigger info: hist:keys=id [active]\n#\n\n\nTotals:\n    Hits: 0\n"
    b"    Entries: 0\n    Dropped: 0\n"
)
FULL = (
    b"{ id:          3, common_pid: python          [       124] } hitcount:        128\n"
    b"\tmax: 9032083299  id:          3\n"
    b"\nTotals:\n    Hits: 128\n    Entries: 128\n    Dropped: 72\n"
)


def test_an_entry_has_eventfd_thread_name_total_and_time() -> None:
    hits, dropped = parse_hist(HOSTILE)
    assert hits[0] == Hits(1, 123, "python", 1, 36913662039)
    assert dropped == 0


def test_no_name_hides_or_forges_an_entry() -> None:
    hits, dropped = parse_hist(HOSTILE)
    assert len(hits) == 10
    assert {(one.eventfd_id, one.total) for one in hits[1:]} == {(0, 3)}
    assert {one.tid: one.comm for one in hits[1:]} == {
        125: "plain",
        126: "CPU 0/KVM",
        127: "} hitcount:  9",
        128: "{ id: 7, common",
        129: "a\n{ id: 1, c",
        130: "���",
        131: "",
        132: "x [ 12] } hitc",
        133: "\n    Dropped: 9",
    }
    assert dropped == 0


def test_what_found_no_room_is_told() -> None:
    assert parse_hist(FULL)[1] == 72


def test_the_histograms_of_several_triggers_are_one() -> None:
    hits, dropped = parse_hist(HOSTILE + FULL + EMPTY + FULL)
    assert len(hits) == 12
    assert dropped == 144


def test_an_empty_histogram_has_no_entries() -> None:
    assert parse_hist(EMPTY) == ([], 0)


@given(st.binary(max_size=15).filter(lambda name: b"\0" not in name))
def test_a_name_of_any_15_bytes_is_one_entry(name: bytes) -> None:
    entry = b"{ id: %10d, common_pid: %-16s[%10d] } hitcount: %10d\n\tmax: %10d  id: %10d\n"
    text = entry % (5, name, 77, 3, 1000, 5) + entry % (6, b"qemu", 78, 4, 2000, 6)
    hits, dropped = parse_hist(text)
    assert [(one.eventfd_id, one.tid, one.total, one.last_ns) for one in hits] == [
        (5, 77, 3, 1000),
        (6, 78, 4, 2000),
    ]
    assert dropped == 0


def test_a_filter_passes_runs_and_single_eventfds() -> None:
    assert filter_text({5}) == "id == 5"
    assert filter_text({7, 9, 8, 5}) == "id == 5 || (id >= 7 && id <= 9)"


def test_a_filter_of_too_many_runs_joins_the_nearest() -> None:
    assert filter_text({1, 10, 12, 40}, most=2) == "(id >= 1 && id <= 12) || id == 40"


@given(st.sets(st.integers(0, 500), min_size=1), st.integers(1, 20))
def test_a_filter_passes_all_that_was_asked_for(ids: set[int], most: int) -> None:
    text = filter_text(ids, most)
    condition = compile(text.replace("||", "or").replace("&&", "and"), "filter", "eval")
    passed = {one for one in range(501) if eval(condition, {"id": one})}
    assert ids <= passed
    assert text.count("||") < most


def test_a_histogram_has_room_for_twice_what_is_expected() -> None:
    assert size_for(10) == 512
    assert size_for(400) == 1024
    assert size_for(10**6) == SIZE_MAX
