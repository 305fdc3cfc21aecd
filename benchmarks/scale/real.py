"""The simulation beside the real thing: a real gateway at three loads; one calibrates the simulation, which foretells the others.

    .venv/bin/python benchmarks/scale/real.py --out benchmarks/results/scale.json        # about 6 minutes
    .venv/bin/python benchmarks/scale/real.py --rounds 1 --seconds 2 --requests 100      # a look while working

Two experiments, each with N clients that ask again as soon as they have their answer (benchmarks/gateway/load.py):

- `workers`: two workers of `--slots` slots each (worker.py), between which the gateway chooses: what limits is the slots.
- `gateway`: the mock that answers at once (benchmarks/gateway/upstream.py): what limits is the gateway's own processor time.

Calibrated on the load named by `--calibrate` (and on the workers asked without a gateway): processor time of a request and of a piece,
its spread, the time that is neither. One client alone is not foretold: where no two requests share a turn of the event loop, each costs
the gateway 1.6 times as much (benchmarks/results/gateway.json). What must hold: answers a second, p50 and p99 at the other
loads within 20 % of the simulation's.
Medians over the rounds, in each of which every load is asked.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.absolute()
sys.path.insert(0, str(HERE.parent / "gateway"))
from run import Server, cpu_s, machine, measure, running
from upstream import PIECES

from lmgraph.assets import atomic
from lmgraph.simulate.load import Arrivals, Size
from lmgraph.simulate.run import run
from lmgraph.simulate.scenario import Gateway, Master, Redis, Scenario, Workers

WITHIN = 0.2
FIGURES = ("rps", "p50_ms", "p99_ms")
LOADS = {"workers": (4, 16, 48), "gateway": (16, 32, 64)}
GRAPH = """\
version: 1
master: {{bundle: none.gguf}}
nodes:
  paced: {{token: 0, description: workers with delays, worker: {{kind: openai, urls: [{paced}], model: mock}}}}
  whole: {{token: 1, description: the same asked whole, worker: {{kind: openai, urls: [{paced}], model: mock, stream: false}}}}
  mock: {{token: 2, description: the mock, worker: {{kind: openai, urls: ['{mock}/v1'], model: mock}}}}
edges: {{start: ['*']}}
"""


def found(cells: Sequence[tuple[Server, str, int]], options: argparse.Namespace) -> list[dict[str, float]]:
    """Medians of the rounds of each (server, way of asking, clients). A round asks all: all see the machine at every speed."""
    times = ("--seconds", options.seconds, "--warm", options.seconds / 4)
    rounds = [[measure(server, mode, "--connections", clients, *times) for server, mode, clients in cells] for _ in range(options.rounds)]
    out = [{name: statistics.median(r[name] for r in those) for name in (*FIGURES, "cpu_us")} for those in zip(*rounds)]
    for (server, mode, clients), row in zip(cells, out):
        print(f"{server.name:8} {mode:6} {clients:3}: {json.dumps(row)}", file=sys.stderr)
    return out


def foretell(scenario: Scenario, clients: int, seconds: float, seed: int) -> dict[str, float]:
    """What the simulation says about so many clients. What a client measures has no network in it that it would not see."""
    made = replace(scenario, arrivals=Arrivals(0, kind="closed", clients=clients), warm_s=seconds / 4, seconds=seconds)
    figures = run(made, seed)
    whole = figures.whole
    return {"rps": figures.answered / seconds, "p50_ms": whole.p50 * 1000, "p99_ms": whole.p99 * 1000}


def spread(found: dict[str, float], clients: int) -> float:
    """Coefficient of variation of a service time, where `clients` wait for one server: p99 over p50 is that of a sum of as many."""
    return max(0.0, (found["p99_ms"] / found["p50_ms"] - 1) * clients**0.5 / 2.33)


def nothing() -> dict[str, Any]:
    """Parts that are not in the experiment."""
    return {"master": Master(kind="none"), "redis": Redis(work_ms=0, calls=0), "prompt": Size(0)}


def compare(
    name: str, scenario: Scenario, real: dict[int, dict[str, float]], calibrated: int, options: argparse.Namespace
) -> dict[str, Any]:
    rows = []
    for clients, measured in real.items():
        told = foretell(scenario, clients, options.simulated, options.seed)
        off = {figure: round(told[figure] / measured[figure] - 1, 4) for figure in FIGURES}
        rows.append(
            {
                "clients": clients,
                "calibrated": clients == calibrated,
                "real": measured,
                "simulated": {k: round(v, 3) for k, v in told.items()},
                "off": off,
            }
        )
        rows[-1]["within"] = all(abs(value) <= WITHIN for value in off.values())
    print(f"\n{name}\n| clients | | answers/s | p50 ms | p99 ms | off |\n|---|---|---|---|---|---|")
    for row in rows:
        for who in ("real", "simulated"):
            off = ", ".join(f"{value:+.1%}" for value in row["off"].values()) if who == "simulated" else ""
            shown = f"{row[who]['rps']:,.1f} | {row[who]['p50_ms']:,.2f} | {row[who]['p99_ms']:,.2f}"
            print(f"| {row['clients']}{' (calibrated)' if row['calibrated'] else ''} | {who} | {shown} | {off} |")
    return {"rows": rows, "within": all(row["within"] for row in rows if not row["calibrated"])}


def workers(gateway: Server, direct: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Slots limit."""
    calibrated = options.calibrate or LOADS["workers"][0]
    plain = replace(gateway, name="whole", model="lmgraph/whole")
    loads = LOADS["workers"]
    alone, whole, *rows = found([(direct, "stream", 1), (plain, "plain", calibrated), *((gateway, "stream", n) for n in loads)], options)
    real = dict(zip(loads, rows))
    first = real[calibrated]
    piece_ms = max(0.0, first["cpu_us"] - whole["cpu_us"]) / len(PIECES) / 1000
    request_ms = whole["cpu_us"] / 1000
    hold_s = alone["p50_ms"] / 1000
    spec = Workers("paced", replicas=2, slots=options.slots, alone=1 / hold_s, total=options.slots / hold_s, balance="two")
    made = Scenario(Arrivals(0), (spec,), gateway=Gateway(1, request_ms, piece_ms * len(PIECES)), output=Size(1), network_ms=0, **nothing())
    made = replace(made, network_ms=max(0.0, first["p50_ms"] - foretell(made, calibrated, options.simulated, options.seed)["p50_ms"]))
    known = {
        "hold_ms": alone["p50_ms"],
        "request_ms": round(request_ms, 4),
        "piece_ms": round(piece_ms, 4),
        "network_ms": round(made.network_ms, 3),
    }
    return {"calibrated": known, **compare("workers", made, real, calibrated, options)}


def saturated(gateway: Server, options: argparse.Namespace) -> dict[str, Any]:
    """The gateway limits."""
    calibrated = options.calibrate or LOADS["gateway"][0]
    mock = replace(gateway, name="mock", model="lmgraph/mock")
    loads = LOADS["gateway"]
    real = dict(zip(loads, found([(mock, "stream", n) for n in loads], options)))
    first = real[calibrated]
    spec = Gateway(1, 1000 / first["rps"], 0, cv=min(10.0, spread(first, calibrated)))
    made = Scenario(Arrivals(0), (), gateway=spec, network_ms=0, **nothing())
    known = {"request_ms": round(spec.request_ms, 4), "cv": round(spec.cv, 3)}
    return {"calibrated": known, **compare("gateway", made, real, calibrated, replace_simulated(options))}


def replace_simulated(options: argparse.Namespace) -> argparse.Namespace:
    """The same, with less simulated time: thousands of answers a second."""
    return argparse.Namespace(**{**vars(options), "simulated": options.simulated / 20})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--requests", type=int, default=500, help="to warm up")
    parser.add_argument("--slots", type=int, default=8, help="of each of the two workers")
    parser.add_argument("--first-ms", type=float, default=40.0)
    parser.add_argument("--gap-ms", type=float, default=8.0)
    parser.add_argument("--calibrate", type=int, default=0, help="load that calibrates (default: the first)")
    parser.add_argument("--simulated", type=float, default=200.0, help="seconds that are simulated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="workers,gateway", help="experiments, separated by commas")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"command": shlex.join(sys.argv), "machine": machine(None), "within": WITHIN}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        _, mock = stack.enter_context(running("upstream", [sys.executable, str(HERE.parent / "gateway" / "upstream.py")], folder))
        delays = ["--slots", str(options.slots), "--first-ms", str(options.first_ms), "--gap-ms", str(options.gap_ms)]
        paced = [stack.enter_context(running(f"worker{i}", [sys.executable, str(HERE / "worker.py"), *delays], folder)) for i in range(2)]
        urls = ", ".join(f"'{url}/v1'" for _, url in paced)
        (folder / "graph.yaml").write_text(GRAPH.format(paced=urls, mock=mock))
        command = [sys.executable, "-m", "lmgraph", "serve", "graph.yaml", "--port", "0", "--store", "sqlite://"]
        process, url = stack.enter_context(running("lmgraph", command, folder, environment={"LMGRAPH_CACHE": str(folder / "cache")}))
        gateway = Server("paced", url, process, "lmgraph/paced")
        for model in ("lmgraph/mock", "lmgraph/paced"):
            measure(replace(gateway, model=model), "stream", "--connections", 8, "--requests", options.requests)
        if "workers" in options.only:
            report["workers"] = workers(gateway, Server("direct", paced[0][1], paced[0][0]), options)
        if "gateway" in options.only:
            report["gateway"] = saturated(gateway, options)
        report["processor_s"] = round(cpu_s(process.pid), 1)
    report["holds"] = all(report[part]["within"] for part in ("workers", "gateway") if part in report)
    print(json.dumps({"holds": report["holds"]}))
    if options.out:
        with atomic(options.out) as part:
            part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
