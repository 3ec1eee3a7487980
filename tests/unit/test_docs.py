"""Does the documentation say what is true: commands, links, dependencies?"""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from typing import TYPE_CHECKING, Any

import pytest

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


def complaint(command: Any, words: list[str]) -> str | None:
    """Return what the command line would object to in `words`, or None.

    Walks the command objects themselves and calls nothing: typer has its own copy of click.
    """
    subcommands: dict[str, Any] = getattr(command, "commands", {})
    options = {
        name: parameter
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("-")
    }
    positionals = [p for p in command.params if p.param_type_name == "argument"]
    given = 0
    rest = iter(words)
    for word in rest:
        if word == "--help":
            return None
        if word == "--":
            given += len(list(rest))
        elif word.startswith("-"):
            name, _, value = word.partition("=")
            if name not in options:
                return f"no option {name}"
            parameter = options[name]
            if getattr(parameter, "is_flag", False):
                continue
            value = value or next(rest, "")
            if not value:
                return f"{name} wants a value"
            choices = [str(getattr(c, "value", c)) for c in getattr(parameter.type, "choices", ())]
            if choices and value not in choices:
                return f"{name} is one of {', '.join(choices)}"
        elif subcommands:
            if word not in subcommands:
                return f"no command {word}"
            return complaint(subcommands[word], list(rest))
        else:
            given += 1
    if subcommands and words:
        return "a command is missing"
    required = sum(1 for p in positionals if p.required)
    endless = any(p.nargs == -1 for p in positionals)
    if given < required or (given > len(positionals) and not endless):
        return f"{given} arguments, {required} to {len(positionals)} wanted"
    return None


@pytest.mark.parametrize(
    ("where", "words"), [pytest.param(*shown, id=shown[0]) for shown in shown_commands()]
)
def test_a_command_in_the_documentation_is_one_that_kickcall_has(
    where: str, words: list[str]
) -> None:
    main = pytest.importorskip("kickcall.cli.main", reason="there is no command line yet")
    from typer.main import get_command

    assert complaint(get_command(main.app), words) is None, where


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
    missing = [p.name for p in (ROOT / "docs").rglob("*.md") if f": {p.name}\n" not in navigation]
    assert missing == []


def test_the_rfc_example_is_in_the_readme_word_for_word() -> None:
    readme = (ROOT / "README.md").read_text()
    assert (
        '{"execute": "x-debug-device-event", "arguments": '
        '{"dev": "/machine/peripheral/vscsi0", "event": "kick", "queue": 3}}'
    ) in readme
    assert "x-debug-device-event /machine/peripheral/vscsi0 kick 3" in readme
