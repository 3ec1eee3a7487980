"""What has KVM been told to do for a machine's kicks and calls? (virt/kvm/eventfd.c)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kickcall.host.kernel.eventfds import read_eventfd_id
from kickcall.host.kernel.processes import open_files
from kickcall.host.kernel.program import bounded, reading

if TYPE_CHECKING:
    from kickcall.host.kernel.program import Kernel

_NAME = "kvm-vm"
_ROUTING_MSI = 2
"""KVM_IRQ_ROUTING_MSI (include/uapi/linux/kvm.h)."""
_BUSES = {
    "KVM_MMIO_BUS": "mmio",
    "KVM_PIO_BUS": "pio",
    "KVM_VIRTIO_CCW_NOTIFY_BUS": "ccw",
    "KVM_FAST_MMIO_BUS": "fast-mmio",
}


@dataclass(frozen=True, slots=True)
class Ioeventfd:
    """A `struct _ioeventfd`: a write of the guest that KVM turns into a signal of an eventfd."""

    address: int
    """Guest-physical, or an I/O port."""
    length: int
    """Bytes of the write; 0 for any."""
    datamatch: int | None
    """The value that must be written; None for any."""
    bus: str
    """`mmio`, `fast-mmio`, `pio`, `ccw`."""
    eventfd_id: int | None


@dataclass(frozen=True, slots=True)
class MsiRoute:
    """The message that an interrupt is."""

    address: int
    data: int


@dataclass(frozen=True, slots=True)
class Irqfd:
    """A `struct kvm_kernel_irqfd`: an eventfd whose signal KVM turns into an interrupt."""

    gsi: int
    eventfd_id: int | None
    msi: MsiRoute | None
    """None where the gsi is no message: a pin, or not routed."""


@dataclass(frozen=True, slots=True)
class KernelVm:
    """A `struct kvm`."""

    fd: int
    ioeventfds: tuple[Ioeventfd, ...]
    irqfds: tuple[Irqfd, ...]


def vms_of(kernel: Kernel, task: Any) -> tuple[KernelVm, ...]:
    """Return the virtual machines that a process has made with KVM: one for QEMU, none for TCG."""
    return tuple(
        _read_vm(kernel, file.fd, file.private)
        for file in open_files(kernel, task)
        if file.anonymous and file.name == _NAME and file.private
    )


def _read_vm(kernel: Kernel, fd: int, address: int) -> KernelVm:
    import drgn
    from drgn.helpers.linux.list import list_for_each_entry

    with reading("KVM's record of a machine"):
        vm = drgn.Object(kernel.program, "struct kvm", address=address)
        buses = {
            value: _BUSES.get(name, name)
            for name, value in kernel.program.type("enum kvm_bus").enumerators
        }
        ioeventfds = tuple(
            Ioeventfd(
                address=int(one.addr),
                length=int(one.length),
                datamatch=None if one.wildcard else int(one.datamatch),
                bus=buses.get(int(one.bus_idx), str(int(one.bus_idx))),
                eventfd_id=read_eventfd_id(kernel, one.eventfd),
            )
            for one in bounded(
                list_for_each_entry("struct _ioeventfd", vm.ioeventfds.address_of_(), "list"),
                "ioeventfds",
            )
        )
        irqfds = tuple(
            Irqfd(int(one.gsi), read_eventfd_id(kernel, one.eventfd), _route(vm, int(one.gsi)))
            for one in bounded(
                list_for_each_entry(
                    "struct kvm_kernel_irqfd", vm.irqfds.items.address_of_(), "list"
                ),
                "irqfds",
            )
        )
        return KernelVm(fd, ioeventfds, irqfds)


def _route(vm: Any, gsi: int) -> MsiRoute | None:
    """Return the message of a gsi, by the table that KVM delivers with (virt/kvm/irqchip.c)."""
    from drgn.helpers.linux.list import hlist_for_each_entry

    table = vm.irq_routing
    if not table or not 0 <= gsi < int(table.nr_rt_entries):
        return None
    entries = hlist_for_each_entry(
        "struct kvm_kernel_irq_routing_entry", table.map[gsi].address_of_(), "link"
    )
    for entry in bounded(entries, "interrupt routes"):
        if int(entry.type) == _ROUTING_MSI:
            message = entry.msi
            address = int(message.address_hi) << 32 | int(message.address_lo)
            return MsiRoute(address, int(message.data))
    return None
