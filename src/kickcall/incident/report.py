"""What becomes a report: a bundle that was just collected, or one that lies in a file?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.draw.text import printable
from kickcall.incident import archive
from kickcall.incident.facts import BundleError, facts_from, lines_from
from kickcall.incident.page import page
from kickcall.incident.plot import by_queue, curve, plot_text
from kickcall.incident.summary import summary

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kickcall.incident.archive import Member
    from kickcall.incident.facts import Facts, Line

_FACTS, _SAMPLES, _BEFORE = "facts.json", "samples.jsonl", "samples-before.jsonl"
WANTED = frozenset({_FACTS, _SAMPLES, _BEFORE})
FORMATS = ("html", "md")
_PLOTS_MOST = 4


def members_of(path: Path) -> dict[str, bytes]:
    """Return what a report needs of a bundle in a file. Raises BundleError."""
    found = archive.read(path, WANTED)
    if _FACTS not in found:
        raise BundleError(f"{path} is no bundle of kickcall's: it has no {_FACTS}")
    return found


def contents(members: list[Member]) -> dict[str, bytes]:
    """Return what a report needs of a bundle that was collected: without secrets, like a file."""
    return {one.name: one.content for one in members if one.name in WANTED}


def told(members: dict[str, bytes]) -> tuple[Facts, list[Line]]:
    """Return what is known, and the looks at all queues by their time. Raises BundleError."""
    facts = facts_from(members[_FACTS])
    lines = [line for name in (_BEFORE, _SAMPLES) for line in lines_from(members.get(name, b""))]
    return facts, sorted(lines, key=lambda line: line.at)


def report(facts: Facts, lines: list[Line], form: str) -> str:
    """Return the report: `html`, or `md`."""
    if form == "md":
        return summary(facts, plots=_plots(facts, lines))
    return page(facts, lines)


def _plots(facts: Facts, lines: list[Line]) -> Iterator[str]:
    """Yield the counters over time of the queues that are stalled, as text."""
    stalled = [(one.device, one.queue) for one in facts.stalls]
    every = {
        (one.fixed.device, one.fixed.queue): one.fixed
        for device in facts.devices
        for one in device.queues
    }
    chosen = [every[key] for key in dict.fromkeys(stalled or every) if key in every]
    looks = by_queue(lines)
    for fixed in chosen[:_PLOTS_MOST]:
        name = f"{fixed.device.rpartition('/')[2]} queue {fixed.queue}"
        yield plot_text(curve(fixed, looks), printable(name))
