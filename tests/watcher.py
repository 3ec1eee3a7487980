"""A `kickcall watch` of a test's, what it says, and machines for it to watch."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kickcall.lab.qtest import Qtest, boot_without_guest
from kickcall.lab.qtest_virtio import SplitQueue
from kickcall.lab.spec import MachineSpec, VirtioBlk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.lab.machine import LabMachine
    from kickcall.lab.qtest_virtio import VirtioPciDriver

KICKCALL = Path(sys.executable).with_name("kickcall")
PATIENCE_S = 60.0
"""For what takes milliseconds on a host that is not busy with other tests."""


class Watcher:
    """A `kickcall watch --json`, and what it said.

    Without `bundles` it writes no incident bundles: each is a process of some seconds.
    """

    def __init__(
        self,
        *arguments: str,
        command: list[str] | None = None,
        bundles: bool = False,
        **how: Any,
    ) -> None:
        words = ["--json", *([] if bundles else ["--no-bundles"]), *arguments]
        self.process = subprocess.Popen(
            [*(command or [str(KICKCALL), "watch"]), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **how,
        )
        self.said: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self._arrived = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._arrived:
                if line.startswith("{"):
                    self.said.append(json.loads(line))
                else:
                    self.errors.append(line)
                self._arrived.notify_all()

    def wait_for(self, what: str, count: int = 1, **fields: object) -> dict[str, Any]:
        """Return the happening that is the `count`th of its kind."""

        def found() -> list[dict[str, Any]]:
            return [
                one for one in self.said if one["what"] == what and fields.items() <= one.items()
            ]

        with self._arrived:
            assert self._arrived.wait_for(lambda: len(found()) >= count, PATIENCE_S), (
                what,
                self.said,
                self.errors,
            )
            return found()[count - 1]

    def count(self, what: str) -> int:
        with self._arrived:
            return sum(one["what"] == what for one in self.said)

    def end(self) -> int:
        self.process.terminate()
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextlib.contextmanager
def disks(name: str, queues: int = 4) -> Iterator[tuple[LabMachine, VirtioPciDriver]]:
    """A machine without a guest, whose disk's queues are set up; here the test is the driver."""
    spec = MachineSpec(name=name, devices=(VirtioBlk(id="blk0", queues=queues, iothread=True),))
    with boot_without_guest(spec) as machine, Qtest(machine) as qtest:
        disk = qtest.device("blk0")
        disk.set_up(event_idx=True)
        yield machine, disk


def publish(disk: VirtioPciDriver, queue: int) -> None:
    """Publish a request of whose completion no call is wanted.

    The test may be late to take it, and what a driver does not take looks like a lost call.
    """
    ring = disk.queues[queue]
    assert isinstance(ring, SplitQueue)
    # Before: a watcher may kick at once.
    ring.set_used_event(ring.avail_idx + 1 & 0xFFFF)
    ring.publish_request()


def lose_a_kick(disk: VirtioPciDriver, queue: int) -> None:
    """Publish a request, and do not kick."""
    publish(disk, queue)
