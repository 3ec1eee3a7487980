"""Do the alert rules and the dashboard say what a real watcher's numbers mean?

One run of a real watcher is recorded as Prometheus would scrape it, and given to promtool as if
15 s lay between two scrapes: at first all is well, then a kick is lost and healed, then a driver
does not reap whatever is injected, then the journal cannot be written, and at the end nobody
answers. One machine's monitor is held by somebody all the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import threading
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kickcall.lab.qtest import boot_without_guest
from kickcall.lab.spec import MachineSpec, VirtioBlk
from kickcall.watch.policy import Rules
from markdown_pages import ROOT
from watcher import PATIENCE_S, Watcher, disks, lose_a_kick
from witness import held_monitor, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.rig

RULES = ROOT / "contrib" / "prometheus" / "kickcall.rules.yml"
DASHBOARD = ROOT / "contrib" / "grafana" / "kickcall.json"
SCRAPED_EVERY_S = 0.25
SAID_TO_BE_S = 15
ADDED = {"job": "kickcall", "instance": "host1"}
"""Labels that Prometheus itself adds to what it scrapes."""

Series = tuple[str, tuple[tuple[str, str], ...]]


@dataclass
class Recording:
    """What was scraped, and when what was going on."""

    scrapes: list[dict[Series, float]] = field(default_factory=list)
    text: str = ""
    """The last, as it came."""
    phases: dict[str, int] = field(default_factory=dict)
    """The last scrape of each phase."""
    rests: bool = False
    """Nothing is scraped for a while: what takes its time then takes none in the recording."""

    def scrape(self, url: str) -> None:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            self.text = answer.read().decode()
        self.scrapes.append(
            {
                (one.name, tuple(sorted((one.labels | ADDED).items()))): one.value
                for family in text_string_to_metric_families(self.text)
                for one in family.samples
            }
            | {("up", tuple(sorted(ADDED.items()))): 1.0}
        )

    def last(self, name: str) -> float:
        """Return the latest value of what has no labels of its own."""
        return self.scrapes[-1][name, tuple(sorted(ADDED.items()))]

    def end_of(self, phase: str) -> str:
        """Return a time in the terms of promtool."""
        return f"{self.phases[phase] * SAID_TO_BE_S}s"

    def input_series(self) -> list[dict[str, str]]:
        """Return everything as promtool wants it."""
        known = sorted({series for scrape in self.scrapes for series in scrape})
        return [
            {
                "series": f"{name}{{{','.join(f'{key}={json.dumps(text)}' for key, text in of)}}}",
                # Prometheus marks what it does not find any more.
                "values": " ".join(
                    "stale" if value is None else f"{value * faster(name):.9f}"
                    for value in (scrape.get((name, of)) for scrape in self.scrapes)
                ),
            }
            for name, of in known
        ]


def faster(name: str) -> float:
    """Return by how much a value grows where time is said to go by faster than it did."""
    return SAID_TO_BE_S / SCRAPED_EVERY_S if name == "kickcall_oldest_request_age_seconds" else 1.0


@contextlib.contextmanager
def scraping(url: str, recording: Recording) -> Iterator[Callable[[str], None]]:
    """Scrape, again and again; what is given names the phase that ends now."""
    stopping = threading.Event()

    def scrape() -> None:
        while not stopping.wait(SCRAPED_EVERY_S):
            if not recording.rests:
                recording.scrape(url)

    thread = threading.Thread(target=scrape)
    thread.start()

    def ended(phase: str) -> None:
        recording.phases[phase] = len(recording.scrapes) - 1

    try:
        yield ended
    finally:
        stopping.set()
        thread.join()


def scraped(recording: Recording, more: int) -> None:
    """Return after so many more scrapes, of which the first may have begun before."""
    wanted = len(recording.scrapes) + more
    until(lambda: len(recording.scrapes) >= wanted, f"{more} more scrapes", PATIENCE_S)


def journal_is_down(url: str) -> bool:
    now = Recording()
    now.scrape(url)
    return not now.last("kickcall_journal_up")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """A watcher's run, recorded."""
    folder = tmp_path_factory.mktemp("metrics")
    journal = folder / "journal.db"
    name = f"metrics-{os.getpid()}"
    recorded = Recording()
    held = MachineSpec(name=f"{name}-held", devices=(VirtioBlk(),), lab_monitor=False)
    with (
        boot_without_guest(held) as other,
        held_monitor(other.qmp_path),  # before anybody else may have asked it
        disks(name) as (_, disk),
        contextlib.closing(
            Watcher(name, f"{name}-held", "--heal", "--metrics", "0", "--journal", str(journal))
        ) as watcher,
    ):
        url = watcher.wait_for("metrics")["url"]
        watcher.wait_for("came", machine=name)
        watcher.wait_for("not-watched", machine=f"{name}-held")
        with scraping(url, recorded) as ended:
            scraped(recorded, 10)
            ended("all is well")
            lose_a_kick(disk, 0)
            watcher.wait_for("helped")
            scraped(recorded, 6)
            ended("healed")
            # The work is done and nobody reaps it, call or no call.
            disk.queues[1].publish_request()
            disk.queues[1].kick()
            watcher.wait_for("refuted", Rules().queue.refuted)
            scraped(recorded, 3)
            ended("refuted")
            with sqlite3.connect(journal, isolation_level=None) as other_writer:
                other_writer.execute("BEGIN IMMEDIATE")
                disk.queues[2].publish_request()
                watcher.wait_for("alert", device="/machine/peripheral/blk0", queue=1)
                # What did not help must still be among the last 10 min when this phase ends.
                recorded.rests = True
                until(lambda: journal_is_down(url), "the journal is given up", PATIENCE_S)
                recorded.rests = False
                # MachineNotWatched fires after 10 min, however few scrapes a busy host made so far.
                scraped(recorded, max(6, 42 - len(recorded.scrapes)))
                ended("no journal")
                other_writer.execute("ROLLBACK")
            other_writer.close()
    return recorded


def promtool(*arguments: object) -> str:
    program = shutil.which("promtool") or str(ROOT / ".cache" / "bin" / "promtool")
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def firing(at: str, *names: str) -> dict[str, Any]:
    """Expect that these alerts fire at a time, and no others."""
    return {
        "expr": 'max by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": at,
        "exp_samples": [
            {"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(names)
        ],
    }


def hold(recording: Recording, folder: Path, tests: dict[str, Any]) -> None:
    file = folder / "test.json"
    one = {
        "interval": f"{SAID_TO_BE_S}s",
        "input_series": recording.input_series(),
        **tests,
    }
    # JSON is YAML.
    file.write_text(
        json.dumps(
            {
                "rule_files": [str(RULES)],
                "evaluation_interval": f"{SAID_TO_BE_S}s",
                "tests": [one],
            }
        )
    )
    promtool("test", "rules", file)


def test_the_files_are_what_prometheus_reads(recording: Recording, tmp_path: Path) -> None:
    promtool("check", "rules", RULES)
    promtool("check", "config", ROOT / "contrib" / "prometheus" / "scrape.yml")
    shown = subprocess.run(
        [shutil.which("promtool") or ROOT / ".cache" / "bin" / "promtool", "check", "metrics"],
        input=recording.text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (shown.returncode, shown.stdout + shown.stderr) == (0, "")


def test_each_alert_fires_for_what_it_says_and_not_before(
    recording: Recording, tmp_path: Path
) -> None:
    machine, verdict = hanging(recording)
    assert verdict in ("lost-call", "driver-stuck")
    lost = "KickcallLosesNotifications"
    hangs = ("KickcallStallLasts", "KickcallRequestWaits", "KickcallHealingDoesNotHelp", lost)
    last = (len(recording.scrapes) - 1) * SAID_TO_BE_S
    assert recording.phases["no journal"] * SAID_TO_BE_S > 600, "too short for what takes 10 min"
    hold(
        recording,
        tmp_path,
        {
            "promql_expr_test": [
                firing(recording.end_of("all is well")),
                firing(recording.end_of("healed"), lost),
                firing(
                    recording.end_of("no journal"),
                    *hangs,
                    "KickcallCannotJournal",
                    "KickcallMachineNotWatched",
                ),
                # Nobody answers: what was counted lately is known for a while.
                firing(f"{last + 20 * 60}s", "KickcallIsGone"),
            ],
            "alert_rule_test": [
                {
                    "eval_time": recording.end_of("refuted"),
                    "alertname": "KickcallStallLasts",
                    "exp_alerts": [
                        {
                            "exp_labels": {
                                **ADDED,
                                "severity": "critical",
                                "machine": machine,
                                "verdict": verdict,
                            },
                            "exp_annotations": {
                                "summary": f"{machine}: 1 of its queues hang ({verdict})",
                                "description": "No injection helps, or none is made. On host1: "
                                f"kickcall diagnose {machine}",
                            },
                        }
                    ],
                }
            ],
        },
    )


def expressions() -> list[str]:
    """Return what the dashboard asks for."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_each_panel_of_the_dashboard_shows_something(recording: Recording, tmp_path: Path) -> None:
    asked = expressions()
    assert len(asked) > 10
    plain = [
        expr.replace("$__rate_interval", "10m").replace("$instance", "host.*") for expr in asked
    ]
    hold(
        recording,
        tmp_path,
        {
            "promql_expr_test": [
                {
                    "expr": f"clamp_max(count({expr}), 1)",
                    "eval_time": recording.end_of("no journal"),
                    "exp_samples": [{"labels": "{}", "value": 1}],
                }
                for expr in plain
            ]
        },
    )


def test_what_is_asked_for_is_shown_and_explained(recording: Recording) -> None:
    asked = {
        name for text in (RULES.read_text(), *expressions())
        for name in re.findall(r"\bkickcall_\w+", text)
    }  # fmt: skip
    shown = {name for name, _ in recording.scrapes[-1]}
    assert asked <= shown
    page = (ROOT / "docs" / "metrics.md").read_text()
    for name in shown:
        if name.startswith("kickcall_"):
            assert re.sub("_(bucket|sum|count)$", "", name) in page, name


def hanging(recording: Recording) -> tuple[str, str]:
    """Return the name of the machine whose driver hangs, and what that is taken for."""
    ((machine, verdict),) = {
        (dict(labels)["machine"], dict(labels)["verdict"])
        for name, labels in recording.scrapes[recording.phases["refuted"]]
        if name == "kickcall_stalls_lasting"
    }
    return machine, verdict
