"""Fitting rows on frozen states: optima worked out by hand, temperatures, and a node learnt later on the toy model."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import WORDS, toy_queries
from lmgraph import bundles
from lmgraph.engine import Engine
from lmgraph.errors import DataError
from lmgraph.train import heads
from lmgraph.train.examples import Example


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


def groups(classes: int = 4, each: int = 60, width: int = 12, spread: float = 0.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """States around one corner a class."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    return (3 * np.eye(classes, width)[labels] + generator.normal(0, spread, (len(labels), width))).astype(np.float32), labels


def chef_queries() -> tuple[list[str], list[str]]:
    """(20 queries to learn from, 40 others)."""
    fillers = ("what is", "explain", "tell me about", "why", "how does", "give an example of")
    queries = [f"{a} {word} {word} {b}" for a in fillers for word in ("oven", "flour", "butter") for b in fillers]
    random.Random(0).shuffle(queries)
    return queries[:20], queries[20:60]


def test_constructed_classes_are_told_apart() -> None:
    x, y = groups()
    check, truth = groups(seed=1)
    fitted = heads.fit_all(x, y, 4, check, truth)
    assert fitted.rows.shape == (4, 12) and fitted.rows.dtype == np.float32
    assert fitted.accuracy > 0.99 and fitted.accuracy == ((check @ fitted.rows.T).argmax(1) == truth).mean()
    assert fitted.penalty in heads.PENALTIES and fitted.loss < 0.1


def test_two_rows_reach_the_optimum_worked_out_by_hand() -> None:
    """x = +1 is class 0, x = -1 is class 1; rows (w, -w). Loss log(1 + e^-2w) + p w^2 is least where p w = s(-2w): w = 1 for p = s(-2)."""
    x, y = np.array([[1.0], [-1.0]]), np.array([0, 1])
    assert heads.fit(x, y, 2, sigmoid(-2)) == pytest.approx(np.array([[1.0], [-1.0]]), abs=1e-3)


def test_a_row_beside_fixed_ones_reaches_the_optimum_worked_out_by_hand() -> None:
    """One fixed logit 0, one row w: log(1 + e^-w) + p w^2 / 2 is least where p w = s(-w): w = 1 for p = s(-1)."""
    x, y = np.array([[1.0], [-1.0]]), np.array([1, 0])
    found = heads.fit(x, y, 1, sigmoid(-1), fixed=np.zeros((2, 1)))
    assert found == pytest.approx(np.array([[1.0]]), abs=1e-3)


def test_a_feature_that_says_nothing_gets_no_weight_and_the_direction_is_the_one_that_tells() -> None:
    x = np.array([[s + t, s - t] for s in (1.0, -1.0) for t in (1.0, -1.0)])
    rows = heads.fit(x, np.array([0, 0, 1, 1]), 2, 1e-2)
    assert rows[0] / np.linalg.norm(rows[0]) == pytest.approx([2**-0.5, 2**-0.5], abs=1e-3)
    assert rows[1] == pytest.approx(-rows[0], abs=1e-4)


def test_a_weight_counts_like_an_example_written_again() -> None:
    x, y = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]]), np.array([0, 1, 1])
    weighted = heads.fit(x, y, 2, 0.05, weights=np.array([3.0, 1.0, 1.0]))
    again = heads.fit(x[[0, 0, 0, 1, 2]], y[[0, 0, 0, 1, 2]], 2, 0.05)
    assert weighted == pytest.approx(again, abs=1e-3)


def test_scaled_features_give_the_same_logits() -> None:
    x, y = groups(3, 20, 6)
    factors = np.array([1000, 0.01, 1, 7, 0.3, 50], dtype=np.float32)
    plain, scaled = heads.fit(x, y, 3, 1e-2), heads.fit(x * factors, y, 3, 1e-2)
    assert (x * factors) @ scaled.T == pytest.approx(x @ plain.T, abs=0.05)


@pytest.mark.parametrize("known", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_found_again(known: float) -> None:
    generator = np.random.default_rng(3)
    logits = generator.normal(0, 3, (4000, 5))
    labels = np.array([generator.choice(5, p=p) for p in heads.softmax(logits / known)])
    assert heads.temperature(logits, labels) == pytest.approx(known, rel=0.1)


def test_a_temperature_stays_within_its_bounds() -> None:
    logits = np.eye(3)[[0, 1, 2]] * 2
    assert heads.temperature(logits, np.array([0, 1, 2])) == pytest.approx(0.2, abs=1e-3)
    assert heads.temperature(logits, np.array([1, 2, 0])) == pytest.approx(5.0, abs=1e-2)


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]])
    assert heads.softmax(logits).tolist() == [[1, 0], [0, 1]]
    assert heads.log_loss(logits, np.array([0, 1])) == 0
    assert heads.log_loss(logits, np.array([1, 1])) == 1e4


def test_a_new_class_is_learnt_beside_rows_that_stay() -> None:
    x, y = groups(4)
    rows = heads.fit(x[y < 3], y[y < 3], 3, 1e-2)
    for heat in (1.0, 2.0):
        row = heads.fit_one(x[y == 3][:20], x[y < 3], y[y < 3], rows, heat)
        check, truth = groups(4, seed=5)
        chosen = (check @ np.vstack([rows, row]).T).argmax(1)
        assert (chosen[truth == 3] == 3).mean() > 0.95
        assert (chosen[truth < 3] == truth[truth < 3]).mean() > 0.98


@pytest.mark.parametrize("count", [0, 2])
def test_too_few_examples_of_a_new_node_are_refused(count: int) -> None:
    x, y = groups(2, 10)
    with pytest.raises(DataError, match=f"{count} example queries are too few"):
        heads.fit_one(x[:count], x, y, np.zeros((2, 12)), 1.0)


def test_labels_become_positions_and_strangers_are_named() -> None:
    assert heads.index(["law", "math", "law"], {"math": 7, "law": 2}).tolist() == [1, 0, 1]
    with pytest.raises(DataError, match=r"Unknown nodes in the examples: chef, tax\.") as caught:
        heads.index(["tax", "law", "chef"], {"math": 7, "law": 2})
    assert "math, law" in caught.value.hint


def test_anchors_are_as_many_for_each_node_and_spread_over_its_examples() -> None:
    rows = [Example(f"q{i}", "math") for i in range(100)] + [Example(f"r{i}", "law") for i in range(3)]
    picked = heads.pick_anchors(rows, 10)
    assert [e.query for e in picked if e.node == "math"] == [f"q{i}" for i in range(0, 100, 10)]
    assert [e.query for e in picked if e.node == "law"] == ["r0", "r1", "r2"]


def test_anchors_come_back_as_they_were_saved(tmp_path: Path) -> None:
    x, _ = groups(2, 3)
    heads.save_anchors(tmp_path / "anchors.npz", x, ["math", "law"] * 3)
    found, names = heads.load_anchors(tmp_path / "anchors.npz")
    assert found == pytest.approx(x, abs=5e-3) and found.dtype == np.float32 and names == ["math", "law"] * 3
    with pytest.raises(DataError, match="no anchor states"):
        heads.load_anchors(tmp_path / "none.npz")


def test_states_come_in_the_order_of_the_queries_and_progress_reaches_the_end(toy_base: Path, toy_bundle: Path) -> None:
    async def work() -> None:
        vocabulary = bundles.read(str(toy_bundle)).vocabulary
        engine = await Engine.open(toy_base, context=256, slots=2, threads=1, states=True)
        seen: list[tuple[int, int]] = []
        queries = ["court", "sum of a matrix", "court", "fever " * 200]
        found = await heads.states(engine, vocabulary, queries, 64, lambda done, total: seen.append((done, total)))
        await engine.close()
        assert found.shape == (4, 64) and found.dtype == np.float32
        assert found[0] == pytest.approx(found[2], abs=1e-3) and np.abs(found[0] - found[1]).max() > 0.1
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    asyncio.run(work())


def test_states_are_kept_as_they_come_and_a_stopped_run_goes_on_from_them(toy_base: Path, toy_bundle: Path, tmp_path: Path) -> None:
    queries, file = [f"court {i}" for i in range(12)], tmp_path / "states.npy"
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    async def work(progress: Callable[[int, int], None]) -> np.ndarray:
        vocabulary = bundles.read(str(toy_bundle)).vocabulary
        engine = await Engine.open(toy_base, context=256, slots=1, threads=1, states=True)
        try:
            return await heads.states(engine, vocabulary, queries, 64, progress, file)
        finally:
            await engine.close()

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(work(stop))
    kept = np.load(file)
    assert (~np.isnan(kept).any(axis=1)).sum() == 5
    found = asyncio.run(work(lambda done, total: seen.append(done)))
    assert seen == list(range(5, 13)) and (found[:5] == kept[:5]).all() and not np.isnan(found).any()
    file.write_bytes(file.read_bytes()[:200])  # damaged: begun anew
    assert asyncio.run(work(lambda done, total: None)) == pytest.approx(found, abs=1e-3)


def test_a_node_is_learnt_from_twenty_examples_and_the_old_ones_lose_no_point(toy_bundle: Path, toy_master: Path, tmp_path: Path) -> None:
    async def work() -> None:
        learnt, others = chef_queries()
        bundle = bundles.read(str(toy_bundle))
        made = await heads.add_node(bundle, toy_master, "chef", 5, learnt, tmp_path / "more", 128, 1)
        again = bundles.read(str(tmp_path / "more"))
        assert again.vocabulary == made.vocabulary == bundle.vocabulary.with_node("chef", 5)
        before, after = bundles.read_tensors(bundle.weights), bundles.read_tensors(again.weights)
        changed = np.flatnonzero((before["output_rows"] != after["output_rows"]).any(1))
        assert changed.tolist() == [5], "no row but the new one may move"
        assert set(heads.load_anchors(tmp_path / "more" / "anchors.npz")[1]) == {*WORDS, "chef"}

        engine = await Engine.open(toy_master, context=256, slots=2, threads=1, states=True)
        old = toy_queries()
        features = await heads.states(engine, bundle.vocabulary, [q for q, _ in old] + learnt + others, 128)
        await engine.close()
        truth = heads.index([n for _, n in old], bundle.vocabulary.nodes)
        three, four = features @ heads.node_rows(bundle).T, features @ heads.node_rows(again).T
        cut = len(old)
        assert (four[:cut].argmax(1) == truth).mean() >= (three[:cut].argmax(1) == truth).mean() - 0.01
        assert (four[cut:cut + len(learnt)].argmax(1) == 3).mean() > 0.9
        assert (four[cut + len(learnt):].argmax(1) == 3).mean() > 0.6, "far more than one in four, from a random model"

    asyncio.run(work())


@pytest.mark.parametrize(("token", "complaint"), [
    (1, "token 1 is taken"), (8, "token 8 is not reserved"), (-1, "token -1 is not reserved")])
def test_a_token_that_cannot_be_had_is_refused_before_any_work(toy_bundle: Path, tmp_path: Path, token: int, complaint: str) -> None:
    bundle, learnt = bundles.read(str(toy_bundle)), chef_queries()[0]
    with pytest.raises(DataError, match=complaint) as caught:
        asyncio.run(heads.add_node(bundle, tmp_path / "never-read.gguf", "chef", token, learnt, tmp_path / "x", 128, 1))
    assert "3" in caught.value.hint or "0 to 7" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_finishing_a_training_leaves_a_temperature_and_anchors(toy_bundle: Path, toy_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trained"
    shutil.copytree(toy_bundle, folder, ignore=shutil.ignore_patterns("anchors.npz"))
    training = [Example(q, n) for q, n in toy_queries()]
    kept = [Example(q, n) for q, n in toy_queries(salt=1)]
    steps: set[str] = set()
    found = asyncio.run(heads.finish(folder, toy_base, tmp_path / "merged.gguf", training, kept, 128, 1,
                                     lambda task, done, total: steps.add(task)))
    assert found["n"] == 36 and found["accuracy"] > 0.7 and 0.2 <= found["temperature"] <= 5
    made = bundles.read(str(folder))
    assert made.vocabulary.temperature == found["temperature"] and made.vocabulary.nodes == {name: i for i, name in enumerate(WORDS)}
    features, names = heads.load_anchors(folder / "anchors.npz")
    assert features.shape == (36, 64) and sorted(set(names)) == sorted(WORDS)
    assert steps == {"states of the part kept aside", "anchor states"}
