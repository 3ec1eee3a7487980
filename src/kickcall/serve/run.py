"""How is the page served: on which address, with which certificate, until when?"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn

from kickcall.errors import KickcallError, UsageError
from kickcall.serve.app import Pages
from kickcall.serve.guard import Guard, hosts_of, is_loopback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kickcall.watch.feed import Source


@dataclass(frozen=True, slots=True)
class Options:
    """How to serve."""

    address: str = "127.0.0.1"
    port: int = 0
    """0: any that is free."""
    names: tuple[str, ...] = ()
    """Other host names under which browsers come here."""
    certificate: Path | None = None
    key: Path | None = None
    behind_proxy: bool = False
    token: str | None = None
    """What a page must show to raise an event; None: nothing is ever raised."""
    count: bool = False
    """Whether the kernel counts kicks and calls while somebody looks at a queue."""
    every_s: float = 0.1


def check(options: Options) -> None:
    """Raise UsageError where the options would show machines to a network in the clear."""
    if (options.certificate is None) != (options.key is None):
        raise UsageError("--tls-cert and --tls-key belong together")
    safe = options.certificate is not None or options.behind_proxy
    if not is_loopback(options.address) and not safe:
        raise UsageError(
            f"{options.address} is reached from other hosts: serve it with --tls-cert and "
            "--tls-key, or with --behind-proxy where a proxy encrypts and asks who comes"
        )
    if (options.address in ("0.0.0.0", "::") or options.behind_proxy) and not options.names:
        raise UsageError("say under which name browsers come here: --host NAME")


@contextlib.contextmanager
def listening(options: Options) -> Iterator[socket.socket]:
    """Give a socket that listens where the options say. Raises KickcallError."""
    family = socket.AF_INET6 if ":" in options.address else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((options.address, options.port))
        except OSError as exc:
            raise KickcallError(
                f"cannot listen on {options.address} port {options.port}: {exc.strerror}"
            ) from exc
        listener.listen(64)
        yield listener


def url_of(options: Options, listener: socket.socket) -> str:
    """Return where the page is."""
    scheme = "https" if options.certificate is not None else "http"
    host = options.names[0] if options.names else options.address
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"{scheme}://{host}:{listener.getsockname()[1]}/"


def server(source: Source, options: Options) -> uvicorn.Server:
    """Return a server that is not started."""
    guard = Guard(hosts_of(options.address, options.names), options.token)
    made: list[uvicorn.Server] = []
    pages = Pages(
        source,
        guard,
        every_s=options.every_s,
        count=options.count,
        stopping=lambda: made[0].should_exit,
    )
    config = uvicorn.Config(
        pages.app(),
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
        limit_concurrency=256,
        ssl_certfile=options.certificate,
        ssl_keyfile=options.key,
    )
    made.append(uvicorn.Server(config))
    return made[0]


def serve(source: Source, options: Options, told: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. `told` is given the page's address when it can be opened."""
    check(options)
    with listening(options) as listener:
        running = server(source, options)

        def stop(*_: object) -> None:
            running.should_exit = True

        # uvicorn takes these over while it runs, and raises what it got once more when it has
        # ended: whoever serves is to end as well, and not to be killed.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        told(url_of(options, listener))
        running.run(sockets=[listener])


@contextlib.contextmanager
def serving(source: Source, options: Options) -> Iterator[str]:
    """Serve in a thread while the block lasts, and give the page's address."""
    check(options)
    with listening(options) as listener:
        running = server(source, options)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not running.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield url_of(options, listener)
        finally:
            running.should_exit = True
            thread.join(5.0)
