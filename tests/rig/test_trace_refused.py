"""Is a kernel that cannot count told in one line, and does it cost nothing but the count?"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import KickcallError
from kickcall.host import tracefs

if TYPE_CHECKING:
    from kickcall.lab.machine import LabMachine

pytestmark = pytest.mark.rig


def can_count() -> bool:
    try:
        tracefs.folder()
    except KickcallError:
        return False
    return True


# tests/kvm/test_trace.py has what holds where it can.
cannot_count = pytest.mark.skipif(can_count(), reason="this kernel can count")


def kickcall(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kickcall", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@cannot_count
def test_trace_says_in_one_line_what_is_missing(mixed_machine: LabMachine) -> None:
    done = kickcall("trace", mixed_machine.name, "--duration", "1s")
    assert done.returncode == 3
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "tracefs" in line or "kprobe" in line


@cannot_count
def test_diagnose_goes_without(mixed_machine: LabMachine) -> None:
    done = kickcall("diagnose", mixed_machine.name, "blk0", "--duration", "500ms", "--json")
    assert done.returncode == 0, done.stderr
    assert {one["queue"] for one in json.loads(done.stdout)["verdicts"]} == {0, 1}


def test_a_queue_without_a_device_is_a_mistake_in_use(mixed_machine: LabMachine) -> None:
    done = kickcall("trace", mixed_machine.name, "--queue", "1")
    assert done.returncode == 2
    assert "--queue needs a DEVICE" in done.stderr
