"""A worker in this process: any GGUF, its own chat template, streamed. Nodes that name the same file share one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from lmgraph.engine import Engine, too_long
from lmgraph.errors import QueryError
from lmgraph.types import Delta, Message

ANSWER_ROOM = 64
"""tokens: what has no room for as many (or for as few as are asked for) is not begun"""
LABELS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""options that say something about a request and nothing about its answer"""
NEUTRAL = {"n": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "response_format": {"type": "text"}, "tool_choice": "none"}
"""option -> the value that changes nothing"""
GREEDY = {"seed", "top_p"}
"""options without effect at temperature 0"""


class SharedEngine:
    """Opens an engine on first use and closes it when nobody needs it any more."""

    def __init__(self, load: Callable[[], Awaitable[Engine]]) -> None:
        self._load = load
        self._lock = asyncio.Lock()
        self._engine: Engine | None = None
        self.turn = asyncio.Lock()
        """who answers with it: one at a time"""

    async def get(self) -> Engine:
        """The engine, loaded once however many ask at the same time."""
        async with self._lock:
            if self._engine is None:
                self._engine = await self._load()
            return self._engine

    async def close(self) -> None:
        """Unload; a later `get` loads again."""
        async with self._lock:
            if self._engine is not None:
                await self._engine.close()
                self._engine = None


class EmbeddedWorker:
    """Answers with a local model. Conversations go in as ids: nothing a user writes acts as a special token."""

    resting = False

    def __init__(self, shared: SharedEngine, system: str = "", default_temperature: float | None = None) -> None:
        self._shared = shared
        self._system = system
        self._temperature = default_temperature

    async def stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float | None = None,
        options: Mapping[str, Any] | None = None,
        whole: bool = False,
    ) -> AsyncIterator[Delta]:
        heat = temperature if temperature is not None else self._temperature if self._temperature is not None else 0.0
        _check(options or {}, greedy=heat == 0)
        engine = await self._shared.get()
        turns = [(m.role, m.content) for m in messages]
        if self._system:
            turns = [("system", self._system), *(t for t in turns if t[0] != "system")]
        ids = await engine.render(turns)
        if len(ids) + min(max_tokens, ANSWER_ROOM) > engine.context:
            raise too_long(len(ids), engine.path, engine.context)
        finish, used = "stop", 0
        async with await engine.session() as session:
            stream = session.generate(ids, max_tokens, temperature=heat)
            try:
                async for piece in stream:
                    if piece.text:
                        yield Delta(piece.text)
                    finish, used = piece.finish or finish, piece.completion_tokens or used
            finally:
                await stream.aclose()
        yield Delta(done=True, finish=finish, usage={"prompt_tokens": len(ids), "completion_tokens": used})

    def turn(self) -> asyncio.Lock:
        """To be held while this worker answers: waiting for those before it is not its silence."""
        return self._shared.turn

    async def engine(self) -> Engine:
        """The model itself, loaded on first use: for what is no conversation."""
        return await self._shared.get()

    async def close(self) -> None:
        await self._shared.close()


def _check(options: Mapping[str, Any], greedy: bool) -> None:
    """Refuse an option that would have an effect which this worker cannot give."""
    for name, value in options.items():
        nothing = value is None or value is False or value in ([], {}, "") or (name in NEUTRAL and value == NEUTRAL[name])
        if not (nothing or name in LABELS or (greedy and name in GREEDY)):
            raise QueryError(
                f"An embedded worker does not know the option {name!r}.",
                "It knows temperature and max_tokens, and seed at temperature 0; a node with an OpenAI-compatible server knows more.",
            )
