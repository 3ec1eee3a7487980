"""Does the guard take for an answer only what answers its own question, and only in time?"""

from __future__ import annotations

import json
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from kickcall.errors import MonitorBusyError, MonitorError, MonitorGoneError, QmpCommandError
from kickcall.vmm.guard_monitor import GuardMonitor, open_first

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
STRAY = b'{"return": [{"label": "of somebody else"}], "id": "of another client"}\r\n'
EVENT = b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}\r\n'


class Played:
    """A monitor that says fixed things around its answers."""

    def __init__(self, path: Path, greeting: bytes, before: bytes = b"") -> None:
        self.path = str(path)
        self._greeting, self._before = greeting, before
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        sock, _ = self._listener.accept()
        with sock, sock.makefile("rb") as lines:
            sock.sendall(self._greeting)
            for line in lines:
                asked = json.loads(line)
                answer: dict[str, Any] = {"return": asked["execute"], "id": asked["id"]}
                if asked["execute"] == "bad":
                    answer = {"error": {"class": "GenericError", "desc": "no"}, "id": asked["id"]}
                if asked["execute"] != "silence":
                    sock.sendall(self._before + json.dumps(answer).encode() + b"\r\n")

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def play(tmp_path: Path) -> Iterator[type[Played]]:
    made: list[Played] = []

    class Made(Played):
        def __init__(self, greeting: bytes = GREETING, before: bytes = b"") -> None:
            super().__init__(tmp_path / f"monitor{len(made)}", greeting, before)
            made.append(self)

    yield Made
    for one in made:
        one.close()


def test_the_answer_to_a_dead_clients_command_is_nobodys(play: Any) -> None:
    # QEMU 7.2 gives it to the next client: seen 3 times in 300.
    played = play(STRAY + GREETING + STRAY, STRAY)
    with GuardMonitor(played.path, 5.0) as monitor:
        assert monitor.execute("query-status") == "query-status"


def test_events_are_kept_and_are_no_answers(play: Any) -> None:
    with GuardMonitor(play(before=EVENT).path, 5.0) as monitor:
        assert monitor.execute("query-status") == "query-status"
        assert {event["event"] for event in monitor.events} == {"STOP"}


def test_a_pretty_monitor_is_understood(play: Any) -> None:
    pretty = json.dumps(json.loads(GREETING), indent=4).replace("\n", "\r\n").encode() + b"\r\n"
    with GuardMonitor(play(pretty).path, 5.0) as monitor:
        assert monitor.execute("query-status") == "query-status"


def test_a_refusal_is_an_error(play: Any) -> None:
    with GuardMonitor(play().path, 5.0) as monitor, pytest.raises(QmpCommandError, match="no"):
        monitor.execute("bad")


def test_silence_is_an_error_in_time(play: Any) -> None:
    with GuardMonitor(play().path, 20.0) as monitor:
        monitor.extend(0.3)
        with pytest.raises(MonitorBusyError):
            monitor.execute("silence")
    with pytest.raises(MonitorBusyError):
        GuardMonitor(play(b"").path, 0.1)


def test_what_speaks_no_qmp_is_an_error(play: Any) -> None:
    with pytest.raises(MonitorError, match="no QMP"):
        GuardMonitor(play(b'{"hello": 1}\r\n').path, 20.0)


def test_the_first_monitor_that_is_there_is_taken(play: Any, tmp_path: Path) -> None:
    played = play()
    with open_first([str(tmp_path / "gone"), played.path], 20.0) as monitor:
        assert monitor.path == played.path
    with pytest.raises(MonitorGoneError, match="gone: nobody listens"):
        open_first([str(tmp_path / "gone")], 1.0)
