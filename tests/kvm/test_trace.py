"""Does the flight recorder count what happens, know who did it, and leave nothing behind?

KICKCALL_TRACE_REQUESTS makes the comparison with the guest's own counts as long as wanted
(6 devices of 16,700 requests, 100,200 in all, take 18 min under TCG).

What must be equal: the kernel raises one MSI for each call, and the guest counts one interrupt
for each that it takes. Several that come before it has taken the first are one. So with one request
in flight calls and interrupts are equal; with many, interrupts are the fewer. A guest that pings
waits for the answer, not for the call that its packet has left: vhost makes that call first, and
the machine takes both on one processor. vhost in the kernel never empties a kick notifier: its
count rises by every kick, always.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kickcall.errors import KernelViewError
from kickcall.host import eventfd_trace, tracefs
from kickcall.host.bpf_counter import BpfCounter
from kickcall.host.eventfds import eventfds_of
from kickcall.host.hist_counter import HistCounter
from kickcall.model import BackendKind, DeviceEvent, Signaller
from kickcall.vmm.recorder import Which
from kvm_zoo import DISKS, NETS, NOTIFIERS, interrupt_lines
from witness import interrupts, until, within

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.attached import AttachedMachine
    from kickcall.lab.machine import LabMachine

pytestmark = [pytest.mark.rig, pytest.mark.timeout(3600)]

KICK, CALL = DeviceEvent.KICK, DeviceEvent.CALL
REQUESTS = int(os.environ.get("KICKCALL_TRACE_REQUESTS", "200"))
PATIENCE = 60.0 + REQUESTS * 0.2
TRACING = Path("/sys/kernel/tracing")


def path_of(device: str) -> str:
    return f"/machine/peripheral/{device}"


def requests(machine: LabMachine, device: str, count: int) -> str:
    """Return a command for the guest that makes so many requests, one at a time."""
    if device in NETS:
        # One ping that sends many does not wait for the answer to the last.
        ping = f"ping -q -c 1 -W 10 {machine.host_address(device)}"
        return f"i=0; while [ $i -lt {count} ]; do {ping} || exit 1; i=$((i+1)); done >/dev/null"
    disk = machine.disk(device)
    # A disk of 16 MiB has 4096 blocks to read; from its start again after that.
    rounds, rest = divmod(count, 4000)
    read = f"dd if={disk} of=/dev/null bs=4k iflag=direct"
    return (
        f"i=0; while [ $i -lt {rounds} ]; do {read} count=4000 || exit 1; i=$((i+1)); done; "
        f"[ {rest} = 0 ] || {read} count={rest}"
    )


def do(machine: LabMachine, command: str) -> None:
    status, output = machine.guest.run(command, timeout=PATIENCE)
    assert status == 0, output


def kick_counts(attached: AttachedMachine, device: str) -> dict[int, int]:
    """Return what fdinfo says of a device's kick notifiers, by queue."""
    counts = {}
    for queue in attached.device(device).queues():
        if (state := queue.state().kick) is not None:
            counts[queue.map.index] = state.count
    return counts


@contextlib.contextmanager
def tracing(machine: LabMachine, *options: str, name: str = "") -> Iterator[subprocess.Popen[str]]:
    """Run `kickcall trace` until the block ends; it counts when the block begins."""
    command = [sys.executable, "-m", "kickcall", "trace", name or machine.name, *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as trace:
        try:
            until(
                lambda: trace.poll() is not None or counts(trace.pid, machine),
                "kickcall trace counts",
                PATIENCE,
            )
            assert trace.poll() is None, trace.communicate()
            yield trace
        finally:
            trace.terminate()


def counts(pid: int, machine: LabMachine) -> bool:
    """Tell whether a kickcall has signalled its own eventfd, to see whether the kernel counts."""
    theirs = {one.eventfd_id for one in eventfds_of(machine.pid).values()}
    return any(one.count and one.eventfd_id not in theirs for one in eventfds_of(pid).values())


def ours() -> list[str]:
    """Return the tracing instances of any kickcall."""
    return [one for one in os.listdir(TRACING / "instances") if one.startswith("kickcall_")]


def probes() -> list[str]:
    """Return the probes of any kickcall."""
    lines = (TRACING / "kprobe_events").read_text().splitlines()
    return [line for line in lines if ":kickcall_" in line and "kickcall_test" not in line]


def programs() -> list[str]:
    """Return the functions that signal eventfds and have programs at their entry."""
    lines = (TRACING / "enabled_functions").read_text().splitlines()
    return [line for line in lines if re.match(r"eventfd_(signal|write)\b.* D\b", line)]


def totals(document: str) -> dict[tuple[str, int, str], Any]:
    """Return the counts of a `--json` document by device, queue and event."""
    parsed: dict[str, Any] = json.loads(document)
    return {
        (queue["id"], queue["queue"], event): queue[event]
        for queue in parsed["queues"]
        for event in ("kick", "call")
        if queue[event] is not None
    }


def refused(*_: object) -> None:
    raise KernelViewError("this kernel takes no program")


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, BpfCounter) for name in (*DISKS, *NETS)),
        ("vscsi0", HistCounter),
        ("iot0", HistCounter),
    ],
)
def test_the_recorder_counts_what_the_guest_and_vhost_count(
    kvm_zoo: LabMachine,
    attached: AttachedMachine,
    name: str,
    way: type[BpfCounter | HistCounter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if way is HistCounter:
        monkeypatch.setattr(eventfd_trace, "BpfCounter", refused)
    backend, _, having = NOTIFIERS[name]
    do(kvm_zoo, requests(kvm_zoo, name, 2))  # the first ping asks for an address as well
    taken, kicked = interrupts(kvm_zoo), kick_counts(attached, name)
    with attached.record(name) as recording:
        assert type(recording._trace._counter) is way
        do(kvm_zoo, requests(kvm_zoo, name, REQUESTS))
        taken_now, kicked_now = interrupts(kvm_zoo), kick_counts(attached, name)
        counts = recording.counts()
    assert recording.dropped == 0
    calls = {queue: counts[Which(path_of(name), queue, CALL)].total for queue in range(having)}
    lines = {queue: (name, interrupt_lines(kvm_zoo, name, queue)) for queue in range(having)}
    for queue, line in lines.items():
        assert calls[queue] == taken_now[line] - taken[line], line
    kicks = {queue: counts[Which(path_of(name), queue, KICK)].total for queue in range(having)}
    if backend is BackendKind.VHOST_KERNEL:
        assert kicks == {queue: kicked_now[queue] - kicked[queue] for queue in range(having)}
    # A ping is answered with one packet; the guest need not kick for each buffer that it returns.
    assert sum(calls.values()) >= REQUESTS
    if name in DISKS:
        assert sum(calls.values()) == REQUESTS
        # A device that is still looking wants no kick.
        assert 0 < sum(kicks.values()) <= REQUESTS
    who = {(event, one.by) for (_, _, event), count in counts.items() for one in count.by}
    answers = {
        BackendKind.VHOST_KERNEL: Signaller.VHOST,
        BackendKind.QEMU: Signaller.QEMU,
        BackendKind.VHOST_USER: Signaller.PROCESS,  # the lab's relay
    }
    assert who == {(KICK, Signaller.GUEST), (CALL, answers[backend])}


@pytest.mark.long
@pytest.mark.parametrize("name", ["vscsi0", "iot0"])
def test_with_many_in_flight_interrupts_are_the_fewer(
    kvm_zoo: LabMachine, attached: AttachedMachine, name: str
) -> None:
    backend, _, having = NOTIFIERS[name]
    each = max(REQUESTS // 4, 25)
    taken, kicked = interrupts(kvm_zoo), kick_counts(attached, name)
    with attached.record(name) as recording:
        do(kvm_zoo, " & ".join([f"({requests(kvm_zoo, name, each)})"] * 8) + " & wait")
        taken_now, kicked_now = interrupts(kvm_zoo), kick_counts(attached, name)
        counts = recording.counts()
    for queue in range(having):
        line = (name, interrupt_lines(kvm_zoo, name, queue))
        rose = taken_now[line] - taken[line]
        assert rose <= counts[Which(path_of(name), queue, CALL)].total
        if backend is BackendKind.VHOST_KERNEL:
            kicks = counts[Which(path_of(name), queue, KICK)].total
            assert kicks == kicked_now[queue] - kicked[queue]
    assert recording.dropped == 0


def test_what_kickcall_injects_is_kickcalls(kvm_zoo: LabMachine, attached: AttachedMachine) -> None:
    with attached.record("vscsi0", 2) as recording:
        attached.device("vscsi0").queue(2).kick()
        before = time.monotonic()
        for event in ("kick", "call"):
            command = [sys.executable, "-m", "kickcall", event, kvm_zoo.name, "vscsi0"]
            subprocess.run([*command, "--queue", "2"], check=True, stdout=subprocess.DEVNULL)
        after = time.monotonic()
        counts = recording.counts()
    kicks, calls = (counts[Which(path_of("vscsi0"), 2, event)] for event in (KICK, CALL))
    assert {one.by for one in (*kicks.by, *calls.by)} == {Signaller.KICKCALL}
    assert kicks.total == 2
    assert [one.pid for one in kicks.by if one.tid == os.getpid()] == [os.getpid()]
    # vhost looks at a queue that was kicked, and need not call for nothing.
    assert calls.total == 1
    assert kicks.last_at is not None
    assert calls.last_at is not None
    assert before < kicks.last_at < calls.last_at < after


@pytest.mark.long
def test_each_event_is_told_with_its_time_and_its_answer(kvm_zoo: LabMachine) -> None:
    with tracing(kvm_zoo, "vscsi0", "--events", "--json", "--duration", "1h") as trace:
        do(kvm_zoo, requests(kvm_zoo, "vscsi0", 50))
        time.sleep(1)
        trace.send_signal(signal.SIGINT)
        out, err = trace.communicate(timeout=PATIENCE)
    assert trace.returncode == 0, err
    *lines, last = out.splitlines()
    events = [json.loads(line) for line in lines]
    assert events == sorted(events, key=lambda one: one["at"])
    ended = json.loads(last)
    assert (ended["ended"], ended["dropped"], ended["lost"]) == ("interrupted", 0, 0)
    counted = totals(last)
    for (device, queue, event), count in counted.items():
        told = [
            one
            for one in events
            if (one["id"], one["queue"], one["event"]) == (device, queue, event)
        ]
        assert len(told) == count["total"]
    calls = [one for one in events if one["event"] == "call"]
    assert len(calls) == 50
    assert all(one["who"] == "vhost" and one["after_kick_s"] > 0 for one in calls)
    times = [queue["kick_to_call"] for queue in ended["queues"] if queue["kick_to_call"]]
    assert sum(one["count"] for one in times) == 50
    assert all(0 < one["min_s"] <= one["median_s"] <= one["max_s"] for one in times)


@pytest.mark.long
def test_two_at_once_count_the_same(kvm_zoo: LabMachine) -> None:
    with (
        tracing(kvm_zoo, "--json", "--duration", "1h") as one,
        # Only the second needs tracefs: it counts in the other way.
        tracing(kvm_zoo, "vscsi0", "--events", "--json", "--duration", "1h") as two,
    ):
        assert len(ours()) == 1
        assert len(programs()) == 2
        do(kvm_zoo, requests(kvm_zoo, "vscsi0", 40))
        for trace in (one, two):
            trace.send_signal(signal.SIGINT)
        everything = totals(one.communicate(timeout=PATIENCE)[0])
        # With events each line is a document.
        vscsi = totals(two.communicate(timeout=PATIENCE)[0].splitlines()[-1])
    assert sum(count["total"] for (_, _, event), count in vscsi.items() if event == "call") == 40
    assert {key: count["total"] for key, count in vscsi.items()} == {
        key: count["total"] for key, count in everything.items() if key[0] == "vscsi0"
    }
    assert (ours(), probes(), programs()) == ([], [], [])


@pytest.mark.long
def test_the_programs_of_one_that_was_killed_are_gone(kvm_zoo: LabMachine) -> None:
    with tracing(kvm_zoo, "--duration", "1h") as killed:
        assert len(programs()) == 2
        killed.kill()
        killed.wait()
    until(lambda: programs() == [], "the kernel takes the programs away")


@pytest.mark.long
def test_one_that_was_killed_is_swept_and_one_that_runs_is_left_alone(
    kvm_zoo: LabMachine,
) -> None:
    with (
        tracing(kvm_zoo, "vscsi0", "--events", "--json", "--duration", "1h") as running,
        tracing(kvm_zoo, "--events", "--duration", "1h") as killed,
    ):
        of_running = {name for name in ours() if f"_{running.pid}_" in name}
        killed.kill()
        killed.wait()
        assert len(ours()) == 2  # it had no time to remove anything
        done = subprocess.run(
            [sys.executable, "-m", "kickcall", "trace", kvm_zoo.name, "--duration", "100ms"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert set(ours()) == of_running
        assert all(f"_{running.pid}_" in line for line in probes())
        do(kvm_zoo, requests(kvm_zoo, "vscsi0", 10))
        running.send_signal(signal.SIGTERM)
        counted = totals(running.communicate(timeout=PATIENCE)[0].splitlines()[-1])
    calls = [count["total"] for (_, _, event), count in counted.items() if event == "call"]
    assert sum(calls) == 10
    assert ours() == []
    assert probes() == []


@pytest.mark.long
def test_a_machine_that_is_mapped_anew_is_counted_on(
    kvm_zoo: LabMachine, attached: AttachedMachine
) -> None:
    # QEMU makes new notifiers when a machine that was paused goes on.
    with attached.record("iot0") as recording:
        do(kvm_zoo, requests(kvm_zoo, "iot0", 10))
        assert recording.follow() == ()
        ids = {one: count.eventfd_id for one, count in recording.counts().items()}
        kvm_zoo.qmp("stop")
        kvm_zoo.qmp("cont")
        (said,) = recording.follow()
        assert "new notifiers" in said
        do(kvm_zoo, requests(kvm_zoo, "iot0", 10))
        counts = recording.counts()
    assert sum(count.total for which, count in counts.items() if which.event is CALL) == 20
    # Those that are held keep their ids, so that no other is taken for them.
    assert {one: count.eventfd_id for one, count in counts.items()} != ids


def test_new_notifiers_that_cannot_be_counted_are_told(
    kvm_zoo: LabMachine, attached: AttachedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with attached.record("iot0") as recording:
        kvm_zoo.qmp("stop")
        kvm_zoo.qmp("cont")
        monkeypatch.setattr(BpfCounter, "add", refused)
        (said,) = recording.follow()
        assert said.startswith("iot0: new notifiers, and they cannot be counted: ")
        assert recording.follow() == ()


def test_a_look_at_the_counts_is_cheap(kvm_zoo: LabMachine, attached: AttachedMachine) -> None:
    with attached.record() as recording:
        do(kvm_zoo, requests(kvm_zoo, "vscsi0", 20))
        best = 1.0
        for _ in range(20):
            began = time.perf_counter()
            recording.counts()
            best = min(best, time.perf_counter() - began)
    # 18 queues; a tenth of this without TCG.
    assert best < within(0.05)


def test_nothing_of_a_test_is_left() -> None:
    assert tracefs.sweep(tracefs.folder()) == []
    assert (ours(), probes(), programs()) == ([], [], [])
