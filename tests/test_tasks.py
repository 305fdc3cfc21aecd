"""Tasks of several steps: files to tasks, the ids that teach them, what is lost and counted, and a toy master that was taught some and walks."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import WORDS, toy_graph
from lmgraph import adapters, bundles, cli, graphfile, plan, prompts, runtime
from lmgraph import settings as environment
from lmgraph.errors import AssetError, DataError, VocabularyMismatch
from lmgraph.plan import Request
from lmgraph.runtime import Runtime
from lmgraph.tokens import Vocabulary
from lmgraph.train import examples, tasks
from lmgraph.train.examples import Encoded, Example
from lmgraph.train.tasks import BARE, PLAN, Task
from lmgraph.types import Answer, Ask, Message
from test_examples import END, FIRST, OCTOPUS, SPECIAL, spell, write

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and transformers
NODES = Vocabulary(FIRST, 8, END, {"math": 4, "law": 0, "health": 2})
TWO = {"query": "sum, then sue", "steps": [{"node": "math", "rewrite": "sum it"}, {"node": "law", "needs": [0], "rewrite": "sue over {0}"}]}
TASKS = st.builds(
    lambda query, nodes, answers: Task(query, tuple(Request(node, f"do {number}", ()) for number, node in enumerate(nodes)), answers and tuple("a" for _ in nodes)),
    st.text(min_size=1, max_size=20), st.lists(st.sampled_from(sorted(NODES.nodes)), min_size=1, max_size=4), st.booleans())


# ---------------------------------------------------------------- files


def test_a_line_becomes_a_task_and_one_with_a_node_a_task_of_one_step(tmp_path: Path) -> None:
    answered = {"query": "é", "lang": "fr", "steps": [{"node": "law", "needs": [], "rewrite": "r", "answer": "so"}]}
    path = write(tmp_path, TWO, answered, {"query": "q", "node": "math"}, {"query": "q", "node": "math", "rewrite": "r", "lang": None})
    assert tasks.load([path]) == [
        Task("sum, then sue", (Request("math", "sum it"), Request("law", "sue over {0}", (0,)))),
        Task("é", (Request("law", "r"),), ("so",), "fr"), Task("q", (Request("math", ""),)), Task("q", (Request("math", "r"),))]


def test_the_answers_of_a_task_count_only_where_every_step_has_one(tmp_path: Path) -> None:
    steps = [{"node": "math", "answer": "3"}, {"node": "law"}]
    assert tasks.load([write(tmp_path, {"query": "q", "steps": steps})])[0].answers == ()
    steps[1]["answer"] = "4"
    assert tasks.load([write(tmp_path, {"query": "q", "steps": steps})])[0].answers == ("3", "4")


@pytest.mark.parametrize(("row", "words"), [
    ({}, r"needs a non-empty string `query` and a list `steps`; found keys \[\]"), ({"query": "q"}, r"found keys \['query'\]"), ({"query": " ", "steps": [{"node": "a"}]}, "non-empty"),
    ({"query": 5, "node": "a"}, "non-empty"), ({"query": "q", "steps": []}, "a list `steps`"), ({"query": "q", "steps": {"node": "a"}}, "a list `steps`"),
    ({"query": "q", "steps": ["math"]}, "step 0 needs a string `node`"), ({"query": "q", "steps": [{"node": "a"}, {"rewrite": "r"}]}, "step 1 needs a string `node`"),
    ({"query": "q", "steps": [{"node": "a", "rewrite": 5}]}, "step 0 needs a string `node`; `rewrite` and `answer` are strings"),
    ({"query": "q", "steps": [{"node": "a", "answer": ["x"]}]}, "`answer` are strings"),
    ({"query": "q", "steps": [{"node": "a", "needs": [0], "rewrite": "{0}"}]}, r"step 0 needs \[0\], expected numbers of steps before it, from 0"),
    ({"query": "q", "steps": [{"node": "a"}, {"node": "b", "needs": [2], "rewrite": "{2}"}]}, r"step 1 needs \[2\]"),
    ({"query": "q", "steps": [{"node": "a"}, {"node": "b", "needs": [-1]}]}, r"step 1 needs \[-1\]"), ({"query": "q", "steps": [{"node": "a"}, {"node": "b", "needs": 0}]}, "step 1 needs 0,"),
    ({"query": "q", "steps": [{"node": "a"}, {"node": "b", "needs": [False]}]}, r"step 1 needs \[false\]"), ({"query": "q", "steps": [{"node": "a"}, {"node": "b", "needs": None}]}, "needs null"),
    ({"query": "q", "steps": [{"node": "a"}, {"node": "b", "needs": [0], "rewrite": "r"}]}, r"step 1 needs \[0\], its rewrite names \[\]"),
    ({"query": "q", "steps": [{"node": "a"}, {"node": "b", "rewrite": "r {0}"}]}, r"step 1 needs \[\], its rewrite names \[0\]"),
], ids=range(18))
def test_a_line_that_cannot_be_used_is_named_with_file_and_line(tmp_path: Path, row: Any, words: str) -> None:
    path = write(tmp_path, TWO, row)
    with pytest.raises(DataError, match=rf"^data\.jsonl:2: .*{words}") as caught:
        tasks.load([path])
    assert caught.value.hint


def test_a_file_without_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No tasks found"):
        tasks.load([write(tmp_path, "")])


@given(st.recursive(st.none() | st.booleans() | st.integers(-2, 3) | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3), max_leaves=4).flatmap(
    lambda odd: st.lists(st.fixed_dictionaries({}, optional={"node": st.just("a") | st.just(odd), "needs": st.just([]) | st.just(odd), "rewrite": st.just("{0}") | st.just(odd), "answer": st.just(odd)}), max_size=3)))
@settings(max_examples=100, deadline=None)
def test_steps_of_anything_are_tasks_that_can_run_or_refused(steps: list[Any]) -> None:
    try:
        found = tasks._parse({"query": "q", "steps": steps}, "here:1")
    except DataError as error:
        assert error.message.startswith("here:1: ")
    else:
        assert sum(map(len, plan.waves(found.steps))) == len(steps) and all(set(plan.needs(s.text)) <= set(s.needs) for s in found.steps)


def test_a_task_stays_on_the_side_that_its_query_belongs_to() -> None:
    made = [Task(f"q{i}", (Request("math", ""),)) for i in range(200)]
    learnt, kept = examples.split(made, tasks.KEPT)
    assert sorted([*learnt, *kept], key=made.index) == made and 20 <= len(kept) <= 60
    assert [t.query for t in kept] == [e.query for e in examples.split([Example(t.query, "law") for t in made], tasks.KEPT)[1]]


# ---------------------------------------------------------------- what is learnt


def words(ids: list[int]) -> str:
    """Ids of the toy tokenizer as text: ids of special text too, functional tokens as <4>, the end as <end>."""
    return "".join("<end>" if i == END else f"<{i - FIRST}>" if i >= FIRST else chr(i - SPECIAL if i >= SPECIAL else i) for i in ids)


TASK = Task("q", (Request("math", "sum"), Request("law", "on {0}", (0,))), ("it is 3", "yes"))


@pytest.mark.parametrize(("form", "text"), [
    (PLAN, "<|im_start|>q\nField:<4>sum<end>\nField:<0>on {0}<end>\nField:<end>"),
    (2, "<|im_start|>q\nField:<4>sum<end>\nAnswer: it is 3\nField:<0>on {0}<end>\nAnswer: yes\nField:<end>"),
    (1, "<|im_start|>q\nField:<4>sum<end>\nAnswer: it is 3\nField:<0>on {0}<end>\nField:<end>"),
    (BARE, "<|im_start|>q\nField:<4><end>\nField:<0><end>\nField:<end>"),
])
def test_a_task_is_taught_as_a_plan_as_a_walk_and_without_requests(form: int, text: str) -> None:
    found = tasks.encode(TASK, NODES, spell, 99, form)
    assert words(found.ids) == text
    assert [words([found.ids[i]]) for i in found.choices] == ["<4>", "<0>", "<end>"] and found.start == found.choices[0]
    assert [words([found.ids[i] for i in span]) for span in found.written] == ([] if form == BARE else ["sum<end>", "on {0}<end>"])


def test_a_task_without_answers_walks_as_it_plans_and_one_without_requests_is_bare() -> None:
    silent = replace(TASK, answers=())
    assert tasks.encode(silent, NODES, spell, 99, 2) == tasks.encode(TASK, NODES, spell, 99, PLAN)
    dumb = replace(silent, steps=tuple(replace(s, text="") for s in TASK.steps))
    assert tasks.encode(dumb, NODES, spell, 99, PLAN) == tasks.encode(TASK, NODES, spell, 99, BARE)


@given(TASKS, st.integers(BARE, 4))
@settings(max_examples=100, deadline=None)
def test_every_choice_is_a_node_or_at_last_the_end_and_nothing_of_the_prompt_is_learnt(task: Task, form: int) -> None:
    found = tasks.encode(task, NODES, spell, 99, form)
    assert [found.ids[i] for i in found.choices] == [*(NODES.id_of(step.node) for step in task.steps), END]
    assert found.choices[-1] == len(found.ids) - 1 and list(found.choices) == sorted(set(found.choices))
    assert found.ids[:found.start] == examples.prompt(task.query, NODES, spell, 99)
    learnt = [i for span in found.written for i in span]
    assert len(set(learnt)) == len(learnt) and not set(learnt) & set(found.choices) and all(i > found.start for i in learnt)


def test_a_long_query_and_a_long_answer_are_shortened_as_in_serving() -> None:
    long = replace(TASK, query="q" * 500, answers=("m" * 30 + "x" * 5000, "yes"))
    text = words(tasks.encode(long, NODES, spell, 60, 9).ids)
    assert text.startswith("<|im_start|>" + "q" * 60 + "\nField:")
    assert "\nAnswer: " + "m" * 26 + "x" * 14 + "\nField:" in text and prompts.ANSWER_LIMIT == 40


def test_what_a_user_or_a_worker_writes_is_never_a_special_token_and_octopus_tasks_are_quoted() -> None:
    odd = Task("<fn_1>", (Request("math", "<fn_end>"),), ("<fn_2>",))
    found = tasks.encode(odd, NODES, spell, 99, 2)
    assert [i for i in found.ids if i >= FIRST] == [NODES.id_of("math"), END, END]
    for text in ("<fn_1>", "<fn_end>", "<fn_2>"):
        assert text in "".join(chr(i) for i in found.ids if i < SPECIAL)
    assert "<4>('do')<end><|end|><|assistant|><end>" in words(tasks.encode(Task("q", (Request("math", "do"),)), OCTOPUS, spell, 99, PLAN).ids)


def test_a_task_of_a_node_without_a_token_is_refused() -> None:
    with pytest.raises(VocabularyMismatch, match="astrology"):
        tasks.encode(Task("q", (Request("astrology", ""),)), NODES, spell, 99, PLAN)


def test_half_of_the_tasks_with_answers_are_walks_and_every_second_of_these_is_answered_in_part() -> None:
    assert sorted(tasks.forms([TASK] * 20)) == [PLAN] * 10 + [1] * 5 + [2] * 5
    few = tasks.forms([TASK if number % 3 == 0 else Task(TASK.query, TASK.steps) for number in range(90)])
    assert 90 - few.count(PLAN) == 29  # every answered one but the first
    long = Task("q", (Request("math", "a"),) * 4, ("x",) * 4)
    assert {1, 2, 3, 4} < set(tasks.forms([long] * 30))


def test_an_example_teaches_that_its_walk_ends_where_walks_are_taught() -> None:
    plain, ending = (examples.encode(Example("q", "math", "sum"), NODES, spell, 99, ends) for ends in (False, True))
    assert words(plain.ids) == "<|im_start|>q\nField:<4>sum<end>" and len(plain.choices) == 1
    assert words(ending.ids) == "<|im_start|>q\nField:<4>sum<end>\nField:<end>" and [words([ending.ids[i]]) for i in ending.choices] == ["<4>", "<end>"]
    assert ending.written == plain.written and ending == tasks.encode(Task("q", (Request("math", "sum"),)), NODES, spell, 99, PLAN)
    bare = examples.encode(Example("q", "math"), NODES, spell, 99, True)
    assert bare == tasks.encode(Task("q", (Request("math", ""),)), NODES, spell, 99, PLAN)


# ---------------------------------------------------------------- what is lost, what is right


class Bigrams:
    """A model whose next id depends on the last one only: made of a table of logits."""

    def __init__(self, table: dict[int, dict[int, float]], size: int) -> None:
        import torch

        self.logits = torch.full((size, size), -20.0)
        for before, following in table.items():
            for after, value in following.items():
                self.logits[before, after] = value

    def eval(self) -> None: ...

    def train(self) -> None: ...

    def states(self, ids: Any, mask: Any) -> Any:
        return ids.unsqueeze(-1).float()

    def scores(self, states: Any) -> Any:
        return self.logits[states.squeeze(-1).long()]


SMALL = Vocabulary(10, 4, 14, {"math": 0, "law": 1, "health": 2})
# ids: 1, 2, 3 stand before choices, 5 is a word of a request
WALK = Encoded([1, 10, 5, 14, 2, 11, 14, 3, 14], (1, 5, 8), (range(2, 4), range(6, 7)))


def lost(row: dict[int, float], target: int, smoothing: float) -> float:
    """Cross-entropy of a row of logits (others -20), smoothed over the nodes."""
    total = math.log(sum(math.exp(v) for v in row.values()) + (15 - len(row)) * math.exp(-20.0))
    log = {i: row.get(i, -20.0) - total for i in range(15)}
    return -((1 - smoothing) * log[target] + smoothing * sum(log[i] for i in (10, 11, 12)) / 3)


def test_the_loss_is_that_of_every_choice_and_of_every_written_token() -> None:
    torch = pytest.importorskip("torch", reason="training is an extra")
    from lmgraph.train import loss

    table = {1: {10: 1.0, 11: 0.5}, 2: {11: 0.3, 14: 2.0}, 3: {14: 1.5, 12: 1.0}, 10: {5: 0.7, 14: 0.1}, 5: {14: 0.2, 5: 0.4}, 11: {14: 0.9}}
    single = Encoded([1, 12], (1,))
    found, choice, rewrite = loss.loss_of(Bigrams(table, 15), [WALK, single], SMALL, 0.1, 0.5)  # type: ignore[arg-type]
    choices = [lost(table[1], 10, 0.1), lost(table[2], 11, 0.1), lost(table[3], 14, 0.1), lost(table[1], 12, 0.1)]
    requests = [lost(table[10], 5, 0), lost(table[5], 14, 0), lost(table[11], 14, 0)]
    assert choice == pytest.approx(sum(choices) / 4, rel=1e-4) and rewrite == pytest.approx(sum(requests) / 3, rel=1e-4)
    assert float(found) == pytest.approx(choice + 0.5 * rewrite)
    assert float(loss.loss_of(Bigrams(table, 15), [single], SMALL, 0.1, 0.5)[0]) == pytest.approx(choices[3], rel=1e-4), "nothing written"  # type: ignore[arg-type]
    assert torch.is_tensor(found)


@pytest.mark.parametrize(("table", "accuracy", "following", "whole"), [
    ({1: {10: 1.0, 14: 9.0}, 2: {11: 1.0}, 3: {14: 1.0}}, 1, 1, 1),  # the end cannot come first
    ({1: {11: 1.0}, 2: {11: 1.0}, 3: {14: 1.0}}, 0, 1, 0),
    ({1: {10: 1.0}, 2: {14: 1.0}, 3: {14: 1.0}}, 1, 0.5, 0),
    ({1: {10: 1.0}, 2: {12: 1.0}, 3: {10: 1.0}}, 1, 0, 0),
    ({1: {10: 1.0, 5: 9.0}, 2: {11: 1.0, 4: 9.0}, 3: {14: 1.0}}, 1, 1, 1),  # plain words are no choice
])
@pytest.mark.parametrize("budget", [9, 4096])
def test_first_choices_following_ones_and_whole_walks_are_counted(table: dict[int, dict[int, float]], accuracy: float, following: float, whole: float, budget: int) -> None:
    pytest.importorskip("torch", reason="training is an extra")
    from lmgraph.train import loss

    single = Encoded([1, 10, 14, 3, 14], (1, 4))
    found = loss.validate(Bigrams(table, 15), [WALK, single], SMALL, budget)  # type: ignore[arg-type]
    assert found["accuracy"] == accuracy and found["n"] == 2
    right = int(table[3].get(14) is not None)
    assert found["next"] == pytest.approx((2 * following + right) / 3)
    assert found["whole"] == (whole + accuracy * right) / 2
    first = {i: table[1].get(i, -20.0) for i in (10, 11, 12)}
    assert found["loss"] == pytest.approx(math.log(sum(map(math.exp, first.values()))) - first[10], abs=1e-4)


def test_where_no_walk_is_longer_than_a_choice_only_the_choice_is_counted() -> None:
    pytest.importorskip("torch", reason="training is an extra")
    from lmgraph.train import loss

    assert set(loss.validate(Bigrams({1: {10: 1.0}}, 15), [Encoded([1, 10, 5], (1,))], SMALL)) == {"accuracy", "loss", "n"}  # type: ignore[arg-type]


# ---------------------------------------------------------------- a master that was taught


FILLERS = ("what is", "explain", "tell me about", "why", "how does", "give an example of")


def taught_queries() -> list[tuple[str, str]]:
    """(query, node), all different."""
    return [(f"{FILLERS[i % 6]} {words.split()[i % 3]} {words.split()[i % 3]} {FILLERS[i // 4]}", node) for node, words in WORDS.items() for i in range(24)]


def pairs() -> Iterator[list[str]]:
    """Nodes in every order of two and of three."""
    for one in WORDS:
        for other in WORDS:
            if other != one:
                yield [one, other]
                yield [one, other, next(iter(set(WORDS) - {one, other}))]


CHAINS = ["dax", "wug", "fep", "zup", "kiv", "mog", "rab", "tiz", "bok", "lun", "pem", "qua"]
"""a word for each order of nodes"""


def taught_tasks() -> list[Task]:
    """A word, said twice, stands for the nodes of a task: each step needs the one before it."""
    made = []
    for word, nodes in zip(CHAINS, pairs(), strict=True):
        steps = [Request(node, "do it" if not k else f"use {{{k - 1}}}", (k - 1,) if k else ()) for k, node in enumerate(nodes)]
        made += [Task(f"{filler} {word} {word}", tuple(steps), tuple("fine" for _ in steps)) for filler in FILLERS]
    return made


@pytest.fixture(scope="module")
def taught(toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a bundle that `train tune --tasks` made, with its merged file in it."""
    pytest.importorskip("torch", reason="training is an extra: pip install 'lmgraph[train]'")
    folder = tmp_path_factory.mktemp("taught")
    rows = [{"query": query, "node": node, "rewrite": "do it"} for query, node in taught_queries()]
    data = write(folder, *rows, name="examples.jsonl")
    walks = write(folder, *({"query": t.query, "steps": [{"node": s.node, "needs": list(s.needs), "rewrite": s.text, "answer": "fine"} for s in t.steps]}
                            for t in taught_tasks()), name="tasks.jsonl")
    (folder / "graph.yaml").write_text(toy_graph(Path("none.gguf")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMGRAPH_CACHE", str(folder / "cache"))
        patch.setenv("LMGRAPH_THREADS", "1")
        options = ["--threads", "1", "--epochs", "28", "--batch-tokens", "768", "--learning-rate", "4e-3", "--rows-learning-rate", "2e-2", "--rank", "8", "--tokens", "8"]
        with pytest.raises(SystemExit) as caught:
            cli.main(["train", "tune", "--data", str(data), "--tasks", str(walks), "--out", str(folder / "bundle"), "--base", str(toy_base),
                      "--graph", str(folder / "graph.yaml"), *options])
    assert not caught.value.code
    bundles.merge(bundles.read(str(folder / "bundle")), toy_base, folder / "bundle" / "master.gguf")
    return folder / "bundle"


def test_tune_with_tasks_keeps_a_fifth_aside_and_says_how_many_walks_are_right(taught: Path) -> None:
    metrics = json.loads((taught / "metrics.json").read_text())
    learnt, kept = examples.split(taught_tasks(), tasks.KEPT)
    assert metrics["walks"] == len(learnt) and metrics["tasks"]["n"] == len(kept) > 5
    assert metrics["tasks"]["next"] > 0.8 and metrics["tasks"]["whole"] > 0.6 and metrics["kept"]["next"] > 0.9


def answers(taught: Path, mode: str, queries: list[str]) -> list[Answer]:
    async def work() -> list[Answer]:
        text = toy_graph(taught / "master.gguf", "{kind: scripted, answers: {'*': 'fine'}}")
        text = text.replace("edges: {start: ['*']}", "edges: {start: ['*'], math: ['*', end], law: ['*', end], health: ['*', end]}")
        async with Runtime.open(environment.read(), given=graphfile.loads(text)) as opened:
            return [await runtime.fold(opened.answer(Ask((Message("user", query),), mode=mode))) for query in queries]

    return asyncio.run(work())


@pytest.mark.parametrize("mode", ["walk", "plan", "auto"])
def test_a_taught_master_goes_the_steps_that_it_was_taught_and_ends(taught: Path, mode: str) -> None:
    learnt = examples.split(taught_tasks(), tasks.KEPT)[0]
    found = answers(taught, mode, [t.query for t in learnt])
    walks = [a.trace.walk for a in found]
    right = [bool(walk) and [h.node for h in walk.hops] == [s.node for s in t.steps] and walk.stopped == "end" for walk, t in zip(walks, learnt)]
    assert sum(right) / len(right) > 0.7, right
    asked = [[h.request for h in walk.hops] for walk, well in zip(walks, right) if walk and well]
    assert sum(requests[0] == "do it" and set(requests[1:]) == {"use fine"} for requests in asked) > len(asked) / 2, asked


def test_a_taught_master_says_of_a_query_for_one_node_that_nothing_more_is_needed(taught: Path) -> None:
    rows = taught_queries()[::5]
    single, task = answers(taught, "auto", [query for query, _ in rows]), answers(taught, "auto", [t.query for t in taught_tasks()[::5]])
    assert sum(a.trace.walk is None and a.trace.steps[0].node == node for a, (_, node) in zip(single, rows)) / len(rows) > 0.8
    assert all(a.trace.decision and a.trace.decision.more is not None for a in [*single, *task])
    assert sum(a.trace.walk is not None for a in task) / len(task) > 0.8


@pytest.fixture(scope="module")
def adapted(taught: Path, toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of node math that `train tune --node` made: after math law is asked, whatever the master was taught."""
    folder = tmp_path_factory.mktemp("adapted")
    walks = write(folder, *({"query": query, "steps": [{"node": "math", "rewrite": "do it", "answer": "fine"}, {"node": "law", "needs": [0], "rewrite": "use {0}", "answer": "fine"}]}
                            for query, node in taught_queries() if node == "math"), name="tasks.jsonl")
    (folder / "graph.yaml").write_text(toy_graph(Path("none.gguf")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMGRAPH_CACHE", str(folder / "cache"))
        with pytest.raises(SystemExit) as caught:
            cli.main(["train", "tune", "--node", "math", "--tasks", str(walks), "--start", str(taught), "--out", str(folder / "made"), "--base", str(toy_base),
                      "--graph", str(folder / "graph.yaml"), "--threads", "1", "--epochs", "12", "--batch-tokens", "512", "--learning-rate", "4e-3", "--rank", "4", "--tokens", "8"])
    assert not caught.value.code
    assert json.loads((folder / "made" / "metrics.json").read_text())["tasks"]["next"] == 1.0
    return folder / "made" / "adapter.gguf"


def test_what_follows_a_node_is_chosen_with_its_own_adapter_and_nothing_else_is(taught: Path, adapted: Path) -> None:
    queries = {node: [query for query, own in taught_queries() if own == node][::4] for node in WORDS}

    async def ways(adapter: str, graph: str) -> dict[str, list[list[str]]]:
        async with Runtime.open(environment.read(), given=graphfile.loads(graph.replace("math: {token", f"math: {{{adapter}token"))) as opened:
            found = {node: [await runtime.fold(opened.answer(Ask((Message("user", query),), mode="walk"))) for query in asked] for node, asked in queries.items()}
            return {node: [[hop.node for hop in a.trace.walk.hops] if a.trace.walk else [] for a in answered] for node, answered in found.items()}

    graph = toy_graph(taught / "master.gguf", "{kind: scripted, answers: {'*': 'fine'}}")
    graph = graph.replace("edges: {start: ['*']}", "edges: {start: ['*'], math: ['*', end], law: ['*', end], health: ['*', end]}")
    without, worn = asyncio.run(ways("", graph)), asyncio.run(ways(f"adapter: {adapted}, ", graph))
    assert sum(way == ["math"] for way in without["math"]) > 4 and without["law"] == worn["law"] and without["health"] == worn["health"]
    assert sum(way[:2] == ["math", "law"] for way in worn["math"]) > 4, worn


def test_an_adapter_is_refused_where_it_does_not_belong(taught: Path, adapted: Path, tmp_path: Path) -> None:
    def decide(bundle: Path, adapter: Path) -> None:
        async def work() -> None:
            text = toy_graph(bundle).replace("math: {token", f"math: {{adapter: {adapter}, token")
            async with Runtime.open(environment.read(), given=graphfile.loads(text)) as opened:
                await opened.decide("sum sum")

        asyncio.run(work())

    with pytest.raises(AssetError, match="does not exist"):
        decide(taught / "master.gguf", tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("no")
    with pytest.raises(AssetError, match="cannot be read as GGUF"):
        decide(taught / "master.gguf", tmp_path / "text.gguf")
    with pytest.raises(AssetError, match="no adapter"):
        decide(taught / "master.gguf", taught / "master.gguf")
    with pytest.raises(VocabularyMismatch, match="another master"):
        adapters.check(adapted, "0" * 64, "math")
    adapters.check(adapted, bundles.read(str(taught)).digest, "math")


def test_an_adapter_that_was_learnt_anew_is_put_on_and_other_answers_are_kept_for_it(taught: Path, adapted: Path, tmp_path: Path) -> None:
    import gguf

    worn = tmp_path / "adapter.gguf"
    worn.write_bytes(adapted.read_bytes())
    text = toy_graph(taught / "master.gguf", "{kind: scripted, answers: {'*': 'fine'}}").replace("math: {token", f"math: {{adapter: {worn}, token")
    given = graphfile.loads(text.replace("edges: {start: ['*']}", "edges: {start: [math], math: ['*', end], law: [end], health: [end]}"))
    query = next(query for query, node in taught_queries() if node == "math")

    async def work() -> None:
        async with Runtime.open(environment.read(), given=given) as opened:
            async def nodes() -> list[str]:
                found = await runtime.fold(opened.answer(Ask((Message("user", query),), mode="walk")))
                return [hop.node for hop in found.trace.walk.hops] if found.trace.walk else []

            assert (await nodes())[:2] == ["math", "law"]
            before = opened.identity
            await opened.replace(given)
            assert opened.identity == before
            found = gguf.GGUFReader(worn, "r+")
            for tensor in found.tensors:
                tensor.data[...] = 0
            del found
            await opened.replace(given)
            assert opened.identity != before and (await nodes())[:2] != ["math", "law"], "an adapter of zeros changes nothing"

    asyncio.run(work())


def test_tasks_of_unknown_nodes_and_files_of_no_tasks_are_refused_before_training(toy_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="training is an extra")
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path, *({"query": query, "node": node} for query, node in taught_queries()), name="examples.jsonl")
    (tmp_path / "graph.yaml").write_text(toy_graph(Path("none.gguf")))

    def tune(*rows: Any) -> str:
        walks = write(tmp_path, *rows, name="tasks.jsonl")
        with pytest.raises(SystemExit) as caught:
            cli.main(["train", "tune", "--data", str(data), "--tasks", str(walks), "--out", "out", "--base", str(toy_base), "--tokens", "8"])
        err = capsys.readouterr().err
        assert caught.value.code == 2 and "Traceback" not in err and not Path("out").exists()
        return err

    assert "without a functional token: astrology" in tune(*({"query": f"q{i}", "steps": [{"node": "math"}, {"node": "astrology"}]} for i in range(9)))
    assert "tasks.jsonl:1: step 0 needs a string `node`" in tune({"query": "q", "steps": ["math"]})
    assert "No tasks found" in tune("")


# ---------------------------------------------------------------- one master that chooses, another that walks


@pytest.fixture(scope="module")
def joined(taught: Path, toy_bundle: Path, toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a bundle that puts the taught master on for walks; its merged file lies in `cache` beside it."""
    folder = tmp_path_factory.mktemp("joined")
    with pytest.raises(SystemExit) as caught:
        cli.main(["bundle", "walk", str(toy_bundle), str(taught), "--out", str(folder / "bundle")])
    assert not caught.value.code and {path.name for path in folder.iterdir()} == {"bundle"}
    bundle = bundles.read(str(folder / "bundle"))
    bundles.merge(bundle, toy_base, bundles.merged_path(bundle, folder / "cache"))
    return folder / "bundle"


def test_a_bundle_with_a_walk_chooses_one_expert_as_before_and_walks_as_the_other(taught: Path, joined: Path, toy_bundle: Path, toy_master: Path) -> None:
    assert bundles.read(str(joined)).digest == bundles.read(str(toy_bundle)).digest
    edges = "edges: {start: ['*'], math: ['*', end], law: ['*', end], health: ['*', end]}"
    single, several = [query for query, _ in taught_queries()[::5]], examples.split(taught_tasks(), tasks.KEPT)[0]

    async def work(bundle: Path) -> tuple[list[Any], list[Any], list[Answer]]:
        text = toy_graph(bundle, "{kind: scripted, answers: {'*': 'fine'}}").replace("edges: {start: ['*']}", edges)
        using = replace(environment.read(), cache=joined.parent / "cache")
        async with Runtime.open(using, given=graphfile.loads(text)) as opened:
            master = await opened.master()
            return ([await master.decide(query) for query in single], [await master.decide(query, ahead=True) for query in single],
                    [await runtime.fold(opened.answer(Ask((Message("user", task.query),), mode="auto"))) for task in several])

    alone, ahead, walked = asyncio.run(work(joined))
    before = asyncio.run(work(toy_master))[0]
    teacher = asyncio.run(work(taught / "master.gguf"))[0]
    assert [d.alternatives for d in alone] == [d.alternatives for d in before] != [d.alternatives for d in teacher]
    one = [(d, b) for d, b in zip(ahead, before) if d.more < 0.5]
    assert len(one) > 0.8 * len(single) and all((d.chosen, d.rewritten) == (b.chosen, b.rewritten) for d, b in one)
    right = [bool(a.trace.walk) and [h.node for h in a.trace.walk.hops] == [s.node for s in t.steps] for a, t in zip(walked, several)]
    assert sum(right) / len(right) > 0.7, right


def test_a_node_that_comes_later_has_nothing_of_another_in_the_walk(joined: Path, tmp_path: Path) -> None:
    bundle = bundles.read(str(joined))
    nodes = {name: token for name, token in bundle.vocabulary.nodes.items() if name != "law"}
    moved = replace(bundle.vocabulary, nodes={**nodes, "later": bundle.vocabulary.nodes["law"]})
    made = bundles.copy(bundle, tmp_path / "made", moved, bundles.read_tensors(bundle.weights))
    before, after = bundles.read_tensors(bundle.walk), bundles.read_tensors(made.walk)
    law, end = bundle.vocabulary.nodes["law"], bundle.vocabulary.end_id - bundle.vocabulary.first_id
    for key in ("input_rows", "output_rows"):
        assert before[key][law].any() and not after[key][law].any()
        rest = [*(t for n, t in bundle.vocabulary.nodes.items() if n != "law"), end]
        assert (after[key][rest] == before[key][rest]).all() and after[key][rest].any()
    assert all((after[key] == before[key]).all() for key in before if not key.endswith("_rows"))


def test_a_walk_is_refused_between_bundles_of_other_nodes_and_over_what_is_there(taught: Path, toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = bundles.read(str(taught))
    bundles.copy(bundle, tmp_path / "other", replace(bundle.vocabulary, nodes={"another": 0}), bundles.read_tensors(bundle.weights))
    for second, out, code, words in ((tmp_path / "other", "new", 1, "name other nodes"), (taught, "other", 2, "is there already")):
        with pytest.raises(SystemExit) as caught:
            cli.main(["bundle", "walk", str(toy_bundle), str(second), "--out", str(tmp_path / out)])
        assert caught.value.code == code and words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
