"""The web application: a page, its files, a stream of events for each view, one thing to post."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from kickcall.draw.svg import COLOURS, STYLE
from kickcall.draw.text import printable
from kickcall.errors import KickcallError
from kickcall.model import DeviceEvent  # noqa: TC001  # msgspec reads it at run time
from kickcall.serve import frames
from kickcall.serve.guard import HEADERS, Guard

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from kickcall.watch.feed import Source

PAGE = Path(__file__).with_name("page")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_NOT_ASKED = "only kickcall serve --trace has the kernel count kicks and calls"
_STREAMS_MOST = 64
_BODY_MOST = 4096
_SHARE = 9
"""A stream takes one part in ten of a processor at most: larger frames come less often."""
_SILENCE_S = 10.0
"""A stream says something at least so often: a proxy may end one that is silent."""
_TIMELINE_S = 0.5
_TIMELINE_BACK_S = 24 * 3600.0
_WRONG_TOKEN_S = 1.0
"""How long the answer to a wrong token takes."""


class EventBody(msgspec.Struct, forbid_unknown_fields=True):
    """What is posted to raise an event."""

    machine: str
    device: str
    queue: int
    event: DeviceEvent
    dry_run: bool


class Pages:
    """Answers requests from `source`, `every_s` seconds between two frames of a stream.

    With `count` the kernel counts the kicks and calls of machines whose queues are looked at.
    """

    def __init__(
        self,
        source: Source,
        guard: Guard,
        *,
        every_s: float = 0.1,
        count: bool = False,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._source = source
        self._guard = guard
        self._every_s = every_s
        self._count = count
        self._stopping = stopping
        self._streams = 0
        self._files = {
            path.name: (path.read_bytes(), _TYPES[path.suffix])
            for path in sorted(PAGE.iterdir())
            if path.suffix in _TYPES
        }
        self._files["draw.css"] = ((COLOURS + STYLE).encode(), _TYPES[".css"])
        self._seen: tuple[float, dict[str, Any]] = (0.0, {})
        self._moments: tuple[float, list[dict[str, Any]], str] = (0.0, [], "")

    def app(self) -> ASGIApp:
        """Return the application, guarded."""
        routes = [
            Route("/", self._index),
            Route("/machine", self._index),
            Route("/queue", self._index),
            Route("/timeline", self._index),
            Route("/page/{name}", self._file),
            Route("/favicon.ico", partial(self._named, "mark.svg")),
            Route("/events", self._events),
            Route("/inject", self._inject, methods=["POST"]),
        ]
        return _Guarded(Starlette(routes=routes), self._guard)

    # --- the page ---

    async def _index(self, request: Request) -> Response:
        return await self._named("index.html", request)

    async def _file(self, request: Request) -> Response:
        return await self._named(request.path_params["name"], request)

    async def _named(self, name: str, request: Request) -> Response:
        # A name that is not one of these few leads nowhere, whatever it says.
        found = self._files.get(name)
        if found is None:
            return PlainTextResponse("no such file", 404)
        return Response(found[0], media_type=found[1])

    # --- streams ---

    async def _events(self, request: Request) -> Response:
        if self._streams >= _STREAMS_MOST:
            return PlainTextResponse("too many pages are open", 503)
        asked = request.query_params
        return StreamingResponse(
            self._stream(request, asked.get("machine"), asked.get("device"), asked.get("queue")),
            media_type="text/event-stream",
        )

    async def _stream(
        self, request: Request, machine: str | None, device: str | None, queue: str | None
    ) -> AsyncIterator[bytes]:
        self._streams += 1
        told: dict[str, Any] = {}
        said_at = time.monotonic()
        try:
            yield _message("hello", {"inject": self._guard.token is not None})
            while not self._stopping():
                started = time.monotonic()
                frame = self._frame(machine, device, queue)
                moments, problem = await self._timeline()
                trouble = printable(self._source.problem)
                frame = {**frame, "moments": moments, "problem": problem, "trouble": trouble}
                if changed := _changes(told, frame):
                    yield _message("frame", changed)
                    said_at = started
                elif started - said_at > _SILENCE_S:
                    yield b": still here\n\n"
                    said_at = started
                told = frame
                spent = time.monotonic() - started
                await asyncio.sleep(max(self._every_s - spent, spent * _SHARE))
                if await request.is_disconnected():
                    return
        finally:
            self._streams -= 1

    def _overview(self) -> dict[str, Any]:
        """Return the overview: the same for all who ask within half a frame."""
        at, frame = self._seen
        now = self._source.now
        if now - at > self._every_s / 2:
            frame = {"view": "overview", **frames.overview(self._source.machines, now)}
            self._seen = (now, frame)
        return frame

    def _frame(self, wanted: str | None, device: str | None, queue: str | None) -> dict[str, Any]:
        if wanted is None:
            return self._overview()
        now = self._source.now
        machine = frames.find(self._source.machines, wanted)
        if machine is None:
            return {"view": "gone", "why": f"no machine {printable(wanted)} runs here now"}
        if device is None or queue is None:
            return {"view": "machine", **frames.machine_frame(machine, now)}
        for one in machine.queues:
            if frames.sane(one.fixed.device) == device and str(one.fixed.queue) == queue:
                not_counted = _NOT_ASKED
                if self._count:
                    not_counted = self._source.count(machine)
                return {
                    "view": "queue",
                    **frames.queue_frame(machine, one, now),
                    "not_counted": printable(not_counted),
                }
        why = machine.why_not or f"{printable(machine.name)} has no such queue now"
        return {"view": "gone", "why": printable(why)}

    async def _timeline(self) -> tuple[list[dict[str, Any]], str]:
        at, moments, problem = self._moments
        now = time.monotonic()
        if now - at > _TIMELINE_S:
            since = time.time() - _TIMELINE_BACK_S
            # A journal may be on a disk that is slow.
            found, problem = await run_in_threadpool(self._source.timeline, since)
            moments = [frames.moment(one) for one in found]
            self._moments = (now, moments, problem)
        return moments, problem

    # --- raising an event ---

    async def _inject(self, request: Request) -> Response:
        if refusal := self._guard.refuse_event(request.headers):
            if "token" in refusal:
                await asyncio.sleep(_WRONG_TOKEN_S)
            return _answer({"error": refusal}, 403)
        raw = b""
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > _BODY_MOST:
                return _answer({"error": "too long"}, 413)
        try:
            body = msgspec.json.decode(raw, type=EventBody)
        except msgspec.MsgspecError as exc:
            return _answer({"error": printable(exc)}, 400)
        machine = frames.find(self._source.machines, body.machine)
        if machine is None:
            return _answer({"error": f"no machine {printable(body.machine)} runs here now"}, 404)
        try:
            done = await run_in_threadpool(
                partial(
                    self._source.raise_event,
                    machine,
                    body.device,
                    body.queue,
                    body.event,
                    dry_run=body.dry_run,
                )
            )
        except KickcallError as exc:
            return _answer({"error": printable(exc)}, 409)
        return _answer(frames.injection(done))


class _Guarded:
    """Answers only what the guard lets through, and says the same headers with everything."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.lower().encode(), text.encode()) for name, text in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *ours]}
            await send(message)

        headers = {
            name.decode("latin-1"): text.decode("latin-1") for name, text in scope["headers"]
        }
        refusal = self._guard.refuse(headers)
        if refusal:
            await PlainTextResponse(f"kickcall: {refusal}\n", 421)(scope, receive, with_headers)
        else:
            await self._app(scope, receive, with_headers)


def _changes(told: dict[str, Any], frame: dict[str, Any]) -> dict[str, Any]:
    """Return what of a frame is new; of machines and queues only those that changed."""
    changed: dict[str, Any] = {}
    for key, value in frame.items():
        before = told.get(key)
        if value is before or value == before:
            continue
        if key in ("machines", "queues") and isinstance(value, dict) and isinstance(before, dict):
            changed[key] = {name: one for name, one in value.items() if before.get(name) != one}
            if gone := [name for name in before if name not in value]:
                changed[f"{key}_gone"] = gone
        else:
            changed[key] = value
    return changed


def _message(event: str, value: dict[str, Any]) -> bytes:
    return b"event: " + event.encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"


def _answer(value: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
