"""Does kickcall name what it leaves in the kernel so that only what is dead is swept?"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from kickcall.errors import KernelViewError
from kickcall.host import tracefs
from kickcall.host.hist_counter import probes
from kickcall.host.processes import start_time
from kickcall.host.signal_sites import BY_WRITE, IN_KERNEL

NAMESPACE = os.stat("/proc/self/ns/pid").st_ino
has_btf = pytest.mark.skipif(
    not Path("/sys/kernel/btf/vmlinux").exists(), reason="this kernel does not tell its types"
)


def name_of(pid: int, started: int | None, namespace: int = NAMESPACE) -> str:
    return f"kickcall_{pid}_{started}_{namespace}_0"


def test_what_a_live_process_made_is_no_orphan() -> None:
    assert not tracefs._is_orphan(name_of(os.getpid(), start_time(os.getpid())))


def test_what_an_ended_process_made_is_an_orphan() -> None:
    ended = subprocess.Popen(["sleep", "60"])
    started = start_time(ended.pid)
    ended.kill()
    ended.wait()
    assert tracefs._is_orphan(name_of(ended.pid, started))


def test_a_pid_that_is_another_processs_by_now_is_an_orphans() -> None:
    started = start_time(os.getpid())
    assert started is not None
    assert tracefs._is_orphan(name_of(os.getpid(), started + 1))


def test_what_others_made_is_not_ours_to_sweep() -> None:
    for name in ("kprobes", "kickcall", "kickcall_1", f"mykickcall_1_2_{NAMESPACE}_0"):
        assert not tracefs._is_orphan(name)


def test_a_container_is_not_swept_while_it_lives() -> None:
    # A namespace that no process here is in: dead where all processes are seen, else unknown.
    seen_all = NAMESPACE == 0xEFFFFFFC
    assert tracefs._is_orphan(name_of(1, 1, namespace=12345)) is seen_all


def test_a_host_without_tracefs_is_one_line_that_says_what_to_do() -> None:
    with pytest.raises(KernelViewError, match="mount -t tracefs") as caught:
        tracefs.folder(mounts="proc /proc proc rw 0 0\nsysfs /sys sysfs rw 0 0\n")
    assert "\n" not in str(caught.value)


def test_a_kernel_without_kprobes_is_one_line_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "instances").mkdir()
    with pytest.raises(KernelViewError, match="CONFIG_KPROBES") as caught:
        tracefs.folder(mounts=f"tracefs {tmp_path} tracefs rw 0 0\n")
    assert "\n" not in str(caught.value)


@has_btf
def test_the_running_kernel_tells_what_to_probe() -> None:
    found = probes()
    # Linux 6.8 made eventfd_signal an inline function (120ae5859363).
    major, minor = map(int, os.uname().release.split(".")[:2])
    function = "eventfd_signal_mask" if (major, minor) >= (6, 8) else "eventfd_signal"
    assert re.fullmatch(rf"{function} id=\+\d+\(\$arg1\):u32", found[IN_KERNEL])
    assert re.fullmatch(r"eventfd_write id=\+\d+\(\+\d+\(\$arg1\)\):u32", found[BY_WRITE])
