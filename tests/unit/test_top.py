"""Does `kickcall top` show the worst first, and write nothing without a yes?"""

from __future__ import annotations

import asyncio
import time
import unicodedata
from typing import TYPE_CHECKING, Any

import pytest
from rich.cells import cell_len

from kickcall.model import DeviceEvent
from kickcall.top.app import Top
from nasty import NASTY
from recorded import Recorded, RecordedMachine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from textual.pilot import Pilot


def shown(app: Top) -> list[str]:
    """Return what stands on the screen, line by line."""
    lines = app.screen._compositor.render_strips()
    return ["".join(segment.text for segment in line) for line in lines]


async def comes(app: Top, pilot: Pilot[Any], *words: str) -> str:
    """Return what stands on the screen once all of `words` do: threads of the program's write it,
    too."""
    deadline = time.monotonic() + 30
    while True:
        text = "\n".join(shown(app))
        if all(word in text for word in words):
            return text
        assert time.monotonic() < deadline, (words, text)
        await pilot.pause(0.05)


def drive(
    source: Recorded,
    steps: Callable[[Top, Pilot[Any]], Awaitable[None]],
    size: tuple[int, int] = (80, 24),
) -> None:
    """Run the program on a terminal of that size while `steps` presses its keys."""

    async def run() -> None:
        app = Top(source, every_s=30.0)  # a drawing that never rests would keep the pilot waiting
        async with app.run_test(size=size) as pilot:
            await pilot.pause(0.1)
            await comes(app, pilot, "kickcall top  ")
            await steps(app, pilot)

    asyncio.run(run())


def test_the_worst_stands_first_and_says_so_in_a_word() -> None:
    source = Recorded(3)
    source.recorded[2].stall(1, source.now)

    async def steps(app: Top, pilot: Pilot[Any]) -> None:
        lines = shown(app)
        assert "3 machines, 12 queues, ✗ 1 stalled" in lines[0]
        assert lines[2].startswith("✗ lost-kick")
        assert "vm002" in lines[2]
        assert "blk0:1" in lines[2]

    drive(source, steps)


def test_a_queue_opens_with_its_path_and_the_break() -> None:
    source = Recorded()
    source.recorded[0].stall(1, source.now)

    async def steps(app: Top, pilot: Pilot[Any]) -> None:
        await pilot.press("enter")
        text = await comes(app, pilot, "vm000 blk0 queue 1", "1 to fetch of 256")
        assert "vm000 blk0 queue 1: ✗ lost-kick on hop 3" in text
        assert text.count("broken here") == 1
        assert " 10 reaped" in text
        assert "1 to fetch of 256" in text
        await pilot.press("escape")
        await comes(app, pilot, "VERDICT")
        assert "VERDICT" in shown(app)[1]

    drive(source, steps)


@pytest.mark.parametrize(("key", "event"), [("k", DeviceEvent.KICK), ("c", DeviceEvent.CALL)])
@pytest.mark.parametrize("opened", [False, True])
def test_nothing_is_written_before_a_yes(key: str, event: DeviceEvent, opened: bool) -> None:
    source = Recorded()
    source.recorded[0].stall(1, source.now)

    async def steps(app: Top, pilot: Pilot[Any]) -> None:
        if opened:
            await pilot.press("enter")
            await comes(app, pilot, "1 to fetch of 256")
        device = "/machine/peripheral/blk0"
        question = f"{event.value.capitalize()} queue 1 of blk0 on vm000?"
        await pilot.press(key)
        await comes(app, pilot, question, "1 into eventfd 37 (fd 20 of process 1000)")
        await pilot.press("n")
        await comes(app, pilot, "nothing was written")
        assert source.raised == [("vm000", device, 1, event, True)]
        await pilot.press(key)
        await comes(app, pilot, question)
        await pilot.press("y")
        await comes(app, pilot, "used.idx 11 to 12")
        assert source.raised[-1] == ("vm000", device, 1, event, False)

    drive(source, steps)


def test_what_cannot_be_written_is_said() -> None:
    source = Recorded()
    source.refuse = "the map is stale"

    async def steps(app: Top, pilot: Pilot[Any]) -> None:
        await pilot.press("k")
        await comes(app, pilot, "nothing was written: the map is stale")

    drive(source, steps)


def test_a_filter_leaves_what_has_all_its_words() -> None:
    source = Recorded(12)
    source.recorded[3].stall(0, source.now)

    async def steps(app: Top, pilot: Pilot[Any]) -> None:
        await pilot.press("slash", *"lost vm003", "enter")
        await comes(app, pilot, "1 shown: lost vm003")
        lines = shown(app)
        assert "1 shown: lost vm003" in lines[0]
        assert "vm003" in lines[2]
        assert lines[3].strip() == ""
        await pilot.press("escape")
        await comes(app, pilot, "vm000")
        assert shown(app)[3].strip() != ""

    drive(source, steps)


def test_the_cursor_stays_on_its_queue_when_the_order_changes() -> None:
    source = Recorded(3)

    async def steps(app: Top, pilot: Pilot[Any]) -> None:
        await pilot.press("down", "down")
        source.recorded[2].stall(3, source.now)
        app.draw()
        await comes(app, pilot, "lost-kick")
        assert "vm002" in shown(app)[2]
        await pilot.press("k")
        await comes(app, pilot, "Kick queue 2 of blk0 on vm000?")
        assert source.raised[0][:3] == ("vm000", "/machine/peripheral/blk0", 2)

    drive(source, steps)


def test_help_names_every_key() -> None:
    async def steps(app: Top, pilot: Pilot[Any]) -> None:
        await pilot.press("question_mark")
        await comes(app, pilot, "Enter", "filter", "sort", "kick", "Esc", "quit")

    drive(Recorded(), steps)


def test_a_host_without_machines_is_told_so() -> None:
    async def steps(app: Top, pilot: Pilot[Any]) -> None:
        assert "no QEMU runs here" in shown(app)[0]

    drive(Recorded(0), steps)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_every_line_fits_the_terminal(width: int) -> None:
    source = Recorded(2)
    source.recorded[0].stall(1, source.now)
    source.play(source.now)

    async def steps(app: Top, pilot: Pilot[Any]) -> None:
        assert {cell_len(line) for line in shown(app)} == {width}
        if width >= 80:
            assert "age" in shown(app)[1]
            assert ("kick/s" in shown(app)[1]) == (width >= 100)

    drive(source, steps, (width, 24))


def test_no_name_steers_the_terminal() -> None:
    source = Recorded(0)
    for number, name in enumerate(NASTY):
        source.recorded.append(RecordedMachine(number, 1, name or "x", device=name))
        source.recorded[-1].stall(0, source.now)

    async def steps(app: Top, pilot: Pilot[Any]) -> None:
        assert_harmless(app)
        await pilot.press("end", "enter")
        assert_harmless(app)
        await pilot.press("k")
        await pilot.pause(0.1)
        assert_harmless(app)

    drive(source, steps, (80, len(NASTY) + 6))


def assert_harmless(app: Top) -> None:
    for line in shown(app):
        assert cell_len(line) == 80
        for char in line:
            assert unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
