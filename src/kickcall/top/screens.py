"""The screens of `kickcall top`: a queue, the question before an injection, the help."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual.containers import Vertical
from textual.screen import ModalScreen, Screen

from kickcall.draw.lines import Line, Span, evidence_lines, path_lines, ring_line, wrapped
from kickcall.draw.path import path_picture
from kickcall.draw.spark import sparkline
from kickcall.draw.text import duration, printable, rate, short
from kickcall.draw.tones import Tone
from kickcall.model import DeviceEvent
from kickcall.top.widgets import Lines

if TYPE_CHECKING:
    from textual.app import ComposeResult
    from textual.binding import BindingType

    from kickcall.model import Injection
    from kickcall.top.rows import Row
    from kickcall.watch.feed import Source

_ON_THE_ROW = 10
"""Lines of the ten hops: they stay in sight while the evidence scrolls."""

HELP = """
  What you see
    Every queue of every machine, worst first. ✗ is stalled, ? is not known,
    ✓ moves, · rests: the word beside it says the same.
    req/s, done/s   what the driver published and the device completed; ≥ where
                    a packed ring may have moved on by whole laps unseen
    out             published and not completed, now and in the last half minute
    age             how long the oldest of them has waited (at least)
    kick/s, call/s  where the kernel counts them: on a wide terminal, for a
                    machine that was named or opened

  Keys
    ↑ ↓ PgUp PgDn   move; Enter opens a queue: its path, the break, the evidence
    k   c           kick, call: asks first, and says what will be written
    /               filter: words that must all occur in machine, queue or verdict
    s               sort: worst, name, outstanding, age, requests
    Esc             back; leaves the filter
    ?   q           this help; quit

  Nothing is ever written unless you confirm it. Every injection is in
  `kickcall journal`.
"""


def footer(text: str) -> Lines:
    """Return a line of keys."""
    lines = Lines("keys")
    lines.styles.height = 1
    lines.can_focus = False
    lines.show([(Span(text, Tone.FAINT),)])
    return lines


class QueueScreen(Screen[None]):
    """One queue: the path with its break, the ring, the evidence."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("escape", "app.pop_screen", "back"),
        ("k", "app.inject('kick')", "kick"),
        ("c", "app.inject('call')", "call"),
    ]

    def __init__(self, source: Source, row: Row, every_s: float) -> None:
        super().__init__()
        self._source = source
        self.row = row
        self._every_s = every_s

    def compose(self) -> ComposeResult:
        yield Lines("queue")
        yield Lines("said")
        yield footer(" Esc back  k kick  c call  ↑↓ scroll  ? help  q quit")

    def on_mount(self) -> None:
        self.query_one("#said").styles.height = 1
        self.query_one("#queue").focus()
        self.set_interval(self._every_s, self.update_lines)
        self.update_lines()

    def say(self, line: Line) -> None:
        """Show what came of an injection."""
        self.query_one("#said", Lines).show([line])

    def update_lines(self) -> None:
        """Draw it as it is now."""
        machine, queue = self.row.machine, self.row.queue
        width = self.size.width
        if queue not in machine.queues or queue is None:
            why = machine.why_not or "it was set up anew, or unplugged: go back"
            self.query_one("#queue", Lines).show(
                [(Span(f"{printable(machine.name)} {self.row.name}: {why}", Tone.UNSURE),)]
            )
            return
        at = self._source.now
        not_counted = self._source.count(machine)
        picture = path_picture(machine.verdict(queue, at), machine.name)
        spark = max(min(width - 60, 40), 10)
        age = queue.age(at)
        kicks, calls = rate(queue.kicks_s), rate(queue.calls_s)
        rates = (
            f"  {rate(queue.requests_s, at_least=queue.at_least)} requests/s, "
            f"{rate(queue.completions_s, at_least=queue.at_least)} completions/s, "
            + (f"{kicks} kicks/s, {calls} calls/s" if kicks != "-" else "kicks: not counted")
        )
        lines = path_lines(picture, width)
        lines += [
            (Span("  "), *ring_line(queue.ring(), max(min(width - 56, 40), 12))),
            (
                Span(f"  out {queue.outstanding:>5} "),
                Span(sparkline(tuple(queue.works), spark), Tone.BUSY),
                Span(f"  age {duration(age):>6} "),
                Span(sparkline(tuple(queue.ages), spark, most=1.0), picture.tone),
            ),
            (Span(rates, Tone.FAINT),),
            *evidence_lines(picture, width),
        ]
        if not_counted:
            lines += [(Span(f"  {text}", Tone.FAINT),) for text in wrapped(not_counted, width - 2)]
        self.query_one("#queue", Lines).show(lines, len(path_lines(picture, width)))


class Confirm(ModalScreen[bool]):
    """Says what will be written, and asks."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("y", "dismiss(True)", "write"),
        ("n", "dismiss(False)", "leave"),
        ("escape", "dismiss(False)", "leave"),
    ]
    DEFAULT_CSS = """
    Confirm { align: center middle; background: transparent; }
    Confirm > Vertical { width: 72; max-width: 100%; height: auto; border: heavy ansi_red;
                         padding: 0 1; background: ansi_default; }
    Confirm Lines { height: auto; }
    """

    def __init__(self, plan: Injection) -> None:
        super().__init__()
        self._plan = plan

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Lines("question")

    def on_mount(self) -> None:
        lines = question_lines(self._plan)
        asked = self.query_one("#question", Lines)
        asked.styles.height = len(lines)
        asked.show(lines)


def question_lines(plan: Injection) -> list[Line]:
    """Return what will be written, in words, and the question."""
    way = "kick" if plan.event is DeviceEvent.KICK else "call"
    does = {
        "kick": "The device will look at what the driver published.",
        "call": "The driver will look at what the device completed.",
    }[way]
    title = f"{way.capitalize()} queue {plan.queue} of {short(plan.device)}"
    now = ", ".join(
        f"{name} {printable(value)}"
        for name, value in (
            ("count", plan.before.count),
            ("avail.idx", plan.before.avail_idx),
            ("used.idx", plan.before.used_idx),
        )
    )
    return [
        (Span(f"{title} on {printable(plan.machine)}?", Tone.STRONG),),
        (),
        *((Span(text),) for text in wrapped(f"Will be written, via {plan.via}:", 68)),
        *((Span(f"  {text}"),) for text in wrapped(_written(plan), 64)),
        (Span(f"  now: {now}", Tone.FAINT),),
        (Span(does),),
        (),
        (Span("y", Tone.STRONG), Span(" write it    "), Span("n", Tone.STRONG), Span(" leave it")),
    ]


def _written(plan: Injection) -> str:
    what = "1 into " if plan.via == "eventfd" else ""
    return f"{what}{printable(plan.target)}"


class Help(ModalScreen[None]):
    """The help."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("escape,question_mark,enter", "dismiss", "back"),
    ]
    DEFAULT_CSS = "Help { background: ansi_default; }"

    def compose(self) -> ComposeResult:
        yield Lines("help")

    def on_mount(self) -> None:
        lines: list[Line] = []
        for text in HELP.splitlines():
            title = text.startswith("  ") and not text.startswith("   ")
            lines.append((Span(text, Tone.STRONG if title else Tone.PLAIN),))
        shown = self.query_one("#help", Lines)
        shown.show(lines)
        shown.focus()
