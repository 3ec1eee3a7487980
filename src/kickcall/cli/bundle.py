"""`kickcall bundle`: one file with everything a QEMU or kernel developer would ask for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kickcall.cli.arguments import JsonOption, MachineArgument, seconds_of
from kickcall.cli.output import plain, print_json

if TYPE_CHECKING:
    from kickcall.incident.facts import Facts

_JOURNAL_S = 86400.0
_JOURNAL_MOST = 50

DurationOption = Annotated[
    str,
    typer.Option("--duration", help="How long to watch at least, as 2s or 500ms.", metavar="T"),
]


def bundle(
    machine: MachineArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="A .tar.gz that does not exist; not given: kickcall-MACHINE-TIME.tar.gz here.",
            show_default=False,
        ),
    ] = None,
    duration: DurationOption = "2s",
    json: JsonOption = False,
    watcher: Annotated[bool, typer.Option("--from-watcher", hidden=True)] = False,
) -> None:
    """Write one file with all that a developer would ask for: for a ticket, or a mailing list.

    Queues over time, notifiers and who holds them, what threads do in the kernel, what QEMU says,
    its command line without secrets, verdicts; a readable summary comes first. Reads only, nothing
    is stopped. What cannot be had is left out, and the file says why.

    \b
    kickcall bundle vm0
    kickcall bundle vm0 --out /tmp/vm0.tar.gz --duration 5s
    tar xzOf vm0.tar.gz | less
    """
    from kickcall.errors import UsageError
    from kickcall.incident.archive import ENDINGS, write
    from kickcall.incident.collect import collect

    seconds = seconds_of(duration)
    seen = None
    if watcher:
        from kickcall.incident.seen import seen_from

        seen = seen_from(sys.stdin.buffer.read())
    if out is not None and not out.name.endswith(ENDINGS):
        raise UsageError(f"--out {out}: the file is a {ENDINGS[0]} and is to be called so")
    if out is not None and not watcher and out.exists():
        raise UsageError(f"{out} exists: give another --out, or remove it")
    with progress() as tell:
        collected = collect(
            machine,
            by="kickcall watch" if watcher else "kickcall bundle",
            duration_s=seconds,
            tell=tell,
            seen=seen,
            journal=journaled,
        )
        facts = collected.facts
        if out is None:
            out = default_file(facts, "tar.gz")
        size = write(out, collected.members, at=facts.at)
    if json:
        print_json(
            {
                "machine": facts.machine.name,
                "pid": facts.machine.pid,
                "file": str(out.absolute()),
                "bytes": size,
                "stalls": stalls_json(facts),
                "members": [
                    {"name": one.name, "bytes": len(one.content), "what": one.what}
                    for one in collected.members
                ],
                "missing": [{"part": one.part, "why": one.why} for one in facts.missing],
            }
        )
        return
    from kickcall.incident.summary import headline

    typer.echo(plain(headline(facts)))
    for one in facts.missing:
        typer.echo(f"  not in it: {plain(one.part)}: {plain(one.why)}")
    typer.echo(f"wrote {plain(out)}: {len(collected.members)} files, {size / 1024:.0f} KiB")
    typer.echo(f"  read it: tar xzOf {plain(out)} | less")


def default_file(facts: Facts, ending: str) -> Path:
    """Return the name of a file that was given none, for this folder."""
    from kickcall.incident.archive import safe_name

    # What comes from a bundle may say anything.
    moment = datetime.fromtimestamp(min(max(facts.at, 0.0), 4e9), UTC)
    return Path(f"kickcall-{safe_name(facts.machine.name)}-{moment:%Y%m%dT%H%M%SZ}.{ending}")


def stalls_json(facts: Facts) -> list[dict[str, Any]]:
    """Return the stalls as `--json` has them."""
    return [
        {"device": one.device, "queue": one.queue, "verdict": one.verdict, "hop": one.hop}
        for one in facts.stalls
    ]


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Show on a terminal's stderr what is done now; nothing where nobody looks."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("") as status:
        yield lambda text: status.update(plain(text))


def journaled(machine: str) -> list[dict[str, Any]]:
    """Return what the journal has of a machine's last day, the latest last."""
    from kickcall.cli.journal import entries_of

    return entries_of(machine, time.time() - _JOURNAL_S, _JOURNAL_MOST)
