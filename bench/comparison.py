"""What is measured: something of kickcall's beside what a user would do otherwise, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Action = Callable[[], object]


@dataclass(frozen=True)
class Comparison:
    """Medians in seconds."""

    what: str
    ours: float
    against: str
    theirs: float
    limit: float | None = None
    """What must hold on an idle machine: reported, and asserted nowhere."""
    limits_difference: bool = False
    """The limit is on what kickcall adds, not on all that it takes."""

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    @property
    def limited(self) -> float:
        return self.ours - self.theirs if self.limits_difference else self.ours

    @property
    def verdict(self) -> str:
        if self.limit is None:
            return ""
        return "pass" if self.limited <= self.limit else "over"


class Compare(Protocol):
    """Measures, keeps the result for the final table, and returns it."""

    def __call__(
        self,
        what: str,
        ours: Action,
        against: str,
        theirs: Action,
        *,
        rounds: int,
        repeat: int = 1,
        limit: float | None = None,
        limits_difference: bool = False,
    ) -> Comparison: ...


def measure(
    benchmark: BenchmarkFixture, ours: Action, theirs: Action, rounds: int, repeat: int
) -> tuple[float, float]:
    """Return the medians of both, run by turns: a busy machine is busy for both.

    `repeat` is how often `ours` is run in each turn, where the other one takes so much longer that
    a single run would find every cache cold.
    """
    taken = []

    def mine() -> None:
        for _ in range(repeat):
            ours()

    def other() -> None:
        start = time.perf_counter()
        theirs()
        taken.append(time.perf_counter() - start)

    untyped: Any = benchmark
    untyped.pedantic(mine, setup=other, rounds=rounds, warmup_rounds=max(1, rounds // 20))
    return float(untyped.stats.stats.median) / repeat, statistics.median(taken)


def seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"
