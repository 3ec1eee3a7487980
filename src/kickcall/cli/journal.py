"""`kickcall journal`: what was seen and done; and how commands that inject get into it."""

from __future__ import annotations

import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kickcall.cli.arguments import JsonOption, seconds_of
from kickcall.cli.output import plain, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.watch.rows import InjectionRow, StallRow
    from kickcall.watch.witness import JournalWitness

JournalOption = Annotated[
    Path | None,
    typer.Option(
        "--journal",
        metavar="PATH",
        envvar="KICKCALL_JOURNAL",
        show_envvar=True,
        dir_okay=False,
        help="The journal; not given: /var/lib/kickcall/journal.db for root.",
        show_default=False,
    ),
]


def warn(text: str) -> None:
    """Print one line of warning."""
    typer.echo(f"kickcall: warning: {plain(text)}", err=True)


@contextmanager
def by_hand(command: str) -> Iterator[JournalWitness]:
    """Give what journals the injections of a command; one that cannot is one warning."""
    from kickcall.watch.witness import JournalWitness

    witness = JournalWitness(f"kickcall {command}", warn)
    try:
        yield witness
    finally:
        witness.close()


def journal(
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="T", help="Only what lasted or came since, as 30m or 2h."),
    ] = None,
    machine: Annotated[
        str | None, typer.Option("--machine", metavar="NAME", help="Only this machine.")
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, max=100_000, help="At most so many, the latest.")
    ] = 100,
    path: JournalOption = None,
    json: JsonOption = False,
) -> None:
    """Print the stalls that were seen and the events that were injected, the newest last.

    \b
    kickcall journal
    kickcall journal --since 1h --machine vm0
    kickcall journal --limit 1000 --json
    """
    from kickcall.watch.journal import Journal

    start = 0.0 if since is None else time.time() - seconds_of(since)
    book = Journal(path, reading=True)
    try:
        stalls = book.stalls(since=start, machine=machine, limit=limit)
        injections = book.injections(since=start, machine=machine, limit=limit)
    finally:
        book.close()
    rows: list[tuple[float, StallRow | InjectionRow]] = [
        *((one.began, one) for one in stalls),
        *((one.at, one) for one in injections),
    ]
    latest = [row for _, row in sorted(rows, key=lambda pair: pair[0])][-limit:]
    if json:
        print_json({"journal": str(book.path), "entries": [_to_json(row) for row in latest]})
    elif latest:
        print_table(
            ("when", "machine", "device", "#queue", "what", "by", "outcome"),
            [_to_cells(row) for row in latest],
        )
    else:
        typer.echo(f"nothing in {plain(book.path)}" + (f" since {since}" if since else ""))


def entries_of(machine: str, since: float, limit: int) -> list[dict[str, Any]]:
    """Return the entries of a machine, the latest last, with `what` and `outcome` in words.

    None where there is no journal. Raises JournalError where it cannot be read.
    """
    from kickcall.watch.database import default_path
    from kickcall.watch.journal import Journal

    if not default_path().exists():
        return []
    book = Journal(reading=True)
    try:
        rows: list[StallRow | InjectionRow] = [
            *book.stalls(since=since, machine=machine, limit=limit),
            *book.injections(since=since, machine=machine, limit=limit),
        ]
    finally:
        book.close()
    entries = []
    for row in rows:
        _, _, _, _, what, _, outcome = _to_cells(row)
        entries.append({**_to_json(row), "what": what, "outcome": outcome})
    return sorted(entries, key=lambda entry: float(entry["at"]))[-limit:]


def _cause(row: StallRow | InjectionRow) -> object:
    return row.evidence[0]["value"] if row.evidence else ""


def _to_cells(row: StallRow | InjectionRow) -> tuple[object, ...]:
    from kickcall.watch.rows import StallRow

    if isinstance(row, StallRow):
        when, what, by = row.began, f"{row.verdict}, hop {row.hop}", "-"
        if row.ended is None:
            outcome = "lasts"
        else:
            outcome = f"{row.ending} after {max(0.0, row.ended - row.began):.2f} s"
    else:
        when, what = row.at, f"{row.event} via {row.via}"
        by = f"{row.by_command}[{row.by_pid}] uid {row.by_uid}"
        outcome = _outcome(row)
    at = datetime.fromtimestamp(when).astimezone().isoformat(" ", "milliseconds")
    device = row.device.removeprefix("/machine/peripheral/")
    return at, row.machine, device, row.queue, what, by, outcome


def _outcome(row: InjectionRow) -> str:
    if row.outcome is None:
        return "unknown outcome"
    if row.outcome != "ok":
        return f"{'unknown outcome' if row.outcome == 'unknown' else row.outcome}: {row.error}"
    helped = {None: "written", True: "helped", False: "did not help"}[row.helped]
    moved = row.used_before is not None and row.used_before != row.used_after
    return f"{helped}, used.idx {row.used_before} to {row.used_after}" if moved else helped


def _to_json(row: StallRow | InjectionRow) -> dict[str, Any]:
    from kickcall.watch.rows import StallRow

    where = {
        "machine": row.machine,
        "pid": row.pid,
        "start_time": row.start_time,
        "device": row.device,
        "queue": row.queue,
    }
    if isinstance(row, StallRow):
        return {
            "entry": "stall",
            "id": row.id,
            "at": row.began,
            **where,
            "verdict": row.verdict,
            "hop": row.hop,
            "ended": row.ended,
            "ending": row.ending,
            "evidence": row.evidence,
        }
    return {
        "entry": "injection",
        "id": row.id,
        "at": row.at,
        **where,
        "event": row.event,
        "via": row.via,
        "target": row.target,
        "eventfd_id": row.eventfd_id,
        "stall": row.stall,
        "by": {"uid": row.by_uid, "pid": row.by_pid, "command": row.by_command},
        "outcome": row.outcome or "unknown",
        "error": row.error,
        "done_at": row.done_at,
        "before": {
            "count": row.count_before,
            "avail_idx": row.avail_before,
            "used_idx": row.used_before,
        },
        "after": {
            "count": row.count_after,
            "avail_idx": row.avail_after,
            "used_idx": row.used_after,
        },
        "helped": row.helped,
        "evidence": row.evidence,
    }
