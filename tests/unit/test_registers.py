"""Is a register written by hand only where that is what the device or the driver does?"""

from __future__ import annotations

import re

import pytest

from kickcall.vmm.interrupts import Region
from kickcall.vmm.registers import doorbell_write, message_refusal
from kickcall.vmm.wiring import Doorbell, Message, QueueWiring

# As `info mtree -f` shows them on q35 under TCG and KVM, and on arm virt with a GICv2m and an ITS.
APIC = [Region(0xFEE00000, 0xFEEFFFFF, "apic-msi")]
KVM_APIC = [Region(0xFEE00000, 0xFEEFFFFF, "kvm-apic-msi")]
GIC_V2M = [Region(0x08020000, 0x08020FFF, "gicv2m")]
ITS = [Region(0x08080000, 0x0808FFFF, "control"), Region(0x08090000, 0x0809FFFF, "translation")]


def message(address: int = 0xFEE02004, data: int = 0x27, *, masked: bool = False) -> Message:
    return Message(1, address, data, masked)


@pytest.mark.parametrize("memory", [APIC, KVM_APIC])
@pytest.mark.parametrize("address", [0xFEE00000, 0xFEE0100C, 0xFEEFF004])
def test_a_message_to_an_apic_is_what_the_device_sends(memory: list[Region], address: int) -> None:
    # Destination in bits 12 to 19, redirection hint in 3, mode in 2 (Intel SDM 3A, 11.11.1).
    assert message_refusal(message(address), memory, ()) == ""


def test_a_message_to_a_gicv2m_is_what_the_device_sends() -> None:
    assert message_refusal(message(0x08020040, 80), GIC_V2M, ()) == ""


@pytest.mark.parametrize(
    ("refused", "memory", "command", "reason"),
    [
        (message(masked=True), APIC, (), "vector 1 is masked: .* kept pending"),
        (message(0, 0), APIC, (), "has no message"),
        (message(0xFEE00018), APIC, (), "remapped by a virtual IOMMU"),
        (message(), APIC, ("-device", "amd-iommu"), "amd-iommu"),
        (message(0xFEE01020), KVM_APIC, (), r"more than 8 bits \(x2APIC\)"),
        (message(0x08090040), ITS, (), "0x8090040, where translation is"),
        (message(0x100000), APIC, (), "0x100000, where nothing is"),
        (message(0x1FEE00000), APIC, (), "where nothing is"),
    ],
)
def test_a_message_that_a_processor_cannot_send_is_refused(
    refused: Message, memory: list[Region], command: tuple[str, ...], reason: str
) -> None:
    assert re.search(reason, message_refusal(refused, memory, command))


def wiring(*doorbells: Doorbell) -> QueueWiring:
    return QueueWiring("/machine/x", "x", 3, None, None, doorbells, "", None, "")


LEGACY = Doorbell("pio", 0xC010, (2,), 3)
MODERN = Doorbell("mmio", 0xFE00300C, (0, 2), None)


def test_a_kick_is_the_queues_number_in_its_notify_register() -> None:
    # virtio 1.4, 4.1.5.2: 16 bits, little-endian.
    assert doorbell_write(wiring(LEGACY, MODERN), 3, frozenset()) == (0xFE00300C, b"\x03\x00")


def test_an_io_port_is_no_memory() -> None:
    assert doorbell_write(wiring(LEGACY), 3, frozenset()) == (
        "its doorbell is an I/O port, and no memory"
    )


def test_a_kick_that_carries_the_rings_position_is_the_drivers_alone() -> None:
    said = doorbell_write(wiring(MODERN), 3, frozenset({"VIRTIO_F_NOTIFICATION_DATA"}))
    assert isinstance(said, str)
    assert "VIRTIO_F_NOTIFICATION_DATA" in said
