"""One answer on its way: from an ask to the last piece, whole or streamed, new or out of the cache.

It knows the order of things: nothing is sent before the first piece is there (so that a failure is a plain HTTP error), and the end
is said only when the turn is kept, or says that it is not. It knows no paths and no keys.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from lmgraph.errors import OutsideError
from lmgraph.runtime import Runtime
from lmgraph.serve import responses, wire
from lmgraph.serve.http import Headers, Request
from lmgraph.serve.memory import Flight, Kept, Memory, Talk
from lmgraph.serve.metrics import Metrics
from lmgraph.types import Decision, Delta, Progress, Step

COUNTED = {"prompt_tokens": "prompt", "completion_tokens": "completion"}
EVENTS = b"text/event-stream; charset=utf-8"


class Answering:
    """An ask and the client that waits for its answer. `memory` is None when nothing may be kept of it."""

    def __init__(
        self, metrics: Metrics, request: Request, chat: wire.Chat, talk: Talk, memory: Memory | None, flight: Flight | None
    ) -> None:
        self.metrics = metrics
        self.request, self.chat, self.talk, self.memory, self.flight = request, chat, talk, memory, flight
        self.kept = flight.kept if flight else None
        self.node = ""
        self.probability: float | None = None
        self.decision: Decision | None = None
        self.steps: list[Step] = []
        """hops of a walk as they end; when the answer is whole, all steps"""
        self.ended: dict[int, int] = {}
        """hop of a walk -> when it ended, in nanoseconds since 1970"""
        self._hop: int | None = None
        """the hop that began last, None before (and without) a walk"""
        self._busy: dict[int | None, str] = {}
        """hop -> the node that works on it now; several in a plan"""
        self._notes = {} if talk.recalled else {"recalled": False}
        """what the answer must say about memory: only what went wrong"""
        self._news: asyncio.Queue[tuple[str, Mapping[str, Any]] | None] | None = asyncio.Queue() if chat.progress else None

    async def run(self, runtime: Runtime) -> None:
        """Answer. Raises what the runtime raises; what was sent until then is sent."""
        metrics, began = self.metrics, self.request.began
        if self.talk.ask.node and not self.kept:
            self._at(self.talk.ask.node)
        try:
            stream = _replay(self.kept) if self.kept else runtime.answer(self.talk.ask, self._decided, self._at, self._walks)
            async with aclosing(stream):
                first = await self._first(stream)
                metrics.first_piece.observe(time.perf_counter() - began)
                await self._deliver(first, stream)
        except OutsideError:
            self._count()
            if self.node and not self.steps:
                metrics.loads[self.node].failures += 1
            raise
        finally:
            for hop in tuple(self._busy):
                self._works(hop)
        if self.decision:
            metrics.decision.observe(self.decision.tokenise_ms / 1e3 + self.decision.prefill_ms / 1e3 + self.decision.decode_ms / 1e3)
        metrics.answer.observe(time.perf_counter() - began)

    def _at(self, node: str) -> None:
        """The node that gives the answer, as far as it is known."""
        self.node = self.request.node = node
        self._works(self._hop, node)

    def _works(self, hop: int | None, node: str = "") -> None:
        """Node `node` works on that hop now; '': nobody does."""
        if before := self._busy.pop(hop, ""):
            self.metrics.loads[before].active -= 1
        if node:
            self.metrics.loads[node].active += 1
            self._busy[hop] = node

    def _decided(self, decision: Decision) -> None:
        self.decision, self.probability = decision, decision.probability
        self._at(decision.node)
        if self._news:
            self._news.put_nowait(("decision", decision.to_json()))

    def _walks(self, event: Progress) -> None:
        if event.kind == "began":
            self._works(None)  # the decision's node: it has its hop now
            self._hop = event.hop
            self._works(event.hop, event.node)
        elif event.kind == "ended":
            self._works(event.hop)
            self.ended[event.hop] = time.time_ns()
            self.steps += [event.step] if event.step else []
        if self._news:
            self._news.put_nowait(("progress", event.to_json()))

    def _count(self) -> None:
        """The steps count for their nodes."""
        for step in self.steps:
            self.metrics.loads[step.node].failures += bool(step.error)
            if step.hop is not None:
                self.metrics.loads[step.node].answers += not step.error
                self.metrics.hops[step.node, "failed" if step.error else "answered"] += 1
            for kind, count in step.usage.items():
                if kind in COUNTED:
                    self.metrics.tokens[step.node, COUNTED[kind]] += count

    async def _first(self, stream: AsyncGenerator[Delta, None]) -> Delta:
        """The first piece. A client that wants to watch gets the stream's beginning, the decision and the steps while it waits."""
        if self.kept:
            self._at(self.kept.node)
            self.probability = self.kept.probability
        news = self._news
        if news is None or self.kept:
            return await anext(stream)
        await self._start()
        writer = wire.Writer(f"chatcmpl-{self.request.id}", wire.MODEL, int(time.time()))
        piece = asyncio.ensure_future(anext(stream))
        piece.add_done_callback(lambda done: news.put_nowait(None))  # behind all that was told before it
        try:
            while (told := await news.get()) is not None:
                await self.request.piece(writer.news(*told))
            return await piece
        finally:
            piece.cancel()
            await asyncio.gather(piece, return_exceptions=True)

    async def _start(self) -> None:
        await self.request.start(200, EVENTS, [(b"cache-control", b"no-store"), *self._headers()])

    async def _deliver(self, delta: Delta, stream: AsyncGenerator[Delta, None]) -> None:
        request, chat = self.request, self.chat
        writer = self._writer(f"{wire.MODEL}/{self.node}")
        pieces: list[Delta] = []
        text: list[str] = []
        plain = True
        if chat.stream and not request.status:
            await self._start()
        if isinstance(writer, responses.Writer):
            request.last_words = writer.fail
        while not delta.done:
            if not chat.stream:
                pieces.append(delta)
            elif piece := writer.chunk(delta):
                await request.piece(piece)
            text.append(delta.text)
            plain = plain and not delta.choices
            delta = await anext(stream)
        while isinstance(writer, wire.Writer) and self._news and not self._news.empty():  # the end of a walk's last hop
            if told := self._news.get_nowait():
                await request.piece(writer.news(*told))
        trace = await self._keep(delta, "".join(text), plain)
        shown = trace if chat.trace else None
        if chat.stream:
            end = writer.end(delta, include_usage=chat.include_usage, trace=shown, notes=self._notes)
            await request.piece(writer.chunk(delta) + end, more=False)
        else:
            await request.respond(200, writer.completion([*pieces, delta], shown, self._notes), self._headers())

    async def _keep(self, last: Delta, text: str, plain: bool) -> Mapping[str, Any]:
        """Keep the turn and the answer; the trace as it is shown."""
        trace: Mapping[str, Any] = last.trace.to_json() if last.trace else {**(self.kept.trace if self.kept else {}), "cache": True}
        self.steps = list(last.trace.steps) if last.trace else []
        self._count()
        walk = last.trace.walk if last.trace else None
        self.metrics.loads[self.node].answers += walk is None  # the hops of a walk are counted
        self.metrics.answers[self.node,] += 1
        worse = walk is not None and (walk.stopped in ("seconds", "master") or any(step.error for step in self.steps))
        if self.flight and not self.kept and plain and not worse and last.finish in ("stop", "length"):
            self.flight.land(Kept(self.node, text, last.finish, dict(last.usage), self.probability, trace))
        if self.memory:
            decided = (trace.get("decision") or {}).get("node") or self.talk.ask.node
            home = decided if trace.get("vote") and decided else self.node  # a voter only lends its worker: the talk stays where it belongs
            if not await self.memory.remember(self.talk, text, home, trace):
                self._notes["kept"] = False
        return trace

    def _headers(self) -> Headers:
        headers = [(b"x-lmgraph-trace", self.request.id.encode())]
        if self.node:
            headers.append((b"x-lmgraph-node", self.node.encode()))
        if self.probability is not None:
            headers.append((b"x-lmgraph-probability", f"{self.probability:.4f}".encode()))
        if self.chat.conversation:
            headers.append((b"x-lmgraph-conversation", self.chat.conversation.encode()))
        if self.flight:
            headers.append((b"x-lmgraph-cache", b"hit" if self.kept else b"miss"))
        return headers

    def _writer(self, model: str) -> wire.Writer | responses.Writer:
        if isinstance(self.chat, responses.Call):
            return responses.Writer(f"{self.chat.conversation}.{self.request.id[:8]}", model, int(time.time()), self.chat)
        return wire.Writer(f"chatcmpl-{self.request.id}", model, int(time.time()))


async def _replay(kept: Kept) -> AsyncGenerator[Delta, None]:
    """A kept answer as a stream."""
    if kept.text:
        yield Delta(kept.text)
    yield Delta(done=True, finish=kept.finish, usage=kept.usage)
