"""How does the guard process ask a QMP monitor? With the standard library, and every wait bounded.

The rest of kickcall uses qemu-qmp, whose import alone takes longer than a whole injection here.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any, Final, Self

from kickcall.errors import MonitorBusyError, MonitorError, MonitorGoneError, QmpCommandError

if TYPE_CHECKING:
    from collections.abc import Sequence

_MESSAGE_MAX: Final = 16 << 20


class GuardMonitor:
    """One conversation with the monitor at `path`; all of it takes at most `timeout` seconds."""

    def __init__(self, path: str, timeout: float) -> None:
        self.path = path
        self._deadline = time.monotonic() + timeout
        self._buffer = b""
        self._decoder = json.JSONDecoder()
        self._asked = 0
        self._name = os.urandom(6).hex()
        self.events: list[dict[str, Any]] = []
        """What QEMU told unasked while it was asked."""
        self._sock = _connect(path, timeout)
        try:
            while "QMP" not in (said := self._receive()):
                if not said.keys() & {"return", "error", "event"}:
                    raise MonitorError(f"{path}: what answers there speaks no QMP")
            self.execute("qmp_capabilities")
        except BaseException:
            self._sock.close()
            raise

    def extend(self, timeout: float) -> None:
        """Give the conversation `timeout` seconds from now."""
        self._deadline = time.monotonic() + timeout

    def execute(self, command: str, **arguments: object) -> Any:
        """Return what QEMU returns. Raises QmpCommandError, or MonitorGoneError and its kin.

        Where the last client was killed while QEMU was at work on its command, QEMU gives the
        answer to the next client (7.2): only what bears this question's own id is its answer.
        """
        self._asked += 1
        identity = f"{self._name}-{self._asked}"
        try:
            self._sock.settimeout(self._left())
            message = {"execute": command, "arguments": arguments, "id": identity}
            self._sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError as exc:
            raise MonitorGoneError(f"{self.path}: the monitor went away: {exc}") from exc
        while True:
            said = self._receive()
            if "event" in said:
                self.events.append(said)
            elif said.get("id") != identity:
                continue
            elif "return" in said:
                return said["return"]
            elif "error" in said:
                raise QmpCommandError(
                    f"QEMU refused {command}: {said['error']['desc']}", said["error"]["class"]
                )

    def hmp(self, line: str) -> str:
        """Return what the human monitor prints for `line`."""
        return str(self.execute("human-monitor-command", **{"command-line": line}))

    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.001)

    def _receive(self) -> dict[str, Any]:
        """Return the next message: of one line, or of several where the monitor is `pretty`."""
        while True:
            text = self._buffer.lstrip()
            if text.endswith((b"}", b"}\n", b"}\r\n")) or b"}\r\n" in text:
                with contextlib.suppress(ValueError):
                    decoded = text.decode(errors="replace")
                    message, end = self._decoder.raw_decode(decoded)
                    self._buffer = decoded[end:].encode()
                    if isinstance(message, dict):
                        return message
                    raise MonitorError(f"{self.path}: what answers there speaks no QMP")
            if len(text) > _MESSAGE_MAX:
                raise MonitorError(f"{self.path}: an answer without an end")
            try:
                self._sock.settimeout(self._left())
                data = self._sock.recv(65536)
            except TimeoutError as exc:
                raise MonitorBusyError(
                    f"{self.path}: no answer: another client holds this monitor (or QEMU's main "
                    "loop is stuck)"
                ) from exc
            except OSError as exc:
                raise MonitorGoneError(f"{self.path}: the monitor went away: {exc}") from exc
            if not data:
                raise MonitorGoneError(f"{self.path}: the monitor hung up")
            self._buffer += data

    def close(self) -> None:
        """Leave the monitor to the next client."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_first(paths: Sequence[str], timeout: float) -> GuardMonitor:
    """Return a conversation with the first of the monitors that answers, after `timeout` at most.

    Raises the first one's MonitorError where none does.
    """
    failure: MonitorError | None = None
    deadline = time.monotonic() + timeout
    for index, path in enumerate(paths):
        share = (deadline - time.monotonic()) / (len(paths) - index)
        try:
            return GuardMonitor(path, max(share, 0.05))
        except MonitorError as exc:
            failure = failure or exc
    raise failure or MonitorError("this QEMU has no QMP monitor")


def _connect(path: str, timeout: float) -> socket.socket:
    folder = -1
    address: str | tuple[str, int] = path
    family = socket.AF_UNIX
    if path.startswith("tcp:"):
        host, _, port = path.removeprefix("tcp:").rpartition(":")
        family, address = (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port))
    elif path.startswith("@"):
        address = "\0" + path[1:]
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if family == socket.AF_UNIX and not path.startswith("@"):
            # By way of its folder: a path may be longer than an address (unix(7)).
            folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_CLOEXEC)
            address = f"/proc/self/fd/{folder}/{os.path.basename(path)}"
        sock.settimeout(timeout)
        sock.connect(address)
    except (BlockingIOError, TimeoutError) as exc:
        sock.close()
        raise MonitorBusyError(f"{path}: another client holds this monitor") from exc
    except OSError as exc:
        sock.close()
        raise MonitorGoneError(f"{path}: nobody listens: {exc}") from exc
    finally:
        if folder >= 0:
            os.close(folder)
    return sock
