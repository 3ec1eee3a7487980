"""How does a test make a kernel skip a function, for the next calls that it chooses?

    with Skip(*signal_of(eventfd_id)) as lost:          # in a KVM host of the lab
        ...
        assert lost.left == 0

The module is tests/module/. It is built on the machine that runs the lab, against the headers of
the kernels that the lab boots, which are downloaded and unpacked into the lab's cache, and never
installed. `python tests/kernel_module.py` does that beforehand: a KVM host has no network.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from kickcall.errors import LabError
from kickcall.host.btf import kernel_types
from kickcall.lab.cache import built, log_progress, run_tool, tool
from kickcall.lab.packages import (
    Kernel,
    distribution,
    download_unpacked,
    kernel_files,
    kernel_packages,
    unpacked_host_kernel,
    unpacked_kernel,
)

if TYPE_CHECKING:
    from kickcall.lab.cache import Tell
    from kickcall.lab.machine import LabMachine

SOURCES = Path(__file__).resolve().parent / "module"
NAME = "kickcall_skip"
PARAMETERS = Path("/sys/module") / NAME / "parameters"
_FINIT_MODULE, _DELETE_MODULE = 313, 176
"""Linux, arch/x86/entry/syscalls/syscall_64.tbl."""
_CHUNK = 2048
"""Characters sent to a guest at once: its serial port takes some milliseconds for them."""

_libc = ctypes.CDLL(None, use_errno=True)


def in_lab_host() -> bool:
    """Tell whether this runs in a KVM host of the lab, whose kernel may be broken."""
    return "KICKCALL_LAB_SHARED" in os.environ


class Calls(NamedTuple):
    """Which calls are to be skipped."""

    symbol: str
    member: int = -1
    """Offset of a u32 in what the first argument points to; -1: the argument itself."""
    equals: int = -1
    """Its value; -1: any."""
    result: int = 0
    """What a skipped call returns."""

    def parameters(self, count: int) -> str:
        fields = self._asdict().items()
        return " ".join([*(f"{name}={value}" for name, value in fields), f"skip={count}"])


def signal_of(eventfd_id: int) -> Calls:
    """Return the kernel's own signals to one eventfd: a doorbell's kicks, or vhost's calls."""
    # Since Linux 6.8 eventfd_signal is inline (120ae5859363).
    names = Path("/proc/kallsyms").read_text()
    found = re.search(r"^\S+ [Tt] (eventfd_signal)$", names, re.M)
    symbol = found[1] if found else "eventfd_signal_mask"
    return Calls(symbol, kernel_types().struct("eventfd_ctx").member("id").offset, eventfd_id)


def handler_of(irq: int) -> Calls:
    """Return the runs of virtio's interrupt handler for one interrupt, in a guest."""
    return Calls("vring_interrupt", equals=irq, result=1)  # IRQ_HANDLED


class Skip:
    """The next `count` of these calls return at once, in the kernel that this runs on.

    It is inserted as the block begins: who probed the function before sees no skipped call.
    """

    def __init__(self, calls: Calls, count: int = 1) -> None:
        if not in_lab_host():
            raise LabError(f"{NAME} is only for KVM hosts of the lab: make kvm")
        self._calls = calls
        self._count = count

    @property
    def left(self) -> int:
        """How many are still to be skipped."""
        return int((PARAMETERS / "skip").read_text())

    def __enter__(self) -> Self:
        fd = os.open(built_module(platform.release()), os.O_RDONLY | os.O_CLOEXEC)
        try:
            parameters = self._calls.parameters(self._count).encode()
            _done(_libc.syscall(_FINIT_MODULE, fd, parameters, 0), f"inserting {NAME}")
        finally:
            os.close(fd)
        return self

    def __exit__(self, *_: object) -> None:
        remove()


def remove() -> None:
    """Remove the module, be it that a test which was killed has left it, if it is there."""
    if PARAMETERS.exists():
        _done(_libc.syscall(_DELETE_MODULE, NAME.encode(), os.O_NONBLOCK), f"removing {NAME}")


class SkipInGuest:
    """The same in the kernel of a guest. The module is sent there at once, which takes seconds."""

    def __init__(self, machine: LabMachine, calls: Calls, count: int = 1) -> None:
        self._guest = machine.guest
        self._calls = calls
        self._count = count
        self._file = f"/run/{NAME}.ko"
        self._send(self._file)

    @property
    def left(self) -> int:
        return int(self._run(f"cat {PARAMETERS}/skip"))

    def __enter__(self) -> Self:
        self._run(f"insmod {self._file} {self._calls.parameters(self._count)}")
        return self

    def __exit__(self, *_: object) -> None:
        self._run(f"rmmod {NAME}")

    def _send(self, file: str) -> None:
        if self._guest.run(f"test -e {file}").status:
            release = self._run("uname -r").strip()
            # What gunzip takes: RFC 1952.
            packed = zlib.compress(built_module(release).read_bytes(), wbits=31)
            text = base64.b64encode(packed).decode()
            for at in range(0, len(text), _CHUNK):
                self._run(f"echo {text[at : at + _CHUNK]} >>{file}.part")
            self._run(f"base64 -d {file}.part | gunzip >{file}.new && mv {file}.new {file}")

    def _run(self, command: str) -> str:
        status, output = self._guest.run(command)
        if status:
            raise LabError(f"the guest could not: {command[:80]}: {output.strip()}")
        return output


def built_module(release: str, tell: Tell = log_progress) -> Path:
    """Return the module for a kernel, from the cache; the first time it is built (20 s)."""
    recipe = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        recipe.update(source.read_bytes())

    def build(folder: Path) -> None:
        headers = built(f"headers-{release}", lambda empty: _unpack_headers(release, empty, tell))
        tell(f"building {NAME} for Linux {release}")
        for source in SOURCES.iterdir():
            shutil.copy(source, folder)
        sources = headers / "usr" / "src"
        (common,) = sources.glob("linux-headers-*-common")
        # The Makefile for one flavour includes the common one by its absolute path, where it would
        # be installed: so it is named here. A make that runs us would pass its flags on.
        make = ["env", "-u", "MAKEFLAGS", "-u", "MAKELEVEL", tool("make", "make"), "--silent"]
        make += ["-C", str(sources / f"linux-headers-{release}"), "-f", str(common / "Makefile")]
        run_tool([*make, f"M={folder}", "modules"], doing=f"building {NAME} for Linux {release}")
        run_tool([tool("strip", "binutils"), "--strip-debug", folder / f"{NAME}.ko"], doing="strip")

    return built(f"{NAME}-{release}-{recipe.hexdigest()[:12]}", build) / f"{NAME}.ko"


def _unpack_headers(release: str, folder: Path, tell: Tell) -> None:
    if distribution().id != "debian":
        raise LabError(f"{NAME} is built against Debian's kernel headers: run this on Debian")
    package = f"linux-headers-{release}"
    needed = kernel_packages(Kernel(package, r"linux-(headers-\S+|kbuild-\S+)"))
    download_unpacked([package, *needed], folder, tell)
    variables = folder / "usr" / "src" / package / ".kernelvariables"
    # The compiler that built the kernel: `CC = … $(CROSS_COMPILE)gcc-12`.
    if compiler := re.search(r"gcc-\d+", variables.read_text()):
        tool(compiler[0], compiler[0])


def _done(status: int, doing: str) -> None:
    if status:
        raise LabError(f"{doing} failed: {os.strerror(ctypes.get_errno())} (see dmesg)")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for kernel in (unpacked_host_kernel(log_progress), unpacked_kernel(log_progress)):
        built_module(kernel_files(kernel)[1].name)
