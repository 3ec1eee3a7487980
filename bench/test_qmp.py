"""What does the socket of `kickcall qmp` add to a command, against QEMU's own monitor?"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from bench.clients import Client

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bench.comparison import Compare

    from kickcall.lab.machine import LabMachine


@pytest.fixture
def served(machine: LabMachine, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "bench.sock"
    target = f"qmp:{machine.qmp_paths[0]}"
    server = subprocess.Popen(
        [sys.executable, "-m", "kickcall", "qmp", target, "--listen", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 20
        while not path.exists():
            assert server.poll() is None, server.communicate()[1]
            assert time.monotonic() < deadline, "kickcall qmp does not listen"
            time.sleep(0.02)
        yield path
    finally:
        server.terminate()
        server.communicate(timeout=20)


def test_a_command_through_the_socket(machine: LabMachine, served: Path, compare: Compare) -> None:
    with Client(served) as ours, Client(machine.qmp_paths[1]) as direct:
        assert ours.ask("query-status") == direct.ask("query-status")
        result = compare(
            "query-status through kickcall qmp",
            lambda: ours.ask("query-status"),
            "the same on QEMU's own monitor",
            lambda: direct.ask("query-status"),
            rounds=2000,
            limit=200e-6,
            limits_difference=True,
        )
    assert result.ratio < 10
