"""Which kernel modules does a guest need, in which order, and what is in their files?

depmod has not run on an unpacked package and kmod may not be installed, so the dependencies are
read where depmod reads them: from `depends=` in each module's .modinfo section
(Linux, include/linux/module.h, MODULE_INFO; scripts/mod/modpost.c, add_depends).
"""

from __future__ import annotations

import lzma
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from kickcall.errors import LabError
from kickcall.lab.cache import tool

if TYPE_CHECKING:
    from collections.abc import Iterable

# ELF-64 object file format, version 1.5: e_shoff at 0x28, e_shentsize, e_shnum, e_shstrndx
# from 0x3a; a section header starts with name (u32), type (u32), flags, addr, offset, size (u64).
_ELF64_LITTLE_ENDIAN = b"\x7fELF\x02\x01"


def modinfo(module: bytes) -> dict[str, list[str]]:
    """Return the .modinfo section of an ELF-64 module as lists of values by tag."""
    if not module.startswith(_ELF64_LITTLE_ENDIAN):
        raise ValueError("not a 64-bit little-endian ELF file")
    (sections,) = struct.unpack_from("<Q", module, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", module, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQ", module, sections + index * entry_size)
        for index in range(count)
    ]
    names_offset = headers[names_index][4]
    found: dict[str, list[str]] = {}
    for name, _type, _flags, _address, offset, size in headers:
        start = names_offset + name
        if module[start : module.index(b"\0", start)] != b".modinfo":
            continue
        for entry in module[offset : offset + size].split(b"\0"):
            tag, separator, value = entry.decode(errors="replace").partition("=")
            if separator:
                found.setdefault(tag, []).append(value)
    return found


def module_name(path: str) -> str:
    """Return a module's name in the kernel, where `-` and `_` are the same character."""
    return Path(path).name.split(".ko")[0].replace("-", "_")


def read_module(path: Path) -> bytes:
    """Return a module's ELF bytes, uncompressed (Debian 13 ships .ko.xz, Ubuntu .ko.zst)."""
    match path.suffix:
        case ".xz":
            return lzma.decompress(path.read_bytes())
        case ".zst":
            unpack = [tool("zstd", "zstd"), "-dcq", str(path)]
            return subprocess.run(unpack, check=True, stdout=subprocess.PIPE).stdout
    return path.read_bytes()


def load_order(tree: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """Return modules by name, each after all that it depends on.

    `tree` is lib/modules/VERSION. Modules that are built into the kernel are left out. Raises
    LabError for a module that the kernel does not have.
    """
    files = {module_name(str(path)): path for path in sorted((tree / "kernel").rglob("*.ko*"))}
    listed = tree / "modules.builtin"
    builtin = {module_name(line) for line in listed.read_text().split()} if listed.exists() else {}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name in builtin:
            return
        if name not in files:
            raise LabError(f"the guest's kernel {tree.name} has no module {name}")
        elf = read_module(files[name])
        for depends in modinfo(elf).get("depends", []):
            for dependency in filter(None, depends.split(",")):
                add(module_name(dependency))
        ordered[name] = elf

    for name in wanted:
        add(module_name(name))
    return ordered
