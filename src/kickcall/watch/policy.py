"""What may be healed now, and what not yet or not any more?

Pure: no clock, no I/O. What was injected so far goes in, a decision comes out. Injections are
counted for a queue, for its machine and for the host alike: each of the three has a budget, and a
breaker that opens when injections do not help. Times are seconds on one clock of the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kickcall.model import VerdictKind, Via

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kickcall.model import Verdict

HEALED = frozenset(
    {
        VerdictKind.LOST_KICK,
        VerdictKind.LOST_CALL,
        VerdictKind.KICK_SUPPRESSED,
        VerdictKind.CALL_SUPPRESSED,
        VerdictKind.KICK_UNREAD,
    }
)
"""What one notification repairs (docs/verdicts). A verdict must also name the event that does:
`kick-unread` does so only where the kick was seen to be lost behind its notifier. `device-stuck`
and `unknown` may name one for a probe; whether it would repair anything is not known, so they are
an admin's to decide."""

NEUTRAL = (Via.EVENTFD, Via.QMP, Via.IOPORT)
"""Ways that do not stop the machine, the one first that needs no monitor."""


@dataclass(frozen=True, slots=True)
class Queue:
    """Which queue of which run of a machine."""

    pid: int
    start_time: int
    device: str
    queue: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What one scope (a queue, a machine, the host) may cost."""

    count: int
    """Never more injections than this in any `window_s` seconds."""
    window_s: float
    refuted: int
    """So many in a row that do not help open the breaker."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How healing is bounded. Seconds."""

    persist_s: float = 0.15
    """How long a verdict must have held, while all of the guest's processors sleep."""
    busy_persist_s: float = 0.5
    """The same while one of them runs or wants to: the driver may be about to do it itself."""
    queue: Budget = Budget(120, 60.0, 3)
    machine: Budget = Budget(240, 60.0, 6)
    host: Budget = Budget(600, 60.0, 12)
    pause_s: float = 0.05
    """Between two injections into one queue, where the first helped."""
    back_off_s: float = 1.0
    """After the first that did not help, or of which that is not known; doubled for each more."""
    back_off_most_s: float = 300.0
    cool_down_s: float = 600.0
    """A breaker stays open for so long, then lets one injection through: its last chance."""

    @property
    def memory_s(self) -> float:
        """Injections that are older than this bear on nothing."""
        windows = (self.queue.window_s, self.machine.window_s, self.host.window_s)
        return max(*windows, self.back_off_most_s, self.cool_down_s)


@dataclass(frozen=True, slots=True)
class Scope:
    """What was injected into a queue, a machine or the host."""

    times: tuple[float, ...] = ()
    """When, newest last; as many as its budget allows."""
    failures: int = 0
    """How many in a row did not help, or are not known to have helped."""
    open_until: float | None = None
    """The breaker opened, and stays so until then at least."""


@dataclass(frozen=True, slots=True)
class State:
    """All that was injected, as far as it bears on the next decision."""

    queues: Mapping[Queue, Scope] = field(default_factory=dict)
    machines: Mapping[tuple[int, int], Scope] = field(default_factory=dict)
    host: Scope = Scope()
    pending: frozenset[Queue] = frozenset()
    """Queues into which was injected, and of which is not known yet whether it helped."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to inject now; if not, why not, and when to ask again."""

    heal: bool
    because: str = ""
    retry_at: float | None = None
    """None: not before something changes."""
    alert: bool = False
    """An admin should know: healing was stopped."""


def decide(
    state: State,
    rules: Rules,
    which: Queue,
    verdict: Verdict,
    *,
    busy: bool,
    now: float,
) -> Decision:
    """Decide whether to inject what `verdict` names. `busy`: a processor of the guest runs."""
    if verdict.verdict not in HEALED or verdict.event is None:
        return Decision(False, f"{verdict.verdict} is nothing that a kick or a call repairs")
    if which in state.pending:
        return Decision(False, "the last injection is being watched", now + rules.pause_s)
    persist = rules.busy_persist_s if busy else rules.persist_s
    if verdict.since_s < persist:
        return Decision(False, "it has not lasted long enough", now + persist - verdict.since_s)
    scopes = (
        ("queue", rules.queue, state.queues.get(which, Scope())),
        ("machine", rules.machine, state.machines.get(_machine(which), Scope())),
        ("host", rules.host, state.host),
    )
    for name, budget, scope in scopes:
        if scope.open_until is not None and now < scope.open_until:
            return Decision(
                False,
                f"{scope.failures} injections in a row did not help (this {name}): healing is "
                "stopped there",
                scope.open_until,
                alert=True,
            )
        full = len(scope.times) >= budget.count
        if full and (free_at := scope.times[-budget.count] + budget.window_s) > now:
            return Decision(
                False,
                f"the budget of this {name} is spent: {budget.count} injections in "
                f"{budget.window_s:g} s",
                free_at,
                alert=True,
            )
    of_queue = scopes[0][2]
    if of_queue.times and (ready := of_queue.times[-1] + _back_off(rules, of_queue)) > now:
        return Decision(False, "backing off after the last injection", ready)
    return Decision(True)


def inject(state: State, rules: Rules, which: Queue, at: float) -> State:
    """Return the state with one more injection, whose effect is yet to be seen."""
    machine = _machine(which)
    return replace(
        state,
        queues={
            **state.queues,
            which: _with_time(state.queues.get(which, Scope()), rules.queue, at),
        },
        machines={
            **state.machines,
            machine: _with_time(state.machines.get(machine, Scope()), rules.machine, at),
        },
        host=_with_time(state.host, rules.host, at),
        pending=state.pending | {which},
    )


def settle(state: State, rules: Rules, which: Queue, helped: bool | None, at: float) -> State:
    """Return the state once it is known whether the last injection helped.

    None: it never will be (the machine ended, the watcher crashed in between). That makes the
    queue wait like a failure, and says nothing against healing elsewhere.
    """
    machine = _machine(which)
    queue = _with_outcome(
        state.queues.get(which, Scope()), rules.queue, bool(helped), rules.cool_down_s, at
    )
    state = replace(state, queues={**state.queues, which: queue}, pending=state.pending - {which})
    if helped is None:
        return state
    of_machine = state.machines.get(machine, Scope())
    return replace(
        state,
        machines={
            **state.machines,
            machine: _with_outcome(of_machine, rules.machine, helped, rules.cool_down_s, at),
        },
        host=_with_outcome(state.host, rules.host, helped, rules.cool_down_s, at),
    )


def withdraw(state: State, which: Queue) -> State:
    """Return the state after an injection that was not written; its place in the budget is gone."""
    return replace(state, pending=state.pending - {which})


def forget(state: State, pid: int, start_time: int) -> State:
    """Return the state without a machine that ended; what the host spent stays spent."""
    gone = (pid, start_time)
    return replace(
        state,
        queues={which: one for which, one in state.queues.items() if _machine(which) != gone},
        machines={machine: one for machine, one in state.machines.items() if machine != gone},
        pending=frozenset(which for which in state.pending if _machine(which) != gone),
    )


def _machine(which: Queue) -> tuple[int, int]:
    return which.pid, which.start_time


def _back_off(rules: Rules, scope: Scope) -> float:
    if not scope.failures:
        return rules.pause_s
    # The exponent is bounded before it is used: a float has an end.
    doubled = rules.back_off_s * 2.0 ** min(scope.failures - 1, 30)
    return min(doubled, rules.back_off_most_s)


def _with_time(scope: Scope, budget: Budget, at: float) -> Scope:
    return replace(scope, times=(*scope.times, at)[-budget.count :])


def _with_outcome(
    scope: Scope, budget: Budget, helped: bool, cool_down_s: float, at: float
) -> Scope:
    if helped:
        return replace(scope, failures=0, open_until=None)
    failures = scope.failures + 1
    return replace(
        scope,
        failures=failures,
        open_until=at + cool_down_s if failures >= budget.refuted else None,
    )
