"""`kickcall lab`: real machines to break on purpose."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer

from kickcall.cli import lab_host
from kickcall.cli.arguments import JsonOption
from kickcall.cli.output import print_json, print_table

if TYPE_CHECKING:
    from kickcall.lab.machine import LabMachine
    from kickcall.lab.spec import AnyDevice

app = typer.Typer(
    no_args_is_help=True,
    help="Boot real virtual machines, run commands in their guests, and lose their notifications.",
)
app.add_typer(lab_host.app, name="host")

_DEFAULT_DEVICES = ("virtio-blk", "virtio-scsi", "virtio-net", "vhost-user-blk")


class Notification(enum.StrEnum):
    """What can be lost."""

    KICK = "kick"
    CALL = "call"


Name = Annotated[
    str, typer.Argument(metavar="NAME", help="The lab machine's name.", show_default=False)
]


@app.command()
def up(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A name for the machine.", show_default=False)
    ],
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="KIND,NAME=VALUE,… (again for each device). KIND: virtio-blk, virtio-scsi, "
            "virtio-net, vhost-user-blk, vhost-scsi, vhost-net, vhost-vsock (as root, on a KVM "
            "host), or any QEMU driver. NAME: id, queues, packed=on, "
            "iothread=on, relay=off, disk=null|file, size-mib, legacy=auto|off|only, "
            "event-idx=off, mmio=on, or any property of QEMU's device. Without: one of each kind.",
            metavar="DEVICE",
            show_default=False,
        ),
    ] = None,
    board: Annotated[
        str, typer.Option(help="q35; microvm: no PCI, virtio-mmio; virt: a guest of aarch64.")
    ] = "q35",
    qemu: Annotated[
        str, typer.Option(help="system, or a Debian release whose QEMU to run (needs root).")
    ] = "system",
    memory: Annotated[int, typer.Option(min=128, help="Guest memory, MiB.")] = 256,
    cpus: Annotated[int, typer.Option(min=1, max=64, help="Virtual CPUs.")] = 2,
    monitors: Annotated[int, typer.Option(min=1, max=16, help="QMP sockets.")] = 1,
    json: JsonOption = False,
) -> None:
    """Boot a machine with a real Linux guest; it runs until `kickcall lab down`.

    The guest's kernel is downloaded into a cache the first time, and never installed.

    Examples:

        kickcall lab up vm0 --device virtio-blk,iothread=on,queues=2

        kickcall lab up vm1 --device vhost-user-blk --qemu trixie

        kickcall lab up vm2 --board virt --device virtio-blk --device virtio-blk,mmio=on
    """
    from kickcall.lab.boot import boot
    from kickcall.lab.spec import MachineSpec
    from kickcall.lab.spec_text import parse_board, parse_device

    spec = MachineSpec(
        name=name,
        devices=tuple(parse_device(text) for text in device or _DEFAULT_DEVICES),
        memory_mib=memory,
        cpus=cpus,
        monitors=monitors,
        board=parse_board(board),
        qemu=qemu,
    )
    machine = boot(spec, outlives=True, tell=lambda step: typer.echo(f"lab: {step}", err=True))
    if json:
        print_json(_facts(machine))
        return
    typer.echo(f"{machine.name} is up: QEMU is process {machine.pid}")
    for path in machine.qmp_paths:
        typer.echo(f"QMP:  {path}")
    print_table(
        ("device", "kind", "in the guest", "relay"),
        [
            (
                spec.id,
                _kind(spec),
                _in_the_guest(machine, spec),
                "yes" if getattr(spec, "relay", False) else "",
            )
            for spec in machine.spec.devices
        ],
    )
    typer.echo(f"Try:  kickcall lab console {name} -- cat /proc/interrupts")


@app.command()
def ls(json: JsonOption = False) -> None:
    """List your lab machines.

    Example:

        kickcall lab ls --json
    """
    from kickcall.lab.machine import machines

    found = machines()
    if json:
        print_json([_facts(machine) for machine in found])
        return
    if not found:
        typer.echo("no lab machine is up; boot one: kickcall lab up vm0")
        return
    print_table(
        ("machine", "#pid", "state", "qemu", "devices"),
        [
            (
                machine.name,
                machine.pid if machine.alive else None,
                "running" if machine.alive else "ended",
                machine.spec.qemu,
                ", ".join(device.id for device in machine.spec.devices),
            )
            for machine in found
        ],
    )


@app.command(context_settings={"ignore_unknown_options": True})
def console(
    name: Name,
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND…", help="A shell command, after --.", show_default=False),
    ],
    timeout: Annotated[
        float | None, typer.Option(help="Stop waiting after this many seconds.", show_default=False)
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Start the command and do not wait for it.")
    ] = False,
) -> None:
    """Run a command in a guest, print its output, and exit with its status.

    Works while other commands hang.

    Example:

        kickcall lab console vm0 -- cat /proc/interrupts
    """
    from kickcall.lab.machine import LabMachine

    # Joined as ssh does it: what the local shell left is for the guest's shell.
    started = LabMachine.find(name).guest.start(" ".join(command))
    if detach:
        return
    status, output = started.wait(float("inf") if timeout is None else timeout)
    typer.echo(output, nl=False)
    raise typer.Exit(status)


@app.command("break")
def break_(
    name: Name,
    device: Annotated[
        str,
        typer.Argument(
            metavar="DEVICE",
            help="A device, as blk0. Without --fault: a vhost-user device with a relay, as vub0.",
            show_default=False,
        ),
    ],
    fault: Annotated[
        str | None,
        typer.Option(
            help="Break a queue in this way (`kickcall lab faults` lists them) until Ctrl-C.",
            show_default=False,
        ),
    ] = None,
    hold: Annotated[
        float | None,
        typer.Option(
            min=0, help="With --fault: repair it after this many seconds.", show_default=False
        ),
    ] = None,
    drop: Annotated[Notification | None, typer.Option(help="Lose the next of these.")] = None,
    delay: Annotated[
        Notification | None, typer.Option(help="Carry the next of these late.")
    ] = None,
    double: Annotated[
        Notification | None, typer.Option(help="Carry the next of these twice.")
    ] = None,
    queue: Annotated[
        int | None, typer.Option(min=0, help="Which queue; any if not given.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1,
    seconds: Annotated[float, typer.Option(min=0, help="How late, with --delay.")] = 1.0,
    clear: Annotated[
        bool, typer.Option("--clear", help="Forget what was asked for and has not happened.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Lose, delay or double a device's next notifications, and show what its relay carried.

    Example:

        kickcall lab break vm0 vub0 --queue 0 --drop kick --count 1
        kickcall lab break vm0 blk0 --fault lost-call
    """
    from kickcall.errors import UsageError
    from kickcall.lab.machine import LabMachine

    if fault is not None:
        if drop or delay or double or clear or json:
            raise UsageError("--fault stands alone: the relay is asked in another command")
        _break_until(name, device, queue, fault, hold)
        return
    relay = LabMachine.find(name).relay(device)
    if clear:
        relay.clear()
    if drop:
        relay.drop(drop, queue, count)
    if delay:
        relay.delay(delay, queue, count, seconds=seconds)
    if double:
        relay.double(double, queue, count)
    rows = relay.report()
    if json:
        print_json(rows)
        return
    print_table(
        ("queue", "event", "#passed", "#dropped", "#delayed", "#doubled", "#still to come"),
        [
            (
                "any" if row.queue is None else row.queue,
                row.event,
                row.passed,
                row.dropped,
                row.delayed,
                row.doubled,
                row.pending,
            )
            for row in rows
        ],
    )


@app.command()
def faults(json: JsonOption = False) -> None:
    """List the faults of `kickcall lab break --fault`.

    Example:

        kickcall lab faults
    """
    from kickcall.lab.faults import FAULTS

    if json:
        print_json([{"name": fault.name, "what": fault.what} for fault in FAULTS.values()])
        return
    print_table(
        ("fault", "what is broken"), [(fault.name, fault.what) for fault in FAULTS.values()]
    )


def _break_until(
    name: str, device: str, queue: int | None, fault_name: str, hold: float | None
) -> None:
    """Break a queue, say how that is known, and repair it after `hold` seconds or at Ctrl-C."""
    import signal

    from kickcall.errors import UsageError
    from kickcall.lab.faults import FAULTS
    from kickcall.lab.faults_target import Target
    from kickcall.lab.machine import LabMachine

    if (fault := FAULTS.get(fault_name)) is None:
        raise UsageError(f"no fault is called {fault_name}: kickcall lab faults lists them")
    ending = {signal.SIGINT, signal.SIGTERM}
    # Waited for, not handled: the repair must not be cut short.
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    try:
        with Target(LabMachine.find(name), device, queue) as target:
            with fault.on(target) as proof:
                typer.echo(f"queue {target.number} of {device} is broken: {proof}")
                until = "Ctrl-C" if hold is None else f"{hold:g} s or Ctrl-C"
                typer.echo(f"until {until}; meanwhile try:  kickcall diagnose {name}", err=True)
                if hold is None:
                    signal.sigwait(ending)
                else:
                    signal.sigtimedwait(ending, hold)
            after = "only a reboot helps" if fault.undone_by == "reboot" else "repaired"
            typer.echo(f"queue {target.number} of {device}: {after}")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ending)


@app.command()
def down(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="The lab machine's name.", show_default=False),
    ] = None,
    all_machines: Annotated[bool, typer.Option("--all", help="All of your lab machines.")] = False,
) -> None:
    """Take a machine down: its processes, sockets and disks.

    Example:

        kickcall lab down vm0
    """
    from kickcall.errors import UsageError
    from kickcall.lab.machine import LabMachine, machines

    if (name is None) != all_machines:
        raise UsageError("say which machine to take down, or --all: kickcall lab ls lists them")
    for machine in machines() if name is None else [LabMachine.find(name)]:
        machine.close()
        typer.echo(f"{machine.name} is down")


def _facts(machine: LabMachine) -> dict[str, object]:
    """Return what --json shows of a machine; its keys do not change."""
    return {
        "name": machine.name,
        "pid": machine.pid if machine.alive else None,
        "running": machine.alive,
        "qemu": machine.spec.qemu,
        "qmp": [str(path) for path in machine.qmp_paths],
        "folder": str(machine.folder),
        "devices": [
            {
                "id": device.id,
                "kind": _kind(device),
                "pci": f"0000:00:{device.slot:02x}.0",
                "queues": getattr(device, "queues", None),
                "relay": bool(getattr(device, "relay", False)),
            }
            for device in machine.spec.devices
        ],
    }


def _in_the_guest(machine: LabMachine, device: AnyDevice) -> str:
    """Return what the guest has of a device: its disk, or the address there."""
    match device.kind:
        case "virtio-blk" | "virtio-scsi" | "vhost-user-blk" | "vhost-scsi":
            return machine.disk(device.id)
        case "vhost-net":
            return f"{machine.guest_address(device.id)} (host: {machine.host_address(device.id)})"
        case "vhost-vsock":
            return f"CID {machine.guest_cid(device.id)}"
        case _:
            return ""


def _kind(device: AnyDevice) -> str:
    return getattr(device, "driver", device.kind)
