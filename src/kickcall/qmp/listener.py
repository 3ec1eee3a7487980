"""How does the server's socket come into the world, and leave it, without harm?

It is 0600 from its first moment (the umask does it: no chmod after the fact), it never takes the
place of a socket that somebody listens on or of a file that is no socket, and it is removed only
while it is still ours.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import Final

from kickcall.errors import KickcallError

_MAX_PATH: Final = 107
"""Bytes, without the closing NUL (unix(7), sun_path)."""


class ListenError(KickcallError):
    """The socket cannot be made at the path that was asked for."""


class ListeningSocket:
    """A Unix socket that listens at a path, and knows whether that path is still its own."""

    def __init__(self, path: str) -> None:
        """Make the socket. Raises ListenError."""
        self.path = str(Path(path).absolute())
        if len(os.fsencode(self.path)) > _MAX_PATH:
            raise ListenError(f"{self.path}: a socket's path may have {_MAX_PATH} bytes at most")
        _make_room(self.path)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # The umask is the whole process's; nothing else runs yet when the server starts.
            before = os.umask(0o177)
            try:
                self.sock.bind(self.path)
            finally:
                os.umask(before)
            self._inode = _inode(self.path)
            self.sock.listen(64)
            self.sock.setblocking(False)
        except OSError as error:
            self.sock.close()
            raise ListenError(f"cannot listen on {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Stop listening and remove the socket, unless another took its place."""
        self.sock.close()
        with contextlib.suppress(FileNotFoundError):
            if _inode(self.path) == self._inode:
                Path(self.path).unlink()


def _inode(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _make_room(path: str) -> None:
    """Remove a socket that nobody listens on. Raises ListenError for anything else there."""
    try:
        mode = os.lstat(path).st_mode
        inode = _inode(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ListenError(f"cannot listen on {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{path} exists and is no socket: it is left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            pass
        except TimeoutError:
            raise ListenError(f"{path} is in use: somebody listens there") from None
        except OSError as error:
            raise ListenError(f"cannot listen on {path}: {error.strerror}") from error
        else:
            raise ListenError(f"{path} is in use: somebody listens there")
    # Between the look and the removal another server may have come: set aside first, then look.
    aside = f"{path}.{os.getpid()}.dead"
    try:
        Path(path).rename(aside)
        if _inode(aside) != inode:
            os.link(aside, path)
            raise ListenError(f"{path} is in use: another server was faster")
    except OSError as error:
        raise ListenError(f"cannot listen on {path}: {error.strerror}") from error
    finally:
        Path(aside).unlink(missing_ok=True)
