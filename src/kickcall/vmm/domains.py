"""How is a libvirt domain's monitor asked? Through the libvirtd (or virtqemud) that holds it.

libvirt passes QMP on: virDomainQemuMonitorCommand. That marks the domain as tainted
(`custom-monitor`), once, which is a line in libvirt's log and nothing else. The machine is found
without libvirt, by its process, and so is the daemon: by its socket, in the root of that process.
Proof that both mean the same machine are its threads: QEMU names those of its processors, and they
must be that process's.

libvirt-python is imported only here, and only when a domain is asked for: it is an optional extra.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from kickcall.errors import (
    MachineGoneError,
    MonitorBusyError,
    MonitorError,
    MonitorGoneError,
    MonitorTimeoutError,
    PrivilegeError,
    QmpCommandError,
)
from kickcall.host import processes, threads
from kickcall.vmm.find import in_root, socket_address
from kickcall.vmm.monitor import COMMAND_TIMEOUT, CONNECT_TIMEOUT, borrow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kickcall.model import Domain, Machine
    from kickcall.vmm.monitor import BorrowMonitor, Monitor

_T = TypeVar("_T")
_SOCKETS = ("virtqemud-sock", "libvirt-sock")
"""The daemon of the QEMU driver alone, and the one with all drivers (libvirt: daemons.rst)."""
_VARIABLE = "LIBVIRT_DEFAULT_URI"
_LEAVING_S = 0.5
_STUCK_MOST = 8
"""Each keeps one of the daemon's workers busy, of 20 (libvirtd.conf: max_workers)."""
MISSING = (
    "its monitor is libvirt's, and libvirt's Python binding is missing: "
    "pip install 'kickcall[libvirt]' (Debian: python3-libvirt)"
)


def binding() -> tuple[Any, Any]:
    """Return the modules `libvirt` and `libvirt_qemu`. Raises MonitorError without them."""
    try:
        import libvirt
        import libvirt_qemu
    except ImportError as exc:
        raise MonitorError(MISSING) from exc
    # What goes wrong is raised, too; by default the library also prints it.
    libvirt.registerErrorHandler(lambda *_: None, None)
    # A daemon of one's own session is started by merely asking for it, unless this says no.
    os.environ.setdefault("LIBVIRT_AUTOSTART", "0")
    return libvirt, libvirt_qemu


def borrow_of(machine: Machine) -> BorrowMonitor:
    """Return what opens a monitor of the machine: a free one of its own, else libvirt's."""
    own = borrow([address.path for address in machine.monitors])
    if machine.domain is None:
        return own
    through_libvirt = borrow_domain(machine)
    if not machine.monitors:
        return through_libvirt

    @contextmanager
    def borrowed(timeout: float = CONNECT_TIMEOUT) -> Iterator[Monitor]:
        with ExitStack() as held:
            try:
                monitor = held.enter_context(own(timeout / 2))
            except MonitorError:
                monitor = held.enter_context(through_libvirt(timeout / 2))
            yield monitor

    return borrowed


def borrow_domain(machine: Machine) -> BorrowMonitor:
    """Return what opens the monitor of the machine by way of its libvirt domain.

    It raises MonitorError where the binding is missing, MonitorBusyError where libvirt does not
    answer, MonitorGoneError where no libvirt has the domain, and PrivilegeError.
    """

    @contextmanager
    def borrowed(timeout: float = CONNECT_TIMEOUT) -> Iterator[Monitor]:
        monitor = DomainMonitor(machine, timeout)
        try:
            yield monitor
        finally:
            monitor.close()

    return borrowed


class DomainMonitor:
    """One conversation with QEMU through libvirt. libvirt keeps its monitor, and goes on using it.

    libvirt's calls have no timeout, so a thread makes them. One that does not come back is left
    behind, and its domain is not asked again until it has.
    """

    def __init__(self, machine: Machine, timeout: float) -> None:
        assert machine.domain is not None
        self._domain = machine.domain
        try:
            binding()
        except MonitorError as exc:
            raise MonitorError(f"{machine.name}: {exc}") from exc
        self._lane = _Lane(machine.domain, timeout)
        try:
            self._handle, self._address = self._lane.run(lambda: locate(machine), timeout)
        except _NoAnswer:
            for address in addresses(machine):
                _forget(address)
            raise MonitorBusyError(
                f"{machine.name}: libvirt did not answer within {timeout:.1f} s"
            ) from None
        except BaseException:
            self._lane.close()
            raise

    def pass_on(self, text: str, timeout: float = COMMAND_TIMEOUT) -> str:
        """Return QEMU's answer to one QMP command, as libvirt passes both on. No `id` in it.

        Raises MonitorGoneError, MonitorBusyError, MonitorTimeoutError or PrivilegeError.
        """
        _, libvirt_qemu = binding()
        try:
            return str(
                self._lane.run(
                    lambda: _translated(
                        self._domain,
                        lambda: libvirt_qemu.qemuMonitorCommand(self._handle, text, 0),
                    ),
                    timeout,
                )
            )
        except _NoAnswer:
            _forget(self._address)
            raise MonitorTimeoutError(
                f"{self._domain.name}: no answer through libvirt within {timeout:.0f} s: QEMU's "
                f"main loop is stuck, or libvirt is busy (virsh domjobinfo {self._domain.name})"
            ) from None

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Return what QEMU returns for `command`."""
        asked: dict[str, object] = {"execute": command}
        if arguments:
            asked["arguments"] = dict(arguments)
        said = json.loads(self.pass_on(json.dumps(asked)))
        if "error" in said:
            raise QmpCommandError(
                f"QEMU refused {command}: {said['error']['desc']}", said["error"]["class"]
            )
        return said["return"]

    def hmp(self, line: str) -> str:
        """Return what the human monitor prints for `line`."""
        return str(self.execute("human-monitor-command", {"command-line": line}))

    def close(self) -> None:
        """Let go. The connection to libvirt stays, for the next time."""
        self._lane.close()


class _NoAnswer(Exception):
    """A call did not come back in time."""


_stuck: dict[str, threading.Thread] = {}
"""Threads that were left behind, by the UUID of the domain that they ask."""


class _Lane:
    """A thread that makes one call after the other, for a caller who waits only so long."""

    def __init__(self, domain: Domain, patience: float = 0.0) -> None:
        left = _stuck.get(domain.uuid)
        if left is not None:
            left.join(patience)
        if left is not None and left.is_alive():
            raise MonitorBusyError(
                f"{domain.name}: libvirt has not answered an earlier command yet: QEMU's main loop "
                "is stuck, or libvirt is"
            )
        for uuid in [uuid for uuid, thread in _stuck.items() if not thread.is_alive()]:
            _stuck.pop(uuid, None)
        if len(_stuck) >= _STUCK_MOST:
            raise MonitorBusyError(
                f"{domain.name}: libvirt does not answer for {len(_stuck)} other domains, and is "
                "asked nothing more until it does"
            )
        self._uuid = domain.uuid
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kickcall-libvirt", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()

    def run(self, call: Callable[[], _T], timeout: float) -> _T:
        """Return what `call` returns, or raise what it raises; _NoAnswer after `timeout` s."""
        done: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

        def report() -> None:
            try:
                done.put((call(), None))
            except BaseException as exc:
                done.put((None, exc))

        self._calls.put(report)
        try:
            value, problem = done.get(timeout=timeout)
        except queue.Empty:
            _stuck[self._uuid] = self._thread
            self.close()
            raise _NoAnswer from None
        if problem is not None:
            raise problem
        return value  # type: ignore[return-value]

    def close(self) -> None:
        self._calls.put(None)


def _translated(domain: Domain, call: Callable[[], _T]) -> _T:
    """Return what a call to libvirt returns; its errors as ours."""
    libvirt, _ = binding()
    try:
        return call()
    except libvirt.libvirtError as exc:
        said = str(exc.get_error_message() or exc)
        match exc.get_error_code():
            case libvirt.VIR_ERR_OPERATION_DENIED | libvirt.VIR_ERR_ACCESS_DENIED:
                raise PrivilegeError(
                    f"{domain.name}: libvirt does not let this user ask QEMU: {said}"
                ) from exc
            case libvirt.VIR_ERR_AUTH_FAILED | libvirt.VIR_ERR_AUTH_UNAVAILABLE:
                raise PrivilegeError(
                    f"{domain.name}: libvirt does not let this user in: {said}"
                ) from exc
            case libvirt.VIR_ERR_OPERATION_TIMEOUT:
                raise MonitorBusyError(
                    f"{domain.name}: libvirt is busy with it (virsh domjobinfo): {said}"
                ) from exc
            case _:
                raise MonitorGoneError(
                    f"{domain.name}: libvirt could not ask QEMU: {said}"
                ) from exc


# Which libvirt


@dataclass(frozen=True, slots=True)
class Address:
    """Where a libvirt daemon may be: an URI with its socket, or libvirt's own default.

    Each machine has a path of its own to the socket, by its root: which socket it is counts.
    """

    uri: str | None
    identity: tuple[int, int] = (0, 0)
    """The socket's device and inode."""
    socket: str = field(default="", compare=False)


def addresses(machine: Machine) -> list[Address]:
    """Return where the libvirt that holds the machine's monitor may be, likeliest first.

    What LIBVIRT_DEFAULT_URI says, if it is this host; then the sockets that the machine's own root
    has: of the system's daemon, and of the one of its user's session.
    """
    found = []
    said = os.environ.get(_VARIABLE, "")
    if said and not urlsplit(said).hostname:
        found.append(Address(None))
    try:
        owner = os.stat(f"/proc/{machine.pid}").st_uid
    except OSError:
        owner = 0
    for folder in ("/run/libvirt", "/var/run/libvirt", f"/run/user/{owner}/libvirt"):
        for name in _SOCKETS:
            path = in_root(machine.pid, f"{folder}/{name}")
            try:
                status = os.stat(path)
            except OSError:
                continue
            # The daemon of a session answers only to /session, as does one in a container that
            # does not run as root (KubeVirt).
            privileged = status.st_uid == 0 and "/user/" not in folder
            kind = "system" if privileged else "session"
            address = Address(kind, (status.st_dev, status.st_ino), path)
            if address not in found:
                found.append(address)
    return found


_connections: dict[Address, Any] = {}
_places: dict[tuple[int, int], tuple[Address, int]] = {}
"""Where a machine was found, and the number that its domain has there while it runs."""
_lock = threading.Lock()


def connect(address: Address, *, fresh: bool = False) -> Any:
    """Return a connection to a libvirt: the one there is, unless it is gone, or a `fresh` one."""
    libvirt, _ = binding()
    if not fresh and (known := _alive(address)) is not None:
        return known
    if address.uri is None:
        opened = libvirt.open(None)
    else:
        with socket_address(address.socket) as path:
            opened = libvirt.open(f"qemu+unix:///{address.uri}?socket={path}")
    if not fresh:
        with _lock:
            _connections[address] = opened
    return opened


def _alive(address: Address) -> Any:
    """Return the connection that there is to a libvirt, or None; forget all that broke."""
    with _lock:
        broken = [one for one, opened in _connections.items() if not opened.isAlive()]
    for one in broken:
        _forget(one)
    with _lock:
        return _connections.get(address)


def _forget(address: Address) -> None:
    """Have the next call go over another connection: on one only five may be on their way.

    (libvirtd.conf: max_client_requests.)
    """
    with _lock:
        opened = _connections.pop(address, None)
    if opened is not None:
        close(opened)


def close(opened: Any) -> threading.Thread:
    """Have a connection closed: that asks the daemon, which may hang."""

    def call() -> None:
        with suppress(Exception):
            opened.close()

    closing = threading.Thread(target=call, name="kickcall-libvirt", daemon=True)
    closing.start()
    return closing


@atexit.register
def _leave() -> None:
    """Close the connections at exit, for libvirt's log; wait for no daemon that hangs."""
    deadline = time.monotonic() + _LEAVING_S
    for closing in [close(opened) for opened in list(_connections.values())]:
        closing.join(max(0.0, deadline - time.monotonic()))


def locate(machine: Machine) -> tuple[Any, Address]:
    """Return libvirt's handle on the machine's domain, and which libvirt it is. May block.

    Raises MonitorGoneError where no libvirt here has it, PrivilegeError and MonitorBusyError.
    """
    libvirt, libvirt_qemu = binding()
    assert machine.domain is not None
    key = (machine.pid, machine.start_time)
    known = _places.get(key)
    if known is not None and _alive(known[0]) is None:
        known = None  # it was restarted, and has another socket
    places = addresses(machine) if known is None else [known[0]]
    problems = []
    for address in places:
        for retry in (False, True):
            try:
                handle = connect(address).lookupByUUIDString(machine.domain.uuid)
                number = handle.ID()
                if known is not None and known[1] == number:
                    return handle, address
                if number > 0 and _is_machine(machine, handle, libvirt_qemu):
                    _note_place(key, (address, number))
                    return handle, address
                problems.append("it has another machine of that name")
                break
            except libvirt.libvirtError as exc:
                said = str(exc.get_error_message() or exc)
                if exc.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    problems.append("it does not know the domain")
                    break
                if exc.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT:
                    raise MonitorBusyError(
                        f"{machine.name}: libvirt is busy with it: {said}"
                    ) from exc
                if retry or _alive(address) is not None:
                    problems.append(said)
                    break
    _places.pop(key, None)
    if processes.start_time(machine.pid) != machine.start_time:
        raise MachineGoneError(f"process {machine.pid} ended")
    if not places:
        raise MonitorGoneError(
            f"{machine.name}: its monitor is libvirt's, and there is no socket of a libvirtd or "
            f"virtqemud in /run/libvirt: start it, or name it in {_VARIABLE}"
        )
    raise MonitorGoneError(
        f"{machine.name}: its monitor is libvirt's, and no libvirt here has it: "
        + "; ".join(
            f"{address.socket or os.environ.get(_VARIABLE)}: {problem}"
            for address, problem in zip(places, problems, strict=False)
        )
    )


def _note_place(key: tuple[int, int], place: tuple[Address, int]) -> None:
    for pid, started in list(_places):
        if processes.start_time(pid) != started:
            _places.pop((pid, started), None)
    _places[key] = place


def _is_machine(machine: Machine, handle: Any, libvirt_qemu: Any) -> bool:
    """Tell whether what answers behind a domain is that process: are its processors' threads?"""
    asked = '{"execute": "query-cpus-fast"}'
    said = json.loads(libvirt_qemu.qemuMonitorCommand(handle, asked, 0))
    told = {int(cpu["thread-id"]) for cpu in said.get("return", ())}
    own = threads.inner_tids(machine.pid)
    return bool(told) and told <= own.keys()
