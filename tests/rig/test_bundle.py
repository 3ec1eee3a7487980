"""Is everything in a bundle of a real stall, is no secret in it, and does nobody notice?

One guest for all: a kick of its vhost-user disk is lost, and stays lost until the last test.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kickcall.attached import attach
from kickcall.incident.facts import lines_from
from kickcall.lab.boot import boot
from kickcall.lab.spec import MachineSpec, VhostUserBlk, VirtioBlk
from opened_bundle import Opened, opened
from pictures import chromium, keep_page
from watcher import Watcher
from witness import held_monitor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.incident.facts import Line
    from kickcall.lab.guest import Command
    from kickcall.lab.machine import LabMachine

pytestmark = pytest.mark.rig

KICKCALL = Path(sys.executable).with_name("kickcall")
SECRET = "hunter2-correct-horse"
SPEC = MachineSpec(
    name=f"bundle-{os.getpid()}",
    devices=(VirtioBlk(id="blk0"), VhostUserBlk(id="vub0", relay=True, disk="file")),
    arguments=(
        *("-object", f"secret,id=sec0,data={SECRET}"),
        *("-fw_cfg", f"name=opt/org.example/token,string={SECRET}"),
    ),
)


@dataclass
class Stalled:
    """A machine with a lost kick."""

    machine: LabMachine
    reading: Command


@pytest.fixture(scope="module")
def stalled(guest_image_built: object) -> Iterator[Stalled]:
    with boot(SPEC) as machine:
        machine.guest.start(
            "while :; do dd if=/dev/vda of=/dev/null bs=4k count=20 iflag=direct; done"
        )
        machine.relay("vub0").drop("kick", queue=0, count=1)
        reading = machine.guest.start(
            f"dd if={machine.disk('vub0')} of=/dev/null bs=4k count=1 iflag=direct"
        )
        machine.relay("vub0").wait_for("kick", queue=0, dropped=1)
        yield Stalled(machine, reading)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KICKCALL, *map(str, words)], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def bundle(stalled: Stalled, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    path = tmp_path_factory.mktemp("bundle") / "b.tar.gz"
    done = run("bundle", stalled.machine.name, "--out", path, "--json")
    assert done.returncode == 0, done.stderr
    assert path.stat().st_mode & 0o777 == 0o600
    return opened(path, done.stdout)


def test_the_stall_is_in_it_with_its_hop(bundle: Opened) -> None:
    assert bundle.told["stalls"] == [
        {"device": "/machine/peripheral/vub0", "queue": 0, "verdict": "lost-kick", "hop": 3}
    ]
    assert bundle.names == [one["name"] for one in bundle.told["members"]]
    assert bundle.names[:2] == ["SUMMARY.md", "facts.json"]
    first = bundle.members["SUMMARY.md"].decode().splitlines()
    assert first[0] == f"# `lost-kick on hop 3: {SPEC.name} vub0 queue 0`"
    assert any("broken here" in line for line in first[:40])


def test_no_secret_is_in_it(bundle: Opened) -> None:
    for name, content in bundle.members.items():
        assert SECRET.encode() not in content, name
    words = bundle.members["command-line.txt"].decode().splitlines()
    assert "secret,id=sec0,data=(removed)" in words
    assert bundle.facts.machine.removed == 2


def test_the_queues_are_seen_over_time(bundle: Opened) -> None:
    seen: dict[str, list[Line]] = {}
    for line in bundle.lines():
        seen.setdefault(line.device.rpartition("/")[2], []).append(line)
    assert {(one.avail_idx, one.used_idx) for one in seen["vub0"]} == {(2, 1)}
    assert seen["vub0"][-1].at - seen["vub0"][0].at > 1.5
    assert len({one.used_idx for one in seen["blk0"]}) > 5
    times = [one.at for one in bundle.lines()]
    assert times == sorted(times)
    assert abs(times[0] - time.time()) < 300


def test_who_serves_and_who_holds_is_in_it(stalled: Stalled, bundle: Opened) -> None:
    relay = stalled.machine.relay_pid("vub0")
    kick = next(one for one in bundle.facts.notifiers if one.id == "vub0" and one.event == "kick")
    assert {holder.pid for holder in kick.holders} == {relay, stalled.machine.pid}
    assert [one.pid for one in bundle.facts.backends] == [relay]
    threads = {one.tid: one for one in bundle.facts.threads}
    assert threads[relay].waits_in == "epoll_wait"
    assert not threads[relay].moved
    assert stalled.machine.pid in threads
    if os.geteuid() == 0:
        assert any("poll" in frame for frame in threads[relay].stack)


def test_what_qemu_says_is_in_it_and_no_back_end_was_asked(bundle: Opened) -> None:
    said = json.loads(bundle.members["qemu.json"])
    assert said["query-status"]["running"] is True
    # Asked of a back-end, x-query-virtio-queue-status would have stopped its ring.
    asked = [question for question in said if question.startswith("x-query-virtio-queue-status")]
    assert asked == ["x-query-virtio-queue-status /machine/peripheral/blk0/virtio-backend 0"]
    vhost = "x-query-virtio-vhost-queue-status /machine/peripheral/vub0/virtio-backend 0"
    assert said[vhost]["num"] == 128
    assert re.search(r"address-space|FlatView", bundle.members["qemu-mtree-f.txt"].decode())
    assert not [said for said in said.values() if isinstance(said, dict) and "error" in said]


@contextlib.contextmanager
def held(machine: LabMachine) -> Iterator[None]:
    """Be the one client that each of the machine's monitors serves."""
    with contextlib.ExitStack() as stack:
        for path in (*machine.qmp_paths, machine.folder / "lab-monitor"):
            stack.enter_context(held_monitor(path))
        yield


def test_a_busy_monitor_costs_its_own_part(stalled: Stalled, tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    with held(stalled.machine):
        done = run("bundle", stalled.machine.pid, "--out", path, "--json")
    assert done.returncode == 0, done.stderr
    found = opened(path, done.stdout)
    assert [one.part for one in found.facts.missing] == ["attaching to the machine"]
    assert "another client holds this monitor" in found.facts.missing[0].why
    assert {"threads-1.txt", "threads-2.txt", "eventfds.json", "host.txt"} <= set(found.names)
    assert "its queues could not be looked at" in found.members["SUMMARY.md"].decode()


def test_a_machine_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = run("bundle", "no-such-vm", "--out", tmp_path / "b.tar.gz")
    assert done.returncode == 3
    assert done.stderr.startswith("kickcall: no running QEMU is named 'no-such-vm'")
    assert os.listdir(tmp_path) == []


def test_a_watcher_writes_one_of_a_stall_with_what_it_saw_before(
    stalled: Stalled, tmp_path: Path
) -> None:
    journal = tmp_path / "journal.db"
    watcher = Watcher(stalled.machine.name, "--journal", str(journal), bundles=True)
    with contextlib.closing(watcher):
        path = Path(watcher.wait_for("bundle")["file"])
        assert watcher.end() == 0
    assert [path] == list((tmp_path / "incidents").iterdir())
    assert path.stat().st_mode & 0o777 == 0o600
    found = opened(path, "{}")
    assert found.facts.by == "kickcall watch"
    assert [(one.verdict, one.hop) for one in found.facts.found] == [("lost-kick", 3)]
    before = lines_from(found.members["samples-before.jsonl"])
    waited = [one for one in before if one.device.endswith("vub0")]
    assert {(one.avail_idx, one.used_idx) for one in waited} == {(2, 1)}
    assert before[0].at < before[-1].at <= found.facts.at
    threads = found.members["threads-0.txt"].decode()
    assert f"tid {stalled.machine.relay_pid('vub0')}  state S  in epoll_wait" in threads
    assert found.facts.journal is not None
    assert any(one["what"] == "lost-kick, hop 3" for one in found.facts.journal)


def test_the_report_tells_the_whole_story_on_its_first_screen_with_scripts_off(
    stalled: Stalled, tmp_path: Path
) -> None:
    path = tmp_path / "r.html"
    done = run("report", stalled.machine.name, "--out", path, "--json")
    assert done.returncode == 0, done.stderr
    assert [one["verdict"] for one in json.loads(done.stdout)["stalls"]] == ["lost-kick"]
    assert SECRET not in path.read_text()
    width, height = 1280, 800
    asked: list[str] = []
    with chromium() as browser:
        context = browser.new_context(
            viewport={"width": width, "height": height}, java_script_enabled=False
        )
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        for what in (
            "h1:has-text('lost-kick on hop 3')",
            ".why:has-text('had to kick')",
            f".next:has-text('kickcall kick {stalled.machine.name} vub0 --queue 0')",
            ".wide [data-hop='3'].broken",
            ".wide [data-hop='10']",
            ".side svg >> nth=0",
            ".plot svg polyline.published",
            ".evidence div:has-text('avail.idx')",
        ):
            box = page.locator(what).first.bounding_box()
            assert box is not None, what
            assert box["x"] >= 0, what
            assert box["x"] + box["width"] <= width, what
            assert box["y"] >= 0, what
            assert box["y"] + box["height"] <= height, what
        assert page.locator("table:has-text('eventfd id')").count() == 1
        keep_page(page, "report")
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.locator(".tall [data-hop='3'].broken").is_visible()
        assert page.locator("html").evaluate("e => e.scrollWidth") <= 390
    assert asked == [path.as_uri()]


def test_the_guest_went_on_and_the_lost_kick_is_still_there_to_be_repaired(
    stalled: Stalled, bundle: Opened
) -> None:
    assert not stalled.reading.done
    with attach(stalled.machine.name) as attached:
        attached.device("vub0").queue(0).kick()
    assert stalled.reading.wait(timeout=30)[0] == 0
    status, _ = stalled.machine.guest.run(
        f"dd if={stalled.machine.disk('vub0')} of=/dev/null bs=4k count=4 iflag=direct", timeout=30
    )
    assert status == 0
