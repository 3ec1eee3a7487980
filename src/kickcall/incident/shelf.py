"""Where are the bundles that a watcher has written, how many may there be, and who writes them?

A process of its own with a low priority writes each, one at a time: the watcher's looks and its
healing wait for none of it. What is in the folder is the memory of how many there were.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from kickcall.errors import KickcallError
from kickcall.incident.archive import ENDINGS, safe_name
from kickcall.incident.seen import Seen, seen_to

if TYPE_CHECKING:
    from collections.abc import Callable

    from kickcall.model import Machine, Verdict

_DAY_S = 86400.0
_WRITING_MOST_S = 300.0
_LEAVING_S = 1.0
_NICER = 10
_NAME = re.compile(r"(\d{8}T\d{6})Z-.*-([0-9a-f]{12})\.tar\.gz")


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many bundles a watcher writes, and keeps."""

    queue: int = 2
    """Of one queue in 24 hours."""
    host: int = 24
    """Of all in 24 hours."""
    size: int = 256 << 20
    """Bytes of all that are kept: the oldest go."""
    waiting: int = 4
    """Stalls that wait for theirs to be written; those beyond get none."""


@dataclass(frozen=True, slots=True)
class Written:
    """What came of one."""

    machine: Machine
    verdict: Verdict
    path: Path | None
    why: str = ""
    """Why there is none."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    machine: Machine
    verdict: Verdict
    seen: Seen
    path: Path


class Shelf:
    """The bundles in `folder`. `tell` is told what came of each, in a thread of the shelf's."""

    def __init__(
        self,
        folder: Path,
        tell: Callable[[Written], None],
        *,
        bounds: Bounds | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self._tell = tell
        self._bounds = bounds or Bounds()
        self._environment = {**os.environ, **(environment or {})}
        self._lock = threading.Lock()
        self._made = [(made, key) for made, key, _ in _bundles_in(folder)]
        """When one was made of which queue."""
        self._wanted: queue.SimpleQueue[_Wanted | None] = queue.SimpleQueue()
        self._waiting = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="bundles", daemon=True)
        self._thread.start()

    def offer(self, machine: Machine, verdict: Verdict, take: Callable[[], Seen]) -> bool:
        """Have a bundle written of a stall, if there may be one more; tell whether it will be.

        Comes back at once. `take` is called only then: what it looks at may take its time.
        """
        now = time.time()
        key = _key(machine, verdict)
        with self._lock:
            self._made = [(made, of) for made, of in self._made if now - _DAY_S < made <= now + 60]
            if (
                self._closed
                or self._waiting >= self._bounds.waiting
                or len(self._made) >= self._bounds.host
                or sum(of == key for _, of in self._made) >= self._bounds.queue
            ):
                return False
            self._made.append((now, key))
            self._waiting += 1
        device = safe_name(verdict.device.rpartition("/")[2])
        name = f"{safe_name(machine.name)}-{device}-q{verdict.queue}-{key}{ENDINGS[0]}"
        path = self.folder / f"{datetime.fromtimestamp(now, UTC):%Y%m%dT%H%M%SZ}-{name}"
        try:
            seen = take()
        except (KickcallError, OSError):  # it went away meanwhile: the rest may tell why
            seen = Seen()
        self._wanted.put(_Wanted(machine, verdict, seen, path))
        return True

    def close(self) -> None:
        """Write no more. One that is being written is given up."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.terminate()
        self._wanted.put(None)
        self._thread.join(_LEAVING_S)

    # --- in the shelf's thread ---

    def _run(self) -> None:
        while (wanted := self._wanted.get()) is not None and not self._closed:
            try:
                written = self._write(wanted)
            except (OSError, subprocess.SubprocessError, ValueError) as exc:
                written = Written(wanted.machine, wanted.verdict, None, str(exc))
            with self._lock:
                self._waiting -= 1
                if self._closed:
                    return
            self._tell(written)

    def _write(self, wanted: _Wanted) -> Written:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self.folder.lstat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise PermissionError(f"{self.folder} is another's, or others may write to it")
        self._make_room()
        with self._lock:
            if self._closed:
                return Written(wanted.machine, wanted.verdict, None, "the watcher ends")
            process = self._process = subprocess.Popen(
                [
                    # Whatever lies in the folder that the watcher was started in: not imported.
                    *(sys.executable, "-P", "-m", "kickcall", "bundle", str(wanted.machine.pid)),
                    *("--out", str(wanted.path), "--duration", "1s", "--from-watcher", "--json"),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,
            )
        with contextlib.suppress(OSError):
            niceness = os.getpriority(os.PRIO_PROCESS, 0) + _NICER
            os.setpriority(os.PRIO_PROCESS, process.pid, min(niceness, 19))
        try:
            out, said = process.communicate(seen_to(wanted.seen), _WRITING_MOST_S)
        finally:
            process.kill()
            process.wait()
            with self._lock:
                self._process = None
        self._make_room(keep=wanted.path)
        if process.returncode != 0:
            why = said.decode(errors="replace").strip().removeprefix("kickcall: ")
            why = why.splitlines()[-1] if why else f"its process ended with {process.returncode}"
            return Written(wanted.machine, wanted.verdict, None, why)
        return Written(wanted.machine, wanted.verdict, Path(json.loads(out)["file"]))

    def _make_room(self, keep: Path | None = None) -> None:
        """Remove the oldest bundles that are too much, and what was left half-written."""
        with contextlib.suppress(OSError):
            for left in self.folder.glob(".20*"):
                if left.lstat().st_mtime < time.time() - 3600:
                    left.unlink()
        found = sorted(_bundles_in(self.folder), reverse=True)
        total = 0
        for _, _, path in found:
            with contextlib.suppress(OSError):
                total += path.lstat().st_size
                if total > self._bounds.size and path != keep:
                    path.unlink()


def _key(machine: Machine, verdict: Verdict) -> str:
    """Return what names a queue of a machine in a file's name, whatever they are called."""
    text = json.dumps([machine.name, verdict.device, verdict.queue])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _bundles_in(folder: Path) -> list[tuple[float, str, Path]]:
    """Return when each bundle was made, of which queue, and where it is."""
    found = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if (name := _NAME.fullmatch(path.name)) is not None:
                with contextlib.suppress(ValueError):
                    made = datetime.strptime(name[1], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
                    found.append((made.timestamp(), name[2], path))
    return found
