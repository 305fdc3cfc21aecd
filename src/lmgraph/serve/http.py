"""One HTTP request over ASGI: its body within limits, its answer, its error, and whether the client is still there.

It knows ASGI's events and nothing of what is asked. (ASGI specification, HTTP connection scope.)
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from urllib.parse import parse_qsl

from lmgraph.errors import LmgraphError, RequestError, WorkerStarting
from lmgraph.serve import wire

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

AFTER: dict[int, Headers] = {408: [(b"connection", b"close")], 413: [(b"connection", b"close")], 401: [(b"www-authenticate", b"Bearer")]}
"""status -> headers: a client that is still sending is cut off, or its body would be read to its end"""
WATCH_S = 0.1
"""seconds until a client is watched for leaving"""
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


class Request:
    """One HTTP request on its way. `began` is on the clock of time.perf_counter, `status` 0 until an answer has begun."""

    __slots__ = ("began", "headers", "id", "key", "last_words", "method", "node", "over", "path", "receive", "scope", "send", "status")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self.receive, self.send = scope, receive, send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"")
        self.id = given.decode() if REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"  # a name, no secret
        self.began = time.perf_counter()
        self.status = 0
        self.over = False
        """the last piece of the answer is on its way"""
        self.key = ""
        """id of the API key that was shown, '' for none"""
        self.node = ""
        """that answered"""
        self.last_words: Callable[[LmgraphError], bytes] = wire.error_event
        """what is said when a stream cannot go on"""

    def query(self) -> dict[str, str]:
        """The query string's fields; of a repeated one the last counts."""
        return dict(parse_qsl(self.scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))

    async def body(self, limits: Limits) -> bytes:
        """The whole body. Raises RequestError (413, 408), Gone."""
        length = self.headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > limits.body_bytes:
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
        self.over = not more
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    async def respond(self, status: int, body: bytes, headers: Headers | None = None, kind: bytes = b"application/json") -> None:
        """Send a whole answer."""
        await self.start(status, kind, [(b"content-length", str(len(body)).encode()), *(headers or [])])
        await self.piece(body, more=False)

    async def say(self, value: Any, headers: Headers | None = None, status: int = 200) -> None:
        """Send a whole answer in JSON."""
        await self.respond(status, json.dumps(value, separators=(",", ":")).encode(), headers)

    async def fail(self, error: LmgraphError) -> None:
        """Send an error: as an answer, or, when a stream has begun, as its last event."""
        if self.status:
            await self.piece(self.last_words(error), more=False)
            return
        status = wire.status_of(error)
        headers = list(AFTER.get(status, ()))
        if isinstance(error, WorkerStarting) or (isinstance(error, RequestError) and status == 429):
            headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()))
        await self.respond(status, wire.error(error), headers)

    async def while_there(self, work: Awaitable[T]) -> T:
        """What `work` returns, awaited as long as the client is there. Cancels it and raises Gone when the client leaves.

        The first look comes after WATCH_S: most answers are over by then, and a task for each of them would cost more than it saves.
        """
        task = asyncio.current_task()
        leaving: asyncio.Task[None] | None = None

        def watch() -> None:
            nonlocal leaving
            leaving = asyncio.create_task(self._left())
            leaving.add_done_callback(lambda done: done.cancelled() or self.over or (task and task.cancel()))

        timer = asyncio.get_running_loop().call_later(WATCH_S, watch)
        try:
            return await work
        except asyncio.CancelledError:
            if leaving is not None and leaving.done() and not leaving.cancelled():
                if task is not None and hasattr(task, "uncancel"):  # Python 3.11: it is we who cancelled
                    task.uncancel()
                raise Gone from None
            raise
        finally:
            timer.cancel()
            if leaving is not None:
                leaving.cancel()

    async def _left(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass


def _too_large(limits: Limits) -> RequestError:
    return RequestError(f"The body is larger than {limits.body_bytes:,} bytes.", code="body_too_large", status=413)
