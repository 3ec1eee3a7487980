"""What became of a notification? Asked of those who would know: the guest, QEMU, the kernel."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import socket
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from kickcall.lab.interrupts import parse_interrupts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kickcall.attached import AttachedMachine
    from kickcall.lab.machine import LabMachine
    from kickcall.model import Verdict

_K = TypeVar("_K")
_T = TypeVar("_T")
Line = tuple[str, str]
"""A line of the guest's /proc/interrupts: the device's id, and the driver's name for it."""

_NOTIFIED = re.compile(r"^virtio_queue_notify vdev (0x[0-9a-f]+) n (\d+) vq 0x[0-9a-f]+$", re.M)


def until(condition: Callable[[], object], what: str, timeout: float = 30.0) -> None:
    """Return when `condition` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.005)


def never(condition: Callable[[], object], what: str, seconds: float = 0.4) -> None:
    """Return after `seconds` in which `condition` did not hold once."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert not condition(), what
        time.sleep(0.02)


def asked_until(good: Callable[[_T], object], ask: Callable[[], _T], timeout: float = 60.0) -> _T:
    """Return the first answer that is `good`; the last one where none was in time."""
    deadline = time.monotonic() + timeout
    while not good(answer := ask()) and time.monotonic() < deadline:
        pass
    return answer


def is_busy() -> bool:
    """Tell whether processes wait for a processor here, or will soon: other tests run beside."""
    beside = "PYTEST_XDIST_WORKER" in os.environ
    return beside or os.getloadavg()[0] >= (os.cpu_count() or 1)


def within(seconds: float) -> float:
    """Return how long a thing of `seconds` may take here: on a busy host five times that."""
    return 5 * seconds if is_busy() else seconds


def was_asked(verdict: Verdict) -> bool:
    """Tell whether QEMU was asked for a verdict.

    A diagnosis waits 0.4 s for a monitor, and on a busy host QEMU may greet later than that.
    """
    return any(one.what == "run state" for one in verdict.evidence)


@contextlib.contextmanager
def held_monitor(path: Path) -> Iterator[None]:
    """Hold a monitor, as libvirt does."""
    with socket.socket(socket.AF_UNIX) as holder:
        holder.connect(str(path))
        assert b"QMP" in holder.recv(4096)
        yield


def interrupt_line(machine: LabMachine, device: str, queue: int) -> Line:
    """Return the line of a queue's interrupt, by the names that Linux's drivers give them."""
    match machine.device(device).kind:
        case "virtio-scsi":  # drivers/scsi/virtio_scsi.c: virtscsi_init
            return device, ("control", "event")[queue] if queue < 2 else f"request.{queue - 2}"
        case "virtio-net":  # drivers/net/virtio_net.c: virtnet_find_vqs
            return device, f"{('input', 'output')[queue % 2]}.{queue // 2}"
        case _:  # drivers/block/virtio_blk.c: init_vq
            return device, f"req.{queue}"


def raised_by(
    machine: LabMachine, attached: AttachedMachine, call: Callable[[], object]
) -> dict[Line, int]:
    """Return which interrupts a call raised, and how often."""

    def called() -> dict[Line, int]:
        before = interrupts(machine)
        call()
        return rise(before, interrupts_after(machine, before))

    return undisturbed(attached, called)


def undisturbed(attached: AttachedMachine, do: Callable[[], _T]) -> _T:
    """Return what `do` returns; of another attempt, if the guest was at work meanwhile.

    On a network it is 5 s after a packet: each side asks whether the other is there (arp(7)).
    """
    for _ in range(5):
        used, returned = used_indices(attached), do()
        if used_indices(attached) == used:
            break
    return returned


def used_indices(attached: AttachedMachine) -> dict[tuple[str, int], int | None]:
    """Return how far each device is in each of its queues."""
    return {
        (device.info.path, queue.map.index): queue.state().used_idx
        for device in attached.devices()
        for queue in device.queues()
    }


_QUIET = """
while before=$(grep virtio /proc/interrupts); sleep 0.02
    after=$(grep virtio /proc/interrupts); [ "$before" != "$after" ]; do :; done
echo "$after"; ls -l /sys/bus/virtio/devices
"""


def interrupts(machine: LabMachine) -> Counter[Line]:
    """Return how often the guest took each interrupt of all virtio devices, once that is at rest.

    At rest: two looks 20 ms apart that show the same.
    """
    listing = machine.guest.run(_QUIET).output
    return Counter(
        {
            (device.id, name): count
            for device in machine.spec.devices
            for name, count in parse_interrupts(listing, machine.address(device.id)).items()
        }
    )


def interrupts_after(machine: LabMachine, before: Counter[Line]) -> Counter[Line]:
    """Return the counts when they have risen, and are at rest again."""
    return counted_after(lambda: interrupts(machine), before)


def counted_after(count: Callable[[], _T], before: _T) -> _T:
    """Return what is counted once an interrupt was taken: its processor may come to it late."""
    until(lambda: count() != before, "the guest takes an interrupt")
    return count()


def nvme_interrupts(machine: LabMachine) -> Counter[str]:
    """Return how often the guest took the interrupt of each queue, as `nvme0q1`."""
    listing = machine.guest.run("grep nvme /proc/interrupts").output
    return Counter(
        {
            line.split()[-1]: sum(int(word) for word in line.split()[1:] if word.isdigit())
            for line in listing.splitlines()
        }
    )


def look_over(machine: LabMachine, device: str) -> None:
    """Return when the guest has looked a new disk over: until then nobody else may open it."""
    read = f"dd if={machine.disk(device)} of=/dev/null bs=4k count=1 iflag=direct"
    until(lambda: machine.guest.run(read).status == 0, f"the disk of {device} can be read")


def rise(before: Mapping[_K, int], after: Mapping[_K, int]) -> dict[_K, int]:
    """Return what moved, and by how much."""
    return {line: after[line] - before[line] for line in after if after[line] != before[line]}


def eventfd_counts(pid: int) -> dict[int, int]:
    """Return the count of every eventfd of a process, by descriptor, as fdinfo has it."""
    counts = {}
    for entry in os.scandir(f"/proc/{pid}/fdinfo"):
        try:
            text = Path(entry.path).read_text()
        except OSError:
            continue
        if found := re.search(r"^eventfd-count:\s*([0-9a-f]+)$", text, re.M):
            counts[int(entry.name)] = int(found[1], 16)
    return counts


def watch_queues(machine: LabMachine) -> None:
    """Let QEMU tell in its log which queue of which device it is made to look at."""
    line = "trace-event virtio_queue_notify on"
    machine.qmp("human-monitor-command", {"command-line": line})


class NotifyTrace:
    """QEMU's own word on which queue it was made to look at: its trace event virtio_queue_notify.

    `with NotifyTrace(machine) as trace:` sees what happens in the block, and a little later.
    """

    def __init__(self, machine: LabMachine) -> None:
        self._log = machine.folder / "qemu.log"
        self._from = 0

    def __enter__(self) -> Self:
        self._from = self._log.stat().st_size
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def seen(self) -> list[tuple[str, int]]:
        """Return (address of the VirtIODevice, queue) of each look since the block began."""
        text = self._log.read_bytes()[self._from :].decode(errors="replace")
        return [(vdev, int(queue)) for vdev, queue in _NOTIFIED.findall(text)]

    def wait_for(self, queue: int) -> str:
        """Return the address of the device whose queue of that number QEMU looks at first."""

        def looks() -> list[str]:
            return [vdev for vdev, number in self.seen() if number == queue]

        until(looks, f"QEMU looks at a queue {queue}")
        return looks()[0]


def own_io(machine: LabMachine, name: str, cpu: int = 0) -> str:
    """Return a command for the guest that makes it use this device, and on a disk one queue."""
    match machine.device(name).kind:
        case "virtio-net":
            return "ping -c 1 -W 5 10.0.2.2"
        case _:
            disk = machine.disk(name)
            return f"taskset -c {cpu} dd if={disk} of=/dev/null bs=4k count=1 iflag=direct"


STOP_IO = "touch /run/stop-io"
"""The guest's command that ends all that `io_until_told` began."""


def io_until_told(machine: LabMachine, name: str, cpu: int = 0) -> str:
    """Return a command for the guest that reads a disk until STOP_IO; it fails if a read does."""
    machine.guest.run("rm -f /run/stop-io")
    read = f"taskset -c {cpu} dd if={machine.disk(name)} of=/dev/null bs=4k count=200 iflag=direct"
    return f"while [ ! -e /run/stop-io ]; do {read} || exit 1; done"


def kernel_complaints(machine: LabMachine) -> str:
    """Return what the guest's kernel complains of.

    Not that a timer's interrupt took long: that is a pause of the host.
    """
    words = "error|warn|bug|stall|timeout|hang|spurious|reset|blocked for"
    return machine.guest.run(f"dmesg | grep -iE '{words}'").output


def virtio_device_address(machine: LabMachine, name: str) -> str:
    """Return where QEMU has the VirtIODevice that the guest uses as `name`, by QEMU's trace."""
    command = own_io(machine, name)
    seen: set[str] = set()
    for _ in range(5):
        with NotifyTrace(machine) as trace:
            status, output = machine.guest.run(command)
            assert status == 0, output
            until(trace.seen, f"QEMU looks at a queue of {name}")
            seen = {vdev for vdev, _ in trace.seen()}
        if len(seen) == 1:  # a network may have had something to say of its own, see undisturbed
            break
    (address,) = seen
    return address


_PTRACE_SEIZE, _PTRACE_INTERRUPT, _PTRACE_DETACH = 0x4206, 0x4207, 17  # linux/ptrace.h
_WALL = 0x40000000
_PPOLL = {"x86_64": 271, "aarch64": 73}  # syscall_64.tbl, asm-generic/unistd.h
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


class StoppedThread:
    """A thread of QEMU, held still while the block lasts; the others run on."""

    def __init__(self, tid: int) -> None:
        self.tid = tid

    def __enter__(self) -> Self:
        self._ptrace(_PTRACE_SEIZE)
        self._ptrace(_PTRACE_INTERRUPT)
        os.waitpid(self.tid, _WALL)
        return self

    def __exit__(self, *_: object) -> None:
        self._ptrace(_PTRACE_DETACH)

    def _ptrace(self, request: int) -> None:
        if _libc.ptrace(request, self.tid, None, None) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), f"ptrace of thread {self.tid}")


class StoppedMainThread(StoppedThread):
    """QEMU's main thread, held still while it waits for something to do.

    Anywhere else it may hold the lock that a virtual CPU needs to ring a doorbell
    (util/main-loop.c, os_host_main_loop_wait: it gives it away around its ppoll alone).
    """

    def __init__(self, machine: LabMachine) -> None:
        super().__init__(machine.pid)

    def __enter__(self) -> Self:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            super().__enter__()
            if self._waits():
                return self
            self.__exit__()
            time.sleep(0.001)
        raise TimeoutError(f"the main thread of QEMU (PID {self.tid}) never waits")

    def _waits(self) -> bool:
        number = Path(f"/proc/{self.tid}/syscall").read_text().split()[0]
        return number == str(_PPOLL[platform.machine()])


class StoppedIothread(StoppedThread):
    """A device's iothread."""

    def __init__(self, machine: LabMachine, device: str) -> None:
        (tid,) = (
            int(one["thread-id"])
            for one in machine.qmp("query-iothreads")
            if one["id"] == f"{device}-iothread"
        )
        super().__init__(tid)
