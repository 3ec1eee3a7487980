"""Is a difference between our map and the kernel's found and named, and nothing else taken for one?

Addresses, lengths and messages as a guest of QEMU 7.2 had them on a host with Linux 6.1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from kickcall.host.kernel.eventfds import KernelEventfd
from kickcall.host.kernel.kvm import Ioeventfd, Irqfd, KernelVm, MsiRoute
from kickcall.host.kernel.vhost import KernelVhost, KernelVhostQueue
from kickcall.model import DeviceEvent
from kickcall.vmm.verify import Outcome, compare
from kickcall.vmm.wiring import Doorbell, Message, QueueWiring

if TYPE_CHECKING:
    from collections.abc import Sequence

SAME, DIFFERENT, NOT_COMPARABLE = Outcome.SAME, Outcome.DIFFERENT, Outcome.NOT_COMPARABLE

QUEUE = QueueWiring(
    device="/machine/peripheral/vscsi0",
    id="vscsi0",
    queue=2,
    kick=45,
    call=53,
    doorbells=(
        Doorbell("mmio", 0xFEBE3008, (0, 2), None),
        Doorbell("pio", 0xC190, (2,), 2),
    ),
    no_doorbell="",
    message=Message(3, 0xFEE00000, 0x26, False),
    no_message="",
)
MMIO = Ioeventfd(0xFEBE3008, 0, None, "mmio", 45)
IOEVENTFDS = (
    MMIO,
    replace(MMIO, bus="fast-mmio"),
    Ioeventfd(0xC190, 2, 2, "pio", 45),
    # The other queues of the device: the same port, other values.
    Ioeventfd(0xC190, 2, 0, "pio", 42),
    Ioeventfd(0xFEBE3000, 0, None, "mmio", 42),
)
IRQFD = Irqfd(29, 53, MsiRoute(0xFEE00000, 0x26))
VM = KernelVm(12, IOEVENTFDS, (IRQFD, Irqfd(27, 51, MsiRoute(0xFEE00000, 0x29))))


def context(number: int) -> KernelEventfd:
    return KernelEventfd(0xFFFF8C8E09132540, 4, (), 0, 0o2004000, number)


def vhost(kick: int, call: int) -> tuple[KernelVhost, ...]:
    queue = KernelVhostQueue(
        index=2,
        num=128,
        last_avail_idx=198,
        avail_idx=198,
        last_used_idx=198,
        used_flags=0,
        signalled_used=198,
        signalled_used_valid=True,
        features=0,
        running=True,
        kick=context(kick),
        call=context(call),
        worker=12773,
        worker_comm="vhost-12712",
        desc=0,
        avail=0,
        used=0,
    )
    return (KernelVhost(36, "vhost-scsi", (queue,)),)


def outcomes(
    queue: QueueWiring = QUEUE,
    vm: KernelVm | None = VM,
    vhosts: Sequence[KernelVhost] = (),
    command: Sequence[str] = (),
) -> tuple[tuple[Outcome, str], tuple[Outcome, str]]:
    """Return what is said of the kick and of the call of one queue."""
    kick, call = compare([queue], [vm] if vm else [], vhosts, command)
    assert (kick.event, call.event) == (DeviceEvent.KICK, DeviceEvent.CALL)
    assert (kick.eventfd_id, call.eventfd_id) == (queue.kick, queue.call)
    return (kick.outcome, kick.says), (call.outcome, call.says)


def test_a_queue_whose_notifiers_are_kvms_is_the_same() -> None:
    kick, call = outcomes(vhosts=vhost(45, 53))
    assert kick == (SAME, "ioeventfd at mmio 0xfebe3008, pio 0xc190 value 2")
    assert call == (SAME, "irqfd, gsi 29, sends vector 3: 0x26 to 0xfee00000")


def test_a_doorbell_for_writes_of_two_bytes_is_the_same() -> None:
    exact = replace(MMIO, length=2)
    kick, _ = outcomes(vm=replace(VM, ioeventfds=(exact, IOEVENTFDS[2])))
    assert kick[0] is SAME


@pytest.mark.parametrize(
    ("ioeventfds", "says"),
    [
        (IOEVENTFDS[2:], "KVM has no ioeventfd at its doorbell mmio 0xfebe3008"),
        (IOEVENTFDS[:2], "KVM has no ioeventfd at its doorbell pio 0xc190 value 2"),
        ((), "KVM has no ioeventfd at its doorbell mmio 0xfebe3008; KVM has no ioeventfd"),
        (
            (*IOEVENTFDS, Ioeventfd(0xFEBE9000, 0, None, "mmio", 45)),
            "a write to mmio 0xfebe9000 signals it, and that is not its doorbell",
        ),
        (
            (*IOEVENTFDS[:2], Ioeventfd(0xC190, 2, 2, "pio", 50)),
            "its doorbell pio 0xc190 value 2 signals eventfd 50, and our map has eventfd 45",
        ),
        (
            (replace(MMIO, length=4), IOEVENTFDS[2]),
            "is for writes of 4 bytes",
        ),
        (
            (replace(MMIO, datamatch=7), IOEVENTFDS[2]),
            "is for the value 7 only",
        ),
    ],
)
def test_a_doorbell_that_differs_is_named(ioeventfds: tuple[Ioeventfd, ...], says: str) -> None:
    (outcome, said), _ = outcomes(vm=replace(VM, ioeventfds=ioeventfds))
    assert outcome is DIFFERENT
    assert says in said


def test_a_kick_notifier_that_our_map_has_not_is_a_difference() -> None:
    (outcome, said), _ = outcomes(replace(QUEUE, kick=None))
    assert outcome is DIFFERENT
    assert "signals eventfd 45, and our map has no kick notifier" in said


def test_a_queue_without_a_kick_notifier_here_and_there_has_nothing_to_compare() -> None:
    kick, _ = outcomes(replace(QUEUE, kick=None), replace(VM, ioeventfds=IOEVENTFDS[3:]))
    assert kick == (NOT_COMPARABLE, "it has no kick notifier, and KVM none at its doorbell")


@pytest.mark.parametrize(
    ("irqfds", "says"),
    [
        ((), "KVM has no irqfd for it"),
        ((replace(IRQFD, msi=None),), "the irqfd's gsi 29 is no message"),
        (
            (replace(IRQFD, msi=MsiRoute(0xFEE01000, 0x26)),),
            "gsi 29 sends 0x26 to 0xfee01000, and vector 3 is 0x26 to 0xfee00000",
        ),
        (
            (replace(IRQFD, msi=MsiRoute(0xFEE00000, 0x27)),),
            "gsi 29 sends 0x27 to 0xfee00000, and vector 3 is 0x26 to 0xfee00000",
        ),
        (
            (IRQFD, replace(IRQFD, gsi=30, msi=MsiRoute(0xFEE00000, 0x27))),
            "gsi 30 sends 0x27",
        ),
    ],
)
def test_an_interrupt_that_differs_is_named(irqfds: tuple[Irqfd, ...], says: str) -> None:
    _, (outcome, said) = outcomes(vm=replace(VM, irqfds=irqfds))
    assert outcome is DIFFERENT
    assert says in said


def test_a_masked_vector_has_nothing_to_compare_and_vhosts_masked_notifier_is_told() -> None:
    masked = replace(QUEUE, message=Message(3, 0xFEE00000, 0x26, True))
    _, call = outcomes(masked, replace(VM, irqfds=()), vhost(45, 99))
    assert call[0] is NOT_COMPARABLE
    assert "vector 3 is masked" in call[1]
    assert "vhost calls with eventfd 99 meanwhile" in call[1]


def test_a_vhost_queue_that_calls_with_another_eventfd_is_a_difference() -> None:
    _, call = outcomes(vhosts=vhost(45, 99))
    assert call == (DIFFERENT, "vhost calls with eventfd 99, and our map has 53")


def test_a_queue_that_vhost_does_not_serve_is_not_held_against_vhost() -> None:
    assert outcomes(vhosts=vhost(46, 99))[1][0] is SAME


def test_without_kvm_there_is_nothing_to_compare() -> None:
    for outcome, says in outcomes(vm=None):
        assert outcome is NOT_COMPARABLE
        assert "no KVM" in says


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("-M", "q35,kernel-irqchip=off"), "QEMU emulates the interrupt controller"),
        (("-device", "intel-iommu,intremap=on"), "remaps its interrupts"),
    ],
)
def test_an_interrupt_that_kvm_does_not_route_itself_has_nothing_to_compare(
    command: Sequence[str], says: str
) -> None:
    kick, call = outcomes(vm=replace(VM, irqfds=()), command=command)
    assert kick[0] is SAME
    assert call[0] is NOT_COMPARABLE
    assert says in call[1]


def test_what_is_not_known_is_said_and_is_no_difference() -> None:
    kick, call = outcomes(
        replace(
            QUEUE,
            doorbells=(),
            no_doorbell="its doorbell is not known",
            message=None,
            no_message="it has INTx",
        )
    )
    assert kick == (NOT_COMPARABLE, "its doorbell is not known")
    assert call == (NOT_COMPARABLE, "it has INTx")
