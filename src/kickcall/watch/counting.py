"""How many kicks and calls a second does a machine's every queue get, while somebody looks at it?

The kernel counts (vmm/recorder.py) only for machines that are looked at right now.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from kickcall.attached import attach
from kickcall.draw.text import printable
from kickcall.errors import KickcallError
from kickcall.model import DeviceEvent
from kickcall.vmm.recorder import Which

if TYPE_CHECKING:
    from kickcall.watch.live import LiveMachine

_WANTED_S = 10.0
"""For so long after somebody asked it is counted on."""
_EVERY_S = 0.5
_RETRY_S = 30.0


class Counting:
    """Counts the notifications of the machines that somebody wants to see."""

    def __init__(self) -> None:
        self._wanted: dict[LiveMachine, float] = {}
        self._threads: dict[LiveMachine, threading.Thread] = {}
        self._why_not: dict[LiveMachine, tuple[str, float]] = {}
        """Why it failed, and when."""
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def want(self, machine: LiveMachine) -> str:
        """Have a machine's notifications counted for some seconds; return why that fails, if so."""
        with self._lock:
            now = self._wanted[machine] = time.monotonic()
            why, failed_at = self._why_not.get(machine, ("", 0.0))
            if why and now >= failed_at + _RETRY_S:
                del self._why_not[machine]
            elif not why and machine not in self._threads and not self._stop.is_set():
                thread = threading.Thread(
                    target=self._count, args=(machine,), name="counting", daemon=True
                )
                self._threads[machine] = thread
                thread.start()
        return why

    def forget(self, machine: LiveMachine) -> None:
        """Take note that a machine ended."""
        with self._lock:
            self._wanted.pop(machine, None)
            self._why_not.pop(machine, None)

    def _count(self, machine: LiveMachine) -> None:
        try:
            self._record(machine)
        except (KickcallError, OSError) as exc:
            with self._lock:
                self._why_not[machine] = (printable(exc), time.monotonic())
        finally:
            for queue in machine.queues:
                queue.kicks_s = queue.calls_s = None
            with self._lock:
                self._threads.pop(machine, None)

    def _record(self, machine: LiveMachine) -> None:
        with attach(machine.machine.pid) as attached, attached.record() as recording:
            before: dict[Which, int] = {}
            at = time.monotonic()
            while time.monotonic() < self._wanted.get(machine, 0.0) + _WANTED_S:
                if self._stop.wait(_EVERY_S):
                    return
                counts = {which: one.total for which, one in recording.counts().items()}
                now = time.monotonic()
                for queue in machine.queues:
                    device, number = queue.fixed.device, queue.fixed.queue
                    for event in DeviceEvent:
                        which = Which(device, number, event)
                        total = counts.get(which)
                        rate = None
                        if total is not None:
                            rate = max(0, total - before.get(which, 0)) / (now - at)
                        if event is DeviceEvent.KICK:
                            queue.kicks_s = rate
                        else:
                            queue.calls_s = rate
                before, at = counts, now
                recording.follow()

    def close(self) -> None:
        """Have nothing counted any more."""
        self._stop.set()
        for thread in list(self._threads.values()):
            thread.join(3.0)
