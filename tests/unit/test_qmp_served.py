"""The notes that tell other commands where a machine's monitor is served are believed with care."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING

import pytest

from kickcall.vmm import served

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kickcall"
    monkeypatch.setattr(served, "runtime_folder", lambda: path)
    return path


def start_time(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def note_of_parent(folder: Path, pid: int, listen: str, **other: object) -> None:
    """Write a note as if our parent process served the machine."""
    parent = os.getppid()
    note = {"listen": listen, "server_pid": parent, "server_start_time": start_time(parent)}
    path = folder / f"{pid}-{start_time(pid)}.json"
    path.write_text(json.dumps(note | other))


def test_a_note_is_private_and_gone_after_withdrawal(folder: Path) -> None:
    served.advertise(42, 7, "/run/a.sock", "/run/qemu.sock")
    (path,) = folder.iterdir()
    assert path.name == "42-7.json"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    note = json.loads(path.read_text())
    assert note["server_pid"] == os.getpid()
    assert (note["listen"], note["upstream"]) == ("/run/a.sock", "/run/qemu.sock")
    served.withdraw(42, 7)
    assert list(folder.iterdir()) == []
    served.withdraw(42, 7)


def test_another_process_finds_the_socket_and_the_server_itself_does_not(folder: Path) -> None:
    served.advertise(os.getpid(), start_time(os.getpid()), "/run/a.sock", "")
    assert served.served_monitor(os.getpid(), start_time(os.getpid())) is None
    note_of_parent(folder, os.getpid(), "/run/a.sock")
    assert served.served_monitor(os.getpid(), start_time(os.getpid())) == "/run/a.sock"
    assert served.served_monitor(os.getpid(), 1) is None


def test_a_served_socket_names_its_machine_by_any_path(folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "a.sock"))
    (tmp_path / "link").symlink_to(tmp_path / "a.sock")
    note_of_parent(folder, os.getpid(), str(tmp_path / "a.sock"))
    assert served.machine_served_at(str(tmp_path / "link")) == os.getpid()
    assert served.machine_served_at(str(tmp_path)) is None
    assert served.machine_served_at(str(tmp_path / "none")) is None


@pytest.mark.parametrize("other", [{"server_start_time": 1}, {"server_start_time": None}])
def test_the_note_of_a_dead_server_counts_for_nothing_and_is_swept(
    folder: Path, other: dict[str, object]
) -> None:
    folder.mkdir(mode=0o700)
    note_of_parent(folder, os.getpid(), "/run/a.sock", **other)
    assert served.served_monitor(os.getpid(), start_time(os.getpid())) is None
    served.advertise(42, 7, "/run/a.sock", "")
    assert [path.name for path in folder.iterdir()] == ["42-7.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"server_pid": "x"}', "[" * 5000])
def test_a_broken_note_is_no_note(folder: Path, text: str) -> None:
    folder.mkdir(mode=0o700)
    (folder / "42-7.json").write_text(text)
    assert served.served_monitor(42, 7) is None
    served.withdraw(42, 7)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_what_another_user_owns_is_not_believed(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    pid, started = os.getpid(), start_time(os.getpid())
    note_of_parent(folder, pid, "/run/a.sock")
    (note,) = folder.iterdir()
    os.chown(note, 12345, -1)
    assert served.served_monitor(pid, started) is None
    os.chown(note, 0, -1)
    os.chown(folder, 12345, -1)
    assert served.served_monitor(pid, started) is None
    with pytest.raises(served.RuntimeFolderError, match="12345"):
        served.advertise(pid, started, "/run/a.sock", "")


def test_a_folder_that_others_may_write_to_is_not_believed(folder: Path) -> None:
    folder.mkdir()
    note_of_parent(folder, os.getpid(), "/run/a.sock")
    folder.chmod(0o777)
    assert served.served_monitor(os.getpid(), start_time(os.getpid())) is None
    with pytest.raises(served.RuntimeFolderError):
        served.advertise(42, 7, "/run/a.sock", "")
