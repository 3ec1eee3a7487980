"""Does the judge tell a loss from none, and name its hop, however driver and device interleave?

`KICKCALL_CASES` says how many random cases to run (a million in the long run).
"""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.cases import FAULTS, run_case

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = int(os.environ.get("KICKCALL_CASES", "2000"))
SHARDS = 4
"""So that pytest -n has something to share out."""


def nth_fault(number: int) -> str:
    """Return what goes wrong in case `number`: nothing in every third."""
    return "" if number % 3 == 0 else FAULTS[number % len(FAULTS)]


@pytest.mark.timeout(0)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_without_a_loss_no_stall_and_with_one_the_right_hop(
    shard: int, record_property: Callable[[str, object], None]
) -> None:
    started, mine = time.perf_counter(), range(shard, CASES, SHARDS)
    for number in mine:
        wrong = run_case(random.Random(number), nth_fault(number // SHARDS))
        assert not wrong, f"case {number}: {wrong}"
    took = time.perf_counter() - started
    record_property("cases", len(mine))
    record_property("cases_per_s", round(len(mine) / took))


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False), st.sampled_from(("", *FAULTS)))
def test_no_schedule_that_hypothesis_finds_misleads_the_judge(
    rng: random.Random, fault: str
) -> None:
    assert not run_case(rng, fault)
