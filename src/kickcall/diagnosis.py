"""Watching a machine for as long as a verdict takes, and probing: the shell around the judge."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kickcall.devices.base import device_class
from kickcall.diagnose.judge import is_undecided, judge, looks_stalled, wants_slow_facts
from kickcall.diagnose.states import Thresholds
from kickcall.diagnose.track import advance, forgive, start
from kickcall.diagnose.view import View
from kickcall.errors import KickcallError, MonitorError
from kickcall.model import Confidence, DeviceEvent, Evidence, Verdict, VerdictKind
from kickcall.vmm.recorder import Recording, Which
from kickcall.vmm.sampler import FINE_S, Sampler, next_interval
from kickcall.vmm.serving import Holders
from kickcall.vmm.slow_facts import facts_unasked, slow_facts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kickcall.devices.base import Witness
    from kickcall.diagnose.states import QueueFixed, SlowFacts
    from kickcall.diagnose.track import Track
    from kickcall.vmm.monitor import Monitor
    from kickcall.vmm.session import MappedDevice, VmmSession

_MARGIN_S = 0.2
"""Watched on after a threshold, so that a queue that reaches it is seen to."""
_AGAIN_S = 0.1
"""Watched on while a queue stands still, before its slow facts are read again."""
_MONITOR_S = 0.4
"""Waited for a monitor while a verdict waits: one that is free greets at once, and one that is not
may be the main loop that is to be found."""
_PUNCTUAL_S = 0.1
"""How much later than planned a look may come before it counts as late."""
_PROBE_S = 1.0
"""How long a probe watches for progress."""


@dataclass
class _Watched:
    """One queue while it is watched."""

    mapped: MappedDevice
    fixed: QueueFixed
    track: Track
    slow: SlowFacts | None


def diagnose(
    session: VmmSession,
    device: MappedDevice | None = None,
    queue: int | None = None,
    *,
    duration_s: float = 2.0,
    probe: bool = False,
    limits: Thresholds | None = None,
    tell: Callable[[str], None] | None = None,
    witness: Witness | None = None,
) -> tuple[Verdict, ...]:
    """Watch the queues of a machine (or of one device, or one queue) and return their verdicts.

    Watches for `duration_s` seconds, and longer only while a queue waits that has not reached its
    threshold. With `probe` the event that a verdict names is injected; `tell` is told beforehand
    what will be written, and `witness` of each write. Raises KickcallError where the machine could
    not be looked at.
    """
    limits = limits or Thresholds()
    chosen = [device] if device is not None else list(session.devices)
    only = [(one, queue) for one in chosen]
    with contextlib.ExitStack() as stack:
        recording = None
        # Evidence that costs nothing but itself where the kernel cannot give it, or may not.
        with contextlib.suppress(KickcallError):
            recording = stack.enter_context(Recording(session, only))
        watch = Watch(stack.enter_context(Sampler(session, only)), recording)
        until = time.monotonic() + duration_s
        latest = until + limits.device_s + _MARGIN_S
        while True:
            _watch(watch, until, limits)
            watched = _look_closely(session, watch, limits)
            undecided = [
                one for one in watched if is_undecided(one.fixed, one.track, one.slow, limits)
            ]
            if time.monotonic() >= latest or not undecided:
                break
            until = time.monotonic() + _AGAIN_S
    # Evidence carries the time of day, samples a clock that never jumps.
    offset = time.time() - time.monotonic()
    verdicts = []
    for one in watched:
        verdict = _judge(session, one, limits)
        if probe and verdict.event is not None:
            verdict = _probe(session, one, verdict, tell, witness)
        verdicts.append(on_the_wall(verdict, offset))
    seen = {id(one.mapped) for one in watched}
    unseen = [not_watched(session, one) for one in chosen if id(one) not in seen]
    return (*verdicts, *(on_the_wall(one, offset) for one in unseen))


class Watch:
    """The histories of all queues of a sampler, kept by looking again and again.

    Only of queues that moved, or are not at rest, anything is worked out at a look: thousands that
    rest cost next to nothing. Their histories are brought up to date when they are asked for.
    """

    def __init__(self, sampler: Sampler, recording: Recording | None = None) -> None:
        self.sampler = sampler
        self._recording = recording
        self._tracks = [start(sample) for sample in sampler.sample()]
        self._at = self._tracks[0].now.at if self._tracks else time.monotonic()
        self._looked = time.monotonic()
        self._restless = {
            number
            for number, (fixed, track) in enumerate(zip(sampler.queues, self._tracks, strict=True))
            if may_sleep_with_calls_off(fixed, track)
        }
        self._settled: set[int] = set()
        self._holders = Holders()

    @property
    def tracks(self) -> list[Track]:
        """The history of every queue, as of the last look."""
        return [self.track(number) for number in range(len(self._tracks))]

    def track(self, number: int) -> Track:
        """Return the history of a queue, as of the last look."""
        track = self._tracks[number]
        if track.now.at < self._at:
            # It was at rest: every look since has found it as it is.
            track = advance(track, replace(track.now, at=self._at), self.sampler.queues[number])
            self._tracks[number] = track
        return track

    def adopt(self, number: int, track: Track) -> None:
        """Go on with the history of a queue that another watch of the same map has kept."""
        self._tracks[number] = track

    def settle(self, number: int) -> None:
        """Leave a queue out of `look` until it moves: nothing can come of it until then."""
        self._settled.add(number)

    def look_after(self, interval_s: float) -> None:
        """Sleep for `interval_s` seconds and look; see `look`."""
        due = self._looked + interval_s
        time.sleep(interval_s)
        self.look(due)

    def look(self, due: float | None = None) -> list[int]:
        """Look, and return the numbers of the queues that moved, or wait, or may be stalled.

        `due` is when the look should have been. Time by which it comes too late is forgiven to
        everybody: a host that does not run the watcher may not have run the back-end either.
        """
        found = self.sampler.look()
        now = time.monotonic()
        late = 0.0 if due is None else now - due - _PUNCTUAL_S
        before, self._at, self._looked = self._at, found.at, now
        moved = set(found.moved)
        self._settled -= moved
        active = sorted((moved | self._restless | set(found.waiting)) - self._settled)
        waiting = set(found.waiting)
        for number in active:
            fixed, track = self.sampler.queues[number], self._tracks[number]
            if track.now.at < before:
                track = advance(track, replace(track.now, at=before), fixed)
            track = advance(track, self.sampler.latest(number), fixed)
            self._tracks[number] = forgive(track, late) if late > 0 else track
            if number not in waiting and may_sleep_with_calls_off(fixed, track):
                self._restless.add(number)
            else:
                self._restless.discard(number)
        return active

    def slow_facts(self, session: VmmSession, number: int, monitor: Monitor) -> SlowFacts:
        """Return what is looked up only for a queue that looks stalled."""
        queue = self.sampler.queues[number].queue
        mapped = self.sampler.devices[number]
        return slow_facts(session, mapped, queue, monitor, holders=self._holders)

    def recorded(self, facts: dict[int, SlowFacts]) -> dict[int, SlowFacts]:
        """Return the queues' facts with what the kernel saw of their notifications."""
        if self._recording is None or not facts:
            return facts
        counts = self._recording.counts()

        def last(number: int, event: DeviceEvent) -> float | None:
            queue = self.sampler.queues[number]
            counted = counts.get(Which(queue.device, queue.queue, event))
            return None if counted is None else counted.last_at

        return {
            number: replace(
                slow,
                recorded_since=self._recording.started_at,
                kicked_at=last(number, DeviceEvent.KICK),
                called_at=last(number, DeviceEvent.CALL),
            )
            for number, slow in facts.items()
        }

    def undecided(self, number: int, limits: Thresholds) -> bool:
        """Tell whether a queue stands still, by the rings alone, and is not called stalled yet."""
        return is_undecided(self.sampler.queues[number], self.track(number), None, limits)

    def judged(self, limits: Thresholds) -> Iterator[tuple[int, Verdict, bool]]:
        """Yield each queue's number, its verdict by the rings alone, and whether it waits."""
        for number, (fixed, track) in enumerate(zip(self.sampler.queues, self.tracks, strict=True)):
            verdict = judge(fixed, track, None, limits)
            yield number, verdict, looks_stalled(fixed, track, limits)


def may_sleep_with_calls_off(fixed: QueueFixed, track: Track) -> bool:
    """Tell whether a queue at rest has its calls off, where only its vector tells if it polls."""
    return View(fixed, track, None, Thresholds()).calls_off_at_rest


def _watch(watch: Watch, until: float, limits: Thresholds) -> None:
    """Sample until `until`, often while a queue looks stalled."""
    interval = FINE_S
    while (left := until - time.monotonic()) > 0:
        waits = any(looks_bad for _, _, looks_bad in watch.judged(limits))
        interval = next_interval(waits, interval)
        watch.look_after(min(interval, left))


def _look_closely(session: VmmSession, watch: Watch, limits: Thresholds) -> list[_Watched]:
    """Read the slow facts of every queue whose verdict they may change, then look once more.

    The slow facts take their time, and a queue that moved meanwhile is not stalled.
    """
    slow: dict[int, SlowFacts] = {}
    suspects = [
        number
        for number, verdict, _ in watch.judged(limits)
        if wants_slow_facts(verdict) or watch.undecided(number, limits) or not session.running
    ]
    if suspects:
        try:
            with session.borrow(_MONITOR_S) as monitor:
                for number in suspects:
                    slow[number] = watch.slow_facts(session, number, monitor)
        except MonitorError:
            # A main loop that hangs answers nobody, and may be what is to be found.
            for number in suspects:
                slow.setdefault(number, facts_unasked(session, watch.sampler.devices[number]))
        slow = watch.recorded(slow)
        watch.look_after(0.0)
    return [
        _Watched(mapped, fixed, track, slow.get(number))
        for number, (mapped, fixed, track) in enumerate(
            zip(watch.sampler.devices, watch.sampler.queues, watch.tracks, strict=True)
        )
    ]


def _judge(session: VmmSession, one: _Watched, limits: Thresholds) -> Verdict:
    return judge(one.fixed, one.track, one.slow, limits, machine=session.machine.name)


def on_the_wall(verdict: Verdict, offset: float) -> Verdict:
    """Return the verdict with its evidence's times as seconds since the epoch."""
    return replace(
        verdict,
        evidence=tuple(replace(one, at=round(one.at + offset, 6)) for one in verdict.evidence),
    )


def not_watched(session: VmmSession, device: MappedDevice) -> Verdict:
    """Return what can be said of a device that has no queue to watch."""
    info = device.device
    why = device.refusal or "the driver has set none of its queues up"
    kind, hop, remedy = VerdictKind.UNKNOWN, 0, "Nothing."
    if not session.running:
        kind = VerdictKind.VM_NOT_RUNNING
    elif not info.driver_ok:
        kind = VerdictKind.DEVICE_NOT_READY
    elif info.kind.startswith("vhost-user") and not info.vhost_started:
        # QEMU stops vhost when the socket to the back-end is closed (hw/virtio/vhost-user-base.c
        # and its kin, the chardev's CLOSED event).
        kind, hop = VerdictKind.BACKEND_GONE, 4
        why = "the driver has set the device up, and QEMU has no back-end for it"
        remedy = "Restart the back-end and let QEMU reconnect to it, or reset the device."
    return Verdict(
        device=device.device.path,
        queue=0,
        verdict=kind,
        hop=hop,
        since_s=0.0,
        evidence=(Evidence("because", why, time.monotonic()),),
        remedy=remedy,
    )


def _probe(
    session: VmmSession,
    one: _Watched,
    verdict: Verdict,
    tell: Callable[[str], None] | None,
    witness: Witness | None,
) -> Verdict:
    """Inject the event that the verdict names, watch, and say whether it helped."""
    assert verdict.event is not None
    name = one.mapped.device.id
    if tell is not None:
        tell(
            f"probe: {verdict.event} queue {verdict.queue} of {name} "
            f"(writes 1 to its {verdict.event} notifier)"
        )
    with Sampler(session, [(one.mapped, one.fixed.queue)]) as sampler:
        (before,) = sampler.sample()
        injected = time.monotonic()
        try:
            device_class(session, one.mapped).device_event(
                verdict.event, verdict.queue, witness=witness
            )
        except KickcallError as exc:
            return _with_evidence(verdict, "probe not possible", str(exc))
        track = start(before)
        while track.moved_at == before.at and time.monotonic() < injected + _PROBE_S:
            time.sleep(FINE_S)
            (sample,) = sampler.sample()
            track = advance(track, sample, one.fixed)
    if track.moved_at > before.at:
        took = f"{(track.moved_at - injected) * 1000:.0f} ms"
        calls_off = View(one.fixed, one.track, one.slow, Thresholds()).calls_off
        return _confirmed(_with_evidence(verdict, "progress after the injection", took), calls_off)
    if verdict.event is DeviceEvent.CALL and not one.fixed.event_idx:
        # The driver may have reaped and have nothing more to ask for: that cannot be seen.
        return _with_evidence(verdict, "progress after the injection", "none that could be seen")
    refuted = _with_evidence(verdict, "progress after the injection", f"none in {_PROBE_S:.0f} s")
    return replace(
        refuted,
        confidence=Confidence.REFUTED,
        remedy=f"Another {verdict.event} does not help: look at who should have taken it.",
    )


def _with_evidence(verdict: Verdict, what: str, value: str) -> Verdict:
    return replace(verdict, evidence=(*verdict.evidence, Evidence(what, value, time.monotonic())))


def _confirmed(verdict: Verdict, calls_off: bool) -> Verdict:
    """Return the verdict as certain; one that was not known is by now."""
    if verdict.verdict is VerdictKind.UNKNOWN:
        if verdict.event is DeviceEvent.KICK:
            known, hop = VerdictKind.LOST_KICK, 3
        elif calls_off:
            known, hop = VerdictKind.CALL_SUPPRESSED, 7
        else:
            known, hop = VerdictKind.LOST_CALL, 8
        verdict = replace(verdict, verdict=known, hop=hop)
    return replace(
        verdict,
        confidence=Confidence.CONFIRMED,
        remedy="The probe repaired it. What lost the notification is still there: see "
        f"docs/verdicts/{verdict.verdict}.md for what to collect.",
    )
