"""Is a bundle a file that tar opens, whole or not there, whose summary tells it all?"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from typing import TYPE_CHECKING

import msgspec
import pytest

from incident_facts import AT, incident, lines, verdict
from kickcall.errors import KickcallError
from kickcall.incident import archive
from kickcall.incident.archive import Member, safe_name
from kickcall.incident.facts import BundleError, facts_from, lines_from, to_json
from kickcall.incident.seen import Seen, seen_from, seen_to
from kickcall.incident.summary import headline, summary
from nasty import NASTY

if TYPE_CHECKING:
    from pathlib import Path

MEMBERS = [Member("SUMMARY.md", b"# hello\n"), Member("facts.json", b"{}\n")]


def test_tar_opens_it_and_the_summary_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "kickcall-vm0.tar.gz"
    size = archive.write(path, MEMBERS, at=AT)
    assert path.stat().st_size == size
    assert path.stat().st_mode & 0o777 == 0o600
    told = subprocess.run(["tar", "tzf", path], capture_output=True, text=True, check=True)
    assert told.stdout == "kickcall-vm0/SUMMARY.md\nkickcall-vm0/facts.json\n"
    text = subprocess.run(["tar", "xzOf", path], capture_output=True, text=True, check=True)
    assert text.stdout == "# hello\n{}\n"
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(b"mine")
    with pytest.raises(BundleError, match="exists"):
        archive.write(path, MEMBERS, at=AT)
    assert path.read_bytes() == b"mine"
    assert os.listdir(tmp_path) == [path.name]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "a.tar.gz").symlink_to(tmp_path / "target")
    with pytest.raises(BundleError, match="exists"):
        archive.write(tmp_path / "a.tar.gz", MEMBERS, at=AT)
    assert (tmp_path / "target").read_bytes() == b"mine"


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot write .*No such file") as caught:
        archive.write(tmp_path / "none" / "a.tar.gz", MEMBERS, at=AT)
    assert isinstance(caught.value, KickcallError)
    assert "\n" not in str(caught.value)


def test_members_are_read_back_without_unpacking(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    archive.write(path, MEMBERS, at=AT)
    assert archive.read(path, frozenset({"facts.json", "other"})) == {"facts.json": b"{}\n"}


def hostile(path: Path, *entries: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for entry in entries:
            file.addfile(entry, io.BytesIO(bytes(entry.size)))
    return path


def test_a_hostile_archive_is_refused_or_passed_over(tmp_path: Path) -> None:
    link = tarfile.TarInfo("a/facts.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    assert archive.read(hostile(tmp_path / "1", link), frozenset({"facts.json"})) == {}
    many = [tarfile.TarInfo(f"a/{number}") for number in range(1200)]
    with pytest.raises(BundleError, match="larger"):
        archive.read(hostile(tmp_path / "2", *many), frozenset())
    for content in (b"", b"hello", (tmp_path / "2").read_bytes()[:50]):
        (tmp_path / "3").write_bytes(content)
        with pytest.raises(BundleError, match="cannot read"):
            archive.read(tmp_path / "3", frozenset({"facts.json"}))


def test_facts_are_the_same_when_read_back() -> None:
    facts = incident()
    assert facts_from(to_json(facts)) == facts
    some = list(lines())
    assert lines_from(b"".join(msgspec.json.encode(line) + b"\n" for line in some)) == some


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[]", b'{"format": 1}', b"[" * 100_000, to_json(incident())[:-20]],
    ids=range(6),
)
def test_facts_that_are_none_are_refused(text: bytes) -> None:
    with pytest.raises(BundleError, match=r"facts\.json"):
        facts_from(text)


def test_a_bundle_of_another_format_says_so() -> None:
    with pytest.raises(BundleError, match="format 2"):
        facts_from(to_json(incident()).replace(b'"format": 1', b'"format": 2', 1))


def test_what_a_watcher_saw_is_handed_over() -> None:
    seen = Seen((verdict("vub0"),), tuple(lines()), "threads")
    assert seen_from(seen_to(seen)) == seen


@pytest.mark.parametrize("name", NASTY, ids=range(len(NASTY)))
def test_a_name_is_no_path(name: str) -> None:
    safe = safe_name(name)
    assert safe
    assert safe[0] not in ".-_"
    assert set(safe) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def test_the_summary_tells_the_stall_on_its_first_screen() -> None:
    first = "\n".join(summary(incident()).splitlines()[:40])
    for said in (
        "# `lost-kick on hop 3: vm0 vm0 queue 0`",
        "Linux 6.1.0 x86_64",
        "7.2.22",
        "2026-11-22 22:42:36.432 UTC",
        "✗  3 kicked",
        "broken here",
        "avail.idx",
        "next: kickcall kick vm0 vm0 --queue 0",
    ):
        assert said in first


def test_the_summary_of_a_healthy_machine_says_so() -> None:
    assert headline(incident(stalled=False)) == "vm0: no stall was found"


def test_the_summary_says_what_could_not_be_had() -> None:
    told = summary(incident("nobody knows"), MEMBERS)
    assert "## What could not be had" in told
    assert "1 word of it had a secret" in told
    assert "    facts.json" in told


@pytest.mark.parametrize("name", NASTY, ids=range(len(NASTY)))
def test_a_nasty_name_steers_no_terminal_and_is_no_markdown(name: str) -> None:
    told = summary(incident(name), MEMBERS)
    for line in told.splitlines():
        assert line.isprintable()
        # Names stand in indented blocks and in code spans, which they cannot leave.
        outside = "" if line.startswith("    ") else "".join(line.split("`")[::2])
        assert "<" not in outside
        assert "](" not in outside
        assert line.count("`") % 2 == 0 or line.startswith("    ")
    assert told.count("\n# ") + told.startswith("# ") == 1
