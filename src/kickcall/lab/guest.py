"""How does the host run a command in a lab guest, even while another command hangs?

The channel is a serial port of the guest (the agent) behind a unix socket of QEMU (this file).
Requests and replies are lines:

    ping ID - .               = ID pong BOOT-ID
    start ID -BASE64 .        = ID started -
    poll ID - .               = ID running -    = ID done STATUS zBASE64    = ID unknown -
    kill ID - .               = ID killed -
    drop ID - .               (no reply)

What a command printed comes compressed. Every request may be sent twice: the agent starts an id
only once, so a request that was lost while the guest booted is simply repeated. QEMU serves one
client of the socket at a time, so each exchange connects, asks and leaves, under a lock that all
host processes share.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import gzip
import secrets
import select
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

from kickcall.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_REPEAT_AFTER = 1.0
"""Seconds without a reply before a request is sent again."""
_ANSWER_WITHIN = 30.0
"""Seconds in which a guest answers that is up: under TCG in a KVM host that TCG runs, it takes a
thousand times what it takes under KVM."""


class CommandResult(NamedTuple):
    """What a command in the guest left: its exit status, and what it printed, errors included."""

    status: int
    output: str


def find_reply(received: bytes, request_id: str) -> list[str] | None:
    """Return the words after the id of the reply to `request_id`, or None if it is not there."""
    for line in received.split(b"\n")[:-1]:
        words = line.decode(errors="replace").split()
        if words[:2] == ["=", request_id]:
            return words[2:]
    return None


class Command:
    """A command that was started in the guest."""

    def __init__(self, guest: Guest, command: str, request_id: str) -> None:
        self._guest = guest
        self._result: CommandResult | None = None
        self.command = command
        self.id = request_id

    @property
    def done(self) -> bool:
        """Whether the command has ended. Asks the guest."""
        return self.result() is not None

    def result(self) -> CommandResult | None:
        """Return the result, or None while the command runs."""
        if self._result is None:
            match self._guest.exchange("poll", self.id):
                case ["done", status, output]:
                    text = base64.b64decode(output[1:])
                    # A machine that was booted before this version answers with `-`.
                    text = gzip.decompress(text) if output[0] == "z" else text
                    self._result = CommandResult(int(status), text.decode(errors="replace"))
                    self._guest.forget(self.id)
                case ["unknown", *_]:
                    raise LabError(f"the guest rebooted while it ran: {self.command}")
        return self._result

    def wait(self, timeout: float = 60.0) -> CommandResult:
        """Return the result. Raises LabError after `timeout` seconds; the command goes on."""
        deadline = time.monotonic() + timeout
        pause = 0.005
        while (result := self.result()) is None:
            if time.monotonic() > deadline:
                raise LabError(f"still running in the guest after {timeout:g} s: {self.command}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.1)
        return result

    def kill(self) -> None:
        """Kill the command and its children. (A process that waits for a disk stays until then.)"""
        self._guest.exchange("kill", self.id)


def reboot_command(boot_id: str) -> str:
    """Return the shell command that reboots the guest out of that boot, and out of no later one.

    A guest may be gone before it says that it will be, and is then told again.
    """
    return f"grep -q {boot_id} /proc/sys/kernel/random/boot_id && reboot -f"


class Guest:
    """A guest's agent. Safe to use from several threads and processes at once."""

    def __init__(self, channel: Path, lock: Path) -> None:
        self._channel = channel
        self._lock = lock
        self._forgotten: list[str] = []

    def run(self, command: str, *, timeout: float = 60.0) -> CommandResult:
        """Run a shell command in the guest and return (status, output).

        Raises LabError if it takes longer than `timeout` seconds.
        """
        return self.start(command).wait(timeout)

    def start(self, command: str) -> Command:
        """Start a shell command in the guest and return at once."""
        started = Command(self, command, secrets.token_hex(6))
        self.exchange("start", started.id, base64.b64encode(command.encode()).decode())
        return started

    def boot_id(self, timeout: float = _ANSWER_WITHIN) -> str:
        """Return the kernel's random id of this boot."""
        return self.exchange("ping", secrets.token_hex(6), timeout=timeout)[1]

    def reboot(self, timeout: float = 60.0) -> None:
        """Reboot the guest and return when it is up again."""
        before = self.boot_id()
        self.start(reboot_command(before))
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with contextlib.suppress(LabError):
                if self.boot_id(timeout=2.0) != before:
                    return
        raise LabError(f"the guest did not come up within {timeout:g} s of a reboot")

    def forget(self, request_id: str) -> None:
        """Let the guest delete a command's output with the next request."""
        self._forgotten.append(request_id)

    def exchange(
        self, verb: str, request_id: str, body: str = "", timeout: float = _ANSWER_WITHIN
    ) -> list[str]:
        """Send one request and return its reply. Raises LabError if the agent stays silent."""
        forgotten, self._forgotten = self._forgotten, []
        drops = "".join(f"drop {old} - .\n" for old in forgotten)
        # The first newline ends what a sender that died may have left half sent.
        request = f"\n{drops}{verb} {request_id} -{body} .\n".encode()
        deadline = time.monotonic() + timeout
        with self._connected(deadline) as channel:
            received = b""
            while (left := deadline - time.monotonic()) > 0:
                channel.sendall(request)
                repeat = time.monotonic() + min(left, _REPEAT_AFTER)
                while (left := repeat - time.monotonic()) > 0:
                    if not select.select([channel], [], [], left)[0]:
                        break
                    data = channel.recv(1 << 16)
                    if not data:
                        raise LabError("the lab machine ended while its guest was asked")
                    # A long reply takes the serial port its time: only silence is repeated to.
                    repeat = time.monotonic() + min(deadline - time.monotonic(), _REPEAT_AFTER)
                    received += data
                    reply = find_reply(received, request_id) if b"\n" in data else None
                    if reply is not None:
                        return reply
        raise LabError(
            f"the guest's agent did not answer within {timeout:g} s: the machine is paused, "
            "or its guest is stuck (see console.log in the machine's folder)"
        )

    @contextlib.contextmanager
    def _connected(self, deadline: float) -> Iterator[socket.socket]:
        with self._lock.open("a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise LabError("somebody else keeps the guest's channel busy") from None
                    time.sleep(0.002)
            with socket.socket(socket.AF_UNIX) as channel:
                channel.settimeout(max(deadline - time.monotonic(), 0.1))
                try:
                    channel.connect(str(self._channel))
                except OSError as error:
                    raise LabError(
                        f"the guest's channel {self._channel} cannot be opened: {error.strerror}"
                    ) from error
                yield channel
