"""A walk over the graph: several workers, one after the other or in waves, until the end is chosen or a limit is reached.

P(y|q) = prod_i P(N_i, q_i | q, trace; N^m_i) P(y_i | q_i; N_i) (Octopus v4, section 3.1): after every answer only the neighbours of the
node that gave it, and the end, may come next. In mode `walk` the master chooses hop by hop and sees a digest of each answer; in mode
`plan` it writes all steps first (Octo-planner) and steps that do not need one another run together. It knows the master, the order of
steps, what becomes of failures and how it ends. How one worker is asked is execute.py's business, what is decided before plan.py's and
ahead.py's, when it is too much limits.py's.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lmgraph import plan
from lmgraph.abreast import abreast
from lmgraph.ahead import decide_all, needs_of, repeats
from lmgraph.errors import LmgraphError, OutsideError, WorkerError, WorkerTimeout
from lmgraph.graph import END, AnswerSpec, Graph, Node
from lmgraph.limits import Limits, TimeOver
from lmgraph.master import MORE, Master
from lmgraph.types import Ask, Decision, Delta, Hop, Message, Passed, Progress, Step, Walk

Run = Callable[..., AsyncGenerator[Delta | Step, None]]
"""`execute.run` for one ask: node, chain, messages, shorten, and whole, answering where they differ"""
CUT_OFF = " [... this answer was cut off here ...]"
"""behind an answer that its worker did not end, for those who are told of it"""
SHOWN, LEAST = 6000, 50
"""characters of earlier answers that a later request holds in all; and at least, where a worker's model has no room for so many"""
COMPOSE = (
    "Several experts have each answered a part of the request below. Write the one answer to the whole request out of theirs: "
    "keep what they found, join it, and do not speak of the experts or of their answers."
)


@dataclass
class _Done:
    """A hop that has begun: what it said (None: nothing, or it failed), and the steps it took."""

    text: str | None = None
    steps: list[Step] = field(default_factory=list)
    pieces: list[Delta] = field(default_factory=list)
    error: LmgraphError | None = None

    @property
    def told(self) -> str:
        """What others are told of the answer: whether its worker came to the end of it, too."""
        return (self.text or "") + CUT_OFF * bool(self.pieces and self.pieces[-1].finish == "length")


class Walking:
    """One walk. `ask_one` asks a worker; `chain` names who takes over from a node; `told` hears of every hop as it begins and ends.

    `ready` makes a node's worker ready (its weights may have to be fetched): that does not count against the walk's time.
    """

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
        ready: Callable[[Node], Awaitable[object]] | None = None,
    ) -> None:
        self.spec, self.graph, self.master, self.ask = spec, graph, master, ask
        self._ask_one, self._chain, self._answering, self._ready = ask_one, chain, answering, ready
        self._told = told or (lambda event: None)
        self._limits = Limits(spec, graph)
        self._hops: list[Hop] = []
        self._done: dict[int, _Done] = {}
        self._drafts: dict[int, tuple[Callable[[int], str], int]] = {}
        """what writes the request of a hop, and how many characters of earlier answers it holds"""

    async def run(self, first: Decision) -> AsyncGenerator[Delta | Step | Walk, None]:
        """Stream the answer: Deltas of the last hop as they come; before the last Delta every Step, the one whose answer it is last, and
        the Walk.

        A hop that fails is left out where nothing needs it. Raises what a hop raises that another one needs, or that is the last; the
        message says what was done before.
        """
        try:
            try:
                stopped, last = await (self._planned(first) if self.spec.mode == "plan" else self._hop_by_hop(first))
            except TimeOver:
                stopped, last = "seconds", None
            async with aclosing(self._finish(stopped) if last is None else self._live(last, stopped)) as stream:
                async for item in stream:
                    yield item
        finally:
            self._limits.end()

    # -- the way: (why it ended, the hop that is left to be streamed) -------------------------------------------------------------------

    async def _hop_by_hop(self, decision: Decision) -> tuple[str, int | None]:
        decisions: list[Decision] = []
        passed: list[Passed] = []
        while not (stopped := self._spent()):
            decisions.append(decision)
            if repeats(decisions):
                return "loop", None
            number = len(self._hops)
            self._hops.append(self._hop(number, decision))
            ends = decision.more is not None and decision.more < MORE
            last = "end" if ends else "hops" if number + 1 >= self.spec.hops else ""
            await self._made_ready(number)
            if last and not self._parts(number):
                return last, number
            await self._limits.within(self._asked(number))
            if last:
                return last, None
            passed.append(Passed(decision.node, decision.written, self._done[number].text or "(no answer)"))
            deciding = self.master.decide(self.ask.query, decision.node, trace=passed, ahead=True)
            try:
                decision = await self._limits.within(deciding)
            except LmgraphError:  # what has been answered is worth more than the error
                return "master", None
            if decision.node == END:
                return "end", None
        return stopped, None

    async def _planned(self, first: Decision) -> tuple[str, int | None]:
        planned = await self._limits.within(decide_all(self.master, self.ask.query, first, self.spec.hops))
        decisions, stopped = planned.decisions, planned.stopped
        self._hops = [Hop(made.node, made.rewritten, needs_of(made, number), made.probability) for number, made in enumerate(decisions)]
        self._told(Progress("plan", hops=tuple(self._hops)))
        waves = plan.waves([plan.Request(hop.node, hop.request, hop.needs) for hop in self._hops])
        for wave in waves:
            if spent := self._spent():
                return spent, None
            for number in wave:
                self._hops[number] = self._hop(number, decisions[number])
                await self._made_ready(number)
            if wave is waves[-1] and len(wave) == 1 and not self._parts(wave[0]):
                return stopped, wave[0]
            await self._limits.within(abreast(self._asked, wave, len(wave)))
        return stopped, None

    def _hop(self, number: int, decision: Decision) -> Hop:
        """The hop with its request, earlier answers in it. Raises the error of a hop whose answer it needs."""
        answers = {earlier: done.told for earlier, done in self._done.items() if done.text is not None and earlier < number}
        if decision.rewrite_note:  # the guard objected, or no request was written: the whole query, and what is known so far
            needs, write = tuple(sorted(answers)), partial(self._whole_query, answers)
        else:
            needs = needs_of(decision, number)
            write = partial(plan.fill, decision.rewritten, {need: answers[need] for need in needs if need in answers})
        if lacking := [need for need in needs if need not in answers]:
            raise self._failure(f"step {number + 1} ({decision.node}) needs it", self._done[lacking[0]].error)
        self._drafts[number] = write, SHOWN
        return Hop(decision.node, write(SHOWN), needs, decision.probability)

    def _whole_query(self, answers: Mapping[int, str], limit: int) -> str:
        share = limit // max(1, len(answers))
        known = "\n\n".join(f"{self._hops[number].node}: {plan.cut(text, share)}" for number, text in sorted(answers.items()))
        return f"{self.ask.query}\n\nWhat other experts have answered so far:\n{known}" if known else self.ask.query

    def _spent(self) -> str:
        """Which limit is reached, '' for none."""
        return self._limits.reached(step for done in self._done.values() for step in done.steps)

    # -- one hop ------------------------------------------------------------------------------------------------------------------

    async def _made_ready(self, number: int) -> None:
        """What keeps its worker from being ready comes up again when it is asked."""
        if self._ready:
            with suppress(OutsideError):
                await self._limits.beside(self._ready(self.graph.nodes[self._hops[number].node]))

    async def _asked(self, number: int) -> None:
        """Ask the worker of a hop and wait for its whole answer; a failure is kept, not raised.

        What the client says of the length of its answer does not hold for a step on the way.
        """
        options = {name: value for name, value in self.ask.options.items() if name != "stop"}
        with suppress(OutsideError):
            async with aclosing(self._pieces(number, whole=True, hidden=True, max_tokens=None, options=options)) as pieces:
                async for _ in pieces:
                    pass

    async def _pieces(self, number: int, **how: Any) -> AsyncGenerator[Delta, None]:
        """What the worker of a hop says; how that went is kept and told. Raises what it raises, and WorkerError for an empty answer."""
        hop, done, began = self._hops[number], _Done(), time.perf_counter()
        self._done[number] = done
        self._told(Progress("began", number, hop.node, hop.request))
        failed = "stopped before its answer was whole"
        try:
            earlier = [m for m in self.ask.messages if m.role in ("system", "developer")]
            node, messages = self.graph.nodes[hop.node], [*earlier, Message("user", hop.request)]
            stream = self._ask_one(node, self._chain(hop.node), messages, shorten=partial(self._shorter, number, earlier), **how)
            async with aclosing(stream) as items:
                async for item in items:
                    if isinstance(item, Step):
                        done.steps.append(replace(item, hop=number))
                        continue
                    done.pieces.append(item)
                    if item.done:
                        text = "".join(piece.text for piece in done.pieces)
                        if not text.strip():
                            raise WorkerError(f"The worker of node {hop.node!r} gave an empty answer.")
                        done.text = text
                        self._told(Progress("ended", number, hop.node, self._hops[number].request, done.steps[-1]))
                    yield item
        except OutsideError as error:
            done.error, failed = error, error.message
            raise
        finally:
            if done.text is None:
                if done.pieces and done.pieces[-1].done:  # it came to its end, and is no answer
                    done.steps[-1] = replace(done.steps[-1], error=failed)
                elif done.error is None or not done.steps:
                    said, took = "".join(piece.text for piece in done.pieces), (time.perf_counter() - began) * 1000
                    done.steps.append(Step(hop.node, self._hops[number].request, said, took, error=failed, hop=number))
                self._told(Progress("ended", number, hop.node, self._hops[number].request, done.steps[-1]))

    def _shorter(self, number: int, earlier: Sequence[Message]) -> Sequence[Message] | None:
        """The messages of a hop with less of earlier answers in them, None where hardly anything of those is left."""
        hop, (write, limit) = self._hops[number], self._drafts[number]
        while (limit := limit // 2) >= LEAST:
            if len(request := write(limit)) < len(hop.request):
                self._hops[number], self._drafts[number] = replace(hop, request=request), (write, limit)
                return [*earlier, Message("user", request)]
        return None

    # -- the end ------------------------------------------------------------------------------------------------------------------

    async def _live(self, number: int, stopped: str, compose: str = "") -> AsyncGenerator[Delta | Step | Walk, None]:
        """The last hop, passed on as it comes. Where it fails before it said anything, what was done before is told in the error."""
        said = False
        try:
            async with aclosing(self._pieces(number, whole=self.ask.whole, answering=self._answering)) as pieces:
                while True:
                    piece = await self._limits.within(anext(pieces))
                    if piece.done:
                        for item in self._ending(stopped, number, compose):
                            yield item
                        yield replace(piece, usage=self._usage())
                        return
                    said = said or bool(piece.text.strip())
                    yield piece
        except TimeOver:
            stopped = "seconds"
        except OutsideError as error:
            if said or len(self._done) == 1:
                raise
            if not compose:
                raise self._failure("it is the last step", error) from error
        if said:  # out of time in the middle of it
            for item in self._ending(stopped, number, compose):
                yield item
            yield Delta(done=True, finish="length", usage=self._usage())
            return
        for rest in self._given(stopped):
            yield rest

    def _parts(self, last: int | None = None) -> list[int]:
        """Answers that no other answer (nor hop `last`, which is to come) was made from: each is a part of the one answer."""
        answered = [number for number, done in sorted(self._done.items()) if done.text is not None]
        needed = {need for number in (*answered, *([] if last is None else [last])) for need in self._hops[number].needs}
        return [number for number in answered if number not in needed]

    async def _finish(self, stopped: str) -> AsyncGenerator[Delta | Step | Walk, None]:
        """Give the answer out of what has been answered: where it has several parts, composed to one if no limit is in the way."""
        parts = self._parts()
        spent = self._spent() if len(parts) > 1 else ""
        if len(parts) < 2 or spent:
            for item in self._given(spent or stopped):
                yield item
            return
        number, node = len(self._hops), self.spec.compose or self._hops[parts[-1]].node
        write = partial(self._brief, parts)
        self._drafts[number] = write, SHOWN
        self._hops.append(Hop(node, write(SHOWN), tuple(parts)))
        async with aclosing(self._live(number, stopped, node)) as stream:
            async for item in stream:
                yield item

    def _brief(self, parts: Sequence[int], limit: int) -> str:
        """What the worker that composes is asked."""
        share = limit // len(parts)
        told = "\n\n".join(f"{self._hops[number].node}:\n{plan.cut(self._done[number].told, share)}" for number in parts)
        return f"{COMPOSE}\n\nRequest:\n{self.ask.query}\n\n{told}"

    def _given(self, stopped: str) -> Iterator[Delta | Step | Walk]:
        """The parts as they were answered, one below the other. Raises the first failure where there are none."""
        parts = self._parts()
        if not parts and stopped == "seconds":
            words = f"No step was answered within {self.spec.seconds:g} s, which is this walk's limit."
            raise self._failure("", WorkerTimeout(words, "Give it more in graph.yaml: answer: {seconds: ...}"))
        if not parts:
            raise self._failure("", next((done.error for done in self._done.values() if done.error), None))
        last = parts[-1]
        if self._answering:
            self._answering(self._done[last].steps[-1].node)
        for number in parts:
            yield from (piece for piece in self._done[number].pieces if not piece.done)
            if number != last:
                yield Delta("\n\n")
        yield from self._ending(stopped, last)
        yield replace(self._done[last].pieces[-1], usage=self._usage())

    def _ending(self, stopped: str, last: int, compose: str = "") -> Iterator[Step | Walk]:
        """What comes before the last Delta: all steps, those of hop `last` last, and the Walk."""
        for number in sorted(self._done, key=lambda number: (number == last, number)):
            yield from self._done[number].steps
        yield Walk(self.spec.mode, tuple(self._hops), stopped, compose)

    def _failure(self, why: str, error: LmgraphError | None) -> OutsideError:
        """The error of a step that cannot be done without, with what was done until then."""
        made = [f"{self._hops[number].node} {'failed' if done.text is None else 'answered'}" for number, done in sorted(self._done.items())]
        kind = type(error) if isinstance(error, OutsideError) else WorkerError
        words = (error.message if error else "No step could be answered").rstrip(".")
        because = f"; {why}" if why else ""
        so_far = f" Done so far: {', '.join(made)}." if made else ""
        return kind(f"{words}{because}.{so_far}", error.hint if error else "")

    def _usage(self) -> dict[str, int]:
        """What all steps used together."""
        total: dict[str, int] = {}
        for done in self._done.values():
            for step in done.steps:
                for kind, count in step.usage.items():
                    total[kind] = total.get(kind, 0) + count
        return total
