"""How is a lab machine booted?

with boot(MachineSpec(devices=(VirtioBlk(iothread=True), VhostUserBlk()))) as machine:
    disk = machine.disk("vub0")
    machine.relay("vub0").drop("kick", queue=0)
    reader = machine.guest.start(f"dd if={disk} of=/dev/null bs=4k count=1 iflag=direct")
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kickcall.errors import LabError
from kickcall.lab import process, vhost_kernel
from kickcall.lab.board import BOARDS
from kickcall.lab.cache import locked, log_progress, tool
from kickcall.lab.command_line import guest_arguments, machine_arguments
from kickcall.lab.image import GuestImage, guest_image
from kickcall.lab.machine import LabMachine, lab_folder, machines
from kickcall.lab.process import LabProcess, listens
from kickcall.lab.qemu import find_qemu, usable_kvm
from kickcall.lab.spec import (
    MachineSpec,
    VhostNet,
    VhostUserBlk,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kickcall.lab.cache import Tell
    from kickcall.lab.qemu import Qemu

_POLL = 0.02
"""Seconds between two looks at whether something has come up."""
_QEMU_BUG = "iotlb_to_section: Assertion `section_index < d->map.sections_nb' failed"
"""Of some thousand boots under TCG, QEMU 10.0 (system/physmem.c) ends with that in one."""
_LONGEST_NAME = 32
"""So that no socket's path gets near the 108 bytes of sockaddr_un (unix(7))."""


def boot(
    spec: MachineSpec,
    *,
    outlives: bool = False,
    wait: bool = True,
    timeout: float = 180.0,
    tell: Tell = log_progress,
) -> LabMachine:
    """Boot a lab machine and return it when its guest takes commands (`wait`).

    Unless it `outlives` this process, it is taken down with it: by `close()`, by the kernel
    when the main thread that booted it ends, or at the latest when the next machine is booted.
    Raises LabError with QEMU's last words if QEMU ends or the guest does not come up.
    """
    once = partial(_boot, spec, outlives=outlives, wait=wait, timeout=timeout, tell=tell)
    try:
        return once()
    except LabError as exc:
        if _QEMU_BUG not in str(exc):
            raise
        tell(f"booting anew, as QEMU has a bug: {exc}")
        return once()


def _boot(
    spec: MachineSpec, *, outlives: bool, wait: bool, timeout: float, tell: Tell
) -> LabMachine:
    board = BOARDS[spec.board]
    qemu = find_qemu(spec.qemu, tell, board)
    machine = prepare(spec, qemu, outlives=outlives)
    try:
        start_backends(machine, timeout)
        image = _image_for(qemu, guest_image(tell, board.architecture, full=spec.needs_full_kernel))
        inside = folder_inside(machine, qemu)
        accelerated = board.architecture == "amd64" and usable_kvm()
        start_qemu(
            machine,
            qemu,
            [
                *machine_arguments(machine.spec, inside),
                *guest_arguments(machine.spec, inside, image, kvm=accelerated),
            ],
            timeout,
        )
        if wait:
            _wait_or_reset(machine, timeout, tell)
    except BaseException:
        machine.close()
        raise
    return machine


def prepare(spec: MachineSpec, qemu: Qemu, *, outlives: bool) -> LabMachine:
    """Return a machine with a folder and disks, and no process yet."""
    for machine in machines():
        if machine.abandoned:
            # What cannot be taken down yet must not keep this machine from being booted.
            with contextlib.suppress(LabError):
                machine.close()
    vhost_kernel.check(spec)
    spec = vhost_kernel.named(spec)
    spec = dataclasses.replace(spec, name=spec.name or f"lab-{secrets.token_hex(3)}").complete()
    me = LabProcess("owner", os.getpid(), process.running_since(os.getpid()) or 0)
    machine = LabMachine(_make_folder(spec.name, qemu), spec, owner=None if outlives else me)
    machine.save()
    for device in spec.devices:
        if getattr(device, "disk", "null") == "file":
            _make_disk(machine.folder / f"{device.id}.img", device.size_mib)  # type: ignore[union-attr]
    return machine


def folder_inside(machine: LabMachine, qemu: Qemu) -> str:
    """Return the machine's folder as QEMU sees it."""
    return str(machine.folder) if qemu.root is None else f"/lab/{machine.name}"


def start_backends(machine: LabMachine, timeout: float) -> None:
    """Start the storage daemons and relays of the machine's vhost-user devices, and make the
    targets of those that vhost in the kernel serves."""
    vhost_kernel.set_up(machine.spec)
    for device in machine.spec.devices:
        if not isinstance(device, VhostUserBlk):
            continue
        daemon = tool("qemu-storage-daemon", "qemu-system-common")
        backend = machine.folder / f"{device.id}.backend"
        _start(
            machine,
            f"{device.id}-backend",
            [daemon, *device.backend_arguments(str(machine.folder))],
        )
        # QEMU's daemon serves one client: connecting to see whether it is up would disturb it.
        _wait(machine, partial(listens, backend), f"{device.id}-backend", timeout)
        if device.relay:
            control = machine.folder / f"{device.id}.control"
            listen = machine.folder / f"{device.id}.relay"
            command = [sys.executable, "-m", "kickcall.lab.relay"]
            command += ["--listen", str(listen), "--backend", str(backend)]
            command += ["--control", str(control)]
            _start(machine, f"{device.id}-relay", command)
            _wait(machine, partial(listens, control), f"{device.id}-relay", timeout)


def start_qemu(machine: LabMachine, qemu: Qemu, arguments: list[str], timeout: float) -> None:
    """Start QEMU and return when it listens at its last socket."""
    _start(machine, "qemu", [*qemu.command, *arguments, *machine.spec.arguments])
    spec = machine.spec
    last = "lab-monitor" if spec.lab_monitor else f"qmp{spec.monitors - 1}"
    if spec.lab_monitor or spec.monitors:
        _wait(machine, partial(listens, machine.folder / last), "qemu", timeout)
    for device in spec.devices:
        if isinstance(device, VhostNet):
            # QEMU makes its sockets before its network interfaces.
            _wait(machine, Path(f"/sys/class/net/{device.tap}").exists, "qemu", timeout)
    vhost_kernel.give_addresses(spec)


def _wait_or_reset(machine: LabMachine, timeout: float, tell: Tell) -> None:
    """Wait for the guest; one that is not up after half the time is reset, and given all of it.

    Of thousands of boots one hangs, on a host that keeps QEMU waiting for a processor.
    """
    try:
        wait_for_guest(machine, timeout / 2)
    except LabError:
        if not (machine.alive and machine.spec.lab_monitor):
            raise
        tell(f"the guest of {machine.name} does not come up: resetting it")
        before = _times_ready(machine)
        machine.qmp("system_reset")
        wait_for_guest(machine, timeout, before)


def wait_for_guest(machine: LabMachine, timeout: float = 60.0, before: int = 0) -> None:
    """Return when the guest of a machine that was just booted takes commands.

    `before` is how often its agent had been ready before that.
    """
    _wait(machine, lambda: _times_ready(machine) > before, "qemu", timeout)
    machine.guest.boot_id()


def _times_ready(machine: LabMachine) -> int:
    console = machine.folder / "console.log"
    return console.read_bytes().count(b"lab: agent ready") if console.exists() else 0


def _start(machine: LabMachine, what: str, command: list[str]) -> None:
    log = machine.folder / f"{what}.log"
    outlives = machine.owner is None
    machine.processes.append(process.start(what, command, log, outlives=outlives))
    machine.save()


def _wait(machine: LabMachine, ready: Callable[[], bool], what: str, timeout: float) -> None:
    """Wait until `ready`. Raises LabError when the process `what` ends before, or time is up."""
    (watched,) = (started for started in machine.processes if started.what == what)
    deadline = time.monotonic() + timeout
    while not ready():
        if not watched.alive:
            words = (machine.folder / f"{what}.log").read_text(errors="replace").strip()
            last = words.splitlines()[-1] if words else "it said nothing"
            raise LabError(f"lab machine {machine.name}: {what} ended at once: {last}")
        if time.monotonic() > deadline:
            raise LabError(f"lab machine {machine.name}: {what} was not up within {timeout:g} s")
        time.sleep(_POLL)


def _make_folder(name: str, qemu: Qemu) -> Path:
    if len(name) > _LONGEST_NAME or not name.replace("-", "").replace("_", "").isalnum():
        raise LabError(
            f"{name!r} cannot be a lab machine's name: letters, digits, - and _, "
            f"at most {_LONGEST_NAME}"
        )
    folder = lab_folder() / name
    if folder.exists() or folder.is_symlink():
        _clear(folder)
    try:
        if qemu.root is None:
            folder.mkdir(mode=0o700)
            return folder
        # Its sockets must lie inside QEMU's root; the link keeps their paths short for us.
        inside = qemu.root / "lab" / name
        inside.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.symlink_to(inside)
    except FileExistsError:
        raise LabError(f"another process boots a lab machine called {name} right now") from None
    return folder


def _clear(folder: Path) -> None:
    """Make room where a dead machine of the same name was. Raises LabError if it lives."""
    try:
        old = LabMachine.find(folder.name)
    except LabError:
        raise LabError(
            f"{folder} is in the way, and is no lab machine that is up: delete it"
        ) from None
    if old.alive:
        raise LabError(f"a lab machine called {folder.name} is up: kickcall lab down {folder.name}")
    old.close()


def _make_disk(path: Path, size_mib: int) -> None:
    """Make a sparse file that starts with words, so that a read in the guest shows something."""
    with path.open("wb") as disk:
        disk.write(f"kickcall lab disk {path.stem}\n".encode().ljust(512, b"."))
        disk.truncate(size_mib << 20)


def _image_for(qemu: Qemu, image: GuestImage) -> GuestImage:
    """Return the guest image as QEMU sees it, brought into its root where it has its own."""
    if qemu.root is None:
        return image
    name = image.kernel.parent.name
    inside = qemu.root / "lab-images" / name
    with locked(f"lab-images-{name}"):
        inside.mkdir(parents=True, exist_ok=True)
        for file in (image.kernel, image.initramfs):
            if not (inside / file.name).exists():
                # Both are in the cache, so on one file system.
                (inside / file.name).hardlink_to(file)
    at = Path("/lab-images") / name
    return GuestImage(at / "vmlinuz", at / "initramfs")
