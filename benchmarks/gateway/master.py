"""The master in the path: what the gateway adds to decisions, and what its cache saves.

    .venv/bin/python benchmarks/gateway/master.py --out benchmarks/results/gateway_master.json

The built-in master decides the same queries in three ways, one straight after another, the order turned round in each round:
- `engine`: `Master.decide` in this process, 16 at a time: the engine's own batch throughput;
- `route`: POST /v1/route, 16 clients, one query each;
- `batch`: one POST /v1/route with all of them.
Gateway and this process have engines alike (slots, threads) and only one of them works at a time. Medians of each round's ratio to
`engine`, with rewriting (`auto`) and without (`never`). Then the cache: a chat at temperature 0 is sent twice, and the time of the second
answer (a hit, checked) is held against the decision's own time as /v1/route tells it, for queries that neither has seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from run import HERE, machine, running

from lmgraph import files, runtime, settings
from lmgraph.train import examples

LEAST, CACHE_MOST = 0.9, 1 / 20
"""of the engine's throughput; of a decision's time"""
READY_S = 300.0


def graph(upstream: str, rewrite: str) -> str:
    """The built-in graph with the mock behind every node."""
    given = yaml.safe_load(files.builtin_graph()) | {"answer": {"mode": "single"}}
    for node in given["nodes"].values():
        node |= {"worker": {"kind": "openai", "urls": [f"{upstream}/v1"], "model": "mock"}, "rewrite": rewrite}
    return yaml.safe_dump(given, sort_keys=False)


async def rate(queries: Sequence[str], decide: Callable[[str], Awaitable[object]], concurrent: int) -> float:
    """Decisions a second, so many at a time."""
    todo = iter(queries)

    async def work() -> None:
        for query in todo:
            await decide(query)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrent)))
    return len(queries) / (time.perf_counter() - began)


async def ready(http: aiohttp.ClientSession) -> None:
    limit = time.monotonic() + READY_S
    while True:
        async with http.get("/readyz") as answer:
            if answer.status == 200:
                return
        if time.monotonic() > limit:
            raise SystemExit("The gateway's master was not loaded in time.")
        await asyncio.sleep(0.2)


async def post(http: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> tuple[Any, str, float]:
    """(answer, what the cache said, milliseconds)."""
    began = time.perf_counter()
    async with http.post(path, json=body) as answer:
        found = await answer.json()
        took = (time.perf_counter() - began) * 1000
    if answer.status != 200:
        raise SystemExit(f"{path} answered {answer.status}: {found}")
    return found, answer.headers.get("x-lmgraph-cache", "none"), took


async def throughput(http: aiohttp.ClientSession, own: runtime.Runtime, queries: list[str], rounds: int, concurrent: int) -> dict[str, Any]:
    master = await own.master()

    async def route(query: str) -> None:
        await post(http, "/v1/route", {"query": query})

    async def batch(part: Sequence[str]) -> float:
        return len(part) / (await post(http, "/v1/route", {"queries": list(part)}))[2] * 1000

    ways: dict[str, Callable[[Sequence[str]], Awaitable[float]]] = {
        "engine": lambda part: rate(part, master.decide, concurrent),
        "route": lambda part: rate(part, route, concurrent),
        "batch": batch,
    }
    each = len(queries) // (rounds + 1)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):  # the first one warms up
        part = queries[i * each : (i + 1) * each]
        for name in list(ways)[:: -1 if i % 2 else 1]:
            found[name].append(await ways[name](part))
    out: dict[str, Any] = {f"{name}_per_s": round(statistics.median(values[1:]), 2) for name, values in found.items()}
    for name in ("route", "batch"):
        out[f"{name}_over_engine"] = round(statistics.median(a / b for a, b in zip(found[name][1:], found["engine"][1:])), 3)
    return out | {"queries": each * rounds, "rounds": found, "holds": out["route_over_engine"] >= LEAST}


async def cache(http: aiohttp.ClientSession, queries: Sequence[str]) -> dict[str, Any]:
    times: dict[str, list[float]] = {"decision": [], "miss": [], "hit": []}
    for query in queries:
        decision, _, _ = await post(http, "/v1/route", {"query": query})
        times["decision"].append(sum(decision["ms"].values()))
        chat = {"model": "lmgraph", "temperature": 0, "messages": [{"role": "user", "content": query}]}
        for expected in ("miss", "hit"):
            _, said, took = await post(http, "/v1/chat/completions", chat)
            if said != expected:
                raise SystemExit(f"The cache said {said!r}, expected {expected!r}: {query!r}")
            times[expected].append(took)
    out: dict[str, Any] = {f"{name}_ms": round(statistics.median(values), 3) for name, values in times.items()}
    share = out["hit_ms"] / out["decision_ms"]
    return out | {"hit_over_decision": round(share, 4), "queries": len(queries), "holds": share < CACHE_MOST}


async def compare(rewrite: str, options: argparse.Namespace, queries: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        _, upstream = stack.enter_context(running("upstream", [sys.executable, str(HERE.absolute() / "upstream.py")], folder))
        (folder / "graph.yaml").write_text(graph(upstream, rewrite))
        command = [sys.executable, "-m", "lmgraph", "serve", "graph.yaml", "--port", "0"]
        if not options.plain:
            command += ["--store", "sqlite:///bench.db"]
        _, url = stack.enter_context(running("lmgraph", command, folder))
        async with aiohttp.ClientSession(url) as http, runtime.Runtime.open(settings.read(), folder / "graph.yaml") as own:
            await ready(http)
            found = {"decisions": await throughput(http, own, queries[: -options.cached], options.rounds, options.concurrent)}
            if not options.plain:
                found["cache"] = await cache(http, queries[-options.cached :])
            return found


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=260, help="in all")
    parser.add_argument("--cached", type=int, default=20, help="of these: queries asked twice")
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--rewrite", nargs="+", default=["auto", "never"], help="as in graph.yaml")
    parser.add_argument("--plain", action="store_true", help="a gateway without a store: no cache")
    parser.add_argument("--data", type=Path, default=Path("data/mmlu_dev.jsonl"), help="where the queries come from")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = examples.load([options.data])
    queries = [rows[i * len(rows) // options.queries].query for i in range(options.queries)]
    report: dict[str, Any] = {"command": shlex.join(sys.argv), "machine": machine(None)}
    report["threads"] = os.environ.get("LMGRAPH_THREADS", "all cores")
    for rewrite in options.rewrite:
        report[rewrite] = await compare(rewrite, options, queries)
        print(rewrite, json.dumps(report[rewrite]), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
