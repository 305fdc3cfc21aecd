"""Puts graph, master and workers together: everything that a door may call.

It knows how a graph comes to life (master, workers, shared engines), what one ask goes through, and how a graph is replaced while
answers run. It knows no command line and no HTTP; where files are found is `files`' business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lmgraph import ahead, execute, loading, voting, walking
from lmgraph.abreast import abreast
from lmgraph.engine import Engine
from lmgraph.errors import AssetError, QueryError, RequestError, UserError, WorkerError
from lmgraph.files import Quiet, Watcher, master_file, model_file, read_graph, with_profile
from lmgraph.graph import Graph, Node
from lmgraph.master import Master
from lmgraph.settings import Settings
from lmgraph.types import Answer, Ask, Decision, Delta, Message, Progress, Step, Trace, Vote, Walk
from lmgraph.workers.base import Worker
from lmgraph.workers.embedded import EmbeddedWorker, SharedEngine
from lmgraph.workers.openai import OpenAIWorker
from lmgraph.workers.scripted import ScriptedWorker

Fetched = TypeVar("Fetched")
EARLIER = 300
"""characters of the turns before that a decision sees"""


@dataclass(eq=False)
class Scene:
    """A graph as it runs. An answer keeps the scene that it began with, whatever replaces the graph meanwhile."""

    graph: Graph
    master: Master | None = None
    workers: dict[str, Worker] = field(default_factory=dict)
    worn: Mapping[str, str] = field(default_factory=dict)
    """node -> digest of the adapter that it brings, as the master has it"""
    active: int = 0
    """answers and decisions under way"""

    def engines(self) -> set[Any]:
        """The master's engine, where there is one."""
        return {self.master.engine} if self.master else set()


class Runtime:
    """A graph that can answer. Make one with `open`, close it when done (`async with` does both)."""

    def __init__(self, given: Graph, settings: Settings, folder: Path | None, watcher: Watcher) -> None:
        self.settings = settings
        self._scene = Scene(given)
        self._scenes = [self._scene]
        """the present one last; the others as long as answers run in them"""
        self._folder = folder
        self._watcher = watcher
        self._slots = 4
        self._master_lock = asyncio.Lock()
        self._files_lock = asyncio.Lock()
        """one fetch or merge at a time: two of one file would write into each other"""
        self._shared: dict[Path, SharedEngine] = {}

    @classmethod
    def open(cls, settings: Settings, path: Path | None = None, watcher: Watcher | None = None, *, given: Graph | None = None) -> Runtime:
        """Read and check the graph; models are loaded on first use."""
        if given is None:
            read, folder = read_graph(path or settings.graph)
        else:
            read, folder = given, None
        return cls(with_profile(read, settings.profile), settings, folder, watcher or Quiet())

    async def __aenter__(self) -> Runtime:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Unload every model and close every connection."""
        for worker in {w for scene in self._scenes for w in scene.workers.values()}:
            await worker.close()
        for shared in self._shared.values():  # also those whose nodes are gone from the graph
            await shared.close()
        for engine in {e for scene in self._scenes for e in scene.engines()}:
            await engine.close()
        self._scene.master = None

    @property
    def graph(self) -> Graph:
        """The graph that new asks get."""
        return self._scene.graph

    @property
    def identity(self) -> str:
        """What answers depend on besides the ask: graph as it runs (with the profile's models), master and adapters by their digests."""
        master, worn = self._scene.master, self._scene.worn
        return f"{self.graph!r} {master.engine.path.name if master else ''} {dict(worn) or ''}"

    @property
    def loaded(self) -> bool:
        """Whether the master is in memory."""
        return self._scene.master is not None

    async def master(self, slots: int = 4) -> Master:
        """The master, loaded on first use. Raises VocabularyMismatch when graph and bundle do not fit."""
        self._slots = slots
        return await self._master_of(self._scene)

    async def _master_of(self, scene: Scene) -> Master:
        async with self._master_lock:
            if scene.master is None:
                scene.master, scene.worn = await self._load(scene.graph)
            return scene.master

    async def _load(self, given: Graph) -> tuple[Master, Mapping[str, str]]:
        """A master, and what tells what it wears from others."""
        cache, fetch = self.settings.cache, partial(self._fetched, master_file)
        if given.master.server:
            return await loading.elsewhere(given, self._folder, cache, fetch)
        return await loading.here(given, self._folder, cache, fetch, self._slots, self.settings.threads)

    def _wearing(self, given: Graph) -> Mapping[str, str]:
        return loading.wearing(given, self._folder, self.settings.cache)[1]

    async def replace(self, given: Graph) -> None:
        """From now on new asks get this graph (already checked as a whole); those under way end with the one they began with.

        Workers whose description is the same stay as they are. Raises VocabularyMismatch, or what loading another bundle raises;
        then nothing has changed.
        """
        given = with_profile(given, self.settings.profile)
        old = self._scene
        master, worn = None, old.worn
        async with self._master_lock:
            # other weights, or an adapter that was learnt anew into the same file
            if loading.weights(given) != loading.weights(old.graph) or (
                old.master and await asyncio.to_thread(self._wearing, given) != old.worn
            ):
                master, worn = await self._load(given)
            elif old.master is not None:
                master = Master(old.master.engine, old.master.vocabulary, given, old.master.adapters)
            kept = {
                name: worker
                for name, worker in old.workers.items()
                if name in given.nodes and given.nodes[name].worker == old.graph.nodes[name].worker
            }
            self._scene = Scene(given, master, kept, worn)
            self._scenes.append(self._scene)
        await self._tidy()

    async def _tidy(self) -> None:
        """Close what belongs only to scenes in which nothing runs any more."""
        over = [scene for scene in self._scenes if scene is not self._scene and not scene.active]
        self._scenes = [scene for scene in self._scenes if scene not in over]
        workers = {w for scene in over for w in scene.workers.values()} - {w for scene in self._scenes for w in scene.workers.values()}
        engines = {e for scene in over for e in scene.engines()} - {e for scene in self._scenes for e in scene.engines()}
        for worker in workers:
            if not isinstance(worker, EmbeddedWorker):  # its engine is shared with nodes that stay
                await worker.close()
        for engine in engines:
            await engine.close()

    async def decide(self, query: str, *, rewriting: bool | None = None) -> Decision:
        """The master's decision for one query, from start."""
        async with self._present() as scene:
            return await (await self._master_of(scene)).decide(query, rewriting=rewriting)

    @asynccontextmanager
    async def _present(self) -> AsyncIterator[Scene]:
        """The present scene, which nothing closes as long as this block runs."""
        scene = self._scene
        scene.active += 1
        try:
            yield scene
        finally:
            scene.active -= 1
            if scene is not self._scene:
                await self._tidy()

    async def decide_all(self, queries: Sequence[str], *, at_once: int = 8) -> list[Decision]:
        """Decisions in the order of the queries, `at_once` at a time. The first failure ends all."""
        made: dict[int, Decision] = {}

        async def work(i: int) -> None:
            made[i] = await self.decide(queries[i])

        await abreast(work, range(len(queries)), at_once)
        return [made[i] for i in range(len(queries))]

    async def worker(self, node: Node) -> Worker:
        """The worker of a node, opened on first use; nodes that name the same model share its engine."""
        return await self._worker_of(self._scene, node)

    async def _worker_of(self, scene: Scene, node: Node) -> Worker:
        if node.name not in scene.workers:
            made = await self._open_worker(node)
            scene.workers.setdefault(node.name, made)
        return scene.workers[node.name]

    async def _open_worker(self, node: Node) -> Worker:
        spec = node.worker
        if spec.kind == "scripted":
            return ScriptedWorker(spec.answers)
        if spec.kind == "openai":
            return OpenAIWorker.of(spec)
        try:
            path = await self._fetched(model_file, spec.model)
        except AssetError as error:
            raise WorkerError(f"node {node.name!r}: {error.message}", error.hint) from error
        if path not in self._shared:
            threads = self.settings.threads
            self._shared[path] = SharedEngine(lambda: Engine.open(path, context=4096, slots=1, threads=threads))
        return EmbeddedWorker(self._shared[path], spec.system, spec.temperature)

    async def _fetched(self, fetch: Callable[[str, Path, Path | None, Watcher], Fetched], name: str) -> Fetched:
        """What `fetch` makes of a name, in a thread. Who is cancelled leaves it running: the next one waits until it is done."""

        async def locked() -> Fetched:
            async with self._files_lock:
                return await asyncio.to_thread(fetch, name, self.settings.cache, self._folder, self._watcher)

        task = asyncio.ensure_future(locked())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to be told
        return await asyncio.shield(task)

    def states(self) -> dict[str, list[dict[str, object]]]:
        """Health of every node's replicas, as far as calls have shown it (nodes over the wire that were asked at least once)."""
        return {name: worker.states() for name, worker in self._scene.workers.items() if isinstance(worker, OpenAIWorker)}

    async def answer(
        self,
        ask: Ask,
        decided: Callable[[Decision], None] | None = None,
        answering: Callable[[str], None] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Stream an answer; the last Delta carries the Trace.

        `decided` is told the decision before a worker starts, `answering` the node whose worker gives the first piece (of a vote: won),
        `progress` what a walk is at.
        """
        async with self._present() as scene:
            nodes = scene.graph.nodes
            able = _able(scene.graph, ask) if ask.needs else None
            if not ask.query.strip() and not (ask.needs and ask.node):
                raise QueryError("The query is empty.", 'Give a question: lmgraph ask "..."')
            decision: Decision | None = None
            walks = ahead.may(scene.graph, ask)
            spec = None
            if ask.node is None:
                decision = await _decide(await self._master_of(scene), ask, able, walks)
                spec = ahead.spec(scene.graph, ask, decision) if walks else None
                decision = decision if spec else ahead.alone(decision)
                if decided:
                    decided(decision)
                name, request = decision.node, decision.rewritten
            elif ask.node in nodes:
                name, request = ask.node, ask.query
            else:
                raise UserError(f"There is no node {ask.node!r}.", f"Valid: {', '.join(nodes)}")
            last = max(i for i, m in enumerate(ask.messages) if m.role == "user")
            plain = all(m.raw is None for m in ask.messages[last:])  # else: pictures, or a tool's answer after it; passed on as it is
            messages = (*ask.messages[:last], Message("user", request)) if plain else ask.messages
            chain = [node for node in _chain(scene.graph, name) if able is None or node.name in able]
            run = partial(
                execute.run,
                open_worker=lambda node: self._worker_of(scene, node),
                max_tokens=ask.max_tokens,
                temperature=ask.temperature,
                options=ask.options,
            )
            stream: AsyncGenerator[Delta | Step | Vote | Walk, None]
            if decision and spec:
                master, chained, ready = await self._master_of(scene), partial(_chain, scene.graph), partial(self._worker_of, scene)
                stream = walking.Walking(spec, scene.graph, master, ask, run, chained, progress, answering, ready).run(decision)
            elif poll := voting.poll(scene.graph, ask, name, decision, able):
                stream = voting.run(poll, chain, messages, run, whole=ask.whole, answering=answering)
            else:
                stream = run(nodes[name], chain, messages, whole=ask.whole, answering=answering)
            trace = Trace(decision)
            async with aclosing(stream):
                async for item in stream:
                    if isinstance(item, Step):
                        trace = replace(trace, steps=(*trace.steps, item))
                    elif isinstance(item, Vote):
                        trace = replace(trace, vote=item)
                    elif isinstance(item, Walk):
                        trace = replace(trace, walk=item)
                    else:
                        yield replace(item, trace=trace) if item.done else item


async def _decide(master: Master, ask: Ask, able: Sequence[str] | None, ahead: bool) -> Decision:
    """The decision for an ask. A turn that follows others is decided with a digest of them, and reaches the worker as it is."""
    earlier = [m.content.strip() for m in ask.messages if m.role == "user"][:-1]
    if not earlier:
        return await master.decide(ask.query, among=able, ahead=ahead)
    digest = " ".join(" ".join(earlier).split())[-EARLIER:]
    made = await master.decide(f"{digest}\n{ask.query}", rewriting=False, among=able, stay=ask.stay)
    return replace(made, query=ask.query, rewritten=ask.query, rewrite_note="follows earlier turns: passed on as it is")


def _able(given: Graph, ask: Ask) -> list[str]:
    """Nodes that accept what an ask needs besides text. Raises RequestError when there is none, or the pinned one does not."""
    able = [name for name, node in given.nodes.items() if ask.needs <= set(node.accepts)]
    if not able or (ask.node in given.nodes and ask.node not in able):
        kinds = ", ".join(sorted({kind for node in given.nodes.values() for kind in node.accepts}))
        who = f"Node {ask.node} does not accept" if able else "No node accepts"
        raise RequestError(f"{who} {' and '.join(sorted(ask.needs))}; what nodes of this graph accept: {kinds}.", param="messages")
    return able


def _chain(given: Graph, name: str) -> list[Node]:
    """Nodes that take over when a worker fails: the node's own fallback, its fallback, and so on, then the master's."""
    chain: list[str] = []
    at = given.nodes[name].fallback
    while at and at != name and at not in chain:
        chain.append(at)
        at = given.nodes[at].fallback
    general = given.master.fallback
    if general and general != name and general not in chain:
        chain.append(general)
    return [given.nodes[n] for n in chain]


async def fold(stream: AsyncIterator[Delta]) -> Answer:
    """A whole answer out of a stream."""
    text: list[str] = []
    last: Delta | None = None
    async for delta in stream:  # to its very end: what is behind it is closed here, not whenever it is collected
        text.append(delta.text)
        last = delta if delta.done else last
    if last is None:
        raise WorkerError("The answer ended without its last piece.")
    return Answer("".join(text), last.trace or Trace(), last.usage)
