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
    """Return the layout in the symbol file `path`; None where it has none of QEMU's types."""
    import drgn

    program = drgn.Program()
    try:
        program.load_debug_info([str(path)])
        queue: Any = program.type("struct VirtQueue")
        owner: Any = program.type("struct VirtIODevice")
        notifier: Any = program.type("struct EventNotifier")
        call = drgn.offsetof(queue, "guest_notifier")
        layout = Layout(
            stride=drgn.sizeof(queue),
            desc=drgn.offsetof(queue, "vring.desc"),
            owner=drgn.offsetof(queue, "vdev"),
            index=drgn.offsetof(queue, "queue_index"),
            notifier_size=drgn.sizeof(notifier),
            owner_vq=drgn.offsetof(owner, "vq"),
            source="symbols",
        )
        kick = drgn.offsetof(queue, "host_notifier")
    except (LookupError, OSError, drgn.MissingDebugInfoError):
        return None
    # A QEMU whose struct is ordered otherwise is not one that `Layout` can describe.
    return layout if (call, kick) == (layout.call, layout.kick) else None
