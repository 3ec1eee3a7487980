"""What does the service do under a real systemd? Run as a unit of one; says it as JSON in a file.

Started by test_service.py, in namespaces of its own: `service_trial.py FILE`.
"""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import time
import traceback
import urllib.request
from pathlib import Path
from typing import Any

from kickcall.lab.qtest import Qtest, boot_without_guest
from kickcall.lab.qtest_virtio import SplitQueue
from kickcall.lab.spec import MachineSpec, VirtioBlk

CONFIG = Path("/etc/kickcall/watch.toml")
PATIENCE_S = 60.0


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{done.stdout}{done.stderr}"


def show(name: str) -> str:
    return run("systemctl", "show", "--value", "-p", name, "kickcall").strip()


def entries() -> list[dict[str, Any]]:
    lines = run("journalctl", "-o", "json", "--no-pager", "SYSLOG_IDENTIFIER=kickcall")
    return [json.loads(line) for line in lines.splitlines() if line.startswith("{")]


def wait_for_entry(what: str, field: str = "KICKCALL_WHAT") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not any(what in entry.get(field, "") for entry in entries()):
        assert time.monotonic() < deadline, f"no {what}: {run('journalctl', '-n', '50')}"
        time.sleep(0.1)


def tried() -> dict[str, Any]:
    said: dict[str, Any] = {}
    nobody = pwd.getpwnam("nobody").pw_uid
    spec = MachineSpec(
        name="service",
        devices=(VirtioBlk(id="blk0", queues=2, iothread=True),),
        arguments=("-runas", "nobody"),  # another user's, as libvirt's machines are
    )
    with boot_without_guest(spec) as machine, Qtest(machine) as qtest:
        for path in machine.qmp_paths:
            os.chown(path, nobody, nobody)
        disk = qtest.device("blk0")
        disk.set_up(event_idx=True)
        said["start"] = run("systemctl", "start", "kickcall")
        wait_for_entry("came")
        queue = disk.queues[1]
        assert isinstance(queue, SplitQueue)
        queue.publish_request()
        # Before it is completed: a call that seems lost for half a second would be healed, too.
        queue.set_used_event(1)
        queue.wait_completed(1, timeout=PATIENCE_S)
        wait_for_entry("helped")
        url = "http://127.0.0.1:9478/metrics"
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            said["metrics"] = answer.read().decode()
        pid = show("MainPID")
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        said["status"] = dict(line.split(":\t", 1) for line in status if ":\t" in line)
        CONFIG.write_text(CONFIG.read_text() + "interval_s = 0.2\n")
        said["reload"] = run("systemctl", "reload", "kickcall")
        wait_for_entry("reloaded")
        CONFIG.write_text(CONFIG.read_text() + "intervals = 1\n")
        said["bad reload"] = run("systemctl", "reload", "kickcall")
        wait_for_entry("intervals", "MESSAGE")
        said["after reloads"] = [show(name) for name in ("ActiveState", "NRestarts", "StatusText")]
        said["same"] = show("MainPID") == pid
        said["entries"] = entries()
        said["stop"] = run("systemctl", "stop", "kickcall")
        said["result"] = show("Result")
        said["kept"] = sorted(path.name for path in Path("/var/lib/kickcall").iterdir())
    return said


if __name__ == "__main__":
    try:
        facts = tried()
    except BaseException:
        facts = {"error": traceback.format_exc(), "journal": run("journalctl", "-n", "100")}
    unfinished = Path(sys.argv[1] + ".part")
    unfinished.write_text(json.dumps(facts))
    unfinished.rename(sys.argv[1])
