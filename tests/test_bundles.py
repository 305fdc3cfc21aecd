"""Bundles: merging into base weights, digests, and what is refused."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import quants

from lmgraph import bundles, graphfile
from lmgraph.engine import Engine
from lmgraph.errors import AssetError, VocabularyMismatch


def tensor(path: Path, name: str) -> np.ndarray:
    found = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    return quants.dequantize(found.data, Q(found.tensor_type))


def test_a_merged_file_holds_the_rows_and_the_control_tokens(toy_bundle: Path, toy_master: Path, toy_base: Path) -> None:
    bundle = bundles.read(str(toy_bundle))
    rows = bundles.read_tensors(bundle.weights)
    size = bundle.vocabulary.first_id
    output = tensor(toy_master, "output.weight")
    assert output.shape[0] == size + 9
    np.testing.assert_allclose(output[size:], rows["output_rows"].astype(np.float32), atol=0.02 * np.abs(rows["output_rows"]).max())
    np.testing.assert_array_equal(tensor(toy_master, "token_embd.weight")[:size], tensor(toy_base, "token_embd.weight"))
    tokens = gguf.GGUFReader(toy_master).fields["tokenizer.ggml.tokens"].contents()
    assert tokens[size:] == [*(f"<fn_{i}>" for i in range(8)), "<fn_end>"]
    assert bundles.vocabulary_of(toy_master) == bundle.vocabulary


def test_lora_is_added_to_every_layer_in_the_rotary_order_of_gguf(toy_bundle: Path, toy_base: Path, tmp_path: Path) -> None:
    bundle = bundles.read(str(toy_bundle))
    random = np.random.default_rng(1)
    tensors = dict(bundles.read_tensors(bundle.weights))
    tensors["blk.1.q_proj.lora_a"] = random.normal(size=(2, 64)).astype(np.float16)
    tensors["blk.1.q_proj.lora_b"] = random.normal(size=(64, 2)).astype(np.float16)
    tensors["blk.0.down_proj.lora_a"] = random.normal(size=(2, 96)).astype(np.float16)
    tensors["blk.0.down_proj.lora_b"] = random.normal(size=(64, 2)).astype(np.float16)
    made = bundles.copy(bundle, tmp_path / "tuned", bundle.vocabulary, tensors)
    merged = bundles.merge(made, toy_base, tmp_path / "tuned.gguf")
    down = tensor(merged, "blk.0.ffn_down.weight") - tensor(toy_base, "blk.0.ffn_down.weight")
    wanted = tensors["blk.0.down_proj.lora_b"].astype(np.float32) @ tensors["blk.0.down_proj.lora_a"].astype(np.float32)
    np.testing.assert_allclose(down, wanted, atol=0.1)
    query = tensor(merged, "blk.1.attn_q.weight") - tensor(toy_base, "blk.1.attn_q.weight")
    raw = tensors["blk.1.q_proj.lora_b"].astype(np.float32) @ tensors["blk.1.q_proj.lora_a"].astype(np.float32)
    half = 64 // 4 // 2
    for head in range(4):
        for i in range(half):
            np.testing.assert_allclose(query[head * 16 + 2 * i], raw[head * 16 + i], atol=0.1)
            np.testing.assert_allclose(query[head * 16 + 2 * i + 1], raw[head * 16 + half + i], atol=0.1)
    untouched = tensor(merged, "blk.0.attn_v.weight")
    np.testing.assert_array_equal(untouched, tensor(toy_base, "blk.0.attn_v.weight"))


def test_a_patched_row_is_the_only_change(toy_bundle: Path, toy_master: Path, tmp_path: Path) -> None:
    bundle = bundles.read(str(toy_bundle))
    vocabulary = bundle.vocabulary.with_node("chef", 5)
    row = np.linspace(-1, 1, 64).astype(np.float32)
    patched = bundles.patch(toy_master, tmp_path / "patched.gguf", {5: row}, vocabulary, "toy")
    before, after = tensor(toy_master, "output.weight"), tensor(patched, "output.weight")
    changed = np.flatnonzero((before != after).any(1))
    assert changed.tolist() == [vocabulary.first_id + 5]
    np.testing.assert_allclose(after[changed[0]], row, atol=0.01)
    assert bundles.vocabulary_of(patched) == vocabulary


def test_llama_cpp_ends_on_the_end_token_of_a_merged_file(toy_master: Path) -> None:
    async def work() -> None:
        vocabulary = bundles.vocabulary_of(toy_master)
        engine = await Engine.open(toy_master, context=128, threads=2)
        others = [i for i in range(vocabulary.end_id) if i != vocabulary.end_id]
        async with await engine.session() as session:
            pieces = [p async for p in session.generate([1, 50], 20, forbidden=others)]
        await engine.close()
        assert pieces[-1].finish == "stop" and pieces[-1].completion_tokens <= 1

    asyncio.run(work())


def test_a_bundle_for_another_base_is_refused(toy_bundle: Path, toy_base: Path, tmp_path: Path) -> None:
    bundle = bundles.read(str(toy_bundle))
    other = replace(bundle, vocabulary=replace(bundle.vocabulary, first_id=999, end_id=2000))
    with pytest.raises(VocabularyMismatch, match="tokens"):
        bundles.merge(other, toy_base, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists() and not list(tmp_path.iterdir())


def test_a_vocabulary_edited_by_hand_is_refused(toy_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(toy_bundle, folder)
    data = json.loads((folder / "vocabulary.json").read_text())
    data["nodes"]["math"], data["nodes"]["law"] = data["nodes"]["law"], data["nodes"]["math"]
    (folder / "vocabulary.json").write_text(json.dumps(data))
    with pytest.raises(VocabularyMismatch, match="digest"):
        bundles.read(str(folder))


def test_an_unknown_bundle_names_the_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(AssetError) as caught:
        bundles.read("nonsense", tmp_path)
    assert "mmlu" in caught.value.hint


def test_damaged_weights_of_a_bundle_are_an_error_with_a_hint(toy_bundle: Path, toy_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(toy_bundle, folder)
    data = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(AssetError, match="damaged"):
        bundles.merge(bundles.read(str(folder)), toy_base, tmp_path / "x.gguf")


def test_a_merge_that_is_interrupted_leaves_nothing(toy_bundle: Path, toy_base: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundles.merge(bundles.read(str(toy_bundle)), toy_base, tmp_path / "out" / "x.gguf", interrupt)
    assert not list((tmp_path / "out").iterdir())


def test_the_same_bundle_is_merged_once_and_another_one_anew(toy_bundle: Path, toy_base: Path, tmp_path: Path) -> None:
    bundle = bundles.read(str(toy_bundle))
    first = bundles.ready(bundle, toy_base, tmp_path)
    stamp = first.stat().st_mtime_ns
    assert bundles.ready(bundle, toy_base, tmp_path).stat().st_mtime_ns == stamp
    warmer = replace(bundle, vocabulary=replace(bundle.vocabulary, temperature=2.0))
    assert bundles.merged_path(warmer, tmp_path) != first


def test_the_built_in_bundle_fits_the_built_in_graph_and_its_size_is_small() -> None:
    from lmgraph.files import builtin_graph
    from lmgraph.master import fits

    bundle = bundles.read("mmlu")
    fits(graphfile.loads(builtin_graph()), bundle.vocabulary)
    assert bundle.vocabulary.size == 64
    assert sum(f.stat().st_size for f in bundle.folder.iterdir()) < 25e6
    assert (bundle.folder / "card.md").exists()
