"""Does a guest get less done while its queues are looked at 100 times a second?

Measured in threes, without, with, without: what the host does beside it hits all three alike, and
the two without say how much that is.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from typing import TYPE_CHECKING

from kickcall.attached import attach
from kickcall.lab.boot import boot
from kickcall.lab.spec import MachineSpec, VhostUserBlk, VirtioBlk
from kickcall.vmm.sampler import Sampler

if TYPE_CHECKING:
    import pytest

    from kickcall.lab.machine import LabMachine

ROUNDS = int(os.environ.get("KICKCALL_ROUNDS", "24"))
INTERVAL_S = 0.01
SPEC = MachineSpec(
    devices=(
        VirtioBlk(id="blk0"),
        VirtioBlk(id="iot0", iothread=True),
        VhostUserBlk(id="vub0", relay=False, disk="file"),
    )
)


def requests_done_in(machine: LabMachine) -> float:
    """Return how many seconds 3 × 1,500 reads take the guest."""
    command = "; ".join(
        f"dd if={machine.disk(name)} of=/dev/null bs=4k count=1500 iflag=direct 2>/dev/null"
        for name in ("blk0", "iot0", "vub0")
    )
    start = time.monotonic()
    assert machine.guest.run(command, timeout=120).status == 0
    return time.monotonic() - start


def look_until(sampler: Sampler, stop: threading.Event) -> None:
    while not stop.wait(INTERVAL_S):
        sampler.look()


def test_a_guest_does_not_notice_100_looks_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        boot(SPEC) as machine,
        attach(machine.name) as attached,
        Sampler(attached._session) as sampler,
    ):
        requests_done_in(machine)
        with_it, noise = [], []
        for _ in range(ROUNDS):
            before = requests_done_in(machine)
            stop = threading.Event()
            looks = threading.Thread(target=look_until, args=(sampler, stop))
            looks.start()
            looked_at = requests_done_in(machine)
            stop.set()
            looks.join()
            after = requests_done_in(machine)
            with_it.append(2 * looked_at / (before + after))
            noise.append(after / before)
        assert sampler.stale == {}
    ratio, spread = statistics.median(with_it), statistics.quantiles(noise, n=4)
    with capsys.disabled():
        print(
            f"\n  with 100 looks a second: {ratio:.3f} of the time without (median of {ROUNDS}); "
            f"without against without: {spread[0]:.3f} to {spread[2]:.3f} (middle half)",
            end="",
        )
    assert spread[0] - 0.01 <= ratio <= spread[2] + 0.01
