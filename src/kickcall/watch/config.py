"""What does a configuration file ask of a watcher, and if it makes no sense, on which line?"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec

from kickcall.diagnose.states import Thresholds
from kickcall.errors import UsageError
from kickcall.watch.address import address_of
from kickcall.watch.policy import Budget, Rules
from kickcall.watch.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

PATH: Final = Path("/etc/kickcall/watch.toml")
"""Where the service has it."""
_SIZE_MOST: Final = 64 << 10

Interval = Annotated[float, msgspec.Meta(ge=0.01, le=60)]
Short = Annotated[float, msgspec.Meta(ge=0.05, le=60)]
Long = Annotated[float, msgspec.Meta(ge=0.05, le=86400)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
Heal = Literal["off", "dry-run", "on"]


class ConfigError(UsageError):
    """The configuration file makes no sense; the message names the file, the line and the key."""


class BudgetTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`[healing.queue]`, `[healing.machine]`, `[healing.host]`: see Budget. What is not said stays
    as it is by default."""

    count: Count | None = None
    window_s: Long | None = None
    refuted: Count | None = None


class HealingTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`[healing]`: see Rules."""

    persist_s: Short | None = None
    busy_persist_s: Short | None = None
    pause_s: Short | None = None
    back_off_s: Long | None = None
    back_off_most_s: Long | None = None
    cool_down_s: Long | None = None
    queue: BudgetTable = msgspec.field(default_factory=BudgetTable)
    machine: BudgetTable = msgspec.field(default_factory=BudgetTable)
    host: BudgetTable = msgspec.field(default_factory=BudgetTable)


class ConfigTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The file, as it is written."""

    machines: tuple[str, ...] = ()
    heal: Heal = "off"
    interval_s: Interval | None = None
    notification_s: Short | None = None
    report_s: Short | None = None
    journal: str | None = None
    metrics: str | None = None
    bundles: bool = True
    healing: HealingTable = msgspec.field(default_factory=HealingTable)


@dataclass(frozen=True, slots=True)
class Config:
    """What is asked of a watcher."""

    machines: tuple[str, ...] = ()
    """Names, pids and so on; all of the host's if there is none."""
    heal: Heal = "off"
    settings: Settings = field(default_factory=Settings)
    rules: Rules = field(default_factory=Rules)
    journal: Path | None = None
    metrics: str | None = None
    """`[ADDR:]PORT`."""
    bundles: bool = True
    """Whether an incident bundle is written when a stall is found."""


def load(path: Path) -> Config:
    """Return what a file asks for. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            raw = file.read(_SIZE_MOST + 1)
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
    if len(raw) > _SIZE_MOST:
        raise ConfigError(f"{path} is larger than {_SIZE_MOST >> 10} KiB: that is no configuration")
    try:
        text = raw.decode()
    except UnicodeDecodeError as exc:
        line = raw[: exc.start].count(b"\n") + 1
        raise ConfigError(f"{path} line {line}: this is no UTF-8") from exc
    return parse(text, path)


def parse(text: str, path: Path) -> Config:
    """Return what a file's text asks for. Raises ConfigError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        what, _, where = str(exc).rpartition(" (at ")
        at = re.match(r"line (\d+)", where)
        line = int(at[1]) if at else text.count("\n") + 1
        raise ConfigError(f"{path} line {line}: {(what or str(exc)).lower()}") from exc

    def wrong(keys: Sequence[str | int], what: str) -> ConfigError:
        name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)[1:]
        return ConfigError(f"{path} line {line_of(text, keys)}: {name}: {what}")

    if (keys := _not_finite(table)) is not None:
        raise wrong(keys, "expected a number, and this is none that can be waited for")
    try:
        said = msgspec.convert(table, ConfigTable)
    except msgspec.ValidationError as exc:
        raise wrong(*_mistake(str(exc))) from exc
    if said.metrics is not None:
        try:
            address_of(said.metrics)
        except UsageError as exc:
            raise wrong(["metrics"], str(exc)) from exc
    if said.journal is not None and not said.journal.startswith("/"):
        raise wrong(["journal"], "expected an absolute path")
    return Config(
        machines=said.machines,
        heal=said.heal,
        settings=_settings(said),
        rules=_rules(said.healing),
        journal=None if said.journal is None else Path(said.journal),
        metrics=said.metrics,
        bundles=said.bundles,
    )


def line_of(text: str, keys: Sequence[str | int]) -> int:
    """Return the line on which what `keys` lead to is first said, counted from 1.

    tomllib keeps no positions. But a text that is cut off behind a whole statement is TOML, too: so
    the line is the first with which `keys` lead somewhere.
    """
    lines = text.split("\n")

    def is_said(count: int) -> bool:
        for end in range(count, len(lines) + 1):
            try:
                table = tomllib.loads("\n".join(lines[:end]) + "\n")
            except tomllib.TOMLDecodeError:
                continue  # in the middle of a statement
            return _leads(table, keys)
        return True

    low, high = 1, len(lines)
    while low < high:
        middle = (low + high) // 2
        if is_said(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _leads(table: Any, keys: Sequence[str | int]) -> bool:
    for key in keys:
        try:
            table = table[key]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _not_finite(table: Any) -> list[str | int] | None:
    """Return the keys that lead to a `nan` or an `inf`: comparisons let the former pass."""
    if isinstance(table, float):
        return None if math.isfinite(table) else []
    items: Any = ()
    if isinstance(table, dict):
        items = table.items()
    elif isinstance(table, list):
        items = enumerate(table)
    for key, value in items:
        if (rest := _not_finite(value)) is not None:
            return [key, *rest]
    return None


_WORDS: Final = {
    "`float`": "a number",
    "`int`": "a whole number",
    "`str`": "a text",
    "`bool`": "true or false",
    "`array`": "a list",
    "`object`": "a table",
    "`null`": "nothing",
}


def _mistake(message: str) -> tuple[list[str | int], str]:
    """Return the keys that lead to a mistake, and what it is, of what msgspec says."""
    what, _, where = message.partition(" - at `$")
    keys: list[str | int] = [
        int(index) if index else name
        for name, index in re.findall(r"\.([^.\[\]`]+)|\[(\d+)\]", where)
    ]
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        near = difflib.get_close_matches(unknown[1], _known(keys), 1)
        hint = f"; is `{near[0]}` meant?" if near else ""
        return [*keys, unknown[1]], f"there is no such key{hint}"
    if invalid := re.fullmatch(r"Invalid enum value '?(.*?)'?", what, re.DOTALL):
        return keys, f"{invalid[1]!r} is none of " + ", ".join(
            f'"{one}"' for one in ("off", "dry-run", "on")
        )
    what = what.replace(" | null`", "`")
    for word, plain in _WORDS.items():
        what = what.replace(word, plain)
    return keys, what[:1].lower() + what[1:]


def _known(keys: Sequence[str | int]) -> tuple[str, ...]:
    """Return the keys that a table may have."""
    if not keys:
        return ConfigTable.__struct_fields__
    return (HealingTable if len(keys) == 1 else BudgetTable).__struct_fields__


def _settings(said: ConfigTable) -> Settings:
    settings = Settings()
    limits = settings.limits
    if said.notification_s is not None:
        limits = Thresholds(notification_s=said.notification_s)
    return Settings(
        interval_s=said.interval_s or settings.interval_s,
        limits=limits,
        report_s=said.report_s or settings.report_s,
    )


def _rules(said: HealingTable) -> Rules:
    rules = Rules()
    return Rules(
        persist_s=said.persist_s or rules.persist_s,
        busy_persist_s=said.busy_persist_s or rules.busy_persist_s,
        queue=_budget(said.queue, rules.queue),
        machine=_budget(said.machine, rules.machine),
        host=_budget(said.host, rules.host),
        pause_s=said.pause_s or rules.pause_s,
        back_off_s=said.back_off_s or rules.back_off_s,
        back_off_most_s=said.back_off_most_s or rules.back_off_most_s,
        cool_down_s=said.cool_down_s or rules.cool_down_s,
    )


def _budget(said: BudgetTable, budget: Budget) -> Budget:
    return Budget(
        said.count or budget.count,
        said.window_s or budget.window_s,
        said.refuted or budget.refuted,
    )
