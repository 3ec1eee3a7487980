"""`kickcall --vmcore FILE vms|show|eventfd`: the machines of a host that crashed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from kickcall.cli.kernel_view import (
    eventfd_lines,
    ioeventfd_lines,
    irqfd_lines,
    vhost_json,
    vhost_lines,
)
from kickcall.cli.output import plain, print_json, print_table
from kickcall.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from kickcall.host.kernel.program import Kernel

COMMANDS = ("vms", "show", "eventfd")
"""Commands that read only, and so have something to say of a vmcore."""


def choose(context: typer.Context, vmcore: Path | None, symbols: list[Path]) -> None:
    """Keep what `--vmcore` and `--symbols` say. Raises UsageError where that makes no sense."""
    if vmcore is None:
        if symbols:
            raise UsageError(
                "--symbols is for a vmcore: kickcall --vmcore FILE --symbols vmlinux …"
            )
        return
    if context.invoked_subcommand not in COMMANDS:
        raise UsageError(
            f"kickcall {context.invoked_subcommand} needs a host that runs; with --vmcore there "
            f"are {', '.join(COMMANDS)}"
        )
    context.obj = (vmcore, tuple(symbols))


def chosen(context: typer.Context) -> Kernel | None:
    """Open the vmcore that the command line names; None where it names none."""
    named = context.find_root().obj
    if named is None:
        return None
    from kickcall.host.kernel.program import open_vmcore

    return open_vmcore(*named)


def vms(kernel: Kernel, json: bool) -> None:
    """List the machines that ran on the host."""
    from kickcall.vmm.crashed import crashed_machines

    found = crashed_machines(kernel)
    if json:
        machines = [{"pid": one.pid, "name": one.name, "comm": one.comm} for one in found]
        print_json({"release": kernel.release, "machines": machines})
        return
    if not found:
        typer.echo("no machine ran under KVM on this host")
        return
    print_table(("#pid", "name", "program"), [(one.pid, one.name, one.comm) for one in found])


def show(kernel: Kernel, machine: str, device: str | None, json: bool) -> None:
    """Show where each queue stood that vhost in the kernel served."""
    from kickcall.vmm.crashed import crashed_machine, crashed_queues

    one = crashed_machine(kernel, machine)
    queues = [queue for queue in crashed_queues(kernel, one) if device in (None, queue.device)]
    if json:
        print_json(
            {
                "machine": one.name,
                "pid": one.pid,
                "release": kernel.release,
                "queues": [
                    {
                        "device": queue.device,
                        **vhost_json(queue.queue),
                        "kick_count": queue.queue.kick.count if queue.queue.kick else None,
                        "call_count": queue.queue.call.count if queue.queue.call else None,
                        "ring": queue.ring,
                    }
                    for queue in queues
                ],
            }
        )
        return
    typer.echo(f"{plain(one.name)}  pid {one.pid}  Linux {kernel.release}  (vmcore)")
    print_table(
        (
            "device",
            "#queue",
            "#size",
            "#avail",
            "#fetched",
            "#used",
            "#out-\nstanding",
            "#kick\ncount",
            "#call\ncount",
            "worker",
        ),
        [
            (
                queue.device,
                queue.queue.index,
                queue.queue.num,
                queue.ring.avail_idx if queue.ring else None,
                queue.queue.last_avail_idx,
                queue.ring.used_idx if queue.ring else queue.queue.last_used_idx,
                (queue.ring.avail_idx - queue.ring.used_idx) & 0xFFFF if queue.ring else None,
                queue.queue.kick.count if queue.queue.kick else None,
                queue.queue.call.count if queue.queue.call else None,
                f"{queue.queue.worker_comm}[{queue.queue.worker}]" if queue.queue.worker else None,
            )
            for queue in queues
        ],
    )
    if any(queue.ring is None for queue in queues):
        typer.echo("avail is not known where the vmcore has not the guest's pages")


def eventfd(
    kernel: Kernel, machine: str, device: str | None, queue: int | None, json: bool
) -> None:
    """Show what KVM and vhost had: doorbells, interrupts, and the eventfds between them."""
    from kickcall.vmm.crashed import crashed_machine, crashed_notifiers, crashed_queues

    one = crashed_machine(kernel, machine)
    served = crashed_queues(kernel, one)
    queues = [
        found
        for found in served
        if device in (None, found.device) and queue in (None, found.queue.index)
    ]
    others = crashed_notifiers(kernel, one, served) if device is None else ()
    if json:
        print_json(
            {
                "machine": one.name,
                "pid": one.pid,
                "release": kernel.release,
                "queues": [
                    {
                        "device": found.device,
                        "queue": found.queue.index,
                        "kick": found.queue.kick,
                        "ioeventfds": found.ioeventfds,
                        "call": found.queue.call,
                        "irqfds": found.irqfds,
                        "vhost": vhost_json(found.queue),
                    }
                    for found in queues
                ],
                "other_notifiers": [
                    {
                        "eventfd_ctx": other.context,
                        "ioeventfds": other.ioeventfds,
                        "irqfds": other.irqfds,
                    }
                    for other in others
                ],
            }
        )
        return
    typer.echo(f"{plain(one.name)}  pid {one.pid}  Linux {kernel.release}  (vmcore)")
    for found in queues:
        typer.echo(f"\n{found.device} queue {found.queue.index}")
        for event, context, lines in (
            ("kick", found.queue.kick, ioeventfd_lines(found.ioeventfds)),
            ("call", found.queue.call, irqfd_lines(found.irqfds)),
        ):
            typer.echo(f"  {event}:")
            for line in [*(eventfd_lines(context) if context else ["no notifier"]), *lines]:
                typer.echo(f"    {line}")
        for line in vhost_lines(found.queue):
            typer.echo(f"  {line}")
    for other in others:
        kind = "kick" if other.ioeventfds else "call"
        typer.echo(f"\n{kind} notifier of a queue that is served in user space")
        lines = [
            *(ioeventfd_lines(other.ioeventfds) if other.ioeventfds else ()),
            *(irqfd_lines(other.irqfds) if other.irqfds else ()),
        ]
        for line in [*eventfd_lines(other.context), *lines]:
            typer.echo(f"  {line}")
