"""What does one client of the socket get to see?

The states and texts are QEMU's (QEMU: monitor/qmp.c): a greeting; then errors until
`qmp_capabilities`; then one command at a time in the order given, replies in that order. A client
that enabled `oob` may have eight commands waiting, and `exec-oob` overtakes them.

Limits keep one client from harming others: a turn ends after a few messages, nothing is read while
commands wait or while the client leaves its replies unread, and a client that leaves too many
events unread is dropped.
"""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from kickcall.errors import DeviceNotFoundError
from kickcall.qmp import event_command, listing, message
from kickcall.qmp.stream import BadInput, Message, MessageStream
from kickcall.qmp.upstream import Ticket
from kickcall.qmp.wire import Connection, close_fds

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable, Mapping, Sequence

    from kickcall.qmp.upstream import Upstream

MAX_QUEUED: Final = 8
"""In-band commands of one client that wait, if it enabled oob (QEMU: QMP_REQ_QUEUE_LEN_MAX)."""
MAX_OOB: Final = 8
"""Out-of-band commands of one client under way at once."""
TURN: Final = 32
"""Messages of one client before others get their turn."""
HIGH_WATER: Final = 256 << 10
"""Bytes that a client has left unread when its next command has to wait."""
_READ_SIZE: Final = 16 << 10
"""Lexing the most costly 16 KiB takes about 20 ms: nobody waits longer for a flooding client."""
_TOO_DEEP: Final = "JSON nesting depth limit exceeded"
_CONTROLS: Final = re.compile(r"[\x00-\x1f]+")


class Hub(Protocol):
    """What sessions share."""

    upstream: Upstream
    serves_event: bool
    """False where the machine's QEMU has x-debug-device-event itself."""

    def device_event(
        self,
        request: event_command.EventRequest,
        done: Callable[[Exception | None], None],
    ) -> None:
        """Raise an event; tell `done` the outcome, later."""
        ...

    def left(self, session: Session) -> None:
        """The client is gone."""
        ...


class Session:
    """One client."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, hub: Hub) -> None:
        self._loop = loop
        self._hub = hub
        self._stream = MessageStream()
        self._queue: deque[Message | BadInput] = deque()
        self._busy = False
        self._oob_under_way = 0
        self._turn_is_due = False
        self._has_ended = False
        self._fds: Sequence[int] = ()
        self._tickets: set[Ticket] = set()
        self.negotiated = False
        self._oob = False
        self.connection = Connection(loop, sock, self, _READ_SIZE)
        self._write(hub.upstream.greeting)

    def event(self, line: bytes) -> None:
        """Pass an event on, if the client may see events."""
        if self.negotiated:
            self.connection.write(line)

    def _write(self, line: bytes) -> None:
        self.connection.write(line + b"\r\n")

    # What the connection tells.

    def may_read(self) -> bool:
        return not self._is_full()

    def received(self, data: bytes) -> None:
        self._stream.push(data)
        self._turn()

    def received_fds(self, fds: Sequence[int]) -> None:
        # As QEMU's chardevs do: descriptors that no command has taken give way.
        self._drop_fds()
        self._fds = fds

    def ended(self) -> None:
        # What came before the end is still answered: the client may only have closed its half.
        self._has_ended = True
        self._turn()

    def drained(self) -> None:
        self._turn()

    def closed(self) -> None:
        for ticket in self._tickets:
            ticket.dropped = True
        self._queue.clear()
        self._drop_fds()
        self._hub.left(self)

    def _drop_fds(self) -> None:
        close_fds(self._fds)
        self._fds = ()

    # Turns.

    def _is_full(self) -> bool:
        if self.connection.waiting_bytes > HIGH_WATER or self._oob_under_way >= MAX_OOB:
            return True
        if self._oob:
            return len(self._queue) >= MAX_QUEUED
        return self._busy or bool(self._queue)

    def _turn(self) -> None:
        """Take commands as far as the limits allow."""
        for _ in range(TURN):
            if self.connection.is_closed:
                return
            if self._queue and not self._busy and self.connection.waiting_bytes <= HIGH_WATER:
                self._busy = True
                self._start(self._queue.popleft())
                continue
            if self._is_full():
                return
            item = self._stream.next()
            if item is None:
                self._idle()
                return
            self._accept(item)
        if not self._turn_is_due:
            self._turn_is_due = True
            self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._turn_is_due = False
        self._turn()

    def _idle(self) -> None:
        if not self._has_ended:
            self.connection.resume()
        elif not (self._busy or self._queue or self._oob_under_way):
            self.connection.close_when_written()

    def _accept(self, item: Message | BadInput) -> None:
        if isinstance(item, Message) and item.members is not None:
            members = item.members
            # QEMU tells out-of-band requests by this alone, before it looks at anything else.
            if "exec-oob" in members and "execute" not in members:
                self._out_of_band(members)
                return
        self._queue.append(item)

    def _out_of_band(self, members: Mapping[str, bytes]) -> None:
        if message.id_is_too_deep(members):
            self._write(message.failure(_TOO_DEEP, None))
            return
        if not self._oob:
            self._refuse_oob(members, message.check(members, oob_enabled=False) or "")
            return
        if self._hub.serves_event and message.command_of(members) == listing.COMMAND:
            self._refuse_oob(members, f"The command {listing.COMMAND} does not support OOB")
            return
        self._oob_under_way += 1

        def done(answer: message.Answer | None) -> None:
            self._tickets.discard(ticket)
            self._oob_under_way -= 1
            if answer:
                self._write(answer.line)
                self._turn()

        ticket = Ticket(members, done, oob=True, fds=self._take_fds(members))
        self._tickets.add(ticket)
        self._hub.upstream.submit(ticket)

    def _refuse_oob(self, members: Mapping[str, bytes], description: str) -> None:
        self._oob_under_way += 1

        def refuse(echo: bytes | None) -> None:
            self._oob_under_way -= 1
            self._write(message.failure(description, echo))

        self._echo(members, refuse)

    # One in-band command.

    def _start(self, item: Message | BadInput) -> None:
        if isinstance(item, BadInput):
            self._reply(message.failure(item.description, None))
            return
        members = item.members
        if members is None:
            self._reply(message.failure(message.NOT_AN_OBJECT, None))
            return
        if message.id_is_too_deep(members):
            self._reply(message.failure(_TOO_DEEP, None))
            return
        command = message.command_of(members)
        fault = message.check(members, self._oob)
        if fault:
            # Beyond the negotiation QEMU finds the words itself, unless its own client may do
            # what this one may not.
            if self.negotiated and (self._oob or "exec-oob" not in members):
                self._forward(members, self._pass)
            else:
                self._echo(members, lambda echo: self._reply(message.failure(fault, echo)))
        elif command == "qmp_capabilities":
            self._forward(members, lambda answer: self._negotiate(members, answer))
        elif not self.negotiated:
            refusal = message.EXPECTING_NEGOTIATION
            self._echo(
                members,
                lambda echo: self._reply(message.failure(refusal, echo, "CommandNotFound")),
            )
        elif not self._hub.serves_event:
            self._forward(members, self._pass)
        elif command == listing.COMMAND:
            self._echo(members, lambda echo: self._device_event(members, echo))
        elif command == "human-monitor-command":
            self._hmp(members)
        elif command == "query-commands":
            self._forward(members, lambda answer: self._reply(listing.with_command(answer.line)))
        elif command == "query-qmp-schema":
            self._forward(
                members,
                lambda answer: self._reply(listing.with_schema(answer.line, answer.result)),
            )
        else:
            self._forward(members, self._pass)

    def _forward(
        self, members: Mapping[str, bytes], then: Callable[[message.Answer], None]
    ) -> None:
        def done(answer: message.Answer | None) -> None:
            self._tickets.discard(ticket)
            if answer:
                then(answer)
                self._turn()

        ticket = Ticket(members, done, fds=self._take_fds(members))
        self._tickets.add(ticket)
        self._hub.upstream.submit(ticket)

    def _take_fds(self, members: Mapping[str, bytes]) -> Sequence[int]:
        if not self._fds or message.command_of(members) not in ("getfd", "add-fd"):
            return ()
        fds, self._fds = self._fds, ()
        return fds

    def _echo(self, members: Mapping[str, bytes], then: Callable[[bytes | None], None]) -> None:
        """Call `then` with the client's id as QEMU would write it, asking QEMU if need be."""
        try:
            echo = message.plain_echo(members)
        except LookupError:
            self._forward(message.echo_request(members), lambda answer: then(answer.echo))
        else:
            then(echo)

    def _pass(self, answer: message.Answer) -> None:
        self._reply(answer.line)

    def _reply(self, line: bytes) -> None:
        """Answer the in-band command under way; it is over."""
        self._busy = False
        self._write(line)

    def _negotiate(self, members: Mapping[str, bytes], answer: message.Answer) -> None:
        # Our own negotiation is long over, so QEMU refuses this one, but only after it has looked
        # at the arguments: what is wrong with them comes in its own words.
        error = None if answer.error is None else message.error_body(answer.error)
        if self.negotiated or error is None or error.class_ != "CommandNotFound":
            self._reply(answer.line)
            return
        arguments = msgspec.json.decode(members.get("arguments", b"{}"), type=_Capabilities)
        if "oob" in arguments.enable and not self._hub.upstream.oob:
            self._reply(message.failure(message.NO_OOB, answer.echo))
            return
        self._oob = "oob" in arguments.enable
        self.negotiated = True
        self._reply(message.success(b"{}", answer.echo))

    # The command that QEMU does not have.

    def _device_event(self, members: Mapping[str, bytes], echo: bytes | None) -> None:
        try:
            request = event_command.from_qmp(members.get("arguments", b"{}"))
        except event_command.BadArgumentsError as fault:
            self._reply(message.failure(str(fault), echo))
            return

        def done(error: Exception | None) -> None:
            if error is None:
                self._reply(message.success(b"{}", echo))
            else:
                unknown = isinstance(error, DeviceNotFoundError)
                error_class = "DeviceNotFound" if unknown else "GenericError"
                self._reply(message.failure(_one_line(error), echo, error_class))
            self._turn()

        self._hub.device_event(request, done)

    def _hmp(self, members: Mapping[str, bytes]) -> None:
        try:
            given = msgspec.json.decode(members.get("arguments", b"{}"), type=_HmpArguments)
        except (msgspec.DecodeError, RecursionError):
            self._forward(members, self._pass)
            return
        line = given.command_line
        if event_command.is_help(line):
            printed = msgspec.json.encode(f"{event_command.HELP}\r\n")
            self._echo(members, lambda echo: self._reply(message.success(printed, echo)))
        elif event_command.hmp_name(line) == listing.COMMAND:
            self._echo(members, lambda echo: self._hmp_event(line, echo))
        else:
            self._forward(members, self._pass)

    def _hmp_event(self, line: str, echo: bytes | None) -> None:
        try:
            request = event_command.from_hmp(line)
        except event_command.BadArgumentsError as fault:
            self._reply(message.success(msgspec.json.encode(str(fault)), echo))
            return

        def done(error: Exception | None) -> None:
            # hmp_handle_error prints "Error: " and the message (QEMU: monitor/hmp-cmds.c).
            printed = f"Error: {_one_line(error)}\r\n" if error else ""
            self._reply(message.success(msgspec.json.encode(printed), echo))
            self._turn()

        self._hub.device_event(request, done)


def _one_line(error: Exception) -> str:
    return _CONTROLS.sub(" ", str(error)) or type(error).__name__


class _Capabilities(msgspec.Struct):
    enable: list[str] = []


class _HmpArguments(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    command_line: str
    cpu_index: int | None = None
