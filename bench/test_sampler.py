"""What does a look at 10,000 queues cost? CPU time of ours, which is all that it takes.

The queues are real ones of QEMU, set up without a guest (`kickcall.lab.qtest`). What counts is the
best of many looks: other work on the host takes a look's caches, and that is no cost of the look.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kickcall.attached import attach
from kickcall.lab.qtest import Qtest, boot_without_guest
from kickcall.lab.spec import MachineSpec, VirtioBlk
from kickcall.vmm.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kickcall.attached import AttachedMachine
    from kickcall.lab.machine import LabMachine
    from kickcall.vmm.session import VmmSession

QUEUES = 10_000
PER_DEVICE = 1_000
DEVICES = 5
"""A machine has so many: two eventfds a queue, and a process may open 20,000 files here."""
TICK = 1 / os.sysconf("SC_CLK_TCK")


def session_of(attached: AttachedMachine) -> VmmSession:
    return attached._session


def cpu_of(work: Callable[[], object], times: int) -> float:
    """Return the least CPU time of `work` in seconds, after one go that does not count."""
    work()
    took = []
    for _ in range(times):
        start = time.process_time()
        work()
        took.append(time.process_time() - start)
    return min(took)


@contextlib.contextmanager
def machine_with_queues(
    *, shared: bool, devices: int = DEVICES, memory_mib: int = 256
) -> Iterator[tuple[LabMachine, AttachedMachine]]:
    """Start a machine whose queues are all set up, with event indices, and have all been used."""
    spec = MachineSpec(
        # An iothread polls the kick notifiers: QEMU's main loop would take 10 ms for each answer
        # of its monitor if it had to poll 5,000.
        devices=tuple(VirtioBlk(queues=PER_DEVICE, iothread=True) for _ in range(devices)),
        memory_mib=memory_mib,
        shared_memory=shared,
    )
    with boot_without_guest(spec) as machine, Qtest(machine) as qtest:
        for device in machine.spec.devices:
            driver = qtest.device(device.id)
            driver.set_up(event_idx=True)
            # QEMU's own position is proved by a queue that has moved.
            driver.queues[0].publish_request()
            driver.queues[0].kick()
            driver.queues[0].wait_completed(1)
        with attach(machine.name) as attached:
            yield machine, attached


@pytest.fixture(scope="module")
def machines() -> Iterator[list[tuple[LabMachine, AttachedMachine]]]:
    """Machines with QUEUES queues between them; their memory is shared."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(machine_with_queues(shared=True))
            for _ in range(QUEUES // (DEVICES * PER_DEVICE))
        ]


@contextlib.contextmanager
def samplers(attached: Sequence[AttachedMachine], **how: Any) -> Iterator[list[Sampler]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Sampler(session_of(one), **how)) for one in attached]


def say(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        print(f"\n  {text}", end="")


def test_a_look_at_10_000_queues(
    machines: list[tuple[LabMachine, AttachedMachine]], capsys: pytest.CaptureFixture[str]
) -> None:
    attached = [one for _, one in machines]
    with samplers(attached) as mapped, samplers(attached, map_memory=False) as read:
        assert sum(len(one.queues) for one in read) == QUEUES
        assert sum(one.mapped for one in mapped) == QUEUES
        by_reading = cpu_of(lambda: [one.look() for one in read], 60)
        by_mapping = cpu_of(lambda: [one.look() for one in mapped], 60)
        whole = cpu_of(lambda: [one.sample() for one in mapped], 10)
        assert not any(one.look().moved for one in read)
    say(capsys, f"{QUEUES} queues: {by_reading * 1e3:6.2f} ms through process_vm_readv")
    say(capsys, f"{QUEUES} queues: {by_mapping * 1e3:6.2f} ms where memory is mapped")
    say(capsys, f"{QUEUES} queues: {whole * 1e3:6.2f} ms with a Sample of every one")
    status = status_query_cpu(*machines[0])
    for what, cost in status.items():
        ratio = cost / (by_reading / QUEUES)
        say(capsys, f"x-query-virtio-queue-status, {what}: {cost * 1e6:.0f} µs, {ratio:.0f} times")
    assert by_reading < 0.010
    assert by_mapping < 0.001
    assert min(status.values()) > 500 * by_reading / QUEUES


def status_query_cpu(machine: LabMachine, attached: AttachedMachine) -> dict[str, float]:
    """Return the CPU time of one x-query-virtio-queue-status, QEMU's and ours together, in s."""
    path = f"{attached.devices()[0].info.path}/virtio-backend"
    times = 1_000

    def spent() -> float:
        fields = Path(f"/proc/{machine.pid}/stat").read_text().rpartition(")")[2].split()
        return time.process_time() + (int(fields[11]) + int(fields[12])) * TICK

    found = {}
    with session_of(attached).borrow() as monitor:
        start = spent()
        for queue in range(times):
            monitor.execute("x-query-virtio-queue-status", {"path": path, "queue": queue})
        found["by kickcall's monitor"] = (spent() - start) / times
    with socket.socket(socket.AF_UNIX) as bare:
        bare.connect(str(machine.folder / "qmp0"))
        answers = bare.makefile("rb")
        answers.readline()
        bare.sendall(b'{"execute":"qmp_capabilities"}\n')
        answers.readline()
        start = spent()
        for queue in range(times):
            arguments = {"path": path, "queue": queue}
            command = {"execute": "x-query-virtio-queue-status", "arguments": arguments}
            bare.sendall(json.dumps(command).encode() + b"\n")
            assert b"return" in answers.readline()
        found["by a bare socket"] = (spent() - start) / times
        answers.close()
    return found


def test_the_cost_grows_with_the_queues(
    machines: list[tuple[LabMachine, AttachedMachine]], capsys: pytest.CaptureFixture[str]
) -> None:
    session = session_of(machines[0][1])
    for map_memory in (False, True):
        cost = {}
        for devices in (1, 2, 5):
            only = [(mapped, None) for mapped in session.devices[:devices]]
            with Sampler(session, only, map_memory=map_memory) as sampler:
                cost[devices] = cpu_of(sampler.look, 60)
            how = "mapped" if map_memory else "read"
            say(capsys, f"{how}: {devices * PER_DEVICE:5} queues {cost[devices] * 1e3:.2f} ms")
        # Five times as many cost a little more each, as they no longer fit in the same cache.
        assert cost[2] < 2 * 2 * cost[1]
        assert cost[5] < 2 * 5 * cost[1]


def test_private_memory_costs_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        machine_with_queues(shared=False, devices=1) as (_, attached),
        Sampler(session_of(attached)) as sampler,
    ):
        assert sampler.mapped == 0
        cost = cpu_of(sampler.look, 60)
    say(capsys, f"private memory: {cost * 1e6:.0f} µs for {PER_DEVICE} queues")
    assert cost < 0.010 * PER_DEVICE / QUEUES


def test_the_cost_does_not_depend_on_the_guests_memory(capsys: pytest.CaptureFixture[str]) -> None:
    cost = {}
    for memory_mib in (256, 16384):
        with machine_with_queues(shared=True, devices=1, memory_mib=memory_mib) as (_, attached):
            for map_memory in (False, True):
                with Sampler(session_of(attached), map_memory=map_memory) as sampler:
                    cost[memory_mib, map_memory] = cpu_of(sampler.look, 60)
    for (memory_mib, map_memory), took in cost.items():
        how = "mapped" if map_memory else "read"
        say(capsys, f"{memory_mib:5} MiB, {how}: {took * 1e6:.0f} µs for {PER_DEVICE} queues")
    for map_memory in (False, True):
        assert cost[16384, map_memory] < 1.5 * cost[256, map_memory]
