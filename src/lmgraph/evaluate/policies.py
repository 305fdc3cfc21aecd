"""Routing policies for replays: the best single model, chance, by category, by query, votes, cascades.

They see a `View` and the letters of those they asked (replay.py holds them to it). How good a model is for a question is its
`Competence`; how credible an answer is, given who gave it, is what `Scorer` learns. It knows no file and no live model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmgraph import vote
from lmgraph.errors import MissingExtra
from lmgraph.evaluate import assign, facts
from lmgraph.evaluate.outcomes import Table
from lmgraph.evaluate.replay import NOBODY, Array, Asked, View, folds

RIDGE = 100.0
"""penalty of the regression from features to who is right; of little weight between 30 and 300 (docs/log.md)"""
INNER = 5
"""parts of a training set in which competence is judged by the rest, before a scorer learns from it"""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Competence:
    """Probability that each model is right: by category (shrunken scores), by the query's features (ridge), or the mean of both."""

    def __init__(self, categories: bool = True, features: bool = True) -> None:
        self._use = categories, features

    def fit(self, table: Table, view: View) -> None:
        """Learn from recorded outcomes; models need not be recorded everywhere."""
        self._scores = assign.scores(table, table.categories)
        self._groups = {name: i for i, name in enumerate(self._scores.groups)}
        if not self._use[1]:
            return
        x = self._scaled(view, first=True)
        known = ~np.isnan(table.right)
        self._rows = np.zeros((x.shape[1], len(table.models)))
        self._base = np.nanmean(table.right, axis=0)
        everywhere = known.all(axis=1)
        gram = x[everywhere].T @ x[everywhere] + RIDGE * np.eye(x.shape[1])
        self._rows = np.linalg.solve(gram, x[everywhere].T @ (table.right[everywhere] - self._base))

    def of(self, view: View) -> Array:
        """(Q, M) probabilities, strictly between 0 and 1."""
        parts = []
        if self._use[0]:
            rows = [self._groups.get(name, NOBODY) for name in view.categories]
            parts.append(np.vstack([self._scores.shrunk, self._scores.overall])[rows])  # NOBODY: a category that is new
        if self._use[1]:
            parts.append(self._scaled(view) @ self._rows + self._base)
        return np.clip(np.mean(parts, axis=0), 0.02, 0.98)

    def _scaled(self, view: View, first: bool = False) -> Array:
        if first:
            self._mean = view.features.mean(axis=0)
            spread = np.sqrt((view.features - self._mean).var(axis=0).sum()) or 1.0
            self._scale = 1.4 / spread  # two embeddings of length 1 side by side have about this spread
        return (view.features - self._mean) * self._scale


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


def usual(competence: Competence, by_category: Competence, sizes: Sequence[int], learnt: bool) -> list[Best]:
    """The policies of a report: baselines, one worker, votes of `sizes`, learnt votes and a cascade where letters are recorded."""
    made: list[Best] = [
        Best(),
        Chance(),
        Route("category routing", by_category),
        Route("query routing", competence),
    ]
    made += [Vote(f"vote of {k}, in the category", by_category, k) for k in sizes]
    made += [Vote(f"vote of {k}", competence, k) for k in sizes]
    if learnt:
        made += [Scored(f"learnt vote of {k}", competence, k) for k in sizes]
        made += [Scored(f"learnt vote of {k}, options read", competence, k, read=True) for k in sizes]
        made += [Scored(f"cascade of at most {k}", competence, k, sure=0.6, read=False) for k in sizes[-1:]]
    return made
