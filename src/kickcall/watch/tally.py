"""What has a watcher counted since it started? Numbers only; `metrics` is who shows them."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from typing import TYPE_CHECKING, Final

from kickcall.model import DeviceEvent, VerdictKind
from kickcall.watch.happenings import What

if TYPE_CHECKING:
    from kickcall.watch.happenings import Happening

LOOK_BOUNDS_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
"""Looks are sorted by these upper bounds: a queue's share is a microsecond or so."""
OUTCOMES: Final = ("helped", "refuted", "unknown", "refused")
"""Of an injection. `unknown`: written, or nobody knows, and nobody could watch what came of it.
`refused`: nothing was written."""


class Tally:
    """Counts that only grow. Its methods are called from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stalls = Counter({str(kind): 0 for kind in VerdictKind if kind.stalled})
        self._injections = Counter(
            {(str(event), outcome): 0 for event in DeviceEvent for outcome in OUTCOMES}
        )
        self._alerts = 0
        self._looks = [0] * (len(LOOK_BOUNDS_S) + 1)
        self._looked_s = 0.0

    def happened(self, one: Happening) -> None:
        """Count what was told."""
        with self._lock:
            if one.what is What.STALL:
                self._stalls[str(one.more.get("verdict", VerdictKind.UNKNOWN))] += 1
            elif one.what is What.ALERT:
                self._alerts += 1

    def injected(self, event: DeviceEvent, outcome: str) -> None:
        """Count an injection of which is known what came of it, one of `OUTCOMES`."""
        with self._lock:
            self._injections[str(event), outcome] += 1

    def looked(self, seconds: float) -> None:
        """Count a look at one machine, and how long it took."""
        with self._lock:
            self._looks[bisect.bisect_left(LOOK_BOUNDS_S, seconds)] += 1
            self._looked_s += seconds

    @property
    def stalls(self) -> dict[str, int]:
        """How many were told, by verdict."""
        with self._lock:
            return dict(self._stalls)

    @property
    def injections(self) -> dict[tuple[str, str], int]:
        """How many were made, or refused, by event and outcome."""
        with self._lock:
            return dict(self._injections)

    @property
    def alerts(self) -> int:
        """How often somebody should have looked."""
        with self._lock:
            return self._alerts

    @property
    def looks(self) -> tuple[list[int], float]:
        """How many looks took no longer than each of `LOOK_BOUNDS_S`, and longer; their seconds."""
        with self._lock:
            return list(self._looks), self._looked_s
