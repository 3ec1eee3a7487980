"""Is a crashed host's memory read with nothing but itself: no symbols, no root, no host?

KICKCALL_SYMBOLS names files with the debug symbols of the lab's host, to read it with those
instead: vmlinux, kvm.ko, vhost.ko and vhost_vsock.ko of Debian's linux-image-VERSION-dbg.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kvm_by_hand
from kickcall.lab.host import boot_host

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.lab.host import LabHost

pytestmark = [
    pytest.mark.rig,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab's host shares the root folder: root"),
]

TESTS = Path(__file__).resolve().parents[1]
SYMBOLS = os.environ.get("KICKCALL_SYMBOLS", "").split()
MEMORY_MIB = 768
"""As little as the host needs: all of it is written to the vmcore."""


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The memory of a KVM host with one machine, made by hand, and what its kernel was told."""
    vmcore = tmp_path_factory.mktemp("crash") / "vmcore"
    with boot_host("crashing", memory_mib=MEMORY_MIB, timeout=300) as host:
        told = made_by_hand(host)
        host.machine.qmp(
            "dump-guest-memory", {"paging": False, "protocol": f"file:{vmcore}", "detach": True}
        )
        deadline = time.monotonic() + 400
        while (status := host.machine.qmp("query-dump")["status"]) == "active":
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert status == "completed"
    yield vmcore, told
    vmcore.unlink()


def made_by_hand(host: LabHost) -> dict[str, Any]:
    """Make the machine of tests/kvm_by_hand.py in the host, and return what it says."""
    output = host.shared / "by-hand"
    program = [sys.executable, str(TESTS / "kvm_by_hand.py"), "-name", "guest=byhand"]
    host.machine.guest.start(f"{shlex.join(program)} >{shlex.quote(str(output))} 2>&1")
    deadline = time.monotonic() + 200
    while not (output.exists() and output.read_text().endswith("}\n")):
        assert time.monotonic() < deadline, output.read_text() if output.exists() else "nothing"
        time.sleep(0.2)
    said: dict[str, Any] = json.loads(output.read_text())
    return said


def kickcall(vmcore: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    symbols = [word for file in SYMBOLS for word in ("--symbols", file)]
    command = [sys.executable, "-m", "kickcall", "--vmcore", str(vmcore), *symbols, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_machines_of_a_crashed_host_are_listed(crashed: tuple[Path, dict[str, Any]]) -> None:
    vmcore, told = crashed
    listed = kickcall(vmcore, "vms", "--json")
    assert listed.returncode == 0, listed.stderr
    (machine,) = json.loads(listed.stdout)["machines"]
    assert (machine["pid"], machine["name"]) == (told["pid"], "byhand")


def test_a_kick_that_was_lost_before_the_crash_is_seen(
    crashed: tuple[Path, dict[str, Any]],
) -> None:
    vmcore, told = crashed
    shown = kickcall(vmcore, "show", "byhand", "--json")
    assert shown.returncode == 0, shown.stderr
    (queue,) = json.loads(shown.stdout)["queues"]
    assert queue["device"] == f"vhost-vsock-{told['vhost']}"
    assert queue["vhost_queue"] == kvm_by_hand.QUEUE
    assert queue["ring"]["avail_idx"] == kvm_by_hand.AVAIL_IDX
    assert queue["last_avail_idx"] == kvm_by_hand.LAST_AVAIL
    assert queue["ring"]["used_idx"] == kvm_by_hand.USED_IDX
    assert queue["kick_count"] == kvm_by_hand.COUNT
    text = kickcall(vmcore, "show", "byhand").stdout
    assert f"{kvm_by_hand.AVAIL_IDX}" in text
    assert f"vhost-{told['pid']}[" in text


def test_the_eventfds_of_a_crashed_host_are_as_the_kernel_had_them(
    crashed: tuple[Path, dict[str, Any]],
) -> None:
    vmcore, told = crashed
    device = f"vhost-vsock-{told['vhost']}"
    shown = kickcall(vmcore, "eventfd", "byhand", device, "--queue", "1", "--json")
    assert shown.returncode == 0, shown.stderr
    (queue,) = json.loads(shown.stdout)["queues"]
    assert queue["kick"]["id"] == told["kick"]
    assert queue["kick"]["count"] == kvm_by_hand.COUNT
    assert [waiter["pid"] for waiter in queue["kick"]["wqh"]] == [queue["vhost"]["worker"]]
    assert {(one["bus"], one["address"], one["datamatch"]) for one in queue["ioeventfds"]} == {
        ("mmio", kvm_by_hand.MMIO, None),
        ("fast-mmio", kvm_by_hand.MMIO, None),
        ("pio", kvm_by_hand.PORT, kvm_by_hand.QUEUE),
    }
    assert queue["call"]["id"] == told["call"]
    assert [waiter["function"] for waiter in queue["call"]["wqh"]] == ["irqfd_wakeup"]
    (irqfd,) = queue["irqfds"]
    assert irqfd["gsi"] == kvm_by_hand.GSI
    assert irqfd["msi"] == {"address": kvm_by_hand.MSI_ADDRESS, "data": kvm_by_hand.MSI_DATA}
    text = kickcall(vmcore, "eventfd", "byhand").stdout
    assert f"count = {kvm_by_hand.COUNT}," in text
    assert f"last_avail_idx = {kvm_by_hand.LAST_AVAIL}," in text


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("kick", "byhand", "x", "--queue", "0"), 2, "needs a host that runs"),
        (("eventfd", "byhand", "--verify"), 2, "needs a machine that runs"),
        (("show", "nobody"), 3, "the vmcore has no machine 'nobody'; it has: byhand (pid "),
    ],
)
def test_what_a_vmcore_cannot_do_is_one_line(
    crashed: tuple[Path, dict[str, Any]], arguments: tuple[str, ...], code: int, says: str
) -> None:
    done = kickcall(crashed[0], *arguments)
    assert done.returncode == code
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_file_that_is_no_vmcore_is_one_line(tmp_path: Path) -> None:
    for content in (b"", b"no vmcore", b"\x7fELF\x02\x01\x01" + bytes(57)):
        file = tmp_path / "file"
        file.write_bytes(content)
        done = kickcall(file, "vms")
        assert done.returncode == 3
        assert done.stderr.count("\n") == 1
        assert "vmcore" in done.stderr
    done = kickcall(tmp_path / "missing", "vms")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
