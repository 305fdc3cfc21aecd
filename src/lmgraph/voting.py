"""A vote at run time: several workers answer one ask at once, and their answers are weighed.

It knows who votes, what becomes of voters that fail, and the judge of free texts. How answers are compared and weighed is vote.py's,
how one worker is asked execute.py's. Nothing is sent before all have answered or failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from lmgraph import vote
from lmgraph.errors import LmgraphError, OutsideError
from lmgraph.execute import failure
from lmgraph.graph import Graph, Node
from lmgraph.types import Ask, Decision, Delta, Message, Step, Vote

Run = Callable[..., AsyncGenerator[Delta | Step, None]]
"""`execute.run` for one ask: node, chain, messages, and whole, answering, tried where they differ"""
SURE = 0.98
"""greatest probability of the master that is taken for a competence; the least is 1 - SURE"""
SHOWN = 4000
"""characters of an answer that the judge sees"""
INSTRUCTION = (
    "Several experts have answered the request below, each on their own. Write the one best answer to the request out of theirs: "
    "keep what is right, leave out what is wrong, and do not speak of the experts or of their answers."
)


@dataclass(frozen=True)
class Poll:
    """Who is asked: at least two voters with their competences, the most competent first, and the judge of free texts."""

    decided: Node
    """the node that the query is for"""
    voters: tuple[tuple[Node, float], ...]
    judge: Node | None
    options: int
    """options that the query lists, 0 when it is no multiple-choice question"""


def poll(graph: Graph, ask: Ask, name: str, decision: Decision | None, able: Collection[str] | None = None) -> Poll | None:
    """Who votes on an ask for node `name`; None where it is answered by one worker. Only nodes in `able` (None: all) may vote.

    Without measured voters they are the decision's best nodes, `name` among them, as competent as they are probable. Nodes whose
    workers are described alike would give one answer twice: the most competent of them votes.
    """
    node = graph.nodes[name]
    spec = node.answer or graph.answer
    if (ask.mode or spec.mode) != "vote" or not comparable(ask):
        return None
    probable = {n: min(max(p, 1 - SURE), SURE) for n, p in decision.alternatives} if decision else {}
    found = [(graph.nodes[n], c) for n, c in (spec.voters or probable).items() if able is None or n in able]
    distinct: list[tuple[Node, float]] = []
    for voter in sorted(found, key=lambda pair: -pair[1]):
        if all(voter[0].worker != other.worker for other, _ in distinct):
            distinct.append(voter)
    voters = distinct[: spec.workers]
    own = [pair for pair in distinct if pair[0].worker == node.worker]
    if not spec.voters and own and own[0] not in voters:  # a conversation's node, or a fallback: not among the most probable
        voters[-1] = own[0]
    judge = graph.nodes[spec.judge] if spec.judge else None
    return Poll(node, tuple(voters), judge, vote.option_count(ask.query)) if len(voters) > 1 else None


def comparable(ask: Ask) -> bool:
    """Whether the answers to an ask are one text each: no tools, pictures, log probabilities, other format or several choices."""
    options = ask.options
    form = options.get("response_format") or {"type": "text"}
    calls = any(options.get(name) for name in ("tools", "functions")) or any(m.role in ("tool", "function") for m in ask.messages)
    several = (options.get("n") or 1) != 1 or options.get("logprobs") or options.get("top_logprobs")
    plain = isinstance(form, Mapping) and form.get("type") == "text"
    return plain and not calls and not several and "image" not in ask.needs


@dataclass(frozen=True)
class _Ballot:
    """What a voter gave: the pieces of its answer, or the error that kept it from answering."""

    node: Node
    competence: float
    step: Step
    pieces: tuple[Delta, ...]
    error: LmgraphError | None


async def run(
    poll: Poll,
    chain: Sequence[Node],
    messages: Sequence[Message],
    ask_one: Run,
    *,
    whole: bool = False,
    answering: Callable[[str], None] | None = None,
) -> AsyncGenerator[Delta | Step | Vote, None]:
    """Let the voters answer, and stream the answer that won: a Step for each, the Vote, the Deltas; the last carries the usage of all.

    Free texts are not compared: the judge writes one answer from them; without a judge, or when it fails, the most competent one is
    taken. When no voter answers, the decided node and `chain` are tried as if there had been no vote; then there is no Vote.
    Raises what `execute.run` raises, and the error of a voter that refuses the ask itself when no other one answers.
    """
    ballots = await _gather(poll, messages, ask_one)
    cast = [ballot for ballot in ballots if ballot.error is None]
    cast = [ballot for ballot in cast if ballot.step.answer.strip()] or cast  # silence is no answer where others speak
    if not cast:
        for ballot in ballots:
            yield ballot.step
        async with aclosing(_afterwards(poll, chain, messages, ask_one, ballots, whole, answering)) as rest:
            async for piece in rest:
                yield piece
        return
    words = [(b.node.name, vote.key(b.step.answer, poll.options), vote.weight(b.competence, poll.options)) for b in cast]
    verdict = vote.tally(words)
    winner = next(b for b in cast if b.node.name == verdict.winner)
    made = Vote(verdict.votes, verdict.winner, verdict.share)
    steps = [ballot.step for ballot in ballots if ballot is not winner]
    for step in steps:
        yield step
    if poll.judge is not None and verdict.key is None and len(cast) > 1:
        brief = _brief(messages, cast)
        judged = Step(poll.judge.name, brief[-1].content)
        sent = False
        try:
            async with aclosing(ask_one(poll.judge, [], brief, whole=whole, answering=answering)) as judging:
                async for item in judging:
                    if isinstance(item, Step):
                        judged = item
                    elif item.done and sent:
                        yield winner.step
                        yield judged
                        yield replace(made, judge=poll.judge.name)
                        yield replace(item, usage=_usage([*steps, winner.step, judged]))
                        return
                    elif item.text or item.choices:
                        sent = True
                        yield item
        except LmgraphError as error:
            if sent:  # text that a user saw is never taken back
                raise
            judged = replace(judged, error=judged.error or error.message)
        steps.append(judged)
        yield judged
    yield winner.step
    yield made
    if answering:
        answering(winner.node.name)
    for piece in winner.pieces:
        yield replace(piece, usage=_usage([*steps, winner.step])) if piece.done else piece


async def _gather(poll: Poll, messages: Sequence[Message], ask_one: Run) -> list[_Ballot]:
    """Every voter's ballot, in their order. Leaving this early stops them all."""
    tasks = [asyncio.create_task(_cast(node, competence, messages, ask_one)) for node, competence in poll.voters]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _cast(node: Node, competence: float, messages: Sequence[Message], ask_one: Run) -> _Ballot:
    step = Step(node.name, messages[-1].content)
    pieces: list[Delta] = []
    error: LmgraphError | None = None
    try:
        async with aclosing(ask_one(node, [], messages, whole=True)) as stream:  # whole: nobody sees it before all are there
            async for item in stream:
                if isinstance(item, Step):
                    step = item
                else:
                    pieces.append(item)
    except LmgraphError as caught:
        error = caught
        step = replace(step, error=step.error or caught.message)
    return _Ballot(node, competence, replace(step, voter=True), tuple(pieces), error)


async def _afterwards(
    poll: Poll,
    chain: Sequence[Node],
    messages: Sequence[Message],
    ask_one: Run,
    ballots: Sequence[_Ballot],
    whole: bool,
    answering: Callable[[str], None] | None,
) -> AsyncGenerator[Delta | Step, None]:
    """Nobody answered: the decided node and those that take over from it, but for voters, which have just failed."""
    failed = [ballot.step for ballot in ballots]
    for ballot in ballots:
        if ballot.error is not None and not isinstance(ballot.error, OutsideError):
            raise ballot.error
    rest = [node for node in (poll.decided, *chain) if node.name not in {step.node for step in failed}]
    if not rest:
        last = ballots[-1].error
        assert isinstance(last, OutsideError)
        raise failure(failed, last)
    async with aclosing(ask_one(rest[0], rest[1:], messages, whole=whole, answering=answering, tried=failed)) as stream:
        async for item in stream:
            yield item


def _brief(messages: Sequence[Message], cast: Sequence[_Ballot]) -> list[Message]:
    """What the judge gets: the conversation, and in place of its last user message the request with all answers to it."""
    last = max(i for i, m in enumerate(messages) if m.role == "user")
    parts = [INSTRUCTION, f"Request:\n{messages[last].content}"]
    for number, ballot in enumerate(cast, 1):
        answer = ballot.step.answer
        cut = f"\n[... {len(answer) - SHOWN:,} more characters are left out]" if len(answer) > SHOWN else ""
        parts.append(f"Answer {number}:\n{answer[:SHOWN]}{cut}")
    return [*messages[:last], Message("user", "\n\n".join(parts))]


def _usage(steps: Sequence[Step]) -> dict[str, int]:
    """What all steps used together."""
    total: dict[str, int] = {}
    for step in steps:
        for kind, count in step.usage.items():
            total[kind] = total.get(kind, 0) + count
    return total
