"""What a store is: history of answers, an exact-match cache, API keys (hashed) and limits behind one shape.

It knows the nouns (Turn, Conversation, ApiKey), the shape of every store, and the token bucket as it works in one process.
It knows no database and no HTTP. Times are Unix seconds, durations seconds, sizes bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from lmgraph import quickjson
from lmgraph.errors import SettingsError, StoreError


def plain(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON may carry and no database takes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def digest_of(secret: str) -> str:
    """What a store keeps of a secret: its sha256, 64 hex digits. Secrets are long and random, so no salt is needed."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Turn:
    """One question with its answer. Appending the same `id` again changes nothing."""

    conversation: str
    request: Mapping[str, Any]
    """what was asked, as JSON: {"messages": [...], ...}; the store does not look inside"""
    answer: str
    node: str
    """the node that answered, '' when none did"""
    trace: Mapping[str, Any] = field(default_factory=dict)
    """`Trace.to_json()`"""
    created: float = field(default_factory=time.time)
    id: str = field(default_factory=lambda: f"{time.time_ns():016x}{random.getrandbits(64):016x}")
    """ordered by time: what is written together then lies together in an index"""
    title: str = ""
    """what a list of conversations shows; the first turn's counts"""

    def __post_init__(self) -> None:
        for name in ("conversation", "node", "id", "title"):
            object.__setattr__(self, name, plain(getattr(self, name)))

    def to_json(self) -> dict[str, Any]:
        """One JSON object; `Turn(**x)` reads it back."""
        return dict(self.__dict__)


def write_turn(turn: Turn) -> str:
    """A turn as a store keeps it: one line of JSON."""
    return quickjson.dumps(turn.to_json())


def read_turn(text: str | bytes) -> Turn:
    """What `write_turn` wrote. Raises StoreError for anything else."""
    try:
        return Turn(**json.loads(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise StoreError(f"The store holds a turn that lmgraph did not write: {text[:80]!r}") from error


@dataclass(frozen=True)
class Conversation:
    """A line in a list of conversations: `turns` is a count, `created` and `updated` are times of its first and newest turn."""

    id: str
    title: str
    turns: int
    created: float
    updated: float

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class ApiKey:
    """Somebody who may ask. Only the digest of the secret is known. Raises SettingsError for limits that let nothing through."""

    id: str
    name: str
    digest: str
    """`digest_of(secret)`"""
    created: float = field(default_factory=time.time)
    revoked: float | None = None
    """when it was revoked, or None: it is good"""
    rate_per_minute: float | None = None
    """requests a minute, None: no limit"""
    concurrent: int | None = None
    """requests at the same time, None: no limit"""
    admin: bool = False
    """may change the graph, empty the cache and read everybody's history"""

    def __post_init__(self) -> None:
        if self.rate_per_minute is not None and not 0 < self.rate_per_minute < math.inf:
            raise SettingsError(f"A key's rate is {self.rate_per_minute} requests a minute; expected more than 0, or none for no limit.")
        if self.concurrent is not None and self.concurrent < 1:
            raise SettingsError(f"A key allows {self.concurrent} requests at the same time; expected 1 or more, or none for no limit.")

    @classmethod
    def make(
        cls, name: str, *, rate_per_minute: float | None = None, concurrent: int | None = None, admin: bool = False
    ) -> tuple[ApiKey, str]:
        """A new key and its secret, which is shown to its owner once and kept nowhere."""
        secret = f"lmg-{secrets.token_urlsafe(32)}"
        id, digest = secrets.token_hex(6), digest_of(secret)
        key = cls(id, plain(name), digest, rate_per_minute=rate_per_minute, concurrent=concurrent, admin=admin)
        return key, secret

    def to_json(self) -> dict[str, Any]:
        """One JSON object; `ApiKey(**x)` reads it back. Holds the digest: leave it out of what others see."""
        return asdict(self)


class Store(Protocol):
    """Every method but `close` raises StoreError when the store fails; none waits longer than a few seconds."""

    async def append(self, turn: Turn) -> None:
        """Keep a turn; returns when it is kept for good. A caller who stops waiting does not stop the writing."""
        ...

    async def turns(self, conversation: str, limit: int) -> list[Turn]:
        """The newest `limit` turns of a conversation, oldest first; [] for one that is not there."""
        ...

    async def conversations(self, limit: int, before: float | None = None) -> list[Conversation]:
        """The newest `limit` conversations, newest first. `before`: only those updated before it, for the next page."""
        ...

    async def recent(self, node: str | None, limit: int) -> list[Turn]:
        """The newest `limit` turns of a node (None: of all nodes), newest first."""
        ...

    async def forget(self, conversation: str) -> bool:
        """Delete a conversation with all its turns; False when there is none."""
        ...

    async def cached(self, key: str) -> bytes | None:
        """The value kept under `key`, None when there is none or its time is over."""
        ...

    async def keep(self, key: str, value: bytes, ttl_s: float) -> None:
        """Keep a value for `ttl_s` seconds. The oldest go when there are too many; a value larger than all the room is not kept."""
        ...

    async def purge(self) -> int:
        """Empty the cache; how many entries it held."""
        ...

    async def add_key(self, key: ApiKey) -> None:
        """Keep a key. Raises StoreError also when its id or digest is already there."""
        ...

    async def key(self, digest: str) -> ApiKey | None:
        """The key with this digest; None for one that is not there or is revoked."""
        ...

    async def keys(self) -> list[ApiKey]:
        """All keys, oldest first, revoked ones too."""
        ...

    async def revoke(self, id: str) -> bool:
        """From now on `key` does not find it; False when there is no such key or it was already revoked."""
        ...

    async def take(self, bucket: str, rate_per_minute: float, burst: int, now: float) -> float:
        """Take one token: 0.0 when it was there, else the seconds until one will be (and none is taken).

        A bucket starts with `burst` tokens (at least 1), holds no more, and gains `rate_per_minute` (above 0, else ValueError).
        `now` is in Unix seconds; a clock that goes backwards gives nothing.
        """
        ...

    async def hold(self, place: str, holder: str, limit: int, until: float, now: float) -> bool:
        """Hold one of the `limit` spots of a place until then; False when all are held. Who holds one already may hold it longer.

        Times are Unix seconds. A spot that nobody gave back is free again when its time is over: its holder may have died.
        """
        ...

    async def let_go(self, place: str, holder: str) -> None:
        """Give a spot back; of one that is not held nothing is said."""
        ...

    async def ping(self) -> None:
        """Write and read something small: returns when the store works."""
        ...

    async def close(self) -> None:
        """Finish what is under way, then let go. Twice is fine."""
        ...


ROUNDING = 1e-6
"""A token that lacks no more than this is whole: whoever waited as long as told gets in, in spite of rounding."""
FEW = 10_000


def gain(rate_per_minute: float, burst: int) -> float:
    """Tokens a second. Raises ValueError for a bucket that would never let anything through."""
    if not (0 < rate_per_minute < math.inf and burst >= 1):
        raise ValueError(f"A bucket with {rate_per_minute} tokens a minute and a burst of {burst} lets nothing through or everything.")
    return rate_per_minute / 60


class Buckets:
    """Token buckets in this process's memory."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[float, float, float]] = {}  # name -> tokens, when counted, when full again
        self._many = FEW

    def take(self, bucket: str, rate_per_minute: float, burst: int, now: float) -> float:
        """As `Store.take`."""
        per_second = gain(rate_per_minute, burst)
        tokens, counted, _ = self._buckets.get(bucket, (float(burst), now, now))
        tokens = min(burst, tokens + max(0.0, now - counted) * per_second)
        now = max(now, counted)
        wait = 0.0
        if tokens >= 1 - ROUNDING:
            tokens = max(0.0, tokens - 1)
        else:
            wait = (1 - tokens) / per_second
        self._buckets[bucket] = (tokens, now, now + (burst - tokens) / per_second)
        if len(self._buckets) > self._many:  # a full bucket says no more than a missing one
            self._buckets = {name: b for name, b in self._buckets.items() if b[2] > now}
            self._many = max(FEW, 2 * len(self._buckets))
        return wait


class Spots:
    """Spots of places in this process's memory."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, float]] = {}

    def hold(self, place: str, holder: str, limit: int, until: float, now: float) -> bool:
        """As `Store.hold`."""
        held = self._held.setdefault(place, {})
        if holder not in held and len(held) >= limit:
            for name in [name for name, end in held.items() if end <= now]:
                del held[name]
            if len(held) >= limit:
                return False
        held[holder] = until
        return True

    def let_go(self, place: str, holder: str) -> None:
        """As `Store.let_go`."""
        held = self._held.get(place, {})
        held.pop(holder, None)
        if not held:
            self._held.pop(place, None)
