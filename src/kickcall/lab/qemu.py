"""Which QEMU runs a lab machine: this system's, or another Debian release's in its own root?"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kickcall.errors import LabError
from kickcall.lab.board import BOARDS
from kickcall.lab.cache import built, locked, run_tool, tool

if TYPE_CHECKING:
    from kickcall.lab.board import Board
    from kickcall.lab.cache import Tell

MIRROR = "http://deb.debian.org/debian"
_DEVICES = ("kvm", "vhost-net", "vhost-scsi", "vhost-vsock", "net/tun")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@dataclass(frozen=True, slots=True)
class Qemu:
    """A QEMU to run: the command that starts it, and the root folder in which it lives."""

    command: tuple[str, ...]
    root: Path | None = None


def find_qemu(name: str, tell: Tell, board: Board = BOARDS["q35"]) -> Qemu:
    """Return the QEMU called `system`, or of a Debian suite as `trixie` (built the first time).

    It is the one that has `board`. Raises LabError where it is not installed, or a suite is asked
    for without root.
    """
    if name == "system":
        return Qemu((tool(board.program, board.package),))
    if not re.fullmatch(r"[a-z]+", name):
        raise LabError(f"{name!r} is no QEMU of the lab: say system or a Debian suite, as trixie")
    if board.architecture != "amd64":
        raise LabError(f"the board {board.name} runs on this system's QEMU only, not on {name}'s")
    if os.geteuid() != 0:
        raise LabError(f"QEMU of Debian {name} runs under chroot, which only root may: use sudo")
    root = built(f"qemu-{name}", lambda folder: _bootstrap(name, folder, tell))
    with locked("qemu-devices"):
        _give_devices(root)
    return Qemu((tool("chroot", "coreutils"), str(root), board.program), root)


def usable_kvm() -> bool:
    """Return whether guests can run under KVM here.

    /dev/kvm may open and even make a VM on a machine whose processor has no virtualization
    extension (seen in cloud containers), and then every vCPU fails: so look at both.
    """
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if flags is None or not {"vmx", "svm"} & set(flags[1].split()):
        return False
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _give_devices(root: Path) -> None:
    """Make in QEMU's root the device files of KVM and vhost that this host has."""
    for name in _DEVICES:
        node = root / "dev" / name
        try:
            number = os.stat(Path("/dev") / name).st_rdev
        except FileNotFoundError:
            continue
        # vhost-scsi's number is another one each time the module is loaded.
        if node.exists() and node.stat().st_rdev == number:
            continue
        node.parent.mkdir(exist_ok=True)
        node.unlink(missing_ok=True)
        os.mknod(node, stat.S_IFCHR | 0o600, number)


def _bootstrap(suite: str, folder: Path, tell: Tell) -> None:
    debootstrap = tool("debootstrap", "debootstrap")
    if not KEYRING.exists():
        raise LabError(
            f"Debian's archive keys {KEYRING} are missing: apt-get install debian-archive-keyring"
        )
    tell(f"installing Debian {suite} with its QEMU into {folder.parent} (half a minute)")
    run_tool(
        [debootstrap, "--variant=minbase", f"--keyring={KEYRING}", suite, folder, MIRROR],
        doing=f"installing Debian {suite} with debootstrap",
    )
    apt: list[str | Path] = [tool("chroot", "coreutils"), folder, "apt-get", "-q"]
    run_tool(
        [*apt, "install", "-y", "--no-install-recommends", "qemu-system-x86"],
        doing=f"installing QEMU of Debian {suite}",
    )
    run_tool([*apt, "clean"], doing="emptying apt's cache")
