"""The field's usual way: all descriptions in the prompt, and a language model that answers with a node's name.

It knows prompts with a list of nodes and how an answer is held to the names. The names form a tree of token ids; at each fork the model
chooses among the ids that go on (to end its turn is one of them, where a name is the beginning of another), so that nothing but a name
can come out. The list stands first: it stays in the engine's cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lmgraph import prompts
from lmgraph.engine import Engine
from lmgraph.errors import EngineError
from lmgraph.evaluate.contestants import Verdict
from lmgraph.train.examples import Example

QUERY_LIMIT = 256
"""query tokens; longer queries are shortened as for the master"""
CONTEXT = 8192
"""tokens that the list and a query may have together"""
QUESTION = "Which expert should answer the user's message? Answer with the expert's name only.\nExperts:\n"


class Listing:
    """A chat model (any GGUF, its own chat template) with every node's name and description in the system message."""

    weights = ""  # the name says which model

    def __init__(self, name: str, engine: Engine) -> None:
        self.name = name
        self._engine = engine

    async def fit(self, examples: Sequence[Example], nodes: Mapping[str, str]) -> None:
        """Read the list; nothing is learnt from the examples. Raises EngineError where it does not fit into the engine's context."""
        listing = QUESTION + "\n".join(f"- {node}: {description}" for node, description in nodes.items())
        mark = "Sentence that stands for the query."
        middle = await self._engine.tokenise(mark)
        self._before, self._after = around(await self._engine.render([("system", listing), ("user", mark)]), middle)
        # a turn after the answer: a conversation that ends with an assistant's is rendered as one to be gone on with
        said, _ = around(await self._engine.render([("user", "?"), ("assistant", mark), ("user", mark)]), middle)
        end = around(said, middle)[1][0]  # what this model's template puts behind an answer
        self._names = {node: [*await self._engine.tokenise(node), end] for node in nodes}
        needed = len(self._before) + QUERY_LIMIT + len(self._after) + max(len(ids) for ids in self._names.values())
        if needed > self._engine.context:
            raise EngineError(
                f"A list of {len(nodes):,} nodes and a query need {needed:,} tokens; {self.name} is loaded with room for "
                f"{self._engine.context:,}."
            )

    async def decide(self, query: str) -> Verdict:
        """The name that the model writes and the product of its probabilities at the forks."""
        kept, _ = prompts.shorten(await self._engine.tokenise(query), QUERY_LIMIT)
        written: list[int] = []
        probability, left = 1.0, self._names
        async with await self._engine.session() as session:
            while len(left) > 1:
                following = {ids[len(written)] for ids in left.values()}
                if len(following) > 1:
                    choice = await session.choose([*self._before, *kept, *self._after, *written], sorted(following))
                    taken, share = choice.probabilities[0]
                    probability *= share
                else:
                    taken = following.pop()
                written.append(taken)
                left = {node: ids for node, ids in left.items() if ids[len(written) - 1] == taken}
        return Verdict(next(iter(left)), probability)

    async def close(self) -> None:
        """Unload the model."""
        await self._engine.close()


def around(ids: Sequence[int], middle: Sequence[int]) -> tuple[list[int], list[int]]:
    """What stands before and behind the last occurrence of `middle`, which there is."""
    at = next(i for i in range(len(ids) - len(middle), -1, -1) if ids[i : i + len(middle)] == middle)
    return list(ids[:at]), list(ids[at + len(middle) :])
