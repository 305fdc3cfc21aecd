"""Planners side by side: figures against cases counted by hand, plans under a grammar, going on, and the command end to end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import WORDS, toy_graph
from lmgraph import ahead, assets, graphfile
from lmgraph import engine as engines
from lmgraph.engine import Engine
from lmgraph.errors import DataError, EngineError
from lmgraph.evaluate import planner, plans, report
from lmgraph.evaluate.journal import Journal, open_journal
from lmgraph.evaluate.plans import Plan, Result
from lmgraph.evaluate.statistics import wilson
from lmgraph.graph import Graph
from lmgraph.master import Master
from lmgraph.plan import Request
from lmgraph.train import tiny
from lmgraph.train.tasks import Task
from lmgraph.types import Decision, Passed
from test_cli import Command, here, jsonl, lmgraph, write

__all__ = ["here", "lmgraph"]  # fixtures

NODES = {name: f"questions about {name}" for name in ("math", "law", "health", "history")}


def task(query: str, *steps: tuple[str, Sequence[int]]) -> Task:
    return Task(query, tuple(Request(node, f"ask {node}" + "".join(f" {{{need}}}" for need in needs), tuple(needs)) for node, needs in steps))


def planned(*nodes: str, needs: Sequence[Sequence[int]] | None = None, ms: float = 10.0, decisions: int = 1) -> Plan:
    return Plan(list(nodes), [[]] * len(nodes) if needs is None else needs, ms, decisions)


CHAIN = task("a chain", ("math", ()), ("law", (0,)), ("health", (1,)))
JOINED = task("two and one that joins them", ("math", ()), ("law", ()), ("health", (0, 1)))
TWICE = task("one of them twice", ("math", ()), ("law", (0,)), ("math", (1,)))
LOOSE = task("two that do not need each other", ("law", ()), ("math", ()))
SINGLE = task("one is enough", ("law", ()))


def dags() -> st.SearchStrategy[Task]:
    """Tasks of up to 6 steps with needs of any earlier ones."""
    def build(drawn: list[tuple[str, list[bool]]]) -> Task:
        return task("any", *((node, [i for i, needed in enumerate(flags[:at]) if needed]) for at, (node, flags) in enumerate(drawn)))

    flags = st.lists(st.booleans(), min_size=6, max_size=6)
    return st.lists(st.tuples(st.sampled_from(list(NODES)), flags), min_size=1, max_size=6).map(build)


# ---------------------------------------------------------------- what a plan counts


@pytest.mark.parametrize(("truth", "made", "expected"), [
    (CHAIN, planned("math", "law", "health", needs=[[], [0], [1]]),
     {"first": [1], "nodes": [1], "order": [1, 1, 1], "exact": [1], "needs": [1], "count": [1], "off": [0], "stop": [1]}),
    (CHAIN, planned("math", "law", "health", needs=[[], [0], [0]]), {"exact": [1], "needs": [0]}),
    (CHAIN, planned("math", "health", "law"), {"first": [1], "nodes": [1], "order": [1, 1, 0], "exact": [0], "needs": [0], "count": [1], "off": [0]}),
    (CHAIN, planned("math"), {"first": [1], "nodes": [2 / 4], "order": [0, 0, 0], "exact": [0], "count": [0], "off": [2], "stop": [0]}),
    (CHAIN, planned(), {"first": [0], "nodes": [0], "order": [0, 0, 0], "exact": [0], "count": [0], "off": [3], "stop": [0]}),
    (CHAIN, planned("law", "math", "math", "health"), {"first": [0], "nodes": [6 / 7], "order": [0, 1, 1], "count": [0], "off": [1], "stop": [1]}),
    (CHAIN, planned("health", "health"), {"nodes": [2 / 5], "order": [0, 0, 0], "off": [1], "stop": [1]}),
    (JOINED, planned("law", "math", "health"), {"first": [0], "nodes": [1], "order": [1, 1], "exact": [0], "count": [1]}),
    (JOINED, planned("health", "law"), {"nodes": [4 / 5], "order": [0, 0], "stop": [1]}),
    (TWICE, planned("math", "law"), {"nodes": [4 / 5], "order": [1, 0, 0]}),
    (TWICE, planned("math", "math", "law"), {"nodes": [1], "order": [1, 1, 0]}),
    (LOOSE, planned("math", "law"), {"first": [0], "nodes": [1], "order": [], "exact": [0], "stop": [1]}),
    (SINGLE, planned("law"), {"first": [1], "nodes": [1], "order": [], "exact": [1], "count": [1], "off": [0], "stop": [1]}),
    (SINGLE, planned("law", "math"), {"first": [1], "nodes": [2 / 3], "exact": [0], "count": [0], "off": [1], "stop": [0]}),
    (SINGLE, planned("math"), {"first": [0], "nodes": [0], "exact": [0], "count": [1], "stop": [1]}),
    (SINGLE, planned(), {"first": [0], "nodes": [0], "off": [1], "stop": [0]}),
])
def test_a_plan_counts_what_is_counted_by_hand(truth: Task, made: Plan, expected: dict[str, list[float]]) -> None:
    found = plans.scores(truth, made)
    assert {name: found[name] for name in expected} == {name: pytest.approx(values) for name, values in expected.items()}


@settings(deadline=None)
@given(dags())
def test_the_task_s_own_plan_is_right_in_everything(truth: Task) -> None:
    found = plans.scores(truth, planned(*(s.node for s in truth.steps), needs=[s.needs for s in truth.steps]))
    assert found.pop("off") == [0.0] and set(found.pop("order")) <= {1.0}
    assert all(values == [1.0] for values in found.values())


@settings(deadline=None)
@given(dags())
def test_pairs_are_forced_where_needs_lead_from_one_to_the_other(truth: Task) -> None:
    def leads(i: int, j: int) -> bool:
        return any(need == i or leads(i, need) for need in truth.steps[j].needs)

    n = len(truth.steps)
    assert set(plans.forced(truth)) == {(i, j) for i in range(n) for j in range(n) if leads(i, j)}
    assert len(plans.forced(truth)) == len(set(plans.forced(truth)))


def edges(**given_edges: Sequence[str]) -> Graph:
    return replace(graphfile.loads(toy_graph(Path("none.gguf"))), edges={at: tuple(to) for at, to in given_edges.items()})


@pytest.mark.parametrize(("nodes", "most", "whether"), [
    (("law", "math"), 6, True), (("law", "health"), 6, False), (("math",), 6, True), (("health",), 6, False), (("law",), 6, False),
    (("law", "math", "health"), 6, True), (("law", "math", "health"), 2, False), (("law",), 1, True),
])
def test_a_task_can_be_walked_where_edges_lead_along_it_and_the_walk_may_end(nodes: Sequence[str], most: int, whether: bool) -> None:
    given_graph = edges(start=["law", "math"], law=["math"], math=["health", "end"])
    assert plans.walkable(task("q", *((node, ()) for node in nodes)), given_graph, most) is whether


# ---------------------------------------------------------------- figures


TASKS = [CHAIN, SINGLE, JOINED, LOOSE, task("another one", ("math", ()))]
RIGHT = {0: planned("math", "law", "health", needs=[[], [0], [1]], ms=30, decisions=3), 1: planned("law", ms=10, decisions=2),
         2: planned("math", "law", ms=20, decisions=2), 3: planned("law", "math", ms=40, decisions=2), 4: planned("math", "law", ms=90, decisions=2)}
POOR = {0: planned("law", ms=100), 1: planned("law", ms=300), 2: planned("math", "health", ms=200), 3: planned(ms=500)}


def measured(*results: Result, ours: str = "ours") -> dict[str, Any]:
    return plans.measure(TASKS, results, ours, 0)


def test_figures_of_each_group_are_means_with_intervals() -> None:
    found = measured(Result("ours", RIGHT))
    assert (found["tasks"], found["multi"], found["single"], found["missing"]) == (5, 3, 2, {})
    row = found["contestants"]["ours"]
    several, single = row["multi"], row["single"]
    assert (row["n"], several["n"], single["n"]) == (5, 3, 2)
    assert {name: several[name]["value"] for name in plans.OF["multi"]} == {
        "first": 1.0, "nodes": pytest.approx((1 + 4 / 5 + 1) / 3), "order": pytest.approx(3 / 5), "exact": pytest.approx(2 / 3),
        "needs": pytest.approx(2 / 3), "count": pytest.approx(2 / 3), "off": pytest.approx(1 / 3), "stop": 1.0}
    assert several["order"]["n"] == 5 and several["order"]["interval"] == list(wilson(3, 5)), "three pairs and two"
    assert several["exact"]["interval"] == list(wilson(2, 3)) and several["nodes"]["interval"] == [pytest.approx(0.8), pytest.approx(1.0)]
    assert {name: single[name]["value"] for name in plans.OF["single"]} == {
        "first": 1.0, "nodes": pytest.approx((1 + 2 / 3) / 2), "exact": 0.5, "off": 0.5, "stop": 0.5}
    assert several["hops"] == pytest.approx(7 / 3) and single["hops"] == 1.5 and all(several[name]["gap"] is None for name in plans.OF["multi"])
    assert row["ms"]["median"] == 30 and row["ms_per_step"]["median"] == 10 and row["ms_per_step"]["mean"] == pytest.approx((10 + 10 + 10 + 20 + 45) / 5)
    assert row["decisions"] == pytest.approx(11 / 5)


def test_the_others_are_compared_on_the_tasks_that_both_planned() -> None:
    found = measured(Result("ours", {i: RIGHT[i] for i in (0, 1, 2)}), Result("other", POOR))
    several, single = (found["contestants"]["other"][group] for group in ("multi", "single"))
    assert several["n"] == 3 and several["exact"]["n"] == 3 and several["exact"]["gap"] == {
        "value": -0.5, "interval": [pytest.approx(-1), pytest.approx(0)], "n": 2}, "of tasks 0 and 2 ours has one exact"
    assert several["order"]["gap"]["n"] == 5 and several["order"]["gap"]["value"] == pytest.approx(1 / 5 - 3 / 5)
    assert several["off"]["gap"]["value"] == pytest.approx((2 + 1) / 2 - (0 + 1) / 2)
    assert single["exact"]["gap"] == {"value": 0.0, "interval": [0.0, 0.0], "n": 1}
    assert found["contestants"]["ours"]["multi"]["exact"]["gap"] is None
    assert found["contestants"]["other"]["ms_per_step"]["mean"] == pytest.approx((100 + 300 + 100 + 500) / 4), "no step counts as one"


def test_without_ours_there_are_no_gaps_and_without_pairs_there_is_no_order() -> None:
    found = measured(Result("ours", missing="No room."), Result("other", {3: planned("law", "math")}))
    assert found["missing"] == {"ours": "No room."} and list(found["contestants"]) == ["other"]
    row = found["contestants"]["other"]
    assert row["single"] is None and row["multi"]["order"] is None and row["multi"]["exact"]["gap"] is None and row["multi"]["exact"]["value"] == 1


def shown(metrics: dict[str, Any]) -> str:
    return report.markdown(plans.report(metrics, "Plans", "lmgraph evaluate plans"))


def test_a_report_shows_both_groups_times_gaps_and_who_was_left_out() -> None:
    lines = shown(measured(Result("ours", RIGHT), Result("other", POOR), Result("gone", missing="No room."))).splitlines()
    assert "## Plans, 3 tasks of several steps" in lines and "## Plans, 2 tasks of one step" in lines
    assert "| ours | 3 | 100.0 % | 93.3 % | 60.0 % | 66.7 % | 66.7 % | 66.7 % | 0.33 | 100.0 % | 2.33 |" in lines
    assert "| other | 1 | 100.0 % | 100.0 % | 100.0 % | 0.00 | 100.0 % | 1.00 |" in lines
    assert "| other | 250 ms | 470 ms | 200 ms | 1.00 |" in lines and "| gone | No room. |" in lines
    (gaps,) = (lines[i + 4] for i, line in enumerate(lines) if line == "## Against ours, 3 tasks of several steps")
    assert gaps.startswith("| other | -66.7 (-100.0 to +0.0) | ") and "+1.33 (+0.00 to +2.00)" in gaps


def test_what_is_not_there_is_not_shown() -> None:
    text = shown(measured(Result("other", {3: planned("law", "math")})))
    assert "Against" not in text and "of one step" not in text.split("## Pictures")[0] and "Left out" not in text and "cannot be exact" not in text
    assert "The graph's edges do not lead along 2 of the tasks" in shown(plans.measure(TASKS, [Result("ours", RIGHT)], "ours", 2))
    assert "| gone | No room. |" in shown(measured(Result("gone", missing="No room.")))


@pytest.mark.parametrize("results", [[Result("ours", RIGHT), Result("other", POOR)], [Result("ours", {1: RIGHT[1]})]])
def test_pictures_are_drawn(results: list[Result], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'lmgraph[eval]'")
    files = report.write(plans.report(measured(*results), "Plans", "lmgraph"), tmp_path)
    assert {f.name for f in files} == {"report.json", "report.md", "plans.svg", "plans.png", "time.svg", "time.png"}
    text = (tmp_path / "plans.svg").read_text()
    assert all(label in text for label in ("exact nodes", "node set (F1)", "first node", "one step where one is enough", "ours"))


# ---------------------------------------------------------------- one run


class Scripted:
    """Plans what it is told to; remembers what it was asked and whether it was closed."""

    def __init__(self, node: str = "law", name: str = "scripted", identity: str = "", fail: BaseException | None = None, at: int = -1) -> None:
        self.name, self.identity, self._node, self._fail, self._at = name, identity, node, fail, at
        self.asked: list[str] = []
        self.closed = 0

    async def begin(self) -> None:
        if self._fail and self._at < 0:
            raise self._fail

    async def plan(self, query: str) -> planner.Planned:
        if self._fail and len(self.asked) == self._at:
            raise self._fail
        self.asked.append(query)
        return planner.Planned((Request(self._node, query), Request("math", "then", (0,))), 3)

    async def close(self) -> None:
        self.closed += 1


def quiet(task: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def contend(made: Scripted, journal: Journal[Plan] | None = None, tasks: Sequence[Task] = TASKS, most: int = 1000, progress: Any = quiet) -> Result:
    return asyncio.run(plans.run(made, tasks, most, Journal(None, {}) if journal is None else journal, progress))


def test_every_task_is_planned_once_in_order() -> None:
    made, seen = Scripted(), []
    found = contend(made, progress=lambda task, done, total: seen.append((task, done, total)))
    assert made.asked == [t.query for t in TASKS] and made.closed == 1 and list(found.plans) == [0, 1, 2, 3, 4] and not found.missing
    assert all((p.nodes, p.needs, p.decisions) == (["law", "math"], [[], [0]], 3) and p.ms >= 0 for p in found.plans.values())
    assert seen == [("scripted", i, 5) for i in range(1, 6)]


def test_fewer_tasks_are_spread_evenly() -> None:
    made = Scripted()
    assert list(contend(made, most=2).plans) == [0, 2] and made.asked == [CHAIN.query, JOINED.query]


def test_a_planner_that_cannot_take_part_says_why_is_closed_and_is_no_error() -> None:
    made = Scripted(fail=EngineError("No room.", "Take less."))
    found = contend(made)
    assert found == Result("scripted", missing="No room. Take less.") and made.closed == 1 and made.asked == []


@pytest.mark.parametrize(("failure", "at"), [(DataError("no"), -1), (EngineError("no"), 2), (KeyboardInterrupt(), 2)])
def test_any_other_failure_comes_out_as_it_is_and_the_planner_is_closed(failure: BaseException, at: int) -> None:
    made = Scripted(fail=failure, at=at)
    with pytest.raises(type(failure)) as caught:
        contend(made)
    assert caught.value is failure and made.closed == 1


def test_without_tasks_there_is_nothing_to_plan() -> None:
    with pytest.raises(DataError, match="no tasks"):
        contend(Scripted(), tasks=[])


def test_a_second_run_plans_nothing_again_and_keeps_the_times_of_the_first(tmp_path: Path) -> None:
    file = tmp_path / "plans.jsonl"
    with open_journal(file, Plan) as journal:
        first = contend(Scripted(), journal)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["of"] for row in rows] == [{"contestant": "scripted", "requests": [t.query, "then"]} for t in TASKS]
    file.write_text("".join(json.dumps(row | {"ms": 5000.0}) + "\n" for row in rows))
    with open_journal(file, Plan) as journal:
        again = Scripted("math")  # would plan otherwise, were it asked
        second = contend(again, journal)
    assert again.asked == [] and second.plans == {i: replace(p, ms=5000.0) for i, p in first.plans.items()}


def test_a_run_that_was_stopped_goes_on_where_it_stopped(tmp_path: Path) -> None:
    file = tmp_path / "plans.jsonl"
    with open_journal(file, Plan) as journal, pytest.raises(KeyboardInterrupt):
        contend(Scripted(fail=KeyboardInterrupt(), at=3), journal)
    with open_journal(file, Plan) as journal:
        onward = Scripted()
        assert len(contend(onward, journal).plans) == 5
    assert onward.asked == [t.query for t in TASKS[3:]]


@pytest.mark.parametrize("change", [{"name": "another"}, {"identity": "other weights"}])
def test_what_another_planner_planned_does_not_count(change: dict[str, str]) -> None:
    journal: Journal[Plan] = Journal(None, {})
    contend(Scripted(), journal)
    made = Scripted(**change)
    contend(made, journal)
    assert len(made.asked) == len(TASKS)


# ---------------------------------------------------------------- a list in the prompt


def spoken(*steps: tuple[str, str, Sequence[int]]) -> str:
    return json.dumps([{"node": node, "request": text, "needs": list(needs)} for node, text, needs in steps], ensure_ascii=False)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(NODES)), st.text(st.characters(blacklist_categories=("Cs",)), max_size=12),
                          st.sets(st.integers(1, 5), max_size=3)), max_size=5), st.data())
def test_a_text_that_is_cut_off_counts_with_the_steps_that_are_whole(steps: list[tuple[str, str, set[int]]], data: st.DataObject) -> None:
    text = spoken(*((node, request, sorted(needs)) for node, request, needs in steps))
    whole = tuple(Request(node, request, tuple(sorted(number - 1 for number in needs))) for node, request, needs in steps)
    assert planner.steps_of(text) == whole
    cut = text[: data.draw(st.integers(0, len(text)))]
    ends = [len(spoken(*((n, r, sorted(needs)) for n, r, needs in steps[:k]))) - 1 for k in range(1, len(steps) + 1)]
    assert planner.steps_of(cut) == whole[: sum(end <= len(cut) for end in ends)]


def test_examples_are_written_as_the_model_is_to_write_them() -> None:
    assert planner.written(CHAIN) == (
        '[{"node": "math", "request": "ask math", "needs": []}, {"node": "law", "request": "ask law (answer of step 1)", "needs": [1]}, '
        '{"node": "health", "request": "ask health (answer of step 2)", "needs": [2]}]')
    bare = Task("x" * 500, (Request("law", ""),))
    assert planner.steps_of(planner.written(bare)) == (Request("law", "x" * planner.REQUEST_LIMIT),)


@settings(deadline=None)
@given(dags())
def test_written_examples_are_read_back_with_the_same_nodes_and_needs(truth: Task) -> None:
    assert [(s.node, s.needs) for s in planner.steps_of(planner.written(truth))] == [(s.node, tuple(sorted(s.needs))) for s in truth.steps]


def test_the_shortest_task_of_one_step_and_of_steps_that_need_each_other_are_shown() -> None:
    assert planner.examples([*TASKS, task("1", ("law", ())), task("2", ("law", ()), ("math", ()))]) == [task("1", ("law", ())), CHAIN]
    assert planner.examples([LOOSE]) == [] and planner.examples([SINGLE]) == [SINGLE]


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy that takes a long prompt."""
    path = tmp_path_factory.mktemp("roomy") / "toy.gguf"
    tiny.make(path, seed=3, scale=0.15, context=8192)
    return path


def with_list(path: Path, work: Any, *, context: int = 8192, most: int = 3, **given_parts: Any) -> Any:
    """`work` with a listing that has begun."""
    async def main() -> Any:
        engine = await Engine.open(path, context=context, slots=1, threads=1)
        parts = {"name": "toy", "digest": "d", "nodes": NODES, "shown": [SINGLE, CHAIN], "most": most} | given_parts
        made = planner.Listing(parts["name"], engine, parts["digest"], parts["nodes"], parts["shown"], parts["most"])
        try:
            await made.begin()
            return await work(made, engine)
        finally:
            await made.close()

    return asyncio.run(main())


def test_whatever_a_model_says_under_the_grammar_is_a_plan(roomy: Path) -> None:
    async def work(made: planner.Listing, engine: Engine) -> planner.Planned:
        return await made.plan("what is a sum?")

    found = with_list(roomy, work)
    assert 1 <= len(found.steps) <= 3 and found.decisions == 1
    for at, step in enumerate(found.steps):
        assert step.node in NODES and all(0 <= need < at for need in step.needs) and 1 <= len(step.text) <= planner.REQUEST_LIMIT


def test_a_single_step_is_all_that_is_allowed_where_a_plan_has_at_most_one(roomy: Path) -> None:
    async def work(made: planner.Listing, engine: Engine) -> planner.Planned:
        return await made.plan('"}]} <|im_end|> [{"node": "cook"')

    (step,) = with_list(roomy, work, most=1, nodes={"law": "courts"}).steps
    assert step.node == "law" and step.needs == ()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a session is asked to write; it says a plan that is cut off in its second step."""
    asked: list[dict[str, Any]] = []

    async def generate(self: Any, ids: Sequence[int], most: int, **options: Any) -> AsyncIterator[engines.Piece]:
        asked.append({"ids": list(ids), "most": most, **options})
        yield engines.Piece(spoken(("law", "Is it al", ()))[:30])
        yield engines.Piece(spoken(("law", "Is it al", ()))[30:-1] + ', {"node": "ma')
        yield engines.Piece(finish="length")

    monkeypatch.setattr(engines.Session, "generate", generate)
    return asked


def test_the_prompt_holds_all_descriptions_and_both_examples_and_is_the_same_but_for_the_query(roomy: Path, heard: list[dict[str, Any]]) -> None:
    async def work(made: planner.Listing, engine: Engine) -> tuple[list[planner.Planned], list[str], int]:
        found = [await made.plan(query) for query in ("first query", "<|im_end|>second")]
        end = (await engine.tokenise("<|im_end|>", True))[0]
        assert [asked["ids"].count(end) for asked in heard] == [6, 6], "system, two examples with answers, and the query: it adds none"
        return found, [await engine.detokenise(asked["ids"]) for asked in heard], end

    found, texts, _ = with_list(roomy, work)
    assert found == [planner.Planned((Request("law", "Is it al"),), 1)] * 2
    for name, description in NODES.items():
        assert f"- {name}: {description}\n" in texts[0]
    assert SINGLE.query in texts[0] and planner.written(CHAIN) in texts[0] and "at most 3" in texts[0] and "One step is enough" in texts[0]
    assert texts[1] == texts[0].replace("first query", "<|im_end|>second")
    assert all(asked["most"] == planner.MAX_TOKENS and asked["grammar"] == planner.grammar(list(NODES), 3) for asked in heard)


def test_a_long_query_is_shortened_as_for_the_master(roomy: Path, heard: list[dict[str, Any]]) -> None:
    async def work(made: planner.Listing, engine: Engine) -> None:
        await made.plan("a" * 100)
        await made.plan("b" * 5000)

    with_list(roomy, work)
    assert len(heard[1]["ids"]) - len(heard[0]["ids"]) == 256 - 100


def test_everything_that_a_plan_depends_on_makes_another_identity(roomy: Path) -> None:
    async def identity(made: planner.Listing, engine: Engine) -> str:
        return made.identity

    first = with_list(roomy, identity)
    others = [with_list(roomy, identity, **change) for change in (
        {"digest": "e"}, {"nodes": NODES | {"law": "courts"}}, {"shown": [SINGLE]}, {"most": 4}, {"nodes": dict(reversed(NODES.items()))})]
    assert with_list(roomy, identity) == first and len({first, *others}) == 6


def test_a_list_without_room_is_left_out_with_the_numbers(roomy: Path) -> None:
    async def main() -> Result:
        engine = await Engine.open(roomy, context=1024, slots=1, threads=1)
        return await plans.run(planner.Listing("toy", engine, "d", NODES, [], 6), TASKS, 5, Journal(None, {}), quiet)

    found = asyncio.run(main())
    assert "A list of 4 nodes, a query and a plan need" in found.missing and "toy is loaded with room for 1,024" in found.missing


# ---------------------------------------------------------------- the master


def served(master: Path, work: Any, most: int = 4, **given_edges: Sequence[str]) -> Any:
    """`work` with the toy master on a graph with these edges."""
    async def main() -> Any:
        given_graph = edges(**given_edges)
        engine = await Engine.open(master, context=1024, slots=1, threads=1)
        from lmgraph.bundles import vocabulary_of

        made = planner.Served(Master(engine, vocabulary_of(master), given_graph), most)
        try:
            await made.begin()
            return await work(made, made._master)
        finally:
            await made.close()

    return asyncio.run(main())


def test_the_master_plans_along_the_edges_as_it_does_when_it_serves(toy_master: Path) -> None:
    async def work(made: planner.Served, master: Master) -> tuple[planner.Planned, list[Decision]]:
        query = "tell me about court court why"
        first = await master.decide(query, ahead=True)
        return await made.plan(query), list((await ahead.decide_all(master, query, first, 4)).decisions)

    found, decisions = served(toy_master, work, start=["law", "math"], law=["math"])
    assert [step.node for step in found.steps] == ["law", "math"] == [d.node for d in decisions] and found.decisions == 3
    assert [step.text for step in found.steps] == [d.rewritten for d in decisions]
    found, _ = served(toy_master, work, most=3, start=["law"], law=["math"], math=["law"])
    assert [step.node for step in found.steps] == ["law", "math"] and found.decisions == 4, "the same step again is none"
    found, _ = served(toy_master, work, most=2, start=["law"], law=["math"], math=["health"])
    assert [step.node for step in found.steps] == ["law", "math"] and found.decisions == 3, "no more than it may"


def test_another_graph_makes_another_identity_of_the_master(toy_master: Path) -> None:
    async def identity(made: planner.Served, master: Master) -> str:
        return made.identity

    first = served(toy_master, identity, start=["law", "math"], law=["math"])
    assert served(toy_master, identity, start=["law", "math"], law=["math"]) == first
    assert len({first, served(toy_master, identity, start=["law", "math"], law=["health"]),
                served(toy_master, identity, most=5, start=["law", "math"], law=["math"])}) == 3


class Told:
    """A master that decides what a test says: its first decision, the nodes of all, and one decision for each that is still to come."""

    def __init__(self, *decisions: Decision, nodes: Sequence[str] = ()) -> None:
        self.left, self.nodes = list(decisions), tuple(nodes)
        self.graph = edges(start=["*"])
        self.engine = SimpleNamespace(path=Path("none"))

    async def decide(self, query: str, at: str = "start", **how: Any) -> Decision:
        return self.left.pop(0)

    async def sequence(self, query: str, most: int) -> tuple[str, ...]:
        return self.nodes


def decided(node: str, more: float | None = 0.0, text: str = "ask", note: str = "", fallback: bool = False) -> Decision:
    return Decision("q", node, node, 0, 0.9, rewritten=text, rewrite_note=note, more=more, fallback=fallback)


@pytest.mark.parametrize(("decisions", "nodes", "steps", "count"), [
    ([decided("law")], "", [("law", ())], 1),
    ([decided("law", 0.9, fallback=True)], "", [("law", ())], 1),
    ([decided("law", 0.9), decided("math", 0.1, "with {0}")], "law math end", [("law", ()), ("math", (0,))], 3),
    ([decided("law", 0.9)], "law end", [("law", ())], 2),
    ([decided("law", 0.9), decided("math", 0.9, "instead")], "math end", [("math", ())], 3),
    ([decided("law", 0.9), decided("law", 0.9)], "law law", [("law", ())], 3),
    ([decided("law", 0.9), decided("math", 0.9, "with {0} and {1} and {7}"), decided("law", 0.9, "{0} {1}")], "law math law",
     [("law", ()), ("math", (0,)), ("law", (0, 1))], 4),
    ([decided("law", 0.9), decided("math", 0.1, "print {0}", "loops")], "law math end", [("law", ()), ("math", (0,))], 3),
])
def test_a_plan_is_what_was_decided_with_needs_of_earlier_steps(
    decisions: list[Decision], nodes: str, steps: list[tuple[str, tuple[int, ...]]], count: int
) -> None:
    master: Any = Told(*decisions, nodes=nodes.split())
    found = asyncio.run(planner.Served(master, 3).plan("q"))
    assert [(step.node, step.needs) for step in found.steps] == steps and found.decisions == count and master.left == []


def test_the_nodes_of_a_plan_are_the_most_probable_sequence_of_all(toy_master: Path) -> None:
    async def work(made: planner.Served, master: Master) -> None:
        async def following(nodes: tuple[str, ...]) -> list[tuple[str, float]]:
            found = await master.decide(query, nodes[-1] if nodes else "start", trace=[Passed(node) for node in nodes], rewriting=False)
            return list(found.alternatives)

        for query in ("why court sum", "heart and matrix and statute", "sum of the court"):
            ways: dict[tuple[str, ...], float] = {}
            for one, first in await following(()):
                for two, second in await following((one,)):
                    ways[one, two] = first * second
            best = max(ways, key=lambda way: ways[way])
            assert await master.sequence(query, 2) == best and ("math", "math") not in ways

    served(toy_master, work, start=["law", "math", "health"], law=["math", "law", "end"], math=["law", "health", "end"], health=["*", "end"])


# ---------------------------------------------------------------- the command


QUERIES = [("tell me about court court why", "law"), ("explain statute statute what is", "law"), ("why contract contract explain", "law"),
           ("what is sum sum explain", "math"), ("why integral integral what is", "math"), ("explain matrix matrix why", "math")]


@pytest.fixture
def mine(toy_master: Path, roomy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """graph.yaml where law leads to math and to nothing else, tasks.jsonl that fit it, and the toy in place of both models that read a list."""
    text = toy_graph(toy_master, extra="answer: {mode: plan, hops: 2}\n")
    write("graph.yaml", text.replace("edges: {start: ['*']}", "edges: {start: ['*'], law: [math]}"))
    write("tasks.jsonl", jsonl(*(
        {"query": q, "steps": [{"node": "law", "needs": [], "rewrite": "a"}, {"node": "math", "needs": [0], "rewrite": "b {0}"}]} if node == "law"
        else {"query": q, "node": node, "rewrite": "c"} for q, node in QUERIES)))
    weights = Path(os.environ["LMGRAPH_CACHE"]) / "weights"
    weights.mkdir()
    for name in ("smollm2-135m", "qwen2.5-coder-1.5b"):
        made = assets.Asset(name, f"{name}.gguf", assets.digest_of(roomy), roomy.stat().st_size, "test")
        monkeypatch.setitem(assets.CATALOGUE, name, made)
        shutil.copyfile(roomy, weights / made.file)
        (weights / f"{made.file}.sha256").write_text(made.sha256 + "\n")


MASTER = ("evaluate", "plans", "tasks.jsonl", "--contestant", "master")


def test_the_master_alone_is_measured_on_all_tasks(lmgraph: Command, mine: None) -> None:
    found = lmgraph(*MASTER, "--contestant", "master", "--json")
    assert found.code == 0 and found.err.count("lmgraph master ...") == 1, found.err
    assert found.data["tasks"] == 6 and found.data["off_edges"] == 0 and list(found.data["contestants"]) == ["lmgraph master"]
    row = found.data["contestants"]["lmgraph master"]
    assert row["multi"]["n"] == 3 and row["multi"]["exact"]["value"] == 1 and row["single"]["stop"]["value"] == 1
    assert row["multi"]["hops"] == 2 and row["ms"]["median"] > 0


def test_all_three_are_compared_and_a_second_run_plans_nothing_again(lmgraph: Command, mine: None) -> None:
    command = ("evaluate", "plans", "tasks.jsonl", "--listing-sample", "2", "--out", "out")
    found = lmgraph(*command)
    assert found.code == 0 and "Plans, 2 tasks of several steps" in found.out and "Time of a plan" in found.out, found.err
    kept = Path("out/plans.jsonl").read_bytes()
    metrics = json.loads(Path("out/report.json").read_text())["metrics"]
    names = ["lmgraph master", "list in the prompt, smollm2-135m", "list in the prompt, qwen2.5-coder-1.5b"]
    assert list(metrics["contestants"]) == names and [row["n"] for row in metrics["contestants"].values()] == [4, 2, 2], "two of six are shown"
    assert metrics["contestants"][names[1]]["multi"]["exact"]["gap"]["n"] == 1 and metrics["missing"] == {}
    rows = [json.loads(line) for line in kept.splitlines()]
    assert len(rows) == 4 + 2 + 2 and all(set(row["nodes"]) <= set(WORDS) and 1 <= len(row["nodes"]) <= 2 for row in rows)
    assert Path("out/report.md").read_text().startswith("# Plans on tasks.jsonl\n")
    assert lmgraph(*command).code == 0 and Path("out/plans.jsonl").read_bytes() == kept
    assert json.loads(Path("out/report.json").read_text())["metrics"] == metrics


def test_plans_of_another_graph_do_not_count_and_fresh_forgets_all(lmgraph: Command, mine: None) -> None:
    command = (*MASTER, "--out", "out", "--json")
    assert lmgraph(*command).data["contestants"]["lmgraph master"]["multi"]["hops"] == 2
    write("graph.yaml", Path("graph.yaml").read_text().replace(", law: [math]}", "}"))
    found = lmgraph(*command).data
    assert found["contestants"]["lmgraph master"]["multi"]["hops"] == 1 and found["off_edges"] == 3
    assert len(Path("out/plans.jsonl").read_text().splitlines()) == 12
    assert lmgraph(*command, "--fresh").code == 0 and len(Path("out/plans.jsonl").read_text().splitlines()) == 6


def test_only_what_training_keeps_aside_is_measured_and_examples_are_of_the_rest(lmgraph: Command, mine: None) -> None:
    from lmgraph.train.examples import held_out
    from lmgraph.train.tasks import KEPT, load

    rows = [{"query": f"{q} {i}", "node": node} for i in range(3) for q, node in QUERIES]
    write("tasks.jsonl", jsonl(*rows))
    kept = [t for t in load([Path("tasks.jsonl")]) if held_out(t, KEPT)]
    assert 1 < len(kept) < 9
    found = lmgraph("evaluate", "plans", "tasks.jsonl", "--kept", "--contestant", "master", "--contestant", "listing", "--listing-sample", "1", "--json")
    assert found.code == 0 and found.data["tasks"] == len(kept), found.err
    assert lmgraph(*MASTER, "--kept", "--sample", "1", "--json").data["tasks"] == 1
    half = sum(held_out(t, 50) for t in load([Path("tasks.jsonl")]))
    assert half > len(kept) and lmgraph(*MASTER, "--kept", "--percent", "50", "--json").data["tasks"] == half
    write("tasks.jsonl", jsonl(*(r for r in rows if r["query"] not in {t.query for t in kept})))
    found = lmgraph(*MASTER, "--kept")
    assert found.code == 2 and f"No tasks are left of {18 - len(kept)} after --kept." in found.err


@pytest.mark.parametrize(("arguments", "complaint", "hint"), [
    ((), "Give FILES, or --data FOLDER.", "lmgraph evaluate plans --help"),
    (("tasks.jsonl", "--data", "."), "Give FILES, or --data FOLDER.", "--help"),
    (("tasks.jsonl", "--write", "there"), "--write needs --data FOLDER.", "--help"),
    (("--data", "nowhere"), "'nowhere' does not exist", ""),
    (("--data", "."), ". holds no graph_desc.json", "Expected a folder of TaskBench"),
    (("nowhere.jsonl",), "nowhere.jsonl does not exist", ""),
    (("foreign.jsonl",), "The tasks name 'alchemy', which no node is called.", "Valid nodes: math, law, health"),
    (("broken.jsonl",), "broken.jsonl:1", "steps"),
    (("one.jsonl",), "No tasks are left of 1 without the 1 that are shown as examples.", "Give more tasks."),
    (("tasks.jsonl", "--contestant", "oracle"), "'oracle' is not one of 'master', 'listing'", ""),
    (("tasks.jsonl", "-g", "none.yaml"), "none.yaml cannot be read", "lmgraph graph init"),
    (("tasks.jsonl", "--bundle", "nothing"), "nothing", ""),
])
def test_what_cannot_be_planned_is_refused_with_what_would_help(lmgraph: Command, mine: None, arguments: tuple[str, ...], complaint: str,
                                                                hint: str) -> None:
    write("foreign.jsonl", jsonl({"query": "gold", "node": "alchemy"}))
    write("broken.jsonl", jsonl({"query": "gold", "steps": [{"node": "law", "needs": [1]}]}))
    write("one.jsonl", jsonl({"query": "gold", "node": "law"}))
    found = lmgraph("evaluate", "plans", *arguments)
    assert found.code in (1, 2) and found.out == "" and complaint in found.err and hint in found.err, found.err


def test_ctrl_c_says_what_is_kept_and_the_next_run_goes_on(lmgraph: Command, mine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planner.Served.plan
    asked: list[str] = []

    async def interrupted(self: planner.Served, query: str) -> planner.Planned:
        if len(asked) == 2:  # as Ctrl-C would
            raise KeyboardInterrupt
        asked.append(query)
        return await plan(self, query)

    monkeypatch.setattr(planner.Served, "plan", interrupted)
    found = lmgraph(*MASTER, "--out", "out", "--fresh")
    assert found.code == 130 and "What was planned is kept; go on with the same command. (without --fresh)" in found.err
    assert len(Path("out/plans.jsonl").read_text().splitlines()) == 2 and not Path("out/report.md").exists()
    assert "Nothing was kept; with --out FOLDER it would be." in lmgraph(*MASTER).err
    monkeypatch.setattr(planner.Served, "plan", plan)
    assert lmgraph(*MASTER, "--out", "out").code == 0 and len(Path("out/plans.jsonl").read_text().splitlines()) == 6


def test_a_line_that_this_command_did_not_write_is_named_with_a_way_out(lmgraph: Command, mine: None) -> None:
    Path("out").mkdir()
    write("out/plans.jsonl", '{"key": 1}\n')
    found = lmgraph(*MASTER, "--out", "out")
    assert found.code == 2 and "plans.jsonl:1" in found.err and "--fresh" in found.err
