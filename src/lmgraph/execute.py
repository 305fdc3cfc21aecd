"""Run one step over workers: timeout, retry, fallback edge; yields Deltas, keeps a Step.

It knows workers and how they fail. It does not know the master, and it chooses nothing but what the graph says comes
after a failure. A step that has already sent text to the user is never started again somewhere else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from lmgraph.errors import EngineError, OutsideError, WorkerError, WorkerTimeout
from lmgraph.graph import Node
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
) -> AsyncGenerator[Delta | Step, None]:
    """Stream one step: Deltas of text, and one Step per node that was tried, when it is over (the last one, before the last Delta,
    holds the answer).

    `chain` are the nodes to try after `node`, in order; `answering` is told the one whose worker gives the first piece. `tried` are
    steps that have failed before. Raises the last error when all fail.
    """
    request = messages[-1].content
    steps = list(tried)
    last: OutsideError | None = None
    for candidate in (node, *chain):
        attempts = 1 + candidate.worker.retries
        for attempt in range(1, attempts + 1):
            began = time.perf_counter()
            first = 0.0
            text: list[str] = []
            try:
                worker = await open_worker(candidate)
                limit = max_tokens or candidate.worker.max_tokens
                stream = worker.stream(messages, max_tokens=limit, temperature=temperature, options=options, whole=whole)
                patience = _Patience(candidate.worker.timeout_s)
                try:
                    while True:
                        with patience:
                            delta = await anext(stream, None)
                        if delta is None:
                            raise WorkerError(f"The worker of node {candidate.name!r} ended its answer without saying so.")
                        if not text and answering:
                            answering(candidate.name)
                        if delta.done:
                            took = (time.perf_counter() - began) * 1000
                            yield Step(candidate.name, request, "".join(text), took, first, attempt, "", delta.usage)
                            yield delta
                            return
                        first = first or (time.perf_counter() - began) * 1000
                        text.append(delta.text)
                        yield delta
                finally:
                    patience.end()
                    close = getattr(stream, "aclose", None)
                    if close is not None:
                        await close()
            except OutsideError as error:
                last = error
                took = (time.perf_counter() - began) * 1000
                if text:
                    yield Step(candidate.name, request, "".join(text), took, first, attempt, error.message)
                    words = f"Node {candidate.name!r} failed in the middle of its answer: {error.message}"
                    raise type(error)(words, error.hint) from error
                refused = 400 <= getattr(error, "status", 0) < 500 and getattr(error, "status", 0) not in (408, 429)
                if attempt == attempts or refused or isinstance(error, (WorkerTimeout, EngineError)):
                    steps.append(Step(candidate.name, request, "", took, 0.0, attempt, error.message))
                    yield steps[-1]
                    break
                await asyncio.sleep(min(0.2 * 2 ** (attempt - 1), 2.0))
    assert last is not None
    raise failure(steps, last)


def failure(steps: Sequence[Step], last: OutsideError) -> OutsideError:
    """The error when every step has failed: it names each, and is of the kind of the last one."""
    return type(last)(f"No worker could answer ({', '.join(f'{s.node}: {s.error}' for s in steps)})", last.hint)


class _Patience:
    """`with patience:` raises WorkerTimeout when what is awaited inside takes too long; one timer for many rounds.

    Not `asyncio.wait_for`: that starts a task for every piece of an answer (Python 3.11), which costs more than reading it.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        """who waits; None between two rounds"""
        self._deadline = 0.0
        self._expired = False

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._deadline = self._loop.time() + self._seconds
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._ring)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        task, self._task = self._task, None
        if self._expired and isinstance(error, asyncio.CancelledError):
            if task is not None and hasattr(task, "uncancel"):  # Python 3.11: it is we who cancelled
                task.uncancel()
            raise WorkerTimeout(f"No answer within {self._seconds:g} s.") from error

    def _ring(self) -> None:
        self._timer = None
        if self._task is None:
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._ring)
        else:
            self._expired = True
            self._task.cancel()

    def end(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
