"""Time of a hop on a walk: the choice among the neighbours of the node where the walk stands, in graphs of more and more nodes.

    .venv/bin/python benchmarks/hop_time.py --out benchmarks/results/hop_time.json

Each node has the same number of neighbours, and `end`, however many nodes the graph has. In one run, alternating, with the same base
weights in the same engine, after one finished step (its request and a digest of its answer are in the prompt):
- `hop`: lmgraph's decision, and whether more will follow (a second choice, from the cached prefix of the first); no request is written;
- `listing_cached`: all descriptions, the query and the finished step, choice among the names, the listing's prefix kept in the cache;
- `listing_cold`: the same without it, what a stateless call costs.
Queries are different each time. Medians; ratios of medians. Rows are random: time does not depend on them.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

from decision_time import ROOM, at_each_size, descriptions, options_of, timed, write

from lmgraph import bundles
from lmgraph.engine import Engine
from lmgraph.graph import END, START, Graph, MasterSpec, Node, WorkerSpec
from lmgraph.master import Master
from lmgraph.types import Passed

NEIGHBOURS = 8
REQUEST = "State the law that governs this case and the quantities it needs."
ANSWER = "The law is that of conservation of energy; the mass is 2 kg, the height 10 m, the acceleration 9.81 m/s2, and friction is small."


def ring(nodes: int) -> Graph:
    """Each node may be followed by the next ones and by the end."""
    names = [f"node_{i}" for i in range(nodes)]
    made = {name: Node(name, i, f"about {name}", WorkerSpec("scripted", answers={"*": "."})) for i, name in enumerate(names)}
    edges = {name: (*(names[(i + k) % nodes] for k in range(1, NEIGHBOURS + 1)), END) for i, name in enumerate(names)}
    return Graph(made, {START: ("*",), **edges}, MasterSpec("none.gguf"))


async def measure(path: Path, nodes: int, queries: list[str], threads: int, cold: int) -> dict[str, float]:
    listing_text = "Experts:\n" + "\n".join(descriptions(nodes)) + "\n\nWhich expert comes next? Question: "
    engine = await Engine.open(path, context=min(ROOM, 1024 + 40 * nodes), slots=1, threads=threads)
    try:
        master = Master(engine, bundles.vocabulary_of(path), ring(nodes))
        step = Passed("node_0", tuple(await engine.tokenise(REQUEST)), ANSWER)
        listing, ask = await engine.tokenise(listing_text), await engine.tokenise("\nExpert:")
        told = await engine.tokenise(f"\nStep 1: {descriptions(nodes)[0].split(':')[0]}: {REQUEST}\nAnswer: {ANSWER}")
        names = sorted({(await engine.tokenise(" " + line.split(":")[0]))[0] for line in descriptions(nodes)})
        ids = [(await engine.tokenise(query))[:256] for query in queries]
        times: dict[str, list[float]] = {"hop": [], "listing_cached": [], "listing_cold": []}
        async with await engine.session() as session:
            await session.choose([*listing, *ids[-1]], names)
            for query in ids[: 10 if nodes <= 100 else 3]:
                times["listing_cached"].append(await timed(session, [*listing, *query, *told, *ask], names))
            for i, query in enumerate(ids[:cold]):
                await timed(session, [3 + i % 40] * 3, None)
                times["listing_cold"].append(await timed(session, [*listing, *query, *told, *ask], names))
        for i, text in enumerate(queries):
            async with await engine.session() as session:
                await timed(session, [3 + i % 40] * 3, None)  # nothing of the last prompt can be used again
            began = time.perf_counter()
            await master.decide(text, "node_0", rewriting=False, trace=[step], ahead=True)
            times["hop"].append((time.perf_counter() - began) * 1000)
    finally:
        await engine.close()
    middle = {name: statistics.median(values) for name, values in times.items()}
    out: dict[str, float] = {"nodes": nodes, "neighbours": NEIGHBOURS, "queries": len(queries), "listing_tokens": len(listing)}
    out |= {f"{name}_ms": round(value, 2) for name, value in middle.items()}
    return out | {f"{name}_over_hop": round(middle[name] / middle["hop"], 2) for name in ("listing_cached", "listing_cold")}


if __name__ == "__main__":
    given = options_of(__doc__, [10, 100, 1000])
    results = asyncio.run(at_each_size(given, measure))
    for row in results:
        row["hop_over_smallest"] = round(row["hop_ms"] / results[0]["hop_ms"], 3)
    write(given, results)
