"""How a master comes to life: its weights loaded in this process, or those of a llama.cpp server elsewhere that many share.

It knows which file a graph's master is and what it puts on. It does not know when one is wanted, nor how engines work.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from lmgraph import bundles
from lmgraph.assets import digests_of
from lmgraph.engine import Engine
from lmgraph.errors import VocabularyMismatch, WorkerError
from lmgraph.files import adapter_files
from lmgraph.graph import Graph
from lmgraph.master import Master, fits
from lmgraph.tokens import Vocabulary

CONTEXT = 1024
Fetch = Callable[[str], Awaitable[tuple[Path, Vocabulary]]]
"""a master by its name: its file, made ready"""


async def here(given: Graph, folder: Path | None, cache: Path, fetch: Fetch, slots: int, threads: int) -> tuple[Master, Mapping[str, str]]:
    """A master in this process, and the digests of what it wears."""
    path, vocabulary = await fetch(given.master.bundle)
    fits(given, vocabulary)
    worn, digests = await asyncio.to_thread(wearing, given, folder, cache)
    engine = await Engine.open(path, context=CONTEXT, slots=slots, threads=threads, adapters=sorted({*worn.values()}))
    return Master(engine, vocabulary, given, worn), digests


async def elsewhere(given: Graph, folder: Path | None, cache: Path, fetch: Fetch) -> tuple[Master, Mapping[str, str]]:
    """A master on a server, and the names of what it wears there. A bundle's weights are not needed here.

    Raises VocabularyMismatch where the server has other weights, EngineError where it does not answer or lacks an adapter, WorkerError
    where its key is missing.
    """
    spec = given.master
    if spec.key_env and not os.environ.get(spec.key_env):
        raise WorkerError(f"The environment variable {spec.key_env}, key of the master's server, is not set.", f"export {spec.key_env}=...")
    if spec.bundle.endswith(".gguf"):
        path, vocabulary = await fetch(spec.bundle)
    else:
        bundle = await asyncio.to_thread(bundles.read, spec.bundle, folder)
        path, vocabulary = bundles.merged_path(bundle, cache), bundle.vocabulary
    fits(given, vocabulary)
    worn, names = await asyncio.to_thread(wearing, given, folder, cache)
    engine = await Engine.connect(spec.server, os.environ.get(spec.key_env, ""), path, sorted({*worn.values()}))
    try:
        spelt = await engine.tokenise(vocabulary.name(0) + vocabulary.end_name, special=True)
        merged = re.fullmatch(r"(.+)-[0-9a-f]{16}\.gguf", path.name)
        other = merged is not None and engine.served != path.name and re.fullmatch(merged[1] + r"-[0-9a-f]{16}\.gguf", engine.served)
        if spelt != [vocabulary.first_id, vocabulary.end_id] or other:
            raise VocabularyMismatch(
                f"The master's server has {engine.served or 'other weights'}, and this graph's master is {path.name}.",
                f"Make its file with: lmgraph train export {spec.bundle} --out {path.name}",
            )
    except BaseException:
        await engine.close()
        raise
    return Master(engine, vocabulary, given, worn), names


def wearing(given: Graph, folder: Path | None, cache: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """What the master puts on where, and what tells it from others: its digests; its file names, where a server has it."""
    worn = adapter_files(given, folder, cache)
    return worn, {name: path.name for name, path in worn.items()} if given.master.server else digests_of(worn)


def weights(given: Graph) -> tuple[str, str, str, dict[str, str]]:
    """What the master's engine holds: its bundle (or where it is served), the adapters of nodes."""
    spec = given.master
    return spec.bundle, spec.server, spec.key_env, {name: node.adapter for name, node in given.nodes.items() if node.adapter}
