"""Run one step over workers: timeout, retry, fallback edge; yields Deltas, keeps a Step.

It knows workers and how they fail. It does not know the master, and it chooses nothing but what the graph says comes
after a failure. A step that has already sent text to the user is never started again somewhere else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from lmgraph.errors import OutsideError, WorkerError, WorkerTimeout
from lmgraph.graph import Node
from lmgraph.patience import Patience
from lmgraph.types import Delta, Message, Step
from lmgraph.workers.base import Worker

Open = Callable[[Node], Awaitable[Worker]]


async def run(
    node: Node,
    chain: Sequence[Node],
    messages: Sequence[Message],
    open_worker: Open,
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    options: Mapping[str, Any] | None = None,
    whole: bool = False,
    answering: Callable[[str], None] | None = None,
    tried: Sequence[Step] = (),
    shorten: Callable[[], Sequence[Message] | None] | None = None,
    hidden: bool = False,
) -> AsyncGenerator[Delta | Step, None]:
    """Stream one step: Deltas of text, and one Step per node that was tried, when it is over (the last one, before the last Delta,
    holds the answer).

    `chain` are the nodes to try after `node`, in order; `answering` is told the one whose worker gives the first piece. `tried` are
    steps that have failed before. `shorten` gives the messages with less in them, for a worker whose model has no room for them (None:
    nothing more can be left out). `hidden`: nobody sees the answer before its end, so one that breaks off, or is empty, is a failure like
    any other, and no piece of it comes out. Raises the last error when all fail.
    """
    steps = list(tried)
    last: OutsideError | None = None
    candidates = (node, *chain)
    for candidate in candidates:
        elsewhere = candidate is not candidates[-1]
        worker: Worker | None = None
        attempts = 1 + candidate.worker.retries
        attempt = 1
        given, request = messages, messages[-1].content
        while True:
            began = time.perf_counter()
            first = 0.0
            text: list[str] = []
            held: list[Delta] = []
            try:
                worker = await open_worker(candidate)
                if worker.resting and elsewhere:
                    raise WorkerError("It is left alone for a while, as its last calls failed or it asked for that.")
                limit = max_tokens or candidate.worker.max_tokens
                async with getattr(worker, "turn", nullcontext)():
                    stream = worker.stream(given, max_tokens=limit, temperature=temperature, options=options, whole=whole)
                    seconds = candidate.worker.timeout_s + candidate.worker.start_timeout_s
                    patience = Patience(seconds, partial(WorkerTimeout, f"No answer within {seconds:g} s."))
                    try:
                        while True:
                            with patience:
                                delta = await anext(stream, None)
                            if delta is None:
                                raise WorkerError(f"The worker of node {candidate.name!r} ended its answer without saying so.")
                            if not text and answering:
                                answering(candidate.name)
                            if delta.done:
                                if hidden and not "".join(text).strip():
                                    raise WorkerError(f"The worker of node {candidate.name!r} gave an empty answer.")
                                for piece in held:
                                    yield piece
                                took = (time.perf_counter() - began) * 1000
                                yield Step(candidate.name, request, "".join(text), took, first, attempt, "", delta.usage)
                                yield delta
                                return
                            first = first or (time.perf_counter() - began) * 1000
                            text.append(delta.text)
                            if hidden:
                                held.append(delta)
                            else:
                                yield delta
                    finally:
                        patience.end()
                        close = getattr(stream, "aclose", None)
                        if close is not None:
                            await close()
            except OutsideError as error:
                last = error
                took = (time.perf_counter() - began) * 1000
                if text and not hidden:
                    yield Step(candidate.name, request, "".join(text), took, first, attempt, error.message)
                    words = f"Node {candidate.name!r} failed in the middle of its answer: {error.message}"
                    raise type(error)(words, error.hint) from error
                if error.too_long and shorten and (shorter := shorten()):
                    given, request = shorter, shorter[-1].content
                    continue
                refused = 400 <= getattr(error, "status", 0) < 500 and getattr(error, "status", 0) not in (408, 429)
                rests = elsewhere and worker is not None and worker.resting
                if attempt == attempts or refused or rests or not error.again:
                    steps.append(Step(candidate.name, request, "".join(text), took, first, attempt, error.message))
                    yield steps[-1]
                    break
                await asyncio.sleep(min(0.2 * 2 ** (attempt - 1), 2.0))
                attempt += 1
    assert last is not None
    raise failure(steps, last)


def failure(steps: Sequence[Step], last: OutsideError) -> OutsideError:
    """The error when every step has failed: it names each, and is of the kind of the last one."""
    return type(last)(f"No worker could answer ({', '.join(f'{s.node}: {s.error}' for s in steps)})", last.hint)
