"""How much a walk may take: time, tokens, cost. It knows steps and prices, and nothing of what the steps are for."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Iterable
from typing import TypeVar

from lmgraph.graph import AnswerSpec, Graph, Node
from lmgraph.patience import Patience
from lmgraph.types import Step

Result = TypeVar("Result")


class TimeOver(Exception):
    """The time of a walk is over; nobody outside a walk sees this."""


class Limits:
    """The limits of one walk, whose time begins now. `end` them with it."""

    def __init__(self, spec: AnswerSpec, graph: Graph) -> None:
        self._spec, self._graph = spec, graph
        self._patience = Patience(spec.seconds, TimeOver, once=True)

    def reached(self, steps: Iterable[Step]) -> str:
        """Which limit these steps have reached (tokens, cost, seconds), '' for none."""
        made = list(steps)
        if sum(step.usage.get(kind, 0) for step in made for kind in ("prompt_tokens", "completion_tokens")) >= self._spec.tokens:
            return "tokens"
        if self._spec.cost is not None and sum(cost(self._graph.nodes[step.node], step) for step in made) > self._spec.cost:
            return "cost"
        return "seconds" if self._patience.over else ""

    async def within(self, work: Awaitable[Result]) -> Result:
        """The result. Raises TimeOver when the time is over before it is there; then the work is cancelled."""
        with self._patience:
            return await work

    async def beside(self, work: Awaitable[Result]) -> Result:
        """The result of what does not count against the time."""
        began = time.monotonic()
        try:
            return await work
        finally:
            self._patience.extend(time.monotonic() - began)

    def end(self) -> None:
        """Stop the clock."""
        self._patience.end()


def cost(node: Node, step: Step) -> float:
    """What a step cost by its worker's price (per million tokens of prompt and completion), 0 where none is given."""
    prompt, completion = node.worker.price
    return (step.usage.get("prompt_tokens", 0) * prompt + step.usage.get("completion_tokens", 0) * completion) / 1e6
