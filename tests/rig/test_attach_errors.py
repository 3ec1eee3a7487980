"""Does each reason for which a machine cannot be attached get its own error, in two seconds?"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.errors import (
    KickcallError,
    LabError,
    MachineNotFoundError,
    MonitorBusyError,
    MonitorError,
    MonitorGoneError,
    NotAVmmError,
)
from kickcall.lab.faults_target import stopped
from kickcall.lab.monitor import ask
from kickcall.lab.process import thread_states
from kickcall.lab.qtest import Qtest, boot_without_guest
from kickcall.lab.spec import MachineSpec, VirtioBlk
from small_qemu import small_qemu
from witness import held_monitor, until, within

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.rig

LIMIT_S = 2.0
AT_ONCE_S = 1.0
TRIES = 3
"""A host that is busy may keep QEMU or us from the processor for longer than the limit."""
NOBODY = 65534


def refused(target: str | int, error: type[KickcallError], match: str) -> None:
    """Check that attaching fails at once with exactly this error, told in one line."""
    fds = len(os.listdir("/proc/self/fd"))
    for _ in range(TRIES):
        began = time.monotonic()
        with pytest.raises(KickcallError) as caught:
            attach(target)
        took = time.monotonic() - began
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 3
        assert len(os.listdir("/proc/self/fd")) == fds
        if took < LIMIT_S and type(caught.value) is error:
            break
    assert took < within(LIMIT_S)
    assert type(caught.value) is error
    assert re.search(match, str(caught.value))


def qmp(path: Path) -> tuple[str, str]:
    return "-qmp", f"unix:{path},server=on,wait=off"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


def answers(path: Path) -> bool:
    with contextlib.suppress(LabError):
        return bool(ask(path, "query-status")["status"] == "prelaunch")
    return False


def test_an_unknown_name() -> None:
    refused("nobody-has-this-name", MachineNotFoundError, "no running QEMU is named")


def test_two_machines_of_one_name(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with (
        small_qemu("-name", "twin", *qmp(one), ready=one) as first,
        small_qemu("-name", "twin", *qmp(two), ready=two) as second,
    ):
        pids = ", ".join(str(pid) for pid in sorted((first, second)))  # they begin again at 2
        refused("twin", MachineNotFoundError, f"2 machines are named 'twin'.*{pids}")
        with attach(second) as attached:
            assert attached.info.pid == second


def test_a_process_that_is_no_qemu() -> None:
    refused(os.getpid(), NotAVmmError, f"process {os.getpid()} is no QEMU, it is python")


def test_a_process_that_is_not() -> None:
    with subprocess.Popen(["true"]) as ended:
        pid = ended.pid
    refused(pid, MachineNotFoundError, f"there is no process {pid}")


def test_a_zombie_is_no_machine(path: Path) -> None:
    with small_qemu("-name", "gone", *qmp(path), ready=path) as pid:
        os.kill(pid, signal.SIGKILL)
        until(lambda: "Z" in thread_states(pid), "QEMU has ended and nobody waited for it")
        refused("gone", MachineNotFoundError, "no running QEMU is named")


def test_a_socket_that_is_not(path: Path) -> None:
    refused(f"qmp:{path}", MonitorGoneError, "no such socket")


def test_a_socket_that_nobody_listens_on(path: Path) -> None:
    with small_qemu(*qmp(path), ready=path) as pid:
        os.kill(pid, signal.SIGKILL)
        until(lambda: thread_states(pid) == {"Z"}, "QEMU has ended")
    refused(f"qmp:{path}", MonitorGoneError, "nobody listens on this socket")


def test_a_file_that_is_no_socket(path: Path) -> None:
    path.write_text("no socket")
    refused(f"qmp:{path}", MonitorGoneError, "nobody listens|cannot connect")


def test_a_socket_of_another_program(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        refused(f"qmp:{path}", NotAVmmError, f"process {os.getpid()}, is no QEMU")


def test_a_socket_of_qemu_that_speaks_no_qmp(path: Path) -> None:
    """The human monitor is a socket of QEMU, too, and greets in another language."""
    monitor = ("-monitor", f"unix:{path},server=on,wait=off")
    with small_qemu(*monitor, ready=path):
        refused(f"qmp:{path}", MonitorError, "speaks no QMP")


def test_a_socket_of_qemu_that_says_nothing(path: Path) -> None:
    serial = ("-serial", f"unix:{path},server=on,wait=off")
    with small_qemu(*serial, ready=path):
        refused(f"qmp:{path}", MonitorBusyError, "no greeting")


def test_a_monitor_that_somebody_holds(path: Path) -> None:
    with small_qemu("-name", "held", *qmp(path), ready=path) as pid:
        with held_monitor(path):
            for target in ("held", pid, f"qmp:{path}"):
                refused(target, MonitorBusyError, "another client holds this monitor")
        with attach("held") as attached:
            assert attached.info.pid == pid


@contextlib.contextmanager
def crowd(path: Path) -> Iterator[None]:
    """Hold a monitor, and have so many wait for it that no more can."""
    with held_monitor(path), contextlib.ExitStack() as waiting:
        for _ in range(20):
            one = waiting.enter_context(socket.socket(socket.AF_UNIX))
            one.setblocking(False)
            try:
                one.connect(str(path))
            except BlockingIOError:
                break
        else:
            pytest.fail("QEMU's queue of clients never fills up")
        yield


def test_a_monitor_that_many_wait_for(path: Path) -> None:
    with small_qemu("-name", "held", *qmp(path), ready=path), crowd(path):
        for target in ("held", f"qmp:{path}"):
            refused(target, MonitorBusyError, "another client holds this monitor")


def test_a_monitor_is_had_when_those_who_waited_have_left(path: Path) -> None:
    with small_qemu("-name", "held", *qmp(path), ready=path) as pid:
        with contextlib.ExitStack() as they:
            they.enter_context(crowd(path))
            leave = threading.Timer(0.3, they.pop_all().close)
        leave.start()
        with attach("held", timeout=10) as attached:
            assert attached.info.pid == pid
        leave.join()


def test_the_second_monitor_is_taken_where_the_first_is_held(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with (
        small_qemu("-name", "held", *qmp(one), *qmp(two), ready=two) as pid,
        held_monitor(one),
    ):
        for _ in range(TRIES):
            began = time.monotonic()
            # Who waits for the first one to the end waits far longer than any host is busy.
            with attach("held", timeout=30) as attached:
                assert attached.info.pid == pid
            took = time.monotonic() - began
            if took < AT_ONCE_S:
                break
        assert took < within(AT_ONCE_S)
        with held_monitor(two):
            refused("held", MonitorBusyError, "another client holds this monitor")


def test_a_qemu_that_was_stopped(path: Path) -> None:
    with small_qemu("-name", "frozen", *qmp(path), ready=path) as pid:
        with stopped(pid):
            for target in ("frozen", f"qmp:{path}"):
                refused(target, MonitorBusyError, "or QEMU's main loop is stuck")
        # Our visits are still in its queue of clients.
        until(lambda: answers(path), "QEMU goes on")


def test_a_qemu_without_a_monitor(path: Path) -> None:
    monitor = ("-monitor", f"unix:{path},server=on,wait=off")
    with small_qemu("-name", "mute", *monitor, ready=path):
        refused("mute", MonitorError, "has no QMP monitor")


def test_a_qemu_whose_socket_was_deleted(path: Path) -> None:
    with small_qemu("-name", "lost", *qmp(path), ready=path):
        path.unlink()
        refused("lost", MonitorGoneError, "no such socket")


# So that `nobody` gets at the Python of these tests, wherever it is. CAP_SYS_PTRACE is not given.
AS_NOBODY = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("socket_mode", [0o600, 0o666])
@pytest.mark.parametrize("command", [("show",), ("eventfd",), ("kick", "blk0", "-q", "0")])
def test_somebody_without_the_privilege(socket_mode: int, command: tuple[str, ...]) -> None:
    """Once the socket refuses; once only the memory of the process does."""
    with boot_without_guest(MachineSpec(devices=(VirtioBlk(id="blk0"),))) as machine:
        with Qtest(machine) as qtest:
            qtest.device("blk0").set_up()
        machine.qmp_path.chmod(socket_mode)
        began = time.monotonic()
        verb, *arguments = command
        tried = subprocess.run(
            [*AS_NOBODY, sys.executable, "-m", "kickcall", verb, machine.name, *arguments],
            capture_output=True,
            text=True,
        )
        assert time.monotonic() - began < within(LIMIT_S)
        assert (tried.returncode, tried.stdout) == (3, "")
        assert tried.stderr.startswith("kickcall: ")
        assert "not permitted" in tried.stderr
        assert "run as root" in tried.stderr
        assert tried.stderr.count("\n") == 1
        assert machine.qmp("query-status")["status"] == "running"
