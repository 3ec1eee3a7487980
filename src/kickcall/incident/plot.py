"""How do a queue's counters move over time, drawn: as SVG without a script, and as a line of text?

Pure. Positions are unwrapped to counts since the first look, so that lines only climb: where the
line of what was completed stays below that of what was published, work waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kickcall.draw.spark import sparkline
from kickcall.draw.text import escaped
from kickcall.model import Layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kickcall.diagnose.states import QueueFixed
    from kickcall.incident.facts import Line

_WIDTH, _HEIGHT = 420, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 30, 28
_POINTS_MOST = 400
_TEXT_WIDTH = 60
_RING_MOST = 1 << 15

STYLE = """
.kc .grid{stroke:var(--kc-line);stroke-width:1;fill:none}
.kc .published{stroke:var(--kc-fetch);stroke-width:2.5;fill:none}
.kc .completed{stroke:var(--kc-device);stroke-width:2.5;fill:none;stroke-dasharray:7 3}
.kc .waits{fill:var(--kc-bad);opacity:.16;stroke:none}
.kc .axis{font-size:11px;fill:var(--kc-faint)}
.kc .key{font-size:12px;font-weight:600}
"""
"""Beside the style sheet of the other drawings."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Two counters of one queue over time, in seconds since the first look."""

    times: tuple[float, ...]
    published: tuple[int, ...]
    completed: tuple[int, ...]
    """Both count from what was completed at the first look."""

    @property
    def waiting(self) -> tuple[int, ...]:
        """How many were published and not completed."""
        return tuple(a - b for a, b in zip(self.published, self.completed, strict=True))

    @property
    def told(self) -> str:
        """The curve in words."""
        if not self.times:
            return "no look at the queue was kept"
        done = self.completed[-1] - self.completed[0]
        return (
            f"{done} completed in {self.times[-1]:.1f} s, {self.waiting[-1]} outstanding at the end"
        )


Looks = dict[tuple[str, int], list["Line"]]
"""The looks at each queue, by device and number."""


def by_queue(lines: Iterable[Line]) -> Looks:
    """Return the looks at each queue."""
    looks: Looks = {}
    for line in lines:
        looks.setdefault((line.device, line.queue), []).append(line)
    return looks


def curve(fixed: QueueFixed, looks: Looks) -> Curve:
    """Return how a queue's counters moved. Whatever the looks say, it is bounded."""
    times: list[float] = []
    published: list[int] = []
    completed: list[int] = []
    size = min(max(fixed.size, 1), _RING_MOST)
    lap = 2 * size if fixed.layout is Layout.PACKED else 1 << 16
    start, last = 0.0, 0
    for line in looks.get((fixed.device, fixed.queue), ()):
        if line.avail_idx is None or line.used_idx is None:
            continue
        used = _linear(fixed, size, line.used_idx)
        ahead = (_linear(fixed, size, line.avail_idx) - used) % lap
        if not times:
            start, last = line.at, used
        at = max(line.at - start, times[-1] if times else 0.0)
        done = (completed[-1] if completed else 0) + (used - last) % lap
        last = used
        times.append(at)
        completed.append(done)
        published.append(done + min(ahead, size))
    return Curve(tuple(times), tuple(published), tuple(completed))


def _linear(fixed: QueueFixed, size: int, value: int) -> int:
    """Return a position as a number that only wraps at the end of a lap (virtio 1.4, 2.8.10)."""
    if fixed.layout is Layout.PACKED:
        # The wrap counter begins with 1, so that it stands for the first pass.
        return (0 if value >> 15 else size) + (value & 0x7FFF) % size
    return value & 0xFFFF


def plot_svg(one: Curve, name: str) -> str:
    """Return the curve as SVG."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="kc" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'role="img" aria-label="{escaped(name)} over time: {escaped(one.told)}">'
    )
    if not one.times:
        return f'{head}<text class="axis" x="10" y="40">{escaped(one.told)}</text></svg>'
    long = max(one.times[-1], 0.001)
    low = min(one.completed[0], one.published[0])
    high = max(*one.published, low + 1)
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(at: float, value: int) -> str:
        x = _LEFT + at / long * wide
        y = _TOP + tall - (value - low) / (high - low) * tall
        return f"{x:.1f} {y:.1f}"

    upper = _steps(one.times, one.published)
    lower = _steps(one.times, one.completed)
    area = " ".join(place(*point) for point in (*upper, *reversed(lower)))
    foot = _TOP + tall
    return "".join(
        (
            head,
            f'<path class="grid" d="M{_LEFT} {_TOP}V{foot}H{_WIDTH - _RIGHT}"/>',
            f'<polygon class="waits" points="{area}"/>',
            f'<polyline class="published" points="{" ".join(place(*p) for p in upper)}"/>',
            f'<polyline class="completed" points="{" ".join(place(*p) for p in lower)}"/>',
            f'<text class="axis" x="{_LEFT - 6}" y="{_TOP + 8}" text-anchor="end">{high}</text>',
            f'<text class="axis" x="{_LEFT - 6}" y="{foot}" text-anchor="end">{low}</text>',
            f'<text class="axis" x="{_LEFT}" y="{_HEIGHT - 10}">0 s</text>',
            f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 10}" text-anchor="end">'
            f"{long:.1f} s</text>",
            f'<path class="published" d="M{_LEFT} 14h26"/>',
            f'<text class="key" x="{_LEFT + 32}" y="18">published</text>',
            f'<path class="completed" d="M{_LEFT + 120} 14h26"/>',
            f'<text class="key" x="{_LEFT + 152}" y="18">completed</text>',
            f'<rect class="waits" x="{_LEFT + 244}" y="7" width="26" height="13"/>',
            f'<text class="key" x="{_LEFT + 276}" y="18">waits</text>',
            "</svg>",
        )
    )


def _steps(times: Sequence[float], values: Sequence[int]) -> list[tuple[float, int]]:
    """Return the corners of a curve that holds each value until the next, at most some hundred."""
    step = max(1, len(times) // _POINTS_MOST)
    chosen = [*range(0, len(times), step)]
    if chosen[-1] != len(times) - 1:
        chosen.append(len(times) - 1)
    corners = [(times[0], values[0])]
    for k in chosen[1:]:
        corners += [(times[k], corners[-1][1]), (times[k], values[k])]
    return corners


def plot_text(one: Curve, name: str) -> str:
    """Return the curve as lines of text: what was completed, and what waited, bit by bit."""
    if not one.times or one.times[-1] <= 0:
        return f"{name}: {one.told}"
    bits = one.times[-1] / _TEXT_WIDTH
    done, waited = [0.0] * _TEXT_WIDTH, [0.0] * _TEXT_WIDTH
    before = one.completed[0]
    at = 0
    for bit in range(_TEXT_WIDTH):
        end = (bit + 1) * bits
        while at + 1 < len(one.times) and (one.times[at + 1] <= end or bit == _TEXT_WIDTH - 1):
            at += 1
        done[bit], before = one.completed[at] - before, one.completed[at]
        waited[bit] = one.waiting[at]
    return "\n".join(
        (
            f"{name}: {one.told}",
            f"  completed   |{sparkline(done, _TEXT_WIDTH)}| {max(done):g} at most in {bits:.2g} s",
            f"  outstanding |{sparkline(waited, _TEXT_WIDTH)}| {max(waited):g} at most",
        )
    )
