"""A worker that answers from a table: for tests, demonstrations and dry runs. No model, no network."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from lmgraph.errors import WorkerError
from lmgraph.types import Delta, Message


class ScriptedWorker:
    """`answers`: request -> answer, '*' for any other; '{}' in an answer becomes the request. Streams word by word.

    An answer that starts with '!' is raised as a WorkerError, to try out fallbacks. Options have no effect.
    """

    resting = False

    def __init__(self, answers: Mapping[str, str]) -> None:
        self._answers = answers
        self.asked: list[tuple[Message, ...]] = []

    async def stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float | None = None,
        options: Mapping[str, Any] | None = None,
        whole: bool = False,
    ) -> AsyncIterator[Delta]:
        self.asked.append(tuple(messages))
        request = messages[-1].content
        answer = self._answers.get(request, self._answers.get("*", "{}")).replace("{}", request)
        if answer.startswith("!"):
            raise WorkerError(answer[1:].strip() or "scripted failure")
        words = answer.split(" ")
        for i, word in enumerate(words[:max_tokens]):
            yield Delta(word if i == 0 else " " + word)
        yield Delta(
            done=True,
            finish="stop" if len(words) <= max_tokens else "length",
            usage={"prompt_tokens": len(request.split()), "completion_tokens": min(len(words), max_tokens)},
        )

    async def close(self) -> None:
        """Nothing to release."""
