"""A graph -> a scenario to size: nodes that share a model are one group, with the times of the server that such a model runs on.

It knows services.json: what was measured here, what is assumed from measurements of others, and where each figure comes from. It does
not know how many replicas are needed (size.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any

from lmgraph.errors import UserError
from lmgraph.graph import WALKS, Graph
from lmgraph.simulate.load import Arrivals, Size
from lmgraph.simulate.scenario import Gateway, Master, Redis, Scenario, Workers

HARDWARE = ("gpu", "cpu")
LARGE_B = 70.0
"""billions of parameters of the one large model that is compared with"""


@dataclass(frozen=True)
class Draft:
    """What is to be sized. Numbers of replicas in it mean nothing yet."""

    scenario: Scenario
    """its master is `embedded`"""
    batched: Master
    """the same decisions on a GPU"""
    large: Workers
    """one large model in the place of all groups"""
    assumptions: tuple[str, ...]


@cache
def known() -> Mapping[str, Any]:
    """services.json."""
    return json.loads(files("lmgraph.simulate").joinpath("services.json").read_text(encoding="utf-8"))


def billions_of(model: str) -> float | None:
    """Billions of parameters as a model's name tells them (135m, 1.5b, 8x7b), None where it does not."""
    found = re.search(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z])", model.lower())
    if not found:
        return None
    return int(found[1] or 1) * float(found[2]) / (1 if found[3] == "b" else 1000)


def server(billions: float, hardware: str) -> Mapping[str, Any] | None:
    """The smallest server of services.json that takes a model of this size, None where none does."""
    able = [row for row in known()["servers"] if row["hardware"] == hardware and row["billions"] >= billions]
    return min(able, key=lambda row: row["billions"], default=None)


def workers_of(row: Mapping[str, Any], name: str, share: float = 1.0) -> Workers:
    """A group on such a server."""
    known_fields = {f.name for f in fields(Workers)} - {"name", "share"}
    return Workers(name, share, **{key: value for key, value in row.items() if key in known_fields})


def draft(
    graph: Graph,
    rate: float,
    *,
    arrivals: Arrivals | None = None,
    hardware: str = "gpu",
    billions: Mapping[str, float] | None = None,
    shares: Mapping[str, float] | None = None,
    hops: float | None = None,
    balance: str = "random",
    large: float = LARGE_B,
) -> Draft:
    """The scenario of a graph at `rate` requests a second.

    `billions`: size of models whose name does not tell it. `shares`: weight of a node's queries (default: all alike). `hops`: worker calls
    of a request (default: 1, or the voters of a vote). `balance`: as in Workers.

    Raises UserError that names every model without a known size or server.
    """
    data, notes = known(), []
    weights = {name: float((shares or {}).get(name, 1.0)) for name in graph.nodes}
    if strange := [name for name in shares or {} if name not in graph.nodes]:
        raise UserError(f"These are no nodes: {', '.join(strange)}.", f"Valid: {', '.join(graph.nodes)}")
    groups: dict[str, list[str]] = {}
    for name, node in graph.nodes.items():
        if node.worker.kind != "scripted":
            groups.setdefault(node.worker.model, []).append(name)
    if not groups or not (total := sum(weights.values())):
        raise UserError("No node of this graph asks a model: there is nothing to size.", "Valid kinds of workers: embedded, openai")
    made, problems = [], []
    for model, names in groups.items():
        size = (billions or {}).get(model) or billions_of(model)
        row = server(size, hardware) if size else None
        if row is None:
            problems.append(
                f"  - {model}: {f'no {hardware} server for {size:g} billion parameters is known' if size else 'its name tells no size'}"
            )
            continue
        specs = [graph.nodes[name].worker for name in names]
        group = workers_of(row, model, sum(weights[name] for name in names) / total)
        made.append(replace(group, timeout_s=max(s.timeout_s for s in specs), retries=min(s.retries for s in specs), balance=balance))
        notes.append(
            f"{model} ({len(names)} node{'s' if len(names) > 1 else ''}, {group.share:.0%} of the calls): {row['name']}, {row['slots']} "
            f"sequences, {row['prefill']:,} prompt tokens/s, {row['alone']:,} tokens/s alone, {row['total']:,} together. {_source(row)}"
        )
    if problems:
        listed = "\n".join(problems)
        hint = f"Say a size: --billions {next(iter(groups))}=8; or measured times: --scenario FILE (docs/scaling.md)"
        raise UserError(f"These models cannot be sized on {hardware}:\n{listed}", hint)
    if graph.master.fallback and (model := graph.nodes[graph.master.fallback].worker.model):
        made = [replace(group, fallback=model) if group.name != model else group for group in made]
    if hops is None:
        hops = float(graph.answer.workers) if graph.answer.mode == "vote" else 1.0
    if graph.answer.mode == "vote":
        notes.append("a vote's answers are counted as calls one after another: the load is right, the time of an answer is too long")
    elif graph.answer.mode in WALKS:
        notes.append(f"the graph may take several steps ({graph.answer.mode}): {hops:g} worker calls a request are counted (--hops)")
    rewriting = sum(weights[name] for name, node in graph.nodes.items() if node.rewrite != "never") / total
    scenario = Scenario(
        arrivals or Arrivals(rate),
        tuple(made),
        prompt=Size(data["traffic"]["prompt"], data["traffic"]["cv"]),
        output=Size(data["traffic"]["output"], data["traffic"]["cv"]),
        gateway=_gateway(data),
        master=_embedded(data, rewriting),
        redis=_redis(data),
        hops=hops,
    )
    biggest = _large(large)
    first = (
        f"tokens: prompts of {scenario.prompt.mean:g}, answers of {scenario.output.mean:g} on average. {_source(data['traffic'])}",
        f"gateway: {scenario.gateway.request_ms:g} ms of processor a request (with what asking Redis takes), "
        f"{scenario.gateway.piece_ms:g} ms a token, one core. {_source(data['gateway'])}",
        f"master in the gateway: {scenario.master.decision_ms:.0f} ms a decision on 2 cores ({rewriting:.0%} of the queries may be "
        f"rewritten). {_source(data['master'])}",
        f"Redis: {scenario.redis.work_ms:g} ms of its processor a request, {scenario.redis.calls} round trips of "
        f"{scenario.redis.trip_ms:g} ms. {_source(data['store'])}",
    )
    if balance == "random":
        notes.append(
            "a call goes to any replica, as a Kubernetes Service chooses; where lmgraph knows each, to the better of two (--balance two)"
        )
    gpu = f"master on a GPU: {_source(data['master']['gpu'])}"
    one = f"one large model: {large:g} billion parameters on {biggest['name']}. {_source(biggest)}"
    return Draft(scenario, _batched(data, rewriting), workers_of(biggest, "large"), (*first, gpu, *notes, one, f"prices: {data['prices']}"))


def draft_of(scenario: Scenario, name: str, *, large: float = LARGE_B) -> Draft:
    """A scenario that somebody has written, with the other kind of master and the large model of services.json. `name`: of its file."""
    data, biggest, own = known(), _large(large), scenario.master
    embedded = own if own.kind == "embedded" else _embedded(data, 0.0)
    batched = own if own.kind == "batched" else _batched(data, 0.0)
    other = (
        f"master on a GPU: {_source(data['master']['gpu'])}"
        if own.kind == "embedded"
        else f"master in the gateway: {embedded.decision_ms:.0f} ms a decision. {_source(data['master'])}"
    )
    notes = (f"times, tokens and prices as {name} says", other, f"one large model: {large:g} billion parameters. {_source(biggest)}")
    return Draft(replace(scenario, master=replace(embedded, share=own.share)), batched, workers_of(biggest, "large"), notes)


def _large(billions: float) -> Mapping[str, Any]:
    row = server(billions, "gpu")
    if row is None:
        most = max(row["billions"] for row in known()["servers"])
        raise UserError(f"No server for a model of {billions:g} billion parameters is known.", f"Valid for --large: up to {most:g}")
    return row


def _source(row: Mapping[str, Any]) -> str:
    return f"{str(row['how']).capitalize()}: {row['source']}."


def _gateway(data: Mapping[str, Any]) -> Gateway:
    row = data["gateway"]
    return Gateway(1, round(row["request_ms"] + data["store"]["gateway_ms"], 6), row["piece_ms"], row["cv"], price=row["price"])


def _redis(data: Mapping[str, Any]) -> Redis:
    row = data["store"]
    return Redis(row["redis_ms"], row["calls"], row["trip_ms"], price=row["price"])


def _embedded(data: Mapping[str, Any], rewriting: float) -> Master:
    row = data["master"]
    return Master("embedded", decision_ms=row["plain_ms"] * (1 - rewriting) + row["rewriting_ms"] * rewriting)


def _batched(data: Mapping[str, Any], rewriting: float) -> Master:
    """A batch takes as long as its longest decision: with one rewrite in it, as long as a rewrite."""
    row = data["master"]["gpu"]
    batch_ms = row["rewriting_batch_ms"] if rewriting else row["batch_ms"]
    query_ms = row["query_ms"] * (1 - rewriting) + row["rewriting_query_ms"] * rewriting
    return Master("batched", batch=row["batch"], batch_ms=batch_ms, query_ms=query_ms, price=row["price"])
