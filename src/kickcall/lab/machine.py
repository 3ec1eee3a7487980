"""How is a lab machine that was booted found again, asked and taken down?

Each machine has a folder of its own with all its sockets, disks and logs, and a `state.json`
from which any other process can find it (`LabMachine.find`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kickcall.errors import LabError
from kickcall.lab import process, vhost_kernel
from kickcall.lab import spec as specs
from kickcall.lab.board import BOARDS
from kickcall.lab.guest import Guest
from kickcall.lab.interrupts import parse_disks, parse_interrupts
from kickcall.lab.monitor import ask
from kickcall.lab.process import LabProcess
from kickcall.lab.relay_control import RelayControl
from kickcall.lab.spec import AnyDevice, MachineSpec, VhostNet, VhostUserBlk, VhostVsock

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType


def lab_folder() -> Path:
    """Return the folder of all lab machines of this user; it is made, for the user alone."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        folder = Path(runtime) / "kickcall-lab"
    else:
        folder = Path(f"/tmp/kickcall-lab-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    # /tmp is everybody's: somebody else may have been first.
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise LabError(
            f"{folder} belongs to somebody else: set XDG_RUNTIME_DIR to a folder of yours"
        )
    return folder


def machines() -> list[LabMachine]:
    """Return this user's lab machines, running or not, by name."""
    found = []
    for folder in sorted(lab_folder().iterdir()):
        if folder.is_symlink() and not folder.exists():
            # The cache with QEMU's root, in which the machine was, has been deleted.
            folder.unlink(missing_ok=True)
        try:
            found.append(LabMachine.find(folder.name))
        except LabError:
            # Being booted or taken down this moment.
            continue
    return found


class LabMachine:
    """A lab machine that was booted, by this process or another."""

    def __init__(
        self,
        folder: Path,
        spec: MachineSpec,
        processes: Sequence[LabProcess] = (),
        owner: LabProcess | None = None,
    ) -> None:
        self.folder = folder
        """Sockets, disks, console.log and qemu.log. A short path: sockets have 108 bytes."""
        self.spec = spec
        self.processes = list(processes)
        self.owner = owner
        """The process that takes the machine down; None if the machine outlives it."""
        self.guest = Guest(folder / "agent", folder / "agent.lock")

    @staticmethod
    def find(name: str) -> LabMachine:
        """Return the lab machine of that name. Raises LabError if there is none."""
        folder = lab_folder() / name
        try:
            state = json.loads((folder / "state.json").read_text())
        except (OSError, ValueError):
            running = ", ".join(sorted(f.name for f in lab_folder().iterdir())) or "none"
            raise LabError(f"no lab machine is called {name} (up: {running})") from None
        return LabMachine(
            folder,
            _spec_from(state["spec"]),
            [LabProcess(**fields) for fields in state["processes"]],
            LabProcess(**state["owner"]) if state["owner"] else None,
        )

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int:
        """QEMU's pid."""
        return self._process("qemu").pid

    @property
    def alive(self) -> bool:
        """Whether QEMU runs."""
        return any(started.what == "qemu" and started.alive for started in self.processes)

    @property
    def qmp_path(self) -> Path:
        """The first QMP socket; the lab itself never connects to it."""
        return self.qmp_paths[0]

    @property
    def qmp_paths(self) -> list[Path]:
        return [self.folder / f"qmp{number}" for number in range(self.spec.monitors)]

    def backend_pid(self, device: str) -> int:
        """Return the pid of the qemu-storage-daemon behind a vhost-user device."""
        return self._process(f"{device}-backend").pid

    def relay_pid(self, device: str) -> int:
        """Return the pid of the relay between QEMU and a vhost-user device's back-end."""
        return self._process(f"{device}-relay").pid

    def relay(self, device: str) -> RelayControl:
        """Return the control of a vhost-user device's relay. Raises LabError if it has none."""
        spec = self.device(device)
        if not (isinstance(spec, VhostUserBlk) and spec.relay):
            raise LabError(
                f"{device} of lab machine {self.name} has no relay: "
                "only a vhost-user-blk device with relay=on has one"
            )
        return RelayControl(self.folder / f"{device}.control")

    def device(self, device: str) -> AnyDevice:
        """Return a device's spec by its id. Raises LabError if there is none."""
        for candidate in self.spec.devices:
            if candidate.id == device:
                return candidate
        has = ", ".join(candidate.id for candidate in self.spec.devices) or "none"
        raise LabError(f"lab machine {self.name} has no device {device} (it has: {has})")

    def qmp(self, command: str, arguments: Mapping[str, Any] | None = None, **more: Any) -> Any:
        """Run a QMP command on the lab's own monitor and return what QEMU returned."""
        if not self.spec.lab_monitor:
            raise LabError(f"lab machine {self.name} was booted without the lab's monitor")
        return ask(self.folder / "lab-monitor", command, {**(arguments or {}), **more})

    def interrupts(self, device: str) -> dict[str, int]:
        """Return how often the guest took each interrupt of a device, over all CPUs.

        `device` is an id, or a port as `hot0` for what is plugged into it. Keys are as the
        guest's driver names them, in the order of the queues: `config`, `req.0` (blk),
        `control`, `event`, `request.0` (scsi), `input.0`, `output.0` (net).
        """
        listing = self.guest.run("cat /proc/interrupts; ls -l /sys/bus/virtio/devices").output
        return parse_interrupts(listing, self.address(device))

    def address(self, device: str) -> str:
        """Return what the guest's sysfs calls a device, or a port as `hot0`: `0000:00:02.0`.

        What is not on PCI is found by where its registers are: `a000400.virtio_mmio`.
        """
        if port := re.fullmatch(r"hot(\d+)", device):
            return f"0000:00:{specs.FIRST_HOTPLUG_SLOT + int(port[1]):02x}.0"
        spec = self.device(device)
        if not spec.mmio:
            return f"0000:00:{spec.slot:02x}.0"
        start = BOARDS[self.spec.board].mmio_address(spec.slot)
        listing = self.guest.run("cat /proc/iomem").output
        found = re.search(rf"^ *{start:08x}-[0-9a-f]+ : (\S+)", listing, re.MULTILINE)
        if found is None:
            raise LabError(f"the guest of {self.name} has no registers at {start:#x} ({device})")
        return found[1]

    def disk(self, device: str) -> str:
        """Return the guest's path of a device's disk, as /dev/vda."""
        deadline = time.monotonic() + 30
        while True:
            listing = self.guest.run("ls -l /sys/block").output
            if found := parse_disks(listing, self.address(device)):
                return f"/dev/{found[0]}"
            # The guest looks for SCSI disks in the background.
            if time.monotonic() > deadline:
                raise LabError(f"the guest of {self.name} sees no disk behind {device}")
            time.sleep(0.1)

    def host_address(self, device: str) -> str:
        """Return the host's IPv4 address in the network that it shares with a vhost-net device."""
        return self._vhost_net(device).address

    def guest_address(self, device: str) -> str:
        """Return the guest's IPv4 address on a vhost-net device."""
        return self._vhost_net(device).guest_address

    def guest_cid(self, device: str) -> int:
        """Return the guest's vsock address on a vhost-vsock device."""
        spec = self.device(device)
        if not isinstance(spec, VhostVsock):
            raise LabError(f"{device} of lab machine {self.name} is no vhost-vsock device")
        return spec.guest_cid

    def close(self) -> None:
        """Kill the machine's processes, take down what they left on the host, delete its folder.

        Raises LabError, and keeps the folder, where the kernel lets go of something only later:
        then the next close, or the next machine that is booted, takes it down.
        """
        process.end(self.processes)
        vhost_kernel.take_down(self.spec)
        # A machine in another root: the folder is there, and ours is a link to it.
        if self.folder.is_symlink():
            shutil.rmtree(self.folder.readlink(), ignore_errors=True)
            self.folder.unlink(missing_ok=True)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> LabMachine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def abandoned(self) -> bool:
        """Whether the process that was to take it down is gone."""
        return self.owner is not None and not self.owner.alive

    def save(self) -> None:
        """Write state.json, whole or not at all."""
        state = {
            "spec": {
                **dataclasses.asdict(self.spec),
                "devices": [
                    {"kind": device.kind, **dataclasses.asdict(device)}
                    for device in self.spec.devices
                ],
            },
            "processes": [dataclasses.asdict(started) for started in self.processes],
            "owner": dataclasses.asdict(self.owner) if self.owner else None,
        }
        unfinished = self.folder / "state.json.new"
        unfinished.write_text(json.dumps(state, indent=1))
        unfinished.rename(self.folder / "state.json")

    def _vhost_net(self, device: str) -> VhostNet:
        spec = self.device(device)
        if not isinstance(spec, VhostNet):
            raise LabError(f"{device} of lab machine {self.name} is no vhost-net device")
        return spec

    def _process(self, what: str) -> LabProcess:
        for started in self.processes:
            if started.what == what:
                return started
        raise LabError(f"lab machine {self.name} has no process {what}")


def _spec_from(state: dict[str, Any]) -> MachineSpec:
    try:
        devices = tuple(
            specs.KINDS[fields.pop("kind")](**_tuples(fields)) for fields in state.pop("devices")
        )
        return MachineSpec(devices=devices, **_tuples(state))
    except (KeyError, TypeError) as error:
        raise LabError(f"a lab machine of another version of kickcall: {error}") from error


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
