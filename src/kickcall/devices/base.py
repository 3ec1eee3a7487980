"""DeviceClass: what a kind of device can be made to do, and the registry of all kinds."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from kickcall.errors import (
    EventNotSupportedError,
    KickcallError,
    MonitorGoneError,
    MonitorTimeoutError,
    StubError,
    UsageError,
)
from kickcall.model import Counters, DeviceEvent, EventOffer, Injection, Via

if TYPE_CHECKING:
    from kickcall.model import AnyDevice, Layout, Machine
    from kickcall.vmm.pci_devices import MappedPci
    from kickcall.vmm.session import MappedDevice, VmmSession

ENTRY_POINTS = "kickcall.devices"
"""The group in which a package from outside registers a DeviceClass (packaging: entry points)."""
M = TypeVar("M", "MappedDevice", "MappedPci")
"""What a session knows of a device: with virtqueues, or with PCI registers."""
BEHIND_LIBVIRT = "it pauses the machine, and no libvirt domain is paused behind libvirt's back"
PAUSES = frozenset({Via.MMIO})
"""The ways that stop the machine for a moment, and so are taken only where that was allowed."""


class Witness(Protocol):
    """Is told of one event before it is written, and of what became of it: for a journal.

    After `before` exactly one of the others is called, unless the process dies in between.
    """

    def before(self, machine: Machine, planned: Injection) -> None:
        """`planned` is about to be written. Raise KickcallError to prevent that."""
        ...

    def written(self, result: Injection) -> None:
        """It was written."""
        ...

    def failed(self, error: KickcallError, *, maybe_written: bool) -> None:
        """It was not written, or (`maybe_written`) nobody knows."""
        ...


class DeviceClass(ABC, Generic[M]):
    """One kind of device. QEMU's RFC has the same name and the same method.

    A subclass says which devices it is for, what their queues are, and which ways it has; a way is
    a function that makes one event ready to be written. Those of virtio devices extend
    `kickcall.devices.virtio.VirtioClass`, others `kickcall.devices.pci.PciClass`, which have most
    of it. Register it in the entry-point group `kickcall.devices`; among the classes that claim a
    device the one with the highest `priority` serves it.
    """

    name: ClassVar[str]
    """What messages and `AttachedDevice.kind` call the kind."""
    priority: ClassVar[int] = 0

    def __init__(self, session: VmmSession, mapped: M) -> None:
        self.session = session
        self.mapped: M = mapped

    @classmethod
    @abstractmethod
    def claims(cls, device: AnyDevice) -> bool:
        """Tell whether this class serves `device`."""

    @abstractmethod
    def queues(self) -> dict[int, str]:
        """Return the numbers that an event can be raised on now, and in words what each is.

        A virtqueue needs no words; for other devices a queue is what the kind says it is.
        """

    @abstractmethod
    def ways(self, event: DeviceEvent, queue: int) -> dict[Via, Offer]:
        """Return the ways to raise `event` on queue number `queue`, best first.

        Each is a function that makes the way ready, or says in words why it cannot be taken now.
        Raises QueueNotFoundError, QueueNotReadyError or MapError for a queue that has none.
        """

    def way_now(self, event: DeviceEvent, queue: int) -> Via | str:
        """Return the way that would be taken now if a pause was allowed, or why there is none."""
        try:
            found = self._choose(self.ways(event, queue), None, allow_pause=True)
        except KickcallError as exc:
            return str(exc)
        return found if isinstance(found, str) else found[0]

    def device_event(
        self,
        event: DeviceEvent,
        queue: int,
        *,
        via: Via | None = None,
        dry_run: bool = False,
        watch_s: float = 0.0,
        allow_pause: bool = False,
        tell: Callable[[str], None] | None = None,
        witness: Witness | None = None,
    ) -> Injection:
        """Raise `event` on queue number `queue` and return what was done.

        `via` forces one way; `dry_run` checks everything and writes nothing; `watch_s` is how many
        seconds to watch the queue before the counters "after" are read; they are unknown where the
        machine ended meanwhile. A way that pauses the machine is taken only with `allow_pause`, or
        where `via` forces it, and `tell` is told before; afterwards the machine is mapped anew.
        `witness` is told of what is written (of a dry run nothing is).
        Raises KickcallError and its kin, and then nothing was written (but see
        `kickcall.devices.ways` for a monitor that fails to answer).
        """
        offered = self.ways(event, queue)
        self.session.check_running()
        if via is not None and via not in offered:
            raise EventNotSupportedError(
                f"{self.mapped.device.id}: a device of kind {self.name} has no {via} way to {event}"
            )
        found = self._choose(offered, via, allow_pause)
        if isinstance(found, str):
            raise EventNotSupportedError(
                f"cannot {event} queue {queue} of {self.mapped.device.id}: {found}"
            )
        chosen, way = found
        pause_ms: float | None = None

        def injection(before: Counters, after: Counters) -> Injection:
            return Injection(
                machine=self.session.machine.name,
                device=self.mapped.device.path,
                queue=queue,
                event=event,
                via=chosen,
                eventfd_id=way.eventfd_id,
                before=before,
                after=after,
                layout=way.layout,
                dry_run=dry_run,
                target=way.target,
                pause_ms=pause_ms,
            )

        if dry_run:
            witness = None
        elif chosen in PAUSES and tell is not None:
            tell(
                f"pausing {self.session.machine.name} for some milliseconds to write {way.target}: "
                "its ioeventfds and vhost restart, and their counts begin anew"
            )
        if witness is not None:
            now = way.counters()
            witness.before(self.session.machine, injection(now, now))
        with _witnessed(witness):
            # The cheap facts are checked last before the write; nothing slow may come in between.
            way.check()
            before = after = way.counters()
            if not dry_run:
                pause_ms = way.write()
                written_at = time.monotonic()
        if not dry_run:
            if pause_ms is not None:
                self._map_anew()
            time.sleep(max(written_at + watch_s - time.monotonic(), 0.0))
            after = _counters_after(way)
        result = injection(before, after)
        if witness is not None:
            witness.written(result)
        return result

    def _map_anew(self) -> None:
        """Map the machine anew: a pause gives its queues other notifiers."""
        with suppress(KickcallError):  # the event was raised; a map that is stale is found to be
            self.session.refresh()
            self.mapped = self.session.again(self.mapped)

    def _choose(
        self, offered: dict[Via, Offer], via: Via | None, allow_pause: bool
    ) -> tuple[Via, Way] | str:
        """Return the first way that applies, or why none does."""
        reasons = []
        for candidate, offer in offered.items() if via is None else [(via, offered[via])]:
            if candidate in PAUSES and self.session.machine.domain is not None:
                reasons.append(f"{candidate}: {BEHIND_LIBVIRT}")
                continue
            if candidate in PAUSES and not (allow_pause or via is candidate):
                reasons.append(
                    f"{candidate}: it pauses the machine for milliseconds, which nobody allowed "
                    "(--allow-pause)"
                )
                continue
            way = offer()
            if isinstance(way, Way):
                return candidate, way
            reasons.append(f"{candidate}: {way}")
        return "; ".join(reasons) or f"a device of kind {self.name} has no such event"


class Way:
    """One event that is ready to be written, and how its effect is read.

    `check` is what is asked last before the write: it raises where the event would not reach what
    was mapped, and is fast. `write` returns for how many milliseconds it paused the machine; None
    where that ran on. `layout` tells what the indices among the counters mean.
    """

    def __init__(
        self,
        target: str,
        write: Callable[[], float | None],
        counters: Callable[[], Counters],
        eventfd_id: int | None = None,
        *,
        check: Callable[[], None],
        layout: Layout | None = None,
    ) -> None:
        self.target = target
        self.write = write
        self.counters = counters
        self.eventfd_id = eventfd_id
        self.check = check
        self.layout = layout


@contextmanager
def _witnessed(witness: Witness | None) -> Iterator[None]:
    """Tell the witness of what fails."""
    try:
        yield
    except KickcallError as exc:
        if witness is not None:
            # Only a monitor can take an event and not say so (see `kickcall.devices.ways`), or a
            # process that writes on our behalf and is killed.
            unsaid = isinstance(exc, (MonitorTimeoutError, MonitorGoneError))
            unsaid |= type(exc) is StubError
            witness.failed(exc, maybe_written=unsaid)
        raise


def _counters_after(way: Way) -> Counters:
    """Return the counters once the event was written: what fails now is no failure to write it."""
    try:
        return way.counters()
    except KickcallError:
        return Counters(None, None, None)


Offer = Callable[[], Way | str]
"""Makes a way ready, or returns the reason why it cannot be taken."""


@cache
def registry() -> tuple[type[DeviceClass[Any]], ...]:
    """Return every DeviceClass that is installed, the one to ask first in front.

    Raises KickcallError naming the entry point that cannot be loaded.
    """
    found = []
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            loaded = entry.load()
        except Exception as exc:
            raise KickcallError(
                f"the device class {entry.name!r} ({entry.value}) cannot be loaded: {exc}"
            ) from exc
        if not (isinstance(loaded, type) and issubclass(loaded, DeviceClass)):
            raise KickcallError(f"{entry.value} is registered as a device class and is none")
        found.append(loaded)
    return tuple(sorted(found, key=lambda kind: (-kind.priority, kind.__name__)))


def device_class(session: VmmSession, mapped: M) -> DeviceClass[M]:
    """Return the class that serves `mapped`. Raises EventNotSupportedError where none does."""
    for kind in registry():
        if kind.claims(mapped.device):
            return kind(session, mapped)
    raise EventNotSupportedError(
        f"{mapped.device.id}: no device class for {mapped.device.kind} is installed"
    )


def offers(kind: DeviceClass[Any]) -> tuple[EventOffer, ...]:
    """Return what events can be raised now on a device, queue by queue, and in which way."""
    found = []
    for queue, name in kind.queues().items():
        for event in DeviceEvent:
            way = kind.way_now(event, queue)
            via, reason = (way, "") if isinstance(way, Via) else (None, way)
            found.append(EventOffer(queue, name, event, via, reason))
    return tuple(found)


def parse_event(event: DeviceEvent | str) -> DeviceEvent:
    """Return `event` as a DeviceEvent. Raises UsageError where it is none."""
    try:
        return DeviceEvent(event)
    except ValueError as exc:
        raise UsageError(f"{event!r} is no device event: kick or call") from exc
