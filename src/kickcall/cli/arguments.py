"""The arguments that several commands take, and how a shell completes them."""

from __future__ import annotations

from typing import Annotated

import typer


def complete_machine(incomplete: str) -> list[str]:
    """Return the names of the machines that run here."""
    from kickcall.vmm.find import find

    return [machine.name for machine in find() if machine.name.startswith(incomplete)]


MachineArgument = Annotated[
    str,
    typer.Argument(
        metavar="MACHINE",
        help="A name, a pid, or qmp:PATH.",
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
