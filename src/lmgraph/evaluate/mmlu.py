"""An exam that a graph sits: the master routes every question, every distinct worker answers every question, and all of it is kept.

So each policy (routed, by subject, one worker for all) is a look-up in one table. It knows questions, decisions, replies and the
journals that let a run go on where it stopped. It is given the function that decides and the one that opens a worker; it computes no
score (marks.py does).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lmgraph.abreast import abreast
from lmgraph.evaluate.asking import Asker, Reply
from lmgraph.evaluate.journal import Finding, Journal, key_of
from lmgraph.evaluate.mmludata import Question, prompt
from lmgraph.graph import Graph, WorkerSpec
from lmgraph.types import Decision
from lmgraph.workers.base import Worker

Item = TypeVar("Item")
Progress = Callable[[str, int, int, str], None]
"""(piece of work, questions done, questions in all, how it goes)"""


@dataclass(frozen=True)
class Routed:
    """What the master made of one question: `node` gets it (`chosen` differs where the fallback took over) with `stem` as its text."""

    node: str
    chosen: str
    probability: float
    fallback: bool
    stem: str
    ms: float
    """from the text to the choice, without the time that a rewrite took"""
    rewrite_ms: float


@dataclass(frozen=True)
class Candidate:
    """One distinct worker of a graph: the nodes that have it, a name for people, and a key that says what its answers depend on."""

    name: str
    key: str
    nodes: tuple[str, ...]
    retries: int


@dataclass(frozen=True)
class Results:
    """Everything that was found, in the order of the questions: `replies` by the candidates' names.

    `rewritten`: the routed worker's reply to the rewritten question, None where the question went to it as it is.
    """

    routed: list[Routed]
    replies: dict[str, list[Reply]]
    rewritten: list[Reply | None]


def candidates(given: Graph, weights: Callable[[WorkerSpec], str]) -> list[Candidate]:
    """The distinct workers of a graph, in its order. `weights` names the weights of an embedded worker (a digest).

    Two nodes have one worker when kind, model, URLs and key are the same and so is the system prompt; embedded, when their weights
    are the same: a raw prompt has no room for a system prompt. Patience, retries and sampling change no answer here.
    """
    found: dict[str, list[str]] = {}
    for name, node in given.nodes.items():
        spec = node.worker
        told = [spec.model, spec.urls, spec.key_env, spec.system, dict(spec.answers)]
        own: list[Any] = [weights(spec)] if spec.kind == "embedded" else told
        found.setdefault(key_of(spec.kind, own), []).append(name)
    models = [given.nodes[nodes[0]].worker.model or given.nodes[nodes[0]].worker.kind for nodes in found.values()]
    return [
        Candidate(
            model if models.count(model) == 1 else f"{model} ({nodes[0]})",
            key,
            tuple(nodes),
            max(given.nodes[name].worker.retries for name in nodes),
        )
        for model, (key, nodes) in zip(models, found.items(), strict=True)
    ]


def master_key(given: Graph, digest: str, rewriting: bool) -> str:
    """What decisions depend on besides the question: the master's weights (their digest) and what the graph says about choosing."""
    first = [[name, given.nodes[name].token, given.nodes[name].threshold, given.nodes[name].rewrite] for name in given.neighbours()]
    return key_of(digest, first, given.master.threshold, given.master.scope, given.master.fallback, rewriting)


async def route(
    decide: Callable[[str], Awaitable[Decision]],
    questions: Sequence[Question],
    key: str,
    journal: Journal[Routed],
    *,
    concurrency: int,
    progress: Progress,
) -> list[Routed]:
    """Where the master sends each question: it sees the question's text, never the choices nor the subject.

    The first exception of `decide` ends it; what was found is in the journal.
    """
    keys = [key_of(key, question.question) for question in questions]
    todo = {k: question for k, question in zip(keys, questions, strict=True) if journal.get(k) is None}
    done = right = 0

    async def work(item: tuple[str, Question]) -> None:
        nonlocal done, right
        k, question = item
        made = await decide(question.question)
        took = made.tokenise_ms + made.prefill_ms
        routed = Routed(made.node, made.chosen, made.probability, made.fallback, made.rewritten, took, made.decode_ms)
        journal.add(k, routed, {"id": question.id, "node": question.node})
        done, right = done + 1, right + (made.chosen == question.node)
        progress("routing", len(questions) - len(todo) + done, len(questions), f"{right / done:.1%} right")

    await abreast(work, list(todo.items()), concurrency)
    return [_there(journal, k) for k in keys]


async def sit(
    questions: Sequence[Question],
    shots: Mapping[str, Sequence[Question]],
    routed: Sequence[Routed],
    those: Sequence[Candidate],
    open_worker: Callable[[Candidate], Awaitable[Worker]],
    journal: Journal[Reply],
    *,
    concurrency: int,
    progress: Progress,
) -> Results:
    """Every candidate answers every question; the routed one also answers the rewritten question where there is one.

    A candidate's questions come in their order (by subject: what their prompts share stays in an engine's cache), and it is closed
    when it is done, before the next one is opened; one that has answered everything is not opened. The first error ends it.
    """
    replies: dict[str, list[Reply]] = {}
    rewritten: list[Reply | None] = [None] * len(questions)
    for candidate in those:
        cells: list[tuple[Question, str, str]] = []
        own: list[str] = []
        again: dict[int, str] = {}
        for i, (question, where) in enumerate(zip(questions, routed, strict=True)):
            stems = [question.question]
            if where.node in candidate.nodes and where.stem != question.question:
                stems.append(where.stem)
            for stem in stems:
                key = key_of(candidate.key, prompt(question, stem, shots[question.subject]))
                cells.append((question, stem, key))
                if stem is question.question:
                    own.append(key)
                else:
                    again[i] = key
        await _answer(cells, shots, candidate, open_worker, journal, concurrency, progress)
        replies[candidate.name] = [_there(journal, key) for key in own]
        for i, key in again.items():
            rewritten[i] = _there(journal, key)
    return Results(list(routed), replies, rewritten)


async def _answer(
    cells: Sequence[tuple[Question, str, str]],
    shots: Mapping[str, Sequence[Question]],
    candidate: Candidate,
    open_worker: Callable[[Candidate], Awaitable[Worker]],
    journal: Journal[Reply],
    concurrency: int,
    progress: Progress,
) -> None:
    """Ask what is not in the journal yet."""
    todo = {key: (question, stem) for question, stem, key in cells if journal.get(key) is None}
    if not todo:
        return
    worker = await open_worker(candidate)
    asker = Asker(worker, candidate.retries)
    done = right = 0

    async def work(item: tuple[str, tuple[Question, str]]) -> None:
        nonlocal done, right
        key, (question, stem) = item
        reply = await asker.ask(question, stem, shots[question.subject])
        journal.add(key, reply, {"worker": candidate.name, "id": question.id, "answer": question.answer})
        done, right = done + 1, right + (reply.choice == question.answer)
        progress(f"asking {candidate.name}", len(cells) - len(todo) + done, len(cells), f"{right / done:.1%} right")

    try:
        await abreast(work, list(todo.items()), concurrency)
    finally:
        await worker.close()


def _there(journal: Journal[Finding], key: str) -> Finding:
    found = journal.get(key)
    assert found is not None  # every key was found or asked for just before
    return found
