"""How does one write guest-physical memory through QEMU's gdb stub? Packets, and a conversation.

The stub speaks the GDB remote serial protocol: `$BODY#CC`, where CC is the sum of the body's bytes
modulo 256, each packet answered by `+` (GDB manual, appendix E.1). In QEMU's physical memory mode
`M` and `m` reach guest-physical addresses, device registers included, as a processor of the guest
would (docs/system/gdb.rst, "Examining physical memory"). Connecting pauses the machine, and `D`
lets it run (gdbstub.c: gdb_chr_event, handle_detach; 5.0 to 10.1).

Standard library only: the guard process imports this and starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING, Final, Self

from kickcall.errors import StubError

if TYPE_CHECKING:
    from collections.abc import Iterator

_OK: Final = b"OK"
_PACKET_MAX: Final = 16 << 10
"""QEMU's own packets have 4096 bytes (MAX_PACKET_LENGTH)."""
_STOPPED: Final = b"TSWX"
"""First letters of what the stub says unasked, when the machine stops (GDB manual, E.3)."""


def packet(body: bytes) -> bytes:
    """Return `body` as it goes over the wire. Commands here need no escapes: they are text."""
    return b"$" + body + b"#" + b"%02x" % (sum(body) & 0xFF)


def read_command(address: int, length: int) -> bytes:
    """Return the command that reads `length` bytes at `address`."""
    return b"m%x,%x" % (address, length)


def write_command(address: int, data: bytes) -> bytes:
    """Return the command that writes `data` at `address`, in one access where a register has it."""
    return b"M%x,%x:" % (address, len(data)) + data.hex().encode()


class PacketReader:
    """Takes bytes as they come and gives the bodies of whole packets.

    Acknowledgements are skipped. Raises StubError for a packet whose sum is wrong: over a unix
    socket that is no noise, but another protocol.
    """

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the body of every packet that `data` completes."""
        self._buffer += data
        while True:
            self._buffer = self._buffer.lstrip(b"+")
            if not self._buffer:
                return
            if self._buffer[:1] != b"$":
                raise StubError(f"the gdb stub said {self._buffer[:16]!r}, which is no packet")
            end = self._buffer.find(b"#")
            if end < 0 or len(self._buffer) < end + 3:
                if len(self._buffer) > _PACKET_MAX:
                    raise StubError("the gdb stub sends a packet without an end")
                return
            body, said = self._buffer[1:end], self._buffer[end + 1 : end + 3]
            self._buffer = self._buffer[end + 3 :]
            if said.lower() != b"%02x" % (sum(body) & 0xFF):
                raise StubError(f"the gdb stub's packet {body[:16]!r} has the wrong sum")
            yield body


class Stub:
    """A conversation with a stub that listens on the unix socket `address`.

    While it is open the machine is paused. Every wait is bounded by `timeout` seconds in all.
    """

    def __init__(self, address: str, timeout: float) -> None:
        self._deadline = time.monotonic() + timeout
        self._reader = PacketReader()
        self._bodies: list[bytes] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._sock.settimeout(timeout)
            self._sock.connect(address)
        except OSError as exc:
            self._sock.close()
            raise StubError(f"the gdb stub at {address} does not answer: {exc}") from exc

    def ask(self, body: bytes) -> bytes:
        """Send a command and return the answer to it, stop replies left out."""
        try:
            self._sock.sendall(packet(body))
            while True:
                while not self._bodies:
                    self._sock.settimeout(max(self._deadline - time.monotonic(), 0.001))
                    data = self._sock.recv(4096)
                    if not data:
                        raise StubError(f"the gdb stub hung up instead of answering {body!r}")
                    self._bodies.extend(self._reader.feed(data))
                answer = self._bodies.pop(0)
                self._sock.sendall(b"+")
                if answer[:1] not in _STOPPED or not answer:
                    return answer
        except OSError as exc:
            raise StubError(f"the gdb stub did not answer {body!r}: {exc}") from exc

    def _command(self, body: bytes) -> None:
        answer = self.ask(body)
        if answer != _OK:
            said = answer.decode(errors="replace") or "nothing: it does not know it"
            raise StubError(f"the gdb stub refused {body.decode()}: {said}")

    def physical(self, on: bool) -> None:
        """Let addresses be guest-physical. QEMU keeps this beyond the connection: switch it off."""
        self._command(b"Qqemu.PhyMemMode:%d" % on)

    def read(self, address: int, length: int) -> bytes:
        """Return `length` bytes at a guest-physical address."""
        answer = self.ask(read_command(address, length))
        try:
            data = bytes.fromhex(answer.decode())
        except ValueError:
            data = b""
        if len(data) != length:
            raise StubError(f"the gdb stub cannot read {length} bytes at {address:#x}")
        return data

    def write(self, address: int, data: bytes) -> None:
        """Write `data` at a guest-physical address."""
        self._command(write_command(address, data))

    def detach(self) -> None:
        """Let the machine run. When this returns it does."""
        self._command(b"D")

    def close(self) -> None:
        """Hang up. A machine that was not let go of stays paused."""
        with contextlib.suppress(OSError):
            self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
