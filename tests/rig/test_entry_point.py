"""Can a package from outside add a device class, exactly as docs/device-classes.md shows it?"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

import kickcall
from kickcall.lab.qtest import Qtest, boot_without_guest
from kickcall.lab.qtest_pci import PciFunction
from kickcall.lab.spec import MachineSpec, OtherDevice
from markdown_pages import ROOT, blocks
from witness import counted_after

if TYPE_CHECKING:
    from pathlib import Path

    from kickcall.lab.machine import LabMachine

pytestmark = pytest.mark.rig

PAGE = ROOT / "docs" / "device-classes.md"


@dataclass(frozen=True)
class Site:
    """A folder of installed packages that only some runs see."""

    folder: Path

    def install(self, project: str, modules: dict[str, str]) -> None:
        """Put a package where `pip install --target` would, which needs a network to build it."""
        told = tomllib.loads(project)["project"]
        info = self.folder / f"{told['name'].replace('-', '_')}-{told['version']}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {told['name']}\nVersion: {told['version']}\n"
        )
        lines = []
        for group, entries in told["entry-points"].items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for name, text in modules.items():
            (self.folder / name).write_text(text)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(self.folder)}
        return subprocess.run(
            [sys.executable, *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def example() -> tuple[str, str, str]:
    """Return the page's project file, the module's file name, and the module."""
    files = {
        block.text.splitlines()[0].removeprefix("# "): block.text
        for block in blocks(PAGE)
        if block.text.startswith("# ")
    }
    name = "kickcall_tally.py"
    return files["pyproject.toml"], name, files[name]


def install_example(site: Site) -> None:
    project, name, module = example()
    site.install(project, {name: module})


SCRIPT = """
import json, sys
import kickcall
from kickcall_tally import TalliedRng

with kickcall.attach(sys.argv[1]) as machine:
    rng = machine.device("rng0")
    results = [rng.queue(0).kick(), rng.queue(0).kick(), rng.queue(0).kick(dry_run=True)]
    print(json.dumps({
        "rng0": rng.kind,
        "blk0": machine.device("blk0").kind,
        "via": [result.via for result in results],
        "tally": [[*key, count] for key, count in TalliedRng.tally.items()],
    }))
"""


def test_the_pages_example_serves_the_device_it_claims_and_no_other(
    mixed_machine: LabMachine, site: Site
) -> None:
    install_example(site)
    done = site.run("-c", SCRIPT, str(mixed_machine.pid))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "rng0": "virtio-rng (tallied)",
        "blk0": "virtio (QEMU)",
        "via": ["eventfd", "eventfd", "eventfd"],
        "tally": [["kick", 0, 2]],
    }


def test_the_command_line_finds_the_class_by_itself(mixed_machine: LabMachine, site: Site) -> None:
    project, name, module = example()
    told = (
        "\nimport atexit, sys\natexit.register(lambda: print(TalliedRng.tally, file=sys.stderr))\n"
    )
    site.install(project, {name: module + told})
    command = ("-m", "kickcall", "kick", str(mixed_machine.pid))
    kicked = site.run(*command, "rng0", "--queue", "0", "--json")
    assert kicked.returncode == 0, kicked.stderr
    assert json.loads(kicked.stdout)["via"] == "eventfd"
    assert kicked.stderr.strip() == "Counter({('kick', 0): 1})"
    other = site.run(*command, "blk0", "--queue", "0")
    assert other.returncode == 0, other.stderr
    assert other.stderr.strip() == "Counter()"


def test_without_the_package_the_device_is_served_as_before(mixed_machine: LabMachine) -> None:
    with kickcall.attach(mixed_machine.pid) as machine:
        assert machine.device("rng0").kind == "virtio (QEMU)"


EDU = """
[project]
name = "kickcall-edu"
version = "1"
[project.entry-points."kickcall.devices"]
edu = "kickcall_edu:Edu"
"""


def test_the_pages_class_for_registers_calls_the_device_that_has_them(site: Site) -> None:
    (module,) = (one.text for one in blocks(PAGE) if one.text.startswith("# kickcall_edu.py\n"))
    site.install(EDU, {"kickcall_edu.py": module})
    spec = MachineSpec(devices=(OtherDevice(id="edu0", driver="edu"),))
    with boot_without_guest(spec) as machine, Qtest(machine) as qtest:
        command = ("-m", "kickcall")
        where = (str(machine.pid), "edu0", "--queue", "0", "--allow-pause")
        early = site.run(*command, "call", *where)
        assert early.returncode == 3
        assert "the guest has not mapped its registers" in early.stderr
        bars = PciFunction(qtest, machine.device("edu0").slot).enable()
        status = bars[0] + 0x24  # docs/specs/edu.rst: interrupt status
        assert qtest.number(f"readl {status:#x}") == 0
        done = site.run(*command, "call", *where)
        assert done.returncode == 0, done.stderr
        assert "the interrupt raise register at" in done.stdout
        assert qtest.number(f"readl {status:#x}") == 1
        shown = site.run(*command, "show", str(machine.pid), "edu0")
        assert re.search(r"0 +factorial +- +mmio", shown.stdout), shown.stdout
        kicked = site.run(*command, "kick", *where)
        assert kicked.returncode == 3
        assert "a device of kind edu has no such event" in kicked.stderr


BROKEN = """
[project]
name = "kickcall-broken"
version = "1"
[project.entry-points."kickcall.devices"]
broken = "kickcall_broken:Missing"
"""


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (None, "No module named 'kickcall_broken'"),
        ("", "Missing"),
        ("raise RuntimeError('made up')", "made up"),
        ("class Missing: pass", "is none"),
    ],
    ids=["no module", "no such name", "fails when it is loaded", "no device class"],
)
@pytest.mark.parametrize("event", ["kick", "call"])
def test_a_package_that_cannot_be_loaded_is_one_line_that_names_it(
    mixed_machine: LabMachine, site: Site, module: str | None, told: str, event: str
) -> None:
    site.install(BROKEN, {} if module is None else {"kickcall_broken.py": module})
    done = site.run("-m", "kickcall", event, str(mixed_machine.pid), "blk0", "--queue", "0")
    assert done.returncode == 3
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("kickcall: ")
    assert "kickcall_broken:Missing" in line
    assert told in line


def test_looking_needs_no_device_class(mixed_machine: LabMachine, site: Site) -> None:
    site.install(BROKEN, {})
    done = site.run("-m", "kickcall", "show", str(mixed_machine.pid), "blk0")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_package_that_cannot_be_loaded_writes_nothing(
    mixed_machine: LabMachine, site: Site
) -> None:
    site.install(BROKEN, {})
    before = mixed_machine.interrupts("blk0")
    for event in ("kick", "call"):
        site.run("-m", "kickcall", event, str(mixed_machine.pid), "blk0", "--queue", "0")
    assert mixed_machine.interrupts("blk0") == before
    # The same call does raise the interrupt once the package is gone.
    (site.folder / "kickcall_broken-1.dist-info" / "entry_points.txt").write_text("")
    done = site.run("-m", "kickcall", "call", str(mixed_machine.pid), "blk0", "--queue", "0")
    assert done.returncode == 0, done.stderr
    after = counted_after(lambda: mixed_machine.interrupts("blk0"), before)
    assert after == {**before, "req.0": before["req.0"] + 1}
