"""Does a watcher obey a file that changes, and does its service manager hear how it goes?"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from typing import TYPE_CHECKING

import pytest

from kickcall.lab.process import thread_states
from kickcall.lab.qtest_virtio import SplitQueue
from watcher import PATIENCE_S, Watcher, disks
from witness import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kickcall.lab.qtest_virtio import VirtioPciDriver

pytestmark = pytest.mark.rig


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """A service manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(PATIENCE_S)
        yield listening


def wait_for(manager: socket.socket, wanted: bytes) -> None:
    while not manager.recv(4096).startswith(wanted):
        pass


def reap(disk: VirtioPciDriver) -> None:
    ring = disk.queues[1]
    assert isinstance(ring, SplitQueue)
    ring.set_used_event(1)


def test_a_watcher_obeys_its_file_and_says_so(tmp_path: Path, manager: socket.socket) -> None:
    first, second = (f"orders-{os.getpid()}-{number}" for number in range(2))
    config = tmp_path / "watch.toml"
    journal = f'journal = "{tmp_path}/journal.db"\n'
    config.write_text(f'machines = ["{first}"]\n{journal}')
    environment = {
        **os.environ,
        "NOTIFY_SOCKET": manager.getsockname(),
        # Seldom: the socket of a manager that is not listening may be full after ten words.
        "WATCHDOG_USEC": "600000000",
    }
    # The environment's word on the journal goes before the file's.
    environment.pop("KICKCALL_JOURNAL", None)
    with (
        disks(first) as (_, gone),
        disks(second) as (_, disk),
        contextlib.closing(Watcher("--config", str(config), env=environment)) as watcher,
    ):
        wait_for(manager, b"READY=1")
        wait_for(manager, b"WATCHDOG=1")
        watcher.wait_for("came", machine=first)
        gone.queues[1].publish_request()
        watcher.wait_for("stall", machine=first)
        assert watcher.count("injected") == 0

        config.write_text(f'{config.read_text()}heal = "on"\nmachines = ["{second}"]\n')
        watcher.process.send_signal(signal.SIGHUP)
        alert = watcher.wait_for("alert")["text"]
        assert f"{config} line 4: " in alert
        assert alert.endswith("all goes on as before")

        config.write_text(
            f'heal = "on"\nmachines = ["{second}"]\njournal = "{tmp_path}/journal.db"'
        )
        watcher.process.send_signal(signal.SIGHUP)
        wait_for(manager, b"RELOADING=1")
        wait_for(manager, b"READY=1")
        watcher.wait_for("reloaded")
        ended = watcher.wait_for("cleared", machine=first)["text"]
        assert ended.startswith("the machine is not to be watched any more")
        assert watcher.wait_for("went", machine=first)["text"] == "it is not to be watched any more"
        watcher.wait_for("came", machine=second)
        disk.queues[1].publish_request()
        watcher.wait_for("helped", machine=second)
        reap(disk)
        # The other one is left alone, healing or not.
        assert gone.queues[1].completed() == 0

        config.write_text(f'heal = "on"\nmachines = ["{first}"]\njournal = "{tmp_path}/other.db"')
        watcher.process.send_signal(signal.SIGHUP)
        until(
            lambda: any("comes with a restart" in one.get("text", "") for one in watcher.said),
            "the watcher says what comes with a restart only",
        )
        watcher.wait_for("helped", machine=first)
        assert watcher.end() == 0
        wait_for(manager, b"STOPPING=1")


def test_a_loop_that_hangs_is_silent(tmp_path: Path, manager: socket.socket) -> None:
    name = f"orders-{os.getpid()}-none"
    environment = {**os.environ, "NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "600000"}
    watching = Watcher(name, "--journal", str(tmp_path / "journal.db"), env=environment)
    with contextlib.closing(watching) as watcher:
        wait_for(manager, b"WATCHDOG=1")
        watcher.process.send_signal(signal.SIGSTOP)
        until(lambda: thread_states(watcher.process.pid) == {"T"}, "the watcher stands still")
        manager.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                manager.recv(4096)
        time.sleep(0.7)
        with pytest.raises(BlockingIOError):
            manager.recv(4096)
