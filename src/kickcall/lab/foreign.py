"""How does the lab get Debian packages of another architecture, without apt's own settings?

An admin's `dpkg --add-architecture` is not ours to say: apt gets settings and lists of its own, in
the cache, and nothing is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.errors import LabError
from kickcall.lab.cache import built, run_tool, tool
from kickcall.lab.packages import Kernel, download_unpacked, kernel_packages
from kickcall.lab.qemu import KEYRING, MIRROR

if TYPE_CHECKING:
    from pathlib import Path

    from kickcall.lab.cache import Tell

_SUITE = "bookworm"
_KERNEL = Kernel("linux-image-cloud-arm64", r"linux-image-\d\S*-cloud-arm64")


def unpacked_arm64(tell: Tell) -> Path:
    """Return a folder with arm64's kernel, its modules and busybox; downloads 22 MB once."""
    return built(f"arm64-{_SUITE}", lambda folder: _unpack(folder, tell))


def _unpack(folder: Path, tell: Tell) -> None:
    if not KEYRING.exists():
        raise LabError(
            f"Debian's archive keys {KEYRING} are missing: apt-get install debian-archive-keyring"
        )
    private = folder / "apt"
    for name in ("lists/partial", "archives/partial"):
        (private / name).mkdir(parents=True)
    (private / "status").touch()
    sources = private / "sources.list"
    sources.write_text(f"deb [arch=arm64 signed-by={KEYRING}] {MIRROR} {_SUITE} main\n")
    options = [
        option
        for setting in (
            f"Dir::Etc::sourcelist={sources}",
            "Dir::Etc::sourceparts=-",
            f"Dir::State::lists={private / 'lists'}",
            f"Dir::State::status={private / 'status'}",
            f"Dir::Cache={private}",
            "APT::Architecture=arm64",
            "APT::Architectures=arm64",
            "APT::Sandbox::User=root",
        )
        for option in ("-o", setting)
    ]
    tell(f"listing Debian {_SUITE} for arm64")
    run_tool([tool("apt-get", "apt"), "-q", *options, "update"], doing="listing arm64's packages")
    kernel = kernel_packages(_KERNEL, options)
    if not kernel:
        raise LabError(f"Debian {_SUITE} has no kernel behind the package {_KERNEL.meta}")
    download_unpacked([*kernel, "busybox-static"], folder, tell, options)
