"""Is a notification that the host's kernel loses found, named and repaired, as in the RFC's hunt?

A small module (tests/kernel_module.py) lets the kernel skip the signal to one eventfd once: what
the doorbell or vhost has raised is then lost, and nothing else is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

import rfc_page
from kernel_module import Calls, Skip, SkipInGuest, handler_of, in_lab_host, remove, signal_of
from kickcall.attached import attach
from kickcall.cli import main
from kickcall.host.tracefs import folder
from kickcall.lab.boot import boot
from kickcall.lab.monitor import ask
from kickcall.lab.spec import MachineSpec, VhostNet, VhostScsi
from kickcall.model import DeviceEvent, VerdictKind
from kvm_zoo import interrupt_lines, know_each_other
from witness import asked_until, interrupts, never, rise, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kickcall.attached import AttachedMachine, AttachedQueue
    from kickcall.lab.guest import Command
    from kickcall.lab.image import GuestImage
    from kickcall.lab.machine import LabMachine
    from kickcall.model import Verdict

pytestmark = [pytest.mark.rig, pytest.mark.timeout(1200)]

ROUNDS = int(os.environ.get("KICKCALL_REPEAT", "1"))
PATIENCE = 60.0
"""Seconds for what takes milliseconds on an idle machine that needs no TCG."""
WATCHED_S = 8.0

KICK, CALL = DeviceEvent.KICK, DeviceEvent.CALL

# Its guest is quiet: a packet that nobody asked for could heal a network queue.
LOSSY = MachineSpec(
    name="vm0",
    devices=(VhostScsi(id="vscsi0", queues=2), VhostNet(id="vnet0")),
    monitors=2,
    kernel_arguments="ipv6.disable=1",
)
SCSI = (("vscsi0", 2), ("vscsi0", 3))
"""The two request queues: the guest uses the one that belongs to the CPU."""
LOSSES = {
    ("vhost-scsi", KICK): SCSI,
    ("vhost-scsi", CALL): SCSI,
    # A ping's request hangs in the transmit queue, its answer in the receive queue.
    ("vhost-net", KICK): (("vnet0", 1),),
    ("vhost-net", CALL): (("vnet0", 0),),
}
BROKEN = {KICK: (VerdictKind.LOST_KICK, 3), CALL: (VerdictKind.LOST_CALL, 8)}


@pytest.fixture(scope="module")
def lossy(guest_image_built: GuestImage) -> Iterator[LabMachine]:
    if not in_lab_host():
        pytest.skip("inserts a module that loses notifications: only in a KVM host of the lab")
    # Eventfds get the ids of those that are gone: what was left would break another's.
    remove()
    with boot(LOSSY, timeout=600) as machine:
        know_each_other(machine, "vnet0")
        yield machine


@pytest.fixture(scope="module")
def rfc(lossy: LabMachine) -> Iterator[Path]:
    """The socket on which a QMP client finds the RFC's command."""
    listen = lossy.folder / "rfc"
    command = [sys.executable, "-m", "kickcall", "qmp", lossy.name, "--listen", str(listen)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert "listening" in server.stdout.readline()
            yield listen
        finally:
            server.terminate()


@pytest.fixture
def attached(lossy: LabMachine, rfc: Path) -> Iterator[AttachedMachine]:
    with attach(lossy.name, timeout=PATIENCE) as machine:
        yield machine


@dataclass
class Hunt:
    """One queue that is to lose something, and the guest's use of it."""

    machine: LabMachine
    attached: AttachedMachine
    device: str
    number: int

    @property
    def queue(self) -> AttachedQueue:
        return self.attached.device(self.device).queue(self.number)

    @property
    def path(self) -> str:
        return f"/machine/peripheral/{self.device}"

    @property
    def line(self) -> tuple[str, str]:
        return self.device, interrupt_lines(self.machine, self.device, self.number)

    def signal(self, event: DeviceEvent) -> Calls:
        """The kernel's own signals to one of the queue's notifiers."""
        notifier = self.queue.map.kick if event is KICK else self.queue.map.call
        assert notifier is not None
        return signal_of(notifier.eventfd_id)

    @property
    def io(self) -> str:
        """A command that needs one notification of each kind, of this queue."""
        if self.device == "vnet0":
            return f"ping -c 1 -W 3600 {self.machine.host_address(self.device)}"
        disk = self.machine.disk(self.device)
        return f"taskset -c {self.number - 2} dd if={disk} of=/dev/null bs=4k count=1 iflag=direct"

    def flows(self) -> None:
        status, output = self.machine.guest.run(self.io, timeout=PATIENCE)
        assert status == 0, output

    def start(self) -> Command:
        return self.machine.guest.start(self.io)

    def verdicts(self) -> dict[tuple[str, int], Verdict]:
        """What a diagnosis of the whole machine calls stalled."""
        found = self.attached.diagnose()
        return {(one.device, one.queue): one for one in found if one.verdict.stalled}

    def stalled(self) -> dict[tuple[str, int], Verdict]:
        """The same of a machine that hangs.

        A diagnosis that did not get to run itself blames nobody: then it is asked again.
        """
        return asked_until(bool, self.verdicts, PATIENCE)

    def ends_well(self, command: Command) -> None:
        status, output = command.wait(PATIENCE)
        assert status == 0, output
        assert self.verdicts() == {}

    @contextlib.contextmanager
    def mended_after(self) -> Iterator[None]:
        """Whatever a test that fails leaves behind, the next one finds a machine at work."""
        try:
            yield
        finally:
            self.queue.kick()
            self.queue.call()


@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize(("back_end", "event"), LOSSES, ids=lambda value: str(value))
def test_what_the_kernel_lost_is_named_and_the_rfcs_command_brings_it_back(
    lossy: LabMachine,
    rfc: Path,
    attached: AttachedMachine,
    back_end: str,
    event: DeviceEvent,
    round_: int,
) -> None:
    queues = LOSSES[back_end, event]
    hunt = Hunt(lossy, attached, *queues[round_ % len(queues)])
    with hunt.mended_after():
        hunt.flows()
        before, at_rest = interrupts(lossy), hunt.queue.state()
        with Skip(hunt.signal(event)) as lost:
            command = hunt.start()
            until(lambda: lost.left == 0, f"the kernel loses the {event}", PATIENCE)
        never(lambda: command.done, "a guest that lost a notification went on")

        # Counters: a lost kick is missing in the notifier, a lost call in the guest's interrupts.
        state = hunt.queue.state()
        assert at_rest.kick is not None and state.kick is not None
        # (The first packet may have needed no kick: with event indices only who sleeps is woken.)
        kicked = state.kick.count - at_rest.kick.count
        assert kicked == 0 if event is KICK else kicked <= 1
        assert interrupts(lossy)[hunt.line] == before[hunt.line]

        stalled = hunt.stalled()
        assert list(stalled) == [(hunt.path, hunt.number)]
        (verdict,) = stalled.values()
        assert (verdict.verdict, verdict.hop) == BROKEN[event]
        assert verdict.event is event

        arguments = {"dev": hunt.path, "event": str(event), "queue": hunt.number}
        assert ask(rfc, "x-debug-device-event", arguments, PATIENCE) == {}
        hunt.ends_well(command)
        after = hunt.queue.state()
        assert after.kick is not None
        assert after.kick.count - state.kick.count == (1 if event is KICK else 0)
        assert after.used_idx == after.avail_idx or back_end == "vhost-net"
        if back_end == "vhost-scsi":
            # (The network may have something to say of its own.)
            rose = rise(before, interrupts(lossy))
            assert {line: by for line, by in rose.items() if line[0] == hunt.line[0]} == {
                hunt.line: 1
            }


# What a diagnosis says that watched all the time, so that it has the kernel's own count.
SEEN = {
    "the doorbell's signal": (VerdictKind.LOST_KICK, 3),
    "vhost's look at the queue": (VerdictKind.KICK_UNREAD, 4),
    "vhost's signal": (VerdictKind.LOST_CALL, 8),
    "the driver's interrupt handler": (VerdictKind.LOST_CALL, 9),
}


def skipping(hunt: Hunt, what: str) -> Skip | SkipInGuest:
    match what:
        case "the doorbell's signal":
            return Skip(hunt.signal(KICK))
        case "vhost's look at the queue":  # drivers/vhost/scsi.c: vhost_scsi_open
            return Skip(Calls("vhost_scsi_handle_kick"))
        case "vhost's signal":
            return Skip(hunt.signal(CALL))
        case _:
            return SkipInGuest(hunt.machine, handler_of(interrupt_number(hunt)))


def interrupt_number(hunt: Hunt) -> int:
    """Return Linux's number of a queue's interrupt: its vectors are numbered in their order."""
    slot = hunt.machine.device(hunt.device).slot
    _, listed = hunt.machine.guest.run(f"ls /sys/bus/pci/devices/0000:00:{slot:02x}.0/msi_irqs")
    # The first vector is for changes of the configuration (drivers/virtio/virtio_pci_common.c).
    return sorted(map(int, listed.split()))[1 + hunt.number]


@pytest.mark.long
@pytest.mark.parametrize("what", SEEN)
def test_a_diagnosis_that_watches_sees_where_it_was_lost(
    lossy: LabMachine, attached: AttachedMachine, what: str
) -> None:
    hunt = Hunt(lossy, attached, "vscsi0", 2)
    verdicts: list[Verdict] = []

    def watch() -> None:
        verdicts.extend(attached.diagnose("vscsi0", 2, duration_s=WATCHED_S))

    with hunt.mended_after():
        hunt.flows()
        skip = skipping(hunt, what)
        before = interrupts(lossy)
        instances = folder() / "instances"
        others = set(os.listdir(instances))
        watching = threading.Thread(target=watch)
        watching.start()
        until(lambda: set(os.listdir(instances)) - others, "the kernel counts", PATIENCE)
        # Its probes come first: what it counts has not been lost before it.
        with skip:
            command = hunt.start()
            until(lambda: skip.left == 0, f"{what} is skipped", PATIENCE)
        watching.join()
        assert not command.done
        taken = rise(before, interrupts(lossy))
        assert taken == ({hunt.line: 1} if what == "the driver's interrupt handler" else {})
        (verdict,) = verdicts
        assert (verdict.verdict, verdict.hop) == SEEN[what]
        # For the guest it is all the same: one more notification, and it goes on.
        assert verdict.event is not None
        hunt.queue.raise_event(verdict.event)
        hunt.ends_well(command)


@pytest.mark.long
def test_a_probe_tells_that_a_call_was_lost_and_not_by_whom(
    lossy: LabMachine, attached: AttachedMachine
) -> None:
    hunt = Hunt(lossy, attached, "vscsi0", 3)
    with hunt.mended_after():
        hunt.flows()
        with SkipInGuest(lossy, handler_of(interrupt_number(hunt))) as ignored:
            command = hunt.start()
            until(lambda: ignored.left == 0, "the driver ignores its interrupt", PATIENCE)
        (verdict,) = attached.diagnose("vscsi0", 3, duration_s=1, probe=True)
        # It came when nobody counted: this looks like a call that was never made, and helps, too.
        assert (verdict.verdict, verdict.hop) == (VerdictKind.LOST_CALL, 8)
        assert str(verdict.confidence) == "confirmed"
        hunt.ends_well(command)


def typed(*words: str) -> str:
    """Return what `kickcall WORDS` prints."""
    result = CliRunner().invoke(main.app, [*words])
    assert result.exit_code == 0, result.output
    return result.output.strip("\n")


def told_of_the_stall(*words: str) -> str:
    """Return what a diagnosis prints; one that did not get to run itself blames nobody."""
    ask = partial(CliRunner().invoke, main.app, [*words])
    result = asked_until(lambda answer: answer.exit_code != 0, ask, PATIENCE)
    assert result.exit_code == 1, result.output
    return result.output.strip("\n")


def counts_of_the_kick(printed: str) -> tuple[int, int]:
    """Return the kick's count in fdinfo and in `struct eventfd_ctx`, as kickcall prints them."""
    in_fdinfo = re.search(r"kick: fd \d+, count in fdinfo (\d+)", printed)
    in_kernel = re.search(r"kick:.*?count = (\d+),", printed, re.S)
    assert in_fdinfo and in_kernel, printed
    return int(in_fdinfo[1]), int(in_kernel[1])


def test_the_rfcs_transcript(lossy: LabMachine, rfc: Path, attached: AttachedMachine) -> None:
    hunt = Hunt(lossy, attached, "vscsi0", 3)
    asked = (
        '{"execute":"x-debug-device-event","arguments":'
        '{"dev":"/machine/peripheral/vscsi0","event":"kick","queue":3}}'
    )
    eventfd = ("eventfd", lossy.name, "vscsi0", "--queue", "3", "--kernel")
    with hunt.mended_after():
        hunt.flows()
        with Skip(hunt.signal(KICK)) as lost:
            command = hunt.start()
            until(lambda: lost.left == 0, "the kernel loses the kick", PATIENCE)
        show = typed("show", lossy.name, "vscsi0")
        before = typed(*eventfd)
        hunt.stalled()
        diagnose = told_of_the_stall("diagnose", lossy.name, "vscsi0", "--queue", "3")
        assert counts_of_the_kick(before) == counts_of_the_kick(typed(*eventfd))
        assert not command.done
        with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as client:
            connection.settimeout(PATIENCE)
            connection.connect(str(rfc))
            answers = [client.readline()]
            for line in ('{"execute":"qmp_capabilities"}', asked):
                client.write(line + "\n")
                client.flush()
                answers.append(client.readline())
        assert [json.loads(line) for line in answers[1:]] == [{"return": {}}] * 2
        status, returned = command.wait(PATIENCE)
        assert status == 0
        after = typed(*eventfd)
        in_fdinfo, in_kernel = counts_of_the_kick(before)
        assert in_fdinfo == in_kernel
        assert counts_of_the_kick(after) == (in_fdinfo + 1, in_kernel + 1)
        assert "lost-kick on hop 3" in diagnose
        rfc_page.write(
            rfc_page.Hunt(
                kernel=platform.release(),
                io=hunt.io,
                show=show,
                eventfd_before=before,
                diagnose=diagnose,
                asked=asked,
                answered=answers[2].strip(),
                returned=returned.strip(),
                eventfd_after=after,
                show_after=typed("show", lossy.name, "vscsi0"),
                before=in_kernel,
                after=in_kernel + 1,
            )
        )
