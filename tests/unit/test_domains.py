"""Is libvirt waited for only so long, and asked only where the machine can be its?"""

from __future__ import annotations

import threading

import msgspec
import pytest

from kickcall.errors import MonitorBusyError, MonitorGoneError
from kickcall.model import Domain, Machine, MonitorAddress
from kickcall.qmp.domain import answer
from kickcall.vmm import domains
from kickcall.vmm.find import is_called

UUID = "9728432e-0b15-4e79-bf6f-2a1046814fd3"
DOMAIN = Domain("web", UUID, MonitorAddress("/m", "/m"))
WEB = Machine(4711, 99, "web", "", (), (), DOMAIN)
HUNDRED = Machine(4712, 99, "web", "", (), (), None, "100")


@pytest.mark.parametrize(
    ("text", "libvirts", "proxmoxs"),
    [
        ("web", True, True),
        ("libvirt:web", True, False),
        (f"libvirt:{UUID}", True, False),
        ("libvirt:100", False, False),
        ("100", False, True),
        ("libvirt:", False, False),
        ("", False, False),
    ],
)
def test_what_a_machine_is_called(text: str, libvirts: bool, proxmoxs: bool) -> None:
    assert (is_called(WEB, text), is_called(HUNDRED, text)) == (libvirts, proxmoxs)


def test_a_call_that_hangs_is_left_and_its_domain_not_asked_until_it_came_back() -> None:
    release = threading.Event()
    lane = domains._Lane(DOMAIN)
    with pytest.raises(domains._NoAnswer):
        lane.run(release.wait, 0.05)
    with pytest.raises(MonitorBusyError, match="web: libvirt has not answered an earlier"):
        domains._Lane(DOMAIN)
    other = domains._Lane(Domain("other", "another", DOMAIN.monitor))
    assert other.run(lambda: 7, 5.0) == 7
    other.close()
    release.set()
    lane._thread.join(5.0)
    again = domains._Lane(DOMAIN)
    assert again.run(lambda: 8, 5.0) == 8
    again.close()


def test_what_a_call_raises_is_raised_to_who_waits() -> None:
    def fail() -> None:
        raise MonitorGoneError("gone")

    lane = domains._Lane(DOMAIN)
    with pytest.raises(MonitorGoneError, match="gone"):
        lane.run(fail, 5.0)
    lane.close()


@pytest.mark.parametrize(
    ("uri", "asked"),
    [
        ("qemu+unix:///system?socket=/a", True),
        ("qemu:///session", True),
        ("qemu+ssh://root@elsewhere/system", False),
        ("", False),
    ],
)
def test_a_libvirt_of_another_host_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, uri: str, asked: bool
) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", uri)
    assert (domains.Address(None) in domains.addresses(WEB)) is asked


def test_the_id_of_a_request_is_not_libvirts_and_comes_back_as_it_was() -> None:
    seen = []

    def libvirt(text: str) -> str:
        seen.append(text)
        return '{"return":{"status":"running"},"id":"libvirt-7"}'

    line = b'{"execute":"query-status","arguments":{"a":[1.50]},"id":[3,{"x":"\\u00e9"}]}'
    said = answer(line, libvirt)
    assert seen == ['{"execute":"query-status","arguments":{"a":[1.50]}}']
    assert said == b'{"return": {"status":"running"}, "id": [3,{"x":"\\u00e9"}]}'


def test_qemus_error_passes_and_libvirts_own_becomes_one() -> None:
    refused = '{"id":"libvirt-8","error":{"class":"CommandNotFound","desc":"no such"}}'
    said = msgspec.json.decode(answer(b'{"execute":"x","id":1}', lambda _: refused))
    assert said == {"id": 1, "error": {"class": "CommandNotFound", "desc": "no such"}}

    def fails(_: str) -> str:
        raise MonitorGoneError("web: libvirt could not ask QEMU: cannot parse json")

    said = msgspec.json.decode(answer(b'{"execute":"x","id":2}', fails))
    assert said["error"]["class"] == "GenericError"
    assert "cannot parse json" in said["error"]["desc"]
