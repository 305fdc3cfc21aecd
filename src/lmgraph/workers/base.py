"""What a worker is: something that streams an answer to a conversation. Every kind of worker has this one shape."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from lmgraph.types import Delta, Message


class Worker(Protocol):
    """Answers conversations. Leaving the stream early stops the work behind it.

    A worker that answers one ask at a time also has `turn()`, what is to be held (`async with`) while it does.
    """

    @property
    def resting(self) -> bool:
        """Whether it is better not asked for a while, where somebody else can answer: it failed again and again, or says so itself."""
        ...

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float | None = None,
        options: Mapping[str, Any] | None = None,
        whole: bool = False,
    ) -> AsyncIterator[Delta]:
        """Pieces of one answer; the last has `done` set. Raises WorkerError, WorkerTimeout or EngineError.

        `whole`: nobody looks at the pieces before the last one is there.
        `options` are further options of OpenAI's chat completions; raises QueryError for one that this worker does not know.
        """
        ...

    async def close(self) -> None:
        """Release connections or weights."""
        ...
