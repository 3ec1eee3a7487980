"""Does a device class check everything before it writes once, and say what it did or why not?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pytest

from kickcall.devices import base
from kickcall.devices.base import DeviceClass, Way, device_class, parse_event, registry
from kickcall.devices.vhost_kernel import VhostKernel
from kickcall.devices.vhost_user import VhostUser
from kickcall.devices.virtio_pci import VirtioPci
from kickcall.devices.ways import virtio_ways
from kickcall.errors import (
    CounterFullError,
    EventNotSupportedError,
    KickcallError,
    MonitorGoneError,
    MonitorTimeoutError,
    QueueNotFoundError,
    QueueNotReadyError,
    StaleMapError,
    StubBusyError,
    StubError,
    UsageError,
)
from kickcall.model import (
    BackendKind,
    Counters,
    Device,
    DeviceEvent,
    Layout,
    QueueMap,
    Rings,
    Via,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kickcall.devices.base import Offer
    from kickcall.model import AnyDevice, Injection, Machine
    from kickcall.vmm.session import MappedDevice, VmmSession

KICK, CALL = DeviceEvent.KICK, DeviceEvent.CALL


def device(backend: BackendKind = BackendKind.QEMU) -> Device:
    return Device(
        path="/machine/peripheral/vscsi0",
        kind="virtio-scsi-device",
        backend=backend,
        num_queues=4,
        features=frozenset(),
        driver_ok=True,
        broken=False,
        vhost_started=backend is not BackendKind.QEMU,
    )


class PlayedMachine:
    """A session and a mapped device that log what is asked of them, in order."""

    def __init__(self, *, fails: dict[str, KickcallError] | None = None) -> None:
        self.log: list[str] = []
        self.fails = fails or {}
        self.count = 7
        self.mapped = cast("MappedDevice", SimpleNamespace(device=device(), queue_map=self.queue))
        self.session = cast(
            "VmmSession",
            SimpleNamespace(
                machine=SimpleNamespace(name="vm0", domain=None),
                check_running=lambda monitor=None: self.step("running"),
            ),
        )

    def step(self, name: str) -> None:
        self.log.append(name)
        if name in self.fails:
            raise self.fails[name]

    def queue(self, index: int) -> QueueMap:
        self.step("queue")
        rings = Rings(0x1000, 0x2000, 0x3000, 128)
        return QueueMap(index, rings, Layout.SPLIT, None, None, virtqueue_address=0)

    def counters(self) -> Counters:
        self.log.append("counters")
        return Counters(self.count, 1, 1)

    def write(self) -> None:
        self.step("write")
        self.count += 1

    def way(self) -> Way:
        self.log.append("ready")
        return Way(
            "a made-up target",
            self.write,
            self.counters,
            eventfd_id=42,
            check=lambda: self.step("verify"),
            layout=Layout.SPLIT,
        )


class MadeUp(DeviceClass[Any]):
    """Has the ways that a test gives it."""

    name: ClassVar[str] = "made up"
    offers: ClassVar[dict[Via, Offer]] = {}

    @classmethod
    def claims(cls, device: AnyDevice) -> bool:
        return True

    def queues(self) -> dict[int, str]:
        return {0: "receive", 1: "transmit"}

    def ways(self, event: DeviceEvent, queue: int) -> dict[Via, Offer]:
        self.mapped.queue_map(queue)
        return self.offers


def made_up(machine: PlayedMachine, offers: dict[Via, Offer] | None = None) -> DeviceClass[Any]:
    kind = type("OfTest", (MadeUp,), {"offers": offers or {Via.EVENTFD: machine.way}})
    made = kind(machine.session, machine.mapped)
    assert isinstance(made, DeviceClass)
    return made


def test_the_map_is_checked_last_before_the_one_write() -> None:
    machine = PlayedMachine()
    made_up(machine).device_event(KICK, 3)
    assert machine.log == ["queue", "running", "ready", "verify", "counters", "write", "counters"]


def test_the_answer_tells_the_way_and_both_counts() -> None:
    result = made_up(PlayedMachine()).device_event(KICK, 3)
    assert (result.machine, result.device) == ("vm0", "/machine/peripheral/vscsi0")
    assert (result.queue, result.event, result.via) == (3, KICK, Via.EVENTFD)
    assert (result.eventfd_id, result.target) == (42, "a made-up target")
    assert (result.before.count, result.after.count) == (7, 8)
    assert not result.dry_run


def test_a_dry_run_checks_all_and_writes_nothing() -> None:
    machine = PlayedMachine()
    result = made_up(machine).device_event(KICK, 3, dry_run=True)
    assert machine.log == ["queue", "running", "ready", "verify", "counters"]
    assert result.dry_run
    assert result.before == result.after


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("queue", QueueNotFoundError("no queue 9")),
        ("running", QueueNotReadyError("paused")),
        ("verify", StaleMapError("the guest rebooted")),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_nothing_is_written_when_a_check_fails(
    step: str, error: KickcallError, dry_run: bool
) -> None:
    machine = PlayedMachine(fails={step: error})
    with pytest.raises(type(error), match=str(error)):
        made_up(machine).device_event(KICK, 3, dry_run=dry_run)
    assert "write" not in machine.log
    assert machine.count == 7


def test_a_full_counter_comes_out_as_it_is() -> None:
    machine = PlayedMachine(fails={"write": CounterFullError("full")})
    with pytest.raises(CounterFullError):
        made_up(machine).device_event(KICK, 3)
    assert machine.count == 7


def test_the_first_way_that_applies_is_taken() -> None:
    machine = PlayedMachine()
    offers: dict[Via, Offer] = {
        Via.QMP: lambda: "no such command",
        Via.EVENTFD: machine.way,
        Via.IOPORT: lambda: pytest.fail("a later way was asked"),
    }
    assert made_up(machine, offers).device_event(KICK, 0).via is Via.EVENTFD


def test_a_way_that_is_forced_is_the_only_one_asked() -> None:
    machine = PlayedMachine()
    offers: dict[Via, Offer] = {Via.QMP: lambda: pytest.fail("asked"), Via.EVENTFD: machine.way}
    assert made_up(machine, offers).device_event(KICK, 0, via=Via.EVENTFD).via is Via.EVENTFD


def test_a_way_that_is_forced_and_not_there_is_not_replaced() -> None:
    machine = PlayedMachine()
    offers: dict[Via, Offer] = {Via.QMP: lambda: "no such command", Via.EVENTFD: machine.way}
    with pytest.raises(EventNotSupportedError, match="qmp: no such command") as caught:
        made_up(machine, offers).device_event(KICK, 0, via=Via.QMP)
    assert "eventfd" not in str(caught.value)
    with pytest.raises(EventNotSupportedError, match="no ioport way to kick"):
        made_up(machine, offers).device_event(KICK, 0, via=Via.IOPORT)
    assert "write" not in machine.log


def test_where_no_way_applies_every_reason_is_told() -> None:
    offers: dict[Via, Offer] = {Via.QMP: lambda: "reason one", Via.EVENTFD: lambda: "reason two"}
    with pytest.raises(EventNotSupportedError) as caught:
        made_up(PlayedMachine(), offers).device_event(CALL, 2)
    assert "cannot call queue 2 of vscsi0" in str(caught.value)
    assert "qmp: reason one; eventfd: reason two" in str(caught.value)


@pytest.mark.parametrize("event", DeviceEvent)
def test_a_virtio_device_is_asked_by_the_vmms_own_command_first(event: DeviceEvent) -> None:
    session = cast("VmmSession", SimpleNamespace(monitor_is_ours=False))
    assert list(virtio_ways(session, PlayedMachine().mapped, 0, event)) == list(Via)


def test_kickcalls_own_socket_is_the_last_way_not_the_first() -> None:
    session = cast("VmmSession", SimpleNamespace(monitor_is_ours=True))
    assert list(virtio_ways(session, PlayedMachine().mapped, 0, KICK))[-1] is Via.QMP


def test_what_can_be_raised_now_is_told_queue_by_queue_with_the_reason_where_not() -> None:
    machine = PausingMachine()
    told = base.offers(made_up(machine, {Via.QMP: lambda: "no", Via.MMIO: machine.pausing_way}))
    assert [(one.queue, one.name, one.event, one.via) for one in told] == [
        (queue, name, event, Via.MMIO)
        for queue, name in ((0, "receive"), (1, "transmit"))
        for event in DeviceEvent
    ]
    refused = base.offers(made_up(machine, {Via.QMP: lambda: "no such command"}))
    assert {one.via for one in refused} == {None}
    assert "no such command" in refused[0].reason
    assert "write" not in machine.log


# the registry


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The entry points that are installed, to be changed by a test."""
    found: list[Any] = []

    def installed(*, group: str) -> list[Any]:
        assert group == "kickcall.devices"
        return found

    monkeypatch.setattr(base, "entry_points", installed)
    registry.cache_clear()
    yield found
    registry.cache_clear()


def entry(name: str, loaded: object) -> SimpleNamespace:
    def load() -> object:
        if isinstance(loaded, Exception):
            raise loaded
        return loaded

    return SimpleNamespace(name=name, value=f"package:{name}", load=load)


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        (BackendKind.QEMU, VirtioPci),
        (BackendKind.VHOST_KERNEL, VhostKernel),
        (BackendKind.VHOST_USER, VhostUser),
    ],
)
def test_the_installed_classes_share_all_devices_among_them(
    backend: BackendKind, kind: type[DeviceClass[Any]]
) -> None:
    registry.cache_clear()
    claiming = [one for one in registry() if one.claims(device(backend))]
    assert claiming == [kind]


def test_the_class_with_the_highest_priority_is_asked_first(entry_points: list[Any]) -> None:
    low = type("A", (MadeUp,), {"priority": -1})
    high = type("B", (MadeUp,), {"priority": 10})
    deaf = type("C", (MadeUp,), {"priority": 99, "claims": classmethod(lambda cls, dev: False)})
    entry_points += [entry("low", low), entry("deaf", deaf), entry("high", high)]
    assert registry() == (deaf, high, low)
    machine = PlayedMachine()
    assert type(device_class(machine.session, machine.mapped)) is high


def test_a_device_that_no_class_claims_is_named(entry_points: list[Any]) -> None:
    machine = PlayedMachine()
    with pytest.raises(EventNotSupportedError, match=r"vscsi0.*virtio-scsi-device"):
        device_class(machine.session, machine.mapped)


@pytest.mark.parametrize("failure", [ImportError("no module x"), AttributeError("y"), OSError("z")])
def test_a_class_that_cannot_be_loaded_is_one_line_with_its_name(
    entry_points: list[Any], failure: Exception
) -> None:
    entry_points.append(entry("broken", failure))
    with pytest.raises(KickcallError) as caught:
        registry()
    assert "'broken'" in str(caught.value)
    assert str(failure) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("thing", [object(), int, lambda: None])
def test_what_is_no_device_class_is_refused(entry_points: list[Any], thing: object) -> None:
    entry_points.append(entry("thing", thing))
    with pytest.raises(KickcallError, match=r"package:thing .* is none"):
        registry()


@pytest.mark.parametrize("word", ["kick", "call"])
def test_an_event_is_one_of_two_words(word: str) -> None:
    assert parse_event(word).value == word


@pytest.mark.parametrize("word", ["", "KICK", "kick ", "poke", "0"])
def test_another_word_is_no_event(word: str) -> None:
    with pytest.raises(UsageError, match="kick or call"):
        parse_event(word)


# Ways that pause the machine


class PausingMachine(PlayedMachine):
    """A played machine with a way that pauses it, and with another map afterwards."""

    def __init__(self, *, fails: dict[str, KickcallError] | None = None) -> None:
        super().__init__(fails=fails)
        self.mapped_anew = SimpleNamespace(device=device(), queue_map=self.queue)
        for name, what in (
            ("refresh", lambda: self.step("refresh")),
            ("again", lambda mapped: self.mapped_anew),
        ):
            setattr(self.session, name, what)

    def pausing_way(self) -> Way:
        def write() -> float:
            self.write()
            return 2.5

        return Way("a register", write, self.counters, check=lambda: self.step("verify"))

    def offers(self, neutral: Offer) -> dict[Via, Offer]:
        return {Via.EVENTFD: neutral, Via.MMIO: self.pausing_way}


def test_a_pause_that_nobody_allowed_is_not_taken_and_the_refusal_names_the_option() -> None:
    machine = PausingMachine()
    kind = made_up(machine, machine.offers(lambda: "no notifier"))
    with pytest.raises(EventNotSupportedError, match=r"no notifier; mmio: .*\(--allow-pause\)"):
        kind.device_event(CALL, 0)
    assert "write" not in machine.log


def test_a_pause_that_was_allowed_is_taken_only_where_nothing_neutral_applies() -> None:
    machine = PausingMachine()
    assert made_up(machine, machine.offers(machine.way)).device_event(
        CALL, 0, allow_pause=True
    ).via is (Via.EVENTFD)
    result = made_up(machine, machine.offers(lambda: "no notifier")).device_event(
        CALL, 0, allow_pause=True
    )
    assert (result.via, result.pause_ms) == (Via.MMIO, 2.5)


def test_to_force_the_way_is_to_allow_the_pause() -> None:
    machine = PausingMachine()
    result = made_up(machine, machine.offers(machine.way)).device_event(CALL, 0, via=Via.MMIO)
    assert result.via is Via.MMIO


def test_a_pause_is_told_before_and_the_machine_is_mapped_anew_after() -> None:
    machine = PausingMachine()
    kind = made_up(machine, machine.offers(lambda: "no notifier"))
    kind.device_event(CALL, 0, allow_pause=True, tell=machine.log.append)
    told, checked, counted, written, *after = machine.log[2:]
    assert told.startswith("pausing vm0 for some milliseconds to write a register")
    assert (checked, counted, written) == ("verify", "counters", "write")
    assert after == ["refresh", "counters"]
    assert kind.mapped is cast("MappedDevice", machine.mapped_anew)


def test_a_dry_run_pauses_nothing_and_tells_no_pause() -> None:
    machine = PausingMachine()
    result = made_up(machine, machine.offers(machine.way)).device_event(
        CALL, 0, via=Via.MMIO, dry_run=True, tell=machine.log.append
    )
    assert result.pause_ms is None
    assert machine.log == ["queue", "running", "verify", "counters"]


def test_an_event_that_was_raised_is_no_failure_where_the_machine_cannot_be_mapped_anew() -> None:
    machine = PausingMachine(fails={"refresh": MonitorGoneError("it went away")})
    result = made_up(machine, machine.offers(machine.way)).device_event(CALL, 0, via=Via.MMIO)
    assert result.pause_ms == 2.5


def test_a_neutral_way_pauses_nothing() -> None:
    assert made_up(PlayedMachine()).device_event(KICK, 0).pause_ms is None


class Told:
    """A witness that notes what it is told, among what happens."""

    def __init__(self, log: list[str], refuses: KickcallError | None = None) -> None:
        self.log = log
        self.refuses = refuses

    def before(self, machine: Machine, planned: Injection) -> None:
        assert planned.before == planned.after
        self.log.append(f"intent: {planned.event} {planned.queue} via {planned.via}")
        if self.refuses is not None:
            raise self.refuses

    def written(self, result: Injection) -> None:
        self.log.append(f"written: {result.before.count} to {result.after.count}")

    def failed(self, error: KickcallError, *, maybe_written: bool) -> None:
        self.log.append(f"failed: {error}, {maybe_written=}")


def test_a_witness_is_told_before_the_last_checks_and_after_the_write() -> None:
    machine = PlayedMachine()
    made_up(machine).device_event(KICK, 3, witness=Told(machine.log))
    assert machine.log[3:] == [
        "counters",
        "intent: kick 3 via eventfd",
        "verify",
        "counters",
        "write",
        "counters",
        "written: 7 to 8",
    ]


def test_a_witness_can_prevent_the_write() -> None:
    machine = PlayedMachine()
    with pytest.raises(KickcallError, match="no room"):
        made_up(machine).device_event(KICK, 3, witness=Told(machine.log, KickcallError("no room")))
    assert "write" not in machine.log


@pytest.mark.parametrize(
    ("step", "error", "maybe_written"),
    [
        ("verify", StaleMapError("it was reset"), False),
        ("write", CounterFullError("it is full"), False),
        ("write", MonitorTimeoutError("no answer"), True),
        ("write", MonitorGoneError("it went away"), True),
        ("write", StubError("the writer was killed"), True),
        ("write", StubBusyError("a debugger has it"), False),
    ],
)
def test_a_witness_is_told_what_failed(
    step: str, error: KickcallError, maybe_written: bool
) -> None:
    machine = PlayedMachine(fails={step: error})
    with pytest.raises(type(error)):
        made_up(machine).device_event(KICK, 3, witness=Told(machine.log))
    assert machine.log[-1] == f"failed: {error}, {maybe_written=}"


def test_a_dry_run_is_nothing_to_witness() -> None:
    machine = PlayedMachine()
    made_up(machine).device_event(KICK, 3, dry_run=True, witness=Told(machine.log))
    assert not [line for line in machine.log if ":" in line]
