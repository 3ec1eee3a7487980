"""Do terminal and page show at once where a real machine's path broke, and repair it?

The lab loses a kick in the vhost-user relay of a real guest. Chromium drives the page, Textual's
pilot drives `kickcall top`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from kickcall.lab.boot import boot
from kickcall.lab.spec import MachineSpec, VhostUserBlk, VirtioBlk, VirtioNet, VirtioScsi
from kickcall.serve.run import Options, serving
from kickcall.top.app import Top
from kickcall.watch.feed import Feed
from kickcall.watch.journal import Journal
from pictures import WRITING, chromium, keep_page, keep_terminal
from small_qemu import small_qemu
from witness import within

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page
    from textual.pilot import Pilot

    from kickcall.lab.guest import Command
    from kickcall.lab.machine import LabMachine

pytestmark = pytest.mark.rig

NAME = "vm0" if WRITING else f"live-{os.getpid()}"
HOSTILE = "<img src=x onerror=document.title='owned'>\x1b[31m\u202ekcab"
TOKEN = "the-token"
PATIENCE_S = 30.0
LOAD = "while :; do dd if=/dev/{0} of=/dev/null bs=64k count=400 iflag=direct; done 2>/dev/null"


@pytest.fixture(scope="module")
def machine(guest_image_built: object) -> Iterator[LabMachine]:
    spec = MachineSpec(
        name=NAME,
        devices=(
            VirtioBlk(id="blk0", queues=2, iothread=True),
            VhostUserBlk(id="vub0", queues=2, relay=True, disk="file"),
            VirtioScsi(id="scsi0", queues=2),
            VirtioNet(id="net0"),
        ),
    )
    with boot(spec) as booted:
        yield booted


@pytest.fixture(scope="module")
def hostile() -> Iterator[str]:
    """A real QEMU that calls itself what would be markup, or steer a terminal."""
    with small_qemu("-name", f"guest={HOSTILE.replace(',', ',,')}", ready=lambda: True):
        yield HOSTILE


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live") / "journal.db"


@pytest.fixture(scope="module")
def feed(machine: LabMachine, hostile: str, journal: Path) -> Iterator[Feed]:
    with (
        pytest.MonkeyPatch.context() as patch,
        Feed([machine.name, hostile], "kickcall serve", journal) as running,
    ):
        # The relay and its back-end may have to wait for a processor before the queue moves.
        patch.setattr("kickcall.watch.feed._INJECTED_S", within(0.4))
        wait_until(lambda: any(one.queues for one in running.machines))
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def wait_until(holds: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.01)


def lose_a_kick(machine: LabMachine) -> Command:
    """Let the guest read from its vhost-user disk, and lose the kick for it."""
    relay = machine.relay("vub0")
    relay.drop("kick", queue=0)
    before = relay.carried("kick", 0).dropped
    reading = machine.guest.start(
        f"taskset 1 dd if={machine.disk('vub0')} of=/dev/null bs=4k count=1 iflag=direct"
    )
    relay.wait_for("kick", 0, dropped=before + 1)
    return reading


@contextlib.contextmanager
def loaded(machine: LabMachine) -> Iterator[None]:
    """Keep the other disk busy, so that there is something to see."""
    load = machine.guest.start(LOAD.format("vda"))
    try:
        yield
    finally:
        load.kill()


def test_the_page_shows_the_break_at_once_and_repairs_it(
    machine: LabMachine, feed: Feed, browser: Browser, journal: Path
) -> None:
    with serving(feed, Options(token=TOKEN)) as url, loaded(machine):
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        asked: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.extend([said.text] * (said.type == "error")))
        page.goto(url)
        page.get_by_role("link", name=machine.name, exact=True).click()
        page.wait_for_selector(".queue svg")
        took = []
        while True:
            reading = lose_a_kick(machine)
            lost = time.monotonic()
            page.wait_for_selector(".queue.stalled")
            took.append(time.monotonic() - lost)
            assert "lost-kick on hop 3" in page.inner_text(".queue.stalled .verdict")
            if took[-1] < 1.0 or len(took) == 10:
                break
            machine_kick(feed, machine)
            reading.wait(timeout=PATIENCE_S)
            page.wait_for_selector(".queue.stalled", state="detached")
        assert min(took) < 1.0, took
        keep_page(page, "page-machine")
        page.click(".queue.stalled")
        page.wait_for_selector('.flat [data-hop="3"].broken')
        assert page.locator(".flat .broken[data-hop]").count() == 1
        assert "lost-kick" in page.inner_text("main")
        keep_page(page, "page-queue")
        permalink = page.url

        repair(page)
        status, _ = reading.wait(timeout=PATIENCE_S)
        assert status == 0
        assert "the queue moved" in page.inner_text("#said")
        page.wait_for_selector(".flat .broken[data-hop]", state="detached")
        page.wait_for_selector("ol.moments >> text=/kick via eventfd: helped, used.idx/")
        assert "lost-kick on hop 3" in page.inner_text("ol.moments")
        (injection,) = injections(journal)[-1:]
        assert (injection.device, injection.event) == ("/machine/peripheral/vub0", "kick")
        assert injection.by_command == "kickcall serve"

        page.goto(permalink)
        page.wait_for_selector('.flat [data-hop="3"].taken')
        assert {urlsplit(one).netloc for one in asked} == {urlsplit(url).netloc}
        # The wrong token is the one thing that was refused.
        assert [one for one in errors if "403 (Forbidden)" not in one] == []
        page.close()


def machine_kick(feed: Feed, machine: LabMachine) -> None:
    from kickcall.model import DeviceEvent

    live = next(one for one in feed.machines if one.name == machine.name)
    feed.raise_event(live, "vub0", 0, DeviceEvent.KICK, dry_run=False)


def injections(journal: Path) -> list[Any]:
    book = Journal(journal, reading=True)
    try:
        return list(book.injections())
    finally:
        book.close()


def repair(page: Page) -> None:
    """Kick from the page, first with a wrong token; nothing is written before the yes."""
    page.click("#kick")
    page.fill("#token", "wrong")
    page.click("#yes")
    page.wait_for_selector("#asked p.bad")
    page.fill("#token", TOKEN)
    page.click("#yes")
    page.wait_for_selector("#plan")
    assert "1 will be written into eventfd" in page.inner_text("#plan")
    page.click("#yes")
    page.wait_for_selector("#said >> text=/^Kicked/")


def test_the_page_works_with_a_keyboard_on_a_phone_and_in_the_dark(
    machine: LabMachine, feed: Feed, browser: Browser
) -> None:
    with serving(feed, Options()) as url, loaded(machine):
        reading = lose_a_kick(machine)
        page = browser.new_page(
            viewport={"width": 390, "height": 844}, color_scheme="dark", device_scale_factor=2
        )
        page.goto(url)
        page.wait_for_selector(".bad-card")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        page.focus(".bad-card")
        page.wait_for_timeout(500)  # frames come and go, and the focus stays
        page.keyboard.press("Enter")
        page.wait_for_selector('.tall [data-hop="3"].broken')
        assert not page.is_visible(".flat")
        assert not page.is_visible("#kick")  # it only reads
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 390, "it has to be scrolled sideways"
        keep_page(page, "phone-queue")
        page.close()
        machine_kick(feed, machine)
        reading.wait(timeout=PATIENCE_S)


def test_a_machine_may_call_itself_anything(feed: Feed, browser: Browser) -> None:
    wait_until(lambda: len(feed.machines) == 2)
    with serving(feed, Options()) as url:
        page = browser.new_page(viewport={"width": 1280, "height": 700})
        page.goto(url)
        row = page.locator("tr", has_text="<img src=x")
        row.wait_for()
        assert "\x1b" not in row.inner_text()
        assert "\u202e" not in row.inner_text()
        assert page.locator("main img").count() == 0
        row.get_by_role("link").click()
        page.wait_for_selector("h1")
        assert "owned" not in page.title().split(" ")[0]
        assert page.locator("main img").count() == 0
        page.close()


def test_the_terminal_shows_the_break_and_repairs_it(
    machine: LabMachine, feed: Feed, journal: Path
) -> None:
    async def steps() -> None:
        app = Top(feed)
        async with app.run_test(size=(80, 24)) as pilot:
            await until(app, pilot, "blk0:0")
            text = shown(app)
            assert "<img src=x" in text
            assert "\x1b" not in text
            reading = lose_a_kick(machine)
            await until(app, pilot, "✗ lost-kick")
            keep_terminal(app, "top")
            await pilot.press("slash", *"vub0", "enter", "enter")
            await until(app, pilot, "broken here")
            assert "3 kicked     doorbell" in shown(app)
            keep_terminal(app, "top-queue")
            before = len(injections(journal))
            await pilot.press("k")
            await until(app, pilot, "1 into eventfd")
            keep_terminal(app, "top-confirm")
            assert len(injections(journal)) == before
            assert not reading.done
            await pilot.press("y")
            await until(app, pilot, "used.idx ")
            assert reading.wait(timeout=PATIENCE_S)[0] == 0
            assert len(injections(journal)) == before + 1

    # Playwright has a loop of its own in this thread.
    with loaded(machine), ThreadPoolExecutor(1) as other:
        other.submit(asyncio.run, steps()).result()


def shown(app: Top) -> str:
    lines = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in line) for line in lines)


async def until(app: Top, pilot: Pilot[None], text: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while text not in shown(app):
        assert time.monotonic() < deadline, shown(app)
        await pilot.pause(0.05)
