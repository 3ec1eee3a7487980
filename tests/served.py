"""How does a test serve the RFC's command on a machine's monitor, as a user does?"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kickcall.lab.machine import LabMachine


@contextlib.contextmanager
def serving(machine: LabMachine, listen: Path, *options: str) -> Iterator[None]:
    """Run `kickcall qmp` on a machine: a monitor that has the RFC's command."""
    command = [sys.executable, "-m", "kickcall", "qmp", machine.name, "--listen", str(listen)]
    command += options
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert "listening" in server.stdout.readline()
            yield
        finally:
            server.terminate()
