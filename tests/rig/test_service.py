"""Does the service that is shipped work under a real systemd, with the little that it may do?

A systemd of the test's own, in namespaces of its own, on an overlay of this machine's files.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from markdown_pages import ROOT

pytestmark = pytest.mark.rig

UNIT = ROOT / "contrib" / "systemd" / "kickcall.service"
EXPOSURE_MOST = 2.5
TRIAL = Path(__file__).with_name("service_trial.py")

# Everything that is no business of the trial's: a systemd with its journal and nothing else.
BOOT = """
set -eu
root=$1 folder=$2 checkout=$3 python=$4
mount -t tmpfs tmpfs "$root"
mkdir "$root/upper" "$root/work" "$root/all"
mount -t overlay overlay -o "lowerdir=/,upperdir=$root/upper,workdir=$root/work" "$root/all"
all=$root/all
mount -t proc proc "$all/proc"
mount --rbind /dev "$all/dev"
mount --rbind /sys "$all/sys"
mount -t tmpfs tmpfs "$all/run"
mkdir -p "$all$folder" "$all$checkout" "$all$python"
mount --bind "$folder" "$all$folder"
for shown in "$checkout" "$python"; do
    mount --bind "$shown" "$all$shown"
    mount -o remount,bind,ro "$all$shown"
done
# Nothing else is to be started, least of all what tidies up: this is the overlay.
rm -rf "$all"/usr/lib/systemd/system/*.target.wants "$all"/etc/systemd/system/*
rm -rf "$all/var/lib/kickcall"
mkdir -p "$all/etc/systemd/system" "$all/etc/kickcall" "$all/usr/local/bin"
cp "$checkout/contrib/systemd/kickcall.service" "$folder/trial.service" "$folder/trial.target" \
    "$all/etc/systemd/system"
cp "$folder/watch.toml" "$all/etc/kickcall"
ln -sf "$checkout/.venv/bin/kickcall" "$all/usr/local/bin/kickcall"
[ -s "$all/etc/machine-id" ] || echo 0123456789abcdef0123456789abcdef >"$all/etc/machine-id"
cd "$all"
mkdir -p old
pivot_root . old
umount -l /old
export container=kickcall
exec /lib/systemd/systemd --system --unit=trial.target --log-target=console --show-status=no
"""
TARGET = """
[Unit]
DefaultDependencies=no
Requires=systemd-journald.socket trial.service
"""
SERVICE = """
[Unit]
DefaultDependencies=no
After=systemd-journald.socket systemd-journald.service
Requires=systemd-journald.service
[Service]
Type=oneshot
RemainAfterExit=yes
Environment=HOME=/root PYTHONPATH={checkout}/src PATH={path}
ExecStart={python} {trial} {result}
StandardError=inherit
"""


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the service did."""
    if os.geteuid() != 0:
        pytest.fail("a systemd of the test's own needs root")
    folder = tmp_path_factory.mktemp("systemd")
    result = folder / "result.json"
    (folder / "root").mkdir()
    (folder / "trial.target").write_text(TARGET)
    (folder / "trial.service").write_text(
        SERVICE.format(
            checkout=ROOT,
            path=os.environ["PATH"],
            python=sys.executable,
            trial=TRIAL,
            result=result,
        )
    )
    (folder / "watch.toml").write_text('heal = "on"\nmetrics = "9478"\n')
    # Its own network, too: this machine's port may be taken.
    namespaces = [
        "--fork",
        "--pid",
        "--kill-child",
        "--mount",
        "--ipc",
        "--uts",
        "--cgroup",
        "--net",
    ]
    booted = ["sh", "-c", "ip link set lo up\n" + BOOT, "sh"]
    console = folder / "console"
    with (
        console.open("w") as output,
        subprocess.Popen(
            ["unshare", *namespaces, *booted, folder / "root", folder, ROOT, sys.base_prefix],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        ) as systemd,
    ):
        try:
            deadline = time.monotonic() + 240
            while not result.exists():
                assert systemd.poll() is None, console.read_text()
                assert time.monotonic() < deadline, console.read_text()
                time.sleep(0.1)
        finally:
            systemd.kill()
    facts: dict[str, Any] = json.loads(result.read_text())
    assert "error" not in facts, facts["error"] + facts["journal"]
    return facts


def test_it_starts_heals_and_ends(trial: dict[str, Any]) -> None:
    assert (trial["start"], trial["stop"], trial["result"]) == ("", "", "success")
    assert 'kickcall_injections_total{event="kick",outcome="helped"} 1.0' in trial["metrics"]
    assert "journal.db" in trial["kept"]


def test_it_has_two_capabilities_and_cannot_get_more(trial: dict[str, Any]) -> None:
    # capability.h: CAP_DAC_OVERRIDE is 1, CAP_SYS_PTRACE 19.
    status = trial["status"]
    for kind in ("CapPrm", "CapEff", "CapBnd"):
        assert int(status[kind], 16) == 1 << 1 | 1 << 19, kind
    assert (int(status["CapInh"], 16), int(status["CapAmb"], 16)) == (0, 0)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_a_reload_is_obeyed_and_one_of_a_mistake_is_refused(trial: dict[str, Any]) -> None:
    assert trial["reload"] == ""
    assert "Job for kickcall.service failed" in trial["bad reload"]
    state, restarts, status = trial["after reloads"]
    assert (state, restarts, trial["same"]) == ("active", "0", True)
    assert status == "watching 1 machines, healing: on"
    messages = [entry["MESSAGE"] for entry in trial["entries"]]
    assert any("watch.toml line 4: intervals: there is no such key" in one for one in messages)


def test_its_journal_has_the_fields(trial: dict[str, Any]) -> None:
    (injected,) = [one for one in trial["entries"] if one.get("KICKCALL_WHAT") == "injected"]
    assert injected["_SYSTEMD_UNIT"] == "kickcall.service"
    assert injected["PRIORITY"] == "5"
    assert injected["KICKCALL_MACHINE"] == "service"
    assert injected["KICKCALL_DEVICE"] == "/machine/peripheral/blk0"
    assert injected["KICKCALL_QUEUE"] == "1"
    assert (injected["KICKCALL_EVENT"], injected["KICKCALL_VIA"]) == ("kick", "eventfd")
    assert injected["KICKCALL_VERDICT"] == "lost-kick"
    # Told once, not again by way of standard output.
    messages = [one["MESSAGE"] for one in trial["entries"]]
    assert len(messages) == len(set(messages))


def test_its_exposure_is_what_the_documentation_says() -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", UNIT],
        capture_output=True,
        text=True,
        check=True,
    )
    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert exposure is not None, done.stdout
    assert float(exposure[1]) <= EXPOSURE_MOST
    assert f"exposure level is {EXPOSURE_MOST}" in (ROOT / "docs" / "service.md").read_text()
