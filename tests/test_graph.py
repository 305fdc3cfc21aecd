"""The graph: YAML both ways, every problem at once, neighbours, and text that is no graph at all."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lmgraph import graph, graphfile, graphschema
from lmgraph.errors import GraphError
from lmgraph.graph import END, START, AnswerSpec, Graph, MasterSpec, Node, WorkerSpec

NAMES = st.from_regex(r"[A-Za-z0-9_-]{0,6}[A-Za-z0-9][A-Za-z0-9_-]{0,6}", fullmatch=True).filter(lambda n: n not in (START, END))
PROBABILITY = st.floats(0, 1)
WORKERS = st.one_of(
    st.builds(WorkerSpec, kind=st.just("embedded"), model=st.text(min_size=1), system=st.text(), max_tokens=st.integers(1, 9999),
              temperature=st.none() | st.floats(0, 2), price=st.tuples(*[st.floats(0, 1e8)] * 2)),
    st.builds(WorkerSpec, kind=st.just("openai"), model=st.text(min_size=1), key_env=st.text(), stream=st.booleans(), retries=st.integers(0, 10),
              urls=st.lists(st.sampled_from(["http://a:1/v1", "https://b/v1"]), min_size=1).map(tuple),
              timeout_s=st.floats(0.001, 1e6)),
    st.builds(lambda how, adapter, **rest: WorkerSpec("openai", "base", urls=("http://a:1/v1",), adapter=adapter, **how, **rest),
              st.sampled_from([{"dialect": "llamacpp"}, {"dialect": "vllm", "adapter_path": "/adapters/x"},
                               *({"dialect": "lorax", "adapter_source": source} for source in ("", *graph.SOURCES))]),
              st.text(min_size=1).filter(lambda name: name != "base"), system=st.text()),
    st.builds(WorkerSpec, kind=st.just("scripted"), answers=st.dictionaries(st.text(), st.text(), max_size=3)))


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Graphs without problems: every walk can end, fallbacks point only to earlier nodes."""
    names = draw(st.lists(NAMES, min_size=1, max_size=5, unique=True))
    numbers = draw(st.lists(st.integers(0, 10**6), min_size=len(names), max_size=len(names), unique=True))
    answers = st.builds(AnswerSpec, st.sampled_from(graph.MODES), st.integers(2, 9), judge=st.sampled_from(["", *names]),
                        voters=st.dictionaries(st.sampled_from(names), st.floats(0, 1, exclude_min=True, exclude_max=True)),
                        hops=st.integers(1, graph.MOST_HOPS), seconds=st.floats(0.001, 86_400), tokens=st.integers(1, 10**9), cost=st.none() | st.floats(0, 10**6),
                        compose=st.sampled_from(["", *names]))
    nodes = {}
    for i, (name, token) in enumerate(zip(names, numbers)):
        nodes[name] = Node(name, token, draw(st.text()), draw(WORKERS), rewrite=draw(st.sampled_from(graph.REWRITE)),
                           threshold=draw(st.none() | PROBABILITY), adapter=draw(st.text()),
                           accepts=tuple(draw(st.lists(st.sampled_from(graph.MODALITIES), unique=True))),
                           fallback=draw(st.sampled_from(["", *names[:i]])), answer=draw(st.none() | answers))
    edges: dict[str, tuple[str, ...]] = {START: ("*",)}
    for name in draw(st.lists(st.sampled_from(names), unique=True)):
        edges[name] = (*draw(st.lists(st.sampled_from(["*", *names]), max_size=3)), END)
    master = MasterSpec(draw(st.text()), draw(PROBABILITY), draw(st.sampled_from(["", *names])))
    return Graph(nodes, edges, master, draw(answers))


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(GraphError) as caught:
        graphfile.loads(text)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def only(text: str) -> str:
    found = problems(text)
    assert len(found) == 1, found
    return found[0]


def node(**changes: Any) -> dict[str, Any]:
    return {"token": 0, "description": "d", "worker": {"kind": "scripted"}, **changes}


def whole(**changes: Any) -> str:
    return yaml.safe_dump({"version": 1, "nodes": {"math": node()}, "edges": {"start": ["*"]}, **changes}, sort_keys=False)


def with_node(**changes: Any) -> str:
    return whole(nodes={"math": node(**changes)})


def with_worker(**worker: Any) -> str:
    return with_node(worker={"kind": "scripted", **worker})


def linked(*names: str, **edges: list[str]) -> Graph:
    nodes = {name: Node(name, i, "", WorkerSpec("scripted")) for i, name in enumerate(names)}
    return Graph(nodes, {at: tuple(to) for at, to in edges.items()})


BUILT_IN_STYLE = """\
# comments are allowed
version: 1
master: {bundle: mmlu, threshold: 0.35, fallback: general}
nodes:
  math:
    token: 4
    description: Algebra, calculus
    worker: {kind: embedded, model: qwen2.5-coder-1.5b, system: You are a careful mathematician.}
  law:
    token: 8
    description: Contracts
    accepts: text
    adapter: adapters/law-next
    fallback: general
    threshold: 0.5
    rewrite: never
    worker: {kind: openai, urls: "http://law-0:8000/v1", model: law-chat, key_env: LAW_KEY, timeout_s: 60}
  general:
    token: 16
    description: Anything else
    worker: {kind: scripted, answers: {"*": "{}", 7: 8}}
edges:
  start: "*"
  math: [law, end]
"""


@given(graphs())
@settings(max_examples=50, deadline=None)
def test_a_graph_comes_back_from_its_yaml_as_it_was(one: Graph) -> None:
    assert graphfile.loads(graphfile.dumps(one)) == one


@given(graphs())
@settings(max_examples=20, deadline=None)
def test_the_order_of_nodes_survives_the_file(one: Graph) -> None:
    assert list(graphfile.loads(graphfile.dumps(one)).nodes) == list(one.nodes)


def test_the_form_of_the_design_is_read_with_its_shorthands() -> None:
    one = graphfile.loads(BUILT_IN_STYLE)
    assert one.master == MasterSpec("mmlu", 0.35, "general")
    assert one.nodes["law"].worker.urls == ("http://law-0:8000/v1",)
    assert one.nodes["law"].accepts == ("text",)
    assert one.nodes["general"].worker.answers == {"*": "{}", "7": "8"}
    assert one.edges == {"start": ("*",), "math": ("law", "end")}


def test_many_ampersands_and_stars_in_descriptions_are_no_attack() -> None:
    nodes = {f"n{i}": node(token=i, description="M&A, *all* of it") for i in range(60)}
    assert len(graphfile.loads(whole(nodes=nodes)).nodes) == 60


def test_defaults_are_left_out_of_the_file() -> None:
    text = graphfile.dumps(linked("math", start=["math"]))
    assert yaml.safe_load(text)["nodes"]["math"] == {"description": "", "token": 0, "worker": {"kind": "scripted"}}


def test_every_problem_is_named_at_once_with_its_line() -> None:
    found = problems("""\
version: 2
nodes:
  math:
    token: yes
    description: 5
    colour: red
    worker: {kind: openai, retries: 11}
  law:
    token: -1
    worker: {kind: carrier-pigeon}
edges:
  start: ["*"]
""")
    expected = [(1, "this lmgraph reads version 1"), (4, "found true or false"), (5, "expected text"), (6, "unknown key"),
                (7, "needs urls"), (7, "needs a model"), (7, "at most 10"), (9, "expected 0 or more"), (8, "needs 'description'"),
                (10, "'carrier-pigeon'; valid: embedded, openai, scripted")]
    for line, words in expected:
        assert any(p.startswith(f"line {line}: ") and words in p for p in found), (line, words, found)
    assert len(found) == len(expected)


def test_every_problem_of_the_whole_is_named_at_once_with_its_line() -> None:
    found = problems("""\
version: 1
master: {fallback: nobody}
nodes:
  a: {token: 1, description: d, worker: {kind: scripted}}
  b:
    token: 1
    description: d
    fallback: c
    worker: {kind: scripted}
edges:
  a: [nowhere]
  ghost: [a]
""")
    for line, words in [(2, "'nobody'"), (6, "share functional token 1"), (8, "'c', which is no node"), (10, "no edge leaves start"),
                        (11, "'nowhere' is no node"), (12, "edges leave 'ghost'")]:
        assert any(p.startswith(f"line {line}: ") and words in p for p in found), (line, words, found)
    assert len(found) == 6


def test_a_key_written_twice_is_named_with_its_line() -> None:
    assert only("version: 1\nnodes: {}\nversion: 1\n") == "line 3: key 'version' is written twice"


def test_a_node_written_twice_is_named_with_its_line() -> None:
    assert only("nodes:\n  law: {}\n  math: {}\n  law: {}\n") == "line 4: key 'law' is written twice"


def test_broken_yaml_is_named_with_its_line() -> None:
    assert only("version: 1\nnodes: [\n").startswith("line 3: ")


@pytest.mark.parametrize(("text", "where"), [
    (whole(color=1), "color"), (whole(master={"fall_back": "math"}), "master.fall_back"), (with_node(tokens=1), "nodes.math.tokens"),
    (with_worker(url="http://a"), "nodes.math.worker.url"),
])
def test_an_unknown_key_is_named_with_the_valid_ones(text: str, where: str) -> None:
    problem = only(text)
    assert f"{where}: unknown key; valid: " in problem


@pytest.mark.parametrize(("text", "words"), [
    ("", "found nothing, expected a mapping"),
    ("just words", "found text ('just words'), expected a mapping"),
    ("[1, 2]", "found a list, expected a mapping"),
])
def test_a_file_that_is_no_mapping_is_refused(text: str, words: str) -> None:
    assert words in only(text)


@pytest.mark.parametrize(("text", "words"), [
    (whole(version="1"), "version: found text ('1'), expected a whole number"),
    (whole(version=True), "version: found true or false (True), expected a whole number"),
    (whole(nodes=[]), "nodes: found a list, expected a mapping"),
    (whole(nodes={"math": None}), "nodes.math: found nothing, expected a mapping"),
    (whole(edges={"start": 5}), "edges.start: found a whole number (5), expected a name or a list of names"),
    (whole(edges={"start": ["*"], "math": None}), "edges.math: found nothing, expected a name or a list of names"),
    (whole(edges={"start": ["*"], "math": {"law": 1}}), "edges.math: found a mapping, expected a name or a list of names"),
    (whole(edges={"start": ["math", 4]}), "edges.start: found a whole number (4) in the list"),
    (whole(edges={"start": ["math", ["math"]]}), "edges.start: found a list in the list"),
    (whole(master={"threshold": "high"}), "master.threshold: found text ('high'), expected a whole number or a number"),
    (with_node(token=True), "token: found true or false (True), expected a whole number"),
    (with_node(token=1.5), "token: found a number (1.5), expected a whole number"),
    (with_node(token=None), "token: found nothing, expected a whole number"),
    (with_node(threshold=False), "threshold: found true or false"),
    (with_node(worker="embedded"), "worker: found text"),
    (with_node(accepts=["text", 1]), "accepts: found a whole number"),
    (with_worker(retries=False), "retries: found true or false"),
    (with_worker(max_tokens=True), "max_tokens: found true or false"),
    (with_worker(answers={"q": ["a"]}), "answers.q: found a list, expected text"),
])
def test_a_value_of_the_wrong_type_is_named_with_what_was_expected(text: str, words: str) -> None:
    assert words in only(text)


@pytest.mark.parametrize(("text", "words"), [
    (with_node(token=-1), "expected 0 or more"), (with_node(threshold=1.01), "a probability from 0 to 1"),
    (whole(master={"threshold": -0.1}), "a probability from 0 to 1"), (with_node(rewrite="sometimes"), "valid: auto, always, never"),
    (with_node(accepts=["smell"]), "valid: text, image, audio"), (with_worker(kind="telepathy"), "valid: embedded, openai, scripted"),
    (with_worker(retries=-1), "at least 0"), (with_worker(retries=11), "at most 10"), (with_worker(max_tokens=0), "at least 1"),
    (with_worker(timeout_s=0), "at least 0.001"), (with_worker(temperature=2.5), "0 to 2"),
    (with_worker(urls=["ftp://x"]), "expected http:// or https://"), (with_worker(kind="embedded"), "kind embedded needs a model"),
    (with_worker(kind="openai", model="m"), "needs urls"),
])
def test_a_value_out_of_range_is_named(text: str, words: str) -> None:
    assert words in only(text)


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("line", [
    "threshold: {}", "worker: {{kind: scripted, timeout_s: {}}}", "worker: {{kind: scripted, temperature: {}}}",
])
def test_a_number_that_is_not_finite_is_refused(line: str, number: str) -> None:
    rest = "" if line.startswith("worker") else "    worker: {kind: scripted}\n"
    text = f"version: 1\nnodes:\n  a:\n    token: 0\n    description: d\n    {line.format(number)}\n{rest}edges: {{start: [a]}}\n"
    problem = only(text)
    assert problem.startswith("line 6: ")
    assert "expected a finite number" in problem


@pytest.mark.parametrize("name", ["start", "end", "*", "", "a b", "a/b", "é", "--", "x" * 65])
def test_a_name_that_cannot_be_a_nodes_is_refused(name: str) -> None:
    assert "a node's name has at most 64 letters" in only(whole(nodes={name: node()}))


@pytest.mark.parametrize("name", ["no", "on", "1", "1.5", "~", "2026-11-24"])
def test_a_name_that_yaml_reads_as_something_else_must_stand_in_quotes(name: str) -> None:
    text = "version: 1\nnodes:\n  {}: {{token: 0, description: d, worker: {{kind: scripted}}}}\nedges: {{start: '*'}}\n"
    assert any("as a node's name, expected text; put it in quotes" in p for p in problems(text.format(name)))
    if name.isalnum():
        assert list(graphfile.loads(text.format(f"'{name}'")).nodes) == [name]


def test_a_graph_without_nodes_says_how_to_add_one() -> None:
    assert "lmgraph graph add NAME" in only("version: 1\nnodes: {}\nedges: {}\n")


@pytest.mark.parametrize("missing", ["version", "nodes", "edges"])
def test_a_missing_section_is_named(missing: str) -> None:
    data = yaml.safe_load(whole())
    del data[missing]
    assert f"needs '{missing}'" in only(yaml.safe_dump(data))


@pytest.mark.parametrize("missing", ["token", "description", "worker"])
def test_a_missing_part_of_a_node_is_named(missing: str) -> None:
    row = node()
    del row[missing]
    assert f"nodes.math: needs '{missing}'" in only(whole(nodes={"math": row}))


def test_two_nodes_cannot_share_a_functional_token() -> None:
    found = only(whole(nodes={"math": node(token=7), "law": node(token=7)}))
    assert "nodes 'math' and 'law' share functional token 7" in found


def test_an_edge_to_an_unknown_node_names_the_valid_ones() -> None:
    assert graph.check(linked("a", "b", start=["a", "b"], a=["c"])) == ["edge a -> c: 'c' is no node; valid: *, end, a, b"]


def test_a_walk_must_not_end_before_it_began() -> None:
    assert graph.check(linked("a", start=["a", "end"])) == ["edge start -> end: a walk needs at least one node"]


@pytest.mark.parametrize("place", ["start", "end"])
def test_start_is_no_target_and_end_is_no_source(place: str) -> None:
    one = linked("a", start=["a"], a=["start"]) if place == "start" else linked("a", start=["a"], end=["a"])
    assert len(graph.check(one)) == 1


def test_a_node_that_cannot_be_reached_says_how_to_connect_it() -> None:
    found = graph.check(linked("a", "b", "c", start=["a"], b=["c"]))
    assert [p.split(";")[0] for p in found] == [f"node '{n}' cannot be reached from start" for n in "bc"]
    assert "lmgraph graph connect start b" in found[0]


def test_a_cycle_to_nowhere_is_named_for_every_node_in_it() -> None:
    found = graph.check(linked("a", "b", "c", start=["a", "c"], a=["b"], b=["a"], c=["end"]))
    assert len(found) == 2
    assert all("can never end" in p for p in found)


@pytest.mark.parametrize("way_out", ["end", "c"])
def test_a_cycle_with_a_way_out_is_no_problem(way_out: str) -> None:
    assert graph.check(linked("a", "b", "c", start=["a", "c"], a=["b"], b=["a", way_out])) == []


@pytest.mark.parametrize("ring", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_fallbacks_that_go_round_are_drawn(ring: list[str]) -> None:
    nodes = {name: Node(name, i, "", WorkerSpec("scripted"), fallback=ring[(i + 1) % len(ring)]) for i, name in enumerate(ring)}
    found = graph.check(Graph(nodes, {START: ("*",)}))
    assert len(found) == len(ring)
    assert found[0] == f"fallbacks go round in a ring: {' -> '.join([*ring, 'a'])}"


def test_a_fallback_that_leads_into_a_ring_is_not_itself_called_a_ring() -> None:
    nodes = {n: Node(n, i, "", WorkerSpec("scripted"), fallback=f) for i, (n, f) in enumerate([("x", "a"), ("a", "b"), ("b", "a")])}
    assert [p.split(": ")[1] for p in graph.check(Graph(nodes, {START: ("*",)}))] == ["a -> b -> a", "b -> a -> b"]


def test_a_chain_of_fallbacks_is_no_problem() -> None:
    nodes = {n: Node(n, i, "", WorkerSpec("scripted"), fallback=f) for i, (n, f) in enumerate([("x", "y"), ("y", "z"), ("z", "")])}
    assert graph.check(Graph(nodes, {START: ("*",)})) == []


def test_a_star_stands_for_every_other_node_in_the_order_of_the_file() -> None:
    one = linked("c", "a", "b", start=["*"], a=["*", "end"], b=["a", "*"])
    assert one.neighbours() == ("c", "a", "b")
    assert one.neighbours("a") == ("c", "b", "end")
    assert one.neighbours("b") == ("a", "c")


def test_a_node_may_follow_itself_only_where_it_is_named() -> None:
    assert linked("a", "b", start=["a"], a=["a", "*"]).neighbours("a") == ("a", "b")


def test_a_node_without_edges_and_an_unknown_place_have_no_neighbours() -> None:
    one = linked("a", start=["a"])
    assert one.neighbours("a") == ()
    assert one.neighbours("nobody") == ()


def test_neighbours_are_named_once() -> None:
    assert linked("a", "b", start=["b", "*", "b"]).neighbours() == ("b", "a")


@given(graphs())
@settings(max_examples=30, deadline=None)
def test_what_can_be_reached_is_closed_under_neighbours(one: Graph) -> None:
    reached = one.reachable()
    assert set(one.neighbours()) <= reached
    assert all(set(one.neighbours(name)) <= reached for name in reached)


WALK = {"mode": "walk", "hops": 4, "seconds": 30, "tokens": 9000, "cost": 0.5, "compose": "math"}


def test_the_limits_of_a_walk_and_the_price_of_a_worker_are_read_and_written() -> None:
    one = graphfile.loads(whole(answer=WALK, nodes={"math": node(worker={"kind": "scripted", "price": [0.15, 1]}, answer={"mode": "plan", "hops": 2})}))
    assert one.answer == AnswerSpec("walk", hops=4, seconds=30, tokens=9000, cost=0.5, compose="math")
    assert one.nodes["math"].answer == AnswerSpec("plan", hops=2) and one.nodes["math"].worker.price == (0.15, 1.0)
    assert graphfile.loads(graphfile.dumps(one)) == one and yaml.safe_load(graphfile.dumps(one))["answer"] == WALK


@pytest.mark.parametrize(("changes", "words"), [
    ({"mode": "run"}, "answer.mode: found 'run'; valid: single, vote, auto, walk, plan"), ({"hops": 0}, "answer.hops: found 0, expected 1 to 20"), ({"hops": 21}, "expected 1 to 20"),
    ({"hops": 2.5}, "answer.hops: found a number (2.5), expected a whole number"), ({"seconds": 0}, "answer.seconds: found 0, expected 0.001 to 86,400"),
    ({"seconds": 90_000}, "found 90000, expected"), ({"seconds": "long"}, "answer.seconds: found text ('long')"), ({"seconds": float("nan")}, "expected a finite number"),
    ({"tokens": 0}, "answer.tokens: found 0, expected 1 to 1,000,000,000"), ({"tokens": True}, "answer.tokens: found true or false"), ({"cost": -1}, "answer.cost: found -1, expected 0 to 1,000,000"),
    ({"compose": 3}, "answer.compose: found a whole number (3), expected text"), ({"compose": "nobody"}, "answer: compose 'nobody' is no node; valid: math"),
    ({"steps": 3}, "answer.steps: unknown key; valid: mode, workers, voters, judge, hops, seconds, tokens, cost, compose"),
])
def test_a_limit_that_cannot_be_one_is_named_with_what_was_expected(changes: dict[str, Any], words: str) -> None:
    assert words in only(whole(answer=WALK | changes))
    assert words.replace("answer", "nodes.math.answer", 1) in only(with_node(answer=WALK | changes))


@pytest.mark.parametrize("price", [[1], [1, 2, 3], [-1, 1], ["1", 2], [True, 1], [float("nan"), 1], [float("inf"), 1], [1e9, 1], [[1], 2], []])
def test_a_price_that_is_none_is_named(price: list[Any]) -> None:
    assert "nodes.math.worker.price: found [" in only(with_worker(price=price)) and "two prices per million tokens: [prompt, completion]" in only(with_worker(price=price))


def test_a_price_of_another_type_is_named() -> None:
    assert only(with_worker(price=3)).endswith("nodes.math.worker.price: found a whole number (3), expected a list")


# ---------------------------------------------------------------- notes: what is no problem, and worth knowing before a walk


def walking(one: Graph, mode: str = "walk", hops: int = 6) -> Graph:
    return Graph(one.nodes, one.edges, answer=AnswerSpec(mode, hops=hops))


def test_dead_ends_and_cycles_are_noted_where_queries_may_walk() -> None:
    one = linked("a", "b", "c", "d", start=["*"], a=["b", "end"], b=["a", "c"], c=[])
    assert graph.notes(one) == graph.notes(walking(one)) and graph.check(one) == [], "a request may ask for a walk, whatever the graph says"
    assert graph.notes(linked("a", "b", start=["*"])) == [], "nobody walks here"
    assert graph.notes(walking(one)) == [
        "dead ends: after c, d a walk is over, whatever is left to do; connect: lmgraph graph connect c NODE end",
        "2 nodes lie on cycles, such as a -> b -> a: a walk there goes on until the master chooses the end, or to the limit of 6 hops"]
    assert graph.notes(walking(linked("a", "b", start=["a"], a=["b"], b=["end"]))) == []


def test_the_limit_that_a_note_names_is_that_of_the_answers_that_walk() -> None:
    one = linked("a", "b", start=["*"], a=["b", "end"], b=["a"])
    nodes = {**one.nodes, "a": Node("a", 0, "", WorkerSpec("scripted"), answer=AnswerSpec("plan", hops=9))}
    (note,) = graph.notes(Graph(nodes, one.edges))
    assert note.endswith("or to the limit of 9 hops")


@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(st.sampled_from([*"abcdef", "*", END]), max_size=4)), st.sampled_from(graph.WALKS))
@settings(max_examples=100, deadline=None)
def test_notes_agree_with_a_search_of_every_way(edges: dict[str, list[str]], mode: str) -> None:
    one = walking(linked(*"abcdef", start=["*"], **edges), mode)
    follows = {n: set(one.neighbours(n)) - {END} for n in one.nodes}
    ways = {(a, b): 1 for a in follows for b in follows[a]}  # lengths of shortest ways
    for _ in follows:
        for (a, b), long in list(ways.items()):
            for c in follows[b]:
                ways[a, c] = min(ways.get((a, c), 99), long + 1)
    dead = [n for n in follows if not one.neighbours(n)]
    rings = {frozenset(b for b in follows if (a, b) in ways and (b, a) in ways) for a in follows if (a, a) in ways}
    found = graph.notes(one)
    assert len(found) == bool(dead) + len(rings)
    if dead:
        assert found.pop(0).startswith(f"dead ends: after {', '.join(dead)} a walk is over")
    for note in found:
        count, _, _, _, _, _, _, *way = note.split(":")[0].split(" ")
        names = [n for n in way if n != "->"]
        assert names[0] == names[-1] and all(b in follows[a] for a, b in pairwise(names)) and len(names) - 1 == ways[names[0], names[0]]
        (ring,) = [r for r in rings if names[0] in r]
        assert int(count) == len(ring)
        rings.remove(ring)


@given(st.text(max_size=200))
@settings(max_examples=50, deadline=None)
def test_text_that_is_no_graph_raises_nothing_but_a_graph_error(text: str) -> None:
    with pytest.raises(GraphError):
        graphfile.loads(text)


@given(st.lists(st.sampled_from(["version: ", "nodes:", "edges:", "start: ", "\n", "\n  ", "- ", "*", "&a ", "*a", "{", "}", "[", "]", "1",
                                 "a: ", "!!int ", "!!set ", "!!pairs ", "!!map ", "!!bool ", "<<: ", "? ", "'", '"', "|", "#",
                                 "token: ", "worker: "])))
@settings(max_examples=50, deadline=None)
def test_scraps_of_yaml_raise_nothing_but_a_graph_error(scraps: list[str]) -> None:
    with pytest.raises(GraphError):
        graphfile.loads("".join(scraps))


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
                      max_leaves=6)


PARTS = ("token", "description", "worker", "rewrite", "threshold", "accepts", "fallback", "adapter", "answer")
NODES = st.dictionaries(st.text(max_size=5), VALUES | st.fixed_dictionaries({}, optional={key: VALUES for key in PARTS}), max_size=2)


@given(st.fixed_dictionaries({"version": st.just(1) | VALUES, "edges": st.just({"start": "*"}) | VALUES},
                             optional={"master": VALUES, "answer": VALUES, "nodes": NODES}))
@settings(max_examples=50, deadline=None)
def test_a_mapping_of_anything_raises_nothing_but_a_graph_error(data: dict[str, Any]) -> None:
    with pytest.raises(GraphError):
        graphfile.loads(yaml.safe_dump(data))


@pytest.mark.parametrize("text", [
    '!!int ""', '!!float ""', "!!bool perhaps", "!!timestamp soon", "!!map ab", "!!map [a]", "!!python/object/apply:os.getcwd []",
    "\x00", "\t",
    "1" + ":1" * 300 + ".0", "version: 0x" + "f" * 5000, "-0b1" + "1" * 20000 + ": 1", "{[a]: 1}", "[" * 2000, '"\\ud800"', "=",
    "--- 1\n--- 2", "<<: {version: 1}", "? [a]\n: b", "x" * 4_000_001,
])
def test_yaml_of_the_worse_kind_raises_nothing_but_a_graph_error(text: str) -> None:
    with pytest.raises(GraphError):
        graphfile.loads(text)


LAUGHS = "a0: &a0 [ha]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
MERGES = "a0: &a0 !!set {? x}\n" + "".join(f"a{i}: &a{i} !!set {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10))


@pytest.mark.parametrize("text", [
    LAUGHS, MERGES, "&a [*a, *a, *a, *a]", "&a {x: *a}", LAUGHS + "nodes: {m: {worker: {kind: scripted, answers: {q: *a9}}}}\n",
    LAUGHS + "edges: {start: !!pairs [a: *a9]}\n", LAUGHS + "version: *a9\nedges: {start: *a9}\n",
], ids=["lists", "merges", "itself", "mapping-in-itself", "answers", "pairs", "edges"])
def test_a_yaml_bomb_is_refused_without_going_off(text: str) -> None:
    with pytest.raises(GraphError):
        graphfile.loads(text)


def test_an_alias_may_share_a_worker_between_nodes() -> None:
    one = graphfile.loads("""\
version: 1
nodes:
  a: {token: 0, description: d, worker: &w {kind: scripted, answers: {"*": hi}}}
  b: {token: 1, description: d, worker: *w}
edges: {start: "*"}
""")
    assert one.nodes["a"].worker == one.nodes["b"].worker


@pytest.fixture(scope="module")
def validator() -> Any:
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(graphschema.schema())
    return jsonschema.Draft202012Validator(graphschema.schema())


def test_the_schema_takes_the_form_of_the_design_and_what_is_written_from_it(validator: Any) -> None:
    validator.validate(yaml.safe_load(BUILT_IN_STYLE.replace(", 7: 8", "")))
    validator.validate(yaml.safe_load(graphfile.dumps(graphfile.loads(BUILT_IN_STYLE))))


@given(one=graphs())
@settings(max_examples=30, deadline=None)
def test_the_schema_takes_every_graph_that_is_written(validator: Any, one: Graph) -> None:
    validator.validate(yaml.safe_load(graphfile.dumps(one)))


@pytest.mark.parametrize("text", [whole(color=1), whole(version=2), with_node(token=-1), with_node(token="a"), with_worker(kind="x"),
                                  whole(edges={"start": None}), with_worker(retries=11), whole(master={"threshold": 2})])
def test_the_schema_refuses_what_loading_refuses(validator: Any, text: str) -> None:
    assert not validator.is_valid(yaml.safe_load(text))
    with pytest.raises(GraphError):
        graphfile.loads(text)


SERVED = {"kind": "openai", "urls": "http://a:1/v1", "model": "base"}


@pytest.mark.parametrize("worker, words", [
    ({"dialect": "tgi"}, "worker.dialect: found 'tgi'; valid: vllm, lorax, llamacpp"),
    ({"adapter": "law"}, "worker.adapter: needs a dialect, which says how the server is asked for it; valid: vllm, lorax, llamacpp"),
    ({"dialect": "vllm", "adapter": "base"}, "worker.adapter: found 'base', the name of its base"),
    ({"dialect": "lorax", "adapter": "law", "adapter_path": "/x"}, "worker.adapter_path: is only for an adapter of dialect vllm"),
    ({"dialect": "vllm", "adapter_path": "/x"}, "worker.adapter_path: is only for an adapter of dialect vllm"),
    ({"dialect": "vllm", "adapter": "law", "adapter_source": "hub"}, "worker.adapter_source: is only for an adapter of dialect lorax"),
    ({"dialect": "lorax", "adapter": "law", "adapter_source": "disk"}, "worker.adapter_source: found 'disk'; valid: hub, local, s3, pbase"),
    ({"kind": "embedded", "urls": [], "dialect": "vllm"}, "worker.dialect: kind embedded has none"),
])
def test_an_adapter_is_named_only_where_a_server_can_be_asked_for_it(worker: dict[str, Any], words: str) -> None:
    assert words in only(with_node(worker={**SERVED, **worker}))


def test_every_problem_of_an_adapter_is_said_at_once() -> None:
    found = problems(with_node(worker={**SERVED, "dialect": "x", "adapter": "base", "adapter_path": "/x", "adapter_source": "disk"}))
    assert len(found) == 5
