"""Is what diagnose says drawn as it is, readable without colours, and with no name as markup?"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kickcall.diagnose.states import QueueFixed, QueueRole, Sample
from kickcall.draw.lines import evidence_lines, path_lines, plain, ring_line
from kickcall.draw.path import Step, path_picture
from kickcall.draw.ring import Part, ring_picture
from kickcall.draw.spark import spark_points, sparkline
from kickcall.draw.svg import COLOURS, path_svg, ring_svg
from kickcall.draw.text import duration, escaped, printable, rate
from kickcall.draw.tones import Tone, severity, tone_of
from kickcall.model import BackendKind, DeviceEvent, Evidence, Layout, Verdict, VerdictKind
from nasty import NASTY

LOST_KICK = Verdict(
    device="/machine/peripheral/vub0",
    queue=1,
    verdict=VerdictKind.LOST_KICK,
    hop=3,
    since_s=0.8,
    evidence=(
        Evidence("because", "The driver had to kick, and no kick waits to be read.", 1.0),
        Evidence("avail.idx", 302, 1.0),
        Evidence("used.idx", 301, 1.0),
        Evidence("kick notifier count", 0, 1.0),
    ),
    remedy="kickcall kick vm0 vub0 --queue 1",
    event=DeviceEvent.KICK,
)
FIXED = QueueFixed(
    "/machine/peripheral/vub0",
    1,
    128,
    Layout.SPLIT,
    True,
    BackendKind.QEMU,
    QueueRole.REQUEST,
    True,
)
SAMPLE = Sample(
    at=1.0,
    avail_idx=302,
    used_idx=290,
    last_avail_idx=299,
    avail_flags=0,
    used_flags=0,
    used_event=284,
    avail_event=299,
    kick_count=0,
    call_count=0,
)


def test_a_lost_kick_breaks_the_path_at_its_third_hop() -> None:
    steps = [hop.step for hop in path_picture(LOST_KICK).hops]
    assert steps == [Step.TAKEN] * 2 + [Step.BROKEN] + [Step.NOT_REACHED] * 7


def test_nothing_is_said_of_hops_where_nothing_is_known() -> None:
    unknown = replace(LOST_KICK, verdict=VerdictKind.UNKNOWN, hop=0)
    assert {hop.step for hop in path_picture(unknown).hops} == {Step.UNKNOWN}


def test_what_was_read_stands_at_the_hop_that_it_tells_of() -> None:
    values = {hop.number: hop.values for hop in path_picture(LOST_KICK).hops}
    assert values[1] == "avail.idx 302"
    assert values[3] == "count 0"
    assert values[6] == "used.idx 301"


def test_the_text_says_without_colour_where_it_broke_and_what_to_do() -> None:
    picture = path_picture(LOST_KICK, "vm0")
    text = plain([*path_lines(picture), *evidence_lines(picture)])
    assert "vm0 vub0 queue 1: ✗ lost-kick on hop 3, observed, for 0.8 s" in text
    assert re.search(r"✗  3 kicked .*broken here", text)
    assert text.count("broken here") == 1
    assert "next: kickcall kick vm0 vub0 --queue 1" in text


@pytest.mark.parametrize("verdict", VerdictKind)
def test_every_verdict_fits_a_terminal_of_80_columns(verdict: VerdictKind) -> None:
    long = replace(
        LOST_KICK,
        verdict=verdict,
        hop=8 if verdict.stalled else 0,
        evidence=(Evidence("because", "long " * 60, 1.0), Evidence("x" * 90, "y" * 90, 1.0)),
    )
    picture = path_picture(long)
    for line in plain([*path_lines(picture), *evidence_lines(picture)]).splitlines():
        assert len(line) <= 80


@pytest.mark.parametrize("tall", [False, True])
def test_the_drawing_says_in_words_what_it_shows(tall: bool) -> None:
    root = ElementTree.fromstring(path_svg(path_picture(LOST_KICK), tall=tall))
    texts = ["".join(one.itertext()) for one in root.iter() if one.tag.endswith("text")]
    assert "✗ lost-kick on hop 3" in texts
    assert texts.count("broken") == 1
    broken = [one for one in root.iter() if one.get("class") == "broken"]
    assert [one.get("data-hop") for one in broken] == ["3"]
    assert "no kick waits" in (root.get("aria-label") or "")


def test_a_drawing_without_style_may_stand_on_a_page_that_forbids_inline_styles() -> None:
    svg = path_svg(path_picture(LOST_KICK)) + ring_svg(ring_picture(FIXED, SAMPLE))
    assert "<style" not in svg and "style=" not in svg and "<script" not in svg


def test_the_ring_is_parted_by_whose_turn_it_is() -> None:
    ring = ring_picture(FIXED, SAMPLE)
    assert [(arc.part, arc.count) for arc in ring.arcs] == [
        (Part.REAP, 6),
        (Part.DEVICE, 9),
        (Part.FETCH, 3),
    ]
    assert ring.outstanding == 12
    assert plain([ring_line(ring)]).endswith("6 to reap, 9 in the device, 3 to fetch of 128")


def test_work_is_only_outstanding_where_nobody_tells_what_was_fetched() -> None:
    ring = ring_picture(FIXED, replace(SAMPLE, last_avail_idx=None))
    assert ring.count(Part.OUTSTANDING) == 12


def test_a_packed_ring_is_drawn_from_its_offsets() -> None:
    fixed = replace(FIXED, layout=Layout.PACKED)
    sample = replace(
        SAMPLE,
        avail_flags=2,
        avail_idx=2,
        last_avail_idx=2,
        used_idx=126 | 0x8000,
        used_event=126 | 0x8000,
    )
    ring = ring_picture(fixed, sample)
    assert [(arc.part, arc.count) for arc in ring.arcs] == [(Part.DEVICE, 4)]
    assert ring.positions()[2] == ("completed", "126w1")


INDEX = st.none() | st.integers(0, 0xFFFF)


@given(
    layout=st.sampled_from(Layout),
    size=st.integers(0, 32768),
    values=st.lists(INDEX, min_size=7, max_size=7),
)
def test_no_ring_is_too_broken_to_be_drawn(
    layout: Layout, size: int, values: list[int | None]
) -> None:
    fixed = replace(FIXED, layout=layout, size=size)
    avail, used, fetched, avail_flags, used_flags, used_event, avail_event = values
    ring = ring_picture(
        fixed,
        Sample(1.0, avail, used, fetched, avail_flags, used_flags, used_event, avail_event, 0, 0),
    )
    ElementTree.fromstring(ring_svg(ring))
    assert len(plain([ring_line(ring)])) < 120
    assert sum(arc.count for arc in ring.arcs) <= max(size, 0)


@pytest.mark.parametrize("name", NASTY, ids=ascii)
def test_no_name_gets_through_as_anything_but_text(name: str) -> None:
    hostile = replace(
        LOST_KICK,
        device=name,
        remedy=name,
        evidence=tuple(Evidence(name, name, 1.0) for _ in range(3)),
    )
    picture = path_picture(hostile, name)
    for text in (printable(name), plain([*path_lines(picture), *evidence_lines(picture)])):
        for char in text.replace("\n", ""):
            assert unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
    for svg in (path_svg(picture), path_svg(picture, tall=True), path_svg(picture, styled=True)):
        root = ElementTree.fromstring(svg)
        tags = {one.tag.removeprefix("{http://www.w3.org/2000/svg}") for one in root.iter()}
        assert tags <= {"svg", "g", "path", "rect", "text", "style", "circle"}
        allowed = {"class", "x", "y", "d", "width", "height", "rx", "viewBox", "role"}
        allowed |= {"aria-label", "data-hop", "text-anchor", "transform"}
        assert {key for one in root.iter() for key in one.attrib} <= allowed
    assert not set(escaped(name)) & set("<>\"'")
    assert len(printable(name)) <= 301


def test_colour_is_never_alone() -> None:
    marks = {tone_of(kind): path_picture(replace(LOST_KICK, verdict=kind)).mark for kind in KINDS}
    assert len(set(marks.values())) == len(marks)
    assert severity(VerdictKind.LOST_KICK) > severity(VerdictKind.UNKNOWN)
    assert tone_of(VerdictKind.IDLE) is Tone.FAINT


KINDS = (VerdictKind.LOST_KICK, VerdictKind.UNKNOWN, VerdictKind.PROGRESSING, VerdictKind.IDLE)


def test_sparklines_tell_nothing_from_little() -> None:
    assert sparkline([0, 1, 8], 5) == "  ·▁█"
    assert sparkline([], 3) == "   "
    assert spark_points([0, 4], 10, 8, 3) == "5.0,8.0 10.0,0.0"


def test_numbers_are_written_as_people_read_them() -> None:
    assert [duration(s) for s in (None, 0.44, 12, 200, 9000)] == [
        "-",
        "0.4 s",
        "12 s",
        "3 min",
        "2 h",
    ]
    assert [rate(r) for r in (None, 0, 0.5, 12, 3400, 250_000)] == [
        "-",
        "0",
        "0.5",
        "12",
        "3.4k",
        "250k",
    ]
    assert rate(10, at_least=True) == "≥10"


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb, as WCAG 2.2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (
        one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_can_be_read_and_every_mark_be_seen(theme: str) -> None:
    sheet = COLOURS.partition(f':root[data-theme="{theme}"]')[2]
    colours = dict(re.findall(r"--kc-([a-z-]+):(#[0-9a-f]{6})", sheet.partition("}")[0]))
    for text in ("ink", "faint", "good", "busy", "unsure", "bad"):
        for paper in ("paper", "box"):
            assert contrast(colours[text], colours[paper]) >= 4.5, (text, paper)
    assert contrast(colours["bad"], colours["bad-box"]) >= 4.5
    assert contrast(colours["ink"], colours["bad-box"]) >= 4.5
    for arc in ("fetch", "device", "reap"):
        assert contrast(colours[arc], colours["track"]) >= 3.0, arc


PATH_PAGE = Path(__file__).resolve().parents[2] / "docs" / "img" / "path.svg"


def test_the_path_in_the_documentation_is_the_one_that_is_drawn() -> None:
    """KICKCALL_WRITE_DOCS=1 draws it anew."""
    drawn = path_svg(path_picture(replace(LOST_KICK, remedy="")), styled=True) + "\n"
    if os.environ.get("KICKCALL_WRITE_DOCS"):
        PATH_PAGE.write_text(drawn)
    assert PATH_PAGE.read_text() == drawn
