"""What an exam shows: the marks of each way to choose a worker, on the same questions, with intervals and differences.

Pure: `measure` takes questions, decisions and replies and returns plain data, `report` says how to show it. Shares are between 0 and
1, intervals are 95 %, times are ms. No answer counts as wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmgraph.errors import DataError
from lmgraph.evaluate import pictures
from lmgraph.evaluate.asking import Reply
from lmgraph.evaluate.mmlu import Candidate, Results
from lmgraph.evaluate.mmludata import Question
from lmgraph.evaluate.report import Cells, Picture, Report, Section, interval, percent
from lmgraph.evaluate.statistics import difference, ratio, share, wilson

BEST, RANDOM, ORACLE, ROUTED, REWRITTEN, ANY = (
    "best single",
    "random node",
    "by subject (oracle)",
    "routed",
    "routed, rewritten",
    "any worker right",
)
MEANS = {
    BEST: "one worker for all, chosen with hindsight on these questions",
    RANDOM: "expected, every node equally likely",
    ORACLE: "the node of the question's subject",
    ROUTED: "the node that the master chooses, after the fallback, as serving would",
    REWRITTEN: "the same, with the master's rewrite where it passed the guard",
    ANY: "no router can do better with these workers",
}


def measure(
    questions: Sequence[Question], results: Results, those: Sequence[Candidate], first: Sequence[str], *, shots: int, rewriting: bool
) -> dict[str, Any]:
    """Everything that is reported, as plain data (JSON-ready; None where a figure is undefined).

    `first` are the nodes that may come first (what a random choice is among). `alone` (each worker for all questions) and `policies`:
    correct, accuracy, Wilson interval, `difference` to the best single worker with its paired interval, mean prompt tokens and ms
    (the master's included where it routes). `best`: the best single worker, known only afterwards. `router`: accuracy of the node
    chosen, and after the fallback, in all and by node. `workers`: share of calls by policy, how answers were had. `by_subject`.

    Raises DataError for no questions, and for a node that no worker answers for.
    """
    owner = {node: candidate.name for candidate in those for node in candidate.nodes}
    if not questions:
        raise DataError("There is nothing to measure: no questions.")
    if strangers := sorted({q.node for q in questions} - owner.keys()):
        raise DataError(f"Questions belong to {', '.join(strangers)}, which no node is called.", f"Valid nodes: {', '.join(owner)}")
    right = {
        name: np.array([reply.choice == q.answer for reply, q in zip(replies, questions, strict=True)], dtype=np.float64)
        for name, replies in results.replies.items()
    }
    cost = {name: np.array([_cost(reply) for reply in replies]) for name, replies in results.replies.items()}
    best = max(right, key=lambda name: right[name].sum())
    chosen = {
        BEST: [best] * len(questions),
        ORACLE: [owner[q.node] for q in questions],
        ROUTED: [owner[routed.node] for routed in results.routed],
    }
    master = np.array([(0.0, routed.ms) for routed in results.routed])
    marks = {name: np.array([right[worker][i] for i, worker in enumerate(who)]) for name, who in chosen.items()}
    costs = {name: np.array([cost[worker][i] for i, worker in enumerate(who)]) for name, who in chosen.items()}
    costs[ROUTED] = costs[ROUTED] + master
    marks[RANDOM] = np.mean([right[owner[node]] for node in first], axis=0)
    costs[RANDOM] = np.mean([cost[owner[node]] for node in first], axis=0)
    if rewriting:
        marks[REWRITTEN], costs[REWRITTEN] = marks[ROUTED].copy(), costs[ROUTED].copy()
        costs[REWRITTEN][:, 1] += [routed.rewrite_ms for routed in results.routed]
        for i, reply in enumerate(results.rewritten):
            if reply is not None:
                marks[REWRITTEN][i] = reply.choice == questions[i].answer
                costs[REWRITTEN][i] += np.array(_cost(reply)) - cost[chosen[ROUTED][i]][i]
    marks[ANY] = np.max(list(right.values()), axis=0)
    order = [name for name in MEANS if name in marks]
    return {
        "n": len(questions),
        "shots": shots,
        "nodes": list(owner),
        "best": best,
        "policies": {name: _figures(marks[name], marks[BEST], costs.get(name)) for name in order},
        "alone": {name: _figures(right[name], marks[BEST], cost[name]) for name in right},
        "router": _router(questions, results),
        "rewrites": {"used": sum(reply is not None for reply in results.rewritten)} if rewriting else None,
        "workers": {
            candidate.name: {
                "nodes": list(candidate.nodes),
                "share_routed": chosen[ROUTED].count(candidate.name) / len(questions),
                "share_oracle": chosen[ORACLE].count(candidate.name) / len(questions),
                "no_answer": sum(reply.choice is None for reply in replies),
                "likelihood": sum(reply.how == "likelihood" for reply in replies),
                "parsed": sum(reply.how == "parsed" for reply in replies),
                "fewer_shots": sum(reply.shots < shots for reply in replies),
            }
            for candidate in those
            for replies in [results.replies[candidate.name]]
        },
        "by_subject": _by_subject(questions, results, {name: marks[name] for name in order}, right),
    }


def _cost(reply: Reply) -> tuple[float, float]:
    """(prompt tokens, ms); not-a-number where the server does not count tokens: no sum with it can be told."""
    return reply.prompt_tokens or np.nan, reply.ms


def _figures(marks: Any, best: Any, cost: Any) -> dict[str, Any]:
    """One policy: `marks` and `best` of shape (n,), `cost` of shape (n, 2): prompt tokens, ms; or None.

    `correct` is a whole number but for an expectation, which is rounded for its interval.
    """
    n, correct = len(marks), round(float(marks.sum()), 6)
    gap, bounds = difference(marks, best)
    tokens, ms = (None, None) if cost is None else (float(value) for value in cost.mean(axis=0))
    return {
        "correct": int(correct) if correct.is_integer() else correct,
        "accuracy": correct / n,
        "interval": list(wilson(round(correct), n)),
        "difference": gap,
        "difference_interval": list(bounds),
        "prompt_tokens": None if tokens is None or np.isnan(tokens) else tokens,
        "ms": ms,
    }


def _router(questions: Sequence[Question], results: Results) -> dict[str, Any]:
    n = len(questions)
    rows: dict[str, list[tuple[bool, bool]]] = {}
    for q, routed in zip(questions, results.routed, strict=True):
        rows.setdefault(q.node, []).append((routed.chosen == q.node, routed.node == q.node))
    every = [row for some in rows.values() for row in some]
    return {
        **share(sum(hit for hit, _ in every), n),
        "after_fallback": share(sum(hit for _, hit in every), n),
        "fallbacks": sum(routed.fallback for routed in results.routed),
        "by_node": {
            node: {
                "n": len(some),
                **share(sum(hit for hit, _ in some), len(some)),
                "after_fallback": sum(hit for _, hit in some) / len(some),
            }
            for node, some in sorted(rows.items())
        },
    }


def _by_subject(questions: Sequence[Question], results: Results, marks: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    places: dict[str, list[int]] = {}
    for i, q in enumerate(questions):
        places.setdefault(q.subject, []).append(i)
    return {
        subject: {
            "n": len(where),
            "node": questions[where[0]].node,
            "router": ratio(sum(results.routed[i].chosen == questions[i].node for i in where), len(where)),
            "policies": {name: float(values[where].mean()) for name, values in marks.items()},
            "alone": {name: float(values[where].mean()) for name, values in right.items()},
        }
        for subject, where in sorted(places.items())
    }


def report(metrics: Mapping[str, Any], title: str, command: str) -> Report:
    """`measure`'s figures for people."""
    routed, policies = metrics["policies"][ROUTED], metrics["policies"]
    line = f"Routed {percent(routed['accuracy'])}, best single {percent(policies[BEST]['accuracy'])}, n = {metrics['n']:,}"
    shown = [name for name in (BEST, ROUTED, ORACLE) if name in policies]
    drawn = [
        Picture(
            "subjects",
            "Accuracy by subject: best single worker, routed, routed by subject",
            lambda: pictures.bars(
                {name: {policy: row["policies"][policy] for policy in shown} for name, row in metrics["by_subject"].items()}, "right", line
            ),
        )
    ]
    points = [
        {"name": name, "cost": row["ms"], "value": row["accuracy"], "interval": row["interval"], "ours": name in (ROUTED, REWRITTEN)}
        for name, row in [*metrics["alone"].items(), *((p, policies[p]) for p in (RANDOM, ORACLE, ROUTED, REWRITTEN) if p in policies)]
    ]
    if len(metrics["alone"]) > 1:
        drawn.append(
            Picture(
                "cost", "Accuracy against time", lambda: pictures.frontier(points, "mean ms a question, as measured here", "right", line)
            )
        )
    return Report(title, command, metrics, _sections(metrics), drawn, _note(metrics))


def _note(metrics: Mapping[str, Any]) -> str:
    lone = len(metrics["alone"]) == 1
    parsed = sum(row["parsed"] for row in metrics["workers"].values())
    fewer = sum(row["fewer_shots"] for row in metrics["workers"].values())
    parts = [
        "All nodes have the same worker here, so routing can change no answer and all policies score the same." if lone else "",
        f"Questions are asked {metrics['shots']}-shot with the prompt of Hendrycks et al. (2021). An answer is the letter with the highest "
        "likelihood, or, where a worker tells no likelihood, the letter that its words state. No answer counts as wrong.",
        f"{parsed:,} answers were read from words: these do not compare with likelihoods one to one." if parsed else "",
        f"{fewer:,} prompts were too long for their worker and had fewer shots." if fewer else "",
        "The best single worker is known only after the exam, so it is a little flattered. Intervals are 95 %: Wilson (1927) for "
        "shares, paired bootstrap for differences. Times are as measured, with what an engine's cache saved.",
    ]
    return " ".join(part for part in parts if part)


def _sections(metrics: Mapping[str, Any]) -> list[Section]:
    policies, alone, router = metrics["policies"], metrics["alone"], metrics["router"]
    after = router["after_fallback"]
    same = ", all with the same worker: routing changes no answer" if len(alone) == 1 else ""
    summary: list[Cells] = [
        ("questions", f"{metrics['n']:,}", f"{len(metrics['by_subject'])} subjects, {metrics['shots']}-shot"),
        ("distinct workers", f"{len(alone)}", f"{len(metrics['nodes'])} nodes{same}"),
        ("best single worker", percent(policies[BEST]["accuracy"]), f"{metrics['best']}, known only afterwards"),
        ("router accuracy", percent(router["accuracy"]), interval(router["interval"])),
        ("after the fallback", percent(after["accuracy"]), f"{interval(after['interval'])}, fallback for {router['fallbacks']:,}"),
    ]
    if metrics["rewrites"]:
        summary.append(("rewritten questions", f"{metrics['rewrites']['used']:,}", "passed the guard"))
    every = {**policies, **{f"{name} alone": row for name, row in alone.items()}}
    table: list[Cells] = [(name, *_cells(row)) for name, row in every.items()]
    costs: list[Cells] = [
        (name, *("-" if row[key] is None else f"{row[key]:,.1f}" for key in ("prompt_tokens", "ms")), MEANS.get(name, ""))
        for name, row in every.items()
    ]
    workers: list[Cells] = [
        (name, f"{len(row['nodes'])}", percent(row["share_routed"]), percent(row["share_oracle"]), f"{row['no_answer']:,}")
        for name, row in metrics["workers"].items()
    ]
    how: list[Cells] = [
        (name, *(f"{row[key]:,}" for key in ("likelihood", "parsed", "fewer_shots")), ", ".join(row["nodes"]))
        for name, row in metrics["workers"].items()
    ]
    nodes: list[Cells] = [
        (name, f"{row['n']:,}", percent(row["accuracy"]), interval(row["interval"]), percent(row["after_fallback"]))
        for name, row in router["by_node"].items()
    ]
    subjects: list[Cells] = [
        (
            name,
            row["node"],
            f"{row['n']:,}",
            percent(row["router"]),
            *(percent(value) for value in row["policies"].values()),
            *(percent(value) for value in row["alone"].values()),
        )
        for name, row in metrics["by_subject"].items()
    ]
    return [
        Section("Summary", ("measure", "value", "detail"), summary),
        Section("Policies", ("policy", "right", "interval", "to best", "interval of that"), table),
        Section("Workers", ("worker", "nodes", "calls, routed", "calls, by subject", "no answer"), workers),
        Section(
            "How answers were had", ("worker", "likelihood", "words", "fewer shots", "nodes"), how, text=frozenset({"nodes"}), brief=False
        ),
        Section("What policies cost and mean", ("policy", "prompt tokens", "ms", "detail"), costs, brief=False),
        Section("Router by node", ("node", "n", "right", "interval", "after the fallback"), nodes),
        Section(
            "Subjects",
            ("subject", "node", "n", "router", *policies, *(f"{name} alone" for name in alone)),
            subjects,
            text=frozenset({"node"}),
            brief=False,
        ),
    ]


def _cells(row: Mapping[str, Any]) -> Cells:
    low, high = row["difference_interval"]
    gap = (f"{row['difference'] * 100:+.1f}", f"{low * 100:+.1f} to {high * 100:+.1f}")
    return (percent(row["accuracy"]), interval(row["interval"]), *gap)
