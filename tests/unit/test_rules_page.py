"""Do the pages on the rules and the verdicts say what the rules say?"""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING

import pytest

from kickcall.diagnose.rules import RULES
from kickcall.diagnose.states import InterruptPath, QueueFixed, Sample, SlowFacts
from kickcall.model import VerdictKind
from markdown_pages import ROOT

if TYPE_CHECKING:
    from types import ModuleType

VERDICTS = ROOT / "docs" / "verdicts"


@pytest.fixture(scope="module")
def draw_rules() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_rules", ROOT / "scripts/draw_rules.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_rules_is_what_the_script_draws(draw_rules: ModuleType) -> None:
    written = (ROOT / "docs" / "rules.md").read_text()
    assert written == draw_rules.page(), "run .venv/bin/python scripts/draw_rules.py"


def test_every_question_of_a_rule_is_answered_in_words(draw_rules: ModuleType) -> None:
    page = (ROOT / "docs" / "rules.md").read_text()
    asked = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", " ".join(draw_rules.conditions())))
    plain = {
        *QueueFixed.__slots__,
        *Sample.__slots__,
        *SlowFacts.__slots__,
        *InterruptPath.__slots__,
    }
    for name in asked - plain:
        assert f"\n`{name}`\n:   " in page, name


@pytest.mark.parametrize("verdict", list(VerdictKind))
def test_every_verdict_has_a_page_with_its_hops(verdict: VerdictKind) -> None:
    page = (VERDICTS / f"{verdict}.md").read_text()
    assert page.startswith(f"# {verdict}\n")
    opening = page.split("## What")[0]
    hops = {rule.hop for rule in RULES if rule.verdict is verdict} - {0}
    said = {int(number) for number in re.findall(r"[Hh]op (\d+)", opening)}
    assert said == hops
    assert ("No hop" in opening) == (not hops)


def test_the_index_lists_every_verdict_with_its_hops() -> None:
    index = (VERDICTS / "index.md").read_text()
    for verdict in VerdictKind:
        hops = sorted({rule.hop for rule in RULES if rule.verdict is verdict} - {0})
        assert f"[{verdict}]({verdict}.md) | {', '.join(map(str, hops))} |" in index
