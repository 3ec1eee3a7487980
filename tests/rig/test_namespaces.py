"""Is a machine reached that is not started by hand: in a container, or by Proxmox VE?"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from container import FOLDER, contained
from kickcall.attached import attach
from kickcall.host.threads import inner_tids
from kickcall.lab.qtest import Qtest
from kickcall.lab.spec import MachineSpec, VirtioBlk, VirtioNet
from kickcall.model import DeviceEvent, VerdictKind, Via
from kickcall.vmm.find import find
from libvirt_host import guest_domain, libvirtd
from small_qemu import small_qemu
from witness import until, was_asked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.lab.image import GuestImage
    from kickcall.lab.machine import LabMachine
    from kickcall.lab.qtest_virtio import VirtioPciDriver

pytestmark = [
    pytest.mark.rig,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may make namespaces"),
]
KICKCALL = Path(sys.executable).with_name("kickcall")
NAME = f"default_vmi-{os.getpid()}"


@pytest.fixture(scope="module")
def machine() -> Iterator[LabMachine]:
    """A machine in a container, with monitors at a path, on TCP and on an abstract socket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spec = MachineSpec(
        name=NAME,
        devices=(VirtioBlk(queues=2, iothread=True), VirtioNet()),
        arguments=(
            *("-qmp", "unix:/tmp/link/linked,server=on,wait=off"),
            *("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off"),
            *("-qmp", f"unix:{NAME},abstract=on,server=on,wait=off"),
        ),
    )
    with contained(spec) as started:
        yield started


@pytest.fixture(scope="module")
def qtest(machine: LabMachine) -> Iterator[Qtest]:
    with Qtest(machine) as connected:
        yield connected


@pytest.fixture
def disk(qtest: Qtest) -> VirtioPciDriver:
    driver = qtest.device("blk0")
    driver.set_up(event_idx=True)
    return driver


def test_a_machine_in_a_container_is_found_with_the_monitors_that_can_be_reached(
    machine: LabMachine,
) -> None:
    (found,) = (one for one in find() if one.pid == machine.pid)
    assert found.name == NAME
    # Its TCP port and its abstract socket are those of its own network: here they are nobody's.
    assert [address.written for address in found.monitors] == [
        f"{FOLDER}/qmp0",
        f"{FOLDER}/lab-monitor",
        "/tmp/link/linked",
    ]
    assert [address.path for address in found.monitors] == [
        f"/proc/{machine.pid}/root{FOLDER}/qmp0",
        f"/proc/{machine.pid}/root{FOLDER}/lab-monitor",
        f"/proc/{machine.pid}/root{FOLDER}/linked",  # by a link of its own root
    ]
    assert not Path(FOLDER).exists()


def test_its_threads_are_numbered_otherwise_inside(machine: LabMachine) -> None:
    inner = inner_tids(machine.pid)
    assert inner[1] == machine.pid
    assert set(inner.values()) == {
        int(one.name) for one in Path(f"/proc/{machine.pid}/task").iterdir()
    }
    told = {int(one["thread-id"]) for one in machine.qmp("query-iothreads")}
    assert told <= inner.keys()
    assert not told & set(inner.values())


@pytest.mark.parametrize("target", ["name", "pid", "socket", "linked"])
def test_a_machine_in_a_container_is_attached(
    machine: LabMachine, disk: VirtioPciDriver, target: str
) -> None:
    targets: dict[str, str | int]
    targets = {
        "name": NAME,
        "pid": machine.pid,
        "socket": f"qmp:{machine.qmp_path}",
        "linked": f"qmp:{machine.folder}/linked",
    }
    with attach(targets[target]) as attached:
        assert attached.info.pid == machine.pid
        assert len(attached.device("blk0").queues()) == 2


def test_a_lost_kick_in_a_container_is_diagnosed_and_repaired(
    machine: LabMachine, disk: VirtioPciDriver
) -> None:
    queue = disk.queues[1]
    queue.publish_request()
    with attach(NAME) as attached:
        for _ in range(3):
            (verdict,) = attached.diagnose("blk0", 1, duration_s=0.6)
            if was_asked(verdict):
                break
        assert verdict.verdict is VerdictKind.LOST_KICK
        assert verdict.event is DeviceEvent.KICK
        # What serves the queue was looked at: a thread of this process, asleep.
        (tid,) = (int(one["thread-id"]) for one in machine.qmp("query-iothreads"))
        here = inner_tids(machine.pid)[tid]
        (thread,) = (one for one in verdict.evidence if f" thread {here} (" in one.what)
        assert "sleeping" in str(thread.value)
        attached.device("blk0").queue(1).kick()
    queue.wait_completed(1)


def test_a_machine_in_a_container_is_written_to_while_it_is_paused(
    machine: LabMachine, disk: VirtioPciDriver
) -> None:
    queue = disk.queues[0]
    queue.publish_request()
    with attach(NAME) as attached:
        result = attached.device("blk0").queue(0).kick(via=Via.MMIO, allow_pause=True)
        assert result.via is Via.MMIO
    queue.wait_completed(1)
    assert machine.qmp("query-status")["status"] == "running"
    assert not [name for name in os.listdir(f"/proc/{machine.pid}/root/tmp") if "stub" in name]


def test_the_rfcs_command_is_served_for_a_container(
    machine: LabMachine, disk: VirtioPciDriver, tmp_path: Path
) -> None:
    queue = disk.queues[0]
    queue.publish_request()
    path = tmp_path / "qmp"
    with subprocess.Popen(
        [KICKCALL, "qmp", NAME, "--listen", path], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert "listening" in server.stdout.readline()
        said = short_visit(path, "x-debug-device-event", dev="blk0", event="kick", queue=0)
        server.terminate()
        assert server.wait(60) == 0
    assert said == {"return": {}}
    queue.wait_completed(1)


def short_visit(path: Path, command: str, **arguments: object) -> Any:
    """Connect, ask, leave, as PVE::QMPClient does (pve-qemu-server: QMPClient.pm)."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        with sock.makefile("rw") as lines:
            lines.readline()
            for asked in (
                {"execute": "qmp_capabilities"},
                {"execute": command, "arguments": arguments},
            ):
                lines.write(json.dumps(asked) + "\n")
                lines.flush()
                said = json.loads(lines.readline())
                while "event" in said:
                    said = json.loads(lines.readline())
    return said


def test_a_machine_of_proxmox_is_found_by_its_number_and_its_monitor_is_shared(
    tmp_path: Path,
) -> None:
    """Proxmox's QEMU knows `-id`. This one takes it for the name of a file, and the number for a
    disk: in /proc it looks the same.
    """
    path = tmp_path / "100.qmp"
    (tmp_path / "100").write_bytes(bytes(1 << 20))
    arguments = (
        *("-pidfile", "-id", "100", "-name", "web,debug-threads=on"),
        *("-chardev", f"socket,id=qmp,path={path},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=qmp-event,path={tmp_path}/qmeventd.sock,reconnect=5"),
        *("-mon", "chardev=qmp-event,mode=control"),
    )
    with small_qemu(*arguments, cwd=tmp_path, ready=path) as pid:
        said = subprocess.run([KICKCALL, "vms", "--json"], capture_output=True, check=True)
        (told,) = (one for one in json.loads(said.stdout)["machines"] if one["pid"] == pid)
        assert (told["name"], told["vmid"], told["monitors"]) == ("web", "100", [str(path)])
        over = threading.Event()
        visits = [0]

        def proxmox() -> None:
            while not over.is_set():
                assert short_visit(path, "query-status")["return"]["status"] == "prelaunch"
                visits[0] += 1

        visitor = threading.Thread(target=proxmox)
        visitor.start()
        try:
            for _ in range(5):
                had = visits[0]
                with attach("100") as attached:
                    assert attached.info.pid == pid
                until(lambda: visits[0] > had, "Proxmox is served again")  # noqa: B023
        finally:
            over.set()
            visitor.join(30)


def test_a_domain_of_a_libvirt_in_the_container_is_asked_through_it(
    tmp_path_factory: pytest.TempPathFactory, guest_image_built: GuestImage
) -> None:
    """As in KubeVirt: QEMU and its libvirt are in one container, and kickcall on the host."""
    folder = tmp_path_factory.mktemp("kv")
    with (
        libvirtd(folder / "kv", "host-kv", contained=True) as libvirt,
        guest_domain(folder / "vmi", "default_vmi", guest_image_built) as domain,
    ):
        libvirt.virsh("create", str(domain.xml))
        domain.wait()
        with attach("libvirt:default_vmi", timeout=10) as attached:
            assert os.readlink(f"/proc/{attached.info.pid}/ns/pid") != os.readlink(
                "/proc/self/ns/pid"
            )
            before = domain.interrupts("virtio1-req.1")
            attached.device("ua-blk0").queue(1).call()
            until(lambda: domain.interrupts("virtio1-req.1") == before + 1, "one more interrupt")
