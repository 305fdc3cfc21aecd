"""The gateway side by side with a bare pass-through and with LiteLLM's proxy: one run, one machine, ratios.

    .venv/bin/python benchmarks/gateway/run.py --litellm --soak 200000 --streams 1000 --out benchmarks/results/gateway.json

All servers stand before the same mock upstream, one process each, and stay up. Each cell (plain or streaming, 1, 16 or 64 connections) is
measured on one server straight after another, and the next round goes through them the other way round: what the machine does meanwhile
touches all of them. Figures are medians over the rounds, ratios medians of each round's ratio. `cpu` is processor time of the server's
process for one answer: of all figures the one that a busy machine disturbs least.

- `direct`: the load generator on the mock itself, which shows that neither of them is the bottleneck;
- `bare`: `bare.py`;
- `lmgraph`: a pinned node, no master; keys, limits, metrics, SQLite memory, and a trace asked for with every request;
- `whole`: the same process, and a node that says `stream: false`: plain answers are asked for whole;
- `kept`: the same process, and every request is a conversation of its own that is written to SQLite;
- `litellm`: its proxy, one worker, a master key, no database. It is slow: one round, and longer.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from load import NUMBER

HERE = Path(__file__).parent
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
MODES, CONNECTIONS = ("plain", "stream"), (1, 16, 64)
START_S = 120.0
MUSTS = {
    ("lmgraph", "bare"): ("rps", 0.6),
    ("lmgraph", "litellm"): ("rps", 40.0),
    ("whole", "bare"): ("rps", 0.6),
    ("kept", "bare"): ("rps", 0.6),
}
"""(server, measured against) -> least ratio of answers a second"""
P99 = 2.0
"""largest ratio to the bare one's p99"""
GRAPH = """\
version: 1
master: {{bundle: none.gguf}}
nodes:
  mock: {{token: 0, description: the mock, worker: {{kind: openai, urls: ['{url}/v1'], model: mock}}}}
  whole: {{token: 2, description: the same asked whole, worker: {{kind: openai, urls: ['{url}/v1'], model: mock, stream: false}}}}
  hold: {{token: 1, description: the mock that stays silent, worker: {{kind: openai, urls: ['{url}/v1'], model: hold}}}}
edges: {{start: ['*']}}
"""
LITELLM = """\
model_list:
  - model_name: mock
    litellm_params: {{model: openai/mock, api_base: '{url}/v1', api_key: none}}
general_settings: {{master_key: sk-bench}}
litellm_settings: {{telemetry: false}}
"""
Cell = tuple[str, str, int]
"""server, mode, connections"""


@dataclass
class Server:
    """Something to measure. Several may be the same process asked differently."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    model: str = "mock"
    key: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    modes: tuple[str, ...] = MODES


# ---------------------------------------------------------------- servers


@contextmanager
def running(name: str, command: Sequence[str], folder: Path, ready: str = "", environment: dict[str, str] | None = None) -> Iterator[Any]:
    """(process, address) of a server, ended afterwards. Its address is `ready` once a GET of it succeeds, else the first it prints."""
    said = folder / f"{name}.log"
    with said.open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=os.environ | (environment or {}))
    try:
        limit = time.monotonic() + START_S
        while not (address := _answers(ready) if ready else ADDRESS.search(said.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > limit:
                raise SystemExit(f"{name} did not start: {shlex.join(command)}\n{said.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)
        yield process, address.group()
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> re.Match[str] | None:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return ADDRESS.match(url)
    except OSError:
        return None


def start_lmgraph(upstream: str, folder: Path, plain: bool, stack: ExitStack) -> list[Server]:
    """The gateway; `plain`: as it was before it had keys and a store."""
    (folder / "graph.yaml").write_text(GRAPH.format(url=upstream))
    own, key, guarded = [sys.executable, "-m", "lmgraph"], "", []
    if not plain:
        store = ["--store", "sqlite:///bench.db"]
        made = subprocess.run(
            [*own, "keys", "create", "bench", "--json", "--rate", "1e9", "--concurrent", "100000", *store],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        key, guarded = json.loads(made.stdout)["secret"], ["--require-keys", *store]
    cache = {} if "LMGRAPH_CACHE" in os.environ else {"LMGRAPH_CACHE": str(folder / "cache")}
    command = [*own, "serve", "graph.yaml", "--port", "0", *guarded]
    process, url = stack.enter_context(running("lmgraph", command, folder, environment=cache))
    traced: dict[str, Any] = {"trace": True}
    return [
        Server("lmgraph", url, process, "lmgraph/mock", key, {"lmgraph": traced}),
        Server("whole", url, process, "lmgraph/whole", key, {"lmgraph": traced}, modes=("plain",)),
        Server("kept", url, process, "lmgraph/mock", key, {"lmgraph": traced | {"conversation": f"bench-{NUMBER}"}}),
    ]


def start_litellm(upstream: str, folder: Path, venv: Path, stack: ExitStack) -> Server:
    """LiteLLM's proxy in an environment of its own, made where it is missing."""
    if not (venv / "bin" / "litellm").exists():
        print(f"Installing LiteLLM's proxy in {venv} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "litellm[proxy]"], check=True)
    (folder / "litellm.yaml").write_text(LITELLM.format(url=upstream))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(venv / "bin" / "litellm"), "--config", "litellm.yaml", "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    quiet = {"LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    alive = f"http://127.0.0.1:{port}/health/liveliness"
    process, url = stack.enter_context(running("litellm", command, folder, alive, quiet))
    return Server("litellm", url, process, key="sk-bench")


def litellm_version(venv: Path) -> str:
    asked = [str(venv / "bin" / "python"), "-c", "import importlib.metadata; print(importlib.metadata.version('litellm'))"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


# ---------------------------------------------------------------- measuring


def load_command(server: Server, *arguments: object, model: str = "") -> list[str]:
    own = ["--model", model or server.model, "--key", server.key, "--extra", json.dumps(server.extra)]
    return [sys.executable, str(HERE / "load.py"), server.url, *own, *map(str, arguments)]


def measure(server: Server, mode: str, *arguments: object) -> dict[str, Any]:
    """What the load generator found, and the server's processor time for each answer. Ends the run when an answer was wrong."""
    before = cpu_s(server.process.pid)
    done = subprocess.run(load_command(server, *arguments, *(["--stream"] if mode == "stream" else [])), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"The load generator failed on {server.name}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    if found["wrong"]:
        raise SystemExit(f"{server.name} gave a wrong answer ({mode}, {arguments}): {found['wrong']}")
    found["cpu_us"] = round((cpu_s(server.process.pid) - before) / found["answers"] * 1e6, 1)
    return found


def family(pid: int) -> list[int]:
    """A process and all below it (Linux)."""
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for child in below for p in family(int(child)))]


def cpu_s(pid: int) -> float:
    """Processor time that a process and those below it have used."""
    fields = [Path(f"/proc/{p}/stat").read_text().rpartition(") ")[2].split() for p in family(pid)]
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Bytes in memory of a process and those below it."""
    return sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in family(pid)) * resource.getpagesize()


def soak(server: Server, requests: int) -> list[dict[str, Any]]:
    """Memory after 10 %, 50 % and all of so many requests, a half of them streams."""
    samples, done = [], 0
    for share in (0.1, 0.5, 1.0):
        for mode, until in (("plain", (done + share * requests) / 2), ("stream", share * requests)):
            measure(server, mode, "--connections", 16, "--requests", max(1, int(until) - done), "--patience", 3600)
            done = int(until)
        samples.append({"requests": done, "resident": resident(server.process.pid)})
        print(f"soak {server.name}: {done:,} requests, {samples[-1]['resident'] / 1e6:.1f} MB", file=sys.stderr)
    return samples


def open_streams(server: Server, streams: int) -> dict[str, Any]:
    """Memory with so many open streams, and after their clients have left."""
    measure(server, "stream", "--connections", 16, "--requests", streams)
    before = resident(server.process.pid)
    command = load_command(server, "--hold", streams, "--patience", 120, model=server.model.replace("mock", "hold"))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin and holder.stdout
        if (said := holder.stdout.readline().strip()) != "open":
            raise SystemExit(f"{server.name} does not hold {streams} streams: {said}")
        during = resident(server.process.pid)
        holder.communicate()
    time.sleep(1)
    after = resident(server.process.pid)
    each = round((during - before) / streams)
    return {"streams": streams, "before": before, "during": during, "after": after, "bytes_per_stream": each}


def machine(venv: Path | None) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("lmgraph", "aiohttp", "uvicorn", "uvloop", "httptools")}
    if venv:
        versions["litellm"] = litellm_version(venv)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": versions,
    }


# ---------------------------------------------------------------- figures


def medians(rounds: dict[Cell, list[dict[str, Any]]]) -> dict[Cell, dict[str, float]]:
    return {
        cell: {name: statistics.median(r[name] for r in found) for name in ("rps", "p50_ms", "p99_ms", "cpu_us")}
        for cell, found in rounds.items()
    }


def ratio(rounds: dict[Cell, list[dict[str, Any]]], one: str, other: str, mode: str, connections: int, name: str) -> float | None:
    """Median over the rounds that both took part in."""
    pairs = zip(rounds.get((one, mode, connections), ()), rounds.get((other, mode, connections), ()))
    found = [a[name] / b[name] for a, b in pairs if b[name]]
    return round(statistics.median(found), 3) if found else None


def compare(rounds: dict[Cell, list[dict[str, Any]]], connections: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each thing that must hold."""
    rows = []
    for (one, other), (name, least) in MUSTS.items():
        for mode in MODES:
            for n in connections:
                if (found := ratio(rounds, one, other, mode, n, name)) is None:
                    continue
                row = {"server": one, "against": other, "mode": mode, "connections": n, name: found, "least": least}
                row["holds"] = found >= least
                if other == "bare" and (slow := ratio(rounds, one, other, mode, n, "p99_ms")) is not None:
                    row |= {"p99": slow, "p99_most": P99, "holds": found >= least and slow <= P99}
                    row["cpu"] = ratio(rounds, one, other, mode, n, "cpu_us")
                rows.append(row)
    return rows


def table(rounds: dict[Cell, list[dict[str, Any]]], rows: list[dict[str, Any]]) -> str:
    lines = ["| mode | connections | server | answers/s | p50 ms | p99 ms | cpu us |", "|---|---|---|---|---|---|---|"]
    for (name, mode, n), found in sorted(medians(rounds).items(), key=lambda item: (item[0][1], item[0][2])):
        values = (found["p50_ms"], found["p99_ms"])
        lines.append(f"| {mode} | {n} | {name} | {found['rps']:,.0f} | {values[0]:.2f} | {values[1]:.2f} | {found['cpu_us']:,.0f} |")
    lines += ["", "| what | mode | connections | answers/s | p99 | cpu | holds |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        others = "".join(f" {r[x]:.2f} |" if r.get(x) is not None else " |" for x in ("p99", "cpu"))
        what = f"{r['server']} / {r['against']} (>= {r['least']:g}x)"
        lines.append(f"| {what} | {r['mode']} | {r['connections']} | {r['rps']:.2f} |{others} {'yes' if r['holds'] else 'NO'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument(
        "--warm-up", type=int, default=200, help="requests before the first measurement, plain and streaming, to each server"
    )
    parser.add_argument("--connections", type=int, nargs="+", default=list(CONNECTIONS))
    parser.add_argument("--only", default="direct,bare,lmgraph,whole,kept", help="servers, separated by commas")
    parser.add_argument("--plain", action="store_true", help="a gateway without keys and store")
    parser.add_argument("--litellm", action="store_true", help="LiteLLM's proxy too; it is installed where it is missing")
    parser.add_argument("--venv", type=Path, help="where LiteLLM is or shall be installed (default: in the user's cache folder)")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="memory over N requests")
    parser.add_argument("--streams", type=int, default=0, metavar="N", help="memory of N open streams")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    venv = (options.venv or Path.home() / ".cache" / "lmgraph" / "litellm").absolute() if options.litellm else None
    rounds: dict[Cell, list[dict[str, Any]]] = {}
    report: dict[str, Any] = {"command": shlex.join(sys.argv)}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        script: Callable[[str], list[str]] = lambda name: [sys.executable, str(HERE.absolute() / f"{name}.py")]  # noqa: E731
        mock, upstream = stack.enter_context(running("upstream", script("upstream"), folder))
        servers = [Server("direct", upstream, mock)]
        if "bare" in options.only:
            process, url = stack.enter_context(running("bare", [*script("bare"), upstream], folder))
            servers.append(Server("bare", url, process))
        if "lmgraph" in options.only or "kept" in options.only:
            servers += start_lmgraph(upstream, folder, options.plain, stack)
        wanted = [s for s in servers if s.name in options.only.split(",")]
        if venv:
            wanted.append(start_litellm(upstream, folder, venv, stack))
        report["machine"] = machine(venv)
        for server in wanted:
            for mode in server.modes:
                measure(server, mode, "--connections", 16, "--requests", options.warm_up, "--patience", 600)
        report["resident_before"] = {s.name: resident(s.process.pid) for s in wanted}
        for i in range(options.rounds):
            for mode in MODES:
                for connections in options.connections:
                    for server in wanted[:: -1 if i % 2 else 1]:
                        slow = server.name == "litellm"
                        if (slow and i) or mode not in server.modes:
                            continue
                        seconds = max(5.0, options.seconds) if slow else options.seconds
                        times = ("--seconds", seconds, "--warm", 3.0 if slow else min(0.5, options.seconds / 2))
                        found = measure(server, mode, "--connections", connections, *times)
                        rounds.setdefault((server.name, mode, connections), []).append(found)
                        print(f"round {i + 1} {mode} {connections:3} {server.name:8} {found['rps']:9,.0f}/s", file=sys.stderr)
        report["resident"] = {s.name: resident(s.process.pid) for s in wanted}
        for server in wanted:
            if options.streams and server.name in ("bare", "lmgraph"):
                report.setdefault("streams", {})[server.name] = open_streams(server, options.streams)
        for server in wanted:
            if options.soak and server.name == "kept":
                report["soak"] = soak(server, options.soak)
    rows = compare(rounds, options.connections)
    report["median"] = {f"{server}/{mode}/{n}": found for (server, mode, n), found in medians(rounds).items()}
    report["ratios"] = rows
    report["rounds"] = {f"{server}/{mode}/{n}": found for (server, mode, n), found in rounds.items()}
    print(table(rounds, rows))
    print(json.dumps({name: report[name] for name in ("machine", "resident", "streams", "soak") if name in report}, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
