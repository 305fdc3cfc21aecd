"""Workers by measured score: shrinkage and subsets against known answers, constraints, and `graph assign` from a table to a graph that loads."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lmgraph import cli, graphfile
from lmgraph.cli import assigning
from lmgraph.errors import DataError, UserError
from lmgraph.evaluate import assign as room
from lmgraph.evaluate.assign import GRID, Scores, assign, scores, voters
from lmgraph.evaluate.outcomes import Model, Table
from lmgraph.evaluate.statistics import wilson

NAN = float("nan")


def recorded(right: Sequence[Sequence[float]], models: Sequence[Model | str] = ()) -> Table:
    """A table of these scores; models are called a, b, c, ..."""
    values = np.array(right, dtype=np.float64)
    q, m = values.shape
    made = tuple(model if isinstance(model, Model) else Model(model) for model in models or "abcdefghijklmnopqrstuvwxyz"[:m])
    return Table(tuple(map(str, range(q))), ("",) * q, ("",) * q, (0,) * q, made, values, None, ("",) * q)


def counted(counts: dict[str, dict[str, tuple[int, int]]]) -> Scores:
    """Scores of {group: {model: (right, answers)}}."""
    models = list(dict.fromkeys(m for row in counts.values() for m in row))
    right, group = [], []
    for name, row in counts.items():
        for i in range(max(n for _, n in row.values())):
            right.append([NAN if i >= row[m][1] else float(i < row[m][0]) for m in models])
            group.append(name)
    return scores(recorded(right, models), group)


def given_shrunk(shrunk: Any, sizes: Any) -> Scores:
    """Scores with these shrunken ones; the overall scores are their weighted means."""
    values, weights = np.array(shrunk, dtype=np.float64), np.array(sizes)
    groups, models = values.shape
    n = np.repeat(weights[:, None], models, axis=1)
    return Scores(tuple(f"g{i}" for i in range(groups)), tuple(f"m{i}" for i in range(models)), weights, n, values * n, values, values,
                  np.zeros((groups, models, 2)), weights @ values / weights.sum(), 1.0)


def models_of(found: Scores) -> list[Model]:
    return [Model(name) for name in found.models]


# ---------------------------------------------------------------- scores


def test_counts_shares_and_intervals_are_what_a_hand_counts() -> None:
    found = scores(recorded([[1, 0.5], [0, 0.5], [1, NAN], [1, 1]]), ["x", "x", "y", "y"])
    assert found.groups == ("x", "y") and found.models == ("a", "b")
    assert found.sizes.tolist() == [2, 2] and found.n.tolist() == [[2, 2], [2, 1]] and found.k.tolist() == [[1, 1], [2, 1]]
    assert found.raw.tolist() == [[0.5, 0.5], [1, 1]] and found.overall.tolist() == [0.75, pytest.approx(2 / 3)]
    assert tuple(found.interval[0, 0]) == wilson(1, 2) and tuple(found.interval[1, 1]) == wilson(1, 1)


def test_many_answers_keep_their_score_and_none_gets_the_overall_one() -> None:
    found = counted({"many": {"a": (4500, 5000), "b": (1000, 5000)}, "few": {"a": (2, 10), "b": (9, 10)}, "none": {"a": (0, 0), "b": (1, 2)}})
    many, few, none = found.shrunk
    assert many == pytest.approx([0.9, 0.2], abs=0.005)
    assert 0.2 < few[0] < found.overall[0] and found.overall[1] < few[1] < 0.9
    assert none[0] == pytest.approx(found.overall[0]) and math.isnan(found.raw[2, 0]) and tuple(found.interval[2, 0]) == (0, 1)


def test_the_shrunken_score_is_the_formula_of_the_docstring() -> None:
    found = counted({"x": {"a": (3, 10), "b": (7, 10)}, "y": {"a": (9, 10), "b": (1, 10)}, "z": {"a": (5, 10), "b": (5, 10)}})
    s = found.strength
    assert found.shrunk[0, 0] == pytest.approx((3 + s * 17 / 30) / (10 + s)) and found.shrunk[1, 1] == pytest.approx((1 + s * 13 / 30) / (10 + s))


def test_the_strength_is_the_most_likely_one_of_the_grid() -> None:
    found = counted({"x": {"a": (3, 12), "b": (7, 12)}, "y": {"a": (9, 12), "b": (6, 12)}, "z": {"a": (5, 12), "b": (2, 12)}})

    def likelihood(s: float) -> float:
        """The product of beta-binomial probabilities, by the rising factorials of its definition."""
        out = 1.0
        for g in range(3):
            for m in range(2):
                k, mean = int(found.k[g, m]), found.overall[m]
                rising = [math.prod(start + i for i in range(count)) for start, count in ((s * mean, k), (s * (1 - mean), 12 - k), (s, 12))]
                out *= rising[0] * rising[1] / rising[2]
        return out

    assert found.strength == max(GRID, key=likelihood)
    assert GRID[0] < found.strength < GRID[-1]


def test_groups_that_do_not_differ_shrink_most_and_groups_that_differ_wholly_least() -> None:
    assert counted({g: {"a": (50, 100), "b": (20, 100)} for g in "xyz"}).strength == pytest.approx(2000)
    assert counted({"x": {"a": (100, 100)}, "y": {"a": (0, 100)}}).strength == 1


def test_a_single_group_is_not_shrunk_and_models_always_right_or_wrong_stay_so() -> None:
    found = counted({"x": {"a": (3, 4), "b": (0, 4), "c": (4, 4)}})
    assert found.shrunk[0] == pytest.approx([0.75, 0, 1])
    assert counted({"x": {"a": (0, 4)}, "y": {"a": (0, 9)}}).shrunk.tolist() == [[0], [0]]


def test_models_without_any_recorded_answer_are_named() -> None:
    with pytest.raises(DataError, match="recorded of b, c"):
        scores(recorded([[1, NAN, NAN]]), ["x"])


@given(st.lists(st.lists(st.one_of(st.just(NAN), st.floats(0, 1)), min_size=3, max_size=3), min_size=1, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_a_shrunken_score_lies_between_the_raw_and_the_overall_one(rows: list[list[float]], data: Any) -> None:
    found = scores(recorded([[1, 0, 0.5], *rows]), data.draw(st.lists(st.sampled_from("xyz"), min_size=len(rows) + 1, max_size=len(rows) + 1)))
    for g in range(len(found.groups)):
        for m in range(3):
            ends = [found.overall[m]] + ([] if math.isnan(found.raw[g, m]) else [found.raw[g, m]])
            assert min(ends) - 1e-9 <= found.shrunk[g, m] <= max(ends) + 1e-9
            assert found.interval[g, m, 0] <= found.interval[g, m, 1]
    assert found.sizes.sum() == len(rows) + 1


# ---------------------------------------------------------------- the choice


def test_every_group_gets_its_best_model_and_the_strongest_overall_is_the_fallback() -> None:
    found = counted({"x": {"a": (90, 100), "b": (60, 100), "c": (10, 100)}, "y": {"a": (10, 100), "b": (60, 100), "c": (30, 100)}})
    made = assign(found, models_of(found))
    assert made.worker == {"x": "a", "y": "b"} and made.fallback == "b" and made.chosen == ("b", "a") and made.left_out == {}
    assert made.expected == pytest.approx((found.shrunk[0, 0] + found.shrunk[1, 1]) / 2)


def test_reasons_say_score_interval_and_the_next_best() -> None:
    found = counted({"x": {"a": (90, 100), "b": (60, 100), "c": (10, 100)}, "y": {"a": (10, 100), "b": (60, 100), "c": (70, 100)}})
    why = assign(found, models_of(found)).reasons["x"]
    assert (why.model, why.n, why.score, why.interval) == ("a", 100, 0.9, wilson(90, 100))
    assert (why.runner_up, why.shrunk, why.runner_up_shrunk) == ("b", found.shrunk[0, 0], found.shrunk[0, 1])
    only = assign(found, models_of(found), most=1).reasons
    assert only["y"].model == "b" and only["y"].runner_up == "c" and only["y"].runner_up_shrunk > only["y"].shrunk
    alone = counted({"x": {"a": (1, 2)}})
    assert assign(alone, models_of(alone)).reasons["x"].runner_up == ""


def test_a_worker_without_answers_in_a_group_has_no_score_there() -> None:
    found = counted({"x": {"a": (90, 100), "b": (10, 100)}, "y": {"a": (0, 0), "b": (1, 5)}})
    why = assign(found, models_of(found)).reasons["y"]
    assert (why.model, why.n, why.score, why.interval) == ("a", 0, None, (0.0, 1.0))


def test_groups_count_by_their_questions() -> None:
    found = given_shrunk([[0.9, 0.1], [0.1, 0.8]], [10, 90])
    assert assign(found, models_of(found), most=1).worker == {"g0": "m1", "g1": "m1"}
    assert assign(found, models_of(found), most=1).expected == pytest.approx(0.1 * 0.1 + 0.9 * 0.8)


def test_the_general_group_gets_the_fallback_whoever_is_best_there() -> None:
    found = given_shrunk([[0.9, 0.2], [0.3, 0.5]], [50, 50])
    made = assign(found, models_of(found), general="g1")
    assert made.worker == {"g0": "m0", "g1": "m0"} and made.fallback == "m0" and made.expected == pytest.approx(0.6)
    assert assign(found, models_of(found), general="elsewhere").worker == {"g0": "m0", "g1": "m1"}


def test_models_to_keep_are_chosen_in_any_case_and_count() -> None:
    found = given_shrunk([[0.9, 0.5, 0.1], [0.1, 0.6, 0.2]], [50, 50])
    assert assign(found, models_of(found), most=2, keep=["m2"]).chosen == ("m1", "m2")
    assert assign(found, models_of(found), keep=["m2"]).chosen == ("m1", "m0", "m2")
    with pytest.raises(UserError, match="at most 1 models, expected at least 2"):
        assign(found, models_of(found), most=1, keep=["m2", "m1"])
    with pytest.raises(UserError, match="'m9'") as caught:
        assign(found, models_of(found), keep=["m9"])
    assert "m0, m1, m2" in caught.value.hint
    with pytest.raises(UserError, match="m0 is to be kept and is over the limits"):
        assign(found, [Model("m0", 9), Model("m1", 1), Model("m2", 1)], billions=2, keep=["m0"])
    with pytest.raises(UserError, match="at most 0"):
        assign(found, models_of(found), most=0)


def test_limits_leave_out_what_is_over_them_and_name_what_is_unknown() -> None:
    found = given_shrunk([[0.9, 0.8, 0.7, 0.6, 0.5]], [10])
    models = [Model("m0", 70, 5.0), Model("m1", None, 0.1), Model("m2", 8, 9.0), Model("m3", 8.0, 1.0)]
    made = assign(found, models, billions=8, cost=1)
    assert made.worker == {"g0": "m3"} and made.reasons["g0"].runner_up == ""
    assert made.left_out == {"m1": "unknown size", "m4": "unknown size and cost"}
    assert assign(found, models, billions=8).worker == {"g0": "m2"} and assign(found, models, cost=1).worker == {"g0": "m1"}


def test_limits_that_no_model_meets_are_answered_with_the_smallest_there_is() -> None:
    found = given_shrunk([[0.9, 0.8]], [10])
    with pytest.raises(UserError, match=r"at most 1 billion parameters: the smallest is m1 with 3\.8 billion parameters"):
        assign(found, [Model("m0", 70), Model("m1", 3.8)], billions=1)
    with pytest.raises(UserError, match=r"a cost of 0\.5 per 1,000 queries: the cheapest is m0 with a cost of 2 per 1,000"):
        assign(found, [Model("m0", 1, 2.0), Model("m1", 1, 3.0)], cost=0.5)
    with pytest.raises(UserError, match=r"the smallest is m0 .*, no model's cost is known"):
        assign(found, [Model("m0", 1)], billions=2, cost=3)


tables = st.integers(1, 5).flatmap(lambda groups: st.integers(1, 6).flatmap(lambda models: st.tuples(
    st.lists(st.lists(st.floats(0, 1), min_size=models, max_size=models), min_size=groups, max_size=groups),
    st.lists(st.integers(1, 50), min_size=groups, max_size=groups))))


def brute(found: Scores, most: int, general: int | None = None) -> float:
    """The best expected score of any `most` models, one subset after the other."""
    best = -1.0
    for subset in combinations(range(len(found.models)), most):
        strongest = max(subset, key=lambda m: found.overall[m])
        value = sum(float(found.sizes[g]) * (row[strongest] if g == general else max(row[m] for m in subset))
                    for g, row in enumerate(found.shrunk)) / float(found.sizes.sum())
        best = max(best, value)
    return best


@given(tables, st.integers(1, 6), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_subset_is_the_best_there_is(table: Any, most: int, with_general: bool) -> None:
    found = given_shrunk(*table)
    most = min(most, len(found.models))
    if with_general and len(set(found.overall)) < len(found.models):
        return  # which of equally strong models is the strongest is nobody's to say
    made = assign(found, models_of(found), most=most, general="g0" if with_general else "")
    assert made.expected == pytest.approx(brute(found, most, 0 if with_general else None))
    assert len(made.chosen) <= most and made.fallback in made.chosen and set(made.worker.values()) <= set(made.chosen)
    assert found.overall[found.models.index(made.fallback)] == max(found.overall[found.models.index(m)] for m in made.chosen)
    told = sum(float(found.sizes[g]) * found.shrunk[g, found.models.index(made.worker[name])] for g, name in enumerate(found.groups))
    assert made.expected == pytest.approx(told / float(found.sizes.sum()))


@given(tables, st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_greedy_addition_and_swaps_end_where_no_swap_helps(table: Any, most: int) -> None:
    found = given_shrunk(*table)
    most = min(most, len(found.models))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "EXACT", 0)
        made = assign(found, models_of(found), most=most)
    exact = brute(found, most)
    assert (1 - 1 / math.e) * exact - 1e-9 <= made.expected <= exact + 1e-9
    used = {found.models.index(m) for m in made.chosen}
    for out in used:
        for new in set(range(len(found.models))) - used:
            swapped = list((used - {out}) | {new})
            assert float(found.sizes @ found.shrunk[:, swapped].max(axis=1)) / float(found.sizes.sum()) <= made.expected + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_with_too_many_subsets_to_compare_the_choice_is_as_good_or_nearly(seed: int) -> None:
    random = np.random.default_rng(seed)
    found = given_shrunk(random.uniform(0, 1, (12, 20)), random.integers(1, 100, 12))
    assert math.comb(20, 7) > room.EXACT
    subsets = np.array(list(combinations(range(20), 7)))
    exact = float((found.sizes / found.sizes.sum() @ found.shrunk[:, subsets].max(axis=2)).max())
    made = assign(found, models_of(found), most=7)
    assert 0.995 * exact <= made.expected <= exact + 1e-9 and len(made.chosen) <= 7


def test_more_models_than_there_are_may_be_allowed() -> None:
    found = given_shrunk([[0.9, 0.5], [0.1, 0.6]], [50, 50])
    assert assign(found, models_of(found), most=9).worker == assign(found, models_of(found)).worker


# ---------------------------------------------------------------- voters


def test_voters_are_the_best_of_the_models_in_the_group_with_their_scores() -> None:
    found = given_shrunk([[0.3, 0.9, 0.5], [0.6, 0.1, 0.2]], [1, 1])
    assert voters(found, ["m0", "m1", "m2"], "g0", 2) == {"m1": 0.9, "m2": 0.5}
    assert list(voters(found, ["m2", "m0"], "g1", 9)) == ["m0", "m2"]
    with pytest.raises(UserError, match="'nowhere'"):
        voters(found, ["m0"], "nowhere", 2)


def test_a_vote_asks_nodes_whose_worker_the_models_are_the_node_itself_first_then_the_general_one() -> None:
    found = Scores(**{**vars(given_shrunk([[0.3, 0.9, 0.5], [0.6, 0.1, 1.0]], [1, 1])), "groups": ("law", "math")})
    workers = {"art": "m1", "law": "m1", "math": "m0", "general": "m2", "spare": "m0", "other": "m2"}
    answers = assigning.ballots(found, workers, "general", 3)
    assert answers["law"] == {"mode": "vote", "workers": 3, "voters": {"law": 0.9, "general": 0.5, "math": 0.3}}
    assert answers["math"]["voters"] == {"general": 0.999, "math": 0.6, "art": 0.1}, "competence stays below 1"
    assert set(answers) == {"law", "math"}, "nothing is known of the others"
    assert assigning.ballots(found, {"law": "m1", "math": "m0"}, "law", 5)["law"]["workers"] == 2
    with pytest.raises(UserError, match="--vote"):
        assigning.ballots(found, {"law": "m1", "math": "m1"}, "law", 2)


# ---------------------------------------------------------------- categories and nodes

NODES = ["law", "computer_science", "electrical_engineering", "general", "Math"]


def test_categories_find_the_node_of_their_name() -> None:
    found = assigning.place(["law", "computer science", "engineering", "other", "math", "law"], NODES)
    assert found == {"law": "law", "computer science": "computer_science", "engineering": "electrical_engineering", "other": "general", "math": "Math"}


def test_categories_go_where_they_are_told_by_pairs_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "map.txt"
    file.write_text("# where they go\n\nx = y =law\nunused=general\nother=Math\n")
    assert assigning.place(["x = y", "other", ""], NODES, [str(file), "other=law", "=general"]) == {"x = y": "law", "other": "law", "": "general"}


def test_a_node_of_the_aliases_name_is_needed_only_where_there_is_none_of_the_category() -> None:
    assert assigning.place(["other"], ["other", "general"]) == {"other": "other"}


def test_categories_without_a_node_are_all_named_with_what_mends_them() -> None:
    with pytest.raises(UserError, match="'cooking lessons', 'lax'") as caught:
        assigning.place(["law", "cooking lessons", "lax"], NODES)
    assert ", ".join(NODES) in caught.value.message and "--map lax=law" in caught.value.hint and "--map 'cooking lessons=" in caught.value.hint


@pytest.mark.parametrize(("given", "words"), [
    ("law=lawyer", "--map: found 'lawyer', which is no node"), ("lax=law", "--map: the table has no category 'lax'"), ("law", "law cannot be read"),
    ("FILE", r"map\.txt:2: found 'nonsense', expected CATEGORY=NODE"),
])
def test_a_map_that_cannot_be_used_is_told(tmp_path: Path, given: str, words: str) -> None:
    (tmp_path / "map.txt").write_text("law=law\nnonsense\n")
    with pytest.raises(UserError, match=words):
        assigning.place(["law"], NODES, [str(tmp_path / "map.txt") if given == "FILE" else given])


# ---------------------------------------------------------------- the command


@dataclasses.dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def lmgraph(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> Result:
        monkeypatch.setattr("sys.stdin", io.StringIO())
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err and "Internal error" not in err, err
        return Result(int(caught.value.code or 0), out, err)

    return run


GRAPH = """\
# my graph
version: 1
master: {bundle: mmlu, threshold: 0.2}  # the master
nodes:
  # numbers
  math: {token: 4, description: numbers, worker: {kind: scripted, answers: {'*': x}}}  # old
  # courts
  law:
    token: 8
    description: courts
    worker:
      kind: embedded
      model: qwen2.5-coder-1.5b  # old
    threshold: 0.1   # of law
  art: {token: 10, description: pictures, worker: {kind: scripted, answers: {'*': x}}}
  general: {token: 16, description: the rest, worker: {kind: scripted, answers: {'*': x}}}
# who follows whom
edges: {start: ['*'], math: [law, end]}
"""
RIGHT = {"math": {"small": 30, "wide": 20, "mathy": 38}, "law": {"small": 10, "wide": 32, "mathy": 8}, "other": {"small": 20, "wide": 24, "mathy": 25}}


@pytest.fixture
def table(tmp_path: Path) -> str:
    """40 questions of each category, 3 models, sizes beside them."""
    rows = [{"category": category, "outcomes": {m: int(i < right) for m, right in row.items()}} for category, row in RIGHT.items() for i in range(40)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = [{"name": "small", "billion_parameters": 3, "cost": 1}, {"name": "wide", "billion_parameters": 70, "cost": 9},
             {"name": "mathy", "worker": {"kind": "openai", "urls": ["http://localhost:7/v1"], "model": "mathy-v2", "key_env": "KEY"}}]
    (tmp_path / "models.json").write_text(json.dumps({"models": sizes}))
    (tmp_path / "graph.yaml").write_text(GRAPH)
    return "answers.jsonl"


def test_the_written_graph_loads_and_every_node_has_the_worker_that_did_best(lmgraph: Command, table: str) -> None:
    done = lmgraph("graph", "assign", table, "--out", "new.yaml")
    assert done.code == 0 and done.out == ""
    made, old = graphfile.loads(Path("new.yaml").read_text()), graphfile.loads(GRAPH)
    workers = {name: node.worker for name, node in made.nodes.items()}
    assert {name: w.model for name, w in workers.items()} == {"math": "mathy-v2", "law": "wide", "art": "wide", "general": "wide"}
    assert workers["law"].kind == "openai" and workers["law"].urls == ("http://localhost:8000/v1",)
    assert workers["math"].urls == ("http://localhost:7/v1",) and workers["math"].key_env == "KEY", "the models file's own worker"
    assert made.edges == old.edges and made.master.fallback == "general" and made.master.threshold == 0.2
    for name, node in made.nodes.items():
        assert (node.token, node.description, node.threshold) == (old.nodes[name].token, old.nodes[name].description, old.nodes[name].threshold)


def test_a_comment_behind_each_worker_says_score_interval_and_the_next(lmgraph: Command, table: str) -> None:
    lines = lmgraph("graph", "assign", table).out.splitlines()
    low, high = wilson(38, 40)
    math_, art, general = (next(line for line in lines[lines.index(f"  {name}:"):] if line.startswith("    worker: {")) for name in ("math", "art", "general"))
    assert f"}} # 0.950 ({low:.3f} to {high:.3f}) on n=40, shrunk 0.9" in math_ and "; next: small 0." in math_
    assert "the strongest overall, no answers recorded here" in art
    assert "the strongest overall: 0.600 (" in general and "on n=40" in general and "best here: mathy" in general


def test_comments_of_the_graph_stay_and_another_run_replaces_only_its_own(lmgraph: Command, table: str) -> None:
    once = lmgraph("graph", "assign", table).out
    for comment in ("# my graph", "# the master", "  # numbers\n  math:", "  # courts\n  law:", "# of law", "# who follows whom\nedges:"):
        assert comment in once
    assert "# old" not in once
    Path("graph.yaml").write_text(once)
    assert lmgraph("graph", "assign", table).out == once


def test_the_file_says_that_the_address_is_a_guess_unless_it_is_given(lmgraph: Command, table: str) -> None:
    assert "http://localhost:8000/v1 is a guess" in lmgraph("graph", "assign", table).out
    done = lmgraph("graph", "assign", table, "--url", "http://one/v1", "--url", "https://two/v1")
    assert "guess" not in done.out and "8000" not in done.out
    assert graphfile.loads(done.out).nodes["law"].worker.urls == ("http://one/v1", "https://two/v1")
    assert lmgraph("graph", "assign", table, "--url", "one:8000").code == 2


def test_the_choices_are_shown_as_a_table_on_stderr(lmgraph: Command, table: str) -> None:
    done = lmgraph("graph", "assign", table)
    law = next(line for line in done.err.splitlines() if " law " in line)
    low, high = wilson(32, 40)
    for cell in ("wide", "40", "0.800", f"{low:.3f} to {high:.3f}", "small 0."):
        assert cell in law
    assert "Fallback: general (wide)" in done.err


def test_json_is_the_assignment_as_data(lmgraph: Command, table: str) -> None:
    done = lmgraph("graph", "assign", table, "--json")
    data = json.loads(done.out)
    assert data["nodes"]["math"]["model"] == "mathy" and data["nodes"]["math"]["score"] == 0.95 and data["nodes"]["math"]["n"] == 40
    assert data["nodes"]["math"]["interval"] == list(wilson(38, 40)) and data["nodes"]["art"] == {"model": "wide", "n": 0}
    assert data["fallback"] == {"node": "general", "model": "wide"} and data["chosen"] == ["wide", "mathy"] and data["left_out"] == {}
    assert data["categories"] == {"math": "math", "law": "law", "other": "general"} and 0.6 < data["expected"] < 0.9


def test_limits_number_and_names_of_models_hold(lmgraph: Command, table: str) -> None:
    def workers(*options: str) -> set[str]:
        done = lmgraph("graph", "assign", table, "--json", *options)
        assert done.code == 0, done.err
        return {row["model"] for row in json.loads(done.out)["nodes"].values()}

    assert workers("--most", "1") == {"wide"} and workers("--max-billions", "10") == {"small"} and workers("--max-cost", "2") == {"small"}
    assert workers("--only", "mathy", "--only", "small") == {"mathy", "small"}
    assert "Left out: mathy (unknown size)" in lmgraph("graph", "assign", table, "--max-billions", "10").err
    done = lmgraph("graph", "assign", table, "--max-billions", "1")
    assert done.code == 2 and "the smallest is small with 3 billion parameters" in done.err and done.out == ""
    done = lmgraph("graph", "assign", table, "--only", "smal")
    assert done.code == 2 and "Valid: small, " in done.err


def test_a_category_without_a_node_is_an_error_that_says_what_to_write(lmgraph: Command, table: str) -> None:
    Path("graph.yaml").write_text(GRAPH.replace("  law:", "  courts:").replace("[law, end]", "[courts, end]"))
    done = lmgraph("graph", "assign", table)
    assert done.code == 2 and "'law'" in done.err and "math, courts, art, general" in done.err and "--map law=" in done.err
    assert lmgraph("graph", "assign", table, "--map", "law=courts").code == 0


def test_a_file_that_is_there_is_not_written_over_without_force(lmgraph: Command, table: str) -> None:
    done = lmgraph("graph", "assign", table, "--out", "graph.yaml")
    assert done.code == 2 and "--force" in done.err and Path("graph.yaml").read_text() == GRAPH
    assert lmgraph("graph", "assign", table, "--out", "graph.yaml", "--force").code == 0
    assert "wide" in Path("graph.yaml").read_text()
    assert {path.name for path in Path().iterdir()} == {"answers.jsonl", "models.json", "graph.yaml"}


def test_a_graph_without_a_fallback_gets_the_node_of_the_strongest_model_as_one(lmgraph: Command, table: str) -> None:
    Path("graph.yaml").write_text(GRAPH.replace("general:", "rest:"))
    done = lmgraph("graph", "assign", table, "--map", "other=rest")
    made = graphfile.loads(done.out)
    assert made.master.fallback == "law" and made.nodes["law"].worker.model == "wide" and made.nodes["rest"].worker.model == "mathy-v2"


def test_a_graph_where_no_node_uses_the_strongest_model_gets_the_node_of_the_next_one(lmgraph: Command, table: str) -> None:
    rows = [{"category": c, "outcomes": {"one": int(c == "math"), "two": int(c == "law" and i < 39), "both": int(i < 35)}} for c in ("math", "law") for i in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("two.yaml").write_text("version: 1\nnodes:\n" + "".join(
        f"  {n}: {{token: {i}, description: d, worker: {{kind: scripted, answers: {{'*': x}}}}}}\n" for i, n in enumerate(("law", "math"))) + "edges: {start: '*'}\n")
    done = lmgraph("graph", "assign", "rows.jsonl", "--graph", "two.yaml", "--out", "new.yaml", "--json")
    made = graphfile.loads(Path("new.yaml").read_text())
    assert made.nodes["math"].worker.model == "one" and made.nodes["law"].worker.model == "two"
    assert made.master.fallback == "math" and json.loads(done.out)["fallback"] == {"node": "math", "model": "one"}
    assert "the strongest overall" not in Path("new.yaml").read_text()


def test_the_graphs_own_fallback_stays_and_gets_the_strongest(lmgraph: Command, table: str) -> None:
    Path("graph.yaml").write_text(GRAPH.replace("threshold: 0.2", "fallback: math"))
    made = graphfile.loads(lmgraph("graph", "assign", table).out)
    assert made.master.fallback == "math" and made.nodes["math"].worker.model == "wide" and made.nodes["general"].worker.model == "mathy-v2"


def test_without_a_graph_the_built_in_one_is_taken(lmgraph: Command, table: str) -> None:
    Path("graph.yaml").unlink()
    made = graphfile.loads(lmgraph("graph", "assign", table).out)
    assert len(made.nodes) == 17 and made.nodes["math"].worker.model == "mathy-v2" and made.nodes["health"].worker.model == "wide"


def test_a_bundle_beside_the_graph_is_still_found_from_another_folder(lmgraph: Command, table: str) -> None:
    Path("here").mkdir()
    Path("here", "mine").mkdir()
    Path("here", "graph.yaml").write_text(GRAPH.replace("bundle: mmlu", "bundle: mine"))
    arguments = ("graph", "assign", table, "--graph", "here/graph.yaml")
    assert graphfile.loads(lmgraph(*arguments).out).master.bundle == "here/mine"
    assert lmgraph(*arguments, "--out", "here/new.yaml").code == 0
    assert graphfile.loads(Path("here/new.yaml").read_text()).master.bundle == "mine"


@pytest.mark.parametrize(("arguments", "words"), [
    (("absent.csv",), "absent.csv does not exist"), (("answers.jsonl", "--graph", "absent.yaml"), "lmgraph graph init absent.yaml"),
    (("answers.jsonl", "--models", "absent.json"), "absent.json cannot be read"), (("answers.jsonl", "--graph", "models.json"), "models.json has"),
])
def test_files_that_cannot_be_used_end_with_a_message(lmgraph: Command, table: str, arguments: Sequence[str], words: str) -> None:
    done = lmgraph("graph", "assign", *arguments)
    assert done.code == 2 and words in done.err and done.out == ""


@pytest.mark.skipif("answer" not in {f.name for f in dataclasses.fields(next(iter(graphfile.loads(GRAPH).nodes.values())))},
                    reason="graphs without votes")
def test_a_vote_is_written_into_the_nodes_and_goes_with_the_workers_it_was_measured_with(lmgraph: Command, table: str) -> None:
    done = lmgraph("graph", "assign", table, "--vote", "3")
    graphfile.loads(done.out)
    nodes = yaml.safe_load(done.out)["nodes"]
    assert nodes["law"]["answer"]["mode"] == "vote" and list(nodes["law"]["answer"]["voters"]) == ["law", "math"] and "answer" not in nodes["art"]
    Path("graph.yaml").write_text(done.out)
    again = yaml.safe_load(lmgraph("graph", "assign", table, "--only", "small").out)["nodes"]
    assert again["law"]["answer"] == {"mode": "vote", "workers": 2}


def test_voters_of_the_whole_graph_go_with_their_workers_and_a_judge_stays(lmgraph: Command, table: str) -> None:
    text = Path("graph.yaml").read_text().replace("nodes:", "answer: {mode: vote, voters: {law: 0.9, math: 0.1}, judge: art}\nnodes:", 1)
    Path("graph.yaml").write_text(text)
    plain = yaml.safe_load(lmgraph("graph", "assign", table).out)
    assert plain["answer"] == {"mode": "vote", "judge": "art"}
    assert yaml.safe_load(lmgraph("graph", "assign", table, "--vote", "3").out)["nodes"]["law"]["answer"]["judge"] == "art"
