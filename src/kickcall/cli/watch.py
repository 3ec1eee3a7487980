"""`kickcall watch`: find, heal and report, for as long as it runs."""

from __future__ import annotations

import os
import signal
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from kickcall.cli.arguments import JsonOption, complete_machine, seconds_of
from kickcall.cli.journal import JournalOption, warn
from kickcall.cli.output import plain

if TYPE_CHECKING:
    from kickcall.watch.happenings import Happening


def watch(
    machines: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MACHINE]...",
            help="Names, pids or qmp:PATHs; all that run here if none is given.",
            autocompletion=complete_machine,
            show_default=False,
        ),
    ] = None,
    heal: Annotated[
        bool, typer.Option("--heal", help="Inject what a verdict names, within bounds.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be injected, write nothing.")
    ] = False,
    interval: Annotated[
        str,
        typer.Option("--interval", metavar="T", help="Between two looks while all is well."),
    ] = "100ms",
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="[ADDR:]PORT",
            help="Serve metrics for Prometheus there; on 127.0.0.1 if no address is given.",
            show_default=False,
        ),
    ] = None,
    journal: JournalOption = None,
    json: JsonOption = False,
) -> None:
    """Watch machines as they come and go, tell every stall, and heal it if asked to.

    Reads only, unless --heal is given. Ends at SIGTERM or Ctrl-C.

    \b
    kickcall watch
    kickcall watch vm0 vm1 --heal
    kickcall watch --heal --dry-run --json
    kickcall watch --heal --metrics 9478
    """
    from kickcall.errors import UsageError
    from kickcall.watch.book import Book
    from kickcall.watch.daemon import Daemon
    from kickcall.watch.database import JournalError
    from kickcall.watch.happenings import Happening, What
    from kickcall.watch.healer import Healer
    from kickcall.watch.policy import Rules
    from kickcall.watch.settings import Settings

    seconds = seconds_of(interval)
    if not 0.01 <= seconds <= 60:
        raise UsageError("--interval must be from 10ms to 1m")
    tell = _tell_json if json else _tell

    def complain(text: str) -> None:
        daemon.tell(Happening(What.ALERT, f"{text}; nothing is healed until it can"))

    book = Book(journal, complain)
    healer = Healer(book, Rules(), enabled=heal or dry_run, dry_run=dry_run)
    daemon = Daemon(machines or [], Settings(interval_s=seconds), healer, tell)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.stop())
    server = None
    try:
        if metrics is not None:
            from kickcall.watch.metrics import MetricsServer, address_of

            server = MetricsServer(daemon, address_of(metrics))
            daemon.tell(
                Happening(What.METRICS, f"metrics at {server.url}", more={"url": server.url})
            )
        try:
            healer.remember()
        except JournalError as exc:
            if heal and not dry_run:
                raise
            warn(str(exc))
        daemon.run()
    except BrokenPipeError:
        # Whoever read what happens is gone; nothing more can be said, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    finally:
        if server is not None:
            server.close()
        book.close()


def _tell(one: Happening) -> None:
    at = datetime.fromtimestamp(one.at).astimezone().isoformat(" ", "milliseconds")
    where = plain(one.machine) if one.machine is not None else "kickcall"
    if one.device is not None:
        where += f" {plain(one.device.removeprefix('/machine/peripheral/'))} queue {one.queue}"
    typer.echo(f"{at}  {where}: {one.what}: {plain(one.text)}")


def _tell_json(one: Happening) -> None:
    import msgspec

    fields = {
        "at": one.at,
        "what": one.what,
        "machine": one.machine,
        "pid": one.pid,
        "device": one.device,
        "queue": one.queue,
        "text": one.text,
        **one.more,
    }
    print(msgspec.json.encode(fields).decode(), flush=True)
