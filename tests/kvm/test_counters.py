"""Do both ways to count in the kernel count the same, each thread and every eventfd of its own?

No machine is needed: this process signals, by write and (at the end of an asynchronous read) from
within the kernel.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from kickcall.host.bpf_counter import BpfCounter
from kickcall.host.eventfd_trace import _signal_by_aio
from kickcall.host.eventfds import read_eventfd
from kickcall.host.hist_counter import HistCounter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kickcall.host.hist import Hits

pytestmark = [pytest.mark.rig]

Way = type[BpfCounter | HistCounter]
WAYS = pytest.mark.parametrize("way", [BpfCounter, HistCounter])


@pytest.fixture
def eventfd() -> Iterator[Callable[[], tuple[int, int]]]:
    """Make an eventfd; return its descriptor and its id."""
    made = []

    def make() -> tuple[int, int]:
        made.append(os.eventfd(0, os.EFD_NONBLOCK))
        state = read_eventfd(os.getpid(), made[-1])
        assert state is not None
        return made[-1], state.eventfd_id

    yield make
    for fd in made:
        os.close(fd)


def by_thread(hits: list[Hits]) -> Counter[tuple[int, int]]:
    return Counter({(one.eventfd_id, one.tid): one.total for one in hits})


@WAYS
def test_each_signal_is_counted_for_its_eventfd_and_its_thread(
    way: Way, eventfd: Callable[[], tuple[int, int]]
) -> None:
    (counted, number), (other, _) = eventfd(), eventfd()
    tids = [threading.get_native_id()]

    def signal() -> None:
        tids.append(threading.get_native_id())
        for _ in range(7):
            os.eventfd_write(counted, 1)

    with way([number], 4) as counter:
        began = time.monotonic_ns()
        for _ in range(1000):
            os.eventfd_write(counted, 1)
        os.eventfd_write(other, 1)
        thread = threading.Thread(target=signal)
        thread.start()
        thread.join()
        assert _signal_by_aio(counted)
        ended = time.monotonic_ns()
        in_kernel, by_write, dropped = counter.counts()
    assert by_thread(by_write) == {(number, tids[0]): 1000, (number, tids[1]): 7}
    assert by_thread(in_kernel) == {(number, tids[0]): 1}
    assert dropped == 0
    assert all(began < one.last_ns < ended for one in (*in_kernel, *by_write))
    # The kernel's name of the thread (prctl(2), PR_SET_NAME): Python gives it none.
    with open("/proc/self/comm", encoding="utf-8") as name:
        assert {one.comm for one in (*in_kernel, *by_write)} == {name.read().strip()}


@WAYS
def test_threads_that_signal_at_once_lose_no_signal(
    way: Way, eventfd: Callable[[], tuple[int, int]]
) -> None:
    fds = [eventfd() for _ in range(8)]
    begin = threading.Barrier(4)
    tids = []

    def signal() -> None:
        tids.append(threading.get_native_id())
        begin.wait()
        for fd, _ in fds * 500:
            os.eventfd_write(fd, 1)

    with way([number for _, number in fds], 4) as counter:
        threads = [threading.Thread(target=signal) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _, by_write, dropped = counter.counts()
    assert by_thread(by_write) == {(number, tid): 500 for _, number in fds for tid in tids}
    assert dropped == 0
    assert len(by_write) == len(fds) * len(tids)


@WAYS
def test_eventfds_that_come_later_are_counted_from_then_on(
    way: Way, eventfd: Callable[[], tuple[int, int]]
) -> None:
    first = eventfd()
    # More than one table is made for.
    later = [eventfd() for _ in range(200)]
    with way([first[1]], 16) as counter:
        for fd, _ in later:
            os.eventfd_write(fd, 1)
        counter.add([number for _, number in later])
        for at, (fd, _) in enumerate(later):
            for _ in range(at % 3 + 1):
                os.eventfd_write(fd, 1)
        os.eventfd_write(first[0], 1)
        counts = counter.counts()
    us = threading.get_native_id()
    expected = {(number, us): at % 3 + 1 for at, (_, number) in enumerate(later)}
    assert by_thread(counts.by_write) == {**expected, (first[1], us): 1}
    assert counts.dropped == 0


@WAYS
def test_signals_that_find_no_room_are_told(
    way: Way, eventfd: Callable[[], tuple[int, int]]
) -> None:
    fd, number = eventfd()
    with way([number], 1) as counter:
        for _ in range(1100):
            thread = threading.Thread(target=os.eventfd_write, args=(fd, 1))
            thread.start()
            thread.join()
        counts = counter.counts()
    # A histogram drops what finds no place near its own, sooner than when it is full.
    assert sum(one.total for one in counts.by_write) + counts.dropped == 1100
    assert counts.dropped >= 1100 - 2 * 512
