"""How did all queues of a machine stand over some seconds? Looked at beside whatever else is done.

A thread looks, and writes a line for each queue that changed. Lines are kept as JSON, and bounded:
where there are too many the looks become rarer.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import msgspec

from kickcall.errors import KickcallError
from kickcall.incident.facts import line_of
from kickcall.vmm.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kickcall.diagnose.states import Sample
    from kickcall.model import Notification
    from kickcall.vmm.recorder import Recording
    from kickcall.vmm.session import VmmSession

_INTERVAL_S = 0.02
_SHARE = 10
"""Looks take one part in so many of a processor at most."""
_LINES_MOST = 40_000
_EVENTS_MOST = 5_000


class Film:
    """Looks at all queues of a machine while a block lasts. `recording` is emptied, too."""

    def __init__(self, session: VmmSession, recording: Recording | None, offset: float) -> None:
        self._sampler = Sampler(session)
        self._recording = recording
        self._offset = offset
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="film", daemon=True)
        self._lines: list[bytes] = []
        self._encoder = msgspec.json.Encoder()
        self._interval = _INTERVAL_S
        self._left = 0.5
        """The part of the lines that is left when the looks become rarer the next time."""
        self.queues = self._sampler.queues
        self.events: deque[Notification] = deque(maxlen=_EVENTS_MOST)
        """The latest notifications that the kernel saw."""
        self.looks = 0
        self.latest: dict[tuple[str, int], Sample] = {}
        """Each queue at the last look, its time in seconds since the epoch."""
        self.problem = ""
        """Why it ended early; empty where it did not."""

    @property
    def text(self) -> bytes:
        """All lines."""
        return b"".join(self._lines)

    @property
    def lines(self) -> int:
        """How many lines there are."""
        return len(self._lines)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                started = time.monotonic()
                found = self._sampler.look()
                self._put(found.moved)
                self.looks += 1
                if self._recording is not None:
                    self.events.extend(self._recording.events()[0])
                took = time.monotonic() - started
                if self.lines > _LINES_MOST * (1 - self._left):
                    self._left /= 2
                    self._interval *= 2
                self._stop.wait(max(self._interval, took * _SHARE))
            self._sampler.look()
            self._put(range(len(self.queues)))
            self.looks += 1
            if self._recording is not None:
                self.events.extend(self._recording.events(last=True)[0])
        except (KickcallError, OSError) as exc:
            self.problem = str(exc)

    def _put(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            fixed = self.queues[number]
            sample = self._sampler.latest(number)
            self.latest[fixed.device, fixed.queue] = replace(sample, at=sample.at + self._offset)
            self._lines.append(self._encoder.encode(line_of(fixed, sample, self._offset)) + b"\n")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sampler.close()
