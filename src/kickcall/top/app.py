"""The program behind `kickcall top`: the table of queues, and what its keys do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar

from rich.cells import set_cell_size
from textual.app import App
from textual.binding import Binding
from textual.widgets import Input

from kickcall.draw.lines import Line, Span
from kickcall.draw.text import printable, short
from kickcall.draw.tones import Tone
from kickcall.errors import KickcallError
from kickcall.model import DeviceEvent
from kickcall.top.rows import ORDERS, Row, Rows, columns, head_line, row_line
from kickcall.top.screens import Confirm, Help, QueueScreen, footer
from kickcall.top.widgets import Lines, Table

if TYPE_CHECKING:
    from textual.app import ComposeResult
    from textual.binding import BindingType

    from kickcall.model import Injection
    from kickcall.watch.feed import Source

KEYS = " ↑↓ move  Enter open  k kick  c call  / filter  s sort  ? help  q quit"


class Top(App[None]):
    """Draws a source every `every_s` seconds. `count` has kicks counted on all of its machines."""

    CSS = """
    Screen { background: ansi_default; color: ansi_default; layout: vertical; }
    #summary, #head, #said { height: 1; }
    #filter { height: 1; border: none; padding: 0 1; background: ansi_default;
              color: ansi_default; display: none; }
    #filter.open { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("q", "quit", "quit"),
        Binding("ctrl+c", "quit", "quit", priority=True),
        ("question_mark", "help", "help"),
        ("slash", "filter", "filter"),
        ("s", "sort", "sort"),
        ("k", "inject('kick')", "kick"),
        ("c", "inject('call')", "call"),
        ("escape", "no_filter", "no filter"),
    ]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, source: Source, *, every_s: float = 0.25, count: bool = False) -> None:
        # The terminal's own colours, light or dark.
        super().__init__(ansi_color=True)
        self._source = source
        self._every_s = every_s
        self._count = count
        self._rows = Rows()
        self._order = 0
        self._words = ""
        self._plan = columns(80)
        self._at = source.now
        self.frames = 0
        """How often the table was drawn."""
        self._summary, self._head, self._said = Lines("summary"), Lines("head"), Lines("said")
        self._table = Table(self._draw_row)
        self._filter = Input(id="filter", placeholder="machine, queue, verdict", compact=True)

    def compose(self) -> ComposeResult:
        yield from (self._summary, self._head, self._table, self._filter, self._said)
        yield footer(KEYS)

    def on_mount(self) -> None:
        self.title = "kickcall top"
        for one in (self._summary, self._head, self._said):
            one.can_focus = False
        self._table.focus()
        self.set_interval(self._every_s, self.draw)
        self.call_after_refresh(self.draw)

    def on_resize(self) -> None:
        self.call_after_refresh(self.draw)

    # --- drawing ---

    def draw(self) -> None:
        """Draw the table as everything is now."""
        if not self._table.is_attached:
            return  # it is being closed
        if len(self.screen_stack) > 1 and not isinstance(self.screen, Confirm):
            return  # nobody sees it
        self.frames += 1
        self._at = self._source.now
        self._plan = columns(self.size.width)
        machines = self._source.machines
        if self._count:
            for machine in machines:
                self._source.count(machine)
        rows = self._rows.chosen(machines, self._at, ORDERS[self._order], self._words)
        self._table.show(rows)
        self._head.show([head_line(self._plan)])
        self._summary.show([self._summary_line(len(machines), len(rows))])

    def _draw_row(self, row: Row) -> Line:
        return row_line(row, self._plan, self._at)

    def _summary_line(self, machines: int, shown: int) -> Line:
        stalled = self._rows.stalled
        told = f"{stalled} stalled" if stalled else "none stalled"
        filtered = f", {shown} shown: {printable(self._words, 20)}" if self._words else ""
        if not machines:
            told = "no QEMU runs here, or none that was asked for"
        return (
            Span(" kickcall top ", Tone.STRONG),
            Span(f" {machines} machine{'s' * (machines != 1)}, {self._rows.all} queues, "),
            Span(f"{'✗ ' * bool(stalled)}{told}", Tone.BAD if stalled else Tone.GOOD),
            Span(filtered, Tone.UNSURE),
            Span(f"  {problem}" if (problem := self._source.problem) else "", Tone.BAD),
            Span(f"  {ORDERS[self._order].name}  {time.strftime('%H:%M:%S')}", Tone.FAINT),
        )

    def say(self, text: str, tone: Tone = Tone.PLAIN) -> None:
        """Show one line above the keys, on whatever screen there is."""
        line = (Span(f" {set_cell_size(text, max(self.size.width - 2, 10))}", tone),)
        if isinstance(self.screen, QueueScreen):
            self.screen.say(line)
        self._said.show([line])

    # --- keys ---

    def action_help(self) -> None:
        """Show the help."""
        if not isinstance(self.screen, Help):
            self.push_screen(Help())

    def action_sort(self) -> None:
        """Sort by the next order."""
        self._order = (self._order + 1) % len(ORDERS)
        self.draw()

    def action_filter(self) -> None:
        """Ask for words."""
        if len(self.screen_stack) == 1:
            self._filter.add_class("open")
            self._filter.focus()

    def action_no_filter(self) -> None:
        """Leave the filter."""
        self._filter.value = ""
        self._close_filter("")

    def on_input_changed(self, event: Input.Changed) -> None:
        self._words = event.value
        self.draw()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._close_filter(event.value)

    def _close_filter(self, words: str) -> None:
        self._words = words
        self._filter.remove_class("open")
        self._table.focus()
        self.draw()

    def on_table_opened(self) -> None:
        row = self._table.chosen
        if row is None:
            return
        if row.queue is None:
            self.say(f"{printable(row.machine.name)} {row.name}: {row.why}", Tone.UNSURE)
        else:
            self.push_screen(QueueScreen(self._source, row, self._every_s))

    # --- injecting ---

    def action_inject(self, word: str) -> None:
        """Say what would be written, ask, and do it."""
        screen = self.screen
        if isinstance(screen, QueueScreen):
            row: Row | None = screen.row
        elif len(self.screen_stack) == 1:
            row = self._table.chosen
        else:
            return
        if row is None or row.queue is None:
            self.say("choose a queue first", Tone.UNSURE)
            return
        event = DeviceEvent(word)
        self.say(f"asking what a {event} of {row.name} would write …", Tone.FAINT)
        # Mapping a machine takes its time: not here.
        self.run_worker(lambda: self._prepare(row, event), thread=True, exclusive=True)

    def _prepare(self, row: Row, event: DeviceEvent) -> None:
        plan = self._raise(row, event, dry_run=True)
        if plan is not None:
            self.call_from_thread(self._ask, row, event, plan)

    def _ask(self, row: Row, event: DeviceEvent, plan: Injection) -> None:
        self.say("")

        def answered(yes: bool | None) -> None:
            if yes:
                self.run_worker(lambda: self._inject(row, event), thread=True)
            else:
                self.say("nothing was written")

        self.push_screen(Confirm(plan), answered)

    def _inject(self, row: Row, event: DeviceEvent) -> None:
        done = self._raise(row, event, dry_run=False)
        if done is not None:
            told, tone = outcome(done)
            self.call_from_thread(self.say, told, tone)

    def _raise(self, row: Row, event: DeviceEvent, *, dry_run: bool) -> Injection | None:
        assert row.queue is not None
        try:
            return self._source.raise_event(
                row.machine, row.device, row.queue.fixed.queue, event, dry_run=dry_run
            )
        except KickcallError as exc:
            self.call_from_thread(self.say, f"nothing was written: {printable(exc)}", Tone.BAD)
            return None


def outcome(done: Injection) -> tuple[str, Tone]:
    """Return in words what an injection did, and how good that is."""
    word = "kicked" if done.event is DeviceEvent.KICK else "called"
    where = f"{word} {short(done.device)} queue {done.queue} via {done.via}"
    before, after = done.before, done.after
    if before.used_idx != after.used_idx:
        return f"{where}: used.idx {before.used_idx} to {after.used_idx}", Tone.GOOD
    if before.avail_idx != after.avail_idx:
        return f"{where}: avail.idx {before.avail_idx} to {after.avail_idx}", Tone.GOOD
    return f"{where}: the rings' indices did not move", Tone.UNSURE
