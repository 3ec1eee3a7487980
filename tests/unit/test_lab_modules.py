"""Are a module's dependencies read from its ELF file, and inserted before it?"""

from __future__ import annotations

import lzma
import struct
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import LabError
from kickcall.lab.modules import load_order, modinfo, module_name

if TYPE_CHECKING:
    from pathlib import Path


def module(*modinfo_entries: str) -> bytes:
    """Return an ELF-64 file with a null section, .modinfo and .shstrtab, laid out by the book."""
    info = b"".join(entry.encode() + b"\0" for entry in modinfo_entries)
    names = b"\0.modinfo\0.shstrtab\0"
    info_at, names_at = 64, 64 + len(info)
    sections_at = names_at + len(names)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    # e_type ET_REL, e_machine x86-64, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize,
    # e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, sections_at, 0, 64, 0, 0, 64, 3, 2)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 2, 0, info_at, len(info), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, names_at, len(names), 0, 0, 1, 0)
    return header + info + names + sections


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "lib" / "modules" / "6.1.0"
    (root / "kernel" / "drivers").mkdir(parents=True)
    return root


def add(tree: Path, name: str, depends: str = "", compress: bool = False) -> bytes:
    elf = module(f"depends={depends}", f"name={name}")
    path = tree / "kernel" / "drivers" / f"{name}.ko"
    if compress:
        path.with_suffix(".ko.xz").write_bytes(lzma.compress(elf))
    else:
        path.write_bytes(elf)
    return elf


def test_modinfo_lists_every_value_of_a_tag() -> None:
    found = modinfo(module("alias=pci:v1", "alias=pci:v2", "depends=virtio,virtio_ring"))
    assert found == {"alias": ["pci:v1", "pci:v2"], "depends": ["virtio,virtio_ring"]}


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match="ELF"):
        modinfo(b"\x7fELF\x01\x01" + bytes(100))


def test_dashes_and_compression_do_not_belong_to_a_modules_name() -> None:
    assert module_name("kernel/drivers/char/hw_random/virtio-rng.ko.xz") == "virtio_rng"


def test_a_module_comes_after_all_that_it_depends_on_and_once(tree: Path) -> None:
    add(tree, "virtio_blk", "virtio,virtio_ring")
    add(tree, "virtio_ring", "virtio")
    add(tree, "virtio")
    add(tree, "virtio_scsi", "virtio-ring")
    ordered = list(load_order(tree, ["virtio_blk", "virtio_scsi"]))
    assert ordered == ["virtio", "virtio_ring", "virtio_blk", "virtio_scsi"]


def test_a_compressed_module_is_unpacked(tree: Path) -> None:
    elf = add(tree, "virtio", compress=True)
    assert load_order(tree, ["virtio"]) == {"virtio": elf}


def test_a_module_that_is_built_into_the_kernel_is_left_out(tree: Path) -> None:
    add(tree, "virtio_blk", "virtio")
    (tree / "modules.builtin").write_text("kernel/drivers/virtio/virtio.ko\n")
    assert list(load_order(tree, ["virtio_blk"])) == ["virtio_blk"]


def test_a_missing_module_is_named(tree: Path) -> None:
    with pytest.raises(LabError, match=r"6\.1\.0 has no module virtio_mem"):
        load_order(tree, ["virtio_mem"])
