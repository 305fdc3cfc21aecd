"""The gateway: an ASGI application over one runtime. Bare ASGI, because a framework's routing costs a third of the throughput.

It knows paths and who may use them, and what an answer goes through: `guard` who asks, `memory` what is remembered, the runtime
the answer, `wire` the bodies. Every failure is an error object of OpenAI's shape; one in the middle of a stream is an event, after
which the stream ends without [DONE].
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from lmgraph import __version__
from lmgraph.errors import LmgraphError, RequestError
from lmgraph.runtime import Runtime
from lmgraph.serve import openapi, page, responses, wire
from lmgraph.serve.answer import Answering
from lmgraph.serve.editing import Editor
from lmgraph.serve.guard import Guard
from lmgraph.serve.http import Gone, Limits, Receive, Request, Scope, Send
from lmgraph.serve.memory import Memory, Talk, cache_key, place
from lmgraph.serve.metrics import TYPE, Metrics
from lmgraph.serve.tracing import Tracing
from lmgraph.store.base import ApiKey, Conversation
from lmgraph.store.shield import Shielded

LOG = logging.getLogger("lmgraph.serve")
PAGE = 50
"""conversations or turns in one answer, unless `limit` says"""
MOST = 500
Handle = Callable[[Request, ApiKey | None], Awaitable[None]]
OPEN = {"/healthz", "/readyz"}
"""paths that need no key"""


class Gateway:
    """The application. Give it an open runtime and a store; it closes both at shutdown."""

    def __init__(
        self,
        runtime: Runtime,
        store: Shielded,
        guard: Guard,
        editor: Editor,
        limits: Limits | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.runtime, self.store, self.guard, self.editor, self.tracing = runtime, store, guard, editor, tracing
        self.limits = limits or Limits()
        self.memory = Memory(store)
        self.metrics = Metrics()
        self._created = int(time.time())
        self._master: asyncio.Task[None] | None = None
        self._paths: dict[str, dict[str, Handle]] = {
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/responses": {"POST": self._responses},
            "/v1/models": {"GET": self._models},
            "/v1/route": {"POST": self._route},
            "/v1/graph": {"GET": self._graph, "PUT": self._edit, "PATCH": self._edit},
            "/v1/graph/undo": {"POST": self._edit},
            "/v1/live": {"GET": self._live},
            "/v1/history": {"GET": self._history},
            "/v1/history/": {"GET": self._conversation, "DELETE": self._forget},
            "/v1/cache": {"DELETE": self._purge},
            "/healthz": {"GET": self._health},
            "/readyz": {"GET": self._ready},
            "/metrics": {"GET": self._metrics},
            "/openapi.json": {"GET": self._openapi},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(Request(scope, receive, send))
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
                await self.store.close()
                if self.tracing:
                    await asyncio.to_thread(self.tracing.close)
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _load(self) -> None:
        said = ""
        while not self.runtime.loaded:
            try:
                await self.runtime.master()
            except LmgraphError as error:
                if error.message != said:
                    LOG.error("The master cannot be loaded: %s", error.message)
                said = error.message
                if not self.runtime.graph.master.server:
                    return
                await asyncio.sleep(1)  # its server may be starting

    async def _http(self, request: Request) -> None:
        path = "/v1/history/" if request.path.startswith("/v1/history/") else request.path
        known = self._paths.get(path)
        try:
            if known is None and (path == "/" or path.startswith("/web/")):
                self.guard.refuse_strange_pages(request)
                await _page(request)
                return
            key = None if path in OPEN else await self.guard.enter(request)
            if known is None:
                raise RequestError(f"There is no {path[:200]!r}. Valid: {', '.join(self._paths)}", code="not_found", status=404)
            if request.method not in known:
                raise RequestError(f"{path} takes {', '.join(known)}.", code="method_not_allowed", status=405)
            await known[request.method](request, key)
        except Gone:
            request.status = request.status or 499
        except asyncio.CancelledError:  # the server stops, and waits no longer
            await request.fail(RequestError("The gateway stops before this answer is finished.", "Ask again.", code="stopping", status=503))
        except LmgraphError as error:
            await request.fail(error)
        except Exception:
            LOG.exception("request %s failed", request.id)
            await request.fail(LmgraphError("Internal error: this is a bug in lmgraph.", f"Its log has request {request.id}."))
        finally:
            self.metrics.requests[path if known else "other", str(request.status)] += 1
            if LOG.isEnabledFor(logging.INFO):
                LOG.info(_line(request, path if known else "other"))

    @asynccontextmanager
    async def _place(self, key: ApiKey | None) -> AsyncIterator[None]:
        if self.metrics.active >= self.limits.active:
            raise RequestError(f"{self.metrics.active} answers are in the making; try again.", code="overloaded", status=429)
        self.metrics.active += 1  # before anything is waited for, or a crowd would get past the check
        try:
            async with self.guard.place(key):
                yield
        finally:
            self.metrics.active -= 1

    # ------------------------------------------------------------ answers

    async def _chat(self, request: Request, key: ApiKey | None) -> None:
        await self.guard.spend(key)
        chat = wire.parse_chat(await request.body(self.limits), self.runtime.graph.nodes)
        async with self._place(key):
            await request.while_there(self._answer(request, chat))

    async def _responses(self, request: Request, key: ApiKey | None) -> None:
        await self.guard.spend(key)
        call = responses.parse(await request.body(self.limits), self.runtime.graph.nodes)
        async with self._place(key):
            await request.while_there(self._respond(request, call))

    async def _respond(self, request: Request, call: responses.Call) -> None:
        """A response's id is its conversation's name and its own mark, so that another one can go on from it."""
        previous = call.echo["previous_response_id"]
        name = call.conversation.rpartition(".")[0] if previous else call.conversation or os.urandom(12).hex()
        talk = await self.memory.recall(call.ask, request.key, name)
        if previous and not talk.turns and talk.recalled:
            words = f"There is no response {previous[:200]!r}."
            raise RequestError(words, param="previous_response_id", code="previous_response_not_found")
        await self._deliver(request, replace(call, conversation=name), talk, call.store)

    async def _answer(self, request: Request, chat: wire.Chat) -> None:
        await self._deliver(request, chat, await self.memory.recall(chat.ask, request.key, chat.conversation), True)

    async def _deliver(self, request: Request, chat: wire.Chat, talk: Talk, keep: bool) -> None:
        """Answer, out of the cache where that may be. `keep`: whether the turn may be remembered."""
        forget = b"no-store" in request.headers.get(b"cache-control", b"").lower()
        memory = self.memory if keep and not forget else None
        if talk.ask.temperature != 0 or memory is None:
            await self._run(Answering(self.metrics, request, chat, talk, memory, None))
            return
        async with self.memory.flight(cache_key(self.runtime.identity, talk.ask, request.key)) as flight:
            self.metrics.cache["hit" if flight.kept else "miss",] += 1
            await self._run(Answering(self.metrics, request, chat, talk, memory, flight))

    async def _run(self, answering: Answering) -> None:
        if self.tracing is None:
            await answering.run(self.runtime)
            return
        status = 499
        try:
            await answering.run(self.runtime)
            status = 200
        except LmgraphError as error:
            status = wire.status_of(error)
            raise
        finally:
            request, now = answering.request, time.time_ns()
            began = now - int((time.perf_counter() - request.began) * 1e9)
            parent = request.headers.get(b"traceparent", b"").decode("latin-1") or None
            pinned = answering.chat.ask.node
            model = {"gen_ai.request.model": f"{wire.MODEL}/{pinned}" if pinned else wire.MODEL}
            self.tracing.record(request.id, parent, began, now, status, answering.decision, answering.steps, model, answering.ended)

    async def _route(self, request: Request, key: ApiKey | None) -> None:
        await self.guard.spend(key)
        queries, batch = wire.parse_route(await request.body(self.limits))
        async with self._place(key):
            found = [d.to_json() for d in await request.while_there(self.runtime.decide_all(queries))]
        await request.say({"object": "list", "data": found} if batch else found[0])

    async def _models(self, request: Request, key: ApiKey | None) -> None:
        nodes = {name: node.description for name, node in self.runtime.graph.nodes.items()}
        await request.respond(200, wire.models(nodes, self._created))

    # ------------------------------------------------------------ the graph

    async def _graph(self, request: Request, key: ApiKey | None) -> None:
        shown = self.editor.to_json() | {"editable": key is not None and key.admin}
        await request.say(shown, [(b"etag", f'"{self.editor.version}"'.encode())])

    async def _edit(self, request: Request, key: ApiKey | None) -> None:
        self.guard.admin(key)
        expected = request.headers.get(b"if-match")
        seen = expected.decode("latin-1").strip('" ') if expected is not None else None
        if request.method == "POST":
            await self.editor.undo(seen)
        else:
            given = wire.load(await request.body(self.limits))
            if request.method == "PATCH":
                await self.editor.patch(given, seen)
            elif given.keys() == {"graph"}:
                await self.editor.put(given["graph"], seen)
            else:
                raise RequestError('Expected {"graph": {...}} in the form of GET /v1/graph.', param="graph")
        LOG.warning("key %s changed the graph: version %s", request.key, self.editor.version)
        await self._graph(request, key)

    async def _live(self, request: Request, key: ApiKey | None) -> None:
        states = self.runtime.states()
        nodes = {name: vars(self.metrics.loads[name]) | {"replicas": states.get(name, [])} for name in self.runtime.graph.nodes}
        await request.say({"version": self.editor.version, "nodes": nodes})

    # ------------------------------------------------------------ memory

    async def _history(self, request: Request, key: ApiKey | None) -> None:
        query = request.query()
        limit = _count(query.get("limit"))
        if node := query.get("node"):
            if not self.guard.sees_all(key):
                self.guard.admin(key)
            turns = await self.store.recent(node, limit)
            await request.say({"object": "list", "data": [turn.to_json() for turn in turns]})
            return
        every = self.guard.sees_all(key)
        if key is None and not every:
            self.guard.admin(key)
        before = _time(query.get("before"))
        found: list[Conversation] = []
        mine = place(request.key, "")
        while len(found) < limit:  # conversations of others are passed over
            page = await self.store.conversations(MOST, before)
            found += [c for c in page if every or c.id.startswith(mine)]
            if len(page) < MOST:
                break
            before = page[-1].updated
        shown = [c.to_json() | {"id": c.id if every else c.id.removeprefix(mine)} for c in found[:limit]]
        await request.say({"object": "list", "data": shown})

    async def _conversation(self, request: Request, key: ApiKey | None) -> None:
        name = _named(request)
        turns = await self.store.turns(self._own(name, key), MOST)
        if not turns:
            raise _no_conversation(name)
        await request.say({"object": "conversation", "id": name, "data": [turn.to_json() for turn in turns]})

    async def _forget(self, request: Request, key: ApiKey | None) -> None:
        name = _named(request)
        if not await self.store.forget(self._own(name, key)):
            raise _no_conversation(name)
        await request.say({"id": name, "deleted": True})

    async def _purge(self, request: Request, key: ApiKey | None) -> None:
        self.guard.admin(key)
        await request.say({"purged": await self.store.purge()})

    def _own(self, name: str, key: ApiKey | None) -> str:
        """A conversation's name in the store; who sees all names it as the store does."""
        if self.guard.sees_all(key):
            return name
        if "/" in name:
            raise _no_conversation(name)
        return place(key.id if key else "", name)

    # ------------------------------------------------------------ health

    async def _health(self, request: Request, key: ApiKey | None) -> None:
        await request.respond(200, b'{"status":"ok"}')

    async def _ready(self, request: Request, key: ApiKey | None) -> None:
        loaded = self._master is not None and self._master.done() and self.runtime.loaded
        state = {"status": "ready" if loaded else "not ready", "master": loaded, "store": self.store.healthy}
        await request.say(state | {"nodes": self.runtime.states()}, status=200 if loaded else 503)

    async def _openapi(self, request: Request, key: ApiKey | None) -> None:
        await request.say(openapi.document(__version__, list(self.runtime.graph.nodes)))

    async def _metrics(self, request: Request, key: ApiKey | None) -> None:
        self.metrics.store_up, self.metrics.turns_dropped = self.store.healthy, self.store.dropped
        await request.respond(200, self.metrics.text(), kind=TYPE.encode())


async def _page(request: Request) -> None:
    """A file of the page."""
    file = page.find(request.path)
    if file is None:
        raise RequestError(f"There is no {request.path[:200]!r}.", "The page is at /.", code="not_found", status=404)
    if request.method != "GET":
        raise RequestError("The page's files take GET.", code="method_not_allowed", status=405)
    if request.headers.get(b"if-none-match") == file.etag:
        await request.start(304, file.kind, file.headers)
        await request.piece(b"", more=False)
    else:
        await request.respond(200, file.body, file.headers, file.kind)


def _line(request: Request, path: str) -> str:
    """A line of the log: what happened, and no word of what was said."""
    said = {"id": request.id, "method": request.method, "path": path, "status": request.status, "node": request.node, "key": request.key}
    return json.dumps(said | {"ms": round((time.perf_counter() - request.began) * 1000, 1)})


def _count(given: str | None) -> int:
    if given is None:
        return PAGE
    if not (given.isascii() and given.isdigit() and len(given) < 6 and 1 <= int(given) <= MOST):
        raise RequestError(f"limit is {given[:40]!r}, expected a whole number from 1 to {MOST}.", param="limit")
    return int(given)


def _time(given: str | None) -> float | None:
    try:
        return None if given is None else float(given)
    except ValueError:
        raise RequestError(f"before is {given!r:.40}, expected a time in seconds since 1970.", param="before") from None


def _named(request: Request) -> str:
    """The conversation that a path names."""
    return request.path.removeprefix("/v1/history/")


def _no_conversation(name: str) -> RequestError:
    return RequestError(f"There is no conversation {name[:200]!r}.", "List them: GET /v1/history", code="not_found", status=404)
