"""Write docs/rules.md: the table, the questions and the picture, all drawn from the rules.

.venv/bin/python scripts/draw_rules.py            # writes docs/rules.md
.venv/bin/python scripts/draw_rules.py --check    # exits with 1 where it is not up to date
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kickcall.diagnose import rules
from kickcall.diagnose.path import PATH
from kickcall.diagnose.rules import RULES
from kickcall.diagnose.view import View

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).resolve().parent.parent / "docs" / "rules.md"

_HEAD = """\
# The rules

<!-- Written by scripts/draw_rules.py from src/kickcall/diagnose/: do not edit. -->

A verdict is the first row of this table that holds. Sections are those of the virtio specification
1.4, where no other source is named. The words in the conditions are [questions](#the-questions)
that are asked of what was seen of the queue.

A *notification* that was owed has half a second to be noticed. A *device* has five seconds for work
that it may have in hand, and a driver whose virtual CPU is busy has the same: slow is not stuck.
Nothing is called stalled that was not looked at three times.

## On the path

"""


def conditions() -> list[str]:
    """Return the condition of every rule in RULES, as it is written there."""
    tree = ast.parse(inspect.getsource(rules))
    written = [
        ast.unparse(call.args[2].body)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "Rule"
        and isinstance(call.args[2], ast.Lambda)
    ]
    assert len(written) == len(RULES)
    return [re.sub(r"\bview\.", "", condition) for condition in written]


def picture() -> Iterator[str]:
    """Yield the path, hop by hop, with the verdicts that a break there gets."""
    yield "```text"
    yield f"{'who':<10} {'hop':<16} {'seen in':<26} if the path breaks here"
    for hop in PATH:
        found = dict.fromkeys(str(rule.verdict) for rule in RULES if rule.hop == hop.number)
        line = f"{hop.by:<10} {hop.number:>2} {hop.name:<13} {hop.seen_in:<26} "
        yield (line + (", ".join(found) or "·")).rstrip()
    found = dict.fromkeys(str(rule.verdict) for rule in RULES if not rule.hop)
    yield f"{'':<10} {'no hop':<16} {'':<26} {', '.join(found)}"
    yield "```"


def table() -> Iterator[str]:
    """Yield the table of rules."""
    yield "| # | verdict | hop | what was seen | holds when | source | a probe injects |"
    yield "| ---: | --- | ---: | --- | --- | --- | --- |"
    for number, (rule, condition) in enumerate(zip(RULES, conditions(), strict=True), 1):
        verdict = f"[{rule.verdict}](verdicts/{rule.verdict}.md)"
        event = "" if rule.event is None else str(rule.event)
        when = "otherwise" if condition == "True" else f"`{condition}`"
        yield (
            f"| {number} | {verdict} | {rule.hop or ''} | {rule.because} | {when} "
            f"| {rule.source} | {event} |"
        )


def questions() -> Iterator[str]:
    """Yield every question that the rules ask, with its answer in words."""
    asked = set(re.findall(r"\b[a-z_]+\b", " ".join(conditions())))
    for name in sorted(asked):
        member = getattr(View, name, None)
        function = getattr(member, "fget", None) or getattr(member, "func", None)
        if function is None:
            continue
        text = " ".join(inspect.cleandoc(function.__doc__ or "").split())
        yield f"`{name}`"
        yield f":   {text}"
        yield ""


def page() -> str:
    """Return docs/rules.md as it should be."""
    lines = [
        *picture(),
        "",
        "## The table",
        "",
        *table(),
        "",
        "## The questions",
        "",
        "`fixed` is what does not change about a queue, `track` what was seen of it so far, and "
        "`slow` what is looked up only when it looks stalled: `src/kickcall/diagnose/states.py`.",
        "",
        *questions(),
    ]
    return _HEAD + "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(PAGE.read_text() != page())
    PAGE.write_text(page())
