"""Is what only the kernel knows in a bundle: kicks and calls, and the threads of vhost?"""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from kickcall.host import tracefs
from kickcall.model import DeviceEvent
from opened_bundle import opened
from watcher import KICKCALL

if TYPE_CHECKING:
    from pathlib import Path

    from kickcall.lab.machine import LabMachine

pytestmark = [pytest.mark.rig, pytest.mark.long, pytest.mark.timeout(900)]

DEVICE = "/machine/peripheral/vscsi0"


def test_a_bundle_has_what_the_kernel_saw_and_what_vhost_does(
    kvm_zoo: LabMachine, tmp_path: Path
) -> None:
    path = tmp_path / "b.tar.gz"
    reading = kvm_zoo.guest.start(
        f"while :; do dd if={kvm_zoo.disk('vscsi0')} of=/dev/null bs=4k count=8 iflag=direct; done"
    )
    try:
        done = subprocess.run(
            [KICKCALL, "bundle", kvm_zoo.name, "--out", path, "--json"],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    finally:
        reading.kill()
    assert done.returncode == 0, done.stderr
    bundle = opened(path, done.stdout)
    facts, members = bundle.facts, bundle.members
    assert bundle.told["missing"] == []
    assert facts.counts is not None
    counted = {(one.device, one.event): one for one in facts.counts if one.total}
    kicks, calls = counted[DEVICE, DeviceEvent.KICK], counted[DEVICE, DeviceEvent.CALL]
    assert "guest" in kicks.by
    assert "vhost" in calls.by
    events = [json.loads(line) for line in members["trace.jsonl"].splitlines()]
    assert {one["event"] for one in events if one["device"] == DEVICE} == {"kick", "call"}
    first = bundle.lines()[0]
    assert all(abs(one["at"] - first.at) < 600 for one in events)
    workers = [one for one in facts.threads if one.comm.startswith("vhost-")]
    assert workers
    assert any("vhost" in frame for one in workers for frame in one.stack)
    said = json.loads(members["qemu.json"])
    assert not [
        asked for asked in said if asked.startswith(f"x-query-virtio-queue-status {DEVICE}")
    ]
    assert not list(tracefs.folder().glob("instances/kickcall_*"))
