"""One case: a driver, a device and a judge that samples them, with or without one loss.

`run_case` makes up a case from a random generator and returns what is wrong with the judge's
verdicts, or an empty string. What is right is said by what the actors know of themselves, which
nothing on a host could know.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from kickcall.diagnose.judge import decide, judge, looks_stalled, wants_slow_facts
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
from kickcall.diagnose.track import Track, advance, span, start
from kickcall.diagnose.view import View
from kickcall.model import BackendKind, DeviceEvent, Layout, VerdictKind
from kickcall.virtio import packed
from model.device import Device, DeviceFaults
from model.driver import POLLED, Driver, DriverFaults
from model.rings import PackedRing, SplitRing
from model.world import Steps, World

if TYPE_CHECKING:
    import random

    from kickcall.diagnose.rules import Rule

LIMITS = Thresholds(notification_s=0.5, device_s=1.5)
SLOW_SERVICE_S = 1.0
"""How long a slow device is at one entry, at the most."""
QUIET_S = LIMITS.device_s + 1.2
"""How long everything has been quiet when the last verdict is asked for."""

V = VerdictKind
SampleSteps = Generator[float, None, Sample]
Said = tuple[VerdictKind, int]

DRIVER_FAULTS = tuple(one.name for one in fields(DriverFaults))
DEVICE_FAULTS = tuple(one.name for one in fields(DeviceFaults))
FAULTS = (*DEVICE_FAULTS, *DRIVER_FAULTS)


@dataclass
class Case:
    """Everything about a case that does not change while it runs."""

    layout: Layout
    event_idx: bool
    backend: BackendKind
    kind: str
    num: int
    start: int
    sync: bool
    polls: str
    arm_at_pop: bool
    triggered_flag: bool
    service_s: float
    fault: str
    nth: int
    facts: bool
    """The slow facts can be had, threads and all."""
    works_in: tuple[ThreadState, str]
    """What a back-end that works on the spot looks like from outside."""
    asleep: ThreadState
    """What a back-end that does not read its kicks looks like."""
    busy_neighbour: float
    """How likely the thread is found at the work of another queue."""
    stop_seen: bool
    busy_guest: float
    """How likely a virtual CPU is found running."""
    barrier: str
    interval: tuple[float, float]
    spies: bool
    """It is looked at right when something was written, too."""
    plan: list[tuple[float, int]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)

    @property
    def role(self) -> QueueRole:
        return QueueRole.INBOX if self.kind == "rx" else QueueRole.REQUEST

    @property
    def calls_when_idle(self) -> bool:
        """As vmm/roles.py has it: blk (polled or not), balloon, net RX."""
        return self.kind in ("blk", "poll", "simple", "rx")

    @property
    def position_known(self) -> bool:
        return self.backend is BackendKind.QEMU

    @property
    def positions_known(self) -> bool:
        return self.layout is Layout.SPLIT or self.position_known


def make_case(rng: random.Random, fault: str = "") -> Case:
    """Make up a case; `fault` is one of FAULTS, or empty for none."""
    layout = rng.choice((Layout.SPLIT, Layout.PACKED))
    event_idx = rng.random() < 0.6
    kind = rng.choice(("blk", "blk", "blk", "simple", "poll", "ctrl", "tx", "lazy", "rx"))
    backend = rng.choice(list(BackendKind))
    if fault == "gone":
        backend = BackendKind.VHOST_USER
    sync = rng.random() < 0.4
    polls = rng.choice(("", "", "a while", "always"))
    if polls == "always" and (
        fault in ("stays_silent", "sleeps_on", "gone", "loses_kick")
        or backend is not BackendKind.VHOST_USER
        or (event_idx and layout is Layout.SPLIT)
    ):
        polls = ""
    arm_at_pop = event_idx and layout is Layout.SPLIT and rng.random() < 0.3
    num = rng.choice((4, 8, 16))
    if layout is Layout.SPLIT:
        start_at = rng.choice((0, 1, 3, 0x10000 - 1, 0x10000 - 2, 0x10000 - 5, 0x8000, 0x7FFE))
        start_at = rng.choice((start_at, rng.randrange(1 << 16)))
    else:
        start_at = 2 * num + rng.randrange(2 * num)
    service = rng.choice((0.0, 1e-4, 0.05, 0.05, SLOW_SERVICE_S))
    if backend is BackendKind.VHOST_KERNEL and sync:
        service = min(service, 0.05)  # a vhost worker does not sleep at its work
    gap = rng.choice((0.0, 1e-5, 0.01, 0.2, 0.6))
    return Case(
        layout=layout,
        event_idx=event_idx,
        backend=backend,
        kind=kind,
        num=num,
        start=start_at,
        sync=sync,
        polls=polls,
        arm_at_pop=arm_at_pop,
        triggered_flag=rng.random() < 0.5,
        service_s=service,
        fault=fault,
        nth=rng.randrange(60) if fault == "stops_after" else rng.randrange(4),
        facts=rng.random() < 0.7,
        works_in=rng.choice(
            (
                (ThreadState.SLEEPING, "pread64"),
                (ThreadState.DISK, ""),
                (ThreadState.RUNNING, ""),
            )
        )
        if backend is not BackendKind.VHOST_KERNEL
        else (ThreadState.RUNNING, ""),
        asleep=(
            rng.choice((ThreadState.SLEEPING, ThreadState.STOPPED))
            if backend is not BackendKind.VHOST_KERNEL
            else ThreadState.SLEEPING
        ),
        busy_neighbour=rng.choice((0.0, 0.0, 0.5)),
        stop_seen=rng.random() < 0.5,
        busy_guest=rng.choice((0.0, 0.0, 0.1, 1.0)),
        barrier=rng.choice(("vector", "function", "bus master")),
        interval=rng.choice(((0.03, 0.25), (0.1, 0.2), (0.15, 0.3))),
        spies=rng.random() < 0.5,
        plan=[
            (rng.random() * gap, rng.choice((1, 1, 1, 2, 3))) for _ in range(rng.randrange(1, 5))
        ],
        arrivals=[rng.random() * gap for _ in range(rng.randrange(1, 7))],
    )


class Run:
    """A case while it runs."""

    def __init__(self, case: Case, rng: random.Random) -> None:
        self.case, self.rng = case, rng
        self.world = World(rng)
        ring_type = SplitRing if case.layout is Layout.SPLIT else PackedRing
        self.ring = ring_type(case.num, case.event_idx, case.start)
        driver_faults, device_faults = DriverFaults(), DeviceFaults()
        if case.fault in DRIVER_FAULTS:
            setattr(driver_faults, case.fault, case.nth)
        elif case.fault:
            setattr(device_faults, case.fault, case.nth)
        self.driver = Driver(
            self.world,
            self.ring,
            case.start,
            kind=case.kind,
            plan=list(case.plan),
            triggered_flag=case.triggered_flag,
            faults=driver_faults,
        )
        self.device = Device(
            self.world,
            self.ring,
            case.start,
            drains=case.backend is not BackendKind.VHOST_KERNEL,
            sync=case.sync,
            polls=case.polls,
            arm_at_pop=case.arm_at_pop,
            inbox=case.arrivals,
            is_inbox=case.kind == "rx",
            service_s=case.service_s,
            faults=device_faults,
        )
        self.driver.device, self.device.driver = self.device, self.driver
        self.fixed = QueueFixed(
            device="/machine/peripheral/dev0",
            queue=0,
            size=case.num,
            layout=case.layout,
            event_idx=case.event_idx,
            backend=case.backend,
            role=case.role,
            calls_when_idle=case.calls_when_idle,
        )
        self.track: Track | None = None
        self.slow: SlowFacts | None = None
        self.rule: Rule | None = None
        self.wrong = ""

    def run(self) -> str:
        """Let it all happen; return what is wrong, or an empty string."""
        world, device, driver = self.world, self.device, self.driver
        driver.actor = world.spawn(driver.run())
        device.actor = world.spawn(device.run())
        device.completer = world.spawn(device.run_completer())
        device.pump = world.spawn(device.run_pump())
        watcher = world.spawn(self._watch())
        if self.case.spies:
            world.spy = watcher
        quiet = 0
        while not self.wrong and quiet < 2:  # one look may come between a publication and its kick
            world.run(world.now + 0.2)
            quiet = quiet + 1 if self._quiet() else 0
            assert world.now < 300, self.case
        world.run(world.now + QUIET_S)
        return self.wrong or self._final()

    def _quiet(self) -> bool:
        """Nothing more will happen, or only looking in vain."""
        device, driver = self.device, self.driver
        due = [device.pump.due, device.completer.due]
        polls_device = device.polls == "always" and device.does == "runs"
        if not (polls_device and not self.ring.chain(device.fetched)):
            due.append(device.actor.due)
        if not (driver.kind in POLLED and driver.chains):
            due.append(driver.actor.due)
        reaps = driver.kind in POLLED and driver.waits_in_vain and not driver.stopped
        return min(due) > 1e8 and not reaps

    # --- the judge's side ---

    def _watch(self) -> Steps:
        """Look again and again, and closer where something looks stalled."""
        rng = self.rng
        shortest, longest = self.case.interval
        while True:
            yield from self._look()
            yield from self._judge(careful=rng.random() < 0.2)
            yield -(shortest + (longest - shortest) * rng.random())

    def _look(self) -> Steps:
        sample = yield from self._sample(self.world.now)
        self.track = (
            start(sample) if self.track is None else advance(self.track, sample, self.fixed)
        )

    def _judge(self, *, careful: bool) -> Steps:
        """Judge by the rings alone, and where that may change the verdict by the slow facts.

        These take their time, and are followed by one more look: a queue that moved meanwhile is
        not stalled.
        """
        assert self.track is not None
        self.slow = None
        rule = decide(View(self.fixed, self.track, None, LIMITS))
        if wants_slow_facts(rule) or (careful and looks_stalled(self.fixed, self.track, LIMITS)):
            self.slow = self._slow_facts()
            yield self.world.tick()
            yield from self._look()
            rule = decide(View(self.fixed, self.track, self.slow, LIMITS))
        if rule.verdict.stalled:
            self._check_stall(rule)
        self.rule = rule

    def _sample(self, at: float) -> SampleSteps:
        """Read field after field: anything may happen in between."""
        tick, device, ring = self.world.tick, self.device, self.ring
        found: dict[str, int | None] = dict.fromkeys(
            ("avail", "used", "last", "avail_flags", "used_flags", "used_event", "avail_event")
        )
        if isinstance(ring, SplitRing):
            order = ["driver", "device", "used_event", "avail_event", "last", "counts"]
            self.rng.shuffle(order)
            kicks = calls = 0
            for name in order:
                if name == "driver":
                    found["avail_flags"], found["avail"] = ring.avail_flags, ring.avail_idx
                elif name == "device":
                    found["used_flags"], found["used"] = ring.used_flags, ring.used_idx
                elif name == "used_event" and ring.event_idx:
                    found["used_event"] = ring.used_event
                elif name == "avail_event" and ring.event_idx:
                    found["avail_event"] = ring.avail_event
                elif name == "last" and self.case.position_known:
                    found["last"] = ring.encode(device.fetched)
                elif name == "counts":
                    kicks, calls = device.kick_count, device.call_count
                yield tick()
        else:
            found["avail_flags"], found["used_event"] = ring.driver_flags, ring.driver_desc
            yield tick()
            found["used_flags"], found["avail_event"] = ring.device_flags, ring.device_desc
            yield tick()
            if self.case.position_known:
                last, used = ring.encode(device.fetched), ring.encode(device.used)
                yield tick()
                position = packed.Position(last & 0x7FFF, bool(last >> 15))
                count = packed.count_available(ring.raw(), position)
                found["avail"] = position.advance(count, ring.num).encode()
                found["last"], found["used"] = last, used
                yield tick()
            kicks, calls = device.kick_count, device.call_count
            yield tick()
        return Sample(
            at,
            found["avail"],
            found["used"],
            found["last"],
            found["avail_flags"],
            found["used_flags"],
            found["used_event"],
            found["avail_event"],
            kicks,
            calls,
        )

    def _slow_facts(self) -> SlowFacts:
        case, device, now = self.case, self.device, self.world.now
        if not case.facts:
            return SlowFacts(now, vm_running=True, driver_ok=True)
        barrier = case.barrier if device.masked else ""
        return SlowFacts(
            now,
            vm_running=True,
            run_state="running",
            driver_ok=True,
            broken=False,
            kick_holders=(
                None if case.backend is not BackendKind.VHOST_USER else int(not device.is_gone)
            ),
            backend_threads=(BackendThread(1, 1, "backend", *self._backend_state()),),
            vcpu_threads=(
                BackendThread(
                    1,
                    2,
                    "CPU 0/KVM",
                    ThreadState.STOPPED
                    if self.driver.stopped and case.stop_seen
                    else ThreadState.RUNNING
                    if self.rng.random() < case.busy_guest
                    else ThreadState.SLEEPING,
                ),
            ),
            interrupts=InterruptPath(
                msix_enabled=True,
                function_masked=barrier == "function",
                vector=None if case.kind in POLLED else 1,
                vector_masked=barrier == "vector",
                vector_pending=device.pending,
                bus_master=barrier != "bus master",
                intx_disabled=True,
            ),
        )

    def _backend_state(self) -> tuple[ThreadState, str]:
        case, device = self.case, self.device
        waits = "" if case.backend is BackendKind.VHOST_KERNEL else "ppoll"
        if device.does == "works":
            return case.works_in
        if device.does == "runs" and not device.sleeps_on:
            return ThreadState.RUNNING, ""
        if device.sleeps_on and case.asleep is ThreadState.STOPPED:
            return ThreadState.STOPPED, ""
        if self.rng.random() < case.busy_neighbour:
            return ThreadState.RUNNING, ""
        return ThreadState.SLEEPING, waits

    # --- what is right ---

    def _check_stall(self, verdict: Rule) -> None:
        said = (verdict.verdict, verdict.hop)
        broke = [at for at in (self.device.broke_at, self.driver.broke_at) if at is not None]
        if not broke:
            self._complain(f"a stall without a loss: {said}", verdict)
        elif said not in self._right():
            self._complain(f"{said} for {self.case.fault}", verdict)

    def _right(self) -> set[Said]:
        """The stall verdicts that are right for the fault, given what the host can see."""
        case, fault = self.case, self.case.fault
        kernel = case.backend is BackendKind.VHOST_KERNEL
        if fault == "loses_kick":
            return {(V.LOST_KICK, 3)}
        if fault == "stays_silent":
            right = {(V.KICK_SUPPRESSED, 2)}
            if case.busy_neighbour:
                # One look does not tell a thread that serves others from one that spins.
                right.add((V.DEVICE_STUCK, 5))
            if not case.position_known and case.service_s > 0.1:
                # What is in flight may as well be what was not fetched.
                right.add((V.LOST_KICK, 3))
            return right
        if fault == "sleeps_on":
            # A worker in the kernel leaves no trace of having been woken.
            return {(V.LOST_KICK, 3)} if kernel else {(V.KICK_UNREAD, 4)}
        if fault == "gone":
            return {(V.BACKEND_GONE, 4)} if case.facts else {(V.KICK_UNREAD, 4)}
        if fault == "never_completes":
            return self._right_for_stuck()
        if fault == "loses_call":
            return {(V.LOST_CALL, 8)}
        if fault == "call_untaken":
            return {(V.LOST_CALL, 9)}
        if fault == "masked":
            return {(V.INTERRUPT_BLOCKED, 9) if case.facts else (V.LOST_CALL, 8)}
        if fault == "pending":
            return {(V.LOST_CALL, 9) if case.facts else (V.LOST_CALL, 8)}
        if fault in ("keeps_calls_off", "asks_too_late"):
            right = {(V.CALL_SUPPRESSED, 7)}
            if isinstance(self.ring, SplitRing) and self.ring.used_event == 0:
                # 0 is Linux's word for silence, and the place of a first completion, too.
                right.add((V.LOST_CALL, 8))
            if fault == "asks_too_late" and case.layout is Layout.PACKED:
                right.add((V.LOST_CALL, 8))  # a lap ahead is a lap behind
            return right
        assert fault == "stops_after"
        if case.facts and case.stop_seen:
            return {(V.DRIVER_STUCK, 10), (V.LOST_KICK, 3)}
        # A vCPU that nobody saw stop has lost what it was about to do.
        return {(V.LOST_CALL, 8), (V.CALL_SUPPRESSED, 7), (V.LOST_KICK, 3)}

    def _right_for_stuck(self) -> set[Said]:
        case = self.case
        if not case.sync and case.polls != "always":
            return {(V.DEVICE_STUCK, 6)}
        right = {(V.DEVICE_STUCK, 6), (V.DEVICE_STUCK, 5)}
        blind = not case.position_known or case.arm_at_pop
        if blind:
            # The kick of what is behind the entry that is stuck; or of that one itself, if it was
            # found before its kick was read.
            right.add((V.KICK_UNREAD, 4))
        looks_busy = case.works_in[0] is ThreadState.RUNNING or not case.sync
        if blind and (not case.facts or looks_busy):
            # Nothing tells a back-end that is stuck at its work from one that sleeps.
            right |= {(V.LOST_KICK, 3), (V.KICK_SUPPRESSED, 2)}
        return right

    def _final(self) -> str:
        """Judge the last verdict by what really hangs."""
        assert self.track is not None
        case = self.case
        self.world.spawn(self._judge(careful=True))
        self.world.run(self.world.now + 1.0)
        verdict = self.rule
        assert verdict is not None
        kicks, calls = self._hangs()
        said = (verdict.verdict, verdict.hop)
        if verdict.verdict.stalled or not (kicks or calls):
            return self.wrong  # stalls are checked when they are said
        if kicks and case.role is QueueRole.REQUEST:
            must = case.event_idx or case.position_known
            if must and case.positions_known:
                self._complain(f"no stall for {case.fault}", verdict)
            elif said[0] is not V.UNKNOWN or verdict.event is not DeviceEvent.KICK:
                self._complain(f"neither a stall nor a probe for {case.fault}", verdict)
        elif calls and case.calls_when_idle and case.kind != "poll":
            now = self.track.now
            if not case.positions_known:
                right = verdict.event is DeviceEvent.KICK
            elif not case.event_idx:
                right = verdict.event is DeviceEvent.CALL or not now.used_idx
                if case.role is QueueRole.REQUEST:
                    right |= bool((now.avail_flags or 0) & 1) and not case.facts
                else:
                    right |= bool((now.avail_flags or 0) & 1)
            else:
                right = self._call_invisible(now)
            if not right:
                self._complain(f"no word on {case.fault}", verdict)
        return self.wrong

    def _call_invisible(self, now: Sample) -> bool:
        """The driver asks for no call, as far as the ring tells: it may as well poll."""
        case = self.case
        if now.used_event == now.used_idx:
            return True  # just where it would be at rest: too late, or Linux's 0 for silence
        if case.fault == "stops_after" and case.triggered_flag:
            # Stopped in its handler, with its last wish more than a lap old.
            assert now.used_event is not None
            assert now.used_idx is not None
            behind = span(self.fixed, now.used_event, now.used_idx)
            if case.layout is Layout.PACKED or behind > self.fixed.size:
                return True
        off = now.used_event == 0 if case.layout is Layout.SPLIT else now.avail_flags == 1
        # Only a vector tells that it would rather be called, and an inbox may be polled.
        return off and (not case.facts or case.role is QueueRole.INBOX)

    def _hangs(self) -> tuple[bool, bool]:
        """Whether the device, and whether the driver, waits for what nobody will tell it."""
        device, driver = self.device, self.driver
        stuck = bool(device.in_flight) or device.does == "works"
        return device.sleeps_on_work or stuck, driver.waits_in_vain

    def _complain(self, what: str, verdict: Rule) -> None:
        if self.wrong:
            return
        assert self.track is not None
        evidence = judge(self.fixed, self.track, self.slow, LIMITS).evidence
        values = ", ".join(f"{one.what}={one.value}" for one in evidence)
        self.wrong = (
            f"{what}; said {verdict.verdict} ({verdict.hop}, event {verdict.event}) at "
            f"{self.world.now:.3f}: {values}\n  hangs {self._hangs()}\n  {self.case}"
        )


def run_case(rng: random.Random, fault: str = "") -> str:
    """Run one random case; return what is wrong with the verdicts, or an empty string."""
    return Run(make_case(rng, fault), rng).run()
