"""Is the message of a PCI device's vector found, and refused where a processor cannot send it?"""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, ClassVar, cast

import pytest

from kickcall.devices.e1000e import E1000e
from kickcall.devices.igb import Igb
from kickcall.devices.intel_nic import Cause, IntelNic, other_cause
from kickcall.devices.pci import message_write
from kickcall.errors import QueueNotFoundError
from kickcall.model import PciDevice
from kickcall.vmm.interrupts import Region
from kickcall.vmm.pci_devices import MappedPci, list_pci_devices
from kickcall.vmm.pci_view import Interrupts, PciView, Vector, entry_check, look
from kickcall.vmm.wiring import Message

if TYPE_CHECKING:
    from kickcall.vmm.monitor import Monitor
    from kickcall.vmm.session import VmmSession

APIC = Region(0xFEE00000, 0xFEEFFFFF, "apic-msi")
TABLE = Region(0xFEB00000, 0xFEB0004F, "msix-table")
ECAM = 0xB0000000
MASTER = 1 << 2


class PlayedMonitor:
    """Answers as QEMU does for one card at 00:03.0, whose configuration space is `space`."""

    def __init__(self, space: bytes, table: bytes = bytes(80), *, ecam: bool = True) -> None:
        self.memory = {TABLE.start: table, TABLE.start + 0x800: bytes(4)}
        if ecam:
            self.memory[ECAM + (3 << 15)] = space
        self.ecam = ecam

    def execute(self, command: str, arguments: object = None) -> object:
        assert command == "query-pci"
        return [{"bus": 0, "devices": [FUNCTION]}]

    def hmp(self, line: str) -> str:
        if line == "info mtree -f":
            ecam = f"  {ECAM:016x}-{ECAM + (1 << 28) - 1:016x} (prio 0, i/o): pcie-mmcfg-mmio\n"
            return (
                'FlatView #0\n AS "memory", root: system\n'
                + (ecam if self.ecam else "")
                + f"  {TABLE.start:016x}-{TABLE.end:016x} (prio 0, i/o): msix-table\n"
                f"  {TABLE.start + 0x800:016x}-{TABLE.start + 0x807:016x} (prio 0, i/o): msix-pba\n"
                f"  {APIC.start:016x}-{APIC.end:016x} (prio 4096, i/o): apic-msi\n"
            )
        words = line.split()
        count, address = int(words[1][1:-2]), int(words[2], 16)
        for start, data in self.memory.items():
            if start <= address < start + len(data):
                raw = data[address - start : address - start + 4 * count].ljust(4 * count, b"\0")
                values = struct.unpack(f"<{count}I", raw)
                return f"{address:016x}: " + " ".join(f"0x{value:08x}" for value in values) + "\n"
        raise AssertionError(f"nothing is at {address:#x}")


FUNCTION = {
    "bus": 0,
    "slot": 3,
    "function": 0,
    "qdev_id": "nic0",
    "id": {"vendor": 0x8086, "device": 0x10D3},
    "regions": [{"bar": 3, "type": "memory", "address": TABLE.start, "size": 0x4000}],
}
MAPPED = MappedPci(PciDevice("/machine/peripheral/nic0", "e1000e", 0, 3, 0), FUNCTION)


def configuration(*capabilities: bytes, command: int = MASTER) -> bytes:
    """Return a configuration space with these capabilities, whose first two bytes are id and 0."""
    space = bytearray(256)
    struct.pack_into("<HHHH", space, 0, 0x8086, 0x10D3, command, 1 << 4)
    at = 0x40
    space[0x34] = at if capabilities else 0
    for number, capability in enumerate(capabilities):
        space[at : at + len(capability)] = capability
        following = at + 0x20
        space[at + 1] = following if number < len(capabilities) - 1 else 0
        at = following
    return bytes(space)


def msix(control: int) -> bytes:
    return struct.pack("<BBHII", 0x11, 0, control, 3, 0x803)


def entry(address: int = 0xFEE01000, data: int = 0x41, control: int = 0) -> bytes:
    return struct.pack("<QII", address, data, control)


def seen(space: bytes, table: bytes = bytes(80), *, ecam: bool = True) -> PciView:
    monitor = PlayedMonitor(space, table, ecam=ecam)
    return look(cast("Monitor", monitor), MAPPED)


ENABLED = 1 << 15 | 4
"""MSI-X message control: enabled, five vectors."""


def test_an_msix_vector_is_written_as_its_table_says_and_checked_in_the_same_pause() -> None:
    view = seen(configuration(msix(ENABLED)), entry() + entry(data=0x42) + bytes(48))
    assert (view.interrupts, view.capable) == (Interrupts.MSIX, 5)
    found = message_write(view, 1, ())
    assert not isinstance(found, str)
    write, target = found
    assert (write.address, write.data) == (0xFEE01000, struct.pack("<I", 0x42))
    assert target == "MSI-X vector 1: 0x42 to 0xfee01000"
    places = {check.address: check for check in write.checks}
    space = ECAM + (3 << 15)
    assert places[space + 4].mask == places[space + 4].value == MASTER
    assert places[space + 0x40].mask == (1 << 15 | 1 << 14) << 16
    assert places[space + 0x40].value == 1 << 15 + 16
    assert places[TABLE.start + 16].value == 0xFEE01000 | 0x42 << 64


@pytest.mark.parametrize(
    ("space", "table", "reason"),
    [
        (configuration(msix(ENABLED)), entry(control=1), "vector 0 is masked: the driver does not"),
        (configuration(msix(ENABLED | 1 << 14)), entry(), "MSI-X is masked for the whole device"),
        (configuration(msix(ENABLED), command=0), entry(), "bus mastering is off"),
        (configuration(msix(ENABLED)), bytes(16), "vector 0 has no message"),
        (configuration(msix(ENABLED)), entry(0xFEE00010), "remapped by a virtual IOMMU"),
        (configuration(msix(ENABLED)), entry(0xFEE010E0), r"more than 8 bits \(x2APIC\)"),
        (configuration(msix(ENABLED)), entry(0x1000), "where nothing is"),
        (configuration(msix(4)), entry(), r"has INTx now \(the driver enabled no messages\)"),
        (configuration(), entry(), r"has INTx now \(and has no messages\)"),
    ],
)
def test_a_message_that_a_processor_cannot_send_is_refused(
    space: bytes, table: bytes, reason: str
) -> None:
    found = message_write(seen(space, table + bytes(64)), 0, ())
    assert isinstance(found, str)
    assert re.search(reason, found), found


def test_a_masked_vector_whose_interrupt_waits_says_so() -> None:
    monitor = PlayedMonitor(configuration(msix(ENABLED)), entry(control=1) + bytes(64))
    monitor.memory[TABLE.start + 0x800] = b"\x01\0\0\0"
    found = message_write(look(cast("Monitor", monitor), MAPPED), 0, ())
    assert isinstance(found, str)
    assert found.endswith("; one is pending")


def test_a_vector_that_the_device_does_not_have_is_named() -> None:
    with pytest.raises(QueueNotFoundError, match="no vector 5: its msi-x vectors are 0 to 4"):
        message_write(seen(configuration(msix(ENABLED)), entry() + bytes(64)), 5, ())


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("maskable", [False, True])
def test_the_messages_of_msi_are_numbered_in_their_data(wide: bool, maskable: bool) -> None:
    # PCI 3.0, 6.8.1: enabled, capable of 8, 4 were asked for.
    control = 1 | 3 << 1 | 2 << 4 | wide << 7 | maskable << 8
    capability = struct.pack("<BBHI", 5, 0, control, 0xFEE02000)
    capability += struct.pack("<I", 0) if wide else b""
    capability += struct.pack("<I", 0x58)
    capability += struct.pack("<II", 0b1000, 0b1000) if maskable else b""
    view = seen(configuration(capability, msix(0)))
    assert view.interrupts is Interrupts.MSI
    assert [one.message.data for one in view.vectors] == [0x58, 0x59, 0x5A, 0x5B]
    assert [one.message.masked for one in view.vectors] == [False, False, False, maskable]
    found = message_write(view, 2, ())
    assert not isinstance(found, str)
    assert found[1] == "MSI vector 2: 0x5a to 0xfee02000"
    check = view.vectors[2].check
    held = int.from_bytes(capability[4:].ljust(24, b"\0"), "little")
    assert held & check.mask == check.value
    # Whoever masks vector 2 in between keeps it from being written.
    masked = held | (1 << (96 if wide else 64) + 2)
    assert (masked & check.mask == check.value) is not maskable


def test_without_a_configuration_space_only_a_mapped_table_tells() -> None:
    view = seen(b"", entry() + bytes(64), ecam=False)
    assert (view.interrupts, view.command, view.checks) == (Interrupts.MSIX, None, ())
    found = message_write(view, 0, ())
    assert not isinstance(found, str)
    unknown = replace(view, interrupts=Interrupts.UNKNOWN, vectors=())
    assert "no configuration space in memory" in cast("str", message_write(unknown, 0, ()))


# Causes of interrupts


def card(kind: type[IntelNic], mode: Interrupts, *, command: int = MASTER) -> IntelNic:
    made = kind(cast("VmmSession", SimpleNamespace()), MAPPED)
    messages = [Message(number, 0xFEE01000, 0x40 + number, False) for number in range(5)]
    vectors = tuple(Vector(one, False, entry_check(TABLE, one)) for one in messages)
    made.__dict__["view"] = PciView(FUNCTION, [APIC], mode, vectors, 5, command, False, ())
    return made


@pytest.mark.parametrize(
    ("queue", "bits", "vector"),
    [(0, 1 << 20, 0), (1, 1 << 22, 1), (2, 1 << 21, 2), (3, 1 << 23, 3)],
)
def test_e1000es_causes_are_those_of_its_queues_by_ivar(queue: int, bits: int, vector: int) -> None:
    # 82574 datasheet, 10.2.4.9: RXQ0, RXQ1, TXQ0, TXQ1, four bits each, the highest says valid.
    registers = {0xC8: 0, 0xD0: 0, 0xE4: 0x8 | 0xA << 4 | 0x9 << 8 | 0xB << 12}
    cause = card(E1000e, Interrupts.MSIX).cause(queue, registers)
    assert isinstance(cause, Cause)
    assert (cause.register, cause.bits, cause.vector) == (0xC8, bits, vector)


def test_a_queue_without_a_vector_is_refused() -> None:
    cause = card(E1000e, Interrupts.MSIX).cause(0, {0xC8: 0, 0xD0: 0, 0xE4: 0x900})
    assert cause == "the driver gave receive 0 no vector (IVAR)"


@pytest.mark.parametrize("mode", [Interrupts.MSI, Interrupts.INTX])
@pytest.mark.parametrize(("queue", "bits"), [(0, 1 << 7), (1, 1 << 0)])
def test_one_interrupt_for_all_is_raised_by_timer_or_write_back(
    mode: Interrupts, queue: int, bits: int
) -> None:
    cause = card(E1000e, mode).cause(queue, {0xC8: 0, 0xD0: 0x9D, 0xE4: 0})
    assert cause == Cause(0xC8, bits, None)


@pytest.mark.parametrize(
    ("mode", "command", "reason"),
    [
        (Interrupts.MSI, 0, "bus mastering is off"),
        (Interrupts.INTX, MASTER | 1 << 10, "INTx is switched off"),
    ],
)
def test_an_interrupt_that_would_not_get_out_is_refused(
    mode: Interrupts, command: int, reason: str
) -> None:
    cause = card(E1000e, mode, command=command).cause(0, {0xC8: 0, 0xD0: 0x9D, 0xE4: 0})
    assert isinstance(cause, str)
    assert cause.startswith(reason)


def test_a_cause_that_is_set_already_is_replaced_by_another_that_the_driver_enabled() -> None:
    assert other_cause(0x80, 0x99, pending=0, enabled=0x9D) == 0x80
    assert other_cause(0x80, 0x99, pending=0x80, enabled=0x9D) == 0x01
    assert other_cause(0x80, 0x99, pending=0x81, enabled=0x9D) == 0x08
    assert other_cause(0x80, 0x99, pending=0x80, enabled=0) == 0x80  # waits for the driver


@pytest.mark.parametrize(
    ("queue", "register", "shift"),
    [(0, 0x1700, 0), (1, 0x1700, 8), (16, 0x1700, 16), (31, 0x171C, 24)],
)
def test_igbs_vectors_are_in_an_array_of_bytes(queue: int, register: int, shift: int) -> None:
    # 82576 datasheet, 8.8.15: IVAR n has rings n and n + 8.
    registers = {0x1504: 0, 0x1508: 0, 0x1514: 1 << 4}
    registers |= {0x1700 + 4 * number: 0 for number in range(8)}
    registers[register] = (0x80 | 3) << shift
    cause = card(Igb, Interrupts.MSIX).cause(queue, registers)
    assert isinstance(cause, Cause)
    assert (cause.register, cause.bits, cause.vector) == (0x1520, 1 << 3, 3)


# Which device is where


class PlayedTree:
    """QOM and `query-pci` of a machine with a bridge without an id, and a card behind it."""

    OBJECTS: ClassVar = {
        "/machine/peripheral": {"nic0": "child<e1000e>"},
        "/machine/peripheral-anon": {"device[0]": "child<pcie-root-port>"},
        "/machine/unattached": {
            "device[1]": "child<e1000>",
            "device[2]": "child<mch>",
            "io[0]": "x",
        },
    }
    PROPERTIES: ClassVar = {
        ("/machine/peripheral-anon/device[0]", "parent_bus"): "/machine/q35/pcie.0",
        ("/machine/peripheral-anon/device[0]", "addr"): 4 << 3,
        (
            "/machine/unattached/device[1]",
            "parent_bus",
        ): "/machine/peripheral-anon/device[0]/pcie.1",
        ("/machine/unattached/device[1]", "addr"): 0,
        ("/machine/unattached/device[2]", "parent_bus"): "/machine/q35/pcie.0",
        ("/machine/unattached/device[2]", "addr"): 0,
    }

    def execute(self, command: str, arguments: dict[str, str] | None = None) -> object:
        match command, arguments or {}:
            case "query-pci", _:
                behind = {"bus": 1, "slot": 0, "function": 0, "qdev_id": "", "regions": []}
                bridge = {"bus": {"secondary": 1}, "devices": [behind]}
                return [
                    {
                        "bus": 0,
                        "devices": [
                            {"bus": 0, "slot": 0, "function": 0, "qdev_id": ""},
                            {"bus": 0, "slot": 3, "function": 0, "qdev_id": "nic0"},
                            {
                                "bus": 0,
                                "slot": 4,
                                "function": 0,
                                "qdev_id": "",
                                "pci_bridge": bridge,
                            },
                        ],
                    }
                ]
            case "qom-list", {"path": path}:
                return [{"name": name, "type": kind} for name, kind in self.OBJECTS[path].items()]
            case "qom-list-types", _:
                return [{"name": name} for name in ("e1000", "e1000e", "mch", "pcie-root-port")]
            case "qom-get", {"path": path, "property": name}:
                return self.PROPERTIES[path, name]
        raise AssertionError(command)


def test_a_device_without_an_id_is_found_by_its_place_behind_bridges_too() -> None:
    found = list_pci_devices(cast("Monitor", PlayedTree()))
    assert {(one.device.path, one.device.kind, one.device.address) for one in found} == {
        ("/machine/peripheral/nic0", "e1000e", "00:03.0"),
        ("/machine/peripheral-anon/device[0]", "pcie-root-port", "00:04.0"),
        ("/machine/unattached/device[1]", "e1000", "01:00.0"),
        ("/machine/unattached/device[2]", "mch", "00:00.0"),
    }
