"""The public interface: attach to a machine, look at its queues, kick and call them."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Self

from kickcall.devices.base import device_class, offers, parse_event
from kickcall.errors import DeviceNotFoundError, KickcallError, UsageError
from kickcall.model import DeviceEvent, Via
from kickcall.vmm import observe
from kickcall.vmm.domains import borrow_of
from kickcall.vmm.find import resolve
from kickcall.vmm.monitor import CONNECT_TIMEOUT, borrow
from kickcall.vmm.served import machine_served_at, served_monitor
from kickcall.vmm.session import VmmSession

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kickcall.devices.base import Witness
    from kickcall.diagnose.states import Thresholds
    from kickcall.host.kernel.program import Kernel
    from kickcall.model import (
        Device,
        EventOffer,
        Injection,
        Machine,
        PciDevice,
        QueueMap,
        QueueState,
        Verdict,
    )
    from kickcall.vmm.kernel_view import QueueInKernel
    from kickcall.vmm.monitor import BorrowMonitor
    from kickcall.vmm.pci_devices import MappedPci
    from kickcall.vmm.recorder import Recording
    from kickcall.vmm.session import MappedDevice
    from kickcall.vmm.verify import Check


def attach(
    target: str | int,
    *,
    timeout: float = CONNECT_TIMEOUT,
    monitor: BorrowMonitor | None = None,
) -> AttachedMachine:
    """Map a running machine and return a handle on it.

    `target` is a name, a pid, `libvirt:DOMAIN` or `qmp:PATH`. The machine's monitor is borrowed for
    some milliseconds, and the machine is not stopped. A `kickcall qmp` that holds the monitor is
    used by itself. `timeout` (seconds) bounds the wait for a held monitor; `monitor` replaces the
    search for one.

    Raises MachineNotFoundError, NotAVmmError, MonitorBusyError, MonitorGoneError, PrivilegeError or
    MapError.
    """
    machine, path = resolve(target)
    ours = False
    if monitor is None:
        if path is None:
            path = served_monitor(machine.pid, machine.start_time)
            ours = path is not None
        else:
            ours = machine_served_at(path) is not None
        monitor = borrow([path]) if path is not None else borrow_of(machine)
    return AttachedMachine(VmmSession(machine, monitor, monitor_is_ours=ours, timeout=timeout))


class AttachedMachine:
    """A machine that was mapped. Use it in a `with` block, or call `close`."""

    def __init__(self, session: VmmSession) -> None:
        self._session = session

    @property
    def info(self) -> Machine:
        """What is known of the VMM process."""
        return self._session.machine

    @property
    def run_state(self) -> str:
        """QEMU's run state when the machine was mapped, as `running` or `paused`."""
        return self._session.run_state

    def devices(self) -> tuple[AttachedDevice, ...]:
        """Return every virtio device, by QOM path."""
        return tuple(AttachedDevice(self._session, mapped) for mapped in self._session.devices)

    def device(self, name: str) -> AttachedDevice:
        """Return the device with that id or QOM path (its own, or its virtio-backend's).

        Raises DeviceNotFoundError.
        """
        mapped = self._virtio(name)
        if mapped is None:
            known = ", ".join(one.device.id for one in self._session.devices) or "none"
            raise DeviceNotFoundError(
                f"{self.info.name} has no virtio device {name!r}; it has: {known}"
            )
        return AttachedDevice(self._session, mapped)

    def pci_devices(self) -> tuple[AttachedPciDevice, ...]:
        """Return every PCI device that is no virtio device, by QOM path. Asks the monitor."""
        found = self._session.pci_devices()
        return tuple(AttachedPciDevice(self._session, mapped) for mapped in found)

    def pci_device(self, name: str) -> AttachedPciDevice:
        """Return the PCI device with that id or QOM path. Raises DeviceNotFoundError."""
        return AttachedPciDevice(self._session, self._pci(name))

    def _virtio(self, name: str) -> MappedDevice | None:
        path = name.removesuffix("/virtio-backend")
        for mapped in self._session.devices:
            if path in (mapped.device.path, mapped.device.id):
                return mapped
        return None

    def _pci(self, name: str) -> MappedPci:
        found = self._session.pci_devices()
        for mapped in found:
            if name in (mapped.device.path, mapped.device.id):
                return mapped
        ids = [one.device.id for one in self._session.devices]
        ids += [one.device.id for one in found]
        raise DeviceNotFoundError(
            f"{self.info.name} has no virtio or PCI device {name!r}; it has: {', '.join(ids)}"
        )

    def device_event(
        self,
        dev: str,
        event: DeviceEvent | str,
        queue: int,
        *,
        via: Via | str | None = None,
        dry_run: bool = False,
        watch_s: float = 0.0,
        allow_pause: bool = False,
        tell: Callable[[str], None] | None = None,
        witness: Witness | None = None,
    ) -> Injection:
        """Raise `event` on a queue of a virtio or PCI device: the RFC's command, as a function.

        `via` forces a way; `dry_run` checks and writes nothing; `watch_s` is how many seconds the
        queue is watched before the counters "after" are read. With `allow_pause` the machine may be
        paused for milliseconds where no other way applies; `tell` is told so before. `witness` is
        told before and after (kickcall.watch.witness writes it to the journal, which this does not
        do by itself). Raises KickcallError and its kin; then nothing was written.
        """
        virtio = self._virtio(dev)
        kind = (
            device_class(self._session, self._pci(dev))
            if virtio is None
            else device_class(self._session, virtio)
        )
        return kind.device_event(
            parse_event(event),
            queue,
            via=_parse_via(via),
            dry_run=dry_run,
            watch_s=watch_s,
            allow_pause=allow_pause,
            tell=tell,
            witness=witness,
        )

    def diagnose(
        self,
        device: str | None = None,
        queue: int | None = None,
        *,
        duration_s: float = 2.0,
        probe: bool = False,
        limits: Thresholds | None = None,
        tell: Callable[[str], None] | None = None,
        witness: Witness | None = None,
    ) -> tuple[Verdict, ...]:
        """Watch the machine's queues (or one device's, or one queue) and say what is wrong.

        Watches for `duration_s` seconds, and on only while a queue waits that has not reached its
        threshold. Reads only; with `probe` the event that a verdict names is injected, after
        `tell` was told so; `witness` is told of each write. Raises KickcallError where the machine
        could not be looked at.
        """
        from kickcall.diagnosis import diagnose

        mapped = None if device is None else self.device(device)._mapped
        return diagnose(
            self._session,
            mapped,
            queue,
            duration_s=duration_s,
            probe=probe,
            limits=limits,
            tell=tell,
            witness=witness,
        )

    def record(
        self, device: str | None = None, queue: int | None = None, *, events: bool = False
    ) -> Recording:
        """Have the kernel count the kicks and calls of the machine's queues in a `with` block.

        Of all queues, of one device's, or of one queue. `counts()` of what is returned tells how
        often each was raised since, by whom, and when last; with `events`, `events()` tells each
        one. Needs root and tracefs: raises PrivilegeError or KernelViewError without.
        """
        from kickcall.vmm.recorder import Recording

        if device is None:
            return Recording(self._session, events=events)
        mapped = self.device(device)._mapped
        if queue is not None:
            mapped.queue_map(queue)
        return Recording(self._session, [(mapped, queue)], events=events)

    def in_kernel(
        self, queues: Sequence[AttachedQueue], kernel: Kernel | None = None
    ) -> tuple[QueueInKernel, ...]:
        """Return what the running kernel keeps of `queues`: eventfds, doorbells, vhost's indices.

        Needs root and the extra `kickcall[kernel]`: raises KernelViewError or PrivilegeError
        without. To ask more than once, open the `kernel` yourself (kickcall.host.kernel.program).
        """
        from kickcall.host.kernel.program import open_live
        from kickcall.vmm.kernel_view import queues_in_kernel

        chosen = [(queue._mapped, queue.map) for queue in queues]
        return queues_in_kernel(self._session, kernel or open_live(), chosen)

    def verify(self, kernel: Kernel | None = None) -> tuple[Check, ...]:
        """Hold the whole map against KVM's and vhost's. Needs what `in_kernel` needs."""
        from kickcall.host.kernel.program import open_live
        from kickcall.vmm.verify import verify

        return verify(self._session, kernel or open_live())

    def refresh(self) -> None:
        """Map the machine anew: after StaleMapError, or to see devices that were plugged in."""
        self._session.refresh()

    def close(self) -> None:
        """Let go of the process. The machine does not notice."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AttachedDevice:
    """A device of an attached machine."""

    def __init__(self, session: VmmSession, mapped: MappedDevice) -> None:
        self._session = session
        self._mapped = mapped

    @property
    def info(self) -> Device:
        """What the monitor said of the device when the machine was mapped."""
        return self._mapped.device

    @property
    def refusal(self) -> str:
        """Why the device's notifiers were not mapped; empty where they were."""
        return self._mapped.refusal

    @property
    def kind(self) -> str:
        """The name of the DeviceClass that serves the device."""
        return device_class(self._session, self._mapped).name

    def queue(self, index: int) -> AttachedQueue:
        """Return queue number `index`.

        Raises QueueNotFoundError, QueueNotReadyError, or MapError where its notifiers could not be
        proved.
        """
        return AttachedQueue(self._session, self._mapped, self._mapped.queue_map(index))

    def queues(self) -> tuple[AttachedQueue, ...]:
        """Return every queue that the driver set up, if the device could be mapped."""
        if self._mapped.array is None:
            return ()
        return tuple(
            AttachedQueue(self._session, self._mapped, self._mapped.queue_map(index))
            for index, element in enumerate(self._mapped.array.elements)
            if element.rings.desc and self._mapped.device.driver_ok
        )

    def events(self) -> tuple[EventOffer, ...]:
        """Return which events can be raised now, queue by queue, and in which way."""
        return offers(device_class(self._session, self._mapped))


class AttachedPciDevice:
    """A device of an attached machine that has registers and interrupts, and no virtqueues."""

    def __init__(self, session: VmmSession, mapped: MappedPci) -> None:
        self._session = session
        self._mapped = mapped

    @property
    def info(self) -> PciDevice:
        """Which device it is."""
        return self._mapped.device

    @property
    def kind(self) -> str:
        """The name of the DeviceClass that serves the device."""
        return device_class(self._session, self._mapped).name

    def queues(self) -> dict[int, str]:
        """Return what events can be raised on, by number: what each is says its DeviceClass."""
        return device_class(self._session, self._mapped).queues()

    def events(self) -> tuple[EventOffer, ...]:
        """Return which events can be raised now, queue by queue, and in which way."""
        return offers(device_class(self._session, self._mapped))

    def kick(self, queue: int, *, dry_run: bool = False, allow_pause: bool = False) -> Injection:
        """Kick the device: it looks at that queue. See `AttachedMachine.device_event`."""
        return self.raise_event(DeviceEvent.KICK, queue, dry_run=dry_run, allow_pause=allow_pause)

    def call(self, queue: int, *, dry_run: bool = False, allow_pause: bool = False) -> Injection:
        """Call the driver for that queue. See `AttachedMachine.device_event`."""
        return self.raise_event(DeviceEvent.CALL, queue, dry_run=dry_run, allow_pause=allow_pause)

    def raise_event(
        self,
        event: DeviceEvent | str,
        queue: int,
        *,
        via: Via | str | None = None,
        dry_run: bool = False,
        watch_s: float = 0.0,
        allow_pause: bool = False,
        tell: Callable[[str], None] | None = None,
        witness: Witness | None = None,
    ) -> Injection:
        """Raise `event` on that queue. See `AttachedMachine.device_event`."""
        kind = device_class(self._session, self._mapped)
        result = kind.device_event(
            parse_event(event),
            queue,
            via=_parse_via(via),
            dry_run=dry_run,
            watch_s=watch_s,
            allow_pause=allow_pause,
            tell=tell,
            witness=witness,
        )
        self._mapped = kind.mapped
        return result


class AttachedQueue:
    """A queue of an attached machine, with its two notifiers."""

    def __init__(self, session: VmmSession, mapped: MappedDevice, queue: QueueMap) -> None:
        self._session = session
        self._mapped = mapped
        self.map = queue
        """Where the queue and its notifiers are."""

    def state(self) -> QueueState:
        """Look at the queue: indices, flags, notifier counts. Microseconds, and nobody notices."""
        self._session.process.check_alive()
        return observe.queue_state(self._session, self._mapped, self.map)

    def kick(
        self,
        *,
        via: Via | str | None = None,
        dry_run: bool = False,
        watch_s: float = 0.0,
        allow_pause: bool = False,
    ) -> Injection:
        """Kick the device: it looks at the available ring. See `AttachedMachine.device_event`."""
        return self.raise_event(
            DeviceEvent.KICK, via=via, dry_run=dry_run, watch_s=watch_s, allow_pause=allow_pause
        )

    def call(
        self,
        *,
        via: Via | str | None = None,
        dry_run: bool = False,
        watch_s: float = 0.0,
        allow_pause: bool = False,
    ) -> Injection:
        """Call the driver: it looks at the used ring. See `AttachedMachine.device_event`."""
        return self.raise_event(
            DeviceEvent.CALL, via=via, dry_run=dry_run, watch_s=watch_s, allow_pause=allow_pause
        )

    def raise_event(
        self,
        event: DeviceEvent | str,
        *,
        via: Via | str | None = None,
        dry_run: bool = False,
        watch_s: float = 0.0,
        allow_pause: bool = False,
        tell: Callable[[str], None] | None = None,
        witness: Witness | None = None,
    ) -> Injection:
        """Raise `event` on this queue. See `AttachedMachine.device_event`."""
        kind = device_class(self._session, self._mapped)
        result = kind.device_event(
            parse_event(event),
            self.map.index,
            via=_parse_via(via),
            dry_run=dry_run,
            watch_s=watch_s,
            allow_pause=allow_pause,
            tell=tell,
            witness=witness,
        )
        if kind.mapped is not self._mapped:  # the machine was paused, and mapped anew
            self._mapped = kind.mapped
            with suppress(KickcallError):
                self.map = kind.mapped.queue_map(self.map.index)
        return result


def _parse_via(via: Via | str | None) -> Via | None:
    """Return the way that `via` forces; None for `auto`. Raises UsageError for an unknown word."""
    if via is None or via == "auto":
        return None
    try:
        return Via(via)
    except ValueError as exc:
        raise UsageError(
            f"{via!r} is no way to inject: auto, {', '.join(way.value for way in Via)}"
        ) from exc
