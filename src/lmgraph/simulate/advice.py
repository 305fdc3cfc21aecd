"""What to run at a rate: both kinds of master sized, the cheaper taken, one large model beside it; and how that is told.

It knows what is compared and the sentences around the numbers. How numbers are found is size.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from lmgraph.errors import UserError
from lmgraph.evaluate.report import Report, Section, percent
from lmgraph.simulate.draft import Draft
from lmgraph.simulate.figures import Figures
from lmgraph.simulate.scenario import Scenario
from lmgraph.simulate.size import STEP, Sizing, Target, alone, sharding_point, size, turning_point

WAYS = ("auto", "embedded", "batched")
NAMES = {"embedded": "master in gateways", "batched": "masters on GPUs", "large": "one large model"}
Watch = Callable[[str, float, float], None]
"""told (what is simulated, simulated seconds, of how many)"""


@dataclass(frozen=True)
class Advice:
    """A recommendation."""

    target: Target
    best: Sizing
    others: dict[str, Sizing | str]
    """the other master, and one large model: sized for the same target, or why they cannot hold it"""
    turning: float | None
    """requests a second from which masters on GPUs are cheaper; None: never"""
    sharding: float | None
    """requests a second above which one Redis is not enough; None: it has nothing to do"""
    assumptions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "rate": self.best.scenario.arrivals.rate,
            "arrivals": asdict(self.best.scenario.arrivals),
            "target": asdict(self.target),
            "best": self.best.to_json(),
            "others": {name: {"impossible": found} if isinstance(found, str) else found.to_json() for name, found in self.others.items()},
            "batched_from": self.turning,
            "shards_from": self.sharding,
            "assumptions": list(self.assumptions),
        }


def advise(draft: Draft, target: Target, master: str = "auto", seed: int = 0, watch: Watch | None = None) -> Advice:
    """Size a draft. `master`: one of WAYS. Raises UserError where no kind of master that may be used holds the target."""
    masters = {"embedded": draft.scenario.master, "batched": draft.batched}
    found = {name: _size(replace(draft.scenario, master=spec), target, seed, NAMES[name], watch) for name, spec in masters.items()}
    able = {name: sizing for name, sizing in found.items() if isinstance(sizing, Sizing) and master in ("auto", name)}
    if not able:
        raise next(error for name, error in found.items() if isinstance(error, UserError) and master in ("auto", name))
    chosen = min(able, key=lambda name: able[name].per_hour)
    found["large"] = _size(alone(draft), target, seed, NAMES["large"], watch)
    others = {NAMES[name]: sizing if isinstance(sizing, Sizing) else sizing.message for name, sizing in found.items() if name != chosen}
    return Advice(target, able[chosen], others, turning_point(draft, target), sharding_point(draft.scenario, target), draft.assumptions)


def _size(scenario: Scenario, target: Target, seed: int, what: str, watch: Watch | None) -> Sizing | UserError:
    try:
        return size(scenario, target, seed, watch=(lambda done, total: watch(f"simulating {what}", done, total)) if watch else None)
    except UserError as error:
        return error


# ---------------------------------------------------------------- telling


def report(advice: Advice, command: str) -> Report:
    """As tables."""
    best = advice.best
    compared = [_compared(f"taken: {NAMES[best.scenario.master.kind]}", best)]
    compared += [_compared(name, found) for name, found in advice.others.items()]
    sections = [
        Section("What to run", ("part", "replicas", "load", "of one, an hour", "together"), _parts(best)),
        times("What it does", best.figures),
        Section("Compared", ("", "replicas", "an hour", "1,000 requests", "first token p99", "answer p50"), compared),
    ]
    return Report(f"{best.scenario.arrivals.rate:,g} requests/s", command, advice.to_json(), sections, note="\n".join(notes(advice)))


def notes(advice: Advice) -> list[str]:
    """Sentences below the tables."""
    best, scenario, target = advice.best, advice.best.scenario, advice.target
    out = [
        f"Held: 99 of 100 first tokens within {target.first_s:g} s, at most {target.load:.0%} of each part's capacity at the mean rate, "
        f"at most {target.failures:.1%} failures. Each number is the smallest, to about {STEP:.0%}"
        + (f" and to a multiple of {best.slices}" if best.slices > 1 else "")
        + ".",
        f"Simulated: {best.figures.requests:,} requests"
        + (f" of one of {best.slices} equal slices; the whole pools its queues and waits no longer." if best.slices > 1 else "."),
    ]
    if advice.turning is None:
        out.append("A master in every gateway is cheaper at any rate.")
    else:
        out.append(f"Masters on GPUs are cheaper than one in every gateway from about {_about(advice.turning)} requests/s on.")
    shards = scenario.redis.shards
    if advice.sharding is not None:
        out.append(f"One Redis is enough up to about {_about(advice.sharding)} requests/s.")
    if shards > 1:
        out.append(
            f"lmgraph speaks to one Redis: run {shards} cells, each with its own gateways and its own Redis, and let the load balancer "
            "keep a user in one cell."
        )
    return out


def _about(number: float) -> str:
    """Two digits that count."""
    return f"{float(f'{number:.2g}'):,.0f}"


def times(title: str, figures: Figures) -> Section:
    """Waiting, first token, answer, and where it is waited."""
    rows = [("in all queues", figures.waiting), ("to the first token", figures.first), ("to the end", figures.whole)]
    rows += [(f"waiting: {name}", spread) for name, spread in figures.waits.items()]
    return Section(
        title,
        ("seconds", "mean", "p50", "p99"),
        [(name, *(f"{value:,.3f}" for value in (spread.mean, spread.p50, spread.p99))) for name, spread in rows],
    )


def _parts(sizing: Sizing) -> list[tuple[str, ...]]:
    scenario, load = sizing.scenario, sizing.loads
    gateway, master, redis = scenario.gateway, scenario.master, scenario.redis
    found = [("gateway", gateway.replicas, load["gateway"], gateway.price)]
    if master.kind == "embedded":
        found = [("gateway with master", gateway.replicas, max(load["gateway"], load["master"]), gateway.price)]
    elif master.kind == "batched":
        found.append(("master on a GPU", master.replicas, load["master"], master.price))
    found.append(("Redis", redis.shards, load["redis"], redis.price))
    found += [(group.name, group.replicas, load[group.name], group.price) for group in scenario.workers]
    rows = [(name, f"{count:,}", percent(share), f"{price:,.2f}", f"{count * price:,.2f}") for name, count, share, price in found]
    return [*rows, ("together", "", "", "", f"{sum(count * price for _, count, _, price in found):,.2f}")]


def _compared(name: str, sizing: Sizing | str) -> tuple[str, ...]:
    if isinstance(sizing, str):
        return (f"{name}: not possible. {sizing}", "-", "-", "-", "-", "-")
    counts = [sizing.scenario.gateway.replicas] if sizing.scenario.master.kind != "none" else []
    counts += [sizing.scenario.master.replicas] if sizing.scenario.master.kind == "batched" else []
    counts += [group.replicas for group in sizing.scenario.workers]
    figures = sizing.figures
    shown = " + ".join(f"{count:,}" for count in counts)
    return (
        name,
        shown,
        f"{sizing.per_hour:,.2f}",
        f"{figures.per_thousand:,.4f}",
        f"{figures.first.p99:,.2f} s",
        f"{figures.whole.p50:,.2f} s",
    )


def played(scenario: Scenario, figures: Figures, title: str, command: str) -> Report:
    """A scenario as it was simulated, without a search."""
    used = [(name, percent(value)) for name, value in figures.utilisation.items()]
    counts = [
        ("requests", f"{figures.requests:,}"),
        ("answered", f"{figures.answered:,}"),
        *((f"failed: {name}", f"{count:,}") for name, count in figures.failures.items()),
        ("tried again", f"{figures.retries:,}"),
        ("answered by a fallback, or tried there", f"{figures.fallbacks:,}"),
        ("under way, on average", f"{figures.in_system:,.2f}"),
        *((f"replicas of {name}, on average", f"{count:,.2f}") for name, count in figures.replicas.items()),
        ("price of an hour", f"{figures.per_hour * scenario.slices:,.2f}"),
        ("price of 1,000 answers", f"{figures.per_thousand:,.4f}"),
    ]
    sections = [Section("Requests", ("", "count"), counts), times("Times", figures), Section("Utilisation", ("part", "share"), used)]
    return Report(title, command, figures.to_json(), sections)
