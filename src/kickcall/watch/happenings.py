"""What a watcher tells: one value for each thing that happened, for people and for programs."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kickcall.model import Machine


class What(enum.StrEnum):
    """The kinds of things that happen."""

    CAME = "came"
    """A machine is watched from now on."""
    WENT = "went"
    """A machine ended."""
    NOT_WATCHED = "not-watched"
    """A machine cannot be watched, for now."""
    STALL = "stall"
    CLEARED = "cleared"
    """A stall is over."""
    INJECTED = "injected"
    HELPED = "helped"
    REFUTED = "refuted"
    """An injection did not help."""
    WOULD_INJECT = "would-inject"
    """A dry run."""
    NOT_HEALED = "not-healed"
    ALERT = "alert"
    """Somebody should look: healing was stopped, or the journal cannot be written."""
    BUNDLE = "bundle"
    """An incident bundle was written."""
    REBOOTED = "rebooted"
    """A machine's guest: libvirt tells it."""
    RELOADED = "reloaded"
    """The configuration was read again."""
    METRICS = "metrics"
    """Where the metrics are served."""


@dataclass(frozen=True, slots=True)
class Happening:
    """One thing that happened."""

    what: What
    text: str
    machine: str | None = None
    pid: int | None = None
    device: str | None = None
    queue: int | None = None
    more: dict[str, Any] = field(default_factory=dict)
    """What programs may want besides: the verdict, the event, how long it took."""
    at: float = field(default_factory=time.time)
    """In seconds since the epoch."""


def of_machine(machine: Machine, what: What, text: str, **more: Any) -> Happening:
    """Return what happened to a machine."""
    return Happening(what, text, machine.name, machine.pid, more=more)


def of_queue(
    machine: Machine, what: What, device: str, queue: int, text: str, **more: Any
) -> Happening:
    """Return what happened to a queue."""
    return Happening(what, text, machine.name, machine.pid, device, queue, more)
