"""How does the lab get a kernel and a busybox without installing any package?

An admin's boot menu is not ours to change: packages are downloaded and unpacked into the cache.
"""

from __future__ import annotations

import platform
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kickcall.errors import LabError
from kickcall.lab.cache import built, run_tool, tool

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kickcall.lab.cache import Tell

_STALE_LISTS = "if the package lists are old or empty: apt-get update"


@dataclass(frozen=True, slots=True)
class Distribution:
    """What the lab must know of a Debian relative to take a kernel from its archive."""

    id: str
    kernel: Kernel
    """What guests run: small."""
    host_kernel: Kernel
    """What a KVM host runs: with 9p, which the small one lacks, beside KVM and vhost."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel in an archive."""

    meta: str
    """A package without files whose dependencies name today's kernel."""
    part: str
    """Which of the dependencies, and of theirs, are the kernel and its modules."""


# Ubuntu splits the kernel: linux-image-*-generic has vmlinuz and depends on linux-modules-*.
DISTRIBUTIONS = {
    "debian": Distribution(
        "debian",
        Kernel("linux-image-cloud-amd64", r"linux-image-\d\S*-cloud-amd64"),
        Kernel("linux-image-amd64", r"linux-image-\d\S*-amd64"),
    ),
    "ubuntu": Distribution(
        "ubuntu",
        Kernel("linux-image-virtual", r"linux-(image|modules)-\d\S*-generic"),
        Kernel("linux-image-generic", r"linux-(image|modules|modules-extra)-\d\S*-generic"),
    ),
}


def distribution() -> Distribution:
    """Return which archive this system's apt reads. Raises LabError elsewhere."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    for name in (release.get("ID", ""), *release.get("ID_LIKE", "").split()):
        if name in DISTRIBUTIONS:
            return DISTRIBUTIONS[name]
    raise LabError(
        "the lab takes its guest's kernel from Debian's or Ubuntu's archive, and this system is "
        f"{release.get('PRETTY_NAME', 'neither')}: run the lab in a Debian container"
    )


def unpacked_kernel(tell: Tell) -> Path:
    """Return a folder that holds boot/vmlinuz-* and lib/modules/*, from the cache or the net."""
    source = distribution()
    return built(f"kernel-{source.id}", lambda folder: _unpack_kernel(source.kernel, folder, tell))


def unpacked_host_kernel(tell: Tell) -> Path:
    """Return the same of the kernel that a KVM host runs; modprobe finds its modules."""
    source = distribution()
    return built(f"host-kernel-{source.id}", lambda folder: _unpack_host_kernel(folder, tell))


def kernel_files(kernel: Path) -> tuple[Path, Path]:
    """Return the vmlinuz and the modules' folder of an unpacked kernel."""
    vmlinuz = sorted((kernel / "boot").glob("vmlinuz-*"))
    # usr/lib first: Debian 13 and Ubuntu 24.04 have moved there.
    trees = [
        tree
        for lib in ("usr/lib/modules", "lib/modules")
        for tree in sorted((kernel / lib).glob("*"))
    ]
    if not (vmlinuz and trees):
        raise LabError(
            "the downloaded package holds no kernel or no modules where expected: "
            f"delete {kernel}, then run apt-get update and try again"
        )
    return vmlinuz[-1], trees[0]


def busybox_program(busybox: Path) -> Path:
    """Return the program in an unpacked busybox package."""
    for path in sorted(busybox.rglob("bin/busybox")):
        if path.is_file():
            return path
    raise LabError(
        "the downloaded package holds no busybox where expected: "
        f"delete {busybox}, then run apt-get update and try again"
    )


def unpacked_busybox(tell: Tell) -> Path:
    """Return a folder that holds a static busybox somewhere in its bin folders."""
    source = distribution()
    return built(
        f"busybox-{source.id}", lambda folder: download_unpacked(["busybox-static"], folder, tell)
    )


def download_unpacked(
    packages: Iterable[str], folder: Path, tell: Tell, options: Sequence[str] = ()
) -> None:
    """Download packages and unpack them into one folder. `options` are apt's.

    Without, they are of this system's archive.
    """
    apt, dpkg = tool("apt-get", "apt"), tool("dpkg", "dpkg")
    names = list(packages)
    tell(f"downloading {', '.join(names)}")
    with tempfile.TemporaryDirectory(prefix="kickcall-deb-") as downloads:
        # As root apt would download as user _apt, who may not write to this folder.
        run_tool(
            [apt, "download", "-q", "-o", "APT::Sandbox::User=root", *options, *names],
            doing=f"downloading {', '.join(names)}",
            hint=_STALE_LISTS,
            cwd=Path(downloads),
        )
        for package in sorted(Path(downloads).glob("*.deb")):
            run_tool([dpkg, "-x", package, folder], doing=f"unpacking {package.name}")


def _unpack_kernel(kernel: Kernel, folder: Path, tell: Tell) -> None:
    packages = kernel_packages(kernel)
    if not packages:
        raise LabError(f"apt knows no kernel behind the package {kernel.meta}: apt-get update")
    download_unpacked(packages, folder, tell)


def _unpack_host_kernel(folder: Path, tell: Tell) -> None:
    busybox = busybox_program(unpacked_busybox(tell))
    _unpack_kernel(distribution().host_kernel, folder, tell)
    version = kernel_files(folder)[1].name
    # depmod looks in lib/modules alone.
    if not (folder / "lib").exists():
        (folder / "lib").symlink_to("usr/lib")
    run_tool([busybox, "depmod", "-b", folder, version], doing=f"listing the modules of {version}")


def kernel_packages(kernel: Kernel, options: Sequence[str] = ()) -> list[str]:
    """Follow the meta package's dependencies to the packages that hold the kernel."""
    found: list[str] = []
    to_ask = [kernel.meta]
    while to_ask:
        for dependency in _dependencies(to_ask.pop(), options):
            if re.fullmatch(kernel.part, dependency) and dependency not in found:
                found.append(dependency)
                to_ask.append(dependency)
    return found


def _dependencies(package: str, options: Sequence[str]) -> list[str]:
    asked = ["depends", "--no-recommends", "--no-suggests", *options, package]
    printed = run_tool(
        [tool("apt-cache", "apt"), *asked],
        doing=f"asking apt for the package {package}",
        hint=_STALE_LISTS,
    )
    return re.findall(r"^[ |]*Depends: (\S+)$", printed, re.MULTILINE)
