"""The commands that make masters, on a toy base that stands in the catalogue: a node learnt later, all rows of a graph, export.

Running them all costs seconds: no torch is needed for any.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from conftest import WORDS, toy_graph, toy_queries
from lmgraph import assets, bundles, graphfile
from lmgraph.engine import Engine
from lmgraph.train import examples as data
from test_cli import Command, here, jsonl, lmgraph, write

__all__ = ["here", "lmgraph"]  # fixtures


@pytest.fixture
def in_catalogue(monkeypatch: pytest.MonkeyPatch, toy_base: Path) -> assets.Asset:
    """The toy base as a model of the catalogue, already fetched."""
    made = assets.Asset("toy", "toy.gguf", assets.digest_of(toy_base), toy_base.stat().st_size, "test")
    monkeypatch.setitem(assets.CATALOGUE, "toy", made)
    weights = Path(os.environ["LMGRAPH_CACHE"]) / "weights"
    weights.mkdir()
    shutil.copyfile(toy_base, weights / "toy.gguf")
    (weights / "toy.gguf.sha256").write_text(made.sha256 + "\n")
    return made


@pytest.fixture
def mine(in_catalogue: assets.Asset, toy_bundle: Path) -> Path:
    """graph.yaml whose master is a bundle folder, with a comment to keep."""
    return write("graph.yaml", "# mine\n" + toy_graph(toy_bundle))


def chef_queries() -> tuple[list[str], list[str]]:
    """(20 queries to learn from, 20 others)."""
    fillers = ("what is", "explain", "tell me about", "why", "how does", "give an example of")
    queries = [f"{a} {word} {word} {b}" for a in fillers for word in ("oven", "flour", "butter") for b in fillers]
    random.Random(0).shuffle(queries)
    return queries[:20], queries[20:40]


@pytest.fixture
def chef() -> Path:
    return write("chef.jsonl", jsonl(*({"query": q} for q in chef_queries()[0])))


def chosen(lmgraph: Command, queries: list[str]) -> list[str]:
    """Where a graph sends queries."""
    return [row["node"] for row in lmgraph("route", "-", "--json", "--no-rewrite", stdin=jsonl(*({"query": q} for q in queries))).rows]


# ---------------------------------------------------------------- one node more


def test_a_node_added_with_examples_is_known_at_once_and_the_old_ones_lose_no_point(lmgraph: Command, mine: Path, chef: Path,
                                                                                    toy_bundle: Path) -> None:
    old = toy_queries()
    before = chosen(lmgraph, [q for q, _ in old])
    found = lmgraph("graph", "add", "chef", "--description", "food", "--examples", "chef.jsonl")
    assert found.code == 0, found.err
    assert "Added chef (token 3)" in found.out and "20 examples" in found.err
    text = mine.read_text()
    made = graphfile.loads(text)
    assert text.startswith("# mine\n") and made.nodes["chef"].token == 3 and "chef" in made.neighbours()
    assert made.master.bundle.replace("\\", "/") == "bundles/graph-chef"
    bundle = bundles.read(made.master.bundle, mine.parent)
    assert bundle.vocabulary.nodes == {**{n: i for i, n in enumerate(WORDS)}, "chef": 3}
    assert bundle.digest != bundles.read(str(toy_bundle)).digest
    assert lmgraph("graph", "check").code == 0

    learnt, others = chef_queries()
    after = chosen(lmgraph, [q for q, _ in old] + learnt + others)
    right = [sum(name == node for name, (_, node) in zip(names, old)) / len(old) for names in (before, after)]
    assert right[1] >= right[0] - 0.01
    assert after[len(old):len(old) + 20].count("chef") >= 19 and after[-20:].count("chef") > 10

    about_cars = [q.replace("oven", "tyre").replace("flour", "brake").replace("butter", "clutch") for q in learnt]
    second = write("more.jsonl", jsonl(*({"query": q} for q in about_cars)))
    found = lmgraph("graph", "add", "mechanic", "--description", "cars", "--examples", str(second))
    assert found.code == 0 and graphfile.loads(mine.read_text()).nodes["mechanic"].token == 4
    assert set(bundles.read(graphfile.loads(mine.read_text()).master.bundle, mine.parent).vocabulary.nodes) == {*WORDS, "chef", "mechanic"}
    assert lmgraph("graph", "check").code == 0


def test_the_patched_master_is_what_a_merge_from_nothing_gives(lmgraph: Command, mine: Path, chef: Path) -> None:
    assert lmgraph("graph", "add", "chef", "--description", "food", "--examples", "chef.jsonl").code == 0
    queries = [q for q, _ in toy_queries(4)] + chef_queries()[1][:4]
    patched = chosen(lmgraph, queries)
    merged = list((Path(os.environ["LMGRAPH_CACHE"]) / "masters").glob("graph-chef-*.gguf"))
    assert len(merged) == 1
    merged[0].unlink()
    assert chosen(lmgraph, queries) == patched and merged[0].exists()


def test_heads_of_a_node_that_the_graph_has_points_the_graph_to_the_new_bundle(lmgraph: Command, mine: Path, chef: Path) -> None:
    assert lmgraph("graph", "add", "chef", "--description", "food").code == 0
    found = lmgraph("route", "oven flour")
    assert found.code == 1 and "not trained for chef (token 3)" in found.err
    found = lmgraph("train", "heads", "--node", "chef", "--examples", "chef.jsonl", "--out", "elsewhere/chef")
    assert found.code == 0 and "graph.yaml uses it" in found.out, found.err
    assert graphfile.loads(mine.read_text()).master.bundle.replace("\\", "/") == "elsewhere/chef"
    assert chosen(lmgraph, chef_queries()[0]).count("chef") >= 19


@pytest.mark.parametrize(("arguments", "content", "complaint"), [
    (("--token", "1"), None, "share functional token 1"),
    (("--token", "8"), None, "token 8 is not reserved in this bundle"),
    ((), '{"query": "salt"}\n' * 2, "2 example queries are too few"),
    ((), '{"query": "salt"}\n{"question": 1}\n', "chef.jsonl:2"),
    ((), "", "holds no queries"),
    ((), b"\xff\xfe", "cannot be read"),
])
def test_a_node_that_cannot_be_learnt_changes_nothing(lmgraph: Command, mine: Path, chef: Path, arguments: tuple[str, ...],
                                                      content: str | bytes | None, complaint: str) -> None:
    if content is not None:
        chef.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = mine.read_text()
    found = lmgraph("graph", "add", "chef", "--description", "food", "--examples", "chef.jsonl", *arguments)
    assert found.code == 2 and complaint in found.err and found.out == ""
    assert mine.read_text() == before and not Path("bundles").exists()


def test_a_token_that_the_bundle_uses_for_another_node_is_refused(lmgraph: Command, mine: Path, chef: Path) -> None:
    assert lmgraph("graph", "remove", "law").code == 0
    found = lmgraph("graph", "add", "chef", "--description", "food", "--examples", "chef.jsonl", "--token", "1")
    assert found.code == 2 and "token 1 is taken" in found.err and "Next free token: 3" in found.err


def test_a_removed_node_comes_back_with_the_row_it_had(lmgraph: Command, mine: Path, chef: Path) -> None:
    add = ("graph", "add", "chef", "--description", "food")
    assert lmgraph(*add, "--examples", "chef.jsonl").code == 0 and lmgraph("graph", "remove", "chef").code == 0
    found = lmgraph(*add, "--examples", "chef.jsonl")
    assert found.code == 2 and "knows chef already" in found.err and "without examples" in found.err
    assert lmgraph(*add).code == 0 and chosen(lmgraph, chef_queries()[0]).count("chef") >= 19


def test_rows_cannot_be_fitted_on_a_merged_master(lmgraph: Command, toy_graph_file: Path, chef: Path) -> None:
    found = lmgraph("graph", "add", "chef", "--description", "food", "--examples", "chef.jsonl")
    assert found.code == 2 and "merged GGUF" in found.err and "folder" in found.err


def test_heads_says_what_is_missing(lmgraph: Command, mine: Path, chef: Path) -> None:
    for arguments, complaint in ((("--node", "chef", "--examples", "chef.jsonl"), "lmgraph graph add chef"),
                                 (("--node", "law"), "--node needs --examples"), ((), "--data and --out"),
                                 (("--data", "chef.jsonl"), "--data and --out"),
                                 (("--node", "law", "--examples", "chef.jsonl"), "knows law already")):
        found = lmgraph("train", "heads", *arguments)
        assert found.code == 2 and complaint in found.err


# ---------------------------------------------------------------- all rows


@pytest.fixture
def labelled() -> Path:
    """Examples of which a tenth is kept aside."""
    rows = [{"query": f"{q} {i}", "node": n} for i in range(4) for q, n in toy_queries()]
    assert data.split([data.Example(r["query"], r["node"]) for r in rows])[1]
    return write("examples.jsonl", jsonl(*rows))


@pytest.mark.parametrize("by", ["file", "name"])
def test_all_rows_of_a_graph_are_fitted_on_an_untouched_base(lmgraph: Command, in_catalogue: assets.Asset, toy_base: Path,
                                                             labelled: Path, by: str) -> None:
    write("graph.yaml", toy_graph(Path("rows")))
    found = lmgraph("train", "heads", "--data", "examples.jsonl", "--out", "rows", "--tokens", "6",
                    "--base", str(toy_base) if by == "file" else "toy")
    assert found.code == 0, found.err
    metrics = found.data
    assert metrics == json.loads(Path("rows/metrics.json").read_text())
    assert metrics["examples"] + metrics["kept"]["n"] == 144 and metrics["kept"]["n"] >= 5
    bundle = bundles.read("rows")
    assert bundle.vocabulary.size == 6 and bundle.vocabulary.temperature == metrics["temperature"]
    assert bundle.vocabulary.base == in_catalogue.sha256
    assert lmgraph("graph", "check").code == 0
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    right = sum(a == b["node"] for a, b in zip(chosen(lmgraph, [r["query"] for r in rows]), rows))
    assert right / len(rows) > 0.6


@pytest.mark.parametrize(("content", "arguments", "complaint"), [
    (None, ("--tokens", "2"), "token 2, only 0..1 are reserved"),
    (jsonl({"query": "a", "node": "law"}), (), "nothing is left to keep aside"),
    ("", (), "No examples found"), ("x\n", (), "examples.jsonl:1"),
    (jsonl(*({"query": f"q{i}", "node": "tax" if i == 3 else "law"} for i in range(60))), (), "Unknown nodes in the examples: tax"),
])
def test_examples_that_cannot_be_fitted_are_refused(lmgraph: Command, in_catalogue: assets.Asset, labelled: Path, content: str | None,
                                                    arguments: tuple[str, ...], complaint: str) -> None:
    write("graph.yaml", toy_graph(Path("rows")))
    if content is not None:
        labelled.write_text(content)
    found = lmgraph("train", "heads", "--data", "examples.jsonl", "--out", "rows", "--base", "toy", *arguments)
    assert found.code == 2 and complaint in found.err and found.out == "" and not Path("rows").exists()


def test_a_base_that_is_neither_in_the_catalogue_nor_a_file_is_named(lmgraph: Command, in_catalogue: assets.Asset, labelled: Path) -> None:
    write("graph.yaml", toy_graph(Path("rows")))
    found = lmgraph("train", "heads", "--data", "examples.jsonl", "--out", "rows", "--base", "nonsense")
    assert found.code == 1 and "'nonsense'" in found.err and "smollm2-135m" in found.err


# ---------------------------------------------------------------- export, pull


def test_export_writes_one_gguf_that_is_a_master_and_overwrites_only_when_forced(lmgraph: Command, in_catalogue: assets.Asset,
                                                                                toy_bundle: Path) -> None:
    found = lmgraph("train", "export", str(toy_bundle), "out/master.gguf")
    assert found.code == 0 and "Wrote out" in found.out, found.err
    path = Path("out/master.gguf")
    vocabulary = bundles.vocabulary_of(path)
    assert vocabulary == bundles.read(str(toy_bundle)).vocabulary

    async def opens() -> list[int]:
        engine = await Engine.open(path, context=128, threads=1)
        try:
            return await engine.tokenise("<fn_2>", True)
        finally:
            await engine.close()

    assert asyncio.run(opens()) == [vocabulary.first_id + 2]
    write("graph.yaml", toy_graph(path))
    assert lmgraph("route", "court contract").code == 0
    path.write_bytes(b"mine")
    found = lmgraph("train", "export", str(toy_bundle), "out/master.gguf")
    assert found.code == 2 and "exists" in found.err and "--force" in found.err and path.read_bytes() == b"mine"
    assert lmgraph("train", "export", "--force", str(toy_bundle), "out/master.gguf").code == 0 and bundles.vocabulary_of(path) == vocabulary


def test_a_bundle_of_unknown_base_weights_is_not_exported(lmgraph: Command, toy_bundle: Path) -> None:
    found = lmgraph("train", "export", str(toy_bundle), "master.gguf")
    assert found.code == 1 and "No base weights with sha256" in found.err and not Path("master.gguf").exists()


def test_an_unknown_bundle_is_not_exported(lmgraph: Command) -> None:
    found = lmgraph("train", "export", "nonsense", "master.gguf")
    assert found.code == 1 and "'nonsense' not found" in found.err


def test_pull_finds_what_is_there_and_verify_finds_a_damaged_byte(lmgraph: Command, in_catalogue: assets.Asset, mine: Path) -> None:
    path = Path(os.environ["LMGRAPH_CACHE"]) / "weights" / "toy.gguf"
    for arguments in (("pull", "toy"), ("pull", "--verify", "toy")):
        found = lmgraph(*arguments)
        assert found.code == 0 and f"toy: {path}" in found.err
    found = lmgraph("pull")
    assert found.code == 0 and "masters" in found.err, "the master of the graph is merged now, not on first use"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert lmgraph("pull", "toy").code == 0, "without --verify nobody reads every byte"
    found = lmgraph("pull", "--verify", "toy")
    assert found.code == 1 and "toy.gguf is damaged" in found.err and "could not be fetched" in found.err and not path.exists()


# ---------------------------------------------------------------- LoRA and rows


@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own
def test_tune_leaves_a_bundle_and_goes_on_from_it_on_more_data(lmgraph: Command, in_catalogue: assets.Asset) -> None:
    pytest.importorskip("torch", reason="training is an extra: pip install 'lmgraph[train]'")
    rows = [{"query": f"{q} {i}", "node": n, "rewrite": f"{q} {i}"} for i in range(2) for q, n in toy_queries()]
    write("examples.jsonl", jsonl(*rows))
    write("more.jsonl", jsonl(*({"query": f"{q} again", "node": n} for q, n in toy_queries())))
    write("graph.yaml", toy_graph(Path("second")))
    common = ("train", "tune", "--data", "examples.jsonl", "--base", "toy", "--tokens", "6", "--batch-tokens", "512", "--threads", "2")
    found = lmgraph(*common, "--rank", "2", "--epochs", "1", "--rewrite-share", "0.5", "--out", "first")
    assert found.code == 0, found.err
    first = found.data
    assert first["examples"] + first["kept"]["n"] == 72 and 15 < first["rewrites"] < first["examples"] - 15
    found = lmgraph(*common, "--data", "more.jsonl", "--rank", "2", "--epochs", "0.5", "--start", "first", "--replay", "0.2", "--out", "second")
    assert found.code == 0, found.err
    second = found.data
    assert second["examples"] + second["kept"]["n"] < 72 + 36 - 30, "a fifth of the first file and all of the second"
    assert bundles.read("second").vocabulary.nodes == {name: i for i, name in enumerate(WORDS)}
    assert lmgraph("graph", "check").code == 0 and set(chosen(lmgraph, [q for q, _ in toy_queries(2)])) <= set(WORDS)
    found = lmgraph(*common, "--rank", "4", "--start", "first", "--out", "third")
    assert found.code == 2 and "does not fit" in found.err and "rank" in found.err
