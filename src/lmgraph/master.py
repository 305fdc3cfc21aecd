"""The master: (query, where we stand) -> Decision. Only neighbours may be chosen; the choice is one forward pass.

It joins engine, prompts, tokens, the rewrite guard and the graph. It asks no worker and keeps no conversation. A walk is asked for hop by
hop: what came before is handed over as a trace, and its prefix is still cached.
One decision holds one sequence of the engine: choose (prefill, softmax over the allowed functional tokens), then, where the
node wants it, write the rewritten query with the same cached prefix until the end token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lmgraph import prompts, rewrite, tokens
from lmgraph.engine import Engine, Session
from lmgraph.errors import NoDecision, QueryError, VocabularyMismatch
from lmgraph.graph import END, START, Graph
from lmgraph.tokens import Vocabulary
from lmgraph.types import Decision, Passed

QUERY_LIMIT = 256
"""query tokens that the master reads; longer queries are shortened for the decision only"""
REWRITE_LIMIT = 160
"""query tokens up to which `rewrite: auto` writes a new query: a longer one carries its own context"""
REQUEST_ROOM = 48
"""tokens that a request may have besides as many as its query has, before the trace of a walk is told more briefly"""
MAX_CHARACTERS = 200_000
MORE = 0.5
"""probability of another step from which on a query counts as a task of several steps"""
WIDTH = 4
"""sequences of nodes that a plan is the best of, at every length"""
TOP = 20
"""nodes whose probabilities a decision names"""
ORDINARY = (" the", " a", " and", " of")
"""words that may stand anywhere: where a query belongs to no node, the master is closer to going on in plain words (docs/log.md)"""
LEAST = 1e-30
"""a probability that llama.cpp rounds to 0"""


class Master:
    """Chooses and rewrites. `graph` and `vocabulary` must fit: see `fits`."""

    def __init__(self, engine: Engine, vocabulary: Vocabulary, graph: Graph, adapters: Mapping[str, Path] | None = None) -> None:
        fits(graph, vocabulary)
        self.adapters = adapters or {}
        """what is put on for the choice that follows a node; at START for asks that may become a walk"""
        self.engine = engine
        self.vocabulary = vocabulary
        self.graph = graph
        self._template: dict[str, list[int]] = {}
        self._words: list[int] = []

    async def decide(
        self,
        query: str,
        at: str = START,
        *,
        rewriting: bool | None = None,
        among: Sequence[str] | None = None,
        stay: str = "",
        scoped: bool = False,
        trace: Sequence[Passed] = (),
        ahead: bool = False,
    ) -> Decision:
        """Decide where `query` goes from node `at`. `rewriting` overrides the nodes' own `rewrite:` setting.

        `among` narrows the choice, of which END is a part.
        `scoped`: the decision says how far the query belongs to a node at all (`Decision.scope`), as it does where the graph sets a scope.
        Node `stay` is chosen unless another one is more probable by the graph's margin, or it may not follow `at`.
        `trace`: the steps that brought the walk here; then `end` is a candidate too, where the graph allows it (`Decision.node` is END).
        `ahead`: whether another step would follow this one is asked, too (`Decision.more`), at the cost of a few tokens. A master that
        puts something on for walks is asked with it first at START, and where no step would follow, once more without it: one more pass
        (unless `among` is one node, which somebody has chosen: it is the first of several).
        Raises QueryError for a query without content, NoDecision when nothing may follow `at`.
        """
        if not query.strip():
            raise QueryError("The query is empty.", 'Give a question: lmgraph ask "..."')
        if len(query) > MAX_CHARACTERS:
            raise QueryError(f"The query has {len(query):,} characters; at most {MAX_CHARACTERS:,} are taken.")
        names = self._following(at, among, bool(trace) and (among is None or END in among))
        if not names:
            raise NoDecision(f"No node may follow {at!r}.", f"Connect one: lmgraph graph connect {at} NODE")
        began = time.perf_counter()
        prompt, query_tokens, shortened = await self.prompt(query, trace)
        tokenised = time.perf_counter()
        async with await self.engine.session() as session:
            started = time.perf_counter()
            session.adapter = self.adapters.get(at) if ahead or at != START else None
            more = await self._several(session, prompt, names) if at == START and (among is None or len(among) != 1) else None
            ranked, scope = await self._choose(session, prompt, names, scoped)
            several = (more or 0.0) >= MORE
            scope = None if several else scope  # log-odds are those of the master as it is
            chosen, probability = ranked[0]
            stayed = chosen != stay and probability - dict(ranked).get(stay, -1.0) < self.graph.master.margin
            if stayed:
                chosen, probability = stay, dict(ranked)[stay]
            sure = chosen == stay or bool(trace) or several  # of a task for several, any of them could come first
            node, fallback = (chosen, False) if sure else self._threshold(chosen, probability, scope, names)
            decided = time.perf_counter()
            said = _Said(query, note="not asked for" if query_tokens <= REWRITE_LIMIT else "long query, passed on as it is")
            if chosen == END:
                said = _Said("", note="the walk ends")
            elif self._wants_rewrite(node, query_tokens, shortened, rewriting) and not fallback:
                said = await self._rewrite(session, query, prompt, self.graph.nodes[chosen].token, query_tokens)
            if ahead and chosen != END and more is None:
                more = await self._more(session, prompt, chosen, said.ids)
            if chosen != END:
                said = said.checked(query, len(trace) if trace or (more or 0.0) >= MORE else None, fallback)
            done = time.perf_counter()
        return Decision(
            query=query,
            node=node,
            chosen=chosen,
            token=self.graph.nodes[chosen].token if chosen != END else -1,
            probability=probability,
            alternatives=ranked,
            rewritten=said.text,
            rewrite_note=said.note,
            fallback=fallback,
            stayed=stayed,
            scope=scope,
            more=more,
            written=said.ids,
            shortened=shortened,
            tokenise_ms=(tokenised - began) * 1000,
            prefill_ms=(decided - started) * 1000,
            decode_ms=(done - decided) * 1000,
            prompt_tokens=len(prompt),
            rewrite_tokens=said.count,
        )

    async def sequence(self, query: str, most: int) -> tuple[str, ...]:
        """The nodes of a plan, END last where it ends before `most` of them: the most probable sequence that a beam of WIDTH finds.

        Only neighbours follow one another. Requests are written afterwards, by `decide`: without them a step is a few tokens.
        """
        prompt, _, _ = await self.prompt(query)
        live: list[tuple[float, tuple[str, ...]]] = [(0.0, ())]
        best: tuple[float, tuple[str, ...]] = (-math.inf, ())
        async with await self.engine.session() as session:
            while live and live[0][0] > best[0]:
                found = []
                for score, nodes in live:
                    at = nodes[-1] if nodes else START
                    session.adapter = self.adapters.get(at)
                    told = [i for node in nodes for i in await self._told(Passed(node))]
                    ranked, _ = await self._choose(session, [*prompt, *told], self._following(at, None, bool(nodes)))
                    found += [(score + math.log(max(p, LEAST)), (*nodes, name)) for name, p in ranked[: WIDTH + 1]]
                found.sort(reverse=True)
                over = [way for way in found if way[1][-1] == END or len(way[1]) == most]
                best = max([best, *over])
                live = [way for way in found if way not in over][:WIDTH]
        return best[1]

    def _following(self, at: str, among: Sequence[str] | None, ending: bool) -> list[str]:
        """Who may come next: neighbours of `at` (of `among`), and the end where a step has been made and the graph lets it end here."""
        following = self.graph.neighbours(at)
        names = [name for name in following if name != END and (among is None or name in among)]
        return [*names, END] if ending and (END in following or not following) else names

    async def _choose(
        self, session: Session, prompt: Sequence[int], names: Sequence[str], scoped: bool = False
    ) -> tuple[tuple[tuple[str, float], ...], float | None]:
        """((name, probability) best first, log-odds against ordinary words where they are asked for): one forward pass."""
        allowed = {self._id(name): name for name in names}
        words = await self._ordinary() if scoped or self.graph.master.scope is not None else []
        top = len(allowed) + len(words) if words else TOP
        choice = await session.choose(prompt, [*allowed, *words], self.vocabulary.temperature, top)
        mass = sum(p for i, p in choice.probabilities if i in allowed) if words else 1.0
        if not choice.probabilities or not mass:
            raise NoDecision("The master gave no probability to any allowed node.")
        ranked = tuple((allowed[i], p / mass) for i, p in choice.probabilities if i in allowed)[:TOP]
        if not words:
            return ranked, None
        odds = ranked[0][1] * mass / max(sum(p for i, p in choice.probabilities if i in words), LEAST)
        return ranked, math.log(odds) * self.vocabulary.temperature

    async def _several(self, session: Session, prompt: Sequence[int], names: Sequence[str]) -> float | None:
        """Probability that a first step is not the only one, as what is put on at START sees it; taken off where it is, None without."""
        worn = session.adapter
        if worn is None:
            return None
        ranked, _ = await self._choose(session, prompt, names)
        more = await self._more(session, prompt, ranked[0][0], ())
        session.adapter = worn if more >= MORE else None
        return more

    async def _more(self, session: Session, prompt: Sequence[int], chosen: str, written: Sequence[int]) -> float:
        """Probability that another step follows this one: the same walk one choice further, before anything is answered."""
        names = self._following(chosen, None, ending=True)
        if names == [END]:
            return 0.0
        if END not in names:
            return 1.0
        ids = [*prompt, *await self._told(Passed(chosen, tuple(written)))]
        if len(ids) >= self.engine.context:
            ids = [*prompt, *await self._told(Passed(chosen))]
        session.adapter = self.adapters.get(chosen)
        ranked, _ = await self._choose(session, ids, names)
        return 1.0 - dict(ranked).get(END, 0.0)

    def _id(self, name: str) -> int:
        return self.vocabulary.end_id if name == END else self.vocabulary.first_id + self.graph.nodes[name].token

    async def prompt(self, query: str, trace: Sequence[Passed] = ()) -> tuple[list[int], int, int]:
        """(ids of the whole prompt, query tokens, query tokens left out). The oldest steps of too long a trace are names only."""
        head, body, tail = prompts.render(query, self.vocabulary.dialect)
        ids = await self.engine.tokenise(body.text, body.special)
        kept, left_out = prompts.shorten(ids, QUERY_LIMIT)
        whole = await self._fixed(head) + kept + await self._fixed(tail)
        steps = [await self._told(Passed(step.node)) for step in trace]
        room = self.engine.context - len(whole) - len(kept) - REQUEST_ROOM - sum(map(len, steps))
        for number in reversed(range(len(steps))):
            told = await self._told(trace[number])
            if (more := len(told) - len(steps[number])) <= room:
                steps[number], room = told, room - more
        return [*whole, *(i for told in steps for i in told)], len(ids), left_out

    async def _told(self, step: Passed) -> list[int]:
        """Ids of a finished step."""
        ids = [self._id(step.node), *step.written, self.vocabulary.end_id]
        for segment in prompts.passed(step.answer, self.vocabulary.dialect):
            told = await self._fixed(segment) if segment.special else await self.engine.tokenise(segment.text)
            ids += told if segment.special else prompts.shorten(told, prompts.ANSWER_LIMIT)[0]
        return ids

    async def _fixed(self, segment: prompts.Segment) -> list[int]:
        if segment.text not in self._template:
            self._template[segment.text] = await self.engine.tokenise(segment.text, segment.special)
        return self._template[segment.text]

    async def _ordinary(self) -> list[int]:
        if not self._words:
            firsts = [(await self.engine.tokenise(word))[0] for word in ORDINARY]
            self._words = list(dict.fromkeys(firsts))  # each once: a small vocabulary may begin them all alike
        return self._words

    def _threshold(self, chosen: str, probability: float, scope: float | None, names: Sequence[str]) -> tuple[str, bool]:
        """(node, whether it is the fallback). The node's own threshold wins over the master's; a fallback must be allowed here."""
        own = self.graph.nodes[chosen].threshold
        limit = self.graph.master.threshold if own is None else own
        fallback, least = self.graph.master.fallback, self.graph.master.scope
        inside = least is None or scope is None or scope >= least
        if (probability >= limit and inside) or not fallback or fallback == chosen or fallback not in names:
            return chosen, False
        return fallback, True

    def _wants_rewrite(self, node: str, query_tokens: int, shortened: int, rewriting: bool | None) -> bool:
        if rewriting is not None:
            return rewriting and not shortened
        setting = self.graph.nodes[node].rewrite
        return not shortened and (setting == "always" or (setting == "auto" and query_tokens <= REWRITE_LIMIT))

    async def _rewrite(self, session: Session, query: str, prompt: Sequence[int], token: int, query_tokens: int) -> _Said:
        vocabulary = self.vocabulary
        functional = [vocabulary.first_id + i for i in range(vocabulary.size)]
        parser = tokens.Parser(vocabulary)
        parser.feed(vocabulary.first_id + token)
        ids = [*prompt, vocabulary.first_id + token]
        text, stopped = "", False
        stream = session.generate(ids, 2 * query_tokens + 48, want_ids=True, forbidden=functional)
        try:
            async for piece in stream:
                text += piece.text
                stopped = stopped or piece.finish == "stop"
                if not all([parser.feed(i) for i in piece.ids]):
                    stopped = True
                    break
        finally:
            await stream.aclose()
        parsed = parser.parsed
        text, finished = tokens.unquote(vocabulary.dialect, text), parsed.finished or stopped
        astray = not finished or rewrite.loops(text)  # a walk would be led astray by what is cut off or loops
        return _Said(text, () if astray else parsed.text_ids, finished, count=len(parsed.text_ids))


@dataclass(frozen=True)
class _Said:
    """What the master wrote for a worker; `note` says why nothing. `ids` are what a walk goes on from, `count` how many were written."""

    text: str
    ids: tuple[int, ...] = ()
    finished: bool = True
    note: str = ""
    count: int = 0

    def checked(self, query: str, earlier: int | None, fallback: bool) -> _Said:
        """The request, or the original query where the guard objects. `earlier`: steps before this one of several, None for an only one."""
        if fallback:
            return replace(self, text=query, note="fallback: the original query")
        if self.note:
            return self
        if earlier is None:
            complaint = rewrite.check(query, self.text, self.finished)
        else:
            complaint = rewrite.check_part(query, self.text, self.finished, earlier)
        return replace(self, text=query if complaint else self.text, note=complaint)


def fits(graph: Graph, vocabulary: Vocabulary) -> None:
    """Raise VocabularyMismatch when the graph uses functional tokens that this master was never trained for.

    A token's number is what counts: a node may be renamed. All misfits are named at once.
    """
    trained = {token: name for name, token in vocabulary.nodes.items()}
    strangers = [f"{node.name} (token {node.token})" for node in graph.nodes.values() if node.token not in trained]
    if strangers:
        spare = vocabulary.spare()
        raise VocabularyMismatch(
            f"The master was not trained for {', '.join(strangers)}; its tokens: "
            f"{', '.join(f'{t}={n}' for t, n in sorted(trained.items()))}.",
            f"Fit the row of a new node from examples: lmgraph train heads --node NAME --examples FILE"
            f"{'' if spare is None else f' (next free token: {spare})'}",
        )
    moved = [
        f"{name}: graph {graph.nodes[name].token}, master {token}"
        for name, token in vocabulary.nodes.items()
        if name in graph.nodes and graph.nodes[name].token != token
    ]
    if moved:
        raise VocabularyMismatch(
            f"Graph and master disagree on functional tokens: {'; '.join(moved)}.",
            "Write the master's numbers into graph.yaml, or use the bundle that was trained for this graph.",
        )
