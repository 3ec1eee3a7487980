"""What does a watcher show to Prometheus, and is it bounded whatever machines are called?"""

from __future__ import annotations

import http.client
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry

from kickcall.errors import UsageError
from kickcall.model import DeviceEvent, Machine, VerdictKind
from kickcall.watch.address import address_of
from kickcall.watch.book import Book
from kickcall.watch.daemon import Daemon
from kickcall.watch.happenings import Happening, What
from kickcall.watch.healer import Healer
from kickcall.watch.metrics import MetricsError, MetricsServer, WatcherCollector
from kickcall.watch.policy import Queue, Rules
from kickcall.watch.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass
class PlayedMachine:
    """As much of a watched machine as its numbers need."""

    name: str
    waiting: list[tuple[str, int, float]] = field(default_factory=list)
    stalls: list[VerdictKind] = field(default_factory=list)
    state: str = "watched"

    @property
    def machine(self) -> Machine:
        return Machine(pid=1, name=self.name, version="", monitors=(), start_time=1, command=())

    @property
    def queues(self) -> int:
        return len(self.waiting)

    def waits(self, now: float) -> list[tuple[str, int, float]]:
        return self.waiting


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    book = Book(tmp_path / "journal.db", lambda _: None)
    yield Daemon([], Settings(), Healer(book, Rules(), enabled=True), lambda _: None)
    book.close()


def with_machines(daemon: Daemon, *machines: PlayedMachine) -> Daemon:
    daemon._machines = {
        (number, 0): cast("Any", machine) for number, machine in enumerate(machines)
    }
    return daemon


def series(daemon: Daemon, *, most: int = 1000) -> Series:
    """Return what a Prometheus would read."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(WatcherCollector(daemon, most=most))
    text = generate_latest(registry).decode()
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            key = (one.name, tuple(sorted(one.labels.items())))
            assert key not in found, f"{key} comes twice"
            found[key] = one.value
    return found


def of(found: Series, name: str) -> dict[tuple[str, ...], float]:
    """Return the series of one metric by their label values, by the labels' names."""
    return {
        tuple(value for _, value in labels): number
        for (called, labels), number in found.items()
        if called == name
    }


def test_stalls_are_counted_by_verdict_and_those_that_never_were_are_0(daemon: Daemon) -> None:
    for kind in (VerdictKind.LOST_KICK, VerdictKind.LOST_KICK, VerdictKind.DEVICE_STUCK):
        daemon._tell(Happening(What.STALL, "", more={"verdict": str(kind)}))
    daemon._tell(Happening(What.ALERT, "look"))
    found = series(daemon)
    stalls = of(found, "kickcall_stalls_total")
    assert stalls["lost-kick",] == 2
    assert stalls["device-stuck",] == 1
    assert stalls["lost-call",] == 0
    assert ("idle",) not in stalls
    assert of(found, "kickcall_alerts_total") == {(): 1}


def test_injections_are_counted_by_what_came_of_them(daemon: Daemon) -> None:
    which = Queue(1, 1, "/machine/peripheral/blk0", 0)
    daemon.healer.settle(which, DeviceEvent.KICK, True)
    daemon.healer.settle(which, DeviceEvent.KICK, False)
    daemon.healer.settle(which, DeviceEvent.CALL, None)
    daemon.healer.withdraw(which, DeviceEvent.CALL)
    found = of(series(daemon), "kickcall_injections_total")
    assert {key for key, count in found.items() if count} == {
        ("kick", "helped"), ("kick", "refuted"), ("call", "unknown"), ("call", "refused"),
    }  # fmt: skip
    assert set(found.values()) == {0, 1}


def test_looks_are_a_histogram_that_adds_up(daemon: Daemon) -> None:
    for seconds in (0.00005, 0.003, 7.0):
        daemon.healer.tally.looked(seconds)
    found = series(daemon)
    buckets = {labels[0]: n for labels, n in of(found, "kickcall_look_seconds_bucket").items()}
    assert (buckets["0.0001"], buckets["0.0025"], buckets["0.005"]) == (1, 1, 2)
    assert (buckets["0.5"], buckets["+Inf"]) == (2, 3)
    assert of(found, "kickcall_look_seconds_count") == {(): 3}
    assert of(found, "kickcall_look_seconds_sum")[()] == pytest.approx(7.00305)


def test_each_queue_tells_how_long_its_oldest_request_waits(daemon: Daemon) -> None:
    blk0 = "/machine/peripheral/blk0"
    with_machines(
        daemon,
        PlayedMachine("vm0", [(blk0, 0, 1.5), (blk0, 1, 0.0)], [VerdictKind.LOST_KICK]),
        PlayedMachine("vm1", state="paused"),
        PlayedMachine("vm2", state="not-watched"),
    )
    found = series(daemon)
    ages = of(found, "kickcall_oldest_request_age_seconds")
    assert ages == {("blk0", "vm0", "0"): 1.5, ("blk0", "vm0", "1"): 0.0}
    assert of(found, "kickcall_machines") == {("watched",): 1, ("paused",): 1, ("not-watched",): 1}
    assert of(found, "kickcall_queues") == {(): 2}
    assert of(found, "kickcall_machine_queues") == {("vm0",): 2, ("vm1",): 0, ("vm2",): 0}
    assert of(found, "kickcall_stalls_lasting") == {("vm0", "lost-kick"): 1}


def test_a_machine_that_went_is_no_series_any_more(daemon: Daemon) -> None:
    assert ("vm0",) in of(
        series(with_machines(daemon, PlayedMachine("vm0"))), "kickcall_machine_queues"
    )
    assert of(series(with_machines(daemon)), "kickcall_machine_queues") == {}


HOSTILE = (
    'a"} 1\nkickcall_stalls_total{verdict="lost-kick',
    "back\\slash\\n",
    "\udcff\udc80",  # bytes that are no UTF-8, as /proc/PID/cmdline gives them
    "x" * 100_000,
    "\x1b[31mred\r\n",
    "",
)


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_name_is_a_label_value_and_nothing_else(daemon: Daemon, name: str) -> None:
    before = {called for called, _ in series(with_machines(daemon, PlayedMachine("vm0")))}
    waiting = [(name, 0, 1.0)]
    found = series(with_machines(daemon, PlayedMachine(name, waiting, [VerdictKind.LOST_CALL])))
    assert {called for called, _ in found} == before | {
        "kickcall_oldest_request_age_seconds",
        "kickcall_stalls_lasting",
    }
    values = [value for _, labels in found for _, value in labels]
    assert all(value.isprintable() and len(value) <= 128 for value in values)
    assert of(found, "kickcall_stalls_total")["lost-kick",] == 0


def test_machines_of_one_name_are_one_series(daemon: Daemon) -> None:
    blk0 = "/machine/peripheral/blk0"
    twins = [PlayedMachine("vm0", [(blk0, 0, age)]) for age in (2.0, 5.0)]
    found = series(with_machines(daemon, *twins))
    assert of(found, "kickcall_oldest_request_age_seconds") == {("blk0", "vm0", "0"): 5.0}
    assert of(found, "kickcall_machine_queues") == {("vm0",): 2}


def test_of_too_many_queues_those_that_wait_longest_are_shown(daemon: Daemon) -> None:
    blk0 = "/machine/peripheral/blk0"
    waiting = [(blk0, number, float(number % 997)) for number in range(20_000)]
    found = series(with_machines(daemon, PlayedMachine("vm0", waiting)), most=50)
    ages = of(found, "kickcall_oldest_request_age_seconds")
    assert len(ages) == 50
    assert min(ages.values()) >= 994
    left_out = of(found, "kickcall_series_left_out")
    assert left_out["kickcall_oldest_request_age_seconds",] == 20_000 - 50


def test_of_too_many_machines_no_more_series_come(daemon: Daemon) -> None:
    machines = [
        PlayedMachine(f"vm{number}", stalls=[VerdictKind.LOST_KICK]) for number in range(500)
    ]
    few, many = (series(with_machines(daemon, *machines[:count]), most=100) for count in (100, 500))
    assert len(few) == len(many)


# --- the address ---


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9478", ("127.0.0.1", 9478)),
        (":9478", ("127.0.0.1", 9478)),
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("[::1]:9478", ("::1", 9478)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
    ],
)
def test_an_address_without_a_host_is_the_loopback(text: str, address: tuple[str, int]) -> None:
    assert address_of(text) == address


@pytest.mark.parametrize("text", ["", "host", "localhost:9478", "127.0.0.1:", "1.2.3.4:99999", "²"])
def test_what_is_no_address_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match="is no address: write 9478"):
        address_of(text)


# --- the server ---


@pytest.fixture
def server(daemon: Daemon) -> Iterator[MetricsServer]:
    served = MetricsServer(daemon, ("127.0.0.1", 0))
    yield served
    served.close()


def get(url: str) -> tuple[str, str]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_what_is_served_is_prometheus_text_with_the_process_s_own_numbers(
    server: MetricsServer,
) -> None:
    kind, text = get(server.url)
    assert kind.startswith("text/plain")
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {"kickcall_stalls", "kickcall_look_seconds", "process_open_fds"} <= names
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(server.url.removesuffix("metrics"))


def test_an_address_that_is_taken_is_one_line(server: MetricsServer, daemon: Daemon) -> None:
    port = int(server.url.split(":")[2].split("/")[0])
    with pytest.raises(MetricsError, match=f"cannot serve metrics at 127.0.0.1 port {port}: Addre"):
        MetricsServer(daemon, ("127.0.0.1", port))


def test_the_other_loopback_works_too(daemon: Daemon) -> None:
    if not socket.has_ipv6:
        pytest.fail("no IPv6 in this Python")
    try:
        served = MetricsServer(daemon, ("::1", 0))
    except MetricsError as exc:
        assert "Cannot assign requested address" in str(exc)  # a host without IPv6
        return
    try:
        assert "[::1]:" in served.url
        get(served.url)
    finally:
        served.close()


def test_clients_that_say_nothing_take_no_more_than_their_places(server: MetricsServer) -> None:
    host, port = "127.0.0.1", int(server.url.split(":")[2].split("/")[0])
    before = threading.active_count()
    idle = [socket.create_connection((host, port)) for _ in range(40)]
    try:
        time.sleep(0.2)
        assert threading.active_count() <= before + 8
    finally:
        for one in idle:
            one.close()
    deadline = time.monotonic() + 20
    while True:
        try:
            assert "kickcall_info" in get(server.url)[1]
            return
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < deadline
            time.sleep(0.05)
