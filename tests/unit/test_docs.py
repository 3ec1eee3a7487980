"""Does the documentation say what is true: commands, links, dependencies?"""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from kickcall.cli import main
from kickcall.model import Via
from markdown_pages import ROOT, Block, anchors, blocks, links, pages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHELL = {"console", "sh", "bash", "shell"}
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
BLOCKS = [block for page in pages() for block in blocks(page)]


def shown_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield where and what for every `kickcall ...` line that a reader could type."""
    for block in BLOCKS:
        if block.language not in SHELL:
            continue
        text = block.text.replace("\\\n", " ")
        for line in text.splitlines():
            typed = line.strip().removeprefix("$ ").removeprefix("sudo ")
            if typed.startswith("kickcall"):
                words = shlex.split(typed.split(" | ")[0], comments=True)
                yield f"{block}: {typed}", [word for word in words if word != "&"][1:]


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=where) for where, words in shown_commands()]
)
def test_a_command_in_the_documentation_is_one_that_kickcall_has(words: list[str]) -> None:
    # With --help nothing is done, but an unknown command or option is still an error.
    # What follows -- is not ours to understand.
    ours = words[: words.index("--")] if "--" in words else words
    result = CliRunner().invoke(main.app, [*ours, "--help"])
    assert result.exit_code == 0, result.output
    for option, value in itertools.pairwise(words):
        if option == "--via":
            assert value in {"auto", *Via}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_python_examples_are_python(block: Block) -> None:
    ast.parse(block.text, filename=str(block))


def test_every_python_dependency_has_its_line() -> None:
    project = PYPROJECT["project"]
    requirements = [
        *PYPROJECT["build-system"]["requires"],
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
        *(one for group in PYPROJECT["dependency-groups"].values() for one in group),
    ]
    names = {re.split(r"[^\w.-]", one, maxsplit=1)[0] for one in requirements}
    assert names - explained() == set()


def test_every_debian_package_has_its_line() -> None:
    setup = (ROOT / "scripts" / "setup.sh").read_text()
    tables = re.findall(r"^[A-Z]+='\n(.*?)^'$", setup, re.DOTALL | re.MULTILINE)
    packages = {line.split()[1] for table in tables for line in table.splitlines()}
    assert packages, "the tables of scripts/setup.sh are not where this test looks"
    assert packages - explained() == set()


def explained() -> set[str]:
    """Return the names in the first column of the tables in docs/dependencies.md."""
    text = (ROOT / "docs" / "dependencies.md").read_text()
    cells = re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    docs = ROOT / "docs"
    names = [str(page.relative_to(docs)) for page in docs.rglob("*.md")]
    missing = [name for name in names if f": {name}\n" not in navigation]
    assert missing == []


def test_the_rfc_example_is_in_the_readme_word_for_word() -> None:
    readme = (ROOT / "README.md").read_text()
    assert (
        '{"execute": "x-debug-device-event", "arguments": '
        '{"dev": "/machine/peripheral/vscsi0", "event": "kick", "queue": 3}}'
    ) in readme
    assert "x-debug-device-event /machine/peripheral/vscsi0 kick 3" in readme
