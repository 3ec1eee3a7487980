"""What does a page get told of machines, of one machine, of one queue? Plain values for JSON.

Every text is printable; the page shows texts as texts. Drawings come from kickcall.draw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kickcall.draw.path import path_picture
from kickcall.draw.svg import path_svg
from kickcall.draw.text import duration, printable, rate, short
from kickcall.draw.tones import mark_of, severity, tone_of
from kickcall.model import VerdictKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kickcall.draw.ring import RingPicture
    from kickcall.model import Injection
    from kickcall.watch.live import LiveMachine, LiveQueue
    from kickcall.watch.timeline import Moment

_WORST = 50
"""Stalled queues that the overview names."""


def verdict_of(kind: VerdictKind) -> dict[str, Any]:
    """Return a verdict as mark, word and tone."""
    return {"mark": mark_of(kind), "word": str(kind), "tone": str(tone_of(kind))}


def sane(name: str) -> str:
    """Return a name as it can be encoded; one that cannot is another one then."""
    return name.encode(errors="replace").decode()


def find(machines: Iterable[LiveMachine], wanted: str) -> LiveMachine | None:
    """Return the machine with that key, or the only one of that name."""
    named = []
    for machine in machines:
        if machine.key == wanted:
            return machine
        if sane(machine.name) == wanted:
            named.append(machine)
    return named[0] if len(named) == 1 else None


def overview(machines: Sequence[LiveMachine], at: float) -> dict[str, Any]:
    """Return a row for every machine, by key, and the worst of all queues."""
    rows: dict[str, Any] = {}
    stalled: list[tuple[float, LiveMachine, LiveQueue, VerdictKind]] = []
    queues = 0
    names: dict[str, int] = {}
    for machine in machines:
        names[machine.name] = names.get(machine.name, 0) + 1
    for machine in machines:
        bad = out = 0
        requests = completions = 0.0
        of_all = machine.of_all(at)
        worst = of_all or VerdictKind.IDLE
        worst_rank = severity(worst)
        for queue in machine.queues:
            kind = of_all or queue.kind(at)
            if (rank := severity(kind)) > worst_rank:
                worst, worst_rank = kind, rank
            if rank == 3:
                bad += 1
                stalled.append((queue.stalled_for(at), machine, queue, kind))
            requests += queue.requests_s
            completions += queue.completions_s
            if not queue.inbox:
                out += queue.outstanding
        for device in machine.devices:
            if device.without_queues is not None:
                kind = device.without_queues.verdict
                if (rank := severity(kind)) > worst_rank:
                    worst, worst_rank = kind, rank
                bad += rank == 3
        queues += len(machine.queues)
        rows[machine.key] = {
            "name": printable(machine.name),
            "link": sane(machine.name) if names[machine.name] == 1 else machine.key,
            "pid": machine.machine.pid,
            "state": machine.state(at),
            "why": printable(machine.why_not),
            "verdict": verdict_of(worst),
            "rank": worst_rank,
            "queues": len(machine.queues),
            "stalled": bad,
            "out": out,
            "requests": rate(requests),
            "completions": rate(completions),
        }
    stalled.sort(key=lambda one: -one[0])
    return {
        "machines": rows,
        "queues": queues,
        "stalled": len(stalled),
        "worst": [
            {
                "key": f"{machine.key} {sane(queue.fixed.device)} {queue.fixed.queue}",
                "machine": printable(machine.name),
                "link": rows[machine.key]["link"],
                "device": sane(queue.fixed.device),
                "name": short(queue.fixed.device),
                "queue": queue.fixed.queue,
                "verdict": verdict_of(kind),
                "hop": queue.verdict.hop if queue.verdict is not None else 0,
                "for": duration(lasted),
            }
            for lasted, machine, queue, kind in stalled[:_WORST]
        ],
    }


def machine_frame(machine: LiveMachine, at: float) -> dict[str, Any]:
    """Return one machine: its devices, and its queues by device and number."""
    return {
        "name": printable(machine.name),
        "pid": machine.machine.pid,
        "version": printable(machine.machine.version),
        "state": machine.state(at),
        "why": printable(machine.why_not),
        "devices": [
            {
                "device": sane(one.path),
                "name": short(one.path),
                "kind": printable(one.kind),
                "backend": str(one.backend),
                "verdict": verdict_of(one.without_queues.verdict) if one.without_queues else None,
                "why": printable(one.without_queues.evidence[0].value)
                if one.without_queues
                else "",
            }
            for one in machine.devices
        ],
        "queues": {
            f"{sane(queue.fixed.device)} {queue.fixed.queue}": {
                "device": sane(queue.fixed.device),
                "queue": queue.fixed.queue,
                "verdict": verdict_of(machine.kind(queue, at)),
                "hop": queue.verdict.hop
                if queue.verdict is not None and machine.kind(queue, at).stalled
                else 0,
                **_numbers(queue, at),
                "ring": ring_values(queue.ring()),
            }
            for queue in machine.queues
        },
    }


def queue_frame(machine: LiveMachine, queue: LiveQueue, at: float) -> dict[str, Any]:
    """Return one queue: its path and ring as drawings, its evidence, its last half minute."""
    picture = path_picture(machine.verdict(queue, at), machine.name)
    ring = queue.ring()
    return {
        "machine": picture.machine,
        "device": sane(queue.fixed.device),
        "name": picture.device,
        "queue": queue.fixed.queue,
        "verdict": verdict_of(picture.verdict),
        "hop": picture.hop,
        "headline": picture.word,
        "lasting": picture.lasting,
        "because": picture.because,
        "remedy": picture.remedy,
        "event": picture.event,
        "path": path_svg(picture),
        "tall": path_svg(picture, tall=True),
        "evidence": picture.evidence,
        "facts": [
            ("back-end", str(queue.fixed.backend)),
            ("layout", str(queue.fixed.layout)),
            ("size", str(queue.fixed.size)),
            ("event index", "yes" if queue.fixed.event_idx else "no"),
        ],
        **_numbers(queue, at),
        "kicks": rate(queue.kicks_s),
        "calls": rate(queue.calls_s),
        "ring": ring_values(ring),
        "positions": ring.positions(),
        "works": tuple(queue.works),
        "ages": tuple(round(age, 2) for age in queue.ages),
    }


def _numbers(queue: LiveQueue, at: float) -> dict[str, Any]:
    return {
        "out": queue.outstanding,
        "age": duration(queue.age(at)),
        "inbox": queue.inbox,
        "requests": rate(queue.requests_s, at_least=queue.at_least),
        "completions": rate(queue.completions_s, at_least=queue.at_least),
    }


def ring_values(ring: RingPicture) -> dict[str, Any]:
    """Return what a page needs to move a ring that was drawn once."""
    return {
        "arcs": [(str(arc.part), arc.start, arc.length) for arc in ring.arcs],
        "head": ring.head,
        "told": ring.told,
        "out": ring.outstanding,
        "problem": printable(ring.problem),
    }


def moment(one: Moment) -> dict[str, Any]:
    """Return a moment of the time line."""
    return {
        "at": one.at,
        "until": one.until,
        "stall": one.stall,
        "machine": one.machine,
        "device": one.device,
        "queue": one.queue,
        "what": one.what,
        "outcome": one.outcome,
        "by": one.by,
        "tone": str(one.tone),
    }


def injection(one: Injection) -> dict[str, Any]:
    """Return an injection, done or planned."""
    return {
        "event": str(one.event),
        "via": str(one.via),
        "target": printable(one.target),
        "machine": printable(one.machine),
        "device": short(one.device),
        "queue": one.queue,
        "dry_run": one.dry_run,
        "before": {
            "count": one.before.count,
            "avail": one.before.avail_idx,
            "used": one.before.used_idx,
        },
        "after": {
            "count": one.after.count,
            "avail": one.after.avail_idx,
            "used": one.after.used_idx,
        },
    }
