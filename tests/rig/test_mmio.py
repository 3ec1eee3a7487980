"""Does a write through the gdb stub call and kick what has no notifier, and nothing else?"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.errors import EventNotSupportedError, QmpCommandError, QueueNotReadyError
from kickcall.lab.boot import boot
from kickcall.lab.spec import MachineSpec, VirtioBlk, VirtioNet
from kickcall.model import Via
from witness import (
    STOP_IO,
    NotifyTrace,
    interrupt_line,
    interrupts,
    interrupts_after,
    io_until_told,
    is_busy,
    kernel_complaints,
    rise,
    until,
    virtio_device_address,
    watch_queues,
)
from zoo import QEMUS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kickcall.attached import AttachedMachine
    from kickcall.lab.image import GuestImage
    from kickcall.lab.machine import LabMachine

pytestmark = pytest.mark.rig

INJECTIONS = int(os.environ.get("KICKCALL_INJECTIONS", "10"))
"""How often the busy machine is paused. A long run takes 100."""
DEVICES = (
    VirtioBlk(id="blk0", queues=2),
    VirtioBlk(id="slow0", queues=2, legacy="off", options=("ioeventfd=off",)),
    VirtioBlk(id="intx0", options=("vectors=0",)),
    VirtioNet(id="net0"),
    VirtioBlk(id="old0", legacy="only", options=("ioeventfd=off",)),
)
"""`slow0` has no notifiers and no port; `intx0` interrupts by INTx; `old0` has only the legacy
interface."""


@pytest.fixture(scope="module", params=QEMUS)
def machine(request: pytest.FixtureRequest, guest_image_built: GuestImage) -> Iterator[LabMachine]:
    spec = MachineSpec(
        qemu=request.param, devices=DEVICES, monitors=2, kernel_arguments="ipv6.disable=1"
    )
    with boot(spec, timeout=180) as booted:
        watch_queues(booted)
        yield booted


@pytest.fixture
def attached(machine: LabMachine) -> Iterator[AttachedMachine]:
    with attach(machine.name) as one:
        yield one


def is_as_before(machine: LabMachine) -> bool:
    stubs = [one for one in machine.qmp("query-chardev") if one["label"] == "gdb"]
    return bool(machine.qmp("query-status")["running"]) and not stubs


@pytest.mark.parametrize(("name", "number"), [("net0", 0), ("net0", 1), ("slow0", 1), ("blk0", 0)])
def test_a_message_calls_exactly_its_queue(
    machine: LabMachine, attached: AttachedMachine, name: str, number: int
) -> None:
    before = interrupts(machine)
    result = attached.device(name).queue(number).call(via="mmio")
    assert rise(before, interrupts_after(machine, before)) == {
        interrupt_line(machine, name, number): 1
    }
    assert result.via is Via.MMIO
    assert result.target.startswith("MSI-X vector ")
    assert result.pause_ms is not None
    assert is_as_before(machine)


def test_a_doorbell_is_rung_where_there_is_neither_notifier_nor_port(
    machine: LabMachine, attached: AttachedMachine
) -> None:
    address = virtio_device_address(machine, "slow0")
    queue = attached.device("slow0").queue(1)
    with pytest.raises(EventNotSupportedError, match=r"mmio: it pauses .*--allow-pause"):
        queue.kick()
    with NotifyTrace(machine) as trace:
        result = queue.kick(allow_pause=True)
        until(lambda: (address, 1) in trace.seen(), "QEMU looks at queue 1 of slow0")
    assert (address, 0) not in trace.seen()
    assert result.via is Via.MMIO
    assert is_as_before(machine)


def test_a_pause_that_is_allowed_is_not_taken_where_a_notifier_is(
    machine: LabMachine, attached: AttachedMachine
) -> None:
    before = interrupts(machine)
    result = attached.device("blk0").queue(0).call(allow_pause=True)
    assert (result.via, result.pause_ms) == (Via.EVENTFD, None)
    line = interrupt_line(machine, "blk0", 0)
    assert rise(before, interrupts_after(machine, before)) == {line: 1}


def test_the_queue_can_be_used_on_after_the_pause_gave_it_other_notifiers(
    machine: LabMachine, attached: AttachedMachine
) -> None:
    queue = attached.device("blk0").queue(1)
    queue.kick(via="mmio")
    before = interrupts(machine)
    assert queue.call().via is Via.EVENTFD
    line = interrupt_line(machine, "blk0", 1)
    assert rise(before, interrupts_after(machine, before)) == {line: 1}
    assert attached.device("net0").queue(1).kick().via is Via.EVENTFD


def test_intx_is_called_by_its_notifier_and_refused_otherwise(
    machine: LabMachine, attached: AttachedMachine
) -> None:
    queue = attached.device("intx0").queue(0)
    with pytest.raises(EventNotSupportedError, match="the device has INTx, and no register"):
        queue.call(via="mmio")
    before = interrupts(machine)
    assert queue.call().via is Via.EVENTFD
    assert rise(before, interrupts_after(machine, before)) == {("intx0", "intx"): 1}
    assert is_as_before(machine)


def test_a_legacy_device_is_kicked_by_its_port_and_called_by_its_message(
    machine: LabMachine, attached: AttachedMachine
) -> None:
    address = virtio_device_address(machine, "old0")
    queue = attached.device("old0").queue(0)
    assert "VIRTIO_F_VERSION_1" not in attached.device("old0").info.features
    with NotifyTrace(machine) as trace:
        result = queue.kick(allow_pause=True)
        until(lambda: (address, 0) in trace.seen(), "QEMU looks at queue 0 of old0")
    assert (result.via, result.pause_ms) == (Via.IOPORT, None)
    with pytest.raises(EventNotSupportedError, match="an I/O port, and no memory"):
        queue.kick(via="mmio")
    before = interrupts(machine)
    assert queue.call(allow_pause=True).via is Via.MMIO
    line = interrupt_line(machine, "old0", 0)
    assert rise(before, interrupts_after(machine, before)) == {line: 1}


def test_a_paused_machine_stays_paused(machine: LabMachine, attached: AttachedMachine) -> None:
    machine.qmp("stop")
    try:
        with pytest.raises(QueueNotReadyError, match="paused"):
            attached.device("net0").queue(0).call(via="mmio")
        assert machine.qmp("query-status")["status"] == "paused"
    finally:
        machine.qmp("cont")
    assert is_as_before(machine)


def kickcall(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kickcall", *words], capture_output=True, text=True, check=False
    )


def test_the_command_line_says_first_that_it_pauses_and_then_for_how_long(
    machine: LabMachine,
) -> None:
    refused = kickcall("call", machine.name, "net0", "--queue", "0")
    assert refused.returncode == 3
    assert "--allow-pause" in refused.stderr
    done = kickcall("call", machine.name, "net0", "--queue", "0", "--allow-pause")
    assert done.returncode == 0
    assert f"pausing {machine.name} for some milliseconds to write MSI-X vector" in done.stderr
    assert "  paused  " in done.stdout


def test_the_rfcs_command_pauses_only_where_the_server_was_told_so(
    machine: LabMachine, tmp_path: Path
) -> None:
    for number, options in enumerate(((), ("--allow-pause",))):
        listen = tmp_path / f"served{number}"
        command = ["qmp", machine.name, "--listen", str(listen), *options]
        with subprocess.Popen(
            [sys.executable, "-m", "kickcall", *command], stdout=subprocess.PIPE, text=True
        ) as server:
            try:
                assert server.stdout is not None
                assert "listening" in server.stdout.readline()
                with attach(f"qmp:{listen}") as attached:
                    call = attached.device("net0").queue(0).call
                    before = interrupts(machine)
                    if options:
                        call(via="qmp")
                        line = interrupt_line(machine, "net0", 0)
                        assert rise(before, interrupts_after(machine, before)) == {line: 1}
                    else:
                        with pytest.raises(QmpCommandError, match="--allow-pause"):
                            call(via="qmp")
                        assert interrupts(machine) == before
            finally:
                server.terminate()
        assert is_as_before(machine)


def test_a_busy_machine_is_called_and_kicked_without_harm(
    machine: LabMachine, attached: AttachedMachine
) -> None:
    complaints = kernel_complaints(machine)
    readers = [
        machine.guest.start(io_until_told(machine, name)) for name in ("blk0", "slow0", "intx0")
    ]
    pinger = machine.guest.start(
        "while [ ! -e /run/stop-io ]; do ping -c 1 -W 10 10.0.2.2 || exit 1; done"
    )
    paused_ms = []
    for number in range(INJECTIONS):
        name, event = (("net0", "call"), ("slow0", "kick"), ("blk0", "call"))[number % 3]
        result = attached.device_event(name, event, 0, via="mmio")
        assert result.pause_ms is not None
        paused_ms.append(result.pause_ms)
    machine.guest.run(STOP_IO)
    for command in (*readers, pinger):
        status, output = command.wait(timeout=60)
        assert status == 0, output
    assert kernel_complaints(machine) == complaints
    assert is_as_before(machine)
    # On a busy host the machine waits for a processor, as it always does.
    if not is_busy():
        assert statistics.median(paused_ms) < 10, paused_ms
