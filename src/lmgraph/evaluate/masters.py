"""lmgraph's own contestants: the trained master of a graph, and rows fitted on the untouched base.

They decide as the gateway does: prompt, one forward pass, softmax over the functional tokens. A master for a set of few examples is
trained here (extra `train`), with one recipe for every set; what was trained is kept in a folder and found again by what made it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lmgraph import bundles
from lmgraph.assets import atomic, digest_of
from lmgraph.engine import Engine
from lmgraph.errors import MissingExtra
from lmgraph.evaluate.contestants import Verdict
from lmgraph.evaluate.journal import key_of
from lmgraph.graph import Graph, MasterSpec, Node, WorkerSpec
from lmgraph.master import QUERY_LIMIT, Master
from lmgraph.tokens import Vocabulary
from lmgraph.train import heads
from lmgraph.train.examples import Example

Progress = Callable[[str, int, int], None]
Made = TypeVar("Made")
CONTEXT = 1024
START = "mmlu"
"""built-in bundle whose LoRA few examples begin with"""
FEW: dict[str, Any] = {"batch_tokens": 768, "learning_rate": 5e-4, "warmup": 0.1, "validate_every": 1_000_000}
"""recipe for a few examples a node; chosen on BANKING77's training queries that are not among the examples"""
PASSES = 50
"""times that a node's examples are seen, all together: 5 epochs of 10 examples"""
EPOCHS = (3, 8)
"""fewest and most epochs"""


class Served:
    """A master as it serves: one forward pass a query."""

    name = "lmgraph master"
    weights = ""

    def __init__(self, master: Master | None = None) -> None:
        self._master = master

    async def fit(self, examples: Sequence[Example], nodes: Mapping[str, str]) -> None:
        """Nothing: it was trained before. Only what decides is named: its weights, and which tokens the graph lets it choose among."""
        if self._master is not None:
            given = self._master.graph
            allowed = [[name, given.nodes[name].token] for name in given.neighbours()]
            self.weights = key_of(digest_of(self._master.engine.path), allowed)

    async def decide(self, query: str) -> Verdict:
        """The chosen node and how far the query belongs to a node at all (`Decision.scope`)."""
        assert self._master is not None
        made = await self._master.decide(query, rewriting=False, scoped=True)
        return Verdict(made.chosen, made.scope or 0.0)

    async def close(self) -> None:
        """Unload the model."""
        if self._master is not None:
            await self._master.engine.close()


class Few(Served):
    """A master trained on the examples that it is given: rows from the nodes' names, LoRA from the bundle `start` (None: from nothing).

    What was trained is found again by examples, nodes, recipe and the digest of `start`.
    """

    def __init__(self, base: Path, digest: str, start: Path | None, folder: Path, threads: int, progress: Progress) -> None:
        super().__init__()
        self._base, self._digest, self._start, self._folder, self._threads = base, digest, start, folder, threads
        self._progress = progress

    async def fit(self, examples: Sequence[Example], nodes: Mapping[str, str]) -> None:
        """Train, merge, load. A run that was stopped goes on from its checkpoint; a finished one is found again."""
        try:
            from lmgraph.train import tune
        except ImportError as error:
            raise MissingExtra(self.name, "train") from error
        epochs = float(min(max(round(PASSES * len(nodes) / len(examples)), EPOCHS[0]), EPOCHS[1]))
        recipe = replace(tune.Recipe(), threads=self._threads, epochs=epochs, **FEW)
        vocabulary = _vocabulary(self._base, self._digest, nodes)
        begins = bundles.read(str(self._start)).digest if self._start else ""
        key = [begins, vocabulary.to_json(), asdict(recipe), [(e.query, e.node) for e in examples]]
        self.weights = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
        folder = self._folder / f"master-{self.weights}"
        merged = folder / "master.gguf"
        if not merged.is_file():

            def train(progress: Progress) -> None:
                def watch(line: str) -> None:
                    if line.startswith("{"):
                        at = json.loads(line)
                        progress(f"training a master, {len(nodes)} nodes", at["step"], at["of"])

                tune.main(self._base, examples, {}, vocabulary, recipe, folder, watch, self._start)

            if not (folder / "metrics.json").is_file():  # the last thing that training leaves
                await _apart(train, self._progress)
            bundles.merge(bundles.read(str(folder)), self._base, merged)
        self._master = await _load(merged, nodes, self._threads)


class RowsOnly(Served):
    """Functional rows fitted on hidden states of the untouched base, on at most `most` of the examples, evenly spread."""

    def __init__(self, base: Path, digest: str, folder: Path, threads: int, progress: Progress, most: int) -> None:
        super().__init__()
        self.name = "lmgraph rows only"
        self._base, self._digest, self._folder, self._threads, self._progress, self._most = base, digest, folder, threads, progress, most

    async def fit(self, examples: Sequence[Example], nodes: Mapping[str, str]) -> None:
        """States of the examples (kept in the folder), rows and temperature on a tenth of them, a merged file."""
        if len(examples) > self._most:
            examples = [examples[i * len(examples) // self._most] for i in range(self._most)]
            self.name = f"lmgraph rows only ({self._most:,} examples)"
        vocabulary = _vocabulary(self._base, self._digest, nodes)
        queries = [e.query for e in examples]
        key = hashlib.sha256(json.dumps([self._digest, QUERY_LIMIT, list(nodes), queries]).encode()).hexdigest()[:12]
        folder = self._folder / f"rows-{key}"
        merged = folder / f"rows-{hashlib.sha256(json.dumps([e.node for e in examples]).encode()).hexdigest()[:12]}.gguf"
        if not merged.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            found = await states_of(
                self._base, None, vocabulary, queries, QUERY_LIMIT, self._threads, folder / "states.npy", self._progress
            )
            labels = heads.index([e.node for e in examples], vocabulary.nodes)
            aside = np.arange(len(examples)) % 10 == 9
            if not aside.any():  # fewer than ten: the penalty is chosen on what it was fitted on
                fitted = heads.fit_all(found, labels, len(nodes), found, labels)
            else:
                fitted = heads.fit_all(found[~aside], labels[~aside], len(nodes), found[aside], labels[aside])
            rows = heads.fit(found, labels, len(nodes), fitted.penalty)
            heads.rows_bundle(folder, vocabulary, replace(fitted, rows=rows), found.shape[1])
            bundles.merge(bundles.read(str(folder)), self._base, merged)
        self._master = await _load(merged, nodes, self._threads)


async def _apart(work: Callable[[Progress], Made], progress: Progress) -> Made:
    """`work` in a thread of its own. Where the caller is cancelled (Ctrl-C), the next progress that it shows ends it."""
    left = threading.Event()

    def watch(task: str, done: int, total: int) -> None:
        if left.is_set():
            raise asyncio.CancelledError
        progress(task, done, total)

    try:
        return await asyncio.to_thread(work, watch)
    finally:
        left.set()


def _vocabulary(base: Path, digest: str, nodes: Mapping[str, str]) -> Vocabulary:
    first = bundles.vocabulary_size(base)
    return Vocabulary(first, len(nodes), first + len(nodes), {name: token for token, name in enumerate(nodes)}, base=digest)


async def _load(merged: Path, nodes: Mapping[str, str], threads: int) -> Master:
    worker = WorkerSpec("scripted")
    given = Graph(
        {name: Node(name, token, text, worker) for token, (name, text) in enumerate(nodes.items())},
        {"start": ("*",)},
        MasterSpec(bundle=str(merged)),
    )
    engine = await Engine.open(merged, context=CONTEXT, slots=1, threads=threads)
    return Master(engine, bundles.vocabulary_of(merged), given)


async def states_of(
    weights: Path,
    adapter: Path | None,
    vocabulary: Vocabulary,
    queries: Sequence[str],
    limit: int,
    threads: int,
    keep: Path,
    progress: Progress,
) -> np.ndarray:
    """Hidden states (N, D) of queries under base weights and, where one is named, a bundle's adapter; kept in a file for the next time.

    By torch where it is installed and fast here (kept when all are there), else by llama.cpp (kept as they come), which needs merged
    weights for an adapter.
    """
    with suppress(FileNotFoundError, ValueError, EOFError):  # a damaged file is made anew
        found = np.load(keep)
        if found.ndim == 2 and len(found) == len(queries) and not np.isnan(found).any():
            return np.asarray(found)
    try:
        from lmgraph.train import model
    except MissingExtra:
        fast = False
    else:
        fast = model.fast_bf16()
    if fast:
        tensors = None if adapter is None else bundles.read_tensors(adapter)

        def compute(show: Progress) -> np.ndarray:
            return model.states(weights, tensors, vocabulary, queries, limit, lambda done, total: show("hidden states", done, total))

        found = await _apart(compute, progress)
        with atomic(keep) as part, part.open("wb") as file:
            np.save(file, found)
        return found
    if adapter is not None:
        weights = bundles.merge(bundles.read(str(adapter.parent)), weights, keep.with_suffix(".gguf"))
    try:
        engine = await Engine.open(weights, context=CONTEXT, slots=2, threads=threads, states=True)
        try:
            return await heads.states(engine, vocabulary, queries, limit, lambda done, total: progress("hidden states", done, total), keep)
        finally:
            await engine.close()
    finally:
        if adapter is not None:
            weights.unlink()
