"""What does a watcher know already when it has a bundle written, and how does it hand that over?"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from kickcall.incident.facts import BundleError, Line
from kickcall.model import Verdict


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen before, and nobody can read any more."""

    found: tuple[Verdict, ...] = ()
    """What is wrong; evidence with the time of day."""
    lines: tuple[Line, ...] = ()
    """How the queues stood before."""
    threads: str = ""
    """What the threads did when the stall was found."""


def seen_to(seen: Seen) -> bytes:
    """Return what a watcher saw as JSON."""
    return msgspec.json.encode(seen)


def seen_from(text: bytes) -> Seen:
    """Return what a watcher saw. Raises BundleError."""
    try:
        return msgspec.json.decode(text, type=Seen)
    except msgspec.MsgspecError as exc:
        raise BundleError(f"what the watcher saw cannot be read: {exc}") from exc
