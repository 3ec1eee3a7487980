"""`kickcall serve`: all machines, devices and queues as a page that moves."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import typer

from kickcall.cli.arguments import MachinesArgument
from kickcall.cli.journal import JournalOption


def serve(
    machines: MachinesArgument = None,
    address: Annotated[
        str, typer.Option("--address", metavar="ADDRESS", help="Where to listen.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="0 takes any that is free.")
    ] = 8410,
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            metavar="NAME",
            help="A name under which browsers come here; may be given again.",
            show_default=False,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option("--tls-cert", exists=True, dir_okay=False, help="A certificate (PEM)."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", exists=True, dir_okay=False, help="Its key (PEM).")
    ] = None,
    behind_proxy: Annotated[
        bool,
        typer.Option("--behind-proxy", help="A proxy encrypts, and asks who comes."),
    ] = False,
    allow_inject: Annotated[
        bool,
        typer.Option("--allow-inject", help="Let who has the token kick and call from the page."),
    ] = False,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Count kicks and calls in the kernel, where one looks."),
    ] = False,
    journal: JournalOption = None,
) -> None:
    """Serve a live page of all machines, devices and queues, on this host alone.

    Reads only, unless --allow-inject is given. Whoever can connect can look: another address needs
    TLS or a proxy. Needs the extra kickcall[serve]. Ends at SIGTERM or Ctrl-C.

    \b
    kickcall serve
    kickcall serve vm0 --allow-inject --port 9000
    kickcall serve --address 192.0.2.7 --tls-cert cert.pem --tls-key key.pem
    """
    from kickcall.errors import KickcallError
    from kickcall.watch.feed import Feed

    try:
        from kickcall.serve import run
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise KickcallError(
            f"kickcall serve needs {exc.name}: pip install 'kickcall[serve]' (without it there is "
            "kickcall top)"
        ) from exc
    token = secrets.token_urlsafe(18) if allow_inject else None
    options = run.Options(
        address=address,
        port=port,
        names=tuple(host or ()),
        certificate=tls_cert,
        key=tls_key,
        behind_proxy=behind_proxy,
        token=token,
        count=trace,
    )
    run.check(options)

    def tell(url: str) -> None:
        typer.echo(f"kickcall serve: {url}")
        if token is not None:
            typer.echo(f"kickcall serve: the token for injections is {token}")

    with Feed(machines or [], "kickcall serve", journal) as feed:
        run.serve(feed, options, tell)
