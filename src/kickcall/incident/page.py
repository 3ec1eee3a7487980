"""How is an incident told in one HTML file, with no script and nothing that is loaded?

Pure. What happened, the path with the break, the ring and the counters over time stand on the first
screen; tables with all the rest below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.draw.path import path_picture
from kickcall.draw.ring import ring_picture
from kickcall.draw.svg import COLOURS, path_svg, ring_svg
from kickcall.draw.svg import STYLE as DRAWING
from kickcall.draw.text import escaped
from kickcall.draw.tones import tone_of
from kickcall.incident import tables
from kickcall.incident.plot import STYLE as PLOT
from kickcall.incident.plot import by_queue, curve, plot_svg
from kickcall.incident.summary import command_lines, headline, secrets_note

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kickcall.incident.facts import Facts, Line, QueueFacts
    from kickcall.incident.plot import Looks
    from kickcall.incident.tables import Table
    from kickcall.model import Verdict

_STALLS_MOST = 12
_HEALTHY_MOST = 4
_CELL_MOST = 1000
_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--kc-paper);color:var(--kc-ink);
 font:15px/1.45 system-ui,"Segoe UI","DejaVu Sans",sans-serif}
main{max-width:1240px;margin:0 auto;padding:14px 20px 40px}
h1{font-size:24px;line-height:1.25;margin:0 0 2px;overflow-wrap:anywhere}
h1.bad,.word.bad{color:var(--kc-bad)}
h2{font-size:18px;margin:26px 0 8px;overflow-wrap:anywhere}
p{margin:4px 0}
.faint{color:var(--kc-faint)}
.why{font-size:16px}
.next{display:inline-block;margin:6px 0 8px;padding:4px 10px;border:1px solid var(--kc-line);
 border-radius:8px;background:var(--kc-box);overflow-wrap:anywhere}
.picture{display:grid;grid-template-columns:minmax(0,7fr) minmax(0,4fr);gap:10px 22px;
 align-items:start}
.picture svg{display:block;width:100%;height:auto}
.side{display:grid;grid-template-columns:minmax(90px,1fr) minmax(0,2fr);gap:10px;
 align-items:center}
.side .plot{grid-column:1/-1}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:1px 12px;margin:0;
 font-size:13px}
dt{color:var(--kc-faint)}dd{margin:0;overflow-wrap:anywhere}
.evidence{columns:3 300px;column-gap:26px;margin-top:10px}
.evidence div{break-inside:avoid;display:flex;gap:8px;justify-content:space-between;
 border-bottom:1px solid var(--kc-line);font-size:13px;padding:2px 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;width:100%}
th,td{text-align:left;padding:3px 10px 3px 0;border-bottom:1px solid var(--kc-line);
 vertical-align:top;overflow-wrap:anywhere}
th{color:var(--kc-faint);font-weight:600;white-space:nowrap}
.number{text-align:right;font-variant-numeric:tabular-nums}
pre{font:12px/1.45 ui-monospace,"DejaVu Sans Mono",monospace;white-space:pre-wrap;
 overflow-wrap:anywhere;background:var(--kc-box);border:1px solid var(--kc-line);
 border-radius:8px;padding:10px;margin:6px 0}
code{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:.94em}
.tall{display:none}
@media screen and (max-width:820px){.picture{grid-template-columns:1fr}.wide{display:none}
 .tall{display:block}}
@media print{main{max-width:none;padding:0}body{font-size:12px}
 .picture{grid-template-columns:minmax(0,7fr) minmax(0,4fr)}h2{break-after:avoid}
 tr,.picture{break-inside:avoid}}
""".replace("\n", "")
# Whatever a name may smuggle in: nothing is run, loaded or sent.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(facts: Facts, lines: Sequence[Line]) -> str:
    """Return an incident as one HTML document."""
    return "".join(_parts(facts, by_queue(lines)))


def _parts(facts: Facts, looks: Looks) -> Iterator[str]:
    stalls = facts.stalls
    title = escaped(headline(facts), _CELL_MOST)
    yield (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escaped(_POLICY)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{title}</title><style>{COLOURS}{DRAWING}{PLOT}{_STYLE}</style></head><body><main>"
    )
    machine, host = facts.machine, facts.host
    yield f"<h1{' class=bad' if stalls else ''}>{'✗ ' if stalls else ''}{title}</h1>"
    yield (
        f'<p class="faint">{escaped(tables.moment(facts.at))} · QEMU {escaped(machine.version)} · '
        f"{escaped(host.kernel)} · {escaped(machine.run_state or 'state not known')} · "
        f"kickcall {escaped(facts.kickcall)}</p>"
    )
    queues = {
        (one.fixed.device, one.fixed.queue): one
        for device in facts.devices
        for one in device.queues
    }
    found = set(map(id, facts.found))
    for number, verdict in enumerate(stalls[:_STALLS_MOST]):
        when = "as the watcher found it" if id(verdict) in found else ""
        queue = queues.get((verdict.device, verdict.queue))
        yield from _stall(facts, verdict, queue, looks, when, first=number == 0)
    if len(stalls) > _STALLS_MOST:
        yield f"<p>{len(stalls) - _STALLS_MOST} more stalls are in the table of queues.</p>"
    if not stalls:
        yield from _healthy(facts, looks)
    yield "<h2>Environment</h2><dl>"
    for name, value in tables.environment(facts):
        yield f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>"
    yield "</dl>"
    for table in tables.in_order(facts):
        yield from _table(table)
    yield "<h2>QEMU's command line</h2><pre>"
    yield "\n".join(escaped(line, _CELL_MOST) for line in command_lines(machine.command))
    yield f'</pre><p class="faint">{escaped(secrets_note(facts), _CELL_MOST)}</p>'
    yield "</main></body></html>\n"


def _stall(
    facts: Facts,
    verdict: Verdict,
    queue: QueueFacts | None,
    looks: Looks,
    when: str,
    *,
    first: bool,
) -> Iterator[str]:
    picture = path_picture(verdict, facts.machine.name)
    if not first:
        tone = tone_of(verdict.verdict)
        yield f'<h2><span class="word {tone}">{picture.mark} {escaped(picture.word)}</span>: '
        yield f"{escaped(picture.device)} queue {verdict.queue}</h2>"
    lasting = f"{picture.lasting}{', ' if when else ''}{when}"
    yield f'<p class="why">{escaped(picture.because)} <span class="faint">({escaped(lasting)})'
    yield f'</span></p><p class="next"><b>Next:</b> {escaped(picture.remedy, 600)}</p>'
    yield f'<div class="picture"><div class="wide">{path_svg(picture)}</div>'
    yield f'<div class="tall">{path_svg(picture, tall=True)}</div><div class="side">'
    if queue is not None:
        yield from _side(queue, looks)
    yield '</div></div><div class="evidence">'
    for what, value in picture.evidence:
        yield f'<div><span class="faint">{escaped(what)}</span><b>{escaped(value)}</b></div>'
    yield "</div>"


def _side(queue: QueueFacts, looks: Looks) -> Iterator[str]:
    """Yield the ring with its positions, and the counters over time."""
    fixed = queue.fixed
    if queue.last is not None:
        ring = ring_picture(fixed, queue.last)
        yield f"<div>{ring_svg(ring)}</div><dl>"
        for name, value in ring.positions():
            yield f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>"
        yield f"<dt>ring</dt><dd>{escaped(ring.told)}</dd></dl>"
    moved = curve(fixed, looks)
    yield f'<div class="plot">{plot_svg(moved, f"queue {fixed.queue}")}'
    yield f'<p class="faint">{escaped(moved.told)}</p></div>'


def _healthy(facts: Facts, looks: Looks) -> Iterator[str]:
    """Yield the queues that moved most, where nothing is wrong."""
    every = [(one, curve(one.fixed, looks)) for device in facts.devices for one in device.queues]
    every.sort(key=lambda two: -(two[1].completed[-1] if two[1].completed else 0))
    for queue, _ in every[:_HEALTHY_MOST]:
        device = queue.fixed.device.rpartition("/")[2]
        yield f"<h2>{escaped(device)} queue {queue.fixed.queue}</h2>"
        yield '<div class="picture"><div class="side">'
        yield from _side(queue, looks)
        yield "</div></div>"


def _table(table: Table) -> Iterator[str]:
    if not table.rows:
        return
    numbers = [name.startswith("#") for name in table.columns]
    yield f'<h2>{escaped(table.title)}</h2><div class="scroll"><table><thead><tr>'
    for name in table.columns:
        css = " class=number" if name.startswith("#") else ""
        yield f"<th{css}>{escaped(name.removeprefix('#'))}</th>"
    yield "</tr></thead><tbody>"
    for row in table.rows:
        cells = (
            f"<td{' class=number' if number else ''}>{escaped(cell, _CELL_MOST)}</td>"
            for cell, number in zip(row, numbers, strict=True)
        )
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"
    if table.note:
        yield f'<p class="faint">{escaped(table.note)}</p>'
