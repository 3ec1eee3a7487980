"""Is a ring read only where its bytes mean what the specification says?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from kickcall.model import BackendKind, Device, Layout, QueueMap, Rings
from kickcall.vmm.guest_memory import GuestMemory, RamRange
from kickcall.vmm.observe import locate
from kickcall.vmm.session import MappedDevice
from kickcall.vmm.virtio import DeviceFacts

QUEUE = QueueMap(0, Rings(0x1000, 0x2000, 0x3000, 256), Layout.SPLIT, None, None, 0x7F0000000000)
MODERN = frozenset({"VIRTIO_F_VERSION_1"})


def located(program: str, features: frozenset[str]) -> str:
    """Return why a queue is not read on a machine of `program`; empty where it is."""
    path = "/machine/peripheral/blk0"
    kind = "virtio-blk-device"
    device = Device(path, kind, BackendKind.QEMU, 1, features, True, False, False)
    session = SimpleNamespace(
        machine=SimpleNamespace(command=(program,)),
        memory=GuestMemory([RamRange(0, 0x7F1000000000, 1 << 20)]),
        has_iommu=False,
    )
    mapped = MappedDevice(DeviceFacts(path, device, {}), None)
    return locate(cast("Any", session), mapped, QUEUE)[1]


@pytest.mark.parametrize(
    ("program", "features"),
    [
        ("/usr/bin/qemu-system-x86_64", frozenset()),
        ("/usr/bin/qemu-system-aarch64", frozenset()),
        ("/usr/bin/qemu-system-s390x", MODERN),
        ("qemu-kvm", frozenset()),
    ],
)
def test_little_endian_rings_are_read(program: str, features: frozenset[str]) -> None:
    assert located(program, features) == ""


def test_legacy_rings_of_a_big_endian_guest_are_not_read() -> None:
    # virtio 1.4, 2.6.3: legacy fields have the guest's own byte order.
    assert "may be big-endian: not read" in located("/usr/bin/qemu-system-s390x", frozenset())
