"""Those who plan: a trained master, and the field's usual way, a language model with all descriptions in its prompt.

The master chooses a sequence of nodes, each a neighbour of the one before, and writes their requests. The other reads a list of all nodes
and writes all steps at once as JSON, held by a grammar: nodes that there are, needs of earlier steps only, no more steps than are allowed.
The list and two examples stand first: they stay in the engine's cache. It knows how a plan is made; it measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from lmgraph import ahead, prompts
from lmgraph.assets import digest_of, digests_of
from lmgraph.engine import Engine
from lmgraph.errors import EngineError
from lmgraph.evaluate.journal import key_of
from lmgraph.evaluate.listing import QUERY_LIMIT, around
from lmgraph.graph import START, Graph
from lmgraph.master import Master
from lmgraph.plan import Request
from lmgraph.rewrite import PLACE
from lmgraph.train.tasks import Task

REQUEST_LIMIT = 160
"""characters of a request that a language model writes, at most: what is asked counts for no figure, and takes time"""
MAX_TOKENS = 1024
"""of a plan that a language model writes; one that is cut off there counts with the steps that are whole"""
SYSTEM = """You split a user's message into steps for experts. Every step is answered by one expert.

Experts:
{experts}

Answer with a JSON list of the steps, in the order in which they must run:
[{{"node": name of the expert, "request": what this expert is asked, in one short sentence, "needs": [numbers of the earlier steps whose \
answers this step uses]}}, ...]
Steps are few. One step is enough where one expert can answer the whole message. Take more steps, at most {most}, only where parts of the \
message need different experts."""


@dataclass(frozen=True)
class Planned:
    """A plan as it was made: steps in their order (none where nothing whole was written), and how often a model was asked for them."""

    steps: tuple[Request, ...]
    decisions: int


class Planner(Protocol):
    """What plans one query at a time, after `begin`."""

    name: str
    identity: str
    """names everything that a plan depends on beside the query; known after `begin`"""

    async def begin(self) -> None:
        """Get ready. Raises EngineError where that cannot be."""
        ...

    async def plan(self, query: str) -> Planned:
        """The steps for a query."""
        ...

    async def close(self) -> None:
        """Release models."""
        ...


class Served:
    """The master as it serves in mode `plan`: whether more is needed, all nodes along the edges, then a request for each."""

    name = "lmgraph master"
    identity = ""

    def __init__(self, master: Master, most: int) -> None:
        self._master, self._most = master, most

    async def begin(self) -> None:
        """Name weights, tokens, edges and thresholds: what the choice depends on."""
        given = self._master.graph
        nodes = [[name, node.token, node.threshold, node.rewrite] for name, node in given.nodes.items()]
        spec = {name: value for name, value in asdict(given.master).items() if name != "bundle"}  # a path; the digest says what is in it
        worn = digests_of(self._master.adapters)
        self.identity = key_of(digest_of(self._master.engine.path), nodes, _edges(given), spec, self._most, *([worn] if worn else []))

    async def plan(self, query: str) -> Planned:
        """The plan, or the one step of the fallback where the master is not sure enough."""
        first = await self._master.decide(query, ahead=True)
        alone = ahead.Planned((first,), "end", 1)
        made = alone if first.fallback else await ahead.decide_all(self._master, query, first, self._most)
        steps = [Request(d.node, d.rewritten, ahead.needs_of(d, number)) for number, d in enumerate(made.decisions)]
        return Planned(tuple(steps), made.asked)

    async def close(self) -> None:
        """Unload the model."""
        await self._master.engine.close()


class Listing:
    """A chat model (any GGUF, its own chat template) with every node's name and description in the system message.

    `digest` is that of its weights, `shown` are tasks that it sees solved, `most` how many steps a plan may have.
    """

    identity = ""

    def __init__(self, name: str, engine: Engine, digest: str, nodes: Mapping[str, str], shown: Sequence[Task], most: int) -> None:
        self.name = name
        self._engine, self._digest, self._nodes, self._shown, self._most = engine, digest, nodes, shown, most
        self._grammar = grammar(list(nodes), most)

    async def begin(self) -> None:
        """Render list and examples once. Raises EngineError where they do not fit into the engine's context."""
        experts = "\n".join(f"- {node}: {description}" for node, description in self._nodes.items())
        messages = [("system", SYSTEM.format(experts=experts, most=self._most))]
        for task in self._shown:
            messages += [("user", task.query), ("assistant", written(task))]
        mark = "Sentence that stands for the query."
        middle = await self._engine.tokenise(mark)
        self._before, self._after = around(await self._engine.render([*messages, ("user", mark)]), middle)
        needed = len(self._before) + QUERY_LIMIT + len(self._after) + MAX_TOKENS
        if needed > self._engine.context:
            raise EngineError(
                f"A list of {len(self._nodes):,} nodes, a query and a plan need {needed:,} tokens; {self.name} is loaded with room for "
                f"{self._engine.context:,}."
            )
        self.identity = key_of(self._digest, self._before, self._after, self._grammar, QUERY_LIMIT, MAX_TOKENS)

    async def plan(self, query: str) -> Planned:
        """The steps that the model writes, greedily."""
        kept, _ = prompts.shorten(await self._engine.tokenise(query), QUERY_LIMIT)
        text = ""
        async with await self._engine.session() as session:
            async for piece in session.generate([*self._before, *kept, *self._after], MAX_TOKENS, grammar=self._grammar):
                text += piece.text
        return Planned(steps_of(text), 1)

    async def close(self) -> None:
        """Unload the model."""
        await self._engine.close()


def grammar(nodes: Sequence[str], most: int) -> str:
    """llama.cpp's GBNF of plans of 1 to `most` steps. Step k may need any of the steps 1 to k - 1; names need no escapes in JSON."""
    rules = ["root ::= " + '"[" step1' + "".join(f' (", " step{k}' for k in range(2, most + 1)) + ")?" * (most - 1) + ' "]"']
    for k in range(1, most + 1):
        earlier = " | ".join(f'"{i}"' for i in range(1, k))
        needs = f'(({earlier}) (", " ({earlier})){{0,{k - 2}}})?' if k > 1 else '""'
        rules.append(f'step{k} ::= "{{\\"node\\": \\"" node "\\", \\"request\\": \\"" request "\\", \\"needs\\": [" {needs} "]}}"')
    return "\n".join(
        [
            *rules,
            "node ::= " + " | ".join(f'"{node}"' for node in nodes),
            f"request ::= character{{1,{REQUEST_LIMIT}}}",
            r'character ::= [^"\\\x00-\x1F] | "\\" ["\\/bfnrt]',
        ]
    )


def written(task: Task) -> str:
    """A task's steps as a model that plans writes them; steps are counted from 1, and a request names them so."""
    steps = []
    for step in task.steps:
        text = PLACE.sub(lambda match: f"(answer of step {int(match[1]) + 1})", step.text) or task.query
        steps.append({"node": step.node, "request": text[:REQUEST_LIMIT], "needs": [need + 1 for need in step.needs]})
    return json.dumps(steps, ensure_ascii=False)


def steps_of(text: str) -> tuple[Request, ...]:
    """The steps of a text of the grammar; of one that was cut off, those that are whole."""
    decoder, found, at = json.JSONDecoder(), [], 1
    while at < len(text):
        try:
            row, at = decoder.raw_decode(text, at)
        except ValueError:
            break
        found.append(Request(row["node"], row["request"], tuple(sorted({number - 1 for number in row["needs"]}))))
        at += len(", ")
    return tuple(found)


def examples(tasks: Sequence[Task]) -> list[Task]:
    """What a model is shown: the task of one step, and that of several of which one needs another, each with the shortest query."""
    single = [task for task in tasks if len(task.steps) == 1]
    several = [task for task in tasks if any(step.needs for step in task.steps)]
    return [min(those, key=lambda task: len(task.query)) for those in (single, several) if those]


def _edges(given: Graph) -> dict[str, list[str]]:
    return {name: list(given.neighbours(name)) for name in (START, *given.nodes)}
