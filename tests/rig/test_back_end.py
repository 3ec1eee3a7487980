"""Is a vhost-user back-end left in peace by all that only looks?"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from kickcall.attached import attach
from kickcall.host.eventfds import holders_of
from kickcall.vmm.monitor import borrow
from witness import STOP_IO, io_until_told, kernel_complaints, until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kickcall.attached import AttachedMachine
    from kickcall.lab.machine import LabMachine
    from kickcall.vmm.monitor import Monitor

pytestmark = pytest.mark.rig

TIMES = 50
TOUCHES_THE_BACK_END = {"x-query-virtio-queue-status"}
"""For a device that vhost serves QEMU sends GET_VRING_BASE for it, and that stops the ring."""
ONLY_LOOKS = {
    "query-status",
    "query-version",
    "query-commands",
    "query-pci",
    "qom-get",
    "x-query-virtio",
    "x-query-virtio-status",
    "x-query-virtio-queue-status",
    "x-query-virtio-vhost-queue-status",
    "human-monitor-command",
}
HMP_ONLY_LOOKS = {"info mtree -f", "info network", "gpa2hva"}


class Overheard:
    """A monitor that notes what it is asked."""

    def __init__(self, monitor: Monitor, asked: list[tuple[str, dict[str, Any]]]) -> None:
        self._monitor = monitor
        self._asked = asked

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        self._asked.append((command, dict(arguments or {})))
        return self._monitor.execute(command, arguments)

    def hmp(self, line: str) -> str:
        self._asked.append(("human-monitor-command", {"command-line": line}))
        return self._monitor.hmp(line)


def test_looking_never_sends_a_command_that_reaches_a_back_end(zoo: LabMachine) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    plain = borrow([str(zoo.qmp_path)])

    @contextlib.contextmanager
    def overheard(timeout: float = 2.0) -> Iterator[Monitor]:
        with plain(timeout) as monitor:
            yield Overheard(monitor, asked)

    with attach(zoo.name, monitor=overheard) as attached:
        for one in attached.devices():
            for queue in one.queues():
                queue.state()
        attached.device("vub0").queue(0).kick(dry_run=True)
        attached.refresh()
    assert {command for command, _ in asked} <= ONLY_LOOKS
    for command, arguments in asked:
        if command in TOUCHES_THE_BACK_END:
            assert not any(name in arguments["path"] for name in ("vub0", "direct0"))
        if command == "human-monitor-command":
            line = arguments["command-line"]
            assert any(line == known or line.startswith(f"{known} ") for known in HMP_ONLY_LOOKS)
    assert "x-query-virtio-vhost-queue-status" in {command for command, _ in asked}


def moved(attached: AttachedMachine, name: str, number: int) -> bool:
    queue = attached.device(name).queue(number)
    before = queue.state().used_idx
    deadline = time.monotonic() + 1
    while queue.state().used_idx == before:
        if time.monotonic() > deadline:
            return False
    return True


@pytest.mark.timeout(900)
def test_looking_many_times_disturbs_no_request(zoo: LabMachine) -> None:
    """A back-end whose ring was stopped would never complete another request."""
    log = zoo.folder / "vub0-relay.log"
    commands = [io_until_told(zoo, name, cpu) for name in ("vub0", "direct0") for cpu in (0, 1)]
    complaints = kernel_complaints(zoo)
    readers = [zoo.guest.start(command) for command in commands]
    for number in range(TIMES):
        with attach(zoo.name) as attached:
            queues = [queue for one in attached.devices() for queue in one.queues()]
            for queue in queues:
                queue.state()
            holders_of({queue.map.kick.eventfd_id for queue in queues if queue.map.kick})
            name = ("vub0", "direct0")[number % 2]
            until(partial(moved, attached, name, number // 2 % 2), f"{name} serves its queues")
    zoo.guest.run(STOP_IO)
    for reader in readers:
        finished = reader.wait(timeout=60)
        assert finished.status == 0, finished.output
    assert kernel_complaints(zoo) == complaints
    # Where a connection ended the relay would have said so.
    assert log.read_text() == ""
