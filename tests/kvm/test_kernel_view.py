"""Does the kernel's own view say what fdinfo, the guest and QEMU say, and is our map the kernel's?

`KICKCALL_REPEAT` is how often guests reboot, and devices are taken from their drivers and back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kvm_by_hand
from kickcall.attached import attach
from kickcall.host.eventfds import read_eventfd
from kickcall.host.kernel.eventfds import eventfds_of
from kickcall.host.kernel.kvm import Ioeventfd, Irqfd, MsiRoute, vms_of
from kickcall.host.kernel.processes import find_task
from kickcall.host.kernel.program import open_live, open_vmcore
from kickcall.host.kernel.vhost import vhosts_of
from kickcall.lab.boot import boot
from kickcall.vmm.crashed import crashed_machine, crashed_queues
from kickcall.vmm.verify import Outcome, compare
from kickcall.vmm.wiring import wiring
from kvm_zoo import KVM_ZOO, NOTIFIERS
from witness import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.attached import AttachedMachine, AttachedQueue
    from kickcall.host.kernel.program import Kernel
    from kickcall.lab.image import GuestImage
    from kickcall.lab.machine import LabMachine
    from kickcall.vmm.kernel_view import QueueInKernel
    from kickcall.vmm.verify import Check

ROUNDS = int(os.environ.get("KICKCALL_REPEAT", "1"))
pytestmark = [pytest.mark.rig, pytest.mark.timeout(900 + 180 * ROUNDS)]
TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return open_live()


@pytest.fixture(scope="module")
def by_hand() -> Iterator[dict[str, Any]]:
    """A machine that never runs, of which all is known (tests/kvm_by_hand.py)."""
    command = [sys.executable, str(TESTS / "kvm_by_hand.py"), "-name", "guest=byhand"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.kill()


@pytest.fixture(scope="module")
def rebooting(guest_image_built: GuestImage) -> Iterator[LabMachine]:
    """A machine like the shared one, to reboot and to break up."""
    with boot(replace(KVM_ZOO, name="kernel-view"), timeout=600) as machine:
        yield machine


def seen(kernel: Kernel, machine: AttachedMachine, queue: AttachedQueue) -> QueueInKernel:
    """Return a queue as the kernel has it."""
    (found,) = machine.in_kernel([queue], kernel)
    return found


def same(checks: tuple[Check, ...]) -> set[tuple[str, int, str]]:
    return {(one.id, one.queue, one.event) for one in checks if one.outcome is Outcome.SAME}


def different(checks: tuple[Check, ...]) -> list[Check]:
    return [one for one in checks if one.outcome is Outcome.DIFFERENT]


ALL = {
    (device, queue, event)
    for device, (_, _, count) in NOTIFIERS.items()
    for queue in range(count)
    for event in ("kick", "call")
}
"""Every notifier of the machine, by who it belongs to."""


def check_by_hand(kernel: Kernel, told: dict[str, Any]) -> None:
    """Hold what is read against what tests/kvm_by_hand.py asked the kernel for."""
    machine = crashed_machine(kernel, "byhand")
    assert machine.pid == told["pid"]
    (found,) = crashed_queues(kernel, machine)
    queue, kick, call = found.queue, found.queue.kick, found.queue.call
    assert found.device == f"vhost-vsock-{told['vhost']}"
    assert (queue.index, queue.num, queue.running) == (kvm_by_hand.QUEUE, kvm_by_hand.NUM, False)
    assert queue.last_avail_idx == queue.avail_idx == kvm_by_hand.LAST_AVAIL
    assert kick is not None
    assert call is not None
    assert (kick.id, kick.count) == (told["kick"], kvm_by_hand.COUNT)
    assert (call.id, call.count) == (told["call"], kvm_by_hand.CALLS)
    assert [waiter.pid for waiter in kick.wqh] == [queue.worker]
    assert [waiter.function for waiter in call.wqh] == ["irqfd_wakeup"]
    assert set(found.ioeventfds) == {
        Ioeventfd(kvm_by_hand.MMIO, 0, None, "mmio", kick.id),
        Ioeventfd(kvm_by_hand.MMIO, 0, None, "fast-mmio", kick.id),
        Ioeventfd(kvm_by_hand.PORT, 2, kvm_by_hand.QUEUE, "pio", kick.id),
    }
    route = MsiRoute(kvm_by_hand.MSI_ADDRESS, kvm_by_hand.MSI_DATA)
    assert found.irqfds == (Irqfd(kvm_by_hand.GSI, call.id, route),)
    assert found.ring is not None
    assert (found.ring.avail_idx, found.ring.used_idx) == (
        kvm_by_hand.AVAIL_IDX,
        kvm_by_hand.USED_IDX,
    )


def test_the_kernel_has_what_was_asked_of_it(kernel: Kernel, by_hand: dict[str, Any]) -> None:
    assert kernel.types_from == "BTF"
    check_by_hand(kernel, by_hand)


def test_a_vmcore_needs_nothing_but_its_own_memory(by_hand: dict[str, Any]) -> None:
    # The running kernel in the format of a vmcore: BTF and the modules' symbols are taken from it.
    crashed = open_vmcore(Path("/proc/kcore"))
    assert crashed.types_from == "BTF"
    check_by_hand(crashed, by_hand)


@pytest.mark.parametrize(("device", "queue"), [("vscsi0", 2), ("vnet0", 1), ("iot0", 0)])
def test_a_kick_counts_alike_in_fdinfo_and_in_the_kernel(
    kernel: Kernel, attached: AttachedMachine, device: str, queue: int
) -> None:
    one = attached.device(device).queue(queue)
    before = seen(kernel, attached, one).kick
    assert before is not None
    assert before.count == one.state().kick.count  # type: ignore[union-attr]
    injection = one.kick()
    after = seen(kernel, attached, one).kick
    assert after is not None
    assert (after.id, after.address) == (before.id, before.address)
    # vhost in the kernel never drains its kick notifier; QEMU does at once.
    expected = before.count + 1 if device.startswith("v") else 0
    assert injection.before.count == before.count
    until(
        lambda: one.state().kick.count == expected,  # type: ignore[union-attr]
        "fdinfo has the count",
    )
    assert seen(kernel, attached, one).kick.count == expected  # type: ignore[union-attr]


def test_vhosts_own_index_moves_with_io(
    kernel: Kernel, attached: AttachedMachine, kvm_zoo: LabMachine
) -> None:
    queues = [attached.device("vscsi0").queue(number) for number in (2, 3)]

    def fetched() -> int:
        total = 0
        for queue in queues:
            found = seen(kernel, attached, queue).vhost
            assert found is not None
            state = queue.state()
            assert found.kind == "vhost-scsi"
            assert found.queue.num == state.size
            # At rest all that the driver published was fetched and completed.
            assert found.queue.last_avail_idx == state.avail_idx
            assert found.queue.last_used_idx == state.used_idx
            total += found.queue.last_avail_idx
        return total

    before = fetched()
    read = f"dd if={kvm_zoo.disk('vscsi0')} of=/dev/null bs=4k count=25 iflag=direct"
    assert kvm_zoo.guest.run(read, timeout=60).status == 0
    assert fetched() - before == 25


def test_who_waits_on_a_notifier_is_named(kernel: Kernel, attached: AttachedMachine) -> None:
    scsi = seen(kernel, attached, attached.device("vscsi0").queue(2))
    assert scsi.vhost is not None
    assert scsi.kick is not None
    assert scsi.call is not None
    (worker,) = scsi.kick.wqh
    assert worker.function == "vhost_poll_wakeup"
    assert worker.pid == scsi.vhost.queue.worker
    assert worker.pid is not None
    comm = Path(f"/proc/{worker.pid}/comm").read_text().strip()
    assert comm == scsi.vhost.queue.worker_comm == f"vhost-{attached.info.pid}"
    assert [waiter.who for waiter in scsi.call.wqh] == [f"KVM irqfd, gsi {scsi.irqfds[0].gsi}"]
    blk = seen(kernel, attached, attached.device("iot0").queue(0))
    assert blk.kick is not None
    assert blk.vhost is None
    assert {waiter.function for waiter in blk.kick.wqh} <= {"pollwake", "ep_poll_callback"}
    assert blk.kick.wqh


def test_the_map_is_the_kernels_on_every_device(kernel: Kernel, attached: AttachedMachine) -> None:
    checks = attached.verify(kernel)
    assert different(checks) == []
    assert same(checks) == ALL
    vhosts = vhosts_of(kernel, find_task(kernel, attached.info.pid))
    assert sorted(one.kind for one in vhosts) == [
        "vhost-net",
        "vhost-net",
        "vhost-net",
        "vhost-scsi",
        "vhost-vsock",
    ]


def test_a_map_that_is_not_the_kernels_is_found_out(
    kernel: Kernel, attached: AttachedMachine
) -> None:
    session = attached._session
    with session.borrow() as monitor:
        queues = {(one.id, one.queue): one for one in wiring(session, monitor)}
    task = find_task(kernel, session.machine.pid)
    vms, vhosts = vms_of(kernel, task), vhosts_of(kernel, task)
    assert different(compare(list(queues.values()), vms, vhosts)) == []
    for device, number in (("vscsi0", 2), ("vnet0", 0), ("vsock0", 0), ("iot0", 0), ("vub0", 0)):
        one, other = queues[device, number], queues[device, number + 1]
        for event in ("kick", "call"):
            swapped = {
                (device, number): replace(one, **{event: getattr(other, event)}),
                (device, number + 1): replace(other, **{event: getattr(one, event)}),
            }
            found = different(compare(list((queues | swapped).values()), vms, vhosts))
            named = {(check.id, check.queue, str(check.event)) for check in found}
            if (device, event) == ("vsock0", "call"):
                # Both queues share a vector: the interrupts are alike, and vhost's word tells.
                assert all("vhost calls with" in check.says for check in found)
            assert {(device, number, event), (device, number + 1, event)} <= named
        assert one.message is not None
        moved = replace(one.message, data=one.message.data ^ 1)
        altered = queues | {(device, number): replace(one, message=moved)}
        (wrong,) = different(compare(list(altered.values()), vms, vhosts))
        assert (wrong.id, wrong.queue, str(wrong.event)) == (device, number, "call")
        assert f"{moved.data:#x}" in wrong.says


@pytest.mark.long
def test_the_map_stays_the_kernels_over_reboots_and_resets(
    kernel: Kernel, rebooting: LabMachine
) -> None:
    with attach(rebooting.name, timeout=60.0) as machine:
        for _ in range(ROUNDS):
            rebooting.guest.reboot(timeout=300)
            machine.refresh()
            checks = machine.verify(kernel)
            assert different(checks) == []
            assert same(checks) == ALL
            for device in rebooting.spec.devices:
                address = f"0000:00:{device.slot:02x}.0"
                driver = "/sys/bus/pci/drivers/virtio-pci"
                assert rebooting.guest.run(f"echo {address} >{driver}/unbind", timeout=60) == (
                    0,
                    "",
                )
                machine.refresh()
                checks = machine.verify(kernel)
                assert different(checks) == []
                assert same(checks) == {one for one in ALL if one[0] != device.id}
                assert rebooting.guest.run(f"echo {address} >{driver}/bind", timeout=60) == (0, "")
            machine.refresh()
            checks = machine.verify(kernel)
            assert different(checks) == []
            assert same(checks) == ALL


def kickcall(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    command = [sys.executable, "-m", "kickcall", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_commands_print_it(kvm_zoo: LabMachine) -> None:
    verified = kickcall("eventfd", kvm_zoo.name, "--verify")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert f"{kvm_zoo.name}: 0 differences; {len(ALL)} notifiers" in verified.stdout
    shown = kickcall("eventfd", kvm_zoo.name, "vscsi0", "--queue", "2", "--kernel", "--json")
    assert shown.returncode == 0, shown.stderr
    (queue,) = json.loads(shown.stdout)["queues"]
    fdinfo = read_eventfd(kvm_zoo.pid, queue["kick"]["fd"])
    assert fdinfo is not None
    assert queue["kick"]["count"] == queue["kick"]["eventfd_ctx"]["count"] == fdinfo.count
    assert queue["kick"]["eventfd_ctx"]["id"] == fdinfo.eventfd_id
    assert queue["vhost"]["kind"] == "vhost-scsi"
    text = kickcall("eventfd", kvm_zoo.name, "vscsi0", "--queue", "2", "--kernel")
    assert f"count = {fdinfo.count}," in text.stdout
    for word in ("kref = ", "wqh = { vhost_poll_wakeup", "flags = ", "id = ", "last_avail_idx = "):
        assert word in text.stdout


def test_our_own_eventfds_are_read_without_any_machine(kernel: Kernel) -> None:
    fd = os.eventfd(7)
    try:
        task = find_task(kernel, os.getpid())
        assert eventfds_of(kernel, task, [fd])[fd].count == 7
        os.eventfd_write(fd, 5)
        found = eventfds_of(kernel, task, [fd, 0])
        assert set(found) == {fd}
        assert (found[fd].count, found[fd].kref, found[fd].wqh) == (12, 1, ())
    finally:
        os.close(fd)
