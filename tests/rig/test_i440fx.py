"""Is everything raised on `-M pc`, too, which has no configuration space in memory?

It is what QEMU and Proxmox VE give who names no machine type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from intel_cards import Writes, call_once, registers
from kickcall.attached import attach
from kickcall.lab.boot import boot
from kickcall.lab.spec import E1000, MachineSpec, VirtioBlk, VirtioNet
from kickcall.model import Via
from witness import NotifyTrace, interrupts, interrupts_after, rise, until, watch_queues

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.attached import AttachedMachine
    from kickcall.lab.image import GuestImage
    from kickcall.lab.machine import LabMachine

pytestmark = pytest.mark.rig

TDT, ICS = 0x3818, 0xC8


@pytest.fixture(scope="module")
def machine(guest_image_built: GuestImage) -> Iterator[LabMachine]:
    card = E1000(id="old0", slot=0x05)
    spec = MachineSpec(
        devices=(card, VirtioBlk(id="blk0", queues=2), VirtioNet(id="net0")),
        monitors=1,
        arguments=("-machine", "pc"),
        kernel_arguments="ipv6.disable=1",
    )
    with boot(spec) as booted:
        ping = f"for i in $(seq 30); do ping -c 1 -W 1 {card.host_address} && exit; done; false"
        assert booted.guest.run(ping, timeout=60).status == 0
        watch_queues(booted)
        yield booted


@pytest.fixture
def attached(machine: LabMachine) -> Iterator[AttachedMachine]:
    with attach(machine.name) as one:
        yield one


@pytest.mark.parametrize("via", [Via.EVENTFD, Via.MMIO])
def test_a_queue_is_called_once(machine: LabMachine, attached: AttachedMachine, via: Via) -> None:
    before = interrupts(machine)
    assert attached.device("blk0").queue(1).call(via=via, allow_pause=True).via is via
    assert rise(before, interrupts_after(machine, before)) == {("blk0", "req.1"): 1}


def test_a_queue_without_a_notifier_is_called_by_its_message(
    machine: LabMachine, attached: AttachedMachine
) -> None:
    before = interrupts(machine)
    assert attached.device("net0").queue(1).call(allow_pause=True).via is Via.MMIO
    assert rise(before, interrupts_after(machine, before)) == {("net0", "output.0"): 1}


@pytest.mark.parametrize("via", [Via.EVENTFD, Via.MMIO, Via.IOPORT])
def test_a_queue_is_kicked(machine: LabMachine, attached: AttachedMachine, via: Via) -> None:
    queue = attached.device("blk0").queue(0)
    with NotifyTrace(machine) as trace:
        assert queue.kick(via=via, allow_pause=True).via is via
        until(lambda: 0 in {number for _, number in trace.seen()}, "QEMU looks at queue 0")


def test_a_card_is_called_by_its_cause_and_kicked_by_its_tail(
    machine: LabMachine, attached: AttachedMachine
) -> None:
    card, base = attached.pci_device("old0"), registers(machine, "old0")
    for queue in card.queues():
        with Writes(machine, base + ICS) as writes:
            call_once(machine, card, queue, writes)
    with Writes(machine, base + TDT) as writes:
        card.raise_event("kick", 1, via="mmio")
        (written,) = writes.seen()
    assert written in range(256)
