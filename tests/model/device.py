"""A device and its back-end: fetches, completes, and keeps to the notification rules of the spec.

It asks for silence while it works, and before it sleeps asks for kicks and looks again (virtio 1.4,
2.7.13.4.1 and 2.8.21.3.1). Work is done on the spot (`sync`) or by and by. How it asks for kicks
without re-arming at each entry, and what vhost and QEMU do, is chosen by `arm_at_pop`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.driver import hit
from model.world import FOREVER, Actor, BoolSteps, Steps, World

if TYPE_CHECKING:
    from model.driver import Driver
    from model.rings import Ring


@dataclass
class DeviceFaults:
    """What goes wrong on the host; -1: never. A number counts down to the occurrence."""

    loses_kick: int = -1
    """A kick does not reach the notifier."""
    stays_silent: int = -1
    """It sleeps without asking for kicks again."""
    sleeps_on: int = -1
    """A kick is in the notifier, and the back-end does not read it, nor any later one."""
    gone: int = -1
    """The back-end closes its notifiers."""
    never_completes: int = -1
    """One entry stays with the device for ever."""
    loses_call: int = -1
    """A call is not made, or does not reach the notifier."""
    call_untaken: int = -1
    """Nobody takes calls from the notifier any more."""
    masked: int = -1
    """The vector stays masked."""
    pending: int = -1
    """The interrupt stays pending."""


class Device:
    """The host's side of one queue, its back-end and its interrupt."""

    driver: Driver
    actor: Actor
    completer: Actor
    pump: Actor

    def __init__(
        self,
        world: World,
        ring: Ring,
        start: int,
        *,
        drains: bool,
        sync: bool,
        polls: str,
        arm_at_pop: bool,
        inbox: list[float],
        is_inbox: bool,
        service_s: float,
        faults: DeviceFaults,
    ) -> None:
        self.world, self.ring = world, ring
        self.drains, self.sync, self.polls, self.arm_at_pop = drains, sync, polls, arm_at_pop
        self.inbox, self.is_inbox = inbox, is_inbox
        self.service_s = service_s
        self.faults = faults
        self.fetched = self.used = self.signalled = start
        self.in_flight: list[tuple[float, int, int]] = []
        """(done at, position, length), oldest first."""
        self.kick_count = self.call_count = 0
        self.kicked = False
        self.masked = self.pending = False
        self.does = "sleeps"
        """`sleeps` in its event loop, `runs`, or `works` on an entry."""
        self.is_gone = self.sleeps_on = self.no_taker = False
        self.silent = False
        self.broke_at: float | None = None

    # --- notifiers ---

    def kick(self) -> None:
        """The doorbell rings."""
        if hit(self.faults, "loses_kick"):
            self._broke()
            return
        self.kick_count += 1
        if self.sleeps_on or hit(self.faults, "sleeps_on"):
            self.sleeps_on = True
            self._broke()
            return
        if not self.is_gone:
            self.kicked = True
            self.world.wake(self.actor)

    def _call(self) -> None:
        if hit(self.faults, "loses_call"):
            self._broke()
            return
        self.call_count += 1
        self.world.wake(self.pump)

    def run_pump(self) -> Steps:
        """KVM's irqfd, or QEMU: takes calls from the notifier and raises the interrupt."""
        while True:
            if not self.call_count:
                yield FOREVER
                continue
            if self.no_taker or hit(self.faults, "call_untaken"):
                self.no_taker = True
                self._broke()
                yield FOREVER
                continue
            self.call_count = 0
            yield self.world.tick()
            if self.masked or hit(self.faults, "masked"):
                self.masked = self.pending = True
                self._broke()
            elif self.pending or hit(self.faults, "pending"):
                self.pending = True
                self._broke()
            else:
                self.driver.interrupt()

    def _broke(self) -> None:
        if self.broke_at is None:
            self.broke_at = self.world.now

    # --- the ring ---

    def run(self) -> Steps:
        """The thread that serves the queue."""
        if self.is_inbox:
            yield from self._run_inbox()
        if self.polls == "always":
            yield from self._run_polling()
        while True:
            if not self.kicked:
                self.does = "sleeps"
                yield FOREVER
                continue
            self.does = "runs"
            if hit(self.faults, "gone"):
                self.is_gone = True
                self._broke()
                self.does = "sleeps"
                while True:
                    yield FOREVER
            yield from self._read_kick()
            yield from self._serve()

    def _read_kick(self) -> Steps:
        self.kicked = False
        if self.drains:
            self.kick_count = 0
        yield self.world.tick()

    def _serve(self) -> Steps:
        world, ring = self.world, self.ring
        while True:
            if not self.arm_at_pop:
                yield from self._kicks_off()
            yield from self._fetch_all()
            if self.polls == "a while":
                until = world.now + 0.05
                while world.now < until:
                    if ring.chain(self.fetched):
                        yield from self._fetch_all()
                    yield 0.01
            if self.silent or hit(self.faults, "stays_silent"):
                self.silent = True
                self._broke()
                yield from self._kicks_off()
                return
            yield from self._kicks_on()
            # Look again: what was published before the driver could see the wish.
            more = ring.chain(self.fetched)
            yield world.tick()
            if not more:
                return

    def _kicks_off(self) -> Steps:
        """Ask for silence. A split ring with event indices is left as it is: the index that stands
        there is passed already (QEMU, vhost)."""
        self.ring.set_kicks(False)
        yield self.world.tick()

    def _kicks_on(self) -> Steps:
        if self.ring.event_idx:
            self.ring.set_avail_event(self.fetched)
            yield self.world.tick()
        self.ring.set_kicks(True)
        yield self.world.tick()

    def _fetch_all(self) -> Steps:
        while (yield from self._fetch()):
            pass

    def _fetch(self) -> BoolSteps:
        world = self.world
        length = self.ring.chain(self.fetched)
        yield world.tick()
        if not length:
            return False
        at = self.fetched
        self.fetched += length
        self.world.happened()
        if self.ring.event_idx and self.arm_at_pop:
            self.ring.set_avail_event(self.fetched)
        yield world.tick()
        takes = world.rng.random() * self.service_s
        if hit(self.faults, "never_completes"):
            self._broke()
            if self.sync:
                self.does = "works"
                while True:
                    yield FOREVER
            takes = 1e9
        if self.sync:
            self.does = "works"
            yield takes
            self.does = "runs"
            yield from self._complete(at, length)
        else:
            after = self.in_flight[-1][0] if self.in_flight else 0.0
            self.in_flight.append((max(world.now + takes, after), at, length))
            world.wake(self.completer)
        return True

    def run_completer(self) -> Steps:
        """Completes what is done, in order, and calls where the driver wants it."""
        while True:
            if not self.in_flight:
                yield FOREVER
                continue
            done, at, length = self.in_flight[0]
            if done > self.world.now:
                yield -max(done - self.world.now, 1e-9)
                continue
            self.in_flight.pop(0)
            yield from self._complete(at, length)

    def _complete(self, at: int, length: int) -> Steps:
        self.ring.complete(at, length)
        self.world.happened()
        yield self.world.tick()
        self.used = at + length
        old, new = self.signalled, self.used
        self.signalled = new
        wanted = self.ring.call_wanted(new, old)
        yield self.world.tick()
        if wanted:
            self._call()
            yield self.world.tick()

    def _run_polling(self) -> Steps:
        """SPDK, DPDK: asks for no kicks, and reads none."""
        self.ring.set_kicks(False)
        idle = 0.01
        self.does = "runs"
        while True:
            if (yield from self._fetch()):
                idle = 0.01
            else:
                yield idle
                idle = min(idle * 2, 0.1)

    def _run_inbox(self) -> Steps:
        """Something happens now and then, and fills the buffer that lies ready."""
        world, ring = self.world, self.ring
        for wait in self.inbox:
            self.does = "sleeps"
            yield wait
            self.does = "runs"
            while not ring.chain(self.fetched):
                yield from self._kicks_on()
                if ring.chain(self.fetched):
                    break
                yield world.tick()
                self.does = "sleeps"
                while not self.kicked:
                    yield FOREVER
                self.does = "runs"
                yield from self._read_kick()
            if self.kicked:
                yield from self._read_kick()
            yield from self._kicks_off()
            at, length = self.fetched, ring.chain(self.fetched)
            self.fetched += length
            yield world.tick()
            yield from self._complete(at, length)
        yield from self._kicks_on()
        while True:
            self.does = "sleeps"
            if not self.kicked:
                yield FOREVER
                continue
            self.does = "runs"
            yield from self._read_kick()

    # --- the truth ---

    @property
    def sleeps_on_work(self) -> bool:
        """It does nothing, and something is published that it has not fetched."""
        return bool(self.ring.chain(self.fetched))
