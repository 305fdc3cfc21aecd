"""The store in one SQLite file, or in memory: one thread writes, one reads, one tidies (`sqlitefile.py`).

All writes that wait are committed together, and only then do their callers go on. A write that returned survives the death of
this process (WAL, synchronous=NORMAL); a power cut may take the last moments. Limits live in memory: they are this process's
own. History is kept until it is forgotten.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmgraph import quickjson
from lmgraph.errors import StoreError
from lmgraph.store.base import ApiKey, Buckets, Conversation, Spots, Turn, plain, read_turn, write_turn
from lmgraph.store.sqlitefile import Desk, Row, Sweeper, connect, explain, migrate

KEY = "id, name, digest, created, revoked, rate_per_minute, concurrent, admin"
AT = [f"json_extract(value, '$[{i}]')" for i in range(6)]
CONVERSATIONS = """
    INSERT INTO conversations SELECT {1}, {4}, 1, {5}, {5} FROM {rows} WHERE NOT EXISTS (SELECT 1 FROM turns WHERE turns.id = {0})
    ON CONFLICT (id) DO UPDATE SET turns = turns + 1, updated = max(updated, excluded.updated)"""
TURNS = "INSERT INTO turns (id, conversation, node, body) SELECT {0}, {1}, {2}, {3} FROM {rows} WHERE true ON CONFLICT DO NOTHING"
ALL, ONE = (
    [sql.format(*at, rows=rows) for sql in (CONVERSATIONS, TURNS)]
    for at, rows in ((AT, "json_each(?)"), ([":0", ":1", ":2", ":3", ":4", ":5"], "(SELECT 1)"))
)
"""the two statements that add turns: many at once, given as one JSON array of arrays, and one, given as values"""


class SqliteStore:
    """A `Store` in a file. `cache_entries` and `cache_bytes` bound the cache."""

    def __init__(self, writer: Desk, reader: Desk, sweeper: Sweeper | None, cache_entries: int, cache_bytes: int) -> None:
        self._writer, self._reader, self._sweeper = writer, reader, sweeper
        self._cache_entries, self._cache_bytes = cache_entries, cache_bytes
        self._buckets, self._spots = Buckets(), Spots()

    @classmethod
    def open(cls, path: Path | str, *, cache_entries: int = 10_000, cache_bytes: int = 64 << 20) -> SqliteStore:
        """The store in this file, made where it is missing, with its folder; ':memory:' is one that ends with the process.

        Raises StoreError for a folder that cannot be made, a file that is no store, or one that a newer lmgraph wrote.
        """
        place = str(path)
        memory = place == ":memory:"
        opened: list[sqlite3.Connection] = []
        try:
            if not memory:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).touch(mode=0o600)  # what people ask is nobody else's business
            opened.append(connect(place))
            migrate(opened[0], place)
            if not memory:
                opened += [connect(place), connect(place)]
                opened[1].execute("PRAGMA query_only = ON")
        except (sqlite3.Error, OSError, StoreError) as error:
            for connection in opened:
                connection.close()
            raise explain(error, place) from error
        desks = [Desk(connection, place, _add_turns) for connection in opened[:2]]
        return cls(desks[0], desks[-1], Sweeper(opened[2]) if opened[2:] else None, cache_entries, cache_bytes)

    async def append(self, turn: Turn) -> None:
        """As `Store.append`; survives the death of the process from when it returns."""
        await self._writer.add((turn.id, turn.conversation, turn.node, write_turn(turn), turn.title, turn.created))

    async def turns(self, conversation: str, limit: int) -> list[Turn]:
        """As `Store.turns`."""
        sql = "SELECT body FROM turns WHERE conversation = ? ORDER BY seq DESC LIMIT ?"
        return [read_turn(body) for (body,) in reversed(await self._rows(sql, plain(conversation), max(0, limit)))]

    async def conversations(self, limit: int, before: float | None = None) -> list[Conversation]:
        """As `Store.conversations`."""
        sql = "SELECT id, title, turns, created, updated FROM conversations WHERE updated < ? ORDER BY updated DESC LIMIT ?"
        return [Conversation(*row) for row in await self._rows(sql, float("inf") if before is None else before, max(0, limit))]

    async def recent(self, node: str | None, limit: int) -> list[Turn]:
        """As `Store.recent`."""
        where, values = ("", ()) if node is None else ("WHERE node = ?", (plain(node),))
        sql = f"SELECT body FROM turns {where} ORDER BY seq DESC LIMIT ?"
        return [read_turn(body) for (body,) in await self._rows(sql, *values, max(0, limit))]

    async def forget(self, conversation: str) -> bool:
        """As `Store.forget`."""

        def write(db: sqlite3.Connection) -> bool:
            db.execute("DELETE FROM turns WHERE conversation = ?", (plain(conversation),))
            return db.execute("DELETE FROM conversations WHERE id = ?", (plain(conversation),)).rowcount > 0

        return await self._writer.do(write)

    async def cached(self, key: str) -> bytes | None:
        """As `Store.cached`."""
        rows = await self._rows("SELECT value FROM cache WHERE key = ? AND expires > ?", key, time.time())
        return rows[0][0] if rows else None

    async def keep(self, key: str, value: bytes, ttl_s: float) -> None:
        """As `Store.keep`."""

        def write(db: sqlite3.Connection) -> None:
            now = time.time()
            db.execute("DELETE FROM cache WHERE key = ? OR expires <= ?", (key, now))
            if ttl_s <= 0 or len(value) > self._cache_bytes:
                return
            db.execute("INSERT INTO cache (key, expires, value) VALUES (?, ?, ?)", (key, now + ttl_s, value))
            while db.execute("SELECT entries > ? OR bytes > ? FROM cache_total", (self._cache_entries, self._cache_bytes)).fetchone()[0]:
                db.execute("DELETE FROM cache WHERE seq = (SELECT min(seq) FROM cache)")

        await self._writer.do(write)

    async def purge(self) -> int:
        """As `Store.purge`."""
        return await self._writer.do(lambda db: db.execute("DELETE FROM cache WHERE true").rowcount)

    async def add_key(self, key: ApiKey) -> None:
        """As `Store.add_key`."""

        def write(db: sqlite3.Connection) -> None:
            row = (key.id, key.name, key.digest, key.created, key.revoked, key.rate_per_minute, key.concurrent, key.admin)
            if not db.execute(f"INSERT INTO keys ({KEY}) VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", row).rowcount:
                raise StoreError(f"The key {key.id} ({key.name}) or its secret is already in the store.", "Make a new one.")

        await self._writer.do(write)

    async def key(self, digest: str) -> ApiKey | None:
        """As `Store.key`."""
        rows = await self._rows(f"SELECT {KEY} FROM keys WHERE digest = ? AND revoked IS NULL", digest)
        return _key(rows[0]) if rows else None

    async def keys(self) -> list[ApiKey]:
        """As `Store.keys`."""
        return [_key(row) for row in await self._rows(f"SELECT {KEY} FROM keys ORDER BY created, id")]

    async def revoke(self, id: str) -> bool:
        """As `Store.revoke`."""
        sql, values = "UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (time.time(), plain(id))
        return await self._writer.do(lambda db: db.execute(sql, values).rowcount > 0)

    async def take(self, bucket: str, rate_per_minute: float, burst: int, now: float) -> float:
        """As `Store.take`, for this process alone."""
        return self._buckets.take(bucket, rate_per_minute, burst, now)

    async def hold(self, place: str, holder: str, limit: int, until: float, now: float) -> bool:
        """As `Store.hold`, for this process alone."""
        return self._spots.hold(place, holder, limit, until, now)

    async def let_go(self, place: str, holder: str) -> None:
        """As `Store.let_go`."""
        self._spots.let_go(place, holder)

    async def ping(self) -> None:
        """As `Store.ping`."""
        await self._writer.do(lambda db: db.execute("UPDATE pinged SET at = ?", (time.time(),)))
        await self._rows("SELECT at FROM pinged")

    async def close(self) -> None:
        """Commit what waits, then close the file."""
        if self._sweeper:
            await self._sweeper.close()
        await self._writer.close()
        await self._reader.close()

    async def _rows(self, sql: str, *values: Any) -> list[Any]:
        return await self._reader.do(lambda db: db.execute(sql, values).fetchall())


def _key(row: Any) -> ApiKey:
    return replace(ApiKey(*row[:-1]), admin=bool(row[-1]))


def _add_turns(db: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Add turns of (id, conversation, node, body, title, created), those whose id is not there yet."""
    given = quickjson.dumps(list({row[0]: row for row in reversed(rows)}.values())[::-1])
    if "\\u0000" not in given:
        for sql in ALL:
            db.execute(sql, (given,))
        return
    for row in rows:  # SQLite's JSON ends a text at a zero character
        for sql in ONE:
            db.execute(sql, {str(i): value for i, value in enumerate(row)})
