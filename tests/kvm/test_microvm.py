"""Are virtio-mmio devices under KVM kicked and called by eventfds, and does KVM have them so?"""

from __future__ import annotations

import pytest

from kickcall.attached import attach
from kickcall.lab.boot import boot
from kickcall.lab.spec import MachineSpec, VirtioBlk, VirtioNet
from kickcall.model import DeviceEvent, Via
from kickcall.vmm.verify import Outcome
from witness import NotifyTrace, interrupts, interrupts_after, rise, until, watch_queues

BOOT_TIMEOUT = 600.0
pytestmark = [pytest.mark.rig, pytest.mark.timeout(900)]


def test_a_machine_without_pci_is_kicked_and_called_by_its_notifiers() -> None:
    devices = (VirtioBlk(id="blk0", queues=2), VirtioNet(id="net0"))
    spec = MachineSpec(
        board="microvm", devices=devices, monitors=2, kernel_arguments="ipv6.disable=1"
    )
    with (
        boot(spec, timeout=BOOT_TIMEOUT) as machine,
        attach(machine.name, timeout=60.0) as attached,
    ):
        watch_queues(machine)
        queue = attached.device("blk0").queue(1)
        with NotifyTrace(machine) as trace:
            assert queue.kick().via is Via.EVENTFD
            until(lambda: [number for _, number in trace.seen()] == [1], "QEMU looks at queue 1")
        before = interrupts(machine)
        assert queue.call().via is Via.EVENTFD
        assert rise(before, interrupts_after(machine, before)) == {("blk0", "intx"): 1}
        # hw/virtio/virtio-mmio.c: one ioeventfd a queue at QueueNotify, and no irqfds.
        checks = {(one.id, one.queue, one.event): one for one in attached.verify()}
        for name, count in (("blk0", 2), ("net0", 3)):
            for number in range(count):
                kick = checks[name, number, DeviceEvent.KICK]
                assert kick.outcome is Outcome.SAME, kick.says
                assert f"value {number}" in kick.says
                call = checks[name, number, DeviceEvent.CALL]
                assert call.outcome is Outcome.NOT_COMPARABLE, call.says
