"""A QMP monitor: what kickcall asks of one, and how it borrows one (connect, ask, leave)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager


class Monitor(Protocol):
    """One conversation with a VMM's QMP monitor. Calls block; they are safe from any thread."""

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Return what QEMU returns. Raises QmpCommandError, MonitorGoneError, MonitorTimeoutError."""
        ...

    def hmp(self, line: str) -> str:
        """Return what the human monitor prints for `line`."""
        ...


type_BorrowMonitor = "Callable[[], AbstractContextManager[Monitor]]"
