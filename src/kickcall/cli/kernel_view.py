"""`kickcall eventfd --kernel` and `--verify`: the kernel's own structures beside our map."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from kickcall.cli.output import plain, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kickcall.attached import AttachedDevice, AttachedMachine
    from kickcall.host.kernel.eventfds import KernelEventfd
    from kickcall.host.kernel.kvm import Ioeventfd, Irqfd
    from kickcall.host.kernel.program import Kernel
    from kickcall.host.kernel.vhost import KernelVhostQueue
    from kickcall.vmm.kernel_view import VhostOfQueue


def print_kernel(
    machine: AttachedMachine, devices: Sequence[AttachedDevice], queue: int | None, json: bool
) -> None:
    """Print what the kernel keeps of the queues of `devices`, or of one of them."""
    from kickcall.host.eventfds import read_eventfd
    from kickcall.host.kernel.program import open_live

    kernel = open_live()
    chosen = [
        one
        for device in devices
        for one in (device.queues() if queue is None else (device.queue(queue),))
    ]
    found = machine.in_kernel(chosen, kernel)
    pid = machine.info.pid
    counts: list[dict[str, int | None]] = []
    for one in chosen:
        states = {
            event: None if notifier is None else read_eventfd(pid, notifier.fd)
            for event, notifier in (("kick", one.map.kick), ("call", one.map.call))
        }
        counts.append({event: state.count if state else None for event, state in states.items()})
    if json:
        queues = [
            {
                "device": seen.device,
                "id": seen.id,
                "queue": seen.queue,
                "kick": _notifier_json(one.map.kick, count["kick"], seen.kick),
                "ioeventfds": seen.ioeventfds,
                "call": _notifier_json(one.map.call, count["call"], seen.call),
                "irqfds": seen.irqfds,
                "vhost": _vhost_json(seen.vhost),
            }
            for seen, one, count in zip(found, chosen, counts, strict=True)
        ]
        print_json({"machine": machine.info.name, **_kernel_json(kernel), "queues": queues})
        return
    typer.echo(f"{plain(machine.info.name)}  pid {pid}  Linux {kernel.release}")
    for seen, one, count in zip(found, chosen, counts, strict=True):
        typer.echo(f"\n{plain(seen.id)} queue {seen.queue}")
        for event, notifier, context in (
            ("kick", one.map.kick, seen.kick),
            ("call", one.map.call, seen.call),
        ):
            if notifier is None or context is None:
                typer.echo(f"  {event}: no notifier")
                continue
            typer.echo(f"  {event}: fd {notifier.fd}, count in fdinfo {count[event]}")
            for line in eventfd_lines(context):
                typer.echo(f"    {line}")
            for line in (
                ioeventfd_lines(seen.ioeventfds) if event == "kick" else irqfd_lines(seen.irqfds)
            ):
                typer.echo(f"    {line}")
        if seen.vhost is not None:
            typer.echo(
                f"  {seen.vhost.kind}: fd {seen.vhost.fd}, its queue {seen.vhost.queue.index}"
            )
            for line in vhost_lines(seen.vhost.queue):
                typer.echo(f"    {line}")


def print_verify(machine: AttachedMachine, json: bool) -> None:
    """Print how our map compares with the kernel's; exit with 1 where it differs."""
    from kickcall.vmm.verify import Outcome

    checks = machine.verify()
    different = [check for check in checks if check.outcome is Outcome.DIFFERENT]
    if json:
        print_json({"machine": machine.info.name, "checks": checks, "differences": len(different)})
    else:
        marks = {Outcome.SAME: "✓", Outcome.DIFFERENT: "✗", Outcome.NOT_COMPARABLE: "·"}
        print_table(
            ("", "device", "#queue", "event", "#eventfd id", "the kernel's"),
            [
                (
                    marks[check.outcome],
                    check.id,
                    check.queue,
                    check.event,
                    check.eventfd_id,
                    check.says,
                )
                for check in checks
            ],
        )
        for check in different:
            typer.echo(
                f"different: {check.event} notifier of queue {check.queue} of {plain(check.id)} "
                f"(eventfd {plain(check.eventfd_id)}): {check.says}"
            )
        same = sum(check.outcome is Outcome.SAME for check in checks)
        typer.echo(
            f"{plain(machine.info.name)}: {len(different)} differences; {same} notifiers are as "
            f"the kernel has them, {len(checks) - same - len(different)} have nothing to compare"
        )
    if different:
        raise typer.Exit(1)


def eventfd_lines(context: KernelEventfd) -> list[str]:
    """Return the struct as `crash` prints it, with the waiters by name."""
    waiters = ", ".join(f"{waiter.function} ({plain(waiter.who)})" for waiter in context.wqh)
    return [
        f"struct eventfd_ctx {{  // {context.address:#x}",
        f"  kref = {context.kref},",
        f"  wqh = {{ {waiters} }}," if waiters else "  wqh = { },",
        f"  count = {context.count},",
        f"  flags = {context.flags:#o},",
        f"  id = {context.id}",
        "}",
    ]


def ioeventfd_lines(found: Sequence[Ioeventfd]) -> list[str]:
    """Return a line for each write of the guest that is a kick."""
    lines = []
    for one in found:
        length = f"{one.length} bytes" if one.length else "any length"
        value = "any value" if one.datamatch is None else f"value {one.datamatch}"
        lines.append(f"ioeventfd: {one.bus} {one.address:#x}, {length}, {value}")
    return lines or ["ioeventfd: none"]


def irqfd_lines(found: Sequence[Irqfd]) -> list[str]:
    """Return a line for each interrupt that a call is."""
    lines = []
    for one in found:
        message = (
            "no message" if one.msi is None else f"MSI {one.msi.data:#x} to {one.msi.address:#x}"
        )
        lines.append(f"irqfd: gsi {one.gsi}, {message}")
    return lines or ["irqfd: none"]


def vhost_lines(queue: KernelVhostQueue) -> list[str]:
    """Return where vhost stands with a queue."""
    worker = f"{plain(queue.worker_comm)}[{queue.worker}]" if queue.worker else "none"
    valid = "" if queue.signalled_used_valid else " (not valid)"
    return [
        "struct vhost_virtqueue {",
        f"  num = {queue.num},",
        f"  last_avail_idx = {queue.last_avail_idx},",
        f"  avail_idx = {queue.avail_idx},",
        f"  last_used_idx = {queue.last_used_idx},",
        f"  signalled_used = {queue.signalled_used}{valid}",
        "}",
        f"worker: {worker}" + ("" if queue.running else "; stopped: it has no back-end"),
    ]


def _kernel_json(kernel: Kernel) -> dict[str, Any]:
    return {"release": kernel.release, "types_from": kernel.types_from}


def _notifier_json(
    notifier: Any, count: int | None, context: KernelEventfd | None
) -> dict[str, Any] | None:
    if notifier is None:
        return None
    return {"fd": notifier.fd, "count": count, "eventfd_ctx": context}


def _vhost_json(vhost: VhostOfQueue | None) -> dict[str, Any] | None:
    return (
        None if vhost is None else {"fd": vhost.fd, "kind": vhost.kind, **vhost_json(vhost.queue)}
    )


def vhost_json(queue: KernelVhostQueue) -> dict[str, Any]:
    """Return the keys that say where vhost stands with a queue."""
    return {
        "vhost_queue": queue.index,
        "num": queue.num,
        "last_avail_idx": queue.last_avail_idx,
        "avail_idx": queue.avail_idx,
        "last_used_idx": queue.last_used_idx,
        "used_flags": queue.used_flags,
        "signalled_used": queue.signalled_used,
        "signalled_used_valid": queue.signalled_used_valid,
        "running": queue.running,
        "kick_id": queue.kick.id if queue.kick else None,
        "call_id": queue.call.id if queue.call else None,
        "worker": queue.worker,
    }
