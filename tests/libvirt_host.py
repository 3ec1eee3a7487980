"""How is a libvirtd started that is nobody else's, and what domains does it run?

A real one, with root's rights and the system's paths, in mount and UTS namespaces of its own: /run,
/var and /etc/libvirt are folders of the test. Its domains boot the lab's guest under TCG.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kickcall.lab.board import BOARDS
from kickcall.lab.guest import Guest
from kickcall.lab.process import listens
from kickcall.lab.relay_control import RelayControl
from witness import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kickcall.lab.image import GuestImage

QEMU = "/usr/bin/qemu-system-x86_64"
_FOLDERS = {
    "etc": "/etc/libvirt",
    "lib": "/var/lib",
    "log": "/var/log",
    "cache": "/var/cache",
    "run": "/run",
}
_FILES = ("passwd", "group", "hosts")
_INSIDE = """
set -e
hostname "$1"
cd "$0"
for file in passwd group hosts; do mount --bind "$file" "/etc/$file"; done
{binds}
# libvirt starts every QEMU that it finds to see what it can do: 2 s for each architecture.
for other in /usr/bin/qemu-system-*; do
    [ "$other" = {qemu} ] || mount --bind /dev/null "$other"
done
{run}
"""
_ALONE = "exec libvirtd -f /etc/libvirt/libvirtd.conf"
_CONTAINED = "libvirtd -f /etc/libvirt/libvirtd.conf & wait"
"""Somebody has to be the first process, and take in what ended (in KubeVirt virt-launcher)."""


@dataclass(slots=True)
class Libvirt:
    """One libvirtd."""

    name: str
    folder: Path
    contained: bool = False
    """It and its domains have pids and a network of their own, too."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "run" / "libvirt" / "libvirt-sock"

    @property
    def uri(self) -> str:
        return f"qemu+unix:///system?socket={self.socket}"

    def start(self) -> None:
        """Start it, or start it again, and return when it answers."""
        binds = "\n".join(f"mount --bind {ours} {theirs}" for ours, theirs in _FOLDERS.items())
        command = ["unshare", "--mount", "--uts", "--propagation", "private"]
        if self.contained:
            command += ["--pid", "--net", "--mount-proc", "--fork", "--kill-child"]
        command += ["sh", "-c"]
        run = _CONTAINED if self.contained else _ALONE
        command += [_INSIDE.format(binds=binds, qemu=QEMU, run=run), str(self.folder), self.name]
        with (self.folder / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

        def answers() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "daemon.log").read_text()
            return self.virsh("list", check=False).returncode == 0

        until(answers, f"libvirtd {self.name} answers", 120)

    def stop(self) -> None:
        """End the daemon. Its domains go on."""
        if self.process is not None:
            if self.contained:
                self.process.kill()  # and with it all that is in the container
            else:
                self.process.terminate()
            self.process.wait(20)
            self.process = None

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Let the daemon hang while the block lasts."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def virsh(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run virsh, another client of this libvirtd."""
        done = subprocess.run(
            ["virsh", "-q", "-c", self.uri, *words], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0 or not check, done.stderr
        return done

    def running(self) -> list[str]:
        return self.virsh("list", "--name").stdout.split()

    def pid(self, name: str) -> int:
        """Return the pid that libvirt noted for a domain."""
        return int((self.folder / "run" / "libvirt" / "qemu" / f"{name}.pid").read_text())


_caches: list[Path] = []
"""Where the last libvirtd noted what QEMU can do: to find it out takes seconds."""


@contextlib.contextmanager
def libvirtd(folder: Path, name: str, *, contained: bool = False) -> Iterator[Libvirt]:
    """Run a libvirtd while the block lasts; its domains end with it."""
    folder.mkdir()
    for ours in _FOLDERS:
        (folder / ours).mkdir()
    for known in _caches:
        if known.is_dir():
            # Another that still runs may be writing there.
            unfinished = shutil.ignore_patterns("*.new")
            shutil.copytree(known, folder / "cache", ignore=unfinished, dirs_exist_ok=True)
    _caches[:] = [folder / "cache"]
    for file in _FILES:
        (folder / file).write_text(Path("/etc", file).read_text())
    with (folder / "passwd").open("a") as users, (folder / "group").open("a") as groups:
        # Debian's libvirt does not start without its user, which comes with another package.
        users.write("libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin\n")
        groups.write("libvirt-qemu:x:64055:\n")
    (folder / "hosts").write_text("127.0.0.1 localhost host-a host-b\n")
    (folder / "etc" / "qemu.conf").write_text(
        'user = "root"\ngroup = "root"\nsecurity_driver = "none"\nstdio_handler = "file"\n'
        "cgroup_controllers = []\n"
    )
    number = f"{sum(name.encode()):012x}"
    (folder / "etc" / "libvirtd.conf").write_text(
        f'auth_unix_rw = "none"\nhost_uuid = "0b15e9a1-2b1c-4d3e-8f00-{number}"\n'
    )
    libvirt = Libvirt(name, folder, contained)
    try:
        libvirt.start()
        yield libvirt
    finally:
        if libvirt.process is not None:
            for domain in libvirt.running():
                libvirt.virsh("destroy", domain, check=False)
        libvirt.stop()


@dataclass(frozen=True, slots=True)
class GuestDomain:
    """A domain with the lab's guest in it."""

    name: str
    folder: Path
    xml: Path
    guest: Guest
    processes: tuple[subprocess.Popen[bytes], ...] = ()

    def wait(self) -> None:
        """Return when the guest takes commands."""
        until(
            lambda: b"lab: agent ready" in (self.folder / "console.log").read_bytes(),
            f"the guest of {self.name} is up",
            timeout=120,
        )

    def interrupts(self, line: str) -> int:
        """Return how often the guest took the interrupt whose line ends so."""
        said = self.guest.run("cat /proc/interrupts").output
        (found,) = (one.split() for one in said.splitlines() if one.endswith(line))
        return sum(int(word) for word in found[1:3])

    @property
    def relay(self) -> RelayControl:
        return RelayControl(self.folder / "control")


_XML = """
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>{memory}</memory>
  {shared}
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{image.kernel}</kernel>
    <initrd>{image.initramfs}</initrd>
    <cmdline>{words}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <devices>
    <emulator>{qemu}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none' queues='2'/>
      <source file='{folder}/disk.img'/>
      <target dev='vda' bus='virtio'/>
      <alias name='ua-blk0'/>
    </disk>
    {vhost_user}
    <interface type='user'><model type='virtio'/><alias name='ua-net0'/></interface>
    <serial type='file'><source path='{folder}/console.log'/><target port='0'/></serial>
    <serial type='unix'>
      <source mode='bind' path='{folder}/agent'/><target port='1'/>
    </serial>
    <memballoon model='none'/>
    <controller type='usb' model='none'/>
  </devices>
</domain>
"""
_SHARED = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
_VHOST_USER = """
    <disk type='vhostuser' device='disk'>
      <driver name="qemu" type="raw" queues="2"/>
      <source type='unix' path='{folder}/relay'/>
      <target dev='vdb' bus='virtio'/>
      <alias name='ua-vub0'/>
    </disk>
"""


@contextlib.contextmanager
def guest_domain(
    folder: Path, name: str, image: GuestImage, *, relay: bool = False
) -> Iterator[GuestDomain]:
    """Prepare a domain; with `relay` it has a disk ua-vub0, served through one. Start it then."""
    folder.mkdir()
    for disk in ("disk", "vub0"):
        with (folder / f"{disk}.img").open("wb") as file:
            file.truncate(16 << 20)
    text = _XML.format(
        name=name,
        memory=192,
        words=BOARDS["q35"].kernel_words(kvm=False),
        image=image,
        qemu=QEMU,
        folder=folder,
        shared=_SHARED,
        vhost_user=_VHOST_USER.format(folder=folder) if relay else "",
    )
    xml = folder / "domain.xml"
    xml.write_text(text)
    with contextlib.ExitStack() as running:
        if relay:
            disk = f"driver=file,node-name=disk,filename={folder}/vub0.img"
            export = (
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,"
                f"addr.type=unix,addr.path={folder}/backend,num-queues=2"
            )
            storage = ["qemu-storage-daemon", "--blockdev", disk, "--export", export]
            running.enter_context(_process(storage, partial(listens, folder / "backend")))
            between = [sys.executable, "-m", "kickcall.lab.relay", "--listen", f"{folder}/relay"]
            between += ["--backend", f"{folder}/backend", "--control", f"{folder}/control"]
            running.enter_context(_process(between, partial(listens, folder / "control")))
        yield GuestDomain(name, folder, xml, Guest(folder / "agent", folder / "agent.lock"))


@contextlib.contextmanager
def _process(command: list[str], ready: Callable[[], bool]) -> Iterator[None]:
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 20
            while not ready():
                assert process.poll() is None, command
                assert time.monotonic() < deadline, command
                time.sleep(0.02)
            yield
        finally:
            process.kill()
