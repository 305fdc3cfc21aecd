"""The graph: nodes, edges, who may follow whom, and what is wrong with it as a whole.

Pure. It knows what a node is (everything a node is, is data) and which node may follow which. It does not know the file it came
from (graphfile.py), whether a bundle or a weights file exists, nor how to talk to a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

START, END = "start", "end"
KINDS = ("embedded", "openai", "scripted")
REWRITE = ("auto", "always", "never")
DIALECTS = ("vllm", "lorax", "llamacpp")
"""servers that put a LoRA on their base for one request, each of which is asked for it in a way of its own"""
SOURCES = ("hub", "local", "s3", "pbase")
"""where LoRAX may fetch an adapter from"""
MODALITIES = ("text", "image", "audio")
MODES = ("single", "vote", "auto", "walk", "plan")
VOTERS = (2, 9)
"""fewest and most workers of a vote"""
WALKS = ("auto", "walk", "plan")
"""modes in which a query may need several hops"""
MOST_HOPS = 20
VERSION = 1


@dataclass(frozen=True)
class WorkerSpec:
    """How a node answers. `embedded`: `model` is a catalogue name or a GGUF file; `openai`: `urls` of one or more replicas."""

    kind: str
    model: str = ""
    system: str = ""
    urls: tuple[str, ...] = ()
    key_env: str = ""
    """name of the environment variable that holds the API key; the key itself is never written in a graph"""
    dialect: str = ""
    """`openai` only: which server it is, where that matters: one that puts adapters on its base. '': any that speaks OpenAI's API"""
    adapter: str = ""
    """name of the LoRA that this server puts on `model` for this node's requests; '': the base alone. Not `Node.adapter`, the master's"""
    adapter_path: str = ""
    """`vllm` only: where the server finds the adapter, which is loaded from there when the server does not have it yet"""
    adapter_source: str = ""
    """`lorax` only: where it fetches the adapter from (one of SOURCES); '': from where it was started to"""
    stream: bool = True
    """`openai` only: False asks for a whole answer whenever the client wants it whole; it must then be there within `timeout_s`"""
    timeout_s: float = 120.0
    start_timeout_s: float = 0.0
    """`openai` only: how long a server that takes no connection (a worker at zero replicas that is being started) is tried again"""
    retries: int = 1
    max_tokens: int = 512
    temperature: float | None = None
    answers: Mapping[str, str] = field(default_factory=dict)
    """`scripted` only: request -> answer, '*' for any"""
    price: tuple[float, float] = (0.0, 0.0)
    """of a million tokens of prompt and of completion, in any one currency"""


@dataclass(frozen=True)
class AnswerSpec:
    """How a query is answered: by one worker (`single`), by `workers` of them whose answers are weighed (`vote`), or by a walk.

    `walk`: the master chooses hop by hop; `plan`: it writes all steps first; `auto`: a plan where the master says that one expert is not
    enough, else a single worker. A walk stops at `hops`, `seconds`, `tokens` (of all steps together) and `cost` (None: no limit).
    """

    mode: str = "single"
    workers: int = 3
    voters: Mapping[str, float] = field(default_factory=dict)
    """node -> measured probability that its worker is right; the most competent of them vote. None named: the master's best"""
    judge: str = ""
    """node whose worker makes one answer out of free texts, which no vote can compare; '': the most competent answer is taken"""
    hops: int = 6
    seconds: float = 600.0
    tokens: int = 50_000
    cost: float | None = None
    compose: str = ""
    """node whose worker makes one answer out of a walk's parts, where it has several; '': the last step's worker"""


@dataclass(frozen=True)
class Node:
    """One expert. `token` is its functional token's number, written down and never derived from order."""

    name: str
    token: int
    description: str
    worker: WorkerSpec
    rewrite: str = "auto"
    threshold: float | None = None
    accepts: tuple[str, ...] = ("text",)
    fallback: str = ""
    """node that takes over when this one's worker fails"""
    adapter: str = ""
    answer: AnswerSpec | None = None
    """how queries for this node are answered; None: as the graph says"""


@dataclass(frozen=True)
class MasterSpec:
    """Which master chooses: a bundle's name or folder, or a GGUF with a vocabulary; below `threshold`, `fallback` answers.

    With `scope`, queries that belong to no node go to `fallback` too: those whose `Decision.scope` is below it.
    Within a conversation the node of the turn before stays unless another one is more probable by at least `margin`.
    `server`: URL of a llama.cpp server that has the master's weights, in place of loading them here; `key_env`: variable with its key.
    """

    bundle: str = "mmlu"
    threshold: float = 0.0
    fallback: str = ""
    margin: float = 0.3
    scope: float | None = None
    server: str = ""
    key_env: str = ""


@dataclass(frozen=True)
class Graph:
    """Nodes and directed edges. `edges[start]` are the nodes that may come first."""

    nodes: Mapping[str, Node]
    edges: Mapping[str, tuple[str, ...]]
    master: MasterSpec = MasterSpec()
    answer: AnswerSpec = AnswerSpec()
    """how queries are answered, where a node says nothing else"""

    def neighbours(self, at: str = START) -> tuple[str, ...]:
        """Nodes (and `end`) that may come after `at`, `*` unfolded to every node, in the order of the file."""
        out: list[str] = []
        for name in self.edges.get(at, ()):
            out += [n for n in self.nodes if n != at] if name == "*" else [name]
        return tuple(dict.fromkeys(out))

    def reachable(self, at: str = START) -> set[str]:
        """Every node that can be reached from `at`."""
        seen: set[str] = set()
        todo = [at]
        while todo:
            for name in self.neighbours(todo.pop()):
                if name not in seen:
                    seen.add(name)
                    todo.append(name)
        return seen


def check(graph: Graph, where: Callable[[tuple[str, ...]], str] = lambda path: "") -> list[str]:
    """Every problem of a graph as a whole: edges, tokens, fallbacks, voters, nodes that cannot be reached, cycles to nowhere."""
    problems: list[str] = []

    def say(path: tuple[str, ...], text: str) -> None:
        problems.append(where(path) + text)

    names = set(graph.nodes)
    if not names:
        say(("nodes",), "the graph has no nodes; add one: lmgraph graph add NAME")
    tokens: dict[int, str] = {}
    for name, node in graph.nodes.items():
        if node.token in tokens:
            say(("nodes", name, "token"), f"nodes {tokens[node.token]!r} and {name!r} share functional token {node.token}")
        tokens.setdefault(node.token, name)
        if node.fallback and node.fallback not in names:
            say(("nodes", name, "fallback"), f"fallback of {name!r} is {node.fallback!r}, which is no node; valid: {', '.join(names)}")
        elif node.fallback and _ring(graph, name):
            say(("nodes", name, "fallback"), f"fallbacks go round in a ring: {' -> '.join(_ring(graph, name))}")
    if graph.master.fallback and graph.master.fallback not in names:
        say(("master", "fallback"), f"master.fallback is {graph.master.fallback!r}, which is no node; valid: {', '.join(sorted(names))}")
    for path, spec in _answers(graph):
        for voter in spec.voters:
            if voter not in names:
                say((*path, "voters", voter), f"{'.'.join(path)}: voter {voter!r} is no node; valid: {', '.join(graph.nodes)}")
        for role in ("judge", "compose"):
            if (name := getattr(spec, role)) and name not in names:
                say((*path, role), f"{'.'.join(path)}: {role} {name!r} is no node; valid: {', '.join(graph.nodes)}")
    if not graph.edges.get(START) and names:
        say(("edges",), 'no edge leaves start: nothing can be chosen first; write  start: ["*"]')
    for at, targets in graph.edges.items():
        if at != START and at not in names:
            say(("edges", at), f"edges leave {at!r}, which is no node; valid: start, {', '.join(sorted(names))}")
        for to in targets:
            if to not in names and to not in ("*", END):
                say(("edges", at), f"edge {at} -> {to}: {to!r} is no node; valid: *, end, {', '.join(sorted(names))}")
            if at == START and to == END:
                say(("edges", at), "edge start -> end: a walk needs at least one node")
    if problems:
        return problems
    reached = graph.reachable()
    for name in graph.nodes:
        if name not in reached:
            say(("nodes", name), f"node {name!r} cannot be reached from start; connect it: lmgraph graph connect start {name}")
        elif graph.neighbours(name) and END not in graph.reachable(name) and not _stops(graph, name):
            say(("edges", name), f"from {name!r} the walk can never end (a cycle to nowhere); connect it: lmgraph graph connect {name} end")
    return problems


def notes(graph: Graph) -> list[str]:
    """What is no problem, and worth knowing before a walk: dead ends, and cycles that only the limit of hops stops."""
    out: list[str] = []
    hops = max((spec.hops for _, spec in _answers(graph) if spec.mode in WALKS), default=0)
    if not hops and not any(graph.neighbours(name) for name in graph.nodes):  # nobody walks here
        return out
    hops = hops or graph.answer.hops
    if dead := [name for name in graph.nodes if not graph.neighbours(name)]:
        out.append(
            f"dead ends: after {', '.join(dead)} a walk is over, whatever is left to do; connect: lmgraph graph connect {dead[0]} NODE end"
        )
    before: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for name in graph.nodes:
        for following in graph.neighbours(name):
            if following != END:
                before[following].append(name)
    backwards = Graph(graph.nodes, {name: tuple(those) for name, those in before.items()})
    seen: set[str] = set()
    for name in graph.nodes:
        if name not in seen and (ring := _cycle(graph, name)):
            together = graph.reachable(name) & backwards.reachable(name)
            seen |= together
            out.append(
                f"{len(together)} nodes lie on cycles, such as {' -> '.join(ring)}: a walk there goes on until the master chooses the end, "
                f"or to the limit of {hops} hops"
            )
    return out


def _cycle(graph: Graph, name: str) -> list[str]:
    """A shortest way from a node back to it, [] where there is none."""
    ways = [[name]]
    seen: set[str] = set()
    for way in ways:  # grows while it is read: breadth first
        for following in graph.neighbours(way[-1]):
            if following == name:
                return [*way, name]
            if following not in seen and following != END:
                seen.add(following)
                ways.append([*way, following])
    return []


def _answers(graph: Graph) -> list[tuple[tuple[str, ...], AnswerSpec]]:
    """(place in the file, what it says) wherever it is said how to answer."""
    own = [(("nodes", name, "answer"), node.answer) for name, node in graph.nodes.items() if node.answer is not None]
    return [(("answer",), graph.answer), *own]


def _stops(graph: Graph, name: str) -> bool:
    """Whether a node without outgoing edges (an implicit end) can be reached."""
    return any(not graph.neighbours(other) for other in graph.reachable(name) if other != END)


def _ring(graph: Graph, name: str) -> list[str]:
    walk = [name]
    while (following := graph.nodes[walk[-1]].fallback) and following in graph.nodes:
        walk.append(following)
        if walk.count(following) > 1:
            return walk if following == name else []
    return []
