"""How do many askers share the machine's one monitor?

QEMU's monitor answers in-band requests in the order in which they came, and runs out-of-band ones
at once. Up to eight in-band requests may wait in QEMU; at the eighth it stops reading, and then
out-of-band requests, too, would wait (QEMU: monitor/qmp.c, QMP_REQ_QUEUE_LEN_MAX). Worse, where
seven wait and one byte ends two more ("1}": a number and a stray brace), QEMU 7.2 and 10.0 abort
on an assertion, VM and all. So at most seven are on their way at any time, and the others queue
here, first come, first served; and what goes up is always a well-formed object.

qemu.qmp's QMPClient is not used: it parses and re-writes messages (replies would not be QEMU's
bytes any more), it gives up on a reply that it cannot route, and it has no way to attach a file
descriptor to one command.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from kickcall.errors import (
    MonitorBusyError,
    MonitorError,
    MonitorGoneError,
    MonitorTimeoutError,
    QmpCommandError,
)
from kickcall.qmp import message
from kickcall.qmp.wire import Connection, close_fds
from kickcall.vmm.find import socket_address

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping, Sequence

MAX_IN_BAND: Final = 7
_READ_SIZE: Final = 256 << 10
_MAX_MESSAGE: Final = 64 << 20
"""Of one message from QEMU; the largest real ones have a few hundred KiB."""


class Lines:
    """Cuts what QEMU sends into messages: a line each, or several where QEMU prints prettily."""

    def __init__(self) -> None:
        self._rest = b""
        self._parts: list[bytes] = []
        self._size = 0
        self._pretty: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """Return the messages that `data` completes, without line ends, each on one line."""
        if b"\n" not in data:
            self._size += len(data)
            if self._size > _MAX_MESSAGE:
                raise MonitorError("QEMU's monitor sent a message of more than 64 MiB: giving up")
            self._parts.append(data)
            return []
        self._parts.append(data)
        *lines, rest = b"".join(self._parts).split(b"\n")
        self._parts = [rest] if rest else []
        self._size = len(rest)
        messages: list[bytes] = []
        for line in lines:
            line = line.rstrip(b"\r")
            if self._pretty or line == b"{":
                # `-mon pretty=on`: a message starts with a line "{" and ends with a line "}".
                self._pretty.append(line)
                if line == b"}":
                    messages.append(msgspec.json.format(b"\n".join(self._pretty), indent=0))
                    self._pretty.clear()
            elif line:
                messages.append(line)
        return messages


@dataclass(slots=True, eq=False)
class Ticket:
    """One request on its way up. `done` is told the answer, or None where none will come."""

    members: Mapping[str, bytes]
    done: Callable[[message.Answer | None], None]
    oob: bool = False
    fds: Sequence[int] = ()
    dropped: bool = field(default=False)
    """Nobody waits any more: not to be sent, if it was not yet."""


@dataclass(frozen=True, slots=True)
class Greeted:
    """A monitor that was connected to and negotiated with."""

    sock: socket.socket
    lines: Lines
    greeting: bytes
    oob: bool
    early: tuple[bytes, ...]
    """Messages that came in already, after the negotiation."""


def greet(path: str, timeout: float = 2.0) -> Greeted:
    """Connect to the monitor at `path` and negotiate all that it offers. Blocks.

    `path` is a Unix socket's, or `@NAME` for an abstract one, or `tcp:HOST:PORT`.

    Raises MonitorGoneError, MonitorBusyError and MonitorError.
    """
    deadline = time.monotonic() + timeout
    sock, tcp = _dial(path)
    try:
        sock.settimeout(timeout)
        try:
            if tcp is not None:
                sock.connect(tcp)
            else:
                with socket_address(path) as address:
                    sock.connect(address)
        except (TimeoutError, BlockingIOError):
            raise MonitorBusyError(_busy(path)) from None
        except OSError as error:
            raise MonitorGoneError(f"cannot connect to the monitor {path}: {error}") from error
        lines = Lines()
        pending: deque[bytes] = deque()

        def receive(late: type[MonitorError], why: str) -> bytes:
            while not pending:
                sock.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    data = sock.recv(_READ_SIZE)
                except OSError as error:
                    if isinstance(error, TimeoutError):
                        raise late(why) from None
                    raise MonitorGoneError(f"the monitor {path} went away: {error}") from error
                if not data:
                    raise MonitorGoneError(f"the monitor {path} went away as we greeted it")
                pending.extend(lines.feed(data))
            return pending.popleft()

        greeting = receive(MonitorBusyError, _busy(path))
        try:
            offered = msgspec.json.decode(greeting, type=_Greeting).QMP.capabilities
        except msgspec.DecodeError:
            raise MonitorError(f"{path} is no QMP monitor: it said {greeting[:80]!r}") from None
        oob = "oob" in offered
        enable = b'{"enable":["oob"]}' if oob else b"{}"
        sock.sendall(b'{"execute":"qmp_capabilities","arguments":%b}\n' % enable)
        reply = receive(
            MonitorTimeoutError,
            f"the monitor {path} greets and does not answer: QEMU's main loop is stuck",
        )
        if not reply.startswith(b'{"return"'):
            raise MonitorError(f"the monitor {path} refused to negotiate: {reply[:200]!r}")
        return Greeted(sock, lines, greeting, oob, tuple(pending))
    except BaseException:
        sock.close()
        raise


def _dial(path: str) -> tuple[socket.socket, tuple[str, int] | None]:
    if path.startswith("tcp:"):
        host, _, port = path.removeprefix("tcp:").rpartition(":")
        if not port.isdecimal():
            raise MonitorGoneError(f"{path}: no port to connect to")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.socket(family, socket.SOCK_STREAM), (host.strip("[]"), int(port))
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), None


class _Offer(msgspec.Struct):
    capabilities: list[str]


class _Greeting(msgspec.Struct):
    QMP: _Offer


def _busy(path: str) -> str:
    return f"somebody else holds the monitor {path}: it gives no greeting (QEMU serves one client)"


class Upstream:
    """The one connection to the machine's monitor, shared."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        greeted: Greeted,
        on_event: Callable[[bytes], None],
        on_end: Callable[[], None],
    ) -> None:
        self._lines = greeted.lines
        self._on_event = on_event
        self._on_end = on_end
        self._loop = loop
        self._number = 0
        self._sent: dict[int, Ticket] = {}
        self._in_band: deque[int] = deque()
        """Numbers of the in-band requests in QEMU's hands, oldest first."""
        self._waiting: deque[Ticket] = deque()
        self.oob = greeted.oob
        self.greeting = greeted.greeting
        # QEMU is trusted to read: a bound here would let clients cut everyone off.
        self._connection = Connection(loop, greeted.sock, self, _READ_SIZE, max_waiting=None)
        for line in greeted.early:
            self._message(line)

    def submit(self, ticket: Ticket) -> None:
        """Send a request, now or when its turn comes."""
        if self._connection.is_closed:
            close_fds(ticket.fds)
            self._loop.call_soon(ticket.done, None)
        elif ticket.oob:
            self._send(ticket)
        elif len(self._in_band) < MAX_IN_BAND:
            self._in_band.append(self._send(ticket))
        else:
            self._waiting.append(ticket)

    def _send(self, ticket: Ticket) -> int:
        self._number += 1
        number = self._number
        self._sent[number] = ticket
        self._connection.write(message.request(ticket.members, number), ticket.fds)
        return number

    async def call(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Execute a command of our own. Raises QmpCommandError and MonitorGoneError."""
        members = {"execute": msgspec.json.encode(command)}
        if arguments is not None:
            members["arguments"] = msgspec.json.encode(arguments)
        future: asyncio.Future[message.Answer | None] = self._loop.create_future()

        def done(answer: message.Answer | None) -> None:
            if not future.done():
                future.set_result(answer)

        ticket = Ticket(members, done)
        self.submit(ticket)
        try:
            answer = await future
        finally:
            ticket.dropped = True
        if answer is None:
            raise MonitorGoneError(f"QEMU's monitor went away while it was asked for {command}")
        if answer.error is not None:
            body = message.error_body(answer.error)
            raise QmpCommandError(f"QEMU refused {command}: {body.desc}", body.class_)
        return msgspec.json.decode(answer.result) if answer.result is not None else {}

    def close(self) -> None:
        """Leave the monitor."""
        self._connection.close()

    # What the connection tells.

    def may_read(self) -> bool:
        return True

    def received(self, data: bytes) -> None:
        try:
            for line in self._lines.feed(data):
                self._message(line)
        except MonitorError:
            self._connection.close()

    def received_fds(self, fds: Sequence[int]) -> None:
        close_fds(fds)  # QEMU sends none

    def ended(self) -> None:
        self._connection.close()

    def drained(self) -> None:
        pass

    def closed(self) -> None:
        for ticket in self._waiting:
            close_fds(ticket.fds)
        left = [*self._sent.values(), *self._waiting]
        self._sent.clear()
        self._in_band.clear()
        self._waiting.clear()
        for ticket in left:
            ticket.done(None)
        self._on_end()

    def _message(self, line: bytes) -> None:
        if line.startswith((b'{"timestamp"', b'{"event"')):
            self._on_event(line)
            return
        try:
            answer = message.answer(line)
        except (msgspec.DecodeError, RecursionError):
            # Nobody can say whose it is but the order; a client that waits is worse off.
            answer = message.Answer(None, None, line, None, None)
        number = answer.number
        if number is None:
            # QEMU took a request for no JSON: it says so without an id, when its turn comes.
            if not self._in_band:
                return
            number = self._in_band[0]
        ticket = self._sent.pop(number, None)
        if ticket is None:
            return
        if not ticket.oob:
            self._in_band.remove(number)
            while self._waiting and len(self._in_band) < MAX_IN_BAND:
                following = self._waiting.popleft()
                if following.dropped:
                    close_fds(following.fds)
                else:
                    self._in_band.append(self._send(following))
        ticket.done(answer)
