"""Is the gdb stub spoken to as the protocol has it, and is what it says taken in bounds?"""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import StubError
from kickcall.vmm.gdbstub import PacketReader, Stub, packet, read_command, write_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def test_a_packet_is_framed_as_in_the_gdb_manual() -> None:
    # GDB manual, E.1: the sum is modulo 256, as two hexadecimal digits. `OK` is 4f + 4b = 9a.
    assert packet(b"OK") == b"$OK#9a"
    assert packet(b"") == b"$#00"
    assert packet(b"Qqemu.PhyMemMode:1")[-3:] == b"#%02x" % (sum(b"Qqemu.PhyMemMode:1") % 256)


def test_memory_commands_are_hexadecimal() -> None:
    assert read_command(0xFEBFD000, 16) == b"mfebfd000,10"
    assert write_command(0xFEE01000, b"\x25\x40\x00\x00") == b"Mfee01000,4:25400000"


def bodies(*chunks: bytes) -> list[bytes]:
    reader = PacketReader()
    return [body for chunk in chunks for body in reader.feed(chunk)]


def test_packets_are_found_however_the_bytes_come() -> None:
    stream = b"+$T02thread:01;#04+$OK#9a"
    assert bodies(stream) == [b"T02thread:01;", b"OK"]
    assert bodies(*(bytes([byte]) for byte in stream)) == [b"T02thread:01;", b"OK"]
    assert bodies(b"+", b"$OK#9", b"a$") == [b"OK"]


@pytest.mark.parametrize("said", [b"$OK#9b", b"{}\n", b"$" + b"a" * 20000])
def test_what_is_no_packet_is_an_error(said: bytes) -> None:
    with pytest.raises(StubError):
        bodies(said)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Callable[[bytes], bytes | None]], str]]:
    """Let a thread answer one client as a stub would: each body, or hang up with None."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "stub"))
    listener.listen()
    threads = []

    def start(answer: Callable[[bytes], bytes | None]) -> str:
        def run() -> None:
            sock, _ = listener.accept()
            reader = PacketReader()
            with sock:
                while data := sock.recv(4096):
                    for body in reader.feed(data):
                        said = answer(body)
                        if said is None:
                            return
                        sock.sendall(said)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return str(tmp_path / "stub")

    yield start
    listener.close()
    for thread in threads:
        thread.join(5)


def test_an_answer_is_told_from_what_the_stub_says_unasked(
    serve: Callable[[Callable[[bytes], bytes | None]], str],
) -> None:
    # QEMU 7.2 says so of the pause before it answers the first command.
    path = serve(lambda body: b"$T02thread:01;#04+" + packet(b"OK"))
    with Stub(path, 20.0) as stub:
        stub.physical(True)
        stub.write(0xFEE00000, b"\x21\x40\x00\x00")


def test_memory_is_read_in_the_length_that_was_asked_for(
    serve: Callable[[Callable[[bytes], bytes | None]], str],
) -> None:
    path = serve(lambda body: packet(b"0c10e0fe" if body.endswith(b",4") else b"E14"))
    with Stub(path, 20.0) as stub:
        assert stub.read(0x1000, 4) == b"\x0c\x10\xe0\xfe"
        with pytest.raises(StubError, match="cannot read 8 bytes at 0x1000"):
            stub.read(0x1000, 8)


@pytest.mark.parametrize("said", [packet(b"E22"), packet(b""), None])
def test_a_refusal_is_an_error(
    serve: Callable[[Callable[[bytes], bytes | None]], str], said: bytes | None
) -> None:
    path = serve(lambda body: said)
    with Stub(path, 1.0) as stub, pytest.raises(StubError):
        stub.detach()


def test_silence_is_an_error_in_time(
    serve: Callable[[Callable[[bytes], bytes | None]], str],
) -> None:
    path = serve(lambda body: b"")
    with Stub(path, 0.1) as stub, pytest.raises(StubError, match="did not answer"):
        stub.detach()


def test_nobody_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StubError, match="does not answer"):
        Stub(str(tmp_path / "nothing"), 0.1)
