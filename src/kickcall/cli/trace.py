"""`kickcall trace`: every kick and every call, counted by the kernel where they happen."""

from __future__ import annotations

import signal
import time
from array import array
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kickcall.cli.arguments import JsonOption, MachineArgument, OptionalDevice, seconds_of
from kickcall.cli.output import plain, print_json, print_table, working

if TYPE_CHECKING:
    from collections.abc import Callable

    from kickcall.attached import AttachedMachine
    from kickcall.model import Device, DeviceEvent, Notification, NotificationCount, Signalled
    from kickcall.vmm.recorder import Recording, Which

_ROUND_S = 0.25
"""Seconds between two looks whether the machine still has the notifiers that are counted."""
_LOOKING_SHARE = 0.05
"""The part of the time that such looks may take, where there are thousands of queues."""
_EVENTS_ROUND_S = 0.05
_TIMES_KEPT = 1 << 20
"""Times from kick to call that are kept of a queue, for its median."""


def trace(
    machine: MachineArgument,
    device: OptionalDevice = None,
    queue: Annotated[
        int | None, typer.Option("--queue", "-q", min=0, help="Only this queue of DEVICE.")
    ] = None,
    duration: Annotated[
        str, typer.Option("--duration", help="How long to count, as 5s or 500ms.", metavar="T")
    ] = "5s",
    events: Annotated[
        bool, typer.Option("--events", help="Print each kick and each call as it happens.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Count every kick and every call of every queue, and say who raised them.

    The kernel counts, where it signals: needs root. The machine is not touched. Ctrl-C ends it
    early, and the totals are printed all the same.

    \b
    kickcall trace vm0
    kickcall trace vm0 vscsi0 --queue 3 --duration 1m
    kickcall trace vm0 vscsi0 --events
    """
    from kickcall.attached import attach
    from kickcall.errors import UsageError

    if queue is not None and device is None:
        raise UsageError("--queue needs a DEVICE")
    seconds = seconds_of(duration)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _interrupted)
    # Events on a terminal are progress enough, and a second line there would be in their way.
    progress = nullcontext() if events else working(f"counting for {seconds:g} s; Ctrl-C ends it")
    with attach(machine) as attached:
        with progress, attached.record(device, queue, events=events) as recording:
            run = _Run(attached, recording, json=json)
            run.go(seconds, events=events)
        if json:
            run.print_json(streamed=events)
        else:
            run.print_table(device, queue)
    if run.failed is not None:
        raise run.failed


def _interrupted(_signal: int, _frame: object) -> None:
    """End as at Ctrl-C: with the totals, and nothing left in the kernel."""
    raise KeyboardInterrupt


class _Run:
    """One recording: how long it went, what it printed meanwhile, and its totals."""

    def __init__(self, attached: AttachedMachine, recording: Recording, *, json: bool) -> None:
        self._attached = attached
        self._recording = recording
        self._json = json
        # Notifications carry a clock that never jumps; people and programs want the time of day.
        self._offset = time.time() - time.monotonic()
        self._devices: dict[str, Device] = {one.info.path: one.info for one in attached.devices()}
        self._to_call: dict[tuple[str, int], array[float]] = {}
        self._printed = 0
        self.ended = "duration"
        self.failed: Exception | None = None
        self.seconds = 0.0
        self.counts: dict[Which, NotificationCount] = {}
        self.dropped = 0
        self.lost = 0

    def go(self, seconds: float, *, events: bool) -> None:
        """Count for so long, or until Ctrl-C, or until the machine ends."""
        from kickcall.errors import MachineGoneError

        recording = self._recording
        until = recording.started_at + seconds
        follow_at = 0.0
        try:
            while (now := time.monotonic()) < until:
                if events:
                    self._print_events(*recording.events())
                if now >= follow_at:
                    for what in recording.follow():
                        typer.echo(plain(what), err=True)
                    # Threads that signalled are looked up while they are there.
                    recording.counts()
                    took = time.monotonic() - now
                    follow_at = now + max(_ROUND_S, took / _LOOKING_SHARE)
                time.sleep(max(0.0, min(until - now, _EVENTS_ROUND_S if events else _ROUND_S)))
        except KeyboardInterrupt:
            self.ended = "interrupted"
        except MachineGoneError as exc:
            self.ended, self.failed = "machine-gone", exc
        self.seconds = time.monotonic() - recording.started_at
        self.counts = recording.counts()
        self.dropped = recording.dropped
        if events:
            self._print_events(*recording.events(last=True))
            # What came after the last count was printed may be in the events, and nowhere else.
            total = sum(one.total for one in self.counts.values()) + self.dropped
            self.lost = max(0, total - self._printed)

    def _print_events(self, found: list[Notification], lost: bool) -> None:
        if lost:
            typer.echo("some are missing here: they came faster than they were read", err=True)
        for one in found:
            self._printed += 1
            if one.after_kick_s is not None:
                times = self._to_call.setdefault((one.device, one.queue), array("d"))
                if len(times) < _TIMES_KEPT:
                    times.append(one.after_kick_s)
            if self._json:
                _print_line(self._event_json(one))
            else:
                self._print_event(one)

    def _print_event(self, one: Notification) -> None:
        at = time.strftime("%H:%M:%S", time.localtime(one.at + self._offset))
        fraction = f"{(one.at + self._offset) % 1:.6f}"[1:]
        after = "" if one.after_kick_s is None else f"  {_short_time(one.after_kick_s)} after kick"
        who = _who(one.by, one.comm, one.pid, one.tid)
        typer.echo(
            f"{at}{fraction}  {plain(self._id(one.device))} queue {one.queue}  {one.event}  "
            f"{who}{after}"
        )

    def _id(self, path: str) -> str:
        known = self._devices.get(path)
        return path if known is None else known.id

    def _queues(self) -> dict[tuple[str, int], dict[DeviceEvent, NotificationCount]]:
        found: dict[tuple[str, int], dict[DeviceEvent, NotificationCount]] = {}
        for which, count in self.counts.items():
            found.setdefault((which.device, which.queue), {})[which.event] = count
        return found

    def print_table(self, device: str | None, queue: int | None) -> None:
        """Print a line for each notification of each queue."""
        now = self._recording.started_at + self.seconds
        rows: list[tuple[object, ...]] = []
        for (path, number), counts in self._queues().items():
            times = self._times(path, number)
            for event, count in counts.items():
                to_call = ""
                if event == "call" and times is not None:
                    to_call = (
                        f"{_short_time(times['median_s'])} "
                        f"({_short_time(times['min_s'])} to {_short_time(times['max_s'])})"
                    )
                rows.append(
                    (
                        self._id(path),
                        number,
                        event,
                        count.total,
                        f"{count.total / self.seconds:.1f}",
                        None
                        if count.last_at is None
                        else f"{_short_time(now - count.last_at)} ago",
                        _by(count.by) or None,
                        to_call,
                    )
                )
        if rows:
            print_table(
                ("device", "#queue", "event", "#total", "#per s", "last", "by", "kick to call"),
                rows,
            )
        chosen = [
            one
            for one in self._attached.devices()
            if device is None or device in (one.info.id, one.info.path)
        ]
        for one in chosen:
            if one.refusal:
                typer.echo(f"not counted: {plain(one.refusal)}")
        typer.echo(
            f"{plain(self._attached.info.name)}: {len(self._queues())} queues, "
            f"{self.seconds:.1f} s" + (" (interrupted)" if self.ended == "interrupted" else "")
        )
        if self.dropped:
            typer.echo(
                f"Drops: up to {self.dropped} kicks and calls found no room in the kernel's table, "
                "or came in the midst of another: the totals lack them (count fewer queues: name a "
                "DEVICE, or --queue)"
            )
        if self.lost:
            typer.echo(f"Lost: {self.lost} kicks and calls were counted and not printed one by one")

    def print_json(self, *, streamed: bool) -> None:
        """Print the totals: one document, or the last line of a stream."""
        document = {
            "machine": self._attached.info.name,
            "pid": self._attached.info.pid,
            "seconds": round(self.seconds, 6),
            "ended": self.ended,
            "dropped": self.dropped,
            "lost": self.lost if streamed else None,
            "queues": [
                {
                    "device": path,
                    "id": self._id(path),
                    "queue": number,
                    "kick": self._count_json(counts, "kick"),
                    "call": self._count_json(counts, "call"),
                    "kick_to_call": self._times(path, number),
                }
                for (path, number), counts in self._queues().items()
            ],
        }
        if streamed:
            _print_line(document)
        else:
            print_json(document)

    def _times(self, path: str, number: int) -> dict[str, float] | None:
        import statistics

        times = self._to_call.get((path, number))
        if not times:
            return None
        return {
            "count": len(times),
            "min_s": round(min(times), 9),
            "median_s": round(statistics.median(times), 9),
            "max_s": round(max(times), 9),
        }

    def _count_json(
        self, counts: dict[DeviceEvent, NotificationCount], event: str
    ) -> dict[str, Any] | None:
        found = [count for one, count in counts.items() if one == event]
        if not found:
            return None
        (count,) = found
        return {
            "eventfd_id": count.eventfd_id,
            "total": count.total,
            "rate": round(count.total / self.seconds, 3),
            "last_at": self._on_the_wall(count.last_at),
            "by": [
                {
                    "who": one.by,
                    "pid": one.pid,
                    "tid": one.tid,
                    "comm": one.comm,
                    "total": one.total,
                    "last_at": self._on_the_wall(one.last_at),
                }
                for one in count.by
            ],
        }

    def _event_json(self, one: Notification) -> dict[str, Any]:
        return {
            "at": self._on_the_wall(one.at),
            "device": one.device,
            "id": self._id(one.device),
            "queue": one.queue,
            "event": one.event,
            "who": one.by,
            "pid": one.pid,
            "tid": one.tid,
            "comm": one.comm,
            "after_kick_s": None if one.after_kick_s is None else round(one.after_kick_s, 9),
        }

    def _on_the_wall(self, at: float | None) -> float | None:
        return None if at is None else round(at + self._offset, 6)


def _print_line(value: object) -> None:
    import msgspec

    print(msgspec.json.encode(value).decode(), flush=True)


def _by(signalled: tuple[Signalled, ...]) -> str:
    """Return who raised something how often; a guest's virtual CPUs are one."""
    totals: dict[str, int] = {}
    for one in signalled:
        name = _who(one.by, one.comm, one.pid, one.tid)
        totals[name] = totals.get(name, 0) + one.total
    return ", ".join(f"{name} {total}" for name, total in totals.items())


def _who(by: str, comm: str, pid: int | None, tid: int) -> str:
    match by:
        case "guest" | "vhost":
            return by
        case "qemu":
            # QEMU names its threads only if told to (-name …,debug-threads=on).
            return "QEMU main loop" if tid == pid else f"QEMU thread {tid} ({plain(comm)})"
        case "kernel":
            return f"kernel, in {plain(comm)}"
        case "unknown":
            return f"thread {plain(comm)}"
    return plain(comm) if pid is None else f"{plain(comm)}[{pid}]"


def _short_time(seconds: float) -> str:
    """Return a time as people say it: 12 µs, 3.4 ms, 5.6 s."""
    units: tuple[tuple[float, str, Callable[[float], str]], ...] = (
        (1e-3, "µs", lambda value: f"{value * 1e6:.0f}"),
        (1.0, "ms", lambda value: f"{value * 1e3:.1f}"),
    )
    for limit, unit, text in units:
        if abs(seconds) < limit:
            return f"{text(seconds)} {unit}"
    return f"{seconds:.1f} s"
