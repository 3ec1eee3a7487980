"""How is a relay told to lose a notification, and asked what it carried?

One JSON line each way, one connection each:

    {"do": "fault", "event": "kick", "queue": 0, "action": "drop", "count": 1}
    {"do": "clear"}        {"do": "report"}
    {"queues": [{"queue": 0, "event": "kick", "passed": 12, "dropped": 0, …}], "connected": true}
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kickcall.errors import LabError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Carried:
    """What became of one queue's kicks or calls. `queue` None: a fault that awaits any queue."""

    queue: int | None
    event: str
    passed: int
    dropped: int
    delayed: int
    doubled: int
    pending: int
    """Faults still to come."""


class RelayControl:
    """A running relay."""

    def __init__(self, path: Path, timeout: float = 5.0) -> None:
        self._path = path
        self._timeout = timeout

    def drop(self, event: str, queue: int | None = None, count: int = 1) -> None:
        """Lose the next `count` kicks or calls of a queue (None: of any queue)."""
        self._fault("drop", event, queue, count)

    def delay(
        self, event: str, queue: int | None = None, count: int = 1, *, seconds: float = 1.0
    ) -> None:
        """Carry the next `count` kicks or calls of a queue `seconds` late."""
        self._fault("delay", event, queue, count, seconds=seconds)

    def double(self, event: str, queue: int | None = None, count: int = 1) -> None:
        """Carry the next `count` kicks or calls of a queue twice, 5 ms apart."""
        self._fault("double", event, queue, count)

    def clear(self) -> None:
        """Forget the faults that have not happened yet."""
        self._ask({"do": "clear"})

    def report(self) -> list[Carried]:
        """Return what was carried and lost since the relay started, by queue and event."""
        return [Carried(**row) for row in self._ask({"do": "report"})["queues"]]

    def carried(self, event: str, queue: int) -> Carried:
        """Return what became of one queue's kicks or calls."""
        for row in self.report():
            if (row.event, row.queue) == (event, queue):
                return row
        return Carried(queue, event, 0, 0, 0, 0, 0)

    def wait_for(self, event: str, queue: int, *, dropped: int, timeout: float = 10.0) -> Carried:
        """Return when at least `dropped` were lost. Raises LabError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (row := self.carried(event, queue)).dropped < dropped:
            if time.monotonic() > deadline:
                raise LabError(
                    f"the relay lost {row.dropped} {event}s of queue {queue} in {timeout:g} s, "
                    f"not {dropped}: does the guest use that queue?"
                )
            time.sleep(0.005)
        return row

    def _fault(
        self, action: str, event: str, queue: int | None, count: int, *, seconds: float = 0.0
    ) -> None:
        request = {"do": "fault", "event": event, "queue": queue, "action": action}
        self._ask({**request, "count": count, "seconds": seconds})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        deadline = time.monotonic() + self._timeout
        try:
            # The relay hangs up on who does not get to ask at once, and has done nothing then.
            while not (line := self._asked(request)) and time.monotonic() < deadline:
                pass
            answer: dict[str, Any] = json.loads(line)
        except (OSError, ValueError) as error:
            raise LabError(f"the relay at {self._path} does not answer: {error}") from error
        if "error" in answer:
            raise LabError(f"the relay refused: {answer['error']}")
        return answer

    def _asked(self, request: dict[str, Any]) -> str:
        """Return the relay's answer; nothing where it hung up before it had read the request."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(self._timeout)
            connection.connect(str(self._path))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(json.dumps(request).encode() + b"\n")
                with connection.makefile("r") as lines:
                    return lines.readline()
        return ""
