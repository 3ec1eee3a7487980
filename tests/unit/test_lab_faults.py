"""Is one thread held at the right place, are the right bytes written, and are registers found?"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import LabError
from kickcall.lab.faults import FAULTS
from kickcall.lab.guest_ram import RingFields
from kickcall.lab.ptrace import HeldThread, Syscall
from kickcall.lab.registers import find_msix
from kickcall.model import Layout, QueueMap, Rings
from kickcall.vmm.guest_memory import GuestMemory, RamRange

if TYPE_CHECKING:
    from collections.abc import Iterator

READER = """
import os, signal
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"!"))
while (data := os.read(0, 1)):
    os.write(1, data)
"""


@pytest.fixture
def reader() -> Iterator[subprocess.Popen[bytes]]:
    """A process that echoes its input byte by byte."""
    with subprocess.Popen(
        [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"0")
        assert process.stdout.read(1) == b"0"
        yield process
        process.kill()


def thread_state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


def answers(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"x")
    assert process.stdout.read(1) == b"x"


def test_a_thread_is_held_where_it_is_and_goes_on_afterwards(
    reader: subprocess.Popen[bytes],
) -> None:
    with HeldThread(reader.pid) as held:
        assert held.is_held
        assert thread_state(reader.pid) == "t"
    assert thread_state(reader.pid) in "SR"
    answers(reader)


def test_a_thread_is_held_before_it_reads_a_descriptor(reader: subprocess.Popen[bytes]) -> None:
    seen: list[Syscall] = []

    def second_read(call: Syscall) -> bool:
        if call.reads(0):
            seen.append(call)
        return len(seen) == 2

    assert reader.stdin is not None
    with HeldThread(reader.pid, second_read) as held:
        # The read in which it slept was made anew when it was traced, and ends with this byte.
        reader.stdin.write(b"a")
        held.wait()
        assert (seen[-1].number, seen[-1].first, seen[-1].entering) == (0, 0, True)
        assert thread_state(reader.pid) == "t"
    assert reader.stdout is not None
    assert reader.stdout.read(1) == b"a"
    answers(reader)


def test_a_thread_that_never_comes_by_is_let_go(reader: subprocess.Popen[bytes]) -> None:
    with HeldThread(reader.pid, lambda call: call.reads(77)) as held:
        with pytest.raises(LabError, match="did not come to where it was to be held"):
            held.wait(timeout=0.2)
        answers(reader)
    answers(reader)


def test_a_thread_that_is_traced_still_gets_its_signals(reader: subprocess.Popen[bytes]) -> None:
    assert reader.stdout is not None
    with HeldThread(reader.pid, lambda call: False):
        os.kill(reader.pid, signal.SIGUSR1)
        assert reader.stdout.read(1) == b"!"
    answers(reader)


def test_what_goes_wrong_while_looking_is_told_to_whoever_waits(
    reader: subprocess.Popen[bytes],
) -> None:
    def wrong(call: Syscall) -> bool:
        raise LabError("the notifier went away")

    with pytest.raises(LabError, match="went away"), HeldThread(reader.pid, wrong) as held:
        held.wait()
    answers(reader)


def test_a_thread_that_does_not_exist_cannot_be_held() -> None:
    with pytest.raises(LabError, match="cannot trace thread 4194305"), HeldThread(4194305):
        pass


# Guest memory: this process's own, as a guest of 64 KiB.


@pytest.fixture
def ram() -> tuple[ctypes.Array[ctypes.c_char], GuestMemory]:
    buffer = ctypes.create_string_buffer(1 << 16)
    return buffer, GuestMemory([RamRange(0, ctypes.addressof(buffer), 1 << 16)])


def fields_of(ram: GuestMemory, layout: Layout) -> RingFields:
    rings = Rings(desc=0x0, avail=0x4000, used=0x8000, num=16)
    return RingFields(os.getpid(), ram, QueueMap(0, rings, layout, None, None, 0))


def test_split_fields_lie_where_the_spec_says(
    ram: tuple[ctypes.Array[ctypes.c_char], GuestMemory],
) -> None:
    buffer, memory = ram
    fields = fields_of(memory, Layout.SPLIT)
    places = {
        "avail_flags": 0x4000,
        "avail_idx": 0x4002,
        "used_event": 0x4000 + 4 + 2 * 16,
        "used_flags": 0x8000,
        "used_idx": 0x8002,
        "avail_event": 0x8000 + 4 + 8 * 16,
    }
    for number, (field, place) in enumerate(places.items(), 0x1234):
        fields.write(field, number)
        assert struct.unpack_from("<H", buffer.raw, place) == (number,)
        assert fields.read(field) == number


def test_packed_event_areas_lie_where_the_spec_says(
    ram: tuple[ctypes.Array[ctypes.c_char], GuestMemory],
) -> None:
    buffer, memory = ram
    fields = fields_of(memory, Layout.PACKED)
    places = {
        "used_event": 0x4000,
        "avail_flags": 0x4002,
        "avail_event": 0x8000,
        "used_flags": 0x8002,
    }
    for number, (field, place) in enumerate(places.items(), 0x1234):
        fields.write(field, number)
        assert struct.unpack_from("<H", buffer.raw, place) == (number,)


@pytest.mark.parametrize("position", [0, 1, 0x7FFF, 0xFFFF])
def test_no_kick_is_owed_at_the_index_that_is_written(
    ram: tuple[ctypes.Array[ctypes.c_char], GuestMemory], position: int
) -> None:
    fields = fields_of(ram[1], Layout.SPLIT)
    event = fields.no_kick_wanted(True, position)["avail_event"]
    for published in range(1, 17):
        new = position + published
        # vring_need_event() of the spec, 2.7.10.
        assert not (new - event - 1) & 0xFFFF < (new - position) & 0xFFFF


@pytest.mark.parametrize("offset", [0, 7, 8, 15])
@pytest.mark.parametrize("wrap", [0, 1])
def test_a_packed_event_is_half_a_ring_away(
    ram: tuple[ctypes.Array[ctypes.c_char], GuestMemory], offset: int, wrap: int
) -> None:
    fields = fields_of(ram[1], Layout.PACKED)
    wanted = fields.no_call_wanted(True, offset | wrap << 15)
    far = offset + 8
    assert wanted == {
        "used_event": far % 16 | (wrap ^ far // 16) << 15,
        # RING_EVENT_FLAGS_DESC, 2.8.10
        "avail_flags": 2,
    }


def test_without_event_index_the_flag_says_it(
    ram: tuple[ctypes.Array[ctypes.c_char], GuestMemory],
) -> None:
    for layout in Layout:
        fields = fields_of(ram[1], layout)
        assert fields.no_kick_wanted(False, 5) == {"used_flags": 1}
        assert fields.no_call_wanted(False, 5) == {"avail_flags": 1}


def test_only_what_is_still_ours_is_given_back(
    ram: tuple[ctypes.Array[ctypes.c_char], GuestMemory],
) -> None:
    fields = fields_of(ram[1], Layout.SPLIT)
    fields.write("used_event", 7)
    fields.write("avail_event", 100)
    # The driver wrote its event since, the device did not.
    fields.restore({"used_event": 3, "avail_event": 4}, {"used_event": 99, "avail_event": 100})
    assert (fields.read("used_event"), fields.read("avail_event")) == (7, 4)


def test_a_ring_outside_guest_memory_is_refused() -> None:
    fields = fields_of(GuestMemory([]), Layout.SPLIT)
    with pytest.raises(LabError, match="does not lie in guest RAM"):
        fields.write("avail_idx", 1)


# PCI registers: the first 256 bytes of a device's configuration space.


def config_space(*capabilities: tuple[int, int, bytes]) -> bytes:
    """Return a configuration space with these capabilities: (offset, id, what follows)."""
    config = bytearray(256)
    config[0x34] = capabilities[0][0] if capabilities else 0
    following = [*(offset for offset, _, _ in capabilities[1:]), 0]
    for (offset, kind, body), after in zip(capabilities, following, strict=False):
        config[offset : offset + 2 + len(body)] = bytes((kind, after)) + body
    return bytes(config)


def test_msix_is_found_behind_other_capabilities() -> None:
    # As QEMU 7.2's virtio-blk-pci has it: 3 vectors, table in BAR 1 at 0, enabled.
    msix = find_msix(
        config_space((0x84, 0x09, bytes(14)), (0x98, 0x11, struct.pack("<HII", 0x8002, 1, 0x801)))
    )
    assert msix is not None
    assert (msix.offset, msix.control, msix.table_bar, msix.table_offset) == (0x98, 0x8002, 1, 0)


def test_a_device_without_msix_has_none() -> None:
    assert find_msix(config_space()) is None
    assert find_msix(config_space((0x40, 0x09, b""))) is None


def test_a_list_of_capabilities_that_loops_ends() -> None:
    config = bytearray(256)
    config[0x34], config[0x41] = 0x40, 0x40
    assert find_msix(bytes(config)) is None


def test_every_fault_is_called_by_its_name_and_says_what_it_breaks() -> None:
    assert all(name == fault.name and fault.what for name, fault in FAULTS.items())
