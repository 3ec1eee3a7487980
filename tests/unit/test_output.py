"""Is what kickcall prints harmless on a terminal and exact for a program, whatever it names?"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import unicodedata
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kickcall.cli.output import plain, print_json, print_table
from kickcall.model import Counters, DeviceEvent, Holder, Via

if TYPE_CHECKING:
    from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    with redirect_stdout(io.StringIO()) as out:
        print_table(columns, rows)
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0, "0"),
        ("", ""),
        (DeviceEvent.KICK, "kick"),
        ("vm\x1b[31m0", "vm�[31m0"),
        ("a\nb\tc\r", "a�b�c�"),
        ("\u202evil", "�vil"),  # text that runs backwards
        ("vm-ö-日本", "vm-ö-日本"),
        ("[red]vm0[/red]", "[red]vm0[/red]"),
    ],
)
def test_a_value_is_shown_as_plain_text(value: object, shown: str) -> None:
    assert plain(value) == shown


@given(st.text())
def test_no_control_character_reaches_a_terminal(text: str) -> None:
    shown = plain(text)
    assert not any(unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp") for char in shown)
    assert len(shown) == len(text)


def test_names_are_never_markup_in_a_table() -> None:
    lines = table(("NAME", "#PID"), [("[bold]vm0[/bold]", 7), ("[link=x]", 42)])
    assert any("[bold]vm0[/bold]" in line for line in lines)
    assert any("[link=x]" in line for line in lines)


def test_numbers_stand_at_the_right_under_their_heading() -> None:
    lines = table(("NAME", "#COUNT"), [("a", 5), ("b", 12345)])
    heading = next(line for line in lines if "NAME" in line)
    assert "#" not in heading
    ends = {len(line) for line in lines if line.strip()[0] in "abN"}
    assert len(ends) == 1, lines


def test_a_pipe_gets_long_cells_uncut() -> None:
    path = "/machine/peripheral/" + "x" * 100
    assert any(path in line for line in table(("PATH", "NAME"), [(path, "vm0")]))


def test_what_is_not_known_is_a_dash() -> None:
    assert table(("A", "B"), [("x", None)])[-1].split() == ["x", "-"]


def printed(value: object) -> str:
    with redirect_stdout(io.StringIO()) as out:
        print_json(value)
    return out.getvalue()


def test_json_is_one_document_with_the_fields_names() -> None:
    text = printed({"holders": (Holder(7, "qemu", 12),), "now": Counters(1, None, 2)})
    assert json.loads(text) == {
        "holders": [{"pid": 7, "comm": "qemu", "fd": 12}],
        "now": {"count": 1, "avail_idx": None, "used_idx": 2},
    }
    assert text.endswith("}\n")


def test_words_of_an_enumeration_are_strings_in_json() -> None:
    assert json.loads(printed([DeviceEvent.CALL, Via.EVENTFD])) == ["call", "eventfd"]


def test_numbers_in_json_are_exact_up_to_a_full_counter() -> None:
    assert json.loads(printed({"count": 2**64 - 2})) == {"count": 18446744073709551614}


@given(st.text(st.characters(blacklist_categories=["Cs"])))
def test_any_name_survives_json(text: str) -> None:
    assert json.loads(printed({"name": text})) == {"name": text}
    assert "\x1b" not in printed({"name": text})


def test_printing_nothing_imports_no_table_library() -> None:
    # `kickcall --help` must not pay for it; `rich` is loaded by the first table only.
    code = "import sys, kickcall.cli.output; print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
