"""From a graph to numbers of replicas: scenarios as files, measured times as data, the search, the commands."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lmgraph import cli, graphfile
from lmgraph.errors import DataError, UserError
from lmgraph.graph import Graph
from lmgraph.simulate import advice, draft, scenario
from lmgraph.simulate.load import Arrivals, Size
from lmgraph.simulate.run import run
from lmgraph.simulate.scenario import Gateway, Master, Redis, Scenario, Workers, slice_of
from lmgraph.simulate.size import Target, alone, least, loads, sharding_point, size, slices_for, turning_point

FEW = settings(deadline=None, max_examples=30)
SCENARIO = """\
arrivals: {rate: 2}
prompt: {mean: 100}
output: {mean: 20, cv: 1}
gateway: {replicas: 2, price: 0.1}
master: {decision_ms: 50}
workers:
  small: {share: 0.8, replicas: 2, slots: 4, prefill: 1000, alone: 20, total: 60, price: 1, fallback: large}
  large: {share: 0.2, replicas: 1, slots: 8, prefill: 1000, alone: 20, total: 80, price: 3}
seconds: 60
warm_s: 10
"""
GRAPH = """\
version: 1
master: {bundle: none.gguf, fallback: chat}
nodes:
  math: {token: 0, description: sums, rewrite: never, worker: {kind: openai, urls: [http://a/v1], model: meta/math-1.5b, timeout_s: 30, retries: 2}}
  law: {token: 1, description: courts, worker: {kind: openai, urls: [http://a/v1], model: meta/math-1.5b}}
  chat: {token: 2, description: talk, worker: {kind: openai, urls: [http://b/v1], model: Llama-3.1-8B-Instruct}}
  fixed: {token: 3, description: a fixed answer, worker: {kind: scripted, answers: {'*': no}}}
edges: {start: ['*']}
"""


def graph(text: str = GRAPH) -> Graph:
    return graphfile.loads(text)


@pytest.fixture(autouse=True)
def short_simulations(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it takes to see the difference that a test is about."""
    monkeypatch.setattr("lmgraph.simulate.size.REQUESTS", 3000)


# ---------------------------------------------------------------- scenarios as files


def test_a_scenario_is_read_with_its_defaults_and_written_back_the_same() -> None:
    made = scenario.loads(SCENARIO)
    assert made.arrivals == Arrivals(2) and made.prompt == Size(100) and made.output == Size(20, 1)
    assert [group.name for group in made.workers] == ["small", "large"] and made.workers[0].fallback == "large"
    assert made.redis == Redis() and made.gateway == Gateway(price=0.1)
    assert scenario.loads(yaml.safe_dump(scenario.to_dict(made), sort_keys=False)) == made
    scaled = scenario.loads(SCENARIO.replace("price: 3", "price: 3, scaling: {least: 0, counts: all}"))
    assert scaled.workers[1].scaling == scenario.Scaling(0, counts="all")
    assert scenario.loads(yaml.safe_dump(scenario.to_dict(scaled), sort_keys=False)) == scaled


def test_every_problem_of_a_scenario_is_named_at_once() -> None:
    text = SCENARIO.replace("rate: 2", "rate: -1, kind: often").replace("replicas: 2, price", "replicas: 0, price").replace("decision_ms: 50", "speed: 1")
    with pytest.raises(DataError) as caught:
        scenario.loads(text.replace("seconds: 60", "seconds: soon"), "mine.yaml")
    said = str(caught.value)
    for part in ("mine.yaml has 5 problems", "arrivals.rate: found -1, expected 0", "arrivals.kind: found 'often'; valid: poisson", "gateway.replicas: found 0",
                 "master.speed: unknown key; valid: kind, share", "seconds: found text"):  # fmt: skip
        assert part in said


@pytest.mark.parametrize(("change", "expected"), [
    (("alone: 20, total: 60", "alone: 20, total: 90"), "workers.small.total: found 90, expected 20 (alone) to 80 (slots times alone)"),
    (("fallback: large", "fallback: huge"), "workers.small.fallback: 'huge' is no group; valid: small, large"),
    (("share: 0.2", "share: 0.3"), "their shares sum to 1.1"),
    (("rate: 2", "rate: 2, kind: bursty, peak: 20"), "arrivals.peak: found 20; with these busy_s and quiet_s the mean allows at most 10"),
    (("rate: 2", "kind: closed"), "kind closed needs clients"),
    (("replicas: 1, slots", "replicas: 0, slots"), "nothing would start one"),
    (("price: 3", "price: 3, scaling: {least: 2}"), "workers.large.replicas: found 1, expected 2 to 100 (scaling)"),
])  # fmt: skip
def test_what_does_not_fit_together_in_a_scenario_is_refused(change: tuple[str, str], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        scenario.loads(SCENARIO.replace(*change))
    assert expected in str(caught.value)


@given(st.text(max_size=60) | st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3)
       | st.dictionaries(st.sampled_from(["arrivals", "workers", "rate", "kind", "small", "slots", "scaling", "mean", "gateway", "replicas"]), inner, max_size=4)).map(yaml.safe_dump))
@FEW
def test_whatever_stands_in_a_file_it_is_a_scenario_or_a_data_error(text: str) -> None:
    try:
        made = scenario.loads(text)
    except DataError:
        return
    assert not scenario.check(made)


# ---------------------------------------------------------------- drafts


@pytest.mark.parametrize(("name", "billions"), [
    ("smollm2-135m", 0.135), ("qwen2.5-coder-1.5b", 1.5), ("meta-llama/Llama-3.1-70B-Instruct", 70), ("mixtral-8x7b", 56), ("phi-3-mini-4k", None), ("gpt-4o", None),
    ("model.q8_0.gguf", None), ("llama3.2:3b", 3),
])  # fmt: skip
def test_a_models_name_tells_its_size_where_it_does(name: str, billions: float | None) -> None:
    assert draft.billions_of(name) == pytest.approx(billions) if billions else draft.billions_of(name) is None


def test_nodes_of_one_model_are_one_group_on_the_smallest_server_that_takes_it() -> None:
    made = draft.draft(graph(), 10).scenario
    small, chat = made.workers
    assert (small.name, small.share, small.timeout_s, small.retries) == ("meta/math-1.5b", 0.5, 120, 1)
    assert (chat.name, chat.share) == ("Llama-3.1-8B-Instruct", 0.25), "the scripted node needs no worker"
    assert small.fallback == chat.name and not chat.fallback
    servers = {row["name"]: row for row in draft.known()["servers"]}
    assert small.total == servers["vLLM, one A10G"]["total"] and chat.total == servers["vLLM, one H100"]["total"]
    known = draft.known()["master"]
    assert made.master.decision_ms == pytest.approx(known["plain_ms"] / 4 + known["rewriting_ms"] * 3 / 4), "one of four nodes is never rewritten for"
    weighted = draft.draft(graph(), 10, shares={"math": 7})
    assert weighted.scenario.workers[0].share == pytest.approx(0.8)
    assert not scenario.check(made)


def test_what_cannot_be_sized_is_named_all_at_once_and_a_size_can_be_told() -> None:
    text = GRAPH.replace("meta/math-1.5b", "gpt-4o")
    with pytest.raises(UserError, match=r"(?s)on cpu.*gpt-4o: its name tells no size.*Llama-3.1-8B-Instruct: no cpu server for 8 billion") as caught:
        draft.draft(graph(text), 10, hardware="cpu")
    assert "--billions gpt-4o=8" in caught.value.hint
    assert draft.draft(graph(text), 10, billions={"gpt-4o": 1.5}).scenario.workers[0].name == "gpt-4o"
    with pytest.raises(UserError, match="no nodes: physics"):
        draft.draft(graph(), 10, shares={"physics": 2})
    only_fixed = "version: 1\nnodes: {a: {token: 0, description: a, worker: {kind: scripted, answers: {'*': x}}}}\nedges: {start: ['*']}"
    with pytest.raises(UserError, match="nothing to size"):
        draft.draft(graph(only_fixed), 10)


def test_votes_and_walks_are_counted_and_said() -> None:
    voted = draft.draft(graph(GRAPH + "answer: {mode: vote, workers: 4}\n"), 10)
    assert voted.scenario.hops == 4 and any("a vote's answers" in line for line in voted.assumptions)
    walked = draft.draft(graph(GRAPH + "answer: {mode: auto}\n"), 10, hops=1.5)
    assert walked.scenario.hops == 1.5 and any("1.5 worker calls" in line for line in walked.assumptions)


def test_every_figure_says_whether_it_was_measured_and_where() -> None:
    data = draft.known()
    rows = [data["traffic"], data["gateway"], data["store"], data["master"], data["master"]["gpu"], *data["servers"]]
    assert all(row["how"] in ("measured", "partly measured", "assumed") and len(row["source"]) > 20 for row in rows)
    for row in data["servers"]:
        assert not scenario.check(Scenario(Arrivals(1), (draft.workers_of(row, "w"),))), row["name"]
        assert row["hardware"] == "cpu" or row["how"] == "assumed", "no GPU was measured here"


# ---------------------------------------------------------------- arithmetic and search


def tiny(rate: float = 20, **more: Any) -> Scenario:
    """A scenario whose answers are short, so that a few seconds tell enough."""
    group = Workers("w", 1.0, 1, 8, 2000, 50, 200, price=1)
    return replace(Scenario(Arrivals(rate), (group,), Size(100, 1), Size(20, 1), Gateway(1, 2.0, 0.05, 1.0, price=0.1), Master(decision_ms=30)), **more)


def test_the_least_numbers_are_what_the_loads_allow() -> None:
    target = Target(load=0.7)
    made = least(tiny(200, redis=Redis(5.0)), target)
    found = loads(made)
    assert all(share <= 0.7 for share in found.values())
    group = made.workers[0]
    assert loads(replace(made, workers=(replace(group, replicas=group.replicas - 1),)))["w"] > 0.7
    fewer = replace(made, gateway=replace(made.gateway, replicas=made.gateway.replicas - 1))
    assert loads(fewer)["master"] > 0.7, "the masters in them are what gateways are needed for"
    assert made.redis.shards == 2
    few = least(tiny(200, gateway=Gateway(1, 0.1, 0, active=10), master=Master("none")), target)
    assert few.gateway.replicas > 200 * 0.5 / 10, "a gateway may have ten answers in the making"


def test_a_load_of_an_engine_is_the_share_of_what_it_can_do_at_most() -> None:
    group = tiny().workers[0]
    most = 1 / (100 / 2000 + 20 / 200)
    full = replace(tiny(), gateway=Gateway(1, 0, 0, active=10**6), master=Master("none"), redis=Redis(0, 0, 0), workers=(replace(group, timeout_s=20.0),))
    for share, answered in ((0.8, 1.0), (1.3, 1 / 1.3)):
        found = run(replace(full, arrivals=Arrivals(most * share), warm_s=100, seconds=400), 1)
        assert found.answered / found.requests == pytest.approx(answered, abs=0.07)


def test_sizing_holds_its_target_and_a_step_less_does_not() -> None:
    bursty = tiny(20, arrivals=Arrivals(20, "bursty", peak=3, busy_s=10, quiet_s=40), master=Master("none"))
    target = Target(0.5)
    tried: list[Scenario] = []
    found = size(bursty, target, 1, tried=tried.append)
    assert found.figures.first.p99 <= 0.5 and found.simulations == len(tried) > 1
    before = run(slice_of(tried[-2], found.slices), 1)
    assert before.first.p99 > 0.5, "the last step was needed"
    assert least(bursty, target).workers[0].replicas < found.scenario.workers[0].replicas
    assert found.per_hour == pytest.approx(found.scenario.workers[0].replicas * 1 + found.scenario.gateway.replicas * 0.1)


def test_a_target_that_an_empty_service_misses_is_refused_before_anything_is_simulated() -> None:
    with pytest.raises(UserError, match=r"takes 0.0\d s where nobody waits; the target .* is 0.05 s") as caught:
        size(tiny(), Target(0.05), tried=lambda made: pytest.fail("simulated"))
    assert "--p99" in caught.value.hint


def test_large_scenarios_are_cut_into_slices_that_are_not_too_small() -> None:
    made = least(tiny(10_000), Target())
    slices = slices_for(made)
    assert 20 <= slices <= 100
    assert made.workers[0].replicas / slices >= 4 and made.arrivals.rate / slices >= 100
    assert slices_for(least(tiny(20), Target())) == 1


def test_a_master_on_a_gpu_pays_from_some_rate_on_and_redis_is_enough_up_to_another() -> None:
    made = draft.draft(graph(), 10)
    rate = turning_point(made, Target())
    assert rate is not None

    def price(kind: Master, at: float) -> float:
        found = least(replace(made.scenario, master=kind, arrivals=Arrivals(at)), Target())
        return found.gateway.replicas * found.gateway.price + (found.master.replicas * kind.price if kind.kind == "batched" else 0)

    assert price(made.batched, rate) < price(made.scenario.master, rate)
    assert price(made.batched, rate * 0.8) > price(made.scenario.master, rate * 0.8)
    assert turning_point(replace(made, batched=replace(made.batched, price=1e9)), Target()) is None
    most = sharding_point(made.scenario, Target(load=0.5))
    assert most == pytest.approx(500 / made.scenario.redis.work_ms)
    at = replace(made.scenario, arrivals=Arrivals(most * 1.01))
    assert least(at, Target(load=0.5)).redis.shards == 2
    assert sharding_point(replace(made.scenario, redis=Redis(0.0)), Target()) is None


def test_advice_takes_the_cheaper_master_and_compares_with_one_large_model() -> None:
    made = draft.Draft(tiny(), Master("batched", batch_ms=5, query_ms=1, price=50), Workers("large", 1, 1, 16, 1500, 30, 200, price=20), ("a guess",))
    found = advice.advise(made, Target())
    assert found.best.scenario.master.kind == "embedded" and list(found.others) == [advice.NAMES["batched"], advice.NAMES["large"]]
    assert advice.advise(made, Target(), "batched").best.scenario.master.kind == "batched"
    large = found.others[advice.NAMES["large"]]
    assert not isinstance(large, str) and large.figures.per_thousand > found.best.figures.per_thousand
    assert alone(made).master.kind == "none" and alone(made).workers[0].share == 1
    told = "\n".join(advice.notes(found))
    assert "99 of 100 first tokens within 2 s" in told
    assert found.turning is None and "cheaper at any rate" in told, "at this price"
    cheap = replace(found, turning=67.4)
    assert "Masters on GPUs are cheaper than one in every gateway from about 67 requests/s on." in advice.notes(cheap)
    json.dumps(found.to_json(), allow_nan=False)
    slow = replace(made, large=replace(made.large, prefill=10))
    assert "nobody waits" in str(advice.advise(slow, Target()).others[advice.NAMES["large"]]), "what cannot hold the target is said, not hidden"
    with pytest.raises(UserError, match="nobody waits"):
        advice.advise(replace(made, scenario=replace(tiny(), prompt=Size(10_000))), Target())


def test_more_cells_than_one_are_advised_where_one_redis_is_not_enough() -> None:
    made = draft.Draft(tiny(300, redis=Redis(6.9)), Master("batched", price=50), Workers("large", 1, 1, 16, 1500, 30, 200, price=20), ())
    told = "\n".join(advice.notes(advice.advise(made, Target(), "embedded")))
    assert "run 3 cells" in told and "up to about 100 requests/s" in told


# ---------------------------------------------------------------- commands


@dataclass
class Result:
    code: Any
    out: str
    err: str


class Run(Protocol):
    def __call__(self, *arguments: str) -> Result: ...


@pytest.fixture
def lmgraph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenario.yaml").write_text(SCENARIO)
    (tmp_path / "graph.yaml").write_text(GRAPH)

    def call(*arguments: str) -> Result:
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as caught:
            cli.main(list(arguments))
        return Result(caught.value.code, out.getvalue(), err.getvalue())

    return call


def test_size_tells_numbers_comparison_and_every_assumption(lmgraph: Run) -> None:
    done = lmgraph("kubernetes", "size", "--rate", "3", "--p99", "3")
    assert done.code == 0, done.err
    for part in ("What to run", "gateway with master", "meta/math-1.5b", "one large model", "Masters on GPUs are cheaper", "Assumptions:", "- prices:", "Lambda's vLLM benchmark"):
        assert part in " ".join(done.out.split()), part


def test_size_writes_json_for_programs_and_takes_a_scenario_of_ones_own(lmgraph: Run) -> None:
    done = lmgraph("kubernetes", "size", "--scenario", "scenario.yaml", "--rate", "4", "--master", "embedded", "--output", "10", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["rate"] == 4 and found["best"]["master"]["kind"] == "embedded" and set(found["best"]["workers"]) == {"small", "large"}
    assert found["assumptions"][0] == "answers of 10 tokens on average, as asked" and "as scenario.yaml says" in found["assumptions"][1]


def test_simulate_plays_a_file_as_it_stands(lmgraph: Run) -> None:
    done = lmgraph("kubernetes", "simulate", "scenario.yaml", "--seed", "3")
    assert done.code == 0, done.err
    assert "answered" in done.out and "price of 1,000 answers" in done.out
    one, other = (json.loads(lmgraph("kubernetes", "simulate", "scenario.yaml", "--json", "--seed", seed).out) for seed in ("3", "4"))
    assert one != other and one["requests"] == pytest.approx(120, abs=40) and len(one["series"]["at"]) == 200


@pytest.mark.parametrize(("arguments", "expected"), [
    (("size", "--rate", "3", "missing.yaml"), "missing.yaml cannot be read"),
    (("size", "--rate", "0"), "0.0 is not in the range"),
    (("size", "--rate", "3", "graph.yaml", "--scenario", "scenario.yaml"), "expected one of them"),
    (("size", "--rate", "3", "--share", "math"), "--share: found 'math', expected NODE=WEIGHT"),
    (("size", "--rate", "3", "--billions", "m=many"), "--billions: found 'm=many', expected MODEL=N"),
    (("size", "--rate", "3", "--hardware", "cpu"), "no cpu server for 8 billion parameters"),
    (("size", "--rate", "3", "--arrivals", "bursty", "--peak", "50"), "the mean allows at most 10"),
    (("simulate", "nowhere.yaml"), "nowhere.yaml cannot be read"),
    (("simulate", "graph.yaml"), "unknown key"),
    (("simulate", "scenario.yaml", "--slices", "3"), "gateway.replicas is 2"),
])  # fmt: skip
def test_bad_input_is_named_and_nothing_is_simulated(lmgraph: Run, arguments: tuple[str, ...], expected: str) -> None:
    done = lmgraph("kubernetes", *arguments)
    assert done.code == 2 and expected in done.err and not done.out
    assert "Traceback" not in done.err


def test_without_simpy_the_command_says_what_to_install(lmgraph: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simpy", None)
    done = lmgraph("kubernetes", "size", "--rate", "3")
    assert done.code == 2 and "pip install 'lmgraph[simulate]'" in done.err


def test_curves_are_drawn_in_panels_over_one_axis() -> None:
    pytest.importorskip("matplotlib")
    from lmgraph.evaluate import pictures

    points = [(1.0, 2.0), (10.0, 4.0)]
    drawn = pictures.lines(
        [{"value": "seconds", "curves": {"ours": points, "theirs": points}, "log": True}, {"value": "replicas", "curves": {"all": points}, "steps": True}], "rate", "A title", log=True
    )
    upper, lower = drawn.axes
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["ours", "theirs"]
    assert [list(xy) for xy in upper.lines[0].get_xydata()] == [list(point) for point in points]
    assert (upper.get_xscale(), upper.get_yscale(), lower.get_yscale()) == ("log", "log", "linear")
    assert lower.lines[0].get_drawstyle() == "steps-post" and lower.get_xlabel() == "rate" and upper.get_title() == "A title"
