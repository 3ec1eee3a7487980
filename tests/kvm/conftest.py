"""Which machine do the tests on a KVM host share?

They need root, KVM and vhost; `make kvm` runs them in the lab's own host where this machine has
not that. Outside they fail, in one line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.lab.boot import boot
from kvm_zoo import KVM_ZOO, NETS, know_each_other, missing, on_one_processor
from witness import watch_queues

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.attached import AttachedMachine
    from kickcall.lab.image import GuestImage
    from kickcall.lab.machine import LabMachine

BOOT_TIMEOUT = 300.0
"""Seconds. Under TCG on a busy machine a guest takes its time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    what = missing()
    if what and any("tests/kvm" in str(item.path) for item in items):
        raise pytest.UsageError(
            f"tests/kvm runs on a KVM host, and this machine has not {what}: make kvm"
        )


@pytest.fixture(scope="session")
def kvm_zoo(guest_image_built: GuestImage) -> Iterator[LabMachine]:
    """A machine with all of `KVM_ZOO`, under KVM. Leave it as you found it."""
    with boot(KVM_ZOO, timeout=BOOT_TIMEOUT) as machine:
        watch_queues(machine)
        for net in NETS:
            know_each_other(machine, net)
            on_one_processor(machine, net)
        yield machine


@pytest.fixture
def attached(kvm_zoo: LabMachine) -> Iterator[AttachedMachine]:
    with attach(kvm_zoo.name, timeout=60.0) as machine:
        yield machine
