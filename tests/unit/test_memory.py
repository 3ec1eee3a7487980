"""Is another process's memory read as it is, with nothing stopped, touched or taken on trust?"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kickcall.errors import KickcallError, MachineGoneError, PrivilegeError
from kickcall.host import memory

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = mmap.PAGESIZE
ME = os.getpid()
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@dataclass(frozen=True)
class Area:
    """Anonymous private memory of this process."""

    start: int
    pages: int

    @property
    def end(self) -> int:
        return self.start + self.pages * PAGE

    def page(self, number: int) -> int:
        return self.start + number * PAGE

    def fill(self, number: int, text: bytes) -> None:
        ctypes.memmove(self.page(number), text * (PAGE // len(text)), PAGE)

    def unmap(self, number: int) -> None:
        assert _libc.munmap(self.page(number), PAGE) == 0

    def present(self) -> list[bool]:
        """Which pages the kernel has made: bit 63 of pagemap."""
        with open("/proc/self/pagemap", "rb") as file:
            file.seek(self.start // PAGE * 8)
            raw = file.read(self.pages * 8)
        return [bool(raw[k * 8 + 7] & 0x80) for k in range(self.pages)]


@pytest.fixture
def area() -> Iterator[Area]:
    pages = 16
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = _libc.mmap(None, pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    # Huge pages would make sixteen pages present at the touch of one.
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(pages * PAGE), 15)
    yield Area(start, pages)
    _libc.munmap(start, pages * PAGE)


def mapping_of(area: Area) -> memory.Mapping:
    return memory.Mapping(area.start, area.end, "rw-p", 0, "")


def test_what_is_read_is_what_is_there(area: Area) -> None:
    area.fill(0, b"kickcall")
    assert memory.read(ME, area.start, 16) == b"kickcallkickcall"
    assert memory.read(ME, area.start + 4, 4) == b"call"


def test_a_read_goes_on_across_pages(area: Area) -> None:
    area.fill(0, b"a")
    area.fill(1, b"b")
    assert memory.read(ME, area.page(1) - 2, 4) == b"aabb"


def test_ranges_that_are_not_mapped_are_none_and_the_others_are_read(area: Area) -> None:
    for number in range(6):
        area.fill(number, bytes([65 + number]))
    area.unmap(1)
    area.unmap(3)
    area.unmap(4)
    found = memory.read_many(ME, [(area.page(number), 2) for number in range(6)])
    assert found == [b"AA", None, b"CC", None, None, b"FF"]


def test_a_range_that_is_mapped_in_part_is_none_as_a_whole(area: Area) -> None:
    area.fill(0, b"a")
    area.fill(2, b"c")
    area.unmap(1)
    across = (area.page(1) - 8, 16)
    found = memory.read_many(ME, [across, (area.page(2), 1), across, (area.page(0), 1)])
    assert found == [None, b"c", None, b"a"]


def test_the_first_and_the_last_range_may_be_unmapped(area: Area) -> None:
    area.fill(2, b"c")
    area.unmap(0)
    ranges = [(0, 8), (area.page(0), 8), (area.page(2), 1), (1 << 63, 8), (2**64 - 8, 8)]
    assert memory.read_many(ME, ranges) == [None, None, b"c", None, None]


def test_more_ranges_than_one_system_call_takes_keep_their_order(area: Area) -> None:
    area.fill(0, bytes(range(256)))
    area.unmap(1)
    ranges = [(area.start + k % 256, 1) for k in range(3000)]
    ranges[1023] = ranges[1024] = ranges[2048] = (area.page(1), 1)
    expected: list[bytes | None] = [bytes([k % 256]) for k in range(3000)]
    expected[1023] = expected[1024] = expected[2048] = None
    assert memory.read_many(ME, ranges) == expected


def test_no_ranges_read_nothing() -> None:
    assert memory.read_many(ME, []) == []


def test_an_empty_range_is_read_as_nothing(area: Area) -> None:
    area.fill(0, b"a")
    assert memory.read_many(ME, [(area.start, 0), (area.start, 1)]) == [b"", b"a"]
    assert memory.read_many(ME, [(area.start, 0)]) == [b""]


@settings(max_examples=60)
@given(st.data())
def test_any_mix_of_ranges_gives_each_its_own_bytes(data: st.DataObject) -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = 6
    start = _libc.mmap(None, pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    area = Area(start, pages)
    try:
        content = bytearray()
        for number in range(pages):
            text = bytes([(number * 41 + k) % 251 for k in range(PAGE)])
            area.fill(number, text)
            content += text
        holes = data.draw(st.sets(st.integers(1, pages - 2)))
        for number in holes:
            area.unmap(number)
        ranges = data.draw(
            st.lists(
                st.tuples(st.integers(0, pages * PAGE - 1), st.integers(0, 3 * PAGE)), max_size=12
            )
        )
        ranges = [(at, min(length, pages * PAGE - at)) for at, length in ranges]
        found = memory.read_many(ME, [(start + at, length) for at, length in ranges])
        for (at, length), got in zip(ranges, found, strict=True):
            touched = range(at // PAGE, (at + length - 1) // PAGE + 1) if length else range(0)
            whole = not holes & set(touched)
            assert got == (bytes(content[at : at + length]) if whole else None)
    finally:
        _libc.munmap(start, pages * PAGE)


def test_a_process_that_ended_is_gone() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    for attempt in (
        lambda: memory.read(pid, PAGE, 8),
        lambda: memory.mappings(pid),
        lambda: list(memory.present_runs(pid, [])),
        lambda: list(memory.slabs(pid, [(0, PAGE)], PAGE, 0)),
    ):
        with pytest.raises(MachineGoneError, match=str(pid)):
            attempt()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_users_process_cannot_be_read() -> None:
    # The child asks about us, as nobody: what the kernel refuses has to come out as its own error.
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            for attempt in (
                lambda: memory.read(os.getppid(), PAGE, 8),
                lambda: memory.mappings(os.getppid()),
            ):
                try:
                    attempt()
                except PrivilegeError:
                    continue
                os._exit(2)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_memory_of_a_stopped_process_can_be_read(area: Area) -> None:
    area.fill(0, b"stopped!")
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    try:
        os.waitpid(pid, os.WUNTRACED)
        ctypes.memset(area.start, 0, PAGE)  # ours only: the child has its own copy
        assert memory.read(pid, area.start, 8) == b"stopped!"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_only_pages_that_hold_data_are_listed(area: Area) -> None:
    for number in (2, 3, 7, 15):
        area.fill(number, b"x")
    assert list(memory.present_runs(ME, [mapping_of(area)])) == [
        (area.page(2), area.page(4)),
        (area.page(7), area.page(8)),
        (area.page(15), area.end),
    ]


def test_listing_and_reading_the_runs_makes_no_page(area: Area) -> None:
    area.fill(4, b"x")
    touched = [number == 4 for number in range(area.pages)]
    assert area.present() == touched
    runs = list(memory.present_runs(ME, [mapping_of(area)]))
    read = b"".join(raw for _, raw in memory.slabs(ME, runs, PAGE, 0))
    assert read == b"x" * PAGE
    assert area.present() == touched


def test_reading_a_page_that_was_never_touched_would_have_made_one(area: Area) -> None:
    # Why present_runs is needed at all: what it leaves out must not be read "to be sure".
    list(memory.slabs(ME, [(area.page(9), area.page(10))], PAGE, 0))
    assert area.present()[9]


def test_an_area_with_no_data_has_no_runs(area: Area) -> None:
    assert list(memory.present_runs(ME, [mapping_of(area)])) == []


def test_a_huge_mapping_is_looked_at_in_pieces_and_its_runs_stay_whole() -> None:
    pages = 3 << 17  # three pieces of 1 MiB of pagemap each
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    start = _libc.mmap(None, pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(pages * PAGE), 15)
    area = Area(start, pages)
    try:
        for number in (0, (1 << 17) - 1, 1 << 17, (2 << 17) - 1, pages - 1):
            area.fill(number, b"x")
        assert list(memory.present_runs(ME, [mapping_of(area)])) == [
            (area.page(0), area.page(1)),
            (area.page((1 << 17) - 1), area.page((1 << 17) + 1)),
            (area.page((2 << 17) - 1), area.page(2 << 17)),
            (area.page(pages - 1), area.end),
        ]
    finally:
        _libc.munmap(start, pages * PAGE)


def test_slabs_overlap_so_that_nothing_is_cut(area: Area) -> None:
    for number in range(4):
        area.fill(number, bytes([65 + number]))
    found = list(memory.slabs(ME, [(area.start, area.page(4))], PAGE, 8))
    assert [at for at, _ in found] == [area.page(number) for number in range(4)]
    assert found[0][1] == b"A" * PAGE + b"B" * 8
    assert found[3][1] == b"D" * PAGE


def test_a_slab_that_is_unmapped_meanwhile_is_left_out(area: Area) -> None:
    for number in range(3):
        area.fill(number, bytes([65 + number]))
    area.unmap(1)
    found = list(memory.slabs(ME, [(area.start, area.page(3))], PAGE, 0))
    assert [raw[:1] for _, raw in found] == [b"A", b"C"]


def test_the_mappings_tell_private_memory_from_files(area: Area) -> None:
    area.fill(0, b"x")
    found = memory.mappings(ME)
    mine = next(one for one in found if one.start <= area.start < one.end)
    assert mine.anonymous
    assert mine.permissions == "rw-p"
    assert any(one.name == "[heap]" and one.anonymous for one in found)
    libc = next(one for one in found if "/libc.so" in one.name or "/libc-" in one.name)
    assert not libc.anonymous
    assert found == sorted(found, key=lambda one: one.start)


def test_a_name_with_blanks_is_kept(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "a file  with blanks")
    with open(path, "wb+") as file:
        file.write(b"x" * PAGE)
        file.flush()
        with mmap.mmap(file.fileno(), PAGE, access=mmap.ACCESS_READ):
            assert any(one.name == path for one in memory.mappings(ME))


def test_shared_anonymous_memory_is_nobodys_heap() -> None:
    with mmap.mmap(-1, PAGE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) as shared:
        address = ctypes.addressof(ctypes.c_char.from_buffer(shared))
        found = next(one for one in memory.mappings(ME) if one.start <= address < one.end)
        assert not found.anonymous


def test_every_error_of_this_room_is_one_that_an_admin_can_read() -> None:
    with pytest.raises(KickcallError) as caught:
        memory.mappings(2**31 - 1)
    assert "\n" not in str(caught.value)
    assert str(2**31 - 1) in str(caught.value)
