"""Who may heal a machine? One watcher at a time, for as long as it lives.

A lock (flock(2)) on a file in the runtime folder, named after the machine's process. The kernel
lets go of it when its holder ends, however that happens.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from kickcall.vmm.served import runtime_folder

if TYPE_CHECKING:
    from pathlib import Path


class HealLock:
    """The right to heal one machine, held until `close`."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    @staticmethod
    def take(pid: int, start_time: int) -> HealLock | None:
        """Return the lock of a machine; None where another watcher has it.

        Raises OSError where the runtime folder cannot be used.
        """
        folder = runtime_folder()
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise PermissionError(f"{folder} is another's, or others may write to it")
        path = folder / f"healing-{pid}-{start_time}.lock"
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Who had it before removes the file: then this is a lock on nothing.
                if os.path.samestat(os.fstat(fd), path.stat()):
                    return HealLock(path, fd)
            except BlockingIOError:
                os.close(fd)
                return None
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def close(self) -> None:
        """Let another watcher heal the machine."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(self._fd)
            self._fd = -1
