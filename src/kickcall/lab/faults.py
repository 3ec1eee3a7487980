"""The faults by name: what can be broken on purpose, where, and what is broken then.

    with Target(machine, "iot0") as queue, FAULTS["lost-kick"].on(queue) as proof:
        ...                       # the guest's request hangs; `proof` says how we know
                                  # afterwards it is repaired, and the request done

Every fault is made by what really happens on hosts: a thread that is held, a count that is read,
a field or a register that is written. None of them lies to whoever looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.errors import LabError
from kickcall.lab import faults_backend as backend
from kickcall.lab import faults_machine as machine
from kickcall.lab import faults_notifications as notifications

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

    from kickcall.lab.faults_target import Target


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to break a queue."""

    name: str
    what: str
    """What is broken, in one line."""
    broken: Callable[[Target], AbstractContextManager[str]]
    """Breaks a queue as long as its block runs, and yields how it is known to be broken."""
    cannot: Callable[[Target], str] = lambda target: target.cannot_request
    """Why it cannot exist on a queue; empty where it can."""
    disturbs: str = ""
    """Whom else it hits: `machine` where other queues cannot be used meanwhile."""
    undone_by: str = "repair"
    """`repair`: when the block is left the queue works. `reboot`: only a reboot of the machine,
    with new back-ends, helps."""

    def on(self, target: Target) -> AbstractContextManager[str]:
        """Break the queue for a `with` block. Raises LabError where the fault cannot exist."""
        if reason := self.cannot(target):
            raise LabError(f"{self.name} cannot exist on {target.device}: {reason}")
        return self.broken(target)


def _by_name(faults: Iterable[Fault]) -> dict[str, Fault]:
    return {fault.name: fault for fault in faults}


FAULTS = _by_name(
    (
        Fault(
            "lost-kick",
            "the kick is read from the notifier, and nobody acts on it",
            notifications.lost_kick,
            lambda target: target.cannot_wait_for_kick,
        ),
        Fault(
            "lost-call",
            "the call is read from the notifier, and raises no interrupt",
            notifications.lost_call,
            notifications.cannot_lose_call,
        ),
        Fault(
            "kick-suppressed",
            "the driver is told in guest memory that the device wants no kick",
            notifications.kick_suppressed,
            lambda target: target.cannot_wait_for_kick,
        ),
        Fault(
            "call-suppressed",
            "the device is told in guest memory that the driver wants no call",
            notifications.call_suppressed,
            notifications.cannot_suppress_call,
        ),
        Fault(
            "kick-unread",
            "the thread or process that reads the kicks stands still",
            backend.kick_unread,
            backend.cannot_leave_unread,
        ),
        Fault(
            "main-loop-stuck",
            "QEMU's main loop, which reads the kicks, stands still",
            backend.kick_unread,
            backend.cannot_stop_main_loop,
            disturbs="machine",
        ),
        Fault(
            "backend-killed",
            "the process behind the vhost-user socket is killed",
            backend.backend_killed,
            backend.cannot_lose_backend,
            undone_by="reboot",
        ),
        Fault(
            "ring-stopped",
            "QEMU is asked x-query-virtio-queue-status: the back-end stops the ring",
            backend.ring_stopped,
            backend.cannot_lose_backend,
            undone_by="reboot",
        ),
        Fault(
            "device-stuck",
            "the storage behind the device completes nothing",
            backend.device_stuck,
            backend.cannot_be_stuck,
        ),
        Fault(
            "device-slow",
            "the storage completes one request a second",
            backend.device_slow,
            backend.cannot_be_slow,
        ),
        Fault(
            "vector-masked",
            "the queue's MSI-X vector is masked in the table",
            machine.vector_masked,
            machine.cannot_block_msix,
        ),
        Fault(
            "function-masked",
            "all MSI-X vectors of the device are masked at once",
            machine.function_masked,
            machine.cannot_block_msix,
        ),
        Fault(
            "intx-disabled",
            "a device without MSI-X may not raise its INTx line",
            machine.intx_disabled,
            machine.cannot_block_intx,
        ),
        Fault(
            "bus-master-off",
            "the device may neither reach guest memory nor send MSI-X messages",
            machine.bus_master_off,
            machine.cannot_be_no_bus_master,
            undone_by="reboot",
        ),
        Fault(
            "driver-stuck",
            "the virtual CPUs stand still while the device completes and calls",
            machine.driver_stuck,
            machine.cannot_stop_driver,
            disturbs="machine",
        ),
        Fault(
            "ring-corrupt",
            "the driver's index (packed: its event area) says what no driver says",
            notifications.ring_corrupt,
            lambda target: "",
        ),
        Fault("vm-paused", "QMP `stop`", machine.vm_paused, lambda target: "", disturbs="machine"),
        Fault(
            "driver-unbound",
            "the guest's driver is unbound from the device",
            machine.driver_unbound,
        ),
        Fault("load", "no fault: the guest keeps the queue busy", machine.load),
        Fault("idle", "no fault: nobody uses the queue", machine.idle, lambda target: ""),
    )
)
