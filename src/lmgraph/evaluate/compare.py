"""Routers side by side: the same queries, the same examples, one after the other on one machine; accuracy, abstention, decision time.

It knows contestants by what they decide. Times are those of one query at a time, in ms, with nothing else asked meanwhile. What was
decided is kept as it comes, and how long learning took, so that a run that was stopped goes on. It knows neither how a contestant works
nor where queries come from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmgraph.errors import DataError, EngineError, MissingExtra
from lmgraph.evaluate import pictures
from lmgraph.evaluate.contestants import Contestant, Verdict
from lmgraph.evaluate.journal import Journal, key_of
from lmgraph.evaluate.report import Cells, Picture, Report, Section, interval, percent
from lmgraph.evaluate.statistics import auroc, difference, share, spread
from lmgraph.train.examples import Example

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Contest:
    """What all contestants get: nodes with descriptions, examples to learn from, queries with their node, queries of no node."""

    nodes: Mapping[str, str]
    examples: Sequence[Example]
    queries: Sequence[Example]
    outside: Sequence[str] = ()

    def spread(self, most: int) -> tuple[list[Example], list[str]]:
        """At most `most` of the queries, and of those of no node the same share, evenly spread."""
        if most >= len(self.queries):
            return list(self.queries), list(self.outside)
        few = [self.queries[i * len(self.queries) // most] for i in range(most)]
        rest = round(len(self.outside) * most / len(self.queries))
        return few, [self.outside[i * len(self.outside) // rest] for i in range(rest)]


@dataclass
class Result:
    """What one contestant did: verdicts and times in the order of its queries; `missing` says why it did nothing."""

    name: str
    queries: list[Example] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    outside: list[Verdict] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    fit_s: float = 0.0
    missing: str = ""


@dataclass(frozen=True)
class Decided:
    """One decision as the journal keeps it; without a node: how long a contestant took to learn."""

    node: str
    score: float
    ms: float


async def run(contestant: Contestant, contest: Contest, most: int, journal: Journal[Decided], progress: Progress) -> Result:
    """Fit, decide at most `most` queries, close.

    A contestant that cannot take part (a library is missing, the nodes do not fit into its model) comes back with `missing`, not as an
    error. Raises DataError where there is nothing to decide or to learn.
    """
    if not contest.queries or not contest.examples:
        raise DataError(f"There are {len(contest.queries)} queries and {len(contest.examples)} examples: nothing to compare.")
    if len({e.node for e in contest.examples}) < 2:
        raise DataError(f"All {len(contest.examples)} examples belong to {contest.examples[0].node}: there is nothing to learn.")
    queries, outside = contest.spread(most)
    try:
        began = time.perf_counter()
        try:
            await contestant.fit(contest.examples, contest.nodes)
        except (MissingExtra, EngineError) as error:
            return Result(contestant.name, missing=f"{error.message} {error.hint}".strip())
        took = (time.perf_counter() - began) * 1000
        learnt = key_of([(e.query, e.node) for e in contest.examples], list(contest.nodes.items()))
        who = (contestant.name, contestant.weights) if contestant.weights else (contestant.name,)
        key = key_of(*who, learnt)
        fitted = journal.get(key)
        if fitted is None:  # a later run finds what the first one trained or computed: its time is not what learning takes
            fitted = Decided("", 0.0, round(took, 3))
            journal.add(key, fitted, {"contestant": contestant.name, "learnt": len(contest.examples)})
        made = Result(contestant.name, queries, fit_s=fitted.ms / 1000)
        for number, query in enumerate([e.query for e in queries] + outside):
            key = key_of(*who, learnt, query)
            found = journal.get(key)
            if found is None:
                started = time.perf_counter()
                verdict = await contestant.decide(query)
                found = Decided(verdict.node, verdict.score, round((time.perf_counter() - started) * 1000, 3))
                journal.add(key, found, {"contestant": contestant.name})
            (made.verdicts if number < len(queries) else made.outside).append(Verdict(found.node, found.score))
            made.ms.append(found.ms)
            progress(contestant.name, number + 1, len(queries) + len(outside))
    finally:
        await contestant.close()
    return made


def measure(results: Sequence[Result], contest: Contest, ours: str) -> dict[str, Any]:
    """Figures of every contestant, as plain data; `ours` is the one that the others are compared with.

    Each: n, correct, accuracy, interval (Wilson); `gap`: its accuracy minus ours on the same queries, with a paired bootstrap
    interval; `ms`: decision time; `fit_s`; `auroc`: how well its score tells queries of a node from those of none.
    """
    right = {r.name: {(e.query, e.node): float(v.node == e.node) for e, v in zip(r.queries, r.verdicts, strict=True)} for r in results}
    rows: dict[str, Any] = {}
    for r in results:
        if r.missing:
            continue
        mine = right[r.name]
        row: dict[str, Any] = {
            "n": len(r.queries),
            **share(sum(v.node == e.node for e, v in zip(r.queries, r.verdicts, strict=True)), len(r.queries)),
        }
        shared = [query for query in mine if query in right.get(ours, {})]
        row["gap"] = None
        if r.name != ours and shared:
            value, bounds = difference([mine[q] for q in shared], [right[ours][q] for q in shared])
            row["gap"] = {"value": value, "interval": list(bounds), "n": len(shared)}
        row["auroc"] = auroc([v.score for v in r.verdicts], [v.score for v in r.outside])
        row |= {"outside": len(r.outside), "ms": spread(r.ms), "fit_s": round(r.fit_s, 1)}
        rows[r.name] = row
    return {
        "nodes": len(contest.nodes),
        "examples": len(contest.examples),
        "queries": len(contest.queries),
        "outside": len(contest.outside),
        "ours": ours,
        "contestants": rows,
        "missing": {r.name: r.missing for r in results if r.missing},
    }


def report(metrics: Mapping[str, Any], title: str, command: str) -> Report:
    """`measure`'s figures for people: a table, best first, and accuracy against decision time."""
    found = sorted(metrics["contestants"].items(), key=lambda item: -item[1]["accuracy"])
    outside = any(row["auroc"] is not None for _, row in found)
    compared = any(row["gap"] is not None for _, row in found)
    rows: list[Cells] = []
    for name, row in found:
        gap = row["gap"]
        cells = [name, f"{row['n']:,}", percent(row["accuracy"]), interval(row["interval"])]
        if compared:
            cells.append(
                "" if gap is None else f"{gap['value'] * 100:+.1f} ({gap['interval'][0] * 100:+.1f} to {gap['interval'][1] * 100:+.1f})"
            )
        cells += [f"{row['auroc']:.3f}" if row["auroc"] is not None else "-"] if outside else []
        rows.append([*cells, f"{row['ms']['median']:.1f} ms", f"{row['fit_s']:.0f} s"])
    head = (
        ["contestant", "queries", "accuracy", "interval"]
        + ([f"against {metrics['ours']}"] if compared else [])
        + (["AUROC"] if outside else [])
        + ["decision", "fit"]
    )
    facts = f"{metrics['nodes']} nodes, {metrics['examples']:,} examples, {metrics['queries']:,} queries"
    sections = [Section(f"Routers ({facts})", head, rows)]
    if metrics["missing"]:
        sections.append(Section("Left out", ("contestant", "detail"), list(metrics["missing"].items())))
    points = [
        {
            "name": name,
            "cost": max(row["ms"]["median"], 0.001),
            "value": row["accuracy"],
            "interval": row["interval"],
            "ours": name == metrics["ours"],
        }
        for name, row in found
    ]
    drawn = Picture(
        "accuracy",
        "Router accuracy against decision time",
        lambda: pictures.frontier(points, "decision time of one query, median (ms, log)", "router accuracy", facts, log=True),
    )
    note = (
        "Accuracy with 95 % Wilson intervals; differences in points on the same queries (paired bootstrap); times of one query at a time, "
        "median; fit: seconds of learning, when it was done for this folder, its last stretch where it was interrupted (what several "
        "contestants share, an embedding model and its vectors, counts for the first of them; the models of listings are loaded before; "
        "the master of a graph was trained before, on data of its own)"
        + ("; AUROC: queries of a node against out-of-scope ones by the contestant's own score." if outside else ".")
    )
    return Report(title, command, metrics, sections, [drawn] if points else [], note)
