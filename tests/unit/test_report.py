"""Does a report tell the stall, load and run nothing, and stay what it is whatever names hold?"""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from incident_facts import AT, incident, lines, verdict
from kickcall.cli import main
from kickcall.diagnose.states import QueueFixed, QueueRole
from kickcall.incident import archive
from kickcall.incident.archive import Member
from kickcall.incident.facts import Line, to_json
from kickcall.incident.page import page
from kickcall.incident.plot import by_queue, curve, plot_svg, plot_text
from kickcall.incident.report import members_of, report, told
from kickcall.model import BackendKind, Layout
from nasty import NASTY

if TYPE_CHECKING:
    from pathlib import Path

    from kickcall.incident.facts import Facts


class Reader(HTMLParser):
    """What is in a page: elements, attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def html(facts: Facts, name: str = "vm0") -> str:
    return page(facts, list(lines(name)))


def test_the_page_tells_machine_verdict_break_evidence_and_what_to_do() -> None:
    read = Reader(html(incident()))
    text = " ".join(read.text)
    for said in (
        "lost-kick on hop 3: vm0 vm0 queue 0",
        "Nobody kicked vm0.",
        "kickcall kick vm0 vm0 --queue 0",
        "broken",
        "avail.idx",
        "published",
        "7.2.22",
        "Linux 6.1.0 x86_64",
        "Notifiers",
        "1 word of it had a secret",
    ):
        assert said in text


def test_the_page_needs_nothing_else() -> None:
    read = Reader(html(incident()))
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert not [one for one in read.attributes if one[0] in ("src", "href", "action")]
    assert "url(" not in html(incident())
    assert "@import" not in html(incident())


@pytest.mark.parametrize("name", NASTY, ids=range(len(NASTY)))
def test_a_nasty_name_is_text_in_the_page(name: str) -> None:
    plain, nasty = Reader(html(incident("vm0"))), Reader(html(incident(name), name))
    assert nasty.tags == plain.tags
    assert [key for key, _ in nasty.attributes] == [key for key, _ in plain.attributes]
    assert all(char.isprintable() or char == "\n" for char in html(incident(name), name))


@pytest.mark.parametrize("name", NASTY, ids=range(len(NASTY)))
def test_a_nasty_name_is_text_in_the_mail(name: str) -> None:
    text = report(incident(name), list(lines(name)), "md")
    assert all(line.isprintable() for line in text.splitlines())
    for line in text.splitlines():
        outside = "" if line.startswith("    ") else "".join(line.split("`")[::2])
        assert "<" not in outside
        assert "](" not in outside


def test_a_machine_without_a_stall_has_a_report_too() -> None:
    text = html(incident(stalled=False))
    assert "vm0: no stall was found" in text
    assert "completed in" in text


def test_each_of_many_stalls_is_drawn_and_more_are_counted() -> None:
    many = tuple(verdict("vm0", queue=queue) for queue in range(20))
    text = html(replace(incident(), verdicts=many))
    assert "and 19 more" in text
    assert text.count('class="picture"') == 12
    assert "8 more stalls" in text


def queue(layout: Layout, size: int = 8) -> QueueFixed:
    return QueueFixed("d", 0, size, layout, True, BackendKind.QEMU, QueueRole.REQUEST, True)


def looks(*positions: tuple[int, int]) -> list[Line]:
    return [
        Line(AT + k, "d", 0, avail, used, None, 0, 0, None, None, kick_count=0, call_count=0)
        for k, (avail, used) in enumerate(positions)
    ]


def test_a_split_ring_s_indices_are_unwrapped() -> None:
    found = curve(queue(Layout.SPLIT), by_queue(looks((65534, 65533), (1, 65535), (3, 3), (5, 3))))
    assert found.times == (0.0, 1.0, 2.0, 3.0)
    assert found.completed == (0, 2, 6, 6)
    assert found.published == (1, 4, 6, 8)
    assert found.waiting == (1, 2, 0, 2)


def test_a_packed_ring_s_positions_are_unwrapped() -> None:
    # Offset in bits 0 to 14, wrap counter in bit 15, which is 1 at first (virtio 1.4, 2.8.10).
    one = 1 << 15
    found = curve(
        queue(Layout.PACKED),
        by_queue(looks((7 | one, 6 | one), (1, 7 | one), (2, 2), (3 | one, 7))),
    )
    assert found.completed == (0, 1, 4, 9)
    assert found.waiting == (1, 2, 0, 4)


@given(st.lists(st.tuples(st.integers(-10, 1 << 17), st.integers(-10, 1 << 17)), max_size=40))
def test_whatever_a_ring_says_a_curve_can_be_drawn(positions: list[tuple[int, int]]) -> None:
    for layout in Layout:
        found = curve(queue(layout), by_queue(looks(*positions)))
        assert all(0 <= waiting <= 8 for waiting in found.waiting)
        assert list(found.completed) == sorted(found.completed)
        Reader(plot_svg(found, "d"))
        assert plot_text(found, "d").count("\n") in (0, 2)


def test_a_long_film_makes_no_large_picture() -> None:
    many = looks(*((k % 65536, k % 65536) for k in range(20_000)))
    assert len(plot_svg(curve(queue(Layout.SPLIT), by_queue(many)), "d")) < 60_000


def bundle(folder: Path, facts: Facts, *, samples: bytes | None = None) -> Path:
    if samples is None:
        samples = b"".join(msgspec.json.encode(line) + b"\n" for line in lines())
    path = folder / "b.tar.gz"
    members = [Member("facts.json", to_json(facts)), Member("samples.jsonl", samples)]
    archive.write(path, members, at=AT)
    return path


def test_a_bundle_s_file_becomes_a_report(tmp_path: Path) -> None:
    path = bundle(tmp_path, incident())
    assert told(members_of(path)) == (incident(), list(lines()))
    done = CliRunner().invoke(main.app, ["report", str(path), "--out", str(tmp_path / "r.html")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "r.html").read_text() == html(incident())
    assert (tmp_path / "r.html").stat().st_mode & 0o777 == 0o600
    done = CliRunner().invoke(main.app, ["report", str(path), "--format", "md"])
    assert done.output == report(incident(), list(lines()), "md")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "pdf"], "html or md"),
        (["--out", "exists.html"], "exists"),
        (["--out", "none/r.html"], "cannot write"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exists.html").write_text("mine")
    done = CliRunner().invoke(main.app, ["report", str(bundle(tmp_path, incident())), *words])
    assert said in str(done.exception)
    assert (tmp_path / "exists.html").read_text() == "mine"


@pytest.mark.parametrize("name", ["facts.json", "samples.jsonl"])
def test_a_bundle_of_somebody_s_own_making_is_refused(tmp_path: Path, name: str) -> None:
    content: dict[str, Any] = {"facts.json": to_json(incident()), "samples.jsonl": b""}
    content[name] = b'{"at": "' + b"x" * 1000
    archive.write(
        tmp_path / "b.tar.gz", [Member(key, text) for key, text in content.items()], at=AT
    )
    done = CliRunner().invoke(main.app, ["report", str(tmp_path / "b.tar.gz"), "--format", "md"])
    assert f"{name} is not as kickcall writes it" in str(done.exception)
