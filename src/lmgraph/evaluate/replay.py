"""Routing policies replayed on recorded answers: fitted on some questions, judged on others.

It knows how a policy is kept honest: what it may see of a question is a `View` (text, what is made of the text alone, category, how many
options), and of the answers only the letters of those workers that it asked. Right and wrong stay in here. It knows no policy;
policies.py has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lmgraph.errors import DataError
from lmgraph.evaluate import facts
from lmgraph.evaluate.outcomes import Table

Array = np.ndarray
NOBODY = -1
"""in a list of workers: asks nobody more"""
OPTIONS = 26
"""letters there are to answer with"""


@dataclass(frozen=True, eq=False)
class View:
    """What a policy may see of Q questions before it asks anybody."""

    queries: tuple[str, ...]
    categories: tuple[str, ...]
    options: Array
    """(Q,) number of options, 0 where unknown"""
    features: Array
    """(Q, D) numbers made of the queries' texts alone"""
    facts: Array
    """(Q, F) plain facts of the queries' texts: `facts.FACTS`, then `facts.LIST_FACTS`; (Q, 0) where no letters are recorded"""
    looks: Array
    """(Q, 26, `facts.OPTION_FACTS`) plain facts of the options, not-a-number for one that is not there; (Q, 0, 0) likewise"""

    def rows(self, index: Array) -> View:
        """The view of these questions only."""
        return View(
            tuple(self.queries[i] for i in index),
            tuple(self.categories[i] for i in index),
            self.options[index],
            self.features[index],
            self.facts[index],
            self.looks[index],
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
    count = len(table.ids)
    rows = np.zeros((count, 0)) if features is None else np.asarray(features, dtype=np.float64)
    if len(rows) != count:
        raise DataError(f"There are features of {len(rows)} questions, expected {count}.")
    told, looks = np.zeros((count, 0)), np.zeros((count, 0, 0))
    if table.letters is not None:
        told = np.array([facts.of_question(query) for query in table.queries])
        looks = np.array([facts.of_options(query, OPTIONS) for query in table.queries])
    return View(table.queries, table.categories, np.asarray(table.options), rows, told, looks)


def folds(count: int, parts: int, seed: int = 0, texts: Sequence[str] = ()) -> list[tuple[Array, Array]]:
    """(training, test) indices of `parts` folds: each question is in exactly one test part.

    `texts`: questions with the same text, where there is one, are in the same part, so that none tells of another. Raises DataError for
    too few questions.
    """
    keys = [text or number for number, text in enumerate(texts)] if texts else list(range(count))
    number_of = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    if not 2 <= parts <= len(number_of):
        raise DataError(
            f"{len(number_of)} different questions cannot be split into {parts} parts.",
            f"Expected 2 to {len(number_of)} parts." if len(number_of) > 1 else "At least two questions are needed.",
        )
    of = np.array([number_of[key] for key in keys])
    order = np.random.default_rng(seed).permutation(len(number_of))
    tests = [np.isin(of, part) for part in np.array_split(order, parts)]
    return [(np.flatnonzero(~test), np.flatnonzero(test)) for test in tests]


def replay(
    policies: Sequence[Policy], table: Table, view: View, splits: Sequence[tuple[Array, Array]], progress: Callable[[int, int, str], None]
) -> dict[str, Play]:
    """Every policy by name: fitted on each training part, played on each test part; what is in no test part is NaN.

    `progress`: (done, total, the policy at work). Raises DataError when a split's parts overlap, when a model has no outcome in a
    training part, when a policy asks an unknown worker or the same one twice, or when the outcome of a worker that it asked is not
    recorded.
    """
    played: dict[str, list[tuple[Array, Play]]] = {policy.name: [] for policy in policies}
    for number, (training, test) in enumerate(splits):
        if both := sorted(set(training.tolist()) & set(test.tolist())):
            raise DataError(
                f"Question {table.ids[both[0]]!r} is in the training and in the test part of one split ({len(both)} are).",
                "Its own outcome would reach the policy.",
            )
        learnt, seen = table.rows(training), view.rows(training)
        if nothing := [m.name for m, gone in zip(table.models, np.isnan(learnt.right).all(axis=0), strict=True) if gone]:
            raise DataError(
                f"No outcome of {', '.join(nothing)} is recorded on the {len(training):,} questions that policies learn from.",
                "Leave such models out: --only MODEL, once for each of the others.",
            )
        asked, shown = table.rows(test), view.rows(test)
        for at, policy in enumerate(policies):
            progress(number * len(policies) + at, len(splits) * len(policies), policy.name)
            policy.fit(learnt, seen)
            played[policy.name].append((test, _play(policy, asked, shown)))
    progress(len(splits) * len(policies), len(splits) * len(policies), "")
    return {name: _whole(len(table.ids), parts) for name, parts in played.items()}


def _whole(count: int, parts: Sequence[tuple[Array, Play]]) -> Play:
    """One play of parts of the questions."""
    width = max(play.workers.shape[1] for _, play in parts)
    workers = np.full((count, width), NOBODY)
    given, right = np.full(count, NOBODY), np.full(count, np.nan)
    for test, play in parts:
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
        twice = known & (asked.workers == following[:, None]).any(axis=1)
        if len(wrong := np.flatnonzero(~known & (following != NOBODY) | twice)):
            raise DataError(
                f"Policy {policy.name!r} asks worker {following[wrong[0]]} about question {table.ids[wrong[0]]!r}, having asked "
                f"{asked.workers[wrong[0]].tolist()}.",
                f"Expected one of 0 to {len(table.models) - 1} that it has not asked, or {NOBODY} for nobody.",
            )
        if not known.any():
            break
        told = np.where(known, letters[each, following.clip(0)], "")
        asked = Asked(np.column_stack([asked.workers, following]), np.column_stack([asked.letters, told]))
    at = np.asarray(policy.give(view, asked))
    rounds = asked.workers.shape[1]
    given = np.array([asked.workers[q, k] if 0 <= k < rounds else NOBODY for q, k in enumerate(at)])
    if len(wrong := np.flatnonzero(given == NOBODY)):
        raise DataError(
            f"Policy {policy.name!r} gives the answer of round {at[wrong[0]]} to question {table.ids[wrong[0]]!r}, where it asked nobody.",
            f"Expected one of 0 to {rounds - 1} in which it asked somebody." if rounds else "It asked nobody at all.",
        )
    right = table.right[each, given]
    if len(gone := np.flatnonzero(np.isnan(right))):
        raise DataError(
            f"Question {table.ids[gone[0]]!r} has no recorded outcome of {table.models[given[gone[0]]].name}, which policy {policy.name!r} "
            f"asks ({len(gone)} such questions in this part).",
            "Leave the model out (--only MODEL, once for each of the others), or the question.",
        )
    return Play(asked.workers, given, right)
