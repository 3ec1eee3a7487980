"""Are machines without PCI, and guests of aarch64, kicked and called, or refused with a reason?"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.errors import EventNotSupportedError
from kickcall.lab.boot import boot
from kickcall.lab.spec import MachineSpec, VirtioBlk, VirtioNet, VirtioScsi
from kickcall.model import Via
from witness import (
    STOP_IO,
    NotifyTrace,
    interrupt_line,
    interrupts,
    interrupts_after,
    io_until_told,
    kernel_complaints,
    rise,
    until,
    virtio_device_address,
    watch_queues,
)
from zoo import QEMUS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.lab.image import GuestImage
    from kickcall.lab.machine import LabMachine

pytestmark = pytest.mark.rig

INJECTIONS = int(os.environ.get("KICKCALL_INJECTIONS", "6"))
ON_MMIO = (
    VirtioBlk(id="blk0", queues=2, mmio=True),
    VirtioNet(id="net0", mmio=True),
    VirtioScsi(id="scsi0", mmio=True),
)
ON_PCI = (
    VirtioBlk(id="pblk0", queues=2),
    VirtioBlk(id="slow0", options=("ioeventfd=off",)),
    VirtioBlk(id="old0", legacy="only", options=("ioeventfd=off",)),
)


@pytest.fixture(scope="module", params=QEMUS)
def microvm(request: pytest.FixtureRequest, guest_image_built: GuestImage) -> Iterator[LabMachine]:
    """No PCI at all. QEMU 7.2 has no ioeventfds there without KVM, and 10.0 has."""
    spec = MachineSpec(
        board="microvm",
        qemu=request.param,
        devices=ON_MMIO,
        monitors=2,
        kernel_arguments="ipv6.disable=1",
    )
    with boot(spec) as booted:
        watch_queues(booted)
        yield booted


@pytest.fixture(scope="module")
def virt() -> Iterator[LabMachine]:
    """A guest of aarch64, with both transports. Its one NIC is on PCI: there the guest uses it."""
    net = VirtioNet(id="pnet0")
    devices = (*(one for one in ON_MMIO if one.id != "net0"), *ON_PCI, net)
    spec = MachineSpec(board="virt", devices=devices, monitors=2, kernel_arguments="ipv6.disable=1")
    with boot(spec) as booted:
        watch_queues(booted)
        yield booted


def has_notifiers(machine: LabMachine) -> bool:
    with attach(machine.name) as attached:
        return attached.device("blk0").queue(0).map.kick is not None


def is_as_before(machine: LabMachine) -> bool:
    stubs = [one for one in machine.qmp("query-chardev") if one["label"] == "gdb"]
    return bool(machine.qmp("query-status")["running"]) and not stubs


def check_kick(machine: LabMachine, name: str, number: int, via: Via) -> None:
    """Kick, and have QEMU itself say that it looks at that queue, and at no other of the device."""
    address = virtio_device_address(machine, name)
    with attach(machine.name) as attached, NotifyTrace(machine) as trace:
        result = attached.device(name).queue(number).kick(allow_pause=True)
        until(lambda: (address, number) in trace.seen(), f"QEMU looks at queue {number} of {name}")
        assert {seen for vdev, seen in trace.seen() if vdev == address} == {number}
    assert result.via is via
    assert (result.pause_ms is None) == (via is Via.EVENTFD)
    assert is_as_before(machine)


def check_call(machine: LabMachine, name: str, number: int, via: Via) -> None:
    """Call, and have the guest count one more interrupt of that device's queue, and no other."""
    before = interrupts(machine)
    with attach(machine.name) as attached:
        result = attached.device(name).queue(number).call(allow_pause=True)
    expected = (
        (name, "intx") if machine.device(name).mmio else interrupt_line(machine, name, number)
    )
    assert rise(before, interrupts_after(machine, before)) == {expected: 1}
    assert result.via is via
    assert is_as_before(machine)


@pytest.mark.parametrize(("name", "number"), [("blk0", 1), ("net0", 1), ("scsi0", 2)])
def test_the_notify_register_kicks_exactly_its_queue(
    microvm: LabMachine, name: str, number: int
) -> None:
    check_kick(microvm, name, number, Via.EVENTFD if has_notifiers(microvm) else Via.MMIO)


@pytest.mark.parametrize("name", ["blk0", "scsi0"])
def test_a_notifier_calls_the_line_that_all_queues_share(microvm: LabMachine, name: str) -> None:
    if has_notifiers(microvm):
        check_call(microvm, name, 0, Via.EVENTFD)
        return
    with (
        attach(microvm.name) as attached,
        pytest.raises(EventNotSupportedError, match="no register that raises its interrupt"),
    ):
        attached.device(name).queue(0).call(allow_pause=True)


def test_a_line_is_not_called_without_a_notifier(microvm: LabMachine) -> None:
    before = interrupts(microvm)
    with (
        attach(microvm.name) as attached,
        pytest.raises(EventNotSupportedError, match="finds nothing in InterruptStatus"),
    ):
        attached.device("net0").queue(0).call(via="mmio")
    assert interrupts(microvm) == before
    assert is_as_before(microvm)


@pytest.mark.parametrize(("name", "number"), [("blk0", 1), ("slow0", 0)])
def test_an_aarch64_guest_is_kicked_through_registers(
    virt: LabMachine, name: str, number: int
) -> None:
    check_kick(virt, name, number, Via.MMIO)


def test_an_aarch64_guest_is_kicked_and_called_through_notifiers(virt: LabMachine) -> None:
    check_kick(virt, "pblk0", 1, Via.EVENTFD)
    check_call(virt, "pblk0", 1, Via.EVENTFD)


@pytest.mark.parametrize(("name", "number"), [("slow0", 0), ("pnet0", 1)])
def test_a_message_to_the_gicv2m_calls_exactly_its_queue(
    virt: LabMachine, name: str, number: int
) -> None:
    check_call(virt, name, number, Via.MMIO)


def test_an_io_bar_that_is_memory_is_not_kicked_as_a_port(virt: LabMachine) -> None:
    with attach(virt.name) as attached:
        queue = attached.device("old0").queue(0)
        with pytest.raises(EventNotSupportedError, match="no legacy I/O BAR"):
            queue.kick(via="ioport")
        with pytest.raises(EventNotSupportedError, match="mmio: its doorbell is not known"):
            queue.kick(allow_pause=True)


def check_commands(machine: LabMachine) -> None:
    for command in (("show",), ("diagnose", "--duration", "0.3")):
        words = [sys.executable, "-m", "kickcall", command[0], machine.name, *command[1:]]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "unknown" not in done.stdout


def test_the_commands_know_a_machine_without_pci(microvm: LabMachine) -> None:
    check_commands(microvm)


def test_the_commands_know_an_aarch64_guest(virt: LabMachine) -> None:
    check_commands(virt)


def check_busy(machine: LabMachine, kinds: list[tuple[str, str, int]]) -> None:
    """Inject every one of `kinds` while its device is used; nothing may fail or complain."""
    complaints = kernel_complaints(machine)
    disks = sorted({name for name, _, _ in kinds if not name.endswith("net0")})
    readers = [machine.guest.start(io_until_told(machine, name)) for name in disks]
    pinger = machine.guest.start(
        "while [ ! -e /run/stop-io ]; do ping -c 1 -W 10 10.0.2.2 || exit 1; done"
    )
    with attach(machine.name) as attached:
        for number in range(INJECTIONS if INJECTIONS <= 10 else INJECTIONS * len(kinds)):
            name, event, queue = kinds[number % len(kinds)]
            attached.device_event(name, event, queue, allow_pause=True)
    machine.guest.run(STOP_IO)
    for command in (*readers, pinger):
        status, output = command.wait(timeout=300)
        assert status == 0, output
    assert kernel_complaints(machine) == complaints
    assert is_as_before(machine)


def test_a_busy_machine_without_pci_stands_every_injection(microvm: LabMachine) -> None:
    kinds = [("blk0", "kick", 0), ("scsi0", "kick", 2), ("net0", "kick", 1)]
    if has_notifiers(microvm):
        kinds += [("blk0", "call", 0), ("scsi0", "call", 2)]
    check_busy(microvm, kinds)


def test_a_busy_aarch64_guest_stands_every_injection(virt: LabMachine) -> None:
    kinds = [("blk0", "kick", 0), ("slow0", "kick", 0), ("slow0", "call", 0), ("pnet0", "call", 0)]
    check_busy(virt, [*kinds, ("pblk0", "kick", 0), ("pblk0", "call", 0)])
