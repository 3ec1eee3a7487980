"""How does the service manager learn that the watcher is ready, and that it still lives?

sd_notify(3): one datagram to the socket that `NOTIFY_SOCKET` names. Elsewhere nothing is said.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time


class ServiceManager:
    """Whoever started this process, if it wants to be told."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        name = os.environ.get("NOTIFY_SOCKET", "")
        if name[:1] in ("/", "@"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
            # An abstract name starts with a null byte.
            self._address = "\0" + name[1:] if name[0] == "@" else name
        self._ready = False
        self._pulse_s = _watchdog_s() / 3
        self._pulse_at = 0.0

    def pulse(self) -> None:
        """Say, some times a second, that the watcher goes on: at first that it is ready."""
        if self._socket is None:
            return
        if not self._ready:
            self._ready = True
            self._say("READY=1")
        now = time.monotonic()
        if self._pulse_s and now >= self._pulse_at:
            self._pulse_at = now + self._pulse_s
            self._say("WATCHDOG=1")

    def reloading(self) -> None:
        """Say that the configuration is being read again; `pulse` says that this is done."""
        self._ready = False
        self._say(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Say that the watcher ends."""
        self._say("STOPPING=1")

    def status(self, text: str) -> None:
        """Say in one line what is going on."""
        self._say("STATUS=" + text.replace("\n", " "))

    def _say(self, what: str) -> None:
        if self._socket is not None:
            # A manager that does not listen is no reason to stop watching.
            with contextlib.suppress(OSError):
                self._socket.sendto(what.encode(errors="replace"), self._address)


def _watchdog_s() -> float:
    """Return after how many seconds of silence the manager ends this process; 0: never."""
    microseconds, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or (pid and pid != str(os.getpid())):
        return 0.0
    return int(microseconds) / 1e6
