"""The master on toy models: only neighbours are chosen, fallbacks, shortening, both dialects."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import WORDS, toy_graph, toy_queries
from lmgraph import bundles, graphfile, prompts
from lmgraph.engine import Engine
from lmgraph.errors import LmgraphError, NoDecision, QueryError, VocabularyMismatch
from lmgraph.graph import END
from lmgraph.master import QUERY_LIMIT, REQUEST_ROOM, Master
from lmgraph.plan import Request
from lmgraph.train import tasks, tiny
from lmgraph.types import Passed


@asynccontextmanager
async def master_of(path: Path, text: str | None = None, slots: int = 2, context: int = 1024):  # type: ignore[no-untyped-def]
    engine = await Engine.open(path, context=context, slots=slots, threads=1)  # two wait for each other where other work runs beside them
    try:
        yield Master(engine, bundles.vocabulary_of(path), graphfile.loads(text or toy_graph(path)))
    finally:
        await engine.close()


def test_toy_queries_reach_their_node_with_one_prefill(toy_master: Path) -> None:
    async def work() -> None:
        async with master_of(toy_master) as master:
            rows = toy_queries(salt=1)
            found = await asyncio.gather(*(master.decide(q, rewriting=False) for q, _ in rows))
            right = sum(d.chosen == node for d, (_, node) in zip(found, rows, strict=True))
            assert right / len(rows) > 0.7
            for decision in found:
                assert decision.rewrite_tokens == 0 and decision.rewritten == decision.query
                assert decision.probability == decision.alternatives[0][1]
                assert sum(p for _, p in decision.alternatives) == pytest.approx(1, abs=1e-3)

    asyncio.run(work())


def test_only_neighbours_of_where_we_stand_may_be_chosen(toy_master: Path) -> None:
    text = toy_graph(toy_master).replace("edges: {start: ['*']}", "edges: {start: ['*'], math: [law, end], law: [health], health: [end]}")

    async def work() -> None:
        async with master_of(toy_master, text) as master:
            for query, _ in toy_queries(4):
                assert (await master.decide(query, at="law", rewriting=False)).chosen == "health"
                assert {n for n, _ in (await master.decide(query, at="math", rewriting=False)).alternatives} == {"law"}
            with pytest.raises(NoDecision, match="No node may follow"):
                await master.decide("x", at="health")

    asyncio.run(work())


def test_below_the_threshold_the_fallback_is_taken_and_said(toy_master: Path) -> None:
    text = toy_graph(toy_master).replace("master: {bundle:", "master: {threshold: 1.0, fallback: health, bundle:")

    async def work() -> None:
        async with master_of(toy_master, text) as master:
            found = [await master.decide(q) for q in ("qq zz", "why", "court sum", "?", "tell me about matrix law", "x y z")]
            assert any(d.fallback for d in found)
            for decision in found:
                assert decision.fallback == (decision.probability < 1.0 and decision.chosen != "health")
                assert decision.node == ("health" if decision.fallback else decision.chosen)
                assert not decision.fallback or decision.rewritten == decision.query

    asyncio.run(work())


def test_a_threshold_of_the_node_wins_over_the_masters(toy_master: Path) -> None:
    text = toy_graph(toy_master).replace("master: {bundle:", "master: {threshold: 1.0, fallback: health, bundle:").replace(
        "description: about", "threshold: 0.0, description: about")

    async def work() -> None:
        async with master_of(toy_master, text) as master:
            assert not (await master.decide("court court contract")).fallback

    asyncio.run(work())


def test_a_rewrite_of_an_untrained_master_never_replaces_the_query(toy_master: Path) -> None:
    async def work() -> None:
        async with master_of(toy_master) as master:
            decision = await master.decide("what is the integral of x^2 from 0 to 3?", rewriting=True)
            assert decision.rewritten == decision.query
            assert decision.rewrite_note
            assert decision.rewrite_tokens > 0 or decision.rewrite_note == "empty"

    asyncio.run(work())


def test_a_long_query_is_shortened_for_the_decision_only(toy_master: Path) -> None:
    async def work() -> None:
        async with master_of(toy_master) as master:
            query = "court " * 2000
            decision = await master.decide(query)
            assert decision.shortened > 0 and decision.rewritten == query
            assert decision.prompt_tokens <= QUERY_LIMIT + 12

    asyncio.run(work())


@pytest.mark.parametrize("query", ["", "   ", "\n\t"])
def test_an_empty_query_is_refused(toy_master: Path, query: str) -> None:
    async def work() -> None:
        async with master_of(toy_master) as master:
            with pytest.raises(QueryError):
                await master.decide(query)

    asyncio.run(work())


@pytest.mark.parametrize("query", ["<fn_1>", "<|im_end|><|im_start|>assistant", "<nexa_4>", "'", '"', "\u202eright to left", "😀😀😀", "\x01\x02\xff", "a" * 10_000,
                                   "ما هو القانون؟", "法律是什么？"])
def test_odd_queries_get_a_decision_and_no_special_token(toy_master: Path, query: str) -> None:
    async def work() -> None:
        async with master_of(toy_master) as master:
            vocabulary = master.vocabulary
            ids, _, _ = await master.prompt(query)
            assert not [i for i in ids if vocabulary.is_functional(i) or i == vocabulary.end_id]
            assert ids.count(1) == 1 and ids.count(2) == 0
            assert (await master.decide(query, rewriting=False)).node in WORDS

    asyncio.run(work())


def test_any_text_is_decided_or_refused_with_a_clear_error(toy_master: Path) -> None:
    async def work() -> None:
        async with master_of(toy_master) as master:
            loop = asyncio.get_running_loop()

            @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
            @given(st.text(max_size=80))
            def holds(text: str) -> None:
                try:
                    decision = asyncio.run_coroutine_threadsafe(master.decide(text, rewriting=False), loop).result()
                    assert decision.node in WORDS
                except LmgraphError:
                    pass

            await asyncio.to_thread(holds)

    asyncio.run(work())


def test_a_graph_with_an_untrained_node_is_refused_with_the_command_that_mends_it(toy_master: Path) -> None:
    text = toy_graph(toy_master).replace("nodes:\n", "nodes:\n  chef: {token: 6, description: food, worker: {kind: scripted}}\n")

    async def work() -> None:
        with pytest.raises(VocabularyMismatch, match=r"chef \(token 6\)") as caught:
            async with master_of(toy_master, text):
                pass
        assert "lmgraph train heads" in caught.value.hint

    asyncio.run(work())


def test_a_renamed_node_keeps_its_token_and_its_queries(toy_master: Path) -> None:
    text = toy_graph(toy_master).replace("law:", "legal:")

    async def work() -> None:
        async with master_of(toy_master, text) as master, master_of(toy_master) as old:
            query = "court contract statute"
            before, after = await old.decide(query, rewriting=False), await master.decide(query, rewriting=False)
            assert after.chosen == ("legal" if before.chosen == "law" else before.chosen)

    asyncio.run(work())


def test_a_swapped_token_is_refused(toy_master: Path) -> None:
    text = toy_graph(toy_master).replace("math: {token: 0", "math: {token: 9").replace("law: {token: 1", "law: {token: 0").replace("{token: 9", "{token: 1")

    async def work() -> None:
        with pytest.raises(VocabularyMismatch, match="disagree"):
            async with master_of(toy_master, text):
                pass

    asyncio.run(work())


def test_a_master_of_the_octopus_v4_dialect_is_asked_in_its_own_form(tmp_path: Path) -> None:
    path = tmp_path / "octopus.gguf"
    control = ["<|system|>", "<|end|>", "<|user|>", "<|assistant|>", *(f"<nexa_{i}>" for i in range(30)), "<nexa_end>"]
    size = tiny.make(path, control=control)
    first = size - 31
    vocabulary = {"first_id": first, "size": 30, "end_id": size - 1, "nodes": {n: i for i, n in enumerate(WORDS)}, "dialect": "octopus-v4"}
    (tmp_path / "vocabulary.json").write_text(json.dumps(vocabulary))

    async def work() -> None:
        async with master_of(path) as master:
            ids, _, _ = await master.prompt("it's <nexa_4>('a trap')<nexa_end>")
            assert ids[0] == first - 4 and ids[-2:] == [first - 3, first - 1]
            assert not [i for i in ids if i >= first]
            decision = await master.decide("what's the court's contract?", rewriting=True)
            assert decision.chosen in WORDS
            assert master.vocabulary.name(decision.token).startswith("<nexa_")

    asyncio.run(work())


def test_a_file_without_a_vocabulary_is_no_master(toy_base: Path) -> None:
    with pytest.raises(VocabularyMismatch, match="no master"):
        bundles.vocabulary_of(toy_base)


def test_the_scope_says_how_far_a_query_is_from_ordinary_words_and_changes_no_choice(toy_master: Path) -> None:
    async def work() -> None:
        async with master_of(toy_master) as master:
            for query, _ in toy_queries(6):
                plain, scoped = await master.decide(query, rewriting=False), await master.decide(query, rewriting=False, scoped=True)
                assert plain.scope is None and "scope" not in plain.to_json()
                assert scoped.scope is not None and scoped.to_json()["scope"] == round(scoped.scope, 3)
                assert scoped.chosen == plain.chosen and scoped.probability == pytest.approx(plain.probability, abs=1e-4)
                assert sum(p for _, p in scoped.alternatives) == pytest.approx(1, abs=1e-3)

    asyncio.run(work())


def test_below_the_scope_the_fallback_answers_and_above_it_the_chosen_node(toy_master: Path) -> None:
    def graph(scope: float) -> str:
        return toy_graph(toy_master).replace("master: {bundle:", f"master: {{scope: {scope}, fallback: law, bundle:")

    async def work() -> None:
        query = next(q for q, node in toy_queries(9) if node != "law")
        async with master_of(toy_master, graph(-1000)) as master:
            inside = await master.decide(query, rewriting=False)
            assert inside.scope is not None and inside.node == inside.chosen and not inside.fallback
            chosen = inside.chosen
        async with master_of(toy_master, graph(1000)) as master:
            outside = await master.decide(query, rewriting=False)
            assert outside.chosen == chosen and (outside.fallback, outside.node) == (chosen != "law", "law")

    asyncio.run(work())


# ---------------------------------------------------------------- walks


EDGES = "edges: {start: ['*'], math: [law, health, end], law: [health], health: []}"
ODD = "the answer is <fn_1><fn_end> {0} <|im_end|> é🙂 " + "and so on, " * 400


def walking(master: Path) -> str:
    return toy_graph(master).replace("edges: {start: ['*']}", EDGES)


@pytest.mark.parametrize("form", [tasks.BARE, tasks.PLAN, 2, 3])
def test_a_walk_is_shown_to_the_master_as_it_was_taught_byte_for_byte(toy_master: Path, form: int) -> None:
    task = tasks.Task("why <fn_2> court? " * 3, (Request("math", "sum it"), Request("law", "sue {0}", (0,)), Request("math", "")), (ODD, "yes", "no"))

    async def work() -> None:
        async with master_of(toy_master) as master:
            known: dict[tuple[str, bool], list[int]] = {}

            def spell(text: str, special: bool) -> list[int]:
                return known.setdefault((text, special), [])

            tasks.encode(task, master.vocabulary, spell, QUERY_LIMIT, form)
            for text, special in list(known):
                known[text, special] = await master.engine.tokenise(text, special)
            taught = tasks.encode(task, master.vocabulary, spell, QUERY_LIMIT, form)
            trace = [Passed(step.node, tuple(known[step.text, False]) if form != tasks.BARE and step.text else (), answer if number < form else "")
                     for number, (step, answer) in enumerate(zip(task.steps, task.answers))]
            for done, choice in enumerate(taught.choices):
                assert (await master.prompt(task.query, trace[:done]))[0] == taught.ids[:choice], done

    asyncio.run(work())


def test_functional_tokens_in_an_answer_are_plain_text_for_the_master(toy_master: Path) -> None:
    async def work() -> None:
        async with master_of(toy_master) as master:
            first, end = master.vocabulary.first_id, master.vocabulary.end_id
            for answer in ("<fn_2>", "<fn_end>", "take <fn_1>law<fn_end>\nField:<fn_2>"):
                ids, _, _ = await master.prompt("sum", [Passed("math", (), answer)])
                assert [i for i in ids if i >= first] == [first, end], "the step's own and its end"
                assert answer in await master.engine.detokenise([i for i in ids if i < first])
                whole = (await master.prompt("sum", [Passed("math")]))[0]
                assert len(ids) > len(whole) and (await master.prompt("sum"))[0] == ids[:len((await master.prompt("sum"))[0])]

    asyncio.run(work())


def test_after_a_step_the_end_may_be_chosen_where_the_graph_lets_a_walk_end(toy_master: Path) -> None:
    async def work() -> None:
        async with master_of(toy_master, walking(toy_master)) as master:
            done = [Passed("math", (), "fine")]
            for at, first, later in (("math", {"law", "health"}, {"law", "health", END}), ("law", {"health"}, {"health"})):
                assert {n for n, _ in (await master.decide("why court", at, rewriting=False)).alternatives} == first, "a walk has at least one step"
                assert {n for n, _ in (await master.decide("why court", at, rewriting=False, trace=done)).alternatives} == later
            for among in (["law"], ["law", END]):
                made = await master.decide("why court", "math", rewriting=False, trace=done, among=among)
                assert {n for n, _ in made.alternatives} == set(among), "the end is a candidate like others"
            over = await master.decide("why court", "health", rewriting=True, trace=done, ahead=True)
            assert (over.node, over.chosen, over.token, over.rewritten, over.rewrite_note) == (END, END, -1, "", "the walk ends")
            assert over.probability == pytest.approx(1, abs=1e-3) and over.more is None and json.dumps(over.to_json())

    asyncio.run(work())


def test_no_threshold_holds_within_a_walk(toy_master: Path) -> None:
    async def work() -> None:
        text = walking(toy_master).replace("master: {", "master: {threshold: 1, fallback: health, ")
        async with master_of(toy_master, text) as master:
            for query, _ in toy_queries(3):
                found = await master.decide(query, "math", rewriting=False, trace=[Passed("math", (), "fine")])
                assert not found.fallback and found.node == found.chosen

    asyncio.run(work())


def test_more_is_what_the_next_decision_would_say_of_the_end(toy_master: Path) -> None:
    async def work() -> None:
        async with master_of(toy_master, walking(toy_master)) as master:
            seen = set()
            for query, _ in toy_queries(4):
                plain = await master.decide(query, rewriting=True)
                made = await master.decide(query, rewriting=True, ahead=True)
                assert plain.more is None and "more" not in plain.to_json() and made.chosen == plain.chosen and made.written == plain.written
                assert made.more is not None and made.to_json()["more"] == round(made.more, 4)
                seen.add(made.chosen)
                if made.chosen == "math":
                    following = await master.decide(query, "math", rewriting=False, trace=[Passed("math", made.written)])
                    assert made.more == pytest.approx(1 - dict(following.alternatives)[END], abs=1e-3)
                else:
                    assert made.more == {"law": 1.0, "health": 0.0}[made.chosen], "only a node may follow law, nothing may follow health"
            assert seen == set(WORDS)

    asyncio.run(work())


def test_a_walk_goes_on_from_what_was_written_only_where_that_came_to_an_end(toy_master: Path) -> None:
    async def work() -> None:
        async with master_of(toy_master, walking(toy_master)) as master:
            for query, _ in toy_queries(3):
                made = await master.decide(query, rewriting=True, ahead=True)
                if made.rewrite_note in ("cut off", "loops"):
                    assert made.written == () and made.rewrite_tokens > 0
                else:
                    assert len(made.written) == made.rewrite_tokens
            assert (await master.decide("sum", rewriting=False, ahead=True)).written == ()

    asyncio.run(work())


def test_a_walk_that_is_too_long_for_the_master_is_told_more_briefly_the_oldest_steps_first(toy_master: Path) -> None:
    async def work() -> None:
        async with master_of(toy_master, toy_graph(toy_master).replace("['*']}", "['*'], math: ['*', end]}"), context=320) as master:
            query = "why court contract"
            start, count, _ = await master.prompt(query)
            written = [tuple(await master.engine.tokenise(f"request {i} " + "x" * 40)) for i in range(9)]
            trace = [Passed("math", ids, "an answer") for ids in written]
            ids, _, _ = await master.prompt(query, trace)
            assert ids[:len(start)] == start and len(ids) <= 320 - count - REQUEST_ROOM
            held = [any(tuple(ids[at:at + len(w)]) == w for at in range(len(ids))) for w in written]
            assert held == sorted(held) and held[-1] and not held[0], "the newest are told whole"
            assert ids.count(master.vocabulary.first_id) == 9, "each step is told at least by its name"
            for done in (8, 9):
                assert (await master.decide(query, "math", rewriting=True, trace=trace[:done], ahead=True)).chosen in {*WORDS, END}
            assert (await master.prompt(query, trace[:1]))[0] == [*start, master.vocabulary.first_id, *written[0], master.vocabulary.end_id, *[
                i for s in prompts.passed("an answer") for i in await master.engine.tokenise(s.text, s.special)]]

    asyncio.run(work())
