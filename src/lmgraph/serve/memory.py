"""What the gateway remembers: conversations with the node they are with, answers that may be given again, what was asked.

It knows the store and what a conversation is. It knows no HTTP and asks no worker. Everything belongs to an owner (the id of an
API key, '' for nobody), and no owner meets what another one said.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from lmgraph.errors import StoreError
from lmgraph.store.base import Store, Turn
from lmgraph.types import Ask, Message

TURNS = 50
"""most turns of a conversation that are put in front of a new one"""
CACHE_S = 86_400.0
TITLE = 80


@dataclass(frozen=True)
class Talk:
    """One ask in its conversation. `id` is '' for a new one without a name: it gets one from its first answer."""

    ask: Ask
    owner: str = ""
    id: str = ""
    new: tuple[Message, ...] = ()
    """the messages that no turn before this one holds"""
    turns: int = 0
    """that the store has of it"""
    recalled: bool = True
    """False: the turns before could not be read, and the answer will not know them"""


@dataclass(frozen=True)
class Kept:
    """An answer that may be given again."""

    node: str
    text: str
    finish: str
    usage: Mapping[str, int]
    probability: float | None
    trace: Mapping[str, Any]


class Flight:
    """An answer in the making that others may wait for. `kept` is what was found in the cache, or None: make it, then `land`."""

    def __init__(self, kept: Kept | None) -> None:
        self.kept = kept
        self.landed: Kept | None = None

    def land(self, kept: Kept) -> None:
        """The answer is made."""
        self.landed = kept


class Memory:
    """Conversations and answers of one gateway over one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._flying: dict[str, asyncio.Future[Kept | None]] = {}

    async def recall(self, ask: Ask, owner: str, conversation: str = "") -> Talk:
        """The ask with what its conversation adds: the turns before (when only a new one was sent), the node it is with.

        A conversation without a name is known again by how it began: its messages up to the first answer. While the store is down an
        ask stays as it is.
        """
        messages = ask.messages
        last = max(i for i, m in enumerate(messages) if m.role == "user")
        begun = next((i for i, m in enumerate(messages) if m.role == "assistant"), None)
        new = messages if begun is None else messages[last:]
        if not conversation:
            if begun is None:
                return Talk(ask, owner, "", new)
            conversation = _name(messages[: begun + 1])
        try:
            turns = await self._store.turns(place(owner, conversation), TURNS)
        except StoreError:
            return Talk(ask, owner, conversation, new, recalled=begun is not None)
        if not turns:
            return Talk(ask, owner, conversation, new)
        if begun is None:
            own = [m for m in messages if m.role in ("system", "developer")]
            earlier = [m for turn in turns for m in _messages(turn)]
            if own:  # a new instruction takes the place of the old one
                earlier = [m for m in earlier if m.role not in ("system", "developer")]
            ask = replace(ask, messages=(*own, *earlier, *(m for m in messages if m not in own)))
            node = turns[-1].node
        else:
            before = next((m.content.strip() for m in reversed(messages[:last]) if m.role == "assistant"), None)
            node = next((t.node for t in reversed(turns) if t.answer.strip() == before), turns[-1].node)
        calling = messages[-1].role in ("tool", "function")
        ask = replace(ask, node=ask.node or node) if calling and node else replace(ask, stay=node)
        return Talk(ask, owner, conversation, new, len(turns))

    async def remember(self, talk: Talk, answer: str, node: str, trace: Mapping[str, Any]) -> bool:
        """Keep a turn; returns whether it is kept for good."""
        name = talk.id or _name((*talk.ask.messages, Message("assistant", answer)))
        first = next((m.content for m in talk.ask.messages if m.role == "user"), "")
        asked = [dict(m.raw) if m.raw is not None else {"role": m.role, "content": m.content} for m in talk.new]
        title = " ".join(first[: 4 * TITLE].split())[:TITLE]
        try:
            await self._store.append(Turn(place(talk.owner, name), {"messages": asked}, answer, node, trace, title=title))
        except StoreError:
            return False
        return True

    @asynccontextmanager
    async def flight(self, key: str) -> AsyncIterator[Flight]:
        """The answer kept under `key`, also one that another request is making just now; else the one to make and `land`."""
        while (flying := self._flying.get(key)) is not None:
            kept = await asyncio.shield(flying)
            if kept is not None:
                yield Flight(kept)
                return
        mine: asyncio.Future[Kept | None] = asyncio.get_running_loop().create_future()
        self._flying[key] = mine
        flight = Flight(None)
        try:
            flight.kept = _read(await self._store.cached(key))
            yield flight
            if flight.landed is not None:
                value = json.dumps(vars(flight.landed), separators=(",", ":")).encode()
                await self._store.keep(key, value, CACHE_S)
        finally:
            del self._flying[key]
            mine.set_result(flight.kept or flight.landed)


def place(owner: str, conversation: str) -> str:
    """The name under which a store has an owner's conversation."""
    return f"{owner}/{conversation}" if owner else conversation


def cache_key(identity: str, ask: Ask, owner: str) -> str:
    """Under which an answer is kept: whatever an answer depends on (`identity` stands for graph, models and master)."""
    turns = [m.raw or (m.role, m.content) for m in ask.messages]
    parts = [identity, owner, ask.node, ask.stay, ask.mode, ask.max_tokens, ask.temperature, ask.options, turns]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(value: bytes | None) -> Kept | None:
    if value is None:
        return None
    try:
        return Kept(**json.loads(value))
    except (ValueError, TypeError):  # written by another version
        return None


def _messages(turn: Turn) -> list[Message]:
    asked = [
        Message(str(m.get("role")), _text(m), None if m.keys() == {"role", "content"} and isinstance(m["content"], str) else m)
        for m in turn.request.get("messages", ())
    ]
    return [*asked, Message("assistant", turn.answer)]


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))
    return content if isinstance(content, str) else ""


def _name(messages: tuple[Message, ...]) -> str:
    """A conversation's name by how it began."""
    first = next(i for i, m in enumerate(messages) if m.role == "assistant")
    beginning = [(m.role, m.content.strip()) for m in messages[: first + 1]]
    return "c-" + hashlib.sha256(json.dumps(beginning).encode()).hexdigest()[:24]
