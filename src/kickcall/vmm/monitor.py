"""A QMP monitor: what kickcall asks of one, and how it borrows one (connect, ask, leave)."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
import time
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qemu.qmp import ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError

from kickcall.errors import (
    MonitorBusyError,
    MonitorError,
    MonitorGoneError,
    MonitorTimeoutError,
    QmpCommandError,
)
from kickcall.vmm.find import socket_address, socket_error

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Mapping, Sequence

_T = TypeVar("_T")

CONNECT_TIMEOUT = 1.8
"""Seconds until a monitor that does not greet counts as busy."""
COMMAND_TIMEOUT = 10.0
"""Seconds until an unanswered command means that QEMU's main loop is stuck."""
_HESITATES_S = 0.1
"""Seconds without a greeting until another monitor of the same QEMU is tried beside it."""
_FULL_S = 0.05
"""Seconds until a monitor whose queue of clients was full is tried again."""
_QUEUE_FULL = frozenset({errno.EAGAIN, errno.EINVAL, errno.ENOTCONN})
"""What a unix socket says whose queue of clients is full: EAGAIN to connect(2) (unix(7)), which
asyncio takes for a connection on its way, and then finds a socket that is not connected."""

# qemu-qmp logs every failure that it also raises; nobody wants to read it twice.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class Monitor(Protocol):
    """One conversation with a VMM's QMP monitor. Calls block; they are safe from any thread."""

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Return what QEMU returns.

        Raises QmpCommandError, MonitorGoneError or MonitorTimeoutError.
        """
        ...

    def hmp(self, line: str) -> str:
        """Return what the human monitor prints for `line`."""
        ...


class BorrowMonitor(Protocol):
    """Opens a monitor for as long as the block lasts, after waiting `timeout` seconds at most."""

    def __call__(self, timeout: float = CONNECT_TIMEOUT) -> AbstractContextManager[Monitor]: ...


class _Client(QMPClient):
    """qemu-qmp's client, for monitors too that were asked to be `pretty`.

    The library takes a line for a message, and such a monitor spreads one over many: from `{` to
    the first line that begins with `}` (QEMU: qobject/json-writer.c indents all between).
    """

    async def _do_recv(self) -> Message:
        raw = await self._readline()
        if raw.strip() == b"{":
            lines = [raw]
            while not lines[-1].startswith(b"}"):
                lines.append(await self._readline())
            raw = b"".join(lines)
        return Message(raw, eager=True)


class QmpMonitor:
    """A monitor on a QMP socket, by qemu-qmp, for callers without an event loop.

    It is the first of `paths` that greets within `timeout` seconds; where none does, the error is
    that of the first. The library is asyncio; its loop runs in a thread of its own, so that this
    works in a REPL or a notebook that already has one.
    """

    def __init__(self, paths: Sequence[str], timeout: float = CONNECT_TIMEOUT) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="kickcall-qmp", daemon=True
        )
        self._thread.start()
        try:
            connecting = asyncio.run_coroutine_threadsafe(_first_of(paths, timeout), self._loop)
            self.path, self._client = connecting.result()
        except BaseException:
            self._stop()
            raise

    def _run(self, work: Coroutine[Any, Any, _T], timeout: float) -> _T:
        async def bounded() -> _T:
            return await asyncio.wait_for(work, timeout)

        return asyncio.run_coroutine_threadsafe(bounded(), self._loop).result()

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Return what QEMU returns for `command`."""
        try:
            return self._run(
                self._client.execute(command, dict(arguments) if arguments else None),
                COMMAND_TIMEOUT,
            )
        except ExecuteError as exc:
            raise QmpCommandError(
                f"QEMU refused {command}: {exc.error.error.desc}", exc.error.error.class_
            ) from exc
        except TimeoutError as exc:
            raise MonitorTimeoutError(
                f"{self.path}: no answer to {command} within {COMMAND_TIMEOUT:.0f} s: "
                "QEMU's main loop is stuck"
            ) from exc
        except (ExecInterruptedError, QMPError, OSError) as exc:
            raise MonitorGoneError(f"{self.path}: the monitor went away during {command}") from exc

    def hmp(self, line: str) -> str:
        """Return what the human monitor prints for `line`."""
        return str(self.execute("human-monitor-command", {"command-line": line}))

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def close(self) -> None:
        """Leave the monitor to the next client."""
        try:
            self._run(self._client.disconnect(), 1.0)
        except (QMPError, OSError, EOFError, TimeoutError):
            pass  # it is gone, and that is all that was wanted
        finally:
            self._stop()


async def _first_of(paths: Sequence[str], timeout: float) -> tuple[str, _Client]:
    """Return the first monitor that greets. The next is tried as soon as one hesitates."""
    deadline = time.monotonic() + timeout
    left = list(paths)
    asked: dict[asyncio.Task[_Client], str] = {}
    failures: dict[str, BaseException] = {}
    try:
        while left or asked:
            if left:
                path = left.pop(0)
                trying = _greeted(path, max(deadline - time.monotonic(), 0.1))
                asked[asyncio.create_task(trying)] = path
            answered, _ = await asyncio.wait(
                asked,
                timeout=_HESITATES_S if left else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in answered:
                path = asked.pop(task)
                failure = task.exception()
                if failure is None:
                    return path, task.result()
                if not isinstance(failure, MonitorError):
                    raise failure
                failures[path] = failure
    finally:
        for task in asked:
            task.cancel()
        for late in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(late, _Client):
                await late.disconnect()
    raise failures[paths[0]]


async def _greeted(path: str, timeout: float) -> _Client:
    """Return a client that was greeted. A full queue of clients may have room a moment later."""
    deadline = time.monotonic() + timeout
    while True:
        client = _Client("kickcall")
        try:
            await asyncio.wait_for(_connect(client, path), max(deadline - time.monotonic(), 0.1))
        except TimeoutError as exc:
            raise MonitorBusyError(
                f"{path}: no greeting within {timeout:.1f} s: another client holds this monitor "
                "(or QEMU's main loop is stuck)"
            ) from exc
        except QMPError as exc:
            cause = exc.__cause__ or exc.__context__ or exc
            if isinstance(cause, OSError) and cause.errno in _QUEUE_FULL:
                if time.monotonic() + _FULL_S < deadline:
                    await asyncio.sleep(_FULL_S)
                    continue
                raise MonitorBusyError(
                    f"{path}: another client holds this monitor, and more are waiting for it "
                    "(or QEMU's main loop is stuck)"
                ) from exc
            if isinstance(cause, OSError) and not isinstance(cause, ConnectionResetError):
                raise socket_error(path, cause) from exc
            if isinstance(cause, (EOFError, ConnectionResetError)):
                raise MonitorGoneError(f"{path}: the other side hung up at once") from exc
            said = str(exc).partition("\n")[0].strip()
            raise MonitorError(f"{path}: what answers there speaks no QMP: {said}") from exc
        return client


async def _connect(client: _Client, path: str) -> None:
    if path.startswith("tcp:"):
        host, _, port = path.removeprefix("tcp:").rpartition(":")
        await client.connect((host, int(port)))
    else:
        with socket_address(path) as address:
            await client.connect(address)


def borrow(paths: Sequence[str]) -> BorrowMonitor:
    """Return what opens the first of the monitors at `paths` that is free.

    All of them together are waited for at most its `timeout` seconds.
    """

    @contextmanager
    def borrowed(timeout: float = CONNECT_TIMEOUT) -> Iterator[Monitor]:
        if not paths:
            raise MonitorError(
                "this QEMU has no QMP monitor that can be reached (no -qmp, no -mon …,mode=control,"
                " or on TCP or an abstract socket in another network namespace): kickcall needs one"
            )
        monitor = QmpMonitor(paths, timeout)
        try:
            yield monitor
        finally:
            monitor.close()

    return borrowed
