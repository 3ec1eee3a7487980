"""How is it printed which events a device can take, and in which way?"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import typer

from kickcall.cli.output import plain, print_table
from kickcall.errors import KickcallError
from kickcall.model import DeviceEvent

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kickcall.attached import AttachedDevice, AttachedPciDevice
    from kickcall.model import EventOffer, Via


def events_of(
    device: AttachedDevice | AttachedPciDevice,
) -> tuple[tuple[EventOffer, ...] | None, str]:
    """Return which events the device can take; None and why where that cannot be said."""
    try:
        return device.events(), ""
    except KickcallError as exc:
        return None, str(exc)


def events_json(offers: tuple[EventOffer, ...] | None) -> list[dict[str, Any]] | None:
    """Return the events as the documents have them."""
    if offers is None:
        return None
    return [
        {
            "queue": one.queue,
            "name": one.name or None,
            "event": one.event,
            "via": one.via,
            "reason": one.reason or None,
        }
        for one in offers
    ]


def print_events(offers: tuple[EventOffer, ...] | None, refusal: str) -> None:
    """Print in which ways the queues of a virtio device can be kicked and called, in a line."""
    if offers is None:
        typer.echo(f"  events: not known: {plain(refusal)}")
        return
    said = []
    for event in DeviceEvent:
        ways: dict[Via, list[int]] = {}
        for one in offers:
            if one.event is event and one.via is not None:
                ways.setdefault(one.via, []).append(one.queue)
        said += [f"{event} via {via} ({_spans(queues)})" for via, queues in ways.items()]
    if said:
        typer.echo(f"  events: {', '.join(said)}")
    _print_reasons(offers)


def print_pci_device(
    device: AttachedPciDevice, offers: tuple[EventOffer, ...] | None, refusal: str
) -> None:
    """Print a device without virtqueues: what it can be kicked and called on."""
    info = device.info
    typer.echo(f"\n{plain(info.id)}  {plain(info.kind)}, PCI {info.address}")
    if offers is None:
        print_events(None, refusal)
        return
    rows = []
    for queue, of_queue in groupby(offers, key=lambda one: one.queue):
        found = {one.event: one for one in of_queue}
        ways = [found[event].via for event in DeviceEvent]
        rows.append((queue, next(iter(found.values())).name, *ways))
    print_table(("#queue", "what", *DeviceEvent), rows)
    _print_reasons(offers)


def _print_reasons(offers: tuple[EventOffer, ...]) -> None:
    """Print why some events cannot be raised: each reason once."""
    reasons: dict[tuple[DeviceEvent, str], list[int]] = {}
    for one in offers:
        if one.via is None:
            reasons.setdefault((one.event, one.reason), []).append(one.queue)
    for (event, reason), queues in reasons.items():
        typer.echo(f"  no {event} ({_spans(queues)}): {plain(reason)}")


def _spans(numbers: Iterable[int]) -> str:
    """Return numbers in order as `queues 0-3, 5`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][-1] == number - 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    word = "queue" if [len(span) for span in spans] == [1] else "queues"
    return f"{word} {', '.join('-'.join(map(str, span)) for span in spans)}"
