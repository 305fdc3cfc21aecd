"""Training a master for real, on a toy: loss falls, the exported file decides as trained, an interrupted run goes on."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from conftest import WORDS, toy_graph, toy_queries

pytest.importorskip("torch", reason="training is an extra: pip install 'lmgraph[train]'")
pytestmark = pytest.mark.filterwarnings("ignore")

from lmgraph import bundles, graphfile
from lmgraph.engine import Engine
from lmgraph.errors import DataError
from lmgraph.master import Master
from lmgraph.tokens import Vocabulary
from lmgraph.train import heads, tune
from lmgraph.train.examples import Example

RECIPE = tune.Recipe(epochs=14, batch_tokens=512, learning_rate=4e-3, rows_learning_rate=2e-2, rank=4, alpha=8, validate_every=20, average=0.8,
                     rewrite_weight=0.3, threads=2)


def vocabulary_for(base: Path) -> Vocabulary:
    size = len(gguf.GGUFReader(base).fields["tokenizer.ggml.tokens"].data)
    return Vocabulary(size, 8, size + 8, {name: i for i, name in enumerate(WORDS)}, base="")


def examples() -> list[Example]:
    return [Example(query, node, rewrite="do it" if i % 3 else "") for i, (query, node) in enumerate(toy_queries(16))]


@pytest.fixture(scope="module")
def tuned(toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "bundle"
    tune.main(toy_base, examples(), {"kept": examples()[::3]}, vocabulary_for(toy_base), RECIPE, out, log=lambda line: None)
    return out


def test_a_run_leaves_its_recipe_log_metrics_and_a_falling_loss(tuned: Path) -> None:
    assert {p.name for p in tuned.iterdir()} >= {"weights.safetensors", "vocabulary.json", "recipe.json", "metrics.json", "log.jsonl", "plot.png"}
    assert not (tuned / "checkpoint.pt").exists()
    lines = [json.loads(line) for line in (tuned / "log.jsonl").read_text().splitlines()]
    assert np.mean([x["choice"] for x in lines[-5:]]) < 0.5 * np.mean([x["choice"] for x in lines[:5]])
    assert json.loads((tuned / "recipe.json").read_text())["rank"] == 4
    assert json.loads((tuned / "metrics.json").read_text())["kept"]["accuracy"] > 0.9


def test_the_merged_file_decides_as_it_was_trained_and_writes_the_rewrite_it_learnt(tuned: Path, toy_base: Path, tmp_path: Path) -> None:
    merged = bundles.merge(bundles.read(str(tuned)), toy_base, tmp_path / "tuned.gguf")

    async def work() -> None:
        engine = await Engine.open(merged, context=512, slots=2, threads=2)
        master = Master(engine, bundles.vocabulary_of(merged), graphfile.loads(toy_graph(merged)))
        found = [(await master.decide(q, rewriting=True), node) for q, node in toy_queries(16)]
        await engine.close()
        assert sum(d.chosen == node for d, node in found) / len(found) > 0.9
        wrote = [d.rewritten for d, _ in found if d.rewritten != d.query]
        assert wrote.count("do it") > len(found) / 2

    asyncio.run(work())


def test_finishing_keeps_anchors_and_a_temperature_measured_on_the_merged_file(tuned: Path, toy_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    bundle = bundles.read(str(tuned))
    bundles.copy(bundle, folder, bundle.vocabulary, bundles.read_tensors(bundle.weights))
    found = asyncio.run(heads.finish(folder, toy_base, tmp_path / "merged.gguf", examples(), examples()[::3], 128, 2, lambda a, b, c: None))
    assert found["accuracy"] > 0.9
    assert bundles.read(str(folder)).vocabulary.temperature == found["temperature"]
    states, names = heads.load_anchors(folder / "anchors.npz")
    assert states.shape == (len(names), 64) and set(names) == set(WORDS)


def test_an_interrupted_run_goes_on_and_ends_where_an_uninterrupted_one_does(toy_base: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=3, checkpoint_minutes=0.0, validate_every=1000)

    class Interrupted(Exception):
        pass

    def interrupt(line: str) -> None:
        raise Interrupted

    vocabulary = vocabulary_for(toy_base)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    tune.main(toy_base, examples(), {"kept": examples()[::3]}, vocabulary, recipe, whole, log=lambda line: None)
    steps = len((whole / "log.jsonl").read_text().splitlines())
    with pytest.raises(Interrupted):
        tune.main(toy_base, examples(), {"kept": examples()[::3]}, vocabulary, replace(recipe, validate_every=steps // 2), halves, log=interrupt)
    assert (halves / "checkpoint.pt").exists()
    said: list[str] = []
    tune.main(toy_base, examples(), {"kept": examples()[::3]}, vocabulary, replace(recipe, validate_every=steps // 2), halves, log=said.append)
    assert said[0].startswith("going on from step")
    one, two = (bundles.read_tensors(p / "weights.safetensors") for p in (whole, halves))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name].astype(np.float32), two[name].astype(np.float32), atol=2e-3)


def test_an_example_of_an_unknown_node_is_refused_before_training(toy_base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="astrology"):
        tune.main(toy_base, [Example("x", "astrology")], {}, vocabulary_for(toy_base), RECIPE, tmp_path / "out")


def test_batches_hold_every_example_once_within_the_budget() -> None:
    import random

    from lmgraph.train.examples import Encoded

    encoded = [Encoded([0] * (1 + i % 50), 0) for i in range(200)]
    made = tune.batches(encoded, 256, random.Random(1))
    assert sorted(i for batch in made for i in batch) == list(range(200))
    assert all(max(len(encoded[i].ids) for i in batch) * len(batch) <= 256 for batch in made)


def test_half_precision_learns_the_same_and_a_wrong_one_is_named(toy_base: Path, tmp_path: Path) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        recipe = replace(RECIPE, precision=precision)
        found[precision] = tune.main(
            toy_base, examples(), {"kept": examples()[::3]}, vocabulary_for(toy_base), recipe, tmp_path / precision, log=lambda line: None
        )["kept"]
    assert found["bf16"]["accuracy"] > 0.9 and abs(found["bf16"]["loss"] - found["fp32"]["loss"]) < 0.2
    with pytest.raises(DataError, match="fp32, bf16"):
        tune.setup(toy_base, vocabulary_for(toy_base), replace(RECIPE, precision="fp8"))
