"""Does everything that the README and the docs show work, as it is printed there?

The pages speak of a machine `vm0` and of sockets under /run; here both have names of their own, so
that the tests disturb no other machine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kickcall.lab.boot import boot
from kickcall.lab.spec import MachineSpec, VhostUserBlk, VirtioBlk, VirtioScsi
from markdown_pages import ROOT, Block, blocks, pages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kickcall.lab.image import GuestImage
    from kickcall.lab.machine import LabMachine

pytestmark = pytest.mark.rig

ALL = [block for page in pages() for block in blocks(page)]
PYTHON = [block for block in ALL if block.run]
SHELL = {"console", "sh", "bash"}
OWN_TESTS = {"lab", "demo", "qmp", "watch", "trace", "--vmcore", "top", "serve", "bundle", "report"}
OWN_OPTIONS = {"--kernel", "--verify", "--allow-pause"}
"""What boots machines, or goes on until it is told to stop, or looks at a kernel that this machine
may not have, or says beforehand what it will do, or leaves files: it has tests of its own."""


def _joined(block: Block) -> list[str]:
    return block.text.replace("\\\n", " ").splitlines()


def shell_lines() -> list[tuple[str, list[str]]]:
    """Return each `$ kickcall …` line that can be run against a machine, and where it stands."""
    found = []
    for block in ALL:
        for line in _joined(block) if block.language in SHELL else ():
            typed = line.removeprefix("$ ")
            if typed.startswith("kickcall "):
                words = shlex.split(typed, comments=True)[1:]
                own = words[0] in OWN_TESTS or OWN_OPTIONS & set(words)
                if not own and not any(word.startswith("libvirt:") for word in words):
                    found.append((f"{block}: {typed}", words))
    return found


LINES = shell_lines()


@pytest.fixture(scope="module")
def vm0(guest_image_built: GuestImage) -> Iterator[LabMachine]:
    spec = MachineSpec(
        name=f"vm0-{os.getpid()}",
        devices=(
            VirtioScsi(id="vscsi0", queues=2),
            VirtioBlk(id="blk0", queues=2),
            VhostUserBlk(id="vub0", queues=2),
            VhostUserBlk(id="vub1", queues=2),
        ),
        monitors=2,
    )
    with boot(spec) as machine:
        yield machine


def for_machine(text: str, machine: LabMachine) -> str:
    return re.sub(r"\bvm0\b", machine.name, text)


def test_there_are_examples_to_run() -> None:
    shown = {words[0] for _, words in LINES}
    assert {"vms", "show", "eventfd", "kick", "call"} <= shown
    assert {block.page.name for block in PYTHON} >= {"README.md", "api.md"}
    assert {block.language for block in PYTHON} == {"python"}


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_python_example_works_as_printed(vm0: LabMachine, block: Block) -> None:
    done = subprocess.run(
        [sys.executable, "-c", for_machine(block.text, vm0)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip(), "an example that prints nothing shows nothing"


@pytest.mark.parametrize("words", [words for _, words in LINES], ids=[where for where, _ in LINES])
def test_a_command_line_works_as_printed(vm0: LabMachine, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kickcall", *(for_machine(word, vm0) for word in words)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    shown = {"vscsi0", "blk0", "vub0", "vub1"} & set(words) or {vm0.name}
    assert all(word in done.stdout for word in shown), done.stdout


@pytest.fixture
def qmp_socket(vm0: LabMachine, tmp_path: Path) -> Iterator[Path]:
    """The socket of the README's `kickcall qmp` line."""
    readme = [block for block in ALL if block.page == ROOT / "README.md"]
    (line,) = {
        line.removeprefix("$ ")
        for block in readme
        for line in block.text.splitlines()
        if line.startswith("$ kickcall qmp")
    }
    path = tmp_path / "vm0.sock"
    words = shlex.split(for_machine(line, vm0))[1:]
    words[words.index("--listen") + 1] = str(path)
    server = subprocess.Popen(
        [sys.executable, "-m", "kickcall", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert server.stdout is not None
        # The path is there a moment before somebody listens at it.
        assert b"listening" in server.stdout.readline(), server.communicate()[1]
        yield path
    finally:
        server.terminate()
        server.communicate(timeout=60)


def test_the_rfcs_command_works_as_printed(vm0: LabMachine, qmp_socket: Path) -> None:
    readme = [block for block in ALL if block.page == ROOT / "README.md"]
    asked, answered = (block.text for block in readme if block.language == "json")
    (typed,) = (
        block.text.strip() for block in readme if block.text.startswith("x-debug-device-event")
    )
    in_hmp = {"execute": "human-monitor-command", "arguments": {"command-line": typed}}
    with (
        socket.socket(socket.AF_UNIX) as connection,
        connection.makefile("rw", encoding="utf-8") as client,
    ):
        connection.settimeout(20)
        connection.connect(str(qmp_socket))

        def ask(line: str) -> object:
            client.write(line.strip() + "\n")
            client.flush()
            while "event" in (reply := json.loads(client.readline())):
                pass
            return reply

        assert "QMP" in json.loads(client.readline())
        assert ask('{"execute": "qmp_capabilities"}') == {"return": {}}
        assert ask(asked) == json.loads(answered)
        assert ask(json.dumps(in_hmp)) == {"return": ""}


def test_a_served_socket_is_as_good_as_the_machines_name(vm0: LabMachine, qmp_socket: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kickcall", "kick", f"qmp:{qmp_socket}", "vscsi0", "--queue", "3"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert vm0.name in done.stdout
