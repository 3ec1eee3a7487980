"""Are fields of another process gathered as they stand there, and is a change noticed? Here the
other process is this one: process_vm_readv(2) does not mind.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kickcall.diagnose.states import QueueRole
from kickcall.errors import MachineGoneError
from kickcall.host.counts import Counts
from kickcall.host.gather import Gather
from kickcall.host.rows import MappedRows, ReadRows
from kickcall.host.shared_memory import SharedRun, map_shared
from kickcall.model import BackendKind, Device
from kickcall.vmm.roles import use_of
from kickcall.vmm.sampler import COARSE_S, FINE_S, next_interval

if TYPE_CHECKING:
    from collections.abc import Iterator

ME = os.getpid()
PAGE = mmap.PAGESIZE


class Memory:
    """Some pages of this process; `hole` of them is not mapped."""

    def __init__(self, pages: int) -> None:
        self.map = mmap.mmap(-1, pages * PAGE)
        self.map[:] = bytes(k * 7 % 251 for k in range(pages * PAGE))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))


AREA = Memory(4)


@given(
    st.lists(
        st.tuples(st.integers(0, 4 * PAGE - 600), st.sampled_from([0, 1, 2, 4, 8, 24, 152, 600])),
        max_size=80,
    ),
    st.booleans(),
)
def test_fields_land_in_the_order_asked_for(fields: list[tuple[int, int]], merge: bool) -> None:
    gather = Gather(ME, [(AREA.address + at, length) for at, length in fields], merge=merge)
    gather.read()
    assert gather.missing == set()
    assert bytes(gather.buffer) == b"".join(AREA.map[at : at + length] for at, length in fields)


def test_thousands_of_fields_are_read_whole() -> None:
    fields = [(AREA.address + k * 5 % (4 * PAGE - 4), 4) for k in range(5000)]
    for merge in (True, False):
        gather = Gather(ME, fields, merge=merge)
        gather.read()
        assert bytes(gather.buffer) == b"".join(
            AREA.map[at - AREA.address : at - AREA.address + 4] for at, _ in fields
        )


def test_a_field_that_is_not_mapped_costs_no_other_field() -> None:
    fields = [(AREA.address, 4), (0x1000, 4), (AREA.address + 8, 4), (0x1008, 4)]
    gather = Gather(ME, fields)
    gather.read()
    assert gather.missing == {1, 3}
    assert bytes(gather.buffer[:4]) == AREA.map[:4]
    assert bytes(gather.buffer[8:12]) == AREA.map[8:12]


def test_a_field_can_be_moved() -> None:
    gather = Gather(ME, [(AREA.address, 4), (0x1000, 4)], merge=False)
    gather.read()
    assert gather.missing == {1}
    gather.move(1, AREA.address + 100)
    gather.read()
    assert gather.missing == set()
    assert bytes(gather.buffer[4:]) == AREA.map[100:104]


def test_a_process_that_ended_is_said_to_be_gone() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(MachineGoneError, match=f"process {child} ended"):
        Gather(child, [(AREA.address, 4)]).read()


# Rows, read and mapped alike.


@contextlib.contextmanager
def memfd(size: int, *, seals: int) -> Iterator[tuple[mmap.mmap, int, int]]:
    """Yield a writable mapping of a memfd with `seals`, its address and its descriptor."""
    file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, size)
    if seals:
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    area = mmap.mmap(file, size)
    holder = ctypes.c_char.from_buffer(area)
    try:
        yield area, ctypes.addressof(holder), file
    finally:
        del holder
        os.close(file)


SHRINK = fcntl.F_SEAL_SHRINK if hasattr(fcntl, "F_SEAL_SHRINK") else 2


def rows_at(address: int, count: int) -> list[list[tuple[int, int]]]:
    """Rows as split rings have them: avail, used, used_event, avail_event."""
    return [
        [(at, 4), (at + 520, 4), (at + 516, 2), (at + 2572, 2)]
        for at in range(address, address + count * 2688, 2688)
    ]


@pytest.mark.parametrize("way", ["read", "mapped"])
def test_only_rows_that_changed_are_named(way: str) -> None:
    count = 300  # in 197 pages
    with memfd(200 * PAGE, seals=SHRINK) as (area, address, _):
        runs = map_shared(ME, [(address, address + len(area))])
        fields = rows_at(address, count)
        rows = ReadRows(ME, fields) if way == "read" else MappedRows(runs, fields)
        rows.read()
        assert rows.read() == []
        struct.pack_into("<I", area, 17 * 2688, 0xFFFF0001)
        struct.pack_into("<H", area, 250 * 2688 + 2572, 0xABCD)
        area[60 * 2688 + 100] = 1  # in no field
        assert sorted(rows.read()) == [17, 250]
        assert rows.row(17) == struct.pack("<IIHH", 0xFFFF0001, 0, 0, 0)
        assert rows.row(250) == struct.pack("<IIHH", 0, 0, 0, 0xABCD)
        assert rows.read() == []
        if isinstance(rows, MappedRows):
            assert rows.unfit == []
            rows.close()
        for run in runs:
            run.view.close()


def test_rows_that_are_entangled_or_elsewhere_are_left_to_reading() -> None:
    with memfd(4 * PAGE, seals=SHRINK) as (area, address, _):
        runs = map_shared(ME, [(address, address + len(area))])
        good, overlapping, inside, outside, across = (
            [(address + 8, 4), (address + 100, 2)],
            [(address + 200, 4), (address + 202, 4)],
            [(address + 50, 4)],
            [(address + 4 * PAGE, 4)],
            [(address + 4 * PAGE - 2, 4)],
        )
        rows = MappedRows(runs, [good, overlapping, inside, outside, across])
        assert sorted(rows.unfit) == [1, 2, 3, 4]
        rows.read()
        rows.close()
        for run in runs:
            run.view.close()


def test_rows_that_cannot_be_read_are_named_each_time() -> None:
    rows = ReadRows(ME, [[(AREA.address, 4)], [(0x1000, 4)]])
    rows.read()
    assert rows.read() == [1]
    assert rows.row(1) is None
    assert rows.row(0) == AREA.map[:4]


# What may be mapped.


def test_memory_that_may_shrink_is_not_mapped() -> None:
    with memfd(PAGE, seals=0) as (area, address, _):
        assert map_shared(ME, [(address, address + len(area))]) == ()


def test_a_mapping_longer_than_its_file_is_not_mapped() -> None:
    file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, 2 * PAGE)
    area = mmap.mmap(file, 2 * PAGE)
    os.ftruncate(file, PAGE)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, SHRINK)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert map_shared(ME, [(address, address + 2 * PAGE)]) == ()
    os.close(file)


def test_private_memory_and_files_are_not_mapped(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("ram") / "ram"
    path.write_bytes(bytes(PAGE))
    with path.open("r+b") as file:
        area = mmap.mmap(file.fileno(), PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert map_shared(ME, [(address, address + PAGE), (AREA.address, AREA.address + PAGE)]) == ()


def test_a_mapping_of_ours_cannot_be_written() -> None:
    with memfd(PAGE, seals=SHRINK) as (area, address, _):
        (run,) = map_shared(ME, [(address, address + len(area))])
        assert isinstance(run, SharedRun)
        with pytest.raises(TypeError, match="read"):
            run.view[0] = 1
        area[0] = 7
        assert run.view[0] == 7
        run.view.close()


# Counts.


def test_an_open_fdinfo_tells_the_count_of_now() -> None:
    file = os.eventfd(0, os.EFD_NONBLOCK)
    with Counts(ME) as counts:
        for value in (0, 3, 0x10):
            if value:
                os.eventfd_write(file, value)
            state = counts.read(file)
            assert state is not None
            assert state.count == value
            if value:
                assert os.eventfd_read(file) == value
        os.close(file)
        assert counts.read(file) is None
        replaced = os.eventfd(5, os.EFD_NONBLOCK)
        assert replaced == file
        again = counts.read(file)
        assert again is not None
        assert again.count == 5
        os.close(replaced)


def test_descriptors_of_ours_stay_few() -> None:
    files = [os.eventfd(k) for k in range(400)]
    before = len(os.listdir("/proc/self/fd"))
    with Counts(ME) as counts:
        found = [counts.read(file) for file in files]
        assert [state.count for state in found if state] == list(range(400))
        assert len(os.listdir("/proc/self/fd")) - before <= 256
    assert len(os.listdir("/proc/self/fd")) == before
    for file in files:
        os.close(file)


# When to look again.


def test_what_looks_stalled_is_looked_at_closely() -> None:
    assert next_interval(True, COARSE_S) == FINE_S == 0.01


def test_what_is_well_again_is_looked_at_ever_less() -> None:
    steps = [FINE_S]
    while steps[-1] < COARSE_S:
        steps.append(next_interval(False, steps[-1]))
    assert steps == [0.01, 0.02, 0.04, 0.08, 0.16, 0.25]
    assert next_interval(False) == COARSE_S == 0.25


# Roles.


def device(kind: str, num_queues: int = 8) -> Device:
    return Device(
        path="/machine/peripheral/x0",
        kind=kind,
        backend=BackendKind.QEMU,
        num_queues=num_queues,
        features=frozenset(),
        driver_ok=True,
        broken=False,
        vhost_started=False,
    )


R, I = QueueRole.REQUEST, QueueRole.INBOX  # noqa: E741


@pytest.mark.parametrize(
    ("kind", "queues", "roles"),
    [
        # virtio 1.4: 5.2.2, 5.6.2, 5.1.2, 5.3.2, 5.5.2, 5.10.2, 5.8.2, 5.11.2, 5.7.2, 5.14.2, 5.9.2
        ("virtio-blk-device", 3, [R, R, R]),
        ("vhost-user-blk", 2, [R, R]),
        ("virtio-scsi-device", 4, [R, I, R, R]),
        ("vhost-scsi", 3, [R, I, R]),
        ("vhost-user-scsi", 3, [R, I, R]),
        ("virtio-net-device", 3, [I, R, R]),
        ("virtio-net-device", 5, [I, R, I, R, R]),
        ("virtio-net-device", 2, [I, R]),
        ("virtio-serial-device", 6, [I, R, I, R, I, R]),
        ("virtio-balloon-device", 3, [R, R, I]),
        ("vhost-vsock-device", 3, [I, R, I]),
        ("virtio-keyboard-device", 2, [I, R]),
        ("vhost-user-fs-device", 2, [R, R]),
        ("virtio-gpu-device", 2, [R, R]),
        ("virtio-sound-device", 4, [R, I, I, I]),
        ("virtio-crypto-device", 2, [R, R]),
        ("virtio-9p-device", 1, [R]),
        ("virtio-of-tomorrow-device", 2, [I, I]),
        ("", 1, [I]),
    ],
)
def test_a_queues_number_tells_who_waits(kind: str, queues: int, roles: list[QueueRole]) -> None:
    assert [use_of(device(kind, queues), queue).role for queue in range(queues)] == roles


def test_who_reaps_late_or_polls_is_not_expected_to_want_calls() -> None:
    net = device("virtio-net-device", 3)
    assert [use_of(net, queue).calls_when_idle for queue in range(3)] == [True, False, False]
    assert not use_of(device("virtio-of-tomorrow-device"), 0).calls_when_idle
    assert use_of(device("virtio-blk-device"), 0).calls_when_idle
