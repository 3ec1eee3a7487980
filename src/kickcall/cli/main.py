"""The command `kickcall`: its subcommands, and how an error is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import kickcall
from kickcall.cli import (
    bundle,
    demo,
    diagnose,
    events,
    journal,
    lab,
    machines,
    qmp,
    report,
    serve,
    top,
    trace,
    vmcore,
    watch,
)
from kickcall.cli.output import plain
from kickcall.errors import KickcallError

app = typer.Typer(
    name="kickcall",
    help="Kick or call any virtqueue of a running, unmodified QEMU.",
    epilog=(
        "Exit codes: 0 done, 1 something is wrong with the machine, 2 usage, 3 could not do it "
        "(and nothing was written)."
    ),
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"kickcall {kickcall.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
    crashed: Annotated[
        Path | None,
        typer.Option(
            "--vmcore",
            metavar="FILE",
            help="Look at a crashed host's memory instead (vms, show, eventfd).",
        ),
    ] = None,
    symbols: Annotated[
        list[Path] | None,
        typer.Option(
            "--symbols",
            metavar="FILE",
            help="vmlinux or a module with debug symbols, for a vmcore without BTF.",
        ),
    ] = None,
) -> None:
    """Kick or call any virtqueue of a running, unmodified QEMU."""
    vmcore.choose(context, crashed, symbols or [])


app.command()(machines.vms)
app.command()(machines.show)
app.command()(machines.eventfd)
app.command()(diagnose.diagnose)
app.command()(trace.trace)
app.command()(events.kick)
app.command()(events.call)
app.command()(qmp.qmp)
app.command()(watch.watch)
app.command()(top.top)
app.command()(serve.serve)
app.command()(journal.journal)
app.command()(bundle.bundle)
app.command()(report.report)
app.add_typer(lab.app, name="lab")
app.command()(demo.demo)


def run() -> None:
    """Run the command line; an error is one line on stderr, never a traceback."""
    try:
        app()
    except KickcallError as exc:
        # It may quote what a machine is called, or a socket: whatever that is, it is one line.
        typer.echo(f"kickcall: {plain(exc)}", err=True)
        sys.exit(exc.exit_code)
    except BrokenPipeError:  # `kickcall show vm0 | head`
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        typer.echo("kickcall: interrupted", err=True)
        sys.exit(130)
