"""How can a running machine lose a notification for real? This relay carries them, and may drop.

    python -m kickcall.lab.relay --listen PATH --backend PATH --control PATH

It sits between a vhost-user front-end (QEMU) and its back-end, and forwards every message with
its file descriptors; only the eventfd of SET_VRING_KICK and SET_VRING_CALL it replaces by one of
its own, and then carries each notification from one eventfd to the other:

    kick: QEMU's eventfd -> relay -> the back-end's eventfd
    call: the back-end's eventfd -> relay -> QEMU's eventfd

The control socket speaks JSON lines, see `relay_control`. One thread and one epoll: a
notification that passes costs a read and a write.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import json
import logging
import os
import select
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kickcall.lab.relay_faults import Action, Fate, FaultPlan
from kickcall.lab.vhost_user import (
    HEADER,
    MOST_FDS,
    Notification,
    SetNotifier,
    StopQueue,
    parse_header,
    parse_request,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger("kickcall.lab.relay")

_DOUBLE_AFTER = 0.005
"""Seconds between a doubled notification and its twin: at once they would be one count of 2."""
_ONE = (1).to_bytes(8, "little")
_LONGEST_CONTROL_LINE = 1 << 16


@dataclass(slots=True, eq=False)
class _Pump:
    """One queue's way for kicks or calls: read from `source`, write to `target`."""

    source: int
    target: int

    def close(self) -> None:
        os.close(self.source)
        os.close(self.target)


class Relay:
    """The event loop and everything it holds open."""

    def __init__(self, listen: str, backend: str, control: str) -> None:
        self._backend_path = backend
        self._plan = FaultPlan()
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._pumps: dict[tuple[Notification, int], _Pump] = {}
        self._later: list[tuple[float, int, _Pump]] = []
        self._order = itertools.count()
        self._front: socket.socket | None = None
        self._back: socket.socket | None = None
        self._listener = _listening(listen)
        self._watch(self._listener.fileno(), self._front_end_came)
        # Last: whoever waits for the control socket may use all of the relay.
        self._control = _listening(control)
        self._watch(self._control.fileno(), self._control_came)

    def run(self) -> None:
        """Carry notifications until killed."""
        while True:
            timeout = max(self._later[0][0] - time.monotonic(), 0.0) if self._later else None
            for fd, _ in self._epoll.poll(timeout):
                # A handler before this one may have closed it.
                if handler := self._handlers.get(fd):
                    handler()
            while self._later and self._later[0][0] <= time.monotonic():
                _, _, pump = heapq.heappop(self._later)
                # The queue may have got other eventfds, or ended, in the meantime.
                if pump in self._pumps.values():
                    os.write(pump.target, _ONE)

    # Messages

    def _front_end_came(self) -> None:
        front, _ = self._listener.accept()
        self._hang_up()
        back = socket.socket(socket.AF_UNIX)
        try:
            back.connect(self._backend_path)
        except OSError as error:
            _log.error("no back-end at %s: %s", self._backend_path, error)
            front.close()
            back.close()
            return
        self._front, self._back = front, back
        self._watch(front.fileno(), lambda: self._forward(front, back, from_front=True))
        self._watch(back.fileno(), lambda: self._forward(back, front, from_front=False))

    def _forward(self, source: socket.socket, target: socket.socket, *, from_front: bool) -> None:
        if not _readable(source):
            return  # it was read before a kick
        fds: list[int] = []
        try:
            head, fds, _, _ = socket.recv_fds(source, HEADER.size, MOST_FDS, socket.MSG_WAITALL)
            if len(head) < HEADER.size:
                self._hang_up()
                return
            header = parse_header(head)
            payload = source.recv(header.size, socket.MSG_WAITALL) if header.size else b""
            meaning = parse_request(header, payload) if from_front else None
            sent = fds
            if isinstance(meaning, SetNotifier):
                sent = self._replaced(meaning, fds)
                # The pump keeps what came; the copy that goes on is closed after sending.
                fds = sent
            elif isinstance(meaning, StopQueue):
                self._stop_pump(Notification.KICK, meaning.queue)
            socket.send_fds(target, [head + payload], sent)
        except (OSError, ValueError) as error:
            _log.error("connection ended: %s", error)
            self._hang_up()
        finally:
            for fd in fds:
                os.close(fd)

    def _replaced(self, message: SetNotifier, fds: list[int]) -> list[int]:
        """Return the descriptors to send in place of a notifier's, and start its pump."""
        key = (message.notification, message.queue)
        replaces = message.has_fd and len(fds) == 1
        if replaces and message.notification is Notification.CALL and key in self._pumps:
            # The back-end may call before it has read this: its way to call stays the same.
            pump = self._pumps[key]
            os.close(pump.target)
            pump.target = fds[0]
            return [os.dup(pump.source)]
        self._stop_pump(*key)
        if not replaces:
            return fds
        ours = os.eventfd(0, os.EFD_CLOEXEC)
        if message.notification is Notification.KICK:
            pump = _Pump(source=fds[0], target=ours)
        else:
            pump = _Pump(source=ours, target=fds[0])
        self._pumps[key] = pump
        self._watch(pump.source, lambda: self._notified(key, pump))
        return [os.dup(ours)]

    def _hang_up(self) -> None:
        """End this front-end's connection and its pumps; the next one may come."""
        for side in (self._front, self._back):
            if side is not None:
                self._unwatch(side.fileno())
                side.close()
        self._front = self._back = None
        for notification, queue in list(self._pumps):
            self._stop_pump(notification, queue)

    # Notifications

    def _notified(self, key: tuple[Notification, int], pump: _Pump) -> None:
        # What QEMU said before the guest kicked comes first: it starts a queue, and then names the
        # eventfd for its calls. A call through the one before would be lost, and a boot hang.
        while key[0] is Notification.KICK and self._front is not None and _readable(self._front):
            self._handlers[self._front.fileno()]()
        if self._pumps.get(key) is not pump:
            return
        # The eventfd is not ours to make non-blocking, and somebody else (kickcall, a debugger)
        # may have read it since epoll saw it: read only what is there.
        if not _readable(pump.source):
            return
        os.read(pump.source, 8)
        fate = self._plan.arrived(*key)
        if fate.action in (Action.PASS, Action.DOUBLE):
            os.write(pump.target, _ONE)
        if fate.action in (Action.DELAY, Action.DOUBLE):
            late = fate.seconds if fate.action is Action.DELAY else _DOUBLE_AFTER
            heapq.heappush(self._later, (time.monotonic() + late, next(self._order), pump))

    def _stop_pump(self, notification: Notification, queue: int) -> None:
        pump = self._pumps.pop((notification, queue), None)
        if pump is not None:
            self._unwatch(pump.source)
            pump.close()

    # Control

    def _control_came(self) -> None:
        connection, _ = self._control.accept()
        # A client that says nothing must not stop the relay for long.
        connection.settimeout(0.5)
        with contextlib.suppress(OSError), connection, connection.makefile("rw") as lines:
            line = lines.readline(_LONGEST_CONTROL_LINE)
            lines.write(json.dumps(self._answer(line)) + "\n")

    def _answer(self, line: str) -> dict[str, Any]:
        try:
            request = json.loads(line)
            match request["do"]:
                case "fault":
                    self._plan.add(
                        Notification(request["event"]),
                        None if request["queue"] is None else int(request["queue"]),
                        Fate(Action(request["action"]), float(request.get("seconds", 0))),
                        int(request["count"]),
                    )
                case "clear":
                    self._plan.clear()
                case "report":
                    pass
                case other:
                    return {"error": f"no such request: {other}"}
        except (ValueError, KeyError, TypeError) as error:
            return {"error": f"bad request: {error!r}"}
        return {"queues": self._plan.report(), "connected": self._front is not None}

    # epoll

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def _unwatch(self, fd: int) -> None:
        # Before close(): epoll would go on watching an eventfd that another process holds open.
        if self._handlers.pop(fd, None):
            self._epoll.unregister(fd)


def _readable(file: int | socket.socket) -> bool:
    return bool(select.select([file], [], [], 0)[0])


def _listening(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(8)
    return listener


def main() -> None:
    parser = argparse.ArgumentParser(prog="kickcall.lab.relay", description=__doc__)
    parser.add_argument("--listen", required=True, help="socket for the front-end (QEMU)")
    parser.add_argument("--backend", required=True, help="socket of the back-end")
    parser.add_argument("--control", required=True, help="socket for faults and counters")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    Relay(arguments.listen, arguments.backend, arguments.control).run()


if __name__ == "__main__":
    main()
