"""What does it cost to watch 1,000 queues ten times a second, and 10,000 once? CPU and memory.

A `kickcall watch` as a user starts it, on real queues of QEMU set up without a guest
(`kickcall.lab.qtest`); its CPU time and memory are the kernel's figures.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kickcall.lab.qtest import Qtest, boot_without_guest
from kickcall.lab.qtest_virtio import SplitQueue
from kickcall.lab.spec import MachineSpec, VirtioBlk

if TYPE_CHECKING:
    from collections.abc import Iterator

PER_DEVICE = 1_000
TICK = 1 / os.sysconf("SC_CLK_TCK")
SECONDS = 15.0
CPU_MOST = 0.05
MIB_MOST = 100


@contextlib.contextmanager
def machines(queues: int) -> Iterator[list[str]]:
    """Start machines with so many queues between them, all set up and at rest."""
    names: list[str] = []
    with contextlib.ExitStack() as stack:
        left = queues // PER_DEVICE
        while left:
            # Two eventfds a queue, and a process may open 20,000 files here.
            devices, left = min(left, 5), left - min(left, 5)
            name = f"bench-watch-{os.getpid()}-{len(names)}"
            spec = MachineSpec(
                name=name,
                devices=tuple(VirtioBlk(queues=PER_DEVICE, iothread=True) for _ in range(devices)),
                shared_memory=True,
            )
            machine = stack.enter_context(boot_without_guest(spec))
            qtest = stack.enter_context(Qtest(machine))
            for device in machine.spec.devices:
                driver = qtest.device(device.id)
                driver.set_up(event_idx=True)
                first = driver.queues[0]
                assert isinstance(first, SplitQueue)
                first.publish_request()
                first.kick()
                first.wait_completed(1, timeout=60.0)
                first.set_used_event(1)
            names.append(name)
        yield names


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK


def memory_mib(pid: int) -> float:
    """Return what the process takes for itself: pages of the VM's that it maps are the VM's."""
    status = Path(f"/proc/{pid}/status").read_text()
    kib = {
        name: int(line.split()[1])
        for line in status.splitlines()
        if (name := line.partition(":")[0]) in ("VmRSS", "RssShmem")
    }
    return (kib["VmRSS"] - kib["RssShmem"]) / 1024


def watch(names: list[str], interval: str, folder: Path) -> tuple[float, float]:
    """Return the share of a processor, and the MiB, that watching the machines takes."""
    command = [str(Path(sys.executable).with_name("kickcall")), "watch", *names]
    command += ["--interval", interval, "--heal", "--journal", str(folder / "journal.db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        try:
            assert watcher.stdout is not None
            for _ in names:
                line = watcher.stdout.readline()
                assert "came: watching" in line, line
            time.sleep(3.0)
            before, start = cpu_s(watcher.pid), time.monotonic()
            time.sleep(SECONDS)
            share = (cpu_s(watcher.pid) - before) / (time.monotonic() - start)
            return share, memory_mib(watcher.pid)
        finally:
            watcher.kill()


@pytest.mark.timeout(1800)
def test_watching_costs_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for queues, interval in ((1_000, "100ms"), (2_000, "1s"), (5_000, "1s"), (10_000, "1s")):
        with machines(queues) as names:
            found[queues] = watch(names, interval, tmp_path)
        share, mib = found[queues]
        with capsys.disabled():
            what = f"{queues:6} queues every {interval:>5}"
            print(f"\n  {what}: {share:6.2%} of a core, {mib:4.0f} MiB", end="")
    for share, mib in found.values():
        assert share < CPU_MOST
        assert mib < MIB_MOST
