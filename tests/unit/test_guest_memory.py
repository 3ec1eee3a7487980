"""Is guest RAM found in what QEMU prints, and does no address ever lead outside it?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kickcall.errors import MapError
from kickcall.vmm.guest_memory import GuestMemory, RamRange, parse_flat_view, read_guest_memory

DATA = Path(__file__).parent / "data"
MIB = 1 << 20

RECORDED = {
    # `info mtree -f` of a running q35 machine of 256 MiB: below the PCI hole the BIOS has made
    # the shadowed ROMs read-only, so its RAM is in three runs.
    "7.2": [(0, 0xC3000), (0xE8000, 0x8000), (0x100000, 255 * MIB)],
    "10.0": [(0, 0xC3000), (0xE4000, 0xC000), (0x100000, 255 * MIB)],
}


@pytest.mark.parametrize("version", RECORDED)
def test_the_ram_that_the_cpus_see_is_read_from_a_recorded_flat_view(version: str) -> None:
    text = (DATA / f"mtree-{version}.txt").read_text()
    assert parse_flat_view(text) == RECORDED[version]


def test_ram_that_only_a_device_sees_does_not_count() -> None:
    text = """FlatView #0
 AS "virtio-blk-pci", root: bus master container
 Root memory region: system
  0000000000000000-000000000fffffff (prio 0, ram): of-the-device

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-0000000000000fff (prio 0, ram): pc.ram KVM
  0000000000001000-0000000000001fff (prio 1, rom): bios
  0000000000002000-0000000000002fff (prio 0, romd): flash
  00000000fd000000-00000000fd000fff (prio 1, i/o): msix
  00000000fe000000-00000000fe000fff (prio 0, ramd): vfio BAR
  0000000100000000-000000017fffffff (prio -1, ram): pc.ram @0000000080000000
"""
    assert parse_flat_view(text) == [(0, 0x1000), (0x1_0000_0000, 0x8000_0000)]


@pytest.mark.parametrize(
    "text", ["", "FlatView #", "No memory", 'FlatView #0\n AS "I/O", root: io']
)
def test_text_without_a_view_of_memory_has_no_ram(text: str) -> None:
    assert parse_flat_view(text) == []


@given(st.text())
def test_no_text_makes_the_parser_fail(text: str) -> None:
    parse_flat_view(text)
    parse_flat_view(f'FlatView #0\n AS "memory", root: system\n{text}')


HOLE = GuestMemory(
    [
        RamRange(0x100000, 0x7F00_0010_0000, 0x1000),
        RamRange(0, 0x7F00_0000_0000, 0x1000),
        RamRange(0x1000, 0x7F00_0000_1000, 0x1000),  # goes on where the first one ends
        RamRange(0x2000, 0x5500_0000_0000, 0x1000),  # goes on in the guest only
    ]
)


@pytest.mark.parametrize(
    ("gpa", "length", "hva"),
    [
        (0, 1, 0x7F00_0000_0000),
        (0xFFF, 1, 0x7F00_0000_0FFF),
        (0, 0x1000, 0x7F00_0000_0000),
        (0xFFC, 8, 0x7F00_0000_0FFC),  # across two runs that are one in QEMU
        (0, 0x2000, 0x7F00_0000_0000),
        (0x1FFC, 4, 0x7F00_0000_1FFC),
        (0x1FFC, 8, None),  # across two runs that are far apart in QEMU
        (0x2000, 0x1000, 0x5500_0000_0000),
        (0x2FFF, 2, None),  # its end is no RAM
        (0x3000, 1, None),
        (0xFFFFF, 1, None),
        (0x100FFF, 1, 0x7F00_0010_0FFF),
        (0x100FFF, 2, None),
        (0x101000, 1, None),
        (2**64 - 1, 1, None),
        (2**64 - 1, 2, None),
        (0, 2**64, None),
        (0, 0, None),
        (0, -1, None),
        (-1, 1, None),
    ],
)
def test_an_area_is_translated_only_if_all_of_it_is_ram_in_one_piece(
    gpa: int, length: int, hva: int | None
) -> None:
    assert HOLE.translate(gpa, length) == hva


def test_a_machine_without_ram_translates_nothing() -> None:
    assert GuestMemory([]).translate(0, 1) is None


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8), st.booleans()), max_size=6),
    st.integers(-2, 120),
    st.integers(-1, 60),
)
def test_every_translated_byte_is_the_byte_of_a_run(
    layout: list[tuple[int, int, bool]], gpa: int, length: int
) -> None:
    runs, bytes_of, at, host = [], {}, 0, 1000
    for gap, size, adjacent in layout:
        at += gap
        host += 0 if adjacent else 500
        runs.append(RamRange(at, host, size))
        bytes_of.update({at + k: host + k for k in range(size)})
        at, host = at + size, host + size
    found = GuestMemory(runs).translate(gpa, length)
    whole = length > 0 and all(
        bytes_of.get(gpa + k) == bytes_of.get(gpa, -9999) + k for k in range(length)
    )
    assert found == (bytes_of[gpa] if whole else None)


class PlayedMonitor:
    """A human monitor that answers from a list."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def execute(self, command: str, arguments: Any = None) -> Any:
        raise AssertionError(f"{command} is not needed for this")

    def hmp(self, line: str) -> str:
        self.asked.append(line)
        return self.answers.get(line, "")


VIEW = (DATA / "mtree-7.2.txt").read_text()


def test_each_run_is_asked_for_its_address_in_qemu() -> None:
    # As the machine of mtree-7.2.txt answered; 0x7f961bfff000 is where its memory begins.
    base = 0x7F961BFFF000
    monitor = PlayedMonitor(
        {"info mtree -f": VIEW}
        | {
            f"gpa2hva {gpa:#x}": f"Host virtual address for {gpa:#x} (ram) is {base + gpa:#x}\r\n"
            for gpa in (0, 0xE8000, 0x100000)
        }
    )
    memory = read_guest_memory(monitor)
    assert memory.translate(0x100000, 4096) == base + 0x100000
    assert memory.translate(0xC3000, 1) is None  # a shadowed ROM
    assert memory.translate(256 * MIB - 1, 1) == base + 256 * MIB - 1
    assert memory.translate(256 * MIB - 1, 2) is None
    assert len(monitor.asked) == 4


def test_a_run_that_goes_away_between_two_questions_is_no_ram() -> None:
    monitor = PlayedMonitor(
        {
            "info mtree -f": VIEW,
            "gpa2hva 0x0": "Host virtual address for 0x0 (ram) is 0x7f0000000000",
            "gpa2hva 0x100000": "No memory is mapped at address 0x100000",
        }
    )
    memory = read_guest_memory(monitor)
    assert memory.translate(0x1000, 1) == 0x7F0000001000
    assert memory.translate(0x100000, 1) is None


def test_a_monitor_that_shows_no_ram_is_an_error() -> None:
    with pytest.raises(MapError, match="no guest RAM"):
        read_guest_memory(PlayedMonitor({}))
