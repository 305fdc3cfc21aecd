"""The smallest numbers of replicas that hold a target at a rate: arithmetic first, then simulations that add to whatever is to blame.

It knows what limits each part and when another kind of master is cheaper. It does not know what a simulation does (run.py), nor a
graph (draft.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from lmgraph.errors import UserError
from lmgraph.simulate.draft import Draft
from lmgraph.simulate.figures import Figures
from lmgraph.simulate.run import Watch, run
from lmgraph.simulate.scenario import Gateway, Master, Redis, Scenario, Workers, slice_of

SPARE = 2
"""fewest gateways and GPU masters: one may fail"""
STEP = 0.12
"""a number is raised by this share at a time, and by at least 1: so much more than the smallest it may be"""
TRIES = 40
SLICE_RATE, BURSTY_RATE = 100.0, 25.0
"""requests a second that a slice has at least, where the whole has more; where they come in bursts (it takes long to see some)"""
LEAST_REPLICAS = 4
"""of a group in a slice, where the whole has as many"""
REQUESTS = 20_000
"""simulated at least; and at least 10 times as long as an answer takes, or 5 bursts"""


@dataclass(frozen=True)
class Target:
    """What must hold."""

    first_s: float = 2.0
    """99 of 100 first tokens are there after so many seconds"""
    load: float = 0.7
    """most of a part's capacity that the mean rate may take"""
    failures: float = 0.001
    """share of requests"""


@dataclass(frozen=True)
class Sizing:
    """What is recommended: the numbers are in `scenario`, `figures` are of one slice of it."""

    scenario: Scenario
    figures: Figures
    slices: int
    loads: Mapping[str, float]
    """share of each part's capacity that the mean rate takes"""
    simulations: int

    @property
    def per_hour(self) -> float:
        """Price of an hour of the whole."""
        return self.figures.per_hour * self.slices

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        figures = self.figures.to_json()
        del figures["series"]
        return {
            "gateways": self.scenario.gateway.replicas,
            "master": asdict(self.scenario.master),
            "redis_shards": self.scenario.redis.shards,
            "workers": {group.name: {"replicas": group.replicas, "share": group.share} for group in self.scenario.workers},
            "loads": dict(self.loads),
            "per_hour": self.per_hour,
            "per_thousand": self.figures.per_thousand,
            "slices": self.slices,
            "simulations": self.simulations,
            "figures": figures,
        }


# ---------------------------------------------------------------- arithmetic


def call_s(group: Workers, scenario: Scenario) -> float:
    """Seconds of a full server that an average call takes: its prompt, and its share of all slots' tokens."""
    return scenario.prompt.mean / group.prefill + scenario.output.mean / group.total


def gateway_s(scenario: Scenario) -> float:
    """Seconds of an event loop that a request takes."""
    answered = sum(group.share for group in scenario.workers) * scenario.hops
    return (scenario.gateway.request_ms + answered * scenario.output.mean * scenario.gateway.piece_ms) / 1000


def master_s(scenario: Scenario) -> float:
    """Seconds of a master that a request's decisions take, in full batches."""
    master = scenario.master
    each = {"embedded": master.decision_ms, "batched": master.batch_ms / master.batch + master.query_ms}.get(master.kind, 0.0)
    return each * master.share * scenario.hops / 1000


def answer_s(scenario: Scenario, load: float) -> float:
    """About how long an answer takes where every part has this load, without waiting."""
    took = 0.0
    for group in scenario.workers:
        # n sequences write n / (t0 + n * t1) tokens a second together: how fast is each when that is `load` of the total?
        marginal = (group.slots / group.total - 1 / group.alone) / (group.slots - 1) if group.slots > 1 else 0.0
        step = (1 / group.alone - marginal) / max(1e-9, 1 - load * group.total * marginal)
        took += group.share * (scenario.prompt.mean / group.prefill + scenario.output.mean * max(step, 1 / group.alone))
    master = scenario.master
    decision = {"embedded": master.decision_ms, "batched": 1.5 * master.batch_ms}.get(master.kind, 0.0) / 1000
    return scenario.hops * (took + decision * master.share)


def loads(scenario: Scenario) -> dict[str, float]:
    """Share of each part's capacity that the mean rate takes."""
    rate, masters = scenario.arrivals.rate, scenario.gateway.replicas if scenario.master.kind == "embedded" else scenario.master.replicas
    found = {
        "gateway": rate * gateway_s(scenario) / scenario.gateway.replicas,
        "master": rate * master_s(scenario) / masters,
        "redis": rate * scenario.redis.work_ms / 1000 / scenario.redis.shards,
    }
    for group in scenario.workers:
        found[group.name] = (
            rate * scenario.hops * group.share * call_s(group, scenario) / group.replicas if group.replicas else float("inf")
        )
    return found


def least(scenario: Scenario, target: Target) -> Scenario:
    """The fewest of everything with which no part's load is above the target's and no gateway has too many answers in the making.

    A burst that lasts longer than a first token may take is carried at full load: with less, those who come late in it wait for it to end.
    """
    arrivals, most = scenario.arrivals, target.load
    lasting = arrivals.kind == "bursty" and arrivals.busy_s > target.first_s
    rate = max(arrivals.rate, arrivals.most() * most) if lasting else arrivals.rate
    under_way = rate * answer_s(scenario, most)
    gateways = max(SPARE, rate * gateway_s(scenario) / most, under_way / (scenario.gateway.active * most))
    master = scenario.master
    if master.kind == "embedded":
        gateways = max(gateways, rate * master_s(scenario) / most)
    elif master.kind == "batched":
        master = replace(master, replicas=max(SPARE, ceil(rate * master_s(scenario) / most)))
    groups = tuple(
        replace(g, replicas=max(1, ceil(rate * scenario.hops * g.share * call_s(g, scenario) / most)), scaling=None)
        for g in scenario.workers
    )
    shards = max(1, ceil(rate * scenario.redis.work_ms / 1000 / most))
    made = replace(scenario, gateway=replace(scenario.gateway, replicas=ceil(gateways)), master=master, workers=groups)
    return replace(made, redis=replace(scenario.redis, shards=shards))


def slices_for(scenario: Scenario) -> int:
    """Into how many slices a scenario with these numbers may be cut: of the larger half of what is possible, where rounding adds least."""
    limits = [scenario.arrivals.rate / (BURSTY_RATE if scenario.arrivals.kind == "bursty" else SLICE_RATE)]
    limits += [scenario.gateway.replicas] if gateway_s(scenario) else []
    limits += [group.replicas / LEAST_REPLICAS for group in scenario.workers]
    most = max(1, int(min(limits)))

    def excess(slices: int) -> float:
        made = rounded(scenario, slices)
        pairs = [(made.gateway.replicas, scenario.gateway.replicas)] if gateway_s(scenario) else []
        pairs += [(new.replicas, old.replicas) for new, old in zip(made.workers, scenario.workers, strict=True)]
        return sum(new / old for new, old in pairs)

    return min(range(most, most // 2, -1), key=excess)


def rounded(scenario: Scenario, slices: int) -> Scenario:
    """Numbers rounded up to multiples of the slices."""

    def up(count: int) -> int:
        return ceil(count / slices) * slices

    gateway = replace(scenario.gateway, replicas=up(scenario.gateway.replicas))
    return replace(scenario, gateway=gateway, workers=tuple(replace(group, replicas=up(group.replicas)) for group in scenario.workers))


def timed(scenario: Scenario, slices: int) -> Scenario:
    """With a time that is long enough to be sure of the 99th percentile."""
    answer, arrivals = answer_s(scenario, 0.7), scenario.arrivals
    seconds = max(REQUESTS / (arrivals.rate / slices), 10 * answer)
    if arrivals.kind == "bursty":
        seconds = max(seconds, 5 * (arrivals.busy_s + arrivals.quiet_s))
    return replace(scenario, warm_s=min(5 * answer, seconds), seconds=seconds)


def turning_point(draft: Draft, target: Target) -> float | None:
    """Requests a second from which on a batched master on a GPU is cheaper than one in every gateway; None: never up to a million."""

    def price(master: Master, rate: float) -> float:
        made = least(replace(draft.scenario, master=master, arrivals=replace(draft.scenario.arrivals, rate=rate)), target)
        servers = made.master.replicas if master.kind == "batched" else 0
        return made.gateway.replicas * made.gateway.price + servers * master.price

    def cheaper(rate: float) -> bool:
        return price(draft.batched, rate) < price(draft.scenario.master, rate)

    low, high = 0.0, 1.0
    while not cheaper(high):
        low, high = high, high * 2
        if high > 1e6:
            return None
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if cheaper(middle) else (middle, high)
    return high


def sharding_point(scenario: Scenario, target: Target) -> float | None:
    """Requests a second above which one Redis has more than the target's load; None: Redis has nothing to do."""
    return target.load / (scenario.redis.work_ms / 1000) if scenario.redis.work_ms else None


# ---------------------------------------------------------------- search


def size(
    scenario: Scenario, target: Target, seed: int = 0, *, watch: Watch | None = None, tried: Callable[[Scenario], None] | None = None
) -> Sizing:
    """The smallest numbers that hold the target (to about STEP). `tried` is told each scenario before it is simulated.

    Raises UserError where an empty service is too slow already, or no number helps.
    """
    idle = _idle_s(scenario)
    if idle > target.first_s:
        raise UserError(
            f"The first token takes {idle:.2f} s where nobody waits; the target for the slowest of a hundred is {target.first_s:g} s.",
            "Allow more time (--p99), or use faster servers (--hardware gpu, --master batched).",
        )
    now = least(scenario, target)
    slices = slices_for(now)
    now = timed(rounded(now, slices), slices)
    for number in range(1, TRIES + 1):
        if tried:
            tried(now)
        figures = run(slice_of(now, slices), seed, watch=watch)
        blamed = _blame(figures, now, target)
        if not blamed:
            return Sizing(now, figures, slices, loads(now), number)
        now = _raised(now, blamed, slices)
    found = f"99 of 100 first tokens within {figures.first.p99:.2f} s, {1 - figures.answered / max(1, figures.requests):.2%} failures"
    raise UserError(
        f"No number of replicas was found that holds the target; the last of {TRIES} simulations: {found}.",
        f"Allow more than {target.first_s:g} s: --p99. The slowest part: {', '.join(blamed)}.",
    )


def _idle_s(scenario: Scenario) -> float:
    """Until the first token of an average request to an empty service."""
    master, redis = scenario.master, scenario.redis
    decision = {"embedded": master.decision_ms, "batched": master.batch_ms + master.query_ms}.get(master.kind, 0.0)
    fixed = scenario.gateway.request_ms + (redis.work_ms + redis.calls * redis.trip_ms + scenario.network_ms) / 2 + decision
    return fixed / 1000 + max((scenario.prompt.mean / group.prefill for group in scenario.workers), default=0.0)


def _blame(figures: Figures, scenario: Scenario, target: Target) -> set[str]:
    """The parts of which there must be more: gateway, master, or a group's name. Empty where the target holds."""
    blamed = set()
    failed = figures.failures
    if sum(failed.values()) > target.failures * figures.requests:
        if failed.get("busy"):
            blamed.add("gateway")
        if len(failed) > (1 if "busy" in failed else 0):
            blamed.add(max(scenario.workers, key=lambda group: figures.waits[group.name].p99).name)
    late = [group.name for group in scenario.workers if figures.groups[group.name].p99 > target.first_s]
    if not late and figures.first.p99 > target.first_s:
        late = [max(figures.groups, key=lambda name: figures.groups[name].p99)] if figures.groups else [""]
    for name in late:
        waits = {part: figures.waits[part].p99 for part in ("gateway", "master", *([name] if name else []))}
        blamed.add(max(waits, key=lambda part: waits[part]))
    return blamed


def _raised(scenario: Scenario, blamed: set[str], slices: int) -> Scenario:
    def more(count: int) -> int:
        return ceil(max(count * (1 + STEP), count + 1) / slices) * slices

    gateway, master = scenario.gateway, scenario.master
    if "gateway" in blamed or ("master" in blamed and master.kind == "embedded"):
        gateway = replace(gateway, replicas=more(gateway.replicas))
    if "master" in blamed and master.kind == "batched":
        master = replace(master, replicas=ceil(max(master.replicas * (1 + STEP), master.replicas + 1)))
    groups = tuple(replace(g, replicas=more(g.replicas)) if g.name in blamed else g for g in scenario.workers)
    return replace(scenario, gateway=gateway, master=master, workers=groups)


def alone(draft: Draft) -> Scenario:
    """The one large model: every request goes to it, nobody decides, no gateway is counted."""
    free = Gateway(active=10**6)
    return replace(
        draft.scenario,
        workers=(replace(draft.large, share=1.0),),
        gateway=replace(free, request_ms=0.0, piece_ms=0.0),
        master=Master("none"),
        redis=Redis(0.0, 0, 0.0),
        hops=1.0,
    )
