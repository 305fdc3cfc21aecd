"""What travels through lmgraph: small frozen dataclasses. Each has a `to_json` where a program may read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `content` is its text; `raw` is the turn as the OpenAI API has it, where text is not all."""

    role: str
    """system, user, assistant, tool, ..."""
    content: str
    raw: Mapping[str, Any] | None = None
    """the whole message object when it holds more than a role and a text (pictures, tool calls, names): passed on as it is"""


@dataclass(frozen=True)
class Ask:
    """What a user wants: the conversation (the last user message is the query), and how to answer it."""

    messages: tuple[Message, ...]
    node: str | None = None
    """a pinned worker, or None: the master chooses"""
    max_tokens: int | None = None
    temperature: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """further options of OpenAI's chat completions (top_p, stop, seed, n, tools, ...), for workers that know them"""
    needs: frozenset[str] = frozenset()
    """modalities besides text (image, audio) that the node must accept"""
    whole: bool = False
    """nobody looks at the answer before it is there whole"""
    stay: str = ""
    """the node that answered the turn before this one: kept unless the new turn clearly belongs elsewhere"""
    mode: str = ""
    """how it is answered (single, auto, walk, plan, vote), '' as the graph says"""

    @property
    def query(self) -> str:
        """The last user message, '' when there is none."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")


@dataclass(frozen=True)
class Decision:
    """What the master decided for one query.

    `token`, `probability` belong to the node that the master chose (`chosen`); `node` is where the query goes, which
    differs when the probability lies below the threshold and the fallback is taken. Probabilities are the softmax over the
    tokens allowed here, best first in `alternatives`. `rewritten` is what the worker gets; `rewrite_note` says why it is
    the original query, where it is. Times in milliseconds.
    """

    query: str
    node: str
    chosen: str
    token: int
    probability: float
    alternatives: tuple[tuple[str, float], ...] = ()
    rewritten: str = ""
    rewrite_note: str = ""
    fallback: bool = False
    stayed: bool = False
    """the conversation's node was kept although another one was a little more probable"""
    scope: float | None = None
    """log-odds of the chosen functional token against ordinary words in its place: low where a query belongs to no node; None: not asked"""
    more: float | None = None
    """probability that another step follows; None: not asked"""
    written: tuple[int, ...] = ()
    """ids of the request as the master wrote it, () where it wrote none: what the next hop goes on from"""
    shortened: int = 0
    """query tokens that the master did not see (the worker gets the query whole)"""
    tokenise_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    prompt_tokens: int = 0
    rewrite_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """One JSON object; key order is stable."""
        return {
            "node": self.node,
            "token": self.token,
            "probability": round(self.probability, 4),
            "alternatives": [{"node": n, "probability": round(p, 4)} for n, p in self.alternatives],
            "query": self.query,
            "rewritten": self.rewritten,
            "fallback": self.fallback,
            "stayed": self.stayed,
            "chosen": self.chosen,
            **({} if self.scope is None else {"scope": round(self.scope, 3)}),
            **({} if self.more is None else {"more": round(self.more, 4)}),
            "rewrite_note": self.rewrite_note,
            "shortened": self.shortened,
            "ms": {"tokenise": round(self.tokenise_ms, 2), "prefill": round(self.prefill_ms, 2), "decode": round(self.decode_ms, 2)},
            "tokens": {"prompt": self.prompt_tokens, "rewrite": self.rewrite_tokens},
        }


@dataclass(frozen=True)
class Passed:
    """A finished step as the master sees it when it chooses the next one."""

    node: str
    written: tuple[int, ...] = ()
    """ids of the request that it wrote"""
    answer: str = ""
    """'' in a plan, where nothing is answered yet"""


@dataclass(frozen=True)
class Delta:
    """A piece of an answer. The last one has `done` set and carries `usage` and, from the runtime, the trace."""

    text: str = ""
    """of the first choice"""
    done: bool = False
    choices: tuple[Mapping[str, Any], ...] = ()
    """the chunk's `choices` as the worker sent them, where the text of the first is not all (several choices, tool calls, logprobs)"""
    usage: Mapping[str, int] = field(default_factory=dict)
    finish: str = ""
    """stop, length or cancelled; only on the last piece"""
    trace: Trace | None = None


@dataclass(frozen=True)
class Step:
    """One hop: which node worked on which request, how long it took, how it ended."""

    node: str
    request: str
    answer: str = ""
    ms: float = 0.0
    first_ms: float = 0.0
    """until the first piece of the answer"""
    attempts: int = 1
    error: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)
    voter: bool = False
    """one of those who voted: they all began together, before any other step"""
    hop: int | None = None
    """number of the hop of a walk, from 0; a hop that fell back has several steps"""


@dataclass(frozen=True)
class Vote:
    """How several workers' answers were weighed. Voters that failed are in the steps only."""

    votes: tuple[tuple[str, str | None, float], ...]
    """(node, what could be compared of its answer: None for free text, weight)"""
    winner: str
    """the node whose answer was taken, or would have been without a judge"""
    share: float
    """weight of those who agree with the winner among all, 0 to 1; 0 when no answer could be compared"""
    judge: str = ""
    """the node that made one answer out of free texts, '' when none did"""

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "votes": [{"node": node, "key": key, "weight": round(weight, 4)} for node, key, weight in self.votes],
            "winner": self.winner,
            "share": round(self.share, 4),
            "judge": self.judge,
        }


@dataclass(frozen=True)
class Hop:
    """What was decided for one hop of a walk: the node, what it is asked, which earlier hops it needs, the master's probability."""

    node: str
    request: str
    needs: tuple[int, ...] = ()
    probability: float = 1.0


@dataclass(frozen=True)
class Walk:
    """How a walk went. `stopped` says why it ended: end (chosen), hops, seconds, tokens, cost (a limit), loop (the same hop
    again), master (it failed on the way)."""

    mode: str
    hops: tuple[Hop, ...]
    stopped: str
    compose: str = ""
    """node that made one answer out of several parts (the last hop), '' when none did"""

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "mode": self.mode,
            "stopped": self.stopped,
            "compose": self.compose,
            "hops": [
                {"node": hop.node, "request": hop.request, "needs": list(hop.needs), "probability": round(hop.probability, 4)}
                for hop in self.hops
            ],
        }


@dataclass(frozen=True)
class Progress:
    """What a walk is at, for those who watch: `plan` (all hops that are planned), `began` and `ended` (one hop)."""

    kind: str
    hop: int = 0
    node: str = ""
    request: str = ""
    step: Step | None = None
    """how it ended"""
    hops: tuple[Hop, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        if self.kind == "plan":
            return {"kind": "plan", "hops": [{"node": hop.node, "request": hop.request, "needs": list(hop.needs)} for hop in self.hops]}
        out: dict[str, Any] = {"kind": self.kind, "hop": self.hop, "node": self.node, "request": self.request}
        if self.step:  # the node that answered may be another one: the hop's fallback
            out |= {"node": self.step.node, "ms": round(self.step.ms, 1), "error": self.step.error, "answer": self.step.answer}
        return out


@dataclass(frozen=True)
class Trace:
    """What happened to one ask: the decision (None when a node was pinned), the steps, the vote and the walk (None when there was none).

    The last step is the one whose answer was given.
    """

    decision: Decision | None = None
    steps: tuple[Step, ...] = ()
    vote: Vote | None = None
    walk: Walk | None = None

    def to_json(self) -> dict[str, Any]:
        """One JSON object; `vote` and `walk` are in it only when there was one."""
        return {
            "decision": self.decision.to_json() if self.decision else None,
            "steps": [
                {
                    "node": s.node,
                    "request": s.request,
                    "ms": round(s.ms, 1),
                    "first_ms": round(s.first_ms, 1),
                    "attempts": s.attempts,
                    "error": s.error,
                    "usage": dict(s.usage),
                    **({} if s.hop is None else {"hop": s.hop, "answer": s.answer}),
                    **({"voter": True} if s.voter else {}),
                }
                for s in self.steps
            ],
            **({"vote": self.vote.to_json()} if self.vote else {}),
            **({"walk": self.walk.to_json()} if self.walk else {}),
        }


@dataclass(frozen=True)
class Answer:
    """A whole answer: the fold of a stream."""

    text: str
    trace: Trace
    usage: Mapping[str, int] = field(default_factory=dict)
