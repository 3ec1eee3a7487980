"""Does a watcher stand machines that come and go, lose sight of themselves, and reboot, for long?

KICKCALL_CHURN_S sets how long (6 s by default, 600 for the full claim). Machines without a guest
are started, lose kicks, are reset, paused and killed at random, at any instant; their monitors are
held by others, and their sockets vanish. One guest reboots meanwhile, under load.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kickcall
import witness
from kickcall.errors import KickcallError, LabError
from kickcall.lab.qtest import Qtest, boot_without_guest
from kickcall.lab.spec import MachineSpec, VirtioBlk
from kickcall.watch.journal import Journal
from kickcall.watch.settings import Settings
from watcher import PATIENCE_S, Watcher, lose_a_kick, publish

if TYPE_CHECKING:
    from collections.abc import Callable

    from kickcall.lab.machine import LabMachine

pytestmark = [pytest.mark.rig, pytest.mark.timeout(1200)]

CHURN_S = float(os.environ.get("KICKCALL_CHURN_S", "6"))
SLOTS = 3
QUEUES = 4
GROWTH_MOST_MIB = 16 if CHURN_S < 300 else 8
ACTIONS = ("lose",) * 4 + ("hold", "vanish", "reset", "stop", "healthy", "wait")

# Says in a file of its own into which eventfd it writes, by the kernel's number for it.
TATTLING = """
import os, sys
from kickcall.host import eventfds
from kickcall.cli.main import run
said = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND)
signal = eventfds.signal
def tell(fd):
    with open(f"/proc/self/fdinfo/{fd}") as file:
        number = dict(line.split(":", 1) for line in file)["eventfd-id"]
    os.write(said, f"{number.strip()}\\n".encode())
    signal(fd)
eventfds.signal = tell
run()
"""


@dataclass
class Churn:
    """What was done to the machines, and which eventfds were their queues' when all was calm."""

    random: random.Random
    kicks: dict[tuple[int, int], set[int]] = field(default_factory=dict)
    """Ids of kick notifiers, by pid and queue."""
    lost: set[tuple[int, int]] = field(default_factory=set)
    """Queues that lost a kick at some time."""
    done: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    errors: list[BaseException] = field(default_factory=list)

    def count(self, what: str) -> None:
        with self.lock:
            self.done[what] = self.done.get(what, 0) + 1

    def learn(self, machine: LabMachine) -> bool:
        """Learn which eventfds are whose; tell whether that was possible."""
        try:
            with kickcall.attach(machine.pid) as attached:
                for queue in range(QUEUES):
                    kick = attached.device("blk0").queue(queue).state().kick
                    assert kick is not None
                    with self.lock:
                        self.kicks.setdefault((machine.pid, queue), set()).add(kick.eventfd_id)
        except KickcallError:
            self.count("not mapped")
            return False
        return True


def live(churn: Churn, name: str, rng: random.Random) -> None:
    """One life of a machine, and its end."""
    spec = MachineSpec(name=name, devices=(VirtioBlk(id="blk0", queues=QUEUES, iothread=True),))
    with contextlib.ExitStack() as held:
        machine = held.enter_context(boot_without_guest(spec))
        qtest = held.enter_context(Qtest(machine))
        churn.count("machines")
        disk = qtest.device("blk0")
        disk.set_up(event_idx=True)
        known = churn.learn(machine)
        seen = True
        completed = [0] * QUEUES
        for _ in range(rng.randrange(1, 9)):
            action = rng.choice(ACTIONS)
            churn.count(action)
            if action == "lose" and known:
                # Queue 0 never loses any, but its driver may have to wait for a processor.
                queue = rng.randrange(1, QUEUES)
                ring = disk.queues[queue]
                with churn.lock:
                    churn.lost.add((machine.pid, queue))
                lose_a_kick(disk, queue)
                completed[queue] += 1
                deadline = time.monotonic() + rng.choice([0.0] + [2.0 if seen else 0.3] * 3)
                while time.monotonic() < deadline and ring.completed() < completed[queue]:
                    time.sleep(0.01)
                if ring.completed() == completed[queue]:
                    churn.count("healed")
                else:
                    ring.kick()
                    break  # it may yet be healed, or not: the machine goes, or is reset
            elif action == "healthy" and known:
                ring = disk.queues[0]
                began = time.monotonic()
                publish(disk, 0)
                ring.kick()
                if time.monotonic() - began >= Settings().limits.notification_s:
                    with churn.lock:
                        churn.lost.add((machine.pid, 0))
                completed[0] += 1
                ring.wait_completed(completed[0], timeout=PATIENCE_S)
            elif action == "hold":
                with contextlib.suppress(OSError):
                    holder = held.enter_context(socket.socket(socket.AF_UNIX))
                    holder.settimeout(0.1)  # others may be waiting for it already
                    holder.connect(str(machine.qmp_path))
            elif action == "vanish":
                seen = False
                Path(machine.qmp_path).unlink(missing_ok=True)
            elif action == "reset":
                disk.reset()
                time.sleep(rng.uniform(0, 0.3))
                disk.set_up(event_idx=True)
                known = churn.learn(machine)
                completed = [0] * QUEUES
            elif action == "stop":
                machine.qmp("stop")
                time.sleep(rng.uniform(0, 0.3))
                machine.qmp("cont")
                # QEMU makes notifiers anew when it goes on.
                known = churn.learn(machine)
            else:
                time.sleep(rng.uniform(0, 0.5))
        if rng.random() < 0.5:
            churn.count("killed")
            os.kill(machine.pid, signal.SIGKILL)


def churned(churn: Churn, name: str, seed: int, until: float) -> None:
    rng = random.Random(seed)
    try:
        while time.monotonic() < until and not churn.errors:
            live(churn, name, rng)
    except BaseException as exc:
        churn.errors.append(exc)


def rebooted(churn: Churn, guest: LabMachine, until: float) -> None:
    load = "while :; do dd if=/dev/vda of=/dev/null bs=4k count=64 iflag=direct 2>/dev/null; done"
    try:
        while time.monotonic() < until and not churn.errors:
            # A host that is busy takes its time, and its guest may not answer.
            with contextlib.suppress(LabError):
                guest.guest.start(load)
                time.sleep(1.0)
                guest.guest.reboot()
                churn.count("reboots")
    except BaseException as exc:
        churn.errors.append(exc)


def memory_mib(pid: int) -> float:
    """Return what the process takes for itself: pages of the VM's that it maps are the VM's."""
    status = Path(f"/proc/{pid}/status").read_text()
    kib = dict(re.findall(r"(VmRSS|RssShmem):\s+(\d+) kB", status))
    return (int(kib["VmRSS"]) - int(kib["RssShmem"])) / 1024


def test_churn_is_stood_with_nothing_lost_leaked_or_written_wrongly(
    boot_machine: Callable[[MachineSpec], LabMachine], tmp_path: Path
) -> None:
    seed = int(os.environ.get("KICKCALL_CHURN_SEED", str(random.randrange(1 << 32))))
    print(f"KICKCALL_CHURN_SEED={seed}")
    churn = Churn(random.Random(seed))
    base = f"churn-{os.getpid()}"
    names = [f"{base}-{slot}" for slot in range(SLOTS)]
    guest = boot_machine(
        MachineSpec(devices=(VirtioBlk(id="blk0", queues=2, disk="file"),)),
    )
    said, journal = tmp_path / "said", tmp_path / "journal.db"
    said.touch()
    tattling = [sys.executable, "-c", TATTLING, str(said), "watch"]
    watcher = Watcher(*names, guest.name, "--heal", "--journal", str(journal), command=tattling)
    pid = watcher.process.pid
    fds = Path(f"/proc/{pid}/fd")
    with contextlib.closing(watcher):
        watcher.wait_for("came", machine=guest.name)
        # What stays open is opened by the first machine and its first injection. A watcher that has
        # to wait for a processor may miss both: then another machine.
        first, deadline = random.Random(2), time.monotonic() + 4 * PATIENCE_S
        while not watcher.count("injected"):
            assert time.monotonic() < deadline, watcher.said
            live(churn, names[0], first)
        # All but the guest.
        witness.until(lambda: watcher.count("went") == watcher.count("came") - 1, "they went")
        before = len(list(fds.iterdir()))
        until = time.monotonic() + CHURN_S
        threads = [
            threading.Thread(target=churned, args=(churn, name, seed + slot, until))
            for slot, name in enumerate(names)
        ]
        threads.append(threading.Thread(target=rebooted, args=(churn, guest, until)))
        for thread in threads:
            thread.start()
        # The first three fifths are left out: threads start, caches fill.
        memory = []
        for part in range(1, 6):
            time.sleep(max(0.0, until - CHURN_S * (1 - part / 5) - time.monotonic()))
            memory.append(memory_mib(pid))
        for thread in threads:
            thread.join()
        if churn.errors:
            raise churn.errors[0]
        # It may be in the middle of a boot.
        guest.guest.boot_id(timeout=4 * PATIENCE_S)
        assert guest.guest.run("true", timeout=PATIENCE_S).status == 0
        assert watcher.process.poll() is None, watcher.errors
        deadline = time.monotonic() + PATIENCE_S
        while len(list(fds.iterdir())) > before:
            assert time.monotonic() < deadline, [os.readlink(fd) for fd in fds.iterdir()]
            time.sleep(0.1)
        memory.append(memory_mib(pid))
        assert memory[-1] - memory[2] < GROWTH_MOST_MIB, memory
        assert watcher.end() == 0
    trouble = [one for one in watcher.said if re.match(r"\w+(Error|Exception): ", one["text"])]
    assert (trouble, watcher.errors) == ([], [])
    rows = Journal(journal, reading=True).injections()
    written = [int(line) for line in said.read_text().split()]
    # An intent may have been put down for a machine that ended before the write.
    assert len(written) <= len(rows)
    right = set().union(*(churn.kicks[key] for key in churn.lost))
    assert set(written) <= right
    for row in rows:
        assert row.event == "kick"
        assert (row.pid, row.queue) in churn.lost
        assert row.eventfd_id in churn.kicks[row.pid, row.queue]
    helped = sum(bool(row.helped) for row in rows)
    print(
        f"{churn.done}, {len(rows)} injections, {helped} helped, "
        f"memory {' '.join(f'{mib:.0f}' for mib in memory)} MiB, {before} descriptors"
    )
