"""Does a machine run again, with no stub left open, whatever is killed while it is written to?

No guest is needed for that: the register that is written here is a word of RAM.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.errors import (
    KickcallError,
    QueueNotReadyError,
    StaleMapError,
    StubBusyError,
    StubError,
)
from kickcall.lab.qtest import Qtest, boot_without_guest
from kickcall.lab.spec import MachineSpec, VirtioBlk
from kickcall.vmm.gdbstub import Stub
from kickcall.vmm.pause import Check, RegisterWrite, write_paused
from kickcall.vmm.stub_guard import FOLDER
from witness import until, within
from zoo import QEMUS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.lab.machine import LabMachine
    from kickcall.vmm.session import VmmSession

pytestmark = pytest.mark.rig

CLOSED_S = 8.0
"""A writer is given 5 s for a step while the machine runs (stub_guard._STEP_MAX_S), and then it is
made good."""
KILLS = int(os.environ.get("KICKCALL_KILLS", "4"))
"""How many injections are killed for each choice of processes. A long run takes 200."""
AT = 0x200000
WRITE = RegisterWrite(AT, b"\x2a\x00\x00\x00")


@pytest.fixture(scope="module", params=QEMUS)
def machine(request: pytest.FixtureRequest) -> Iterator[LabMachine]:
    spec = MachineSpec(qemu=request.param, devices=(VirtioBlk(id="blk0"),))
    with boot_without_guest(spec) as booted:
        yield booted


@pytest.fixture
def session(machine: LabMachine) -> Iterator[VmmSession]:
    with attach(machine.name) as attached:
        yield attached._session


@pytest.fixture
def qtest(machine: LabMachine) -> Iterator[Qtest]:
    with Qtest(machine) as connected:
        connected.write(AT, b"\x00\x00\x00\x00")
        yield connected


def stub_of(machine: LabMachine) -> str | None:
    """Return where the machine's gdb stub listens, if it has one."""
    devices = {one["label"]: one["filename"] for one in machine.qmp("query-chardev")}
    return devices.get("gdb")


def is_running(machine: LabMachine) -> bool:
    return bool(machine.qmp("query-status")["running"])


def hmp(machine: LabMachine, line: str) -> str:
    return str(machine.qmp("human-monitor-command", {"command-line": line}))


def is_as_before(machine: LabMachine) -> bool:
    return is_running(machine) and stub_of(machine) is None


def folders(machine: LabMachine, kickcall: int | None = None) -> list[Path]:
    """Return the stub's folders of one kickcall. Other tests' lie beside them."""
    pid = os.getpid() if kickcall is None else kickcall
    return list(Path(f"/proc/{machine.pid}/root/tmp").glob(f"{FOLDER}{pid}-*"))


LATE = "cut short|did not answer|does not answer|no answer: another client"
"""What is said where QEMU got no processor in the 0.4 s that a pause may last at the most."""


def write(session: VmmSession, what: RegisterWrite = WRITE, tries: int = 5) -> float:
    """Write; anew where QEMU was late."""
    try:
        return write_paused(session, what)
    except KickcallError as exc:
        if tries == 1 or not re.search(LATE, str(exc)):
            raise
    return write(session, what, tries - 1)


# What it does


def test_a_register_is_written_and_the_machine_runs_on(
    machine: LabMachine, session: VmmSession, qtest: Qtest
) -> None:
    paused_ms = [write(session) for _ in range(5)]
    assert qtest.read(AT, 4) == WRITE.data
    assert is_as_before(machine)
    assert folders(machine) == []
    assert 0 < statistics.median(paused_ms) < 400


def test_nothing_is_written_where_something_else_stands_than_expected(
    machine: LabMachine, session: VmmSession, qtest: Qtest
) -> None:
    qtest.write(AT + 16, b"\x01\x02\x03\x04")
    right = Check(AT + 16, 0xFFFF, 0x0201)
    wrong = Check(AT + 16, 0xFFFFFFFF, 0x04030200)
    with pytest.raises(StaleMapError, match="what stands at 0x200010 changed; nothing was written"):
        write(session, RegisterWrite(AT, WRITE.data, (right, wrong)))
    assert qtest.read(AT, 4) == bytes(4)
    assert is_as_before(machine)
    write(session, RegisterWrite(AT, WRITE.data, (right,)))
    assert qtest.read(AT, 4) == WRITE.data


def test_nothing_is_written_where_the_device_has_other_registers(
    machine: LabMachine, session: VmmSession, qtest: Qtest
) -> None:
    moved = RegisterWrite(AT, WRITE.data, (), {"qdev_id": "blk0", "regions": []})
    with pytest.raises(StaleMapError, match="registers were moved"):
        write(session, moved)
    assert qtest.read(AT, 4) == bytes(4)
    assert is_as_before(machine)


# What it leaves alone


def test_an_open_stub_is_refused_and_left_open(
    machine: LabMachine, session: VmmSession, tmp_path: Path
) -> None:
    hmp(machine, "gdbserver tcp:127.0.0.1:0")
    try:
        theirs = stub_of(machine)
        with pytest.raises(StubBusyError, match="its gdb stub is in use"):
            write_paused(session, WRITE)
        assert stub_of(machine) == theirs
        assert is_running(machine)
    finally:
        hmp(machine, "gdbserver none")


def test_a_debugger_that_is_connected_keeps_its_machine_paused(
    machine: LabMachine, session: VmmSession
) -> None:
    path = f"/tmp/debugger-{os.getpid()}"
    hmp(machine, f"gdbserver unix:{path},server=on,wait=off")
    try:
        with Stub(f"/proc/{machine.pid}/root{path}", 5.0) as debugger:
            assert debugger.ask(b"qSupported")
            assert not is_running(machine)
            with pytest.raises((StubBusyError, QueueNotReadyError)):
                write_paused(session, WRITE)
            assert not is_running(machine)
            debugger.detach()
    finally:
        hmp(machine, "gdbserver none")
    assert is_as_before(machine)


def test_a_paused_machine_stays_paused_and_is_not_written_to(
    machine: LabMachine, session: VmmSession, qtest: Qtest
) -> None:
    machine.qmp("stop")
    try:
        with pytest.raises(QueueNotReadyError, match=r"not running \(QEMU: paused\)"):
            write_paused(session, WRITE)
        assert not is_running(machine)
        assert stub_of(machine) is None
    finally:
        machine.qmp("cont")
    assert qtest.read(AT, 4) == bytes(4)


# Killed


def guard_processes() -> dict[int, int]:
    """Return the parent of each process that runs the guard's program, by pid."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if b"kickcall.vmm.stub_guard" in (entry / "cmdline").read_bytes():
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                if stat[0] != "Z":
                    found[int(entry.name)] = int(stat[1])
        except OSError:
            continue
    return found


def processes_of(kickcall: int) -> dict[str, int]:
    """Return the processes of one injection that are there now."""
    found = {"kickcall": kickcall}
    all_of_them = guard_processes()
    for pid, parent in all_of_them.items():
        if parent == kickcall:
            found["guard"] = pid
            for child, its_parent in all_of_them.items():
                if its_parent == pid:
                    found["writer"] = child
    return found


def forked(session: VmmSession) -> int:
    """Inject from another process, and return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            write_paused(session, WRITE)
        finally:
            os._exit(0)
    return pid


def signalled(
    machine: LabMachine, session: VmmSession, whom: tuple[str, ...], number: int, after_s: float
) -> float:
    """Signal processes of an injection `after_s` seconds after its start.

    Return how long it took until the machine ran and no stub was open.
    """
    pid = forked(session)
    ours: set[int] = set()
    try:
        time.sleep(after_s)
        found = processes_of(pid)
        ours = set(found.values()) - {pid}
        for name in whom:
            if name in found:
                with contextlib.suppress(ProcessLookupError):  # it was done just now
                    os.kill(found[name], number)
        began = time.monotonic()
        until(lambda: is_running(machine), "the machine runs", within(2.0))
        # Of a writer that hangs while the machine runs nobody is in a hurry to close the stub.
        until(lambda: is_as_before(machine), "it has no stub", within(CLOSED_S))
        took = time.monotonic() - began
    finally:
        if number == signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
            for one in set(guard_processes()) & ours:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGCONT)
        if whom[0] == "kickcall" and number == signal.SIGKILL:
            os.waitpid(pid, 0)
        else:
            until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid, "kickcall ends", within(15.0))
    until(lambda: not set(guard_processes()) & ours, "the guard ends", within(15.0))
    # A guard that had hardly begun when we looked is not among them.
    assert_nothing_is_left(machine, pid)
    return took


def assert_nothing_is_left(machine: LabMachine, kickcall: int) -> None:
    """Of an injection the folder goes last."""
    until(lambda: not folders(machine, kickcall), "the stub's folder goes", within(15.0))
    assert is_as_before(machine)


def time_of_one(session: VmmSession) -> float:
    began = time.monotonic()
    os.waitpid(forked(session), 0)
    return time.monotonic() - began


@pytest.mark.parametrize(
    "whom",
    [("kickcall",), ("guard",), ("writer",), ("kickcall", "writer"), ("guard", "writer")],
    ids="+".join,
)
def test_whoever_is_killed_at_whatever_instant_the_machine_runs_within_a_second(
    machine: LabMachine, session: VmmSession, whom: tuple[str, ...]
) -> None:
    whole = time_of_one(session)
    chance = random.Random(5)
    took = [
        signalled(machine, session, whom, signal.SIGKILL, chance.uniform(0, whole))
        for _ in range(KILLS)
    ]
    assert max(took) < within(1.0), took


@pytest.mark.parametrize("whom", ["kickcall", "guard", "writer"])
def test_a_process_that_hangs_keeps_no_machine_paused(
    machine: LabMachine, session: VmmSession, whom: str
) -> None:
    whole = time_of_one(session)
    chance = random.Random(6)
    for _ in range(max(KILLS // 4, 1)):
        # A writer that hangs before it paused anything is given longer: the machine runs anyway.
        signalled(machine, session, (whom,), signal.SIGSTOP, chance.uniform(0, whole))


def test_a_killed_server_of_the_monitor_keeps_no_machine_paused(
    machine: LabMachine, tmp_path: Path
) -> None:
    chance, whole = random.Random(7), 0.1
    for number in range(KILLS):
        command = [sys.executable, "-m", "kickcall", "qmp", machine.name]
        command += ["--listen", str(tmp_path / f"served{number}")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert "listening" in server.stdout.readline()
            with attach(machine.name) as attached:
                if number == 0:
                    whole = time_of_one(attached._session)
                pid = forked(attached._session)
                time.sleep(chance.uniform(0, whole))
                server.kill()
                until(lambda: is_as_before(machine), "the machine runs, with no stub", within(5.0))
                os.waitpid(pid, 0)
        assert_nothing_is_left(machine, pid)


def test_what_was_cut_short_is_told(machine: LabMachine, session: VmmSession) -> None:
    """Kill the writer while the machine is paused: kickcall says that nobody knows."""
    pid = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            while True:
                writer = processes_of(pid).get("writer")
                if writer is not None and not is_running(machine):
                    with contextlib.suppress(ProcessLookupError):
                        # It may come too late, when all is written: then the next one.
                        os.kill(writer, signal.SIGKILL)
        finally:
            os._exit(1)  # never into the other tests
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                write_paused(session, WRITE)
            except KickcallError as exc:
                if isinstance(exc, StubError) and "killed" in str(exc):
                    break
                assert re.search(LATE, str(exc)), exc
        else:
            pytest.fail("the machine was never seen paused")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert is_as_before(machine)
