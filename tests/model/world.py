"""Who acts next, and when: actors on a virtual clock, interleaved access by access.

An actor is a generator. What it yields is how long it takes until it goes on, in seconds: every
memory access and every notifier operation ends in one `yield`, so any other actor may come between
two of them. A negative delay is a sleep that `wake` cuts short.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

Steps = Generator[float, None, None]
"""What an actor does, step by step."""
BoolSteps = Generator[float, None, bool]
"""The same, with an answer."""
FOREVER = -math.inf
"""A sleep that only `wake` ends."""

SLOW_S = 0.03
"""How long one step may take at the most: well below every threshold, some steps in a row, too."""


@dataclass(eq=False)
class Actor:
    """One thread of control."""

    steps: Steps
    sleeping: bool = False
    due: float = 0.0
    """When it goes on; never, if nobody wakes it: infinity."""
    version: int = field(default=0, repr=False)


class World:
    """The virtual clock, and everybody who waits on it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now = 0.0
        self.spy: Actor | None = None
        """Who likes to look when something has just happened."""
        self._heap: list[tuple[float, int, int, Actor]] = []
        self._order = 0

    def tick(self) -> float:
        """Return how long one access takes: mostly a microsecond, now and then much longer."""
        chance = self.rng.random()
        return chance * 0.6 if chance < 0.05 else chance * 3e-6

    def spawn(self, steps: Steps) -> Actor:
        """Let an actor begin, now."""
        actor = Actor(steps)
        self._push(actor, self.now)
        return actor

    def wake(self, actor: Actor | None) -> None:
        """End an actor's sleep, a step's time from now. One that is awake goes on as it is."""
        if actor is not None and actor.sleeping:
            actor.sleeping = False
            self._push(actor, self.now + self.tick())

    def happened(self) -> None:
        """Tell that something was written that is worth a look right now."""
        if self.spy is not None and self.rng.random() < 0.3:
            self.wake(self.spy)

    def run(self, until: float) -> None:
        """Let everybody act until `until`."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            at, _, version, actor = heapq.heappop(heap)
            if version != actor.version:
                continue
            self.now = at
            actor.sleeping = False
            delay = next(actor.steps, None)
            if delay is None:
                delay = math.inf
            elif delay < 0:
                actor.sleeping = True
                delay = -delay
            self._push(actor, at + delay)
        self.now = max(self.now, until)

    def _push(self, actor: Actor, at: float) -> None:
        actor.version += 1
        actor.due = at
        if at == math.inf:
            return
        self._order += 1
        heapq.heappush(self._heap, (at, self._order, actor.version, actor))
