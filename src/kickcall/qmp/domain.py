"""How does the server hold a monitor that is libvirt's? By a socket that speaks QMP for it.

One end goes to the server as any monitor's socket would. At the other a thread takes a request at a
time and has libvirt pass it on; the events that libvirt has of QEMU come in between. Out-of-band
commands and file descriptors do not pass through libvirt, so neither is offered.
"""

from __future__ import annotations

import queue
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kickcall.errors import KickcallError, MachineGoneError, MonitorGoneError
from kickcall.qmp import message
from kickcall.qmp.upstream import Greeted, Lines
from kickcall.vmm import domain_events, domains

if TYPE_CHECKING:
    from collections.abc import Callable

    from kickcall.model import Machine

_READ_SIZE: Final = 64 << 10
_GREETING: Final = b'{"QMP": {"version": %b, "capabilities": []}}'
_PATIENCE_S: Final = 3600.0
"""A command may take its time: the other clients wait for it with QEMU's own monitor, too."""


def greet_domain(machine: Machine, timeout: float = 2.0) -> Greeted:
    """Return a connection to the machine's monitor by way of libvirt, greeted. Blocks.

    Raises what `vmm.domains.borrow_domain` does.
    """
    monitor = domains.DomainMonitor(machine, timeout)
    try:
        version = msgspec.json.encode(monitor.execute("query-version"))
        ours, theirs = socket.socketpair()
        told = _Teller(theirs)
        connection = _events(machine, told)
    except BaseException:
        monitor.close()
        raise

    def end() -> None:
        monitor.close()
        told.end()
        if connection is not None:
            with suppress(Exception):
                connection.close()

    threading.Thread(
        target=_serve, args=(theirs, monitor, told, end), name="kickcall-domain", daemon=True
    ).start()
    return Greeted(ours, Lines(), _GREETING % version, oob=False, early=())


class _Teller:
    """Writes lines to a socket, in a thread of its own: libvirt's is not to wait for a reader."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="kickcall-teller", daemon=True).start()

    def tell(self, line: bytes) -> None:
        self._lines.put(line + b"\r\n")

    def end(self) -> None:
        self._lines.put(None)

    def _run(self) -> None:
        with suppress(OSError):
            while (line := self._lines.get()) is not None:
                self._sock.sendall(line)
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


def _events(machine: Machine, told: _Teller) -> Any:
    """Pass on the events that libvirt has of the machine's QEMU, and tell when libvirt is gone."""
    libvirt, libvirt_qemu = domains.binding()
    try:
        handle, address = domains.locate(machine)
        connection = domain_events.open_told(address, told.end)
        domain = connection.lookupByUUIDString(handle.UUIDString())
    except libvirt.libvirtError as exc:
        raise MonitorGoneError(f"{machine.name}: libvirt tells no events: {exc}") from exc

    def event(
        _: Any, __: Any, name: str, seconds: int, micros: int, details: str | None, ___: Any
    ) -> None:
        data = b', "data": ' + details.encode() if details else b""
        told.tell(
            b'{"timestamp": {"seconds": %d, "microseconds": %d}, "event": "%b"%b}'
            % (seconds, micros, name.encode(), data)
        )

    def lifecycle(_: Any, __: Any, what: int, ___: int, ____: Any) -> None:
        if what == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            told.end()

    libvirt_qemu.qemuMonitorEventRegister(connection, domain, None, event, None)
    connection.domainEventRegisterAny(
        domain, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, None
    )
    return connection


def _serve(
    sock: socket.socket, monitor: domains.DomainMonitor, told: _Teller, end: Callable[[], None]
) -> None:
    """Answer requests until the server hangs up, or the machine has ended."""
    rest = b""
    try:
        while data := sock.recv(_READ_SIZE):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.strip():
                    told.tell(answer(line, lambda text: monitor.pass_on(text, _PATIENCE_S)))
    except (OSError, MachineGoneError):
        pass
    finally:
        end()
        sock.close()


def answer(line: bytes, pass_on: Callable[[str], str]) -> bytes:
    """Return the reply to one request; the id that it bears is not libvirt's business.

    libvirt numbers requests itself, and refuses one that has an id.
    """
    request = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    own = request.pop("id", None)
    echo = None if own is None else bytes(own)
    try:
        said = msgspec.json.decode(pass_on(msgspec.json.encode(request).decode()), type=_Said)
    except MachineGoneError:
        raise
    except (KickcallError, msgspec.DecodeError) as exc:
        return message.failure(str(exc), echo)
    if said.error is not msgspec.UNSET:
        return message.failure(said.error.desc, echo, said.error.class_)
    result = b"{}" if said.result is msgspec.UNSET else bytes(said.result)
    return message.success(result, echo)


class _Said(msgspec.Struct, rename={"result": "return"}):
    """What libvirt hands back: QEMU's reply, with an id of libvirt's."""

    result: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    error: message.ErrorBody | msgspec.UnsetType = msgspec.UNSET
