"""What is known of an incident: the values that a bundle keeps and a report is drawn from.

As JSON they are the bundle's `facts.json`. A bundle comes by mail from anybody: whatever is read
back is checked against these types, and every text in it is hostile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from kickcall.diagnose.states import QueueFixed, Sample
from kickcall.errors import KickcallError
from kickcall.model import DeviceEvent, Holder, QueueState, Verdict

FORMAT = 1


class BundleError(KickcallError):
    """A bundle cannot be written, or a file is no bundle that this kickcall can read."""


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """The VMM process."""

    name: str
    pid: int
    version: str
    run_state: str
    """QEMU's; empty where nobody could ask."""
    running_s: float | None
    """Seconds since the process started."""
    command: tuple[str, ...]
    """Its command line, without secrets."""
    removed: int
    """How many words of it had a secret."""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The host."""

    kernel: str
    distribution: str
    cpus: int


@dataclass(frozen=True, slots=True)
class QueueFacts:
    """One queue that the driver set up. Times in `last` are seconds since the epoch."""

    fixed: QueueFixed
    state: QueueState
    last: Sample | None
    """The latest look of the sampler."""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """One virtio device."""

    device: str
    id: str
    kind: str
    backend: str
    layout: str
    num_queues: int
    driver_ok: bool
    broken: bool
    vhost_started: bool
    features: tuple[str, ...]
    """What driver and device agreed on."""
    refusal: str
    """Why its notifiers were not mapped; empty where they were."""
    queues: tuple[QueueFacts, ...]


@dataclass(frozen=True, slots=True)
class NotifierFacts:
    """One notifier, and who holds it."""

    device: str
    id: str
    queue: int
    event: DeviceEvent
    eventfd_id: int
    fd: int
    count: int
    flags: int
    semaphore: bool | None
    holders: tuple[Holder, ...]


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """A process that serves queues of the machine from outside."""

    pid: int
    comm: str
    command: tuple[str, ...]
    """Without secrets."""


@dataclass(frozen=True, slots=True)
class ThreadFacts:
    """One thread, as it was at the end."""

    pid: int
    tid: int
    comm: str
    state: str
    waits_in: str
    wchan: str
    stack: tuple[str, ...]
    """The kernel's functions, innermost first; empty where they could not be read."""
    moved: bool
    """It woke or was stopped by the scheduler between the two looks."""


@dataclass(frozen=True, slots=True)
class CountFacts:
    """How often the kernel saw a notification while the bundle was made."""

    device: str
    queue: int
    event: DeviceEvent
    total: int
    last_at: float | None
    """In seconds since the epoch."""
    by: str


@dataclass(frozen=True, slots=True)
class Missing:
    """A part of the bundle that could not be had, and why."""

    part: str
    why: str


@dataclass(frozen=True, slots=True)
class Facts:
    """All that programs may want to know of an incident. Times in seconds since the epoch."""

    format: int
    kickcall: str
    by: str
    """Who asked for it: `kickcall bundle`, `kickcall watch`, `kickcall report`."""
    at: float
    took_s: float
    machine: MachineFacts
    host: HostFacts
    verdicts: tuple[Verdict, ...] = ()
    """What a diagnosis said now."""
    found: tuple[Verdict, ...] = ()
    """What the watcher found that made it write the bundle; it may have healed it since."""
    devices: tuple[DeviceFacts, ...] = ()
    notifiers: tuple[NotifierFacts, ...] = ()
    hidden_processes: int = 0
    """Processes whose descriptors could not be looked at: they may hold notifiers, too."""
    backends: tuple[ProcessFacts, ...] = ()
    threads: tuple[ThreadFacts, ...] = ()
    counts: tuple[CountFacts, ...] | None = None
    """None: the kernel could not be made to count."""
    journal: tuple[dict[str, Any], ...] | None = None
    """What the journal has of the machine, the latest last; None: it was not looked at."""
    missing: tuple[Missing, ...] = ()

    @property
    def stalls(self) -> tuple[Verdict, ...]:
        """The verdicts that say that something is wrong: what was found, then what is so now.

        A queue of which both are the same is named once, as it is now.
        """
        now = [one for one in self.verdicts if one.verdict.stalled]
        still = {(one.device, one.queue, one.verdict) for one in now}
        before = [one for one in self.found if (one.device, one.queue, one.verdict) not in still]
        return (*before, *now)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of `samples.jsonl`: a queue as a look found it (diagnose.states.Sample).

    `at` is in seconds since the epoch. A queue has a line at the first look, at the last one, and
    whenever it changed.
    """

    at: float
    device: str
    queue: int
    avail_idx: int | None
    used_idx: int | None
    last_avail_idx: int | None
    avail_flags: int | None
    used_flags: int | None
    used_event: int | None
    avail_event: int | None
    kick_count: int | None
    call_count: int | None
    unreadable: str = ""


def line_of(fixed: QueueFixed, sample: Sample, offset: float) -> Line:
    """Return a look at a queue as a line. `offset` makes its time one since the epoch."""
    return Line(
        round(sample.at + offset, 6),
        fixed.device,
        fixed.queue,
        sample.avail_idx,
        sample.used_idx,
        sample.last_avail_idx,
        sample.avail_flags,
        sample.used_flags,
        sample.used_event,
        sample.avail_event,
        sample.kick_count,
        sample.call_count,
        sample.unreadable,
    )


def to_json(value: object) -> bytes:
    """Return a value as indented JSON that no terminal takes for anything else."""
    import json

    return (json.dumps(msgspec.to_builtins(value), indent=1) + "\n").encode()


def facts_from(text: bytes) -> Facts:
    """Return what a `facts.json` says. Raises BundleError."""
    try:
        facts = msgspec.json.decode(text, type=Facts)
    except (msgspec.MsgspecError, RecursionError, ValueError) as exc:
        raise BundleError(f"facts.json is not as kickcall writes it: {exc}") from exc
    if facts.format != FORMAT:
        raise BundleError(
            f"the bundle has format {facts.format}, and this kickcall reads {FORMAT}: use that of "
            f"kickcall {facts.kickcall}"
        )
    return facts


def lines_from(text: bytes) -> list[Line]:
    """Return what a `samples.jsonl` says. Raises BundleError."""
    decoder = msgspec.json.Decoder(Line)
    try:
        return [decoder.decode(line) for line in text.splitlines() if line]
    except (msgspec.MsgspecError, RecursionError, ValueError) as exc:
        raise BundleError(f"samples.jsonl is not as kickcall writes it: {exc}") from exc
