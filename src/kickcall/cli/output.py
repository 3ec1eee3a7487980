"""How facts are printed: one table style for people, one JSON document for programs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

    from kickcall.model import Layout


def working(text: str) -> AbstractContextManager[object]:
    """Show on a terminal's stderr that something takes its time; nothing where nobody looks."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else nullcontext()


def print_json(value: Any) -> None:
    """Print `value` (dataclasses included) as one JSON document."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under their columns. Columns whose name starts with `#` are numbers.

    Names come from machines and may hold anything: they are printed as text, control characters
    left out, never as markup.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            column.removeprefix("#"),
            justify="right" if column.startswith("#") else "left",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        # A pipe has no width; a table that is cut to 80 columns loses what was asked for.
        console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())


def index_text(layout: Layout | None, value: int | None) -> str | None:
    """Return an index as people read it: a packed position as OFFSET, `w` and wrap counter."""
    if value is None:
        return None
    return str(value) if layout == "split" else f"{value & 0x7FFF}w{value >> 15}"


def plain(value: object) -> str:
    """Return `value` as text without control characters; `-` where it is not known."""
    if value is None:
        return "-"
    return "".join(char if char.isprintable() else "�" for char in str(value))
