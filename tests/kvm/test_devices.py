"""Does every command work on every kind of device that a KVM host serves?"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from kickcall.errors import EventNotSupportedError
from kickcall.lab.monitor import ask
from kickcall.model import BackendKind, Via
from kvm_zoo import (
    DISKS,
    NETS,
    NOTIFIERS,
    QEMUS_OWN,
    HandlerHits,
    Knocking,
    interrupt_lines,
    kick_handler,
    knock,
    notifier_counts,
)
from served import serving
from witness import (
    NotifyTrace,
    eventfd_counts,
    interrupts,
    raised_by,
    rise,
    undisturbed,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kickcall.attached import AttachedMachine, AttachedQueue
    from kickcall.lab.machine import LabMachine
    from kickcall.model import Injection

pytestmark = [pytest.mark.rig, pytest.mark.timeout(600)]

IN_THE_KERNEL = [
    name for name, (backend, _, _) in NOTIFIERS.items() if backend is BackendKind.VHOST_KERNEL
]


def kickcall(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    command = [sys.executable, "-m", "kickcall", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@contextlib.contextmanager
def traffic(machine: LabMachine) -> Iterator[None]:
    """Keep every device busy while the block lasts."""
    machine.guest.run("rm -f /run/stop-io")
    loops = [
        f"taskset -c {cpu} dd if={machine.disk(disk)} of=/dev/null bs=4k count=50 iflag=direct"
        for disk in DISKS
        for cpu in (0, 1)
    ] + [f"ping -q -c 20 -i 0.02 -W 5 {machine.host_address(net)}" for net in NETS]
    started = [
        machine.guest.start(f"while [ ! -e /run/stop-io ]; do {loop} || exit 1; done")
        for loop in loops
    ]
    try:
        with Knocking(machine):
            yield
    finally:
        machine.guest.run("touch /run/stop-io")
        for command in started:
            status, output = command.wait(120)
            assert status == 0, output


def test_the_guest_runs_under_kvm(kvm_zoo: LabMachine) -> None:
    assert kvm_zoo.qmp("query-kvm") == {"enabled": True, "present": True}


def test_every_device_is_mapped_with_the_notifiers_that_it_has(attached: AttachedMachine) -> None:
    seen = {}
    for device in attached.devices():
        queues = [queue.map for queue in device.queues()]
        assert not device.refusal
        have = [queue.index for queue in queues if queue.kick and queue.call]
        have_not = [queue.index for queue in queues if not (queue.kick or queue.call)]
        assert have == list(range(len(have)))
        assert have_not == list(range(len(have), len(queues)))
        seen[device.info.id] = (device.info.backend, len(queues), len(have))
    assert seen == NOTIFIERS


@pytest.mark.parametrize("name", list(NOTIFIERS))
def test_every_call_raises_its_own_interrupt_by_one(
    kvm_zoo: LabMachine, attached: AttachedMachine, name: str
) -> None:
    _, _, having = NOTIFIERS[name]
    for number in range(having):
        queue = attached.device(name).queue(number)
        own = (name, interrupt_lines(kvm_zoo, name, number))
        assert raised_by(kvm_zoo, attached, partial(queue.call, via="eventfd")) == {own: 1}


@pytest.mark.parametrize("name", IN_THE_KERNEL)
def test_every_kick_runs_vhosts_own_handler_once(
    kvm_zoo: LabMachine, attached: AttachedMachine, name: str
) -> None:
    _, _, having = NOTIFIERS[name]
    handlers = {kick_handler(name, number) for number in range(having)}
    interrupts(kvm_zoo)
    with HandlerHits(handlers) as hits:
        for number in range(having):
            queue = attached.device(name).queue(number)
            assert queue.map.kick is not None
            handler = kick_handler(name, number)
            ran, rose, result = undisturbed(attached, partial(kicked, attached, queue, hits))
            assert ran == {handler: 1}
            # Nobody reads it: it goes on counting.
            assert rose == {queue.map.kick.fd: 1}
            assert result.before.count is not None
            assert result.after.count == result.before.count + 1


def kicked(
    attached: AttachedMachine, queue: AttachedQueue, hits: HandlerHits
) -> tuple[dict[str, int], dict[int, int], Injection]:
    """Kick; return which handlers ran, whose counts rose, and what the kick says of itself."""
    before, counts = hits.counts(), notifier_counts(attached)
    result = queue.kick()
    until(lambda: hits.counts() != before, "a handler runs")
    return rise(before, hits.counts()), rise(counts, notifier_counts(attached)), result


@pytest.mark.parametrize("name", ["iot0", "scsi0"])
def test_every_kick_makes_qemu_look_at_that_queue(
    kvm_zoo: LabMachine, attached: AttachedMachine, name: str
) -> None:
    _, queues, _ = NOTIFIERS[name]
    for number in range(queues):
        with NotifyTrace(kvm_zoo) as trace:
            attached.device(name).queue(number).kick()
            until(trace.seen, f"QEMU looks at queue {number} of {name}")
            interrupts(kvm_zoo)
            assert [queue for _, queue in trace.seen()] == [number]


def test_every_kick_goes_through_the_relay(kvm_zoo: LabMachine, attached: AttachedMachine) -> None:
    relay = kvm_zoo.relay("vub0")
    for number in (0, 1):
        before = relay.carried("kick", number).passed
        attached.device("vub0").queue(number).kick()
        until(lambda: relay.carried("kick", number).passed == before + 1, "the relay carries it")  # noqa: B023


@pytest.mark.parametrize("name", list(QEMUS_OWN))
def test_a_queue_that_qemu_keeps_is_kicked_by_its_io_port(
    kvm_zoo: LabMachine, attached: AttachedMachine, name: str
) -> None:
    queue = attached.device(name).queue(QEMUS_OWN[name])
    if name == "vsock0":
        # QEMU offers vhost-vsock without the legacy interface.
        with pytest.raises(EventNotSupportedError, match="no kick notifier"):
            queue.kick()
        return
    with NotifyTrace(kvm_zoo) as trace:
        assert queue.kick().via is Via.IOPORT
        until(trace.seen, f"QEMU looks at a queue of {name}")
        assert {number for _, number in trace.seen()} == {QEMUS_OWN[name]}
    with pytest.raises(EventNotSupportedError, match="no call notifier"):
        queue.call()


def test_the_rfcs_command_works_on_every_device(
    kvm_zoo: LabMachine, attached: AttachedMachine, tmp_path: Path
) -> None:
    listen = tmp_path / "served"
    with serving(kvm_zoo, listen):
        for name, (backend, _, having) in NOTIFIERS.items():
            last = {"dev": f"/machine/peripheral/{name}", "queue": having - 1}
            call = partial(ask, listen, "x-debug-device-event", {**last, "event": "call"}, 60)
            line = interrupt_lines(kvm_zoo, name, having - 1)
            assert raised_by(kvm_zoo, attached, call) == {(name, line): 1}
            notifier = attached.device(name).queue(having - 1).map.kick
            assert notifier is not None
            before = eventfd_counts(kvm_zoo.pid)[notifier.fd]
            assert ask(listen, "x-debug-device-event", {**last, "event": "kick"}, 60) == {}
            if backend is BackendKind.VHOST_KERNEL:
                assert eventfd_counts(kvm_zoo.pid)[notifier.fd] == before + 1


def test_the_commands_of_the_command_line_know_vhost(kvm_zoo: LabMachine) -> None:
    shown: dict[str, Any] = json.loads(kickcall("show", kvm_zoo.name, "--json").stdout)
    assert {device["id"] for device in shown["devices"]} == set(NOTIFIERS)
    done = kickcall("kick", kvm_zoo.name, "vscsi0", "--queue", "3", "--json")
    assert done.returncode == 0, done.stderr
    listed = kickcall("eventfd", kvm_zoo.name, "vscsi0", "--queue", "3", "--json")
    rows = json.loads(listed.stdout)
    kick = next(row for row in rows["notifiers"] if row["event"] == "kick")
    assert kick["count"] == json.loads(done.stdout)["after"]["count"]


def test_an_idle_machine_and_a_busy_one_are_healthy(
    kvm_zoo: LabMachine, attached: AttachedMachine
) -> None:
    interrupts(kvm_zoo)
    idle = attached.diagnose(duration_s=1)
    assert [str(verdict) for verdict in idle if verdict.verdict.stalled] == []
    # A receive queue full of empty buffers is how it has to be.
    said = {(verdict.device, verdict.queue): verdict.verdict for verdict in idle}
    for name in ("vnet0", "vsock0"):
        assert str(said[f"/machine/peripheral/{name}", 0]) == "idle"
    # Without the event index nothing tells whether the driver has seen what it received.
    used = attached.device("vnetplain0").queue(0).state().used_idx
    plain = str(said["/machine/peripheral/vnetplain0", 0])
    assert plain == ("unknown" if used else "idle")
    progressing: set[str] = set()

    def all_progress() -> bool:
        # On a busy host the guest may come to some of its loops only after seconds.
        busy = attached.diagnose(duration_s=3)
        assert [str(verdict) for verdict in busy if verdict.verdict.stalled] == []
        progressing.update(
            verdict.device.rpartition("/")[2]
            for verdict in busy
            if str(verdict.verdict) == "progressing"
        )
        return progressing >= {*DISKS, *NETS, "vsock0"}

    with traffic(kvm_zoo):
        until(all_progress, "every device that has work is seen to do it", 180)
    knock(kvm_zoo)
