"""What does a lab guest boot? A distribution's kernel, busybox, virtio modules and the agent."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from kickcall.errors import LabError
from kickcall.lab import cpio
from kickcall.lab.cache import built, log_progress
from kickcall.lab.foreign import unpacked_arm64
from kickcall.lab.modules import load_order
from kickcall.lab.packages import (
    busybox_program,
    distribution,
    kernel_files,
    unpacked_busybox,
    unpacked_host_kernel,
    unpacked_kernel,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from kickcall.lab.board import Architecture
    from kickcall.lab.cache import Tell

# In the order in which the guest inserts them; what they depend on is found.
# virtio_pci first: then each driver finds the devices in the order of their PCI slots.
MODULES = (
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_scsi",
    "sd_mod",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "virtio_console",
    "vmw_vsock_virtio_transport",
)

FULL_MODULES = (*MODULES, "e1000", "e1000e", "igb", "nvme")
"""What only the distribution's whole kernel has beside them."""

_FOLDERS = ("bin", "sbin", "usr", "usr/bin", "usr/sbin", "dev", "proc", "sys", "run", "tmp")


@dataclass(frozen=True, slots=True)
class GuestImage:
    """A kernel and an initramfs, as files that QEMU's -kernel and -initrd take."""

    kernel: Path
    initramfs: Path


def guest_image(
    tell: Tell = log_progress, architecture: Architecture = "amd64", *, full: bool = False
) -> GuestImage:
    """Return the guest image from the cache; the first time, download and build it (10 s).

    With `full` its kernel is the distribution's whole one, with drivers for real hardware. To have
    it built from a newer kernel package, delete the cache folder.
    """
    scripts = {name: script(name) for name in ("init", "agent")}
    if full and architecture != "amd64":
        raise LabError(f"the lab has no whole kernel for {architecture}")
    modules = FULL_MODULES if full else MODULES
    recipe = hashlib.sha256(repr((modules, _FOLDERS, sorted(scripts.items()))).encode())
    source = distribution().id if architecture == "amd64" else architecture
    name = f"guest-{source}-{recipe.hexdigest()[:12]}"
    folder = built(name, lambda unfinished: _build(unfinished, scripts, architecture, full, tell))
    return GuestImage(folder / "vmlinuz", folder / "initramfs")


def script(name: str) -> bytes:
    """Return one of the shell scripts that run in what the lab boots."""
    return resources.files("kickcall.lab").joinpath("guest_files", name).read_bytes()


def _build(
    folder: Path,
    scripts: dict[str, bytes],
    architecture: Architecture,
    full: bool,
    tell: Tell,
) -> None:
    ours = busybox_program(unpacked_busybox(tell))
    if architecture == "amd64":
        kernel, program = (unpacked_host_kernel if full else unpacked_kernel)(tell), ours
    else:
        kernel = unpacked_arm64(tell)
        program = busybox_program(kernel)
    tell("building the guest's initramfs")
    vmlinuz, tree = kernel_files(kernel)
    entries = [cpio.folder(name) for name in (*_FOLDERS, "modules")]
    entries += busybox_entries(program, ours)
    entries += module_entries(tree, FULL_MODULES if full else MODULES)
    entries.extend(cpio.file(name, content, 0o755) for name, content in scripts.items())
    (folder / "initramfs").write_bytes(cpio.archive(entries))
    (folder / "vmlinuz").write_bytes(vmlinuz.read_bytes())


def busybox_entries(program: Path, lists: Path | None = None) -> list[cpio.Entry]:
    """Return busybox and a link for each of its commands, in bin.

    `lists` is one that runs here and has the same commands, where `program` is another
    architecture's.
    """
    listed = subprocess.run(
        [lists or program, "--list"], check=True, capture_output=True, text=True
    )
    return [
        cpio.file("bin/busybox", program.read_bytes(), 0o755),
        *(
            cpio.link(f"bin/{applet}", "busybox")
            for applet in listed.stdout.split()
            if applet != "busybox"
        ),
    ]


def module_entries(tree: Path, wanted: Iterable[str]) -> list[cpio.Entry]:
    """Return the modules and what they depend on, and their names in the order of insertion."""
    modules = load_order(tree, wanted)
    return [
        *(cpio.file(f"modules/{name}.ko", elf) for name, elf in modules.items()),
        cpio.file("modules/order", "".join(f"{name}\n" for name in modules).encode()),
    ]
