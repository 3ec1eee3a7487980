"""Does a path of another process lead to what that process means by it?"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from kickcall.vmm.find import in_root

if TYPE_CHECKING:
    from pathlib import Path

ROOT = f"/proc/{os.getpid()}/root"


@pytest.mark.parametrize(
    ("link", "target", "path", "expected"),
    [
        ("run", "/there", "run/qmp", "/there/qmp"),
        ("run", "there", "run/qmp", "{here}/there/qmp"),
        ("run", "../up", "run/qmp", "{here}/../up/qmp"),
        ("run", "../" * 40 + "top", "run/qmp", "/top/qmp"),
        ("run", "/there", "run/../qmp", "/qmp"),
        ("qmp", "/there/socket", "qmp", "/there/socket"),
        ("other", "/there", "run//./qmp", "{here}/run/qmp"),
    ],
)
def test_links_are_followed_inside_the_root(
    tmp_path: Path, link: str, target: str, path: str, expected: str
) -> None:
    (tmp_path / link).symlink_to(target)
    wanted = os.path.normpath(expected.format(here=os.path.realpath(tmp_path)))
    assert in_root(os.getpid(), f"{tmp_path}/{path}") == ROOT + wanted


def test_a_ring_of_links_comes_to_an_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert in_root(os.getpid(), f"{tmp_path}/a/qmp") == f"{ROOT}{tmp_path}/a/qmp"


def test_a_process_that_is_gone_has_its_path_as_it_is() -> None:
    assert in_root(2**22 + 1, "/run/qmp") == f"/proc/{2**22 + 1}/root/run/qmp"
