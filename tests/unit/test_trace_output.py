"""Does `kickcall trace` print what was counted: readable for people, documented for programs?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from kickcall.cli.trace import _Run, _short_time, _who
from kickcall.errors import MachineGoneError
from kickcall.model import (
    BackendKind,
    Device,
    DeviceEvent,
    Notification,
    NotificationCount,
    Signalled,
    Signaller,
)
from kickcall.vmm.recorder import Which

if TYPE_CHECKING:
    import pytest

KICK, CALL = DeviceEvent.KICK, DeviceEvent.CALL
PATH = "/machine/peripheral/vscsi0"
VSCSI0 = Device(
    path=PATH,
    kind="vhost-scsi",
    backend=BackendKind.VHOST_KERNEL,
    num_queues=4,
    features=frozenset(),
    driver_ok=True,
    broken=False,
    vhost_started=True,
)


def counted(event: DeviceEvent, *by: Signalled) -> NotificationCount:
    return NotificationCount(
        device=PATH,
        queue=3,
        event=event,
        eventfd_id=104,
        total=sum(one.total for one in by),
        last_at=max((one.last_at for one in by), default=None),
        by=by,
    )


GUEST = (
    Signalled(Signaller.GUEST, 567, 571, "CPU 0/KVM", 20, 100.5),
    Signalled(Signaller.GUEST, 567, 572, "CPU 1/KVM", 10, 100.6),
)
VHOST = Signalled(Signaller.VHOST, 580, 580, "vhost-567", 30, 100.7)


class Recorded:
    """Stands in for a kernel that has counted these, and recorded one kick and its call."""

    started_at = 0.0
    dropped = 0

    def __init__(self, *counts: NotificationCount, gone: bool = False) -> None:
        self._counts = {Which(one.device, one.queue, one.event): one for one in counts}
        self._gone = gone

    def counts(self) -> dict[Which, NotificationCount]:
        return self._counts

    def events(self, *, last: bool = False) -> tuple[list[Notification], bool]:
        if not last:
            return [], False
        kick = Notification(1.0, PATH, 3, KICK, Signaller.GUEST, 567, 571, "CPU 0/KVM", None)
        call = Notification(
            1.25, PATH, 3, CALL, Signaller.VHOST, 580, 580, "vhost-567\n{}", 0.000084
        )
        return [kick, call], False

    def follow(self) -> tuple[str, ...]:
        if self._gone:
            raise MachineGoneError("process 567 ended since it was attached")
        return ()


def run(recorded: Recorded, *, as_json: bool, events: bool = False) -> _Run:
    """Print as a run of no length does."""
    device = SimpleNamespace(info=VSCSI0, refusal="")
    attached = SimpleNamespace(info=SimpleNamespace(name="vm0", pid=567), devices=lambda: (device,))
    made = _Run(cast("Any", attached), cast("Any", recorded), json=as_json)
    made.go(0.0 if not recorded._gone else 1e9, events=events)
    return made


def test_a_table_has_a_line_for_each_notification_and_who_raised_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(Recorded(counted(KICK, *GUEST), counted(CALL, VHOST)), as_json=False).print_table(
        None, None
    )
    kick, call = re.findall(r"^ vscsi0 +3 .*$", capsys.readouterr().out, re.M)
    # The guest's processors are one guest.
    assert re.search(r" kick +30 .* guest 30$", kick.rstrip())
    assert re.search(r" call +30 .* vhost 30$", call.rstrip())


def test_what_was_never_raised_is_said_to_be_zero(capsys: pytest.CaptureFixture[str]) -> None:
    run(Recorded(counted(CALL)), as_json=False).print_table(None, None)
    assert re.search(r"^ vscsi0 +3 +call +0 +0\.0 +- +-", capsys.readouterr().out, re.M)


def test_drops_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    recorded = Recorded(counted(KICK, *GUEST))
    recorded.dropped = 7
    run(recorded, as_json=False).print_table(None, None)
    assert "Drops: up to 7 " in capsys.readouterr().out


def test_json_has_the_documented_keys_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    run(Recorded(counted(KICK, *GUEST)), as_json=True).print_json(streamed=False)
    printed = json.loads(capsys.readouterr().out)
    page = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
    section = page[page.index("### `trace`") : page.index("### `diagnose`")]
    documented, event = map(json.loads, re.findall(r"```json\n(.*?)```", section, re.S))
    assert keys(printed) == keys(documented)
    assert printed["queues"][0]["kick"]["by"][0]["who"] == "guest"
    assert printed["queues"][0]["call"] is None
    run(Recorded(counted(KICK, *GUEST)), as_json=True, events=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [keys(line) for line in lines] == [keys(event), keys(event)]


def keys(value: object) -> object:
    """Return the keys of a document, however deep, without its values."""
    if isinstance(value, dict):
        return {name: keys(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [keys(one) for one in value[:1]]
    return None


def test_events_that_were_lost_are_told_from_those_that_were_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = run(Recorded(counted(KICK, *GUEST), counted(CALL, VHOST)), as_json=True, events=True)
    made.print_json(streamed=True)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["lost"] == 60 - 2
    assert last["queues"][0]["kick_to_call"] == {
        "count": 1,
        "min_s": 0.000084,
        "median_s": 0.000084,
        "max_s": 0.000084,
    }


def test_an_event_is_one_line_whatever_the_thread_is_called(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(Recorded(), as_json=False, events=True)
    kick, call = capsys.readouterr().out.splitlines()
    assert kick.endswith("vscsi0 queue 3  kick  guest")
    assert call.endswith("vscsi0 queue 3  call  vhost  84 µs after kick")


def test_a_machine_that_ended_has_its_totals_and_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = run(Recorded(counted(KICK, *GUEST), gone=True), as_json=True)
    made.print_json(streamed=False)
    printed = json.loads(capsys.readouterr().out)
    assert printed["ended"] == "machine-gone"
    assert printed["queues"][0]["kick"]["total"] == 30
    assert isinstance(made.failed, MachineGoneError)


def test_threads_have_names_that_tell_them_apart() -> None:
    assert _who("qemu", "qemu-system-x86", 567, 567) == "QEMU main loop"
    assert _who("qemu", "IO iot0", 567, 570) == "QEMU thread 570 (IO iot0)"
    assert _who("process", "qemu-storage-da", 31, 31) == "qemu-storage-da[31]"
    assert _who("kernel", "swapper/0", 0, 0) == "kernel, in swapper/0"
    assert _who("process", "a\nb", None, 9) == "a�b"


def test_times_are_said_as_people_say_them() -> None:
    assert [_short_time(one) for one in (0.000084, 0.0123, 2.34)] == ["84 µs", "12.3 ms", "2.3 s"]
