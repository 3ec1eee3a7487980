"""`kickcall watch`: find, heal and report, for as long as it runs."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kickcall.cli.arguments import JsonOption, MachinesArgument, seconds_of
from kickcall.cli.journal import JournalOption, warn
from kickcall.cli.output import plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from kickcall.watch.config import Config
    from kickcall.watch.happenings import Happening
    from kickcall.watch.keeper import Keeper


def watch(
    machines: MachinesArgument = None,
    heal: Annotated[
        bool, typer.Option("--heal", help="Inject what a verdict names, within bounds.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be injected, write nothing.")
    ] = False,
    interval: Annotated[
        str | None,
        typer.Option(
            "--interval",
            metavar="T",
            help="Between two looks while all is well; not given: 100ms.",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            metavar="[ADDR:]PORT",
            help="Serve metrics for Prometheus there; on 127.0.0.1 if no address is given.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="A TOML file with all of this and more; read again at SIGHUP.",
            show_default=False,
        ),
    ] = None,
    check_config: Annotated[
        bool,
        typer.Option("--check-config", help="Only say whether the file makes sense."),
    ] = False,
    journal: JournalOption = None,
    no_bundles: Annotated[
        bool, typer.Option("--no-bundles", help="Write no incident bundle when a stall is found.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Watch machines as they come and go, tell every stall, and heal it if asked to.

    Reads only, unless --heal is given. Ends at SIGTERM or Ctrl-C.

    \b
    kickcall watch
    kickcall watch vm0 vm1 --heal
    kickcall watch --heal --dry-run --json
    kickcall watch --heal --metrics 9478
    kickcall watch --config /etc/kickcall/watch.toml --check-config
    """
    from kickcall.watch.config import PATH, Config, load

    if check_config:
        checked = config or PATH
        load(checked)
        typer.echo(f"{checked}: nothing is wrong with it")
        return

    def asked() -> Config:
        """Return what the file asks for, where the command line does not say otherwise."""
        said = load(config) if config is not None else Config()
        if interval is not None:
            said = replace(said, settings=replace(said.settings, interval_s=_interval(interval)))
        if heal or dry_run:
            said = replace(said, heal="dry-run" if dry_run else "on")
        return replace(
            said,
            machines=tuple(machines or said.machines),
            journal=journal or said.journal,
            metrics=metrics or said.metrics,
            bundles=said.bundles and not no_bundles,
        )

    _run(asked, json=json, reload=config is not None)


def _run(asked: Callable[[], Config], *, json: bool, reload: bool) -> None:
    from kickcall.errors import KickcallError
    from kickcall.watch.book import Book
    from kickcall.watch.daemon import Daemon
    from kickcall.watch.database import JournalError
    from kickcall.watch.happenings import Happening, What
    from kickcall.watch.healer import Healer
    from kickcall.watch.journald import Journald, is_our_output, is_there
    from kickcall.watch.service import ServiceManager

    config = asked()
    journald = Journald() if is_there() else None
    # What goes to systemd's journal with its fields need not go there a second time without.
    say = _say_json if json else _say if journald is None or not is_our_output() else _say_nothing

    def tell(one: Happening) -> None:
        if journald is not None:
            journald.tell(one)
        say(one)
        if one.what in (What.CAME, What.WENT):
            service.status(f"watching {len(daemon.machines)} machines, healing: {healer.mode}")

    def complain(text: str) -> None:
        daemon.tell(Happening(What.ALERT, f"{text}; nothing is healed until it can"))

    def obey() -> None:
        service.reloading()
        try:
            new = asked()
        except KickcallError as exc:
            daemon.tell(Happening(What.ALERT, f"{exc}; all goes on as before"))
            return
        now = (config.journal, config.metrics, config.bundles)
        if (new.journal, new.metrics, new.bundles) != now:
            text = "another journal, address for metrics, or word on bundles comes with a restart"
            daemon.tell(Happening(What.ALERT, text))
        daemon.obey(new.machines, new.settings)
        healer.obey(new.rules, enabled=new.heal != "off", dry_run=new.heal == "dry-run")
        daemon.tell(Happening(What.RELOADED, f"read the configuration, healing: {healer.mode}"))

    service = ServiceManager()
    book = Book(config.journal, complain)
    healer = Healer(
        book, config.rules, enabled=config.heal != "off", dry_run=config.heal == "dry-run"
    )
    # Bundles tell what happened by way of the daemon, which shows them all that it sees.
    keeper = _keeper(config, lambda one: daemon.tell(one)) if config.bundles else None
    daemon = Daemon(config.machines, config.settings, healer, tell, keeper, pulse=service.pulse)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.stop())
    if reload:
        signal.signal(signal.SIGHUP, lambda *_: daemon.soon(obey))
    server = None
    try:
        if config.metrics is not None:
            from kickcall.watch.address import address_of
            from kickcall.watch.metrics import MetricsServer

            server = MetricsServer(daemon, address_of(config.metrics))
            text = f"metrics at {server.url}"
            daemon.tell(Happening(What.METRICS, text, more={"url": server.url}))
        try:
            healer.remember()
        except JournalError as exc:
            if healer.mode == "on":
                raise
            warn(str(exc))
        daemon.run()
    except BrokenPipeError:
        # Whoever read what happens is gone; nothing more can be said, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    finally:
        service.stopping()
        if keeper is not None:
            keeper.close()
        if server is not None:
            server.close()
        book.close()


def _keeper(config: Config, tell: Callable[[Happening], None]) -> Keeper:
    from kickcall.incident.shelf import Shelf
    from kickcall.watch.database import ENVIRONMENT, default_path
    from kickcall.watch.keeper import Keeper, teller

    journal = config.journal or default_path()
    # What the bundle says of the past is in this watcher's journal.
    environment = {ENVIRONMENT: str(journal)}
    shelf = Shelf(journal.parent / "incidents", teller(tell), environment=environment)
    return Keeper(shelf, config.settings.report_s)


def _interval(text: str) -> float:
    from kickcall.errors import UsageError

    seconds = seconds_of(text)
    if not 0.01 <= seconds <= 60:
        raise UsageError("--interval must be from 10ms to 1m")
    return seconds


def _say(one: Happening) -> None:
    at = datetime.fromtimestamp(one.at).astimezone().isoformat(" ", "milliseconds")
    where = plain(one.machine) if one.machine is not None else "kickcall"
    if one.device is not None:
        where += f" {plain(one.device.removeprefix('/machine/peripheral/'))} queue {one.queue}"
    typer.echo(f"{at}  {where}: {one.what}: {plain(one.text)}")


def _say_json(one: Happening) -> None:
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


def _say_nothing(_: Happening) -> None:
    pass
