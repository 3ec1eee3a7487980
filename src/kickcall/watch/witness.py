"""Injections by hand, in the journal: what `kickcall kick`, `call`, `--probe` and the socket do.

An admin who repairs a machine is not stopped by a full disk: where the journal cannot be written
that is said once, and the injection is made all the same. (The healer is stopped, see `healer`.)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kickcall.watch import journald
from kickcall.watch.database import JournalError
from kickcall.watch.happenings import What, of_queue
from kickcall.watch.journal import Journal
from kickcall.watch.rows import Who

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kickcall.errors import KickcallError
    from kickcall.model import Injection, Machine


class JournalWitness:
    """Puts injections, one after the other, into the journal.

    The journal is opened when it is first needed; `warn` is told, once, if it cannot be written.
    """

    def __init__(
        self, command: str, warn: Callable[[str], None], *, path: Path | None = None
    ) -> None:
        self._who = Who(os.geteuid(), os.getpid(), command)
        self._warn = warn
        self._path = path
        self._journal: Journal | None = None
        self._number: int | None = None
        self._machine: Machine | None = None
        self._planned: Injection | None = None
        self._warned = False

    def before(self, machine: Machine, planned: Injection) -> None:
        """Put down the intent."""
        self._number = None
        self._machine, self._planned = machine, planned
        try:
            if self._journal is None:
                self._journal = Journal(self._path)
            self._number = self._journal.intend(machine, planned, self._who)
        except JournalError as exc:
            self._complain(exc)

    def written(self, result: Injection) -> None:
        """Put down the outcome."""
        self._tell(What.INJECTED, f"{result.event} injected via {result.via}: {result.target}")
        if self._journal is not None and self._number is not None:
            try:
                self._journal.done(self._number, result)
            except JournalError as exc:
                self._complain(exc)

    def failed(self, error: KickcallError, *, maybe_written: bool) -> None:
        """Put down that it failed."""
        whether = "perhaps injected" if maybe_written else "not injected"
        self._tell(What.NOT_HEALED, f"{whether}: {error}")
        if self._journal is not None and self._number is not None:
            try:
                self._journal.failed(self._number, str(error), maybe_written=maybe_written)
            except JournalError as exc:
                self._complain(exc)

    def _tell(self, what: What, text: str) -> None:
        """Put it into systemd's journal, too, where there is one."""
        if not journald.is_there() or self._machine is None or self._planned is None:
            return
        planned = self._planned
        more = {
            "event": str(planned.event),
            "via": str(planned.via),
            "injection": self._number,
            "command": self._who.command,
        }
        journal = journald.Journald()
        journal.tell(of_queue(self._machine, what, planned.device, planned.queue, text, **more))
        journal.close()

    def _complain(self, exc: JournalError) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"not journaled: {exc}")

    def close(self) -> None:
        """Let go of the journal."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
