"""How is a whole KVM host booted on a machine that may have no KVM, and how is it used?

    with boot_host() as host:
        status = host.run(["kickcall", "vms"])

The host is a lab machine: this machine's files are its root, read-only below a layer in memory.
TCG emulates AMD's virtualization extension, so that guests in the host run under KVM.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from kickcall.errors import LabError
from kickcall.lab.board import tsc_words
from kickcall.lab.boot import prepare, start_qemu, wait_for_guest
from kickcall.lab.cache import log_progress
from kickcall.lab.command_line import machine_arguments
from kickcall.lab.host_image import host_image
from kickcall.lab.image import guest_image
from kickcall.lab.machine import LabMachine
from kickcall.lab.qemu import find_qemu, usable_kvm
from kickcall.lab.spec import MachineSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kickcall.lab.cache import Tell
    from kickcall.lab.guest import Command
    from kickcall.lab.host_image import HostImage

NAME = "kvm-host"
"""What a host is called that was given no name."""
MODULES = (
    "configfs",
    "loop",
    "tun",
    "vhost_net",
    "vhost_scsi",
    "vhost_vsock",
    "target_core_mod",
    "qemu_fw_cfg",
)
"""Loaded when the host comes up, beside KVM."""

ASSIGNABLE = "0000:00:10.0"
"""The PCI address of the device that a host has for a guest."""
_VFIO_MODULES = ("vfio-pci", "vfio_iommu_type1")
_IOMMU = (
    # Before the devices that it is for.
    *("-device", "intel-iommu,intremap=on"),
    *("-device", "nvme,id=assignable,serial=assignable,addr=0x10"),
    *("-blockdev", f"driver=null-co,node-name=assignable-disk,size={64 << 20},read-zeroes=on"),
    *("-device", "nvme-ns,bus=assignable,drive=assignable-disk"),
)
"""VT-d with interrupt remapping, without which Linux assigns nothing (vfio_iommu_type1.c,
allow_unsafe_interrupts); the processor need not be Intel's."""

_CPUS_UNDER_TCG = 1
"""With two, a host of QEMU 7.2 died within two minutes of work, five times in five: of an interrupt
right after #VMEXIT, while the global interrupt flag is clear and GS the guest's (Linux 6.1.192,
__svm_vcpu_run). Of QEMU 10.0 the host lasted, and its guests hung or panicked. With one CPU neither
was seen. A guess at why: an interrupt that VMRUN injects stays in exception_index, and is raised
again when no interrupt but another vCPU stops this one (QEMU, svm_helper.c: helper_vmrun).
"""

_TAG = "lab"
_POLL = 0.05
"""Seconds between two looks for output."""
_LONGEST_PAUSE = 0.5
"""Seconds between two questions whether a long command has ended: each costs the host a little."""
_GRACE = 10.0
"""Seconds that a command has to end by itself when it is interrupted."""
_CHUNK = 1 << 16
# They say how this machine's own programs are to be run, or are of no use in the host.
_NOT_PASSED_ON = {"PYTHONDONTWRITEBYTECODE", "XDG_RUNTIME_DIR", "DISPLAY", "SSH_AUTH_SOCK", "PWD"}


def boot_host(
    name: str = NAME,
    *,
    memory_mib: int = 4096,
    cpus: int | None = None,
    assignable: bool = False,
    outlives: bool = False,
    timeout: float = 120.0,
    tell: Tell = log_progress,
) -> LabHost:
    """Boot a KVM host and return it when it takes commands (10 s, under TCG on 2 cores).

    With `assignable` it has an IOMMU, and an NVMe controller at `ASSIGNABLE` to give a guest.
    It has two `cpus` if nothing else is said, and under TCG one, see `_CPUS_UNDER_TCG`.
    Unless it `outlives` this process, it is taken down with it, as any lab machine.
    """
    nested = usable_kvm() and _kvm_nests()
    qemu = find_qemu("system", tell)
    image = host_image(tell)
    # So that no guest in the host has to download it again, each time.
    guest_image(tell)
    cpus = cpus or (2 if nested else _CPUS_UNDER_TCG)
    spec = MachineSpec(name=name, memory_mib=memory_mib, cpus=cpus)
    machine = prepare(spec, qemu, outlives=outlives)
    host = LabHost(machine)
    try:
        host.make_folders(image, MODULES + _VFIO_MODULES if assignable else MODULES)
        tell(f"booting the KVM host {name}")
        folder = str(machine.folder)
        arguments = [
            *machine_arguments(machine.spec, folder),
            *(_IOMMU if assignable else ()),
            *(("-M", "kernel-irqchip=split") if assignable and nested else ()),
            *_host_arguments(host, image, nested, "intel_iommu=on iommu=pt" if assignable else ""),
        ]
        start_qemu(machine, qemu, arguments, timeout)
        wait_for_guest(machine, timeout)
        if machine.guest.run("test -c /dev/kvm").status:
            said = (machine.folder / "console.log").read_text(errors="replace").split("\n")
            words = "; ".join(line.strip() for line in said if line.startswith("lab: modprobe"))
            raise LabError(f"the KVM host {name} came up without /dev/kvm ({words})")
    except BaseException:
        machine.close()
        raise
    return host


class LabHost:
    """A KVM host that is up."""

    def __init__(self, machine: LabMachine) -> None:
        self.machine = machine
        self._folder = machine.folder / "host"

    @staticmethod
    def find(name: str = NAME) -> LabHost:
        """Return the KVM host of that name. Raises LabError if there is none."""
        host = LabHost(LabMachine.find(name))
        if not host._folder.is_dir():
            raise LabError(f"{name} is a lab machine, and no KVM host: kickcall lab host up")
        return host

    @staticmethod
    def is_up(name: str = NAME) -> bool:
        """Return whether a KVM host of that name runs."""
        with contextlib.suppress(LabError):
            return LabHost.find(name).machine.alive
        return False

    @property
    def name(self) -> str:
        return self.machine.name

    @property
    def shared(self) -> Path:
        """A folder that the host may write to; it has the same path inside and outside."""
        return self._folder / "shared"

    def make_folders(self, image: HostImage, modules: Sequence[str] = MODULES) -> None:
        """Write what the host reads when it comes up."""
        self.shared.mkdir(parents=True)
        (self._folder / "jobs").mkdir()
        settings = {
            "modules": str(image.modules),
            # Where lab_folder() is in the host, which has no XDG_RUNTIME_DIR.
            "machines": f"/tmp/kickcall-lab-{os.getuid()}",
            "shared": str(self.shared),
            "load": " ".join(modules),
        }
        lines = [f"{name}={shlex.quote(value)}\n" for name, value in settings.items()]
        (self._folder / "settings").write_text("".join(lines))

    def run(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        stdout: BinaryIO | None = None,
        stderr: BinaryIO | None = None,
    ) -> int:
        """Run a program in the host, copy out what it prints as it prints it, return its status.

        It runs in the same folder (`cwd`) and with this process's environment, if nothing else
        is given; its standard input is empty. Interrupted (Ctrl-C), it is interrupted there.
        """
        with self._started(command, cwd or Path.cwd(), environment) as (job, started):
            copies = [
                _Copy(job / "stdout", stdout or sys.stdout.buffer),
                _Copy(job / "stderr", stderr or sys.stderr.buffer),
            ]
            try:
                pause = _POLL
                while (result := started.result()) is None:
                    ask_again = time.monotonic() + pause
                    while time.monotonic() < ask_again:
                        for copy in copies:
                            copy.more()
                        time.sleep(_POLL)
                    pause = min(pause * 1.5, _LONGEST_PAUSE)
            except BaseException:
                self._interrupt(started)
                raise
            finally:
                for copy in copies:
                    copy.more()
        if result.output:
            raise LabError(f"the KVM host {self.name} could not run it: {result.output.strip()}")
        return result.status

    def close(self) -> None:
        """Take the host down; nothing of it is left."""
        self.machine.close()

    def __enter__(self) -> LabHost:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _started(
        self, command: Sequence[str], cwd: Path, environment: Mapping[str, str] | None
    ) -> Iterator[tuple[Path, Command]]:
        passed = {
            name: value
            for name, value in (os.environ if environment is None else environment).items()
            if name.isidentifier() and name not in _NOT_PASSED_ON
        }
        passed["KICKCALL_LAB_SHARED"] = str(self.shared)
        job = self._folder / "jobs" / secrets.token_hex(6)
        job.mkdir()
        inside = f"/run/lab/host/jobs/{job.name}"
        # What was read of this machine's files is forgotten first: they may have changed since.
        script = (
            "sync; echo 3 >/proc/sys/vm/drop_caches\n"
            f"cd {shlex.quote(str(cwd))} || exit 126\n"
            # A shell starts what it puts in the background with SIGINT ignored.
            "exec /usr/bin/env --default-signal=INT -i "
            f"{' '.join(shlex.quote(f'{name}={value}') for name, value in passed.items())} "
            f"{shlex.join(command)} >>{inside}/stdout 2>>{inside}/stderr\n"
        )
        (job / "command").write_text(script)
        for name in ("stdout", "stderr"):
            (job / name).touch()
        try:
            yield job, self.machine.guest.start(f". {inside}/command")
        finally:
            for name in ("command", "stdout", "stderr"):
                (job / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                job.rmdir()

    def _interrupt(self, started: Command) -> None:
        """Let a command end as Ctrl-C would have it; kill it if it does not, or at the second."""
        try:
            self.machine.guest.run(f"kill -INT -$(cat /run/agent/{started.id}/pid)")
            started.wait(_GRACE)
        except (LabError, KeyboardInterrupt):
            with contextlib.suppress(LabError):
                started.kill()


class _Copy:
    """What one of a command's outputs has said so far, and who is told."""

    def __init__(self, path: Path, to: BinaryIO) -> None:
        self._from = path.open("rb")
        self._to = to

    def more(self) -> None:
        while data := self._from.read(_CHUNK):
            self._to.write(data)
            self._to.flush()


def _host_arguments(
    host: LabHost, image: HostImage, nested: bool, kernel_arguments: str
) -> list[str]:
    folder = host.machine.folder
    words = ["console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check"]
    words += [] if nested else [tsc_words()]
    accelerator = "kvm" if nested else "tcg,thread=multi,tb-size=1024"
    return [
        *("-accel", accelerator, "-cpu", "host" if nested else "EPYC,+svm,+npt"),
        *("-kernel", str(image.boot.kernel), "-initrd", str(image.boot.initramfs)),
        "-append",
        " ".join(filter(None, [*words, kernel_arguments])),
        # Tells QEMU where the kernel keeps its VMCOREINFO, without which a dump is no vmcore.
        *("-no-reboot", "-device", "vmcoreinfo"),
        *("-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap"),
        *("-virtfs", f"local,path={folder}/host,mount_tag={_TAG},security_model=none"),
        *("-chardev", f"file,id=lab-console,path={folder}/console.log,append=on"),
        *("-serial", "chardev:lab-console"),
        *("-chardev", f"socket,id=lab-agent,path={folder}/agent,server=on,wait=off"),
        *("-serial", "chardev:lab-agent"),
    ]


def _kvm_nests() -> bool:
    for module in ("kvm_amd", "kvm_intel"):
        with contextlib.suppress(OSError):
            nested = Path(f"/sys/module/{module}/parameters/nested").read_text().strip()
            return nested in ("1", "Y")
    return False
