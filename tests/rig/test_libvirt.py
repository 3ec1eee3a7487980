"""Does everything work on a libvirt domain by its name, with libvirt's own monitor?

A real libvirtd, and real domains with the lab's guest. One of their disks is vhost-user, through a
relay that can lose notifications.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kickcall.attached import attach
from kickcall.errors import EventNotSupportedError, MonitorBusyError, MonitorGoneError
from kickcall.vmm.domains import addresses
from kickcall.vmm.find import resolve
from libvirt_host import guest_domain, libvirtd
from opened_bundle import opened
from watcher import KICKCALL, PATIENCE_S, Watcher
from witness import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.lab.image import GuestImage
    from libvirt_host import GuestDomain, Libvirt

pytestmark = [
    pytest.mark.rig,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may make namespaces for a libvirtd"),
]

READ = "taskset -c 0 dd if=/dev/{} of=/dev/null bs=4k count=1 iflag=direct"
DISK, NET, RELAYED = "ua-blk0", "ua-net0", "ua-vub0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lv")


@pytest.fixture(scope="module")
def libvirt(folder: Path) -> Iterator[Libvirt]:
    with libvirtd(folder / "a", "host-a") as started:
        yield started


@pytest.fixture(scope="module")
def domain(libvirt: Libvirt, folder: Path, guest_image_built: GuestImage) -> Iterator[GuestDomain]:
    """A domain called lv0 whose guest is up."""
    with guest_domain(folder / "lv0", "lv0", guest_image_built, relay=True) as made:
        libvirt.virsh("create", str(made.xml))
        made.wait()
        yield made


def kickcall(*words: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([KICKCALL, *words], capture_output=True, text=True, timeout=60, **how)


def answer(*words: str) -> Any:
    done = kickcall(*words, "--json")
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def test_a_domain_is_listed_with_its_name_and_without_libvirts_monitor(
    libvirt: Libvirt, domain: GuestDomain
) -> None:
    (machine,) = (one for one in answer("vms")["machines"] if one["pid"] == libvirt.pid("lv0"))
    assert (machine["name"], machine["domain"], machine["monitors"]) == ("lv0", "lv0", [])
    assert "libvirt:lv0" in kickcall("vms").stdout


@pytest.mark.parametrize("target", ["lv0", "libvirt:lv0", "uuid", "pid"])
def test_a_domain_is_attached_by_any_of_its_names(
    libvirt: Libvirt, domain: GuestDomain, target: str
) -> None:
    uuid = libvirt.virsh("domuuid", "lv0").stdout.strip()
    meant = {"uuid": f"libvirt:{uuid}", "pid": str(libvirt.pid("lv0"))}.get(target, target)
    with attach(meant) as machine:
        assert machine.info.pid == libvirt.pid("lv0")
        assert {device.info.id for device in machine.devices()} == {DISK, NET, RELAYED}


def test_show_and_eventfd_tell_of_a_domains_queues(domain: GuestDomain) -> None:
    devices = {one["id"]: one for one in answer("show", "libvirt:lv0")["devices"]}
    assert [queue["queue"] for queue in devices[DISK]["queues"]] == [0, 1]
    notifiers = answer("eventfd", "libvirt:lv0", DISK)["notifiers"]
    assert [(one["queue"], one["event"]) for one in notifiers] == [
        (0, "kick"),
        (0, "call"),
        (1, "kick"),
        (1, "call"),
    ]


def test_a_call_interrupts_the_guest_of_a_domain(domain: GuestDomain) -> None:
    before = domain.interrupts("virtio1-req.1")
    said = answer("call", "libvirt:lv0", DISK, "--queue", "1")
    assert said["via"] == "eventfd"
    until(lambda: domain.interrupts("virtio1-req.1") == before + 1, "one more interrupt")


def test_a_lost_kick_is_diagnosed_and_repaired_on_a_domain(domain: GuestDomain) -> None:
    domain.relay.drop("kick", queue=0, count=1)
    read = domain.guest.start(READ.format("vdb"))
    domain.relay.wait_for("kick", 0, dropped=1)
    verdicts = answer("diagnose", "libvirt:lv0")["verdicts"]
    stalled = [one for one in verdicts if one["verdict"] not in ("idle", "progressing")]
    assert [(one["device"].rpartition("/")[2], one["verdict"]) for one in stalled] == [
        (RELAYED, "lost-kick")
    ]
    would = answer("kick", "libvirt:lv0", RELAYED, "--queue", "0", "--dry-run")
    assert (would["via"], would["dry_run"]) == ("eventfd", True)
    answer("kick", "libvirt:lv0", RELAYED, "--queue", "0")
    assert read.wait(timeout=60).status == 0


def test_a_probe_confirms_what_was_lost_on_a_domain(domain: GuestDomain) -> None:
    domain.relay.drop("call", queue=0, count=1)
    read = domain.guest.start(READ.format("vdb"))
    domain.relay.wait_for("call", 0, dropped=1)
    (verdict,) = answer("diagnose", "libvirt:lv0", RELAYED, "--queue", "0", "--probe")["verdicts"]
    assert (verdict["verdict"], verdict["confidence"]) == ("lost-call", "confirmed")
    assert read.wait(timeout=60).status == 0


def test_a_ticket_can_be_made_of_a_stalled_domain(domain: GuestDomain, tmp_path: Path) -> None:
    bundle, page = tmp_path / "lv0.tar.gz", tmp_path / "lv0.html"
    lost = domain.relay.carried("kick", 0).dropped
    domain.relay.drop("kick", queue=0, count=1)
    read = domain.guest.start(READ.format("vdb"))
    domain.relay.wait_for("kick", 0, dropped=lost + 1)
    done = kickcall("bundle", "libvirt:lv0", "--out", str(bundle), "--json")
    assert done.returncode == 0, done.stderr
    found = opened(bundle, done.stdout)
    # Counting is the kernel's, and not every kernel has it; all else is there.
    assert {one["part"] for one in found.told["missing"]} <= {"the flight recorder"}, found.told
    said = json.loads(found.members["qemu.json"])
    assert said["query-status"]["running"] is True
    assert b"lost-kick" in found.members["SUMMARY.md"]
    # libvirt gives QEMU a master key by its file's name; what is in the file is not asked for.
    assert b"masterKey" in found.members["facts.json"]
    (stall,) = answer("report", "libvirt:lv0", "--out", str(page))["stalls"]
    assert (stall["device"].rpartition("/")[2], stall["verdict"]) == (RELAYED, "lost-kick")
    assert "lv0" in page.read_text()
    answer("kick", "libvirt:lv0", RELAYED, "--queue", "0")
    assert read.wait(timeout=60).status == 0


def test_no_domain_is_paused_behind_libvirts_back(libvirt: Libvirt, domain: GuestDomain) -> None:
    with attach("libvirt:lv0") as machine:
        with pytest.raises(EventNotSupportedError, match=r"mmio: .* behind libvirt's back"):
            machine.device(NET).queue(0).call(allow_pause=True)
        (offer,) = (
            one for one in machine.device(NET).events() if (one.queue, one.event) == (0, "call")
        )
        assert (offer.via, "behind libvirt's back" in offer.reason) == (None, True)
    assert libvirt.virsh("domstate", "lv0", "--reason").stdout.strip() == "running (booted)"


def test_the_rfcs_command_is_served_on_a_domain(domain: GuestDomain, folder: Path) -> None:
    path = folder / "qmp"
    before = domain.interrupts("virtio1-req.0")
    with subprocess.Popen(
        [KICKCALL, "qmp", "libvirt:lv0", "--listen", path], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert "listening" in server.stdout.readline()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(str(path))
            with sock.makefile("rw") as lines:
                assert json.loads(lines.readline())["QMP"]["capabilities"] == []
                for number, (command, arguments) in enumerate(
                    [
                        ("qmp_capabilities", {}),
                        (
                            "x-debug-device-event",
                            {"dev": f"/machine/peripheral/{DISK}", "event": "call", "queue": 0},
                        ),
                        ("stop", {}),
                        ("cont", {}),
                        ("query-nothing", {}),
                    ]
                ):
                    asked = {"execute": command, "arguments": arguments, "id": [number, "é"]}
                    lines.write(json.dumps(asked) + "\n")
                lines.flush()
                replies: list[dict[str, Any]] = []
                events: list[str] = []
                while len(replies) < 5 or len(events) < 2:
                    said = json.loads(lines.readline())
                    if "event" in said:
                        events.append(said["event"])
                    else:
                        replies.append(said)
        # Other commands go through it.
        assert answer("show", "lv0")["run_state"] == "running"
        server.terminate()
        assert server.wait(60) == 0
    by_number = {one["id"][0]: one for one in replies}
    assert [by_number[number].get("return") for number in range(4)] == [{}] * 4
    assert by_number[4]["error"]["class"] == "CommandNotFound"
    assert events == ["STOP", "RESUME"]
    until(lambda: domain.interrupts("virtio1-req.0") == before + 1, "one more interrupt")


def test_without_the_binding_one_line_says_what_to_install(domain: GuestDomain) -> None:
    without = (
        "import sys; sys.modules['libvirt'] = None; sys.argv = ['kickcall', 'show', 'lv0'];"
        "from kickcall.cli.main import run; run()"
    )
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "lv0: its monitor is libvirt's" in done.stderr
    assert "pip install 'kickcall[libvirt]'" in done.stderr


def test_a_libvirt_that_hangs_is_waited_for_only_so_long(
    libvirt: Libvirt, domain: GuestDomain
) -> None:
    with attach("libvirt:lv0") as machine, libvirt.stopped():
        began = time.monotonic()
        with pytest.raises(MonitorBusyError, match=r"lv0: libvirt did not answer within 1\.8 s"):
            machine.refresh()
        with pytest.raises(MonitorBusyError, match="lv0: libvirt has not answered an earlier"):
            machine.refresh()
        machine.device(DISK).queue(0).state()
        done = kickcall("show", "lv0")
        assert (done.returncode, done.stderr.count("\n")) == (3, 1)
        assert time.monotonic() - began < 30
    with attach("libvirt:lv0", timeout=30) as machine:
        assert machine.run_state == "running"


def test_libvirt_may_be_restarted_under_an_attached_domain(
    libvirt: Libvirt, domain: GuestDomain
) -> None:
    # A libvirt that was just started may be at work on the domain for some seconds.
    with attach("libvirt:lv0", timeout=30) as machine:
        libvirt.stop()
        with pytest.raises(MonitorGoneError, match="lv0: its monitor is libvirt's, and no libvirt"):
            machine.refresh()
        # What needs no monitor goes on.
        machine.device(DISK).queue(0).state()
        machine.device(DISK).queue(0).call()
        # The monitor is free, and is taken only if it is named.
        (monitor,) = libvirt.folder.glob("lib/libvirt/qemu/domain-*-lv0/monitor.sock")
        with attach(f"qmp:{monitor}") as by_path:
            assert by_path.info.pid == machine.info.pid
        libvirt.start()
        machine.refresh()
        assert machine.run_state == "running"


@contextlib.contextmanager
def watcher(folder: Path, *words: str) -> Iterator[Watcher]:
    started = Watcher("--journal", str(folder / "journal.db"), *words)
    try:
        yield started
        assert started.end() == 0
    finally:
        started.close()


def test_the_watcher_heals_a_domain_whose_monitor_is_libvirts(
    domain: GuestDomain, folder: Path
) -> None:
    with watcher(folder, "libvirt:lv0", "--heal") as watch:
        watch.wait_for("came", machine="lv0")
        domain.relay.drop("kick", queue=0, count=1)
        read = domain.guest.run(READ.format("vdb"))
        assert read.status == 0
        healed = watch.wait_for("helped")
        assert (healed["device"].rpartition("/")[2], healed["queue"]) == (RELAYED, 0)
        assert watch.count("injected") == 1


def test_a_domain_that_migrates_is_let_go_of_here_and_watched_there(
    libvirt: Libvirt, domain: GuestDomain, folder: Path, guest_image_built: GuestImage
) -> None:
    """From one libvirtd to another, and with the guest at work; both are on this host."""
    with (
        libvirtd(folder / "b", "host-b") as other,
        guest_domain(folder / "lv1", "lv1", guest_image_built) as made,
        watcher(folder, "lv1", "--heal") as watch,
    ):
        libvirt.virsh("create", str(made.xml))
        first = libvirt.pid("lv1")
        watch.wait_for("came", machine="lv1", pid=first)
        made.wait()
        # Whether devices were set up is asked every 15 s at the least.
        what = "the watcher maps the guest's memory"
        until(lambda: mapped(watch.process.pid), what, PATIENCE_S)
        memory = mapped(watch.process.pid)
        # Two ways to one libvirtd need one connection.
        ways = [addresses(resolve(name)[0]) for name in ("lv0", "lv1")]
        assert ways[0] == ways[1]
        assert ways[0][0].socket != ways[1][0].socket
        made.guest.start("while true; do " + READ.format("vda") + "; done")
        libvirt.virsh("migrate", "--live", "--unsafe", "lv1", other.uri, "tcp:127.0.0.1")
        assert (libvirt.running().count("lv1"), other.running()) == (0, ["lv1"])
        second = other.pid("lv1")
        assert watch.wait_for("went", pid=first)["text"] == "it migrated away"
        watch.wait_for("came", pid=second)
        # A mapping would keep the memory of what left.
        assert not memory & mapped(watch.process.pid)
        with attach("libvirt:lv1") as machine:
            assert (machine.info.pid, machine.run_state) == (second, "running")
            before = machine.device(DISK).queue(0).state().avail_idx
            until(
                lambda: machine.device(DISK).queue(0).state().avail_idx != before,
                "the guest goes on at its destination",
            )
        other.virsh("reset", "lv1")
        watch.wait_for("rebooted", pid=second)
        other.virsh("destroy", "lv1")
        watch.wait_for("went", pid=second, text="it was destroyed")
        assert watch.count("injected") == 0


def mapped(pid: int) -> set[str]:
    """Return which guests' memory a process has mapped, by inode (proc_pid_maps(5))."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "/memfd:" in line}
