"""Is healing bounded, whatever happens: budgets, back-off, breaker, and what is never healed?"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kickcall.model import DeviceEvent, Verdict, VerdictKind
from kickcall.watch.policy import (
    HEALED,
    Budget,
    Decision,
    Queue,
    Rules,
    State,
    decide,
    forget,
    inject,
    settle,
    withdraw,
)

Q0 = Queue(100, 5000, "/machine/peripheral/vub0", 0)
Q1 = Queue(100, 5000, "/machine/peripheral/vub0", 1)
OTHER = Queue(200, 6000, "/machine/peripheral/vub0", 0)
RULES = Rules()


def verdict(
    kind: VerdictKind = VerdictKind.LOST_KICK,
    since_s: float = 1.0,
    event: DeviceEvent | None = DeviceEvent.KICK,
) -> Verdict:
    return Verdict(Q0.device, 0, kind, 3, since_s, (), "", event=event)


def ask(
    state: State, which: Queue = Q0, now: float = 0.0, rules: Rules = RULES, **how: bool
) -> Decision:
    return decide(state, rules, which, verdict(), busy=how.get("busy", False), now=now)


def injected(state: State, helped: bool | None, at: float, which: Queue = Q0) -> State:
    return settle(inject(state, RULES, which, at), RULES, which, helped, at)


@pytest.mark.parametrize("kind", VerdictKind)
def test_only_what_a_notification_repairs_is_healed(kind: VerdictKind) -> None:
    asked = decide(State(), RULES, Q0, verdict(kind), busy=False, now=0.0)
    assert asked.heal == (
        kind
        in {
            VerdictKind.LOST_KICK,
            VerdictKind.LOST_CALL,
            VerdictKind.KICK_SUPPRESSED,
            VerdictKind.CALL_SUPPRESSED,
            VerdictKind.KICK_UNREAD,
        }
    )


@pytest.mark.parametrize("kind", sorted(HEALED))
def test_a_verdict_that_names_no_event_is_not_healed(kind: VerdictKind) -> None:
    assert not decide(State(), RULES, Q0, verdict(kind, event=None), busy=False, now=0.0).heal


def test_a_verdict_must_persist() -> None:
    short = decide(State(), RULES, Q0, verdict(since_s=0.1), busy=False, now=7.0)
    assert not short.heal
    assert short.retry_at == pytest.approx(7.05)
    assert decide(State(), RULES, Q0, verdict(since_s=0.15), busy=False, now=7.05).heal


def test_a_verdict_must_persist_longer_while_the_guest_runs() -> None:
    assert not decide(State(), RULES, Q0, verdict(since_s=0.4), busy=True, now=0.0).heal
    assert decide(State(), RULES, Q0, verdict(since_s=0.5), busy=True, now=0.0).heal


def test_nothing_is_injected_while_the_last_injection_is_watched() -> None:
    state = inject(State(), RULES, Q0, 0.0)
    assert not ask(state, now=100.0).heal
    assert ask(state, Q1, now=100.0).heal


def test_what_helped_may_be_repeated_at_once_and_what_did_not_must_wait_twice_as_long() -> None:
    helped = injected(State(), True, 0.0)
    assert ask(helped, now=RULES.pause_s).heal
    once = injected(State(), False, 0.0)
    assert ask(once, now=0.99).retry_at == 1.0
    assert ask(once, now=1.0).heal
    twice = injected(once, False, 1.0)
    assert not ask(twice, now=2.99).heal
    assert ask(twice, now=3.0).heal


def test_an_unknown_outcome_makes_its_queue_wait_and_no_other() -> None:
    state = injected(State(), None, 0.0)
    assert not ask(state, now=0.5).heal
    assert ask(state, Q1, now=0.5).heal
    assert state.host.failures == 0


def test_what_was_not_written_after_all_leaves_the_queue_as_it_was_but_is_paid_for() -> None:
    state = withdraw(inject(State(), RULES, Q0, 0.0), Q0)
    assert ask(state, now=RULES.pause_s).heal
    assert state.host.times == (0.0,)
    assert state.queues[Q0].failures == 0


def test_the_breaker_opens_when_healing_does_not_help_and_says_so() -> None:
    state = State()
    for at in (0.0, 10.0, 20.0):
        assert ask(state, now=at).heal
        state = injected(state, False, at)
    stopped = ask(state, now=600.0)
    assert (stopped.heal, stopped.alert, stopped.retry_at) == (False, True, 620.0)
    assert "3 injections in a row did not help" in stopped.because
    assert ask(state, Q1, now=600.0).heal


def test_an_open_breaker_lets_one_through_later_and_closes_when_that_helps() -> None:
    state = State()
    for at in (0.0, 10.0, 20.0):
        state = injected(state, False, at)
    assert ask(state, now=620.0).heal
    assert not ask(injected(state, False, 620.0), now=700.0).heal
    assert ask(injected(state, True, 620.0), now=621.0).heal


@pytest.mark.parametrize(
    ("queues", "failures"),
    [
        ([Queue(1, 1, "d", n) for n in range(6)], 6),
        ([Queue(n, 1, "d", 0) for n in range(12)], 12),
    ],
    ids=["of a machine", "of a host"],
)
def test_queues_together_open_the_breaker_of_their_machine_or_host(
    queues: list[Queue], failures: int
) -> None:
    state = State()
    for at, which in enumerate(queues):
        assert ask(state, which, now=float(at)).heal, at
        state = injected(state, False, float(at), which)
    fresh = replace(queues[0], queue=99)
    assert ask(state, fresh, now=20.0).because.startswith(f"{failures} injections in a row")


def test_a_machine_that_ended_is_forgotten_and_the_host_remembers() -> None:
    state = inject(injected(State(), False, 0.0), RULES, OTHER, 1.0)
    left = forget(state, Q0.pid, Q0.start_time)
    assert set(left.queues) == {OTHER}
    assert set(left.machines) == {(OTHER.pid, OTHER.start_time)}
    assert left.pending == {OTHER}
    assert left.host == state.host


small = st.builds(Budget, st.integers(1, 5), st.floats(0.5, 20.0), st.integers(1, 4))


@given(
    rules=st.builds(
        Rules,
        queue=small,
        machine=small,
        host=small,
        back_off_s=st.floats(0.0, 3.0),
        cool_down_s=st.floats(0.0, 10.0),
    ),
    steps=st.lists(
        st.tuples(
            st.floats(0.0, 3.0),
            st.sampled_from([Q0, Q1, OTHER]),
            st.sampled_from([True, False, None]),
        ),
        max_size=120,
    ),
)
def test_never_more_than_its_budget_in_any_window(
    rules: Rules, steps: list[tuple[float, Queue, bool | None]]
) -> None:
    state, now = State(), 1000.0
    done: list[tuple[float, Queue]] = []
    for later, which, helped in steps:
        now += later
        if decide(state, rules, which, verdict(), busy=False, now=now).heal:
            done.append((now, which))
            state = settle(inject(state, rules, which, now), rules, which, helped, now)
    for budget, scope_of in (
        (rules.queue, lambda which: which),
        (rules.machine, lambda which: which.pid),
        (rules.host, lambda which: None),
    ):
        for start, first in done:
            within = [
                at
                for at, which in done
                if scope_of(which) == scope_of(first) and start <= at < start + budget.window_s
            ]
            # `start + window` may round up to the very time at which the next one was allowed.
            assert len(within) <= budget.count, (budget, within)


@given(
    outcomes=st.lists(st.sampled_from([True, False, None]), max_size=40),
    at=st.floats(0.0, 1e6),
)
def test_a_refusal_that_time_ends_names_the_time(outcomes: list[bool | None], at: float) -> None:
    state, now = State(), at
    for helped in outcomes:
        asked = ask(state, now=now)
        while not asked.heal:
            assert asked.retry_at is not None
            assert asked.retry_at > now
            now = asked.retry_at
            asked = ask(state, now=now)
        state = injected(state, helped, now)
