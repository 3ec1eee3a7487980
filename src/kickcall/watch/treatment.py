"""What is done about the stalls of one machine, and does it help?

`treat` decides and injects, `follow` watches for the effect. Never both at the same time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.diagnose.states import ThreadState
from kickcall.errors import KickcallError, MachineGoneError, MapError, MonitorError
from kickcall.watch.happenings import What
from kickcall.watch.lock import HealLock
from kickcall.watch.policy import HEALED, Queue

if TYPE_CHECKING:
    from collections.abc import Container

    from kickcall.diagnose.states import Sample, SlowFacts
    from kickcall.diagnosis import Watch
    from kickcall.model import DeviceEvent, Machine, Verdict
    from kickcall.vmm.session import VmmSession
    from kickcall.watch.healer import Healer
    from kickcall.watch.stalls import Stalls

_HELP_S = 1.0
"""How long a queue is watched for progress after an injection."""


@dataclass(frozen=True, slots=True)
class Treated:
    """What came of a stall that could be healed."""

    injected: bool = False
    retry_at: float | None = None
    """When to ask again; None: when the verdict is due again anyway."""
    map_is_wrong: bool = False
    """What was mapped is no longer so: nothing was written."""
    seen: frozenset[int] = frozenset()
    """Queues that were found moved, or waiting, right before the write."""


@dataclass(frozen=True, slots=True)
class _Injected:
    """An injection whose effect is watched for."""

    number: int
    at: float
    event: DeviceEvent
    side: tuple[object, ...]
    verdict: Verdict


class Treatment:
    """The injections into one machine. Queues are named by their number in its sampler."""

    def __init__(self, machine: Machine, healer: Healer, stalls: Stalls) -> None:
        self._machine = machine
        self._healer = healer
        self._stalls = stalls
        self._lock: HealLock | None = None
        self._injected: dict[int, _Injected] = {}

    def __contains__(self, number: object) -> bool:
        """Tell whether an injection into a queue is being watched."""
        return number in self._injected

    def __bool__(self) -> bool:
        """Tell whether any is."""
        return bool(self._injected)

    def treat(
        self, number: int, verdict: Verdict, slow: SlowFacts, watch: Watch, session: VmmSession
    ) -> Treated:
        """Inject what the verdict names if that may be."""
        healer = self._healer
        if not healer.enabled or verdict.verdict not in HEALED or verdict.event is None:
            return Treated()
        if slow.vm_running is None:
            self._stalls.not_healed(verdict, "the monitor does not say whether the machine runs")
            return Treated()
        if not healer.dry_run and (refusal := self._may_not_heal()):
            self._stalls.not_healed(verdict, refusal)
            return Treated()
        # Threads that run or want to: the guest may be about to kick, or to reap, by itself.
        busy = not slow.vcpu_threads or any(
            thread.state is ThreadState.RUNNING for thread in slow.vcpu_threads
        )
        decision = healer.decide(self._which(verdict), verdict, busy=busy)
        if not decision.heal:
            if decision.alert:
                self._stalls.not_healed(verdict, decision.because, alert=True)
            return Treated(retry_at=decision.retry_at)
        if healer.dry_run:
            self._stalls.would_inject(verdict)
            return Treated()
        return self._inject(number, verdict, watch, session)

    def _inject(self, number: int, verdict: Verdict, watch: Watch, session: VmmSession) -> Treated:
        assert verdict.event is not None
        which, event = self._which(verdict), verdict.event
        side = _side(watch.track(number).now, verdict)
        stall = self._stalls.report(verdict)
        seen: set[int] = set()

        def unmoved() -> bool:
            seen.update(watch.look())
            return _side(watch.track(number).now, verdict) == side

        try:
            intent, result = self._healer.raise_event(
                session, watch.sampler.devices[number], verdict, stall.number, unmoved
            )
        except MachineGoneError:
            raise
        except MonitorError as exc:
            # It may have been written all the same.
            self._healer.settle(which, event, None)
            self._stalls.not_healed(verdict, str(exc))
            return Treated(seen=frozenset(seen))
        except KickcallError as exc:
            self._healer.withdraw(which, event)
            self._stalls.not_healed(verdict, str(exc))
            return Treated(map_is_wrong=isinstance(exc, MapError), seen=frozenset(seen))
        self._injected[number] = _Injected(intent, time.monotonic(), event, side, verdict)
        text = f"{event} injected via {result.via}: {result.target}"
        self._stalls.say(What.INJECTED, verdict, text, via=str(result.via), injection=intent)
        return Treated(injected=True, seen=frozenset(seen))

    def follow(self, watch: Watch, now: float, hesitating: Container[int]) -> dict[int, str]:
        """Take note of the injections of which is known by now whether they helped.

        Returns these queues, and how their stalls ended: empty where they last.
        """
        known = {}
        for number, one in list(self._injected.items()):
            track = watch.track(number)
            if _side(track.now, one.verdict) != one.side or number not in hesitating:
                helped = True
            elif now >= one.at + _HELP_S:
                helped = False
            else:
                continue
            del self._injected[number]
            self._healer.settle(self._which(one.verdict), one.event, helped)
            self._healer.book.watched(one.number, helped)
            more = {"after_s": round(now - one.at, 4), "injection": one.number}
            if helped:
                self._stalls.say(What.HELPED, one.verdict, f"the {one.event} helped", **more)
            else:
                self._stalls.say(What.REFUTED, one.verdict, f"the {one.event} did not help", **more)
            known[number] = f"healed by a {one.event}" if helped else ""
        return known

    def forget(self) -> None:
        """Take note that of no injection it will be known whether it helped."""
        for one in self._injected.values():
            self._healer.settle(self._which(one.verdict), one.event, None)
            self._healer.book.watched(one.number, None)
        self._injected.clear()

    def close(self) -> None:
        """Let another watcher heal the machine."""
        self.forget()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _may_not_heal(self) -> str:
        """Return why this watcher may not heal the machine; empty where it may."""
        if self._lock is None:
            try:
                self._lock = HealLock.take(self._machine.pid, self._machine.start_time)
            except OSError as exc:
                return f"no lock can be taken, so another kickcall watch may heal it, too: {exc}"
        return "" if self._lock is not None else "another kickcall watch heals this machine"

    def _which(self, verdict: Verdict) -> Queue:
        machine = self._machine
        return Queue(machine.pid, machine.start_time, verdict.device, verdict.queue)


def _side(sample: Sample, verdict: Verdict) -> tuple[object, ...]:
    """Return what moves when the verdict's event helps: the device's side, or also the driver's."""
    device = (
        sample.used_idx,
        sample.last_avail_idx,
        sample.avail_event,
        sample.used_flags,
        sample.unreadable,
    )
    if verdict.hop < 7:
        return device
    return (*device, sample.avail_idx, sample.avail_flags, sample.used_event)
