"""TaskBench's layout on small made files: graph, gold chains in both releases' names, what is left out, what training gets, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmgraph import graphfile
from lmgraph.errors import DataError
from lmgraph.evaluate import plans, taskbench
from lmgraph.graph import check
from lmgraph.plan import Request
from lmgraph.train import examples, tasks
from lmgraph.train.tasks import KEPT, Task
from test_cli import Command, here, jsonl, lmgraph
from test_plans import mine, roomy

__all__ = ["here", "lmgraph", "mine", "roomy"]  # fixtures

NODES = [
    {"id": "Image Downloader", "desc": "Downloads an image from a given URL.", "input-type": ["url"], "output-type": ["image"]},
    {"id": "Image-to-Text", "desc": "Reads the text of an image", "input-type": ["image"], "output-type": ["text"]},
    {"id": "Text Splicer", "desc": "Joins two texts.", "input-type": ["text", "text"], "output-type": ["text"]},
    {"id": "Image Search (by Image)", "desc": "", "input-type": [], "output-type": []},
    {"id": "send_sms", "desc": "Sends a message.", "parameters": [{"name": "phone_number", "type": "string", "desc": "whom"}, {"name": "content"}]},
]
LINKS = [
    {"source": "Image Downloader", "target": "Image-to-Text", "type": "image"},
    {"source": "Image Downloader", "target": "Image Search (by Image)", "type": "image"},
    {"source": "Image-to-Text", "target": "Text Splicer", "type": "text"},
    {"source": "Image-to-Text", "target": "Text Splicer", "type": "text"},
]
CHAIN = {
    "id": "1", "seed": 5, "type": "chain", "n_tools": 2, "sampled_nodes": [], "sampled_links": [], "user_request": "Read what is on example.com/a.png",
    "task_steps": ["Step 1: Download the image.", "Step 2: Read its text."],
    "task_nodes": [{"task": "Image Downloader", "arguments": ["example.com/a.png"]}, {"task": "Image-to-Text", "arguments": ["<node-0>"]}],
    "task_links": [{"source": "Image Downloader", "target": "Image-to-Text"}],
}
SINGLE = {"id": "2", "type": "single", "user_request": "Send 'hello' to 123", "task_steps": ["Call send_sms with content: 'hello'"],
          "task_nodes": [{"task": "send_sms", "arguments": [{"name": "content", "value": "hello"}]}], "task_links": []}


def bench(folder: Path, *rows: dict[str, Any], nodes: Any = NODES, links: Any = LINKS, requests: Any = None) -> taskbench.Bench:
    folder.mkdir(exist_ok=True)
    (folder / "graph_desc.json").write_text(json.dumps({"nodes": nodes, "links": links}))
    (folder / "data.json").write_text(jsonl(*rows))
    if requests is not None:
        (folder / "user_requests.json").write_text(jsonl(*requests))
    return taskbench.load(folder)


def with_steps(*titles: str, refers: dict[int, list[Any]] | None = None, links: list[tuple[str, str]] | None = None, **more: Any) -> dict[str, Any]:
    return {"id": "9", "user_request": "do it", "task_nodes": [{"task": title, "arguments": (refers or {}).get(at, [])} for at, title in enumerate(titles)],
            "task_links": [{"source": source, "target": target} for source, target in links or []], **more}


def test_nodes_become_experts_with_names_tokens_and_what_they_take_and_give(tmp_path: Path) -> None:
    found = bench(tmp_path, CHAIN, SINGLE).graph
    assert [(name, node.token) for name, node in found.nodes.items()] == [
        ("Image_Downloader", 0), ("Image-to-Text", 1), ("Text_Splicer", 2), ("Image_Search_by_Image", 3), ("send_sms", 4)]
    assert [node.description for node in found.nodes.values()] == [
        "Downloads an image from a given URL. Takes url. Gives image.", "Reads the text of an image. Takes image. Gives text.",
        "Joins two texts. Takes text, text. Gives text.", "Image Search (by Image).", "Sends a message. Takes phone_number, content."]
    assert found.answer.mode == "plan" and check(found) == []


def test_names_that_would_be_alike_reserved_or_empty_are_told_apart(tmp_path: Path) -> None:
    nodes = [{"id": title} for title in ("a b", "a_b", "a-b", "end", "结束", "()", "x" * 90, "x" * 91)]
    found = bench(tmp_path, with_steps("a_b"), with_steps("结束", "end"), nodes=nodes, links=[])
    names = list(found.graph.nodes)
    assert names[:5] == ["a_b", "a_b_1", "a-b", "end_3", "node"] and len(set(names)) == 8 and check(found.graph) == []
    assert graphfile.loads(graphfile.dumps(found.graph)) == found.graph
    assert [[step.node for step in task.steps] for task in found.tasks] == [["a_b_1"], ["node", "end_3"]]


def test_a_chain_is_a_task_with_needs_and_requests(tmp_path: Path) -> None:
    assert bench(tmp_path, CHAIN, SINGLE).tasks == [
        Task("Read what is on example.com/a.png", (Request("Image_Downloader", "Download the image."), Request("Image-to-Text", "Read its text: {0}", (0,)))),
        Task("Send 'hello' to 123", (Request("send_sms", "Call send_sms with content: 'hello'"),)),
    ]


def test_the_names_and_the_json_texts_of_the_other_release_are_read_alike(tmp_path: Path) -> None:
    other = {{"user_request": "instruction", "task_steps": "tool_steps", "task_nodes": "tool_nodes", "task_links": "tool_links"}.get(key, key):
             json.dumps(value) if isinstance(value, list) else value for key, value in CHAIN.items()}
    assert set(other) == {"id", "seed", "type", "n_tools", "sampled_nodes", "sampled_links", "instruction", "tool_steps", "tool_nodes", "tool_links"}
    assert bench(tmp_path, other).tasks == bench(tmp_path / "same", CHAIN).tasks


def test_requests_are_found_by_id_where_the_data_have_none(tmp_path: Path) -> None:
    without = {key: value for key, value in CHAIN.items() if key != "user_request"}
    (made,) = bench(tmp_path, without, requests=[{"id": "2", "user_request": "no"}, {"id": "1", "user_request": "Read it"}]).tasks
    assert made.query == "Read it"


A, B, C = "Image Downloader", "Image-to-Text", "Text Splicer"


@pytest.mark.parametrize(("row", "expected"), [
    (with_steps(A, B, links=[(A, B)]), [("Image_Downloader", ()), ("Image-to-Text", (0,))]),
    (with_steps(B, A, links=[(A, B)]), [("Image_Downloader", ()), ("Image-to-Text", (0,))]),
    (with_steps(B, A, refers={0: ["<node-1>"]}), [("Image_Downloader", ()), ("Image-to-Text", (0,))]),
    (with_steps(B, B, C, refers={2: ["<node-0>", "<node-1>"]}, links=[(B, C)]), [("Image-to-Text", ()), ("Image-to-Text", ()), ("Text_Splicer", (0, 1))]),
    (with_steps(B, B, C, links=[(B, C)]), [("Image-to-Text", ()), ("Image-to-Text", ()), ("Text_Splicer", (1,))]),
    (with_steps(A, B, C, refers={2: [{"name": "text", "value": "see <node-1> and <node-0>"}]}),
     [("Image_Downloader", ()), ("Image-to-Text", ()), ("Text_Splicer", (0, 1))]),
    (with_steps(A, B, refers={1: ["<node-1>", "<node-7>", "node-0"]}, links=[("Nothing", B), (A, A)]), [("Image_Downloader", ()), ("Image-to-Text", ())]),
    (with_steps("image downloader", "IMAGE-TO-TEXT"), [("Image_Downloader", ()), ("Image-to-Text", ())]),
    (with_steps("Send SMS"), [("send_sms", ())]),
])
def test_needs_come_from_references_and_links_and_steps_run_after_what_they_need(tmp_path: Path, row: dict[str, Any],
                                                                                expected: list[tuple[str, tuple[int, ...]]]) -> None:
    (made,) = bench(tmp_path, row).tasks
    assert [(step.node, step.needs) for step in made.steps] == expected


@settings(deadline=None)
@given(st.permutations(range(5)), st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=5, max_size=5))
def test_however_steps_are_listed_each_comes_after_those_that_it_refers_to(tmp_path_factory: pytest.TempPathFactory, order: list[int],
                                                                         flags: list[list[bool]]) -> None:
    titles = [node["id"] for node in NODES]
    place = {old: new for new, old in enumerate(order)}
    refers = {place[at]: [f"<node-{place[need]}>" for need in range(at) if flags[at][need]] for at in range(5)}
    made = bench(tmp_path_factory.mktemp("bench"), with_steps(*(titles[old] for old in order), refers=refers))
    (task,) = made.tasks
    names = dict(zip(titles, made.graph.nodes))
    at = {names[title]: number for number, title in enumerate(titles)}
    assert sorted(step.node for step in task.steps) == sorted(at)
    for number, step in enumerate(task.steps):
        assert all(need < number for need in step.needs)
        assert {at[task.steps[need].node] for need in step.needs} == {need for need in range(at[step.node]) if flags[at[step.node]][need]}


@pytest.mark.parametrize("steps", [None, ["only one"], ["one", ""], ["one {0}", "two"], [{"step": 1}, {"step": 2}]])
def test_steps_that_say_nothing_about_single_nodes_teach_the_choice_only(tmp_path: Path, steps: Any) -> None:
    (made,) = bench(tmp_path, {**CHAIN, "task_steps": steps}).tasks
    assert [(step.text, step.needs) for step in made.steps] == [("", ()), ("", (0,))]


def test_what_cannot_be_a_task_is_left_out_and_counted(tmp_path: Path) -> None:
    found = bench(tmp_path, CHAIN, with_steps("Oven"), with_steps(A, "Oven"), with_steps(A, B, refers={0: ["<node-1>"], 1: ["<node-0>"]}),
                  {**CHAIN, "user_request": " "})
    assert len(found.tasks) == 1 and found.left_out == {
        "with a node that the graph has not": 2, "whose steps need each other in a circle": 1, "without a request": 1}


def aside(row: Callable[[str], dict[str, Any]], whether: bool) -> dict[str, Any]:
    """A row whose request training keeps aside, or does not."""
    return next(made for made in (row(f"request {i}") for i in range(200)) if examples.held_out(Task(made["user_request"], ()), KEPT) is whether)


def test_edges_are_links_and_what_tasks_that_training_may_see_need_besides(tmp_path: Path) -> None:
    def loose(query: str) -> dict[str, Any]:
        return with_steps(B, "send_sms") | {"user_request": query}

    edges = bench(tmp_path, aside(loose, False)).graph.edges
    assert edges == {
        "start": ("Image-to-Text", "Image_Downloader"), "Image_Downloader": ("Image-to-Text", "Image_Search_by_Image", "end"),
        "Image-to-Text": ("Text_Splicer", "send_sms", "end"), "Text_Splicer": ("end",), "Image_Search_by_Image": ("end",), "send_sms": ("end",)}
    hidden = bench(tmp_path / "hidden", aside(loose, True)).graph
    assert hidden.edges["Image-to-Text"] == ("Text_Splicer", "end"), "what is kept aside says nothing"
    assert set(hidden.edges["start"]) == {"Image_Downloader", "send_sms"} and check(hidden) == []


@settings(deadline=None)
@given(st.lists(st.tuples(st.text("abc", min_size=1, max_size=6), st.lists(st.sampled_from([n["id"] for n in NODES]), min_size=1, max_size=7)),
                min_size=1, max_size=8))
def test_every_graph_is_whole_and_leads_along_all_tasks_that_training_may_see(tmp_path_factory: pytest.TempPathFactory,
                                                                            rows: list[tuple[str, list[str]]]) -> None:
    found = bench(tmp_path_factory.mktemp("bench"), *({**with_steps(*titles), "user_request": query} for query, titles in rows))
    assert check(found.graph) == [] and found.graph.answer.hops >= max(len(task.steps) for task in found.tasks)
    for task in found.tasks:
        assert examples.held_out(task, KEPT) or plans.walkable(task, found.graph, found.graph.answer.hops)


def test_what_is_written_is_what_training_and_measuring_read(tmp_path: Path) -> None:
    rows = [{**SINGLE, "user_request": f"Send {i}"} for i in range(60)]
    found = bench(tmp_path / "in", CHAIN, *rows)
    files = taskbench.write(found, tmp_path / "out")
    assert {file.name for file in files} == {"graph.yaml", "tasks.jsonl", "examples.jsonl"} == {p.name for p in (tmp_path / "out").iterdir()}
    assert graphfile.loads((tmp_path / "out/graph.yaml").read_text()) == found.graph
    assert tasks.load([tmp_path / "out/tasks.jsonl"]) == found.tasks
    learnt = examples.load([tmp_path / "out/examples.jsonl"])
    queries = {e.query for e in learnt}
    aside = {task.query for task in found.tasks if examples.held_out(task, KEPT)}
    training, kept = examples.split(learnt)
    assert {e.node for e in learnt} == {"send_sms"} and {t.query for t in found.tasks[1:]} - queries < aside
    assert not {e.query for e in training} & aside, "nothing that measures is learnt"
    assert kept and {e.query for e in kept} < aside


def test_a_graph_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    found = bench(tmp_path / "in", CHAIN)
    (tmp_path / "graph.yaml").write_text("mine")
    with pytest.raises(DataError, match="exists") as caught:
        taskbench.write(found, tmp_path)
    assert "--write DIR" in caught.value.hint and (tmp_path / "graph.yaml").read_text() == "mine" and not (tmp_path / "tasks.jsonl").exists()


@pytest.mark.parametrize(("files", "complaint"), [
    ({}, "holds no graph_desc.json"),
    ({"graph_desc.json": json.dumps({"nodes": NODES, "links": LINKS})}, "holds no data.json"),
    ({"graph_desc.json": "{", "data.json": ""}, "graph_desc.json cannot be read"),
    ({"graph_desc.json": "[]", "data.json": ""}, "graph_desc.json: needs lists `nodes` (not empty) and `links`"),
    ({"graph_desc.json": '{"nodes": [], "links": []}', "data.json": ""}, "needs lists `nodes` (not empty)"),
    ({"graph_desc.json": '{"nodes": [{"id": "a"}, {"id": "a"}], "links": []}', "data.json": ""}, 'nodes[1] needs an `id` of its own, a text; found "a"'),
    ({"graph_desc.json": '{"nodes": [{"id": 3}], "links": []}', "data.json": ""}, "nodes[0] needs an `id` of its own, a text; found 3"),
    ({"graph_desc.json": '{"nodes": [7], "links": []}', "data.json": ""}, "nodes[0] needs an `id` of its own, a text; found null"),
    ({"graph_desc.json": '{"nodes": [{"id": "a"}], "links": [{"source": "a", "target": "b"}]}', "data.json": ""}, 'links[0] leads from "a" to "b"'),
    ({"graph_desc.json": '{"nodes": [{"id": "a"}], "links": ["a"]}', "data.json": ""}, "links[0] leads from null to null"),
    ({"graph_desc.json": '{"nodes": [{"id": "\\ud800"}], "links": []}', "data.json": ""}, "graph_desc.json cannot be read"),
    ({"data.json": ""}, "holds no task that can be used."),
    ({"data.json": jsonl(with_steps("Oven"))}, "holds no task that can be used: 1 with a node that the graph has not."),
    ({"data.json": "{\n"}, "data.json:1: not JSON"),
    ({"data.json": jsonl(SINGLE, {"id": "3"})}, "data.json:2: needs a text `user_request` and a list `task_nodes` of nodes with `task`; found keys ['id']"),
    ({"data.json": jsonl({**SINGLE, "user_request": 7})}, "data.json:1: needs a text `user_request`"),
    ({"data.json": jsonl({**SINGLE, "task_nodes": ["send_sms"]})}, "data.json:1: needs a text `user_request` and a list `task_nodes`"),
    ({"data.json": jsonl({**SINGLE, "task_nodes": "no list"})}, "data.json:1: `task_nodes` is no list"),
    ({"data.json": jsonl({**SINGLE, "task_links": {"a": "b"}})}, "data.json:1: `task_links` is no list"),
    ({"data.json": jsonl(SINGLE), "user_requests.json": "[1]\n"}, "user_requests.json:1: found list, expected an object"),
])
def test_what_is_no_folder_of_taskbench_is_refused_by_file_and_line(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    if "graph_desc.json" not in files and files:
        files = {"graph_desc.json": json.dumps({"nodes": NODES, "links": LINKS})} | files
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        taskbench.load(tmp_path)
    assert complaint in caught.value.message and caught.value.hint == taskbench.EXPECTED


# ---------------------------------------------------------------- the command


def test_graph_and_tasks_are_written_with_the_commands_that_go_on(lmgraph: Command) -> None:
    bench(Path("bench"), CHAIN, SINGLE, with_steps("Oven"))
    found = lmgraph("evaluate", "plans", "--data", "bench", "--write", "out")
    assert found.code == 0 and "wrote out/graph.yaml" in found.out and "left out: 1 task with a node that the graph has not" in found.err
    assert "lmgraph train tune -g out/graph.yaml --data out/examples.jsonl --tasks out/tasks.jsonl --out out/bundle" in found.err
    assert "lmgraph evaluate plans out/tasks.jsonl -g out/graph.yaml --kept" in found.err
    untrained = lmgraph("evaluate", "plans", "out/tasks.jsonl", "-g", "out/graph.yaml", "--contestant", "master")
    assert untrained.code == 1 and "Master bundle 'bundle' not found" in untrained.err and "lmgraph train tune" in untrained.err
    again = lmgraph("evaluate", "plans", "--data", "bench", "--write", "out")
    assert again.code == 2 and "exists" in again.err and "--write DIR" in again.err
    found = lmgraph("evaluate", "plans", "--data", "bench", "--write", "other", "--json")
    assert {key: found.data[key] for key in ("nodes", "tasks")} == {"nodes": 5, "tasks": 2} and len(found.data["files"]) == 3


def test_its_nodes_need_a_master_of_their_own_and_a_list_in_the_prompt_needs_none(lmgraph: Command, mine: None) -> None:
    bench(Path("bench"), CHAIN, SINGLE, {**SINGLE, "user_request": "Send 'a longer text' to 456"})
    found = lmgraph("evaluate", "plans", "--data", "bench")
    assert found.code == 2 and "need a master of their own" in found.err and "--write DIR" in found.err and "--contestant listing" in found.err
    found = lmgraph("evaluate", "plans", "--data", "bench", "-g", "graph.yaml")
    assert found.code == 2 and "'Image-to-Text'" in found.err and "which no node is called" in found.err
    found = lmgraph("evaluate", "plans", "--data", "bench", "--contestant", "listing", "--json")
    assert found.code == 0 and found.data["tasks"] == 1 and found.data["contestants"]["list in the prompt, smollm2-135m"]["n"] == 1, found.err
