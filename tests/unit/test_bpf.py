"""Are programs put together as the kernel wants them, and is its refusal one line?"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from kickcall.errors import KernelViewError
from kickcall.host import bpf
from kickcall.host.bpf import R0, R1, R6, R7, R8, STACK, Map, Program
from kickcall.host.bpf_counter import _slots_for, counting
from kickcall.host.btf import kernel_types
from kickcall.host.signal_sites import BY_WRITE, IN_KERNEL, Site, Sites

SITES = Sites({IN_KERNEL: Site("eventfd_signal", 7), BY_WRITE: Site("eventfd_write", 8)}, 44, 24)
has_btf = pytest.mark.skipif(
    not Path("/sys/kernel/btf/vmlinux").exists(), reason="this kernel does not tell its types"
)


def test_each_instruction_is_that_of_the_standard() -> None:
    # Linux 6.1, samples/bpf/bpf_insn.h: what its macros make of the same, on a little-endian host.
    program = Program()
    program.load(R6, R1, 0, 8)  # BPF_LDX_MEM(BPF_DW, BPF_REG_6, BPF_REG_1, 0)
    program.load(R1, R6, 44, 4)  # BPF_LDX_MEM(BPF_W, …)
    program.store(STACK, -8, R1, 4)  # BPF_STX_MEM(BPF_W, BPF_REG_10, BPF_REG_1, -8)
    program.store_number(STACK, -4, -1, 4)  # BPF_ST_MEM(BPF_W, BPF_REG_10, -4, -1)
    program.copy(R1, STACK)  # BPF_MOV64_REG
    program.add(R1, -8)  # BPF_ALU64_IMM(BPF_ADD, …)
    program.add_atomically(R6, 8, R1)  # BPF_ATOMIC_OP(BPF_DW, BPF_ADD, …)
    program.set_map(R1, 5)  # BPF_LD_MAP_FD
    program.call(1)  # BPF_EMIT_CALL
    program.set_area(R6, 5)  # BPF_LD_IMM64_RAW(BPF_REG_6, BPF_PSEUDO_MAP_VALUE, 5)
    program.add_register(R6, R7)  # BPF_ALU64_REG(BPF_ADD, …)
    program.shift(R8, 32)  # BPF_ALU64_IMM(BPF_LSH, …)
    program.shift(R8, -32)  # BPF_ALU64_IMM(BPF_RSH, …)
    program.swap_if_r0(R6, 8, R8)  # BPF_ATOMIC_OP(BPF_DW, BPF_CMPXCHG, …)
    program.end()
    assert program.code.hex(" ", 8) == (
        "7916000000000000 61612c0000000000 631af8ff00000000 620afcffffffffff bfa1000000000000 "
        "07010000f8ffffff db16080000000000 1811000005000000 0000000000000000 8500000001000000 "
        "1826000005000000 0000000000000000 0f76000000000000 6708000020000000 7708000020000000 "
        "db860800f1000000 b700000000000000 9500000000000000"
    )


def test_jumps_count_from_the_next_instruction_in_both_directions() -> None:
    program = Program()
    program.label("start")
    program.jump_if(R0, 1, "end")  # BPF_JMP_IMM(BPF_JEQ, …)
    program.jump_unless(R0, 2, "start")  # BPF_JMP_IMM(BPF_JNE, …)
    program.jump_if_at_least(R7, 1024, "end")  # BPF_JMP_IMM(BPF_JGE, …)
    program.jump_if_same(R7, R8, "start")  # BPF_JMP_REG(BPF_JEQ, …)
    program.set(R0, 1)
    program.label("end")
    program.end()
    assert program.code[:32].hex(" ", 8) == (
        "1500040001000000 5500feff02000000 3507020000040000 1d87fcff00000000"
    )


@pytest.mark.parametrize("site", [IN_KERNEL, BY_WRITE])
def test_a_counted_signal_walks_a_short_way(site: str) -> None:
    # What the kernel's thread has to do at each signal: docs/trace.md says "some 40 instructions".
    code = counting(SITES, site, 3, 1024, 4)
    ends = [at // 8 for at in range(0, len(code), 8) if code[at] == 0x95]  # exit
    assert ends[0] < 45
    assert ends[-1] == len(code) // 8 - 1


def test_slots_reach_beyond_the_highest_id_and_an_id_that_is_too_high_is_one_line() -> None:
    assert [_slots_for(highest) for highest in (0, 768, 769, 32769, 65535)] == [
        *(1024, 1024, 2048, 65536, 65536)
    ]
    with pytest.raises(KernelViewError, match="an eventfd has the id 65536"):
        _slots_for(65536)


@has_btf
def test_what_is_asked_of_the_kernel_lies_where_it_has_it() -> None:
    attr = kernel_types().union("bpf_attr")
    packed = bpf._PROGRAM.pack(*range(1, 8), b"name", 8, 10)
    for member, value in {
        "prog_type": 1,
        "insn_cnt": 2,
        "insns": 3,
        "license": 4,
        "log_level": 5,
        "log_size": 6,
        "log_buf": 7,
        "expected_attach_type": 8,
        "attach_btf_id": 10,
    }.items():
        found = attr.member(member)
        assert packed[found.offset] == value, member


def test_a_machine_without_a_way_in_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "s390x")
    with pytest.raises(KernelViewError, match="no BPF program for s390x") as caught:
        Map(8, 32, 512)
    assert "\n" not in str(caught.value)
