"""Are lab machines what their description says, and do they leave nothing behind?"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import LabError
from kickcall.lab import process
from kickcall.lab.boot import boot
from kickcall.lab.machine import LabMachine, lab_folder, machines
from kickcall.lab.qemu import Qemu, find_qemu
from kickcall.lab.spec import MachineSpec, OtherDevice, VhostUserBlk, VirtioBlk, VirtioNet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import BootMachine

pytestmark = pytest.mark.rig

DISKS = ("blk0", "iot0", "packed0", "scsi0", "scsipk0", "vub0", "direct0")


def eventually(what: Callable[[], bool], timeout: float = 60.0) -> bool:
    deadline = time.monotonic() + timeout
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def grown(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name for name, count in after.items() if count > before[name]}


@pytest.mark.parametrize("device", DISKS)
def test_a_read_of_a_disk_raises_an_interrupt_of_its_own_device_only(
    mixed_machine: LabMachine, device: str
) -> None:
    disk = mixed_machine.disk(device)
    before = {name: mixed_machine.interrupts(name) for name in DISKS}
    # One sector somewhere else each time is never in the page cache: iflag=direct.
    status, output = mixed_machine.guest.run(
        f"dd if={disk} of=/dev/null bs=4k count=4 iflag=direct"
    )
    assert status == 0, output
    changed = {name: grown(before[name], mixed_machine.interrupts(name)) for name in DISKS}
    assert changed.pop(device)
    assert not any(changed.values())


def test_a_ping_raises_both_queues_of_the_network_device(mixed_machine: LabMachine) -> None:
    before = mixed_machine.interrupts("net0")
    assert mixed_machine.guest.run("ping -c 3 -i 0.2 10.0.2.2").status == 0
    assert "input.0" in grown(before, mixed_machine.interrupts("net0"))


def test_a_disk_that_is_a_file_keeps_what_the_guest_writes(mixed_machine: LabMachine) -> None:
    disk = mixed_machine.disk("vub0")
    assert mixed_machine.guest.run(f"head -c 23 {disk}").output == "kickcall lab disk vub0\n"
    written = f"echo lost and found | dd of={disk} bs=512 seek=9 conv=sync oflag=direct"
    assert mixed_machine.guest.run(written).status == 0
    with (mixed_machine.folder / "vub0.img").open("rb") as image:
        image.seek(9 * 512)
        assert image.read(14) == b"lost and found"


def test_each_interface_and_layout_is_what_the_driver_agreed_on(boot_machine: BootMachine) -> None:
    machine = boot_machine(
        MachineSpec(
            devices=(
                VirtioBlk(id="legacy", legacy="only"),
                VirtioBlk(id="both", queues=2),
                VirtioBlk(id="packed", packed=True, legacy="off"),
                VirtioNet(id="noevent", event_idx=False),
                VirtioBlk(id="intx", options=("vectors=0",)),
                OtherDevice(id="balloon", driver="virtio-balloon-pci"),
            )
        )
    )
    features = {}
    for device in machine.spec.devices:
        path = f"/sys/bus/pci/devices/0000:00:{device.slot:02x}.0/virtio*/features"
        features[device.id] = machine.guest.run(f"cat {path}").output.strip()
    # Feature bits, virtio 1.2, 6: 29 RING_EVENT_IDX, 32 VERSION_1, 34 RING_PACKED.
    assert {name: bits[32] for name, bits in features.items()} == {
        "legacy": "0",
        "both": "1",
        "packed": "1",
        "noevent": "1",
        "intx": "1",
        "balloon": "1",
    }
    assert [name for name, bits in features.items() if bits[34] == "1"] == ["packed"]
    assert features["noevent"][29] == "0"
    assert features["both"][29] == "1"
    assert list(machine.interrupts("intx")) == ["intx"]
    assert list(machine.interrupts("both")) == ["config", "req.0", "req.1"]
    for disk in ("legacy", "both", "packed", "intx"):
        read = f"dd if={machine.disk(disk)} of=/dev/null bs=4k count=1 iflag=direct"
        assert machine.guest.run(read).status == 0


def test_a_device_can_be_plugged_into_a_port_and_taken_out(boot_machine: BootMachine) -> None:
    machine = boot_machine(MachineSpec(hotplug_ports=2))
    machine.qmp("blockdev-add", {"driver": "null-co", "node-name": "d", "size": 1 << 20})
    machine.qmp("device_add", driver="virtio-blk-pci", id="hp", bus="hot1", drive="d")
    disk = machine.disk("hot1")
    read = f"dd if={disk} of=/dev/null bs=4k count=1 iflag=direct"
    assert machine.guest.run(read).status == 0
    assert sum(machine.interrupts("hot1").values()) > 0
    machine.qmp("device_del", id="hp")
    assert eventually(lambda: machine.interrupts("hot1") == {})


def test_processes_sockets_and_disks_are_gone_after_close() -> None:
    with boot(MachineSpec(devices=(VhostUserBlk(disk="file"),)), wait=False) as machine:
        started = {one.what for one in machine.processes}
        assert started == {"qemu", "vub0-backend", "vub0-relay"}
        assert all(one.alive for one in machine.processes)
    assert not any(one.alive for one in machine.processes)
    assert not machine.folder.exists()
    with pytest.raises(LabError, match="no lab machine is called"):
        LabMachine.find(machine.name)


def test_the_folder_is_the_users_alone(boot_machine: BootMachine) -> None:
    machine = boot_machine(MachineSpec(), wait=False)
    assert machine.folder.stat().st_mode & 0o777 == 0o700
    assert lab_folder().stat().st_mode & 0o777 == 0o700


def test_a_machine_is_found_by_name_with_all_that_it_is(boot_machine: BootMachine) -> None:
    booted = boot_machine(MachineSpec(devices=(VirtioBlk(options=("vectors=0",)),)), wait=False)
    found = LabMachine.find(booted.name)
    assert (found.spec, found.pid, found.alive) == (booted.spec, booted.pid, True)
    assert booted.name in [machine.name for machine in machines()]


def test_a_name_that_is_taken_is_refused_and_the_machine_left_alone(
    boot_machine: BootMachine,
) -> None:
    machine = boot_machine(MachineSpec(), wait=False)
    with pytest.raises(LabError, match=f"called {machine.name} is up"):
        boot(MachineSpec(name=machine.name))
    assert machine.alive


def test_a_name_with_a_slash_is_refused() -> None:
    with pytest.raises(LabError, match="cannot be a lab machine's name"):
        boot(MachineSpec(name="../etc"))


def test_a_qemu_that_ends_at_once_is_quoted_and_leaves_nothing() -> None:
    with pytest.raises(LabError, match="'no-such-device' is not a valid device model name"):
        boot(MachineSpec(name="broken", devices=(OtherDevice(driver="no-such-device"),)))
    assert not (lab_folder() / "broken").exists()


def test_a_qemu_that_ends_of_a_bug_of_its_own_is_started_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = (
        "qemu-system-x86_64: system/physmem.c:2671: iotlb_to_section: "
        "Assertion `section_index < d->map.sections_nb' failed."
    )
    ending = Qemu((sys.executable, "-c", f"raise SystemExit({words!r})"))
    to_come = [ending]
    monkeypatch.setattr(
        "kickcall.lab.boot.find_qemu",
        lambda *asked: to_come.pop() if to_come else find_qemu(*asked),
    )
    with boot(MachineSpec(name="lab-bug")) as machine:
        assert not to_come
        assert machine.guest.run("true").status == 0
    to_come += [ending, ending]
    with pytest.raises(LabError, match="iotlb_to_section"):
        boot(MachineSpec(name="lab-bug"))
    assert not to_come
    assert not (lab_folder() / "lab-bug").exists()


def test_a_link_to_a_root_that_was_deleted_is_swept_up(tmp_path: Path) -> None:
    link = lab_folder() / f"gone-{os.getpid()}"
    link.symlink_to(tmp_path / "no-root" / "lab" / "gone")
    machines()
    assert not link.is_symlink()


BOOT_AND_STAY = """
import time
from kickcall.lab.boot import boot
from kickcall.lab.spec import MachineSpec
machine = boot(MachineSpec(), wait=False, outlives={outlives})
print(machine.name, flush=True)
time.sleep({stay})
"""


def boot_elsewhere(outlives: bool, stay: int) -> tuple[subprocess.Popen[str], LabMachine]:
    script = BOOT_AND_STAY.format(outlives=outlives, stay=stay)
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    return owner, LabMachine.find(owner.stdout.readline().strip())


def test_a_machine_dies_with_the_process_that_booted_it_even_by_sigkill(
    boot_machine: BootMachine,
) -> None:
    owner, machine = boot_elsewhere(outlives=False, stay=60)
    assert machine.alive
    owner.kill()
    owner.communicate()
    assert eventually(lambda: not machine.alive)
    # The next machine that is booted sweeps up what is left of it; or another test's, as slowly.
    boot_machine(MachineSpec(), wait=False)
    assert eventually(lambda: not machine.folder.exists())


def test_a_machine_that_outlives_its_process_stays_until_it_is_taken_down() -> None:
    owner, machine = boot_elsewhere(outlives=True, stay=0)
    owner.communicate()
    try:
        time.sleep(0.3)
        assert machine.alive
        assert machine.qmp("query-status")["status"] == "running"
    finally:
        machine.close()
    assert not machine.alive


def test_a_pid_that_another_process_has_now_is_not_killed() -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        started = process.running_since(bystander.pid)
        assert started is not None
        process.end([process.LabProcess("qemu", bystander.pid, started - 1)])
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
