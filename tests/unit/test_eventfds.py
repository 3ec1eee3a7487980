"""What does kickcall read of an eventfd, and can its own write ever block or change it?"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import time
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import CounterFullError, MachineGoneError
from kickcall.host import eventfds

if TYPE_CHECKING:
    from collections.abc import Iterator

FULL = 2**64 - 2  # eventfd(2): "the maximum value that may be stored in the counter"

LINUX_6_12 = (
    "pos:\t0\nflags:\t02004002\nmnt_id:\t16\nino:\t1060\n"
    "eventfd-count:               1f\neventfd-id: 73\neventfd-semaphore: 1\n"
)
LINUX_6_1 = (
    "pos:\t0\nflags:\t02004002\nmnt_id:\t15\nino:\t8195\n"
    "eventfd-count:               10\neventfd-id: 105\n"
)
LINUX_4_19 = "pos:\t0\nflags:\t02\nmnt_id:\t12\neventfd-count:                0\n"


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def add(fd: int, count: int) -> None:
    os.write(fd, struct.pack("=Q", count))


def test_the_count_is_hexadecimal_and_the_id_decimal() -> None:
    state = eventfds.parse_fdinfo(LINUX_6_1)
    assert state is not None
    assert (state.count, state.eventfd_id) == (16, 105)


def test_flags_are_octal() -> None:
    state = eventfds.parse_fdinfo(LINUX_6_1)
    assert state is not None
    assert state.flags == os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC


def test_whether_it_is_a_semaphore_is_told_since_linux_6_5() -> None:
    new, old = eventfds.parse_fdinfo(LINUX_6_12), eventfds.parse_fdinfo(LINUX_6_1)
    assert new is not None
    assert old is not None
    assert new.semaphore is True
    assert old.semaphore is None
    plain = eventfds.parse_fdinfo(LINUX_6_12.replace("semaphore: 1", "semaphore: 0"))
    assert plain is not None
    assert plain.semaphore is False


def test_a_kernel_without_ids_gives_an_id_that_no_eventfd_has() -> None:
    state = eventfds.parse_fdinfo(LINUX_4_19)
    assert state is not None
    assert state.eventfd_id < 0
    assert state.count == 0


def test_what_is_no_eventfd_has_no_state() -> None:
    assert eventfds.parse_fdinfo("pos:\t0\nflags:\t02\nmnt_id:\t9\n") is None
    assert eventfds.parse_fdinfo("") is None
    assert eventfds.parse_fdinfo("pos:\t0\nflags:\t02\ntfd: 5 events: 19 data: 5\n") is None


def test_a_real_eventfd_shows_its_count(eventfd: int) -> None:
    add(eventfd, 0xABC)
    state = eventfds.read_eventfd(os.getpid(), eventfd)
    assert state is not None
    assert state.count == 0xABC
    assert state.flags & os.O_ACCMODE == os.O_RDWR
    assert not state.flags & os.O_NONBLOCK


def test_reading_the_state_takes_nothing_from_the_count(eventfd: int) -> None:
    add(eventfd, 5)
    for _ in range(3):
        eventfds.read_eventfd(os.getpid(), eventfd)
    assert os.eventfd_read(eventfd) == 5


def test_two_descriptors_of_one_eventfd_share_its_id_and_two_eventfds_do_not(eventfd: int) -> None:
    again, other = os.dup(eventfd), os.eventfd(0)
    try:
        first, same, different = (
            eventfds.read_eventfd(os.getpid(), fd) for fd in (eventfd, again, other)
        )
        assert first is not None
        assert same is not None
        assert different is not None
        assert first.eventfd_id == same.eventfd_id >= 0
        assert first.eventfd_id != different.eventfd_id
    finally:
        os.close(again)
        os.close(other)


def test_a_pipe_and_a_closed_descriptor_are_no_eventfds() -> None:
    read_end, write_end = os.pipe()
    try:
        assert eventfds.read_eventfd(os.getpid(), read_end) is None
    finally:
        os.close(read_end)
        os.close(write_end)
    assert eventfds.read_eventfd(os.getpid(), write_end) is None


def test_all_eventfds_of_a_process_are_listed_and_nothing_else(eventfd: int) -> None:
    with open(os.devnull) as other:
        found = eventfds.eventfds_of(os.getpid())
        assert eventfd in found
        assert other.fileno() not in found


def test_the_eventfds_of_a_process_that_is_gone_cannot_be_listed() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(MachineGoneError, match=str(pid)):
        eventfds.eventfds_of(pid)


def test_every_holder_is_found_by_the_id(eventfd: int) -> None:
    start, go = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.close(go)
            os.read(start, 1)
        os._exit(0)
    try:
        state = eventfds.read_eventfd(os.getpid(), eventfd)
        assert state is not None
        holders, _ = eventfds.holders_of({state.eventfd_id})
        held = {(holder.pid, holder.fd) for holder in holders[state.eventfd_id]}
        assert {(os.getpid(), eventfd), (child, eventfd)} <= held
        assert {pid for pid, _ in held} == {os.getpid(), child}
    finally:
        os.close(go)
        os.close(start)
        os.waitpid(child, 0)


def test_a_signal_adds_one(eventfd: int) -> None:
    add(eventfd, 41)
    eventfds.signal(eventfd)
    assert os.eventfd_read(eventfd) == 42


def test_the_last_count_that_fits_is_still_written(eventfd: int) -> None:
    add(eventfd, FULL - 1)
    eventfds.signal(eventfd)
    assert os.eventfd_read(eventfd) == FULL


def test_a_full_eventfd_is_refused_at_once_and_stays_as_it_was(eventfd: int) -> None:
    add(eventfd, FULL)
    started = time.monotonic()
    with pytest.raises(CounterFullError, match="nothing was written"):
        eventfds.signal(eventfd)
    assert time.monotonic() - started < 1
    assert os.eventfd_read(eventfd) == FULL


def test_the_flags_that_all_holders_share_are_left_alone(eventfd: int) -> None:
    before = fcntl.fcntl(eventfd, fcntl.F_GETFL)
    eventfds.signal(eventfd)
    add(eventfd, FULL - 1)
    with pytest.raises(CounterFullError):
        eventfds.signal(eventfd)
    assert fcntl.fcntl(eventfd, fcntl.F_GETFL) == before
    assert not before & os.O_NONBLOCK


def test_this_kernel_writes_fdinfo_as_the_recorded_ones(eventfd: int) -> None:
    add(eventfd, 0x1F)
    with open(f"/proc/self/fdinfo/{eventfd}") as file:
        text = file.read()
    assert re.search(r"^eventfd-count:\s+1f$", text, re.M)
