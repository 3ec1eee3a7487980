"""A driver as Linux has it (drivers/virtio/virtio_ring.c, 6.1 and later): one vCPU, one queue.

Kinds: `blk` (reaps when called), `simple` (reaps when called and never switches its calls off:
balloon), `poll` (blk poll queue: no vector, calls off for ever), `ctrl` (virtio-net's control
queue: the same, one command at a time), `tx` (net TX with NAPI), `lazy` (net TX without: calls on
only for a full ring), `rx` (net RX with NAPI; an inbox).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.rings import PackedRing, SplitRing
from model.world import FOREVER, Actor, BoolSteps, Steps, World

if TYPE_CHECKING:
    from model.device import Device
    from model.rings import Ring

POLLED = frozenset({"poll", "ctrl"})


@dataclass
class DriverFaults:
    """What goes wrong in the driver; -1: never. A number counts down to the occurrence."""

    keeps_calls_off: int = -1
    """It does not switch its calls on again."""
    asks_too_late: int = -1
    """It asks for its call at an index beyond all that it published."""
    stops_after: int = -1
    """Its vCPU stops after so many steps."""


def hit(obj: object, name: str) -> bool:
    """Count down to an occurrence; True when it has come."""
    left: int = getattr(obj, name)
    if left >= 0:
        setattr(obj, name, left - 1)
    return left == 0


class Driver:
    """The guest's side of one queue."""

    device: Device
    actor: Actor

    def __init__(
        self,
        world: World,
        ring: Ring,
        start: int,
        *,
        kind: str,
        plan: list[tuple[float, int]],
        triggered_flag: bool,
        faults: DriverFaults,
    ) -> None:
        self.world, self.ring, self.kind = world, ring, kind
        self.plan = plan
        self.triggered_flag = triggered_flag
        self.faults = faults
        self.published = self.reaped = start
        self.chains: list[tuple[int, int]] = []
        """(position, length) of what is published and not reaped, oldest first."""
        self.calls_off_wished = False
        self.triggered = False
        self.irq = False
        self.stopped = False
        self.broken = False
        """It left its calls off, or asked for them too late, and believes that they are on."""
        self.late = False
        self.broke_at: float | None = None
        if kind in POLLED:
            self.calls_off_wished = True
            # vring_create_virtqueue without a callback. With event indices the flag is not written
            # (split), and used_event is what the zeroed page holds.
            ring.set_calls(False)
            if ring.event_idx:
                ring.zero_used_event()

    # --- what an interrupt handler calls ---

    def interrupt(self) -> None:
        """The queue's vector fires; a driver that polls gave it none."""
        if self.kind in POLLED:
            return
        self.irq = True
        self.world.wake(self.actor)

    # --- virtio_ring.c ---

    def _calls_off(self) -> Steps:
        if self.calls_off_wished:
            return
        self.calls_off_wished = True
        if self.triggered_flag and self.triggered:
            return
        if self.ring.event_idx:
            self.ring.zero_used_event()
        else:
            self.ring.set_calls(False)
        yield self.world.tick()

    def _calls_on(self, at: int) -> Steps:
        self.triggered = False
        if self.broken:
            return
        if hit(self.faults, "keeps_calls_off"):
            self.broke_at = self.world.now
            self.broken = True
            if self.ring.event_idx:
                self.ring.zero_used_event()
            else:
                self.ring.set_calls(False)
            yield self.world.tick()
            return
        if self.ring.event_idx:
            if hit(self.faults, "asks_too_late"):
                self.broke_at = self.world.now
                self.broken = self.late = True
                at = self.published + 2
            self.ring.set_used_event(at)
            yield self.world.tick()
        if self.calls_off_wished or isinstance(self.ring, PackedRing):
            self.calls_off_wished = False
            self.ring.set_calls(True)
            yield self.world.tick()

    def _more(self) -> bool:
        return bool(self.chains) and self.ring.is_used(self.reaped)

    def _reap(self) -> BoolSteps:
        if not self._more():
            yield self.world.tick()
            return False
        yield self.world.tick()
        _, length = self.chains.pop(0)
        self.reaped += length
        if not self.calls_off_wished and self.ring.event_idx and not self.broken:
            self.ring.set_used_event(self.reaped)
            yield self.world.tick()
        return True

    def _publish(self, lengths: list[int]) -> Steps:
        """Publish chains, and kick for all of them at once if the device wants it."""
        old = self.published
        for length in lengths:
            if isinstance(self.ring, PackedRing):
                for tail in range(length - 1, 0, -1):
                    self.ring.publish_tail(self.published + tail)
                    yield self.world.tick()
            self.ring.publish(self.published, length)
            self.chains.append((self.published, length))
            self.published += length
            self.world.happened()
            yield self.world.tick()
        wanted = self.ring.kick_wanted(self.published, old)
        yield self.world.tick()
        if wanted:
            self.device.kick()
            yield self.world.tick()

    def _room(self) -> int:
        return self.ring.num - (self.published - self.reaped)

    # --- the drivers ---

    def run(self) -> Steps:
        """The vCPU: interrupts first, then what there is to ask for."""
        world = self.world
        steps = self._run_rx() if self.kind == "rx" else self._run()
        for delay in steps:
            if hit(self.faults, "stops_after"):
                self.stopped = True
                self.broke_at = world.now
                while True:
                    yield FOREVER
            yield delay

    def _run(self) -> Steps:
        world = self.world
        next_at = self.plan[0][0] if self.plan else None
        full = False
        while True:
            if self.irq:
                self.irq = False
                yield from self._handle()
                full = False
            elif self.kind in POLLED and self.chains:
                if not (yield from self._reap()):
                    yield 0.02 + world.tick()
            elif next_at is not None and world.now >= next_at and not full:
                _, burst = self.plan.pop(0)
                yield from self._submit(burst)
                full = self.kind in ("tx", "lazy") and self._room() < 2
                if full and self.kind == "lazy" and not (yield from self._enable_delayed()):
                    # More was used already: free_old_xmit, and go on.
                    yield from self._reap_all()
                    yield from self._calls_off()
                    full = False
                next_at = world.now + self.plan[0][0] if self.plan else None
            elif next_at is not None and not full:
                yield -max(next_at - world.now, 1e-9)
            else:
                yield FOREVER

    def _submit(self, burst: int) -> Steps:
        if self.kind in ("tx", "lazy"):
            # start_xmit: free what was sent before, then send.
            while True:
                if self.kind == "tx":
                    yield from self._calls_off()
                yield from self._reap_all()
                if self.kind == "lazy" or (yield from self._enable_delayed()):
                    break
        lengths: list[int] = []
        rng = self.world.rng
        for _ in range(1 if self.kind == "ctrl" else burst):
            length = 1 + (isinstance(self.ring, PackedRing) and rng.random() < 0.3)
            if sum(lengths) + length <= self._room():
                lengths.append(length)
        if lengths:
            yield from self._publish(lengths)

    def _enable_delayed(self) -> BoolSteps:
        """virtqueue_enable_cb_delayed: at 3/4 of what is outstanding."""
        outstanding = self.published - self.reaped
        ahead = outstanding * 3 // 4
        yield from self._calls_on(self.reaped + ahead)
        if isinstance(self.ring, SplitRing):
            more = (self.ring.used_idx - self.reaped) & 0xFFFF > ahead
        else:
            more = self._more()
        yield self.world.tick()
        return not more

    def _reap_all(self) -> Steps:
        while (yield from self._reap()):
            pass

    def _handle(self) -> Steps:
        """vring_interrupt and the driver's callback."""
        more = self._more()
        yield self.world.tick()
        if not more:
            return
        self.triggered = self.ring.event_idx
        if self.late:
            self.broken = False
        if self.kind == "simple":
            yield from self._reap_all()
        elif self.kind == "lazy":
            # skb_xmit_done: no more calls; the next start_xmit takes back what was sent.
            yield from self._calls_off()
        else:
            yield from self._reap_and_enable()

    def _reap_and_enable(self) -> Steps:
        """do { disable; reap } while (!enable): virtblk_done, virtscsi_vq_done, NAPI."""
        while True:
            yield from self._calls_off()
            yield from self._reap_all()
            yield from self._calls_on(self.reaped)
            more = self._more()
            yield self.world.tick()
            if not more or self.broken:
                return

    def _run_rx(self) -> Steps:
        """Fill the ring, and refill it when half is gone (virtnet_receive)."""
        yield from self._publish([1] * self.ring.num)
        while True:
            if not self.irq:
                yield FOREVER
            self.irq = False
            if not self._more():
                yield self.world.tick()
                continue
            self.triggered = self.ring.event_idx
            if self.late:
                self.broken = False
            while True:
                yield from self._calls_off()
                yield from self._reap_all()
                if self._room() > self.ring.num // 2:
                    yield from self._publish([1] * self._room())
                yield from self._calls_on(self.reaped)
                more = self._more()
                yield self.world.tick()
                if not more or self.broken:
                    break

    # --- the truth ---

    @property
    def waits_in_vain(self) -> bool:
        """It sleeps, and something that it asked for is done."""
        return self._more()
