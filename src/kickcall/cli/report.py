"""`kickcall report`: one page for a ticket, with the path drawn and the counters plotted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kickcall.cli.arguments import JsonOption, complete_machine, seconds_of
from kickcall.cli.bundle import (
    DurationOption,
    default_file,
    journaled,
    progress,
    stalls_json,
)
from kickcall.cli.output import plain, print_json


def report(
    machine: Annotated[
        str,
        typer.Argument(
            metavar="MACHINE|BUNDLE",
            help="A machine, or the .tar.gz of kickcall bundle.",
            autocompletion=complete_machine,
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="A file that does not exist, as vm0.html or vm0.md; not given: HTML goes to "
            "kickcall-MACHINE-TIME.html here, Markdown to standard output.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="html|md",
            help="What it is; not given: what --out ends with, else html.",
            show_default=False,
        ),
    ] = None,
    duration: DurationOption = "2s",
    json: JsonOption = False,
) -> None:
    """Write one self-contained page for a ticket (HTML), or a text for a mailing list (Markdown).

    Verdicts with the path drawn, counters over time, notifiers, environment; nothing in it is
    loaded or run. Reads only, as `kickcall bundle`; of a bundle's file it looks at no machine.

    \b
    kickcall report vm0 --out vm0.html
    kickcall report vm0 --format md
    kickcall report kickcall-vm0-20261122T224236Z.tar.gz --out vm0.html
    """
    from kickcall.errors import UsageError
    from kickcall.incident import report as making
    from kickcall.incident.archive import ENDINGS, write_one

    seconds = seconds_of(duration)
    if form is None:
        form = "md" if out is not None and out.suffix == ".md" else "html"
    if form not in making.FORMATS:
        raise UsageError(f"--format {form}: it is html or md")
    if out is not None and out.exists():
        raise UsageError(f"{out} exists: give another --out, or remove it")
    if machine.endswith(ENDINGS) and Path(machine).is_file():
        members = making.members_of(Path(machine))
    else:
        from kickcall.incident.collect import collect

        with progress() as tell:
            collected = collect(
                machine, by="kickcall report", duration_s=seconds, tell=tell, journal=journaled
            )
        members = making.contents(collected.members)
    facts, lines = making.told(members)
    text = making.report(facts, lines, form)
    if out is None and form == "md" and not json:
        typer.echo(text, nl=False)
        return
    if out is None:
        out = default_file(facts, form)
    size = write_one(out, text.encode(errors="backslashreplace"))
    if json:
        print_json(
            {
                "machine": facts.machine.name,
                "file": str(out.absolute()),
                "format": form,
                "bytes": size,
                "stalls": stalls_json(facts),
            }
        )
        return
    from kickcall.incident.summary import headline

    typer.echo(plain(headline(facts)))
    typer.echo(f"wrote {plain(out)}: {size / 1024:.0f} KiB")
