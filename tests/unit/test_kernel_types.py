"""Does drgn read memory by types that it was told from BTF, as the compiler laid them out?"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import drgn
import pytest

from btf_blob import Blob, eventfd_like
from kickcall.errors import KernelViewError, PrivilegeError
from kickcall.host.btf import Kind, Types
from kickcall.host.kernel.program import bounded, open_live, open_vmcore, reading
from kickcall.host.kernel.types import BtfTypes

if TYPE_CHECKING:
    from collections.abc import Sequence

SOURCE = Path(__file__).resolve().parents[2] / "src"
AT = 0xFFFF888000001000


def program(memory: bytes, kernel: Types, modules: Sequence[Types] = ()) -> drgn.Program:
    """Return a program with `memory` at `AT` and no types but BTF's."""
    made = drgn.Program(
        drgn.Platform(
            drgn.Architecture.X86_64,
            drgn.PlatformFlags.IS_64_BIT | drgn.PlatformFlags.IS_LITTLE_ENDIAN,
        )
    )

    def read(_address: int, count: int, offset: int, _physical: bool) -> bytes:
        return memory[offset : offset + count]

    made.add_memory_segment(AT, len(memory), read, False)
    made.register_type_finder("btf", BtfTypes(made, kernel, modules).find, enable_index=0)
    return made


def object_at(made: drgn.Program, type_name: str, offset: int = 0) -> Any:
    return drgn.Object(made, type_name, address=AT + offset)


def test_members_of_all_kinds_are_read_from_where_they_are() -> None:
    # struct ctx of the blob: kref at 0, count at 8, ids[4] at 16, list at 32.
    memory = struct.pack("<iIQ4IQQ", -5, 0, 0x1122334455667788, 1, 2, 3, 4, AT + 32, AT)
    made = program(memory, Types(eventfd_like()[0].done()))
    ctx = object_at(made, "struct ctx")
    assert int(ctx.kref) == -5
    assert int(ctx.count) == 0x1122334455667788
    assert (int(ctx.low), int(ctx.high)) == (0x55667788, 0x11223344)
    assert [int(one) for one in ctx.ids] == [1, 2, 3, 4]
    assert ctx.list.next.value_() == AT + 32
    # A pointer leads to the struct it points to, and that has its own members.
    assert ctx.list.next.next.value_() == AT + 32
    assert ctx.list.next.prev.value_() == AT
    assert ctx.count.type_.type_name() == "__u64"
    assert drgn.sizeof(made.type("struct ctx")) == 48


def test_the_container_of_a_member_is_found() -> None:
    made = program(bytes(64), Types(eventfd_like()[0].done()))
    ctx = object_at(made, "struct ctx", 8)
    back = drgn.container_of(ctx.list.address_of_(), "struct ctx", "list")
    assert back.value_() == AT + 8


def test_bit_fields_and_enums_have_their_values() -> None:
    blob = Blob()
    word = blob.integer("unsigned int", 4)
    bus = blob.add(
        Kind.ENUM,
        "kvm_bus",
        4,
        blob.string("KVM_MMIO_BUS"),
        0,
        blob.string("KVM_PIO_BUS"),
        1,
        vlen=2,
    )
    flag = blob.add(Kind.INT, "_Bool", 1, 4 << 24 | 8)
    names = [blob.string(name) for name in ("masked", "kind", "bus", "valid")]
    members = [names[0], word, 1 << 24 | 1, names[1], word, 3 << 24 | 2]
    members += [names[2], bus, 32, names[3], flag, 64]
    blob.add(Kind.STRUCT, "route", 12, *members, vlen=4, flag=1)
    made = program(struct.pack("<IIB3x", 0b10110, 1, 1), Types(blob.done()))
    route = object_at(made, "struct route")
    assert (int(route.masked), int(route.kind)) == (1, 0b101)
    assert int(route.bus) == 1
    assert bool(route.valid) is True
    assert dict(made.type("enum kvm_bus").enumerators) == {"KVM_MMIO_BUS": 0, "KVM_PIO_BUS": 1}


def test_a_struct_that_the_kernel_only_declares_is_the_modules() -> None:
    kernel_blob = Blob()
    declared = kernel_blob.add(Kind.FWD, "kvm", 0)
    pointer = kernel_blob.add(Kind.PTR, "", declared)
    kernel_blob.structure("holder", 8, ("vm", pointer, 0))
    kernel = Types(kernel_blob.done())
    module_blob = Blob(first=kernel.end, first_string=kernel.string_end)
    number = module_blob.integer("int", 4)
    module_blob.structure("kvm", 8, ("users", number, 32))
    module = Types(module_blob.done(), kernel)
    made = program(struct.pack("<QiI", AT + 8, 0, 3), kernel, [module])
    assert int(object_at(made, "struct holder").vm.users) == 3
    # Without the module the struct is there, and has no members to look into.
    alone = object_at(program(bytes(16), kernel), "struct holder")
    with pytest.raises((AttributeError, TypeError)):
        _ = alone.vm.users


def test_what_the_kernel_has_not_or_drgn_cannot_read_is_one_clear_line() -> None:
    made = program(bytes(64), Types(eventfd_like()[0].done()))
    ctx = object_at(made, "struct ctx")
    otherwise = "an eventfd could not be read, as this kernel has it otherwise: .*'wqh'"
    with pytest.raises(KernelViewError, match=otherwise), reading("an eventfd"):
        _ = ctx.wqh
    with (
        pytest.raises(KernelViewError, match="an eventfd could not be read: "),
        reading("an eventfd"),
    ):
        int(ctx.list.next.next.value_())
    with pytest.raises(KernelViewError, match="could not be read"), reading("an eventfd"):
        made.type("struct nowhere")


def test_a_list_that_does_not_end_is_given_up() -> None:
    def endless() -> Any:
        while True:
            yield 1

    with pytest.raises(KernelViewError, match="list of waiters does not end"):
        for _ in bounded(endless(), "waiters"):
            pass


def test_without_drgn_one_line_says_what_to_install() -> None:
    # -S: no packages are found but our own.
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
        "from kickcall.host.kernel.program import open_live\n"
        "from kickcall.errors import KernelViewError\n"
        "try: open_live()\n"
        "except KernelViewError as exc: print(exc)"
    )
    said = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert said.stderr == ""
    assert said.stdout.strip().endswith("pip install 'kickcall[kernel]'")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_without_root_one_line_says_so() -> None:
    child = os.fork()
    if child == 0:  # what it imports was imported before: its own packages may be unreadable now
        os.setuid(65534)
        try:
            open_live()
        except PrivilegeError as exc:
            os._exit(7 if "only root may: use sudo" in str(exc) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.skipif(
    os.geteuid() != 0 or Path("/proc/kcore").exists(), reason="this kernel shows /proc/kcore"
)
def test_a_kernel_without_kcore_is_told_as_one() -> None:
    with pytest.raises(KernelViewError, match="this kernel shows no /proc/kcore"):
        open_live()


def test_a_program_that_crashed_is_no_vmcore(tmp_path: Path) -> None:
    # An ELF core file without VMCOREINFO: e_type ET_CORE, no program headers.
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HHI", 4, 62, 1)
    head += struct.pack("<QQQIHHHHHH", 0, 64, 0, 0, 64, 56, 0, 0, 0, 0)
    file = tmp_path / "core"
    file.write_bytes(head)
    with pytest.raises(KernelViewError, match="vmcore"):
        open_vmcore(file)
