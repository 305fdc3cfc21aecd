"""TaskBench (Shen et al. 2023, microsoft/JARVIS): a folder with graph_desc.json, data.json, user_requests.json -> a graph and its tasks.

graph_desc.json: {nodes: [{id, desc, input-type, output-type} or {id, desc, parameters}], links: [{source, target, type}]}. The others
are JSON Lines: {id, user_request}, and {id, user_request, task_steps, task_nodes: [{task, arguments}], task_links: [{source, target}]},
where an argument `<node-0>` is the output of the first node. The names of the Hugging Face release (instruction, tool_steps, tool_nodes,
tool_links; lists as JSON text) are read, too. It knows this layout and what training reads; it plans and measures nothing.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lmgraph import graphfile
from lmgraph.assets import atomic
from lmgraph.errors import DataError
from lmgraph.graph import END, MOST_HOPS, START, AnswerSpec, Graph, MasterSpec, Node, WorkerSpec
from lmgraph.plan import Request
from lmgraph.rewrite import PLACE
from lmgraph.train.examples import held_out, lines
from lmgraph.train.tasks import KEPT, Task

FILES = ("graph_desc.json", "data.json", "user_requests.json")
EXPECTED = (
    "Expected a folder of TaskBench (github.com/microsoft/JARVIS, taskbench): graph_desc.json; data.json with lines of id, user_request, "
    "task_nodes, task_links; user_requests.json with lines of id and user_request (may be missing where data.json has them)."
)
BUNDLE = "bundle"
"""folder beside the written graph where its master is trained"""
TENTH = 10
"""percent of examples that training keeps aside and calibrates with"""
REFERENCE = re.compile(r"<node-(\d+)>")
STEP = re.compile(r"^\s*step\s*\d+\s*[:.]\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Bench:
    """The graph of a domain (its master is yet to be trained), its gold tasks, and how many were left out for which reason."""

    graph: Graph
    tasks: Sequence[Task]
    left_out: Mapping[str, int]


def load(folder: Path) -> Bench:
    """Read a folder. Raises DataError naming file and line.

    Edges are the links. From start go the nodes that begin tasks; two steps that follow one another without a link (independent ones
    of a DAG) get an edge. Both are read off the tasks that training may see. Every node may be the last.
    """
    for file in FILES[:2]:
        if not (folder / file).is_file():
            raise DataError(f"{folder} holds no {file}.", EXPECTED)
    described, links = _described(folder / FILES[0])
    names = _names(list(described))
    known = {_plain(title): name for title, name in names.items()} | names
    queries = {}
    if (folder / FILES[2]).is_file():
        queries = {str(row.get("id")): row.get("user_request") for row, _ in _rows(folder / FILES[2])}
    tasks: list[Task] = []
    left_out: Counter[str] = Counter()
    for row, where in _rows(folder / FILES[1]):
        made = _task(row, where, known, queries)
        if isinstance(made, Task):
            tasks.append(made)
        else:
            left_out[made] += 1
    if not tasks:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        raise DataError(f"{folder / FILES[1]} holds no task that can be used{f': {reasons}' if reasons else ''}.", EXPECTED)
    nodes = {name: Node(name, token, described[title], WorkerSpec("scripted")) for token, (title, name) in enumerate(names.items())}
    edges = _edges(list(nodes), [(names[source], names[target]) for source, target in links], tasks)
    hops = min(max(6, *(len(task.steps) for task in tasks)), MOST_HOPS)
    return Bench(Graph(nodes, edges, MasterSpec(BUNDLE), AnswerSpec("plan", hops=hops)), tasks, dict(left_out))


def write(bench: Bench, folder: Path) -> list[Path]:
    """graph.yaml, tasks.jsonl (all tasks) and examples.jsonl (those of one step, for `train tune --data`); the paths.

    Of the fifth of tasks that is kept aside, examples.jsonl has only the tenth that training keeps aside, too: the other it would learn.
    Raises DataError where there is a graph already, AssetError for a place that cannot be written.
    """
    if (folder / "graph.yaml").exists():
        raise DataError(f"{folder / 'graph.yaml'} exists.", "Name another folder: --write DIR")
    single = [task for task in bench.tasks if len(task.steps) == 1 and (held_out(task, TENTH) or not held_out(task, KEPT))]
    texts = {
        folder / "tasks.jsonl": "".join(_line(task) for task in bench.tasks),
        folder / "examples.jsonl": "".join(_line(task) for task in single),
        folder / "graph.yaml": graphfile.dumps(bench.graph),  # last: where it lies, the rest is whole
    }
    for path, text in texts.items():
        with atomic(path) as part:
            part.write_text(text, encoding="utf-8")
    return list(texts)


def _line(task: Task) -> str:
    steps = [{"node": step.node, "needs": list(step.needs), "rewrite": step.text} for step in task.steps]
    only = {"node": steps[0]["node"], "rewrite": steps[0]["rewrite"]}
    return json.dumps({"query": task.query, **({"steps": steps} if len(steps) > 1 else only)}, ensure_ascii=False) + "\n"


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        yield from lines([path])
    except DataError as error:
        error.hint = EXPECTED
        raise


def _described(path: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """(description of each node by its id, links) of graph_desc.json."""
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
        json.dumps(data, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}.", EXPECTED) from error
    nodes, links = (data.get(key) if isinstance(data, dict) else None for key in ("nodes", "links"))
    if not isinstance(nodes, list) or not isinstance(links, list) or not nodes:
        raise DataError(f"{path.name}: needs lists `nodes` (not empty) and `links`.", EXPECTED)
    described: dict[str, str] = {}
    for number, node in enumerate(nodes):
        title = node.get("id") if isinstance(node, dict) else None
        if not isinstance(title, str) or not title or title in described:
            raise DataError(f"{path.name}: nodes[{number}] needs an `id` of its own, a text; found {json.dumps(title)}.", EXPECTED)
        described[title] = _description(node)
    for number, link in enumerate(links):
        ends = [link.get(end) if isinstance(link, dict) else None for end in ("source", "target")]
        if not all(isinstance(end, str) and end in described for end in ends):
            raise DataError(
                f"{path.name}: links[{number}] leads from {json.dumps(ends[0])} to {json.dumps(ends[1])}: both must be nodes.", EXPECTED
            )
    return described, [(link["source"], link["target"]) for link in links]


def _description(node: Mapping[str, Any]) -> str:
    """What a node does, takes and gives, as TaskBench's own prompts tell it."""
    text = str(node.get("desc") or node["id"]).strip()
    text += "" if text.endswith(".") else "."
    parameters = [p.get("name") if isinstance(p, dict) else p for p in node.get("parameters") or []]
    for verb, things in (("Takes", node.get("input-type") or parameters), ("Gives", node.get("output-type"))):
        if isinstance(things, list) and things:
            text += f" {verb} {', '.join(str(thing) for thing in things)}."
    return text


def _names(titles: Sequence[str]) -> dict[str, str]:
    """A node's name for each id: letters, digits, _ and - of it, each name once."""
    names: dict[str, str] = {}
    for number, title in enumerate(titles):
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", title).strip("_-")[:48] or "node"
        while name in (START, END, *names.values()):
            name += f"_{number}"
        names[title] = name
    return names


def _plain(title: str) -> str:
    return title.replace("_", " ").lower()


def _list(row: Mapping[str, Any], where: str, *keys: str) -> list[Any] | None:
    """The first of several keys that is there: a list, or the JSON text of one."""
    for key in keys:
        value = row.get(key)
        if value is None:
            continue
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        if not isinstance(value, list):
            raise DataError(f"{where}: `{key}` is no list.", EXPECTED)
        return value
    return None


def _task(row: Mapping[str, Any], where: str, known: Mapping[str, str], queries: Mapping[str, Any]) -> Task | str:
    """A task, or why it cannot be one."""
    asked = (row.get("user_request"), row.get("instruction"), queries.get(str(row.get("id"))))
    query = next((text for text in asked if text is not None), None)
    nodes = _list(row, where, "task_nodes", "tool_nodes", "sampled_nodes")
    if (
        not isinstance(query, str)
        or not nodes
        or not all(isinstance(n, dict) and isinstance(n.get("task", n.get("id")), str) for n in nodes)
    ):
        raise DataError(
            f"{where}: needs a text `user_request` and a list `task_nodes` of nodes with `task`; found keys {sorted(row)}.", EXPECTED
        )
    if not query.strip():
        return "without a request"
    titles = [n.get("task", n.get("id")) for n in nodes]
    chosen = [known.get(title, known.get(_plain(title), "")) for title in titles]
    if not all(chosen):
        return "with a node that the graph has not"
    needs = _needs(nodes, chosen, _list(row, where, "task_links", "tool_links", "sampled_links") or [], known)
    order = _order(needs)
    if len(order) < len(nodes):
        return "whose steps need each other in a circle"
    texts = _list(row, where, "task_steps", "tool_steps") or []
    if len(texts) != len(nodes) or not all(isinstance(text, str) and text.strip() and not PLACE.search(text) for text in texts):
        texts = [""] * len(nodes)  # they say nothing about single nodes: only the choice is taught
    place = {old: new for new, old in enumerate(order)}
    steps = []
    for old in order:
        mine = tuple(sorted(place[need] for need in needs[old]))
        text = STEP.sub("", texts[old]).strip()
        if text and mine:
            text = f"{text.rstrip('.:')}: {' '.join(f'{{{need}}}' for need in mine)}"
        steps.append(Request(chosen[old], text, mine))
    return Task(query, tuple(steps))


def _needs(nodes: Sequence[Mapping[str, Any]], chosen: Sequence[str], links: Sequence[Any], known: Mapping[str, str]) -> list[set[int]]:
    """Whose output each node uses: what its arguments refer to, and for links by name the nearest node before it of that name."""
    needs: list[set[int]] = []
    for at, node in enumerate(nodes):
        numbers = {int(number) for number in REFERENCE.findall(json.dumps(node.get("arguments")))}
        needs.append({number for number in numbers if number < len(nodes) and number != at})
    for link in links:
        ends = [link.get(end) if isinstance(link, dict) else None for end in ("source", "target")]
        source, target = (known.get(end, known.get(_plain(end), "")) if isinstance(end, str) else "" for end in ends)
        sources = [at for at, name in enumerate(chosen) if name == source]
        for at in (at for at, name in enumerate(chosen) if name == target):
            others = [other for other in sources if other != at]
            if others and not needs[at] & set(sources):
                needs[at].add(max((other for other in others if other < at), default=others[0]))
    return needs


def _order(needs: Sequence[set[int]]) -> list[int]:
    """Steps after those that they need, else in the order in which they stand; those of a circle are left out."""
    order: list[int] = []
    while ready := [at for at in range(len(needs)) if at not in order and needs[at] <= set(order)]:
        order.append(ready[0])
    return order


def _edges(nodes: Sequence[str], links: Sequence[tuple[str, str]], tasks: Sequence[Task]) -> dict[str, tuple[str, ...]]:
    seen = [[step.node for step in task.steps] for task in tasks if not held_out(task, KEPT)]
    ways = [*links, *(pair for way in seen for pair in pairwise(way))]
    edges = {name: tuple(dict.fromkeys(target for source, target in ways if source == name)) for name in nodes}
    firsts = {way[0] for way in seen}
    starts = [name for name in nodes if name in firsts]
    for name in nodes:
        if name not in Graph({}, {**edges, START: tuple(starts)}).reachable():
            starts.append(name)
    return {START: tuple(starts), **{name: (*targets, END) for name, targets in edges.items()}}
