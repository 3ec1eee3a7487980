"""How is an incident told in plain text: at the top of a bundle, in a mail, in a ticket?

Pure. It is Markdown, and reads well as it is. Data stands in indented blocks and in code spans,
where neither Markdown nor HTML means anything; a name can leave neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.draw.lines import evidence_lines, path_lines, plain
from kickcall.draw.path import path_picture
from kickcall.draw.text import printable
from kickcall.incident import tables

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kickcall.incident.archive import Member
    from kickcall.incident.facts import Facts
    from kickcall.incident.tables import Table

_WIDTH = 92
_STALLS_MOST = 8
_CELL_MOST = 60
_COMMAND_MOST = 400


def summary(facts: Facts, members: Sequence[Member] = (), plots: Iterable[str] = ()) -> str:
    """Return an incident as Markdown. `members` are the other files of its bundle."""
    return "\n".join([*_told(facts, members, plots), ""])


def headline(facts: Facts) -> str:
    """Return what happened in one line of text; names in it are printable and not escaped."""
    name = printable(facts.machine.name)
    stalls = facts.stalls
    if not stalls:
        why = "no stall was found" if facts.verdicts else "its queues could not be looked at"
        return f"{name}: {why}"
    picture = path_picture(stalls[0])
    more = f", and {len(stalls) - 1} more" if len(stalls) > 1 else ""
    return f"{picture.word}: {name} {picture.device} queue {picture.queue}{more}"


def _told(facts: Facts, members: Sequence[Member], plots: Iterable[str]) -> Iterator[str]:
    yield f"# {_span(headline(facts))}"
    yield ""
    yield from _block(f"{name:<14} {value}" for name, value in tables.environment(facts))
    stalls = facts.stalls
    found = set(map(id, facts.found))
    for one in stalls[:_STALLS_MOST]:
        picture = path_picture(one, facts.machine.name)
        when = "found by the watcher" if id(one) in found else "seen now"
        yield f"## {_span(f'{picture.mark} {picture.word}: {picture.device} queue {one.queue}')}"
        yield ""
        yield f"As {when}:"
        yield ""
        yield from _block(plain(path_lines(picture, _WIDTH)).split("\n"))
        yield from _block(plain(evidence_lines(picture, _WIDTH)).split("\n"))
    if len(stalls) > _STALLS_MOST:
        yield f"{len(stalls) - _STALLS_MOST} more stalls: see facts.json."
        yield ""
    for plot in plots:
        yield from _block(plot.split("\n"))
    for table in tables.in_order(facts):
        yield from _table(table)
    yield "## QEMU's command line"
    yield ""
    yield from _block(command_lines(facts.machine.command))
    yield secrets_note(facts)
    if members:
        yield ""
        yield "## In this file"
        yield ""
        yield from _block(f"{one.name:<24} {one.what}" for one in members)


def secrets_note(facts: Facts) -> str:
    """Return what was left out on purpose."""
    removed = facts.machine.removed
    words = f"{removed} word{'s' * (removed != 1)} of it had a secret, now `(removed)`"
    return (
        f"{words if removed else 'No secret was seen in it'}. Nothing here is from the guest's "
        "memory but the indices and flags of its rings. Read it before you send it on all the same."
    )


def command_lines(command: Sequence[str]) -> list[str]:
    """Return a command line with each option on a line of its own."""
    lines: list[str] = []
    for word in command:
        text = printable(word, _COMMAND_MOST)
        if lines and not text.startswith("-"):
            lines[-1] += f" {text}"
        else:
            lines.append(text)
    return lines


def _table(table: Table) -> Iterator[str]:
    if not table.rows:
        return
    yield f"## {table.title}"
    yield ""
    yield from _block(_aligned(table))
    if table.note:
        yield table.note
        yield ""


def _aligned(table: Table) -> Iterator[str]:
    """Yield the lines of a table, its columns as wide as they must be."""
    names = [name.removeprefix("#") for name in table.columns]
    last = len(names) - 1
    rows = [
        [cell if k == last else cell[:_CELL_MOST] for k, cell in enumerate(row)]
        for row in [names, *table.rows]
    ]
    widths = [max(len(row[k]) for row in rows) for k in range(last + 1)]
    for row in rows:
        cells = [
            cell.rjust(width) if name.startswith("#") else cell if k == last else cell.ljust(width)
            for k, (cell, width, name) in enumerate(zip(row, widths, table.columns, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _span(text: str) -> str:
    """Return printable text as a code span."""
    return f"`{text.replace('`', chr(0x2CB)) or '-'}`"


def _block(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines as an indented block: nothing in it means anything."""
    yield from (f"    {line}".rstrip() for line in lines)
    yield ""
