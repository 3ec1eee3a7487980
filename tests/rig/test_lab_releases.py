"""Does another Debian release's QEMU run a lab machine in a root of its own?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import LabError
from kickcall.lab.boot import boot
from kickcall.lab.qtest import Qtest, boot_without_guest
from kickcall.lab.spec import MachineSpec, VhostUserBlk, VirtioBlk

if TYPE_CHECKING:
    from conftest import BootMachine

pytestmark = pytest.mark.rig

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="chroot is for root only")


@needs_root
# The first time debootstrap downloads a Debian.
@pytest.mark.timeout(600)
def test_qemu_of_debian_13_boots_a_guest_in_its_own_root(boot_machine: BootMachine) -> None:
    machine = boot_machine(
        MachineSpec(qemu="trixie", devices=(VirtioBlk(), VhostUserBlk(disk="file")))
    )
    assert machine.qmp("query-version")["qemu"]["major"] == 10
    root = os.readlink(f"/proc/{machine.pid}/root")
    assert root.endswith("/qemu-trixie")
    # QEMU names its sockets as its own root has them; ours is a short path to the same.
    command = Path(f"/proc/{machine.pid}/cmdline").read_text()
    assert f"unix:/lab/{machine.name}/qmp0," in command
    assert machine.qmp_path.resolve() == Path(f"{root}/lab/{machine.name}/qmp0")
    for device in ("blk0", "vub0"):
        read = f"dd if={machine.disk(device)} of=/dev/null bs=4k count=1 iflag=direct"
        assert machine.guest.run(read).status == 0


@needs_root
@pytest.mark.timeout(600)
def test_nothing_is_mounted_and_nothing_of_the_machine_is_left_in_the_root() -> None:
    mounts = Path("/proc/self/mounts").read_text()
    spec = MachineSpec(qemu="trixie", devices=(VirtioBlk(queues=4),))
    with boot_without_guest(spec) as machine, Qtest(machine) as qtest:
        blk = qtest.device("blk0")
        blk.set_up()
        blk.queues[3].publish_request()
        blk.queues[3].kick()
        blk.queues[3].wait_completed(1)
        inside = machine.folder.resolve()
        assert Path("/proc/self/mounts").read_text() == mounts
    assert not inside.exists()
    assert not machine.folder.is_symlink()


def test_without_root_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LabError, match="only root may: use sudo"):
        boot(MachineSpec(qemu="trixie"))


@pytest.mark.parametrize("name", ["", "../etc", "Trixie; reboot"])
def test_a_qemu_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(LabError, match="is no QEMU of the lab"):
        boot(MachineSpec(qemu=name))
