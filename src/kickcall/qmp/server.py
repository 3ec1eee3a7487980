"""How does one machine's monitor serve many clients, from start to end?

`serve` holds the monitor, listens, and returns when the machine has ended or a signal came.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import os
import select
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kickcall.errors import KickcallError, MonitorGoneError, MonitorTimeoutError
from kickcall.qmp import listing
from kickcall.qmp.executor import EventExecutor, attach
from kickcall.qmp.listener import ListeningSocket
from kickcall.qmp.session import Session
from kickcall.qmp.upstream import Upstream, greet
from kickcall.vmm import served

if TYPE_CHECKING:
    from collections.abc import Callable

    from kickcall.devices.base import Witness
    from kickcall.qmp.event_command import EventRequest
    from kickcall.qmp.executor import Attached
    from kickcall.qmp.upstream import Greeted
    from kickcall.vmm.monitor import BorrowMonitor

MAX_CLIENTS: Final = 64
"""Beyond these a client connects and gets no greeting until another leaves, as with QEMU."""
_GRACE: Final = 2.0
"""Seconds that clients have to take their last replies, and the VMM has to end."""


_ANSWER_TIMEOUT: Final = 2.0
_SHUTDOWN: Final = b'"event": "SHUTDOWN"'


class Ended(enum.Enum):
    """Why the server ended."""

    SIGNAL = "signal"
    MACHINE = "machine"
    """The VMM process ended."""
    MONITOR = "monitor"
    """The monitor was closed and the VMM process goes on."""


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What the server tells whoever started it."""

    listening: Callable[[str], None] = lambda path: None
    warning: Callable[[str], None] = lambda text: None
    witness: Witness | None = None
    """Is told of every event that is raised, in the thread that raises it."""
    allow_pause: bool = False
    """An event may pause the machine for milliseconds where no other way applies."""


class Server:
    """Clients on one side, the machine's monitor on the other."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: ListeningSocket,
        upstream: Upstream,
        executor: EventExecutor,
    ) -> None:
        self._loop = loop
        self._listener = listener
        self.upstream = upstream
        self._executor = executor
        self.serves_event = True
        self._sessions: set[Session] = set()
        self._accepting = False
        self._dismissing = False
        self._all_left = asyncio.Event()

    def event(self, line: bytes) -> None:
        """Pass an event on to every client that may see events."""
        data = line + b"\r\n"
        for session in tuple(self._sessions):
            session.event(data)

    def device_event(self, request: EventRequest, done: Callable[[Exception | None], None]) -> None:
        """Raise an event; tell `done` the outcome, later."""
        self._executor.submit(request, done)

    def accept(self) -> None:
        """Take clients in."""
        if not (self._accepting or self._dismissing) and len(self._sessions) < MAX_CLIENTS:
            self._accepting = True
            self._loop.add_reader(self._listener.sock.fileno(), self._incoming)

    def _incoming(self) -> None:
        try:
            sock, _ = self._listener.sock.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.refuse()
                self._loop.call_later(1.0, self.accept)
            return
        sock.set_inheritable(False)
        self._sessions.add(Session(self._loop, sock, self))
        if len(self._sessions) >= MAX_CLIENTS:
            self.refuse()

    def refuse(self) -> None:
        """Take no more clients in."""
        if self._accepting:
            self._accepting = False
            self._loop.remove_reader(self._listener.sock.fileno())

    def left(self, session: Session) -> None:
        """A client is gone."""
        self._sessions.discard(session)
        if not self._sessions:
            self._all_left.set()
        self.accept()

    async def dismiss(self) -> None:
        """Stop listening, and close all clients once they have taken what was written to them."""
        self._dismissing = True
        self.refuse()
        self._listener.close()
        for session in tuple(self._sessions):
            session.connection.close_when_written()
        if self._sessions:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_left.wait(), _GRACE)
        for session in tuple(self._sessions):
            session.connection.close()


def _has_ended(pidfd: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(int(timeout * 1000)))


async def serve(
    pid: int,
    start_time: int,
    upstream_path: str,
    listen_path: str,
    callbacks: Callbacks | None = None,
    attach: Callable[[int, BorrowMonitor], Attached] = attach,
    greet: Callable[[str], Greeted] = greet,
) -> Ended:
    """Serve the monitor of the machine `pid` on `listen_path` until it ends or a signal comes.

    `greet` takes the monitor at `upstream_path` (in a thread).
    Raises ListenError, MonitorError and their kin before the first client is taken in.
    """
    callbacks = callbacks or Callbacks()
    loop = asyncio.get_running_loop()
    end: asyncio.Future[Ended] = loop.create_future()

    def ended(why: Ended) -> None:
        if not end.done():
            end.set_result(why)

    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise KickcallError(f"cannot watch process {pid}: {error.strerror}") from error
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(os.close, pidfd)
        listener = ListeningSocket(listen_path)
        stack.callback(listener.close)
        greeted = await asyncio.to_thread(greet, upstream_path)
        server: Server | None = None
        has_shut_down = False

        def on_event(line: bytes) -> None:
            nonlocal has_shut_down
            has_shut_down |= _SHUTDOWN in line
            if server is not None:
                server.event(line)

        upstream = Upstream(loop, greeted, on_event, lambda: ended(Ended.MONITOR))
        stack.callback(upstream.close)
        executor = EventExecutor(
            loop, upstream, pid, attach, callbacks.witness, allow_pause=callbacks.allow_pause
        )
        stack.push_async_callback(executor.close)
        # Before the executor's worker is waited for: it may be waiting for the monitor.
        stack.callback(upstream.close)
        server = Server(loop, listener, upstream, executor)
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for number in signals:
            loop.add_signal_handler(number, ended, Ended.SIGNAL)
            stack.callback(loop.remove_signal_handler, number)

        try:
            commands = await asyncio.wait_for(upstream.call("query-commands"), _ANSWER_TIMEOUT)
        except TimeoutError:
            raise MonitorTimeoutError(
                f"the monitor {upstream_path} does not answer: QEMU's main loop is stuck"
            ) from None
        server.serves_event = not any(
            isinstance(entry, dict) and entry.get("name") == listing.COMMAND
            for entry in (commands if isinstance(commands, list) else ())
        )
        stack.push_async_callback(server.dismiss)
        if server.serves_event:
            executor.prepare(lambda error: _warn(callbacks, error))
        try:
            served.advertise(pid, start_time, listener.path, upstream_path)
            stack.callback(served.withdraw, pid, start_time)
        except (OSError, KickcallError) as error:
            callbacks.warning(f"other kickcall commands will not find this server: {error}")
        server.accept()
        callbacks.listening(listener.path)
        why = await end
        await server.dismiss()
        # A large machine takes its time to give its memory back: its word is enough.
        if why is Ended.MONITOR and (
            has_shut_down or await asyncio.to_thread(_has_ended, pidfd, _GRACE)
        ):
            return Ended.MACHINE
        return why


def run(
    pid: int,
    start_time: int,
    upstream_path: str,
    listen_path: str,
    callbacks: Callbacks,
    greet: Callable[[str], Greeted] = greet,
) -> Ended:
    """Do what `serve` does, in an event loop of its own. To be called in the main thread."""
    return asyncio.run(serve(pid, start_time, upstream_path, listen_path, callbacks, greet=greet))


def _warn(callbacks: Callbacks, error: Exception | None) -> None:
    # A monitor that went away ends the server, which says so.
    if error is not None and not isinstance(error, MonitorGoneError):
        callbacks.warning(f"{listing.COMMAND} will try again, it could not prepare: {error}")
