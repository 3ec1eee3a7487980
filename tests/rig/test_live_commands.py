"""Do `kickcall top` and `kickcall serve` start, end and clean up as commands on a real terminal?"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import ssl
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from small_qemu import small_qemu
from witness import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.rig

KICKCALL = Path(sys.executable).with_name("kickcall")
PATIENCE_S = 60.0
NAME = f"shown-{os.getpid()}"


@pytest.fixture(scope="module", autouse=True)
def machine() -> Iterator[int]:
    with small_qemu("-name", NAME, ready=lambda: True) as pid:
        yield pid


class Terminal:
    """A command on a terminal of 80 by 24, and what it wrote there."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(theirs)
        self.theirs = theirs
        self.process = subprocess.Popen(
            [str(KICKCALL), *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color", **environment},
            start_new_session=True,
        )
        self.seen = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self.ours, 65536):
                self.seen.extend(data)

    def wait_for(self, text: bytes) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.seen:
            assert self.process.poll() is None, self.seen.decode(errors="replace")[-1500:]
            assert time.monotonic() < deadline, self.seen.decode(errors="replace")[-1500:]
            time.sleep(0.02)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.theirs)
        self._reader.join(PATIENCE_S)
        os.close(self.ours)


def press(key: bytes) -> Callable[[Terminal], object]:
    return lambda terminal: os.write(terminal.ours, key)


def send(number: signal.Signals) -> Callable[[Terminal], object]:
    return lambda terminal: terminal.process.send_signal(number)


@pytest.mark.parametrize(
    "end", [press(b"q"), press(b"\x03"), send(signal.SIGTERM)], ids=["q", "Ctrl-C", "SIGTERM"]
)
def test_top_gives_the_terminal_back_as_it_was(end: Callable[[Terminal], object]) -> None:
    terminal = Terminal("top", NAME)
    try:
        terminal.wait_for(NAME[:6].encode())
        assert termios.tcgetattr(terminal.theirs) != terminal.before
        end(terminal)
        assert terminal.process.wait(PATIENCE_S) == 0
        assert termios.tcgetattr(terminal.theirs) == terminal.before
        # The screen that was there before.
        until(lambda: b"\x1b[?1049l" in terminal.seen, "all that it wrote is read")
        assert b"Traceback" not in terminal.seen
    finally:
        terminal.close()


def test_top_says_all_without_colour() -> None:
    terminal = Terminal("top", NAME, NO_COLOR="1")
    try:
        terminal.wait_for(b"unknown")
        for colour in (b"[31m", b"[35m", b";31m", b";35m", b"38;2;", b"38;5;"):
            assert colour not in terminal.seen
    finally:
        terminal.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_at_a_signal_though_a_page_is_open(number: signal.Signals) -> None:
    command = [str(KICKCALL), "serve", NAME, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            with urllib.request.urlopen(f"{url}events", timeout=PATIENCE_S) as stream:
                while b"frame" not in stream.readline():
                    pass
                server.send_signal(number)
                assert server.wait(PATIENCE_S) == 0
        finally:
            server.kill()


def test_serve_encrypts_with_a_certificate(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    making = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    making += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(making, check=True, capture_output=True)
    command = [str(KICKCALL), "serve", NAME, "--port", "0"]
    command += ["--tls-cert", str(certificate), "--tls-key", str(key)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            assert url.startswith("https://127.0.0.1:")
            trusting = ssl.create_default_context(cafile=str(certificate))
            trusting.check_hostname = False
            with urllib.request.urlopen(url, timeout=PATIENCE_S, context=trusting) as page:
                assert b"<title>kickcall</title>" in page.read()
        finally:
            server.kill()
