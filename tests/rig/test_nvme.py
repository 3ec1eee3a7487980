"""Are NVMe queues kicked with the tail that the driver published, and called by their vector?"""

from __future__ import annotations

import os
import re
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.errors import (
    EventNotSupportedError,
    QueueNotFoundError,
    QueueNotReadyError,
    StaleMapError,
)
from kickcall.host import eventfds
from kickcall.host.processes import Process
from kickcall.lab.boot import boot
from kickcall.lab.spec import MachineSpec, OtherDevice
from kickcall.model import Via
from witness import (
    STOP_IO,
    StoppedMainThread,
    counted_after,
    kernel_complaints,
    never,
    nvme_interrupts,
    until,
)
from zoo import QEMUS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.attached import AttachedMachine, AttachedPciDevice
    from kickcall.lab.image import GuestImage
    from kickcall.lab.machine import LabMachine

pytestmark = pytest.mark.rig

INJECTIONS = int(os.environ.get("KICKCALL_INJECTIONS", "8"))
_EVENTS = ("pci_nvme_shadow_doorbell_sq", "pci_nvme_update_sq_tail")
"""QEMU takes a tail from its shadow doorbell: what 7.2 calls that, and what 10.0 does."""
_LOOKED = re.compile(rf"^(?:{'|'.join(_EVENTS)}) sqid (\d+) ", re.M)


def controllers(*options: str) -> tuple[tuple[OtherDevice, ...], tuple[str, ...]]:
    """Return a controller with each of `options`, and the arguments for a disk behind each."""
    devices, arguments = [], []
    for number, option in enumerate(options):
        name = f"nvme{number}"
        devices.append(OtherDevice(id=name, driver="nvme", options=(f"serial={name}", option)))
        disk = f"driver=null-co,node-name=disk{number},size={64 << 20},read-zeroes=on"
        arguments += ["-blockdev", disk, "-device", f"nvme-ns,bus={name},drive=disk{number}"]
    return tuple(devices), tuple(arguments)


@pytest.fixture(scope="module", params=QEMUS)
def machine(request: pytest.FixtureRequest, guest_image_built: GuestImage) -> Iterator[LabMachine]:
    """`nvme0` has eventfds at its doorbells, `nvme1` has not: QEMU's default."""
    devices, arguments = controllers("ioeventfd=on", "ioeventfd=off")
    spec = MachineSpec(qemu=request.param, devices=devices, arguments=arguments, monitors=2)
    with boot(spec) as booted:
        for event in _EVENTS:
            line = f"trace-event {event} on"
            booted.qmp("human-monitor-command", {"command-line": line})
        yield booted


@pytest.fixture
def attached(machine: LabMachine) -> Iterator[AttachedMachine]:
    with attach(machine.name) as one:
        yield one


def looked_at(machine: LabMachine, since: int) -> list[int]:
    """Return whose tail QEMU took from its shadow doorbell, by the log from `since` on."""
    text = (machine.folder / "qemu.log").read_bytes()[since:].decode(errors="replace")
    return [int(number) for number in _LOOKED.findall(text)]


def is_as_before(machine: LabMachine) -> bool:
    stubs = [one for one in machine.qmp("query-chardev") if one["label"] == "gdb"]
    return bool(machine.qmp("query-status")["running"]) and not stubs


def test_every_queue_of_the_driver_is_known(attached: AttachedMachine) -> None:
    # Linux: a pair of I/O queues for each of the two processors, and the admin queues.
    for name in ("nvme0", "nvme1"):
        device = attached.pci_device(name)
        assert device.kind == "NVMe"
        assert device.queues() == {0: "admin", 1: "I/O", 2: "I/O"}


@pytest.mark.parametrize(("name", "number"), [("nvme0", 0), ("nvme1", 2)])
def test_a_call_is_the_interrupt_of_that_completion_queue(
    machine: LabMachine, attached: AttachedMachine, name: str, number: int
) -> None:
    before = nvme_interrupts(machine)
    result = attached.pci_device(name).call(number, allow_pause=True)
    after = counted_after(partial(nvme_interrupts, machine), before)
    assert after - before == Counter({f"{name}q{number}": 1})
    assert result.via is Via.MMIO
    assert is_as_before(machine)


@pytest.mark.parametrize(("name", "via"), [("nvme0", Via.EVENTFD), ("nvme1", Via.MMIO)])
def test_a_kick_makes_the_controller_look_at_the_tail(
    machine: LabMachine, attached: AttachedMachine, name: str, via: Via
) -> None:
    since = (machine.folder / "qemu.log").stat().st_size
    result = attached.pci_device(name).kick(2, allow_pause=True)
    until(lambda: looked_at(machine, since), f"QEMU looks at queue 2 of {name}")
    assert set(looked_at(machine, since)) == {2}
    assert result.via is via
    assert is_as_before(machine)


def test_a_kick_that_was_lost_is_made_up_for(
    machine: LabMachine, attached: AttachedMachine
) -> None:
    device = attached.pci_device("nvme0")
    notifiers = doorbell_eventfds(device)
    # A loop and no sleep: the guest's timers stand still with QEMU's main thread.
    reader = machine.guest.start(
        "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; "
        "taskset -c 0 dd if=/dev/nvme0n1 of=/dev/null bs=4k count=1 iflag=direct"
    )
    with Process(machine.pid) as process, StoppedMainThread(machine):
        rung: list[int] = []

        def rings() -> bool:
            states = eventfds.eventfds_of(machine.pid)
            rung[:] = [number for number, fd in notifiers.items() if states[fd].count]
            return bool(rung)

        until(rings, "the guest rings a doorbell of nvme0")
        ours = process.duplicate_fd(notifiers[rung[0]])
        os.read(ours, 8)
        os.close(ours)
    never(lambda: reader.done, "the kick was not lost")
    device.kick(rung[0])
    assert reader.wait(timeout=60).status == 0


def doorbell_eventfds(device: AttachedPciDevice) -> dict[int, int]:
    """Return the descriptors that QEMU's doorbells signal, by queue, as a dry run names them."""
    found = {}
    for number in (1, 2):
        target = device.kick(number, dry_run=True).target
        named = re.search(r"\(fd (\d+) ", target)
        assert named is not None, target
        found[number] = int(named[1])
    return found


def test_what_only_the_driver_knows_is_refused(attached: AttachedMachine) -> None:
    device = attached.pci_device("nvme1")
    with pytest.raises(EventNotSupportedError, match="known to the driver alone"):
        device.kick(0, allow_pause=True)
    with pytest.raises(QueueNotFoundError, match="no submission queue 3: it has 0, 1, 2"):
        device.kick(3, allow_pause=True)
    with pytest.raises(QueueNotFoundError, match="no completion queue 3"):
        device.call(3, allow_pause=True)


def test_a_controller_that_was_let_go_of_is_refused(
    machine: LabMachine, attached: AttachedMachine
) -> None:
    driver = "/sys/bus/pci/drivers/nvme"
    address = machine.address("nvme1")
    device = attached.pci_device("nvme1")
    device.kick(1, dry_run=True, allow_pause=True)
    assert machine.guest.run(f"echo {address} > {driver}/unbind").status == 0
    try:
        with pytest.raises(QueueNotReadyError, match="has shut the controller down"):
            attached.pci_device("nvme1").call(1, allow_pause=True)
    finally:
        assert machine.guest.run(f"echo {address} > {driver}/bind").status == 0
        until(
            lambda: machine.guest.run("test -b /dev/nvme1n1").status == 0,
            "the guest has nvme1 again",
        )


def test_a_busy_machine_stands_every_injection(
    machine: LabMachine, attached: AttachedMachine
) -> None:
    complaints = kernel_complaints(machine)
    machine.guest.run("rm -f /run/stop-io")
    readers = [
        machine.guest.start(
            f"while [ ! -e /run/stop-io ]; do taskset -c {cpu} "
            f"dd if=/dev/{name}n1 of=/dev/null bs=4k count=100 iflag=direct || exit 1; done"
        )
        for cpu, name in enumerate(("nvme0", "nvme1"))
    ]
    kinds = [("nvme0", "kick"), ("nvme0", "call"), ("nvme1", "call"), ("nvme1", "kick")]
    written: Counter[tuple[str, str]] = Counter()
    for number in range(INJECTIONS if INJECTIONS <= 10 else INJECTIONS * len(kinds)):
        name, event = kinds[number % len(kinds)]
        try:
            attached.device_event(name, event, 1 + number // len(kinds) % 2, allow_pause=True)
            written[name, event] += 1
        except StaleMapError as moved:
            # The driver went on between our look at its tail and the pause: that is no tail now.
            assert (name, event) == ("nvme1", "kick"), moved
    machine.guest.run(STOP_IO)
    for reader in readers:
        status, output = reader.wait(timeout=300)
        assert status == 0, output
    assert kernel_complaints(machine) == complaints
    assert is_as_before(machine)
    assert set(written) >= {*kinds[:3]}
