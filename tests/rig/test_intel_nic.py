"""Are Intel's cards kicked by their tails and called by their causes, and harmed by neither?"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

import pytest

from intel_cards import Writes, call_once, card_of, interface, registers
from kickcall.attached import attach
from kickcall.errors import EventNotSupportedError, QueueNotFoundError, QueueNotReadyError
from kickcall.lab.boot import boot
from kickcall.lab.spec import E1000, E1000e, Igb, MachineSpec
from kickcall.model import DeviceEvent, Via
from witness import kernel_complaints, until
from zoo import QEMUS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.attached import AttachedMachine, AttachedPciDevice
    from kickcall.lab.image import GuestImage
    from kickcall.lab.machine import LabMachine

pytestmark = pytest.mark.rig

INJECTIONS = int(os.environ.get("KICKCALL_INJECTIONS", "12"))
CARDS = (
    E1000e(id="msix0", slot=0x02),
    E1000e(id="msi0", slot=0x03),
    E1000e(id="intx0", slot=0x04),
    E1000(id="old0", slot=0x05),
)
"""e1000e in each of its three modes, which its driver is told in the order of the slots."""
MODES = "e1000e.IntMode=2,1,0"
TDT, TXDCTL, TARC0, TXDCTL_ENABLE, TARC_ENABLE = 0x3818, 0x3828, 0x3840, 1 << 25, 1 << 10


@pytest.fixture(scope="module", params=QEMUS)
def machine(request: pytest.FixtureRequest, guest_image_built: GuestImage) -> Iterator[LabMachine]:
    igb = () if request.param == "system" else (Igb(id="igb0", slot=0x06),)
    spec = MachineSpec(
        qemu=request.param,
        devices=(*CARDS, *igb),
        monitors=2,
        hotplug_ports=1,
        # Intel's own root port has MSI, where QEMU's has MSI-X.
        arguments=("-device", "ioh3420,id=old-port,chassis=9,addr=0x1b"),
        # The registers can be reached through /dev/mem, so that a test can hold packets back.
        kernel_arguments=f"ipv6.disable=1 iomem=relaxed {MODES}",
    )
    with boot(spec) as booted:
        for card in cards(booted):
            # Also waits for the link, and for the neighbour's address.
            ping = f"for i in $(seq 30); do ping -c 1 -W 1 {card.host_address} && exit; done; false"
            assert booted.guest.run(ping, timeout=60).status == 0
        yield booted


@pytest.fixture
def attached(machine: LabMachine) -> Iterator[AttachedMachine]:
    with attach(machine.name) as one:
        yield one


def cards(machine: LabMachine) -> list[E1000e]:
    return [device for device in machine.spec.devices if isinstance(device, E1000e)]


@pytest.mark.parametrize("name", ["msix0", "msi0", "intx0", "old0", "igb0"])
def test_a_cause_calls_exactly_its_queue(
    machine: LabMachine, attached: AttachedMachine, name: str
) -> None:
    device = attached.pci_device(name)
    cause_set = registers(machine, name) + (0x1520 if name == "igb0" else 0xC8)
    queues = device.queues()
    assert len(queues) == (4 if name == "igb0" else 2)
    for queue in queues:
        with Writes(machine, cause_set) as writes:
            call_once(machine, device, queue, writes)


def register(machine: LabMachine, address: int, value: int | None = None) -> int:
    """Read a register in the guest, after it was written if `value` says so."""
    write = f"devmem {address:#x} 32 {value:#x} && " if value is not None else ""
    done = machine.guest.run(f"{write}devmem {address:#x} 32")
    assert done.status == 0, done.output
    return int(done.output, 16)


@pytest.mark.parametrize("name", ["msix0", "msi0", "intx0", "igb0"])
def test_a_kick_sends_the_packet_that_was_held_back(
    machine: LabMachine, attached: AttachedMachine, name: str
) -> None:
    device = attached.pci_device(name)
    base = registers(machine, name)
    rings = [queue for queue, what in device.queues().items() if what.startswith("transmit")]
    tails = [base + TDT + 0x100 * (queue // 2) for queue in rings]
    # A card whose ring is switched off takes the new tail and does nothing.
    if name == "igb0":
        switches = {at + TXDCTL - TDT: TXDCTL_ENABLE for at in tails}
    else:
        switches = {base + TARC0: TARC_ENABLE}
    on = {at: register(machine, at) for at in switches}
    assert all(on[at] & bit for at, bit in switches.items())
    held: list[int] = []

    def tails_differ(before: list[int]) -> bool:
        held[:] = [register(machine, at) for at in tails]
        return held != before

    for _ in range(5):
        for at, bit in switches.items():
            register(machine, at, on[at] & ~bit)
        before = [register(machine, at) for at in tails]
        # It waits for longer than all of this may take.
        ping = machine.guest.start(f"ping -c 1 -W 50 {card_of(machine, name).host_address}")
        until(partial(tails_differ, before), "the new tail")
        waiting = list(held)
        for at, value in on.items():
            register(machine, at, value)
        sent_before = ping.done
        for queue in rings:
            result = device.raise_event("kick", queue, via="mmio")
            assert result.target.startswith(f"the tail register of transmit {queue // 2} at ")
        until(lambda: ping.done or tails_differ(waiting), "the answer", timeout=60)  # noqa: B023
        if not tails_differ(waiting):
            break
        # On a busy host this took more than a second: Linux has reset the card that hung.
        ping.kill()
    else:
        pytest.fail("the driver reset the card each time")
    assert not sent_before, "the packet was sent without a kick"
    status, output = ping.wait()
    assert status == 0, output


@pytest.mark.parametrize(
    ("name", "queue", "offset"),
    [("msix0", 0, 0x2818), ("old0", 0, 0x2818), ("old0", 1, 0x3818), ("igb0", 0, 0x2818)],
)
def test_a_kick_writes_the_tail_that_stands_there(
    machine: LabMachine, attached: AttachedMachine, name: str, queue: int, offset: int
) -> None:
    address = registers(machine, name) + offset
    for _ in range(5):
        stands = register(machine, address)
        with Writes(machine, address) as writes:
            attached.pci_device(name).raise_event("kick", queue, via="mmio")
            written = writes.seen()
        after = register(machine, address)
        if after == stands:
            break
        # The driver went on: each side of a network asks for the other now and then (arp(7)).
    assert written == [stands]
    assert after == stands


@pytest.mark.parametrize(("name", "interrupts"), [("hot0", "msi-x"), ("old-port", "msi")])
def test_a_root_ports_vectors_are_called_by_their_messages(
    machine: LabMachine, attached: AttachedMachine, name: str, interrupts: str
) -> None:
    port = attached.pci_device(name)
    assert port.kind == "PCI"
    assert set(port.queues().values()) == {f"{interrupts} vector"}
    with pytest.raises(EventNotSupportedError, match="has no mmio way to kick"):
        port.raise_event("kick", 0, via="mmio")
    count = len(port.queues())
    with pytest.raises(QueueNotFoundError, match=f"vectors are 0 to {count - 1}"):
        port.raise_event("call", count, via="mmio")
    raised = set()
    for queue in port.queues():
        before = port_interrupts(machine)
        port.raise_event("call", queue, via="mmio")
        until(lambda: port_interrupts(machine) != before, "the port's interrupt")  # noqa: B023
        after = port_interrupts(machine)
        (line,) = (line for line in after if after[line] != before[line])
        assert after[line] == before[line] + 1
        raised.add(line)
    assert len(raised) == count


def port_interrupts(machine: LabMachine) -> dict[str, int]:
    """Return how often the guest took each interrupt of its root ports, by the numbers of these."""
    counts = {}
    said = machine.guest.run("grep -E 'aerdrv|PCIe|pciehp' /proc/interrupts").output
    for line in said.splitlines():
        number, _, rest = line.partition(":")
        counts[number.strip()] = sum(int(word) for word in rest.split() if word.isdigit())
    return counts


def test_what_cannot_be_is_refused_with_the_reason(
    machine: LabMachine, attached: AttachedMachine
) -> None:
    device = attached.pci_device("intx0")
    with pytest.raises(QueueNotReadyError, match="the driver does not use receive 1"):
        device.call(2, allow_pause=True)
    with pytest.raises(QueueNotFoundError, match="its queues are 0 to 3"):
        device.kick(4, allow_pause=True)
    with pytest.raises(EventNotSupportedError, match="--allow-pause"):
        device.call(0)
    ethernet = interface(machine, "intx0")
    card = card_of(machine, "intx0")
    machine.guest.run(f"ip link set {ethernet} down")
    try:
        with pytest.raises(QueueNotReadyError, match="the interface is down"):
            attached.pci_device("intx0").call(0, allow_pause=True)
    finally:
        machine.guest.run(
            f"ip link set {ethernet} up; for i in $(seq 30); do "
            f"ping -c 1 -W 1 {card.host_address} && exit; done",
            timeout=60,
        )


def test_the_rfcs_function_finds_cards_too(attached: AttachedMachine) -> None:
    result = attached.device_event(
        "/machine/peripheral/msix0", "call", 1, allow_pause=True, dry_run=True
    )
    assert (result.device, result.via, result.dry_run) == (
        "/machine/peripheral/msix0",
        Via.MMIO,
        True,
    )
    offers = attached.pci_device("msix0").events()
    assert {(one.queue, one.name, one.event, one.via) for one in offers} == {
        (queue, name, event, Via.MMIO)
        for queue, name in ((0, "receive 0"), (1, "transmit 0"))
        for event in DeviceEvent
    }


def events_in_turn(
    devices: list[AttachedPciDevice],
) -> Iterator[tuple[AttachedPciDevice, str, int]]:
    while True:
        for queue in (0, 1):
            for event in ("call", "kick"):
                for device in devices:
                    yield device, event, queue


def test_busy_cards_are_called_and_kicked_without_harm(
    machine: LabMachine, attached: AttachedMachine
) -> None:
    before = kernel_complaints(machine)
    echoed = 256 << 10
    traffic = [
        machine.guest.start(
            "until [ -e /run/stop-traffic ]; do "
            f"[ $(head -c {echoed} /dev/zero | nc {card.echo_address} 7 | wc -c) = {echoed} ] "
            "|| exit 1; done"
        )
        for card in cards(machine)
    ]
    turns = events_in_turn([attached.pci_device(card.id) for card in cards(machine)])
    for _, (device, event, queue) in zip(range(INJECTIONS), turns, strict=False):
        device.raise_event(event, queue, via="mmio")
    machine.guest.run("touch /run/stop-traffic")
    for command in traffic:
        status, output = command.wait(timeout=60)
        assert status == 0, output
    assert kernel_complaints(machine) == before
    assert machine.qmp("query-status")["running"]
