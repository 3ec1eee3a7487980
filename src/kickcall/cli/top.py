"""`kickcall top`: all machines, devices and queues in a terminal, worst first."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from kickcall.cli.arguments import MachinesArgument, seconds_of
from kickcall.cli.journal import JournalOption


def top(
    machines: MachinesArgument = None,
    refresh: Annotated[
        str, typer.Option("--refresh", metavar="T", help="Between two drawings.")
    ] = "250ms",
    journal: JournalOption = None,
) -> None:
    """Show all machines, devices and queues live, worst first; Enter opens the path of a queue.

    Reads only, until you press k or c and confirm what will be written. Needs the extra
    kickcall[top].

    \b
    kickcall top
    kickcall top vm0 --refresh 1s
    """
    from kickcall.errors import KickcallError, UsageError
    from kickcall.watch.feed import Feed

    seconds = seconds_of(refresh)
    if not 0.05 <= seconds <= 60:
        raise UsageError("--refresh must be from 50ms to 1m")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("kickcall top draws on a terminal, and this is none: kickcall watch")
    try:
        from kickcall.top.app import Top
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] not in ("textual",):
            raise
        raise KickcallError(
            f"kickcall top needs {exc.name}: pip install 'kickcall[top]' (without it there is "
            "kickcall watch)"
        ) from exc
    with Feed(machines or [], "kickcall top", journal) as feed:
        app = Top(feed, every_s=seconds, count=bool(machines))
        for number in (signal.SIGTERM, signal.SIGHUP):
            # The terminal is given back as it was.
            signal.signal(number, lambda *_: app.exit())
        app.run()
