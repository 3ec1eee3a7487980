"""What do the README and the pages under docs/ contain: code blocks, links, headings?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = "<!-- run -->"
"""Stands on the line before a Python block that must work against a real machine `vm0`."""

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>\w*)")
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced code block."""

    page: Path
    line: int
    """Of the first line inside the fence, counted from 1."""
    language: str
    text: str
    run: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Return every Markdown file that a user reads."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """Return the fenced code blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    at = 0
    while at < len(lines):
        fence = _FENCE.match(lines[at])
        at += 1
        if fence is None:
            continue
        start = at
        while not lines[at].strip().startswith(fence["fence"]):
            at += 1
        inside = [line.removeprefix(fence["indent"]) for line in lines[start:at]]
        above = lines[start - 2].strip() if start >= 2 else ""
        found.append(
            Block(page, start + 1, fence["language"], "\n".join(inside) + "\n", above == RUN)
        )
        at += 1
    return found


def prose(page: Path) -> str:
    """Return a page without its code."""
    return re.sub(r"`[^`\n]+`", "", _without_blocks(page))


def links(page: Path) -> list[str]:
    """Return where the links of a page lead."""
    return [match["target"] for match in _LINK.finditer(prose(page))]


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings get (Python-Markdown's toc slugs)."""
    headings = re.findall(r"^#+ +(.+)$", _without_blocks(page), re.MULTILINE)
    return {_slug(heading) for heading in headings}


def _without_blocks(page: Path) -> str:
    return re.sub(r"^ *(`{3,}).*?^ *\1 *$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def _slug(heading: str) -> str:
    plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"[-\s]+", "-", plain)
