"""What does the journal keep of a stall, and of an injection?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Who:
    """Who injects."""

    uid: int
    pid: int
    command: str


@dataclass(frozen=True, slots=True)
class StallRow:
    """A stall as it was observed. Times in seconds since the epoch."""

    id: int
    machine: str
    pid: int
    start_time: int
    device: str
    queue: int
    verdict: str
    hop: int
    began: float
    ended: float | None
    ending: str | None
    """How it ended, in words; None while it lasts."""
    evidence: list[dict[str, Any]]
    watcher_pid: int
    watcher_start_time: int


@dataclass(frozen=True, slots=True)
class InjectionRow:
    """An injection. `outcome` None: unknown, whoever was to write it down crashed."""

    id: int
    stall: int | None
    machine: str
    pid: int
    start_time: int
    device: str
    queue: int
    event: str
    via: str
    target: str
    eventfd_id: int | None
    by_uid: int
    by_pid: int
    by_command: str
    at: float
    evidence: list[dict[str, Any]]
    outcome: str | None
    """`ok`: written. `refused`: nothing was written. `unknown`: it may have been written."""
    done_at: float | None
    error: str | None
    count_before: int | None
    avail_before: int | None
    used_before: int | None
    count_after: int | None
    avail_after: int | None
    used_after: int | None
    helped: bool | None
    """Whether the queue moved after it; None: not watched, or not known."""
