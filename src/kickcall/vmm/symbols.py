"""The exact layout of `struct VirtQueue`, where the debug symbols of this QEMU are installed."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from kickcall.vmm.layout import Layout

_DEBUG_ROOTS = (Path("/usr/lib/debug"),)
_GNU_BUILD_ID = re.compile(rb"\x04\0\0\0(.)\0\0\0\x03\0\0\0GNU\0", re.S)
_HEADERS = 64 << 10
"""The build-id note lies in the first pages of a binary."""


def build_id(pid: int) -> str | None:
    """Return the GNU build-id of the process's binary in hexadecimal, or None where it has none."""
    try:
        with open(f"/proc/{pid}/exe", "rb") as file:
            head = file.read(_HEADERS)
    except OSError:
        return None
    found = _GNU_BUILD_ID.search(head)
    if found is None:
        return None
    length = found[1][0]
    return head[found.end() : found.end() + length].hex()


def debug_file(pid: int) -> Path | None:
    """Return the file with the symbols of the process's binary: a separate one, or the binary.

    Separate ones are found by build-id (gdb manual, "Separate Debug Files"), in the process's root
    first. None where no symbols are installed.
    """
    identity = build_id(pid)
    if identity is not None:
        for root in (Path(f"/proc/{pid}/root/usr/lib/debug"), *_DEBUG_ROOTS):
            path = root / ".build-id" / identity[:2] / f"{identity[2:]}.debug"
            if path.exists():
                return path
    binary = Path(f"/proc/{pid}/exe")
    try:
        with binary.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _HEADERS))
            # Section headers and their names stand at the end of an ELF file.
            return binary if b".debug_info\0" in file.read() else None
    except OSError:
        return None


def virtqueue_layout(pid: int) -> Layout | None:
    """Return the layout that the symbols of this QEMU tell; None without symbols or without drgn.

    Needs the extra `kickcall[symbols]`. Raises nothing: without symbols the layout is derived.
    """
    if importlib.util.find_spec("drgn") is None:
        return None
    path = debug_file(pid)
    return None if path is None else read_layout(path)


def read_layout(path: Path) -> Layout | None:
    """Return the layout in the symbol file `path`; None where `Layout` cannot describe what it has.

    That is a file without QEMU's types, or with fields in an order that no QEMU had so far.
    """
    import drgn

    program = drgn.Program()
    try:
        # Nothing is loaded into a program without a target: its one module is made by hand.
        program.extra_module("qemu", create=True).try_file(path, force=True)
        queue: Any = program.type("struct VirtQueue")
        owner: Any = program.type("struct VirtIODevice")
        notifier: Any = program.type("struct EventNotifier")
        layout = Layout(
            stride=drgn.sizeof(queue),
            desc=drgn.offsetof(queue, "vring.desc"),
            owner=drgn.offsetof(queue, "vdev"),
            index=drgn.offsetof(queue, "queue_index"),
            notifier_size=drgn.sizeof(notifier),
            owner_vq=drgn.offsetof(owner, "vq"),
            source="symbols",
        )
        found = {
            name: drgn.offsetof(struct, name)
            for struct, names in (
                (queue, ("vring.num", "vring.avail", "vring.used")),
                (queue, ("guest_notifier", "host_notifier")),
                (notifier, ("rfd", "wfd")),
                (notifier, ("initialized",) if layout.notifier_size > 8 else ()),
            )
            for name in names
        }
    except Exception:  # drgn raises bare Exceptions where a file's DWARF is malformed
        return None
    assumed = {
        "vring.num": 0,
        "vring.avail": layout.desc + 8,
        "vring.used": layout.desc + 16,
        "guest_notifier": layout.call,
        "host_notifier": layout.kick,
        "rfd": 0,
        "wfd": 4,
        "initialized": 8,
    }
    return layout if all(assumed[name] == at for name, at in found.items()) else None
