"""How are lines of spans shown in a terminal, and how does one scroll through them?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.segment import Segment
from rich.style import Style
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from kickcall.draw.tones import Tone

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from textual import events

    from kickcall.draw.lines import Line
    from kickcall.top.rows import Row

STYLES: dict[Tone, Style] = {
    Tone.PLAIN: Style(),
    Tone.STRONG: Style(bold=True),
    Tone.FAINT: Style(dim=True),
    Tone.GOOD: Style(color="green"),
    Tone.BUSY: Style(color="cyan"),
    Tone.UNSURE: Style(color="magenta"),
    Tone.BAD: Style(color="red", bold=True),
}
"""The terminal's own colours: they suit it, light or dark."""


def strip(line: Line, width: int, reversed_spans: int = 0) -> Strip:
    """Return a line as Textual shows it, cut or filled to `width` cells."""
    segments = [
        Segment(
            span.text, STYLES[span.tone] + _REVERSE if n < reversed_spans else STYLES[span.tone]
        )
        for n, span in enumerate(line)
    ]
    return Strip(segments).adjust_cell_length(width, Style())


_REVERSE = Style(reverse=True)
_CHOSEN = 2
"""Spans of a chosen row that are reversed: verdict and names, but no sparklines."""


class Lines(Widget, can_focus=True):
    """Lines that scroll. `pinned` of them stay at the top."""

    DEFAULT_CSS = "Lines { height: 1fr; }"

    def __init__(self, id: str, *, pinned: int = 0) -> None:
        super().__init__(id=id)
        self._lines: Sequence[Line] = ()
        self._pinned = pinned
        self._top = 0

    def show(self, lines: Sequence[Line], pinned: int = 0) -> None:
        """Show other lines, at the same place."""
        self._lines, self._pinned = lines, pinned
        self.scroll_lines(0)

    def scroll_lines(self, by: int) -> None:
        """Scroll by so many lines."""
        most = max(0, len(self._lines) - self.size.height)
        self._top = min(max(self._top + by, 0), most)
        self.refresh()

    def render_line(self, y: int) -> Strip:
        number = y if y < self._pinned else y + self._top
        line = self._lines[number] if number < len(self._lines) else ()
        return strip(line, self.size.width)

    def on_key(self, event: events.Key) -> None:
        page = max(self.size.height - self._pinned - 1, 1)
        steps = {"up": -1, "down": 1, "pageup": -page, "pagedown": page}
        steps |= {"home": -(1 << 30), "end": 1 << 30}
        if (step := steps.get(event.key)) is not None:
            event.stop()
            self.scroll_lines(step)

    def on_mouse_scroll_down(self) -> None:
        self.scroll_lines(3)

    def on_mouse_scroll_up(self) -> None:
        self.scroll_lines(-3)


class Table(Widget, can_focus=True):
    """The rows, one of them chosen. Only those that are seen are ever drawn."""

    DEFAULT_CSS = "Table { height: 1fr; }"

    class Opened(Message):
        """Enter was pressed on a row."""

    def __init__(self, draw: Callable[[Row], Line]) -> None:
        super().__init__(id="table")
        self._draw = draw
        self._rows: Sequence[Row] = ()
        self._top = 0
        self._at = 0
        self._followed: tuple[str, str, int] | None = None
        """The row that was chosen, wherever it goes; None: whatever stands at the top."""

    @property
    def chosen(self) -> Row | None:
        """The row under the cursor."""
        return self._rows[self._at] if self._at < len(self._rows) else None

    def show(self, rows: Sequence[Row]) -> None:
        """Show these rows; the cursor stays on the row that it is on."""
        self._rows = rows
        if self._followed is not None:
            found = (place for place, row in enumerate(rows) if row.id == self._followed)
            self._at = next(found, min(self._at, max(len(rows) - 1, 0)))
        else:
            self._at = 0
        self._keep_in_sight()
        self.refresh()

    def choose(self, place: int) -> None:
        """Put the cursor on a row."""
        if not self._rows:
            return
        self._at = min(max(place, 0), len(self._rows) - 1)
        self._followed = self._rows[self._at].id if self._at else None
        self._keep_in_sight()
        self.refresh()

    def _keep_in_sight(self) -> None:
        height = max(self.size.height, 1)
        self._top = min(self._top, self._at, max(len(self._rows) - height, 0))
        self._top = max(self._top, self._at - height + 1, 0)

    def render_line(self, y: int) -> Strip:
        place = self._top + y
        if place >= len(self._rows):
            return Strip.blank(self.size.width)
        chosen = _CHOSEN if place == self._at else 0
        return strip(self._draw(self._rows[place]), self.size.width, chosen)

    def on_resize(self) -> None:
        self._keep_in_sight()

    def on_key(self, event: events.Key) -> None:
        page = max(self.size.height - 1, 1)
        steps = {"up": -1, "down": 1, "pageup": -page, "pagedown": page}
        steps |= {"home": -(1 << 30), "end": 1 << 30}
        if (step := steps.get(event.key)) is not None:
            event.stop()
            self.choose(self._at + step)
        elif event.key == "enter":
            event.stop()
            self.post_message(self.Opened())

    def on_click(self, event: events.Click) -> None:
        place = self._top + event.y
        if place == self._at and self._followed is not None:
            self.post_message(self.Opened())
        self.choose(place)

    def on_mouse_scroll_down(self) -> None:
        self.choose(self._at + 3)

    def on_mouse_scroll_up(self) -> None:
        self.choose(self._at - 3)
