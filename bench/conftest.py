"""Which machine is measured, and how are the results told: one table at the end, and JSON."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest
from bench.comparison import Comparison, measure, seconds

import kickcall
from kickcall.lab.boot import boot
from kickcall.lab.spec import MachineSpec, VirtioBlk, VirtioScsi

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.comparison import Action, Compare
    from pytest_benchmark.fixture import BenchmarkFixture

    from kickcall.attached import AttachedMachine
    from kickcall.lab.machine import LabMachine

RESULTS: list[Comparison] = []

TWENTY_QUEUES = MachineSpec(
    name=f"bench-{os.getpid()}",
    memory_mib=256,
    devices=(
        VirtioScsi(id="vscsi0", queues=2),  # control, event and two of requests
        *(VirtioBlk(id=f"blk{number}", queues=2) for number in range(8)),
    ),
    monitors=3,
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # the table below says it once, and as ratios


@pytest.fixture(scope="session")
def machine() -> Iterator[LabMachine]:
    """A guest of 256 MiB with 20 queues, all set up by its drivers."""
    with boot(TWENTY_QUEUES) as booted:
        yield booted


@pytest.fixture
def attached(machine: LabMachine) -> Iterator[AttachedMachine]:
    with kickcall.attach(machine.pid) as mapped:
        yield mapped


@pytest.fixture
def results() -> list[Comparison]:
    """What the final table shows: for what is not measured as `compare` does."""
    return RESULTS


@pytest.fixture
def compare(benchmark: BenchmarkFixture) -> Compare:
    def run(
        what: str,
        ours: Action,
        against: str,
        theirs: Action,
        *,
        rounds: int,
        repeat: int = 1,
        limit: float | None = None,
        limits_difference: bool = False,
    ) -> Comparison:
        mine, others = measure(benchmark, ours, theirs, rounds, repeat)
        result = Comparison(what, mine, against, others, limit, limits_difference)
        benchmark.extra_info["ratio"] = result.ratio
        RESULTS.append(result)
        return result

    return run


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not RESULTS:
        return
    folder = config.rootpath / ".benchmarks"
    folder.mkdir(exist_ok=True)
    told = [asdict(one) | {"ratio": one.ratio, "verdict": one.verdict} for one in RESULTS]
    where = folder / "kickcall.json"
    where.write_text(
        json.dumps({"host": platform.platform(), "cpus": os.cpu_count(), "results": told}, indent=2)
        + "\n"
    )
    terminalreporter.section("medians; ratio = kickcall / what it is measured against")
    for row in _rows():
        terminalreporter.line(row)
    terminalreporter.line(f"also in {where}")


def _rows() -> list[str]:
    cells = [("kickcall", "takes", "against", "takes", "ratio", "limit", "")]
    for one in RESULTS:
        limit = ""
        if one.limit is not None:
            limit = f"{'adds ' if one.limits_difference else ''}{seconds(one.limit)}"
        ratio = f"{one.ratio:.2f}" if one.ratio >= 0.1 else f"1/{1 / one.ratio:.0f}"
        cells.append(
            (
                one.what,
                seconds(one.ours),
                one.against,
                seconds(one.theirs),
                ratio,
                limit,
                one.verdict,
            )
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
