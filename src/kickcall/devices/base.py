"""DeviceClass: what a kind of device can be made to do, and the registry of all kinds."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, ClassVar, Protocol

from kickcall.errors import (
    EventNotSupportedError,
    KickcallError,
    MonitorGoneError,
    MonitorTimeoutError,
    StubError,
    UsageError,
)
from kickcall.model import Counters, DeviceEvent, Injection, Via

if TYPE_CHECKING:
    from kickcall.model import Device, Machine, QueueMap
    from kickcall.vmm.session import MappedDevice, VmmSession

ENTRY_POINTS = "kickcall.devices"
"""The group in which a package from outside registers a DeviceClass (packaging: entry points)."""
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


class DeviceClass(ABC):
    """One kind of device. QEMU's RFC has the same name and the same method.

    A subclass says which devices it is for and which ways it has; a way is a function that writes
    one event (see `kickcall.devices.ways`). Register it in the entry-point group
    `kickcall.devices`; among the classes that claim a device the one with the highest `priority`
    serves it.
    """

    name: ClassVar[str]
    """What messages and `AttachedDevice.kind` call the kind."""
    priority: ClassVar[int] = 0

    def __init__(self, session: VmmSession, mapped: MappedDevice) -> None:
        self.session = session
        self.mapped = mapped

    @classmethod
    @abstractmethod
    def claims(cls, device: Device) -> bool:
        """Tell whether this class serves `device`."""

    @abstractmethod
    def ways(self, event: DeviceEvent, queue: QueueMap) -> dict[Via, Offer]:
        """Return the ways to raise `event` on `queue`, best first.

        Each is a function that makes the way ready, or says in words why it cannot be taken now.
        """

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
        queue_map = self.mapped.queue_map(queue)
        self.session.check_running()
        chosen, way = self._choose(event, queue_map, via, allow_pause)
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
                layout=queue_map.layout,
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
            self.session.verify(self.mapped, queue_map, event)
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
            self.mapped = self.session.device_at(self.mapped.device.path)

    def _choose(
        self, event: DeviceEvent, queue: QueueMap, via: Via | None, allow_pause: bool
    ) -> tuple[Via, Way]:
        offered = self.ways(event, queue)
        device = self.mapped.device
        if via is not None:
            if via not in offered:
                raise EventNotSupportedError(
                    f"{device.id}: a device of kind {self.name} has no {via} way to {event}"
                )
            offered = {via: offered[via]}
        reasons = []
        for candidate, offer in offered.items():
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
        raise EventNotSupportedError(
            f"cannot {event} queue {queue.index} of {device.id}: "
            + ("; ".join(reasons) or f"it has no event {event}")
        )


class Way:
    """One event that is ready to be written, and how its effect is read.

    `write` returns for how many milliseconds it paused the machine; None where that ran on.
    """

    def __init__(
        self,
        target: str,
        write: Callable[[], float | None],
        counters: Callable[[], Counters],
        eventfd_id: int | None = None,
    ) -> None:
        self.target = target
        self.write = write
        self.counters = counters
        self.eventfd_id = eventfd_id


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
def registry() -> tuple[type[DeviceClass], ...]:
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


def device_class(session: VmmSession, mapped: MappedDevice) -> DeviceClass:
    """Return the class that serves `mapped`. Raises EventNotSupportedError where none does."""
    for kind in registry():
        if kind.claims(mapped.device):
            return kind(session, mapped)
    raise EventNotSupportedError(
        f"{mapped.device.id}: no device class for {mapped.device.kind} is installed"
    )


def parse_event(event: DeviceEvent | str) -> DeviceEvent:
    """Return `event` as a DeviceEvent. Raises UsageError where it is none."""
    try:
        return DeviceEvent(event)
    except ValueError as exc:
        raise UsageError(f"{event!r} is no device event: kick or call") from exc
