"""x-debug-device-event on a real guest: the RFC's command works for any QMP client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

import kickcall
from kickcall.lab.spec import MachineSpec, VirtioBlk
from kickcall.vmm.served import served_monitor
from witness import counted_after, within

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from kickcall.lab.machine import LabMachine

pytestmark = [pytest.mark.rig, pytest.mark.timeout(180)]

KICKCALL = [sys.executable, "-c", "from kickcall.cli.main import run; run()", "qmp"]
SPEC = MachineSpec(devices=(VirtioBlk(id="blk0", queues=2),), hotplug_ports=1)


@pytest.fixture
def machine(boot_machine: Any) -> LabMachine:
    made: LabMachine = boot_machine(SPEC)
    return made


@pytest.fixture
def served(machine: LabMachine, tmp_path: Path) -> Iterator[str]:
    """The machine's monitor on a socket; the machine's only user monitor is held by it."""
    path = str(tmp_path / "served.sock")
    server = subprocess.Popen(
        [*KICKCALL, str(machine.pid), "--listen", path],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("listening on ")
        yield path
    finally:
        server.terminate()
        assert server.wait(60) == 0


def ask(path: str, *requests: Mapping[str, object]) -> list[Any]:
    """Return the replies to `requests`, put by one client, events left out."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(path)
        file = sock.makefile("rb")
        replies: list[Any] = []
        assert "QMP" in json.loads(file.readline())
        negotiation = {"execute": "qmp_capabilities"}
        for request in (negotiation, *requests):
            sock.sendall(json.dumps(request).encode())
            while "event" in (reply := json.loads(file.readline())):
                pass
            replies.append(reply)
        return replies[1:]


def event(word: str, queue: int, dev: str = "/machine/peripheral/blk0") -> dict[str, object]:
    arguments = {"dev": dev, "event": word, "queue": queue}
    return {"execute": "x-debug-device-event", "arguments": arguments, "id": queue}


def test_a_call_raises_the_queues_interrupt_by_one(machine: LabMachine, served: str) -> None:
    for queue in (0, 1):
        before = machine.interrupts("blk0")
        assert ask(served, event("call", queue)) == [{"return": {}, "id": queue}]
        after = counted_after(lambda: machine.interrupts("blk0"), before)
        assert {key: after[key] - before[key] for key in after if key != "config"} == {
            f"req.{queue}": 1,
            f"req.{1 - queue}": 0,
        }


def test_kick_hmp_and_refusals(machine: LabMachine, served: str) -> None:
    line = {"command-line": "x-debug-device-event /machine/peripheral/blk0 kick 1"}
    hmp = {"execute": "human-monitor-command", "arguments": line}
    wrong = {"command-line": "x-debug-device-event blk0 kick 7"}
    answers = ask(
        served,
        event("kick", 0),
        hmp,
        event("kick", 7),
        event("kick", 0, dev="nope"),
        event("poke", 0),
        {"execute": "human-monitor-command", "arguments": wrong},
    )
    assert answers[0] == {"return": {}, "id": 0}
    assert answers[1] == {"return": ""}
    assert answers[2]["error"]["class"] == "GenericError"
    assert answers[3]["error"]["class"] == "DeviceNotFound"
    assert answers[4]["error"]["desc"] == "Parameter 'event' does not accept value 'poke'"
    assert answers[5]["return"].startswith("Error: blk0 has no queue 7")
    status, _ = machine.guest.run("dd if=/dev/vda of=/dev/null bs=4k count=4 iflag=direct")
    assert status == 0


def test_after_a_reboot_the_map_is_made_anew(machine: LabMachine, served: str) -> None:
    assert ask(served, event("call", 0)) == [{"return": {}, "id": 0}]
    machine.guest.reboot()
    before = machine.interrupts("blk0")["req.0"]
    assert ask(served, event("call", 0)) == [{"return": {}, "id": 0}]
    assert counted_after(lambda: machine.interrupts("blk0")["req.0"], before) == before + 1


def test_a_device_that_was_plugged_in_later_is_found(machine: LabMachine, served: str) -> None:
    assert ask(served, event("kick", 0, "hot"))[0]["error"]["class"] == "DeviceNotFound"
    node = {"driver": "null-co", "node-name": "hotnode", "size": 1 << 20}
    plug = {"driver": "virtio-blk-pci", "id": "hot", "drive": "hotnode", "bus": "hot0"}
    answers = ask(
        served,
        {"execute": "blockdev-add", "arguments": node},
        {"execute": "device_add", "arguments": plug},
    )
    assert answers == [{"return": {}}, {"return": {}}]
    deadline = time.monotonic() + 60
    while "return" not in (answer := ask(served, event("kick", 0, "hot"))[0]):
        assert time.monotonic() < deadline, answer
        time.sleep(0.2)


def test_other_commands_go_through_the_server_by_themselves(
    machine: LabMachine, served: str
) -> None:
    with open(f"/proc/{machine.pid}/stat") as file:
        start_time = int(file.read().rpartition(")")[2].split()[19])
    assert served_monitor(machine.pid, start_time) == served
    for target in (str(machine.pid), machine.name, f"qmp:{served}"):
        with kickcall.attach(target) as attached:
            result = attached.device("blk0").queue(0).call()
            assert result.via is kickcall.Via.EVENTFD
            assert result.before.count is not None


def test_an_event_takes_no_longer_than_a_few_milliseconds(machine: LabMachine, served: str) -> None:
    ask(served, event("kick", 0))
    start = time.perf_counter()
    ask(served, *(event("kick", 0) for _ in range(100)))
    each = (time.perf_counter() - start) / 100
    print(f"an event through the socket: {each * 1e6:.0f} µs")
    assert each < within(0.02)


def test_the_machine_outlives_a_server_that_is_killed(machine: LabMachine, tmp_path: Path) -> None:
    path = str(tmp_path / "killed.sock")
    command = [*KICKCALL, str(machine.pid), "--listen", path]
    for _ in range(2):  # the second finds the first one's dead socket and note
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        assert server.stdout.readline().startswith("listening on ")
        assert ask(path, event("call", 0)) == [{"return": {}, "id": 0}]
        server.kill()
        server.wait()
        server.stdout.close()
        assert os.path.exists(path)
    with kickcall.attach(machine.pid) as attached:
        assert attached.device("blk0").queue(0).call().via is kickcall.Via.EVENTFD
