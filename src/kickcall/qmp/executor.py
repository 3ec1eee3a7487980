"""How does a device event get from the server's event loop to the machine and back?

`kickcall.attach` is synchronous, so it runs in one worker thread, one event after the other. What
it asks the monitor goes through the server's own connection: there is no second monitor to take.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, Protocol

import kickcall
from kickcall.errors import (
    DeviceNotFoundError,
    KickcallError,
    MapError,
    MonitorGoneError,
    MonitorTimeoutError,
    QueueNotFoundError,
    QueueNotReadyError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kickcall.devices.base import Witness
    from kickcall.qmp.event_command import EventRequest
    from kickcall.qmp.upstream import Upstream
    from kickcall.vmm.monitor import BorrowMonitor, Monitor

_TIMEOUT: Final = 10.0
"""Seconds that one monitor command may take before the event is given up."""


class LoopMonitor:
    """The monitor as the worker thread sees it: blocking calls into the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, upstream: Upstream) -> None:
        self._loop = loop
        self._upstream = upstream

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Return what QEMU returns. Raises QmpCommandError and the other MonitorErrors."""
        call = self._upstream.call(command, arguments)
        try:
            future = asyncio.run_coroutine_threadsafe(call, self._loop)
        except RuntimeError:
            call.close()
            raise MonitorGoneError("the server is ending: the monitor is closed") from None
        try:
            return future.result(_TIMEOUT)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise MonitorTimeoutError(
                f"QEMU did not answer {command} within {_TIMEOUT:.0f} s: its main loop is stuck"
            ) from None
        except concurrent.futures.CancelledError:
            raise MonitorGoneError("the server is ending: the monitor is closed") from None

    def hmp(self, line: str) -> str:
        """Return what the human monitor prints for `line`."""
        return str(self.execute("human-monitor-command", {"command-line": line}))


class Attached(Protocol):
    """What an attached machine can do, as far as the server needs it (kickcall.attach)."""

    def device_event(
        self,
        dev: str,
        event: Any,
        queue: int,
        *,
        allow_pause: bool = False,
        witness: Witness | None = None,
    ) -> Any: ...

    def refresh(self) -> Any: ...

    def close(self) -> Any: ...


def attach(pid: int, borrow: BorrowMonitor) -> Attached:
    """Attach to the machine by way of a monitor that is already held."""
    attached: Attached = kickcall.attach(pid, monitor=borrow)
    return attached


class EventExecutor:
    """Raises device events on one machine, in a thread of its own."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        upstream: Upstream,
        pid: int,
        attach: Callable[[int, BorrowMonitor], Attached] = attach,
        witness: Witness | None = None,
        *,
        allow_pause: bool = False,
    ) -> None:
        self._loop = loop
        self._monitor = LoopMonitor(loop, upstream)
        self._pid = pid
        self._attach = attach
        self._witness = witness
        self._allow_pause = allow_pause
        self._machine: Attached | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device-event")

    def prepare(self, done: Callable[[Exception | None], None]) -> None:
        """Attach in the background, so that the first event is as fast as the others."""
        self._run(self._ready, done)

    def submit(self, request: EventRequest, done: Callable[[Exception | None], None]) -> None:
        """Raise an event after those that were asked for before; tell `done` the outcome."""
        self._run(lambda: self._raise(request), done)

    def _run(self, work: Callable[[], object], done: Callable[[Exception | None], None]) -> None:
        def report(future: asyncio.Future[object]) -> None:
            if future.cancelled():
                done(MonitorGoneError("the server is ending"))
                return
            error = future.exception()
            done(error if isinstance(error, Exception) or error is None else KickcallError(error))

        self._loop.run_in_executor(self._pool, work).add_done_callback(report)

    @contextlib.contextmanager
    def _borrow(self, timeout: float = 0.0) -> Iterator[Monitor]:
        yield self._monitor  # It is ours all the time: nobody waits for it.

    # In the worker thread.

    def _ready(self) -> Attached:
        if self._machine is None:
            self._machine = self._attach(self._pid, self._borrow)
        return self._machine

    def _raise(self, request: EventRequest) -> None:
        machine = self._ready()
        asked = (request.dev, request.event, request.queue)
        try:
            machine.device_event(*asked, allow_pause=self._allow_pause, witness=self._witness)
        except (MapError, DeviceNotFoundError, QueueNotFoundError, QueueNotReadyError):
            # The machine was mapped some time ago. Since then the guest may have rebooted, a
            # device been plugged in, a driver set its queues up. Nothing was written: look again.
            machine.refresh()
            machine.device_event(*asked, allow_pause=self._allow_pause, witness=self._witness)

    def _detach(self) -> None:
        if self._machine is not None:
            with contextlib.suppress(KickcallError, OSError):
                self._machine.close()

    async def close(self) -> None:
        """Let go of the machine, after the event under way."""
        self._pool.submit(self._detach)
        await asyncio.to_thread(self._pool.shutdown)
