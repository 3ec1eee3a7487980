"""What does a watcher show to Prometheus, and who may ask for it?

Worked out when it is asked for, in a thread of its own: the loop does not know of it. What a
guest, or whoever named a machine, could blow up is bounded: so many series of a kind, so many
characters of a name, so many clients.
"""

from __future__ import annotations

import heapq
import socket
import threading
import time
from collections import Counter
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import MetricsHandler
from prometheus_client.registry import Collector

import kickcall
from kickcall.errors import KickcallError
from kickcall.watch.tally import LOOK_BOUNDS_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from prometheus_client.metrics_core import Metric

    from kickcall.watch.daemon import Daemon

SERIES_MOST: Final = 1000
"""Series of one kind that are shown at most, where their number depends on the host's machines."""
_NAME_MOST: Final = 128
_CLIENTS_MOST: Final = 8
_CLIENT_S: Final = 5.0
"""How long a client may say nothing."""
_PERIPHERAL: Final = "/machine/peripheral/"


class MetricsError(KickcallError):
    """The metrics cannot be served: the address is taken, or not this host's."""


class WatcherCollector(Collector):
    """The numbers of one watcher, worked out at every `collect`."""

    def __init__(self, daemon: Daemon, *, most: int = SERIES_MOST) -> None:
        self._daemon = daemon
        self._most = most

    def collect(self) -> Iterator[Metric]:
        """Yield all that there is to tell now."""
        daemon = self._daemon
        tally = daemon.healer.tally
        yield _gauge(
            "kickcall_info",
            "Which kickcall this is, and whether it heals (on, dry-run, off).",
            ("version", "heal"),
            {(kickcall.__version__, daemon.healer.mode): 1},
        )
        yield _counter(
            "kickcall_stalls", "Stalls that were seen.", ("verdict",), _keyed(tally.stalls)
        )
        yield _counter(
            "kickcall_injections",
            "Injections by what came of them.",
            ("event", "outcome"),
            tally.injections,
        )
        yield _counter("kickcall_alerts", "How often somebody should look.", (), {(): tally.alerts})
        yield _look_seconds(*tally.looks)
        yield _gauge(
            "kickcall_journal_up",
            "Whether the journal can be written: while it cannot, nothing is healed.",
            (),
            {(): 0 if daemon.healer.book.failing else 1},
        )
        yield from self._of_machines()

    def _of_machines(self) -> Iterator[Metric]:
        states = Counter({("watched",): 0, ("paused",): 0, ("not-watched",): 0})
        queues: Counter[tuple[str, ...]] = Counter()
        lasting: Counter[tuple[str, ...]] = Counter()
        waits: dict[tuple[str, ...], float] = {}
        now = time.monotonic()
        # Of two machines with one name the numbers are one: no series may come twice.
        for machine in self._daemon.machines:
            name = _label(machine.machine.name)
            states[machine.state,] += 1
            queues[name,] += machine.queues
            lasting.update((name, str(kind)) for kind in machine.stalls)
            for device, queue, waited_s in machine.waits(now):
                key = (name, _label(device.removeprefix(_PERIPHERAL)), str(queue))
                waits[key] = max(waited_s, waits.get(key, 0.0))
        yield _gauge("kickcall_machines", "Machines of this host, by state.", ("state",), states)
        yield _gauge("kickcall_queues", "Queues that are watched.", (), {(): queues.total()})
        left_out: dict[tuple[str, ...], float] = {}
        for name, text, labels, values in (
            (
                "kickcall_machine_queues",
                "Queues that are watched, by machine.",
                ("machine",),
                queues,
            ),
            (
                "kickcall_stalls_lasting",
                "Stalls that last, by machine.",
                ("machine", "verdict"),
                lasting,
            ),
            (
                "kickcall_oldest_request_age_seconds",
                "For how long, at least, the oldest request of a queue has waited.",
                ("machine", "device", "queue"),
                waits,
            ),
        ):
            shown = _largest(values, self._most)
            left_out[name,] = len(values) - len(shown)
            yield _gauge(name, text, labels, shown)
        yield _gauge(
            "kickcall_series_left_out",
            "Series that are not shown, as there are too many: those with the least values.",
            ("metric",),
            left_out,
        )


def _label(name: str) -> str:
    """Return a name that somebody else chose, as one that can be shown (surrogates cannot)."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in name)[
        :_NAME_MOST
    ]


def _keyed(values: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    return {(key,): value for key, value in values.items()}


def _largest(values: Mapping[tuple[str, ...], float], most: int) -> Mapping[tuple[str, ...], float]:
    """Return all of `values` if there is room, else those that matter most, and always the same
    of those that do not matter."""
    if len(values) <= most:
        return values
    kept = heapq.nsmallest(most, values.items(), key=lambda item: (-item[1], item[0]))
    return dict(kept)


def _gauge(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _look_seconds(counts: list[int], total_s: float) -> Metric:
    buckets, so_far = [], 0
    for bound, count in zip([*map(str, LOOK_BOUNDS_S), "+Inf"], counts, strict=True):
        so_far += count
        buckets.append((bound, float(so_far)))
    return HistogramMetricFamily(
        "kickcall_look_seconds",
        "How long a look at all queues of one machine takes.",
        buckets=buckets,
        sum_value=total_s,
    )


class _Handler(MetricsHandler):
    timeout = _CLIENT_S
    protocol_version = "HTTP/1.0"
    """One request a connection: nobody holds one for nothing."""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == "/metrics":
            super().do_GET()
        else:
            self.send_error(404, explain="The metrics are at /metrics.")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int, handler: Callable[..., Any]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._places = threading.BoundedSemaphore(_CLIENTS_MOST)
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        # HTTPServer's own looks the host's name up, which may take its time.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = self.socket.getsockname()[:2]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread can be had
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""


class MetricsServer:
    """Serves `/metrics` at an address until `close`. Raises MetricsError where that cannot be."""

    def __init__(
        self, daemon: Daemon, address: tuple[str, int], *, most: int = SERIES_MOST
    ) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(WatcherCollector(daemon, most=most))
        ProcessCollector(registry=registry)
        host, port = address
        try:
            self._server = _Server(host, port, _Handler.factory(registry))
        except OSError as exc:
            raise MetricsError(
                f"cannot serve metrics at {host} port {port}: {exc.strerror}"
            ) from exc
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
