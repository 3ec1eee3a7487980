"""Where does the lab keep what it downloads and builds, so that two processes can share it?"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kickcall.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Tell = Callable[[str], None]
"""Is told, in one line, about any step that takes more than a second."""

_log = logging.getLogger("kickcall.lab")


def log_progress(step: str) -> None:
    """The default `Tell`: Python's logging, at level INFO."""
    _log.info("%s", step)


def cache_folder() -> Path:
    """Return $KICKCALL_CACHE, else kickcall in $XDG_CACHE_HOME, else ~/.cache/kickcall."""
    if own := os.environ.get("KICKCALL_CACHE"):
        folder = Path(own)
    elif xdg := os.environ.get("XDG_CACHE_HOME"):
        folder = Path(xdg) / "kickcall"
    else:
        folder = Path.home() / ".cache" / "kickcall"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(
            f"the lab's cache {folder} cannot be made: {error.strerror}; set KICKCALL_CACHE"
        ) from error
    return folder.resolve()


def built(name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the cache; if there is none, let `build` fill it first.

    Another process sees either nothing or the whole folder: it is filled under another name
    and renamed. A lock keeps two processes from doing the same minutes of work at once.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    with locked(name):
        if folder.is_dir():
            return folder
        unfinished = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
        try:
            unfinished.chmod(0o755)
            build(unfinished)
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return folder


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock `name`; it ends with the process that holds it."""
    with (cache_folder() / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def tool(name: str, package: str) -> str:
    """Return the path of a program. Raises LabError that names its Debian package."""
    # Debian's PATH for users has no sbin, where chroot and debootstrap are.
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    found = shutil.which(name, path=path)
    if found is None:
        raise LabError(f"the lab needs {name}, which is not here: apt-get install {package}")
    return found


def run_tool(
    command: Sequence[str | Path], *, doing: str, hint: str = "", cwd: Path | None = None
) -> str:
    """Return what a tool prints. Raises LabError with the last line of its complaint."""
    done = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
    )
    if done.returncode:
        complaint = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise LabError(
            f"{doing} failed: {Path(command[0]).name} said: {complaint}"
            + (f" ({hint})" if hint else "")
        )
    return done.stdout
