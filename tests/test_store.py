"""Stores: one contract over a SQLite file, SQLite in memory and a real Redis; what happens when a process, a disk or Redis dies."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lmgraph.errors import MissingExtra, SettingsError, StoreError
from lmgraph.store import open_store, sqlitefile
from lmgraph.store import redis as redis_store
from lmgraph.store.base import ApiKey, Buckets, Store, Turn, digest_of
from lmgraph.store.redis import RedisStore
from lmgraph.store.shield import Shielded
from lmgraph.store.sqlite import SqliteStore

Work = Callable[[Any], Coroutine[Any, Any, None]]


class RedisServer:
    """A real redis-server on a loopback port of its own, without files."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.url = folder, f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        program = shutil.which("redis-server")
        assert program, "redis-server is missing, and these tests need a real one: apt-get install redis-server"
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self.folder)]
        self.process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis_py.RedisError:
                assert time.monotonic() < deadline and self.process.poll() is None, "redis-server does not start"

    def client(self) -> redis_py.Redis:
        return redis_py.Redis(port=self.port)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no dead Redis."""
    monkeypatch.setattr(redis_store, "CONNECT_S", 60.0)
    monkeypatch.setattr(redis_store, "ANSWER_S", 60.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def redis(server: RedisServer) -> RedisServer:
    """The server of this module, empty."""
    with server.client() as client:
        client.flushall()
    return server


@pytest.fixture(params=["file", "memory", "redis"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Store]:
    """Opens a store of every kind; for a file and for Redis, the same one again."""
    if request.param == "redis":
        url = request.getfixturevalue("redis").url
        return lambda **bounds: RedisStore(url, **bounds) if bounds else open_store(url)
    place = ":memory:" if request.param == "memory" else str(tmp_path / "folder" / "store.db")
    return lambda **bounds: SqliteStore.open(place, **bounds) if bounds else open_store("sqlite://" if place == ":memory:" else f"sqlite:///{place}")


def use(store: Any, work: Work) -> None:
    async def main() -> None:
        try:
            await work(store)
        finally:
            await store.close()

    asyncio.run(main())


async def until(condition: Callable[[], Any], seconds: float = 30) -> None:
    """Wait for a condition; it may be a coroutine function."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if await found if asyncio.iscoroutine(found) else found:
            return
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.005)


def a_turn(number: int, conversation: str = "c", node: str = "math", **more: Any) -> Turn:
    request = {"messages": [{"role": "user", "content": f"question {number}"}]}
    return Turn(conversation, request, f"answer {number}", node, {"steps": [{"node": node}]}, created=1000.0 + number, **more)


# the contract: history


def test_turns_come_back_whole_and_in_order(opened: Callable[..., Store]) -> None:
    async def work(store: Store) -> None:
        turns = [a_turn(i, title=f"title {i}") for i in range(5)]
        for turn in turns:
            await store.append(turn)
        assert await store.turns("c", 100) == turns
        assert await store.turns("c", 2) == turns[-2:]
        assert await store.turns("c", 0) == await store.turns("nobody", 5) == []

    use(opened(), work)


def test_the_same_turn_twice_is_one(opened: Callable[..., Store]) -> None:
    async def work(store: Store) -> None:
        turn = a_turn(1)
        await asyncio.gather(*(store.append(turn) for _ in range(5)))
        assert await store.turns("c", 9) == [turn]
        assert [c.turns for c in await store.conversations(9)] == [1]

    use(opened(), work)


def test_conversations_are_listed_newest_first_by_the_page(opened: Callable[..., Store]) -> None:
    async def work(store: Store) -> None:
        for i in range(5):
            await store.append(a_turn(i, f"c{i}", title=f"first of {i}"))
        await store.append(a_turn(9, "c1", title="second"))
        first = await store.conversations(2)
        assert [c.to_json() for c in first] == [
            {"id": "c1", "title": "first of 1", "turns": 2, "created": 1001.0, "updated": 1009.0},
            {"id": "c4", "title": "first of 4", "turns": 1, "created": 1004.0, "updated": 1004.0},
        ]
        assert [c.id for c in await store.conversations(9, before=first[-1].updated)] == ["c3", "c2", "c0"]
        assert await store.conversations(9, before=1000.0) == await store.conversations(0) == []

    use(opened(), work)


def test_recent_turns_are_newest_first_of_one_node_or_of_all(opened: Callable[..., Store]) -> None:
    async def work(store: Store) -> None:
        turns = [a_turn(i, f"c{i % 2}", ("math", "law", "")[i % 3]) for i in range(6)]
        for turn in turns:
            await store.append(turn)
        assert await store.recent(None, 4) == turns[:1:-1]
        assert await store.recent("law", 4) == [turns[4], turns[1]]
        assert await store.recent("", 1) == [turns[5]]
        assert await store.recent("art", 4) == await store.recent(None, 0) == []

    use(opened(), work)


def test_a_forgotten_conversation_is_nowhere(opened: Callable[..., Store]) -> None:
    async def work(store: Store) -> None:
        for i in range(4):
            await store.append(a_turn(i, f"c{i % 2}"))
        assert await store.forget("c0") is True
        assert await store.forget("c0") is False
        assert await store.turns("c0", 9) == []
        assert [c.id for c in await store.conversations(9)] == ["c1"]
        assert {t.conversation for t in await store.recent(None, 9) + await store.recent("math", 9)} == {"c1"}
        await store.append(a_turn(7, "c0"))
        assert [c.turns for c in await store.conversations(9)] == [1, 2]

    use(opened(), work)


@pytest.mark.parametrize("text", ["", "é 日本 🦆", "a\nb\0c", "a:b \"'{}%s", "x" * 5000])
def test_any_text_is_kept_as_it_is(opened: Callable[..., Store], text: str) -> None:
    async def work(store: Store) -> None:
        turn = Turn(text, {"messages": [text], "half": "\ud83e"}, text + "\udd86", text, {text: text}, title=text)
        await store.append(turn)
        assert await store.turns(text, 1) == await store.recent(text, 1) == [turn]
        assert [(c.id, c.title) for c in await store.conversations(1)] == [(text, text)]
        assert await store.forget(text)

    use(opened(), work)


def test_halves_of_surrogate_pairs_in_names_are_replaced(opened: Callable[..., Store]) -> None:
    async def work(store: Store) -> None:
        await store.append(Turn("c\ud800", {}, "", "n\ud800", title="t\ud800"))
        (turn,) = await store.turns("c\ud800", 1)
        assert (turn.conversation, turn.node, turn.title) == ("c?", "n?", "t?")
        assert await store.recent("n\ud800", 1) == [turn]
        assert await store.forget("c\ud800")

    use(opened(), work)


def test_many_who_append_at_once_lose_nothing_and_keep_their_order(opened: Callable[..., Store]) -> None:
    async def work(store: Store) -> None:
        async def talk(name: str) -> None:
            for i in range(10):
                await store.append(a_turn(i, name))
                assert (await store.turns(name, 1))[0].answer == f"answer {i}"

        await asyncio.gather(*(talk(f"c{i}") for i in range(64)))
        assert {c.turns for c in await store.conversations(100)} == {10}
        assert [t.answer for t in await store.turns("c63", 10)] == [f"answer {i}" for i in range(10)]

    use(opened(), work)


# the contract: cache


def test_the_cache_gives_back_bytes_until_their_time_is_over(opened: Callable[..., Store]) -> None:
    async def work(store: Store) -> None:
        assert await store.cached("k") is None
        await store.keep("k", b"\x00\xff one", 60)
        assert await store.cached("k") == b"\x00\xff one"
        await store.keep("k", b"two", 60)
        assert await store.cached("k") == b"two"
        await store.keep("k", b"three", 0.01)

        async def gone() -> bool:
            return await store.cached("k") is None

        await until(gone)
        await store.keep("k", b"four", 0)
        assert await gone()

    use(opened(), work)


def test_the_oldest_leave_a_cache_with_too_many_entries(opened: Callable[..., Store]) -> None:
    async def work(store: Store) -> None:
        for key in "abcad":
            await store.keep(key, key.encode(), 60)
        assert [await store.cached(key) for key in "abcd"] == [b"a", None, b"c", b"d"]
        assert await store.purge() == 3
        assert await store.purge() == 0
        assert await store.cached("a") is None

    use(opened(cache_entries=3), work)


def test_the_oldest_leave_a_cache_with_too_many_bytes(opened: Callable[..., Store]) -> None:
    async def work(store: Store) -> None:
        await store.keep("a", b"1" * 60, 60)
        await store.keep("b", b"2" * 40, 60)
        assert await store.cached("a")
        await store.keep("c", b"3", 60)
        assert [bool(await store.cached(key)) for key in "abc"] == [False, True, True]
        await store.keep("c", b"4" * 101, 60)
        assert [bool(await store.cached(key)) for key in "abc"] == [False, True, False]
        await store.keep("a", b"5" * 60, 60)
        assert await store.purge() == 2

    use(opened(cache_bytes=100), work)


# the contract: keys


def test_a_key_is_found_by_the_digest_of_its_secret_until_it_is_revoked(opened: Callable[..., Store]) -> None:
    async def work(store: Store) -> None:
        first, secret = ApiKey.make("Ann\ud800", rate_per_minute=30, concurrent=2)
        second, other = ApiKey.make("Bob")
        assert secret != other and len(secret) > 40 and secret not in str(first)
        await store.add_key(first)
        await store.add_key(second)
        assert await store.key(digest_of(secret)) == first
        assert await store.key(digest_of("guess")) is None
        assert await store.keys() == [first, second]
        assert await store.revoke(first.id) is True
        assert await store.revoke(first.id) is await store.revoke("nobody") is False
        assert await store.key(digest_of(secret)) is None
        assert [bool(key.revoked) for key in await store.keys()] == [True, False]
        assert await store.key(digest_of(other)) == second

    use(opened(), work)


def test_a_key_is_not_replaced_by_another_with_its_id_or_secret(opened: Callable[..., Store]) -> None:
    async def work(store: Store) -> None:
        key, _ = ApiKey.make("Ann")
        await store.add_key(key)
        for same in (ApiKey(key.id, "Eve", digest_of("eve")), ApiKey("eve", "Eve", key.digest)):
            with pytest.raises(StoreError, match="already in the store"):
                await store.add_key(same)
        assert await store.keys() == [key]
        assert await store.key(digest_of("eve")) is None
        await store.add_key(ApiKey("eve", "Eve", digest_of("eve")))
        assert await store.key(digest_of("eve"))

    use(opened(), work)


@pytest.mark.parametrize("limits", [{"rate_per_minute": 0}, {"rate_per_minute": -1}, {"rate_per_minute": float("nan")}, {"concurrent": 0}])
def test_a_key_with_a_limit_that_lets_nothing_through_is_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="expected"):
        ApiKey.make("Ann", **limits)


# the contract: limits


def test_a_bucket_gives_its_burst_then_one_token_at_a_time(opened: Callable[..., Store]) -> None:
    async def work(store: Store) -> None:
        now = 1_790_000_000.25
        assert [await store.take("ann", 60, 3, now) for _ in range(3)] == [0, 0, 0]
        assert await store.take("ann", 60, 3, now) == pytest.approx(1, abs=1e-5)
        assert await store.take("ann", 60, 3, now + 0.75) == pytest.approx(0.25, abs=1e-5)
        assert await store.take("bob", 60, 1, now) == 0
        assert await store.take("ann", 60, 3, now + 1) == 0
        assert await store.take("ann", 60, 3, now - 1e6) > 0, "a clock that goes back gives nothing"
        assert [await store.take("ann", 60, 3, now + 1e6) > 0 for _ in range(4)] == [False, False, False, True]
        for rate, burst in ((0, 1), (-1, 1), (float("inf"), 1), (60, 0)):
            with pytest.raises(ValueError, match="bucket"):
                await store.take("ann", rate, burst, now)

    use(opened(), work)


@given(
    rate=st.floats(0.1, 6000),
    burst=st.integers(1, 50),
    steps=st.lists(st.one_of(st.just(0.0), st.floats(0, 30)), max_size=200),
    start=st.sampled_from([0.0, 1_790_000_000.0]),
)
@hypothesis_settings(max_examples=60, deadline=None, database=None)
def test_a_bucket_never_allows_more_than_burst_and_rate_and_never_makes_one_wait_twice(
    rate: float, burst: int, steps: list[float], start: float
) -> None:
    buckets, now, allowed = Buckets(), start, 0
    for step in steps:
        now += step
        wait = buckets.take("b", rate, burst, now)
        allowed += wait == 0
        assert allowed <= burst + rate / 60 * (now - start) + 1e-3
        if wait:
            now += wait + 1e-6
            assert buckets.take("b", rate, burst, now) == 0
            allowed += 1


def test_redis_counts_as_memory_does(redis: RedisServer) -> None:
    async def work(store: Store) -> None:
        buckets, now = Buckets(), 1_790_000_000.0
        for i in range(200):
            now += (0.0, 0.3, 0.01, 7.5, 0.0)[i % 5] * (i % 7)
            assert await store.take("b", 47, 4, now) == pytest.approx(buckets.take("b", 47, 4, now), abs=1e-6)

    use(open_store(redis.url), work)


def test_buckets_that_are_full_again_are_not_remembered() -> None:
    buckets = Buckets()
    for i in range(50_000):
        buckets.take(f"b{i}", 600, 1, i / 100)  # each is full again after 0.1 s
    assert len(buckets._buckets) <= 10_001


def test_a_place_has_so_many_spots_and_those_of_the_dead_become_free(opened: Callable[..., Store]) -> None:
    async def work(store: Store) -> None:
        now = 1_790_000_000.25

        async def hold(place: str, holder: str, at: float = 0.0) -> bool:
            return await store.hold(place, holder, 2, now + at + 60, now + at)

        assert [await hold("p", who) for who in "abcab"] == [True, True, False, True, True]
        assert await hold("q", "c"), "another place"
        await store.let_go("p", "a")
        await store.let_go("p", "nobody")
        assert [await hold("p", who) for who in "cd"] == [True, False]
        assert await hold("p", "b", 30) and not await hold("p", "d", 59)
        assert [await hold("p", who, 61) for who in "de"] == [True, False], "the time of c is over, that of b was made longer"

    use(opened(), work)


# the contract: living and dying


def test_a_store_that_works_answers_a_ping_and_one_that_is_closed_says_so(opened: Callable[..., Store]) -> None:
    async def work(store: Store) -> None:
        await store.ping()
        await store.close()
        await store.close()

    use(opened(), work)


def test_what_was_kept_is_there_after_opening_again(opened: Callable[..., Store], request: pytest.FixtureRequest) -> None:
    key, _ = ApiKey.make("Ann")
    there = "memory" not in request.node.callspec.id

    async def fill(store: Store) -> None:
        await store.append(a_turn(1))
        await store.keep("k", b"v", 60)
        await store.add_key(key)

    async def look(store: Store) -> None:
        assert bool(await store.turns("c", 1)) is bool(await store.cached("k")) is bool(await store.keys()) is there

    use(opened(), fill)
    use(opened(), look)


# SQLite


def test_a_closed_file_refuses_and_pending_writes_are_kept(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        pending = [asyncio.create_task(store.append(a_turn(i))) for i in range(2500)]  # more than one transaction takes
        await asyncio.sleep(0)
        await store.close()
        await asyncio.gather(*pending)
        with pytest.raises(StoreError, match="closed"):
            await store.append(a_turn(99))
        with pytest.raises(StoreError, match="closed"):
            await store.turns("c", 1)

    use(SqliteStore.open(tmp_path / "s.db"), work)

    async def look(store: Store) -> None:
        assert len(await store.turns("c", 9999)) == 2500

    use(SqliteStore.open(tmp_path / "s.db"), look)
    assert (tmp_path / "s.db").stat().st_mode & 0o077 == 0, "others may read what people asked"


CHILD = """
import asyncio, sys
from lmgraph.store import open_store
from lmgraph.store.base import Turn
async def main():
    store = open_store("sqlite:///" + sys.argv[1])
    async def talk(name):
        while True:
            turn = Turn(name, {"messages": ["x" * 500]}, "y" * 500, "math")
            await store.append(turn)
            print(turn.id, flush=True)
    await asyncio.gather(*(talk(f"c{i}") for i in range(16)))
asyncio.run(main())
"""


def test_what_was_acknowledged_before_kill_9_is_there(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout
        lines = [child.stdout.readline() for _ in range(400)]
        os.kill(child.pid, signal.SIGKILL)
        lines += child.stdout.readlines()
    acknowledged = {line.strip() for line in lines if line.endswith("\n")}
    assert child.returncode == -signal.SIGKILL
    assert len(acknowledged) >= 400

    async def look(store: Store) -> None:
        kept = await store.recent(None, 1_000_000)
        assert acknowledged <= {turn.id for turn in kept}
        assert sum(c.turns for c in await store.conversations(99)) == len(kept)
        await store.append(a_turn(1))

    use(open_store(f"sqlite:///{path}"), look)


def test_many_may_open_a_new_file_at_the_same_moment(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: SqliteStore.open(tmp_path / "s.db"), range(8)))

    async def work() -> None:
        key, _ = ApiKey.make("Ann")
        await asyncio.gather(*(store.append(a_turn(i)) for i, store in enumerate(stores)))
        await stores[0].add_key(key)
        assert [len(await store.turns("c", 99)) for store in stores] == [8] * 8
        assert [await store.key(key.digest) for store in stores] == [key] * 8
        for store in stores:
            await store.close()

    asyncio.run(work())


def test_a_write_that_is_refused_harms_no_other_in_its_transaction(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        key, _ = ApiKey.make("Ann")
        jobs: list[Coroutine[Any, Any, None]] = []
        for i in range(20):
            jobs += [store.append(a_turn(i)), store.add_key(key)]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert sum(isinstance(r, StoreError) for r in results) == 19
        assert len(await store.turns("c", 99)) == 20

    use(SqliteStore.open(tmp_path / "s.db"), work)


def test_one_who_stops_waiting_does_not_harm_the_others(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        tasks = [asyncio.create_task(store.append(a_turn(i))) for i in range(10)]
        await asyncio.sleep(0)
        tasks[3].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(r) for r in results if r is not None] == [asyncio.CancelledError]
        assert len(await store.turns("c", 99)) == 10

    use(SqliteStore.open(tmp_path / "s.db"), work)


@pytest.mark.parametrize(("make", "message", "hint"), [
    (lambda p: p.write_text("this is a text and no database " * 100), "file is not a database", "another file"),
    (lambda p: p.mkdir(), "unable to open", "ls -ld"),
    (lambda p: _sql(p, "CREATE TABLE theirs (x)"), "of another program", "another file"),
    (lambda p: _sql(p, "PRAGMA application_id = 7"), "of another program", "another file"),
    (lambda p: _sql(p, f"PRAGMA application_id = {sqlitefile.APPLICATION}", "PRAGMA user_version = 99"), "format 99.*up to 2", "pip install -U"),
])
def test_a_file_that_is_no_store_of_ours_is_left_alone(tmp_path: Path, make: Callable[[Path], Any], message: str, hint: str) -> None:
    path = tmp_path / "s.db"
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(StoreError, match=message) as caught:
        open_store(f"sqlite:///{path}")
    assert hint in caught.value.hint
    assert before == (path.read_bytes() if path.is_file() else b"")


def _sql(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for sql in statements:
        connection.execute(sql)
    connection.close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file/sub") as caught:
        open_store(f"sqlite:///{tmp_path}/file/sub/s.db")
    assert "ls -ld" in caught.value.hint


def test_a_full_disk_is_a_store_error_and_not_the_end(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        await store.append(a_turn(0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
        try:
            with pytest.raises(StoreError) as caught:
                for i in range(1, 100):
                    await store.append(Turn("c", {"messages": ["x" * 10_000]}, "", "math", id=str(i)))
                    kept = i
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "df -h" in caught.value.hint
        assert len(await store.turns("c", 1000)) == kept + 1
        await store.append(a_turn(100))
        assert len(await store.turns("c", 1000)) == kept + 2

    use(SqliteStore.open(tmp_path / "s.db"), work)


def test_a_file_that_another_holds_for_long_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlitefile, "BUSY_S", 0.05)

    async def work(store: Store) -> None:
        other = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked") as caught:
            await store.append(a_turn(1))
        assert "fuser" in caught.value.hint
        assert await store.turns("c", 1) == [], "reading goes on"
        other.execute("ROLLBACK")
        other.close()
        await store.append(a_turn(1))

    use(SqliteStore.open(tmp_path / "s.db"), work)


def test_a_turn_that_lmgraph_did_not_write_is_named(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await store.append(a_turn(1))
        other = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
        other.execute("UPDATE turns SET body = '[1]'")
        other.close()
        with pytest.raises(StoreError, match="did not write"):
            await store.turns("c", 1)

    use(SqliteStore.open(tmp_path / "s.db"), work)


# Redis


def test_history_in_redis_is_bounded_and_ends(redis: RedisServer) -> None:
    async def work(store: Store) -> None:
        for i in range(6):
            await store.append(a_turn(i, "c0"))
        assert [t.answer for t in await store.turns("c0", 9)] == ["answer 3", "answer 4", "answer 5"]
        for i in range(1, 4):
            await store.append(a_turn(i + 10, f"c{i}"))
        assert [c.id for c in await store.conversations(9)] == ["c3", "c2"]
        assert await store.turns("c0", 9) == []
        await store.append(a_turn(20, "c3"))
        await store.append(a_turn(21, "c3"))
        await store.append(a_turn(22, "c3"))
        assert [t.answer for t in await store.recent(None, 9)] == [f"answer {i}" for i in (22, 21, 20, 12)]
        with redis.client() as client:
            keys = set(client.keys())
            assert all(key.startswith(b"lmgraph:") for key in keys)
            endless = {key for key in keys if client.ttl(key) == -1}
            assert endless == {b"lmgraph:sequence", b"lmgraph:conversations"}
            client.delete("lmgraph:conversation:c3", "lmgraph:turns:c3", "lmgraph:bodies:c3")  # as when its time is over
        assert [c.id for c in await store.conversations(9)] == ["c2"]
        assert [t.answer for t in await store.recent(None, 9)] == ["answer 12"]
        await store.append(a_turn(30, "c2"))
        with redis.client() as client:
            assert client.zrange("lmgraph:conversations", 0, -1) == [b"c2"]

    use(RedisStore(redis.url, turns=3, conversations=2, recent=4, history_s=1000), work)


def test_limits_and_cache_in_redis_are_shared(redis: RedisServer) -> None:
    async def work(store: Store) -> None:
        other = open_store(redis.url)
        waits = await asyncio.gather(*((store, other)[i % 2].take("ann", 60, 10, 1000.0) for i in range(40)))
        assert waits.count(0.0) == 10
        await store.keep("k", b"v", 60)
        assert await other.cached("k") == b"v"
        await other.close()

    use(open_store(redis.url), work)


@pytest.mark.parametrize("url", ["redis://ann:s3cr3t@127.0.0.1:{port}/0", "redis://:s3cr3t@127.0.0.1:1", "redis://127.0.0.1:1?password=s3cr3t"])
def test_a_password_is_never_shown(redis: RedisServer, url: str) -> None:
    async def work(store: Store) -> None:
        with pytest.raises(StoreError, match=r"Redis at 127\.0\.0\.1") as caught:
            await store.ping()
        assert caught.value.hint
        seen: BaseException | None = caught.value
        while seen:
            assert "s3cr3t" not in f"{seen} {seen!r}"
            seen = seen.__cause__ or seen.__context__

    use(open_store(url.format(port=redis.port)), work)


@pytest.mark.parametrize("url", ["redis://:s3cr3t/x@host", "redis://:s3cr3t@host:port", "rediss://h?s3cr3t=1", "redis://h?db=s3cr3t"])
def test_an_address_that_cannot_be_read_shows_no_password_either(url: str) -> None:
    with pytest.raises(SettingsError, match="cannot be read") as caught:
        open_store(url)
    assert "s3cr3t" not in str(caught.value) and caught.value.__cause__ is None
    assert "redis://" in caught.value.hint


def test_a_redis_that_hangs_is_a_store_error(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "ANSWER_S", 0.05)

    async def work(store: Store) -> None:
        os.kill(redis.process.pid, signal.SIGSTOP)
        try:
            with pytest.raises(StoreError, match="Timeout"):
                await store.append(a_turn(1))
            with pytest.raises(StoreError, match="Timeout"):
                await store.cached("k")
        finally:
            os.kill(redis.process.pid, signal.SIGCONT)

    use(open_store(redis.url), work)


def test_more_callers_than_connections_wait_their_turn(redis: RedisServer) -> None:
    async def work(store: Store) -> None:
        assert await asyncio.gather(*(store.cached("k") for _ in range(300))) == [None] * 300
        with redis.client() as client:
            assert client.info("clients")["connected_clients"] < 50

    use(open_store(redis.url), work)


# the shield


class Broken:
    """A store that fails when `broken`, and counts how often it is asked."""

    def __init__(self) -> None:
        self.broken, self.asked = True, 0

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def answer(*_: Any) -> Any:
            self.asked += 1
            if self.broken:
                raise StoreError("The disk has gone.", "Look for it.")
            return 0.0

        return answer

    async def close(self) -> None:
        return None


def test_a_dead_store_costs_requests_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def work(store: Shielded) -> None:
        assert store.healthy
        for i in range(100):
            with pytest.raises(StoreError):
                await store.append(a_turn(i))
            assert await store.cached("k") is None
            await store.keep("k", b"v", 60)
            assert (await store.take("b", 60, 2, 1000.0) == 0) is (i < 2)
        assert (broken.asked, store.dropped, store.healthy) == (1, 100, False)
        for call in (store.forget("c"), store.purge(), store.keys(), store.key("d"), store.ping(), store.turns("c", 1),
                     store.conversations(1), store.recent(None, 1)):
            with pytest.raises(StoreError, match="disk has gone") as caught:
                await call
            assert caught.value.hint == "Look for it."
        assert broken.asked == 1

    broken = Broken()
    use(Shielded(broken, every_s=3600), work)  # type: ignore[arg-type]
    assert [record.message for record in caplog.records] == ["The store is gone, requests go on without it: The disk has gone."]


def test_the_shield_asks_by_itself_whether_the_store_is_back(caplog: pytest.LogCaptureFixture) -> None:
    async def work(store: Shielded) -> None:
        assert all(isinstance(lost, StoreError) for lost in await asyncio.gather(*(store.append(a_turn(i)) for i in range(5)), return_exceptions=True))
        await until(lambda: broken.asked > 8)
        assert not store.healthy
        broken.broken = False
        await until(lambda: store.healthy)
        await store.append(a_turn(9))
        assert store.dropped == 5

    broken = Broken()
    use(Shielded(broken, every_s=0.01), work)  # type: ignore[arg-type]
    gone, back = (record.message for record in caplog.records)
    assert "gone" in gone and "is back after" in back


def test_a_refused_key_is_no_failure_of_the_store(opened: Callable[..., Store]) -> None:
    async def work(store: Shielded) -> None:
        key, _ = ApiKey.make("Ann")
        await store.add_key(key)
        with pytest.raises(StoreError):
            await store.add_key(key)
        assert store.healthy
        assert await store.key(key.digest) == key
        await store.append(a_turn(1))
        assert await store.turns("c", 1) and await store.recent(None, 1) and await store.conversations(1) and await store.forget("c")
        await store.keep("k", b"v", 60)
        assert await store.cached("k") and await store.purge() == 1
        assert await store.take("b", 60, 1, 1.0) == 0 < await store.take("b", 60, 1, 1.0)
        assert await store.revoke(key.id) and await store.keys() and await store.key(key.digest) is None
        await store.ping()

    use(Shielded(opened()), work)


def test_a_gateway_outlives_its_redis(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="lmgraph.store")
    server = RedisServer(tmp_path)

    async def work(store: Shielded) -> None:
        seen, _ = ApiKey.make("Ann")
        unseen, _ = ApiKey.make("Bob")
        revoked, _ = ApiKey.make("Eve")
        for key in (seen, unseen, revoked):
            await store.add_key(key)
        await store.append(a_turn(1))
        assert await store.key(seen.digest) == seen
        assert await store.key(revoked.digest) == revoked
        assert await store.revoke(revoked.id)

        server.stop()
        lost = await asyncio.gather(*(store.append(a_turn(i)) for i in range(20)), return_exceptions=True)
        assert all(isinstance(error, StoreError) for error in lost), "nobody is told that a turn is kept when it is not"
        assert (store.healthy, store.dropped) == (False, 20)
        with pytest.raises(StoreError):
            await store.turns("c", 9)
        assert await store.cached("k") is None
        assert [await store.take("b", 60, 2, 1000.0) > 0 for _ in range(3)] == [False, False, True]
        assert await store.key(seen.digest) == seen
        for key in (unseen, revoked):
            with pytest.raises(StoreError, match=r"Redis at 127\.0\.0\.1"):
                await store.key(key.digest)

        server.start()
        await until(lambda: store.healthy)
        await store.append(a_turn(2))
        assert [t.answer for t in await store.turns("c", 9)] == ["answer 2"]
        assert await store.key(seen.digest) is None, "this Redis keeps nothing: the store that works is right"

    try:
        use(Shielded(open_store(server.url), every_s=0.05), work)
    finally:
        server.stop()
    gone, back = (record.message for record in caplog.records)
    assert gone.startswith("The store is gone") and "20 turns were dropped" in back


def test_a_restarted_redis_is_not_noticed_between_requests(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)

    async def work(store: Shielded) -> None:
        await asyncio.gather(*(store.append(a_turn(i)) for i in range(20)))
        server.stop()
        server.start()
        await asyncio.gather(*(store.append(a_turn(i)) for i in range(20)))
        assert (store.healthy, store.dropped) == (True, 0)
        assert len(await store.turns("c", 99)) == 20

    try:
        use(Shielded(open_store(server.url)), work)
    finally:
        server.stop()


def test_a_remembered_key_is_forgotten_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(store: Shielded) -> None:
        inner = store._store
        key, _ = ApiKey.make("Ann")
        await store.add_key(key)
        assert await store.key(key.digest) == key
        await inner.close()
        assert await store.key(key.digest) == key
        monkeypatch.setattr("lmgraph.store.shield.REMEMBER_S", -1.0)
        with pytest.raises(StoreError):
            await store.key(key.digest)

    use(Shielded(open_store("sqlite://")), work)


# opening


def test_sqlite_urls_name_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def nothing(_: Store) -> None:
        return None

    use(open_store("sqlite:///here/a.db"), nothing)
    use(open_store(f"sqlite:///{tmp_path}/there/b.db"), nothing)
    use(open_store("sqlite://"), nothing)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")) == ["here/a.db", "there/b.db"]


@pytest.mark.parametrize("url", ["", "store.db", "sqlite:", "sqlite:///", "sqlite://store.db", "postgres://ann:s3cr3t@h/db", "redis://", "ann:s3cr3t@h"])
def test_a_url_of_no_known_form_lists_the_valid_ones_and_shows_no_password(url: str) -> None:
    with pytest.raises(SettingsError, match="no form") as caught:
        open_store(url)
    assert all(form in caught.value.hint for form in ("sqlite:///relative.db", "sqlite:////", "sqlite:// ", "redis://", "rediss://"))
    assert "s3cr3t" not in str(caught.value)


def test_redis_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lmgraph.store.redis")
    monkeypatch.delattr("lmgraph.store.redis", raising=False)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(MissingExtra) as caught:
        open_store("redis://localhost")
    assert caught.value.hint == "Install it: pip install 'lmgraph[redis]'"
