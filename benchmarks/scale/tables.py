"""The tables and pictures of docs/scaling.md: the built-in graph from 1 to 10,000 requests a second, and a day of an autoscaled group.

    .venv/bin/python benchmarks/scale/tables.py --pictures docs/pictures        # some minutes; Markdown on stdout
    .venv/bin/python benchmarks/scale/tables.py --rates 10 100 10000 --days     # the tables only

Nothing is measured here: everything comes from the simulation (src/lmgraph/simulate) with the times of its services.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmgraph import graphfile
from lmgraph.assets import atomic
from lmgraph.evaluate import pictures
from lmgraph.files import builtin_graph
from lmgraph.simulate.advice import NAMES, Advice, advise
from lmgraph.simulate.draft import draft
from lmgraph.simulate.figures import Figures
from lmgraph.simulate.load import Arrivals
from lmgraph.simulate.run import run
from lmgraph.simulate.scenario import Scaling, Scenario, loads
from lmgraph.simulate.size import Target

RATES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0)
HERE = Path(__file__).parent
HOUR_S = 3600


def advised(rates: Sequence[float], kind: str, seed: int) -> dict[float, Advice]:
    given, found = graphfile.loads(builtin_graph()), {}
    for rate in rates:
        began = time.perf_counter()
        found[rate] = advise(draft(given, rate, arrivals=Arrivals(rate, kind)), Target(), seed=seed)
        print(f"{rate:,g} requests/s: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return found


def row(rate: float, advice: Advice) -> str:
    best, large = advice.best, advice.others[NAMES["large"]]
    scenario, figures = best.scenario, best.figures
    masters = f"{scenario.master.replicas} GPU" if scenario.master.kind == "batched" else "in gateways"
    alone = "-" if isinstance(large, str) else f"{large.scenario.workers[0].replicas:,}"
    cost = "-" if isinstance(large, str) else f"{large.figures.per_thousand:.3f}"
    cells = [
        f"{rate:,g}",
        f"{scenario.gateway.replicas:,}",
        masters,
        f"{scenario.redis.shards}",
        " + ".join(f"{group.replicas:,}" for group in scenario.workers),
        f"{figures.first.p50:.2f} / {figures.first.p99:.2f}",
        f"{figures.whole.p50:.1f} / {figures.whole.p99:.1f}",
        f"{best.per_hour:,.2f}",
        f"{figures.per_thousand:.3f}",
        alone,
        cost,
    ]
    return f"| {' | '.join(cells)} |"


def rates_table(found: dict[float, Advice]) -> str:
    head = (
        "| requests/s | gateways | masters | Redis | workers | first token p50 / p99 (s) | answer p50 / p99 (s) | an hour | 1,000 requests "
        "| one large model: servers | 1,000 requests |"
    )
    return "\n".join([head, "|" + "---|" * 11, *(row(rate, advice) for rate, advice in found.items())])


def rates_picture(found: dict[float, Advice]) -> Any:
    def curve(value: Any) -> list[tuple[float, float]]:
        return [(rate, value(advice)) for rate, advice in found.items()]

    def large(advice: Advice) -> float:
        sizing = advice.others[NAMES["large"]]
        return float("nan") if isinstance(sizing, str) else sizing.figures.per_thousand

    times = {
        "first token, 99 of 100": curve(lambda a: a.best.figures.first.p99),
        "first token, median": curve(lambda a: a.best.figures.first.p50),
        "answer, 99 of 100": curve(lambda a: a.best.figures.whole.p99),
        "answer, median": curve(lambda a: a.best.figures.whole.p50),
    }
    costs = {"the graph": curve(lambda a: a.best.figures.per_thousand), "one large model": curve(large)}
    panels = [{"value": "seconds", "curves": times, "log": True}, {"value": "dollars for 1,000 requests", "curves": costs, "log": True}]
    return pictures.lines(panels, "requests a second", "Built-in graph, smallest numbers that hold the target (simulated)", log=True)


def days(day_s: float, seed: int) -> dict[str, Figures]:
    """A day with the numbers of its top, and with two ways to count for the autoscaler."""
    day = loads((HERE / "day.yaml").read_text(encoding="utf-8"), "day.yaml")
    day = replace(day, arrivals=replace(day.arrivals, day_s=day_s), seconds=day_s)
    group = day.workers[0]
    assert group.scaling

    def way(scaling: Scaling | None, balance: str = "two") -> Scenario:
        return replace(day, workers=(replace(group, scaling=scaling, balance=balance),))

    waiting = replace(group.scaling, counts="waiting", target=1.0)
    ways = {
        "fixed": way(None),
        "all calls": way(group.scaling),
        "waiting calls": way(waiting),
        "fixed, any replica": way(None, "random"),
        "all calls, any replica": way(group.scaling, "random"),
    }
    found = {}
    for name, scenario in ways.items():
        began = time.perf_counter()
        found[name] = run(scenario, seed, samples=288)
        print(f"a day, {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return found


def days_table(found: dict[str, Figures]) -> str:
    lines = ["| counted | replicas on average | first token p50 / p99 (s) | failures | 1,000 requests |", "|---|---|---|---|---|"]
    for name, figures in found.items():
        replicas, failed = sum(figures.replicas.values()), 1 - figures.answered / figures.requests
        lines.append(
            f"| {name} | {replicas:.2f} | {figures.first.p50:.2f} / {figures.first.p99:.2f} | {failed:.2%} | {figures.per_thousand:.3f} |"
        )
    return "\n".join(lines)


def days_picture(found: dict[str, Figures]) -> Any:
    def curve(figures: Figures, kind: str) -> list[tuple[float, float]]:
        names = [name for name in figures.series if name.split(":")[0] == kind]
        sums = [sum(values) for values in zip(*(figures.series[name] for name in names))]
        last = figures.series["at"][-1]
        return [(at / last * 24, value) for at, value in zip(figures.series["at"], sums)]

    some = {name: found[name] for name in ("all calls", "waiting calls", "fixed") if name in found}
    panels = [
        {"value": "requests/s", "curves": {"requests": curve(next(iter(some.values())), "rate")}},
        {"value": "replicas", "curves": {name: curve(figures, "replicas") for name, figures in some.items()}, "steps": True},
        {"value": "calls that wait", "curves": {name: curve(figures, "waiting") for name, figures in some.items()}},
    ]
    return pictures.lines(panels, "hour of the day", "A day of one group: what the autoscaler counts (simulated)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="*", default=list(RATES))
    parser.add_argument("--kind", choices=["poisson", "bursty"], default="poisson")
    parser.add_argument("--days", action=argparse.BooleanOptionalAction, default=True, help="also the day of an autoscaled group")
    parser.add_argument("--day-s", type=float, default=24.0 * HOUR_S, help="seconds of a day; fewer: a look while working")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    parser.add_argument("--out", type=Path, help="JSON of everything")
    options = parser.parse_args()
    report: dict[str, Any] = {"command": shlex.join(sys.argv)}
    figures = {}
    if options.rates:
        found = advised(options.rates, options.kind, options.seed)
        print(rates_table(found), flush=True)
        report["rates"] = {f"{rate:g}": advice.to_json() for rate, advice in found.items()}
        figures["scaling-rates"] = rates_picture(found)
    if options.days:
        day = days(options.day_s, options.seed)
        print("\n" + days_table(day), flush=True)
        report["day"] = {name: one.to_json() for name, one in day.items()}
        figures["scaling-day"] = days_picture(day)
    if options.pictures:
        for name, figure in figures.items():
            with atomic(options.pictures / f"{name}.png") as part:
                figure.savefig(part, format="png", dpi=120, metadata={"Software": None})
    if options.out:
        with atomic(options.out) as part:
            part.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
