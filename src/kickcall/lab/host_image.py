"""What does a KVM host of the lab boot? A distribution's kernel, and this machine's own files.

The initramfs mounts the root of the machine that runs the lab (9p, read-only, a tmpfs above it),
so that every program is there and nothing has to be installed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.lab import cpio
from kickcall.lab.cache import built, log_progress
from kickcall.lab.image import GuestImage, busybox_entries, module_entries, script
from kickcall.lab.packages import (
    busybox_program,
    kernel_files,
    unpacked_busybox,
    unpacked_host_kernel,
)

if TYPE_CHECKING:
    from pathlib import Path

    from kickcall.lab.cache import Tell

# What the root needs; modprobe finds the others there.
_MODULES = ("virtio_pci", "9p", "9pnet_virtio", "overlay")
_SCRIPTS = {"init": "host-init", "host-start": "host-start", "agent": "agent"}
_FOLDERS = ("bin", "dev", "proc", "sys", "lower", "changes", "new", "modules")


@dataclass(frozen=True, slots=True)
class HostImage:
    """What QEMU boots, and the folder that is to be /lib/modules."""

    boot: GuestImage
    modules: Path


def host_image(tell: Tell = log_progress) -> HostImage:
    """Return the host's kernel from the cache; the first time, download and unpack it (15 s).

    To have a newer kernel, delete the cache's folder host-kernel-*.
    """
    kernel = unpacked_host_kernel(tell)
    vmlinuz, tree = kernel_files(kernel)
    scripts = {name: script(file) for name, file in _SCRIPTS.items()}
    recipe = hashlib.sha256(repr((_MODULES, _FOLDERS, sorted(scripts.items()))).encode())

    def build(folder: Path) -> None:
        entries = [cpio.folder(name) for name in _FOLDERS]
        entries += busybox_entries(busybox_program(unpacked_busybox(tell)))
        entries += module_entries(tree, _MODULES)
        entries.extend(cpio.file(name, content, 0o755) for name, content in scripts.items())
        (folder / "initramfs").write_bytes(cpio.archive(entries))

    image = built(f"host-{tree.name}-{recipe.hexdigest()[:12]}", build)
    return HostImage(GuestImage(vmlinuz, image / "initramfs"), tree.parent)
