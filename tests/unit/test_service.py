"""What do the service manager and systemd's journal hear? From sockets of the test's own."""

from __future__ import annotations

import os
import re
import socket
import struct
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from kickcall.model import Counters, DeviceEvent, Injection, Machine, Via
from kickcall.watch import journald, service
from kickcall.watch.happenings import Happening, What
from kickcall.watch.journald import Journald
from kickcall.watch.service import ServiceManager
from kickcall.watch.witness import JournalWitness

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.settimeout(5)
        yield listening


def heard(listener: socket.socket) -> list[bytes]:
    listener.setblocking(False)
    said = []
    while True:
        try:
            said.append(listener.recv(1 << 16))
        except BlockingIOError:
            return said


# --- the service manager ---


@pytest.fixture
def manager(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> ServiceManager:
    monkeypatch.setenv("NOTIFY_SOCKET", listener.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    return ServiceManager()


def test_the_first_pulse_says_ready_and_each_says_alive_but_not_too_often(
    manager: ServiceManager, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(service, "time", SimpleNamespace(monotonic=lambda: now))
    for _ in range(100):
        manager.pulse()
    assert heard(listener) == [b"READY=1", b"WATCHDOG=1"]
    now += 0.15  # a third of the time until the manager would lose patience, and a little more
    manager.pulse()
    assert heard(listener) == [b"WATCHDOG=1"]


def test_a_reload_is_said_with_its_time_and_its_end(
    manager: ServiceManager, listener: socket.socket
) -> None:
    manager.pulse()
    heard(listener)
    before = time.monotonic_ns() // 1000
    manager.reloading()
    manager.pulse()
    said = heard(listener)
    reloading = re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=(\d+)", said[0])
    assert reloading is not None
    assert before <= int(reloading[1]) <= time.monotonic_ns() // 1000
    assert said[1] == b"READY=1"


def test_an_abstract_socket_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        name = f"kickcall-test-{os.getpid()}"
        listening.bind("\0" + name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        manager = ServiceManager()
        manager.stopping()
        manager.status("two\nlines")
        assert heard(listening) == [b"STOPPING=1", b"STATUS=two lines"]


def test_another_process_s_watchdog_is_not_ours(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", listener.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    ServiceManager().pulse()
    assert heard(listener) == [b"READY=1"]


@pytest.mark.parametrize("name", ["", "/no/such/socket", "relative", "@nobody-listens"])
def test_without_a_manager_nothing_is_said_and_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    manager = ServiceManager()
    manager.pulse()
    manager.stopping()


def test_a_manager_that_does_not_listen_stops_nobody(
    manager: ServiceManager, listener: socket.socket
) -> None:
    started = time.monotonic()
    for _ in range(10_000):
        manager.status("x" * 1000)
    assert time.monotonic() - started < 5


# --- systemd's journal ---


def fields(entry: bytes) -> dict[str, str]:
    """Return an entry's fields as the journal reads them (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""
    found: dict[str, str] = {}
    while entry:
        line, _, entry = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack_from("<Q", entry)
            value, entry = entry[8 : 8 + size], entry[8 + size + 1 :]
        assert re.fullmatch(rb"[A-Z][A-Z0-9_]{0,63}", name), name
        found[name.decode()] = value.decode()
    return found


STALL = Happening(
    What.STALL,
    "lost-kick on hop 3",
    "vm0",
    4711,
    "/machine/peripheral/blk0",
    2,
    {"verdict": "lost-kick", "hop": 3, "since_s": 0.5},
)


def test_what_happened_is_an_entry_with_its_fields(listener: socket.socket) -> None:
    journal = Journald(listener.getsockname())
    journal.tell(STALL)
    (entry,) = heard(listener)
    said = fields(entry)
    assert said.pop("MESSAGE") == "vm0 blk0 queue 2: stall: lost-kick on hop 3"
    assert re.fullmatch("[0-9a-f]{32}", said.pop("MESSAGE_ID"))
    assert said == {
        "SYSLOG_IDENTIFIER": "kickcall",
        "PRIORITY": "4",
        "KICKCALL_WHAT": "stall",
        "KICKCALL_MACHINE": "vm0",
        "KICKCALL_MACHINE_PID": "4711",
        "KICKCALL_DEVICE": "/machine/peripheral/blk0",
        "KICKCALL_QUEUE": "2",
        "KICKCALL_VERDICT": "lost-kick",
        "KICKCALL_HOP": "3",
        "KICKCALL_SINCE_S": "0.5",
    }


@pytest.mark.parametrize("name", ["vm0\nPRIORITY=0", "\udcff", "x" * 100_000, "a=b\n\n", "\0"])
def test_a_hostile_name_is_a_value_and_no_field(listener: socket.socket, name: str) -> None:
    journal = Journald(listener.getsockname())
    journal.tell(Happening(What.ALERT, name, name))
    (entry,) = heard(listener)
    said = fields(entry)
    assert set(said) == {
        "SYSLOG_IDENTIFIER", "MESSAGE_ID", "MESSAGE", "PRIORITY", "KICKCALL_WHAT",
        "KICKCALL_MACHINE",
    }  # fmt: skip
    assert said["PRIORITY"] == "4"
    assert len(said["KICKCALL_MACHINE"]) <= 4096


def test_a_journal_that_is_not_there_or_does_not_keep_up_stops_nobody(
    listener: socket.socket, tmp_path: Path
) -> None:
    gone = Journald(str(tmp_path / "none"))
    gone.tell(STALL)
    assert gone.lost == 1
    full = Journald(listener.getsockname())
    started = time.monotonic()
    for _ in range(10_000):
        full.tell(STALL)
    assert time.monotonic() - started < 10
    assert full.lost > 0


def test_output_that_goes_to_the_journal_is_known_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status = os.fstat(1)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    assert journald.is_our_output()
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
    assert not journald.is_our_output()
    monkeypatch.delenv("JOURNAL_STREAM")
    assert not journald.is_our_output()


def test_an_injection_by_hand_is_an_entry_too(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journald, "SOCKET", listener.getsockname())
    machine = Machine(pid=1, start_time=1, name="vm0", version="", monitors=(), command=())
    counters = Counters(0, 1, 1)
    planned = Injection(
        "vm0", "/machine/peripheral/blk0", 1, DeviceEvent.KICK, Via.EVENTFD, 7, counters, counters
    )
    witness = JournalWitness("kickcall kick", lambda _: None, path=tmp_path / "journal.db")
    witness.before(machine, planned)
    witness.written(planned)
    witness.close()
    (entry,) = heard(listener)
    said = fields(entry)
    assert said["KICKCALL_WHAT"] == "injected"
    assert said["KICKCALL_COMMAND"] == "kickcall kick"
    assert (said["KICKCALL_MACHINE"], said["KICKCALL_QUEUE"]) == ("vm0", "1")
    assert (said["KICKCALL_EVENT"], said["KICKCALL_INJECTION"]) == ("kick", "1")
