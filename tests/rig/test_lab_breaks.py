"""Does the relay lose real notifications of a real guest, and does an eventfd write repair them?"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from functools import partial
from signal import SIGCONT, SIGSTOP
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import LabError
from kickcall.host.eventfds import eventfds_of, signal
from kickcall.host.processes import Process
from kickcall.lab.process import listens
from kickcall.lab.relay_control import RelayControl
from kickcall.lab.spec import MachineSpec, VhostUserBlk, VirtioBlk
from kickcall.lab.vhost_user import HEADER
from witness import until, within

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import BootMachine
    from kickcall.lab.guest import Command
    from kickcall.lab.machine import LabMachine

pytestmark = pytest.mark.rig


@pytest.fixture(scope="module")
def machine(guest_image_built: object) -> Iterator[LabMachine]:
    from kickcall.lab.boot import boot

    with boot(MachineSpec(devices=(VhostUserBlk(queues=2, disk="file"),))) as booted:
        yield booted


def read_on(machine: LabMachine, queue: int) -> Command:
    """Start a read that uses this queue: with two CPUs and two queues, CPU N submits to queue N."""
    disk = machine.disk("vub0")
    return machine.guest.start(
        f"taskset -c {queue} dd if={disk} of=/dev/null bs=4k count=1 iflag=direct"
    )


def write_all_shared_eventfds(machine: LabMachine) -> None:
    """Write 1 to every eventfd of QEMU that the relay holds: all kick and call notifiers."""
    of_relay = {state.eventfd_id for state in eventfds_of(machine.relay_pid("vub0")).values()}
    with Process(machine.pid) as qemu:
        for fd, state in eventfds_of(machine.pid).items():
            if state.eventfd_id in of_relay:
                ours = qemu.duplicate_fd(fd)
                signal(ours)
                os.close(ours)


@pytest.mark.parametrize("event", ["kick", "call"])
@pytest.mark.parametrize("queue", [0, 1])
def test_one_lost_notification_hangs_a_read_until_the_notifiers_are_written(
    machine: LabMachine, event: str, queue: int
) -> None:
    relay = machine.relay("vub0")
    before = relay.carried(event, queue)
    relay.drop(event, queue)
    reader = read_on(machine, queue)
    after = relay.wait_for(event, queue, dropped=before.dropped + 1)
    assert (after.dropped, after.pending) == (before.dropped + 1, 0)
    time.sleep(0.3)
    assert not reader.done
    write_all_shared_eventfds(machine)
    assert reader.wait(timeout=60).status == 0


def test_a_fault_of_one_queue_leaves_the_other_alone(machine: LabMachine) -> None:
    relay = machine.relay("vub0")
    relay.drop("kick", 1)
    assert read_on(machine, 0).wait(timeout=60).status == 0
    assert relay.carried("kick", 1).pending == 1
    relay.clear()
    assert read_on(machine, 1).wait(timeout=60).status == 0


@pytest.mark.parametrize("event", ["kick", "call"])
def test_a_delayed_notification_comes_late_by_itself(machine: LabMachine, event: str) -> None:
    machine.relay("vub0").delay(event, 0, seconds=1.0)
    before = time.monotonic()
    assert read_on(machine, 0).wait(timeout=60).status == 0
    assert time.monotonic() - before >= 1.0


def test_a_doubled_call_is_two_interrupts(machine: LabMachine) -> None:
    assert read_on(machine, 0).wait(timeout=60).status == 0
    relay = machine.relay("vub0")
    rises: list[int] = []
    # A QEMU that has to wait for a processor takes both for one: then once more.
    while 2 not in rises and len(rises) < 20:
        relay.double("call", 0)
        relay.report()  # a relay that answers again has carried the last twin, however late
        before = machine.interrupts("vub0")["req.0"]
        assert read_on(machine, 0).wait(timeout=60).status == 0
        time.sleep(0.1)  # the twin comes later
        rises.append(machine.interrupts("vub0")["req.0"] - before)
    assert rises[-1] == 2, rises
    assert set(rises) <= {1, 2}


def test_every_kick_and_call_of_a_read_is_counted(machine: LabMachine) -> None:
    relay = machine.relay("vub0")
    kicks, calls = relay.carried("kick", 0).passed, relay.carried("call", 0).passed
    for _ in range(5):
        assert read_on(machine, 0).wait(timeout=60).status == 0
    assert relay.carried("kick", 0).passed == kicks + 5
    assert relay.carried("call", 0).passed == calls + 5


def test_the_relay_goes_on_after_a_reboot_and_after_a_pause(boot_machine: BootMachine) -> None:
    machine = boot_machine(MachineSpec(devices=(VhostUserBlk(queues=2),)))
    machine.guest.reboot(timeout=180)
    assert read_on(machine, 0).wait(timeout=60).status == 0
    machine.qmp("stop")
    machine.qmp("cont")
    assert read_on(machine, 0).wait(timeout=60).status == 0
    relay = machine.relay("vub0")
    relay.drop("kick", 0)
    reader = read_on(machine, 0)
    relay.wait_for("kick", 0, dropped=1)
    # The guest's next request does not kick again: the first one is lost for good.
    time.sleep(0.3)
    assert not reader.done


def test_a_device_without_a_relay_says_so(boot_machine: BootMachine) -> None:
    machine = boot_machine(
        MachineSpec(devices=(VirtioBlk(), VhostUserBlk(relay=False))), wait=False
    )
    for device in ("blk0", "vub0"):
        with pytest.raises(LabError, match=f"{device} of lab machine .* has no relay"):
            machine.relay(device)
    with pytest.raises(LabError, match=r"no device vub7 \(it has: blk0, vub0\)"):
        machine.relay("vub7")


# The relay by itself, between a front-end and a back-end that are this test.


class Ends:
    """A relay process, and sockets in the place of QEMU and of the back-end."""

    def __init__(self, folder: Path) -> None:
        self.listen, self.control = str(folder / "relay"), folder / "control"
        self.back_listener = socket.socket(socket.AF_UNIX)
        self.back_listener.bind(str(folder / "backend"))
        self.back_listener.listen()
        self.back_listener.settimeout(10)
        self.relay = subprocess.Popen(
            [
                *(sys.executable, "-m", "kickcall.lab.relay", "--listen", self.listen),
                *("--backend", str(folder / "backend"), "--control", str(self.control)),
            ]
        )
        until(partial(listens, self.control), "the relay listens")

    def connect(self) -> tuple[socket.socket, socket.socket]:
        front = socket.socket(socket.AF_UNIX)
        front.settimeout(10)
        front.connect(self.listen)
        back, _ = self.back_listener.accept()
        back.settimeout(10)
        return front, back


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    ends = Ends(tmp_path)
    try:
        yield ends
    finally:
        ends.relay.kill()
        ends.relay.wait()
        ends.back_listener.close()


def message(request: int, payload: bytes) -> bytes:
    return HEADER.pack(request, 1, len(payload)) + payload


def test_messages_and_their_fds_pass_in_both_directions(ends: Ends) -> None:
    front, back = ends.connect()
    memory = os.memfd_create("table")
    os.write(memory, b"guest memory")
    # SET_MEM_TABLE is 5.
    socket.send_fds(front, [message(5, b"x" * 40)], [memory])
    data, fds, _, _ = socket.recv_fds(back, 4096, 4)
    assert data == message(5, b"x" * 40)
    assert os.pread(fds[0], 12, 0) == b"guest memory"
    socket.send_fds(back, [message(31, b"y" * 24)], [memory])
    data, fds, _, _ = socket.recv_fds(front, 4096, 4)
    assert data == message(31, b"y" * 24)
    assert os.pread(fds[0], 12, 0) == b"guest memory"


def test_a_front_end_that_comes_back_gets_a_back_end_again_and_counters_stay(ends: Ends) -> None:
    for expected in (1, 2):
        front, back = ends.connect()
        kick = os.eventfd(0)
        socket.send_fds(front, [message(12, bytes(8))], [kick])
        _, fds, _, _ = socket.recv_fds(back, 4096, 4)
        os.eventfd_write(kick, 1)
        assert os.eventfd_read(fds[0]) == 1
        assert RelayControl(ends.control).carried("kick", 0).passed == expected
        front.close()
        assert back.recv(1) == b""


def test_a_call_is_not_lost_while_qemu_names_another_eventfd_for_it(ends: Ends) -> None:
    # QEMU starts a vhost-user-blk device, and then names the eventfds for its calls
    # (hw/block/vhost-user-blk.c: vhost_user_blk_start): the guest may kick before that is read.
    front, back = ends.connect()
    first, second, kick = (os.eventfd(0) for _ in range(3))
    carried = []
    for request, notifier in ((13, first), (12, kick)):  # SET_VRING_CALL, SET_VRING_KICK
        socket.send_fds(front, [message(request, bytes(8))], [notifier])
        carried += socket.recv_fds(back, HEADER.size + 8, 1)[1]
    ends.relay.send_signal(SIGSTOP)
    for _ in range(3):
        front.sendall(message(18, bytes(8)))  # SET_VRING_ENABLE
    socket.send_fds(front, [message(13, bytes(8))], [second])
    os.eventfd_write(kick, 1)
    ends.relay.send_signal(SIGCONT)
    call, kicked = carried
    assert os.eventfd_read(kicked) == 1
    # The back-end has read none of that yet.
    os.eventfd_write(call, 1)
    assert select.select([second], [], [], 30)[0]
    assert not select.select([first], [], [], 0)[0]


def test_a_queue_without_an_fd_is_passed_on_unchanged(ends: Ends) -> None:
    front, back = ends.connect()
    front.sendall(message(12, (1 << 8).to_bytes(8, "little")))
    data, fds, _, _ = socket.recv_fds(back, 4096, 4)
    assert (data, fds) == (message(12, (1 << 8).to_bytes(8, "little")), [])


def test_nonsense_ends_the_connection_and_not_the_relay(ends: Ends) -> None:
    front, back = ends.connect()
    front.sendall(b"\xff" * 12)
    assert front.recv(1) == b""
    assert back.recv(1) == b""
    front, back = ends.connect()
    front.sendall(message(1, b""))
    assert back.recv(100) == message(1, b"")


def test_a_control_request_that_makes_no_sense_is_refused(ends: Ends) -> None:
    relay = RelayControl(ends.control)
    with pytest.raises(LabError, match="'shout' is not a valid Notification"):
        relay.drop("shout", 0)
    assert relay.report() == []
    ends.relay.kill()
    ends.relay.wait()
    with pytest.raises(LabError, match="does not answer"):
        relay.report()


def test_the_relay_adds_less_than_a_millisecond(ends: Ends) -> None:
    front, back = ends.connect()
    kick = os.eventfd(0)
    socket.send_fds(front, [message(12, bytes(8))], [kick])
    _, fds, _, _ = socket.recv_fds(back, 4096, 4)
    took = []
    for _ in range(200):
        before = time.monotonic()
        os.eventfd_write(kick, 1)
        os.eventfd_read(fds[0])
        took.append(time.monotonic() - before)
    # The median: other tests share the processors.
    assert sorted(took)[100] < within(0.001)
