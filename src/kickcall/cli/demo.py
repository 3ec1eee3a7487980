"""The README's story, told by a real machine: lose a kick, lose a call, repair both."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from kickcall.errors import KickcallError, LabError
from kickcall.model import DeviceEvent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from kickcall.lab.guest import Command
    from kickcall.lab.machine import LabMachine

_DEVICE = "vub0"
_HANG_S = 1.0
"""How long a read must have been stuck before the story calls it a hang. A read takes 1 ms."""
_REPAIR_S = 10.0
_SOCKET_WAIT_S = 15.0


def demo(
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Tell the story this often on one machine.")
    ] = 1,
) -> None:
    """Lose a kick and a call on a real guest, and repair both with the RFC's command.

    Boots a Linux guest with a vhost-user disk (no KVM and no root needed), and takes it down again.
    Exits with 0 if every hang was repaired, and with 1 if not.
    """
    from kickcall.lab.boot import boot
    from kickcall.lab.spec import MachineSpec, VhostUserBlk

    name = f"demo{os.getpid()}"
    _say("Booting a Linux guest with a virtio disk that another process serves (vhost-user) …")
    started = time.monotonic()
    spec = MachineSpec(
        name=name, devices=(VhostUserBlk(id=_DEVICE, relay=True, disk="file"),), lab_monitor=False
    )
    with boot(spec, tell=lambda text: _say(f"  {text}")) as machine:
        typer.echo(f"  it is up after {time.monotonic() - started:.1f} s, pid {machine.pid}")
        _run("vms")
        _say("I/O flows:")
        typer.echo(_indent(_read(machine).wait(_REPAIR_S).output))
        listen = machine.folder / "kickcall.sock"
        with _served(name, listen):
            repaired = 0
            for number in range(1, rounds + 1):
                if rounds > 1:
                    _say(f"Round {number} of {rounds}")
                repaired += _lose_and_repair(machine, listen, DeviceEvent.KICK)
                repaired += _lose_and_repair(machine, listen, DeviceEvent.CALL)
    typer.echo(f"\n{repaired} of {2 * rounds} hangs repaired; the machine is taken down")
    if repaired < 2 * rounds:
        raise typer.Exit(1)


def _lose_and_repair(machine: LabMachine, listen: Path, event: DeviceEvent) -> bool:
    """Lose one notification on the way between QEMU and the back-end, and raise it again."""
    sides = "QEMU to the back-end" if event is DeviceEvent.KICK else "the back-end to QEMU"
    _say(f"The next {event} from {sides} is lost, and the guest reads again:")
    relay = machine.relay(_DEVICE)
    before = relay.carried(event, 0).dropped
    relay.drop(event, queue=0)
    reader = _read(machine)
    relay.wait_for(event, 0, dropped=before + 1)
    time.sleep(_HANG_S)
    if reader.done:
        raise LabError(f"the {event} was dropped and the read did not hang: this shows nothing")
    typer.echo(f"  the guest's dd hangs: nothing for {_HANG_S} s")
    _say("Where does the queue stand?")
    _run("show", machine.name, _DEVICE)
    if event is DeviceEvent.KICK:
        typer.echo("  avail is ahead of used, and the kick count is 0: nobody told the back-end.")
    else:
        typer.echo("  used is as far as avail, and past where the driver wanted its call:")
        typer.echo("  the work is done, and nobody told the guest.")
    _say("The RFC's command, on the machine's own monitor:")
    path = f"/machine/peripheral/{_DEVICE}"
    command = {
        "execute": "x-debug-device-event",
        "arguments": {"dev": path, "event": str(event), "queue": 0},
    }
    raised = time.monotonic()
    typer.echo(f"  -> {json.dumps(command)}")
    typer.echo(f"  <- {json.dumps(_ask(listen, command))}")
    try:
        result = reader.wait(_REPAIR_S)
    except LabError:
        typer.echo(f"  the read still hangs after {_REPAIR_S:.0f} s: not repaired")
        reader.kill()
        return False
    typer.echo(f"  dd returned {(time.monotonic() - raised) * 1000:.0f} ms later:")
    typer.echo(_indent(result.output))
    return result.status == 0


def _read(machine: LabMachine) -> Command:
    command = f"dd if={machine.disk(_DEVICE)} of=/dev/null bs=4k count=1 iflag=direct"
    typer.echo(f"  guest: # {command}")
    return machine.guest.start(command)


def _say(text: str) -> None:
    typer.echo(typer.style(f"\n{text}" if not text.startswith(" ") else text, bold=True))


def _indent(text: str) -> str:
    return "\n".join(f"  guest: {line}" for line in text.splitlines())


def _kickcall(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kickcall", *arguments]


def _run(*arguments: str) -> None:
    """Run a kickcall command as the reader would, and show it with its output."""
    typer.echo(f"  $ kickcall {shlex.join(arguments)}")
    done = subprocess.run(_kickcall(*arguments), capture_output=True, text=True, check=False)
    typer.echo("\n".join(f"  {line}".rstrip() for line in done.stdout.splitlines()))
    if done.returncode != 0:
        raise KickcallError(f"`kickcall {shlex.join(arguments)}` failed: {done.stderr.strip()}")


@contextmanager
def _served(name: str, listen: Path) -> Iterator[None]:
    """Run `kickcall qmp` for the machine while the block lasts."""
    _say("The machine's QMP monitor, plus the RFC's command, on a socket of ours:")
    typer.echo(f"  $ kickcall qmp {name} --listen {listen} &")
    server = subprocess.Popen(
        _kickcall("qmp", name, "--listen", str(listen)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + _SOCKET_WAIT_S
        while not listen.exists():
            if server.poll() is not None:
                _, told = server.communicate()
                raise KickcallError(f"`kickcall qmp` ended: {told.strip()}")
            if time.monotonic() > deadline:
                raise KickcallError(f"`kickcall qmp` made no socket in {_SOCKET_WAIT_S:.0f} s")
            time.sleep(0.02)
        yield
    finally:
        server.terminate()
        server.communicate()


def _ask(path: Path, command: Mapping[str, object]) -> dict[str, object]:
    """Send one QMP command as any client would: greet, negotiate, ask."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_REPAIR_S)
        connection.connect(str(path))
        with connection.makefile("rw") as stream:
            stream.readline()
            for message in ({"execute": "qmp_capabilities"}, command):
                stream.write(json.dumps(message) + "\n")
                stream.flush()
                while "event" in (answer := json.loads(stream.readline())):
                    continue
    assert isinstance(answer, dict)
    return answer
