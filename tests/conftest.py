"""Which machines do tests share, and how does a test get one of its own?

    def test_…(boot_machine):
        machine = boot_machine(MachineSpec(devices=(VirtioBlk(queues=2),)))

Machines are real (2 to 4 s each) and are taken down by their pids, also when a test fails.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

import pytest

from kickcall.lab.boot import boot
from kickcall.lab.image import GuestImage, guest_image
from kickcall.lab.spec import (
    MachineSpec,
    OtherDevice,
    VhostUserBlk,
    VirtioBlk,
    VirtioNet,
    VirtioScsi,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kickcall.lab.machine import LabMachine


class BootMachine(Protocol):
    """Boots a machine that is taken down when the test ends."""

    def __call__(self, spec: MachineSpec, *, wait: bool = True) -> LabMachine: ...


MIXED = MachineSpec(
    devices=(
        VirtioBlk(id="blk0", queues=2),
        VirtioBlk(id="iot0", queues=2, iothread=True),
        VirtioBlk(id="packed0", queues=2, packed=True, legacy="off"),
        VirtioScsi(id="scsi0", queues=2),
        VirtioScsi(id="scsipk0", queues=2, packed=True, legacy="off"),
        VirtioNet(id="net0"),
        VhostUserBlk(id="vub0", queues=2, relay=True, disk="file"),
        VhostUserBlk(id="direct0", queues=1, relay=False),
        OtherDevice(id="rng0", driver="virtio-rng-pci"),
    ),
    monitors=2,
)
"""Every kind of device and layout that kickcall names; `iot0` is served by an iothread."""


@pytest.fixture(scope="session", autouse=True)
def journal_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests inject by the hundred: into a journal of their own."""
    path = tmp_path_factory.mktemp("journal") / "journal.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KICKCALL_JOURNAL", str(path))
        yield path


@pytest.fixture(scope="session")
def guest_image_built() -> GuestImage:
    """The guest image, downloaded and built if this is the first run."""
    return guest_image()


@pytest.fixture
def boot_machine(guest_image_built: GuestImage) -> Iterator[BootMachine]:
    with contextlib.ExitStack() as booted:

        def boot_one(spec: MachineSpec, *, wait: bool = True) -> LabMachine:
            return booted.enter_context(boot(spec, wait=wait))

        yield boot_one


@pytest.fixture(scope="session")
def mixed_machine(guest_image_built: GuestImage) -> Iterator[LabMachine]:
    """A machine with a device of every kind (`MIXED`), shared by all tests of a session.

    Leave it as you found it: do not reboot, unplug or pause it, and let no fault wait.
    """
    with boot(MIXED) as machine:
        yield machine
