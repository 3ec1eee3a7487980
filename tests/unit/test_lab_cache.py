"""Can two processes share the lab's cache, and does half-built work never show in it?"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from kickcall.errors import LabError
from kickcall.lab.cache import built, cache_folder, run_tool, tool

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KICKCALL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_follows_kickcall_cache_then_xdg_then_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("KICKCALL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "kickcall"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "kickcall"


def test_two_at_once_build_once_and_both_see_the_whole() -> None:
    builds: list[Path] = []
    seen: list[list[str]] = []

    def build(folder: Path) -> None:
        builds.append(folder)
        (folder / "first").touch()
        time.sleep(0.1)
        (folder / "second").touch()

    def use() -> None:
        seen.append(sorted(path.name for path in built("thing", build).iterdir()))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert seen == [["first", "second"]] * 4


def test_a_build_that_fails_leaves_nothing_and_may_be_tried_again(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise LabError("no network")

    with pytest.raises(LabError, match="no network"):
        built("thing", fail)
    assert [path.name for path in cache.iterdir()] == [".thing.lock"]
    assert built("thing", lambda folder: (folder / "whole").touch()).is_dir()


def test_a_missing_tool_names_its_debian_package() -> None:
    with pytest.raises(LabError, match="apt-get install unheard-of-package"):
        tool("no-such-program-here", "unheard-of-package")


def test_a_tool_that_fails_says_what_it_was_for_and_its_last_words() -> None:
    with pytest.raises(LabError, match=r"looking failed: ls said: .*nowhere.*\(try elsewhere\)"):
        run_tool(["ls", "/nowhere"], doing="looking", hint="try elsewhere")
