"""Is an assigned device called through the eventfd that the host's kernel signals for it?

Runs on a host with an IOMMU and a device to give away: `kickcall lab host run --assignable`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.errors import EventNotSupportedError
from kickcall.host.kernel.kvm import vms_of
from kickcall.host.kernel.processes import find_task
from kickcall.host.kernel.program import open_live
from kickcall.lab.boot import boot
from kickcall.lab.host import ASSIGNABLE
from kickcall.lab.spec import MachineSpec
from kickcall.model import Via
from witness import STOP_IO, counted_after, kernel_complaints, nvme_interrupts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.attached import AttachedMachine
    from kickcall.lab.image import GuestImage
    from kickcall.lab.machine import LabMachine

BOOT_TIMEOUT = 300.0
INJECTIONS = int(os.environ.get("KICKCALL_INJECTIONS", "10"))


@pytest.fixture(scope="module")
def machine(guest_image_built: GuestImage) -> Iterator[LabMachine]:
    """A guest that has the host's NVMe controller as its own."""
    device = Path("/sys/bus/pci/devices") / ASSIGNABLE
    (device / "driver_override").write_text("vfio-pci")
    Path("/sys/bus/pci/drivers_probe").write_text(ASSIGNABLE)
    assert (device / "driver").resolve().name == "vfio-pci", "this host has no IOMMU"
    given = ("-device", f"vfio-pci,host={ASSIGNABLE},id=given0,addr=0x8")
    with boot(MachineSpec(monitors=2, arguments=given), timeout=BOOT_TIMEOUT) as booted:
        yield booted


@pytest.fixture
def attached(machine: LabMachine) -> Iterator[AttachedMachine]:
    with attach(machine.name, timeout=60.0) as one:
        yield one


def taken(machine: LabMachine, before: Counter[str]) -> Counter[str]:
    """Return what the guest has taken since."""
    return counted_after(partial(nvme_interrupts, machine), before) - before


@pytest.mark.parametrize("vector", [0, 1, 2])
def test_the_eventfd_of_a_vector_raises_exactly_its_interrupt(
    machine: LabMachine, attached: AttachedMachine, vector: int
) -> None:
    before = nvme_interrupts(machine)
    result = attached.pci_device("given0").call(vector)
    assert taken(machine, before) == Counter({f"nvme0q{vector}": 1})
    assert (result.via, result.pause_ms) == (Via.EVENTFD, None)
    assert "which KVM turns into" in result.target


def test_kvm_routes_that_eventfd_to_the_message_of_the_devices_own_table(
    attached: AttachedMachine,
) -> None:
    kernel = open_live()
    task = find_task(kernel, attached.info.pid, attached.info.start_time)
    routed = {
        irqfd.eventfd_id: irqfd.msi
        for vm in vms_of(kernel, task)
        for irqfd in vm.irqfds
        if irqfd.msi is not None
    }
    device = attached.pci_device("given0")
    for vector in (0, 1, 2):
        by_eventfd = device.raise_event("call", vector, via="eventfd", dry_run=True)
        by_message = device.raise_event("call", vector, via="mmio", dry_run=True)
        assert by_eventfd.eventfd_id is not None
        message = routed[by_eventfd.eventfd_id]
        assert by_message.target.endswith(f"{message.data:#x} to {message.address:#x}")


def test_its_message_can_be_written_where_a_pause_is_allowed(
    machine: LabMachine, attached: AttachedMachine
) -> None:
    before = nvme_interrupts(machine)
    result = attached.pci_device("given0").raise_event("call", 1, via="mmio")
    assert taken(machine, before) == Counter({"nvme0q1": 1})
    assert result.pause_ms is not None


def test_what_its_driver_alone_knows_or_did_not_ask_for_is_refused(
    attached: AttachedMachine,
) -> None:
    device = attached.pci_device("given0")
    with pytest.raises(EventNotSupportedError, match="known to its driver alone"):
        device.kick(1, allow_pause=True)
    with pytest.raises(EventNotSupportedError, match=r"eventfd: .* masked"):
        device.call(5)


def test_show_names_the_way(machine: LabMachine) -> None:
    words = [sys.executable, "-m", "kickcall", "show", machine.name]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "vfio-pci, PCI 00:08.0" in shown
    assert "eventfd" in shown


def test_a_busy_device_stands_calls(machine: LabMachine, attached: AttachedMachine) -> None:
    before = kernel_complaints(machine)
    machine.guest.run("rm -f /run/stop-io")
    reader = machine.guest.start(
        "while [ ! -e /run/stop-io ]; do "
        "dd if=/dev/nvme0n1 of=/dev/null bs=4k count=20 iflag=direct || exit 1; done"
    )
    device = attached.pci_device("given0")
    for number in range(INJECTIONS):
        device.call(1 + number % 2)
    machine.guest.run(STOP_IO)
    status, output = reader.wait(timeout=120)
    assert status == 0, output
    assert kernel_complaints(machine) == before
