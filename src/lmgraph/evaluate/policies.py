"""Routing policies for replays: the best single model, chance, by category, by query, votes, cascades.

They see a `View` and the letters of those they asked (replay.py holds them to it). How good a model is for a question is its
`Competence` (competence.py); how credible an answer is, given who gave it, is what `Scorer` learns. It knows no file and no live model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from lmgraph import vote
from lmgraph.errors import MissingExtra
from lmgraph.evaluate import facts
from lmgraph.evaluate.competence import Competence, Rows
from lmgraph.evaluate.outcomes import Table
from lmgraph.evaluate.replay import NOBODY, Array, Asked, View

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


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
        """Competence, then the scorer, on competence that was judged without the question itself. Raises MissingExtra."""
        if not installed():
            raise MissingExtra(f"The policy {self.name!r}", "compare")
        super().fit(table, view)
        self.most = min(self.most, len(table.models))
        judged = self._competence.judged()
        order = np.argsort(-judged, axis=1, kind="stable")[:, : self.most]
        letters = np.take_along_axis(np.array(table.letters), order, axis=1)
        told = np.flatnonzero(~np.isnan(np.take_along_axis(table.right, order, axis=1)).any(axis=1))  # else silence and a gap look alike
        fewest = 1 if self._sure < 1 else self.most
        self._scorer.fit(view.rows(told), order[told], letters[told], judged[told], np.array(table.truth)[told], fewest)

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
    `read`: also the options' texts (`facts.LIST_FACTS`, `facts.of_options`), which may say more about who wrote the question than about
    the answer.
    """

    def __init__(self, read: bool) -> None:
        self._read = read

    def fit(self, view: View, workers: Array, letters: Array, competence: Array, truth: Array, fewest: int) -> None:
        """Learn from what (Q, K) workers said; the first `fewest` to K of them, so that it can be asked at any time from there on."""
        from sklearn.ensemble import HistGradientBoostingClassifier

        rows, labels = [], []
        for k in range(fewest, workers.shape[1] + 1):
            features, said = self._features(view, workers[:, :k], letters[:, :k], competence)
            rows.append(features[said])
            labels.append((letters[:, :k] == truth[:, None])[said])
        right = np.concatenate(labels)
        self._share = float(right.mean()) if len(right) else 0.0
        self._model = None
        if 0 < self._share < 1:  # else there is nothing to tell apart
            speaking = competence.shape[1] + 4
            self._model = HistGradientBoostingClassifier(
                max_iter=120, learning_rate=0.05, max_leaf_nodes=8, min_samples_leaf=40, l2_regularization=5.0, max_features=0.5,
                monotonic_cst=[1] * speaking + [0] * (rows[0].shape[1] - speaking), random_state=0,
            )  # fmt: skip
            with _alone():
                self._model.fit(np.concatenate(rows), right)

    def of(self, view: View, workers: Array, letters: Array, competence: Array) -> Array:
        """(Q, K) probability of each worker's answer, the same for the same letter; -1 where it gave none."""
        features, said = self._features(view, workers, letters, competence)
        out = np.where(said, self._share, -1.0)
        if self._model is not None and said.any():
            with _alone():
                out[said] = self._model.predict_proba(features[said])[:, 1]
        return out

    def _features(self, view: View, workers: Array, letters: Array, competence: Array) -> tuple[Array, Array]:
        """((Q, K, F) numbers about each worker's answer, (Q, K) whether it gave a letter). The first M + 4 can only speak for an answer."""
        asked, said = workers >= 0, letters != ""
        own = np.take_along_axis(competence, workers.clip(0), axis=1)
        others = np.where(view.options > 1, view.options, vote.UNKNOWN_OPTIONS)[:, None] - 1
        weight = np.where(said, np.maximum(np.log(own * others / (1 - own)), vote.LEAST), 0.0)
        same = (letters[:, :, None] == letters[:, None, :]) & said[:, None, :]  # (Q, K answers, K voters): says the same
        behind = (same * weight[:, None, :]).sum(axis=2)
        rival = np.where(same, 0.0, behind[:, None, :]).max(axis=2)
        speaks_for = (
            behind,
            behind - rival,
            np.where(same, own[:, None, :], 0.0).max(axis=2),  # the most competent who says so
            same.sum(axis=2),
        )
        place = np.array([[LETTERS.find(letter[:1]) for letter in row] for row in letters], dtype=int).reshape(letters.shape)
        about = (
            rival,
            behind / np.maximum(weight.sum(axis=1), vote.LEAST)[:, None],
            _each((asked & ~said).sum(axis=1), letters),
            _each(asked.sum(axis=1), letters),
            _each(view.options, letters),
            place,
        )
        parts = [_stand(workers, said, same, competence.shape[1]), np.stack(speaks_for, axis=2), np.stack(about, axis=2)]
        told = view.facts if self._read else view.facts[:, : len(facts.FACTS)]
        parts.append(np.repeat(told[:, None], letters.shape[1], axis=1))
        if self._read:
            parts.append(np.take_along_axis(view.looks, place.clip(0)[:, :, None], axis=1))
        return np.concatenate(parts, axis=2), said


def _stand(workers: Array, said: Array, same: Array, models: int) -> Array:
    """(Q, K, M) how each model stands to each answer: 1 gave it, -1 gave another one, 0 gave none or was not asked."""
    out = np.zeros((*workers.shape, models + 1))
    column = np.broadcast_to(np.where(workers >= 0, workers, models)[:, None, :], same.shape)
    np.put_along_axis(out, column, np.where(same, 1.0, np.where(said[:, None, :], -1.0, 0.0)), axis=2)
    return out[:, :, :models]


def _each(values: Array, letters: Array) -> Array:
    """(Q,) numbers of questions as (Q, K) numbers of their answers."""
    return np.broadcast_to(values[:, None], letters.shape)


def _alone() -> AbstractContextManager[Any]:
    """One OpenMP thread: trees are small, and on a busy machine threads that wait for each other took sixteen times as long."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, "openmp")


def installed() -> bool:
    """Whether learnt votes can be had here (scikit-learn is installed)."""
    return importlib.util.find_spec("sklearn") is not None


def _unheard(table: Table) -> str:
    """Why a vote would be impossible or unfair, '' where it is not: somebody has a score alone where others have letters."""
    if table.letters is None:
        return "The table has scores alone, no letters to vote with."
    said = np.array(table.letters) != ""
    mute = ((table.right > 0) & ~said & said.any(axis=1, keepdims=True)).any(axis=0)
    names = [model.name for model, alone in zip(table.models, mute, strict=True) if alone]
    return f"Of {', '.join(names)} there are scores alone where others have letters." if names else ""


def usual(table: Table, view: View, sizes: Sequence[int], sure: float) -> tuple[list[Best], dict[str, str]]:
    """(the policies of a report on this table, which others are left out and why).

    Baselines; one worker, by category and by features where there are some; where letters are recorded, votes of `sizes` (no more than
    there are models), learnt votes (once more with the options read, where they are listed), and a cascade that stops at the probability
    `sure`. Policies share what they learn of competence.
    """
    made: list[Best] = [Best(), Chance(), Route("category", by_category := Competence())]
    able, left_out = by_category, {}
    if view.features.shape[1]:
        able = Rows(categories=True)
        made += [Route("master over models", Rows(categories=False)), Route("master and category", able)]
    else:
        left_out["master"] = "The table has no texts of questions that it could read."
    counts = sorted({min(size, len(table.models)) for size in sizes} - {1})
    if why := "There is one model." if not counts else _unheard(table):
        left_out["votes, cascade"] = why
        return made, left_out
    if not (learnt := installed()):
        missing = MissingExtra("A learnt vote", "compare")
        left_out["learnt votes, cascade"] = f"{missing.message} {missing.hint}"
    options = ((False, ""), (True, ", options read"))[: 1 + bool(np.isfinite(view.looks).any())]
    for k in counts:
        made.append(Vote(f"vote of {k}, category", by_category, k))
        if able is not by_category:
            made.append(Vote(f"vote of {k}", able, k))
        made += [Scored(f"learnt vote of {k}{added}", able, k, read=read) for read, added in options if learnt]
    if learnt:
        read, added = options[-1]
        made.append(Scored(f"cascade of at most {counts[-1]}{added}", able, counts[-1], sure=sure, read=read))
    return made, left_out
