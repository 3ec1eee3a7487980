"""Is it told what a thread does, and what it waits in? On real processes of this host."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kickcall.host import threads
from kickcall.host.processes import comm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TWO_THREADS = """
import select, sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
epoll = select.epoll()
print(epoll.fileno(), flush=True)
epoll.poll()
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_THREADS], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def comes(what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def test_a_sleeping_thread_tells_which_call_it_sleeps_in(child: subprocess.Popen[str]) -> None:
    # (The main thread may be in a futex, too, on its way: the interpreter's lock.)
    waits = ["epoll_wait", "futex"]
    assert comes(lambda: [one.waits_in for one in threads.threads_of(child.pid)] == waits)
    main, other = threads.threads_of(child.pid)
    assert (main.pid, main.tid, main.state, main.waits_in) == (
        child.pid,
        child.pid,
        "S",
        "epoll_wait",
    )
    assert (other.pid, other.state, other.waits_in) == (child.pid, "S", "futex")


def test_a_stopped_process_has_stopped_threads(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGSTOP)
    assert comes(lambda: {one.state for one in threads.threads_of(child.pid)} == {"T"})
    assert {one.waits_in for one in threads.threads_of(child.pid)} == {""}
    child.send_signal(signal.SIGCONT)
    assert comes(lambda: {one.state for one in threads.threads_of(child.pid)} == {"S"})


def test_a_killed_process_is_a_zombie_and_then_gone(child: subprocess.Popen[str]) -> None:
    child.kill()
    assert comes(lambda: threads.thread(child.pid, child.pid).state == "Z")
    child.wait()
    assert threads.thread(child.pid, child.pid).state == ""
    assert threads.threads_of(child.pid) == ()


def test_the_thread_that_asks_runs() -> None:
    me = threads.thread(os.getpid(), threading.get_native_id())
    assert (me.state, me.waits_in) == ("R", "")


def test_a_name_may_hold_a_parenthesis() -> None:
    name = "a) R (b"
    before = comm(os.getpid())
    with open("/proc/self/comm", "w") as file:
        file.write(name)
    try:
        assert threads.thread(os.getpid(), os.getpid()).comm == name
    finally:
        with open("/proc/self/comm", "w") as file:
            file.write(before)


def test_a_descriptor_is_found_in_an_epoll_set() -> None:
    ends = os.pipe()
    with select.epoll() as epoll:
        epoll.register(ends[0], select.EPOLLIN)
        assert threads.in_epoll(os.getpid(), ends[0]) is True
        assert threads.in_epoll(os.getpid(), ends[1]) is False
    for end in ends:
        os.close(end)


def test_without_an_epoll_set_nothing_is_said(child: subprocess.Popen[str]) -> None:
    # The child's has nothing in it: it tells nothing of its other descriptors.
    assert threads.in_epoll(child.pid, 0) is None


def test_a_process_has_no_vhost_workers_of_its_own() -> None:
    assert threads.vhost_workers(os.getpid()) == ()
