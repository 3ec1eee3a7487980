"""Are a queue's interrupt switches and threads told as they are on a real machine?"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.diagnose.states import ThreadState
from kickcall.lab.boot import boot
from kickcall.lab.spec import MachineSpec, VhostUserBlk, VirtioBlk, VirtioNet
from kickcall.vmm.interrupts import interrupt_path
from kickcall.vmm.slow_facts import slow_facts
from zoo import QEMUS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.diagnose.states import SlowFacts
    from kickcall.lab.machine import LabMachine

pytestmark = pytest.mark.rig

SPEC = MachineSpec(
    devices=(
        VirtioBlk(id="blk0", queues=2, slot=2),
        VirtioBlk(id="iot0", queues=1, iothread=True, slot=3),
        VirtioNet(id="net0", slot=4),
        VhostUserBlk(id="vub0", relay=False, slot=5),
        VirtioBlk(id="slow0", options=("ioeventfd=off",), slot=6),
    ),
    monitors=2,
)


@pytest.fixture(scope="module", params=QEMUS)
def machine(request: pytest.FixtureRequest, guest_image_built: object) -> Iterator[LabMachine]:
    with boot(dataclasses.replace(SPEC, qemu=request.param)) as booted:
        yield booted


def facts(machine: LabMachine, device: str, queue: int = 0) -> SlowFacts:
    with attach(machine.name) as attached:
        session = attached._session
        with session.borrow() as monitor:
            return slow_facts(session, attached.device(device)._mapped, queue, monitor)


def table_entry(machine: LabMachine, slot: int, vector: int) -> int:
    """Return the address of a vector's control word: BAR 1, where QEMU has virtio's table."""
    lines = machine.guest.run(f"cat /sys/bus/pci/devices/0000:00:{slot:02x}.0/resource").output
    return int(lines.splitlines()[1].split()[0], 16) + 16 * vector + 12


def test_a_healthy_queue_has_no_obstacle(machine: LabMachine) -> None:
    found = facts(machine, "blk0", 1)
    assert (found.vm_running, found.run_state) == (True, "running")
    assert (found.driver_ok, found.broken) == (True, False)
    assert (
        found.interrupts.msix_enabled,
        found.interrupts.function_masked,
        found.interrupts.bus_master,
    ) == (True, False, True)
    # Linux gives vector 0 to configuration changes, then one to each queue, and switches INTx off.
    assert (
        found.interrupts.vector,
        found.interrupts.vector_masked,
        found.interrupts.vector_pending,
    ) == (2, False, False)
    assert found.interrupts.intx_disabled is True
    assert found.kick_holders is None
    assert len(found.vcpu_threads) == machine.spec.cpus


def test_a_queue_without_a_vector_has_none(machine: LabMachine) -> None:
    # Linux polls the control queue.
    assert facts(machine, "net0", 2).interrupts.vector is None


def test_the_main_loop_or_the_iothread_serves_a_queue(machine: LabMachine) -> None:
    (main,) = facts(machine, "blk0").backend_threads
    (iothread,) = facts(machine, "iot0").backend_threads
    assert (main.pid, main.tid) == (machine.pid, machine.pid)
    told = {entry["id"]: entry["thread-id"] for entry in machine.qmp("query-iothreads")}
    if machine.spec.qemu == "system":
        assert iothread.tid == told["iot0-iothread"]
    assert iothread.tid != main.tid
    assert facts(machine, "slow0").backend_threads == ()


def test_a_masked_vector_is_seen(machine: LabMachine) -> None:
    address = table_entry(machine, 3, vector=1)
    try:
        machine.guest.run(f"devmem {address:#x} 32 1")
        found = facts(machine, "iot0")
        assert (found.interrupts.vector, found.interrupts.vector_masked) == (1, True)
        # To read the pending bits would make QEMU take the vector's call.
        assert found.interrupts.vector_pending is None
    finally:
        machine.guest.run(f"devmem {address:#x} 32 0")
    assert facts(machine, "iot0").interrupts.vector_masked is False


def test_a_masked_function_is_seen(machine: LabMachine) -> None:
    config = "/sys/bus/pci/devices/0000:00:03.0/config"
    at = msix_control(machine, config)
    raw = machine.guest.run(f"xxd -s {at} -l 1 -p {config}").output.strip()
    flags = int(raw, 16)
    try:
        write_config(machine, config, at, flags | 0x40)  # bit 14 of Message Control
        assert facts(machine, "iot0").interrupts.function_masked is True
    finally:
        write_config(machine, config, at, flags)
    assert facts(machine, "iot0").interrupts.function_masked is False


def msix_control(machine: LabMachine, config: str) -> int:
    """Return the offset of the upper byte of Message Control."""
    raw = bytes.fromhex(machine.guest.run(f"xxd -p -l 256 {config} | tr -d '\\n'").output.strip())
    at = raw[0x34]
    while raw[at] != 0x11:
        at = raw[at + 1]
    return at + 3


def write_config(machine: LabMachine, config: str, at: int, value: int) -> None:
    machine.guest.run(
        f"printf '\\{value:03o}' | dd of={config} bs=1 seek={at} count=1 conv=notrunc 2>/dev/null"
    )


def test_a_stopped_back_end_is_seen(machine: LabMachine) -> None:
    pid = machine.backend_pid("vub0")
    before = facts(machine, "vub0")
    assert before.kick_holders == 1
    # The storage daemon polls its few descriptors without an epoll set (util/fdmon-poll.c).
    assert before.kick_polled is not False
    assert {thread.pid for thread in before.backend_threads} == {pid}
    assert ThreadState.STOPPED not in {thread.state for thread in before.backend_threads}
    os.kill(pid, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 60
        states: set[ThreadState] = set()
        while states != {ThreadState.STOPPED} and time.monotonic() < deadline:
            states = {thread.state for thread in facts(machine, "vub0").backend_threads}
        assert states == {ThreadState.STOPPED}
    finally:
        os.kill(pid, signal.SIGCONT)


def test_bus_mastering_off_is_seen(machine: LabMachine) -> None:
    """Last: QEMU takes DRIVER_OK from a virtio device that loses it (hw/virtio/virtio-pci.c,
    virtio_write_config), and the driver does not know.
    """
    config = "/sys/bus/pci/devices/0000:00:06.0/config"
    write_config(machine, config, 4, 0x03)
    with attach(machine.name) as attached:
        session = attached._session
        device = next(one for one in session.devices if one.device.id == "slow0")
        with session.borrow() as monitor:
            assert interrupt_path(session, monitor, device, 0).bus_master is False
    assert facts(machine, "blk0").interrupts.bus_master is True


def test_without_ecam_only_what_is_memory_is_told(guest_image_built: object) -> None:
    spec = MachineSpec(devices=(VirtioBlk(id="blk0", slot=4),), arguments=("-M", "pc"))
    with boot(spec) as machine:
        found = facts(machine, "blk0")
        assert (
            found.interrupts.msix_enabled,
            found.interrupts.function_masked,
            found.interrupts.intx_disabled,
        ) == (None,) * 3
        assert (
            found.interrupts.vector,
            found.interrupts.vector_masked,
            found.interrupts.vector_pending,
        ) == (1, False, False)
        assert found.interrupts.bus_master is True
        write_config(machine, "/sys/bus/pci/devices/0000:00:04.0/config", 4, 0x03)
        with attach(machine.name) as attached:
            session = attached._session
            with session.borrow() as monitor:
                (device,) = session.devices
                assert interrupt_path(session, monitor, device, 0).bus_master is False
