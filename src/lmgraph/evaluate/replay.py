"""Routing policies replayed on recorded answers: fitted on some questions, judged on others.

It knows how a policy is kept honest: what it may see of a question is a `View` (text, features, category, how many options), and of the
answers only the letters of those workers that it asked. Right and wrong stay in here. It knows no policy; policies.py has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lmgraph.errors import DataError
from lmgraph.evaluate import pictures
from lmgraph.evaluate.outcomes import Table
from lmgraph.evaluate.report import Cells, Picture, Report, Section, interval, percent
from lmgraph.evaluate.statistics import difference, wilson

Array = np.ndarray
NOBODY = -1
"""in a list of workers: asks nobody more"""


@dataclass(frozen=True, eq=False)
class View:
    """What a policy may see of Q questions before it asks anybody."""

    queries: tuple[str, ...]
    categories: tuple[str, ...]
    options: Array
    """(Q,) number of options, 0 where unknown"""
    features: Array
    """(Q, D) numbers made of the queries' texts alone"""

    def rows(self, index: Array) -> View:
        """The view of these questions only."""
        return View(
            tuple(self.queries[i] for i in index), tuple(self.categories[i] for i in index), self.options[index], self.features[index]
        )


@dataclass(frozen=True, eq=False)
class Asked:
    """Who has been asked, and what they chose: (Q, K) columns of workers (NOBODY: none) and their letters ('' where none is known)."""

    workers: Array
    letters: Array


class Policy(Protocol):
    """Chooses workers for each question, one round after the other, then whose answer is given."""

    name: str

    def fit(self, table: Table, view: View) -> None:
        """Learn from questions whose outcomes are known."""
        ...

    def ask(self, view: View, asked: Asked) -> Array:
        """(Q,) whom each question asks next, NOBODY when it has asked enough. Nobody is asked twice."""
        ...

    def give(self, view: View, asked: Asked) -> Array:
        """(Q,) the round (0 to K-1) whose worker's answer is given."""
        ...


@dataclass(frozen=True, eq=False)
class Play:
    """What became of Q questions: whom they asked (Q, K), whose answer was given (Q,), how right it was (Q,)."""

    workers: Array
    given: Array
    right: Array


def view_of(table: Table, features: Array | None) -> View:
    """What policies may see of a table. Features default to none."""
    rows = np.zeros((len(table.ids), 0)) if features is None else np.asarray(features, dtype=np.float64)
    if len(rows) != len(table.ids):
        raise DataError(f"There are features of {len(rows)} questions, expected {len(table.ids)}.")
    return View(table.queries, table.categories, np.asarray(table.options), rows)


def folds(count: int, parts: int, seed: int = 0) -> list[tuple[Array, Array]]:
    """(training, test) indices of `parts` folds: each question is in exactly one test part. Raises DataError for too few questions."""
    if not 2 <= parts <= count:
        raise DataError(f"{count} questions cannot be split into {parts} parts.", f"Expected 2 to {count}.")
    order = np.random.default_rng(seed).permutation(count)
    return [(np.sort(np.setdiff1d(order, part)), np.sort(part)) for part in np.array_split(order, parts)]


def replay(policy: Policy, table: Table, view: View, splits: Sequence[tuple[Array, Array]], progress: Callable[[int, int], None]) -> Play:
    """Fit on each training part, play each test part; what is in no test part is NaN.

    Raises DataError when a policy asks an unknown worker or the same one twice, or a worker's outcome is not recorded.
    """
    plays = []
    for number, (training, test) in enumerate(splits, 1):
        if set(training.tolist()) & set(test.tolist()):
            raise DataError("A question is in the training and in the test part of one split.", "Its own outcome would reach the policy.")
        policy.fit(table.rows(training), view.rows(training))
        plays.append((test, _play(policy, table.rows(test), view.rows(test))))
        progress(number, len(splits))
    width = max(play.workers.shape[1] for _, play in plays)
    workers = np.full((len(table.ids), width), NOBODY)
    given, right = np.full(len(table.ids), NOBODY), np.full(len(table.ids), np.nan)
    for test, play in plays:
        workers[test, : play.workers.shape[1]] = play.workers
        given[test], right[test] = play.given, play.right
    return Play(workers, given, right)


def _play(policy: Policy, table: Table, view: View) -> Play:
    count = len(table.ids)
    letters = np.array(table.letters) if table.letters is not None else np.full((count, len(table.models)), "")
    asked = Asked(np.zeros((count, 0), dtype=int), np.zeros((count, 0), dtype="<U2"))
    each = np.arange(count)
    while True:
        following = np.asarray(policy.ask(view, asked))
        known = (following >= 0) & (following < len(table.models))
        if not (known | (following == NOBODY)).all() or (known[:, None] & (asked.workers == following[:, None])).any():
            raise DataError(f"Policy {policy.name!r} asks a worker that is not there, or one twice.")
        if not known.any():
            break
        told = np.where(known, letters[each, following.clip(0)], "")
        asked = Asked(np.column_stack([asked.workers, following]), np.column_stack([asked.letters, told]))
    at = np.asarray(policy.give(view, asked))
    given = asked.workers[each, at]
    if (given < 0).any():
        raise DataError(f"Policy {policy.name!r} gives an answer of a worker that it did not ask.")
    right = table.right[each, given]
    if np.isnan(right).any():
        where = table.ids[int(np.flatnonzero(np.isnan(right))[0])]
        raise DataError(f"Question {where!r} has no recorded outcome of a model that was asked.", "Leave the model out: --only MODEL")
    return Play(asked.workers, given, right)


def measure(table: Table, plays: Mapping[str, Play], first: str, groups: Sequence[str]) -> dict[str, Any]:
    """Figures of every policy, as plain data; `first` is the policy (best single) that others are compared with.

    Each: n, score, interval (Wilson of the rounded count), `gap` to `first` (paired bootstrap), workers asked per query (mean, most),
    `billions`: parameters activated per query (None where a size is unknown), `regret`: the oracle's score minus this one's,
    `by_group`. `oracle`: some model was right; it knows the outcomes and is no policy.
    """
    inside = ~np.isnan(plays[first].right)
    best = np.nanmax(table.right, axis=1)[inside]
    n, oracle = int(inside.sum()), float(best.mean())
    sizes = np.array([np.nan if m.billions is None else m.billions for m in table.models] + [0.0])
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
            "by_group": {group: float(right[np.array(groups)[inside] == group].mean()) for group in sorted(set(np.array(groups)[inside]))},
        }
    return {
        "questions": len(table.ids),
        "models": [
            {"name": m.name, "billions": m.billions, "score": float(np.nanmean(table.right[:, i]))} for i, m in enumerate(table.models)
        ],
        "oracle": {"n": n, "score": oracle, "interval": list(wilson(round(float(best.sum())), n))},
        "first": first,
        "policies": rows,
    }


def report(metrics: Mapping[str, Any], title: str, command: str) -> Report:
    """`measure`'s figures for people: policies, models, categories, and score against parameters activated."""
    found, oracle = metrics["policies"], metrics["oracle"]
    rows: list[Cells] = []
    for name, row in found.items():
        gap = row["gap"]
        rows.append(
            [
                name,
                percent(row["score"]),
                interval(row["interval"]),
                "" if gap is None else f"{gap['value'] * 100:+.1f} ({gap['interval'][0] * 100:+.1f} to {gap['interval'][1] * 100:+.1f})",
                f"{row['workers']:.2f}",
                f"{row['most']}",
                "-" if row["billions"] is None else f"{row['billions']:.1f}",
                f"{row['regret'] * 100:.1f}",
            ]
        )
    rows.append(["oracle (some model is right)", percent(oracle["score"]), interval(oracle["interval"]), "", "", "", "", "0.0"])
    head = ("policy", "score", "interval", f"against {metrics['first']}", "workers", "most", "billions", "regret")
    models: list[Cells] = [
        (m["name"], "-" if m["billions"] is None else f"{m['billions']:g}", percent(m["score"]))
        for m in sorted(metrics["models"], key=lambda m: -m["score"])
    ]
    names = list(next(iter(found.values()))["by_group"])
    groups: list[Cells] = [(group, *(percent(row["by_group"][group]) for row in found.values())) for group in names]
    sections = [
        Section(f"Policies ({oracle['n']:,} questions, {len(models)} models)", head, rows),
        Section("Models", ("model", "billions", "score"), models, brief=False),
        Section("By category", ("category", *found), groups, brief=False),
    ]
    points = [
        {
            "name": name,
            "cost": row["billions"] or row["workers"],
            "value": row["score"],
            "interval": row["interval"],
            "ours": any(word in name for word in ("master", "vote", "cascade")),
        }
        for name, row in found.items()
    ]
    known = all(row["billions"] is not None for row in found.values())
    cost = "parameters activated per query (billions)" if known else "workers asked per query"
    drawn = [Picture("cost", f"Score against {cost}", lambda: pictures.frontier(points, cost, "score", f"{oracle['n']:,} questions"))]
    if len(names) > 1:
        shown = [name for name in found if name != "random"]
        series = {group: {name: found[name]["by_group"][group] for name in (shown[0], shown[-1])} for group in names}
        drawn.append(Picture("categories", "Score by category", lambda: pictures.bars(series, "score", f"{oracle['n']:,} questions")))
    note = (
        "Every question is judged by policies that were fitted on other questions. Workers, billions: asked, and parameters activated, per "
        "query (mean). Regret: what the oracle has more; it knows the outcomes and counts lucky guesses. Intervals: 95 %, Wilson; "
        "differences: paired bootstrap. A learnt vote also knows who disagrees and facts of the question; `options read`: facts of the "
        "answer's text as well (its length, digits), which in MMLU-Pro say something by themselves, because most of its wrong options "
        "were written by a language model."
    )
    return Report(title, command, metrics, sections, drawn, note)
