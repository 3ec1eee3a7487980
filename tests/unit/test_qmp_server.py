"""Many clients share one monitor, without seeing or harming each other. QEMU is played here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from kickcall.errors import (
    DeviceNotFoundError,
    KickcallError,
    MonitorBusyError,
    MonitorGoneError,
    MonitorTimeoutError,
    QueueNotFoundError,
    StaleMapError,
)
from kickcall.model import DeviceEvent
from kickcall.qmp import wire
from kickcall.qmp.listener import ListenError, ListeningSocket
from kickcall.qmp.server import Callbacks, Ended, serve
from kickcall.qmp.upstream import MAX_IN_BAND, greet
from kickcall.vmm import served
from witness import within

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

    from kickcall.devices.base import Witness
    from kickcall.vmm.monitor import Monitor

GREETING = {"QMP": {"version": {}, "capabilities": ["oob"]}}
LIMIT = 1 << 24


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "runtime_folder", lambda: tmp_path / "notes")
    # The process whose monitor goes away is this one: it will not end in any time.
    monkeypatch.setattr("kickcall.qmp.server._GRACE", 0.2)
    # The played QEMU is this process, too, which may be kept waiting for a processor.
    monkeypatch.setattr("kickcall.qmp.server._ANSWER_TIMEOUT", 20.0)


@dataclass
class FakeQemu:
    """Answers as QEMU does; `hold` is answered when it is told to, `quit` ends it."""

    path: str
    commands: list[str] = field(default_factory=lambda: ["stop"])
    seen: list[str] = field(default_factory=list)
    held: list[dict[str, Any]] = field(default_factory=list)
    most_in_band: int = 0

    async def start(self) -> None:
        self.server = await asyncio.start_unix_server(self._talk, self.path, limit=LIMIT)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.send(GREETING)
        while line := await reader.readline():
            request = json.loads(line)
            command = request.get("execute") or request["exec-oob"]
            self.seen.append(command)
            if command == "qmp_capabilities" and "id" not in request:
                self.send({"return": {}})
            elif command == "qmp_capabilities":
                self.answer(request, error={"class": "CommandNotFound", "desc": "complete"})
            elif command == "hold":
                self.held.append(request)
                self.most_in_band = max(self.most_in_band, len(self.held))
            elif command == "quit":
                self.answer(request)
                self.send({"timestamp": {"seconds": 1}, "event": "SHUTDOWN"})
                self.end()
            elif command == "query-commands":
                self.answer(request, [{"name": name} for name in self.commands])
            elif command == "large":
                self.answer(request, "x" * 100_000)
            else:
                self.answer(request, request.get("arguments", {}))

    def send(self, message: object) -> None:
        self.writer.write(json.dumps(message).encode() + b"\r\n")

    def answer(self, request: dict[str, Any], result: object = None, error: object = None) -> None:
        if error is not None:
            self.send({"id": request["id"], "error": error})
        else:
            self.send({"return": {} if result is None else result, "id": request["id"]})

    def end(self) -> None:
        self.writer.close()
        self.server.close()


@dataclass
class FakeMachine:
    """Does as attach() does, and notes it."""

    monitor: Callable[[], contextlib.AbstractContextManager[Monitor]]
    raised: list[tuple[str, DeviceEvent, int]] = field(default_factory=list)
    refreshed: int = 0
    closed: bool = False
    threads: set[int] = field(default_factory=set)

    def device_event(
        self,
        dev: str,
        event: DeviceEvent,
        queue: int,
        *,
        allow_pause: bool = False,
        witness: Witness | None = None,
    ) -> None:
        self.threads.add(threading.get_ident())
        if dev == "stale" and not self.refreshed:
            raise StaleMapError("the guest rebooted")
        if dev == "plugged-late" and not self.refreshed:
            raise DeviceNotFoundError("machine vm0 has no device 'plugged-late'")
        if dev == "always-stale":
            raise StaleMapError("the guest\nreboots")
        if dev == "asks":
            with self.monitor() as monitor:
                assert monitor.execute("echo", {"a": 1}) == {"a": 1}
        if dev == "waits":
            with self.monitor() as monitor:
                monitor.execute("hold")
        if dev == "breaks":
            raise ZeroDivisionError
        if dev == "nope":
            raise DeviceNotFoundError("machine vm0 has no device 'nope'")
        if queue > 1:
            raise QueueNotFoundError(f"device {dev} has no queue {queue}: it has 0 to 1")
        self.raised.append((dev, event, queue))

    def refresh(self) -> None:
        self.refreshed += 1

    def close(self) -> None:
        self.closed = True


class Client:
    """A QMP client that is none of ours: raw JSON on a stream."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def connect(cls, path: str, negotiate: bool = True, oob: bool = False) -> Client:
        self = cls()
        self.reader, self.writer = await asyncio.open_unix_connection(path, limit=LIMIT)
        assert await self.receive() == GREETING
        if negotiate:
            enable = {"enable": ["oob"]} if oob else {}
            assert await self.ask("qmp_capabilities", enable) == {"return": {}}
        return self

    def send(self, command: str, arguments: object = None, **other: object) -> None:
        message = {"execute": command} | other
        if arguments:
            message["arguments"] = arguments
        self.writer.write(json.dumps(message).encode())

    async def receive(self) -> Any:
        line = await asyncio.wait_for(self.reader.readline(), 5)
        return json.loads(line) if line else None

    async def ask(self, command: str, arguments: object = None, **other: object) -> Any:
        self.send(command, arguments, **other)
        return await self.receive()


@dataclass
class World:
    """A server between a played QEMU and whoever connects."""

    qemu: FakeQemu
    path: str
    machine: list[FakeMachine]
    served: asyncio.Task[Ended]
    warnings: list[str]


@contextlib.asynccontextmanager
async def world(folder: Path, commands: tuple[str, ...] = ("stop",)) -> AsyncIterator[World]:
    qemu = FakeQemu(str(folder / "qemu.sock"), list(commands))
    await qemu.start()
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    machines: list[FakeMachine] = []
    warnings: list[str] = []

    def attach(pid: int, borrow: Any) -> FakeMachine:
        assert pid == os.getpid()
        machines.append(FakeMachine(borrow))
        return machines[-1]

    task = asyncio.ensure_future(
        serve(
            os.getpid(),
            7,
            qemu.path,
            str(folder / "served.sock"),
            Callbacks(listening.set_result, warnings.append),
            attach,
            partial(greet, timeout=20.0),
        )
    )
    try:
        path = await asyncio.wait_for(listening, 5)
        yield World(qemu, path, machines, task, warnings)
    finally:
        if not task.done():
            qemu.end()
            await asyncio.wait_for(task, 10)
        qemu.server.close()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def test_equal_ids_are_kept_apart_and_replies_find_their_way(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as here:
            clients = [await Client.connect(here.path) for _ in range(5)]
            for number, client in enumerate(clients):
                client.send("hold", id=1)
                clients[number].send("echo", {"n": number}, id=1)
            while len(here.qemu.held) < 5:
                await asyncio.sleep(0.01)
            # In-band order per client: nothing of the second command yet.
            assert "echo" not in here.qemu.seen
            for request in reversed(here.qemu.held):
                here.qemu.answer(request, {"held": True})
            for number, client in enumerate(clients):
                assert await client.receive() == {"return": {"held": True}, "id": 1}
                assert await client.receive() == {"return": {"n": number}, "id": 1}

    run(test)


def test_events_go_to_all_who_negotiated_as_they_are(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as here:
            first, second = await Client.connect(here.path), await Client.connect(here.path)
            early = await Client.connect(here.path, negotiate=False)
            event = {"timestamp": {"seconds": 5, "microseconds": 17}, "event": "STOP"}
            here.qemu.send(event)
            assert await first.receive() == await second.receive() == event
            answer = await early.ask("query-status", id="a")
            assert answer["error"]["class"] == "CommandNotFound"

    run(test)


def test_one_clients_leaving_drops_only_its_replies(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as here:
            leaver, stayer = await Client.connect(here.path), await Client.connect(here.path)
            leaver.send("hold", id=1)
            leaver.writer.write(b'{"execute": "half')
            while not here.qemu.held:
                await asyncio.sleep(0.01)
            leaver.writer.transport.abort()
            here.qemu.answer(here.qemu.held.pop())
            assert await stayer.ask("echo", {"a": 2**64 - 1}) == {"return": {"a": 2**64 - 1}}

    run(test)


def test_what_was_sent_before_the_end_of_input_is_still_answered(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as here:
            client = await Client.connect(here.path)
            for number in range(3):
                client.send("echo", id=number)
            client.writer.write_eof()
            assert [(await client.receive())["id"] for _ in range(3)] == [0, 1, 2]
            assert await client.receive() is None

    run(test)


def test_out_of_band_overtakes_and_is_never_held_up(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as here:
            others = [await Client.connect(here.path) for _ in range(12)]
            client = await Client.connect(here.path, oob=True)
            for other in others:
                other.send("hold", id=1)
            for number in range(5):
                client.send("hold", id=number)
            client.writer.write(b'{"exec-oob": "urgent", "id": "now"}')
            assert await client.receive() == {"return": {}, "id": "now"}
            # One more would let QEMU stop reading at eight (QMP_REQ_QUEUE_LEN_MAX).
            assert here.qemu.most_in_band == MAX_IN_BAND
            client.writer.write(b'{"exec-oob": "x-debug-device-event", "id": 2}')
            refused = await client.receive()
            assert refused["error"]["desc"] == (
                "The command x-debug-device-event does not support OOB"
            )

    run(test)


def test_a_client_without_oob_may_not_use_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as here:
            client = await Client.connect(here.path)
            client.writer.write(b'{"exec-oob": "urgent", "id": 5}')
            desc = "QMP input member 'exec-oob' is unexpected"
            assert await client.receive() == {
                "id": 5,
                "error": {"class": "GenericError", "desc": desc},
            }

    run(test)


def test_a_client_that_never_reads_is_dropped_and_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with world(tmp_path) as here:
            deaf, other = await Client.connect(here.path), await Client.connect(here.path)
            deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
            for _ in range(100):
                deaf.send("large")
            await asyncio.sleep(0.3)
            # Its commands wait rather than fill our memory.
            assert here.qemu.seen.count("large") < 20
            event = {"timestamp": {"seconds": 1}, "event": "X", "data": {"s": "y" * 100_000}}
            # Events cannot wait: enough of them and it is out.
            for _ in range(wire.MAX_WAITING // 100_000 + 2):
                here.qemu.send(event)
                assert await other.receive() == event
            assert (await other.ask("echo", id=1))["id"] == 1
            deaf.reader._transport.resume_reading()  # type: ignore[attr-defined]
            while await deaf.reader.read(1 << 20):
                pass

    run(test)


def test_a_flood_starves_nobody(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as here:
            flood, other = await Client.connect(here.path), await Client.connect(here.path)
            flood.writer.write(b",,,,[1,1,1,[" * 100_000)
            drain = asyncio.ensure_future(flood.reader.read(1 << 30))
            times = []
            for number in range(20):
                start = asyncio.get_running_loop().time()
                assert (await other.ask("echo", id=number))["id"] == number
                times.append(asyncio.get_running_loop().time() - start)
            assert sorted(times)[10] < within(0.2)
            drain.cancel()
            flood.writer.transport.abort()

    run(test)


def test_the_event_is_raised_and_answered_like_a_command(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as here:
            client = await Client.connect(here.path)
            event: dict[str, object] = {"dev": "blk0", "event": "kick", "queue": 1}
            name = "x-debug-device-event"
            assert await client.ask(name, event, id=[1, 2]) == {"return": {}, "id": [1, 2]}
            line = {"command-line": f"{name} blk0 call 0"}
            assert await client.ask("human-monitor-command", line) == {"return": ""}
            (machine,) = here.machine
            assert machine.raised == [
                ("blk0", DeviceEvent.KICK, 1),
                ("blk0", DeviceEvent.CALL, 0),
            ]
            assert name not in here.qemu.seen
            unknown = await client.ask(name, event | {"dev": "nope"})
            assert unknown["error"]["class"] == "DeviceNotFound"
            wrong = await client.ask(name, event | {"queue": 9}, id=1)
            assert wrong["id"] == 1
            assert wrong["error"]["class"] == "GenericError"
            assert "has no queue 9" in wrong["error"]["desc"]
            line = {"command-line": f"{name} blk0 call 9"}
            printed = await client.ask("human-monitor-command", line)
            assert printed["return"].startswith("Error: device blk0 has no queue 9")
            assert "error" in await client.ask(name, event | {"dev": "breaks"})
            assert (await client.ask(name, {"dev": "a"}))["error"]["desc"] == (
                "Parameter 'event' is missing"
            )
            assert await client.ask(name, event | {"dev": "asks"}) == {"return": {}}
            assert len(machine.threads) == 1
            help_line = {"command-line": f"help {name}"}
            assert name in (await client.ask("human-monitor-command", help_line))["return"]
        assert machine.closed

    run(test)


def test_a_map_that_does_not_fit_is_made_anew_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as here:
            client = await Client.connect(here.path)
            event: dict[str, object] = {"dev": "stale", "event": "kick", "queue": 0}
            assert await client.ask("x-debug-device-event", event) == {"return": {}}
            assert here.machine[0].refreshed == 1
            here.machine[0].refreshed = 0
            plugged = await client.ask("x-debug-device-event", event | {"dev": "plugged-late"})
            assert plugged == {"return": {}}
            stale = await client.ask("x-debug-device-event", event | {"dev": "always-stale"})
            assert stale["error"]["desc"] == "the guest reboots"
            assert here.machine[0].refreshed == 2

    run(test)


def test_a_qemu_that_has_the_command_itself_gets_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path, ("x-debug-device-event",)) as here:
            client = await Client.connect(here.path)
            listed = await client.ask("query-commands")
            assert listed == {"return": [{"name": "x-debug-device-event"}]}
            assert await client.ask("x-debug-device-event", {"a": 1}) == {"return": {"a": 1}}
            assert here.machine == []

    run(test)


def test_when_the_monitor_goes_clients_see_the_last_event_and_the_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as here:
            first, second = await Client.connect(here.path), await Client.connect(here.path)
            waiting = {"dev": "waits", "event": "kick", "queue": 0}
            second.send("x-debug-device-event", waiting)
            while "hold" not in here.qemu.seen:
                await asyncio.sleep(0.01)
            assert await first.ask("quit", id=0) == {"return": {}, "id": 0}
            for client in (first, second):
                assert (await client.receive())["event"] == "SHUTDOWN"
            assert await first.receive() is None
            # A large machine takes its time to end: SHUTDOWN is taken for it.
            assert await here.served is Ended.MACHINE
            assert not os.path.lexists(here.path)

    run(test)


def test_a_monitor_that_closes_while_the_machine_goes_on_is_told_apart(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as here:
            client = await Client.connect(here.path)
            here.qemu.end()
            assert await client.receive() is None
            assert await here.served is Ended.MONITOR

    run(test)


def test_a_monitor_that_greets_and_never_answers_is_no_busy_one(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    with socket.socket(socket.AF_UNIX) as stuck:
        stuck.bind(path)
        stuck.listen()

        def hello() -> None:
            with stuck.accept()[0] as peer:
                peer.sendall(json.dumps(GREETING).encode() + b"\n")
                peer.recv(1 << 16)
                peer.recv(1 << 16)

        thread = threading.Thread(target=hello)
        thread.start()
        with pytest.raises(MonitorTimeoutError, match="main loop is stuck"):
            greet(path, timeout=2.0)
        thread.join(5)


def test_odd_ids_of_refused_requests_do_not_pile_up(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as here:
            client, other = await Client.connect(here.path), await Client.connect(here.path)
            client.writer.write(b'{"exec-oob": "a", "id": 1.50}' * 500)
            assert (await other.ask("echo", id=1))["id"] == 1
            for _ in range(500):
                refused = await client.receive()
                assert refused["id"] == 1.5
                assert "exec-oob" in refused["error"]["desc"]

    run(test)


def test_a_signal_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with world(tmp_path) as here:
            client = await Client.connect(here.path)
            assert stat.S_IMODE(os.stat(here.path).st_mode) == 0o600
            os.kill(os.getpid(), 15)
            assert await here.served is Ended.SIGNAL
            assert await client.receive() is None
            assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "qemu.sock"]
            assert list((tmp_path / "notes").iterdir()) == []

    run(test)


def test_more_clients_than_it_takes_wait_for_their_greeting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kickcall.qmp.server.MAX_CLIENTS", 2)

    async def test() -> None:
        async with world(tmp_path) as here:
            first = await Client.connect(here.path)
            second = await Client.connect(here.path)
            third = asyncio.ensure_future(Client.connect(here.path))
            await asyncio.sleep(0.1)
            assert not third.done()
            first.writer.close()
            await asyncio.wait_for(third, 5)
            assert (await second.ask("echo", id=1))["id"] == 1

    run(test)


def test_a_dead_socket_is_replaced_and_anything_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    before = os.umask(0)
    try:
        listener = ListeningSocket(str(path))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ListenError, match="somebody listens"):
        ListeningSocket(str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.sock"]
    path.unlink()
    path.write_text("precious")
    listener.close()
    assert path.read_text() == "precious"
    with pytest.raises(ListenError, match="no socket"):
        ListeningSocket(str(path))
    with pytest.raises(ListenError, match="107 bytes"):
        ListeningSocket(str(tmp_path / ("x" * 107)))
    with pytest.raises(ListenError, match="No such file"):
        ListeningSocket(str(tmp_path / "none" / "a.sock"))


def test_a_monitor_that_is_held_gone_or_none_has_an_error_of_its_own(tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    with pytest.raises(MonitorGoneError):
        greet(path)
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(path)
        mute.listen()
        with pytest.raises(MonitorBusyError, match="somebody else holds"):
            greet(path, timeout=0.1)
    with pytest.raises(KickcallError):
        greet("tcp:nowhere")
