"""The master: (query, where we stand) -> Decision. Only neighbours may be chosen; the choice is one forward pass.

It joins engine, prompts, tokens, the rewrite guard and the graph. It asks no worker and keeps no conversation.
One decision holds one sequence of the engine: choose (prefill, softmax over the allowed functional tokens), then, where the
node wants it, write the rewritten query with the same cached prefix until the end token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from lmgraph import prompts, rewrite, tokens
from lmgraph.engine import Engine, Session
from lmgraph.errors import NoDecision, QueryError, VocabularyMismatch
from lmgraph.graph import END, START, Graph
from lmgraph.tokens import Vocabulary
from lmgraph.types import Decision

QUERY_LIMIT = 256
"""query tokens that the master reads; longer queries are shortened for the decision only"""
REWRITE_LIMIT = 160
"""query tokens up to which `rewrite: auto` writes a new query: a longer one carries its own context"""
MAX_CHARACTERS = 200_000
TOP = 20
"""nodes whose probabilities a decision names"""
ORDINARY = (" the", " a", " and", " of")
"""words that may stand anywhere: where a query belongs to no node, the master is closer to going on in plain words (docs/log.md)"""
LEAST = 1e-30
"""a probability that llama.cpp rounds to 0"""


class Master:
    """Chooses and rewrites. `graph` and `vocabulary` must fit: see `fits`."""

    def __init__(self, engine: Engine, vocabulary: Vocabulary, graph: Graph) -> None:
        fits(graph, vocabulary)
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
    ) -> Decision:
        """Decide where `query` goes from node `at`. `rewriting` overrides the nodes' own `rewrite:` setting; `among` narrows the choice.

        `scoped`: the decision says how far the query belongs to a node at all (`Decision.scope`), as it does where the graph sets a scope.
        Node `stay` is chosen unless another one is more probable by the graph's margin, or it may not follow `at`.
        Raises QueryError for a query without content, NoDecision when nothing may follow `at`.
        """
        if not query.strip():
            raise QueryError("The query is empty.", 'Give a question: lmgraph ask "..."')
        if len(query) > MAX_CHARACTERS:
            raise QueryError(f"The query has {len(query):,} characters; at most {MAX_CHARACTERS:,} are taken.")
        names = [name for name in self.graph.neighbours(at) if name != END and (among is None or name in among)]
        if not names:
            raise NoDecision(f"No node may follow {at!r}.", f"Connect one: lmgraph graph connect {at} NODE")
        began = time.perf_counter()
        prompt, query_tokens, shortened = await self.prompt(query)
        tokenised = time.perf_counter()
        allowed = {self.vocabulary.first_id + self.graph.nodes[name].token: name for name in names}
        async with await self.engine.session() as session:
            started = time.perf_counter()
            words = await self._ordinary() if scoped or self.graph.master.scope is not None else []
            top = len(allowed) + len(words) if words else TOP
            choice = await session.choose(prompt, [*allowed, *words], self.vocabulary.temperature, top)
            mass = sum(p for i, p in choice.probabilities if i in allowed) if words else 1.0
            if not choice.probabilities or not mass:
                raise NoDecision("The master gave no probability to any allowed node.")
            ranked = tuple((allowed[i], p / mass) for i, p in choice.probabilities if i in allowed)[:TOP]
            odds = ranked[0][1] * mass / max(sum(p for i, p in choice.probabilities if i in words), LEAST) if words else 0.0
            scope = math.log(odds) * self.vocabulary.temperature if words else None
            chosen, probability = ranked[0]
            stayed = chosen != stay and probability - dict(ranked).get(stay, -1.0) < self.graph.master.margin
            if stayed:
                chosen, probability = stay, dict(ranked)[stay]
            node, fallback = (chosen, False) if chosen == stay else self._threshold(chosen, probability, scope, names)
            decided = time.perf_counter()
            text, note, written = query, "", 0
            if fallback:
                note = "fallback: the original query"
            elif self._wants_rewrite(node, query_tokens, shortened, rewriting):
                text, note, written = await self._rewrite(session, query, prompt, self.graph.nodes[chosen].token, query_tokens)
            else:
                note = "not asked for" if query_tokens <= REWRITE_LIMIT else "long query, passed on as it is"
            done = time.perf_counter()
        return Decision(
            query=query,
            node=node,
            chosen=chosen,
            token=self.graph.nodes[chosen].token,
            probability=probability,
            alternatives=ranked,
            rewritten=text,
            rewrite_note=note,
            fallback=fallback,
            stayed=stayed,
            scope=scope,
            shortened=shortened,
            tokenise_ms=(tokenised - began) * 1000,
            prefill_ms=(decided - started) * 1000,
            decode_ms=(done - decided) * 1000,
            prompt_tokens=len(prompt),
            rewrite_tokens=written,
        )

    async def prompt(self, query: str) -> tuple[list[int], int, int]:
        """(ids of the whole prompt, query tokens, query tokens left out)."""
        head, body, tail = prompts.render(query, self.vocabulary.dialect)
        ids = await self.engine.tokenise(body.text, body.special)
        kept, left_out = prompts.shorten(ids, QUERY_LIMIT)
        return await self._fixed(head) + kept + await self._fixed(tail), len(ids), left_out

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

    async def _rewrite(self, session: Session, query: str, prompt: list[int], token: int, query_tokens: int) -> tuple[str, str, int]:
        """(request for the worker, why it is the original or '', tokens written)."""
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
        request = tokens.unquote(vocabulary.dialect, text)
        complaint = rewrite.check(query, request, parsed.finished or stopped)
        return (query if complaint else request), complaint, len(parsed.text_ids)


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
