"""Routing policies for replays: the best single model, chance, by category, by query, votes, cascades.

They see a `View` and the letters of those they asked (replay.py holds them to it). How good a model is for a question is its
`Competence`; how credible an answer is, given who gave it, is what `Scorer` learns. It knows no file and no live model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmgraph import vote
from lmgraph.errors import DataError, MissingExtra
from lmgraph.evaluate import assign, facts
from lmgraph.evaluate.outcomes import Table
from lmgraph.evaluate.replay import NOBODY, Array, Asked, View, folds

PENALTIES = (10.0, 30.0, 100.0, 300.0)
CATEGORY = 0.3
"""weight of the category beside features that weigh 1 together"""
INNER = 5
"""parts of a training set in which competence is judged by the rest, before a scorer learns from it"""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Competence:
    """Probability that each model is right on a question, from its category alone."""

    def fit(self, table: Table, view: View) -> None:
        """Shrunken scores by category (`assign.scores`)."""
        self._scores = assign.scores(table, table.categories)
        self._groups = {name: i for i, name in enumerate(self._scores.groups)}

    def of(self, view: View) -> Array:
        """(Q, M) probabilities, strictly between 0 and 1."""
        rows = [self._groups.get(name, NOBODY) for name in view.categories]  # NOBODY: a category that is new, so the overall score
        return _probabilities(np.vstack([self._scores.shrunk, self._scores.overall])[rows])


class Rows(Competence):
    """The same from the query's features: a functional row a model, ridge regression on who was right.

    The master's hidden states as features and the greatest product with a row is what choosing by functional token is, with models in
    place of nodes. `categories`: the category counts as a feature, too. The penalty does best on parts kept aside.
    """

    def __init__(self, categories: bool) -> None:
        self._categories = categories

    def fit(self, table: Table, view: View) -> None:
        """Learn from the questions whose outcomes are recorded for every model. Raises DataError where there are too few."""
        whole = ~np.isnan(table.right).any(axis=1)
        if whole.sum() < 2 * INNER:
            raise DataError(
                f"{whole.sum()} questions have the outcomes of every model; expected at least {2 * INNER}.", "Use --only MODEL."
            )
        self._names = {name: i for i, name in enumerate(sorted(set(view.categories)))}
        self._mean, self._spread = view.features.mean(axis=0), view.features.std(axis=0)
        x, y = self._inputs(view)[whole], table.right[whole]
        error = dict.fromkeys(PENALTIES, 0.0)
        for training, test in folds(len(x), INNER, seed=2):
            for penalty, (rows, base) in zip(PENALTIES, _ridge(x[training], y[training]), strict=True):
                error[penalty] += float(((x[test] @ rows + base - y[test]) ** 2).sum())
        self._rows, self._base = _ridge(x, y)[PENALTIES.index(min(PENALTIES, key=lambda penalty: error[penalty]))]

    def of(self, view: View) -> Array:
        """(Q, M) probabilities, strictly between 0 and 1."""
        return _probabilities(self._inputs(view) @ self._rows + self._base)

    def _inputs(self, view: View) -> Array:
        scaled = (view.features - self._mean) / np.where(self._spread > 0, self._spread, 1) / np.sqrt(max(1, view.features.shape[1]))
        if not self._categories:
            return np.asarray(scaled)
        hot = np.zeros((len(view.queries), len(self._names)))
        for q, name in enumerate(view.categories):
            if name in self._names:
                hot[q, self._names[name]] = CATEGORY
        return np.hstack([scaled, hot])


def _ridge(x: Array, y: Array) -> list[tuple[Array, Array]]:
    """(rows (D, M), base (M,)) for each of PENALTIES; x need not be centred."""
    middle, base = x.mean(axis=0), y.mean(axis=0)
    values, vectors = np.linalg.eigh((x - middle).T @ (x - middle))
    turned = vectors.T @ ((x - middle).T @ (y - base))
    made = []
    for penalty in PENALTIES:
        rows = vectors @ (turned / (values.clip(0) + penalty)[:, None])
        made.append((rows, base - middle @ rows))
    return made


def _probabilities(values: Array) -> Array:
    return np.clip(values, 0.02, 0.98)


class Best:
    """Always the model with the highest score on the training questions."""

    name = "best single model"

    def fit(self, table: Table, view: View) -> None:
        """Find it."""
        self._model = int(np.argmax(np.nanmean(table.right, axis=0)))

    def ask(self, view: View, asked: Asked) -> Array:
        """The same model once."""
        return np.full(len(view.queries), NOBODY if asked.workers.shape[1] else self._model)

    def give(self, view: View, asked: Asked) -> Array:
        """Its answer."""
        return np.zeros(len(view.queries), dtype=int)


class Chance(Best):
    """A uniformly random model."""

    name = "random"

    def fit(self, table: Table, view: View) -> None:
        """Count the models."""
        self._models = len(table.models)

    def ask(self, view: View, asked: Asked) -> Array:
        """A draw for each question."""
        if asked.workers.shape[1]:
            return np.full(len(view.queries), NOBODY)
        return np.random.default_rng(0).integers(self._models, size=len(view.queries))


class Route(Best):
    """One worker: the most competent."""

    def __init__(self, name: str, competence: Competence) -> None:
        self.name = name
        self._competence = competence

    def fit(self, table: Table, view: View) -> None:
        """Learn competence."""
        self._competence.fit(table, view)

    def ask(self, view: View, asked: Asked) -> Array:
        """The most competent once."""
        if asked.workers.shape[1]:
            return np.full(len(view.queries), NOBODY)
        return np.asarray(self._competence.of(view).argmax(axis=1))


class Vote(Route):
    """The k most competent answer; each letter weighs what its voters weigh (vote.weight), as at run time."""

    def __init__(self, name: str, competence: Competence, most: int) -> None:
        super().__init__(name, competence)
        self.most = most

    def ask(self, view: View, asked: Asked) -> Array:
        """The next most competent, up to `most`."""
        k = asked.workers.shape[1]
        order = np.argsort(-self._competence.of(view), axis=1, kind="stable")
        return np.full(len(view.queries), NOBODY) if k == min(self.most, order.shape[1]) else order[:, k]

    def give(self, view: View, asked: Asked) -> Array:
        """The answer of the heaviest voter for the heaviest letter."""
        competence = self._competence.of(view)
        given = np.zeros(len(view.queries), dtype=int)
        for q, (workers, letters) in enumerate(zip(asked.workers, asked.letters, strict=True)):
            votes = [
                (str(at), letter or None, vote.weight(float(competence[q, worker]), int(view.options[q])))
                for at, (worker, letter) in enumerate(zip(workers, letters, strict=True))
            ]
            given[q] = int(vote.tally(votes).winner)
        return given


class Scored(Vote):
    """A vote whose weights are learnt: who said it, who said otherwise, and (with `read`) what the answer looks like.

    `sure` below 1 makes it a cascade: nobody more is asked once an answer is credible enough.
    """

    def __init__(self, name: str, competence: Competence, most: int, *, sure: float = 1.0, read: bool = False) -> None:
        super().__init__(name, competence, most)
        self._sure = sure
        self._scorer = Scorer(read)

    def fit(self, table: Table, view: View) -> None:
        """Competence, then the scorer, on competence that was judged without the question itself."""
        self.most = min(self.most, len(table.models))
        judged = np.zeros((len(table.ids), len(table.models)))
        for training, test in folds(len(table.ids), min(INNER, len(table.ids)), seed=1):
            self._competence.fit(table.rows(training), view.rows(training))
            judged[test] = self._competence.of(view.rows(test))
        order = np.argsort(-judged, axis=1, kind="stable")[:, : self.most]
        letters = np.take_along_axis(np.array(table.letters), order, axis=1)
        fewest = 1 if self._sure < 1 else self.most
        self._scorer.fit(view, order, letters, judged, np.array(table.truth), fewest)
        self._competence.fit(table, view)

    def ask(self, view: View, asked: Asked) -> Array:
        """The next most competent where no answer is credible enough yet."""
        following = super().ask(view, asked)
        if self._sure < 1 and asked.workers.shape[1] and (following != NOBODY).any():
            sure = self._scorer.of(view, asked.workers, asked.letters, self._competence.of(view)).max(axis=1) >= self._sure
            following = np.where(sure | (asked.workers[:, -1] == NOBODY), NOBODY, following)
        return following

    def give(self, view: View, asked: Asked) -> Array:
        """The first who said the most credible letter; the first of all where nobody said one."""
        credible = self._scorer.of(view, asked.workers, asked.letters, self._competence.of(view))
        return np.asarray(credible.argmax(axis=1))


class Scorer:
    """Probability that an answer is right, by gradient boosting (scikit-learn): more voters never make an answer less credible.

    The learnt answer scorer of a cascade (Chen et al., FrugalGPT, 2023), with a few dozen plain numbers in place of a language model.
    `read`: also the answer's own text (`facts.of_options`), which may say more about who wrote the question than about the answer.
    """

    def __init__(self, read: bool) -> None:
        self._read = read

    def fit(self, view: View, workers: Array, letters: Array, competence: Array, truth: Array, fewest: int) -> None:
        """Learn from what (Q, K) workers said; the first `fewest` to K of them, so that it can be asked at any time from there on."""
        try:
            from sklearn.ensemble import HistGradientBoostingClassifier
        except ImportError as error:
            raise MissingExtra("A learnt vote", "compare") from error
        rows, labels = [], []
        for k in range(fewest, workers.shape[1] + 1):
            features, said = self._features(view, workers[:, :k], letters[:, :k], competence)
            rows.append(features[said])
            labels.append((letters[:, :k] == truth[:, None])[said])
        up = [1] * (competence.shape[1] + 4) + [0] * (rows[0].shape[1] - competence.shape[1] - 4)
        self._model = HistGradientBoostingClassifier(
            max_iter=120, learning_rate=0.05, max_leaf_nodes=8, min_samples_leaf=40, l2_regularization=5.0, max_features=0.5,
            monotonic_cst=up, random_state=0,
        )  # fmt: skip
        self._model.fit(np.concatenate(rows), np.concatenate(labels))

    def of(self, view: View, workers: Array, letters: Array, competence: Array) -> Array:
        """(Q, K) probability of each worker's answer, the same for the same letter; -1 where it gave none."""
        features, said = self._features(view, workers, letters, competence)
        out = np.full(workers.shape, -1.0)
        if said.any():
            out[said] = self._model.predict_proba(features[said])[:, 1]
        return out

    def _features(self, view: View, workers: Array, letters: Array, competence: Array) -> tuple[Array, Array]:
        """((Q, K, F), (Q, K) whether a letter was given). The first M + 4 columns can only speak for an answer."""
        count, k = workers.shape
        each = np.arange(count)
        said = letters != ""
        own = np.take_along_axis(competence, workers.clip(0), axis=1)
        options = np.where(view.options > 1, view.options, vote.UNKNOWN_OPTIONS)[:, None]
        weight = np.maximum(np.log(own * (options - 1) / (1 - own)), vote.LEAST) * said
        models = competence.shape[1]
        columns = []
        for j in range(k):
            same = (letters == letters[:, [j]]) & said
            stand = np.zeros((count, models + 1))  # 1 said it, -1 said otherwise, 0 was not asked or said nothing
            stand[each[:, None], np.where(workers >= 0, workers, models)] = np.where(same, 1.0, np.where(said, -1.0, 0.0))
            mine = (weight * same).sum(axis=1)
            rival = np.max([(weight * (letters == letters[:, [i]])).sum(axis=1) * ~same[:, i] for i in range(k)], axis=0)
            total = weight.sum(axis=1)
            best = np.where(same, own, 0).max(axis=1)
            columns.append(
                np.column_stack(
                    [
                        stand[:, :models],
                        mine,
                        mine - rival,
                        best,
                        same.sum(axis=1),
                        rival,
                        mine / np.maximum(total, vote.LEAST),
                        (~said & (workers >= 0)).sum(axis=1),
                        (workers >= 0).sum(axis=1),
                        view.options,
                        [LETTERS.find(letter[:1]) for letter in letters[:, j]],
                    ]
                )
            )
        features = np.stack(columns, axis=1)
        texts = np.array([facts.of_question(query) for query in view.queries])
        parts = [features, np.repeat(texts[:, None], k, axis=1)]
        if self._read:
            looks = np.array([facts.of_options(query, len(LETTERS)) for query in view.queries])
            at = np.array([[max(LETTERS.find(letter[:1]), 0) for letter in row] for row in letters])
            parts.append(np.take_along_axis(looks, at[:, :, None], axis=1))
        return np.concatenate(parts, axis=2), said


def usual(sizes: Sequence[int], sure: float, learnt: bool) -> list[Best]:
    """The policies of a report: baselines, one worker, votes of `sizes`; learnt votes and a cascade where letters are recorded."""
    made: list[Best] = [
        Best(),
        Chance(),
        Route("category", Competence()),
        Route("master over models", Rows(categories=False)),
        Route("master and category", Rows(categories=True)),
    ]
    for k in sizes if learnt else ():
        made.append(Vote(f"vote of {k}, category", Competence(), k))
        made.append(Vote(f"vote of {k}", Rows(categories=True), k))
        made.append(Scored(f"learnt vote of {k}", Rows(categories=True), k))
        made.append(Scored(f"learnt vote of {k}, options read", Rows(categories=True), k, read=True))
    if learnt:
        made.append(Scored(f"cascade of at most {max(sizes)}, options read", Rows(categories=True), max(sizes), sure=sure, read=True))
    return made
