"""Does a card that no driver serves interrupt as its class says, and only where it was set up?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.devices.pci import message_write
from kickcall.errors import EventNotSupportedError, QmpCommandError, QueueNotReadyError
from kickcall.lab.qtest import Qtest, boot_without_guest
from kickcall.lab.qtest_pci import PciFunction
from kickcall.lab.spec import E1000, E1000e, Igb, MachineSpec
from kickcall.vmm.monitor import borrow
from kickcall.vmm.pci_view import Interrupts, look
from served import serving
from zoo import QEMUS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kickcall.attached import AttachedPciDevice
    from kickcall.lab.machine import LabMachine

pytestmark = pytest.mark.rig

RCTL, TCTL, ENABLE, IMS, ICS, IVAR = 0x100, 0x400, 1 << 1, 0xD0, 0xC8, 0xE4
RDLEN, RDT, TDLEN, TDT = 0x2808, 0x2818, 0x3808, 0x3818
MSI, MSIX = 0x05, 0x11


class Card:
    """A card of a machine without a guest, driven as a driver would."""

    def __init__(self, machine: LabMachine, qtest: Qtest, name: str) -> None:
        self.qtest = qtest
        self.pci = PciFunction(qtest, machine.device(name).slot)
        self.bars = self.pci.enable()
        self.landing = qtest.allocate(4 * 32)

    def write(self, offset: int, value: int) -> None:
        self.qtest.batch([f"writel {self.bars[0] + offset:#x} {value:#x}"])

    def read(self, offset: int) -> int:
        return self.qtest.number(f"readl {self.bars[0] + offset:#x}")

    def up(self) -> None:
        """Set a ring up in each direction: nothing is in them."""
        self.write(RDLEN, 0x1000)
        self.write(TDLEN, 0x1000)
        self.write(RCTL, ENABLE)
        self.write(TCTL, ENABLE)

    def enable_msi(self) -> None:
        (at,) = (one.offset for one in self.pci.capabilities() if one.id == MSI)
        self.pci.set_config(at + 4, self.landing)
        self.pci.set_config(at + 8, 0)
        self.pci.set_config(at + 12, 0x1234, 2)  # 64 bits wide (e1000e.c, igb.c: msi_init)
        self.pci.set_config(at + 2, self.pci.config(at, 4) >> 16 | 1, 2)

    def messages(self) -> list[int]:
        """Return the numbers of the MSI-X vectors whose messages came since the last look."""
        words = [self.landing + 4 * vector for vector in range(32)]
        came = [number for number, at in enumerate(words) if self.qtest.number(f"readl {at:#x}")]
        self.qtest.batch([f"writel {at:#x} 0" for at in words])
        return came


@pytest.fixture(scope="module", params=QEMUS)
def machine(request: pytest.FixtureRequest) -> Iterator[LabMachine]:
    igb = () if request.param == "system" else (Igb(id="igb0"),)
    devices = (E1000e(id="msix0"), E1000e(id="msi0"), E1000e(id="intx0"), E1000(id="old0"), *igb)
    with boot_without_guest(MachineSpec(qemu=request.param, devices=devices, monitors=2)) as one:
        yield one


@pytest.fixture
def qtest(machine: LabMachine) -> Iterator[Qtest]:
    with Qtest(machine) as one:
        # The configuration space into memory, as firmware does (hw/pci-host/q35.c: PCIEXBAR).
        PciFunction(one, 0).set_config(0x60, 0xB000_0001)
        yield one


@pytest.fixture
def cards(machine: LabMachine) -> Iterator[dict[str, AttachedPciDevice]]:
    with attach(machine.pid) as attached:
        yield {device.info.id: device for device in attached.pci_devices()}


def test_by_msix_each_ring_has_the_message_that_ivar_names(
    machine: LabMachine, qtest: Qtest, cards: dict[str, AttachedPciDevice]
) -> None:
    card, device = Card(machine, qtest, "msix0"), cards["msix0"]
    with pytest.raises(QueueNotReadyError, match="the interface is down: no receive is enabled"):
        device.call(0, allow_pause=True)
    card.up()
    assert device.queues() == {0: "receive 0", 1: "transmit 0"}
    assert card.pci.enable_msix(card.bars, card.landing) == 5
    with pytest.raises(EventNotSupportedError, match=r"gave receive 0 no vector \(IVAR\)"):
        device.call(0, allow_pause=True)
    card.write(IVAR, 0x8 | 3 | (0x8 | 1) << 8)
    card.write(IMS, 1 << 20 | 1 << 22)
    assert card.messages() == []
    device.call(0, allow_pause=True)
    assert card.messages() == [3]
    device.call(1, allow_pause=True)
    assert card.messages() == [1]


def test_a_masked_vector_is_refused_and_nothing_is_written(
    machine: LabMachine, qtest: Qtest, cards: dict[str, AttachedPciDevice]
) -> None:
    card, device = Card(machine, qtest, "msix0"), cards["msix0"]
    card.up()
    card.pci.enable_msix(card.bars, card.landing)
    card.write(IVAR, 0x8 | 3)
    table = next(one.offset for one in card.pci.capabilities() if one.id == MSIX)
    where = card.pci.config(table + 4)
    entry = card.bars[where & 7] + (where & ~7) + 3 * 16
    qtest.batch([f"writel {entry + 12:#x} 1"])
    with pytest.raises(EventNotSupportedError, match="MSI-X vector 3 is masked"):
        device.call(0, allow_pause=True)
    qtest.batch([f"writel {entry + 12:#x} 0"])
    assert card.messages() == []


@pytest.mark.parametrize("name", ["msi0", "intx0", "old0"])
def test_by_msi_and_intx_all_rings_have_one_interrupt(
    machine: LabMachine, qtest: Qtest, cards: dict[str, AttachedPciDevice], name: str
) -> None:
    card, device = Card(machine, qtest, name), cards[name]
    card.up()
    if name == "msi0":
        card.enable_msi()
    card.write(IMS, 0x81)
    for queue, cause in ((0, 0x80), (1, 0x01)):
        card.read(0xC0)  # as a driver's handler: the causes are cleared by that
        assert card.read(ICS) & 0x81 == 0
        result = device.raise_event("call", queue, via="mmio")
        assert result.target.startswith(f"interrupt cause {cause:#x} to ")
        assert card.read(ICS) & 0x81 == cause
        if name == "msi0":
            assert card.messages() == [0]
    # A cause that waits is no news to QEMU from 8.1 on: another one is.
    result = device.raise_event("call", 1, via="mmio")
    assert result.target.startswith("interrupt cause 0x80 to ")
    card.write(IMS + 8, 0xFFFFFFFF)  # IMC
    if name != "msi0":
        card.pci.set_config(0x04, 0b111 | 1 << 10, 2)
        with pytest.raises(EventNotSupportedError, match="INTx is switched off"):
            device.call(0, allow_pause=True)


def test_bus_mastering_off_is_refused(
    machine: LabMachine, qtest: Qtest, cards: dict[str, AttachedPciDevice]
) -> None:
    card = Card(machine, qtest, "msix0")
    card.up()
    card.pci.enable_msix(card.bars, card.landing)
    card.pci.set_config(0x04, 0b011, 2)
    with pytest.raises(EventNotSupportedError, match="bus mastering is off"):
        cards["msix0"].call(0, allow_pause=True)


@pytest.mark.parametrize(("name", "queue", "tail"), [("intx0", 0, RDT), ("old0", 1, TDT)])
def test_a_kick_writes_back_the_tail_that_stands_in_the_pause(
    machine: LabMachine,
    qtest: Qtest,
    cards: dict[str, AttachedPciDevice],
    name: str,
    queue: int,
    tail: int,
) -> None:
    card, device = Card(machine, qtest, name), cards[name]
    card.up()
    card.write(TCTL, ENABLE)
    card.write(tail, 0)
    log = machine.folder / "qemu.log"
    begin = log.stat().st_size
    line = "trace-event memory_region_ops_write {}"
    machine.qmp("human-monitor-command", {"command-line": line.format("on")})
    device.raise_event("kick", queue, via="mmio")
    machine.qmp("human-monitor-command", {"command-line": line.format("off")})
    told = log.read_bytes()[begin:].decode(errors="replace")
    assert f"addr {card.bars[0] + tail:#x} value 0x0 size 4 " in told


def test_igb_has_a_cause_for_each_vector(
    machine: LabMachine, qtest: Qtest, cards: dict[str, AttachedPciDevice]
) -> None:
    card, device = Card(machine, qtest, "igb0"), cards["igb0"]
    card.up()
    card.pci.enable_msix(card.bars, card.landing)
    card.write(0x1514, 1 << 4)  # GPIE: MSI-X mode
    card.write(0x1700, 0x80 | 5 | (0x80 | 2) << 8)
    card.write(0x1524, 0xFF)  # EIMS
    assert device.queues() == {0: "receive 0", 1: "transmit 0"}
    device.call(0, allow_pause=True)
    assert card.messages() == [5]
    device.call(1, allow_pause=True)
    assert card.messages() == [2]


def test_the_rfcs_command_calls_cards_too_where_a_pause_is_allowed(
    machine: LabMachine, qtest: Qtest, tmp_path: Path
) -> None:
    card = Card(machine, qtest, "msi0")
    card.up()
    card.enable_msi()
    card.write(IMS, 0x81)
    card.messages()  # of causes that were set before they were enabled
    listen = tmp_path / "served"
    arguments = {"dev": "msi0", "event": "call", "queue": 0}
    with (
        serving(machine, listen),
        borrow([str(listen)])() as monitor,
        pytest.raises(QmpCommandError, match="--allow-pause"),
    ):
        monitor.execute("x-debug-device-event", arguments)
    assert card.messages() == []
    card.read(0xC0)
    with serving(machine, listen, "--allow-pause"), borrow([str(listen)])() as monitor:
        assert monitor.execute("x-debug-device-event", arguments) == {}
        assert card.messages() == [0]
        with pytest.raises(QmpCommandError, match="has no virtio or PCI device 'nic9'"):
            monitor.execute("x-debug-device-event", arguments | {"dev": "nic9"})


def test_a_vector_that_goes_to_memory_is_only_the_devices_to_write(
    machine: LabMachine, qtest: Qtest
) -> None:
    card = Card(machine, qtest, "msix0")
    card.pci.enable_msix(card.bars, card.landing)
    with attach(machine.pid) as attached:
        session = attached._session
        (mapped,) = (one for one in session.pci_devices() if one.device.id == "msix0")
        with session.borrow() as monitor:
            view = look(monitor, mapped)
    assert view.interrupts is Interrupts.MSIX
    assert [one.message.data for one in view.vectors] == [1] * 5
    found = message_write(view, 0, ())
    assert isinstance(found, str)
    assert "where pc.ram is: only a device may write there" in found
