"""`kickcall lab host`: a whole KVM host to try kickcall on, on a machine that may have no KVM."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Annotated

import typer

from kickcall.cli.arguments import JsonOption
from kickcall.cli.output import print_json

if TYPE_CHECKING:
    from kickcall.lab.host import LabHost

app = typer.Typer(
    no_args_is_help=True,
    help="Boot a whole KVM host, whose files are this machine's, and run commands in it.",
)

_DEFAULT_NAME = "kvm-host"

HostName = Annotated[str, typer.Option(metavar="NAME", help="The host's name.")]
Memory = Annotated[int, typer.Option(min=1024, help="The host's memory, MiB.")]
Cpus = Annotated[
    int | None,
    typer.Option(min=1, max=64, help="The host's CPUs.  [default: 2; 1 under TCG]"),
]
Assignable = Annotated[
    bool,
    typer.Option("--assignable", help="With an IOMMU, and an NVMe controller to give a guest."),
]


@app.command()
def up(
    name: HostName = _DEFAULT_NAME,
    memory: Memory = 4096,
    cpus: Cpus = None,
    assignable: Assignable = False,
    json: JsonOption = False,
) -> None:
    """Boot a KVM host; it runs until `kickcall lab host down`.

    It needs no hardware virtualization and no root. It sees this machine's files, and what it
    writes to them stays in its memory. Its kernel is downloaded into a cache, never installed.

    Examples:

        kickcall lab host up

        kickcall lab host run -- kickcall lab up vm0 --device vhost-scsi,queues=2
    """
    host = _boot(name, memory, cpus, assignable, outlives=True)
    if json:
        print_json(
            {
                "name": host.name,
                "pid": host.machine.pid,
                "folder": str(host.machine.folder),
                "shared": str(host.shared),
            }
        )
        return
    typer.echo(f"{host.name} is up: QEMU is process {host.machine.pid}")
    typer.echo(f"shared folder, with the same path in the host:  {host.shared}")
    typer.echo("Try:  kickcall lab host run -- kickcall lab up vm0 --device vhost-scsi,queues=2")


@app.command(context_settings={"ignore_unknown_options": True})
def run(
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND…", help="A program and its arguments, after --."),
    ],
    name: HostName = _DEFAULT_NAME,
    memory: Memory = 4096,
    cpus: Cpus = None,
    assignable: Assignable = False,
) -> None:
    """Run a program in the KVM host, as root, and exit with its status.

    It runs in the same folder as here and with the same environment, and what it prints is shown
    as it is printed. Several may run at once. If no host is up, one is booted for this command
    and taken down after it. Files to keep go to the folder $KICKCALL_LAB_SHARED.

    Examples:

        kickcall lab host run -- kickcall vms

        kickcall lab host run -- sh -c 'cat /proc/interrupts | grep -i msi'
    """
    from kickcall.lab.host import LabHost

    # As at Ctrl-C: the command is told, and a host of this command's own goes down with it.
    signal.signal(signal.SIGTERM, _interrupted)
    if LabHost.is_up(name):
        raise typer.Exit(LabHost.find(name).run(command))
    with _boot(name, memory, cpus, assignable, outlives=False) as host:
        status = host.run(command)
    raise typer.Exit(status)


@app.command()
def down(name: HostName = _DEFAULT_NAME) -> None:
    """Take the KVM host down, with all that was booted in it.

    Example:

        kickcall lab host down
    """
    from kickcall.lab.host import LabHost

    LabHost.find(name).close()
    typer.echo(f"{name} is down")


def _boot(name: str, memory: int, cpus: int | None, assignable: bool, *, outlives: bool) -> LabHost:
    from kickcall.lab.host import boot_host

    return boot_host(
        name,
        memory_mib=memory,
        cpus=cpus,
        assignable=assignable,
        outlives=outlives,
        tell=lambda step: typer.echo(f"lab: {step}", err=True),
    )


def _interrupted(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
