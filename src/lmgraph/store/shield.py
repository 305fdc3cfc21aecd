"""A store that may die without taking requests with it: a shield around any store.

While the store is down, the cache finds nothing, turns are dropped and counted, and limits are this process's own; no request waits
for it: only a task of the shield's own asks, once in a while, whether it is back. What must not be guessed raises StoreError: who may
enter (but keys seen a moment ago are remembered), what was said before, whether a turn is kept, whether something was deleted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from lmgraph.errors import StoreError
from lmgraph.store.base import ApiKey, Buckets, Conversation, Spots, Store, Turn

T = TypeVar("T")
REMEMBER_S = 60.0
log = logging.getLogger("lmgraph.store")


class Shielded:
    """A `Store` around another. `every_s`: seconds between two questions whether a dead store is back."""

    def __init__(self, store: Store, *, every_s: float = 1.0) -> None:
        self._store, self._every_s = store, every_s
        self._buckets, self._spots = Buckets(), Spots()
        self._seen: dict[str, tuple[ApiKey, float]] = {}  # digest -> key, when it was seen; no more entries than there are keys
        self._error: StoreError | None = None
        self._waiting: asyncio.Task[None] | None = None
        self._dropped = 0

    @property
    def healthy(self) -> bool:
        """Whether the store works, as far as is known."""
        return self._error is None

    @property
    def dropped(self) -> int:
        """How many turns were not kept, since the start."""
        return self._dropped

    async def append(self, turn: Turn) -> None:
        """As `Store.append`; a turn that cannot be kept is counted besides."""
        try:
            await self._try(self._store.append(turn))
        except StoreError:
            self._dropped += 1
            raise

    async def turns(self, conversation: str, limit: int) -> list[Turn]:
        """As `Store.turns`. Raises StoreError while the store is down: a conversation that cannot be read is not empty."""
        return await self._try(self._store.turns(conversation, limit))

    async def conversations(self, limit: int, before: float | None = None) -> list[Conversation]:
        """As `Store.conversations`. Raises StoreError while the store is down."""
        return await self._try(self._store.conversations(limit, before))

    async def recent(self, node: str | None, limit: int) -> list[Turn]:
        """As `Store.recent`. Raises StoreError while the store is down."""
        return await self._try(self._store.recent(node, limit))

    async def forget(self, conversation: str) -> bool:
        """As `Store.forget`. Raises StoreError while the store is down: "there was none" would be a lie."""
        return await self._try(self._store.forget(conversation))

    async def cached(self, key: str) -> bytes | None:
        """As `Store.cached`; None while the store is down."""
        with suppress(StoreError):
            return await self._try(self._store.cached(key))
        return None

    async def keep(self, key: str, value: bytes, ttl_s: float) -> None:
        """As `Store.keep`; nothing is kept while the store is down."""
        with suppress(StoreError):
            await self._try(self._store.keep(key, value, ttl_s))

    async def purge(self) -> int:
        """As `Store.purge`. Raises StoreError while the store is down: the cache would be there again afterwards."""
        return await self._try(self._store.purge())

    async def add_key(self, key: ApiKey) -> None:
        """As `Store.add_key`; always asks the store, and its refusal does not count as a failure of the store."""
        await self._store.add_key(key)

    async def key(self, digest: str) -> ApiKey | None:
        """As `Store.key`. While the store is down: the key when it was seen in the last 60 s, else raises StoreError."""
        try:
            key = await self._try(self._store.key(digest))
        except StoreError:
            seen, when = self._seen.get(digest, (None, 0.0))
            if seen is None or time.monotonic() - when > REMEMBER_S:
                raise
            return seen
        if key is None:
            self._seen.pop(digest, None)
        else:
            self._seen[digest] = (key, time.monotonic())
        return key

    async def keys(self) -> list[ApiKey]:
        """As `Store.keys`. Raises StoreError while the store is down."""
        return await self._try(self._store.keys())

    async def revoke(self, id: str) -> bool:
        """As `Store.revoke`; always asks the store. A key that is remembered here is forgotten at once, whatever comes of it."""
        self._seen = {digest: seen for digest, seen in self._seen.items() if seen[0].id != id}
        return await self._store.revoke(id)

    async def take(self, bucket: str, rate_per_minute: float, burst: int, now: float) -> float:
        """As `Store.take`; from a bucket of this process while the store is down."""
        with suppress(StoreError):
            return await self._try(self._store.take(bucket, rate_per_minute, burst, now))
        return self._buckets.take(bucket, rate_per_minute, burst, now)

    async def hold(self, place: str, holder: str, limit: int, until: float, now: float) -> bool:
        """As `Store.hold`; a spot of this process while the store is down."""
        with suppress(StoreError):
            return await self._try(self._store.hold(place, holder, limit, until, now))
        return self._spots.hold(place, holder, limit, until, now)

    async def let_go(self, place: str, holder: str) -> None:
        """As `Store.let_go`; while the store is down, a spot that it held is free when its time is over."""
        self._spots.let_go(place, holder)
        with suppress(StoreError):
            await self._try(self._store.let_go(place, holder))

    async def ping(self) -> None:
        """As `Store.ping`. Raises StoreError at once while the store is down."""
        await self._try(self._store.ping())

    async def close(self) -> None:
        """As `Store.close`."""
        if self._waiting:
            self._waiting.cancel()
            with suppress(asyncio.CancelledError):
                await self._waiting
        await self._store.close()

    async def _try(self, call: Coroutine[Any, Any, T]) -> T:
        """The call's result. Raises StoreError: the store's own, or without asking it while it is down."""
        if self._error is not None:
            call.close()
            raise StoreError(self._error.message, self._error.hint)
        try:
            return await call
        except StoreError as error:
            if self._error is None:  # the first of all that were under way
                self._error = error
                log.warning("The store is gone, requests go on without it: %s", error.message)
                self._waiting = asyncio.create_task(self._wait(time.monotonic(), self._dropped))
            raise

    async def _wait(self, started: float, dropped: int) -> None:
        """Ask until the store is back; it went at `started` (monotonic), when so many turns had been dropped before."""
        while self._error is not None:
            await asyncio.sleep(self._every_s)
            with suppress(StoreError):
                await self._store.ping()
                self._error = None
        log.warning("The store is back after %.0f s; %d turns were dropped.", time.monotonic() - started, self._dropped - dropped)
