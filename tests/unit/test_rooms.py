"""Do imports go in one direction: does no room of the package import a higher one?"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kickcall

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "kickcall"
FILES = sorted(PACKAGE.rglob("*.py"))

NOUNS = {"model", "errors"}
CORE = NOUNS | {"virtio", "host", "vmm", "devices"}
# The package itself (`import kickcall`) is the public API: it stands where `attached` does.
PUBLIC = CORE | {"diagnose", "diagnosis", "attached", "kickcall"}
MAY_IMPORT = {
    "model": set(),
    "errors": {"model"},
    "virtio": NOUNS,
    "host": NOUNS,
    "diagnose": NOUNS | {"virtio"},
    "vmm": NOUNS | {"virtio", "host", "diagnose"},  # of `diagnose` only its nouns, `states`
    "devices": NOUNS | {"virtio", "host", "vmm"},
    "diagnosis": CORE | {"diagnose"},
    "attached": CORE | {"diagnose", "diagnosis"},
    "kickcall": CORE | {"attached"},
    "lab": PUBLIC,
    "qmp": PUBLIC,
    "draw": NOUNS | {"virtio", "diagnose"},
    "incident": PUBLIC | {"draw"},
    "watch": PUBLIC | {"draw", "incident"},
    "serve": PUBLIC | {"draw", "watch"},
    "top": PUBLIC | {"draw", "watch"},
    "cli": PUBLIC | {"lab", "qmp", "draw", "incident", "watch", "serve", "top"},
    "__main__": {"cli"},
}
DOES_IO = {
    "asyncio",
    "ctypes",
    "fcntl",
    "io",
    "mmap",
    "os",
    "pathlib",
    "select",
    "signal",
    "socket",
    "subprocess",
    "threading",
    "time",
}
PURE = (
    "virtio/",
    "diagnose/",
    "draw/",
    *(f"incident/{name}" for name in ("page", "plot", "redact", "summary", "tables")),
    "watch/policy",
)
ASYNCIO = ("qmp/", "serve/", "lab/relay", "vmm/monitor")
PRINTS = ("cli/", "top/")


def room(file: Path) -> str:
    """Return the room that a file of the package is in, as the table above names it."""
    first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "kickcall" if first == "__init__" else first


def imported(file: Path) -> set[str]:
    """Return the full names of the modules that a file imports, for types only or for real."""
    package = ["kickcall", *file.relative_to(PACKAGE).parent.parts]
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from kickcall import host` imports the room; `from kickcall import attach` the API.
            if module == "kickcall":
                names.update(f"kickcall.{alias.name}" for alias in node.names)
            else:
                names.add(module)
    return names


def rooms_imported(file: Path) -> set[str]:
    """Return the other rooms that a file imports from."""
    rooms = set()
    for name in imported(file):
        head, _, rest = name.partition(".")
        if head == "kickcall":
            first = rest.split(".")[0]
            rooms.add(first if first in MAY_IMPORT else "kickcall")
    return rooms - {room(file)}


def libraries_imported(file: Path) -> set[str]:
    """Return the top-level names of what a file imports from outside the package."""
    return {name.split(".")[0] for name in imported(file)} - {"kickcall"}


def is_in(file: Path, places: tuple[str, ...]) -> bool:
    return file.relative_to(PACKAGE).as_posix().startswith(places)


def name(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_room_imports_no_higher_room(file: Path) -> None:
    assert room(file) in MAY_IMPORT, "a room that the table does not know: where does it stand?"
    assert rooms_imported(file) - MAY_IMPORT[room(file)] == set()


@pytest.mark.parametrize("file", [f for f in FILES if is_in(f, PURE)], ids=name)
def test_what_is_pure_does_no_io(file: Path) -> None:
    assert libraries_imported(file) & DOES_IO == set()


@pytest.mark.parametrize("file", [f for f in FILES if room(f) == "vmm"], ids=name)
def test_vmm_takes_only_nouns_from_the_diagnosis(file: Path) -> None:
    taken = {module for module in imported(file) if module.startswith("kickcall.diagnose")}
    assert taken <= {"kickcall.diagnose.states"}


@pytest.mark.parametrize("file", [f for f in FILES if not is_in(f, ASYNCIO)], ids=name)
def test_the_core_is_synchronous(file: Path) -> None:
    assert "asyncio" not in libraries_imported(file)


@pytest.mark.parametrize("file", [f for f in FILES if not is_in(f, PRINTS)], ids=name)
def test_only_the_command_line_prints(file: Path) -> None:
    assert libraries_imported(file) & {"typer", "rich", "click"} == set()


@pytest.mark.parametrize("public", kickcall.__all__)
def test_no_module_takes_the_place_of_a_public_name(public: str) -> None:
    # Importing `kickcall.attach` the module would replace `kickcall.attach` the function.
    assert not (PACKAGE / f"{public}.py").exists()


def test_the_table_itself_has_one_direction() -> None:
    for lower, may in MAY_IMPORT.items():
        for higher in may:
            assert lower not in MAY_IMPORT[higher], f"{lower} and {higher} import each other"
