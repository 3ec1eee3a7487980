"""How do tests drive a browser, and where do the pictures in the documentation come from?

    KICKCALL_WRITE_DOCS=1 .venv/bin/python -m pytest tests/rig/test_live_views.py

writes them anew; without it nothing is written.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page
    from textual.app import App

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "img"
WRITING = bool(os.environ.get("KICKCALL_WRITE_DOCS"))
CHROMIUM = "/usr/bin/chromium"
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Run Debian's Chromium without a screen."""
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=list(_FLAGS), env={**_environment(), "HOME": folder}
        )
        try:
            yield browser
        finally:
            browser.close()


def _environment() -> dict[str, str | float | bool]:
    return dict(os.environ)


def keep_page(page: Page, name: str, *, whole: bool = False) -> None:
    """Keep a picture of a page in the documentation."""
    if WRITING:
        IMAGES.mkdir(exist_ok=True)
        page.screenshot(path=str(IMAGES / f"{name}.png"), full_page=whole)


def keep_terminal(app: App[None], name: str) -> None:
    """Keep a picture of a terminal in the documentation."""
    if WRITING:
        IMAGES.mkdir(exist_ok=True)
        svg = app.export_screenshot(title="kickcall top")
        # The documentation asks no other host for anything, fonts included.
        svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
        svg = svg.replace("Fira Code", "ui-monospace, DejaVu Sans Mono")
        (IMAGES / f"{name}.svg").write_text(svg)
