"""What is true of a kind of device on a KVM host, and of no other?"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import StaleMapError
from kickcall.host.processes import Process
from kickcall.lab.registers import Registers
from kvm_zoo import NETS, HandlerHits, interrupt_lines, kick_handler, notifier_counts
from witness import (
    StoppedIothread,
    asked_until,
    eventfd_counts,
    interrupts,
    interrupts_after,
    never,
    rise,
    until,
)

if TYPE_CHECKING:
    from kickcall.attached import AttachedMachine, AttachedQueue
    from kickcall.lab.guest import Command
    from kickcall.lab.machine import LabMachine

pytestmark = [pytest.mark.rig, pytest.mark.timeout(600)]

PATIENCE = 60.0


def read(machine: LabMachine, name: str, *, cpu: int, count: int = 1) -> str:
    disk = machine.disk(name)
    return f"taskset -c {cpu} dd if={disk} of=/dev/null bs=4k count={count} iflag=direct"


def succeeds(command: Command) -> None:
    status, output = command.wait(PATIENCE)
    assert status == 0, output


def kick_count(queue: AttachedQueue) -> int:
    state = queue.state()
    assert state.kick is not None
    return state.kick.count


def test_the_count_of_vhosts_kick_notifier_is_the_number_of_kicks(
    kvm_zoo: LabMachine, attached: AttachedMachine
) -> None:
    queue = attached.device("vscsi0").queue(3)
    handler = kick_handler("vscsi0", 3)
    command = read(kvm_zoo, "vscsi0", cpu=1, count=50)
    interrupts(kvm_zoo)
    with HandlerHits({handler}) as hits:
        before, used = kick_count(queue), queue.state().used_idx
        succeeds(kvm_zoo.guest.start(command))
        interrupts(kvm_zoo)
        kicks, now = hits.counts()[handler], queue.state().used_idx
    assert used is not None
    assert now is not None
    assert (now - used) % (1 << 16) >= 50
    # The worker may find a request before its kick, and several kicks by one look; each counts.
    assert kick_count(queue) - before >= kicks >= 1
    after = kick_count(queue)
    time.sleep(0.5)
    assert kick_count(queue) == after


def registers(machine: LabMachine, name: str) -> Registers:
    return Registers(machine.guest, f"0000:00:{machine.device(name).slot:02x}.0")


def moved(before: dict[int, int], now: dict[int, int]) -> dict[int, int]:
    """Return which eventfds' counts changed, and by how much."""
    return {fd: now[fd] - before[fd] for fd in now if now[fd] != before[fd]}


def test_a_call_through_a_masked_vector_waits_in_the_call_notifier(
    kvm_zoo: LabMachine, attached: AttachedMachine
) -> None:
    # vhost-scsi has no masked notifier (QEMU, hw/scsi/vhost-scsi-common.c: "guest_notifier_mask/
    # pending not used yet"): QEMU takes the irqfd away, so nobody reads the call notifier.
    queue = attached.device("vscsi0").queue(3)
    assert queue.map.call is not None
    assert queue.map.kick is not None
    command = read(kvm_zoo, "vscsi0", cpu=1)
    interrupts(kvm_zoo)
    before = notifier_counts(attached)
    # Linux gives vector 0 to the configuration and the next ones to the queues.
    registers(kvm_zoo, "vscsi0").mask_vector(4, True)
    try:
        reader = kvm_zoo.guest.start(command)
        until(
            lambda: eventfd_counts(kvm_zoo.pid)[queue.map.call.fd] == 1,  # type: ignore[union-attr]
            "vhost calls",
            PATIENCE,
        )
        never(lambda: reader.done, "a masked vector stays silent")
        waiting = moved(before, notifier_counts(attached))
        assert waiting.keys() == {queue.map.kick.fd, queue.map.call.fd}
        # A diagnosis that did not get to run itself blames nobody: then it is asked again.
        (verdict,) = asked_until(
            lambda verdicts: verdicts[0].verdict.stalled,
            lambda: attached.diagnose("vscsi0", 3, duration_s=2),
            PATIENCE,
        )
        assert str(verdict.verdict) == "interrupt-blocked", str(verdict)
    finally:
        registers(kvm_zoo, "vscsi0").mask_vector(4, False)
    succeeds(reader)


def test_vhost_net_calls_a_masked_vectors_own_notifier(
    kvm_zoo: LabMachine, attached: AttachedMachine
) -> None:
    queue = attached.device("vnetplain0").queue(0)
    assert queue.map.call is not None
    interrupts(kvm_zoo)
    ours = {
        notifier.fd
        for one in attached.device("vnetplain0").queues()
        for notifier in (one.map.kick, one.map.call)
        if notifier is not None
    }
    before = eventfd_counts(kvm_zoo.pid)
    registers(kvm_zoo, "vnetplain0").mask_vector(1, True)
    try:
        ping = f"ping -c 1 -W 60 {kvm_zoo.host_address('vnetplain0')}"
        waiting_for_answer = kvm_zoo.guest.start(ping)
        # One eventfd has the call, and it is none of the queues' notifiers: QEMU looks there when
        # the vector is unmasked (hw/virtio/vhost.c, vhost_virtqueue_mask and _pending).
        until(
            lambda: set(moved(before, eventfd_counts(kvm_zoo.pid))) - ours,
            "vhost calls the masked notifier",
            PATIENCE,
        )
        assert eventfd_counts(kvm_zoo.pid)[queue.map.call.fd] == 0
        never(lambda: waiting_for_answer.done, "a masked vector stays silent")
    finally:
        registers(kvm_zoo, "vnetplain0").mask_vector(1, False)
    succeeds(waiting_for_answer)


def test_net_with_and_without_the_event_index(
    kvm_zoo: LabMachine, attached: AttachedMachine
) -> None:
    for name in NETS:
        device = attached.device(name)
        pairs = kvm_zoo.device(name).queues  # type: ignore[union-attr]
        received = [device.queue(2 * pair) for pair in range(pairs)]
        sent = [device.queue(2 * pair + 1) for pair in range(pairs)]
        indexed = name == "vnet0"
        for queue in (*received, *sent):
            state = queue.state()
            assert (state.used_event is not None, state.avail_event is not None) == (
                indexed,
                indexed,
            )
        kicks = [sum(map(kick_count, queues)) for queues in (sent, received)]
        before = interrupts(kvm_zoo)
        succeeds(kvm_zoo.guest.start(f"ping -c 5 -i 0.2 -W 5 {kvm_zoo.host_address(name)}"))
        rose = rise(before, interrupts(kvm_zoo))
        # Each request is alone, so each is kicked, and each answer is called.
        assert sum(map(kick_count, sent)) - kicks[0] >= 5
        inputs = [rose.get((name, f"input.{pair}"), 0) for pair in range(pairs)]
        assert sum(inputs) >= 5
        # vhost wants no kick of a receive queue in which buffers are left.
        assert sum(map(kick_count, received)) == kicks[1]


def test_a_pause_starts_vhost_anew(kvm_zoo: LabMachine, attached: AttachedMachine) -> None:
    succeeds(kvm_zoo.guest.start(read(kvm_zoo, "vscsi0", cpu=0, count=2)))
    queue = attached.device("vscsi0").queue(2)
    assert kick_count(queue) > 1
    kvm_zoo.qmp("stop")
    kvm_zoo.qmp("cont")
    with pytest.raises(StaleMapError):
        queue.kick()
    attached.refresh()
    queue = attached.device("vscsi0").queue(2)
    # QEMU kicks each queue once when it hands it over (hw/virtio/virtio-bus.c).
    assert kick_count(queue) == 1
    before = interrupts(kvm_zoo)
    queue.call()
    after = interrupts_after(kvm_zoo, before)
    assert rise(before, after) == {("vscsi0", interrupt_lines(kvm_zoo, "vscsi0", 2)): 1}
    succeeds(kvm_zoo.guest.start(read(kvm_zoo, "vscsi0", cpu=0)))


@pytest.mark.parametrize("event", ["kick", "call"])
def test_what_the_relay_lost_is_repaired_under_kvm(
    kvm_zoo: LabMachine, attached: AttachedMachine, event: str
) -> None:
    command, relay = read(kvm_zoo, "vub0", cpu=1), kvm_zoo.relay("vub0")
    lost = relay.carried(event, 1).dropped
    relay.drop(event, queue=1)
    reader = kvm_zoo.guest.start(command)
    relay.wait_for(event, 1, dropped=lost + 1, timeout=PATIENCE)
    never(lambda: reader.done, "the guest's request needs no help")
    attached.device("vub0").queue(1).raise_event(event)
    succeeds(reader)


def test_a_kick_that_an_iothread_lost_is_repaired_under_kvm(
    kvm_zoo: LabMachine, attached: AttachedMachine
) -> None:
    command, queue = read(kvm_zoo, "iot0", cpu=1), attached.device("iot0").queue(1)
    kick = queue.map.kick
    assert kick is not None
    with Process(kvm_zoo.pid) as process:
        ours = process.duplicate_fd(kick.fd)
    try:
        with StoppedIothread(kvm_zoo, "iot0"):
            reader = kvm_zoo.guest.start(command)
            until(lambda: eventfd_counts(kvm_zoo.pid)[kick.fd] == 1, "the guest kicks", PATIENCE)
            os.read(ours, 8)
        never(lambda: reader.done, "the guest's request needs no help")
        queue.kick()
        succeeds(reader)
    finally:
        os.close(ours)
