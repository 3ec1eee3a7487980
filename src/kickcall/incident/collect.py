"""What is put into a bundle, and in which order? Each part fails alone, and the bundle says why.

The threads first: what they do now is gone soonest. Then the machine is mapped, and watched while
a diagnosis is made; then the monitor is asked, and last come the threads once more.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

import kickcall
from kickcall.attached import attach
from kickcall.errors import KickcallError
from kickcall.host import snapshot
from kickcall.host.eventfds import eventfds_of, holders_of
from kickcall.host.processes import comm
from kickcall.incident import facts as nouns
from kickcall.incident.archive import Member, safe_name
from kickcall.incident.film import Film
from kickcall.incident.redact import redact, scrub
from kickcall.incident.seen import Seen
from kickcall.incident.summary import summary
from kickcall.incident.threads import shots_of, threads_text
from kickcall.model import BackendKind, DeviceEvent
from kickcall.vmm.find import resolve
from kickcall.vmm.recorder import Recording
from kickcall.vmm.told import told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kickcall.attached import AttachedDevice, AttachedMachine
    from kickcall.host.snapshot import ThreadShot
    from kickcall.model import Machine, Verdict

_MONITOR_S = 1.0
_BACKENDS_MOST = 8
"""Processes beside the VMM whose threads are looked at."""
_STACK_MOST = 6
"""Functions of a kernel stack that stand in the facts; the text has all."""
_FRAME_START = "[<"
_SCALE = os.sysconf("SC_CLK_TCK")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Collected:
    """A bundle before it is a file."""

    facts: nouns.Facts
    members: list[Member]
    """SUMMARY.md first."""


@dataclass
class _Parts:
    """What has been collected so far. A part that fails is put down with its reason."""

    tell: Callable[[str], None]
    members: list[Member] = field(default_factory=list)
    missing: list[nouns.Missing] = field(default_factory=list)
    removed: set[str] = field(default_factory=set)

    def put(self, name: str, content: str | bytes, what: str) -> None:
        if isinstance(content, str):
            content = content.encode(errors="backslashreplace")
        self.members.append(Member(name, content, what))

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.tell(name)
        try:
            yield
        except (KickcallError, OSError) as exc:
            self.lacks(name, str(exc))
        except Exception as exc:  # a bundle without this part is better than none
            self.lacks(name, f"{type(exc).__name__}: {exc}")

    def lacks(self, name: str, why: str) -> None:
        self.missing.append(nouns.Missing(name, why))


def collect(
    target: str | int,
    *,
    by: str,
    duration_s: float = 2.0,
    tell: Callable[[str], None] = lambda _: None,
    seen: Seen | None = None,
    journal: Callable[[str], list[dict[str, Any]]] | None = None,
) -> Collected:
    """Collect what a developer would ask for of a machine. Reads only, and stops nothing.

    `by` says who asks. `tell` is told what is done next. `journal` returns the journal's entries of
    a machine by its name. Raises KickcallError only where there is no such machine.
    """
    started, seen = time.time(), seen or Seen()
    machine, _ = resolve(target)
    parts = _Parts(tell)
    shown = redact(machine.command)
    parts.removed |= shown.removed
    parts.put("command-line.txt", "\n".join(shown.arguments) + "\n", "QEMU's, secrets removed")
    before = _threads(parts, "threads-1.txt", machine, (), "what the threads did at first")
    if seen.threads:
        parts.put("threads-0.txt", seen.threads, "what they did when the stall was found")
    if seen.lines:
        lines = b"".join(msgspec.json.encode(line) + b"\n" for line in seen.lines)
        parts.put("samples-before.jsonl", lines, "how the queues stood before the stall was found")
    found = _Found(machine)
    with parts.part("attaching to the machine"), attach(target) as attached:
        found.machine, found.run_state = attached.info, attached.run_state
        _look(parts, found, attached, duration_s)
    if not found.notifiers:
        with parts.part("QEMU's eventfds"):
            states = {str(fd): state for fd, state in eventfds_of(machine.pid).items()}
            parts.put("eventfds.json", nouns.to_json(states), "all of QEMU's, by descriptor")
    backends = [_process(parts, pid) for pid in found.backends]
    after = _threads(parts, "threads-2.txt", machine, found.backends, "what they did at the end")
    with parts.part("QEMU's process"):
        parts.put("process.txt", snapshot.process_text(machine.pid), "/proc/PID of QEMU")
    with parts.part("the host"):
        booted = redact(["-append", snapshot.text_or_why("/proc/cmdline")])
        text = f"{snapshot.host_text()}\n== /proc/cmdline, secrets removed\n{booted.arguments[1]}"
        parts.put("host.txt", text, "kernel, load, modules")
    with parts.part("the host's interrupts"):
        parts.put("interrupts.txt", snapshot.interrupts_text(), "lines of /proc/interrupts")
    entries = None
    if journal is not None:
        with parts.part("the journal"):
            entries = tuple(journal(machine.name))
    facts = nouns.Facts(
        format=nouns.FORMAT,
        kickcall=kickcall.__version__,
        by=by,
        at=started,
        took_s=round(time.time() - started, 3),
        machine=nouns.MachineFacts(
            name=machine.name,
            pid=machine.pid,
            version=found.machine.version,
            run_state=found.run_state,
            running_s=_running_s(machine),
            command=shown.arguments,
            removed=shown.count,
        ),
        host=nouns.HostFacts(*snapshot.host_words()),
        verdicts=found.verdicts,
        found=seen.found,
        devices=tuple(found.devices),
        notifiers=tuple(found.notifiers),
        hidden_processes=found.hidden,
        backends=tuple(backends),
        threads=tuple(_thread_facts(before, after)),
        counts=found.counts,
        journal=entries,
        missing=tuple(parts.missing),
    )
    return Collected(facts, _finished(parts, facts))


@dataclass
class _Found:
    """What the machine's map and its queues told."""

    machine: Machine
    run_state: str = ""
    verdicts: tuple[Verdict, ...] = ()
    devices: list[nouns.DeviceFacts] = field(default_factory=list)
    notifiers: list[nouns.NotifierFacts] = field(default_factory=list)
    hidden: int = 0
    backends: tuple[int, ...] = ()
    counts: tuple[nouns.CountFacts, ...] | None = None


def _look(parts: _Parts, found: _Found, attached: AttachedMachine, duration_s: float) -> None:
    offset = time.time() - time.monotonic()
    session = attached._session
    film: Film | None = None
    with contextlib.ExitStack() as stack:
        recording = None
        with parts.part("the flight recorder"):
            recording = stack.enter_context(Recording(session, events=True))
        with contextlib.ExitStack() as filming:
            with parts.part("samples of the queues"):
                film = filming.enter_context(Film(session, recording, offset))
            with parts.part(f"a diagnosis, {duration_s:g} s or more"):
                found.verdicts = attached.diagnose(duration_s=duration_s)
        if recording is not None:
            with parts.part("the flight recorder's counts"):
                found.counts = _counts(recording, offset)
    if film is not None:
        parts.put("samples.jsonl", film.text, f"{film.looks} looks at the queues")
        if film.problem:
            parts.lacks("samples of the queues", f"they ended early: {film.problem}")
        if recording is not None:
            events = [msgspec.to_builtins(one) for one in film.events]
            for one in events:
                one["at"] = round(one["at"] + offset, 6)
            text = b"".join(msgspec.json.encode(one) + b"\n" for one in events)
            parts.put("trace.jsonl", text, "kicks and calls as the kernel saw them, the latest")
    with parts.part("the queues"):
        found.devices = [_device(one, film) for one in attached.devices()]
    with parts.part("the notifiers"):
        found.notifiers, found.hidden = _notifiers(attached)
        found.backends = _backends(found)
    with parts.part("the monitor"):
        first = [(one.device, one.queue) for one in found.verdicts if one.verdict.stalled]
        with session.borrow(_MONITOR_S) as monitor:
            _put_told(parts, dict(told(monitor, session.devices, first)))


def _put_told(parts: _Parts, answers: dict[str, Any]) -> None:
    structured = {key: said for key, said in answers.items() if not isinstance(said, str)}
    parts.put("qemu.json", nouns.to_json(structured), "what QEMU's monitor says (QMP)")
    for question, said in answers.items():
        if isinstance(said, str):
            name = safe_name(question.removeprefix("info ").replace(" ", ""))
            text = said.replace("\r\n", "\n")
            parts.put(f"qemu-{name}.txt", text, f"`{question}` of the human monitor")


def _counts(recording: Recording, offset: float) -> tuple[nouns.CountFacts, ...]:
    return tuple(
        nouns.CountFacts(
            one.device,
            one.queue,
            one.event,
            one.total,
            None if one.last_at is None else round(one.last_at + offset, 6),
            ", ".join(f"{who.by} {who.comm}[{who.tid}] {who.total}" for who in one.by[:4]),
        )
        for one in recording.counts().values()
    )


def _device(one: AttachedDevice, film: Film | None) -> nouns.DeviceFacts:
    info = one.info
    fixed = {} if film is None else {(each.device, each.queue): each for each in film.queues}
    latest = {} if film is None else film.latest
    queues = [
        nouns.QueueFacts(fixed[key], queue.state(), latest.get(key))
        for queue in one.queues()
        if (key := (info.path, queue.map.index)) in fixed
    ]
    return nouns.DeviceFacts(
        device=info.path,
        id=info.id,
        kind=info.kind,
        backend=info.backend,
        layout=info.layout,
        num_queues=info.num_queues,
        driver_ok=info.driver_ok,
        broken=info.broken,
        vhost_started=info.vhost_started,
        features=tuple(sorted(info.features)),
        refusal=one.refusal,
        queues=tuple(queues),
    )


def _notifiers(attached: AttachedMachine) -> tuple[list[nouns.NotifierFacts], int]:
    seen = []
    for device in attached.devices():
        for queue in device.queues():
            state = queue.state()
            for event, notifier, now in (
                (DeviceEvent.KICK, queue.map.kick, state.kick),
                (DeviceEvent.CALL, queue.map.call, state.call),
            ):
                if notifier is not None and now is not None:
                    seen.append((device.info, queue.map.index, event, notifier, now))
    holders, hidden = holders_of({notifier.eventfd_id for _, _, _, notifier, _ in seen})
    return [
        nouns.NotifierFacts(
            info.path,
            info.id,
            index,
            event,
            notifier.eventfd_id,
            notifier.fd,
            now.count,
            now.flags,
            now.semaphore,
            tuple(one for one in holders[notifier.eventfd_id] if one.pid != os.getpid()),
        )
        for info, index, event, notifier, now in seen
    ], hidden


def _backends(found: _Found) -> tuple[int, ...]:
    """Return the processes that serve queues from outside, those of stalled ones first."""
    stalled = {(one.device, one.queue) for one in found.verdicts if one.verdict.stalled}
    outside = {one.device for one in found.devices if one.backend == BackendKind.VHOST_USER}
    held = sorted(found.notifiers, key=lambda one: (one.device, one.queue) not in stalled)
    pids = [
        holder.pid
        for one in held
        if one.device in outside
        for holder in one.holders
        if holder.pid != found.machine.pid and holder.comm != "kickcall"
    ]
    return tuple(dict.fromkeys(pids))[:_BACKENDS_MOST]


def _process(parts: _Parts, pid: int) -> nouns.ProcessFacts:
    shown = redact(snapshot.command_of(pid))
    parts.removed |= shown.removed
    return nouns.ProcessFacts(pid, comm(pid), shown.arguments)


def _threads(
    parts: _Parts, name: str, machine: Machine, others: tuple[int, ...], what: str
) -> list[ThreadShot]:
    shots: list[ThreadShot] = []
    with parts.part("threads"):
        shots = shots_of(machine.pid, others, workers=True)
        parts.put(name, threads_text(shots), what)
    return shots


def _thread_facts(before: list[ThreadShot], after: list[ThreadShot]) -> Iterator[nouns.ThreadFacts]:
    was = {one.tid: one for one in before}
    for one in after:
        moved = one.tid in was and was[one.tid].switches != one.switches
        yield nouns.ThreadFacts(
            one.pid, one.tid, one.comm, one.state, one.waits_in, one.wchan, _frames(one), moved
        )


def _frames(one: ThreadShot) -> tuple[str, ...]:
    lines = [line for line in one.stack.splitlines() if line.startswith(_FRAME_START)]
    return tuple(line.partition("] ")[2].partition("+")[0] for line in lines[:_STACK_MOST])


def _running_s(machine: Machine) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        uptime = float(snapshot.file_text("/proc/uptime").split()[0])
        return round(uptime - machine.start_time / _SCALE, 1)
    return None


def _finished(parts: _Parts, facts: nouns.Facts) -> list[Member]:
    """Return all members in the order in which they are read, with every secret taken out."""
    files = sorted(parts.members, key=lambda one: one.name)
    whole = Member("facts.json", nouns.to_json(facts), "all of the summary, for programs")
    first = Member("SUMMARY.md", summary(facts, [whole, *files]).encode(), "this")
    return [
        Member(one.name, scrub(one.content, parts.removed), one.what)
        for one in (first, whole, *files)
    ]
