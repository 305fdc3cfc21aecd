"""Which model works for which group of questions, by measured score: shrunken scores, the best few models, voters. Pure.

It knows a table of recorded answers and groups (a group is a node's questions). It knows no graph.yaml and no file. Shares are
between 0 and 1, intervals are 95 %. A score is what a model did on the recorded questions: choosing the best of many models by it
flatters the chosen one a little, so judge a choice on other questions than those it was made on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np

from lmgraph.errors import DataError, UserError
from lmgraph.evaluate.outcomes import Model, Table, nearest
from lmgraph.evaluate.statistics import wilson

GRID = np.geomspace(1, 2000, 60)
"""strengths of shrinkage that are tried"""
EXACT = 50_000
"""subsets of models that are compared one by one; above, greedy addition and swaps"""
CLOSE = 1e-12
"""scores that differ by less are equal"""


@dataclass(frozen=True, eq=False)
class Scores:
    """What G groups and M models came to. A group's questions need not be recorded for every model."""

    groups: tuple[str, ...]
    models: tuple[str, ...]
    sizes: np.ndarray
    """(G,) questions"""
    n: np.ndarray
    """(G, M) recorded answers"""
    k: np.ndarray
    """(G, M) sum of their scores"""
    raw: np.ndarray
    """(G, M) k / n, NaN where n is 0"""
    shrunk: np.ndarray
    """(G, M) the raw score drawn toward the model's overall one, the more the fewer answers there are; never NaN"""
    interval: np.ndarray
    """(G, M, 2) Wilson's of the raw score"""
    overall: np.ndarray
    """(M,) mean score over all recorded answers"""
    strength: float
    """s of the shrinkage: as many answers as the overall score counts for"""


@dataclass(frozen=True)
class Reason:
    """Why a group has its worker. `score` is None and the interval (0, 1) without recorded answers; '' where nobody else was eligible."""

    model: str
    n: int
    score: float | None
    shrunk: float
    interval: tuple[float, float]
    runner_up: str
    """the best of the other eligible models: better than the worker where only few models may be used"""
    runner_up_shrunk: float


@dataclass(frozen=True)
class Assignment:
    """A worker for each group, and one for everything else."""

    worker: Mapping[str, str]
    fallback: str
    """the strongest overall of the chosen"""
    chosen: tuple[str, ...]
    """every model that is used, the strongest overall first"""
    expected: float
    """mean over the questions of the shrunken scores of their workers"""
    reasons: Mapping[str, Reason]
    left_out: Mapping[str, str]
    """models that were not eligible though no limit is known to be broken: their size or cost is unknown"""


def scores(table: Table, group: Sequence[str]) -> Scores:
    """Scores of every model in every group; `group` labels each question. Raises DataError for models without any recorded answer.

    Shrinkage is empirical Bayes (Efron and Morris, JASA 70, 1975) with a beta-binomial (Skellam, JRSS B 10, 1948): in group g, model m
    is right as a draw from Beta(s·overall, s·(1-overall)), so shrunk = (k + s·overall) / (n + s). s maximises the marginal likelihood
    of all groups and models over a grid from 1 to 2,000.
    """
    names = tuple(model.name for model in table.models)
    recorded = ~np.isnan(table.right)
    if unknown := [name for name, any_ in zip(names, recorded.any(axis=0), strict=True) if not any_]:
        raise DataError(f"No answers are recorded of {', '.join(unknown)}.", "Leave them out, or record their answers.")
    groups = tuple(dict.fromkeys(group))
    place = {name: i for i, name in enumerate(groups)}
    member = np.zeros((len(groups), len(group)))
    member[[place[name] for name in group], np.arange(len(group))] = 1.0
    n = np.rint(member @ recorded).astype(np.int64)
    k = np.minimum(member @ np.where(recorded, table.right, 0.0), n)
    overall = k.sum(axis=0) / n.sum(axis=0)
    raw = np.where(n > 0, k / np.maximum(n, 1), np.nan)
    strength = float(GRID[int(np.argmax([_evidence(k, n, overall, s) for s in GRID]))])
    shrunk = (k + strength * overall) / (n + strength)
    interval = np.array([[wilson(round(float(a)), int(b)) for a, b in zip(*row, strict=True)] for row in zip(k, n, strict=True)])
    return Scores(groups, names, np.rint(member.sum(axis=1)).astype(np.int64), n, k, raw, shrunk, interval, overall, strength)


_lgamma = np.vectorize(math.lgamma, otypes=[np.float64])


def _evidence(k: np.ndarray, n: np.ndarray, overall: np.ndarray, strength: float) -> float:
    """Log marginal likelihood of all counts. Models that are always or never right say nothing about the strength."""
    inside = (overall > 0) & (overall < 1)
    a, b, k, n = strength * overall[inside], strength * (1 - overall[inside]), k[:, inside], n[:, inside]
    each = _lgamma(a + k) + _lgamma(b + n - k) - _lgamma(strength + n) - _lgamma(a) - _lgamma(b) + math.lgamma(strength)
    return float(each.sum())


def assign(
    scores: Scores,
    models: Sequence[Model],
    *,
    most: int | None = None,
    billions: float | None = None,
    cost: float | None = None,
    keep: Sequence[str] = (),
    general: str = "",
) -> Assignment:
    """The assignment with the greatest expected score that uses at most `most` models within the limits.

    `billions` and `cost` (of 1,000 queries) are the most a model may have; `keep` names models that are chosen in any case, and
    `general` the group that gets the fallback, whoever is best there. The subset of models is the best there is where at most 50,000
    come into question, else found by greedy addition (Nemhauser, Wolsey and Fisher, Math. Programming 14, 1978) and swaps until none
    improves it. Raises UserError when no model is left, or those to keep cannot be.
    """
    eligible, left_out = _eligible(scores, models, billions, cost)
    for name in keep:
        if name not in scores.models:
            raise UserError(f"No model is called {name!r}.", f"Valid: {', '.join(nearest(name, scores.models))}")
        if scores.models.index(name) not in eligible:
            raise UserError(f"{name} is to be kept and is over the limits.", "Raise the limits, or do not keep it.")
    least = max(1, len(set(keep)))
    if most is not None and most < least:
        raise UserError(f"Found at most {most} models, expected at least {least}.", f"To be kept: {', '.join(keep) or 'none'}")
    order = sorted(eligible, key=lambda m: -scores.overall[m])  # from here a model is its rank: 0 is the strongest overall
    kept = sorted({order.index(scores.models.index(name)) for name in keep})
    value = _Value(
        scores.shrunk[:, order], scores.sizes / scores.sizes.sum(), scores.groups.index(general) if general in scores.groups else None
    )
    subset = list(range(len(order))) if most is None or most >= len(order) else _subset(value, most, kept)
    best = [subset[0] if name == general else _first(value.shrunk[g], subset) for g, name in enumerate(scores.groups)]
    used = sorted({*best, subset[0], *kept})
    return Assignment(
        {name: scores.models[order[rank]] for name, rank in zip(scores.groups, best, strict=True)},
        scores.models[order[subset[0]]],
        tuple(scores.models[order[rank]] for rank in used),
        float(value.of(np.array([subset]))[0]),
        {name: _reason(scores, g, order, rank) for g, (name, rank) in enumerate(zip(scores.groups, best, strict=True))},
        left_out,
    )


def voters(scores: Scores, models: Sequence[str], group: str, count: int) -> dict[str, float]:
    """The `count` best of these models in a group, best first, with the probability that each is right (its shrunken score).

    Raises UserError for a group without questions.
    """
    if group not in scores.groups:
        raise UserError(f"There are no questions of {group!r}.", f"Valid: {', '.join(nearest(group, scores.groups))}")
    row = scores.shrunk[scores.groups.index(group)]
    found = {name: float(row[scores.models.index(name)]) for name in models}
    return dict(sorted(found.items(), key=lambda item: -item[1])[:count])


@dataclass(frozen=True)
class _Value:
    """What sets of models are worth; models are ranks."""

    shrunk: np.ndarray
    """(G, ranks)"""
    weights: np.ndarray
    """(G,) share of the questions"""
    general: int | None
    """the group that gets the strongest overall"""

    def of(self, sets: np.ndarray) -> np.ndarray:
        """Expected score of each of (S, size) sets, their ranks in order."""
        best = self.shrunk[:, sets].max(axis=2)
        if self.general is not None:
            best[self.general] = self.shrunk[self.general, sets[:, 0]]
        return self.weights @ best


def _subset(value: _Value, size: int, kept: list[int]) -> list[int]:
    """The ranks of the best set of this size that holds those to be kept."""
    free = [rank for rank in range(value.shrunk.shape[1]) if rank not in kept]
    if math.comb(len(free), size - len(kept)) <= EXACT:
        return _better(value, (sorted([*kept, *more]) for more in combinations(free, size - len(kept))), [], -1.0)[0]
    subset, reached = kept, -1.0
    while len(subset) < size:
        subset, reached = _better(value, (sorted([*subset, rank]) for rank in free if rank not in subset), [], -1.0)
    while True:
        swaps = (sorted([*(set(subset) - {old}), new]) for old in subset if old not in kept for new in free if new not in subset)
        improved, gain = _better(value, swaps, subset, reached)
        if improved == subset:
            return subset
        subset, reached = improved, gain


def _better(value: _Value, sets: Iterator[list[int]], found: list[int], reached: float) -> tuple[list[int], float]:
    """(set, its value): the first of the best of these, where it beats what was found."""
    while block := list(islice(sets, 4096)):
        values = value.of(np.array(block))
        first = _first(values, range(len(block)))
        if values[first] > reached + CLOSE:
            found, reached = block[first], float(values[first])
    return found, reached


def _first(values: np.ndarray, among: Sequence[int]) -> int:
    """The first of those whose value is greatest."""
    picked = values[list(among)]
    return among[int(np.argmax(picked >= picked.max() - CLOSE))]


def _reason(scores: Scores, g: int, order: Sequence[int], rank: int) -> Reason:
    others = [other for other in range(len(order)) if other != rank]
    second = order[_first(scores.shrunk[g, order], others)] if others else None
    m = order[rank]
    low, high = scores.interval[g, m]
    return Reason(
        scores.models[m],
        int(scores.n[g, m]),
        float(scores.raw[g, m]) if scores.n[g, m] else None,
        float(scores.shrunk[g, m]),
        (float(low), float(high)),
        "" if second is None else scores.models[second],
        0.0 if second is None else float(scores.shrunk[g, second]),
    )


def _eligible(scores: Scores, models: Sequence[Model], billions: float | None, cost: float | None) -> tuple[list[int], dict[str, str]]:
    """(columns of the models within the limits, why others are left out of which nothing is known)."""
    known = {model.name: model for model in models}
    own = [known.get(name, Model(name)) for name in scores.models]
    limits = [
        (limit, what, best, noun, [getattr(model, field) for model in own])
        for field, limit, what, best, noun in (
            ("billions", billions, "{:g} billion parameters", "smallest", "size"),
            ("cost", cost, "a cost of {:g} per 1,000 queries", "cheapest", "cost"),
        )
        if limit is not None
    ]
    left_out: dict[str, str] = {}
    eligible = []
    for column, name in enumerate(scores.models):
        unknown = [noun for _, _, _, noun, values in limits if values[column] is None]
        if unknown:
            left_out[name] = f"unknown {' and '.join(unknown)}"
        elif all(values[column] <= limit for limit, _, _, _, values in limits):
            eligible.append(column)
    if not eligible:
        wanted = " and ".join(what.format(limit) for limit, what, _, _, _ in limits)
        found = []
        for _, what, best, noun, values in limits:
            sized = sorted((value, name) for value, name in zip(values, scores.models, strict=True) if value is not None)
            found.append(f"the {best} is {sized[0][1]} with {what.format(sized[0][0])}" if sized else f"no model's {noun} is known")
        raise UserError(
            f"No model has at most {wanted}: {', '.join(found)}.",
            "Raise the limit, or tell sizes and costs in a models file (docs/outcomes.md).",
        )
    return eligible, left_out
