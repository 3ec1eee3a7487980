"""`kickcall diagnose`: which hop of which queue lost the notification, and what to type next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kickcall.cli.arguments import JsonOption, MachineArgument, OptionalDevice, seconds_of
from kickcall.cli.output import plain, print_json, print_table, working

if TYPE_CHECKING:
    from kickcall.model import Verdict

_THREADS_SHOWN = 6
_MARK = {"taken": "✓", "broken": "✗", "not reached": "·"}


def diagnose(
    machine: MachineArgument,
    device: OptionalDevice = None,
    queue: Annotated[
        int | None, typer.Option("--queue", "-q", min=0, help="Only this queue of DEVICE.")
    ] = None,
    duration: Annotated[
        str,
        typer.Option("--duration", help="How long to watch at least, as 2s or 500ms.", metavar="T"),
    ] = "2s",
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Inject what each verdict names, and see whether it helps."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Say which hop lost the notification, with the evidence, before anyone touches the machine.

    Reads only, unless --probe is given. Exits with 0 if all is well, 1 if a stall was found, and
    3 if it could not look.

    \b
    kickcall diagnose vm0
    kickcall diagnose vm0 vscsi0 --queue 3 --probe
    kickcall diagnose vm0 --duration 10s --json
    """
    from kickcall.attached import attach
    from kickcall.cli.journal import by_hand
    from kickcall.errors import UsageError

    if queue is not None and device is None:
        raise UsageError("--queue needs a DEVICE")
    seconds = seconds_of(duration)
    with (
        attach(machine) as attached,
        by_hand("diagnose --probe") as witness,
        working(f"watching for {seconds:g} s or more"),
    ):
        verdicts = attached.diagnose(
            device,
            queue,
            duration_s=seconds,
            probe=probe,
            tell=lambda text: typer.echo(text, err=True),
            witness=witness,
        )
        name = attached.info.name
    if json:
        print_json({"machine": name, "verdicts": [_to_json(verdict) for verdict in verdicts]})
    else:
        _tell(name, verdicts)
    if any(verdict.verdict.stalled for verdict in verdicts):
        raise typer.Exit(1)


def _to_json(verdict: Verdict) -> dict[str, object]:
    return {
        "device": verdict.device,
        "queue": verdict.queue,
        "verdict": verdict.verdict,
        "hop": verdict.hop,
        "since_s": round(verdict.since_s, 3),
        "evidence": verdict.evidence,
        "remedy": verdict.remedy,
        "confidence": verdict.confidence,
    }


def _tell(machine: str, verdicts: tuple[Verdict, ...]) -> None:
    from kickcall.model import VerdictKind

    worth = [
        verdict
        for verdict in verdicts
        if verdict.verdict.stalled or verdict.verdict is VerdictKind.UNKNOWN
    ]
    for verdict in worth:
        _tell_path(verdict)
    rest = [verdict for verdict in verdicts if verdict not in worth]
    if rest:
        print_table(
            ("device", "#queue", "verdict", "because"),
            [(_short(one.device), one.queue, one.verdict, one.evidence[0].value) for one in rest],
        )
    stalled = sum(verdict.verdict.stalled for verdict in verdicts)
    typer.echo(
        f"{plain(machine)}: {stalled or 'none'} of {len(verdicts)} queues stalled"
        + (f", {len(worth) - stalled} not known" if len(worth) > stalled else "")
    )


def _short(device: str) -> str:
    return plain(device.removeprefix("/machine/peripheral/"))


def _tell_path(verdict: Verdict) -> None:
    from kickcall.diagnose.path import HopState, path_of

    where = f"{_short(verdict.device)} queue {verdict.queue}"
    word = f"{verdict.verdict}" + (f" on hop {verdict.hop}" if verdict.hop else "")
    typer.echo(
        f"{where}: "
        + typer.style(word, bold=True)
        + f", {verdict.confidence}, for {verdict.since_s:.1f} s"
    )
    typer.echo(f"  {verdict.evidence[0].value}")
    if verdict.hop:
        for hop, state in path_of(verdict):
            line = (
                f"  {_MARK[state.value]} {hop.number:2} {hop.name:<10} {hop.by:<9}  {hop.seen_in}"
            )
            if state is HopState.BROKEN:
                line = typer.style(f"{line}  ◀── broken here", bold=True)
            typer.echo(line)
    values = [one for one in verdict.evidence[1:] if " thread " not in one.what]
    threads = [one for one in verdict.evidence[1:] if " thread " in one.what]
    for one in (*values, *threads[:_THREADS_SHOWN]):
        typer.echo(f"    {plain(one.what)}: {plain(one.value)}")
    if len(threads) > _THREADS_SHOWN:
        typer.echo(f"    … and {len(threads) - _THREADS_SHOWN} more threads (--json has all)")
    typer.echo(f"  next: {plain(verdict.remedy)}\n")
