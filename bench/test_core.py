"""How long does kickcall take to map a machine, to kick a queue and to look at one?"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from bench.clients import Client

import kickcall

if TYPE_CHECKING:
    from bench.comparison import Compare

    from kickcall.attached import AttachedMachine
    from kickcall.lab.machine import LabMachine


def attach_and_map(machine: LabMachine) -> int:
    with kickcall.attach(machine.pid) as attached:
        return sum(len(device.queues()) for device in attached.devices())


@pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb: scripts/setup.sh bench")
def test_attach_and_map_20_queues(machine: LabMachine, compare: Compare) -> None:
    gdb = ["gdb", "-nx", "-batch", "-ex", "detach", "-p", str(machine.pid)]

    def attach_gdb() -> None:
        subprocess.run(gdb, check=True, capture_output=True)

    assert attach_and_map(machine) == 20
    result = compare(
        "attach and map 20 queues",
        lambda: attach_and_map(machine),
        "gdb -p PID, detach (stops the VM)",
        attach_gdb,
        rounds=10,
        limit=0.150,
    )
    assert result.ratio < 1


def test_an_attached_kick_against_a_fresh_process(
    machine: LabMachine, attached: AttachedMachine, compare: Compare
) -> None:
    queue = attached.device("vscsi0").queue(3)
    command = [sys.executable, "-m", "kickcall", "kick", str(machine.pid), "vscsi0", "-q", "3"]

    def run_kickcall() -> None:
        subprocess.run([*command, "--json"], check=True, capture_output=True)

    result = compare(
        "queue.kick()",
        queue.kick,
        "a fresh `kickcall kick` (100 ms of it watching)",
        run_kickcall,
        rounds=10,
        repeat=100,
        limit=150e-6,
    )
    assert result.ratio < 1 / 20


def test_an_attached_kick_against_a_question_to_the_monitor(
    machine: LabMachine, attached: AttachedMachine, compare: Compare
) -> None:
    queue = attached.device("vscsi0").queue(3)
    with Client(machine.qmp_paths[1]) as client:
        result = compare(
            "queue.kick()",
            queue.kick,
            "query-status on an open monitor",
            lambda: client.ask("query-status"),
            rounds=2000,
            limit=150e-6,
        )
    assert result.ratio < 10


def test_the_state_of_a_queue(
    machine: LabMachine, attached: AttachedMachine, compare: Compare
) -> None:
    queue = attached.device("vscsi0").queue(3)
    path = "/machine/peripheral/vscsi0/virtio-backend"
    with Client(machine.qmp_paths[1]) as client:
        told = client.ask("x-query-virtio-queue-status", path=path, queue=3)
        state = queue.state()
        assert (state.used_idx, state.last_avail_idx) == (
            told["used-idx"],
            told["last-avail-idx"],
        )
        result = compare(
            "queue.state()",
            queue.state,
            "x-query-virtio-queue-status",
            lambda: client.ask("x-query-virtio-queue-status", path=path, queue=3),
            rounds=2000,
        )
    assert result.ratio < 1


def test_the_help_of_the_command_line(compare: Compare) -> None:
    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    result = compare(
        "kickcall --help",
        lambda: run("-m", "kickcall", "--help"),
        "python -c pass",
        lambda: run("-c", "pass"),
        rounds=20,
        limit=0.200,
    )
    assert result.ratio < 40


def test_the_fresh_process_kicks_too(machine: LabMachine) -> None:
    # What the second test measures is only worth measuring if it did something.
    command = [sys.executable, "-m", "kickcall", "kick", str(machine.pid), "vscsi0", "-q", "3"]
    done = subprocess.run([*command, "--json"], check=True, capture_output=True)
    assert json.loads(done.stdout)["via"] == "eventfd"
