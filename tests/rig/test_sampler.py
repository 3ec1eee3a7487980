"""Does a look at all queues say what a close look at each says, and does it follow the guest?"""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.errors import MachineGoneError
from kickcall.lab.boot import boot
from kickcall.lab.qtest import Qtest, boot_without_guest
from kickcall.lab.spec import MachineSpec, VhostUserBlk, VirtioBlk, VirtioNet, VirtioScsi
from kickcall.model import DeviceEvent
from kickcall.vmm.sampler import Sampler
from witness import look_over, until
from zoo import QEMUS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import BootMachine
    from kickcall.attached import AttachedMachine
    from kickcall.diagnose.states import Sample
    from kickcall.lab.machine import LabMachine
    from kickcall.model import QueueState, Rings

pytestmark = pytest.mark.rig

DISKS = (
    VirtioBlk(id="blk0", queues=1),
    VirtioBlk(id="iot0", queues=1, iothread=True),
    VirtioBlk(id="packed0", queues=1, packed=True, legacy="off"),
    VirtioScsi(id="scsi0", queues=1),
    VirtioScsi(id="scsipk0", queues=1, packed=True, legacy="off"),
    VirtioBlk(id="plain0", queues=1, event_idx=False),
)
TWO_BACKENDS = (
    *("-object", "memory-backend-ram,id=near,size=128M"),
    *("-object", "memory-backend-memfd,id=far,size=128M,share=on"),
    *("-numa", "node,memdev=near", "-numa", "node,memdev=far"),
)
"""Half of the guest's memory is private and half is shared, on two nodes."""


def sampler_of(attached: AttachedMachine, *, map_memory: bool = True) -> Sampler:
    return Sampler(attached._session, map_memory=map_memory)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((qemu.values[0], memory), id=f"{qemu.id}-{memory}", marks=qemu.marks)
        for qemu in QEMUS
        for memory in ("private", "shared", "both")
        if qemu.id == "system" or memory == "shared"
    ],
)
def machine(request: pytest.FixtureRequest, guest_image_built: object) -> Iterator[LabMachine]:
    qemu, memory = request.param
    vhost_user = (VhostUserBlk(id="vub0", queues=1, relay=False),) if memory == "shared" else ()
    spec = MachineSpec(
        qemu=qemu,
        devices=(*DISKS, VirtioNet(id="net0"), *vhost_user),
        shared_memory=memory == "shared",
        arguments=TWO_BACKENDS if memory == "both" else (),
        kernel_arguments="ipv6.disable=1",
    )
    with boot(spec) as booted:
        for name in ("scsi0", "scsipk0"):
            look_over(booted, name)
        yield booted


@pytest.fixture
def attached(machine: LabMachine) -> Iterator[AttachedMachine]:
    with attach(machine.name) as one:
        yield one


FIELDS = (
    *("avail_idx", "used_idx", "last_avail_idx"),
    *("avail_flags", "used_flags", "used_event", "avail_event"),
)


def as_sampled(state: QueueState) -> dict[str, int | None]:
    return {
        **{name: getattr(state, name) for name in FIELDS},
        "kick_count": state.kick.count if state.kick else None,
        "call_count": state.call.count if state.call else None,
    }


def without_time(sample: Sample) -> dict[str, int | None]:
    found = dataclasses.asdict(sample)
    assert found.pop("unreadable") == ""
    found.pop("at")
    return found


@pytest.mark.parametrize("map_memory", [True, False])
def test_samples_of_an_idle_machine_are_what_a_close_look_says(
    attached: AttachedMachine, map_memory: bool
) -> None:
    with sampler_of(attached, map_memory=map_memory) as sampler:
        samples = sampler.sample()
        assert len(samples) == len(sampler.queues) == len(sampler.maps) == len(sampler.devices)
        looked_at = {
            (device.info.path, queue.map.index): as_sampled(queue.state())
            for device in attached.devices()
            for queue in device.queues()
        }
    sampled = {
        (fixed.device, fixed.queue): without_time(sample)
        for fixed, sample in zip(sampler.queues, samples, strict=True)
    }
    assert sampled == looked_at
    assert sampled  # …and there was something to compare


def test_shared_memory_is_mapped_and_private_memory_is_not(
    machine: LabMachine, attached: AttachedMachine
) -> None:
    with sampler_of(attached) as sampler:
        splits = sum(fixed.layout == "split" for fixed in sampler.queues)
        if machine.spec.memory_is_shared:
            assert sampler.mapped == splits
        elif not machine.spec.arguments:
            assert sampler.mapped == 0
        else:
            # Which half a ring is in is the guest's choice.
            assert 0 <= sampler.mapped <= splits


@pytest.mark.parametrize("map_memory", [True, False])
@pytest.mark.parametrize("device", ["blk0", "iot0", "packed0", "scsi0", "scsipk0", "plain0"])
def test_a_look_follows_what_the_guest_does(
    machine: LabMachine, attached: AttachedMachine, device: str, map_memory: bool
) -> None:
    disk = machine.disk(device)
    mapped = attached.device(device)._mapped
    last = len(mapped.facts.queues) - 1
    with Sampler(attached._session, [(mapped, last)], map_memory=map_memory) as sampler:
        (before,) = sampler.sample()
        assert sampler.look().moved == ()
        machine.guest.run(f"dd if={disk} of=/dev/null bs=4k count=3 iflag=direct")
        assert sampler.look().moved == (0,)
        after = sampler.latest(0)
        (state,) = (attached.device(device).queue(last).state(),)
        assert without_time(after) == as_sampled(state)
        assert before.used_idx is not None
        assert after.used_idx is not None
        # Split: one index a request, however many buffers it has.
        if sampler.queues[0].layout == "split":
            assert (after.used_idx - before.used_idx) & 0xFFFF == 3
        else:
            assert after.used_idx != before.used_idx
        assert after.avail_idx == after.used_idx == after.last_avail_idx
        assert after.at > before.at


def test_values_of_a_busy_queue_fit_each_other(
    machine: LabMachine, attached: AttachedMachine
) -> None:
    disks = " ".join(machine.disk(name) for name in ("blk0", "iot0", "scsi0"))
    load = machine.guest.start(
        f"for disk in {disks}; do (while :; do dd if=$disk of=/dev/null bs=4k count=4000 "
        "iflag=direct; done) & done; sleep 1000"
    )
    try:
        with sampler_of(attached) as sampler:
            moves = 0
            ends = time.monotonic() + 60
            while moves < 500 and time.monotonic() < ends:
                for number in sampler.look().moved:
                    sample, fixed = sampler.latest(number), sampler.queues[number]
                    if fixed.layout == "packed" or sample.last_avail_idx is None:
                        continue
                    assert sample.avail_idx is not None
                    assert sample.used_idx is not None
                    moves += 1
                    waiting = (sample.avail_idx - sample.used_idx) & 0xFFFF
                    assert waiting <= fixed.size
                    assert (sample.last_avail_idx - sample.used_idx) & 0xFFFF <= waiting
        assert moves >= 500
    finally:
        load.kill()
        machine.guest.run("killall dd sleep")


def rings(attached: AttachedMachine) -> dict[tuple[str, int], Rings]:
    return {
        (device.info.path, queue.map.index): queue.map.rings
        for device in attached.devices()
        for queue in device.queues()
    }


def test_a_reboot_is_noticed_and_refresh_looks_at_the_new_queues(
    boot_machine: BootMachine,
) -> None:
    machine = boot_machine(MachineSpec(devices=DISKS, shared_memory=True))
    with attach(machine.name) as attached, sampler_of(attached) as sampler:
        queues, were = sampler.queues, rings(attached)
        sampler.sample()
        machine.guest.reboot()
        samples, stale = sampler.sample(), set(sampler.stale)
        sampler.refresh()
        now = rings(attached)
        # By chance a ring may be where it was: it can be read on, as it is the same to look at.
        moved = {
            number
            for number, queue in enumerate(queues)
            if were[queue.device, queue.queue] != now[queue.device, queue.queue]
        }
        assert moved
        assert moved <= stale
        assert [sample.unreadable for sample in samples] == [
            "the driver set it up anew" if number in moved else "" for number in range(len(queues))
        ]
        assert sampler.queues == queues
        assert {sample.unreadable for sample in sampler.sample()} == {""}
        assert sampler.stale == {}


def test_a_pause_is_noticed_where_it_replaces_notifiers(boot_machine: BootMachine) -> None:
    machine = boot_machine(MachineSpec(devices=(VhostUserBlk(id="vub0", relay=False),)))
    with attach(machine.name) as attached, sampler_of(attached) as sampler:
        (before,) = sampler.sample()
        assert before.kick_count == 0
        machine.qmp("stop")
        (paused,) = sampler.sample()
        assert paused.unreadable == ""
        assert (paused.avail_idx, paused.used_idx) == (before.avail_idx, before.used_idx)
        machine.qmp("cont")
        sampler.sample()
        assert sampler.stale == {0: "its notifiers were replaced"}
        sampler.refresh()
        # QEMU itself kicks the back-end that it starts.
        until(lambda: sampler.sample()[0].kick_count == 0, "the back-end reads its kick")
        assert sampler.stale == {}


def test_a_machine_that_ended_is_said_to_be_gone_and_its_memory_let_go(
    boot_machine: BootMachine,
) -> None:
    machine = boot_machine(MachineSpec(devices=(VirtioBlk(),), shared_memory=True))
    with attach(machine.name) as attached, sampler_of(attached) as sampler:
        assert sampler.mapped
        sampler.look()
        assert b"memory-backend-memfd" in our_mappings()
        machine.close()
        with pytest.raises(MachineGoneError, match=f"process {machine.pid} ended"):
            sampler.look()
        assert b"memory-backend-memfd" not in our_mappings()


def our_mappings() -> bytes:
    with open("/proc/self/maps", "rb") as file:
        return file.read()


@pytest.mark.parametrize("packed", [False, True])
def test_work_without_a_kick_is_seen_to_wait(packed: bool) -> None:
    with (
        boot_without_guest(MachineSpec(devices=(VirtioBlk(queues=2, packed=packed),))) as machine,
        Qtest(machine) as qtest,
    ):
        blk = qtest.device("blk0")
        blk.set_up(packed=packed, event_idx=True)
        # A queue that has moved proves where QEMU keeps its positions.
        blk.queues[1].publish_request()
        blk.queues[1].kick()
        blk.queues[1].wait_completed(1)
        with attach(machine.name) as attached, sampler_of(attached) as sampler:
            sampler.look()
            blk.queues[0].publish_request()
            look = sampler.look()
            assert 0 in look.moved
            assert 0 in look.waiting
            sample = sampler.latest(0)
            # Packed positions start with a wrap counter of 1 (virtio 1.4, 2.8.1); this driver's
            # requests are chains of three.
            assert sample.avail_idx == (0x8003 if packed else 1)
            assert sample.used_idx == sample.last_avail_idx == (0x8000 if packed else 0)
            assert (sample.kick_count, sample.call_count) == (0, 0)
            assert 0 in sampler.look().waiting
            attached.device("blk0").queue(0).raise_event(DeviceEvent.KICK)
            blk.queues[0].wait_completed(1)
            sampler.look()
            sample = sampler.latest(0)
            assert sample.used_idx == sample.last_avail_idx == sample.avail_idx


@pytest.mark.parametrize("packed", [False, True])
def test_a_reset_queue_is_said_to_be_reset(packed: bool) -> None:
    with (
        boot_without_guest(MachineSpec(devices=(VirtioBlk(queues=2, packed=packed),))) as machine,
        Qtest(machine) as qtest,
    ):
        blk = qtest.device("blk0")
        blk.set_up(packed=packed)
        with attach(machine.name) as attached, sampler_of(attached) as sampler:
            sampler.look()
            blk.reset()
            assert sampler.look().waiting == ()
            assert sampler.latest(1).unreadable == "the driver reset it"
            assert sampler.latest(1).avail_idx is None


@pytest.mark.timeout(600)
def test_100_looks_a_second_do_not_slow_the_guest_down(boot_machine: BootMachine) -> None:
    """In pairs, with and without in turn, so that the host's own load hits both alike."""
    devices = (VirtioBlk(id="blk0"), VhostUserBlk(id="vub0", relay=False, disk="file"))
    machine = boot_machine(MachineSpec(devices=devices))
    command = "; ".join(
        f"dd if={machine.disk(name)} of=/dev/null bs=4k count=4000 iflag=direct 2>/dev/null"
        for name in ("blk0", "vub0")
    )

    def run() -> float:
        start = time.monotonic()
        assert machine.guest.run(command, timeout=120).status == 0
        return time.monotonic() - start

    with attach(machine.name) as attached, sampler_of(attached) as sampler:
        run()
        ratios: list[float] = []
        # More pairs only where the host disturbed all but one of the first six.
        while len(ratios) < 6 or (sorted(ratios)[1] >= 1.1 and len(ratios) < 12):
            number = len(ratios)
            first_with = number % 2 == 0
            took = {}
            for sampled in (first_with, not first_with):
                stop = threading.Event()
                looks = threading.Thread(target=look_until, args=(sampler, stop))
                if sampled:
                    looks.start()
                took[sampled] = run()
                stop.set()
                if sampled:
                    looks.join()
            ratios.append(took[True] / took[False])
        print(f"time with the sampler, as a multiple: {[f'{ratio:.2f}' for ratio in ratios]}")
        # The best pair is the one that the host disturbed least.
        assert sorted(ratios)[1] < 1.1
        # No ring was stopped, and nothing was set up anew.
        assert sampler.stale == {}


def look_until(sampler: Sampler, stop: threading.Event) -> None:
    while not stop.wait(0.01):
        sampler.look()
