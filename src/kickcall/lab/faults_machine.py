"""How do interrupts not arrive, and drivers not run? Faults on hops 9 and 10, and of no hop."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from kickcall.errors import LabError
from kickcall.lab.ptrace import HeldThread
from kickcall.lab.registers import BUS_MASTER, INTX_DISABLE
from kickcall.lab.spec import VirtioNet
from kickcall.model import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kickcall.lab.faults_target import Target

_TRIES = 5


def cannot_block_msix(target: Target) -> str:
    if "vectors=0" in target.spec.options:
        return "it has no MSI-X vectors"
    return target.cannot_wait_for_call


def cannot_block_intx(target: Target) -> str:
    if "vectors=0" not in target.spec.options:
        return "it has MSI-X vectors, and does not use INTx"
    return target.cannot_wait_for_call


def cannot_stop_driver(target: Target) -> str:
    # The CPUs are stopped at a kick, so that the completion comes after it.
    return target.cannot_wait_for_kick or target.cannot_wait_for_call


@contextlib.contextmanager
def _blocked(target: Target, block: Callable[[bool], None]) -> Iterator[None]:
    """Let the device complete a request while `block` keeps its interrupt away."""
    block(True)
    command = None
    try:
        completed = target.completed
        command = target.request()
        target.until_completed(completed)
        if command.done:
            raise LabError(f"the guest took the interrupt of {target.device} all the same")
        yield
    finally:
        # The device sends what it kept pending (PCI 3.0, 6.8.3.4), or holds its INTx line.
        block(False)
        if command is not None:
            target.finish(command)


@contextlib.contextmanager
def vector_masked(target: Target) -> Iterator[str]:
    """Mask the queue's vector, as a guest's interrupt code does for a moment."""
    # Linux gives vector 0 to the configuration and the next ones to the queues, in their order.
    vector = target.number + 1
    with _blocked(target, lambda on: target.registers.mask_vector(vector, on)):
        yield f"MSI-X vector {vector} is masked, and the guest's request hangs"


@contextlib.contextmanager
def function_masked(target: Target) -> Iterator[str]:
    """Set the function mask in the MSI-X capability."""
    with _blocked(target, target.registers.mask_function):
        yield "the MSI-X function mask is set, and the guest's request hangs"


@contextlib.contextmanager
def intx_disabled(target: Target) -> Iterator[str]:
    """Set Interrupt Disable in the command register."""
    with _blocked(target, lambda on: target.registers.set_command(INTX_DISABLE, on)):
        yield "INTx is disabled, and the guest's request hangs"


def cannot_be_no_bus_master(target: Target) -> str:
    if target.queue.map.layout is Layout.PACKED:
        # Seen with 7.2: virtqueue_pop() gives nothing from a disabled device, and
        # virtio_queue_packed_empty() does not say that it is empty (hw/virtio/virtio.c).
        return "QEMU itself spins for ever then, in the thread that serves the queue"
    return target.cannot_request


@contextlib.contextmanager
def bus_master_off(target: Target) -> Iterator[str]:
    """Clear Bus Master Enable.

    QEMU takes DRIVER_OK away from the device with it, and gives it back with nothing
    (hw/virtio/virtio-pci.c, virtio_write_config): only the driver can start the device again.
    """
    target.registers.set_command(BUS_MASTER, False)
    command = target.request()
    if command.done:
        raise LabError(f"{target.device} served the guest without being bus master")
    yield "bus master enable is off, and the guest's request hangs"


@contextlib.contextmanager
def driver_stuck(target: Target) -> Iterator[str]:
    """Stop the virtual CPUs when a request is published, and let the device complete it."""
    threads = target.cpu_threads
    for _ in range(_TRIES):
        completed = target.completed
        with contextlib.ExitStack() as cpus:
            with target.kick_waiting() as command:
                for thread in threads:
                    cpus.enter_context(HeldThread(thread))
            if _goes_on_without_cpus(target, completed):
                yield "the device completed, and the threads of the virtual CPUs are stopped"
                cpus.close()
                target.finish(command)
                return
        target.finish(command)
    raise LabError(f"the virtual CPUs of {target.machine.name} cannot be stopped without QEMU")


def _goes_on_without_cpus(target: Target, completed: int) -> bool:
    """Tell whether QEMU still works: a CPU may have been stopped while it had the big lock."""
    try:
        target.machine.qmp("query-status")
        target.until_completed(completed)
    except LabError:
        return False
    return True


@contextlib.contextmanager
def vm_paused(target: Target) -> Iterator[str]:
    """Pause the machine."""
    target.machine.qmp("stop")
    try:
        yield f"QEMU says {target.machine.qmp('query-status')['status']}"
    finally:
        target.machine.qmp("cont")
        # The pause gave the queue other notifiers.
        target.refresh()


@contextlib.contextmanager
def driver_unbound(target: Target) -> Iterator[str]:
    """Unbind the guest's driver from the device, which resets it."""
    folder = f"/sys/bus/pci/devices/0000:00:{target.spec.slot:02x}.0"
    status, name = target.machine.guest.run(
        f"cd {folder}/virtio* && d=$(readlink -f driver) && n=$(basename $PWD) && "
        "echo $n >driver/unbind && echo $d $n"
    )
    if status:
        raise LabError(f"the driver of {target.device} cannot be unbound: {name.strip()}")
    driver, bound = name.split()
    try:
        yield f"{bound} has no driver in the guest"
    finally:
        target.machine.guest.run(f"echo {bound} >{driver}/bind")
        if isinstance(target.spec, VirtioNet):
            # As the guest's init does.
            target.machine.guest.run(
                "ip address add 10.0.2.15/24 dev eth0; ip link set eth0 up; "
                "ip route add default via 10.0.2.2"
            )
        target.refresh()


@contextlib.contextmanager
def load(target: Target) -> Iterator[str]:
    """Keep the queue busy."""
    busy = target.machine.guest.start(f"while :; do {target.request_command()}; done")
    try:
        target.until_completed(target.completed)
        yield "the queue's indices move"
    finally:
        busy.kill()


@contextlib.contextmanager
def idle(target: Target) -> Iterator[str]:
    """Leave the queue alone."""
    yield "nobody uses the queue"
