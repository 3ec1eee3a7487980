"""How does a test say what a queue looked like, for how long, and what else was known?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kickcall.diagnose.judge import judge, looks_stalled, wants_slow_facts
from kickcall.diagnose.states import (
    BackendThread,
    InterruptPath,
    QueueFixed,
    QueueRole,
    Sample,
    SlowFacts,
    ThreadState,
    Thresholds,
)
from kickcall.diagnose.track import advance, start
from kickcall.model import BackendKind, Layout, VerdictKind

if TYPE_CHECKING:
    from kickcall.model import Verdict

V = VerdictKind
SIZE = 8
LIMITS = Thresholds(notification_s=0.5, device_s=5.0)
ENABLE, DISABLE, DESC, RESERVED = 0, 1, 2, 3
WELL = SlowFacts(
    at=0.0,
    vm_running=True,
    run_state="running",
    driver_ok=True,
    broken=False,
    interrupts=InterruptPath(
        msix_enabled=True,
        function_masked=False,
        vector=1,
        vector_masked=False,
        vector_pending=False,
        bus_master=True,
        intx_disabled=True,
    ),
)


def blk(
    layout: Layout = Layout.SPLIT,
    *,
    event_idx: bool = True,
    backend: BackendKind = BackendKind.QEMU,
    size: int = SIZE,
) -> QueueFixed:
    """A request queue whose driver keeps its calls on."""
    return QueueFixed(
        "/machine/peripheral/blk0", 0, size, layout, event_idx, backend, QueueRole.REQUEST,
        calls_when_idle=True,
    )  # fmt: skip


def net_tx(layout: Layout = Layout.SPLIT, *, event_idx: bool = True) -> QueueFixed:
    """A request queue whose driver reaps when it gets around to it, or polls."""
    return replace(blk(layout, event_idx=event_idx, size=64), calls_when_idle=False)


def net_rx(layout: Layout = Layout.SPLIT, *, event_idx: bool = True) -> QueueFixed:
    """An inbox."""
    return replace(blk(layout, event_idx=event_idx), role=QueueRole.INBOX)


def split(
    avail: int,
    used: int,
    last: int | None = None,
    *,
    used_event: int | None = None,
    avail_event: int | None = None,
    avail_flags: int = 0,
    used_flags: int = 0,
    kick: int = 0,
    call: int = 0,
) -> Sample:
    """What was seen of a split ring; indices may be given beyond 2^16."""

    def u16(index: int | None) -> int | None:
        return None if index is None else index & 0xFFFF

    return Sample(
        0.0, u16(avail), u16(used), u16(last), avail_flags, used_flags,
        u16(used_event), u16(avail_event), kick, call,
    )  # fmt: skip


def packed(
    avail: int | None,
    used: int | None,
    last: int | None,
    *,
    calls: int = DESC,
    used_event: int = 0,
    kicks: int = DESC,
    avail_event: int = 0,
    kick: int = 0,
    call: int = 0,
) -> Sample:
    """What was seen of a packed ring of SIZE. Positions count descriptors from the first lap on,
    whose wrap counter is 1 (virtio 1.4, 2.8.1)."""

    def encode(at: int | None) -> int | None:
        return None if at is None else at % SIZE | (not at // SIZE & 1) << 15

    return Sample(
        0.0, encode(avail), encode(used), encode(last), calls, kicks,
        encode(used_event), encode(avail_event), kick, call,
    )  # fmt: skip


def verdict(
    fixed: QueueFixed,
    *seen: tuple[float, Sample],
    slow: SlowFacts | None = WELL,
    step_s: float = 0.1,
) -> Verdict:
    """Judge a queue that was seen as in each pair's sample for as many seconds as it says."""
    at, track = 0.0, None
    for seconds, sample in seen:
        until = at + seconds
        while True:
            sample = replace(sample, at=at)
            track = start(sample) if track is None else advance(track, sample, fixed)
            at += step_s
            if at >= until:
                break
    assert track is not None
    # The shell looks up the slow facts only where that may change the verdict.
    said = judge(fixed, track, None, LIMITS, machine="vm0")
    if slow is None:
        return said
    if wants_slow_facts(said) or looks_stalled(fixed, track, LIMITS):
        said = judge(fixed, track, slow, LIMITS, machine="vm0")
    return said


def thread(state: ThreadState, waits_in: str = "") -> BackendThread:
    return BackendThread(100, 101, "iothread0", state, waits_in)


def backend(state: ThreadState, waits_in: str = "") -> SlowFacts:
    return replace(WELL, backend_threads=(thread(state, waits_in),))


def switched(**switches: Any) -> SlowFacts:
    """All is well but for these switches on the interrupt's way."""
    return replace(WELL, interrupts=replace(WELL.interrupts, **switches))


IN_ITS_LOOP = backend(ThreadState.SLEEPING, "ppoll")


def says(said: Verdict) -> tuple[VerdictKind, int]:
    return said.verdict, said.hop
