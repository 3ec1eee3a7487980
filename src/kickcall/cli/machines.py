"""Looking: `kickcall vms`, `kickcall show`, `kickcall eventfd`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kickcall.cli.arguments import JsonOption, MachineArgument, OptionalDevice
from kickcall.cli.offers import events_json, events_of, print_events, print_pci_device
from kickcall.cli.output import index_text, plain, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kickcall.attached import AttachedDevice, AttachedMachine, AttachedPciDevice
    from kickcall.model import EventOffer, NotifierState, QueueState

    _PciShown = tuple[AttachedPciDevice, tuple[EventOffer, ...] | None, str]


def vms(context: typer.Context, json: JsonOption = False) -> None:
    """List every QEMU on this host. Asks no monitor.

    \b
    kickcall vms
    kickcall vms --json
    """
    from kickcall.cli import vmcore
    from kickcall.vmm.find import find
    from kickcall.vmm.served import served_monitor

    if (crashed := vmcore.chosen(context)) is not None:
        vmcore.vms(crashed, json)
        return
    found = find()
    served = {machine.pid: served_monitor(machine.pid, machine.start_time) for machine in found}
    if json:
        machines = [
            {
                "pid": machine.pid,
                "name": machine.name,
                "version": machine.version,
                "monitors": [address.path for address in machine.monitors],
                "domain": machine.domain and machine.domain.name,
                "vmid": machine.number or None,
                "served_at": served[machine.pid],
            }
            for machine in found
        ]
        print_json({"machines": machines})
        return
    if not found:
        typer.echo("no QEMU runs on this host (or this /proc does not show it)")
        return
    rows = []
    for machine in found:
        monitors = [address.path for address in machine.monitors]
        if machine.domain is not None:
            monitors.append(f"libvirt:{machine.domain.name}")
        if served[machine.pid] is not None:
            monitors.append(f"{served[machine.pid]} (kickcall qmp)")
        rows.append(
            (machine.pid, machine.name, machine.version or None, "\n".join(monitors) or None)
        )
    print_table(("#pid", "name", "QEMU", "QMP monitors"), _lines(rows))


def _lines(rows: Sequence[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """Return rows in which the last cell's lines each have a row of their own."""
    spread: list[tuple[object, ...]] = []
    for *cells, last in rows:
        first, *rest = str(last).split("\n") if last is not None else [None]
        spread.append((*cells, first))
        spread.extend((*("" for _ in cells), line) for line in rest)
    return spread


def _chosen(machine: AttachedMachine, device: str | None) -> tuple[AttachedDevice, ...]:
    return machine.devices() if device is None else (machine.device(device),)


def show(
    context: typer.Context,
    machine: MachineArgument,
    device: OptionalDevice = None,
    json: JsonOption = False,
) -> None:
    """Show every device that can take an event, and where each virtqueue stands.

    \b
    kickcall show vm0
    kickcall show vm0 vscsi0
    kickcall show vm0 nic0
    kickcall show qmp:/run/vm0.qmp vscsi0 --json
    kickcall --vmcore /var/crash/vmcore show vm0
    """
    from kickcall.attached import attach
    from kickcall.cli import vmcore

    if (crashed := vmcore.chosen(context)) is not None:
        vmcore.show(crashed, machine, device, json)
        return
    with attach(machine) as attached:
        virtio, pci = _shown(attached, device)
        states = [[queue.state() for queue in one.queues()] for one in virtio]
        if json:
            print_json(_show_json(attached, list(zip(virtio, states, strict=True)), pci))
            return
        info = attached.info
        typer.echo(
            f"{plain(info.name)}  pid {info.pid}  QEMU {plain(info.version)}  {attached.run_state}"
        )
        for each, of_queues in zip(virtio, states, strict=True):
            _print_device(each, of_queues)
        for other, offers, refusal in pci:
            print_pci_device(other, offers, refusal)


def _shown(
    attached: AttachedMachine, name: str | None
) -> tuple[tuple[AttachedDevice, ...], list[_PciShown]]:
    """Return the virtio devices to show, and the PCI devices that can take an event.

    One that is asked for by name is shown in any case.
    """
    from kickcall.errors import DeviceNotFoundError

    pci: tuple[AttachedPciDevice, ...]
    if name is None:
        virtio, pci = attached.devices(), attached.pci_devices()
    else:
        try:
            virtio, pci = (attached.device(name),), ()
        except DeviceNotFoundError:
            virtio, pci = (), (attached.pci_device(name),)
    shown = [(one, *events_of(one)) for one in pci]
    return virtio, [one for one in shown if name is not None or one[1]]


def _show_json(
    attached: AttachedMachine,
    devices: list[tuple[AttachedDevice, list[QueueState]]],
    pci: list[_PciShown],
) -> dict[str, Any]:
    info = attached.info
    return {
        "machine": info.name,
        "pid": info.pid,
        "version": info.version,
        "run_state": attached.run_state,
        "devices": [
            {
                "device": one.info.path,
                "id": one.info.id,
                "kind": one.info.kind,
                "backend": one.info.backend,
                "num_queues": one.info.num_queues,
                "driver_ok": one.info.driver_ok,
                "event_idx": one.info.event_idx,
                "refusal": one.refusal or None,
                "queues": states,
                "events": events_json(events_of(one)[0]),
            }
            for one, states in devices
        ],
        "pci_devices": [
            {
                "device": one.info.path,
                "id": one.info.id,
                "kind": one.info.kind,
                "address": one.info.address,
                "events": events_json(offers),
                "refusal": refusal or None,
            }
            for one, offers, refusal in pci
        ],
    }


def _print_device(device: AttachedDevice, states: list[QueueState]) -> None:
    info = device.info
    suppression = "event index" if info.event_idx else "flags"
    typer.echo(
        f"\n{plain(info.id)}  {plain(info.kind)}, {info.backend}, {info.layout}, {suppression}, "
        f"{len(states)} of {info.num_queues} queues set up"
    )
    if device.refusal:
        typer.echo(f"  {plain(device.refusal)}")
    if not states:
        return
    print_table(
        (
            "#queue",
            "#size",
            "#avail",
            "#fetched",
            "#used",
            "#out-\nstanding",
            "kick\nwanted",
            "call\nwanted",
            "#kick\ncount",
            "#call\ncount",
        ),
        [
            (
                state.queue,
                state.size,
                index_text(state.layout, state.avail_idx),
                index_text(state.layout, state.last_avail_idx),
                index_text(state.layout, state.used_idx),
                state.outstanding,
                _wanted(state, state.avail_event, state.used_flags),
                _wanted(state, state.used_event, state.avail_flags),
                _count(state.kick),
                _count(state.call),
            )
            for state in states
        ],
    )
    for state in states:
        for note in state.notes:
            typer.echo(f"  queue {state.queue}: {plain(note)}")
    print_events(*events_of(device))


def _wanted(state: QueueState, event: int | None, flags: int | None) -> str | None:
    """Return when the other side wants its notification (virtio 1.4, 2.7.7, 2.7.10, 2.8.10)."""
    if flags is None:
        return None
    if state.layout == "packed":
        modes = {0: "always", 1: "never", 2: f"at {index_text(state.layout, event)}"}
        return modes.get(flags, "reserved")
    if event is not None:
        return f"past {event}"
    return "never" if flags & 1 else "always"


def _count(state: NotifierState | None) -> int | None:
    return None if state is None else state.count


def eventfd(
    context: typer.Context,
    machine: MachineArgument,
    device: OptionalDevice = None,
    queue: Annotated[
        int | None, typer.Option("--queue", "-q", min=0, help="Only this queue of DEVICE.")
    ] = None,
    kernel: Annotated[
        bool, typer.Option("--kernel", help="Print the kernel's own structures beside them.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the whole map with KVM's and vhost's.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show each queue's notifiers, and every process that holds them.

    \b
    kickcall eventfd vm0
    kickcall eventfd vm0 vub0 --json
    kickcall eventfd vm0 vscsi0 --queue 3 --kernel
    kickcall eventfd vm0 --verify
    kickcall --vmcore /var/crash/vmcore eventfd vm0
    """
    from kickcall.attached import attach
    from kickcall.cli import kernel_view, vmcore
    from kickcall.errors import UsageError
    from kickcall.host.eventfds import holders_of
    from kickcall.model import DeviceEvent

    if queue is not None and device is None:
        raise UsageError("--queue needs a DEVICE")
    if verify and (kernel or device is not None):
        raise UsageError("--verify compares the whole machine: give it MACHINE and nothing else")
    if (crashed := vmcore.chosen(context)) is not None:
        if verify:
            raise UsageError("--verify needs a machine that runs: a vmcore has no map of ours")
        vmcore.eventfd(crashed, machine, device, queue, json)
        return
    with attach(machine) as attached:
        if verify:
            kernel_view.print_verify(attached, json)
            return
        if kernel:
            kernel_view.print_kernel(attached, _chosen(attached, device), queue, json)
            return
        found = []
        for one in _chosen(attached, device):
            for each in one.queues() if queue is None else (one.queue(queue),):
                state = each.state()
                for event, notifier, now in (
                    (DeviceEvent.KICK, each.map.kick, state.kick),
                    (DeviceEvent.CALL, each.map.call, state.call),
                ):
                    if notifier is not None and now is not None:
                        found.append((one.info, each.map.index, event, notifier, now))
        holders, hidden = holders_of({notifier.eventfd_id for _, _, _, notifier, _ in found})
        entries = [
            {
                "device": info.path,
                "id": info.id,
                "queue": index,
                "event": event,
                "eventfd_id": notifier.eventfd_id,
                "fd": notifier.fd,
                "count": now.count,
                "flags": now.flags,
                "semaphore": now.semaphore,
                "holders": holders[notifier.eventfd_id],
            }
            for info, index, event, notifier, now in found
        ]
        if json:
            print_json(
                {"machine": attached.info.name, "notifiers": entries, "hidden_processes": hidden}
            )
            return
        print_table(
            ("device", "#queue", "event", "#eventfd id", "#fd", "#count", "flags", "held by"),
            [
                (
                    entry["id"],
                    entry["queue"],
                    entry["event"],
                    entry["eventfd_id"],
                    entry["fd"],
                    entry["count"],
                    f"{entry['flags']:#o}",
                    _holders(holders[notifier.eventfd_id]),
                )
                for entry, (_, _, _, notifier, _) in zip(entries, found, strict=True)
            ],
        )
        if hidden:
            typer.echo(f"{hidden} processes could not be looked at: run as root to see all holders")


def _holders(holders: tuple[Any, ...]) -> str:
    return ", ".join(f"{plain(holder.comm)}[{holder.pid}] fd {holder.fd}" for holder in holders)
