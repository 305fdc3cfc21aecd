"""Walks: hop by hop and by a plan, parts of one answer, failures, limits and their end; the master is a script, the workers are real ones."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from conftest import WORDS, toy_graph
from lmgraph import ahead, execute, graphfile, plan, runtime, walking
from lmgraph import settings as environment
from lmgraph.errors import EngineError, OutsideError, QueryError, WorkerError, WorkerTimeout
from lmgraph.graph import AnswerSpec, Graph
from lmgraph.limits import Limits, TimeOver, cost
from lmgraph.runtime import Runtime
from lmgraph.types import Answer, Ask, Decision, Delta, Message, Passed, Progress, Step, Trace, Walk
from lmgraph.walking import COMPOSE, SHOWN, Walking

QUERY = "the whole query"
ASK = Ask((Message("user", QUERY),))
BROKEN = "! out of order"
KNOWN = "\n\nWhat other experts have answered so far:\n"


@pytest.fixture(autouse=True)
def one_thread(own_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMGRAPH_THREADS", "1")


def graph_of(workers: Mapping[str, str], edges: str = "{start: ['*']}", **prices: str) -> Graph:
    """Nodes name -> answer or worker ('name>other' has a fallback); `prices` of their workers."""
    rows = []
    for i, (key, said) in enumerate(workers.items()):
        name, _, other = key.partition(">")
        worker = said if said.startswith("{kind") else json.dumps({"kind": "scripted", "retries": 0, "answers": {"*": said}})
        if name in prices:
            worker = f"{worker[:-1]}, price: {prices[name]}}}"
        rows.append(f"  {name}: {{token: {i}, description: d, worker: {worker}{f', fallback: {other}' if other else ''}}}\n")
    return graphfile.loads(f"version: 1\nnodes:\n{''.join(rows)}edges: {edges}\n")


def hop(node: str, request: str = "", more: float = 1.0, note: str = "") -> Decision:
    """A decision for a hop; without a request it has a note, and the worker is to get the whole query."""
    note = note or ("" if request else "invented the number 7")
    return Decision(QUERY, node, node, 0, 0.9, rewritten=request or QUERY, rewrite_note=note, more=more, written=() if note else (len(request),))


OVER = Decision(QUERY, "end", "end", -1, 0.8)


@dataclass
class Script:
    """A master that decides what a test says, one decision after the other, and keeps what it was asked."""

    todo: list[Decision]
    first: Decision | None = None
    asked: list[tuple[str, tuple[Passed, ...]]] = field(default_factory=list)

    async def decide(self, query: str, at: str, *, trace: Sequence[Passed], ahead: bool, among: Sequence[str] | None = None) -> Decision:
        assert (query, ahead) == (QUERY, not trace or among is None)
        self.asked.append((at, tuple(trace)))
        made = self.todo.pop(0)
        assert among is None or among == [made.node]
        return made

    async def sequence(self, query: str, most: int) -> tuple[str, ...]:
        """The nodes of a plan: those of the script, up to the one that expects no more."""
        assert query == QUERY and self.first
        nodes = [self.first.node]
        for made in self.todo[: most - 1]:
            nodes.append(made.node)
            if made.node != "end" and made.more is not None and made.more < 0.5:
                nodes.append("end")
            if nodes[-1] == "end":
                break
        return tuple(nodes)


@dataclass
class Walked:
    """A walk and all that was seen of it."""

    master: Script
    events: list[Progress] = field(default_factory=list)
    answering: list[str] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    asked: dict[str, list[str]] = field(default_factory=dict)
    """node -> requests, of scripted workers"""
    trace: Trace = field(default_factory=Trace)
    watch: Callable[[], None] = lambda: None
    """called after every event and every piece"""

    def note(self, event: Progress) -> None:
        self.events.append(event)
        self.watch()

    async def run(self, graph: Graph, first: Decision, mode: str, ask: Ask, limits: Mapping[str, Any]) -> None:
        async with Runtime.open(environment.read(), given=graph) as opened:
            one = partial(execute.run, open_worker=opened.worker, max_tokens=ask.max_tokens, temperature=ask.temperature, options=ask.options)
            walk = Walking(AnswerSpec(mode, **limits), graph, self.master, ask, one, partial(self._chain, graph), self.note, self.answering.append)  # type: ignore[arg-type]
            try:
                async for item in walk.run(first):
                    if isinstance(item, Step):
                        self.trace = replace(self.trace, steps=(*self.trace.steps, item))
                    elif isinstance(item, Walk):
                        self.trace = replace(self.trace, walk=item)
                    else:
                        assert not (self.deltas and self.deltas[-1].done), "the last piece is the last"
                        self.deltas.append(replace(item, trace=self.trace) if item.done else item)
                        self.watch()
            finally:
                for name, node in graph.nodes.items():
                    if node.worker.kind == "scripted":
                        self.asked[name] = [m[-1].content for m in (await opened.worker(node)).asked]  # type: ignore[attr-defined]
                began, ended = ([e.hop for e in self.events if e.kind == kind] for kind in ("began", "ended"))
                assert sorted(began) == sorted(ended), "every hop that began has ended, once"

    @staticmethod
    def _chain(graph: Graph, name: str) -> list[Any]:
        return [graph.nodes[other] for other in [graph.nodes[name].fallback] if other]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def walk(self) -> Walk:
        last = self.deltas[-1]
        assert last.done and last.trace and last.trace.walk
        return last.trace.walk

    @property
    def steps(self) -> list[tuple[str, int | None, str]]:
        """(node, hop, error) of every step in the trace."""
        return [(step.node, step.hop, step.error) for step in self.trace.steps]


async def walked(graph: Graph, decisions: Sequence[Decision], mode: str = "walk", ask: Ask = ASK, seen: Walked | None = None, **limits: Any) -> Walked:
    made = seen or Walked(Script([]))
    made.master.todo, made.master.first = list(decisions[1:]), decisions[0]
    await made.run(graph, decisions[0], mode, ask, limits)
    return made


def walk(graph: Graph, decisions: Sequence[Decision], mode: str = "walk", ask: Ask = ASK, **limits: Any) -> Walked:
    return asyncio.run(walked(graph, decisions, mode, ask, **limits))


ECHO = {"math": "M({})", "law": "L({})", "health": "H({})"}


# ---------------------------------------------------------------- hop by hop


def test_the_next_hop_is_decided_when_the_one_before_has_answered_and_gets_its_answer() -> None:
    found = walk(graph_of(ECHO), [hop("math", "sum it"), hop("law", "judge {0}", more=0.1)])
    assert found.text == "L(judge M(sum it))" and found.asked == {"math": ["sum it"], "law": ["judge M(sum it)"], "health": []}
    assert found.master.asked == [("math", (Passed("math", (6,), "M(sum it)"),))]
    assert found.steps == [("math", 0, ""), ("law", 1, "")]
    assert [(h.node, h.request, h.needs) for h in found.walk.hops] == [("math", "sum it", ()), ("law", "judge M(sum it)", (0,))]
    assert (found.walk.mode, found.walk.stopped, found.walk.compose) == ("walk", "end", "")
    assert found.deltas[-1].usage == {"prompt_tokens": 2 + 3, "completion_tokens": 2 + 3}, "of all hops together"


def test_the_last_answer_streams_and_earlier_hops_are_progress() -> None:
    found = walk(graph_of({**ECHO, "law": "one two three"}), [hop("math", "sum it"), hop("law", "judge {0}", more=0.1)])
    assert [delta.text for delta in found.deltas] == ["one", " two", " three", ""]
    assert [(e.kind, e.hop, e.node, e.request) for e in found.events] == [
        ("began", 0, "math", "sum it"), ("ended", 0, "math", "sum it"), ("began", 1, "law", "judge M(sum it)"), ("ended", 1, "law", "judge M(sum it)")]
    ended = [e.step for e in found.events if e.kind == "ended"]
    assert [step and (step.answer, step.error, step.ms > 0) for step in ended] == [("M(sum it)", "", True), ("one two three", "", True)]
    assert found.answering == ["law"], "the node whose worker gives the answer"
    data = found.events[1].to_json()
    assert data["kind"] == "ended" and data["answer"] == "M(sum it)" and data["ms"] > 0 and json.dumps(data)


def test_a_walk_of_one_hop_is_that_hops_answer() -> None:
    found = walk(graph_of(ECHO), [hop("law", "judge", more=0.0)])
    assert found.text == "L(judge)" and found.steps == [("law", 0, "")] and found.walk.stopped == "end" and found.master.asked == []


def test_where_the_end_is_chosen_the_last_answer_is_given() -> None:
    found = walk(graph_of(ECHO), [hop("math", "sum it"), hop("law", "judge {0}"), OVER])
    assert found.text == "L(judge M(sum it))" and found.walk.stopped == "end" and found.answering == ["law"]
    assert [at for at, _ in found.master.asked] == ["math", "law"]
    assert found.master.asked[1][1] == (Passed("math", (6,), "M(sum it)"), Passed("law", (9,), "L(judge M(sum it))"))


def test_a_hop_may_use_any_answer_before_it() -> None:
    found = walk(graph_of(ECHO), [hop("math", "a"), hop("law", "b {0}"), hop("health", "{1} | {0} | {1}", more=0.0)])
    assert found.text == "H(L(b M(a)) | M(a) | L(b M(a)))" and found.walk.hops[2].needs == (0, 1) and found.walk.compose == ""


def test_the_systems_words_go_to_every_worker_and_the_query_to_none() -> None:
    async def work() -> None:
        graph = graph_of(ECHO)
        seen: list[Any] = []
        async with Runtime.open(environment.read(), given=graph) as opened:
            ask = Ask((Message("system", "be brief"), Message("developer", "in verse"), Message("user", QUERY)))
            one = partial(execute.run, open_worker=opened.worker)
            script: Any = Script([hop("law", "judge {0}", more=0.0)])
            async for _ in Walking(AnswerSpec("walk"), graph, script, ask, one, lambda name: []).run(hop("math", "sum it")):
                pass
            for name in ("math", "law"):
                worker: Any = await opened.worker(graph.nodes[name])
                seen += worker.asked
        assert [[(m.role, m.content) for m in messages] for messages in seen] == [
            [("system", "be brief"), ("developer", "in verse"), ("user", text)] for text in ("sum it", "judge M(sum it)")]

    asyncio.run(work())


# ---------------------------------------------------------------- requests that the guard refused, texts that look like more


def test_without_a_request_of_its_own_a_hop_gets_the_whole_query_and_what_is_known() -> None:
    found = walk(graph_of(ECHO), [hop("math"), hop("law"), hop("health", more=0.0)])
    first, second = f"M({QUERY})", f"L({QUERY}{KNOWN}math: M({QUERY}))"
    assert found.asked["math"] == [QUERY] and found.asked["law"] == [f"{QUERY}{KNOWN}math: {first}"]
    assert found.asked["health"] == [f"{QUERY}{KNOWN}math: {first}\n\nlaw: {second}"]
    assert [h.needs for h in found.walk.hops] == [(), (0,), (0, 1)] and found.walk.compose == "", "nothing is left to compose"


@pytest.mark.parametrize("mode", ["walk", "plan"])
def test_braces_that_a_user_wrote_stay_as_they_are(mode: str) -> None:
    query = "what does '{0} {1}'.format(a, b) give?"
    ask = Ask((Message("user", query),))
    graph = graph_of(ECHO)
    first = Decision(query, "math", "math", 0, 0.9, rewritten=query, rewrite_note="{0} stands in the query itself", more=0.0)
    found = walk(graph, [first], mode, ask)
    assert found.asked["math"] == [query] and found.walk.hops[0].needs == () and found.text == f"M({query})"


def test_an_answer_with_places_in_it_is_text() -> None:
    found = walk(graph_of({**ECHO, "math": "{0} and {1} and <fn_1>"}), [hop("math", "a"), hop("law", "b {0}", more=0.0)])
    assert found.asked["law"] == ["b {0} and {1} and <fn_1>"]


def test_long_answers_are_cut_with_a_marker_and_share_the_room() -> None:
    long = {"math": "m" * 50_000, "law": "l" * 50_000, "health": "fine"}
    found = walk(graph_of(long), [hop("math", "a"), hop("law", "b"), hop("health", "{0} | {1}", more=0.0)])
    (request,) = found.asked["health"]
    assert request.count("m") == request.count("l") + 0 or abs(request.count("m") - request.count("l")) < 30
    assert request.count(" [... 47,000 characters left out ...] ") == 2 and SHOWN < len(request) < SHOWN + 100
    found = walk(graph_of(long), [hop("math", "a"), hop("law")  , hop("health", more=0.0)])
    assert found.asked["law"][0].count("[... 44,000 characters left out ...]") == 1
    assert found.asked["health"][0].count("[... 47,000 characters left out ...]") == 2 and len(found.asked["health"][0]) < SHOWN + 300


# ---------------------------------------------------------------- the plan


def test_a_plan_is_made_before_anything_is_answered_and_told() -> None:
    found = walk(graph_of(ECHO), [hop("math", "a"), hop("law", "b"), hop("health", "{0} {1}", more=0.2)], "plan")
    assert found.text == "H(M(a) L(b))" and found.walk.mode == "plan" and found.walk.stopped == "end"
    assert found.master.asked == [("math", (Passed("math", (1,)),)), ("law", (Passed("math", (1,)), Passed("law", (1,))))]
    told = found.events[0]
    assert told.kind == "plan" and [(h.node, h.request, h.needs) for h in told.hops] == [("math", "a", ()), ("law", "b", ()), ("health", "{0} {1}", (0, 1))]
    assert told.to_json()["hops"][2] == {"node": "health", "request": "{0} {1}", "needs": [0, 1]}
    assert [h.request for h in found.walk.hops] == ["a", "b", "M(a) L(b)"] and found.steps == [("math", 0, ""), ("law", 1, ""), ("health", 2, "")]
    assert [d.text for d in found.deltas] == ["H(M(a)", " L(b))", ""], "the last answer streams"


def test_a_plan_ends_where_the_master_chooses_the_end_although_it_expected_more() -> None:
    found = walk(graph_of(ECHO), [hop("math", "a"), OVER], "plan")
    assert found.text == "M(a)" and found.walk.stopped == "end" and len(found.walk.hops) == 1


def test_a_planned_step_without_a_request_of_its_own_waits_for_all_before_it() -> None:
    found = walk(graph_of(ECHO), [hop("math", "a"), hop("law", "b"), hop("health", more=0.0)], "plan")
    assert found.asked["health"] == [f"{QUERY}{KNOWN}math: M(a)\n\nlaw: L(b)"] and found.walk.hops[2].needs == (0, 1)
    found = walk(graph_of({**ECHO, "law": BROKEN}), [hop("math", "a"), hop("law", "b"), hop("health", more=0.0)], "plan")
    assert found.asked["health"] == [f"{QUERY}{KNOWN}math: M(a)"] and found.walk.hops[2].needs == (0,), "it does without what failed"


# ---------------------------------------------------------------- several parts


PARTS = [hop("math", "a"), hop("law", "b", more=0.0)]


@pytest.mark.parametrize("mode", ["walk", "plan"])
def test_the_last_worker_makes_one_answer_out_of_several_parts(mode: str) -> None:
    found = walk(graph_of({**ECHO, "law": "said by law"}), PARTS, mode)
    assert found.text == "said by law" and found.walk.compose == "law" and [d.text for d in found.deltas[:2]] == ["said", " by"]
    assert found.asked["law"] == ["b", f"{COMPOSE}\n\nRequest:\n{QUERY}\n\nmath:\nM(a)\n\nlaw:\nsaid by law"]
    assert found.steps == [("math", 0, ""), ("law", 1, ""), ("law", 2, "")] and found.walk.hops[2].needs == (0, 1)
    assert found.walk.to_json()["compose"] == "law" and found.answering == ["law"]


def test_a_named_node_composes_and_what_was_used_is_no_part() -> None:
    steps = [hop("math", "a"), hop("law", "b {0}"), hop("math", "c", more=0.0)]
    found = walk(graph_of({**ECHO, "health": "all in one"}), steps, compose="health")
    assert found.text == "all in one" and found.walk.compose == "health"
    assert found.asked["health"] == [f"{COMPOSE}\n\nRequest:\n{QUERY}\n\nlaw:\nL(b M(a))\n\nmath:\nM(c)"]


@pytest.mark.parametrize("said", [BROKEN, "", " \n"])
def test_where_the_composer_fails_or_says_nothing_the_parts_are_graphas_they_are(said: str) -> None:
    found = walk(graph_of({**ECHO, "health": said}), PARTS, compose="health")
    assert found.text.strip() == "M(a)\n\nL(b)" and found.walk.compose == "" and found.answering[-1] == "law"
    assert found.steps[-1] == ("law", 1, "") and [s[:2] for s in found.steps if s[2]] == [("health", 2)]


def test_parts_that_are_long_are_cut_for_the_composer() -> None:
    found = walk(graph_of({"math": "m" * 9000, "law": "l" * 100, "health": "short"}), PARTS, compose="health")
    assert "[... 6,000 characters left out ...]" in found.asked["health"][0] and "l" * 100 in found.asked["health"][0]


# ---------------------------------------------------------------- hops that fail


@pytest.mark.parametrize("said", [BROKEN, "", " \n "])
def test_a_failed_hop_that_nothing_needs_is_left_out_with_a_note(said: str) -> None:
    note = "out of order" if said == BROKEN else "The worker of node 'math' gave an empty answer."
    for mode in ("walk", "plan"):
        found = walk(graph_of({**ECHO, "math": said}), [hop("math", "a"), hop("law", "b", more=0.0)], mode)
        assert found.text == "L(b)" and found.walk.stopped == "end" and found.walk.compose == ""
        assert found.steps == [("math", 0, note), ("law", 1, "")]
    assert walk(graph_of({**ECHO, "math": said}), [hop("math", "a"), hop("law", "b", more=0.0)]).master.asked == [
        ("math", (Passed("math", (1,), "(no answer)"),))]


@pytest.mark.parametrize("mode", ["walk", "plan"])
def test_a_failed_hop_that_another_one_needs_is_an_error_that_says_what_was_done(mode: str) -> None:
    steps = [hop("health", "a"), hop("math", "b"), hop("law", "judge {1}", more=0.0)]
    with pytest.raises(WorkerError) as caught:
        walk(graph_of({**ECHO, "math": BROKEN}), steps, mode)
    assert caught.value.message == ("No worker could answer (math: out of order); step 3 (law) needs it. Done so far: health answered, math failed.")


def test_when_the_last_hop_fails_what_was_done_before_is_said() -> None:
    with pytest.raises(WorkerError) as caught:
        walk(graph_of({**ECHO, "law": BROKEN}), [hop("math", "a"), hop("law", "judge {0}", more=0.0)])
    assert caught.value.message == "No worker could answer (law: out of order); it is the last step. Done so far: math answered, law failed."
    with pytest.raises(WorkerError, match=r"^The worker of node 'law' gave an empty answer; it is the last step\. Done so far: math answered, law failed\.$"):
        walk(graph_of({**ECHO, "law": ""}), [hop("math", "a"), hop("law", "judge {0}", more=0.0)])


def test_when_the_only_hop_fails_its_error_is_the_walks() -> None:
    with pytest.raises(WorkerError) as caught:
        walk(graph_of({"law": BROKEN}), [hop("law", "a", more=0.0)])
    assert caught.value.message == "No worker could answer (law: out of order)"
    with pytest.raises(WorkerError, match=r"^The worker of node 'law' gave an empty answer\.$"):
        walk(graph_of({"law": ""}), [hop("law", "a", more=0.0)])


@pytest.mark.parametrize("mode", ["walk", "plan"])
def test_when_every_hop_fails_the_first_error_is_told_with_all_that_was_tried(mode: str) -> None:
    with pytest.raises(WorkerError) as caught:
        walk(graph_of({"math": BROKEN, "law": "! law too"}), [hop("math", "a"), hop("law", "b"), OVER], mode)
    assert caught.value.message == "No worker could answer (math: out of order). Done so far: math failed, law failed."


def test_a_last_hop_that_fails_beside_other_parts_is_left_out_and_what_it_needed_is_a_part_again() -> None:
    steps = [hop("math", "a"), hop("law", "b"), hop("broken", "{0}", more=0.0)]
    found = walk(graph_of({**ECHO, "broken": BROKEN}), steps, compose="health")
    assert found.walk.compose == "health" and "math:\nM(a)\n\nlaw:\nL(b)" in found.asked["health"][0]
    assert ("broken", 2, "out of order") in found.steps


def test_a_failing_worker_is_tried_again_and_then_its_fallback_answers_for_the_hop() -> None:
    twice = "{kind: scripted, retries: 1, answers: {'*': '! out of order'}}"
    found = walk(graph_of({"math>health": twice, "law": ECHO["law"], "health": ECHO["health"]}), [hop("math", "a"), hop("law", "b {0}", more=0.0)])
    assert found.asked == {"math": ["a", "a"], "health": ["a"], "law": ["b H(a)"]}
    assert found.steps == [("math", 0, "out of order"), ("health", 0, ""), ("law", 1, "")]
    assert [e.step.node for e in found.events if e.kind == "ended" and e.step] == ["health", "law"]


def test_an_ask_that_a_worker_refuses_is_the_asks_fault_and_ends_the_walk(toy_base: Path) -> None:
    graph = graph_of({"math": f"{{kind: embedded, model: {toy_base}}}", "law": "B"})
    with pytest.raises(QueryError, match="presence_penalty"):
        walk(graph, [hop("law", "a"), hop("math", "b"), hop("law", "{0} {1}", more=0.0)], "plan", replace(ASK, options={"presence_penalty": 1}))


FAILING = {"broken": BROKEN, "silent": " "}


@st.composite
def walks(draw: st.DrawFn) -> list[Decision]:
    """Decisions of a walk that ends by itself: each with a request that needs some hops before it, or without one (at most once a node)."""
    made: list[Decision] = []
    for number in range(draw(st.integers(1, 5))):
        node = draw(st.sampled_from([*ECHO, *FAILING]))
        needs = draw(st.sets(st.integers(0, number - 1), max_size=2)) if number else set()
        request = "" if draw(st.integers(0, 4)) == 0 else f"r{number} " + " ".join(f"{{{need}}}" for need in sorted(needs))
        made.append(hop(node, request))
    asked = [made_.node for made_ in made if made_.rewrite_note]
    assume(len(asked) == len(set(asked)))
    return [*made[:-1], replace(made[-1], more=0.0)]


@given(walks(), st.sampled_from(["walk", "plan"]))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_walk_is_an_error_or_an_answer_as_a_model_of_it_says(steps: list[Decision], mode: str) -> None:
    fails = [step.node in FAILING for step in steps]
    needs = [set(range(i)) if step.rewrite_note else set(plan.needs(step.rewritten)) for i, step in enumerate(steps)]
    lacking = any(fails[need] for step, need_ in zip(steps, needs) if not step.rewrite_note for need in need_)

    def parts(answered: Sequence[int], last: int | None = None) -> list[int]:
        used = {need for i in [*answered, *([] if last is None else [last])] for need in needs[i]}
        return [i for i in answered if i not in used]

    ways = plan.waves([plan.Request("", "", tuple(need)) for need in needs]) if mode == "plan" else [[i] for i in range(len(steps))]
    last = ways[-1][0] if len(ways[-1]) == 1 else None
    streamed = last is not None and not parts([i for i, failed in enumerate(fails) if not failed and i != last], last)
    graph = graph_of({**ECHO, **FAILING})
    if lacking or all(fails) or (streamed and last is not None and fails[last]):
        with pytest.raises(WorkerError) as caught:
            walk(graph, steps, mode)
        assert ("Done so far" in caught.value.message) == (len(steps) > 1)
        return
    found = walk(graph, steps, mode)
    answers = {s.hop: s.answer for s in found.trace.steps if not s.error}
    assert set(answers) - {len(steps)} == {i for i, failed in enumerate(fails) if not failed} and found.walk.stopped == "end"
    for i, made in enumerate(found.walk.hops[:len(steps)]):
        assert set(made.needs) == {need for need in needs[i] if not fails[need]} and all(answers[need] in made.request for need in made.needs)
    final = parts([i for i, failed in enumerate(fails) if not failed])
    assert found.trace.steps[-1].answer == found.text and not found.trace.steps[-1].error
    if len(final) == 1:
        assert found.walk.compose == "" and found.text == answers[final[0]]
    else:
        assert found.walk.compose == steps[final[-1]].node and COMPOSE in found.text and found.walk.hops[-1].needs == tuple(final)


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("mode", ["walk", "plan"])
def test_no_more_hops_than_the_limit_are_made(mode: str) -> None:
    found = walk(graph_of(ECHO), [hop("math", "a"), hop("law", "b {0}"), hop("health", "c {1}"), hop("math", "d")], mode, hops=3)
    assert found.text == "H(c L(b M(a)))" and found.walk.stopped == "hops" and len(found.walk.hops) == 3
    assert len(found.master.todo) == 1, "the fourth is not even decided"
    one = walk(graph_of(ECHO), [hop("math", "a")], mode, hops=1)
    assert one.text == "M(a)" and one.walk.stopped == "hops" and one.master.asked == []


@pytest.mark.parametrize("mode", ["walk", "plan"])
@pytest.mark.parametrize("again", [hop("math", "a"), hop("math", "a", more=0.0)])
def test_the_same_request_to_the_same_node_is_a_loop(mode: str, again: Decision) -> None:
    found = walk(graph_of(ECHO), [hop("math", "a"), hop("law", "b {0}"), again, hop("health", "c")], mode)
    assert found.text == "L(b M(a))" and found.walk.stopped == "loop" and found.steps == [("math", 0, ""), ("law", 1, "")]
    assert [h.node for h in found.walk.hops] == ["math", "law"] and found.asked["math"] == ["a"]


def test_the_same_node_with_another_request_is_no_loop() -> None:
    found = walk(graph_of(ECHO), [hop("math", "a"), hop("law", "{0}"), hop("math", "b {1}", more=0.0)])
    assert found.text == "M(b L(M(a)))" and found.walk.stopped == "end"


def test_the_whole_query_for_the_same_node_again_is_a_loop_whatever_is_known_by_then() -> None:
    found = walk(graph_of(ECHO), [hop("math"), hop("law"), hop("math"), hop("law")])
    assert found.walk.stopped == "loop" and [h.node for h in found.walk.hops] == ["math", "law"]


@pytest.mark.parametrize("mode", ["walk", "plan"])
def test_a_limit_of_tokens_stops_before_the_next_hop_and_gives_what_there_is(mode: str) -> None:
    steps = [hop("math", "a"), hop("law", "b {0}"), hop("health", "c {1}", more=0.0)]
    found = walk(graph_of({**ECHO, "law": "one two three four"}), steps, mode, tokens=2 + 6)
    assert found.text == "one two three four" and found.walk.stopped == "tokens" and found.asked["health"] == []
    assert walk(graph_of({**ECHO, "law": "one two three four"}), steps, mode, tokens=9).walk.stopped == "end"


def test_a_limit_of_cost_counts_prices_by_the_million_tokens() -> None:
    steps = [hop("math", "a b c"), hop("law", "d {0}"), hop("health", "c", more=0.0)]
    graph = graph_of({**ECHO, "math": "one two"}, math="[1.5, 2]")
    price = (3 * 1.5 + 2 * 2) / 1e6
    dear = walk(graph, steps, cost=price * 0.99)
    assert dear.text == "one two" and dear.walk.stopped == "cost" and dear.asked["law"] == []
    assert cost(graph.nodes["math"], dear.trace.steps[0]) == pytest.approx(price)
    assert walk(graph, steps, cost=price * 1.01).walk.stopped == "end"
    assert walk(graph, steps, cost=0).walk.stopped == "cost"
    assert walk(graph_of(ECHO), steps, cost=0).walk.stopped == "end", "what costs nothing goes on"


def test_at_a_limit_parts_are_graphone_below_the_other_and_nobody_composes() -> None:
    found = walk(graph_of({**ECHO, "law": "one two three"}), PARTS, "plan", tokens=5)
    assert found.text == "M(a)\n\none two three" and found.walk.stopped == "tokens" and found.walk.compose == ""
    assert found.steps == [("math", 0, ""), ("law", 1, "")] and len(found.walk.hops) == 2


def test_a_limit_leaves_out_no_part_that_nothing_was_made_from() -> None:
    steps = [hop("math", "a"), hop("law", "b"), hop("health", "{0} {1}", more=0.0)]
    found = walk(graph_of(ECHO), steps, "plan", tokens=1)
    assert found.text == "M(a)\n\nL(b)" and found.walk.stopped == "tokens" and [h.node for h in found.walk.hops] == ["math", "law", "health"]


# ---------------------------------------------------------------- real servers: time, waves, leaving


class Server:
    """An OpenAI-compatible server in this loop: `speak` is given the request and yields the pieces of its answer, or raises Refused."""

    def __init__(self, speak: Callable[[str], AsyncIterator[str]]) -> None:
        self.speak = speak
        self.requests: list[str] = []
        self.asked, self.left = asyncio.Event(), asyncio.Event()
        self.worker = ""
        self._tasks: set[asyncio.Task[None] | None] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Server]:
        server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self.worker = f"{{kind: openai, model: m, retries: 0, urls: 'http://127.0.0.1:{port}/v1'}}"
        try:
            yield self
        finally:
            server.close()
            await server.wait_closed()
            await asyncio.gather(*filter(None, self._tasks))

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        head = await reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"(?i)content-length: (\d+)", head)
        body = json.loads(await reader.readexactly(int(found[1]) if found else 0))
        self.requests.append(body["messages"][-1]["content"])
        self.asked.set()
        answer, gone = asyncio.ensure_future(self._answer(writer)), asyncio.ensure_future(reader.read())
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            self.left.set()
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async def _answer(self, writer: asyncio.StreamWriter) -> None:
        begun = False
        with suppress(ConnectionError):
            try:
                async for text in self.speak(self.requests[-1]):
                    if not begun:
                        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
                    begun = True
                    writer.write(b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n")
                    await writer.drain()
                writer.write(b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n')
            except Refused as error:
                said = json.dumps({"error": error.args[0]}).encode()
                writer.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(said), said))
            await writer.drain()


class Refused(Exception):
    """A server's `error` object."""


async def silence(request: str) -> AsyncIterator[str]:
    await asyncio.Event().wait()
    yield ""


async def half(request: str) -> AsyncIterator[str]:
    yield "half an answer"
    await asyncio.Event().wait()


def saying(text: str, after: asyncio.Event | None = None, first: asyncio.Event | None = None) -> Callable[[str], AsyncIterator[str]]:
    """Says a text; sets `first` when it is asked and waits for `after`."""
    async def speak(request: str) -> AsyncIterator[str]:
        if first:
            first.set()
        if after:
            await after.wait()
        yield text

    return speak


class Hourglass(Limits):
    """Limits whose time is over when a test says so."""

    over: asyncio.Event

    async def within(self, work: Any) -> Any:
        done, over = asyncio.ensure_future(work), asyncio.ensure_future(self.over.wait())
        try:
            await asyncio.wait({done, over}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise TimeOver
            return done.result()
        finally:
            for task in (done, over):
                task.cancel()
            await asyncio.gather(done, over, return_exceptions=True)

    def reached(self, steps: Any) -> str:
        return "seconds" if self.over.is_set() else super().reached(steps)


@pytest.fixture
def hourglass(monkeypatch: pytest.MonkeyPatch) -> type[Hourglass]:
    monkeypatch.setattr(walking, "Limits", Hourglass)
    return Hourglass


def with_servers(work: Callable[..., Coroutine[Any, Any, None]], *speaking: Callable[[str], AsyncIterator[str]], hourglass: type[Hourglass] | None = None) -> None:
    """Run `work` with a server for each way to speak; with an hourglass its event comes first."""
    async def main() -> None:
        async with AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(Server(speak).running()) for speak in speaking]
            over = asyncio.Event()
            if hourglass:
                hourglass.over = over
            await asyncio.wait_for(work(*([over] if hourglass else []), *servers), 120)

    asyncio.run(main())


async def turn(over: asyncio.Event, when: asyncio.Event) -> None:
    """The time is over as soon as something has happened."""
    await when.wait()
    over.set()


def test_independent_steps_of_a_plan_run_together() -> None:
    async def work() -> None:
        one, other = asyncio.Event(), asyncio.Event()
        async with Server(saying("one", other, one)).running() as first, Server(saying("other", one, other)).running() as second:  # each waits for the other
            graph = graph_of({"math": first.worker, "law": second.worker, "health": ECHO["health"]})
            found = await asyncio.wait_for(walked(graph, [hop("math", "a"), hop("law", "b"), hop("health", "{0}+{1}", more=0.0)], "plan"), 120)
            assert found.text == "H(one+other)" and {e.kind for e in found.events[1:3]} == {"began"}

    asyncio.run(work())


def test_when_the_time_is_over_in_the_first_hop_that_is_an_error(hourglass: type[Hourglass]) -> None:
    async def work(over: asyncio.Event, server: Server) -> None:
        for mode in ("walk", "plan"):
            for steps in ([hop("math", "a"), hop("law", "b {0}", more=0.0)], [hop("math", "a", more=0.0)]):
                over.clear()
                server.asked.clear()
                turning = asyncio.create_task(turn(over, server.asked))
                with pytest.raises(WorkerTimeout) as caught:
                    await walked(graph_of({"math": server.worker, "law": "B"}), steps, mode, seconds=7)
                assert caught.value.message == "No step was answered within 7 s, which is this walk's limit. Done so far: math failed."
                assert "answer: {seconds: ...}" in caught.value.hint
                await turning
                await server.left.wait()

    with_servers(work, silence, hourglass=hourglass)


@pytest.mark.parametrize("mode", ["walk", "plan"])
@pytest.mark.parametrize("last", [True, False])
def test_when_the_time_is_over_in_a_later_hop_the_answer_so_far_is_given(hourglass: type[Hourglass], mode: str, last: bool) -> None:
    async def work(over: asyncio.Event, server: Server) -> None:
        turning = asyncio.create_task(turn(over, server.asked))
        steps = [hop("math", "a"), hop("law", "b {0}", more=0.0 if last else 1.0), hop("health", "c {1}", more=0.0)]
        found = await walked(graph_of({**ECHO, "law": server.worker}), steps, mode)
        assert found.text == "M(a)" and found.walk.stopped == "seconds" and found.asked["health"] == [] and found.answering[-1] == "math"
        assert found.steps == [("law", 1, "stopped before its answer was whole"), ("math", 0, "")], "the last step is the one whose answer is given"
        await turning
        await server.left.wait()

    with_servers(work, silence, hourglass=hourglass)


def test_when_the_time_is_over_in_a_wave_what_was_answered_is_graphand_the_rest_is_stopped(hourglass: type[Hourglass]) -> None:
    async def work(over: asyncio.Event, quick: Server, slow: Server) -> None:
        graph = graph_of({"math": quick.worker, "law": slow.worker, "health": ECHO["health"]})
        quick.speak = saying("quick", slow.asked)
        seen = Walked(Script([]))
        seen.watch = lambda: over.set() if any(e.kind == "ended" for e in seen.events) else None
        await walked(graph, [hop("math", "a"), hop("law", "b"), hop("health", "{0} {1}", more=0.0)], "plan", seen=seen)
        assert seen.text == "quick" and seen.walk.stopped == "seconds" and seen.steps[-1] == ("math", 0, "")
        await slow.left.wait()

    with_servers(work, silence, silence, hourglass=hourglass)


@pytest.mark.parametrize("composing", [True, False])
def test_when_the_time_is_over_in_the_middle_of_the_last_answer_it_ends_there(hourglass: type[Hourglass], composing: bool) -> None:
    async def work(over: asyncio.Event, server: Server) -> None:
        seen = Walked(Script([]))
        seen.watch = lambda: over.set() if seen.deltas else None
        steps = [hop("math", "a"), hop("health", "b", more=0.0)] if composing else [hop("math", "a"), hop("law", "b {0}", more=0.0)]
        await walked(graph_of({**ECHO, "law": server.worker}), steps, seen=seen, compose="law")
        assert seen.text == "half an answer" and seen.deltas[-1].finish == "length" and seen.walk.stopped == "seconds"
        last = seen.trace.steps[-1]
        assert (last.node, last.answer, last.error) == ("law", "half an answer", "stopped before its answer was whole") and last.ms > 0
        assert seen.walk.compose == ("law" if composing else "")
        await server.left.wait()

    with_servers(work, half, hourglass=hourglass)


def test_when_the_time_is_over_before_the_composer_speaks_the_parts_are_given(hourglass: type[Hourglass]) -> None:
    async def work(over: asyncio.Event, server: Server) -> None:
        turning = asyncio.create_task(turn(over, server.asked))
        found = await walked(graph_of({**ECHO, "health": server.worker}), PARTS, compose="health")
        assert found.text == "M(a)\n\nL(b)" and found.walk.stopped == "seconds" and found.steps[-1] == ("law", 1, "")
        await turning

    with_servers(work, silence, hourglass=hourglass)


@pytest.mark.parametrize("mode", ["walk", "plan"])
def test_when_the_time_is_over_while_the_master_decides_what_there_is_is_given(hourglass: type[Hourglass], mode: str) -> None:
    async def work(over: asyncio.Event) -> None:
        class Slow(Script):
            async def decide(self, *arguments: Any, **options: Any) -> Decision:
                over.set()
                await asyncio.Event().wait()
                raise AssertionError

        seen, steps = Walked(Slow([])), [hop("math", "a"), hop("law", "b")]
        if mode == "plan":
            with pytest.raises(WorkerTimeout, match=r"^No step was answered within 600 s, which is this walk's limit\.\n"):
                await walked(graph_of(ECHO), steps, mode, seen=seen)
        else:
            await walked(graph_of(ECHO), steps, mode, seen=seen)
            assert seen.text == "M(a)" and seen.walk.stopped == "seconds"

    with_servers(work, hourglass=hourglass)


@pytest.mark.parametrize(("mode", "steps"), [
    ("plan", [hop("math", "a"), hop("law", "b"), hop("health", "{0} {1}", more=0.0)]),
    ("walk", [hop("math", "a")]), ("walk", [hop("math", "a", more=0.0)]),
])
@pytest.mark.parametrize("speak", [silence, half])
def test_leaving_a_walk_stops_every_running_worker(mode: str, steps: list[Decision], speak: Callable[[str], AsyncIterator[str]]) -> None:
    async def work(*servers: Server) -> None:
        graph = graph_of({"math": servers[0].worker, "law": servers[1].worker, "health": ECHO["health"]})
        running = servers if mode == "plan" else servers[:1]
        seen = Walked(Script([]))
        walking_on = asyncio.create_task(walked(graph, steps, mode, seen=seen))
        await asyncio.gather(*(server.asked.wait() for server in running))
        walking_on.cancel()
        with pytest.raises(asyncio.CancelledError):
            await walking_on
        await asyncio.gather(*(server.left.wait() for server in running))
        assert {e.step.error for e in seen.events if e.kind == "ended" and e.step} == {"stopped before its answer was whole"}

    with_servers(work, speak, speak)


def test_an_answer_that_breaks_off_after_it_was_seen_is_an_error() -> None:
    async def broken(request: str) -> AsyncIterator[str]:
        yield "half"
        raise ConnectionError

    async def work(server: Server) -> None:
        seen = Walked(Script([]))
        with pytest.raises(WorkerError, match=r"^Node 'law' failed in the middle of its answer"):
            await walked(graph_of({"math": "M", "law": server.worker}), [hop("math", "a"), hop("law", "b {0}", more=0.0)], seen=seen)
        assert seen.text == "half"

    with_servers(work, broken)


def test_a_hop_on_the_way_that_breaks_off_is_tried_again_and_then_its_fallback_answers() -> None:
    asked = []

    async def broken(request: str) -> AsyncIterator[str]:
        asked.append(request)
        yield "half"
        raise ConnectionError

    async def work(server: Server) -> None:
        worker = server.worker.replace("retries: 0", "retries: 1")
        graph = graph_of({"math>law": worker, **{"law": ECHO["law"], "health": ECHO["health"]}})
        found = await walked(graph, [hop("math", "a"), hop("health", "b {0}", more=0.0)])
        assert found.text == "H(b L(a))" and len(asked) == 1 + ("retries: 1" in worker)
        assert [(node, at, bool(error)) for node, at, error in found.steps] == [("math", 0, True), ("law", 0, False), ("health", 1, False)]

    with_servers(work, broken)


def test_a_master_that_fails_on_the_way_costs_no_answer() -> None:
    class Broken(Script):
        async def decide(self, *_: Any, **__: Any) -> Decision:
            raise EngineError("llama.cpp is gone")

    seen = Walked(Broken([]))
    asyncio.run(walked(graph_of(ECHO), [hop("math", "a")], seen=seen))
    assert seen.text == "M(a)" and seen.walk.stopped == "master"


def test_what_a_client_says_of_length_holds_for_the_answer_that_it_gets() -> None:
    seen: list[tuple[str, int, Mapping[str, Any]]] = []

    class Spy:
        resting = False
        def __init__(self, name: str) -> None:
            self.name = name

        async def stream(self, messages: Sequence[Message], *, max_tokens: int, options: Mapping[str, Any] | None = None, **_: Any) -> AsyncIterator[Delta]:
            seen.append((self.name, max_tokens, options or {}))
            yield Delta(f"{self.name} says")
            yield Delta(done=True, finish="length")

    async def work() -> None:
        graph, asked = graph_of(ECHO), replace(ASK, max_tokens=7, options={"stop": ["x"], "seed": 1})

        async def opened(node: Any) -> Any:
            return Spy(node.name)

        one = partial(execute.run, open_worker=opened, max_tokens=asked.max_tokens, options=asked.options)
        master: Any = Script([hop("law", "judge {0}", more=0.0)])
        walk = Walking(AnswerSpec("walk"), graph, master, asked, one, lambda name: [])
        (ended,) = [item async for item in walk.run(hop("math", "sum")) if isinstance(item, Walk)]
        assert seen == [("math", 512, {"seed": 1}), ("law", 7, {"stop": ["x"], "seed": 1})]
        assert ended.hops[1].request == f"judge math says{walking.CUT_OFF}"

    asyncio.run(work())


@pytest.mark.parametrize("mode", ["walk", "plan"])
def test_every_worker_is_made_ready_first_and_what_fails_then_comes_up_when_it_is_asked(mode: str) -> None:
    async def work() -> None:
        opened: list[str] = []

        async def ready(node: Any) -> None:
            opened.append(node.name)
            raise WorkerError("no weights yet")

        async def scripted(node: Any) -> Any:
            return await there.worker(node)

        graph = graph_of(ECHO)
        async with Runtime.open(environment.read(), given=graph) as there:
            master: Any = Script([hop("law", "judge {0}", more=0.0)], hop("math", "sum"))
            walk = Walking(AnswerSpec(mode), graph, master, ASK, partial(execute.run, open_worker=scripted), lambda name: [], ready=ready)
            text = "".join([item.text async for item in walk.run(hop("math", "sum")) if isinstance(item, Delta)])
        assert text == "L(judge M(sum))" and opened == ["math", "law"]

    asyncio.run(work())


def test_what_is_beside_the_limits_takes_nothing_of_them() -> None:
    async def work() -> None:
        limits = Limits(AnswerSpec("walk", seconds=0.05), graph_of(ECHO))
        loop = asyncio.get_running_loop()
        long = loop.time() + 0.1

        async def fetched() -> str:
            over = asyncio.Event()
            loop.call_at(long, over.set)
            await over.wait()
            return "weights"

        assert await limits.beside(fetched()) == "weights" and limits.reached([]) == ""
        with pytest.raises(TimeOver):
            await limits.within(asyncio.Event().wait())
        limits.end()

    asyncio.run(work())


def test_waiting_for_its_turn_is_not_a_workers_silence() -> None:
    async def work() -> None:
        turn, began = asyncio.Lock(), asyncio.Event()

        class OneAtATime:
            resting = False

            def turn(self) -> asyncio.Lock:
                return turn

            async def stream(self, *_: Any, **__: Any) -> AsyncIterator[Delta]:
                began.set()
                yield Delta("mine", done=False)
                yield Delta(done=True, finish="stop")

        async def opened(node: Any) -> Any:
            return OneAtATime()

        node = replace(graph_of(ECHO).nodes["math"])
        node = replace(node, worker=replace(node.worker, timeout_s=0.01))
        await turn.acquire()

        async def ask() -> str:
            return "".join([item.text async for item in execute.run(node, [], [Message("user", "x")], opened) if isinstance(item, Delta)])

        asking_on, patient = asyncio.create_task(ask()), asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, patient.set)
        await patient.wait()
        assert not began.is_set() and not asking_on.done()
        turn.release()
        assert await asking_on == "mine" and not turn.locked()

    asyncio.run(work())


def test_the_limits_of_a_real_clock() -> None:
    async def work() -> None:
        graph = graph_of(ECHO)
        cancelled = asyncio.Event()

        async def never() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        short, long = Limits(AnswerSpec("walk", seconds=0.01), graph), Limits(AnswerSpec("walk", seconds=600), graph)
        with pytest.raises(TimeOver):
            await short.within(never())
        assert cancelled.is_set() and short.reached([]) == "seconds"
        assert long.reached([]) == "" and await long.within(asyncio.sleep(0, "done")) == "done"

        async def tired() -> None:
            raise asyncio.TimeoutError

        with pytest.raises(asyncio.TimeoutError):
            await long.within(tired())
        with pytest.raises(TimeOver):  # also when the time ran out while nobody waited
            await short.within(never())
        long.end()


def test_a_cancellation_is_never_lost_even_where_the_result_comes_with_it() -> None:
    async def work() -> None:
        limits = Limits(AnswerSpec("walk", seconds=600), graph_of(ECHO))
        result: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def wait() -> str:
            await result
            return await limits.within(asyncio.sleep(0, "not cancelled"))

        waiting = asyncio.create_task(limits.within(wait()))
        await asyncio.sleep(0)
        result.set_result("there")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        limits.end()

    asyncio.run(work())


def test_when_time_and_caller_stop_it_together_the_caller_is_heard() -> None:
    async def work() -> None:
        limits = Limits(AnswerSpec("walk", seconds=0.001), graph_of(ECHO))

        async def never() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                waiting.cancel()
                raise

        waiting = asyncio.create_task(limits.within(never()))
        with pytest.raises(asyncio.CancelledError if sys.version_info >= (3, 11) else TimeOver):
            await waiting

    asyncio.run(work())

    asyncio.run(work())


# ---------------------------------------------------------------- models without room


def test_earlier_answers_are_cut_further_for_a_model_that_has_no_room_for_them(toy_base: Path) -> None:
    embedded = f"{{kind: embedded, model: {toy_base}, max_tokens: 5}}"
    graph = graph_of({"math": "é" * 9000, "law": embedded})  # two tokens a letter
    found = walk(graph, [hop("math", "a"), hop("law", "b {0}", more=0.0)])
    (step,) = [s for s in found.trace.steps if s.node == "law"]
    assert not step.error and "[... 8,250 characters left out ...]" in step.request and found.walk.hops[1].request == step.request
    assert 2 * 750 < step.usage["prompt_tokens"] < 2048 and found.events[-1].request == step.request


def test_a_text_that_has_no_room_without_any_answer_is_an_error_and_another_node_may_have_room(toy_base: Path) -> None:
    embedded = f"{{kind: embedded, model: {toy_base}, max_tokens: 5}}"
    steps = [hop("math", "a"), hop("law", "x" * 5000 + " {0}", more=0.0)]
    with pytest.raises(EngineError, match=r"room for 4096, its answer included.*; it is the last step\. Done so far: math answered, law failed\."):
        walk(graph_of({"math": "short", "law": embedded}), steps)
    found = walk(graph_of({"math": "m" * 5000, "law>health": embedded, "health": "fine"}), steps)
    assert found.text == "fine" and [s[:2] for s in found.steps] == [("math", 0), ("law", 1), ("health", 1)]


@pytest.mark.parametrize("error", [
    {"message": "This model's maximum context length is 1000 tokens. However, you requested 1500 tokens.", "type": "BadRequestError", "code": 400},
    {"message": "too much", "type": "invalid_request_error", "code": "context_length_exceeded"},
    {"message": "the request exceeds the available context size", "type": "exceed_context_size_error", "code": 400},
])
def test_a_server_that_says_that_a_request_is_too_long_gets_a_shorter_one(error: dict[str, Any]) -> None:
    async def picky(request: str) -> AsyncIterator[str]:
        if len(request) > 1000:
            raise Refused(error)
        yield "fits"

    async def work(server: Server) -> None:
        found = await walked(graph_of({"math": "m" * 9000, "law": server.worker}), [hop("math", "a"), hop("law", "b {0}", more=0.0)])
        assert found.text == "fits" and [len(request) > 1000 for request in server.requests] == [True, True, True, False]
        assert "[... 8,250 characters left out ...]" in server.requests[-1] and found.steps == [("math", 0, ""), ("law", 1, "")]
        found = await walked(graph_of({"math": "m" * 9000, "health": "h" * 9000, "law": server.worker}), [hop("math", "a"), hop("health", "b", more=0.0)], compose="law")
        assert found.text == "fits" and len(server.requests[-1]) <= 1000

    with_servers(work, picky)


# ---------------------------------------------------------------- which asks walk


FULL = """\
version: 1
answer: {mode: auto, hops: 4}
nodes:
  a: {token: 0, description: d, worker: {kind: scripted}}
  b: {token: 1, description: d, worker: {kind: scripted}, answer: {mode: plan, hops: 2}}
  c: {token: 2, description: d, worker: {kind: scripted}, answer: {mode: single}}
edges: {start: ['*']}
"""


def asking(*roles: str, **options: Any) -> Ask:
    return Ask(tuple(Message(role, "x") for role in roles), **options)


@pytest.mark.parametrize(("ask", "may"), [
    (asking("user"), True), (asking("system", "user"), True), (asking("user", mode="plan"), True), (asking("user", mode="single"), False),
    (asking("user", mode="vote"), False), (asking("user", node="a"), False), (asking("user", needs=frozenset({"image"})), False),
    (asking("user", "assistant", "user"), False), (asking("user", "assistant", "user", mode="walk"), False), (asking("user", options={"n": 2}), False),
    (asking("user", options={"tools": [{}]}), False), (asking("user", options={"response_format": {"type": "json_object"}}), False),
])
def test_first_turns_in_plain_text_may_walk(ask: Ask, may: bool) -> None:
    assert ahead.may(graphfile.loads(FULL), ask) == may


def test_where_nothing_in_the_graph_walks_only_the_ask_can_say_so() -> None:
    plain = graphfile.loads(FULL.replace("mode: auto", "mode: single").replace("mode: plan", "mode: vote"))
    assert not ahead.may(plain, asking("user")) and ahead.may(plain, asking("user", mode="auto"))
    assert ahead.may(graphfile.loads(FULL.replace("mode: auto", "mode: single")), asking("user")), "a node's own answer may be a plan"


@pytest.mark.parametrize(("node", "more", "mode", "found"), [
    ("a", 0.9, "", ("plan", 4)), ("a", 0.5, "", ("plan", 4)), ("a", 0.4, "", None), ("a", None, "", None), ("b", 0.0, "", ("plan", 2)), ("c", 0.9, "", None),
    ("c", 0.9, "auto", ("plan", 4)), ("c", 0.1, "auto", None), ("c", 0.1, "walk", ("walk", 4)), ("a", 0.1, "plan", ("plan", 4)), ("b", 0.9, "single", None), ("a", 0.9, "vote", None),
])
def test_auto_plans_where_more_is_needed_a_nodes_own_answer_wins_and_the_asks_mode_before_both(
    node: str, more: float | None, mode: str, found: tuple[str, int] | None
) -> None:
    decision = Decision("q", node, node, 0, 0.9, more=more)
    spec = ahead.spec(graphfile.loads(FULL), asking("user", mode=mode), decision)
    assert (spec and (spec.mode, spec.hops)) == found
    assert ahead.spec(graphfile.loads(FULL), asking("user", mode=mode), replace(decision, fallback=True)) is None


def test_a_walk_of_at_most_one_hop_is_a_single_answer() -> None:
    decision = Decision("q", "a", "a", 0, 0.9, more=0.9)
    assert ahead.spec(graphfile.loads(FULL.replace("hops: 4", "hops: 1")), asking("user", mode="walk"), decision) is None


def test_who_answers_alone_is_asked_all_of_it() -> None:
    part = Decision("Sum 2000 dollars over 3 years. Who pays?", "a", "a", 0, 0.9, rewritten="Say who pays.", more=0.9)
    assert ahead.alone(part).rewritten == part.query and "number" in ahead.alone(part).rewrite_note
    whole = replace(part, rewritten="Sum 2000 dollars over 3 years and say who pays.")
    assert ahead.alone(whole) == whole and ahead.alone(replace(part, more=0.1)) == replace(part, more=0.1)


# ---------------------------------------------------------------- the real master: only neighbours may follow


PATH = "{start: [math], math: [law], law: [health], health: [math, end]}"


def answer_to(master: Path, ask: Ask, answer: str = "{mode: single}", edges: str = PATH, worker: str = "{kind: scripted, answers: {'*': 'it is {}'}}") -> Answer:
    async def work() -> Answer:
        text = toy_graph(master, worker, f"answer: {answer}\n").replace("edges: {start: ['*']}", f"edges: {edges}")
        async with Runtime.open(environment.read(), given=graphfile.loads(text)) as opened:
            return await runtime.fold(opened.answer(ask))

    return asyncio.run(work())


def court(mode: str = "") -> Ask:
    return Ask((Message("user", "court contract statute"),), mode=mode)


@pytest.mark.parametrize(("answer", "mode"), [("{mode: walk, hops: 3}", ""), ("{mode: plan, hops: 3}", ""), ("{mode: auto, hops: 3}", ""), ("{mode: single, hops: 3}", "auto")])
def test_after_an_answer_only_its_nodes_neighbours_may_follow(toy_master: Path, answer: str, mode: str) -> None:
    found = answer_to(toy_master, court(mode), answer)
    walk = found.trace.walk
    assert walk and [h.node for h in walk.hops][:3] == ["math", "law", "health"] and walk.stopped in ("hops", "end")
    assert walk.mode == ("walk" if "mode: walk" in answer else "plan") and found.trace.decision and found.trace.decision.more == 1.0
    assert {s.node for s in found.trace.steps} == set(WORDS) and found.text.startswith("it is")
    assert found.trace.to_json()["walk"]["hops"][1]["needs"] == list(walk.hops[1].needs) and found.trace.to_json()["steps"][0]["hop"] == 0


def test_single_stops_after_one_whatever_the_graph_says(toy_master: Path) -> None:
    for ask, answer in ((court(), "{mode: single}"), (court("single"), "{mode: walk}")):
        found = answer_to(toy_master, ask, answer)
        assert found.trace.walk is None and [s.node for s in found.trace.steps] == ["math"] and found.trace.decision
        assert found.trace.decision.more is None, "nobody asked whether more is needed"


def test_auto_stops_after_one_where_nothing_can_follow(toy_master: Path) -> None:
    for edges in ("{start: ['*'], math: [end], law: [end], health: [end]}", "{start: ['*']}"):
        found = answer_to(toy_master, court(), "{mode: auto}", edges)
        assert found.trace.walk is None and len(found.trace.steps) == 1 and found.trace.decision and found.trace.decision.more == 0.0


def test_a_follow_up_and_a_pinned_node_do_not_walk(toy_master: Path) -> None:
    turns = (Message("user", "court?"), Message("assistant", "yes"), Message("user", "court contract statute"))
    assert answer_to(toy_master, Ask(turns, mode="walk")).trace.walk is None
    assert answer_to(toy_master, Ask(turns[:1], "law", mode="walk")).trace.walk is None


def test_the_fallback_of_the_master_answers_alone(toy_master: Path) -> None:
    async def work() -> None:
        text = toy_graph(toy_master, extra="answer: {mode: walk}\n").replace("master: {", "master: {threshold: 1, fallback: law, ")
        async with Runtime.open(environment.read(), given=graphfile.loads(text)) as opened:
            found = await runtime.fold(opened.answer(Ask((Message("user", "fever bone doctor"),))))
        assert found.trace.decision and found.trace.decision.fallback and found.trace.walk is None and [s.node for s in found.trace.steps] == ["law"]

    asyncio.run(work())


def test_errors_of_a_walk_are_of_the_kind_that_doors_know(toy_master: Path) -> None:
    with pytest.raises(OutsideError, match=r"^No worker could answer"):
        answer_to(toy_master, court("walk"), worker="{kind: scripted, retries: 0, answers: {'*': '! out of order'}}")


@pytest.mark.parametrize("mode", ["walk", "plan", "auto"])
def test_what_looks_like_a_place_in_a_users_words_is_text(toy_master: Path, mode: str) -> None:
    ask = Ask((Message("user", "court {2} contract {0}"),), mode=mode)
    for edges in (PATH, "{start: ['*']}"):
        found = answer_to(toy_master, ask, "{mode: walk, hops: 3}", edges)
        assert found.trace.steps[0].request == "court {2} contract {0}" and found.text
