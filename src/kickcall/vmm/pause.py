"""How is a register written while the machine is paused for it? Through `vmm/stub_guard.py`.

What is written here is what is asked of that program, and what becomes of it where it is killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kickcall import errors
from kickcall.errors import StubBusyError, StubError
from kickcall.vmm import served, stub_guard
from kickcall.vmm.monitor import CONNECT_TIMEOUT

if TYPE_CHECKING:
    from kickcall.vmm.session import VmmSession

_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from kickcall.vmm.stub_guard import main; main()"
)
_SILENCE_S = 8.0
"""Longer than any step that the guard lets pass: after that both of its processes hang."""
_RESCUE_S = 10.0


@dataclass(frozen=True, slots=True)
class Check:
    """What must stand at a guest-physical address, else nothing is written."""

    address: int
    mask: int
    """Which bits of the little-endian number there. As many words of 32 bits are read."""
    value: int


@dataclass(frozen=True, slots=True)
class RegisterWrite:
    """One register to write, and what proves that it still is that register."""

    address: int
    data: bytes | int
    """What to write; a number is that of the bytes to write back as they stand there then."""
    checks: tuple[Check, ...] = ()
    function: dict[str, Any] | None = None
    """What `query-pci` said of the device when the address was looked up."""


def write_paused(session: VmmSession, write: RegisterWrite) -> float:
    """Pause the machine, check, write, let it run, and return for how many ms it was paused.

    Raises StubBusyError, StaleMapError, QueueNotReadyError or MonitorError, and then nothing was
    written; StubError where that is not known. In each case the machine runs when this returns,
    or the guard goes on until it does.
    """
    machine = session.machine
    if machine.domain is not None:
        # libvirt takes a pause for somebody's wish: it gives the locks of the domain's disks back
        # and, where the domain runs on unasked, does not take them again (libvirt 9.0:
        # qemu_process.c, qemuProcessHandleStop and -Resume). `devices/base.py` says no before.
        raise StubBusyError(
            f"{machine.name} is a libvirt domain, and none is paused behind libvirt's back"
        )
    if any(
        option == "-gdb" and value.startswith("chardev:")
        for option, value in pairwise(machine.command)
    ):
        # Its character device may have any name, so what the guard looks for would not tell.
        raise StubBusyError(f"{machine.name} was started with a gdb stub (-gdb chardev:…)")
    held = served.served_monitor(machine.pid, machine.start_time, own=True)
    order = {
        "pid": machine.pid,
        "start_time": machine.start_time,
        "monitors": [
            *([] if held is None else [held]),
            *(address.path for address in machine.monitors),
        ],
        "folder": f"{stub_guard.FOLDER}{os.getpid()}-{os.urandom(4).hex()}",
        "timeout": CONNECT_TIMEOUT,
        "function": write.function
        and [write.function.get("qdev_id"), write.function.get("regions")],
        "checks": [[check.address, check.mask, check.value] for check in write.checks],
        "writes": [
            [write.address, write.data if isinstance(write.data, int) else write.data.hex()]
        ],
    }
    with _Guard(order) as guard:
        guard.listen(_SILENCE_S)
        told = guard.told
        if not told.ended:
            guard.kill()
            order |= {"socket": told.socket, "rescue": told.phase}
            with _Guard(order) as rescuer:
                rescuer.listen(_RESCUE_S)
                if not rescuer.told.ended:
                    raise StubError(
                        f"{machine.name}: the write was cut short, and the machine does not "
                        "answer: a process of kickcall goes on trying to let it run"
                    )
    if told.pause_ms is not None:
        return told.pause_ms
    if told.error is not None:
        kind = getattr(errors, told.error[0], StubError)
        now = ""
        if told.phase in (stub_guard.PAUSING, stub_guard.RUNNING) and kind is StubError:
            now = "; the machine runs again, and the event may have been raised"
        raise kind(f"{machine.name}: {told.error[1]}{now}")
    if told.phase in (stub_guard.PAUSING, stub_guard.RUNNING):
        raise StubError(
            f"{machine.name}: the write was cut short (a process of kickcall was killed, or QEMU "
            "was too slow); the machine runs, and the event may have been raised"
        )
    raise StubError(
        f"{machine.name}: a process of kickcall was killed before the write: nothing was written"
    )


@dataclass(slots=True)
class _Told:
    """What the guard has told so far."""

    socket: str = ""
    phase: str = stub_guard.START
    writer: int | None = None
    pause_ms: float | None = None
    error: tuple[str, str] | None = None
    ended: bool = False
    """All that has to be made good was made good."""

    def take(self, line: dict[str, Any]) -> None:
        self.socket = line.get("socket", self.socket)
        self.writer = line.get("writer", self.writer)
        self.pause_ms = line.get("pause_ms", self.pause_ms)
        if "error" in line:
            self.error = self.error or (line["error"], line["message"])
        if line.get("phase") == stub_guard.CLOSED or "rescued" in line:
            self.ended = True
        else:
            self.phase = line.get("phase", self.phase)


@dataclass(slots=True)
class _Guard:
    """A guard process at work on an order."""

    order: dict[str, Any]
    told: _Told = field(default_factory=_Told)
    _process: subprocess.Popen[bytes] = field(init=False)

    def __enter__(self) -> Self:
        home = Path(errors.__file__).resolve().parents[1]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, str(home)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # no Ctrl-C, no hang-up of a terminal reaches it
                cwd="/",
            )
        except OSError as exc:
            raise StubError(f"the guard process cannot be started: {exc}") from exc
        assert self._process.stdin is not None
        with suppress(OSError):  # then it is gone, and its silence tells
            self._process.stdin.write(json.dumps(self.order).encode() + b"\n")
            self._process.stdin.close()
        return self

    def listen(self, silence_s: float) -> None:
        """Take in what the guard and the writer tell, until all is done, or both are gone."""
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + silence_s
        said = b""
        while not self.told.ended:
            if not select.select([stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
                return
            data = os.read(stdout.fileno(), 65536)
            if not data:
                return
            deadline = time.monotonic() + silence_s
            *lines, said = (said + data).split(b"\n")
            for line in lines:
                self.told.take(json.loads(line))

    def kill(self) -> None:
        """End both processes, so that nobody else is at work on the stub."""
        self._process.kill()
        writer = self.told.writer
        if writer is not None and _is_guard(writer):
            with suppress(OSError):
                os.kill(writer, signal.SIGKILL)

    def __exit__(self, *_: object) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()
        # A guard that goes on trying is left to it.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0 if self.told.ended else 0.1)


def _is_guard(pid: int) -> bool:
    try:
        return _START.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
