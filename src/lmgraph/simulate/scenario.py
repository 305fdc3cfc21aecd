"""What is simulated: arrivals, gateways, master, Redis, groups of workers, as frozen data with units; and reading it from YAML.

It knows which values make sense together and names every problem at once. It does not know how a part works (parts.py), nor where
measured times come from (services.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import ceil
from typing import Any

import yaml

from lmgraph.errors import DataError, UserError
from lmgraph.graphread import Reader
from lmgraph.simulate.load import KINDS, Arrivals, Size

MASTERS = ("embedded", "batched", "none")
BALANCES = ("random", "two", "shared")
COUNTS = ("waiting", "all")


@dataclass(frozen=True)
class Gateway:
    """`replicas` processes of `lmgraph serve`, each with one core for its event loop and another for an embedded master."""

    replicas: int = 2
    request_ms: float = 0.5
    """processor time of a request, without its pieces"""
    piece_ms: float = 0.05
    """processor time of one streamed piece (a token)"""
    cv: float = 0.0
    """coefficient of variation of a request's processor time"""
    active: int = 1024
    """answers in the making at a time; more get 429"""
    price: float = 0.0
    """of one for an hour"""


@dataclass(frozen=True)
class Master:
    """Who decides. `embedded`: one engine in every gateway, one decision at a time. `batched`: servers on a GPU that take what waits."""

    kind: str = "embedded"
    share: float = 1.0
    """of the requests; the rest is pinned to a node or stays with its conversation's"""
    decision_ms: float = 74.0
    """`embedded`: of one decision on a gateway's cores"""
    cv: float = 0.0
    replicas: int = 1
    """`batched`: servers"""
    batch: int = 64
    """most decisions in a batch"""
    batch_ms: float = 10.0
    query_ms: float = 0.5
    """a batch of n takes batch_ms + n * query_ms"""
    price: float = 0.0
    """of a server for an hour (`batched`)"""


@dataclass(frozen=True)
class Redis:
    """The shared store. A request comes twice: before its decision and when its answer is whole, each time with half of all this."""

    work_ms: float = 0.1
    """Redis' processor time for a request"""
    calls: int = 6
    """round trips that a request waits for"""
    trip_ms: float = 0.2
    """a round trip on the network"""
    shards: int = 1
    price: float = 0.0
    """of a shard for an hour"""


@dataclass(frozen=True)
class Scaling:
    """An autoscaler as KEDA and the HorizontalPodAutoscaler work: every `interval_s` it wants ceil(count / target) replicas.

    It adds at most as many as there are, or 4, at a time, and goes no lower than the most it has wanted within `cooldown_s`.
    """

    least: int = 1
    most: int = 100
    counts: str = "waiting"
    """what is counted: requests that wait, or `all` that a replica has (waiting and running)"""
    target: float = 4.0
    """of them for each replica"""
    interval_s: float = 30.0
    cooldown_s: float = 300.0


@dataclass(frozen=True)
class Workers:
    """Replicas of one server whose base model answers for a group of nodes, with continuous batching."""

    name: str
    share: float = 1.0
    """of all calls"""
    replicas: int = 1
    slots: int = 16
    """sequences at a time; more wait in the server"""
    prefill: float = 5000.0
    """prompt tokens a second, when nothing is decoded"""
    alone: float = 50.0
    """tokens a second of one sequence alone"""
    total: float = 400.0
    """tokens a second of all slots together, when all decode"""
    chunk: int = 512
    """prompt tokens that are read along with one token of each running sequence (chunked prefill)"""
    balance: str = "random"
    """which replica gets a call: any (a Kubernetes Service), the better of two (lmgraph's replicas), or one queue before all"""
    timeout_s: float = 120.0
    """for the first piece of an answer; then the fallback is asked"""
    retries: int = 1
    errors: float = 0.0
    """share of calls that are refused at once; they are tried again"""
    fallback: str = ""
    start_s: float = 120.0
    """from asking for a replica to its first request: machine, image, weights, warming up"""
    price: float = 0.0
    """of a replica for an hour, whether it works or starts"""
    scaling: Scaling | None = None


@dataclass(frozen=True)
class Scenario:
    """Everything that is simulated. Times of day in seconds from 0; prices in one currency."""

    arrivals: Arrivals
    workers: tuple[Workers, ...]
    """their shares may sum to less than 1: the rest is answered without one"""
    prompt: Size = field(default_factory=lambda: Size(230, 1.0))
    """tokens"""
    output: Size = field(default_factory=lambda: Size(195, 1.0))
    """tokens"""
    gateway: Gateway = Gateway()
    master: Master = Master()
    redis: Redis = Redis()
    hops: float = 1.0
    """worker calls of a request on average, one after another, each with its own decision"""
    network_ms: float = 1.0
    """of a request, there and back, besides Redis' round trips"""
    warm_s: float = 60.0
    """at the beginning, not counted"""
    seconds: float = 600.0
    """whose arrivals are counted"""
    slices: int = field(default=1, metadata={"inner": True})
    """this is one of so many equal slices of a larger scenario (`slice_of`)"""


LIMITS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "": {"hops": (1, 100), "seconds": (0.001, 1e7), "warm_s": (0, 1e7)},
    "arrivals": {"rate": (0, 1e7), "peak": (1, 1e4), "swing": (0, 1), "busy_s": (0.001, 1e7), "quiet_s": (0.001, 1e7), "day_s": (1, 1e7)},
    "size": {"mean": (0, 1e7), "cv": (0, 10)},
    "gateway": {"replicas": (1, 1e5), "active": (1, 1e6), "cv": (0, 10)},
    "master": {"share": (0, 1), "replicas": (1, 1e5), "batch": (1, 1e5), "cv": (0, 10)},
    "redis": {"shards": (1, 1e4), "calls": (0, 1000)},
    "workers": {
        **{"share": (0, 1), "replicas": (0, 1e6), "slots": (1, 1e5), "prefill": (1e-6, 1e9), "alone": (1e-6, 1e9), "total": (1e-6, 1e9)},
        **{"chunk": (1, 1e6), "timeout_s": (0.001, 1e6), "retries": (0, 10), "errors": (0, 1)},
    },
    "scaling": {"least": (0, 1e6), "most": (1, 1e6), "target": (1e-6, 1e9), "interval_s": (0.1, 1e6)},
}
"""section -> field -> least and most; any other number: 0 to a billion"""
CHOICES = {("arrivals", "kind"): KINDS, ("master", "kind"): MASTERS, ("workers", "balance"): BALANCES, ("scaling", "counts"): COUNTS}
TYPES: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}


def loads(text: str, name: str = "scenario") -> Scenario:
    """A scenario of YAML text: the keys are the fields of these classes, `workers` is a mapping from names.

    Raises DataError with every problem.
    """
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{name} cannot be read as YAML: {getattr(error, 'problem', None) or error}", f"Expected: {', '.join(KEYS)}"
        ) from error
    reader = Reader(lambda path: "")
    made = _read(reader, data)
    problems = reader.problems or (check(made) if made else [])
    if problems or made is None:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise DataError(f"{name} has {len(problems)} problem{'s' if len(problems) != 1 else ''}:\n{listed}", "See docs/scaling.md")
    return made


def _known(kind: type) -> dict[str, tuple[type, ...]]:
    return {f.name: TYPES.get(str(f.type), (dict,)) for f in fields(kind) if not f.metadata.get("inner")}


KEYS = tuple(_known(Scenario))


def _section(reader: Reader, data: Any, path: tuple[str, ...], kind: type, section: str, required: tuple[str, ...] = ()) -> Any:
    """One dataclass out of a mapping; None where something is wrong."""
    before = len(reader.problems)
    known = _known(kind)
    row = reader.take(data, path, {name: types for name, types in known.items() if name != "name" or section != "workers"}, required)
    for name, value in row.items():
        if known[name] in (TYPES["int"], TYPES["float"]):
            low, high = LIMITS[section].get(name, (0, 1e9))
            if not low <= value <= high:
                reader.say((*path, name), f"found {value}, expected {low:g} to {high:g}")
        elif (section, name) in CHOICES:
            reader.one_of(value, CHOICES[section, name], (*path, name))
    if section == "workers" and "scaling" in row:
        row["scaling"] = _section(reader, row["scaling"], (*path, "scaling"), Scaling, "scaling")
    if len(reader.problems) > before:
        return None
    return kind(**row, name=path[-1]) if section == "workers" else kind(**row)


def _read(reader: Reader, data: Any) -> Scenario | None:
    top = reader.take(data, (), _known(Scenario), ("arrivals", "workers"))
    parts: dict[str, Any] = {}
    sections = {"arrivals": Arrivals, "prompt": Size, "output": Size, "gateway": Gateway, "master": Master, "redis": Redis}
    for name, kind in sections.items():
        if name in top:
            required = {"arrivals": () if top[name].get("kind") == "closed" else ("rate",)}.get(name, ("mean",) if kind is Size else ())
            row = {"rate": 0.0, **top[name]} if name == "arrivals" and not required else top[name]
            parts[name] = _section(reader, row, (name,), kind, "size" if kind is Size else name, required)
    parts["workers"] = tuple(
        _section(reader, row, ("workers", str(name)), Workers, "workers") for name, row in top.get("workers", {}).items()
    )
    for name in ("hops", "network_ms", "warm_s", "seconds"):
        if name in top:
            low, high = LIMITS[""].get(name, (0, 1e9))
            if not low <= top[name] <= high:
                reader.say((name,), f"found {top[name]}, expected {low:g} to {high:g}")
            parts[name] = top[name]
    return None if reader.problems else Scenario(**parts)


def check(scenario: Scenario) -> list[str]:
    """What does not fit together in a scenario."""
    problems = []
    arrivals, names = scenario.arrivals, [group.name for group in scenario.workers]
    if arrivals.kind == "closed" and arrivals.clients < 1:
        problems.append("arrivals: kind closed needs clients")
    if arrivals.kind == "bursty" and arrivals.quiet_rate() < 0:
        most = (arrivals.busy_s + arrivals.quiet_s) / arrivals.busy_s
        problems.append(f"arrivals.peak: found {arrivals.peak:g}; with these busy_s and quiet_s the mean allows at most {most:g}")
    if (shares := sum(group.share for group in scenario.workers)) > 1 + 1e-9:
        problems.append(f"workers: their shares sum to {shares:g}, expected at most 1")
    for group in scenario.workers:
        at = f"workers.{group.name}"
        if not group.alone * (1 - 1e-9) <= group.total <= group.slots * group.alone * (1 + 1e-9):
            problems.append(
                f"{at}.total: found {group.total:g}, expected {group.alone:g} (alone) to {group.slots * group.alone:g} (slots times alone)"
            )
        if group.fallback and group.fallback not in names:
            problems.append(f"{at}.fallback: {group.fallback!r} is no group; valid: {', '.join(names)}")
        if group.scaling and not group.scaling.least <= group.replicas <= group.scaling.most:
            problems.append(f"{at}.replicas: found {group.replicas}, expected {group.scaling.least} to {group.scaling.most} (scaling)")
        if not group.scaling and not group.replicas:
            problems.append(f"{at}.replicas: found 0, and nothing would start one; expected at least 1, or scaling")
    return problems


def slice_of(scenario: Scenario, slices: int) -> Scenario:
    """One of `slices` equal parts: 1/slices of the arrivals and of every replica. Raises UserError where a number cannot be divided.

    Splitting Poisson arrivals at random gives Poisson arrivals again, also where their rate changes with time. A slice's queues are no
    shorter than those of the whole, which pools its servers: what holds in a slice holds in the whole. Redis is not divided: in a
    slice it works so many times slower, and its waits are counted so many times shorter, which changes neither. A batched master of fewer
    servers is one whose batches have the slice's part of the decisions and take as long.
    """
    if slices == 1:
        return scenario
    counts = {"gateway.replicas": scenario.gateway.replicas}
    counts |= {f"workers.{group.name}.replicas": group.replicas for group in scenario.workers}
    if scenario.arrivals.kind == "closed":
        counts["arrivals.clients"] = scenario.arrivals.clients
    if odd := [f"{name} is {count}" for name, count in counts.items() if count % slices]:
        raise UserError(
            f"{slices} equal slices need numbers that {slices} divides: {', '.join(odd)}.", "Use fewer slices, or other numbers."
        )

    def part(group: Workers) -> Workers:
        scaling = group.scaling and replace(group.scaling, least=ceil(group.scaling.least / slices), most=ceil(group.scaling.most / slices))
        return replace(group, replicas=group.replicas // slices, scaling=scaling)

    master = scenario.master
    if master.kind == "batched" and master.replicas % slices == 0:
        master = replace(master, replicas=master.replicas // slices)
    elif master.kind == "batched":
        fewer = slices / master.replicas
        batch, price = max(1, round(master.batch / fewer)), master.price / fewer
        master = replace(master, replicas=1, batch=batch, query_ms=master.query_ms * fewer, price=price)
    return replace(
        scenario,
        arrivals=replace(scenario.arrivals, rate=scenario.arrivals.rate / slices, clients=scenario.arrivals.clients // slices),
        gateway=replace(scenario.gateway, replicas=scenario.gateway.replicas // slices),
        master=master,
        workers=tuple(map(part, scenario.workers)),
        slices=scenario.slices * slices,
    )


def to_dict(scenario: Scenario) -> dict[str, Any]:
    """Plain data in the file's form."""
    data = asdict(scenario)
    del data["slices"]
    data["workers"] = {row.pop("name"): {k: v for k, v in row.items() if v is not None} for row in data["workers"]}
    return data
