"""Which QEMU processes run on this host, what they are called, and where their monitors are."""

from __future__ import annotations

import errno
import mmap
import os
import re
import socket
import struct
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kickcall.errors import (
    KickcallError,
    MachineNotFoundError,
    MonitorBusyError,
    MonitorGoneError,
    NotAVmmError,
    PrivilegeError,
)
from kickcall.host.processes import pids, start_time
from kickcall.model import Domain, Machine, MonitorAddress
from kickcall.vmm import cmdline

if TYPE_CHECKING:
    from collections.abc import Iterator

_BINARY = re.compile(r"(qemu-system-[\w-]+|qemu-kvm|qemu|kvm)(\s\(deleted\))?$")
_VERSION = b"QEMU emulator version "  # softmmu/vl.c, version(): one literal with the number in it
_VERSION_MAX = 200
_STEPS_MAX = 200
"""Of a path, links followed; so that a ring of them comes to an end."""
_UNIX_PATH_MAX = 107
"""sockaddr_un.sun_path, less the closing NUL (unix(7))."""


def find() -> list[Machine]:
    """Return every QEMU that this /proc shows, by pid. Asks no monitor and disturbs nobody."""
    return [machine for pid in pids() if (machine := inspect(pid)) is not None]


def inspect(pid: int) -> Machine | None:
    """Return what /proc says of process `pid`, or None where it is no QEMU (yet, or any more).

    Within execve(2) it is QEMU's program already, and has no arguments yet (Linux, fs/binfmt_elf.c,
    load_elf_binary: begin_new_exec comes before create_elf_tables).
    """
    proc = Path(f"/proc/{pid}")
    binary = ""
    try:
        binary = os.readlink(proc / "exe")
    except PermissionError:
        pass  # another user's process: the name it was called by has to do
    except OSError:
        return None
    if binary and not _BINARY.fullmatch(os.path.basename(binary)):
        return None
    try:
        raw = (proc / "cmdline").read_bytes()
    except OSError:
        return None
    if not raw:
        return None
    arguments = [part.decode(errors="replace") for part in raw.removesuffix(b"\0").split(b"\0")]
    started = start_time(pid)
    if started is None or not _BINARY.fullmatch(os.path.basename(binary or arguments[0])):
        return None
    said = cmdline.parse(arguments)
    monitors = tuple(address for spec in said.qmp if (address := _monitor(pid, spec)) is not None)
    return Machine(
        pid=pid,
        start_time=started,
        name=said.name or f"pid-{pid}",
        version=_binary_version(pid),
        monitors=monitors,
        command=tuple(arguments),
        domain=_domain(pid, said),
        number=said.number,
    )


def _domain(pid: int, said: cmdline.CommandLine) -> Domain | None:
    if said.libvirt is None:
        return None
    monitor = _monitor(pid, said.libvirt) or MonitorAddress("", "")
    return Domain(said.name, said.uuid, monitor)


def _binary_version(pid: int) -> str:
    """Return the version in the binary's text; empty where the binary cannot be read.

    The binary is read, not run: it may be another user's, or of another root.
    """
    try:
        with open(f"/proc/{pid}/exe", "rb") as file:
            status = os.fstat(file.fileno())
            key = (status.st_dev, status.st_ino, status.st_mtime_ns)
            if key not in _versions:
                _versions[key] = _version_in(file.fileno())
            return _versions[key]
    except (OSError, ValueError):
        return ""


_versions: dict[tuple[int, int, int], str] = {}
"""Versions by file: the machines of a host mostly run one binary of 20 MB."""


def _version_in(fd: int) -> str:
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as text:
        at = text.find(_VERSION)
        raw = text[at + len(_VERSION) : at + len(_VERSION) + _VERSION_MAX] if at >= 0 else b""
    return re.split(rb"[\n\0]", raw, maxsplit=1)[0].decode(errors="replace").strip()


def _same_root(pid: int) -> bool:
    try:
        theirs, ours = os.stat(f"/proc/{pid}/root"), os.stat("/proc/self/root")
        namespaces = [os.readlink(f"/proc/{who}/ns/mnt") for who in (pid, "self")]
    except OSError:
        return True
    same = (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)
    return same and namespaces[0] == namespaces[1]


def _same_network(pid: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net")
    except OSError:
        return True


def _monitor(pid: int, spec: cmdline.SocketSpec) -> MonitorAddress | None:
    if (spec.tcp is not None or spec.abstract is not None) and not _same_network(pid):
        return None  # here that address is nobody's, or another machine's
    if spec.tcp is not None:
        written = f"tcp:{spec.tcp[0]}:{spec.tcp[1]}"
        return MonitorAddress(written, written)
    if spec.abstract is not None:
        return MonitorAddress(f"@{spec.abstract}", f"@{spec.abstract}")
    path = spec.path
    if path is None and spec.fd is not None:
        path = _path_of_socket(pid, spec.fd)
    if path is None:
        return None
    return MonitorAddress(_as_seen_here(pid, path), path)


def _as_seen_here(pid: int, path: str) -> str:
    """Return where this process finds `path` of process `pid`: its own root and directory count."""
    if not path.startswith("/"):
        if not _same_root(pid):
            return f"/proc/{pid}/cwd/{path}"
        try:
            return os.path.join(os.readlink(f"/proc/{pid}/cwd"), path)
        except OSError:
            return path
    return path if _same_root(pid) else in_root(pid, path)


def in_root(pid: int, path: str) -> str:
    """Return where this process finds the absolute `path` of process `pid`, through its root.

    Symbolic links are followed as that process would. Left to the kernel an absolute one, as
    Debian's /var/run, would lead from the other's root to ours.
    """
    root = f"/proc/{pid}/root"
    done: list[str] = []
    todo = _parts(path)
    for _ in range(_STEPS_MAX):
        if not todo:
            return "/".join((root, *done))
        part = todo.pop()
        if part == "..":
            del done[-1:]
            continue
        try:
            target = os.readlink("/".join((root, *done, part)))
        except OSError:  # no link
            done.append(part)
            continue
        if target.startswith("/"):
            done.clear()
        todo += _parts(target)
    return root + path


def _parts(path: str) -> list[str]:
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _path_of_socket(pid: int, fd: int) -> str | None:
    """Return the path that a socket handed to QEMU is bound to (/proc/PID/net/unix)."""
    try:
        link = os.readlink(f"/proc/{pid}/fd/{fd}")
        lines = Path(f"/proc/{pid}/net/unix").read_text(errors="replace").splitlines()[1:]
    except OSError:
        return None
    if not link.startswith("socket:["):
        return None
    inode = link[len("socket:[") : -1]
    for line in lines:
        parts = line.split(None, 7)
        if len(parts) == 8 and parts[6] == inode:
            return parts[7]
    return None


@contextmanager
def socket_address(path: str) -> Iterator[str]:
    """Give the address with which connect(2) reaches the unix socket at `path`, for the block.

    `@NAME` is an abstract socket. A path that is longer than an address may be (through
    /proc/PID/root it easily is) is reached by way of its folder. Raises the errors of
    `socket_error`.
    """
    if path.startswith("@"):
        yield "\0" + path[1:]
        return
    if len(os.fsencode(path)) <= _UNIX_PATH_MAX:
        yield path
        return
    try:
        folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_CLOEXEC)
    except OSError as exc:
        raise socket_error(path, exc) from exc
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


def peer_pid(path: str, timeout: float = 1.0) -> int:
    """Return the pid of the process that listens on the unix socket at `path` (SO_PEERCRED).

    The kernel records who called listen(2), so a connection alone tells, with nothing said.
    Raises MonitorGoneError where nobody listens.
    """
    with (
        socket_address(path) as address,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe,
    ):
        probe.settimeout(timeout)
        try:
            probe.connect(address)
        except (BlockingIOError, TimeoutError):
            raise MonitorBusyError(
                f"{path}: another client holds this monitor, and more are waiting for it "
                "(or QEMU's main loop is stuck)"
            ) from None
        except OSError as exc:
            raise socket_error(path, exc) from exc
        raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[0])


def socket_error(path: str, exc: OSError) -> KickcallError:
    """Return the error that tells an admin why the socket at `path` cannot be used."""
    match exc.errno:
        case errno.ENOENT:
            return MonitorGoneError(f"{path}: no such socket")
        case errno.ECONNREFUSED:
            return MonitorGoneError(f"{path}: nobody listens on this socket (its QEMU has ended?)")
        case errno.EACCES | errno.EPERM:
            return PrivilegeError(
                f"{path}: not permitted to connect: run as root or as the socket's owner"
            )
        case _:
            return MonitorGoneError(f"{path}: cannot connect: {exc.strerror or exc}")


def resolve(target: str | int) -> tuple[Machine, str | None]:
    """Return the machine that `target` means, and the monitor's path where the target names one.

    `target` is a name, a pid, `libvirt:DOMAIN` or `qmp:PATH`; a number is a pid, while digits may
    be a name, or a VMID of Proxmox VE. Raises MachineNotFoundError, NotAVmmError, MonitorGoneError
    or PrivilegeError.
    """
    if isinstance(target, int):
        return _resolve_pid(target), None
    text = target
    if text.startswith("qmp:"):
        return _resolve_socket(text.removeprefix("qmp:"))
    named = [machine for machine in find() if is_called(machine, text)]
    if len(named) == 1:
        return named[0], None
    if named:
        which = ", ".join(str(machine.pid) for machine in named)
        raise MachineNotFoundError(f"{len(named)} machines are named {text!r}: use a pid ({which})")
    if text.isdigit():
        return _resolve_pid(int(text)), None
    if text.startswith("libvirt:"):
        raise MachineNotFoundError(
            f"no running libvirt domain is named {text.removeprefix('libvirt:')!r}: "
            "`kickcall vms` lists the machines that run here"
        )
    raise MachineNotFoundError(
        f"no running QEMU is named {text!r}: `kickcall vms` lists those that run here"
    )


def is_called(machine: Machine, text: str) -> bool:
    """Tell whether `text` names the machine: its name, its VMID, or `libvirt:` and name or UUID."""
    if text.startswith("libvirt:"):
        wanted = text.removeprefix("libvirt:")
        return machine.domain is not None and wanted in (machine.domain.name, machine.domain.uuid)
    return bool(text) and text in (machine.name, machine.number)


def _resolve_pid(pid: int) -> Machine:
    machine = inspect(pid)
    if machine is not None:
        return machine
    if not os.path.exists(f"/proc/{pid}"):
        raise MachineNotFoundError(f"there is no process {pid}")
    try:
        binary = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        binary = "something that cannot be looked at"
    raise NotAVmmError(f"process {pid} is no QEMU, it is {binary}")


def _resolve_socket(path: str) -> tuple[Machine, str]:
    from kickcall.vmm.served import machine_served_at

    pid = machine_served_at(path) or _listens_for(path) or peer_pid(path)
    machine = inspect(pid)
    if machine is None:
        raise NotAVmmError(f"{path}: who listens there, process {pid}, is no QEMU")
    return machine, path


def _listens_for(path: str) -> int | None:
    """Return the pid of the machine that has a monitor at `path` which another process made.

    libvirt does so, and hands QEMU the socket: the kernel knows only who called listen(2).
    """
    try:
        wanted = os.stat(path)
    except OSError:
        return None
    for machine in find():
        addresses = [*machine.monitors, *([machine.domain.monitor] if machine.domain else [])]
        for address in addresses:
            try:
                if os.path.samestat(wanted, os.stat(address.path)):
                    return machine.pid
            except OSError:
                continue
    return None
