"""Is an initramfs what the kernel's documentation says, and what cpio itself reads?"""

from __future__ import annotations

import shutil
import subprocess

import pytest

from kickcall.lab import cpio


def test_a_record_has_the_magic_13_hexadecimal_fields_and_padding_to_4_bytes() -> None:
    record = cpio.archive([cpio.file("init", b"hello", 0o755)])
    # Documentation/driver-api/early-userspace/buffer-format.rst
    assert record[:6] == b"070701"
    fields = [int(record[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
    inode, mode, _uid, _gid, links, _mtime, size, *_device, name_size, check = fields
    assert (inode, mode, links, size, name_size, check) == (1, 0o100755, 1, 5, 5, 0)
    # 6 + 104 bytes of header and 5 of name end at 115: one byte of padding.
    assert record[110:116] == b"init\0\0"
    assert record[116:124] == b"hello\0\0\0"
    assert b"TRAILER!!!" in record[124:]
    assert len(record) % 4 == 0


def test_the_same_files_make_the_same_archive() -> None:
    entries = [cpio.folder("bin"), cpio.link("bin/sh", "busybox")]
    assert cpio.archive(entries) == cpio.archive(list(entries))


@pytest.mark.skipif(shutil.which("cpio") is None, reason="the cpio program is not installed")
def test_cpio_reads_files_folders_and_links() -> None:
    archive = cpio.archive(
        [cpio.folder("bin"), cpio.file("bin/busybox", b"x" * 10, 0o755), cpio.link("a", "bin")]
    )
    listed = subprocess.run(["cpio", "-tv"], input=archive, capture_output=True, check=True)
    lines = [line.split() for line in listed.stdout.decode().splitlines()]
    assert [(words[0], words[4], words[8:]) for words in lines] == [
        ("drwxr-xr-x", "0", ["bin"]),
        ("-rwxr-xr-x", "10", ["bin/busybox"]),
        ("lrwxrwxrwx", "3", ["a", "->", "bin"]),
    ]
