"""Is every QEMU of the host found, with its name, its version and its monitors?"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.lab.monitor import ask
from kickcall.lab.process import listens
from kickcall.lab.qtest import boot_without_guest
from kickcall.lab.spec import MachineSpec
from kickcall.vmm.find import find, inspect
from kickcall.watch.finder import Finder
from small_qemu import qemu_binary, small_qemu
from witness import until
from zoo import QEMUS

if TYPE_CHECKING:
    from kickcall.model import Machine

pytestmark = pytest.mark.rig

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may change namespaces")


def seen(pid: int) -> Machine:
    (machine,) = (machine for machine in find() if machine.pid == pid)
    return machine


def attaches(pid: int) -> None:
    """Check that the monitor that was found is this very QEMU's."""
    with attach(pid) as attached:
        assert attached.info.pid == pid
        assert attached.run_state in ("prelaunch", "paused", "running")


def installed_version() -> str:
    said = subprocess.run([qemu_binary(), "--version"], capture_output=True, text=True, check=True)
    return said.stdout.splitlines()[0].removeprefix("QEMU emulator version ")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("-name", "vm0"), "vm0"),
        (("-name", "guest=vm0,debug-threads=on"), "vm0"),
        (("-name", "a,,b,debug-threads=on"), "a,b"),
        (("--name", "vm0"), "vm0"),
        (("-name", "debug-threads=on,guest=second"), "second"),
        (("-name", "first", "-name", "last"), "last"),
        (("-name", "vm0", "-name", "debug-threads=on"), "vm0"),
    ],
)
def test_a_machine_is_called_what_qemu_calls_it(
    tmp_path: Path, arguments: tuple[str, ...], name: str
) -> None:
    path = tmp_path / "qmp"
    monitor = ("-qmp", f"unix:{path},server=on,wait=off")
    with small_qemu(*arguments, *monitor, ready=path) as pid:
        assert ask(path, "query-name") == {"name": name}
        assert seen(pid).name == name


def test_vms_lists_name_version_and_monitors(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    monitor = ("-qmp", f"unix:{path},server=on,wait=off")
    with small_qemu("-name", "vm0", *monitor, ready=path) as pid:
        said = subprocess.run(
            [sys.executable, "-m", "kickcall", "vms", "--json"], capture_output=True, check=True
        )
        (told,) = (one for one in json.loads(said.stdout)["machines"] if one["pid"] == pid)
        assert told == {
            "pid": pid,
            "name": "vm0",
            "version": installed_version(),
            "monitors": [str(path)],
            "domain": None,
            "vmid": None,
            "served_at": None,
        }


def test_a_machine_without_a_name_is_called_by_its_pid(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    with small_qemu("-qmp", f"unix:{path},server=on,wait=off", ready=path) as pid:
        assert seen(pid).name == f"pid-{pid}"
        with attach(f"pid-{pid}") as attached:
            assert attached.info.pid == pid


@pytest.mark.parametrize(
    "arguments",
    [
        ("-qmp", "unix:{path},server=on,wait=off"),
        ("-qmp", "unix:{path},server,nowait"),
        ("-qmp-pretty", "unix:{path},server=on,wait=off"),
        ("-chardev", "socket,id=m,path={path},server=on,wait=off", "-mon", "m,mode=control"),
        (
            *("-mon", "chardev=m,mode=control,pretty=on"),
            *("-chardev", "socket,path={path},id=m,server=on,wait=off"),
        ),
        (
            *("-chardev", "socket,id=m,path={path},server=on,wait=off"),
            *("-qmp", "chardev:m"),
        ),
    ],
    ids=range(6),
)
def test_a_monitor_is_found_however_it_was_asked_for(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    path = tmp_path / "with,comma"
    written = [argument.format(path=str(path).replace(",", ",,")) for argument in arguments]
    with small_qemu(*written, ready=path) as pid:
        assert [address.path for address in seen(pid).monitors] == [str(path)]
        attaches(pid)


def test_a_relative_path_counts_from_qemus_own_directory(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    with small_qemu("-qmp", "unix:qmp,server=on,wait=off", cwd=tmp_path, ready=path) as pid:
        (address,) = seen(pid).monitors
        assert (address.path, address.written) == (str(path), "qmp")
        attaches(pid)


def test_a_path_may_be_longer_than_a_socket_address(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    path = deep / "qmp"
    with small_qemu("-qmp", "unix:qmp,server=on,wait=off", cwd=deep, ready=path) as pid:
        assert len(seen(pid).monitors[0].path) > 200
        attaches(pid)
        with attach(f"qmp:{path}") as attached:
            assert attached.info.pid == pid


def test_an_abstract_socket_is_a_monitor() -> None:
    name = f"kickcall-test-{os.getpid()}"
    is_up = partial(listens, Path(f"@{name}"))
    for option in (f"unix:{name},abstract=on,server=on,wait=off",):
        with small_qemu("-qmp", option, ready=is_up) as pid:
            assert [address.path for address in seen(pid).monitors] == [f"@{name}"]
            attaches(pid)


def test_a_tcp_port_is_a_monitor() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def is_up() -> bool:
        return f":{port:04X} 00000000:0000 0A" in Path("/proc/net/tcp").read_text()

    with small_qemu("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off", ready=is_up) as pid:
        assert [address.path for address in seen(pid).monitors] == [f"tcp:127.0.0.1:{port}"]
        attaches(pid)


def test_a_socket_that_was_handed_over_is_a_monitor(tmp_path: Path) -> None:
    """As libvirt does: it binds and listens, and QEMU gets the descriptor."""
    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        fd = listener.fileno()
        arguments = ("-chardev", f"socket,id=m,fd={fd},server=on,wait=off")
        with small_qemu(
            *arguments, "-mon", "chardev=m,mode=control", pass_fds=(fd,), ready=path
        ) as pid:
            assert [address.path for address in seen(pid).monitors] == [str(path)]
            attaches(pid)


@needs_root
def test_a_qemu_in_another_mount_namespace_is_reached(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    inside = f"mount -t tmpfs none {hidden} && exec "
    before = ("unshare", "-m", "--propagation", "private", "sh", "-c", inside + '"$0" "$@"')
    monitor = ("-qmp", f"unix:{hidden}/qmp,server=on,wait=off")

    # (The socket itself is not to be seen from here.)
    with small_qemu(*monitor, before=before, ready=partial(listens, hidden / "qmp")) as pid:
        until(lambda: inspect(pid), "the command becomes QEMU")
        assert list(hidden.iterdir()) == []
        (address,) = seen(pid).monitors
        assert address.written == f"{hidden}/qmp"
        assert address.path == f"/proc/{pid}/root{hidden}/qmp"
        attaches(pid)


@pytest.mark.parametrize("qemu", QEMUS)
def test_each_qemu_is_found_with_its_version_in_its_own_root(qemu: str) -> None:
    with boot_without_guest(MachineSpec(qemu=qemu)) as machine:
        found = seen(machine.pid)
        version = machine.qmp("query-version")
        numbers = ".".join(str(version["qemu"][part]) for part in ("major", "minor", "micro"))
        assert found.name == machine.name
        assert found.version == f"{numbers} ({version['package']})"
        assert numbers.startswith("10.0." if qemu == "trixie" else "")
        attaches(machine.pid)
        if qemu == "trixie":
            assert found.monitors[0].path.startswith(f"/proc/{machine.pid}/root/")


def test_a_qemu_whose_binary_was_replaced_is_found(tmp_path: Path) -> None:
    """An upgraded package leaves running machines with a deleted file as their program."""
    binary, path = tmp_path / "qemu-system-x86_64", tmp_path / "qmp"
    shutil.copy(qemu_binary(), binary)
    # Away from its usual place it does not find its modules and its firmware.
    modules = [module.parent for module in Path("/usr/lib").glob("*/qemu/accel-tcg-*.so")]
    before = ("env", f"QEMU_MODULE_DIR={modules[0] if modules else ''}")
    arguments = ("-name", "old", "-L", "/usr/share/qemu", "-L", "/usr/share/seabios")
    monitor = ("-qmp", f"unix:{path},server=on,wait=off")
    with small_qemu(*arguments, *monitor, before=before, binary=str(binary), ready=path) as pid:
        binary.unlink()
        assert os.readlink(f"/proc/{pid}/exe").endswith(" (deleted)")
        assert seen(pid).name == "old"
        assert seen(pid).version == installed_version()
        attaches(pid)


# Hides its arguments, and shows them again when it is told to: prctl(2), PR_SET_MM_MAP.
_HIDING = """
import ctypes, struct, sys
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
field = [0, 0, 0, *open("/proc/self/stat").read().rpartition(")")[2].split()]  # as proc(5) counts
code, (stack,), data = field[26:28], field[28:29], field[45:48]
arguments, environment = field[48:50], field[50:52]
for shown in ((arguments[0], arguments[0]), arguments):
    places = *code, *data, libc.sbrk(0), stack, *shown, *environment
    wanted = struct.pack("=12QIi", *map(int, places), 0, 0, -1)
    ended = libc.prctl(35, 14, wanted, ctypes.c_ulong(len(wanted)), ctypes.c_ulong(0))
    print(ended, flush=True)
    sys.stdin.readline()
"""


def test_a_machine_in_the_midst_of_execve_is_found_when_it_has_its_arguments(
    tmp_path: Path,
) -> None:
    binary = tmp_path / "qemu-system-x86_64"
    shutil.copy(Path(sys.executable).resolve(), binary)
    name = f"exec-{os.getpid()}"
    finder = Finder([name])
    with subprocess.Popen(
        [binary, "-c", _HIDING, "-name", name],
        env={**os.environ, "PYTHONHOME": sys.base_prefix},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "0\n"
        assert Path(f"/proc/{process.pid}/cmdline").read_bytes() == b""
        assert inspect(process.pid) is None
        assert finder.scan() == []
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "0\n"
        assert [(machine.pid, machine.name) for machine in finder.scan()] == [(process.pid, name)]


def test_what_only_calls_itself_qemu_is_none() -> None:
    with subprocess.Popen(
        ["qemu-system-x86_64", "30"], executable=shutil.which("sleep")
    ) as pretender:
        try:
            assert inspect(pretender.pid) is None
            assert pretender.pid not in [machine.pid for machine in find()]
        finally:
            pretender.kill()
