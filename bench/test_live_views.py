"""What do terminal and page cost with 200 machines and 5,000 queues, a third of them busy?

The machines are recorded data (tests/recorded.py): no host runs so many. The terminal is a real one
(a pty of 80 by 24), the page is in Chromium. Looking at real queues is measured in test_watch.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kickcall.serve.run import Options, serving
from pictures import chromium
from recorded import Recorded

if TYPE_CHECKING:
    from collections.abc import Iterator

MACHINES, QUEUES = 200, 25
SECONDS = 20.0
PACE_S = 0.5
TICK = 1 / os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK


def memory_mib(pid: int, what: str = "RssAnon") -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if what in line) / 1024


@pytest.mark.timeout(300)
def test_the_terminal_takes_less_than_a_fifth_of_a_core_at_2_hz(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    script = Path(__file__).with_name("recorded_top.py")
    command = [sys.executable, str(script), str(MACHINES), str(QUEUES), "0.5"]
    environment = {**os.environ, "TERM": "xterm-256color"}
    seen = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                seen.extend(data)

    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True
    ) as top:
        os.close(theirs)
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            time.sleep(5.0)
            assert top.poll() is None, seen.decode(errors="replace")[-2000:]
            before, start = cpu_s(top.pid), time.monotonic()
            time.sleep(SECONDS)
            share = (cpu_s(top.pid) - before) / (time.monotonic() - start)
            mib = memory_mib(top.pid)
        finally:
            top.kill()
    reader.join(5.0)
    os.close(ours)
    assert b"200 machines, 5000 queues" in seen.replace(b"\x1b[0m", b"")
    with capsys.disabled():
        print(f"\n  kickcall top, 5,000 queues at 2 Hz: {share:.1%} of a core, {mib:.0f} MiB")
    assert share < 0.20


@contextlib.contextmanager
def playing(source: Recorded) -> Iterator[None]:
    """Let the machines move while the block lasts."""
    over = threading.Event()

    def play() -> None:
        while not over.wait(PACE_S):
            source.play(time.monotonic())

    thread = threading.Thread(target=play)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


WATCH_TASKS = """
window.longest = 0;
new PerformanceObserver((list) => {
  for (const one of list.getEntries()) window.longest = Math.max(window.longest, one.duration);
}).observe({ type: "longtask", buffered: true });
"""


@pytest.mark.timeout(300)
def test_the_page_draws_a_frame_in_less_than_100_ms_and_150_mib(
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = Recorded(MACHINES, QUEUES)
    for number in range(0, MACHINES, 20):
        source.recorded[number].stall(QUEUES - 1, source.now)
    with playing(source), serving(source, Options()) as url, chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.add_init_script(WATCH_TASKS)
        found: dict[str, Any] = {}
        for path in ("", "machine?name=vm000"):
            page.goto(url + path)
            page.wait_for_selector("td.name a, .queue svg")
            page.wait_for_timeout(2000)
            page.evaluate("window.longest = 0; window.kickcallFrames.most = 0")
            before = page.evaluate("window.kickcallFrames.count")
            page.wait_for_timeout(SECONDS * 500)
            frames = page.evaluate("window.kickcallFrames")
            found[path or "/"] = (
                (frames["count"] - before) / (SECONDS / 2),
                frames["most"],
                page.evaluate("window.longest"),
            )
        browser_wide = browser.new_browser_cdp_session()
        processes = browser_wide.send("SystemInfo.getProcessInfo")["processInfo"]
        mib = max(memory_mib(one["id"]) for one in processes if one["type"] == "renderer")
    with capsys.disabled():
        for path, (rate, most, longest) in found.items():
            print(
                f"\n  {path}: {rate:.1f} frames a second, the longest {most:.0f} ms of script, "
                f"{longest:.0f} ms in all (0: less than 50)",
                end="",
            )
        print(f"\n  the page: {mib:.0f} MiB; its server: {memory_mib(os.getpid()):.0f} MiB")
    for rate, most, longest in found.values():
        assert rate > 0.5
        assert max(most, longest) < 100
    assert mib < 150
    assert memory_mib(os.getpid()) < 150
