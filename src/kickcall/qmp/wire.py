"""How do bytes and file descriptors get in and out of one Unix socket, without waiting?

asyncio's own streams would do but for two things. A QMP client may pass a descriptor (`getfd`,
`add-fd`), and asyncio's transports drop those. And a peer that does not read must neither hold
up others nor fill our memory, so what waits to be written is counted and bounded here.
"""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

MAX_WAITING: Final = 8 << 20
"""Bytes that may wait for a peer to read them. One message more may start while below it."""
_MAX_FDS: Final = 16
"""As QEMU's chardevs take at once (QEMU: chardev/char-socket.c, TCP_MAX_FDS)."""
_FD_SPACE: Final = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)


class Owner(Protocol):
    """Who is told what happens on a connection."""

    def may_read(self) -> bool:
        """Whether more input is welcome now; if not, `Connection.resume` asks for it later."""
        ...

    def received(self, data: bytes) -> None:
        """Bytes came in."""
        ...

    def received_fds(self, fds: Sequence[int]) -> None:
        """File descriptors came in, before the bytes they came with; the owner closes them."""
        ...

    def ended(self) -> None:
        """The peer will send nothing more. It may still read."""
        ...

    def drained(self) -> None:
        """All that waited to be written was taken."""
        ...

    def closed(self) -> None:
        """The connection is no more. Told once, never from within a call to the connection."""
        ...


class Connection:
    """One connected Unix socket in an event loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        owner: Owner,
        read_size: int,
        max_waiting: int | None = MAX_WAITING,
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._owner = owner
        self._read_size = read_size
        self._max_waiting = max_waiting
        self._waiting: deque[tuple[memoryview, Sequence[int]]] = deque()
        self.waiting_bytes = 0
        self.is_closed = False
        self._closing = False
        self._reading = True
        sock.setblocking(False)
        loop.add_reader(sock.fileno(), self._readable)

    def _readable(self) -> None:
        if not self._owner.may_read():
            self._pause()
            return
        try:
            data, ancillary, _, _ = self._sock.recvmsg(
                self._read_size, _FD_SPACE, socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if ancillary:
            fds = array.array("i")
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
            self._owner.received_fds(fds.tolist())
        if data:
            self._owner.received(data)
        else:
            self._pause()
            self._owner.ended()

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock.fileno())

    def resume(self) -> None:
        """Read again, after `may_read` said no."""
        if not self._reading and not self.is_closed:
            self._reading = True
            self._loop.add_reader(self._sock.fileno(), self._readable)

    def write(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send `data`, now as far as the peer takes it. `fds` are closed once they are sent.

        A peer that has more than `max_waiting` bytes to read already is dropped.
        """
        if self.is_closed or self._closing:
            close_fds(fds)
            return
        if self._max_waiting is not None and self.waiting_bytes > self._max_waiting:
            close_fds(fds)
            self.close()
            return
        idle = not self._waiting
        self._waiting.append((memoryview(data), fds))
        self.waiting_bytes += len(data)
        if idle:
            self._send()
            if self._waiting and not self.is_closed:
                self._loop.add_writer(self._sock.fileno(), self._writable)

    def _send(self) -> None:
        while self._waiting:
            data, fds = self._waiting[0]
            try:
                if fds:
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
                    sent = self._sock.sendmsg([data], [rights])
                else:
                    sent = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.close()
                return
            close_fds(fds)
            self.waiting_bytes -= sent
            if sent < len(data):
                self._waiting[0] = (data[sent:], ())
                return
            self._waiting.popleft()

    def _writable(self) -> None:
        self._send()
        if self.is_closed or self._waiting:
            return
        self._loop.remove_writer(self._sock.fileno())
        if self._closing:
            self.close()
        else:
            self._owner.drained()

    def close_when_written(self) -> None:
        """Close once the peer has taken what waits; take nothing more to write."""
        self._closing = True
        if not self._waiting:
            self.close()

    def close(self) -> None:
        """Close now. What waits is lost."""
        if self.is_closed:
            return
        self.is_closed = True
        self._pause()
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _, fds in self._waiting:
            close_fds(fds)
        self._waiting.clear()
        self.waiting_bytes = 0
        self._loop.call_soon(self._owner.closed)


def close_fds(fds: Sequence[int]) -> None:
    """Close descriptors that nobody took."""
    for fd in fds:
        os.close(fd)
