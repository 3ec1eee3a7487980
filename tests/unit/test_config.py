"""Does a configuration file mean what it says, and does a mistake name its line and key?"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kickcall.cli import main
from kickcall.watch.config import Config, ConfigError, load, parse
from kickcall.watch.policy import Budget, Rules
from markdown_pages import ROOT

PATH = Path("watch.toml")
SHIPPED = ROOT / "contrib" / "watch.toml"


def test_an_empty_file_asks_for_what_no_file_asks_for() -> None:
    assert parse("", PATH) == Config()
    assert Config().rules == Rules()


def test_what_is_said_is_asked_and_what_is_not_stays() -> None:
    config = parse(
        """
        machines = ["vm0", "qmp:/run/vm1.sock"]
        heal = "on"
        interval_s = 1
        journal = "/var/lib/kickcall/j.db"
        metrics = "9478"
        [healing]
        persist_s = 0.3
        machine.count = 7
        [healing.queue]
        window_s = 30
        """,
        PATH,
    )
    assert config.machines == ("vm0", "qmp:/run/vm1.sock")
    assert (config.heal, config.metrics) == ("on", "9478")
    assert config.settings.interval_s == 1.0
    assert config.journal == Path("/var/lib/kickcall/j.db")
    rules = Rules()
    assert config.rules.persist_s == 0.3
    assert config.rules.busy_persist_s == rules.busy_persist_s
    assert config.rules.queue == Budget(rules.queue.count, 30.0, rules.queue.refuted)
    assert config.rules.machine.count == 7
    assert config.rules.host == rules.host


MISTAKES = {
    'interval_s = "fast"': (1, "interval_s", "expected a number, got a text"),
    "\n# how often\ninterval_s = 0.001": (3, "interval_s", "expected a number >= 0.01"),
    "intervall_s = 1": (1, "intervall_s", "there is no such key; is `interval_s` meant?"),
    '\n\nheal = "yes"': (3, "heal", '\'yes\' is none of "off", "dry-run", "on"'),
    "heal = true": (1, "heal", "expected a text, got true or false"),
    'machines = "vm0"': (1, "machines", "expected a list, got a text"),
    'heal = "on"\nmachines = [\n  "vm0",\n  3,\n]': (
        2,
        "machines[1]",
        "expected a text, got a whole number",
    ),
    'metrics = "localhost"': (1, "metrics", "'localhost' is no address"),
    'journal = "j.db"': (1, "journal", "expected an absolute path"),
    "[healing]\npersist_s = 0": (2, "healing.persist_s", "expected a number >= 0.05"),
    "[healing]\nqueue.count = 0": (2, "healing.queue.count", "expected a whole number >= 1"),
    "[healing.queue]\n# many\ncount = 1.5": (
        3,
        "healing.queue.count",
        "expected a whole number, got a number",
    ),
    '["healing"]\n\nqueue = {count = 1, refutd = 2}': (
        3,
        "healing.queue.refutd",
        "there is no such key; is `refuted` meant?",
    ),
    "[healing.queue]\nwindow_s = nan": (2, "healing.queue.window_s", "expected a number"),
    "report_s = inf": (1, "report_s", "expected a number"),
    "[[healing]]": (1, "healing", "expected a table, got a list"),
    '"a.b" = 1': (1, "a.b", "there is no such key"),
    'journal = """\n/j\n"""\n[heeling]\n': (4, "heeling", "is `healing` meant?"),
}


@pytest.mark.parametrize(("text", "where"), MISTAKES.items(), ids=range(len(MISTAKES)))
def test_a_mistake_names_its_line_and_its_key(text: str, where: tuple[int, str, str]) -> None:
    line, key, what = where
    with pytest.raises(ConfigError) as caught:
        parse(text, PATH)
    said = str(caught.value)
    assert said.startswith(f"watch.toml line {line}: {key}: "), said
    assert what in said


@pytest.mark.parametrize(
    ("text", "line"),
    [("a = ", 1), ('\nheal = "on"\nheal = "off"', 3), ("heal = 'on", 1), ("x\n", 1), ("[a\n", 1)],
)
def test_what_is_no_toml_names_its_line(text: str, line: int) -> None:
    with pytest.raises(ConfigError, match=f"watch.toml line {line}: "):
        parse(text, PATH)


@given(st.text())
def test_whatever_the_file_holds_it_is_one_line_of_error_or_a_configuration(text: str) -> None:
    try:
        parse(text, PATH)
    except ConfigError as exc:
        assert str(exc)


def test_a_file_that_cannot_be_read_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "no.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b'heal = "on"\n\xff\n')
    with pytest.raises(ConfigError, match=r"binary.toml line 2: this is no UTF-8"):
        load(binary)
    huge = tmp_path / "huge.toml"
    huge.write_bytes(b"#" * 100_000)
    with pytest.raises(ConfigError, match="that is no configuration"):
        load(huge)


def check(path: Path) -> tuple[int, str]:
    result = CliRunner().invoke(main.app, ["watch", "--check-config", "--config", str(path)])
    error = result.exception
    assert error is None or isinstance(error, (SystemExit, ConfigError)), error
    if isinstance(error, ConfigError):
        return error.exit_code, str(error)
    return result.exit_code, result.output


def test_the_command_checks_a_file_and_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "watch.toml"
    path.write_text('heal = "on"\n')
    assert check(path) == (0, f"{path}: nothing is wrong with it\n")
    path.write_text('heal = "on"\nintervals = 1\n')
    status, said = check(path)
    assert status == 2
    assert f"{path} line 2: intervals: " in said


def test_the_file_that_is_shipped_is_right_and_tells_the_defaults() -> None:
    assert load(SHIPPED) == Config()
    # With every comment taken away from what it could say, it says the same.
    said = SHIPPED.read_text()
    uncommented = "\n".join(
        line.removeprefix("#") if line.startswith("#") and not line.startswith("# ") else line
        for line in said.splitlines()
    )
    config = parse(uncommented, SHIPPED)
    assert config.rules == Rules()
    assert config.settings == Config().settings
