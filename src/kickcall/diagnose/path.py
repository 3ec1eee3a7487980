"""The path of one request: ten hops, and where a verdict says that it is broken."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kickcall.model import Verdict


@dataclass(frozen=True, slots=True)
class Hop:
    """One step that a request takes. See docs/path.md."""

    number: int
    name: str
    by: str
    """Who takes the step: `driver`, `device`, or what lies between them."""
    seen_in: str
    """What shows on the host that it was taken."""


PATH: tuple[Hop, ...] = (
    Hop(1, "published", "driver", "avail.idx"),
    Hop(2, "kick owed", "device", "avail_event, used.flags"),
    Hop(3, "kicked", "doorbell", "kick notifier"),
    Hop(4, "woken", "back-end", "kick notifier drained"),
    Hop(5, "fetched", "device", "last_avail_idx"),
    Hop(6, "completed", "device", "used.idx"),
    Hop(7, "call owed", "driver", "used_event, avail.flags"),
    Hop(8, "called", "device", "call notifier"),
    Hop(9, "delivered", "interrupt", "MSI-X table, pending bits"),
    Hop(10, "reaped", "driver", "used_event, avail.idx"),
)


class HopState(enum.Enum):
    """How far the request came."""

    TAKEN = "taken"
    BROKEN = "broken"
    NOT_REACHED = "not reached"


def path_of(verdict: Verdict) -> tuple[tuple[Hop, HopState], ...]:
    """Return every hop with its state. A verdict that names no hop has none that is broken."""
    broken = verdict.hop or len(PATH) + 1
    return tuple((hop, _state(hop.number, broken)) for hop in PATH)


def _state(number: int, broken: int) -> HopState:
    if number == broken:
        return HopState.BROKEN
    return HopState.TAKEN if number < broken else HopState.NOT_REACHED
