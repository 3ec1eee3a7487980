"""How does a test see an Intel card's registers, its writes and its interrupts in the guest?"""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import TYPE_CHECKING, Self

import pytest

from kickcall.lab.spec import E1000e
from kickcall.model import Via

if TYPE_CHECKING:
    from kickcall.attached import AttachedPciDevice
    from kickcall.lab.machine import LabMachine


def card_of(machine: LabMachine, name: str) -> E1000e:
    found = machine.device(name)
    assert isinstance(found, E1000e)
    return found


def interface(machine: LabMachine, name: str) -> str:
    mac = card_of(machine, name).mac
    return machine.guest.run(
        f"basename $(dirname $(grep -l {mac} /sys/class/net/*/address))"
    ).output.strip()


def taken(machine: LabMachine, ethernet: str) -> dict[str, int]:
    """Return how often the guest took each interrupt of an interface."""
    counts = {}
    for line in machine.guest.run(f"grep -w {ethernet} /proc/interrupts").output.splitlines():
        numbers = re.match(r"\s*\d+:((?:\s+\d+)+) ", line)
        assert numbers is not None
        name = re.search(rf"\b{ethernet}\S*", line)
        assert name is not None
        counts[name[0].rstrip(",")] = sum(map(int, numbers[1].split()))
    return counts


def lines_of(name: str, bits: int, lines: list[str]) -> list[str]:
    """Return which of an interface's interrupts a write to the cause set register has to raise."""
    match name:
        case "msix0":  # e1000_request_msix: receive, transmit, link; 82574 datasheet, 10.2.4.2
            causes = {20: lines[0], 22: lines[1]}
        case "igb0":  # a bit for each vector, which the kernel numbers in their order
            causes = dict(enumerate(lines))
        case _:
            return lines
    return [line for bit, line in causes.items() if bits >> bit & 1]


class Writes:
    """Every write to a register that QEMU's card sees in a `with` block, the driver's and ours."""

    def __init__(self, machine: LabMachine, address: int) -> None:
        self._machine = machine
        self._log = machine.folder / "qemu.log"
        self._write = re.compile(
            rf"^memory_region_ops_write .* addr {address:#x} value (0x[0-9a-f]+) size 4 ", re.M
        )

    def __enter__(self) -> Self:
        self._begin = self._log.stat().st_size
        trace(self._machine, "memory_region_ops_write", "on")
        return self

    def __exit__(self, *_: object) -> None:
        trace(self._machine, "memory_region_ops_write", "off")

    def seen(self) -> list[int]:
        text = self._log.read_bytes()[self._begin :].decode(errors="replace")
        return [int(value, 16) for value in self._write.findall(text)]


def call_once(machine: LabMachine, device: AttachedPciDevice, queue: int, writes: Writes) -> None:
    """Call a queue, and hold the guest's interrupts to the causes that its card saw set.

    Linux sets a cause itself every 2 s (e1000_watchdog_task), so ours may not be the only one. On
    a busy host two of them may become one interrupt before the guest gets to it: then once more.
    """
    name = device.info.id
    ethernet = interface(machine, name)
    # From 8.1 on the timer that throttles an MSI-X vector repeats its last interrupt
    # (hw/net/e1000e_core.c, e1000e_intrmgr_on_msix_throttling_timer), the driver's own, too.
    repeats = 2 if machine.spec.qemu != "system" and name in ("msix0", "igb0") else 1
    for _ in range(15):
        begun = -1
        while begun != len(writes.seen()):
            begun = len(writes.seen())
            before = taken(machine, ethernet)
        result = device.raise_event("call", queue, via="mmio")
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            after = taken(machine, ethernet)
            values = writes.seen()[begun:]
            owed = Counter(line for bits in values for line in lines_of(name, bits, list(before)))
            rise = {line: after[line] - before[line] for line in after}
            if all(owed[line] <= rise[line] <= repeats * owed[line] for line in after):
                (ours,) = re.findall("cause (0x[0-9a-f]+) to ", result.target)
                assert lines_of(name, int(ours, 16), list(before)) == [expected(name, queue, after)]
                assert int(ours, 16) in values
                assert (result.via, result.layout) == (Via.MMIO, None)
                return
    pytest.fail(f"{rise} interrupts for {owed} causes")


def expected(name: str, queue: int, lines: dict[str, int]) -> str:
    """Return a queue's interrupt, by the names that Linux's drivers give them."""
    if len(lines) == 1:
        return next(iter(lines))
    word = f"{'tx' if queue % 2 else 'rx'}-{queue // 2}"
    (line,) = (line for line in lines if line.endswith((word, f"-TxRx-{queue // 2}")))
    return line


def registers(machine: LabMachine, name: str) -> int:
    """Return where a card's registers are."""
    for bus in machine.qmp("query-pci"):
        for entry in bus["devices"]:
            if entry["qdev_id"] == name:
                return int(entry["regions"][0]["address"])
    raise AssertionError(f"no {name}")


def trace(machine: LabMachine, event: str, switch: str) -> None:
    machine.qmp("human-monitor-command", {"command-line": f"trace-event {event} {switch}"})
