"""`kickcall qmp`: the machine's monitor plus the RFC's command, on a socket for any QMP client."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def qmp(
    machine: Annotated[
        str,
        typer.Argument(
            help="Name, pid, libvirt:DOMAIN, or qmp:PATH of a running QEMU.", show_default=False
        ),
    ],
    listen: Annotated[
        Path,
        typer.Option(
            "--listen", "-l", help="Where to make the socket (mode 0600).", show_default=False
        ),
    ],
    allow_pause: Annotated[
        bool,
        typer.Option(
            "--allow-pause",
            help="An event may pause the machine for milliseconds where nothing else applies.",
        ),
    ] = False,
) -> None:
    """Serve a machine's own QMP monitor, with x-debug-device-event, to many clients at once.

    The socket is the monitor of an unmodified QEMU and takes one command more:

    \b
    {"execute": "x-debug-device-event",
     "arguments": {"dev": "/machine/peripheral/vscsi0", "event": "kick", "queue": 3}}

    Everything else passes through: replies, events, errors, out-of-band commands. While this
    runs, other kickcall commands on that machine go through it by themselves. It stays in the
    foreground, and ends with the machine, with SIGTERM or with Ctrl-C.

    \b
    kickcall qmp vm0 --listen /run/vm0.qmp
    kickcall qmp qmp:/var/run/qemu/vm0.sock --listen /run/vm0.qmp
    kickcall qmp libvirt:vm0 --listen /run/vm0.qmp
    kickcall qmp vm0 --listen /run/vm0.qmp --allow-pause
    qmp-shell /run/vm0.qmp
    socat - UNIX-CONNECT:/run/vm0.qmp
    """
    from kickcall.cli.journal import warn
    from kickcall.errors import MonitorBusyError, MonitorError, MonitorGoneError, UsageError
    from kickcall.qmp.server import Callbacks, Ended, run
    from kickcall.qmp.upstream import Greeted, greet
    from kickcall.vmm.find import resolve
    from kickcall.vmm.served import served_monitor
    from kickcall.watch.witness import JournalWitness

    if listen == Path():
        raise UsageError("--listen needs the path of a socket")
    found, path = resolve(machine)
    held = served_monitor(found.pid, found.start_time)
    if held is not None:
        raise MonitorBusyError(f"a kickcall qmp serves machine {found.name} already: {held}")
    paths = [path] if path else [monitor.path for monitor in found.monitors]
    through_libvirt = f"libvirt:{found.domain.name}" if found.domain and not path else None
    if through_libvirt is not None:
        paths.append(through_libvirt)
    if not paths:
        raise MonitorError(
            f"machine {found.name} (pid {found.pid}) has no QMP monitor: "
            "start its QEMU with -qmp unix:PATH,server=on,wait=off"
        )

    def take_domain(_: str) -> Greeted:
        from kickcall.qmp.domain import greet_domain

        return greet_domain(found)

    callbacks = Callbacks(
        listening=lambda where: typer.echo(
            f"listening on {where} (machine {found.name}, pid {found.pid}); try: qmp-shell {where}"
        ),
        warning=warn,
        witness=JournalWitness("kickcall qmp", warn),
        allow_pause=allow_pause,
    )
    for upstream in paths:
        try:
            taken = take_domain if upstream == through_libvirt else greet
            ended = run(found.pid, found.start_time, upstream, str(listen), callbacks, taken)
            break
        except (MonitorBusyError, MonitorGoneError):
            # Another of the machine's monitors may be free.
            if upstream == paths[-1]:
                raise
    match ended:
        case Ended.MACHINE:
            typer.echo(f"machine {found.name} has ended; {listen} is removed")
        case Ended.SIGNAL:
            typer.echo(f"stopped; machine {found.name} goes on, {listen} is removed")
        case Ended.MONITOR:
            raise MonitorGoneError(
                f"machine {found.name} closed its monitor {upstream} and goes on; "
                f"{listen} is removed"
            )
