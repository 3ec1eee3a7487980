"""Where do hundreds of machines come from that no host could run? From data, played back.

A `Recorded` stands where `kickcall.watch.feed.Feed` does: the same live machines, told of looks at
queues that move as loaded disks do, instead of by a sampler.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any, cast

from kickcall.diagnose.states import QueueFixed, QueueRole, Sample, SlowFacts
from kickcall.diagnose.track import Track, advance, start
from kickcall.errors import KickcallError
from kickcall.model import (
    BackendKind,
    Counters,
    Evidence,
    Injection,
    Layout,
    Machine,
    Verdict,
    VerdictKind,
    Via,
)
from kickcall.watch.live import LiveDevice, LiveMachine, LiveQueue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kickcall.model import DeviceEvent
    from kickcall.watch.timeline import Moment

SIZE = 256


def sample(at: float, avail: int, used: int) -> Sample:
    avail, used = avail & 0xFFFF, used & 0xFFFF
    return Sample(at, avail, used, used, 0, 0, used, used, 0, 0)


class _Tracks:
    """Stands where a Watch does."""

    def __init__(self, tracks: list[Track]) -> None:
        self.tracks = tracks

    def track(self, number: int) -> Track:
        return self.tracks[number]


class _Watched:
    """Stands where a WatchedMachine does."""

    def __init__(self) -> None:
        self.doubtful: set[int] = set()


class RecordedMachine:
    """A machine with `queues` queues, four to a device."""

    def __init__(self, number: int, queues: int, name: str = "", device: str = "blk") -> None:
        self.live = LiveMachine(Machine(1000 + number, 7, name or f"vm{number:03}", "7.2", (), ()))
        self.watched = _Watched()
        now = time.monotonic()
        fixed = [
            QueueFixed(
                f"/machine/peripheral/{device}{one // 4}",
                one % 4,
                SIZE,
                Layout.SPLIT,
                True,
                BackendKind.QEMU,
                QueueRole.REQUEST,
                True,
            )
            for one in range(queues)
        ]
        self.indices = [(0, 0)] * queues
        self.tracks = _Tracks([start(sample(now, 0, 0)) for _ in fixed])
        self.live.queues = tuple(
            LiveQueue(one, what, self.tracks.tracks[one]) for one, what in enumerate(fixed)
        )
        self.live.devices = tuple(
            LiveDevice(path, path.rsplit("/", 1)[1], "virtio-blk-device", BackendKind.QEMU, 4, None)
            for path in dict.fromkeys(one.device for one in fixed)
        )
        self.live.why_not = ""

    def move(self, number: int, avail: int, used: int, at: float) -> None:
        """Publish up to `avail`, complete up to `used`."""
        self.indices[number] = (avail, used)
        track = self.tracks.tracks[number]
        fixed = self.live.queues[number].fixed
        self.tracks.tracks[number] = advance(track, sample(at, avail, used), fixed)
        self.live.look(cast("Any", self.watched), cast("Any", self.tracks), [number], at)

    def stall(self, number: int, at: float, since_s: float = 1.0) -> None:
        """Let a queue have lost a kick."""
        avail, used = self.indices[number]
        self.watched.doubtful.add(number)
        self.move(number, avail + 1, used, at - since_s)
        because = "The driver published work and had to kick, and no kick waits to be read."
        verdict = Verdict(
            self.live.queues[number].fixed.device,
            self.live.queues[number].fixed.queue,
            VerdictKind.LOST_KICK,
            3,
            since_s,
            (Evidence("because", because, at), Evidence("avail.idx", avail + 1, at)),
            "kickcall kick",
        )
        self.live.judge(number, verdict, SlowFacts(at))


class Recorded:
    """A source of live machines: `count` with `queues` each, of which some are busy."""

    def __init__(self, count: int = 1, queues: int = 4, *, busy: float = 0.3) -> None:
        self.recorded = [RecordedMachine(number, queues) for number in range(count)]
        self.raised: list[tuple[str, str, int, DeviceEvent, bool]] = []
        self.refuse = ""
        self.problem = ""
        self.looking = True
        """Whether all machines are looked at all the time, if nothing moves either."""
        self._busy = busy
        self._random = random.Random(7)

    @property
    def machines(self) -> Sequence[LiveMachine]:
        if self.looking:
            for one in self.recorded:
                one.live.looked_at = time.monotonic()
        return [one.live for one in self.recorded]

    @property
    def now(self) -> float:
        return time.monotonic()

    def play(self, at: float) -> None:
        """Let the busy queues of all machines move on."""
        for machine in self.recorded:
            active = range(int(len(machine.indices) * self._busy))
            for number in active:
                avail, _ = machine.indices[number]
                machine.indices[number] = (avail + self._random.randint(0, 60), avail)
                track = machine.tracks.tracks[number]
                moved = sample(at, *machine.indices[number])
                machine.tracks.tracks[number] = advance(
                    track, moved, machine.live.queues[number].fixed
                )
            machine.live.look(cast("Any", machine.watched), cast("Any", machine.tracks), active, at)

    def timeline(self, since: float, limit: int = 200) -> tuple[list[Moment], str]:
        return [], "there is no journal"

    def raise_event(
        self, machine: LiveMachine, device: str, queue: int, event: DeviceEvent, *, dry_run: bool
    ) -> Injection:
        if self.refuse:
            raise KickcallError(self.refuse)
        self.raised.append((machine.name, device, queue, event, dry_run))
        before = Counters(0, 12, 11)
        after = before if dry_run else Counters(0, 12, 12)
        return Injection(
            machine.name,
            device,
            queue,
            event,
            Via.EVENTFD,
            37,
            before,
            after,
            dry_run=dry_run,
            target="eventfd 37 (fd 20 of process 1000)",
        )

    def count(self, machine: LiveMachine) -> str:
        return "tracefs is not mounted"
