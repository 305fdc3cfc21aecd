"""The figures of replayed policies: score, gap to the best single model, workers and parameters asked, regret; and their report.

It knows plays (`replay.Play`) and the table that they were made on. It knows no policy, and plays nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lmgraph.evaluate import pictures
from lmgraph.evaluate.outcomes import Table
from lmgraph.evaluate.replay import Play
from lmgraph.evaluate.report import Cells, Picture, Report, Section, interval, percent
from lmgraph.evaluate.statistics import difference, wilson


def measure(table: Table, plays: Mapping[str, Play], first: str, missing: Mapping[str, str]) -> dict[str, Any]:
    """Figures of every policy, as plain data.

    `first` is the policy (best single) that others are compared with; `missing` says which were left out and why. Each has n, score,
    interval (Wilson of the rounded count), `gap` to `first` (paired bootstrap), workers asked per query (mean, most), `billions`:
    parameters activated per query (None where a size is unknown), `regret`: the oracle's score minus this one's, `by_category`. `oracle`:
    the best recorded outcome of each question; it knows the outcomes and is no policy. `questions` counts those that were learnt from,
    too; `models` are scored on the judged questions.
    """
    inside = ~np.isnan(plays[first].right)
    recorded = table.right[inside]
    best = np.nanmax(recorded, axis=1)
    n, oracle = int(inside.sum()), float(best.mean())
    sizes = np.array([np.nan if m.billions is None else m.billions for m in table.models] + [0.0])
    category = np.array(table.categories)[inside]
    rows: dict[str, Any] = {}
    for name, play in plays.items():
        right, workers = play.right[inside], play.workers[inside]
        score = float(right.mean())
        gap, bounds = difference(right, plays[first].right[inside])
        billions = float(sizes[workers].sum(axis=1).mean())
        rows[name] = {
            "n": n,
            "score": score,
            "interval": list(wilson(round(float(right.sum())), n)),
            "gap": None if name == first else {"value": gap, "interval": list(bounds)},
            "workers": float((workers >= 0).sum(axis=1).mean()),
            "most": int((workers >= 0).sum(axis=1).max()),
            "billions": None if np.isnan(billions) else billions,
            "regret": oracle - score,
            "by_category": {str(label): float(right[category == label].mean()) for label in np.unique(category)},
        }
    return {
        "questions": len(table.ids),
        "models": [
            {"name": m.name, "billions": m.billions, "score": float(np.nanmean(recorded[:, i]))} for i, m in enumerate(table.models)
        ],
        "oracle": {"n": n, "score": oracle, "interval": list(wilson(round(float(best.sum())), n))},
        "first": first,
        "policies": rows,
        "missing": dict(missing),
    }


def report(metrics: Mapping[str, Any], title: str, command: str) -> Report:
    """`measure`'s figures for people: policies, models, categories, and score against parameters activated."""
    found, oracle = metrics["policies"], metrics["oracle"]
    scores: list[Cells] = [(name, percent(row["score"]), interval(row["interval"]), *_gap(row["gap"])) for name, row in found.items()]
    scores.append(("oracle (some model is right)", percent(oracle["score"]), interval(oracle["interval"]), "", ""))
    costs: list[Cells] = [
        (
            name,
            f"{row['workers']:.2f}",
            f"{row['most']}",
            "-" if row["billions"] is None else f"{row['billions']:.1f}",
            f"{row['regret'] * 100:.1f}",
        )
        for name, row in found.items()
    ]
    models: list[Cells] = [
        (m["name"], "-" if m["billions"] is None else f"{m['billions']:g}", percent(m["score"]))
        for m in sorted(metrics["models"], key=lambda m: -m["score"])
    ]
    labels = list(next(iter(found.values()))["by_category"])
    sections = [
        Section(
            f"Policies ({oracle['n']:,} questions, {len(models)} {'models' if len(models) > 1 else 'model'})",
            ("policy", "score", "interval", "to best", "interval of that"),
            scores,
        ),
        Section("What policies cost, per question", ("policy", "workers", "most", "billions", "regret"), costs),
        Section("Models", ("model", "billions", "score"), models, brief=False),
    ]
    if metrics["missing"]:
        sections.append(Section("Left out", ("policies", "detail"), list(metrics["missing"].items())))
    known = all(row["billions"] is not None for row in found.values())
    points = [
        {
            "name": name,
            "cost": row["billions"] if known else row["workers"],
            "value": row["score"],
            "interval": row["interval"],
            "ours": any(word in name for word in ("master", "vote", "cascade")),
        }
        for name, row in found.items()
    ]
    cost = "parameters activated per query (billions)" if known else "workers asked per query"
    drawn = [Picture("cost", f"Score against {cost}", lambda: pictures.frontier(points, cost, "score", f"{oracle['n']:,} questions"))]
    if len(labels) > 1:
        groups: list[Cells] = [(label or "(none)", *(percent(row["by_category"][label]) for row in found.values())) for label in labels]
        sections.append(Section("By category", ("category", *found), groups, brief=False))
        shown = [name for name in found if name != "random"]
        series = {label or "(none)": {name: found[name]["by_category"][label] for name in (shown[0], shown[-1])} for label in labels}
        drawn.append(Picture("categories", "Score by category", lambda: pictures.bars(series, "score", f"{oracle['n']:,} questions")))
    note = (
        "Every question is judged by policies that were fitted on other questions. To best: points more than the best single model, which "
        "is chosen on those other questions, too. Workers and billions are means: how many are asked, and the parameters of all of them. "
        "Regret: points that the oracle has more; it knows the outcomes and counts lucky guesses. Intervals are 95 %: Wilson (1927) for "
        "scores, paired bootstrap for differences."
    )
    if any("learnt" in name for name in found):
        note += " A learnt vote also knows who disagrees, and facts of the question."
    if any("options read" in name for name in found):
        note += (
            " `options read`: facts of the answer's text as well (its length, digits), which in MMLU-Pro say something by themselves, "
            "because most of its wrong options were written by a language model."
        )
    return Report(title, command, metrics, sections, drawn, note)


def _gap(gap: Mapping[str, Any] | None) -> Cells:
    if gap is None:
        return ("", "")
    low, high = gap["interval"]
    return (f"{gap['value'] * 100:+.1f}", f"{low * 100:+.1f} to {high * 100:+.1f}")
