"""The field's usual way: all descriptions in the prompt, and a language model that answers with a node's name.

It knows prompts with a list of nodes and how an answer is held to the names. The names form a tree of token ids; at each fork the model
chooses among the ids that go on, so that nothing but a name can come out. The list stands first: it stays in the engine's cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lmgraph import prompts
from lmgraph.engine import Engine
from lmgraph.evaluate.contestants import Verdict
from lmgraph.train.examples import Example

QUERY_LIMIT = 256
"""query tokens; longer queries are shortened as for the master"""
CONTEXT = 8192
"""tokens that the list and a query may have together"""
QUESTION = "Which expert should answer the user's message? Answer with the expert's name only.\nExperts:\n"


class Listing:
    """A chat model (any GGUF, its own chat template) with every node's name and description in the system message."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name = name
        self._engine = engine

    async def fit(self, examples: Sequence[Example], nodes: Mapping[str, str]) -> None:
        """Read the list; nothing is learnt from the examples but what the descriptions say."""
        self._names = {node: await self._engine.tokenise(node) + [-1] for node in nodes}  # -1: no name ends inside another
        listing = QUESTION + "\n".join(f"- {node}: {description}" for node, description in nodes.items())
        mark = "Sentence that stands for the query."
        ids, middle = await self._engine.render([("system", listing), ("user", mark)]), await self._engine.tokenise(mark)
        at = next(i for i in range(len(ids) - len(middle), -1, -1) if ids[i : i + len(middle)] == middle)
        self._before, self._after = ids[:at], ids[at + len(middle) :]
        self._end = (await self._engine.tokenise("\n"))[0]

    async def decide(self, query: str) -> Verdict:
        """The name that the model writes and the product of its probabilities at the forks."""
        kept, _ = prompts.shorten(await self._engine.tokenise(query), QUERY_LIMIT)
        written: list[int] = []
        probability, left = 1.0, self._names
        async with await self._engine.session() as session:
            while len(left) > 1:
                following = {ids[len(written)] for ids in left.values()}
                if len(following) > 1:
                    allowed = [self._end if i < 0 else i for i in sorted(following)]
                    choice = await session.choose([*self._before, *kept, *self._after, *written], allowed)
                    chosen, share = choice.probabilities[0]
                    taken = -1 if chosen == self._end else chosen
                    probability *= share
                else:
                    taken = following.pop()
                written.append(taken)
                left = {node: ids for node, ids in left.items() if ids[len(written) - 1] == taken}
        return Verdict(next(iter(left)), probability)

    async def close(self) -> None:
        """Unload the model."""
        await self._engine.close()
