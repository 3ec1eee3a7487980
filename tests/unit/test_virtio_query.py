"""Which questions does kickcall ask a monitor, and does none of them ever reach a back-end?

x-query-virtio-queue-status makes QEMU ask a started vhost-user back-end for GET_VRING_BASE, and by
the vhost-user protocol that stops the ring. The answers here are recorded from real machines.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from kickcall.errors import MonitorError, QmpCommandError
from kickcall.model import BackendKind, Layout, Rings
from kickcall.vmm import virtio

DATA = Path(__file__).parent / "data"
VERSIONS = ["7.2", "10.0"]
DANGEROUS = "x-query-virtio-queue-status"
OF_VHOST = "x-query-virtio-vhost-queue-status"
HARMLESS = {
    "x-query-virtio",
    "x-query-virtio-status",
    OF_VHOST,
    "qom-get",
    "human-monitor-command",
}


class PlayedMonitor:
    """A monitor that answers as a recorded QEMU did, and logs what it was asked."""

    def __init__(self, version: str = "10.0") -> None:
        self.record = json.loads((DATA / f"virtio-{version}.json").read_text())
        self.log: list[tuple[str, dict[str, Any]]] = []

    def execute(self, command: str, arguments: Any = None) -> Any:
        arguments = dict(arguments or {})
        self.log.append((command, arguments))
        if command == "x-query-virtio":
            return self.record["x-query-virtio"]
        device = self.record["devices"].get(arguments["path"])
        if device is None:
            raise QmpCommandError("no such device", "DeviceNotFound")
        match command:
            case "qom-get":
                assert arguments["property"] == "type"
                return device["type"]
            case "x-query-virtio-status":
                return device["status"]
        try:
            return device[command][arguments["queue"]]
        except (KeyError, IndexError):
            raise QmpCommandError("no such queue") from None

    def hmp(self, line: str) -> str:
        self.log.append(("human-monitor-command", {"command-line": line}))
        return str(self.record[line])

    @property
    def commands(self) -> set[str]:
        return {command for command, _ in self.log}

    def device(self, name: str) -> dict[str, Any]:
        found = self.record["devices"][path_of(name)]
        assert isinstance(found, dict)
        return found


def path_of(name: str) -> str:
    return f"/machine/peripheral/{name}/virtio-backend"


def read(monitor: PlayedMonitor, name: str) -> virtio.DeviceFacts:
    facts = virtio.read_device(monitor, path_of(name))
    assert facts is not None
    return facts


def make_vhost(monitor: PlayedMonitor, name: str, kind: str, *, started: bool = True) -> None:
    """Turn a recorded device into one of `kind` whose queues vhost has."""
    device = monitor.device(name)
    count = device["status"]["num-vqs"]
    device["type"] = kind
    device["status"]["vhost-started"] = started
    device["status"]["vhost-dev"] = {"nvqs": count, "vq-index": 0}
    theirs = copy.deepcopy(monitor.device("vub0")[OF_VHOST][0])
    device[OF_VHOST] = [theirs] * count
    device[DANGEROUS] = [{"vring-desc": 4096}] * count  # a wrong question would be answered


@pytest.mark.parametrize("version", VERSIONS)
def test_every_device_of_a_recorded_machine_is_read(version: str) -> None:
    monitor = PlayedMonitor(version)
    assert virtio.list_devices(monitor) == [
        path_of(name) for name in ("blk0", "net0", "scsi0", "vub0")
    ]
    found = {name: read(monitor, name).device for name in ("blk0", "net0", "scsi0", "vub0")}
    assert {name: (device.backend, device.num_queues) for name, device in found.items()} == {
        "blk0": (BackendKind.QEMU, 2),
        "net0": (BackendKind.QEMU, 3),
        "scsi0": (BackendKind.QEMU, 4),
        "vub0": (BackendKind.VHOST_USER, 1),
    }
    assert all(device.driver_ok and device.event_idx for device in found.values())
    assert all(device.layout is Layout.SPLIT for device in found.values())
    assert all(not device.broken for device in found.values())
    assert found["scsi0"].path == "/machine/peripheral/scsi0"
    assert found["scsi0"].id == "scsi0"


def test_a_queue_in_qemu_tells_its_rings_and_positions() -> None:
    facts = read(PlayedMonitor("7.2"), "scsi0")
    # The fourth queue of the recorded machine: 273 requests from boot to shell.
    told = facts.queues[3]
    assert told.rings.desc == 37273600
    assert told.rings.num == 256
    assert told.positions == virtio.Positions(last_avail_idx=273, used_idx=273)


def test_a_vhost_user_queue_tells_its_rings_and_no_positions() -> None:
    monitor = PlayedMonitor("7.2")
    told = monitor.device("vub0")[OF_VHOST][0]
    facts = read(monitor, "vub0").queues[0]
    assert facts.positions is None
    assert facts.rings == Rings(
        told["desc-phys"], told["avail-phys"], told["used-phys"], told["num"]
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_a_vhost_user_device_is_never_asked_for_its_queues(version: str) -> None:
    monitor = PlayedMonitor(version)
    read(monitor, "vub0")
    assert DANGEROUS not in monitor.commands
    assert monitor.commands <= HARMLESS


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("vhost-user-blk", BackendKind.VHOST_USER),
        ("vhost-user-scsi", BackendKind.VHOST_USER),
        ("vhost-user-fs-device", BackendKind.VHOST_USER),
        ("vhost-user-gpio-device", BackendKind.VHOST_USER),
        ("vhost-user-something-new", BackendKind.VHOST_USER),
        ("vhost-vdpa-device", BackendKind.VHOST_USER),
        ("vhost-scsi", BackendKind.VHOST_KERNEL),
        ("vhost-vsock-device", BackendKind.VHOST_KERNEL),
    ],
)
def test_no_vhost_device_is_asked_for_its_queues_started_or_not(
    kind: str, backend: BackendKind, started: bool
) -> None:
    monitor = PlayedMonitor()
    make_vhost(monitor, "scsi0", kind, started=started)
    facts = read(monitor, "scsi0")
    assert facts.device.backend is backend
    assert facts.device.vhost_started is started
    assert DANGEROUS not in monitor.commands
    assert monitor.commands <= HARMLESS
    # Not started, nothing is known of its queues, rather than asked.
    assert len(facts.queues) == (4 if started else 0)


@pytest.mark.parametrize(
    "kind",
    ["virtio-blk-device", "virtio-net-device", "virtio-scsi-device", "virtio-future-device"],
)
def test_no_device_is_asked_while_vhost_serves_it_whatever_it_is_called(kind: str) -> None:
    monitor = PlayedMonitor()
    make_vhost(monitor, "scsi0", kind)
    facts = read(monitor, "scsi0")
    assert facts.device.backend is not BackendKind.QEMU
    assert DANGEROUS not in monitor.commands
    assert virtio.ask_positions(monitor, facts, 0) is None
    assert DANGEROUS not in monitor.commands


def test_a_device_of_a_kind_that_is_not_known_to_be_qemus_own_is_not_asked() -> None:
    monitor = PlayedMonitor()
    monitor.device("scsi0")["type"] = "virtio-future-device"
    facts = read(monitor, "scsi0")
    assert facts.queues == {}
    assert DANGEROUS not in monitor.commands
    assert virtio.ask_positions(monitor, facts, 0) is None
    assert DANGEROUS not in monitor.commands


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize(
    "peers",
    [
        "net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\n"
        " \\ vu0: index=0,type=vhost-user,chardev=c0\n",
        # Several queues, and another NIC before it.
        "lan: index=0,type=nic,model=e1000e,macaddr=52:54:00:12:34:57\n"
        " \\ u0: index=0,type=user,net=10.0.2.0,restrict=off\n"
        "net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\n"
        " \\ vu0: index=0,type=vhost-user,chardev=c0\n"
        "net0: index=1,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\n"
        " \\ vu0: index=1,type=vhost-user,chardev=c0\n",
        # A NIC whose name the QOM path does not tell: all peers count.
        "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\n"
        " \\ vu0: index=0,type=vhost-user,chardev=c0\n",
    ],
)
def test_a_nic_with_a_vhost_user_peer_is_not_asked(peers: str, started: bool) -> None:
    monitor = PlayedMonitor()
    monitor.record["info network"] = peers
    make_vhost(monitor, "net0", "virtio-net-device", started=started)
    facts = read(monitor, "net0")
    assert facts.device.backend is BackendKind.VHOST_USER
    assert DANGEROUS not in monitor.commands
    assert virtio.ask_positions(monitor, facts, 0) is None
    assert DANGEROUS not in monitor.commands


@pytest.mark.parametrize("version", VERSIONS)
def test_a_device_in_qemu_is_asked_for_each_of_its_queues(version: str) -> None:
    monitor = PlayedMonitor(version)
    facts = read(monitor, "scsi0")
    asked = [arguments["queue"] for command, arguments in monitor.log if command == DANGEROUS]
    assert asked == [0, 1, 2, 3]
    assert set(facts.queues) == {0, 1, 2, 3}
    assert virtio.ask_positions(monitor, facts, 2) == facts.queues[2].positions


def test_a_device_without_a_driver_has_no_queues_to_ask_for() -> None:
    monitor = PlayedMonitor()
    monitor.device("scsi0")["status"]["status"] = {
        "statuses": ["VIRTIO_CONFIG_S_ACKNOWLEDGE: Valid virtio device found"]
    }
    facts = read(monitor, "scsi0")
    assert not facts.device.driver_ok
    assert facts.queues == {}
    assert DANGEROUS not in monitor.commands


def test_a_queue_that_the_driver_never_set_up_is_left_out() -> None:
    monitor = PlayedMonitor()
    monitor.device("scsi0")[DANGEROUS][1]["vring-desc"] = 0
    assert set(read(monitor, "scsi0").queues) == {0, 2, 3}


def test_vhost_is_asked_only_for_the_queues_that_it_has() -> None:
    # vhost-scsi in QEMU: vhost has the request queues, QEMU keeps control and event (0 and 1).
    monitor = PlayedMonitor()
    make_vhost(monitor, "scsi0", "vhost-scsi")
    monitor.device("scsi0")["status"]["vhost-dev"] = {"nvqs": 2, "vq-index": 2}
    assert set(read(monitor, "scsi0").queues) == {2, 3}
    assert {arguments["queue"] for command, arguments in monitor.log if command == OF_VHOST} == {
        2,
        3,
    }


def test_a_device_that_is_unplugged_meanwhile_is_no_error() -> None:
    assert virtio.read_device(PlayedMonitor(), path_of("gone0")) is None


def test_features_are_qemus_names_and_unknown_bits_are_kept() -> None:
    monitor = PlayedMonitor()
    features = monitor.device("blk0")["status"]["guest-features"]
    features["unknown-dev-features"] = 1 << 40
    features["transports"] = ["VIRTIO_F_RING_PACKED: Packed virtqueue layout supported"]
    device = read(monitor, "blk0").device
    assert device.layout is Layout.PACKED
    assert not device.event_idx
    assert "bit-40" in device.features


def test_a_broken_device_is_told() -> None:
    monitor = PlayedMonitor()
    monitor.device("blk0")["status"]["broken"] = True
    assert read(monitor, "blk0").device.broken


def test_a_qemu_without_the_command_is_named_as_too_old() -> None:
    class Old(PlayedMonitor):
        def execute(self, command: str, arguments: Any = None) -> Any:
            raise QmpCommandError(
                "The command x-query-virtio has not been found", "CommandNotFound"
            )

    with pytest.raises(MonitorError, match=r"QEMU 7\.2 or newer"):
        virtio.list_devices(Old())


NETWORK = """\
hub 0
 \\ hub0port1: #net1: index=0,type=user,net=10.0.2.0,restrict=off
net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56
 \\ tap0: index=0,type=tap,ifname=tap0,script=no,downscript=no
net1: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:57
 \\ vu1: index=0,type=vhost-user,chardev=c1
lonely: index=0,type=vhost-vdpa,fd=7
"""


@pytest.mark.parametrize(
    ("nic", "types"),
    [
        ("net0", {"nic", "tap"}),
        ("net1", {"nic", "vhost-user"}),
        ("lonely", {"vhost-vdpa"}),
    ],
)
def test_the_peers_of_a_nic_are_its_own(nic: str, types: set[str]) -> None:
    assert virtio.peer_types(NETWORK, nic) == types


def test_for_a_nic_that_is_not_listed_every_back_end_counts() -> None:
    assert virtio.peer_types(NETWORK, "device[0]") >= {"vhost-user", "tap"}


@pytest.mark.parametrize(
    "text", ["", "\n", "nonsense", " \\ : index=,type=", "a: index=x,type=tap"]
)
def test_text_that_lists_nothing_has_no_types(text: str) -> None:
    assert virtio.peer_types(text, "net0") == set()
