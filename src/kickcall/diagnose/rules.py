"""The rules: one table, read from the top; the first that holds is the verdict.

Each row says on which hop the path is broken, why that follows, and where the specification says
so. The diagram in the documentation is drawn from this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.model import DeviceEvent, VerdictKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from kickcall.diagnose.view import View


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table."""

    verdict: VerdictKind
    hop: int
    """1 to 10, or 0 where no hop is broken or none can be named."""
    when: Callable[[View], bool]
    because: str
    """What was seen, in one sentence."""
    source: str
    """The section of the virtio specification (1.4), or the source, that the row rests on."""
    remedy: str
    """What to do; `{kick}` and `{call}` become the commands for this queue."""
    event: DeviceEvent | None = None
    """What a probe injects."""
    time_will_tell: bool = False
    """A queue of which this holds may be called stalled once it has stood still for longer."""


_ASK_BACKEND = (
    "Look at the back-end: its log, its threads' stacks (/proc/PID/task/*/stack), its disk."
)

RULES: tuple[Rule, ...] = (
    Rule(
        VerdictKind.VM_NOT_RUNNING,
        0,
        lambda view: view.slow is not None and view.slow.vm_running is False,
        "The machine does not run: no queue can move.",
        "QEMU: query-status",
        "Resume the machine (`cont`) if it should run.",
    ),
    Rule(
        VerdictKind.DEVICE_NOT_READY,
        0,
        lambda view: view.slow is not None and view.slow.driver_ok is False,
        "The driver has not set the device up: its rings mean nothing.",
        "2.1",
        "Look at the guest's log for the driver's complaint.",
    ),
    Rule(
        VerdictKind.UNKNOWN,
        0,
        lambda view: bool(view.track.now.unreadable),
        "The rings could not be read.",
        "",
        "The evidence names the reason.",
    ),
    Rule(
        VerdictKind.RING_CORRUPT,
        1,
        lambda view: view.published_impossible and view.nothing_moves,
        "More entries are published than the queue can hold, or the driver's event area is in a "
        "mode that does not exist.",
        "2.7.13.3.1, 2.8.10",
        "The driver's side of the ring is damaged: dump the guest's memory, then reset the device.",
    ),
    Rule(
        VerdictKind.RING_CORRUPT,
        6,
        lambda view: view.completed_impossible and view.nothing_moves,
        "More entries are completed than were published, or the device's event area is in a mode "
        "that does not exist.",
        "2.7.8, 2.8.10",
        "The device's side of the ring is damaged: collect the back-end's log, then reset the "
        "device.",
    ),
    Rule(
        VerdictKind.DEVICE_NOT_READY,
        0,
        lambda view: view.slow is not None and view.slow.broken is True,
        "The device gave up on the driver, and needs a reset.",
        "2.1.2",
        "Look at the VMM's log for what the device complained about, then reset it.",
    ),
    Rule(
        VerdictKind.BACKEND_GONE,
        4,
        lambda view: (
            view.backend_left
            and view.device_should_have_looked
            and (view.work_waits or view.count_stays)
        ),
        "Work is outstanding, and no process but the VMM holds the kick notifier.",
        "vhost-user protocol: SET_VRING_KICK, GET_VRING_BASE",
        "Restart the back-end and let QEMU reconnect (`reconnect=` on its chardev), or reset the "
        "device.",
    ),
    Rule(
        VerdictKind.KICK_UNREAD,
        4,
        lambda view: view.kick_unread,
        "The driver kicked, and nobody has read the kick.",
        "eventfd(2)",
        "The back-end is stopped, or does not poll this notifier. " + _ASK_BACKEND,
    ),
    Rule(
        VerdictKind.DEVICE_STUCK,
        6,
        lambda view: view.work_waits and view.fetched and view.device_should_have_finished,
        "The device has fetched all work and completes none.",
        "2.7.14",
        _ASK_BACKEND,
    ),
    Rule(
        VerdictKind.PROGRESSING,
        0,
        lambda view: view.work_waits and view.fetched,
        "The device has fetched all work and is at it.",
        "2.7.14",
        "Nothing.",
        time_will_tell=True,
    ),
    Rule(
        VerdictKind.DEVICE_STUCK,
        5,
        lambda view: view.work_waits and view.device_should_have_finished and view.stuck_at_work,
        "The back-end runs, or waits for something that is no event, and does not get to what is "
        "published.",
        "2.7.13.4",
        _ASK_BACKEND,
        DeviceEvent.KICK,
    ),
    Rule(
        VerdictKind.PROGRESSING,
        0,
        lambda view: view.work_waits and view.may_yet_look,
        "Work is outstanding, and the back-end is busy.",
        "2.7.13.4",
        "Nothing.",
        time_will_tell=True,
    ),
    Rule(
        VerdictKind.DEVICE_STUCK,
        5,
        lambda view: (
            view.work_waits
            and view.device_should_have_looked
            and view.backend_stopped
            and not view.kick_waits
        ),
        "The back-end took the kick, and is stopped before it fetched the work.",
        "2.7.13.4",
        "Let the back-end go on (SIGCONT, or end its debugger). " + _ASK_BACKEND,
    ),
    Rule(
        VerdictKind.LOST_KICK,
        3,
        lambda view: (
            view.work_waits
            and view.device_should_have_looked
            and view.kick_was_owed
            and view.kick_missing
        ),
        "The driver published work and had to kick, and the kernel has seen no kick since.",
        "2.7.13.4.1, 2.8.10; eventfd_signal, eventfd_write",
        "{kick}",
        DeviceEvent.KICK,
    ),
    Rule(
        VerdictKind.UNKNOWN,
        0,
        lambda view: (
            view.work_waits
            and view.device_should_have_looked
            and not view.position_known
            and view.kick_was_owed
        ),
        "Work is outstanding. Without the event index nothing outside the back-end tells whether "
        "it has seen it: this is a lost kick, or a slow device.",
        "2.7.10",
        "Let a probe find out: {probe}",
        DeviceEvent.KICK,
    ),
    Rule(
        VerdictKind.UNKNOWN,
        0,
        lambda view: view.work_waits and view.device_should_have_looked and view.may_be_at_work,
        "Work is outstanding, and the back-end may be in the middle of it, with its kicks off: "
        "this is a lost kick, or a slow device.",
        "2.7.10, 2.8.10",
        "Watch it for longer than a slow device needs, or let a probe find out: {probe}",
        DeviceEvent.KICK,
        time_will_tell=True,
    ),
    Rule(
        VerdictKind.KICK_UNREAD,
        4,
        lambda view: (
            view.work_waits
            and view.device_should_have_looked
            and view.kick_was_owed
            and view.kick_recorded
        ),
        "The driver kicked, as the kernel has seen, and the device has not looked.",
        "2.7.13.4.1, 2.8.10; eventfd_signal, eventfd_write",
        "The kick was lost on its way from the notifier to the back-end. {kick}",
        DeviceEvent.KICK,
    ),
    Rule(
        VerdictKind.LOST_KICK,
        3,
        lambda view: (
            view.work_waits
            and view.device_should_have_looked
            and view.kick_was_owed
            and not view.kick_waits
        ),
        "The driver published work and had to kick, no kick waits to be read, and the device "
        "has not looked.",
        "2.7.13.4.1, 2.8.10",
        "{kick}",
        DeviceEvent.KICK,
    ),
    Rule(
        VerdictKind.KICK_SUPPRESSED,
        2,
        lambda view: (
            view.work_waits
            and view.device_should_have_looked
            and not view.kick_was_owed
            and view.nothing_in_flight
            and view.positions_known
        ),
        "The driver published work; the device had asked for no kick, and sleeps.",
        "2.7.10, 2.8.10",
        "{kick}",
        DeviceEvent.KICK,
    ),
    Rule(
        VerdictKind.DEVICE_STUCK,
        5,
        lambda view: view.work_waits and view.device_should_have_finished,
        "Work is outstanding, some of it with the device, and nothing moves.",
        "2.7.13.4",
        _ASK_BACKEND,
        DeviceEvent.KICK,
    ),
    Rule(
        VerdictKind.DRIVER_STUCK,
        10,
        lambda view: (
            (view.call_was_owed or view.calls_left_off)
            and view.driver_should_have_looked
            and view.cpus_stopped
        ),
        "The work is done and the driver does not reap it: a virtual CPU is stopped.",
        "2.7.14",
        "Let the virtual CPU's thread go on.",
    ),
    Rule(
        VerdictKind.INTERRUPT_BLOCKED,
        9,
        lambda view: (
            view.call_was_owed and view.driver_should_have_looked and bool(view.interrupt_barrier)
        ),
        "The work is done, the driver wants its call, and the interrupt cannot reach it.",
        "4.1.5.1.2; PCI: MSI-X",
        "The guest switched the interrupt off: look at its driver's and its PCI core's log.",
    ),
    Rule(
        VerdictKind.LOST_CALL,
        9,
        lambda view: (
            view.call_untaken
            and ((view.call_was_owed and view.driver_had_every_chance) or view.call_expected)
        ),
        "The device called, and neither KVM nor QEMU has taken the call from the notifier.",
        "eventfd(2); KVM_IRQFD",
        "QEMU's main loop is stuck, or the notifier has lost its irqfd. {call}",
        DeviceEvent.CALL,
    ),
    Rule(
        VerdictKind.LOST_CALL,
        9,
        lambda view: (
            view.call_was_owed
            and view.driver_had_every_chance
            and view.slow is not None
            and view.slow.interrupts.vector_pending is True
        ),
        "The interrupt is pending in the device, is not masked, and was not delivered.",
        "PCI: MSI-X pending bits",
        "{call}",
        DeviceEvent.CALL,
    ),
    Rule(
        VerdictKind.LOST_CALL,
        9,
        lambda view: view.call_was_owed and view.driver_had_every_chance and view.call_recorded,
        "The work is done and the device called, as the kernel has seen; the driver has not reaped "
        "it: the interrupt was lost, or the driver did not listen.",
        "2.7.7.2, 2.8.10; eventfd_signal, eventfd_write",
        "{call}",
        DeviceEvent.CALL,
    ),
    Rule(
        VerdictKind.LOST_CALL,
        8,
        lambda view: view.call_was_owed and view.driver_had_every_chance,
        "The work is done, the driver wanted its call, and has not reaped it.",
        "2.7.7.2, 2.8.10",
        "{call}",
        DeviceEvent.CALL,
    ),
    Rule(
        VerdictKind.CALL_SUPPRESSED,
        7,
        lambda view: view.call_asked_too_late and view.driver_had_every_chance,
        "The driver wants its call at an index that nothing it published can reach.",
        "2.7.7, 2.8.10",
        "{call}",
        DeviceEvent.CALL,
    ),
    Rule(
        VerdictKind.CALL_SUPPRESSED,
        7,
        lambda view: view.calls_left_off and view.driver_had_every_chance,
        "The driver switched its calls off and did not switch them on again.",
        "2.7.7, 2.8.10",
        "{call}",
        DeviceEvent.CALL,
    ),
    Rule(
        VerdictKind.PROGRESSING,
        0,
        lambda view: view.moved_lately or view.work_waits or view.drivers_turn,
        "The queue moves.",
        "",
        "Nothing.",
        time_will_tell=True,
    ),
    Rule(
        VerdictKind.UNKNOWN,
        0,
        lambda view: not view.positions_known,
        "The device's back-end keeps its position in the ring to itself.",
        "2.8",
        "Let a probe find out: {probe}",
        DeviceEvent.KICK,
    ),
    Rule(
        VerdictKind.UNKNOWN,
        0,
        lambda view: (
            not view.reaping_visible
            and not view.calls_off
            and view.fixed.calls_when_idle
            and bool(view.track.now.used_idx)
        ),
        "All work is done. Without the event index nothing tells whether the driver has reaped "
        "it: a lost call would look like this, and so does an idle queue.",
        "2.7.7",
        "If the guest hangs, let a probe find out: {probe}",
        DeviceEvent.CALL,
    ),
    Rule(
        VerdictKind.UNKNOWN,
        0,
        lambda view: (
            view.calls_off_at_rest and view.slow is None and view.driver_should_have_looked
        ),
        "The driver has its calls off: whether it polls, its interrupt vector tells.",
        "2.7.7, 2.8.10",
        "Look closer: kickcall diagnose does.",
    ),
    Rule(
        VerdictKind.UNKNOWN,
        0,
        lambda view: (
            view.calls_off_at_rest and view.may_use_intx and view.driver_should_have_looked
        ),
        "The driver has its calls off, and its device no MSI-X: nothing tells whether it polls, as "
        "firmware does, or waits for an interrupt that will not come.",
        "2.7.7, 2.8.10",
        "If the guest hangs, let a probe find out: {probe}",
        DeviceEvent.CALL,
    ),
    Rule(
        VerdictKind.UNKNOWN,
        0,
        lambda view: view.much_unreaped,
        "All work is done, and much of it not reaped by a driver that does so when it gets around "
        "to it: a lost call would look like this, and so does an idle queue.",
        "2.7.7",
        "If the guest hangs, let a probe find out: {probe}",
        DeviceEvent.CALL,
    ),
    Rule(
        VerdictKind.IDLE,
        0,
        lambda view: True,
        "Nothing is outstanding, or only empty buffers for what may come.",
        "2.7.13",
        "Nothing.",
    ),
)
