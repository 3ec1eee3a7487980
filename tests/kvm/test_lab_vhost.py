"""Does what the lab makes on the host for vhost go away again, whatever happens?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import LabError
from kickcall.lab.boot import boot
from kickcall.lab.spec import MachineSpec, VhostNet, VhostScsi, VirtioBlk
from witness import until

if TYPE_CHECKING:
    from kickcall.lab.image import GuestImage
    from kickcall.lab.machine import LabMachine

pytestmark = [pytest.mark.rig, pytest.mark.timeout(300)]

TARGETS = Path("/sys/kernel/config/target")
SPEC = MachineSpec(devices=(VhostScsi(),))

# Ends without any clean-up, and its machine with it (PR_SET_PDEATHSIG).
CRASHES = """
import os
from kickcall.lab.boot import boot
from kickcall.lab.spec import MachineSpec, VhostScsi
machine = boot(MachineSpec(name="crashed", devices=(VhostScsi(),)), wait=False)
print(machine.device("vscsi0").wwpn, flush=True)
os._exit(1)
"""


def targets() -> set[str]:
    """Return the vhost targets and the memory disks that are on this host."""
    vhost = {str(path) for path in (TARGETS / "vhost").glob("naa.*")}
    disks = (TARGETS / "core").glob("rd_mcp_*/*")
    return vhost | {str(path) for path in disks if path.is_dir()}


def wwpn(machine: LabMachine) -> str:
    device = machine.device("vscsi0")
    assert isinstance(device, VhostScsi)
    return device.wwpn


def test_a_target_and_a_tap_are_there_as_long_as_their_machine(
    guest_image_built: GuestImage,
) -> None:
    before = targets()
    spec = MachineSpec(devices=(VhostScsi(), VhostNet()))
    with boot(spec, wait=False) as machine, boot(SPEC, wait=False) as other:
        assert str(TARGETS / "vhost" / wwpn(machine)) in targets()
        assert len(targets() - before) == 4
        net = machine.device("vnet0")
        assert isinstance(net, VhostNet)
        assert Path(f"/sys/class/net/{net.tap}").exists()
        other.close()
        assert len(targets() - before) == 2
    assert targets() == before
    until(lambda: not Path(f"/sys/class/net/{net.tap}").exists(), "the tap goes")


def test_what_a_crash_of_the_owner_leaves_goes_with_the_next_boot(
    guest_image_built: GuestImage,
) -> None:
    before = targets()
    done = subprocess.run(
        [sys.executable, "-c", CRASHES], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 1
    assert str(TARGETS / "vhost" / done.stdout.strip()) in targets()
    with boot(MachineSpec(devices=(VirtioBlk(),)), wait=False):
        assert targets() == before


def test_a_boot_that_fails_leaves_no_target(guest_image_built: GuestImage) -> None:
    before = targets()
    with pytest.raises(LabError, match="no-such-option"):
        boot(MachineSpec(devices=(VhostScsi(),), arguments=("-no-such-option",)), wait=False)
    assert targets() == before


def test_a_target_of_somebody_else_is_left_alone(guest_image_built: GuestImage) -> None:
    with boot(SPEC, wait=False) as machine:
        there = targets()
        taken = MachineSpec(devices=(VhostScsi(wwpn=wwpn(machine)),))
        with pytest.raises(LabError, match=r"target called naa\.\S+ is there"):
            boot(taken, wait=False)
        assert targets() == there
        assert machine.alive


def test_without_root_the_need_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LabError, match="a vhost-scsi device needs root"):
        boot(SPEC, wait=False)
