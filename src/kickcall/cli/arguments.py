"""The arguments that several commands take: how they are read, and how a shell completes them."""

from __future__ import annotations

from typing import Annotated

import typer


def complete_machine(incomplete: str) -> list[str]:
    """Return the names of the machines that run here."""
    from kickcall.vmm.find import find

    return [machine.name for machine in find() if machine.name.startswith(incomplete)]


def seconds_of(text: str) -> float:
    """Return a duration in seconds. Raises UsageError where `text` is none."""
    from kickcall.errors import UsageError

    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
    number = text.rstrip("mshd")
    try:
        value = float(number) * units[text[len(number) :]]
    except (ValueError, KeyError):
        value = -1.0
    if not 0 < value <= 366 * 86400:
        raise UsageError(f"{text!r} is no duration: write 2s, 500ms, 1m or 1h")
    return value


MachineArgument = Annotated[
    str,
    typer.Argument(
        metavar="MACHINE",
        help="A name, a pid, libvirt:DOMAIN, or qmp:PATH.",
        autocompletion=complete_machine,
        show_default=False,
    ),
]
MachinesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MACHINE]...",
        help="Names, pids or qmp:PATHs; all that run here if none is given.",
        autocompletion=complete_machine,
        show_default=False,
    ),
]
DeviceArgument = Annotated[
    str,
    typer.Argument(metavar="DEVICE", help="An id (vscsi0) or a QOM path.", show_default=False),
]
OptionalDevice = Annotated[
    str | None,
    typer.Argument(metavar="[DEVICE]", help="An id (vscsi0) or a QOM path.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
