"""Is what vhost in the kernel needs asked for before anything is made?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kickcall.errors import LabError
from kickcall.lab import vhost_kernel
from kickcall.lab.spec import MachineSpec, VhostNet, VhostScsi, VhostVsock, VirtioBlk


@pytest.mark.parametrize("device", [VhostScsi(), VhostNet(), VhostVsock()])
def test_without_root_the_need_is_named(
    device: VhostScsi | VhostNet | VhostVsock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LabError, match=f"a {device.kind} device needs root.*kickcall lab host run"):
        vhost_kernel.check(MachineSpec(devices=(VirtioBlk(), device)))
    vhost_kernel.check(MachineSpec(devices=(VirtioBlk(),)))


def test_a_host_without_vhost_is_told_which_module_to_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    absent = {VhostScsi: {tmp_path / "vhost-scsi": "vhost_scsi"}}
    monkeypatch.setattr(vhost_kernel, "_NEEDED", absent)
    with pytest.raises(LabError, match="vhost-scsi, which this machine has not: modprobe vhost_"):
        vhost_kernel.check(MachineSpec(devices=(VhostScsi(),)))


def test_a_target_of_somebody_else_is_refused_before_it_could_be_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(vhost_kernel, "_NEEDED", {})
    monkeypatch.setattr(vhost_kernel, "_TARGETS", tmp_path)
    (tmp_path / "vhost" / "naa.1").mkdir(parents=True)
    with pytest.raises(LabError, match=r"a vhost-scsi target called naa\.1 is there"):
        vhost_kernel.check(MachineSpec(devices=(VhostScsi(wwpn="naa.1"),)))
    vhost_kernel.check(MachineSpec(devices=(VhostScsi(wwpn="naa.2"), VhostScsi())))


def test_taking_down_what_was_never_made_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vhost_kernel, "_TARGETS", tmp_path)
    vhost_kernel.take_down(MachineSpec(devices=(VhostScsi(wwpn="naa.5001405000000001"),)))
    assert list(Path(tmp_path).iterdir()) == []
