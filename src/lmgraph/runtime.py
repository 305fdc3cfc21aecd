"""Puts graph, master and workers together: everything that a door may call.

It knows how a graph comes to life (weights, merged master, workers, shared engines) and what one ask goes through. It knows
no command line and no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Protocol

from lmgraph import assets, bundles, execute, graphfile
from lmgraph.engine import Engine
from lmgraph.errors import AssetError, GraphError, QueryError, RequestError, UserError, WorkerError
from lmgraph.graph import Graph, Node
from lmgraph.master import Master
from lmgraph.settings import Settings
from lmgraph.tokens import Vocabulary
from lmgraph.types import Answer, Ask, Decision, Delta, Message, Step, Trace
from lmgraph.workers.base import Worker
from lmgraph.workers.embedded import EmbeddedWorker, SharedEngine
from lmgraph.workers.openai import OpenAIWorker
from lmgraph.workers.scripted import ScriptedWorker

MASTER_CONTEXT = 1024
TINY = "smollm2-135m"


class Watcher(Protocol):
    """How long work is shown: a door draws bars, a test ignores them."""

    def progress(self, task: str, done: int, total: int) -> None:
        """`done` of `total` of a named piece of work."""
        ...

    def say(self, text: str) -> None:
        """One line worth knowing."""
        ...


class Quiet:
    """A watcher that shows nothing."""

    def progress(self, task: str, done: int, total: int) -> None: ...

    def say(self, text: str) -> None: ...


def builtin_graph() -> str:
    """The text of the built-in graph `mmlu`."""
    return (resources.files("lmgraph") / "data" / "mmlu.yaml").read_text(encoding="utf-8")


def read_graph(path: Path | None) -> tuple[Graph, Path | None]:
    """(graph, folder it lies in): the file when given, ./graph.yaml when there is one, else the built-in graph."""
    if path is None:
        path = Path("graph.yaml") if Path("graph.yaml").is_file() else None
    if path is None:
        return graphfile.loads(builtin_graph(), "the built-in graph"), None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GraphError(f"{path} cannot be read: {error}.", f"Make one: lmgraph graph init {path}") from error
    return graphfile.loads(text, str(path)), path.parent


def with_profile(given: Graph, profile: str) -> Graph:
    """The graph as it runs under a profile: `tiny` puts SmolLM2-135M in place of every catalogue model."""
    if profile != "tiny":
        return given
    nodes = {
        name: replace(node, worker=replace(node.worker, model=TINY))
        if node.worker.kind == "embedded" and node.worker.model in assets.CATALOGUE
        else node
        for name, node in given.nodes.items()
    }
    return replace(given, nodes=nodes)


def model_file(model: str, cache: Path, beside: Path | None, watcher: Watcher) -> Path:
    """The GGUF of a catalogue name (fetched when missing) or of a path (relative ones: beside the graph)."""
    if model in assets.CATALOGUE:
        asset = assets.CATALOGUE[model]
        return assets.fetch(asset, cache, lambda done, total: watcher.progress(f"fetching {asset.name}", done, total), watcher.say)
    path = Path(model).expanduser()
    path = path if path.is_absolute() or beside is None else beside / path
    if not path.is_file():
        raise AssetError(
            f"Model {model!r} is neither in the catalogue nor a file.", f"Valid: {', '.join(assets.CATALOGUE)}, or a GGUF file."
        )
    return path


def base_of(vocabulary_base: str) -> assets.Asset:
    """The catalogue's asset with this sha256. Raises AssetError."""
    for asset in assets.CATALOGUE.values():
        if asset.sha256 == vocabulary_base:
            return asset
    raise AssetError(
        f"No base weights with sha256 {vocabulary_base[:16]}... in the catalogue.",
        "Use a bundle trained on a catalogue model, or a merged GGUF.",
    )


def master_file(name: str, cache: Path, beside: Path | None, watcher: Watcher) -> tuple[Path, Vocabulary]:
    """(GGUF, vocabulary) of a master: a .gguf file as it is, or a bundle merged into its base on first use."""
    if name.endswith(".gguf"):
        path = model_file(name, cache, beside, watcher)
        return path, bundles.vocabulary_of(path)
    bundle = bundles.read(name, beside)
    target = bundles.merged_path(bundle, cache)
    if target.is_file():
        return target, bundle.vocabulary
    asset = base_of(bundle.vocabulary.base)
    base = model_file(asset.name, cache, beside, watcher)
    path = bundles.ready(bundle, base, cache, lambda done, total: watcher.progress(f"merging master {bundle.name}", done, total))
    return path, bundle.vocabulary


class Runtime:
    """A graph that can answer. Make one with `open`, close it when done (`async with` does both)."""

    def __init__(self, given: Graph, settings: Settings, folder: Path | None, watcher: Watcher) -> None:
        self.graph = given
        self.settings = settings
        self._folder = folder
        self._watcher = watcher
        self._master: Master | None = None
        self._master_lock = asyncio.Lock()
        self._files_lock = asyncio.Lock()
        """one fetch or merge at a time: two of one file would write into each other"""
        self._shared: dict[Path, SharedEngine] = {}
        self._workers: dict[str, Worker] = {}

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
        for worker in self._workers.values():
            await worker.close()
        if self._master is not None:
            await self._master.engine.close()
            self._master = None

    async def master(self, slots: int = 4) -> Master:
        """The master, loaded on first use. Raises VocabularyMismatch when graph and bundle do not fit."""
        async with self._master_lock:
            if self._master is None:
                async with self._files_lock:
                    path, vocabulary = await asyncio.to_thread(
                        master_file, self.graph.master.bundle, self.settings.cache, self._folder, self._watcher
                    )
                engine = await Engine.open(path, context=MASTER_CONTEXT, slots=slots, threads=self.settings.threads)
                try:
                    self._master = Master(engine, vocabulary, self.graph)
                except Exception:
                    await engine.close()
                    raise
            return self._master

    async def decide(self, query: str, *, rewriting: bool | None = None) -> Decision:
        """The master's decision for one query, from start."""
        return await (await self.master()).decide(query, rewriting=rewriting)

    async def worker(self, node: Node) -> Worker:
        """The worker of a node, opened on first use; nodes that name the same model share its engine."""
        if node.name not in self._workers:
            self._workers[node.name] = await self._open_worker(node)
        return self._workers[node.name]

    async def _open_worker(self, node: Node) -> Worker:
        spec = node.worker
        if spec.kind == "scripted":
            return ScriptedWorker(spec.answers)
        if spec.kind == "openai":
            return OpenAIWorker(
                spec.urls, spec.model, system=spec.system, key_env=spec.key_env, timeout_s=spec.timeout_s, temperature=spec.temperature
            )
        try:
            async with self._files_lock:
                path = await asyncio.to_thread(model_file, spec.model, self.settings.cache, self._folder, self._watcher)
        except AssetError as error:
            raise WorkerError(f"node {node.name!r}: {error.message}", error.hint) from error
        if path not in self._shared:
            threads = self.settings.threads
            self._shared[path] = SharedEngine(lambda: Engine.open(path, context=4096, slots=1, threads=threads))
        return EmbeddedWorker(self._shared[path], spec.system, spec.temperature)

    @property
    def loaded(self) -> bool:
        """Whether the master is in memory."""
        return self._master is not None

    def states(self) -> dict[str, list[dict[str, object]]]:
        """Health of every node's replicas, as far as calls have shown it (nodes over the wire that were asked at least once)."""
        return {name: worker.states() for name, worker in self._workers.items() if isinstance(worker, OpenAIWorker)}

    async def answer(
        self, ask: Ask, decided: Callable[[Decision], None] | None = None, answering: Callable[[str], None] | None = None
    ) -> AsyncIterator[Delta]:
        """Stream an answer; the last Delta carries the Trace.

        `decided` is told the decision before the worker starts, `answering` the node whose worker gives the first piece.
        """
        able = self._able(ask) if ask.needs else None
        if not ask.query.strip() and not (ask.needs and ask.node):
            raise QueryError("The query is empty.", 'Give a question: lmgraph ask "..."')
        decision: Decision | None = None
        if ask.node is None:
            decision = await (await self.master()).decide(ask.query, among=able)
            if decided:
                decided(decision)
            name, request = decision.node, decision.rewritten
        elif ask.node in self.graph.nodes:
            name, request = ask.node, ask.query
        else:
            raise UserError(f"There is no node {ask.node!r}.", f"Valid: {', '.join(self.graph.nodes)}")
        last = max(i for i, m in enumerate(ask.messages) if m.role == "user")
        plain = all(m.raw is None for m in ask.messages[last:])  # else: pictures, or a tool's answer after it; passed on as it is
        messages = (*ask.messages[:last], Message("user", request)) if plain else ask.messages
        steps: list[Step] = []
        stream = execute.run(
            self.graph.nodes[name],
            [node for node in self._chain(name) if able is None or node.name in able],
            messages,
            self.worker,
            max_tokens=ask.max_tokens,
            temperature=ask.temperature,
            options=ask.options,
            answering=answering,
        )
        try:
            async for item in stream:
                if isinstance(item, Step):
                    steps.append(item)
                elif item.done:
                    yield replace(item, trace=Trace(decision, tuple(steps)))
                else:
                    yield item
        finally:
            await stream.aclose()

    def _able(self, ask: Ask) -> list[str]:
        """Nodes that accept what an ask needs besides text. Raises RequestError when there is none, or the pinned one does not."""
        able = [name for name, node in self.graph.nodes.items() if ask.needs <= set(node.accepts)]
        if not able or (ask.node in self.graph.nodes and ask.node not in able):
            kinds = ", ".join(sorted({kind for node in self.graph.nodes.values() for kind in node.accepts}))
            who = f"Node {ask.node} does not accept" if able else "No node accepts"
            raise RequestError(f"{who} {' and '.join(sorted(ask.needs))}; what nodes of this graph accept: {kinds}.", param="messages")
        return able

    def _chain(self, name: str) -> list[Node]:
        """Nodes that take over when a worker fails: the node's own fallback, its fallback, and so on, then the master's."""
        chain: list[str] = []
        at = self.graph.nodes[name].fallback
        while at and at != name and at not in chain:
            chain.append(at)
            at = self.graph.nodes[at].fallback
        general = self.graph.master.fallback
        if general and general != name and general not in chain:
            chain.append(general)
        return [self.graph.nodes[n] for n in chain]


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
