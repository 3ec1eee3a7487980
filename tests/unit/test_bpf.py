"""Are programs put together as the kernel wants them, and is its refusal one line?"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from kickcall.errors import KernelViewError
from kickcall.host import bpf
from kickcall.host.bpf import R0, R1, R6, STACK, Map, Program
from kickcall.host.bpf_counter import counting
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
    program.end()
    assert program.code.hex(" ", 8) == (
        "7916000000000000 61612c0000000000 631af8ff00000000 620afcffffffffff bfa1000000000000 "
        "07010000f8ffffff db16080000000000 1811000005000000 0000000000000000 8500000001000000 "
        "b700000000000000 9500000000000000"
    )


def test_jumps_count_from_the_next_instruction_in_both_directions() -> None:
    program = Program()
    program.label("start")
    program.jump_if_zero(R0, "end")
    program.jump_unless_zero(R0, "start")
    program.set(R0, 1)
    program.label("end")
    program.end()
    first, second = program.code[:8], program.code[8:16]
    assert first.hex() == "1500020000000000"
    assert second.hex() == "5500feff00000000"


@pytest.mark.parametrize("site", [IN_KERNEL, BY_WRITE])
def test_a_counted_signal_walks_a_short_way(site: str) -> None:
    # What the kernel's thread has to do at each signal: docs/trace.md says "some 40 instructions".
    code = counting(SITES, site, 3)
    assert len(code) // 8 < 64
    assert code[-8] == 0x95  # exit


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
