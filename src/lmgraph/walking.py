"""A walk over the graph: several workers, one after the other or in waves, until the end is chosen or a limit is reached.

P(y|q) = prod_i P(N_i, q_i | q, trace; N^m_i) P(y_i | q_i; N_i) (Octopus v4, section 3.1): after every answer only the neighbours of the
node that gave it, and the end, may come next. In mode `walk` the master chooses hop by hop and sees a digest of each answer; in mode
`plan` it writes all steps first (Octo-planner) and steps that do not need one another run together. It knows the master, the order of
steps, limits and failures. How one worker is asked is execute.py's business, what a plan is plan.py's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from lmgraph import plan
from lmgraph.errors import LmgraphError, OutsideError, WorkerError
from lmgraph.graph import END, WALKS, AnswerSpec, Graph, Node
from lmgraph.master import MORE, Master
from lmgraph.types import Ask, Decision, Delta, Hop, Message, Passed, Progress, Step, Walk
from lmgraph.voting import comparable

Run = Callable[..., AsyncGenerator[Delta | Step, None]]
"""`execute.run` for one ask: node, chain, messages, and whole, answering where they differ"""
Result = TypeVar("Result")
SHOWN = 6000
"""characters of an earlier answer that a later request holds"""
COMPOSE = (
    "Several experts have each answered a part of the request below. Write the one answer to the whole request out of theirs: "
    "keep what they found, join it, and do not speak of the experts or of their answers."
)


def may(graph: Graph, ask: Ask) -> bool:
    """Whether an ask may become a walk: a first turn in plain text, for no pinned node, where it or some answer of the graph says so."""
    first = sum(message.role == "user" for message in ask.messages) == 1
    modes = {ask.mode} if ask.mode else {graph.answer.mode, *(node.answer.mode for node in graph.nodes.values() if node.answer)}
    return first and ask.node is None and not ask.needs and comparable(ask) and bool(modes & {*WALKS})


def spec(graph: Graph, ask: Ask, decision: Decision) -> AnswerSpec | None:
    """How this ask walks, None where one worker (or a vote) answers it: the node's own answer before the graph's, the ask's mode first."""
    found = graph.nodes[decision.node].answer or graph.answer
    found = replace(found, mode=ask.mode) if ask.mode else found
    if found.mode not in WALKS or decision.fallback:
        return None
    if found.mode == "auto":
        return replace(found, mode="walk") if (decision.more or 0.0) >= MORE else None
    return found


@dataclass
class _Done:
    """A hop that is over: what it said (None: it failed), and the steps it took."""

    text: str | None
    steps: list[Step]
    pieces: list[Delta]
    error: LmgraphError | None = None


class Walking:
    """One walk. `ask_one` asks a worker; `chain` names who takes over from a node; `told` hears of every hop as it begins and ends."""

    def __init__(
        self,
        spec: AnswerSpec,
        graph: Graph,
        master: Master,
        ask: Ask,
        ask_one: Run,
        chain: Callable[[str], Sequence[Node]],
        told: Callable[[Progress], None] | None = None,
        answering: Callable[[str], None] | None = None,
    ) -> None:
        self.spec, self.graph, self.master, self.ask = spec, graph, master, ask
        self._ask_one, self._chain, self._answering = ask_one, chain, answering
        self._told = told or (lambda event: None)
        self._began = time.monotonic()
        self._hops: list[Hop] = []
        self._done: dict[int, _Done] = {}
        self._compose = ""

    async def run(self, first: Decision) -> AsyncGenerator[Delta | Step | Walk, None]:
        """Stream the answer: Steps as they end, Deltas of the last answer as it comes, the Walk before the last Delta.

        Raises what a step raises that something else needs, or that is the last; its message says what was done before.
        """
        walk = self._planned(first) if self.spec.mode == "plan" else self._hop_by_hop(first)
        async with aclosing(walk) as stream:
            async for item in stream:
                yield item

    # -- hop by hop ---------------------------------------------------------------------------------------------------------------

    async def _hop_by_hop(self, decision: Decision) -> AsyncGenerator[Delta | Step | Walk, None]:
        passed: list[Passed] = []
        stopped = ""
        while True:
            number = len(self._hops)
            request = self._request(decision)
            if stopped := self._stop(decision.node, request):
                break
            self._hops.append(Hop(decision.node, request, plan.needs(decision.rewritten), decision.probability))
            ends = decision.more is not None and decision.more < MORE
            last = "end" if ends else "hops" if number + 1 >= self.spec.hops else ""
            if last and not self._others(number):
                async with aclosing(self._live(number, last)) as stream:
                    async for item in stream:
                        yield item
                return
            done = await self._within(self._hop(number))
            if done is None:
                stopped = "seconds"
                break
            for step in done.steps:
                yield step
            passed.append(Passed(decision.node, decision.written, done.text or "(no answer)"))
            if last:
                stopped = last
                break
            following = await self._within(self.master.decide(self.ask.query, decision.node, trace=passed, rewriting=True, ahead=True))
            if following is None or following.node == END:
                stopped = "end" if following else "seconds"
                break
            decision = following
        async with aclosing(self._finish(stopped)) as stream:
            async for item in stream:
                yield item

    def _stop(self, node: str, request: str) -> str:
        """Why no further hop is made, '' when it may be."""
        if any(hop.node == node and hop.request == request for hop in self._hops):
            return "loop"
        return self._spent() if self._hops else ""

    def _spent(self) -> str:
        """Which limit is reached, '' for none."""
        steps = [step for done in self._done.values() for step in done.steps]
        if sum(step.usage.get(kind, 0) for step in steps for kind in ("prompt_tokens", "completion_tokens")) >= self.spec.tokens:
            return "tokens"
        if self.spec.cost is not None and sum(cost(self.graph.nodes[step.node], step) for step in steps) >= self.spec.cost:
            return "cost"
        return "seconds" if self._left() <= 0 else ""

    # -- planned ------------------------------------------------------------------------------------------------------------------

    async def _planned(self, first: Decision) -> AsyncGenerator[Delta | Step | Walk, None]:
        decisions = await decide_all(self.master, self.ask.query, first, self.spec.hops)
        needs = [tuple(need for need in plan.needs(made.rewritten) if need < number) for number, made in enumerate(decisions)]
        self._hops = [Hop(made.node, made.rewritten, need, made.probability) for made, need in zip(decisions, needs, strict=True)]
        self._told(Progress("plan", hops=tuple(self._hops)))
        full = len(decisions) >= self.spec.hops and (decisions[-1].more or 0.0) >= MORE
        stopped = "hops" if full else "end"
        waves = plan.waves([plan.Request(hop.node, hop.request, hop.needs) for hop in self._hops])
        for wave in waves:
            if stopped_now := self._spent() if self._done else "":
                stopped = stopped_now
                break
            for number in wave:
                hop = self._hops[number]
                self._hops[number] = replace(hop, request=self._filled(number, decisions[number]))
            if wave is waves[-1] and len(wave) == 1 and not self._others(wave[0]):
                async with aclosing(self._live(wave[0], stopped)) as stream:
                    async for item in stream:
                        yield item
                return
            ended = await self._within(_together([self._hop(number) for number in wave]))
            for number in wave:
                if number in self._done:
                    for step in self._done[number].steps:
                        yield step
            if ended is None:
                stopped = "seconds"
                break
        async with aclosing(self._finish(stopped)) as stream:
            async for item in stream:
                yield item

    def _filled(self, number: int, decision: Decision) -> str:
        answers = {need: done.text for need, done in self._done.items() if done.text is not None}
        lacking = [need for need in self._hops[number].needs if need not in answers]
        if lacking:
            raise self._failure(f"step {number + 1} ({decision.node}) needs it", self._done[lacking[0]].error)
        if decision.rewrite_note:  # the guard objected: the whole query, and what is known so far
            return self._whole_query(answers)
        return plan.fill(decision.rewritten, answers, SHOWN)

    # -- one hop ------------------------------------------------------------------------------------------------------------------

    def _request(self, decision: Decision) -> str:
        """What the worker of the next hop is asked."""
        answers = {number: done.text for number, done in self._done.items() if done.text is not None}
        if decision.rewrite_note and answers:
            return self._whole_query(answers)
        for need in plan.needs(decision.rewritten):
            if need in self._done and need not in answers:
                raise self._failure(f"step {len(self._hops) + 1} ({decision.node}) needs it", self._done[need].error)
        return plan.fill(decision.rewritten, answers, SHOWN)

    def _whole_query(self, answers: dict[int, str]) -> str:
        known = "\n\n".join(f"{self._hops[number].node}: {plan.cut(text, SHOWN)}" for number, text in sorted(answers.items()))
        return f"{self.ask.query}\n\nWhat other experts have answered so far:\n{known}" if known else self.ask.query

    async def _hop(self, number: int) -> _Done:
        """Ask the worker of a hop and wait for its whole answer; a failure is kept, not raised."""
        hop = self._hops[number]
        self._told(Progress("began", number, hop.node, hop.request))
        done = _Done(None, [], [])
        try:
            async with aclosing(self._asked(number, whole=True)) as stream:
                async for item in stream:
                    if isinstance(item, Step):
                        done.steps.append(replace(item, hop=number))
                    else:
                        done.pieces.append(item)
            done.text = "".join(piece.text for piece in done.pieces)
            if not done.text.strip():
                raise WorkerError(f"The worker of node {hop.node!r} gave an empty answer.")
        except OutsideError as error:
            done.error, done.text = error, None
            if not done.steps or not done.steps[-1].error:
                done.steps.append(Step(hop.node, hop.request, error=error.message, hop=number))
        self._done[number] = done
        self._told(Progress("ended", number, hop.node, hop.request, done.steps[-1]))
        return done

    async def _live(self, number: int, stopped: str) -> AsyncGenerator[Delta | Step | Walk, None]:
        """The last hop, passed on as it comes. Where it fails before it said anything, what was done before is told in the error."""
        hop = self._hops[number]
        self._told(Progress("began", number, hop.node, hop.request))
        said = False
        steps: list[Step] = []
        try:
            async with aclosing(self._asked(number, whole=self.ask.whole, answering=self._answering)) as stream:
                while (item := await self._within(anext(stream, None))) is not None:
                    if isinstance(item, Step):
                        step = replace(item, hop=number)
                        steps.append(step)
                        self._done[number] = _Done(None if step.error else step.answer, steps, [])
                        self._told(Progress("ended", number, hop.node, hop.request, step))
                        yield step
                    elif item.done:
                        yield self._walk(stopped)
                        yield replace(item, usage=self._usage())
                        return
                    else:
                        said = said or bool(item.text)
                        yield item
        except OutsideError as error:
            if said or not self._done:
                raise
            raise self._failure("it is the last step", error) from error
        if said:  # out of time in the middle of it
            yield self._walk("seconds")
            yield Delta(done=True, finish="length", usage=self._usage())
            return
        async with aclosing(self._finish("seconds")) as rest:
            async for piece in rest:
                yield piece

    def _asked(self, number: int, **how: Any) -> AsyncGenerator[Delta | Step, None]:
        hop = self._hops[number]
        earlier = [m for m in self.ask.messages if m.role in ("system", "developer")]
        return self._ask_one(self.graph.nodes[hop.node], self._chain(hop.node), [*earlier, Message("user", hop.request)], **how)

    # -- the end ------------------------------------------------------------------------------------------------------------------

    def _others(self, number: int) -> list[int]:
        """Answers that no later step needs, beside that of hop `number`: they are parts of the one answer, too."""
        needed = {need for hop in self._hops for need in hop.needs}
        return [i for i, done in self._done.items() if i != number and i not in needed and done.text is not None]

    async def _finish(self, stopped: str) -> AsyncGenerator[Delta | Step | Walk, None]:
        """Give the answer out of what has been answered: the one part that no later step needed, or all of them composed to one."""
        answered = {number: done for number, done in sorted(self._done.items()) if done.text is not None}
        if not answered:
            raise self._failure("", next((done.error for done in self._done.values() if done.error), None))
        needed = {need for hop in self._hops for need in hop.needs}
        parts = [number for number in answered if number not in needed] or [max(answered)]
        if len(parts) > 1 and stopped in ("end", "hops", "loop"):
            async with aclosing(self._composed(parts, stopped)) as stream:
                async for item in stream:
                    yield item
            return
        done = answered[parts[-1]]
        if self._answering:
            self._answering(done.steps[-1].node)
        yield self._walk(stopped)
        for piece in done.pieces:
            yield replace(piece, usage=self._usage()) if piece.done else piece

    async def _composed(self, parts: Sequence[int], stopped: str) -> AsyncGenerator[Delta | Step | Walk, None]:
        node = self.graph.nodes[self.spec.compose or self._hops[parts[-1]].node]
        told = "\n\n".join(f"{self._hops[number].node}:\n{plan.cut(self._done[number].text or '', SHOWN)}" for number in parts)
        request = f"{COMPOSE}\n\nRequest:\n{self.ask.query}\n\n{told}"
        number = len(self._hops)
        self._hops.append(Hop(node.name, request, tuple(parts), 1.0))
        self._compose = node.name
        async with aclosing(self._live(number, stopped)) as stream:
            async for item in stream:
                yield item

    def _walk(self, stopped: str) -> Walk:
        return Walk(self.spec.mode, tuple(self._hops), stopped, self._compose)

    def _failure(self, why: str, error: LmgraphError | None) -> OutsideError:
        """The error of a step that cannot be done without, with what was done until then."""
        made = [f"{self._hops[number].node} {'failed' if done.text is None else 'answered'}" for number, done in sorted(self._done.items())]
        kind = type(error) if isinstance(error, OutsideError) else WorkerError
        because = f" ({why})" if why else ""
        so_far = f" Done so far: {', '.join(made)}." if made else ""
        return kind(f"{error.message if error else 'No step could be answered.'}{because}{so_far}", error.hint if error else "")

    def _usage(self) -> dict[str, int]:
        """What all steps used together."""
        total: dict[str, int] = {}
        for done in self._done.values():
            for step in done.steps:
                for kind, count in step.usage.items():
                    total[kind] = total.get(kind, 0) + count
        return total

    # -- time ---------------------------------------------------------------------------------------------------------------------

    def _left(self) -> float:
        return self.spec.seconds - (time.monotonic() - self._began)

    async def _within(self, work: Awaitable[Result]) -> Result | None:
        """The result, or None when the walk's time is over: then the work is cancelled."""
        try:
            return await asyncio.wait_for(work, max(self._left(), 0.001))
        except asyncio.TimeoutError:
            if self._left() > 0:
                raise
            return None


async def decide_all(master: Master, query: str, first: Decision, most: int) -> list[Decision]:
    """A plan: the decisions for every step from `first` (made with `ahead`) to the end or to `most` of them, before any is answered."""
    decisions = [first]
    while len(decisions) < most and (decisions[-1].more is None or decisions[-1].more >= MORE):
        passed = [Passed(made.node, made.written) for made in decisions]
        made = await master.decide(query, decisions[-1].node, trace=passed, rewriting=True, ahead=True)
        if made.node == END:
            break
        decisions.append(made)
    return decisions


async def _together(works: Sequence[Any]) -> list[_Done]:
    """All at once; leaving this early stops them all."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def cost(node: Node, step: Step) -> float:
    """What a step cost by its worker's price (per million tokens of prompt and completion), 0 where none is given."""
    prompt, completion = node.worker.price
    return (step.usage.get("prompt_tokens", 0) * prompt + step.usage.get("completion_tokens", 0) * completion) / 1e6
