"""Decision time: one functional token against bare prefill, and against all descriptions in the prompt.

    .venv/bin/python benchmarks/decision_time.py --out benchmarks/results/decision_time.json

Everything is measured in one run, alternating, with the same base weights in the same engine. For each query:
- `prefill`: the query's tokens alone, nothing chosen (one token is sampled, as llama.cpp always does);
- `functional`: lmgraph's decision (template + query, softmax over the functional tokens of all nodes);
- `listing_cold`: all node descriptions, then the query, choice among node names: what a stateless call costs;
- `listing_cached`: the same with the listing's prefix kept in the cache, as a warm server would.
Queries are different each time, so that only template and listing can come from the cache. Medians; ratios of medians.
The larger graphs are the built-in descriptions numbered on; their rows are random (time does not depend on it). From about 350
nodes on the listing is longer than the base's context: it is timed all the same (`beyond_context`), though no answer could be trusted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np

from lmgraph import assets, bundles, files, graphfile, prompts, settings
from lmgraph.engine import Engine, Session
from lmgraph.tokens import Vocabulary
from lmgraph.train import examples, heads

BASE = "smollm2-135m"
LONGEST = 8192
"""context that the base was trained for, in tokens"""
ROOM = 32768
"""context that the measured copies claim, so that the engine times longer listings too"""


async def timed(session: Session, ids: list[int], allowed: list[int] | None) -> float:
    began = time.perf_counter()
    if allowed is None:
        async for _ in session.generate(ids, 1):
            pass
    else:
        await session.choose(ids, allowed)
    return (time.perf_counter() - began) * 1000


def build(base: Path, nodes: int, folder: Path) -> Path:
    """A rows-only master for `nodes` nodes."""
    import gguf

    first = len(gguf.GGUFReader(base).fields["tokenizer.ggml.tokens"].data)
    width = 576
    vocabulary = Vocabulary(first, nodes, first + nodes, {f"node_{i}": i for i in range(nodes)})
    rows = np.random.default_rng(0).normal(0, 0.1, (nodes, width)).astype(np.float32)
    heads.rows_bundle(folder / f"n{nodes}", vocabulary, heads.Fitted(rows, 1.0, 0.0, 0.0, 0.0), width)
    path = bundles.merge(bundles.read(str(folder / f"n{nodes}")), base, folder / f"n{nodes}.gguf")
    field = gguf.GGUFReader(path, "r+").fields["llama.context_length"]
    field.parts[field.data[0]][0] = ROOM
    return path


def descriptions(nodes: int) -> list[str]:
    given = list(graphfile.loads(files.builtin_graph()).nodes.values())
    return [f"{given[i % len(given)].name}{'' if i < len(given) else f'_{i}'}: {given[i % len(given)].description}" for i in range(nodes)]


async def measure(path: Path, nodes: int, queries: list[str], threads: int, cold: int) -> dict[str, float]:
    vocabulary = bundles.vocabulary_of(path)
    listing_text = "Experts:\n" + "\n".join(descriptions(nodes)) + "\n\nWhich expert should answer this question? Question: "
    engine = await Engine.open(path, context=min(ROOM, 1024 + 40 * nodes), slots=1, threads=threads)
    try:
        head, _, tail = prompts.render("")
        before, after = await engine.tokenise(head.text, True), await engine.tokenise(tail.text, True)
        listing, ask = await engine.tokenise(listing_text), await engine.tokenise("\nExpert:")
        names = sorted({(await engine.tokenise(" " + line.split(":")[0]))[0] for line in descriptions(nodes)})
        allowed = [vocabulary.first_id + t for t in vocabulary.nodes.values()]
        ids = [(await engine.tokenise(q))[:256] for q in queries]
        times: dict[str, list[float]] = {"prefill": [], "functional": [], "listing_cold": [], "listing_cached": []}
        async with await engine.session() as session:
            for i, query in enumerate(ids):
                flush = [3 + i % 40]  # another first token: nothing of the last prompt can be used again
                for name in ("prefill", "functional") if i % 2 else ("functional", "prefill"):
                    await timed(session, flush * 3, None)
                    times[name].append(
                        await timed(session, query, None) if name == "prefill" else await timed(session, before + query + after, allowed)
                    )
            for i, query in enumerate(ids[:cold]):
                await timed(session, [3 + i % 40] * 3, None)
                times["listing_cold"].append(await timed(session, listing + query + ask, names))
            for query in ids[cold : cold + (10 if nodes <= 100 else 3)]:
                times["listing_cached"].append(await timed(session, listing + query + ask, names))
    finally:
        await engine.close()
    middle = {name: statistics.median(values) for name, values in times.items() if values}
    out: dict[str, float] = {f"{name}_ms": round(value, 2) for name, value in middle.items()}
    out |= {
        "nodes": nodes,
        "queries": len(queries),
        "query_tokens_median": statistics.median(map(len, ids)),
        "listing_tokens": len(listing),
        "beyond_context": len(listing) + len(ask) + 256 > LONGEST,
    }
    out["functional_over_prefill"] = round(middle["functional"] / middle["prefill"], 3)
    for name in ("listing_cold", "listing_cached"):
        out[f"{name}_over_functional"] = round(middle[name] / middle["functional"], 2)
    return out


Measure = Callable[[Path, int, list[str], int, int], Awaitable[dict[str, float]]]
"""(master, nodes, queries, threads, cold queries) -> figures"""


def options_of(description: str, nodes: list[int]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=nodes)
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--data", type=Path, default=Path("data/mmlu_dev.jsonl"), help="where the queries come from")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


async def at_each_size(options: argparse.Namespace, measure: Measure) -> list[dict[str, float]]:
    """Figures for every number of nodes, printed as they come."""
    using = settings.read()
    base = assets.fetch(assets.CATALOGUE[BASE], using.cache)
    rows = examples.load([options.data])
    queries = [rows[i * len(rows) // options.queries].query for i in range(options.queries)]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for nodes in options.nodes:
            path = build(base, nodes, Path(folder))
            results.append(await measure(path, nodes, queries, using.threads, 5 if nodes <= 100 else 1))
            print(json.dumps(results[-1]), flush=True)
    return results


def write(options: argparse.Namespace, results: list[dict[str, float]]) -> None:
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"threads": settings.read().threads, "base": BASE, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    given = options_of(__doc__, [17, 100, 1000])
    write(given, asyncio.run(at_each_size(given, measure)))
