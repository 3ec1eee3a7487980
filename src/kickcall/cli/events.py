"""Injecting: `kickcall kick` and `kickcall call`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kickcall.cli.arguments import DeviceArgument, JsonOption, MachineArgument
from kickcall.cli.output import index_text, plain, print_json
from kickcall.model import DeviceEvent

if TYPE_CHECKING:
    from kickcall.model import Counters, Injection

WATCH_S = 0.1
"""Seconds that a queue is watched after an event."""

QueueOption = Annotated[
    int,
    typer.Option("--queue", "-q", min=0, help="Its number in `kickcall show`.", show_default=False),
]
ViaOption = Annotated[
    str, typer.Option("--via", help="The way: auto, qmp, eventfd, ioport or mmio.", metavar="WAY")
]
PauseOption = Annotated[
    bool,
    typer.Option(
        "--allow-pause", help="Where nothing else applies, pause the machine for milliseconds."
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.")
]


def kick(
    machine: MachineArgument,
    device: DeviceArgument,
    queue: QueueOption,
    via: ViaOption = "auto",
    allow_pause: PauseOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Kick a queue: make the device look at what the driver published.

    \b
    kickcall kick vm0 vscsi0 --queue 3
    kickcall kick vm0 /machine/peripheral/vscsi0 --queue 3 --dry-run
    """
    _raise(machine, device, DeviceEvent.KICK, queue, via, allow_pause, dry_run, json)


def call(
    machine: MachineArgument,
    device: DeviceArgument,
    queue: QueueOption,
    via: ViaOption = "auto",
    allow_pause: PauseOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Call a queue: make the driver look at what the device completed.

    \b
    kickcall call vm0 vscsi0 --queue 3
    kickcall call vm0 vscsi0 --queue 3 --via eventfd --json
    kickcall call vm0 net0 --queue 0 --allow-pause
    """
    _raise(machine, device, DeviceEvent.CALL, queue, via, allow_pause, dry_run, json)


def _raise(
    machine: str,
    device: str,
    event: DeviceEvent,
    queue: int,
    via: str,
    allow_pause: bool,
    dry_run: bool,
    json: bool,
) -> None:
    from kickcall.attached import attach
    from kickcall.cli.journal import by_hand

    with attach(machine) as attached, by_hand(str(event)) as witness:
        result = attached.device_event(
            device,
            event,
            queue,
            via=via,
            dry_run=dry_run,
            watch_s=WATCH_S,
            allow_pause=allow_pause,
            tell=lambda text: typer.echo(f"kickcall: {plain(text)}", err=True),
            witness=witness,
        )
    if json:
        print_json(_to_json(result))
    else:
        _tell(result)


def _to_json(result: Injection) -> dict[str, object]:
    return {
        "machine": result.machine,
        "device": result.device,
        "queue": result.queue,
        "event": result.event,
        "via": result.via,
        "eventfd_id": result.eventfd_id,
        "layout": result.layout,
        "target": result.target,
        "pause_ms": result.pause_ms,
        "dry_run": result.dry_run,
        "before": result.before,
        "after": result.after,
    }


def _tell(result: Injection) -> None:
    where = f"queue {result.queue} of {plain(result.device)} on {plain(result.machine)}"
    if result.dry_run:
        typer.echo(f"would {result.event} {where} via {result.via}: {result.target}")
        if result.layout is not None:
            typer.echo(f"  now     {_counters(result, result.before)}")
        return
    done = "kicked" if result.event is DeviceEvent.KICK else "called"
    typer.echo(f"{done} {where} via {result.via}: {result.target}")
    if result.pause_ms is not None:
        typer.echo(f"  paused  {result.pause_ms:.1f} ms")
    if result.layout is None:
        typer.echo("  it has no virtqueue: only the guest can tell what became of it")
        return
    typer.echo(f"  before  {_counters(result, result.before)}")
    typer.echo(f"  after   {_counters(result, result.after)}  ({WATCH_S * 1000:.0f} ms later)")
    typer.echo(f"  {_meaning(result)}")


def _counters(result: Injection, counters: Counters) -> str:
    return "  ".join(
        f"{name} {plain(value)}"
        for name, value in (
            ("count", counters.count),
            ("avail.idx", index_text(result.layout, counters.avail_idx)),
            ("used.idx", index_text(result.layout, counters.used_idx)),
        )
    )


def _meaning(result: Injection) -> str:
    """Return in words what the queue did after the event."""
    before, after = result.before, result.after
    if after.avail_idx is None or after.used_idx is None:
        return "the ring's indices could not be read"
    if after.used_idx != before.used_idx:
        return "the device completed work: used.idx moved"
    if after.avail_idx != before.avail_idx:
        return "the driver published work: avail.idx moved"
    if result.event is DeviceEvent.KICK and after.avail_idx != after.used_idx:
        return "used.idx did not move, and work is outstanding"
    return "the queue did not move"
