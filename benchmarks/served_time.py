"""A master on a llama.cpp server (over loopback) against the same master in this process: one decision at a time, and many at once.

    .venv/bin/python benchmarks/served_time.py --out benchmarks/results/served_time.json        # the built-in master; about a minute

Both have the same weights, threads and slots; queries take turns between them. Medians of a decision without rewriting, and decisions a
second of sixteen at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmgraph import adapters, bundles, graphfile, settings
from lmgraph.assets import atomic
from lmgraph.files import Quiet, builtin_graph
from lmgraph.master import Master
from lmgraph.runtime import Runtime

SERVER = """\
import signal, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = sys.argv[1], ["127.0.0.1"], int(sys.argv[3])
params.n_parallel, params.n_ctx = 4, 4096
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[4])
params.verbosity, params.warmup, params.fit_params, params.cache_ram_mib = -1, False, False, 0
lora = xllamacpp.CommonAdapterLoraInfo()
lora.path, lora.scale = sys.argv[2], 0.0
params.lora_adapters = [lora]
server = xllamacpp.Server(params)
print("ready", flush=True)
signal.pause()
"""


async def alone(master: Master, query: str) -> float:
    began = time.perf_counter()
    await master.decide(query, rewriting=False)
    return (time.perf_counter() - began) * 1000


async def together(master: Master, queries: list[str]) -> float:
    began = time.perf_counter()
    await asyncio.gather(*(master.decide(query, rewriting=False) for query in queries))
    return len(queries) / (time.perf_counter() - began)


async def measure(url: str, queries: list[str], rounds: int) -> dict[str, Any]:
    given = graphfile.loads(builtin_graph())
    using = settings.read()
    async with (
        Runtime.open(using, given=given, watcher=Quiet()) as here,
        Runtime.open(using, given=replace(given, master=replace(given.master, server=url)), watcher=Quiet()) as there,
    ):
        masters = {"here": await here.master(), "served": await there.master()}
        times: dict[str, list[float]] = {name: [] for name in masters}
        rates: dict[str, list[float]] = {name: [] for name in masters}
        for query in queries:
            for name, master in masters.items():
                times[name].append(await alone(master, query))
        for _ in range(rounds):
            for name, master in masters.items():
                rates[name].append(await together(master, queries[:16]))
    out: dict[str, Any] = {f"{name}_ms": round(statistics.median(found), 2) for name, found in times.items()}
    out |= {f"{name}_per_s": round(statistics.median(found), 2) for name, found in rates.items()}
    return out | {
        "served_over_here_ms": round(out["served_ms"] / out["here_ms"], 3),
        "served_over_here_per_s": round(out["served_per_s"] / out["here_per_s"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path("data/hard.jsonl"), help="queries, one JSON object a line")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = options.data.read_text(encoding="utf-8").splitlines()[: options.queries]
    using, bundle = settings.read(), bundles.read("mmlu")
    walk = adapters.walk_path(bundle, using.cache)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVER, str(bundles.merged_path(bundle, using.cache)), str(walk), str(port), str(using.threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout and server.stdout.readline() == "ready\n"
            found = asyncio.run(measure(f"http://127.0.0.1:{port}", [json.loads(line)["query"] for line in lines], options.rounds))
        finally:
            server.kill()
    report = {"command": shlex.join(sys.argv), "threads": using.threads, "queries": len(lines), **found}
    print(json.dumps(report, indent=2))
    if options.out:
        with atomic(options.out) as part:
            part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
