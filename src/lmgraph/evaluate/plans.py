"""Planners side by side: the same tasks, one after the other on one machine; nodes, their order, when they stop, and time.

It knows planners by what they plan. Times are those of one query at a time, in ms, with nothing else asked meanwhile. What was planned is
kept as it comes, so that a run that was stopped goes on. It knows neither how a planner works nor where tasks come from.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lmgraph.errors import DataError, EngineError
from lmgraph.evaluate import pictures
from lmgraph.evaluate.journal import Journal, key_of
from lmgraph.evaluate.planner import Planner
from lmgraph.evaluate.report import Cells, Picture, Report, Section, interval, percent
from lmgraph.evaluate.statistics import difference, spread, wilson
from lmgraph.graph import END, START, Graph
from lmgraph.train.tasks import Task

Progress = Callable[[str, int, int], None]
GROUPS = {"multi": "several steps", "single": "one step"}
FIGURES = {
    "first": "first node",
    "nodes": "node set (F1)",
    "order": "order",
    "exact": "exact nodes",
    "needs": "and needs",
    "count": "as many steps",
    "off": "steps off",
    "stop": "stop",
}
OF = {
    "multi": ("first", "nodes", "order", "exact", "needs", "count", "off", "stop"),
    "single": ("first", "nodes", "exact", "off", "stop"),  # of one step: no order, no needs, and as many steps is to stop in time
}
"""figures of each group, in the order in which they are shown"""


@dataclass(frozen=True)
class Plan:
    """One plan as the journal keeps it. `decisions`: how often a model was asked."""

    nodes: Sequence[str]
    needs: Sequence[Sequence[int]]
    ms: float
    decisions: int


@dataclass
class Result:
    """What one planner did: plans by the index of their task; `missing` says why it did nothing."""

    name: str
    plans: dict[int, Plan] = field(default_factory=dict)
    missing: str = ""


async def run(planner: Planner, tasks: Sequence[Task], most: int, journal: Journal[Plan], progress: Progress) -> Result:
    """Plan at most `most` of the tasks, evenly spread, and close.

    A planner that cannot take part (the nodes do not fit into its model) comes back with `missing`, not as an error. Raises DataError
    where there is nothing to plan.
    """
    if not tasks:
        raise DataError("There are no tasks: nothing to plan.")
    places = range(len(tasks)) if most >= len(tasks) else [i * len(tasks) // most for i in range(most)]
    made = Result(planner.name)
    try:
        try:
            await planner.begin()
        except EngineError as error:
            return Result(planner.name, missing=f"{error.message} {error.hint}".strip())
        for number, at in enumerate(places, 1):
            key = key_of(planner.name, planner.identity, tasks[at].query)
            found = journal.get(key)
            if found is None:
                began = time.perf_counter()
                planned = await planner.plan(tasks[at].query)
                took = round((time.perf_counter() - began) * 1000, 3)
                steps = planned.steps
                found = Plan([step.node for step in steps], [list(step.needs) for step in steps], took, planned.decisions)
                journal.add(key, found, {"contestant": planner.name, "requests": [step.text for step in steps]})
            made.plans[at] = found
            progress(planner.name, number, len(places))
    finally:
        await planner.close()
    return made


def walkable(task: Task, given: Graph, most: int) -> bool:
    """Whether the graph's edges lead along a task's nodes, from start to where a walk may end, in at most `most` steps."""
    ways = [START, *(step.node for step in task.steps)]
    last = given.neighbours(ways[-1])
    along = all(there in given.neighbours(here) for here, there in pairwise(ways))
    return len(task.steps) <= most and along and (not last or END in last or len(task.steps) == most)


def forced(task: Task) -> list[tuple[int, int]]:
    """Pairs (i, j) of steps of which j needs i's answer, also through others: i must come before j."""
    before: list[set[int]] = []
    for step in task.steps:
        before.append(set(step.needs).union(*(before[need] for need in step.needs)))
    return [(i, j) for j, those in enumerate(before) for i in sorted(those)]


def scores(task: Task, plan: Plan) -> dict[str, list[float]]:
    """Figure -> what this plan counts for it: one value, but for `order` one for each forced pair.

    `nodes`: F1 of the two multisets of nodes. `order`: 1 where i's node comes before j's; a node that comes several times is matched
    in turn, a pair of which a node is missing counts 0. `off`: by how many steps the plan is too long or too short. `stop`: one step
    where one is enough, several where it is not.
    """
    truth, made = [step.node for step in task.steps], list(plan.nodes)
    shared = sum((Counter(truth) & Counter(made)).values())
    places = {numbered: at for at, numbered in enumerate(_numbered(made))}
    wanted = [places.get(numbered) for numbered in _numbered(truth)]
    pairs = [(wanted[i], wanted[j]) for i, j in forced(task)]
    exact = made == truth
    needs = exact and all(set(step.needs) == set(mine) for step, mine in zip(task.steps, plan.needs, strict=True))
    stops = len(made) > 1 if len(truth) > 1 else len(made) == 1
    return {
        "first": [float(made[:1] == truth[:1])],
        "nodes": [2 * shared / (len(truth) + len(made))],
        "order": [float(i is not None and j is not None and i < j) for i, j in pairs],
        "exact": [float(exact)],
        "needs": [float(needs)],
        "count": [float(len(made) == len(truth))],
        "off": [float(abs(len(made) - len(truth)))],
        "stop": [float(stops)],
    }


def _numbered(nodes: Sequence[str]) -> list[tuple[str, int]]:
    """Each node with how often it came before."""
    return [(node, list(nodes[:at]).count(node)) for at, node in enumerate(nodes)]


def measure(tasks: Sequence[Task], results: Sequence[Result], ours: str, off_edges: int) -> dict[str, Any]:
    """Figures of every planner, as plain data; `ours` is the one that the others are compared with.

    `multi`, `single` (tasks of several steps, of one; None where there are none): n, `hops` (mean steps of a plan), and for each figure
    value (mean), n (values), interval (95 %: Wilson for shares of yes and no, else bootstrap) and `gap`: the value minus ours on the
    same tasks, with a paired bootstrap interval. `ms` of a plan and `ms_per_step`. `off_edges`: tasks that the graph's edges do not allow.
    """
    mine = next((r for r in results if r.name == ours and not r.missing), None)
    rows: dict[str, Any] = {}
    for r in results:
        if r.missing:
            continue
        row: dict[str, Any] = {"n": len(r.plans)}
        for group, figures in OF.items():
            row[group] = None
            if at := [i for i in r.plans if (len(tasks[i].steps) > 1) == (group == "multi")]:
                other = {i: scores(tasks[i], mine.plans[i]) for i in at if i in mine.plans} if mine and mine is not r else {}
                own = {i: scores(tasks[i], r.plans[i]) for i in at}
                hops = sum(len(r.plans[i].nodes) for i in at) / len(at)
                row[group] = {"n": len(at), "hops": hops, **{name: _figure(name, own, other) for name in figures}}
        plans = list(r.plans.values())
        row["ms"] = spread([plan.ms for plan in plans])
        row["ms_per_step"] = spread([plan.ms / max(1, len(plan.nodes)) for plan in plans])
        row["decisions"] = sum(plan.decisions for plan in plans) / len(plans)
        rows[r.name] = row
    several = sum(len(task.steps) > 1 for task in tasks)
    return {
        "tasks": len(tasks),
        "multi": several,
        "single": len(tasks) - several,
        "off_edges": off_edges,
        "ours": ours,
        "contestants": rows,
        "missing": {r.name: r.missing for r in results if r.missing},
    }


def _figure(
    name: str, own: Mapping[int, Mapping[str, list[float]]], other: Mapping[int, Mapping[str, list[float]]]
) -> dict[str, Any] | None:
    """A figure over all tasks, None where no task has one (order, without forced pairs)."""
    values = [value for found in own.values() for value in found[name]]
    if not values:
        return None
    if name in ("nodes", "off"):
        mean, bounds = difference(values, [0.0] * len(values))
    else:
        mean, bounds = sum(values) / len(values), wilson(round(sum(values)), len(values))
    gap = None
    if theirs := [value for found in other.values() for value in found[name]]:
        value, between = difference([value for i in other for value in own[i][name]], theirs)
        gap = {"value": value, "interval": list(between), "n": len(theirs)}
    return {"value": mean, "n": len(values), "interval": list(bounds), "gap": gap}


def report(metrics: Mapping[str, Any], title: str, command: str) -> Report:
    """`measure`'s figures for people: tables of both groups, times, intervals, gaps, and two pictures."""
    found, ours = metrics["contestants"], metrics["ours"]
    sections: list[Section] = []
    for group, what in GROUPS.items():
        rows = {name: row[group] for name, row in found.items() if row[group]}
        if not rows:
            continue
        names, heading = OF[group], f"{metrics[group]:,} {'task' if metrics[group] == 1 else 'tasks'} of {what}"
        head = [FIGURES[name] for name in names]
        table: list[Cells] = [
            (who, f"{r['n']:,}", *(_shown(name, r[name]) for name in names), f"{r['hops']:.2f}") for who, r in rows.items()
        ]
        sections.append(Section(f"Plans, {heading}", ("contestant", "tasks", *head, "hops"), table))
        bounds: list[Cells] = [(who, *(_bounds(name, r[name]) for name in names)) for who, r in rows.items()]
        sections.append(Section(f"Intervals, {heading}", ("contestant", *head), bounds, brief=False))
        if ours in rows and len(rows) > 1:
            gaps: list[Cells] = [(who, *(_gap(name, r[name]) for name in names)) for who, r in rows.items() if who != ours]
            sections.append(Section(f"Against {ours}, {heading}", ("contestant", *head), gaps, brief=False))
    times: list[Cells] = [
        (who, f"{r['ms']['median']:,.0f} ms", f"{r['ms']['p95']:,.0f} ms", f"{r['ms_per_step']['median']:,.0f} ms", f"{r['decisions']:.2f}")
        for who, r in found.items()
    ]
    if times:
        sections.append(Section("Time of a plan", ("contestant", "median", "p95", "a step, median", "decisions"), times))
    if metrics["missing"]:
        sections.append(Section("Left out", ("contestant", "detail"), list(metrics["missing"].items())))
    return Report(title, command, metrics, sections, _pictures(metrics) if found else [], _note(metrics))


def _shown(name: str, figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    return f"{figure['value']:.2f}" if name == "off" else percent(figure["value"])


def _bounds(name: str, figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    low, high = figure["interval"]
    return f"{low:.2f} to {high:.2f}" if name == "off" else interval((low, high))


def _gap(name: str, figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure["gap"] is None:
        return "-"
    scale, places = (1, 2) if name == "off" else (100, 1)
    value, low, high = (scale * x for x in (figure["gap"]["value"], *figure["gap"]["interval"]))
    return f"{value:+.{places}f} ({low:+.{places}f} to {high:+.{places}f})"


def _pictures(metrics: Mapping[str, Any]) -> list[Picture]:
    """Bars of the figures that say most, and exact plans against the time of a step."""
    found = metrics["contestants"]
    group = "multi" if any(row["multi"] for row in found.values()) else "single"
    what = f"{metrics[group]:,} tasks of {GROUPS[group]}"

    def value(row: Mapping[str, Any], where: str, name: str) -> float | None:
        return row[where][name]["value"] if row[where] else None

    bars = {
        who: {
            **{FIGURES[name]: value(row, group, name) for name in ("exact", "nodes", "first")},
            "one step where one is enough": value(row, "single", "stop"),
        }
        for who, row in found.items()
    }
    points = [
        {
            "name": who,
            "cost": max(row["ms_per_step"]["median"], 0.001),
            "value": row[group]["exact"]["value"],
            "interval": row[group]["exact"]["interval"],
            "ours": who == metrics["ours"],
        }
        for who, row in found.items()
        if row[group]
    ]
    cost = "time of a step, median (ms, log)"
    return [
        Picture("plans", "What plans get right", lambda: pictures.bars(bars, "share", what)),
        Picture("time", "Exact plans against the time of a step", lambda: pictures.frontier(points, cost, "exact nodes", what, log=True)),
    ]


def _note(metrics: Mapping[str, Any]) -> str:
    note = (
        "Order: share of the pairs of steps of which one needs the other's answer whose nodes come in that order (a pair without one of "
        "its nodes does not). Exact nodes: the same nodes in the same sequence; and needs: with the same needs, too. Stop: several steps "
        "where several are needed, one where one is enough. Steps off: mean difference of their number. Hops: mean steps of a plan. "
        "Decisions: how often the model was asked for a plan. Times of one query at a time, requests included. Intervals are 95 %: Wilson "
        "(1927) for shares, bootstrap for F1 and steps off, paired bootstrap for differences on the same tasks (in points)."
    )
    if metrics["off_edges"]:
        note += f" The graph's edges do not lead along {metrics['off_edges']:,} of the tasks: the master cannot be exact on them."
    return note
