"""How do members become one compressed file that tar opens, and a file members again?

The file appears whole or not at all, and only its owner may read it.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.incident.facts import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

ENDINGS = (".tar.gz", ".tgz")
_MEMBER_MOST = 64 << 20
_ALL_MOST = 256 << 20
_MEMBERS_MOST = 1000


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a bundle."""

    name: str
    content: bytes
    what: str = ""
    """What is in it, in words."""


def safe_name(text: str, most: int = 40) -> str:
    """Return `text` as a part of a file's name: no path, no option, nothing to quote."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", text)[:most].strip("._-")
    return name or "machine"


def write(path: Path, members: list[Member], *, at: float) -> int:
    """Write the members in that order as an archive; return the file's size.

    They lie in a folder that is called like the file. Raises BundleError, where there is such a
    file already, too.
    """
    name = path.name
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    # Whoever unpacks it gets this folder: `..` would not do.
    folder = safe_name(name, 120)
    with (
        _appearing(path) as raw,
        gzip.GzipFile("", "wb", 6, raw, int(at)) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for member in members:
            entry = tarfile.TarInfo(f"{folder}/{member.name}")
            entry.size, entry.mtime, entry.mode = len(member.content), int(at), 0o600
            archive.addfile(entry, io.BytesIO(member.content))
    return path.stat().st_size


def write_one(path: Path, content: bytes) -> int:
    """Write a file that only its owner may read; return its size. Raises BundleError."""
    with _appearing(path) as raw:
        raw.write(content)
    return len(content)


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to be written that will be at `path` when the block ends, if nothing is there."""
    temporary = ""
    try:
        prefix = f".{safe_name(path.name, 120)}."
        descriptor, temporary = tempfile.mkstemp(prefix=prefix, dir=path.parent)  # 0600
        with os.fdopen(descriptor, "wb") as raw:
            yield raw
            raw.flush()
            os.fsync(raw.fileno())
        _into_place(temporary, path)
    except FileExistsError as exc:
        raise BundleError(f"{path} exists: give another --out, or remove it") from exc
    except OSError as exc:
        raise BundleError(f"cannot write {path}: {exc.strerror or exc}") from exc
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _into_place(temporary: str, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike rename(2) it never replaces
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        os.rename(temporary, path)
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path, wanted: frozenset[str]) -> dict[str, bytes]:
    """Return those members of a bundle that are wanted, by name without the folder.

    Nothing is unpacked onto the disk, and no more than some hundred MiB into memory. Raises
    BundleError.
    """
    found: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(path, "r|gz") as archive:
            for number, entry in enumerate(archive):
                total += entry.size
                if number >= _MEMBERS_MOST or total > _ALL_MOST:
                    raise BundleError(f"{path} is larger than any bundle of kickcall's")
                name = entry.name.partition("/")[2]
                if name not in wanted or name in found or not entry.isreg():
                    continue
                file = archive.extractfile(entry) if entry.size <= _MEMBER_MOST else None
                if file is not None:
                    found[name] = file.read()
    except (OSError, tarfile.TarError, EOFError, zlib.error) as exc:
        raise BundleError(f"cannot read {path} as a bundle: {exc}") from exc
    return found
