"""One SQLite file of lmgraph's: its format, how it is opened, and the thread that alone uses a connection to it.

Jobs that wait are done in one transaction (group commit), and only then do their callers go on. It knows the tables and what
SQLite's errors mean; what is kept in the tables and why is `store/sqlite.py`'s.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from lmgraph.errors import StoreError

T = TypeVar("T")
APPLICATION = 0x6C6D6772
"""written into the file's header ("lmgr"): a file of another program is never touched"""
BUSY_S, OPEN_S = 2.0, 20.0
"""seconds that a write waits for another process, and that opening a file does: many may make it at the same moment"""
TOGETHER = 1000
"""most jobs in one transaction"""
SWEEP_S = 0.5
LOG_PAGES = 16_000
"""of 4 KiB: a write-ahead log that is longer is started anew"""
MIGRATIONS: list[tuple[str, ...]] = [  # only ever add at the end: `PRAGMA user_version` counts how many a file has seen
    (
        "CREATE TABLE turns (seq INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, conversation TEXT NOT NULL, node TEXT NOT NULL,"
        " body TEXT NOT NULL)",
        "CREATE INDEX turns_conversation ON turns (conversation, seq)",
        "CREATE INDEX turns_node ON turns (node, seq)",
        "CREATE TABLE conversations (id TEXT PRIMARY KEY, title TEXT NOT NULL, turns INTEGER NOT NULL, created REAL NOT NULL,"
        " updated REAL NOT NULL)",
        "CREATE INDEX conversations_updated ON conversations (updated)",
        "CREATE TABLE cache (seq INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, expires REAL NOT NULL, value BLOB NOT NULL)",
        "CREATE INDEX cache_expires ON cache (expires)",
        # kept by triggers, so that it is right with several processes on one file and no write has to count
        "CREATE TABLE cache_total (entries INTEGER NOT NULL, bytes INTEGER NOT NULL)",
        "INSERT INTO cache_total VALUES (0, 0)",
        "CREATE TRIGGER cache_more AFTER INSERT ON cache BEGIN"
        " UPDATE cache_total SET entries = entries + 1, bytes = bytes + length(new.value); END",
        "CREATE TRIGGER cache_less AFTER DELETE ON cache BEGIN"
        " UPDATE cache_total SET entries = entries - 1, bytes = bytes - length(old.value); END",
        "CREATE TABLE keys (id TEXT PRIMARY KEY, name TEXT NOT NULL, digest TEXT UNIQUE NOT NULL, created REAL NOT NULL, revoked REAL,"
        " rate_per_minute REAL, concurrent INTEGER)",
        "CREATE TABLE pinged (at REAL NOT NULL)",
        "INSERT INTO pinged VALUES (0)",
    ),
    ("ALTER TABLE keys ADD COLUMN admin INTEGER NOT NULL DEFAULT 0",),
]


Row = Sequence[Any]
"""one thing to add, as JSON can hold it"""
Job = tuple[Callable[[sqlite3.Connection], Any], "asyncio.Future[Any]"]


def _nothing(connection: sqlite3.Connection) -> None: ...


ROWS: Job = (_nothing, cast("asyncio.Future[Any]", None))
"""in the queue: rows wait"""


class Desk:
    """One connection and the only thread that uses it. Jobs that wait are done in one transaction, in the order they came."""

    def __init__(
        self, connection: sqlite3.Connection, place: str, add: Callable[[sqlite3.Connection, list[Row]], None] | None = None
    ) -> None:
        self._connection, self._place, self._closed = connection, place, False
        self._add = add
        self._rows: deque[tuple[Row, asyncio.Future[None]]] = deque()
        self._reads = bool(connection.execute("PRAGMA query_only").fetchone()[0])
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="lmgraph-store", daemon=True)
        self._thread.start()

    async def do(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """What the job returns, once it is committed. Raises StoreError; a caller who stops waiting does not stop the job."""
        if self._closed:
            raise StoreError(f"The store {self._place} is closed.")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.put((job, future))
        return await future

    async def add(self, row: Row) -> None:
        """Like a job that adds this row, but all rows that wait are added by one call of the `add` that the desk was given.

        Each statement lets the other threads of this process go first, so one for all costs a busy process far less than one for each.
        """
        if self._closed:
            raise StoreError(f"The store {self._place} is closed.")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._rows.append((row, future))
        if len(self._rows) == 1:  # else the thread has been called, or is just taking them
            self._jobs.put(ROWS)
        await future

    async def close(self) -> None:
        """Do what waits, then close the connection. Twice is fine."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _work(self) -> None:
        with closing(self._connection):
            more = True
            while more or self._rows:
                taken = [self._jobs.get()]
                while len(taken) < TOGETHER and not self._jobs.empty():
                    taken.append(self._jobs.get())
                more = more and None not in taken
                jobs = [job for job in taken if job is not None and job is not ROWS]
                rows = self._take()
                results = self._commit([work for work, _ in jobs], [row for row, _ in rows])
                settled = [(future, result) for (_, future), result in zip([*rows, *jobs], results)]
                for loop in {future.get_loop() for future, _ in settled}:
                    with suppress(RuntimeError):  # that loop is closed: nobody waits any more
                        loop.call_soon_threadsafe(_settle, [(f, r) for f, r in settled if f.get_loop() is loop])

    def _take(self) -> list[tuple[Row, asyncio.Future[None]]]:
        rows: list[tuple[Row, asyncio.Future[None]]] = []
        while self._rows and len(rows) < TOGETHER:
            rows.append(self._rows.popleft())
        if self._rows:
            self._jobs.put(ROWS)
        return rows

    def _commit(self, jobs: list[Callable[[sqlite3.Connection], Any]], rows: list[Row]) -> list[Any]:
        """Results or StoreErrors, of the rows and then of the jobs. One job's failure is its own; one of all together is everybody's."""
        try:
            self._connection.execute("BEGIN" if self._reads else "BEGIN IMMEDIATE")
            if rows and self._add:
                self._add(self._connection, rows)
            results = [*(None for _ in rows), *(self._do(job) for job in jobs)]
            self._connection.execute("COMMIT")
            return results
        except Exception as error:  # noqa: BLE001 - handed over to the callers: this thread must go on
            with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                self._connection.execute("ROLLBACK")
            return [explain(error, self._place) for _ in (*rows, *jobs)]

    def _do(self, job: Callable[[sqlite3.Connection], Any]) -> Any:
        self._connection.execute("SAVEPOINT job")
        try:
            result = job(self._connection)
        except Exception as error:  # handed over to the caller
            if not self._connection.in_transaction:  # a full disk may end the whole transaction
                raise
            self._connection.execute("ROLLBACK TO job")
            result = explain(error, self._place) if isinstance(error, sqlite3.Error) else error
        self._connection.execute("RELEASE job")
        return result


class Sweeper:
    """Moves what was written from the write-ahead log into the file (a checkpoint), on a connection and a thread of its own.

    SQLite does it by itself in the middle of some writer's commit, who then waits for the disk. Without an error of its own: what
    cannot be moved stays in the log, and a disk that is full or broken is noticed by whoever writes.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lmgraph-sweeper", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Stop and close the connection. Twice is fine."""
        self._over.set()
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _work(self) -> None:
        with closing(self._connection):
            while not self._over.wait(SWEEP_S):
                with suppress(sqlite3.Error):
                    _, pages, _ = self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                    if pages > LOG_PAGES:  # writers that never pause keep it from starting anew: let them wait once
                        self._connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()


def _settle(results: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, result in results:
        if future.done():  # cancelled meanwhile
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


def connect(place: str) -> sqlite3.Connection:
    """A connection that any one thread may use, with transactions left to us. Raises sqlite3.Error."""
    connection = sqlite3.connect(place, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")  # `Sweeper` does it
    return connection


def migrate(db: sqlite3.Connection, place: str) -> None:
    """Bring a file to the newest format. Raises StoreError for another program's file or a newer format, sqlite3.Error."""
    db.execute(f"PRAGMA busy_timeout = {OPEN_S * 1000:.0f}")
    db.execute("BEGIN IMMEDIATE")  # two processes may open a new file at the same moment
    application, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    if application != APPLICATION and (application or version or db.execute("SELECT 1 FROM sqlite_master").fetchone()):
        raise StoreError(f"{place} is a database of another program.", "Name another file.")
    if version > len(MIGRATIONS):
        raise StoreError(
            f"{place} was written by a newer lmgraph: it has format {version}, this one knows up to {len(MIGRATIONS)}.",
            "Update: pip install -U lmgraph. Or name another file.",
        )
    for statements in MIGRATIONS[version:]:
        for sql in statements:
            db.execute(sql)
    db.execute(f"PRAGMA application_id = {APPLICATION}")
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    db.execute("COMMIT")
    until = time.monotonic() + OPEN_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError:  # SQLite does not wait here for others who open the file just now
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
    db.execute(f"PRAGMA busy_timeout = {BUSY_S * 1000:.0f}")


def explain(error: Exception, place: str) -> StoreError:
    """A StoreError that says what to do about it."""
    if isinstance(error, StoreError):
        return error
    text = str(error)
    folder = Path(place).absolute().parent
    hints = {
        "full": f"Make room: df -h {folder}",
        "disk I/O": f"Is the disk full or broken? df -h {folder}",
        "not a database": "Name another file, or move this one away.",
        "malformed": f"The file is damaged. Save what is there: sqlite3 {place} .recover | sqlite3 mended.db",
        "locked": "Another process holds the file for long; find it: fuser " + place,
        "unable to open": f"Is it a file, in a folder that may be written? ls -ld {folder} {place}",
        "readonly": f"It may not be written: ls -ld {folder} {place}",
    }
    other = f"May the folder be written? ls -ld {folder}" if isinstance(error, OSError) else ""
    return StoreError(f"The store {place} failed: {text}", next((hint for sign, hint in hints.items() if sign in text), other))
