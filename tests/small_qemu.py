"""How is a QEMU started that has no guest, no disks and no lab: only a name and monitors?"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kickcall.lab.process import listens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

BARE = ("-M", "q35", "-accel", "tcg", "-m", "16", "-S", "-nodefaults", "-display", "none")
"""A PC that never runs. It is up in 0.1 s."""


def qemu_binary() -> str:
    found = shutil.which("qemu-system-x86_64")
    assert found is not None
    return found


@contextlib.contextmanager
def small_qemu(
    *arguments: str,
    ready: Path | Callable[[], bool],
    cwd: Path | None = None,
    before: Sequence[str] = (),
    binary: str = "",
    pass_fds: Sequence[int] = (),
) -> Iterator[int]:
    """Run a QEMU while the block lasts and return its pid. `before` is a command that becomes it.

    It is up when `ready` says so, or when it listens at that socket.
    """

    def is_up() -> bool:
        return ready.is_socket() and listens(ready) if isinstance(ready, Path) else ready()

    command = [*before, binary or qemu_binary(), *BARE, *arguments]
    with subprocess.Popen(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=pass_fds
    ) as qemu:
        try:
            deadline = time.monotonic() + 20
            while not is_up():
                if qemu.poll() is not None:
                    assert qemu.stderr is not None
                    raise AssertionError(f"QEMU ended: {qemu.stderr.read().decode()}")
                assert time.monotonic() < deadline, "QEMU does not come up"
                time.sleep(0.01)
            yield qemu.pid
        finally:
            qemu.kill()
