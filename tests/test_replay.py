"""Policies replayed on recorded answers: nobody sees an answer too early (a leak is planted, and seen), figures against cases counted by
hand, and `evaluate outcomes` from a table to a report. Where scikit-learn is needed, tests without it are skipped."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import json
import math
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

try:
    from threadpoolctl import threadpool_limits  # comes with scikit-learn
except ImportError:
    threadpool_limits = nullcontext


from conftest import WORDS, toy_queries
from lmgraph import bundles, train, vote
from lmgraph.errors import DataError, MissingExtra
from lmgraph.evaluate import facts, masters, outcomes, policies, replay, standings
from lmgraph.evaluate.competence import Competence, Rows
from lmgraph.evaluate.outcomes import Model, Table
from lmgraph.evaluate.replay import NOBODY, Asked, Play, View
from lmgraph.evaluate.report import drawable
from lmgraph.evaluate.statistics import wilson
from test_cli import Command, here, jsonl, lmgraph, write
from test_training_cli import in_catalogue

__all__ = ["here", "in_catalogue", "lmgraph"]  # fixtures

NAN = float("nan")
LETTERS = "ABCDEFGHIJ"
needs_sklearn = pytest.mark.skipif(not policies.installed(), reason="learnt votes are an extra: pip install 'lmgraph[compare]'")


def silent(done: int, total: int, note: str) -> None: ...


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small sums in one thread: where other work runs beside them, threads wait for each other many times as long as they work."""
    with threadpool_limits(1):
        yield


def recorded(
    right: Any, categories: Sequence[str] = (), letters: Sequence[Sequence[str]] | None = None, truth: Sequence[str] = (), options: int = 4,
    queries: Sequence[str] = (), billions: Sequence[float | None] = (),
) -> Table:
    """A table of these scores; models are called a, b, c, ..., questions q0, q1, ..."""
    values = np.array(right, dtype=np.float64)
    count, models = values.shape
    sizes = billions or [None] * models
    return Table(
        tuple(f"q{i}" for i in range(count)), tuple(queries or [""] * count), tuple(categories or [""] * count), (options,) * count,
        tuple(Model("abcdefgh"[m], sizes[m]) for m in range(models)), values, None if letters is None else tuple(map(tuple, letters)),
        tuple(truth or [""] * count),
    )


def said(letters: Sequence[Sequence[str]], truth: Sequence[str], **more: Any) -> Table:
    """A table of these letters."""
    return recorded([[letter == t for letter in row] for row, t in zip(letters, truth, strict=True)], letters=letters, truth=truth, **more)


def halves(learnt: int, judged: int) -> list[tuple[Any, Any]]:
    """One split: the first questions are learnt from, the others are judged."""
    return [(np.arange(learnt), np.arange(learnt, learnt + judged))]


def played(policy: Any, table: Table, learnt: int, features: Any = None) -> Play:
    """What becomes of the questions after the first `learnt`, from which the policy learns."""
    found = replay.replay([policy], table, replay.view_of(table, features), halves(learnt, len(table.ids) - learnt), silent)[policy.name]
    return Play(found.workers[learnt:], found.given[learnt:], found.right[learnt:])


class Fixed:
    """Asks the workers that it is told to, round after round, and gives the answer of one round."""

    name = "fixed"

    def __init__(self, rounds: Sequence[Sequence[int]], at: Sequence[int]) -> None:
        self.rounds, self.at = rounds, at

    def fit(self, table: Table, view: View) -> None: ...

    def ask(self, view: View, asked: Asked) -> Any:
        k = asked.workers.shape[1]
        return np.array([row[k] if k < len(row) else NOBODY for row in self.rounds])

    def give(self, view: View, asked: Asked) -> Any:
        return np.array(self.at)


# ---------------------------------------------------------------- no outcome reaches the policy that is scored on it

HARD, EASY, MODELS = 100, 200, 4


@dataclasses.dataclass(frozen=True)
class Random:
    """Questions of which exactly one model is right. For the first HARD nothing says who: each has a category and a feature of its own, so
    a memory of their outcomes is perfect and nothing can be learnt from others. For the rest the category and a feature say it: there a
    policy learns to trust what it knows."""

    table: Table
    features: Any

    @cached_property
    def view(self) -> View:
        return replay.view_of(self.table, self.features)

    @property
    def splits(self) -> list[tuple[Any, Any]]:
        """Three folds of the hard questions; all others are learnt from."""
        every = np.arange(HARD + EASY)
        return [(np.setdiff1d(every, part), part) for _, part in replay.folds(HARD, 3)]


def random_outcomes(seed: int = 0) -> Random:
    rng = np.random.default_rng(seed)
    able = np.concatenate([rng.permutation(np.arange(HARD) % MODELS), np.arange(EASY) % MODELS])
    features = np.zeros((HARD + EASY, HARD + MODELS))
    features[np.arange(HARD), np.arange(HARD)] = 1
    features[np.arange(HARD, HARD + EASY), HARD + able[HARD:]] = 1
    truth, letters, queries = [], [], []
    for q, model in enumerate(able):
        own, *wrong = rng.permutation(list(LETTERS[:8]))
        truth.append(str(own))
        letters.append([str(own if m == model else wrong[m]) for m in range(MODELS)])
        options = (f"{letter}. {'option ' * int(rng.integers(1, 5))}{rng.integers(1000)}" for letter in LETTERS[:8])
        queries.append("\n".join([f"Question {q}{' and so on' * int(rng.integers(9))}?", *options]))
    categories = [f"own {q}" for q in range(HARD)] + [f"known {model}" for model in able[HARD:]]
    return Random(said(letters, truth, categories=categories, options=8, queries=queries, billions=[1.0, 2.0, 4.0, 8.0]), features)


def usual(given: Random) -> list[Any]:
    """Every policy of a report."""
    return list(policies.usual(given.table, given.view, (2, 3), 0.3)[0])


class Leaky:
    """A policy that has learnt from all questions, whatever it is given to learn from: the leak."""

    def __init__(self, policy: Any, given: Random) -> None:
        self.name, self.policy, self.given = policy.name, policy, given

    def fit(self, table: Table, view: View) -> None:
        self.policy.fit(self.given.table, self.given.view)

    def ask(self, view: View, asked: Asked) -> Any:
        return self.policy.ask(view, asked)

    def give(self, view: View, asked: Asked) -> Any:
        return self.policy.give(view, asked)


def test_every_policy_guesses_where_nothing_can_be_known_and_a_planted_leak_is_seen() -> None:
    given = random_outcomes()
    honest = replay.replay(usual(given), given.table, given.view, given.splits, silent)
    for name, play in honest.items():
        assert 0.10 < play.right[:HARD].mean() < 0.42, f"{name}: one in four is right"
        assert np.isnan(play.right[HARD:]).all(), "these were only learnt from"
    every = np.arange(HARD + EASY)
    split = [(every[HARD:], every[:HARD])]
    leaking = replay.replay([Leaky(policy, given) for policy in usual(given)], given.table, given.view, split, silent)
    for name, play in leaking.items():
        knows_nothing = name in (policies.Best.name, policies.Chance.name)
        assert (play.right[:HARD].mean() > 0.8) != knows_nothing, name


def test_the_leak_is_looked_for_in_every_policy_of_a_report() -> None:
    given = random_outcomes()
    names = [policy.name for policy in usual(given)]
    learnt = ["learnt vote of {}", "learnt vote of {}, options read"] if policies.installed() else []
    per_size = ["vote of {}, category", "vote of {}", *learnt]
    assert names == [
        "best single model", "random", "category", "master over models", "master and category",
        *(name.format(k) for k in (2, 3) for name in per_size), *(["cascade of at most 3, options read"] if learnt else []),
    ]


def test_a_question_s_own_outcome_changes_neither_whom_it_asks_first_nor_anything_of_another_question() -> None:
    given = random_outcomes()
    training, test = given.splits[0]
    changed, q = given.table, int(test[7])
    right, letters, truth = changed.right.copy(), list(changed.letters or ()), list(changed.truth)
    right[q] = 1 - right[q]
    letters[q], truth[q] = tuple(LETTERS[(LETTERS.index(x) + 3) % 8] for x in reversed(letters[q])), "H"
    changed = dataclasses.replace(changed, right=right, letters=tuple(letters), truth=tuple(truth))
    before = replay.replay(usual(given), given.table, given.view, [(training, test)], silent)
    after = replay.replay(usual(given), changed, replay.view_of(changed, given.features), [(training, test)], silent)
    others = test[test != q]
    for name in before:
        one, other = before[name], after[name]
        assert one.workers[q, 0] == other.workers[q, 0], name
        for field in ("given", "right"):
            assert np.array_equal(getattr(one, field)[others], getattr(other, field)[others]), name
        width = min(one.workers.shape[1], other.workers.shape[1])
        assert np.array_equal(one.workers[others, :width], other.workers[others, :width]), name
    assert any(before[name].right[q] != after[name].right[q] for name in before), "that its outcome was another was noticed"


def test_a_policy_sees_the_question_and_the_letters_of_those_it_asked_and_nothing_else() -> None:
    given = random_outcomes()
    training, test = given.splits[0]
    order = np.array([np.random.default_rng(q).permutation(MODELS) for q in test])
    seen: list[str] = []

    class Spy(Fixed):
        def fit(self, table: Table, view: View) -> None:
            assert not set(table.ids) & {given.table.ids[q] for q in test} and len(table.ids) == len(training)
            assert view.queries == table.queries, "of the same questions"

        def ask(self, view: View, asked: Asked) -> Any:
            assert {field.name for field in dataclasses.fields(view)} == {"queries", "categories", "options", "features", "facts", "looks"}
            assert view.queries == tuple(given.table.queries[q] for q in test) and len(view.features) == len(test)
            assert asked.workers.tolist() == order[:, : asked.workers.shape[1]].tolist()
            for place, (workers, letters) in enumerate(zip(asked.workers, asked.letters, strict=True)):
                assert given.table.letters is not None
                assert letters.tolist() == [given.table.letters[test[place]][w] for w in workers]
            seen.append("asked")
            return super().ask(view, asked)

        def give(self, view: View, asked: Asked) -> Any:
            assert asked.letters.shape == (len(test), 2)
            seen.append("given")
            return super().give(view, asked)

    found = replay.replay([Spy(order[:, :2].tolist(), [1] * len(test))], given.table, given.view, [(training, test)], silent)["fixed"]
    assert seen == ["asked", "asked", "asked", "given"]
    assert found.right[test].tolist() == [given.table.right[q, order[i, 1]] for i, q in enumerate(test)]


def test_who_asks_nobody_more_sees_no_letter_more() -> None:
    table = said([["A", "B"], ["C", "D"]] * 2, ["A", "D"] * 2)

    class Spy(Fixed):
        def give(self, view: View, asked: Asked) -> Any:
            assert asked.workers.tolist() == [[0, 1], [1, NOBODY]] and asked.letters.tolist() == [["A", "B"], ["D", ""]]
            return super().give(view, asked)

    assert played(Spy([[0, 1], [1]], [1, 0]), table, 2).right.tolist() == [0, 1]


def test_a_split_whose_parts_overlap_is_refused_with_the_question_named() -> None:
    table = recorded([[1, 0]] * 4)
    with pytest.raises(DataError, match=r"Question 'q2' is in the training and in the test part of one split \(2 are\)"):
        replay.replay([policies.Best()], table, replay.view_of(table, None), [(np.array([0, 2, 3]), np.array([1, 2, 3]))], silent)


# ---------------------------------------------------------------- folds


@given(st.integers(2, 60), st.data())
def test_each_question_is_in_exactly_one_test_part_and_learns_from_all_others(count: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(2, count))
    splits = replay.folds(count, parts, data.draw(st.integers(0, 5)))
    assert len(splits) == parts
    assert sorted(np.concatenate([test for _, test in splits]).tolist()) == list(range(count))
    for training, test in splits:
        assert sorted([*training, *test]) == list(range(count))
        assert count // parts <= len(test) <= -(-count // parts)


@given(st.lists(st.sampled_from(["", "a", "b", "c", "d"]), min_size=2, max_size=30), st.integers(0, 5))
def test_questions_of_one_text_are_in_one_part(texts: list[str], seed: int) -> None:
    different = len(set(texts) - {""}) + texts.count("")
    if different < 2:
        with pytest.raises(DataError, match="1 different questions cannot be split"):
            replay.folds(len(texts), 2, seed, texts)
        return
    splits = replay.folds(len(texts), different, seed, texts)
    assert sorted(np.concatenate([test for _, test in splits]).tolist()) == list(range(len(texts)))
    for training, test in splits:
        assert len(test) and not ({texts[i] for i in training} - {""}) & {texts[i] for i in test}


def test_the_seed_decides_the_parts() -> None:
    def parts(seed: int) -> list[list[int]]:
        return [test.tolist() for _, test in replay.folds(50, 5, seed)]

    assert parts(1) == parts(1) != parts(2)


def test_too_few_questions_for_the_parts_are_told() -> None:
    with pytest.raises(DataError, match="3 different questions cannot be split into 5 parts") as caught:
        replay.folds(3, 5)
    assert "2 to 3" in caught.value.hint


# ---------------------------------------------------------------- what a policy may do


@pytest.mark.parametrize(("rounds", "at", "words"), [
    ([[0, 0]], [0], r"asks worker 0 about question 'q1', having asked \[0\]"), ([[2]], [0], r"asks worker 2 about question 'q1'"),
    ([[-2]], [0], "asks worker -2"), ([[0]], [1], "gives the answer of round 1 to question 'q1'"), ([[0]], [-1], "gives the answer of round -1"),
    ([[]], [0], "gives the answer of round 0"),
])
def test_a_policy_that_asks_twice_or_an_unknown_worker_or_gives_what_nobody_said_is_refused(rounds: Any, at: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        played(Fixed(rounds, at), recorded([[1, 0], [1, 0]]), 1)
    assert caught.value.hint


def test_the_answer_of_a_round_in_which_a_question_asked_nobody_is_refused() -> None:
    with pytest.raises(DataError, match="round 1 to question 'q3', where it asked nobody"):
        played(Fixed([[0, 1], [0]], [1, 1]), recorded([[1, 0]] * 4), 2)


def test_an_outcome_that_is_not_recorded_is_an_error_that_names_question_and_model() -> None:
    table = recorded([[1, 0], [1, 1], [1, NAN], [NAN, NAN]])
    with pytest.raises(DataError, match="Question 'q2' has no recorded outcome of b, which policy 'fixed' asks \\(2 such") as caught:
        played(Fixed([[0], [1], [1]], [0, 0, 0]), table, 1)
    assert "--only" in caught.value.hint
    assert played(Fixed([[0], [0]], [0, 0]), table.rows([0, 1, 2]), 1).right.tolist() == [1, 1], "nobody asks b"


def test_a_model_without_any_outcome_to_learn_from_is_named() -> None:
    with pytest.raises(DataError, match="No outcome of b is recorded on the 2 questions"):
        played(policies.Best(), recorded([[0, NAN], [0, NAN], [0, 1]]), 2)


def test_features_of_other_questions_are_refused() -> None:
    with pytest.raises(DataError, match="features of 3 questions, expected 2"):
        replay.view_of(recorded([[1], [0]]), np.zeros((3, 5)))


# ---------------------------------------------------------------- policies on cases counted by hand

X, Y = ["x"] * 10, ["y"] * 10
BY_CATEGORY = recorded(
    # a is right on 9 of 10 in x and 4 of 10 in y, b on 2 and 8: a is the best single model, b the better one in y
    [[1, 0]] * 7 + [[1, 1]] * 2 + [[0, 0]] + [[1, 1]] * 4 + [[0, 1]] * 4 + [[0, 0]] * 2
    + [[1, 0], [1, 1], [0, 1], [0, 1], [0, 1], [1, 0], [0, 0], [1, 1], [0.5, 0], [0, 0.5]],
    [*X, *Y, "x", "x", "x", "y", "y", "y", "y", "y", "x", "new"], billions=[3.0, 7.0],
)


def test_the_best_single_model_is_asked_once_and_always() -> None:
    found = played(policies.Best(), BY_CATEGORY, 20)
    assert found.workers.tolist() == [[0]] * 10 and found.given.tolist() == [0] * 10
    assert found.right.tolist() == [1, 1, 0, 0, 0, 1, 0, 1, 0.5, 0]


def test_each_category_goes_to_its_best_model_and_a_new_one_to_the_best_overall() -> None:
    found = played(policies.Route("category", Competence()), BY_CATEGORY, 20)
    assert found.given.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0, 0]
    assert found.right.tolist() == [1, 1, 0, 1, 1, 0, 0, 1, 0.5, 0]


def test_a_random_model_is_asked_evenly() -> None:
    found = played(policies.Chance(), recorded([[0, 0, 1]] * 901), 1)
    assert all(250 < count < 350 for count in np.bincount(found.given, minlength=3)) and found.workers.shape == (900, 1)


def test_the_figures_are_what_a_hand_counts() -> None:
    table, split = BY_CATEGORY, halves(20, 10)
    made = [policies.Best(), policies.Route("category", Competence())]
    metrics = standings.measure(table, replay.replay(made, table, replay.view_of(table, None), split, silent), "best single model", {})
    best, routed, oracle = metrics["policies"]["best single model"], metrics["policies"]["category"], metrics["oracle"]
    assert (metrics["questions"], best["n"], oracle["n"]) == (30, 10, 10)
    assert best["score"] == pytest.approx(0.45) and routed["score"] == pytest.approx(0.55)
    assert oracle["score"] == pytest.approx(0.8), "one of two models is right on 7, half right on 2"
    assert (best["regret"], routed["regret"]) == (pytest.approx(0.35), pytest.approx(0.25))
    assert tuple(oracle["interval"]) == wilson(8, 10) and tuple(routed["interval"]) == wilson(round(5.5), 10)
    assert best["gap"] is None and routed["gap"]["value"] == pytest.approx(0.1)
    assert (best["billions"], routed["billions"]) == (3.0, pytest.approx(3 * 0.5 + 7 * 0.5))
    assert (routed["workers"], routed["most"]) == (1.0, 1)
    assert best["by_category"] == {"new": 0, "x": pytest.approx(2.5 / 4), "y": pytest.approx(2 / 5)}
    assert routed["by_category"] == {"new": 0, "x": pytest.approx(2.5 / 4), "y": pytest.approx(3 / 5)}
    assert [(m["name"], m["score"]) for m in metrics["models"]] == [("a", pytest.approx(0.45)), ("b", pytest.approx(0.55))]


def test_workers_and_parameters_are_counted_as_they_were_asked() -> None:
    table = recorded([[1, 1, 1]] * 4, billions=[1.0, 10.0, None])
    workers = {"one": [[0, NOBODY]] * 4, "some": [[0, 1], [1, NOBODY], [0, 1], [0, NOBODY]], "unknown": [[0, 2]] + [[0, NOBODY]] * 3}
    plays = {name: Play(np.array(rows), np.zeros(4, dtype=int), np.ones(4)) for name, rows in workers.items()}
    found = standings.measure(table, plays, "one", {})["policies"]
    assert [(row["workers"], row["most"], row["billions"]) for row in found.values()] == [(1, 1, 1), (1.5, 2, (11 + 10 + 11 + 1) / 4), (1.25, 2, None)]


def test_the_interval_of_a_gap_holds_the_true_gap_nearly_always() -> None:
    table, asked, given = recorded([[1]] * 400), np.zeros((400, 1), dtype=int), np.zeros(400, dtype=int)
    held = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        one = (rng.random(400) < 0.6).astype(float)
        other = np.where(rng.random(400) < 0.25, 1.0, one)  # truly 0.1 better: a quarter of the 0.4
        gap = standings.measure(table, {"one": Play(asked, given, one), "other": Play(asked, given, other)}, "one", {})["policies"]["other"]["gap"]
        low, high = gap["interval"]
        assert low < gap["value"] < high < low + 0.1
        held += low <= 0.1 <= high
    assert 51 <= held <= 60, "95 % are 57"


# ---------------------------------------------------------------- votes


def learnt(strong: float, weak: float) -> list[list[str]]:
    """100 questions whose right letter is A: one strong model, two weak ones."""
    return [["A" if q < share * 100 else "B" for share in (strong, weak, weak)] for q in range(100)]


@pytest.mark.parametrize(("weak", "options", "wins"), [
    (0.7, 4, "D"),  # 2 log(0.7 * 3 / 0.3) = 3.89 is more than log(0.9 * 3 / 0.1) = 3.30
    (0.55, 4, "C"),  # 2 log(0.55 * 3 / 0.45) = 2.60 is less
    (0.7, 2, "C"),  # 2 log(0.7 / 0.3) = 1.69 is less than log(0.9 / 0.1) = 2.20: agreeing on one of two says less
    (0.55, 10, "D"),  # 2 log(0.55 * 9 / 0.45) = 4.80 is more than log(0.9 * 9 / 0.1) = 4.39
])
def test_two_weak_who_agree_outvote_a_strong_one_where_their_weights_do(weak: float, options: int, wins: str) -> None:
    table = said([*learnt(0.9, weak), ["C", "D", "D"], ["C", "D", "E"], ["", "D", "E"]], ["A"] * 100 + [wins, "C", "D"], options=options)
    found = played(policies.Vote("vote", Competence(), 3), table, 100)
    assert found.right.tolist() == [1, 1, 1], "the majority or not; the strong one among three; the heavier of equals where he is silent"
    assert found.workers.tolist() == [[0, 1, 2]] * 3


def test_a_vote_asks_the_most_able_and_no_more_than_there_are() -> None:
    rows = [["A", "B", "A", "A"] if q < 60 else ["B", "B", "A", "A"] if q < 80 else ["B", "B", "B", "A"] for q in range(100)]
    table = said([*rows, ["A", "A", "B", "B"]], ["A"] * 101)
    assert played(policies.Vote("vote", Competence(), 2), table, 100).workers.tolist() == [[3, 2]]
    assert played(policies.Vote("vote", Competence(), 9), table, 100).workers.tolist() == [[3, 2, 0, 1]]


def test_where_nobody_gave_a_letter_the_most_able_is_taken() -> None:
    table = said([*learnt(0.9, 0.7), ["", "", ""]], ["A"] * 101)
    assert played(policies.Vote("vote", Competence(), 3), table, 100).given.tolist() == [0]


def copycat(count: int, seed: int = 0) -> Table:
    """a is right on 65 %, b says what a says, c is right on 85 %: two voices that are one outweigh the better model in a plain vote."""
    rng = np.random.default_rng(seed)
    letters, truth = [], []
    for _ in range(count):
        right, *wrong = rng.permutation(list("ABCD"))
        a = right if rng.random() < 0.65 else wrong[0]
        letters.append([str(a), str(a), str(right if rng.random() < 0.85 else wrong[int(rng.integers(3))])])
        truth.append(str(right))
    return said(letters, truth)


@needs_sklearn
def test_a_learnt_vote_sees_that_one_model_only_repeats_another() -> None:
    table = copycat(1500)
    plain = played(policies.Vote("plain", Competence(), 3), table, 1000).right.mean()
    learnt = played(policies.Scored("learnt", Competence(), 3), table, 1000).right.mean()
    assert plain < 0.72 < 0.80 < learnt


def test_votes_are_left_out_where_one_model_has_scores_alone_and_others_letters() -> None:
    table = said([["A", "B", "A"]] * 20, ["A"] * 20)
    mixed = dataclasses.replace(table, letters=tuple(("", *row[1:]) for row in table.letters))
    made, left_out = policies.usual(mixed, replay.view_of(mixed, None), (3,), 0.5)
    assert not [policy.name for policy in made if "vote" in policy.name] and "Of a there are scores alone" in left_out["votes, cascade"]
    assert not policies.usual(table, replay.view_of(table, None), (3,), 0.5)[1].get("votes, cascade")


@needs_sklearn
def test_a_learnt_vote_does_not_take_a_gap_for_silence() -> None:
    table = copycat(300)
    gaps = table.right.copy()
    gaps[:150, 2] = NAN
    lost = dataclasses.replace(table, right=gaps, letters=tuple((*row[:2], "") if q < 150 else row for q, row in enumerate(table.letters)))
    assert played(policies.Scored("learnt", Competence(), 3), lost, 250).right.mean() > 0.7


def test_competence_is_judged_without_copies_of_a_question() -> None:
    def judged(first: float) -> Any:
        outcomes = [[first, 1 - first]] * 2 + [[float(pair % 2), float(pair % 3 == 0)] for pair in range(20) for _ in range(2)]
        table = recorded(outcomes, [f"c{q // 2}" for q in range(42)], queries=[f"text {q // 2}" for q in range(42)])
        able = Competence()
        able.fit(table, replay.view_of(table, None))
        return able.judged()[:2]

    assert np.allclose(judged(0.0), judged(1.0)), "what is said of a question does not hang on its own outcome, nor on its copy's"


@needs_sklearn
def test_a_cascade_asks_one_where_all_is_sure_and_all_where_nothing_is() -> None:
    sure = said([["A", "A", "A"]] * 120, ["A"] * 120)
    assert played(policies.Scored("cascade", Competence(), 3, sure=0.9), sure, 100).workers.tolist() == [[0]] * 20
    never = said([["A", "B", "C"]] * 120, ["D"] * 120)
    assert played(policies.Scored("cascade", Competence(), 3, sure=0.1), never, 100).workers.tolist() == [[0, 1, 2]] * 20
    silent = said([["", "", ""]] * 120, ["D"] * 120)
    found = played(policies.Scored("cascade", Competence(), 3, sure=0.0), silent, 100)
    assert found.workers.tolist() == [[0, 1, 2]] * 20 and found.given.tolist() == [0] * 20, "no answer is no credible answer"


@needs_sklearn
def test_a_cascade_goes_on_only_where_the_first_answer_is_not_credible() -> None:
    rng = np.random.default_rng(0)
    easy = [["A", "A", "A"] for _ in range(250)]
    hard = [[str(letter) for letter in rng.choice(list("ABCD"), 3)] for _ in range(250)]
    table = said([*easy, *hard], ["A"] * 500, categories=["easy"] * 250 + ["hard"] * 250).rows(rng.permutation(500))
    found = played(policies.Scored("cascade", Competence(), 3, sure=0.8), table, 400)
    asked = (found.workers != NOBODY).sum(axis=1)
    assert all(NOBODY not in row[:n] for row, n in zip(found.workers.tolist(), asked)), "who has asked enough asks nobody later"
    assert {int(n) for n, category in zip(asked, table.categories[400:]) if category == "easy"} == {1}
    assert np.mean([n for n, category in zip(asked, table.categories[400:]) if category == "hard"]) > 2


@needs_sklearn
def test_options_read_tell_of_an_answer_by_its_looks_and_a_vote_without_them_cannot() -> None:
    rng = np.random.default_rng(0)
    letters, truth, queries = [], [], []
    for _ in range(600):
        texts = ["short", "short", "short", "long, as nobody makes up a wrong one"]
        order = rng.permutation(4)
        queries.append("Which?\n" + "\n".join(f"{LETTERS[i]}. {texts[k]}" for i, k in enumerate(order)))
        truth.append(LETTERS[list(order).index(3)])
        letters.append([LETTERS[k] for k in rng.permutation(4)[:2]])
    table = said(letters, truth, queries=queries)
    blind = played(policies.Scored("learnt", Competence(), 2), table, 500).right.mean()
    reading = played(policies.Scored("read", Competence(), 2, read=True), table, 500).right.mean()
    assert blind < 0.4 and reading == pytest.approx(table.right[500:].max(axis=1).mean()), "right wherever one of the two is"


def test_a_learnt_vote_without_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtra, match="'learnt'") as caught:
        played(policies.Scored("learnt", Competence(), 2), copycat(20), 10)
    assert "pip install 'lmgraph[compare]'" in caught.value.hint


# ---------------------------------------------------------------- rows


def by_sign(count: int, seed: int = 0) -> tuple[Any, Any]:
    """(outcomes, features): the sign of the first of eight features decides which of two models is right."""
    features = np.random.default_rng(seed).normal(size=(count, 8))
    return np.column_stack([features[:, 0] > 0, features[:, 0] <= 0]).astype(float), features


def test_rows_find_who_is_right_where_features_decide_it() -> None:
    right, features = by_sign(600)
    assert played(policies.Route("rows", Rows(categories=False)), recorded(right), 400, features).right.mean() > 0.93


def test_rows_on_noise_are_as_good_as_the_best_single_model() -> None:
    rng = np.random.default_rng(1)
    table, features = recorded(rng.random((1000, 3)) < (0.7, 0.4, 0.3)), rng.normal(size=(1000, 40))
    routed = played(policies.Route("rows", Rows(categories=False)), table, 600, features)
    assert (routed.given == 0).mean() > 0.97
    assert routed.right.mean() == pytest.approx(played(policies.Best(), table, 600).right.mean(), abs=0.02)


def test_the_penalty_is_strong_on_noise_and_weak_where_there_is_something_to_learn() -> None:
    def spread(right: Any, features: Any) -> float:
        table = recorded(right)
        view = replay.view_of(table, features)
        rows = Rows(categories=False)
        rows.fit(table, view)
        return float((rows.of(view)[:, 0]).std())

    right, features = by_sign(400)
    noise = np.random.default_rng(5).permutation(right)
    assert spread(right, features) > 0.25, "a straight line through a step, drawn a little toward the mean"
    assert spread(noise, features) < 0.05


def test_rows_of_features_and_categories_know_both() -> None:
    right, features = by_sign(600)
    swapped = np.arange(600) % 2 == 1
    right[swapped] = 1 - right[swapped]  # in every other question, all of one category, the sign means the opposite
    both = np.column_stack([features * ~swapped[:, None], features * swapped[:, None]])
    table = recorded(right, ["odd" if odd else "even" for odd in swapped])
    assert played(policies.Route("rows", Rows(categories=True)), table, 400, both).right.mean() > 0.9


def test_a_new_category_counts_as_the_average_one() -> None:
    rng = np.random.default_rng(0)
    categories = ["x"] * 150 + ["y"] * 50
    right = np.column_stack([rng.random(200) < np.where(np.arange(200) < 150, 0.9, 0.1), rng.random(200) < 0.5])
    table = recorded(right, categories)
    for competence in (Competence(), Rows(categories=True)):
        competence.fit(table, replay.view_of(table, None))
        x, y, new = competence.of(replay.view_of(recorded([[1, 1]] * 3, ["x", "y", "new"]), None))
        assert new == pytest.approx(table.right.mean(axis=0)) and x[0] > new[0] + 0.05 > new[0] > y[0] + 0.1


def test_too_few_questions_with_all_outcomes_are_a_data_error() -> None:
    table = recorded([[1, NAN]] * 6 + [[NAN, 1]] * 6 + [[1, 0]] * 4)
    with pytest.raises(DataError, match="Of 16 questions to learn from 4 have the outcomes of every model; expected at least 5") as caught:
        Rows(categories=False).fit(table, replay.view_of(table, np.zeros((16, 2))))
    assert "--only" in caught.value.hint


def test_competence_for_what_it_learnt_from_is_judged_without_the_question_itself() -> None:
    given = random_outcomes()
    for competence in (Competence(), Rows(categories=True)):
        competence.fit(given.table, given.view)
        aside, inside = competence.judged()[:HARD], competence.of(given.view)[:HARD]
        right = given.table.right[:HARD] == 1
        assert inside[right].mean() > inside[~right].mean() + 0.2, "it remembers"
        assert abs(aside[right].mean() - aside[~right].mean()) < 0.05, "and does not use what it remembers of a question"


def test_a_shared_competence_learns_anew_from_other_questions() -> None:
    competence = Competence()
    for right in ([[1, 0]] * 8, [[0, 1]] * 8):
        table = recorded(right)
        view = replay.view_of(table, None)
        competence.fit(table, view)
        assert competence.of(view)[0].argmax() == np.argmax(right[0]) == competence.judged()[0].argmax()


# ---------------------------------------------------------------- facts of texts

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=80) | st.text("AB.C) (\n1", max_size=40)
plain = st.text("abc xyz 019,.=\\?", min_size=0, max_size=30)
listed = st.lists(plain.map(str.strip), min_size=2, max_size=26)


@given(st.one_of(plain, st.just("I. one\nII. two"), st.just("A. an example\nB. of a list\n\nNow:")), listed, st.sampled_from(["{}. {}", "({}) {}", "{}) {}"]))
def test_the_options_of_a_question_are_read_as_they_were_written(stem: str, options: list[str], form: str) -> None:
    query = "\n".join([stem, *(form.format("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i], option) for i, option in enumerate(options))])
    assert facts.options_of(query) == options
    assert facts.of_question(query)[facts.FACTS.index("options")] == len(options)
    assert facts.of_question(query)[facts.FACTS.index("length")] == pytest.approx(math.log1p(len(stem) + 1)), "what stands before the options"


def test_a_lone_letter_lists_no_options_and_an_option_may_have_several_lines() -> None:
    assert facts.options_of("A. Lincoln was president.") == facts.options_of("Which?") == facts.options_of("") == []
    assert facts.options_of("Which?\nA. one\n  more\nB. two\nC. three\n") == ["one\n  more", "two", "three"]


@given(any_text)
def test_options_are_listed_as_the_vote_counts_them_and_facts_are_finite(query: str) -> None:
    assert len(facts.options_of(query)) == vote.option_count(query)
    assert len(facts.of_question(query)) == len(facts.FACTS + facts.LIST_FACTS) and all(map(math.isfinite, facts.of_question(query)))


@given(listed, st.integers(0, 30))
def test_facts_of_options_are_finite_and_those_that_are_not_there_not_a_number(options: list[str], most: int) -> None:
    query = "Which?\n" + "\n".join(f"{'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[i]}. {option}" for i, option in enumerate(options))
    rows = facts.of_options(query, most)
    assert len(rows) == most and all(len(row) == len(facts.OPTION_FACTS) for row in rows)
    for i, row in enumerate(rows):
        assert all(map(math.isfinite, row)) if i < len(options) else all(map(math.isnan, row))


def test_facts_of_options_say_what_anybody_sees() -> None:
    rows = facts.of_options("Which?\nA. 1234\nB. eight characters, or 8\nC. None of the above", 3)
    named = [dict(zip(facts.OPTION_FACTS, row, strict=True)) for row in rows]
    assert [row["has digits"] for row in named] == [1, 1, 0] and named[0]["digits"] == 1
    assert [row["none or all"] for row in named] == [0, 0, 1] and [row["rank"] for row in named] == [0, 2 / 3, 1 / 3]


# ---------------------------------------------------------------- two tables


def test_joined_tables_hold_the_questions_of_both_with_the_models_of_the_first() -> None:
    one = said([["A", "B"]], ["A"], queries=["first?"])
    other = dataclasses.replace(said([["C", "D"]], ["D"], queries=["second?"]), models=(Model("b"), Model("a")))
    found = outcomes.joined(one, other)
    assert found.queries == ("first?", "second?") and found.models == one.models
    assert found.right.tolist() == [[1, 0], [1, 0]] and found.letters == (("A", "B"), ("D", "C")) and found.truth == ("A", "D")


@pytest.mark.parametrize(("one", "other", "double"), [
    ((["a"], ["same?"]), (["b"], ["same?"]), "'b'"), ((["a"], [""]), (["a"], [""]), "'a'"), ((["a"], [""]), (["a"], ["text?"]), "'a'"),
    ((["a"], ["text?"]), (["a"], [""]), "'a'"), ((["a"], ["text?"]), (["a"], ["another?"]), ""), ((["a"], [""]), (["b"], [""]), ""),
])
def test_a_question_that_is_in_both_tables_is_refused(one: Any, other: Any, double: str) -> None:
    def table(ids: list[str], queries: list[str]) -> Table:
        return dataclasses.replace(recorded([[1, 0]], queries=queries), ids=tuple(ids))

    if not double:
        assert len(outcomes.joined(table(*one), table(*other)).ids) == 2
        return
    with pytest.raises(DataError, match=f"Question {double} of the table to judge on is also in the table to learn from .1 are"):
        outcomes.joined(table(*one), table(*other))


def test_tables_of_other_models_or_other_kinds_are_refused_with_the_way_out() -> None:
    one = recorded([[1, 0, 1]], queries=["first?"])
    for models, hint in (("ad", "--only a"), ("xy", "It has: x, y")):
        other = dataclasses.replace(recorded([[1, 0]], queries=["second?"]), models=tuple(map(Model, models)))
        with pytest.raises(DataError, match="records no answer of") as caught:
            outcomes.joined(one, other)
        assert hint in caught.value.hint
    with pytest.raises(DataError, match="letters"):
        outcomes.joined(one, said([["A", "B", "C"]], ["A"], queries=["second?"]))


# ---------------------------------------------------------------- lmgraph evaluate outcomes


def sheet(path: str, rows: Sequence[Sequence[Any]], models: Sequence[str] = ("a", "b"), *head: str) -> Path:
    """A CSV table: id, category, what else `head` names, and the models."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["id", "category", *head, *(f"model:{m}" for m in models)], *rows])
    return Path(path)


def scores(path: str, count: int = 40, begin: int = 0) -> Path:
    """a is right on all of x and nothing of y, b on three of four questions."""
    rows = [(f"q{i}", "xy"[i % 2], int(i % 2 == 0), int(i % 8 > 1)) for i in range(begin, begin + count)]
    return sheet(path, rows)


def sizes(**billions: float) -> Path:
    return write("sizes.yaml", json.dumps({"models": [{"name": name, "billion_parameters": size} for name, size in billions.items()]}))


def test_scores_alone_give_the_policies_without_votes(lmgraph: Command) -> None:
    result = lmgraph("evaluate", "outcomes", str(scores("t.csv")), "--models", str(sizes(a=2, b=8)), "--json")
    found = result.data["policies"]
    assert result.code == 0 and list(found) == ["best single model", "random", "category"]
    assert found["best single model"]["score"] == 0.75 and found["category"]["score"] == pytest.approx((1 + 0.75) / 2)
    assert found["category"]["by_category"] == {"x": 1.0, "y": 0.75} and found["category"]["billions"] == pytest.approx(5)
    assert "letters" in result.data["missing"]["votes, cascade"] and "texts" in result.data["missing"]["master"]


def test_a_report_is_shown_and_written_with_its_pictures(lmgraph: Command) -> None:
    result = lmgraph("evaluate", "outcomes", str(scores("t.csv")), "--models", str(sizes(a=2, b=8)), "--out", "report")
    assert result.code == 0 and "best single model" in result.out and "oracle" in result.out and "Left out" in result.out
    text = Path("report/report.md").read_text()
    assert "## By category" in text and "| category | 87.5 % |" in text and "fitted on other questions" in text and "learnt vote" not in text
    assert json.loads(Path("report/report.json").read_text())["metrics"]["policies"]["random"]["n"] == 40
    for name in ("cost", "categories"):
        assert Path(f"report/{name}.svg").is_file() == Path(f"report/{name}.png").is_file() == drawable()


@needs_sklearn
def test_letters_give_votes_learnt_votes_and_a_cascade(lmgraph: Command) -> None:
    table = copycat(200)
    rows = [(i, "c", t, 4, *letters) for i, letters, t in zip(table.ids, table.letters or (), table.truth)]
    path = sheet("t.csv", rows, "abc", "answer", "options")
    found = lmgraph("evaluate", "outcomes", str(path), "--folds", "2", "--sure", "0.5", "--json").data["policies"]
    assert list(found)[3:] == ["vote of 3, category", "learnt vote of 3", "cascade of at most 3"], "a vote of 5 would be one of 3"
    assert found["vote of 3, category"]["workers"] == 3 > found["cascade of at most 3"]["workers"] >= 1
    assert lmgraph("evaluate", "outcomes", str(path), "--only", "a", "--folds", "2", "--json").data["missing"]["votes, cascade"] == "There is one model."


def test_without_scikit_learn_learnt_votes_are_left_out_and_the_report_says_how_to_have_them(
    lmgraph: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    table = copycat(40)
    rows = [(i, "c", t, 4, *letters) for i, letters, t in zip(table.ids, table.letters or (), table.truth)]
    result = lmgraph("evaluate", "outcomes", str(sheet("t.csv", rows, "abc", "answer", "options")), "--votes", "2", "--out", "report")
    assert result.code == 0 and "vote of 2, category" in result.out and "learnt votes, cascade" in result.out
    text = Path("report/report.md").read_text()
    assert "| learnt votes, cascade | A learnt vote needs" in text and "pip install 'lmgraph[compare]'" in text and "| learnt vote of" not in text


def test_a_second_table_is_judged_by_what_the_first_says(lmgraph: Command) -> None:
    scores("learn.csv", 40)
    judged = sheet("judge.csv", [("new1", "x", 0, 1), ("new2", "y", 0, 1), ("new3", "y", 1, 0)], "ba")
    result = lmgraph("evaluate", "outcomes", "learn.csv", "--test", str(judged), "--out", "report", "--json")
    found = result.data["policies"]
    assert found["category"]["n"] == 3 and found["category"]["score"] == pytest.approx(2 / 3), "a in x, b in y; the columns stand the other way"
    assert found["best single model"]["score"] == pytest.approx(1 / 3) and result.data["questions"] == 43
    assert Path("report/report.md").read_text().startswith("# Recorded outcomes: learn.csv, judged on judge.csv\n")


def test_only_models_of_the_size_asked_for_take_part_and_others_are_named(lmgraph: Command) -> None:
    table = sheet("t.csv", [(f"q{i}", "x", 0, 1, 1, 1) for i in range(10)], "abcd")
    result = lmgraph("evaluate", "outcomes", str(table), "--models", str(sizes(a=1, b=7, c=70)), "--max-billions", "7", "--json")
    assert [model["name"] for model in result.data["models"]] == ["a", "b"] and "size unknown: d" in result.err
    few = lmgraph("evaluate", "outcomes", str(table), "--models", "sizes.yaml", "--only", "b", "--only", "c", "--max-billions", "0.5")
    assert few.code == 2 and "the smallest is b with 7" in few.err
    none = lmgraph("evaluate", "outcomes", str(table), "--max-billions", "3")
    assert none.code == 2 and "no model's size is known" in none.err and "--models" in none.err


@pytest.mark.parametrize(("arguments", "words"), [
    (["absent.csv"], "absent.csv does not exist"), (["t.csv", "--only", "A1"], "No model is called 'A1'"), (["t.csv", "--only", "a", "--only", "a"], "each once"),
    (["t.csv", "--folds", "41"], "40 different questions cannot be split into 41 parts"), (["t.csv", "--folds", "1"], "--folds"),
    (["t.csv", "--test", "t.csv"], "Question 'q0' of the table to judge on is also in the table to learn from (40 are)"),
    (["t.csv", "--max-billions", "0"], "--max-billions"), (["t.csv", "--sure", "2"], "--sure"), (["t.csv", "--votes", "1"], "--votes"),
    (["t.csv", "--reads", "5"], "--reads"), (["t.csv", "--test", "other.csv"], "records no answer of b"),
    (["gaps.csv"], "4 of 6 questions to judge lack an outcome: 'q1' of b; 'q2' of a, b; 'q3' of b; 'q4' of b."),
    (["u.csv", "--test", "gaps.csv"], "Outcomes missing of: b (4), a (1)"), (["gaps.csv", "--only", "a"], "1 of 6 questions to judge lack an outcome: 'q2' of a."),
    (["gaps.csv", "--test", "t.csv"], "is also in"),
])
def test_what_cannot_be_replayed_is_told_with_exit_code_two(lmgraph: Command, arguments: list[str], words: str) -> None:
    scores("t.csv")
    scores("u.csv", 4, 100)
    sheet("other.csv", [("z", "x", 1)], "a")
    sheet("gaps.csv", [("g0", "x", 1, 1), ("q1", "x", 1, ""), ("q2", "x", "", ""), ("q3", "x", 1, ""), ("q4", "x", 1, ""), ("g5", "x", 1, 1)])
    result = lmgraph("evaluate", "outcomes", *arguments)
    assert result.code == 2 and words in " ".join(result.err.split()), result.err
    assert not result.out


# ---------------------------------------------------------------- what the master reads


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states by llama.cpp, as where the extra `train` is not installed."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "lmgraph.train.model", raising=False)
    monkeypatch.delattr(train, "model", raising=False)


def questions(path: str, copies: int = 1, ends: Sequence[str] = ("please", "in short", "again")) -> Path:
    """54 texts for each of these words, about three things of which model a knows the first, b the second, c the third. Each stands there
    `copies` times; copies have a category that no other text has."""
    rows = []
    for model, words in zip("abc", WORDS.values()):
        for word in words.split():
            for begin in ("what is", "explain", "tell me about", "why", "how does", "give an example of"):
                texts = [f"{begin} {end} {word} {word}" for end in ends]
                rows += [{"query": text, "category": text if copies > 1 else "", "outcomes": {m: int(m == model) for m in "abc"}} for text in texts * copies]
    return write(path, jsonl(*rows))


@pytest.mark.usefixtures("in_catalogue", "without_torch")
def test_the_master_s_rows_find_who_knows_what_a_question_is_about(lmgraph: Command, toy_bundle: Path) -> None:
    found = lmgraph("evaluate", "outcomes", str(questions("t.jsonl")), "--bundle", str(toy_bundle), "--folds", "3", "--json").data
    assert found["policies"]["best single model"]["score"] < 0.4 < 0.5 < found["policies"]["master over models"]["score"]
    assert list(found["missing"]) == ["votes, cascade"]


@pytest.mark.usefixtures("in_catalogue", "without_torch")
def test_what_the_master_read_is_kept_with_the_report_and_not_read_again(lmgraph: Command, toy_bundle: Path) -> None:
    def run(*more: str) -> Any:
        command = ["evaluate", "outcomes", str(questions("t.jsonl", ends=["please"])), "--bundle", str(toy_bundle), "--folds", "3", "--out", "report", "--json", *more]
        return lmgraph(*command)

    first = run()
    (states,) = Path("report").glob("states-*.npy")
    assert "hidden states" in first.err and not list(Path("report").glob("*.gguf")), "merged weights are needed only while they read"
    second = run()
    assert "hidden states" not in second.err and second.data == first.data
    states.write_bytes(states.read_bytes()[:-100])
    damaged = run()
    assert "hidden states" in damaged.err and damaged.data == first.data
    assert run("--reads", "8").code == 0 and len(list(Path("report").glob("states-*.npy"))) == 2, "other numbers, another file"


@pytest.mark.usefixtures("in_catalogue", "without_torch")
def test_copies_of_a_question_tell_nothing_of_it(lmgraph: Command, toy_bundle: Path) -> None:
    found = lmgraph("evaluate", "outcomes", str(questions("t.jsonl", copies=3, ends=["please"])), "--bundle", str(toy_bundle), "--folds", "3", "--json").data["policies"]
    assert found["category"]["score"] < 0.5, "with a copy to learn from, this were 1"


@pytest.mark.usefixtures("in_catalogue", "without_torch")
def test_both_tables_are_read_when_one_is_judged_by_the_other(lmgraph: Command, toy_bundle: Path) -> None:
    questions("learn.jsonl")
    questions("judge.jsonl", ends=["now"])
    command = ["evaluate", "outcomes", "learn.jsonl", "--test", "judge.jsonl", "--bundle", str(toy_bundle), "--json"]
    assert lmgraph(*command).data["policies"]["master over models"]["score"] > 0.5
    again = lmgraph(*command[:3], "--test", "learn.jsonl")
    assert again.code == 2 and "is also in the table to learn from" in again.err


@pytest.mark.parametrize(("bundle", "words"), [("absent", "Master bundle 'absent' not found"), ("other", "No base weights with sha256")])
def test_a_master_that_cannot_read_is_named(lmgraph: Command, toy_bundle: Path, bundle: str, words: str) -> None:
    shutil.copytree(toy_bundle, "other")
    result = lmgraph("evaluate", "outcomes", str(questions("t.jsonl")), "--bundle", bundle)
    assert result.code == 1 and words in result.err and not result.out


def test_a_bundle_of_rows_alone_reads_as_the_base_does(toy_base: Path, toy_bundle: Path) -> None:
    pytest.importorskip("torch", reason="reading by torch is an extra: pip install 'lmgraph[train]'")
    from lmgraph.train import model

    made = bundles.read(str(toy_bundle))
    queries = [query for query, _ in toy_queries(2)]
    one, other = (model.states(toy_base, tensors, made.vocabulary, queries, 64) for tensors in (bundles.read_tensors(made.weights), None))
    assert one.shape[0] == 6 and np.array_equal(one, other)


def test_reading_by_torch_ends_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch, toy_base: Path, toy_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="reading by torch is an extra: pip install 'lmgraph[train]'")
    from lmgraph.train import model

    monkeypatch.setattr(model, "fast_bf16", lambda: True)
    monkeypatch.setattr(model, "STATE_TOKENS", 8)  # a query at a time
    made, gone, seen = bundles.read(str(toy_bundle)), threading.Event(), []
    queries = [query for query, _ in toy_queries(10)]

    async def read() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def progress(name: str, done: int, total: int) -> None:
            seen.append(done)
            loop.call_soon_threadsafe(task.cancel)
            assert gone.wait(60)

        try:
            await masters.states_of(toy_base, made.weights, made.vocabulary, queries, 64, 1, tmp_path / "states.npy", progress)
        finally:
            gone.set()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(read())
    assert len(seen) == 1 and not (tmp_path / "states.npy").exists()
