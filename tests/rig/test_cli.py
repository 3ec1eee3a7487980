"""What do the commands print, for people and for programs, and how do they end?"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kickcall.attached import attach
from small_qemu import small_qemu
from witness import (
    STOP_IO,
    eventfd_counts,
    interrupt_line,
    interrupts,
    io_until_told,
    own_io,
    raised_by,
    rise,
    undisturbed,
)

if TYPE_CHECKING:
    from kickcall.attached import AttachedMachine
    from kickcall.lab.machine import LabMachine
    from witness import Line

pytestmark = pytest.mark.rig


def kickcall(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kickcall", *arguments], capture_output=True, text=True, timeout=30
    )


def told(*arguments: str) -> Any:
    """Return the JSON that a command prints."""
    ended = kickcall(*arguments, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    return json.loads(ended.stdout)


def printed(*arguments: str) -> str:
    ended = kickcall(*arguments)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


STATE_KEYS = {"eventfd_id", "count", "flags", "semaphore"}
COUNTER_KEYS = {"count", "avail_idx", "used_idx"}


def test_vms(zoo: LabMachine) -> None:
    (machine,) = (one for one in told("vms")["machines"] if one["name"] == zoo.name)
    assert set(machine) == {"pid", "name", "version", "monitors", "domain", "vmid", "served_at"}
    assert machine["pid"] == zoo.pid
    assert len(machine["monitors"]) == 3  # two for users, one for the lab
    table = printed("vms")
    (row,) = (line for line in table.splitlines() if f" {zoo.name} " in line)
    assert row.split()[:2] == [str(zoo.pid), zoo.name]
    assert machine["monitors"][0] in row


def test_show_for_programs(zoo: LabMachine) -> None:
    said = told("show", zoo.name)
    assert set(said) == {
        "machine",
        "pid",
        "version",
        "run_state",
        "devices",
        "pci_devices",
    }
    assert (said["machine"], said["pid"], said["run_state"]) == (zoo.name, zoo.pid, "running")
    devices = {device["id"]: device for device in said["devices"]}
    assert set(devices) == {device.id for device in zoo.spec.devices}
    for device in devices.values():
        assert set(device) == {
            "device",
            "id",
            "kind",
            "backend",
            "num_queues",
            "driver_ok",
            "event_idx",
            "refusal",
            "queues",
            "events",
        }
        assert device["refusal"] is None
        for event in device["events"]:
            assert set(event) == {"queue", "name", "event", "via", "reason"}
            assert (event["via"] is None) == (event["reason"] is not None)
        for queue in device["queues"]:
            assert set(queue) == {
                "device",
                "queue",
                "layout",
                "size",
                "backend",
                "avail_idx",
                "used_idx",
                "last_avail_idx",
                "outstanding",
                "avail_flags",
                "used_flags",
                "used_event",
                "avail_event",
                "kick",
                "call",
                "notes",
            }
            for notifier in (queue["kick"], queue["call"]):
                assert notifier is None or set(notifier) == STATE_KEYS
    assert devices["vub0"]["backend"] == "vhost-user"
    assert devices["packed0"]["queues"][0]["layout"] == "packed"
    assert devices["net0"]["queues"][0]["call"] is None
    (only,) = told("show", zoo.name, "/machine/peripheral/blk0")["devices"]
    assert only["id"] == "blk0"


def test_show_for_people(zoo: LabMachine) -> None:
    text = printed("show", zoo.name, "vub0")
    assert text.startswith(f"{zoo.name}  pid {zoo.pid}  QEMU ")
    assert "vub0  vhost-user-blk, vhost-user, split, event index, 2 of 2 queues set up" in text
    assert [line.split()[0] for line in text.splitlines() if re.match(r"\s+\d", line)] == ["0", "1"]
    everything = printed("show", zoo.name)
    for device in zoo.spec.devices:
        assert re.search(rf"^{device.id}  ", everything, re.MULTILINE)


def lost_and_kicked(zoo: LabMachine) -> tuple[dict[str, Any], dict[str, Any]]:
    """Lose a kick, and kick; return what `show` said of the queue before, and what `kick` said."""
    command, relay = own_io(zoo, "vub0", cpu=0), zoo.relay("vub0")
    lost = relay.carried("kick", 0).dropped
    relay.drop("kick", queue=0)
    reader = zoo.guest.start(command)
    relay.wait_for("kick", 0, dropped=lost + 1)
    (device,) = told("show", zoo.name, "vub0")["devices"]
    said = told("kick", zoo.name, "vub0", "--queue", "0")
    assert reader.wait(timeout=60).status == 0
    return device["queues"][0], said


def test_show_tells_where_a_lost_kick_left_the_queue(zoo: LabMachine) -> None:
    # A busy host may not run the back-end in the 0.1 s that a kick by hand is watched.
    for _ in range(5):
        queue, said = lost_and_kicked(zoo)
        if said["after"]["used_idx"] != said["before"]["used_idx"]:
            break
    assert (queue["avail_idx"] - queue["used_idx"]) % 65536 == queue["outstanding"] == 1
    assert queue["kick"]["count"] == 0
    assert set(said) == {
        "machine",
        "device",
        "queue",
        "layout",
        "event",
        "via",
        "eventfd_id",
        "pause_ms",
        "target",
        "dry_run",
        "before",
        "after",
    }
    assert set(said["before"]) == set(said["after"]) == COUNTER_KEYS
    assert (said["machine"], said["device"]) == (zoo.name, "/machine/peripheral/vub0")
    assert (said["queue"], said["event"], said["via"]) == (0, "kick", "eventfd")
    assert said["eventfd_id"] == queue["kick"]["eventfd_id"]
    assert said["before"] == {
        "count": 0,
        "avail_idx": queue["avail_idx"],
        "used_idx": queue["used_idx"],
    }
    assert said["after"] == {
        "count": 0,
        "avail_idx": queue["avail_idx"],
        "used_idx": queue["avail_idx"],
    }


def test_eventfd_shows_who_holds_each_notifier(zoo: LabMachine) -> None:
    said = told("eventfd", zoo.name)
    assert set(said) == {"machine", "notifiers", "hidden_processes"}
    assert (said["machine"], said["hidden_processes"]) == (zoo.name, 0)
    assert len(said["notifiers"]) == 23 + 20
    others = {"vub0": {zoo.relay_pid("vub0")}, "direct0": {zoo.backend_pid("direct0")}}
    for notifier in said["notifiers"]:
        assert set(notifier) == {
            "device",
            "id",
            "queue",
            "event",
            "eventfd_id",
            "fd",
            "count",
            "flags",
            "semaphore",
            "holders",
        }
        holders = {(one["pid"], one["fd"]) for one in notifier["holders"]}
        assert (zoo.pid, notifier["fd"]) in holders
        assert {pid for pid, _ in holders} == {zoo.pid} | others.get(notifier["id"], set())
        for holder in notifier["holders"]:
            # The kernel's own word, in the back-end's fdinfo.
            text = Path(f"/proc/{holder['pid']}/fdinfo/{holder['fd']}").read_text()
            assert re.search(rf"eventfd-id:\s*{notifier['eventfd_id']}$", text, re.MULTILINE)
    table = printed("eventfd", zoo.name, "direct0")
    assert table.count(f"qemu-storage-da[{zoo.backend_pid('direct0')}] fd ") == 4


def test_call_for_people(zoo: LabMachine, attached: AttachedMachine) -> None:
    def called() -> None:
        text = printed("call", zoo.name, "packed0", "-q", "1")
        where = f"queue 1 of /machine/peripheral/packed0 on {zoo.name}"
        assert text.startswith(f"called {where} via eventfd: eventfd ")
        first = r"^  before  count 0  avail\.idx \S+  used\.idx \S+$"
        assert re.search(first, text, re.MULTILINE)

    assert raised_by(zoo, attached, called) == {interrupt_line(zoo, "packed0", 1): 1}


@pytest.mark.parametrize("event", ["kick", "call"])
def test_a_dry_run_says_what_it_would_do_and_does_nothing(
    zoo: LabMachine, attached: AttachedMachine, event: str
) -> None:
    def raised() -> dict[Line, int]:
        before = interrupts(zoo)
        text = printed(event, zoo.name, "vub0", "-q", "0", "--dry-run")
        assert text.startswith(f"would {event} queue 0 of /machine/peripheral/vub0")
        assert told(event, zoo.name, "vub0", "-q", "0", "--dry-run")["dry_run"] is True
        return rise(before, interrupts(zoo))

    carried = zoo.relay("vub0").report()
    assert undisturbed(attached, raised) == {}
    assert zoo.relay("vub0").report() == carried


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (2, ("kick",)),
        (2, ("kick", "{name}", "blk0")),
        (2, ("kick", "{name}", "blk0", "--queue", "first")),
        (2, ("kick", "{name}", "blk0", "--queue", "-1")),
        (2, ("kick", "{name}", "blk0", "--queue", "0", "--via", "luck")),
        (2, ("show", "{name}", "--no-such-option")),
        (2, ("poke", "{name}")),
        (3, ("show", "no-such-machine")),
        (3, ("show", "{name}", "no-such-device")),
        (3, ("eventfd", "{name}", "no-such-device")),
        (3, ("kick", "{name}", "no-such-device", "--queue", "0")),
        (3, ("kick", "{name}", "blk0", "--queue", "2")),
        (3, ("kick", "{name}", "blk0", "--queue", "999999999999999999999")),
        (3, ("call", "{name}", "net0", "--queue", "0")),
        (3, ("call", "{name}", "blk0", "--queue", "0", "--via", "ioport")),
        (3, ("kick", "{name}", "packed0", "--queue", "0", "--via", "ioport")),
        (3, ("kick", "{name}", "blk0", "--queue", "0", "--via", "qmp")),
        (3, ("kick", "qmp:/no/such/socket", "blk0", "--queue", "0", "--json")),
        (3, ("show", "1")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_what_cannot_be_done_says_so_on_stderr_alone(
    zoo: LabMachine, code: int, arguments: tuple[str, ...]
) -> None:
    ended = kickcall(*(argument.format(name=zoo.name) for argument in arguments))
    assert (ended.returncode, ended.stdout) == (code, "")
    assert "Traceback" not in ended.stderr
    if code == 3:
        assert ended.stderr.startswith("kickcall: ")
        assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["\x1b[31mred\x1b[0m", "[red]no markup[/red]", "two\nlines", "\x9b2J", "‮gpj", "[/]"]
)
def test_a_hostile_name_is_printed_as_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / "qmp"
    monitor = ("-qmp", f"unix:{path},server=on,wait=off")
    with small_qemu("-name", name, *monitor, ready=path) as pid:
        machines = {one["pid"]: one for one in told("vms")["machines"]}
        assert machines[pid]["name"] == name
        for arguments in (("vms",), ("show", str(pid)), ("eventfd", str(pid)), ("show", name)):
            text = printed(*arguments)
            assert all(char.isprintable() or char == "\n" for char in text)
        (row,) = (line for line in printed("vms").splitlines() if line.split()[:1] == [str(pid)])
        assert str(path) in row
        if name.isprintable():
            assert name in row
        ended = kickcall("kick", str(pid), "blk0", "-q", "0")
        assert (ended.returncode, ended.stdout) == (3, "")
        assert all(char.isprintable() for char in ended.stderr.rstrip("\n"))


KICKS = """
import sys
from kickcall.attached import attach
with attach(sys.argv[1]) as machine:
    queues = [machine.device(name).queue(0) for name in ("blk0", "iot0", "vub0", "direct0")]
    print("kicking", flush=True)
    while True:
        for queue in queues:
            queue.kick()
            queue.call()
"""


def test_a_kickcall_that_is_killed_harms_no_machine(zoo: LabMachine) -> None:
    """At any moment: while it starts, while it maps, while it writes."""
    disks = ("blk0", "iot0", "vub0", "direct0")
    readers = [zoo.guest.start(io_until_told(zoo, name)) for name in disks]
    held = len(eventfd_counts(zoo.pid))
    for number in range(20):
        with subprocess.Popen(
            [sys.executable, "-c", KICKS, zoo.name], stdout=subprocess.PIPE, text=True
        ) as victim:
            if number % 2:
                assert victim.stdout is not None
                assert victim.stdout.readline() == "kicking\n"
            time.sleep(0.011 * number)
            os.kill(victim.pid, signal.SIGKILL)
    zoo.guest.run(STOP_IO)
    for reader in readers:
        finished = reader.wait(timeout=60)
        assert finished.status == 0, finished.output
    with attach(zoo.name) as attached:
        assert attached.run_state == "running"
        for name in disks:
            status, output = zoo.guest.run(own_io(zoo, name))
            assert status == 0, output
        for one in attached.devices():
            for queue in one.queues():
                kick = queue.state().kick
                assert kick is None or kick.count == 0
    assert len(eventfd_counts(zoo.pid)) == held
