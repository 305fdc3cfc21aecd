"""How probable it is that each model is right on a question, learnt from other questions: by category, or by the query's features.

It knows tables of recorded outcomes and what may be seen of a question (`replay.View`). It knows no policy, and whom to ask is not its
matter. Several policies may share one competence: what they learn from the same questions is then learnt once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from lmgraph.errors import DataError
from lmgraph.evaluate import assign
from lmgraph.evaluate.outcomes import Table
from lmgraph.evaluate.replay import NOBODY, Array, View, folds

PENALTIES = (10.0, 30.0, 100.0, 300.0)
CATEGORY = 0.3
"""weight of the category beside features that weigh 1 together"""
PARTS = 5
"""of a training set, each judged by the rest"""
FEWEST = 5
"""questions with the outcomes of every model that rows are fitted on"""


class Competence:
    """Probability that each model is right on a question, from its category alone."""

    _table: Table | None = None
    _view: View | None = None
    _judged: Array | None = None

    def fit(self, table: Table, view: View) -> None:
        """Learn; from the same questions (the same two objects) only once. Raises DataError where too little is recorded."""
        if table is not self._table or view is not self._view:
            self._learn(table, view)
            self._table, self._view, self._judged = table, view, None

    def judged(self) -> Array:
        """(Q, M) probabilities for the questions of `fit`, each part of them by what the other parts say: none knows its own outcome."""
        assert self._table is not None and self._view is not None
        if self._judged is None:
            self._judged = np.zeros(self._table.right.shape)
            other = copy.copy(self)
            texts = self._view.queries
            different = len({*texts} - {""}) + texts.count("")
            for training, test in folds(len(texts), min(PARTS, different), seed=1, texts=texts):
                other._learn(self._table.rows(training), self._view.rows(training))
                self._judged[test] = other.of(self._view.rows(test))
        return self._judged

    def of(self, view: View) -> Array:
        """(Q, M) probabilities, strictly between 0 and 1; a category that is new has the overall score."""
        rows = [self._groups.get(name, NOBODY) for name in view.categories]  # the last row stands for NOBODY
        return _probabilities(np.vstack([self._scores.shrunk, self._scores.overall])[rows])

    def _learn(self, table: Table, view: View) -> None:
        """Shrunken scores by category (`assign.scores`)."""
        self._scores = assign.scores(table, table.categories)
        self._groups = {name: i for i, name in enumerate(self._scores.groups)}


class Rows(Competence):
    """The same from the query's features: a functional row a model, ridge regression on who was right.

    The master's hidden states as features and the greatest product with a row is what choosing by functional token is, with models in
    place of nodes. `categories`: the category counts as a feature, too. The penalties are those with the least squared error when each
    question is left out once (Allen, Technometrics 16, 1974).
    """

    def __init__(self, categories: bool) -> None:
        self._categories = categories

    def of(self, view: View) -> Array:
        """(Q, M) probabilities, strictly between 0 and 1; a category that is new counts as the average one."""
        return _probabilities(self._inputs(view) @ self._rows + self._base)

    def _learn(self, table: Table, view: View) -> None:
        whole = ~np.isnan(table.right).any(axis=1)
        if whole.sum() < FEWEST:
            raise DataError(
                f"Of {len(whole)} questions to learn from {whole.sum()} have the outcomes of every model; expected at least {FEWEST}.",
                "Record more, or leave out models of which little is recorded: --only MODEL, once for each of the others.",
            )
        self._names = {name: i for i, name in enumerate(sorted(set(view.categories)))}
        self._shares = np.bincount([self._names[name] for name in view.categories]) / len(view.categories)
        self._mean, self._spread = view.features.mean(axis=0), view.features.std(axis=0)
        x, right = self._inputs(view)[whole], table.right[whole]
        easy = right.mean(axis=1, keepdims=True)
        # how hard a question is and who does better on it than others take penalties of their own: one for both would be the first's
        self._rows, self._base = _ridge(x, (easy, right - easy))

    def _inputs(self, view: View) -> Array:
        scaled = (view.features - self._mean) / np.where(self._spread > 0, self._spread, 1) / np.sqrt(max(1, view.features.shape[1]))
        if not self._categories:
            return np.asarray(scaled)
        each = np.vstack([np.eye(len(self._names)), self._shares])
        return np.hstack([scaled, CATEGORY * each[[self._names.get(name, NOBODY) for name in view.categories]]])


def _ridge(x: Array, targets: Sequence[Array]) -> tuple[Array, Array]:
    """(rows (D, M), base (M,)) so that x @ rows + base comes near the sum of `targets` (each (N, M) or (N, 1)).

    Each target has a penalty of its own, the best of PENALTIES for it.
    """
    middle = x.mean(axis=0)
    values, vectors = np.linalg.eigh((x - middle).T @ (x - middle))
    turned = (x - middle) @ vectors
    shrinks = [1 / (values.clip(0) + penalty) for penalty in PENALTIES]
    owns = [1 / len(x) + turned**2 @ shrink for shrink in shrinks]  # how much a question's own outcome counts in what is said of it
    rows, base = np.zeros((x.shape[1], 1)), np.zeros(1)
    for y in targets:
        mean = y.mean(axis=0)
        right = turned.T @ (y - mean)
        made = [right * shrink[:, None] for shrink in shrinks]
        errors = [float((((y - mean - turned @ m) / (1 - own)[:, None]) ** 2).sum()) for m, own in zip(made, owns, strict=True)]
        found = vectors @ made[int(np.argmin(errors))]
        rows, base = rows + found, base + mean - middle @ found
    return rows, base


def _probabilities(values: Array) -> Array:
    return np.clip(values, 0.02, 0.98)
