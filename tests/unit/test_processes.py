"""Is a process held so that its end is noticed and its pid never means another one?"""

from __future__ import annotations

import os
import select
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import MachineGoneError, PrivilegeError
from kickcall.host import processes
from kickcall.host.processes import Process

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet reaped


def test_a_running_process_is_alive(child: subprocess.Popen[bytes]) -> None:
    with Process(child.pid) as process:
        assert process.alive()
        process.check_alive()


def test_a_process_that_ended_is_not_alive_though_nobody_reaped_it(
    child: subprocess.Popen[bytes],
) -> None:
    with Process(child.pid) as process:
        end(child)
        assert not process.alive()
        with pytest.raises(MachineGoneError, match=f"process {child.pid} ended"):
            process.check_alive()


def test_several_threads_may_ask_at_once(child: subprocess.Popen[bytes]) -> None:
    with Process(child.pid) as process, ThreadPoolExecutor(4) as threads:
        assert all(threads.map(process.alive, [0.1] * 8))


def test_a_stopped_process_is_alive(child: subprocess.Popen[bytes]) -> None:
    with Process(child.pid) as process:
        os.kill(child.pid, signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        assert process.alive()


def test_a_zombie_and_a_pid_that_is_free_cannot_be_held(child: subprocess.Popen[bytes]) -> None:
    end(child)
    with pytest.raises(MachineGoneError, match=str(child.pid)):
        Process(child.pid)
    child.wait()
    with pytest.raises(MachineGoneError, match=f"no process {child.pid}"):
        Process(child.pid)


def test_a_process_that_could_not_be_held_leaves_no_descriptor_open(
    child: subprocess.Popen[bytes],
) -> None:
    end(child)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(MachineGoneError):
        Process(child.pid)
    assert set(os.listdir("/proc/self/fd")) <= before  # what others had may be closed meanwhile


def test_closing_twice_closes_nothing_else(child: subprocess.Popen[bytes]) -> None:
    process = Process(child.pid)
    process.close()
    with open(os.devnull) as reused:  # takes the number that was freed
        process.close()
        os.fstat(reused.fileno())


def test_a_duplicate_is_the_same_open_file() -> None:
    with Process(os.getpid()) as process:
        eventfd = os.eventfd(3)
        try:
            ours = process.duplicate_fd(eventfd)
            os.write(ours, struct.pack("=Q", 4))
            os.close(ours)
            assert os.eventfd_read(eventfd) == 7
        finally:
            os.close(eventfd)


def test_a_duplicate_outlives_the_process_that_had_it() -> None:
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        eventfd = os.eventfd(9)
        os.write(tell, struct.pack("i", eventfd))
        select.select([], [], [], 60)
        os._exit(0)
    try:
        (fd,) = struct.unpack("i", os.read(ready, 4))
        with Process(pid) as process:
            ours = process.duplicate_fd(fd)
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert os.eventfd_read(ours) == 9
            os.close(ours)
            with pytest.raises(MachineGoneError):
                process.duplicate_fd(fd)
    finally:
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(tell)


def test_a_duplicate_is_not_handed_on_to_programs_that_we_start(
    child: subprocess.Popen[bytes],
) -> None:
    with Process(child.pid) as process:
        ours = process.duplicate_fd(0)
        assert not os.get_inheritable(ours)
        os.close(ours)


def test_a_descriptor_that_is_not_open_is_an_os_error(child: subprocess.Popen[bytes]) -> None:
    with Process(child.pid) as process, pytest.raises(OSError, match="Bad file descriptor"):
        process.duplicate_fd(777)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_users_descriptor_needs_privilege(child: subprocess.Popen[bytes]) -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            with Process(child.pid) as process:
                try:
                    process.duplicate_fd(0)
                except PrivilegeError as exc:
                    code = 0 if "CAP_SYS_PTRACE" in str(exc) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_start_time_counts_clock_ticks_since_boot(child: subprocess.Popen[bytes]) -> None:
    started = processes.start_time(child.pid)
    assert started is not None
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    age = uptime - started / os.sysconf("SC_CLK_TCK")
    assert -0.1 < age < 60


def test_the_start_time_does_not_change_and_differs_from_an_older_processs(
    child: subprocess.Popen[bytes],
) -> None:
    first = processes.start_time(child.pid)
    time.sleep(0.05)
    assert processes.start_time(child.pid) == first
    with Process(child.pid) as process:
        assert process.start_time == first
    ours = processes.start_time(os.getpid())
    assert ours is not None
    assert first is not None
    assert ours < first


def test_a_name_with_blanks_and_parentheses_does_not_shift_the_fields(tmp_path: Path) -> None:
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "60"])
    try:
        deadline = time.monotonic() + 5
        while processes.comm(process.pid) != "a) S 1 (b" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert processes.comm(process.pid) == "a) S 1 (b"
        started, ours = processes.start_time(process.pid), processes.start_time(os.getpid())
        assert started is not None
        assert ours is not None
        assert started > ours
    finally:
        process.kill()
        process.wait()


def test_what_is_gone_has_no_start_time_and_no_name(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    assert processes.start_time(child.pid) is None
    assert processes.comm(child.pid) == ""


def test_all_processes_are_listed(child: subprocess.Popen[bytes]) -> None:
    found = processes.pids()
    assert {os.getpid(), child.pid} <= set(found)
    assert found == sorted(found)
