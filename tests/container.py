"""How does a machine run that is in a container: with a root, a network and pids of its own?

As KubeVirt runs it: what lies in its folders is not on the host, its first process has number 1,
and its QEMU names its threads by numbers that mean others outside.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from kickcall.lab.command_line import machine_arguments
from kickcall.lab.machine import LabMachine
from kickcall.lab.process import LabProcess, running_since
from kickcall.vmm.find import find
from small_qemu import qemu_binary
from witness import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.lab.spec import MachineSpec

NAMESPACES = (
    *("unshare", "--mount", "--pid", "--net", "--fork", "--kill-child"),
    *("--propagation", "private"),
)
FOLDER = "/tmp/run"
"""The machine's sockets, as it sees them itself; /tmp is its own. /tmp/link leads there."""
_INSIDE = """
set -e
mount -t proc none /proc
mount -t tmpfs none /tmp
mkdir /tmp/run
ln -s /tmp/run /tmp/link
head -c 65536 /dev/zero | tr '\\0' '\\364' > /tmp/halt.bin
exec {command}
"""


@contextlib.contextmanager
def contained(spec: MachineSpec) -> Iterator[LabMachine]:
    """Run a machine without a guest in a container while the block lasts; `Qtest` drives it."""
    spec = spec.complete()
    command = [
        *(qemu_binary(), *machine_arguments(spec, FOLDER), *spec.arguments),
        *("-accel", "tcg", "-bios", "/tmp/halt.bin"),
        *("-qtest", f"unix:{FOLDER}/qtest,server=on,wait=off", "-qtest-log", "none"),
    ]
    inside = _INSIDE.format(command=shlex.join(command))
    with subprocess.Popen([*NAMESPACES, "sh", "-c", inside], stdin=subprocess.DEVNULL) as outer:
        try:
            until(
                lambda: outer.poll() is not None or pids_called(spec.name),
                f"{spec.name} runs in its container",
            )
            (pid,) = pids_called(spec.name)
            folder = Path(f"/proc/{pid}/root{FOLDER}")
            until((folder / "qtest").is_socket, f"{spec.name} is up")
            since = running_since(pid)
            assert since is not None
            yield LabMachine(folder, spec, [LabProcess("qemu", pid, since)])
        finally:
            outer.kill()


def pids_called(name: str) -> list[int]:
    return [machine.pid for machine in find() if machine.name == name]
