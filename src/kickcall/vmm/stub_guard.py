"""Who makes sure that a machine that was paused for a write runs again, whatever gets killed?

This program. kickcall starts it in a session of its own and gives it one order: which registers to
write through the gdb stub. It makes two processes:

    kickcall ── guard ── writer

The writer does everything: opens the stub, connects (that pauses the machine), checks, writes, lets
the machine run, closes the stub. It needs nobody for that, so killing kickcall or the guard changes
nothing. The guard only waits. Where the writer dies, or does not get on while the machine is
paused, the guard ends it, lets the machine run and closes the stub, and tries on as long as the
machine's process lives. Where both are gone kickcall starts another guard (`vmm/pause.py`).

Before each step that has to be made good the writer says so on a pipe, so that whoever takes over
knows how far it came. docs/safety.md has every case.

Standard library and four small files only: it is there in some ten milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from kickcall.errors import (
    KickcallError,
    MonitorError,
    QmpCommandError,
    QueueNotReadyError,
    StubBusyError,
)
from kickcall.vmm.gdbstub import Stub
from kickcall.vmm.guard_monitor import GuardMonitor, open_first

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# How far the writer is.
START: Final = "start"
OPENING: Final = "opening"
"""From here on a stub of ours may be open."""
PAUSING: Final = "pausing"
"""From here on the machine may be paused by us, and the stub be in physical memory mode."""
RUNNING: Final = "running"
"""It runs again."""
CLOSED: Final = "closed"

_PRIORITY: Final = -20
_PAUSED_MAX_S: Final = 0.4
"""Seconds that the writer may need from the pause until the machine runs again."""
_STEP_MAX_S: Final = 5.0
_CLOSING_S: Final = 2.0
_RESCUE_S: Final = 0.3
_RETRY_S: Final = 0.05
_ANSWER_S: Final = 0.2
"""Seconds for the monitor to answer while the machine is paused."""
FOLDER: Final = "kickcall-stub-"
_MIGRATES: Final = frozenset(
    {"setup", "active", "device", "pre-switchover", "postcopy-active", "wait-unplug", "cancelling"}
)
"""When source and destination must not both run (qapi/migration.json, MigrationStatus)."""
_STARTED: Final = 18
"""Index of the start time behind the state in /proc/PID/stat (proc(5): fields 22 and 3)."""
_FOLDERS: Final = ("/tmp", "/run", "/var/tmp")


def main() -> None:
    """Carry out the order on standard input, and tell on standard output how it goes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        # On a busy host the machine would stay paused while we wait for a processor.
        os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)
    text = sys.stdin.buffer.read()
    if not text.endswith(b"\n"):
        return  # kickcall ended before it had said all
    order = json.loads(text)
    if "rescue" in order:
        tell(_rescued(order, order["rescue"]))
        return
    try:
        order["socket"] = _make_folder(order) + "/gdb"
    except OSError as exc:
        tell({"error": "StubError", "message": f"it has no place for a socket: {exc}"})
        tell({"phase": CLOSED})
        return
    tell({"socket": order["socket"]})
    _guard(order)


def tell(message: dict[str, Any]) -> None:
    """Write one line for kickcall, if it is still there."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


def _guard(order: dict[str, Any]) -> None:
    """Watch over the writer until it is done, or do what it left undone."""
    told, says = os.pipe()
    writer = os.fork()
    if writer == 0:
        os.close(told)
        status = 1
        try:
            _writer(order, says)
            status = 0
        finally:
            os._exit(status)
    os.close(says)
    phase = START
    poll = select.poll()
    poll.register(told, select.POLLIN)
    said = b""
    while phase != CLOSED:
        patience = _PAUSED_MAX_S if phase == PAUSING else _STEP_MAX_S
        if not poll.poll(patience * 1000):
            break
        data = os.read(told, 4096)
        if not data:
            break
        said += data
        *lines, said = said.split(b"\n")
        phase = lines[-1].decode() if lines else phase
    else:
        os.waitpid(writer, 0)
        return
    os.kill(writer, signal.SIGKILL)  # our own child, not yet waited for: it can be no other
    os.waitpid(writer, 0)
    tell(_rescued(order, phase))


# The writer


def _writer(order: dict[str, Any], guard: int) -> None:
    phase = START

    def mark(reached: str) -> None:
        nonlocal phase
        phase = reached
        with contextlib.suppress(OSError):  # a guard that is gone guards no more
            os.write(guard, phase.encode() + b"\n")
        tell({"phase": phase, "writer": os.getpid()})

    try:
        _carry_out(order, mark)
    except (KickcallError, OSError, ValueError, KeyError) as exc:
        tell({"error": type(exc).__name__, "message": str(exc)})
        if phase != START:
            raise  # the guard makes it good
    _remove_folder(order)
    mark(CLOSED)


def _carry_out(order: dict[str, Any], mark: Callable[[str], None]) -> None:
    with open_first(order["monitors"], order["timeout"]) as monitor:
        monitor.extend(_STEP_MAX_S / 2)
        _check_may_pause(monitor)
        mark(OPENING)
        _open_stub(monitor, order)
        mark(PAUSING)
        tell(_write(monitor, order, mark))
        monitor.extend(_CLOSING_S)
        _close_stub(monitor, order)


def _check_may_pause(monitor: GuardMonitor) -> None:
    status = monitor.execute("query-status")
    if not status["running"]:
        raise QueueNotReadyError(f"it is not running (QEMU: {status['status']})")
    migration = monitor.execute("query-migrate").get("status")
    if migration in _MIGRATES:
        raise StubBusyError(f"it is being migrated ({migration}) and may not be paused")
    stub = _stub(monitor)
    if stub is not None and FOLDER in stub:
        raise StubBusyError(
            "another kickcall is at work on its gdb stub, or was killed with all its processes "
            f"({stub}): then type `gdbserver none` and `cont` on its monitor"
        )
    if stub is not None:
        raise StubBusyError(
            f"its gdb stub is in use ({stub}), and a debugger's stub is left alone: close it first"
        )


def _stub(monitor: GuardMonitor) -> str | None:
    """Return where the machine's gdb stub listens, None where it has none.

    Its character device is always called `gdb` (gdbstub.c, gdbserver_start).
    """
    for device in monitor.execute("query-chardev"):
        if device["label"] == "gdb":
            return str(device["filename"])
    return None


def _open_stub(monitor: GuardMonitor, order: dict[str, Any]) -> None:
    """Open the stub. Where somebody opened another meanwhile QEMU refuses, and closes none."""
    said = monitor.hmp(f"gdbserver unix:{order['socket']},server=on,wait=off")
    if order["socket"] not in (_stub(monitor) or ""):
        reason = " ".join(said.split()) or "it said nothing"
        raise StubBusyError(f"QEMU opens no gdb stub: {reason}")


def _close_stub(monitor: GuardMonitor, order: dict[str, Any]) -> None:
    if order["socket"] in (_stub(monitor) or ""):
        monitor.hmp("gdbserver none")


def _write(
    monitor: GuardMonitor, order: dict[str, Any], mark: Callable[[str], None]
) -> dict[str, Any]:
    """Pause, check, write, let run. Whatever is found, the machine is let go of again."""
    asked_at = time.time()
    began = time.monotonic()
    with Stub(_from_here(order), _PAUSED_MAX_S) as stub:
        stub.physical(True)
        ours, problem = _paused_by_us(monitor, asked_at)
        problem = problem or _changed(monitor, stub, order)
        if not problem:
            for address, data in order["writes"]:
                # A number of bytes: nobody but us can change them now, so they are written back.
                kept = isinstance(data, int)
                stub.write(address, stub.read(address, data) if kept else bytes.fromhex(data))
        stub.physical(False)
        if ours:
            stub.detach()
        ended = time.monotonic()
        mark(RUNNING)
    if problem:
        return {"error": "StaleMapError", "message": f"{problem}; nothing was written"}
    return {"pause_ms": round((ended - began) * 1000, 3)}


def _paused_by_us(monitor: GuardMonitor, asked_at: float) -> tuple[bool, str]:
    """Tell whether it was our connection that paused the machine; and if not, what did.

    QEMU tells once that it stopped, and when: before we connected it was for somebody else.
    """
    monitor.extend(_ANSWER_S)
    try:
        state = monitor.execute("query-status")["status"]
    except MonitorError as exc:
        return True, str(exc)
    stopped = False
    for event in monitor.events:
        at = event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
        if at < asked_at and event["event"] in ("STOP", "RESUME"):
            stopped = event["event"] == "STOP"
    if stopped or state != "paused":
        return False, f"somebody else paused it meanwhile, and it stays so (QEMU: {state})"
    return True, ""


def _changed(monitor: GuardMonitor, stub: Stub, order: dict[str, Any]) -> str:
    """Return what is not as it was when the registers were looked up; nothing where all is.

    The machine is paused: what holds now holds when the write is made.
    """
    if order["function"]:
        try:
            buses = monitor.execute("query-pci")
        except MonitorError as exc:
            return str(exc)
        if order["function"] not in _functions(buses):
            return "the device's registers were moved"
    for address, mask, expected in order["checks"]:
        found = int.from_bytes(stub.read(address, -(-mask.bit_length() // 32) * 4), "little")
        if found & mask != expected:
            return f"what stands at {address:#x} changed"
    return ""


def _functions(buses: list[dict[str, Any]]) -> Iterator[list[Any]]:
    """Yield the id and the registers of every PCI function, behind bridges, too."""
    for bus in buses:
        for entry in bus.get("devices", ()):
            yield [entry.get("qdev_id"), entry["regions"]]
            if "pci_bridge" in entry:
                yield from _functions([entry["pci_bridge"]])


# What a writer left undone


def _rescued(order: dict[str, Any], phase: str) -> dict[str, Any]:
    """Close the stub, and let the machine run if it was paused by us. Does not give up."""
    problem = ""
    paused = phase == PAUSING
    while phase != START and _lives(order):
        if phase == PAUSING:
            with contextlib.suppress(KickcallError, OSError):
                _let_run(order)
                phase = RUNNING
        try:
            with open_first(order["monitors"], _RESCUE_S) as monitor:
                monitor.extend(_CLOSING_S)
                _close_stub(monitor, order)
                # Without a stub nothing of ours can pause it again.
                if paused and monitor.execute("query-status")["status"] == "paused":
                    monitor.execute("cont")
                if order["socket"] not in (_stub(monitor) or ""):
                    break
        except QmpCommandError as exc:
            problem = str(exc)
            break
        except (KickcallError, OSError, ValueError, KeyError):
            time.sleep(_RETRY_S)
    _remove_folder(order)
    return {"rescued": phase, "message": problem}


def _let_run(order: dict[str, Any]) -> None:
    """Leave the physical memory mode, which outlives the connection, and let the machine run."""
    with Stub(_from_here(order), _RESCUE_S) as stub:
        stub.physical(False)
        stub.detach()


# The socket's place


def _make_folder(order: dict[str, Any]) -> str:
    """Make a folder that only QEMU can enter; return its path as QEMU sees it."""
    failure: OSError | None = None
    for place in _FOLDERS:
        path = f"/proc/{order['pid']}/root{place}/{order['folder']}"
        try:
            os.mkdir(path, 0o700)
        except OSError as exc:
            failure = failure or exc
            continue
        owner = _owner(order["pid"])
        if owner[0] != os.geteuid():
            os.chown(path, *owner, follow_symlinks=False)
        return f"{place}/{order['folder']}"
    raise failure or OSError("no folder")


def _owner(pid: int) -> tuple[int, int]:
    """Return the effective user and group of a process (proc_pid_status(5))."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        ids = dict(line.split(":", 1) for line in file if line.startswith(("Uid:", "Gid:")))
    return int(ids["Uid"].split()[1]), int(ids["Gid"].split()[1])


def _remove_folder(order: dict[str, Any]) -> None:
    # A machine that ended takes /proc/PID/root with it; then its root was most probably ours.
    for root in (f"/proc/{order['pid']}/root", ""):
        for place in _FOLDERS:
            path = f"{root}{place}/{order['folder']}"
            with contextlib.suppress(OSError):
                os.unlink(f"{path}/gdb")
            with contextlib.suppress(OSError):
                os.rmdir(path)


def _from_here(order: dict[str, Any]) -> str:
    """Return the stub's socket as this process finds it."""
    return f"/proc/{order['pid']}/root{order['socket']}"


def _lives(order: dict[str, Any]) -> bool:
    """Tell whether the machine's process is still there."""
    try:
        with open(f"/proc/{order['pid']}/stat", encoding="utf-8", errors="replace") as file:
            state, *fields = file.read().rpartition(")")[2].split()
    except OSError:
        return False
    return state not in "ZX" and int(fields[_STARTED]) == order["start_time"]
