"""Does `kickcall serve` answer only whom it may, and say only what is harmless?

Asked over HTTP, as a browser would; no machine is needed for it.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

import pytest

from kickcall.draw.text import printable
from kickcall.errors import KickcallError, UsageError
from kickcall.model import DeviceEvent
from kickcall.serve.guard import Guard, host_of, hosts_of, is_loopback
from kickcall.serve.run import Options, check, serving
from nasty import NASTY
from recorded import Recorded, RecordedMachine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOKEN = "s3cret"
DEVICE = "/machine/peripheral/blk0"


class Site:
    """A page that is served, and who asks for it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.authority = urlsplit(url).netloc

    def ask(
        self, path: str, method: str = "GET", body: bytes = b"", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        host, _, port = self.authority.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {"Host": self.authority, **named})
        answer = connection.getresponse()
        got = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        connection.close()
        return got

    def inject(self, **changed: str) -> tuple[int, dict[str, Any]]:
        """Ask for a kick as the page does; `changed` are headers, "" leaves one out."""
        headers = {
            "origin": f"http://{self.authority}",
            "content_type": "application/json",
            "x_kickcall_token": TOKEN,
            **changed,
        }
        body = {
            "machine": "vm000",
            "device": DEVICE,
            "queue": 1,
            "event": "kick",
            "dry_run": False,
        }
        kept = {name: value for name, value in headers.items() if value}
        status, _, said = self.ask("/inject", "POST", json.dumps(body).encode(), **kept)
        return status, json.loads(said)

    def frame(self, query: str = "") -> dict[str, Any]:
        """Return the first frame of a stream."""
        host, _, port = self.authority.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request("GET", f"/events?{query}", headers={"Host": self.authority})
        answer = connection.getresponse()
        assert answer.status == 200
        while (line := answer.fp.readline()) != b"event: frame\n":
            assert line
        data = answer.fp.readline().removeprefix(b"data: ")
        connection.close()
        frame: dict[str, Any] = json.loads(data)
        return frame


@contextmanager
def site(source: Recorded, token: str | None = TOKEN, **options: Any) -> Iterator[Site]:
    with serving(source, Options(token=token, **options)) as url:
        yield Site(url)


@pytest.fixture(scope="module")
def source() -> Recorded:
    recorded = Recorded(2)
    recorded.recorded[0].stall(1, recorded.now)
    return recorded


@pytest.fixture(scope="module")
def here(source: Recorded) -> Iterator[Site]:
    with site(source) as found:
        yield found


@pytest.mark.parametrize("path", ["/", "/machine?name=vm0", "/queue", "/timeline", "/page/page.js"])
def test_everything_is_said_with_a_policy_that_lets_nothing_else_in(here: Site, path: str) -> None:
    status, headers, body = here.ask(path)
    assert status == 200
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers
    assert b"://" not in body.replace(b"http://www.w3.org/2000/svg", b"")


def test_the_page_holds_no_inline_script_nor_style(here: Site) -> None:
    _, _, body = here.ask("/")
    text = body.decode()
    assert text.count("<script") == 1
    assert '<script type="module" src="/page/page.js">' in text
    assert "<style" not in text
    assert " style=" not in text


@pytest.mark.parametrize(
    "path",
    ["/page/../app.py", "/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/page/"],
)
def test_no_path_leads_out_of_the_page(here: Site, path: str) -> None:
    status, _, body = here.ask(path)
    assert status == 404
    assert b"import" not in body


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::2]", "0.0.0.0"]
)
@pytest.mark.parametrize("path", ["/", "/events", "/inject"])
def test_a_name_that_was_made_to_lead_here_is_answered_nothing(
    here: Site, host: str, path: str
) -> None:
    status, headers, body = here.ask(path, Host=host)
    assert status == 421
    assert b"vm000" not in body
    assert "content-security-policy" in headers


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1:8410", "LOCALHOST", "[::1]:80"])
def test_a_tunnel_may_lead_here_by_another_port(here: Site, host: str) -> None:
    assert here.ask("/", Host=host)[0] == 200


def test_a_page_of_ours_with_the_token_may_raise_an_event(here: Site, source: Recorded) -> None:
    source.raised.clear()
    status, said = here.inject()
    assert status == 200
    assert source.raised == [("vm000", DEVICE, 1, DeviceEvent.KICK, False)]
    assert said["after"] == {"count": 0, "avail": 12, "used": 12}


@pytest.mark.parametrize(
    "changed",
    [
        {"x_kickcall_token": ""},
        {"x_kickcall_token": "s3cre"},
        {"origin": ""},
        {"origin": "null"},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "file://127.0.0.1"},
        {"content_type": "text/plain"},
        {"content_type": "application/x-www-form-urlencoded"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
    ids=str,
)
def test_nobody_else_may(here: Site, source: Recorded, changed: dict[str, str]) -> None:
    source.raised.clear()
    status, said = here.inject(**changed)
    assert status == 403
    assert said["error"]
    assert source.raised == []


def test_another_site_is_not_even_allowed_to_ask(here: Site) -> None:
    status, headers, _ = here.ask(
        "/inject",
        "OPTIONS",
        origin="http://evil.example",
        access_control_request_method="POST",
        access_control_request_headers="x-kickcall-token",
    )
    assert status == 405
    assert not any(name.startswith("access-control") for name in headers)


def test_without_leave_nothing_is_ever_raised(source: Recorded) -> None:
    source.raised.clear()
    with site(source, token=None) as reading:
        status, said = reading.inject()
        assert (status, source.raised) == (403, [])
        assert "--allow-inject" in said["error"]
        assert reading.inject(x_kickcall_token="None")[0] == 403


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b"\xff", b'{"machine": 1}', b"[" * 4000, b'"' + b"x" * 9000]
)
def test_what_is_no_request_is_refused(here: Site, body: bytes) -> None:
    status, _, said = here.ask(
        "/inject",
        "POST",
        body,
        origin=f"http://{here.authority}",
        content_type="application/json",
        x_kickcall_token=TOKEN,
    )
    assert status in (400, 413)
    assert json.loads(said)["error"]


def test_what_cannot_be_done_is_said_in_a_line(here: Site, source: Recorded) -> None:
    source.refuse = "the map is\x1b[31m stale"
    try:
        assert here.inject() == (409, {"error": "the map is�[31m stale"})
    finally:
        source.refuse = ""


def test_the_streams_tell_machines_queues_and_the_break(here: Site) -> None:
    overview = here.frame()
    assert overview["stalled"] == 1
    assert overview["worst"][0]["verdict"]["word"] == "lost-kick"
    machine = here.frame("machine=vm000")
    assert machine["queues"][f"{DEVICE} 1"]["hop"] == 3
    assert machine["queues"][f"{DEVICE} 0"]["ring"]["arcs"] == []
    queue = here.frame(f"machine=vm000&device={quote(DEVICE)}&queue=1")
    assert queue["headline"] == "lost-kick on hop 3"
    assert '<g class="broken" data-hop="3">' in queue["path"]
    assert here.frame("machine=vm777")["view"] == "gone"


def test_a_machine_is_found_by_its_name_or_by_what_it_is(here: Site, source: Recorded) -> None:
    key = source.machines[1].key
    assert here.frame("machine=vm001")["pid"] == here.frame(f"machine={key}")["pid"]


def test_names_are_text_wherever_they_are_said() -> None:
    source = Recorded(0)
    for number, name in enumerate(NASTY):
        source.recorded.append(RecordedMachine(number, 1, name, device=name))
        source.recorded[-1].stall(0, source.now)
    with site(source) as found:
        overview = found.frame()
        assert len(overview["machines"]) == len(NASTY)
        for key, row in overview["machines"].items():
            assert row["name"] == printable(row["name"])
            machine = found.frame(f"machine={key}")
            assert machine["name"] == printable(machine["name"])
            (queue,) = machine["queues"].values()
            asked = f"machine={key}&device={quote(queue['device'])}&queue=0"
            told = found.frame(asked)
            assert told["view"] == "queue"
            for drawing in (told["path"], told["tall"]):
                tags = {
                    one.tag.rpartition("}")[2] for one in ElementTree.fromstring(drawing).iter()
                }
                assert tags <= {"svg", "g", "rect", "path", "text"}


def test_the_hosts_that_are_ours_follow_from_the_address() -> None:
    assert hosts_of("127.0.0.1", ()) == {"127.0.0.1", "localhost", "[::1]"}
    assert hosts_of("192.0.2.7", ("Host.example",)) == {"192.0.2.7", "host.example"}
    assert [host_of(one) for one in ("a:1", "[::1]:2", "A")] == ["a", "[::1]", "a"]
    assert [is_loopback(one) for one in ("127.3.2.1", "::1", "localhost", "0.0.0.0", "x")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_a_network_sees_machines_only_through_tls_or_a_proxy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--tls-cert"):
        check(Options(address="192.0.2.7"))
    with pytest.raises(UsageError, match="belong together"):
        check(Options(certificate=tmp_path / "cert.pem"))
    with pytest.raises(UsageError, match="--host NAME"):
        check(Options(address="0.0.0.0", certificate=tmp_path, key=tmp_path))
    with pytest.raises(UsageError, match="--host NAME"):
        check(Options(behind_proxy=True))
    check(Options(address="192.0.2.7", certificate=tmp_path, key=tmp_path))
    check(Options(behind_proxy=True, names=("host.example",)))


def test_a_port_that_is_taken_is_said(here: Site, source: Recorded) -> None:
    port = int(here.authority.rpartition(":")[2])
    with (
        pytest.raises(KickcallError, match="cannot listen on 127"),
        site(source, port=port),
    ):
        pass


def test_the_token_is_compared_whole() -> None:
    guard = Guard(frozenset({"h"}), "tökén")
    headers = {"host": "h", "origin": "http://h", "content-type": "application/json"}
    assert guard.refuse_event({**headers, "x-kickcall-token": "tökén"}) == ""
    assert guard.refuse_event({**headers, "x-kickcall-token": "tök"}) != ""


def test_trouble_is_said_on_every_page(source: Recorded) -> None:
    source.problem = "the watcher ended\x07"
    try:
        with site(source) as found:
            assert found.frame()["trouble"] == "the watcher ended�"
            assert found.frame("machine=vm000")["trouble"] == "the watcher ended�"
    finally:
        source.problem = ""


def test_the_kernel_counts_only_if_that_was_asked_for(source: Recorded) -> None:
    asked = f"machine=vm000&device={quote(DEVICE)}&queue=1"
    with site(source) as found:
        assert "--trace" in found.frame(asked)["not_counted"]
    with site(source, count=True) as found:
        assert found.frame(asked)["not_counted"] == "tracefs is not mounted"


@pytest.mark.parametrize(
    ("command", "missing"), [("serve", "starlette"), ("serve", "uvicorn"), ("top", "textual")]
)
def test_what_has_to_be_installed_is_said_in_a_line(command: str, missing: str) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['kickcall', {command!r}]\n"
        "sys.stdin.isatty = sys.stdout.isatty = lambda: True\n"
        "from kickcall.cli.main import run; run()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert f"pip install 'kickcall[{command}]'" in done.stderr


def test_a_page_for_the_network_in_the_clear_is_refused_in_a_line() -> None:
    command = [sys.executable, "-m", "kickcall", "serve", "--address", "192.0.2.7"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--tls-cert" in done.stderr
    assert done.stderr.count("\n") == 1


def test_top_says_that_it_needs_a_terminal() -> None:
    command = [sys.executable, "-m", "kickcall", "top"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (2, "")
    assert "terminal" in done.stderr
    assert done.stderr.count("\n") == 1


@contextmanager
def stream(here: Site, query: str) -> Iterator[http.client.HTTPResponse]:
    host, _, port = here.authority.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.request("GET", f"/events?{query}", headers={"Host": here.authority})
    try:
        yield connection.getresponse()
    finally:
        connection.close()


def next_frame(answer: http.client.HTTPResponse) -> dict[str, Any]:
    while (line := answer.fp.readline()) != b"event: frame\n":
        assert line
    frame: dict[str, Any] = json.loads(answer.fp.readline().removeprefix(b"data: "))
    return frame


def test_a_stream_tells_only_what_changed() -> None:
    source = Recorded(1, queues=4)
    with site(source) as found, stream(found, "machine=vm000") as answer:
        first = next_frame(answer)
        assert len(first["queues"]) == 4
        source.recorded[0].move(2, 5, 1, source.now)
        second = next_frame(answer)
        assert set(second) == {"queues"}
        assert set(second["queues"]) == {f"{DEVICE} 2"}
        assert second["queues"][f"{DEVICE} 2"]["out"] == 4


def test_a_page_too_many_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kickcall.serve.app._STREAMS_MOST", 1)
    with site(Recorded(1)) as found:
        with stream(found, "") as answer:
            next_frame(answer)
            assert found.ask("/events")[0] == 503
        deadline = time.monotonic() + 10
        while True:
            # The one that was closed makes room.
            with stream(found, "") as answer:
                if answer.status == 200:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.05)
