"""From a queue's history to a verdict: the first rule that holds, with the values behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.diagnose.rules import RULES
from kickcall.diagnose.view import View
from kickcall.model import Evidence, Verdict, VerdictKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.diagnose.rules import Rule
    from kickcall.diagnose.states import QueueFixed, SlowFacts, Thresholds
    from kickcall.diagnose.track import Track


def judge(
    fixed: QueueFixed,
    track: Track,
    slow: SlowFacts | None,
    limits: Thresholds,
    *,
    machine: str = "MACHINE",
) -> Verdict:
    """Return the verdict on a queue. Never raises, whatever the rings hold.

    Without `slow` a stall is judged by the rings alone. Before it is reported look at the slow
    facts (`wants_slow_facts`), then at the queue once more, and judge again: facts that are newer
    than the last sample may be of a time when the queue had moved. Evidence carries the times of
    the samples.
    """
    view = View(fixed, track, slow, limits)
    rule = decide(view)
    device = fixed.device.removeprefix("/machine/peripheral/")
    where = f"{machine} {device} --queue {fixed.queue}"
    return Verdict(
        device=fixed.device,
        queue=fixed.queue,
        verdict=rule.verdict,
        hop=rule.hop,
        since_s=_since(rule, view),
        evidence=(
            Evidence("because", rule.because, track.now.at),
            *_ring_evidence(track),
            *_slow_evidence(view),
        ),
        remedy=rule.remedy.format(
            kick=f"kickcall kick {where}",
            call=f"kickcall call {where}",
            probe=f"kickcall diagnose {where} --probe",
        ),
        event=rule.event,
    )


def decide(view: View) -> Rule:
    """Return the rule that holds: the verdict without its evidence, for who asks often."""
    return next(rule for rule in RULES if rule.when(view))


def wants_slow_facts(verdict: Verdict | Rule) -> bool:
    """Tell whether the verdict may change once the slow facts are known."""
    return verdict.verdict.stalled or verdict.verdict is VerdictKind.UNKNOWN


def looks_stalled(fixed: QueueFixed, track: Track, limits: Thresholds) -> bool:
    """Tell whether a queue is worth another look soon: a stall by the rings alone, or nearly one.

    That work is outstanding is enough, so this is true of every busy queue.
    """
    view = View(fixed, track, None, limits)
    if view.work_waits or view.call_was_owed or view.kick_waits:
        return True
    return decide(view).verdict.stalled


def is_undecided(
    fixed: QueueFixed, track: Track, slow: SlowFacts | None, limits: Thresholds
) -> bool:
    """Tell whether a queue that is not called stalled stands still, and may be called so soon."""
    view = View(fixed, track, slow, limits)
    return view.hesitates and decide(view).time_will_tell


def _since(rule: Rule, view: View) -> float:
    """Return for how long what the rule says has been so, at the least."""
    if rule.verdict in (VerdictKind.IDLE, VerdictKind.PROGRESSING):
        return view.track.now.at - view.track.moved_at
    if rule.hop in (7, 8, 9, 10):
        return view.driver_still_s
    return view.device_still_s


def _ring_evidence(track: Track) -> Iterator[Evidence]:
    now = track.now
    if now.unreadable:
        yield Evidence("unreadable", now.unreadable, now.at)
        return
    for what, value in (
        ("avail.idx", now.avail_idx),
        ("last_avail_idx", now.last_avail_idx),
        ("used.idx", now.used_idx),
        ("avail.flags", now.avail_flags),
        ("used.flags", now.used_flags),
        ("used_event", now.used_event),
        ("avail_event", now.avail_event),
        ("kick notifier count", now.kick_count),
        ("call notifier count", now.call_count),
    ):
        if value is not None:
            yield Evidence(what, value, now.at)


def _slow_evidence(view: View) -> Iterator[Evidence]:
    slow = view.slow
    if slow is None:
        return
    if slow.run_state:
        yield Evidence("run state", slow.run_state, slow.at)
    for what, value in (
        ("DRIVER_OK", slow.driver_ok),
        ("broken", slow.broken),
        ("bus master", slow.interrupts.bus_master),
        ("MSI-X enabled", slow.interrupts.msix_enabled),
        ("MSI-X function mask", slow.interrupts.function_masked),
        ("MSI-X vector masked", slow.interrupts.vector_masked),
        ("MSI-X vector pending", slow.interrupts.vector_pending),
    ):
        if value is not None:
            yield Evidence(what, "yes" if value else "no", slow.at)
    if slow.interrupts.vector is not None:
        yield Evidence("MSI-X vector", slow.interrupts.vector, slow.at)
    if slow.recorded_since is not None:
        for what, last in (("kick", slow.kicked_at), ("call", slow.called_at)):
            told = f"{slow.at - last:.3f} s ago" if last is not None else "none yet"
            yield Evidence(f"last {what} that the kernel saw", told, slow.at)
    if slow.kick_holders is not None:
        yield Evidence("other holders of the kick notifier", slow.kick_holders, slow.at)
    if slow.kick_polled is not None:
        polled = "yes" if slow.kick_polled else "no"
        yield Evidence("kick notifier in an epoll set", polled, slow.at)
    for role, threads in (("back-end", slow.backend_threads), ("vCPU", slow.vcpu_threads)):
        for thread in threads:
            yield Evidence(
                f"{role} thread {thread.tid} ({thread.comm})", str(thread.state), slow.at
            )
