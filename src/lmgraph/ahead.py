"""What is decided ahead of a walk: whether an ask walks at all, and in mode `plan` every step before the first worker is asked.

It knows the master and the graph's word on how to answer. It asks no worker: that is walking.py's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lmgraph import plan, rewrite
from lmgraph.graph import END, START, WALKS, AnswerSpec, Graph
from lmgraph.master import MORE, Master
from lmgraph.types import Ask, Decision, Passed
from lmgraph.voting import comparable


def may(graph: Graph, ask: Ask) -> bool:
    """Whether an ask may become a walk: a first turn in plain text, for no pinned node, where it or some answer of the graph says so."""
    first = sum(message.role == "user" for message in ask.messages) == 1
    modes = {ask.mode} if ask.mode else {graph.answer.mode, *(node.answer.mode for node in graph.nodes.values() if node.answer)}
    return first and ask.node is None and not ask.needs and comparable(ask) and bool(modes & {*WALKS})


def spec(graph: Graph, ask: Ask, decision: Decision) -> AnswerSpec | None:
    """How this ask walks, None where one worker (or a vote) answers it: the node's own answer before the graph's, the ask's mode first."""
    own = graph.nodes[decision.node].answer
    found = graph.answer if own is None or (ask.mode in WALKS and own.mode not in WALKS) else own
    found = replace(found, mode=ask.mode) if ask.mode else found
    if found.mode not in WALKS or found.hops == 1 or decision.fallback:
        return None
    if found.mode == "auto":
        return replace(found, mode="plan") if (decision.more or 0.0) >= MORE else None
    return found


def alone(decision: Decision) -> Decision:
    """The decision where one worker answers it all: a request that is only the first step of several gives way to the query itself."""
    complaint = rewrite.check(decision.query, decision.rewritten) if (decision.more or 0.0) >= MORE and not decision.rewrite_note else ""
    return replace(decision, rewritten=decision.query, rewrite_note=complaint) if complaint else decision


@dataclass(frozen=True)
class Planned:
    """The decisions of a plan, why it ended (end, hops, loop), and how often the master was asked: for a step, or for all nodes."""

    decisions: tuple[Decision, ...]
    stopped: str
    asked: int


async def decide_all(master: Master, query: str, first: Decision, most: int) -> Planned:
    """A plan: the decisions for every step to the end or to `most` of them, before any is answered. `first` was made with `ahead`.

    Where it says that more is needed, the nodes of all steps are chosen together (`Master.sequence`; the first may be another one then),
    and each is written its request in turn. A step that is asked what it was asked before ends the plan, too, and is no part of it.
    """
    if first.more is not None and first.more < MORE:
        return Planned((first,), "end", 1)
    if most == 1:
        return Planned((first,), "hops", 1)
    nodes = await master.sequence(query, most)
    steps, asked = [node for node in nodes if node != END], 2
    decisions: list[Decision] = []
    for node in steps:
        if not decisions and node == first.node:
            decisions.append(first)
            continue
        passed = [Passed(made.node, made.written) for made in decisions]
        at = decisions[-1].node if decisions else START
        decisions.append(await master.decide(query, at, trace=passed, ahead=not passed, among=[node]))
        asked += 1
        if repeats(decisions):
            return Planned(tuple(decisions[:-1]), "loop", asked)
    return Planned(tuple(decisions), "end" if nodes[-1] == END else "hops", asked)


def needs_of(decision: Decision, number: int) -> tuple[int, ...]:
    """Which answers step `number` needs: by its own words, or without a request of its own all before it.

    What looks like a place in a user's words (the first request) is none.
    """
    return tuple(range(number)) if decision.rewrite_note else tuple(need for need in plan.needs(decision.rewritten) if need < number)


def repeats(decisions: Sequence[Decision]) -> bool:
    """Whether the last decision asks the same node the same thing as an earlier one."""
    return (decisions[-1].node, decisions[-1].rewritten) in {(made.node, made.rewritten) for made in decisions[:-1]}
