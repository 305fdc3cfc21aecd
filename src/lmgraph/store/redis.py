"""The store in Redis, for several gateways at once: history, cache, keys and limits are shared. The one home of redis-py.

One Redis, not a cluster. History here is bounded: a conversation goes some time after its last turn, the oldest turns and
conversations go when there are too many. An append that returned is as safe as this Redis is (its `appendonly` setting).
Redis' own limits on memory are the operator's; `noeviction` or `volatile-*` keep API keys safe.

    lmgraph:conversations      sorted set: conversation by its last time       lmgraph:cache:<key>   value, with its time to live
    lmgraph:conversation:<c>   hash: title, created, updated                   lmgraph:cache-order   sorted set: key by age
    lmgraph:turns:<c>          sorted set: member by age                       lmgraph:cache-sizes   hash: key -> bytes
    lmgraph:bodies:<c>         hash: member -> turn                            lmgraph:cache-bytes   their sum
    lmgraph:recent[:<node>]    sorted set: member by age                       lmgraph:keys          hash: digest -> key
    lmgraph:sequence           counts; gives "age"                             lmgraph:key-ids       hash: id -> digest
    lmgraph:bucket:<name>      hash: tokens, at                                lmgraph:keys-revoked  hash: digest -> when

A member is the JSON list [conversation, id, node]: enough to find its turn and every set it is in.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import ConnectionError as Unreachable

from lmgraph.errors import SettingsError, StoreError
from lmgraph.store.base import ROUNDING, ApiKey, Conversation, Turn, gain, plain, read_turn, write_turn

CONNECT_S, ANSWER_S = 1.0, 2.0
CONNECTIONS = 32

FORGET = """
local function drop(member)
  local place = cjson.decode(member)
  redis.call('ZREM', 'lmgraph:recent', member)
  redis.call('ZREM', 'lmgraph:recent:' .. place[3], member)
  redis.call('ZREM', 'lmgraph:turns:' .. place[1], member)
  redis.call('HDEL', 'lmgraph:bodies:' .. place[1], member)
end
local function forget(conversation)
  for _, member in ipairs(redis.call('ZRANGE', 'lmgraph:turns:' .. conversation, 0, -1)) do drop(member) end
  redis.call('ZREM', 'lmgraph:conversations', conversation)
  return redis.call('DEL', 'lmgraph:conversation:' .. conversation)
end
"""
APPEND = (
    FORGET
    + """
local member, conversation, node, title, created, body = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local now, ttl, many_turns, many_conversations, many_recent = tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9] + 0, ARGV[10] + 0, ARGV[11] + 0
local turns, bodies, about = 'lmgraph:turns:' .. conversation, 'lmgraph:bodies:' .. conversation, 'lmgraph:conversation:' .. conversation
if redis.call('HSETNX', bodies, member, body) == 0 then return end
local age = redis.call('INCR', 'lmgraph:sequence')
redis.call('ZADD', turns, age, member)
redis.call('HSETNX', about, 'title', title)
redis.call('HSETNX', about, 'created', created)
local updated = redis.call('HGET', about, 'updated')
if not updated or tonumber(updated) < tonumber(created) then updated = created end
redis.call('HSET', about, 'updated', updated)
redis.call('ZADD', 'lmgraph:conversations', updated, conversation)
for _, key in ipairs({turns, bodies, about}) do redis.call('EXPIRE', key, ttl) end
for _, member in ipairs(redis.call('ZRANGE', turns, 0, -1 - many_turns)) do drop(member) end
for _, recent in ipairs({'lmgraph:recent', 'lmgraph:recent:' .. node}) do
  redis.call('ZADD', recent, age, member)
  redis.call('ZREMRANGEBYRANK', recent, 0, -1 - many_recent)
  redis.call('EXPIRE', recent, ttl)
end
for _, old in ipairs(redis.call('ZRANGEBYSCORE', 'lmgraph:conversations', '-inf', now - ttl, 'LIMIT', 0, 100)) do
  if redis.call('EXISTS', 'lmgraph:conversation:' .. old) == 0 then redis.call('ZREM', 'lmgraph:conversations', old) end
end
for _, old in ipairs(redis.call('ZRANGE', 'lmgraph:conversations', 0, -1 - many_conversations)) do forget(old) end
"""
)
KEEP = """
local function drop(key)
  redis.call('DECRBY', 'lmgraph:cache-bytes', redis.call('HGET', 'lmgraph:cache-sizes', key) or 0)
  redis.call('HDEL', 'lmgraph:cache-sizes', key)
  redis.call('ZREM', 'lmgraph:cache-order', key)
  return redis.call('DEL', 'lmgraph:cache:' .. key)
end
local key, value, ttl_ms, many, bytes = ARGV[1], ARGV[2], ARGV[3] + 0, ARGV[4] + 0, ARGV[5] + 0
drop(key)
if ttl_ms < 1 or #value > bytes then return end
redis.call('SET', 'lmgraph:cache:' .. key, value, 'PX', ttl_ms)
redis.call('ZADD', 'lmgraph:cache-order', redis.call('INCR', 'lmgraph:sequence'), key)
redis.call('HSET', 'lmgraph:cache-sizes', key, #value)
redis.call('INCRBY', 'lmgraph:cache-bytes', #value)
while redis.call('ZCARD', 'lmgraph:cache-order') > many or tonumber(redis.call('GET', 'lmgraph:cache-bytes')) > bytes do
  local oldest = redis.call('ZRANGE', 'lmgraph:cache-order', 0, 0)[1]
  if not oldest then redis.call('SET', 'lmgraph:cache-bytes', 0) break end
  drop(oldest)
end
"""
PURGE = """
local gone = 0
for _, key in ipairs(redis.call('ZRANGE', 'lmgraph:cache-order', 0, -1)) do gone = gone + redis.call('DEL', 'lmgraph:cache:' .. key) end
redis.call('DEL', 'lmgraph:cache-order', 'lmgraph:cache-sizes', 'lmgraph:cache-bytes')
return gone
"""
TAKE = """
local bucket, per_second, burst, now, rounding = 'lmgraph:bucket:' .. ARGV[1], ARGV[2] + 0, ARGV[3] + 0, ARGV[4] + 0, ARGV[5] + 0
local state = redis.call('HMGET', bucket, 'tokens', 'at')
local tokens, at = tonumber(state[1] or burst), tonumber(state[2] or now)
tokens = math.min(burst, tokens + math.max(0, now - at) * per_second)
local wait = 0
if tokens >= 1 - rounding then tokens = math.max(0, tokens - 1) else wait = (1 - tokens) / per_second end
redis.call('HSET', bucket, 'tokens', string.format('%.17g', tokens), 'at', string.format('%.17g', math.max(now, at)))
redis.call('PEXPIRE', bucket, math.ceil((burst - tokens) / per_second * 1000) + 60000)
return string.format('%.17g', wait)
"""

HOLD = """
local place, limit, now = 'lmgraph:held:' .. ARGV[1], ARGV[3] + 0, ARGV[5] + 0
redis.call('ZREMRANGEBYSCORE', place, '-inf', ARGV[5])
if not redis.call('ZSCORE', place, ARGV[2]) and redis.call('ZCARD', place) >= limit then return 0 end
redis.call('ZADD', place, ARGV[4], ARGV[2])
redis.call('PEXPIRE', place, math.max(1, math.ceil((ARGV[4] - now) * 1000)) + 60000)
return 1
"""


class RedisStore:
    """A `Store` in Redis. It connects when first asked. `history_s` is how long a conversation stays after its last turn."""

    def __init__(
        self,
        url: str,
        *,
        history_s: int = 30 * 86400,
        turns: int = 1000,
        conversations: int = 10_000,
        recent: int = 1000,
        cache_entries: int = 10_000,
        cache_bytes: int = 64 << 20,
    ) -> None:
        """Raises SettingsError for a URL that cannot be read; the password in it is never shown."""
        self._history, self._cache = (history_s, turns, conversations, recent), (cache_entries, cache_bytes)
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "localhost", parts.port or 6379
            pool: Any = BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=ANSWER_S,
                socket_connect_timeout=CONNECT_S,
                socket_timeout=ANSWER_S,
                # once more, at once, on a connection that died while idle; never after a timeout
                retry=Retry(NoBackoff(), 1, supported_errors=(Unreachable,)),
                retry_on_error=[Unreachable],
                protocol=2,
            )
            pool.make_connection()  # not connected: only to see an option that is unknown
        except (ValueError, TypeError, RedisError):
            raise SettingsError(  # neither the URL nor the error behind it: both may hold the password
                "The address of the Redis store cannot be read.", "Expected redis://[[user]:password@]host[:port][/database]."
            ) from None
        self._client = Redis.from_pool(pool)
        self._append, self._forget, self._keep, self._purge, self._take, self._hold = (
            self._client.register_script(lua) for lua in (APPEND, FORGET + "return forget(ARGV[1])", KEEP, PURGE, TAKE, HOLD)
        )

    async def append(self, turn: Turn) -> None:
        """As `Store.append`."""
        member = json.dumps([turn.conversation, turn.id, turn.node])
        said = (member, turn.conversation, turn.node, turn.title, repr(turn.created), write_turn(turn))
        await self._run(self._append, *said, time.time(), *self._history)

    async def turns(self, conversation: str, limit: int) -> list[Turn]:
        """As `Store.turns`."""
        if limit < 1:
            return []
        (members,) = await self._ask(("ZRANGE", f"lmgraph:turns:{plain(conversation)}", -limit, -1))
        return await self._read(members)

    async def conversations(self, limit: int, before: float | None = None) -> list[Conversation]:
        """As `Store.conversations`."""
        newest = "+inf" if before is None else f"({before!r}"
        (ids,) = await self._ask(("ZREVRANGEBYSCORE", "lmgraph:conversations", newest, "-inf", "LIMIT", 0, max(0, limit)))
        names = [name.decode() for name in ids]
        about = await self._ask(*(("HMGET", f"lmgraph:conversation:{name}", "title", "created", "updated") for name in names))
        counts = await self._ask(*(("ZCARD", f"lmgraph:turns:{name}") for name in names))
        return [
            Conversation(name, title.decode(), count, float(created), float(updated))
            for name, (title, created, updated), count in zip(names, about, counts)
            if created is not None  # its time was over
        ]

    async def recent(self, node: str | None, limit: int) -> list[Turn]:
        """As `Store.recent`."""
        if limit < 1:
            return []
        key = "lmgraph:recent" if node is None else f"lmgraph:recent:{plain(node)}"
        (members,) = await self._ask(("ZREVRANGE", key, 0, limit - 1))
        return await self._read(members)

    async def forget(self, conversation: str) -> bool:
        """As `Store.forget`."""
        return bool(await self._run(self._forget, plain(conversation)))

    async def cached(self, key: str) -> bytes | None:
        """As `Store.cached`."""
        (value,) = await self._ask(("GET", f"lmgraph:cache:{key}"))
        return value

    async def keep(self, key: str, value: bytes, ttl_s: float) -> None:
        """As `Store.keep`; a value whose time is over counts against the bounds until it is the oldest."""
        await self._run(self._keep, key, value, max(0, round(ttl_s * 1000)), *self._cache)

    async def purge(self) -> int:
        """As `Store.purge`."""
        return int(await self._run(self._purge))

    async def add_key(self, key: ApiKey) -> None:
        """As `Store.add_key`."""
        ours = False
        if (await self._ask(("HSETNX", "lmgraph:key-ids", key.id, key.digest)))[0]:
            (ours,) = await self._ask(("HSETNX", "lmgraph:keys", key.digest, json.dumps(key.to_json())))
            if not ours:
                await self._ask(("HDEL", "lmgraph:key-ids", key.id))
        if not ours:
            raise StoreError(f"The key {key.id} ({key.name}) or its secret is already in the store.", "Make a new one.")
        if key.revoked is not None:
            await self._ask(("HSETNX", "lmgraph:keys-revoked", key.digest, repr(key.revoked)))

    async def key(self, digest: str) -> ApiKey | None:
        """As `Store.key`."""
        body, revoked = await self._ask(("HGET", "lmgraph:keys", digest), ("HEXISTS", "lmgraph:keys-revoked", digest))
        return None if body is None or revoked else ApiKey(**json.loads(body))

    async def keys(self) -> list[ApiKey]:
        """As `Store.keys`."""
        bodies, revoked = await self._ask(("HVALS", "lmgraph:keys"), ("HGETALL", "lmgraph:keys-revoked"))
        keys = [ApiKey(**json.loads(body)) for body in bodies]
        when = {digest.decode(): float(at) for digest, at in revoked.items()}
        return sorted((replace(key, revoked=when.get(key.digest)) for key in keys), key=lambda key: (key.created, key.id))

    async def revoke(self, id: str) -> bool:
        """As `Store.revoke`."""
        (digest,) = await self._ask(("HGET", "lmgraph:key-ids", plain(id)))
        return digest is not None and bool((await self._ask(("HSETNX", "lmgraph:keys-revoked", digest, repr(time.time()))))[0])

    async def take(self, bucket: str, rate_per_minute: float, burst: int, now: float) -> float:
        """As `Store.take`, shared by all who use this Redis."""
        return float(await self._run(self._take, bucket, gain(rate_per_minute, burst), burst, repr(now), ROUNDING))

    async def hold(self, place: str, holder: str, limit: int, until: float, now: float) -> bool:
        """As `Store.hold`, shared by all who use this Redis."""
        return bool(await self._run(self._hold, place, holder, limit, repr(until), repr(now)))

    async def let_go(self, place: str, holder: str) -> None:
        """As `Store.let_go`."""
        await self._ask(("ZREM", f"lmgraph:held:{place}", holder))

    async def ping(self) -> None:
        """As `Store.ping`."""
        await self._ask(("SET", "lmgraph:pinged", time.time()), ("GET", "lmgraph:pinged"))

    async def close(self) -> None:
        """As `Store.close`."""
        with suppress(RedisError, OSError):  # it is gone already
            await self._client.aclose(close_connection_pool=True)

    async def _read(self, members: list[bytes]) -> list[Turn]:
        places = [(json.loads(member)[0], member) for member in members]
        bodies = await self._ask(*(("HGET", f"lmgraph:bodies:{conversation}", member) for conversation, member in places))
        return [read_turn(body) for body in bodies if body is not None]  # None: its conversation's time was over

    async def _ask(self, *commands: tuple[Any, ...]) -> list[Any]:
        """The replies to commands that are sent together."""
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                for command in commands:
                    pipe.execute_command(*command)
                return await pipe.execute()
        except (RedisError, OSError) as error:
            raise self._explain(error) from error

    async def _run(self, script: Any, *values: Any) -> Any:
        try:
            return await script(keys=[], args=values)
        except (RedisError, OSError) as error:
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> StoreError:
        refused = isinstance(error, AuthenticationError) or str(error).startswith(("NOAUTH", "WRONGPASS", "NOPERM"))
        asking = f"Is it running? redis-cli -h {self._host} -p {self._port} ping"
        hint = "Check user and password in the store's URL." if refused else asking
        return StoreError(f"Redis at {self._host}:{self._port} failed: {error}", hint)
