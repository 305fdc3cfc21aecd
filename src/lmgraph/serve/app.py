"""The gateway: an ASGI application over one runtime. Bare ASGI, because a framework's routing costs a third of the throughput.

It knows paths, headers, limits and how a client leaves; `wire` knows what bodies look like, the runtime what an answer takes. Every
failure is an error object of OpenAI's shape; one in the middle of a stream is an event, after which the stream ends without [DONE].
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, cast

from lmgraph.errors import LmgraphError, RequestError
from lmgraph.runtime import Runtime
from lmgraph.serve import wire
from lmgraph.serve.metrics import TYPE, Metrics
from lmgraph.types import Decision, Delta

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

LOG = logging.getLogger("lmgraph.serve")
AFTER: dict[int, Headers] = {429: [(b"retry-after", b"1")], 408: [(b"connection", b"close")], 413: [(b"connection", b"close")]}
"""status -> headers: a client that is still sending is cut off, or its body would be read to its end"""
REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")


@dataclass(frozen=True)
class Limits:
    """What one gateway takes on: what is above is refused at once, so that memory stays bounded."""

    body_bytes: int = 4 << 20
    body_s: float = 30.0
    """a body must be there after this many seconds"""
    active: int = 1024
    """answers in the making"""


class Gone(Exception):
    """The client has left: nobody reads what would be sent."""


@dataclass
class Request:
    """One HTTP request on its way."""

    scope: Scope
    receive: Receive
    send: Send
    id: str
    began: float
    status: int = 0

    async def body(self, limits: Limits) -> bytes:
        """The whole body. Raises RequestError (413, 408), Gone."""
        for name, value in self.scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > limits.body_bytes:
                raise _too_large(limits)
        event = await self.receive()
        if event["type"] == "http.request" and not event.get("more_body"):
            return self._within(event.get("body", b""), limits)
        try:
            return await asyncio.wait_for(self._rest(event, limits), limits.body_s)
        except asyncio.TimeoutError:
            raise RequestError(f"The body did not arrive within {limits.body_s:g} s.", code="timeout", status=408) from None

    async def _rest(self, event: MutableMapping[str, Any], limits: Limits) -> bytes:
        body = bytearray()
        while event["type"] == "http.request":
            body += event.get("body", b"")
            self._within(body, limits)
            if not event.get("more_body"):
                return bytes(body)
            event = await self.receive()
        raise Gone

    @staticmethod
    def _within(body: bytes | bytearray, limits: Limits) -> bytes:
        if len(body) > limits.body_bytes:
            raise _too_large(limits)
        return cast(bytes, body)

    async def start(self, status: int, kind: bytes, headers: Headers) -> None:
        """Send status and headers."""
        self.status = status
        all_headers = [(b"content-type", kind), (b"x-request-id", self.id.encode()), *headers]
        await self.send({"type": "http.response.start", "status": status, "headers": all_headers})

    async def piece(self, body: bytes, more: bool = True) -> None:
        """Send a piece of the body."""
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    async def respond(self, status: int, body: bytes, headers: Headers | None = None, kind: bytes = b"application/json") -> None:
        """Send a whole answer."""
        await self.start(status, kind, [(b"content-length", str(len(body)).encode()), *(headers or [])])
        await self.piece(body, more=False)

    async def fail(self, error: LmgraphError, headers: Headers | None = None) -> None:
        """Send an error: as an answer, or, when a stream has begun, as its last event."""
        if self.status:
            await self.piece(wire.error_event(error), more=False)
        else:
            await self.respond(wire.status_of(error), wire.error(error), headers)


def _too_large(limits: Limits) -> RequestError:
    return RequestError(f"The body is larger than {limits.body_bytes:,} bytes.", code="body_too_large", status=413)


class Gateway:
    """The application. Give it an open runtime; it closes it at shutdown."""

    def __init__(self, runtime: Runtime, limits: Limits | None = None) -> None:
        self.runtime = runtime
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self._active = 0
        self._created = int(time.time())
        self._master: asyncio.Task[Any] | None = None
        self._paths: dict[str, tuple[str, Callable[[Request], Awaitable[None]]]] = {
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/models": ("GET", self._models),
            "/v1/route": ("POST", self._route),
            "/healthz": ("GET", self._health),
            "/readyz": ("GET", self._ready),
            "/metrics": ("GET", self._metrics),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(Request(scope, receive, send, _id(scope), time.perf_counter()))
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            event = await receive()
            if event["type"] == "lifespan.startup":
                self._master = asyncio.create_task(self._load())
                await send({"type": "lifespan.startup.complete"})
            else:
                if self._master:
                    self._master.cancel()
                    await asyncio.gather(self._master, return_exceptions=True)
                await self.runtime.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _load(self) -> None:
        try:
            await self.runtime.master()
        except LmgraphError as error:
            LOG.error("The master cannot be loaded: %s", error.message)

    async def _http(self, request: Request) -> None:
        path = request.scope["path"]
        known = self._paths.get(path)
        try:
            if known is None:
                raise RequestError(f"There is no {path[:200]!r}. Valid: {', '.join(self._paths)}", code="not_found", status=404)
            if request.scope["method"] != known[0]:
                raise RequestError(f"{path} takes {known[0]}.", code="method_not_allowed", status=405)
            await known[1](request)
        except Gone:
            request.status = request.status or 499
        except LmgraphError as error:
            await request.fail(error, AFTER.get(wire.status_of(error)))
        except Exception:
            LOG.exception("request %s failed", request.id)
            await request.fail(LmgraphError("Internal error: this is a bug in lmgraph.", f"Its log has request {request.id}."))
        finally:
            self.metrics.requests.labels(path if known else "other", request.status).inc()

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._active >= self.limits.active:
            raise RequestError(f"{self._active} answers are in the making; try again.", code="overloaded", status=429)
        self._active += 1
        self.metrics.active.set(self._active)
        try:
            yield
        finally:
            self._active -= 1
            self.metrics.active.set(self._active)

    async def _chat(self, request: Request) -> None:
        chat = wire.parse_chat(await request.body(self.limits), self.runtime.graph.nodes)
        with self._place():
            await _while_there(request.receive, self._answer(request, chat))

    async def _answer(self, request: Request, chat: wire.Chat) -> None:
        decision: Decision | None = None
        node = ""

        def decided(made: Decision) -> None:
            nonlocal decision
            decision = made
            self.metrics.decision.observe(time.perf_counter() - request.began)

        def answering(name: str) -> None:
            nonlocal node
            node = name

        stream = cast(AsyncGenerator[Delta, None], self.runtime.answer(chat.ask, decided, answering))
        async with aclosing(stream):
            delta = await anext(stream)  # what fails before the first piece is a plain HTTP error
            self.metrics.first.observe(time.perf_counter() - request.began)
            headers = [(b"x-lmgraph-node", node.encode()), (b"x-lmgraph-trace", request.id.encode())]
            if decision is not None:
                headers.append((b"x-lmgraph-probability", f"{decision.probability:.4f}".encode()))
            writer = wire.Writer(f"chatcmpl-{request.id}", f"{wire.MODEL}/{node}", int(time.time()))
            pieces: list[Delta] = []
            if chat.stream:
                await request.start(200, b"text/event-stream; charset=utf-8", [(b"cache-control", b"no-store"), *headers])
            while not delta.done:
                if not chat.stream:
                    pieces.append(delta)
                elif piece := writer.chunk(delta):
                    await request.piece(piece)
                delta = await anext(stream)
        trace = delta.trace.to_json() if chat.trace and delta.trace else None
        if chat.stream:
            closing = writer.chunk(delta) + writer.end(delta, include_usage=chat.include_usage, trace=trace)
            await request.piece(closing, more=False)
        else:
            await request.respond(200, writer.completion([*pieces, delta], trace), headers)
        self._count(request, node, delta)

    def _count(self, request: Request, node: str, last: Delta) -> None:
        self.metrics.answers.labels(node).inc()
        self.metrics.total.observe(time.perf_counter() - request.began)
        for name, count in wire.usage_of(last).items():
            if name != "total_tokens":
                self.metrics.tokens.labels(node, name.removesuffix("_tokens")).inc(count)

    async def _route(self, request: Request) -> None:
        queries, batch = wire.parse_route(await request.body(self.limits))
        with self._place():
            decisions: list[Decision] = []
            await _while_there(request.receive, self._decide(queries, decisions))
        found = [d.to_json() for d in decisions]
        await request.respond(200, json.dumps({"object": "list", "data": found} if batch else found[0]).encode())

    async def _decide(self, queries: list[str], into: list[Decision]) -> None:
        todo = iter(range(len(queries)))
        made: dict[int, Decision] = {}

        async def work() -> None:
            for i in todo:  # one iterator for all: as many at a time as the engine has places
                made[i] = await self.runtime.decide(queries[i])

        tasks = [asyncio.create_task(work()) for _ in range(min(8, len(queries)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        into.extend(made[i] for i in range(len(queries)))

    async def _models(self, request: Request) -> None:
        nodes = {name: node.description for name, node in self.runtime.graph.nodes.items()}
        await request.respond(200, wire.models(nodes, self._created))

    async def _health(self, request: Request) -> None:
        await request.respond(200, b'{"status":"ok"}')

    async def _ready(self, request: Request) -> None:
        loaded = self._master is not None and self._master.done() and self.runtime.loaded
        state = {"status": "ready" if loaded else "not ready", "master": loaded, "nodes": self.runtime.states()}
        await request.respond(200 if loaded else 503, json.dumps(state).encode())

    async def _metrics(self, request: Request) -> None:
        await request.respond(200, self.metrics.text(), kind=TYPE.encode())


def _id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return uuid.uuid4().hex


async def _while_there(receive: Receive, work: Awaitable[None]) -> None:
    """Await `work` as long as the client is there; cancel it and raise Gone when the client leaves."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(receive))
    leaving.add_done_callback(lambda done: done.cancelled() or task.cancel())
    try:
        await task
    except asyncio.CancelledError:
        if leaving.done() and not leaving.cancelled():
            raise Gone from None
        raise
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
