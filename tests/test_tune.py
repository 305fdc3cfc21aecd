"""Training a master for real, on a toy: loss falls, the exported file decides as trained, an interrupted run goes on."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from conftest import WORDS, toy_graph, toy_queries

pytest.importorskip("torch", reason="training is an extra: pip install 'lmgraph[train]'")
pytestmark = pytest.mark.filterwarnings("ignore")

from lmgraph import bundles, cli, graphfile
from lmgraph.engine import Engine
from lmgraph.errors import AssetError, DataError
from lmgraph.master import Master
from lmgraph.tokens import Vocabulary
from lmgraph.train import heads, model, tune
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


# ---------------------------------------------------------------- states, and masters to begin with


def test_states_are_those_of_llama_cpp_with_an_adapter_and_without(tuned: Path, toy_base: Path, tmp_path: Path) -> None:
    bundle = bundles.read(str(tuned))
    merged = bundles.merge(bundle, toy_base, tmp_path / "merged.gguf")
    queries = ["court", "<|im_end|> sum", "matrix " * 40, "¿qué es la fiebre? 半", *(e.query for e in examples()[:70:9])]
    seen: list[tuple[int, int]] = []

    async def by_llama_cpp(weights: Path) -> np.ndarray:
        engine = await Engine.open(weights, context=256, slots=1, threads=1, states=True)
        try:
            return await heads.states(engine, bundle.vocabulary, queries, 64)
        finally:
            await engine.close()

    found = {}
    for name, weights, adapter in (("base", toy_base, None), ("adapted", merged, bundles.read_tensors(bundle.weights))):
        ours = model.states(toy_base, adapter, bundle.vocabulary, queries, 64, lambda done, total: seen.append((done, total)))
        theirs = asyncio.run(by_llama_cpp(weights))
        assert ours.shape == theirs.shape == (len(queries), 64) and ours.dtype == np.float32
        assert np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max(), name
        found[name] = ours
    assert np.abs(found["base"] - found["adapted"]).max() > 0.3 * np.abs(found["base"]).max(), "the adapter changes something"
    assert seen == [(len(queries), len(queries))] * 2


def test_states_come_in_the_order_of_the_queries_however_long_they_are(toy_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "STATE_TOKENS", 100)  # several batches
    queries = ["court " * n for n in (9, 1, 5, 2, 9, 1)]
    seen: list[int] = []
    vocabulary = vocabulary_for(toy_base)
    together = model.states(toy_base, None, vocabulary, queries, 64, lambda done, total: seen.append(done))
    alone = np.concatenate([model.states(toy_base, None, vocabulary, [query], 64) for query in queries[:4]])
    assert np.abs(together[:4] - alone).max() < 0.1 * np.abs(alone).max()
    assert np.abs(together[4:] - together[:2]).max() < 0.02 * np.abs(alone).max()
    assert np.abs(together[0] - together[1]).max() > 0.3 * np.abs(alone).max()
    assert len(seen) > 2 and seen == sorted(set(seen)) and seen[-1] == 6


def test_a_master_begun_with_another_keeps_the_rows_of_nodes_that_both_name_by_the_same_token(tuned: Path, toy_base: Path, tmp_path: Path) -> None:
    vocabulary = replace(vocabulary_for(toy_base), nodes={"math": 0, "chef": 1, "health": 5})
    told = bundles.read_tensors(tuned / "weights.safetensors")
    recipe = replace(RECIPE, seed=1)  # other random rows than the bundle began with
    fresh, _ = tune.setup(toy_base, vocabulary, recipe)
    begun, _ = tune.setup(toy_base, vocabulary, recipe, tuned)
    for rows in ("input_rows", "output_rows"):
        made, new = (getattr(m, rows).detach().numpy() for m in (begun, fresh))
        old = told[rows].astype(np.float32)
        np.testing.assert_array_equal(made[[0, 8]], old[[0, 8]], "math, and the end")
        np.testing.assert_array_equal(made[1:8], new[1:8], "chef has law's token, health another one")
        assert (np.abs(made[[1, 5]] - old[[1, 5]]).max(axis=1) > 1e-2).all()
    lora = {name: p for name, p in tune.trained(begun).items() if "lora" in name}
    assert len(lora) == 28
    (tmp_path / "again").mkdir()
    tune.save(begun, vocabulary, recipe, tmp_path / "again")
    again = bundles.read_tensors(tmp_path / "again" / "weights.safetensors")
    assert again.keys() == told.keys()
    for name in told:
        if "lora" in name:
            np.testing.assert_allclose(again[name].astype(np.float32), told[name].astype(np.float32), atol=1e-3)


def test_a_bundle_that_does_not_fit_and_a_folder_that_is_none_are_refused(tuned: Path, toy_bundle: Path, toy_base: Path, tmp_path: Path) -> None:
    vocabulary = vocabulary_for(toy_base)
    with pytest.raises(DataError, match=r"does not fit: blk\.0\.q_proj\.lora_a is \(4, 64\), expected \(8, 64\)") as caught:
        tune.setup(toy_base, vocabulary, replace(RECIPE, rank=8), tuned)
    assert "Use its rank (recipe.json)" in caught.value.hint
    with pytest.raises(DataError, match=r"lora_a is nothing, expected"):
        tune.setup(toy_base, vocabulary, RECIPE, toy_bundle)
    with pytest.raises(AssetError, match=r"not found: no vocabulary\.json in "):
        tune.setup(toy_base, vocabulary, RECIPE, tmp_path)


def test_no_bars_but_ours_and_no_warnings_of_libraries_are_seen(toy_base: Path, tmp_path: Path) -> None:
    (tmp_path / "graph.yaml").write_text(toy_graph(toy_base))
    rows = [{"query": f"{e.query} {i}", "node": e.node} for i, e in enumerate(examples())]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "lmgraph", "train", "tune", "-g", "graph.yaml", "--data", "data.jsonl", "--out", "out", "--base", str(toy_base),
               "--tokens", "8", "--epochs", "0.1", "--rank", "2", "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": str(Path(tune.__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (tmp_path / "out" / "anchors.npz").exists(), done.stderr
    ours = ("examples, ", "The bundle is in ", "states of the part kept aside ...", "anchor states ...")
    assert [line for line in done.stderr.splitlines() if line.strip() and not any(text in line for text in ours)] == []


def test_too_few_examples_to_keep_any_aside_are_refused_before_training(toy_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("graph.yaml").write_text(toy_graph(toy_base))
    Path("data.jsonl").write_text('{"query": "court", "node": "law"}\n' * 50)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "tune", "--data", "data.jsonl", "--out", "out", "--base", str(toy_base), "--tokens", "8"])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "Too few examples" in said and "at least 50" in said and not Path("out").exists()
