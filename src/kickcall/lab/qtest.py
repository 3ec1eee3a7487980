"""How are a machine's registers and memory driven from Python, with no guest at all?

    with boot_without_guest(MachineSpec(devices=(VirtioBlk(queues=256),))) as machine:
        with Qtest(machine) as qtest:
            blk = qtest.device("blk0")
            blk.set_up()
            queue = blk.queues[17]
            queue.publish_request()
            queue.kick()

QEMU's qtest protocol (QEMU, softmmu/qtest.c, at the top) is lines: `writel ADDR VALUE` and `OK`.
The machine runs under TCG with a firmware of HLT instructions, so it is `running` and nobody but
us touches PCI. One operation takes 54 µs when each waits for the last; batches do not wait.
"""

from __future__ import annotations

import socket
import time
from os import strerror
from typing import TYPE_CHECKING

from kickcall.errors import LabError
from kickcall.lab.boot import folder_inside, prepare, start_backends, start_qemu
from kickcall.lab.cache import log_progress
from kickcall.lab.command_line import machine_arguments
from kickcall.lab.qemu import find_qemu
from kickcall.lab.qtest_virtio import VirtioPciDriver, write_command

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from kickcall.lab.cache import Tell
    from kickcall.lab.machine import LabMachine
    from kickcall.lab.spec import MachineSpec

_HLT = b"\xf4"
_FIRMWARE_SIZE = 64 << 10
"""The smallest -bios that QEMU takes; its last 16 bytes hold the reset vector."""
_BATCH = 256
"""Commands on their way at once: few enough that neither side's socket buffer fills up."""
_FIRST_FREE_RAM = 1 << 20
"""Below 1 MiB the PC has holes."""
_CHUNK = 1 << 20
"""How much memory is zeroed at once; a divisor of all memory sizes."""


def boot_without_guest(
    spec: MachineSpec,
    *,
    outlives: bool = False,
    timeout: float = 30.0,
    tell: Tell = log_progress,
) -> LabMachine:
    """Start a machine whose processor halts at once, to be driven with `Qtest`. Takes 0.2 s."""
    qemu = find_qemu(spec.qemu, tell)
    machine = prepare(spec, qemu, outlives=outlives)
    try:
        (machine.folder / "halt.bin").write_bytes(_HLT * _FIRMWARE_SIZE)
        start_backends(machine, timeout)
        inside = folder_inside(machine, qemu)
        arguments = [
            *machine_arguments(machine.spec, inside),
            *("-accel", "tcg", "-bios", f"{inside}/halt.bin"),
            *("-qtest", f"unix:{inside}/qtest,server=on,wait=off", "-qtest-log", "none"),
        ]
        start_qemu(machine, qemu, arguments, timeout)
    except BaseException:
        machine.close()
        raise
    return machine


class Qtest:
    """A connection to a machine's qtest socket, and the RAM and PCI space it has given out."""

    def __init__(self, machine: LabMachine, timeout: float = 20.0) -> None:
        self._machine = machine
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        # QEMU listens there only after it has answered on its monitors.
        deadline = time.monotonic() + timeout
        while (code := self._socket.connect_ex(str(machine.folder / "qtest"))) != 0:
            if time.monotonic() > deadline or not machine.alive:
                self._socket.close()
                raise LabError(f"lab machine {machine.name} has no qtest socket: {strerror(code)}")
            time.sleep(0.005)
        self._replies = self._socket.makefile("r")
        self._next_ram = self._zeroed_to = _FIRST_FREE_RAM

    @property
    def pid(self) -> int:
        """QEMU's pid."""
        return self._machine.pid

    def device(self, device: str) -> VirtioPciDriver:
        """Return a driver for a virtio device of the machine, by its id."""
        found = self._machine.device(device)
        return VirtioPciDriver(self, slot=found.slot, kind=found.kind)

    def allocate(self, size: int, align: int = 16) -> int:
        """Return the address of RAM that holds zeroes and that this connection has not used.

        A new connection begins at the bottom again, so it sets up anew the devices that it uses.
        """
        address = -(-self._next_ram // align) * align
        self._next_ram = address + size
        if self._next_ram > self._machine.spec.memory_mib << 20:
            raise LabError("the lab machine's memory is used up: raise memory_mib")
        if self._next_ram > self._zeroed_to:
            length = -(-(self._next_ram - self._zeroed_to) // _CHUNK) * _CHUNK
            self.batch([f"memset {self._zeroed_to:#x} {length:#x} 0"])
            self._zeroed_to += length
        return address

    def read(self, address: int, size: int) -> bytes:
        """Return guest-physical memory."""
        (value,) = self.batch([f"read {address:#x} {size:#x}"])
        return bytes.fromhex(value.removeprefix("0x"))

    def write(self, address: int, data: bytes) -> None:
        """Write guest-physical memory."""
        self.batch([write_command(address, data)])

    def number(self, command: str) -> int:
        """Return what one `inl`, `readw`, … command reads."""
        (value,) = self.batch([command])
        return int(value, 16)

    def batch(self, commands: Iterable[str]) -> list[str]:
        """Send commands and return their values, in order. Raises LabError for a refused one."""
        todo = list(commands)
        values: list[str] = []
        try:
            for start in range(0, len(todo), _BATCH):
                part = todo[start : start + _BATCH]
                self._socket.sendall("".join(f"{command}\n" for command in part).encode())
                for command in part:
                    reply = self._replies.readline().split()
                    if not reply or reply[0] != "OK":
                        raise LabError(
                            f"qtest refused {command!r}: {' '.join(reply) or 'it ended'}"
                        )
                    values.append(reply[1] if len(reply) > 1 else "")
        except OSError as error:
            raise LabError(f"qtest of {self._machine.name} does not answer: {error}") from error
        return values

    def close(self) -> None:
        self._replies.close()
        self._socket.close()

    def __enter__(self) -> Qtest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
