"""Whether the servers of a node have its base and its adapter: each is asked once, what it said is kept, a vLLM is told to load.

It knows how to ask a server and when to ask again; however many answers wait for it, one question is under way for each server. What is
asked and what an answer means is dialects.py's business, which replica takes a call openai.py's.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from lmgraph import quickjson
from lmgraph.errors import WorkerError
from lmgraph.workers import dialects
from lmgraph.workers.dialects import Stock, Wanted
from lmgraph.workers.http import Client
from lmgraph.workers.reading import detail, refusal
from lmgraph.workers.replicas import Replica
from lmgraph.workers.target import prepare

MOST = 4 << 20
"""bytes of a listing"""
HEADERS = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "lmgraph"}


@dataclass(frozen=True)
class Seen:
    """A replica that was looked at: what is wrong with it for its node, or what is worth knowing (it is not up yet; it will load)."""

    url: str
    """without user name and password"""
    problem: str = ""
    note: str = ""


class Inventory:
    """What the replicas of one node have. `silence_s` bounds the wait for each answer, also while an adapter is loaded."""

    def __init__(self, wanted: Wanted, client: Client, *, silence_s: float) -> None:
        self.wanted = wanted
        self._client, self._silence_s = client, silence_s
        self._known: dict[str, tuple[Stock, float]] = {}
        """URL -> what it has, and when it was asked"""
        self._asking: dict[str, asyncio.Task[Stock]] = {}

    async def ready(self, replica: Replica, key: str) -> Stock:
        """What a replica has, which is all that the node needs; asked for, and loaded, where that is not known.

        Raises WorkerError where it lacks something, and what asking raises (OSError, asyncio.TimeoutError, ValueError).
        """
        if known := self._known.get(replica.url):
            return known[0]
        task = self._asking.get(replica.url)
        if task is None:
            now = time.monotonic()
            task = self._asking[replica.url] = asyncio.create_task(self._prepare(replica, key))
            task.add_done_callback(lambda done: self._asked(replica.url, now, done))
        return await asyncio.shield(task)  # shielded: others wait for it too

    async def holds(self, replica: Replica, key: str, has: Stock, opened: float) -> bool:
        """Whether a request that was made for `has` meant the right adapter: sent over a connection that was opened then, and is alive.

        Where adapters have numbers and the server was asked for them before the connection was opened, it may have been started anew in
        between; it is asked again then, while it works on the answer. Raises what `ready` raises.
        """
        if self.wanted.dialect in dialects.NUMBERED and (replica.url not in self._known or self._known[replica.url][1] < opened):
            self.forget(replica)
            return await self.ready(replica, key) == has
        return True

    def forget(self, replica: Replica) -> None:
        """Ask this replica again before the next answer."""
        self._known.pop(replica.url, None)

    async def look(self, replica: Replica, key: str) -> Stock:
        """What a replica says it has. Changes nothing; raises what `ready` raises, but for what it lacks."""
        answers = []
        for path in dialects.LISTINGS[self.wanted.dialect]:
            status, body = await self._call(replica, path, key)
            if status != 200:
                error = refusal(f"{replica.name} answered {status} to GET {path}: ", detail(body), status)
                if status in (404, 405):
                    error.hint = f"Is it the server that graph.yaml says (dialect: {self.wanted.dialect})?"
                raise error
            try:
                answers.append(quickjson.loads(body))
            except ValueError as error:
                raise WorkerError(f"{replica.name} answered GET {path} with something that is not JSON: {body[:100]!r}") from error
        try:
            return dialects.stock(self.wanted.dialect, answers)
        except ValueError as error:
            words = f"{replica.name} does not list what it has as a server of dialect {self.wanted.dialect} does: {error}."
            raise WorkerError(words, "Is it the server that graph.yaml says?") from error

    async def see(self, replica: Replica, key: str) -> Seen:
        """Look at a replica for a person. Raises what `look` raises."""
        has = await self.look(replica, key)
        if dialects.loads(self.wanted, has):
            return Seen(replica.name, note=f"the adapter {self.wanted.adapter!r} is loaded from {self.wanted.path} before the first answer")
        if error := self._lacking(replica, has):
            return Seen(replica.name, str(error))
        unlisted = has.adapters is None and self.wanted.adapter
        return Seen(
            replica.name, note=f"whether it can load the adapter {self.wanted.adapter!r} shows with the first answer" if unlisted else ""
        )

    async def close(self) -> None:
        """Stop asking."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _asked(self, url: str, when: float, task: asyncio.Task[Stock]) -> None:
        self._asking.pop(url, None)
        if not task.cancelled() and task.exception() is None:
            self._known[url] = task.result(), when

    async def _prepare(self, replica: Replica, key: str) -> Stock:
        has = await self.look(replica, key)
        if dialects.loads(self.wanted, has):
            body = quickjson.dumpb(dialects.load(self.wanted))
            status, said = await self._call(replica, dialects.LOADING, key, body)
            if problem := dialects.loaded(self.wanted, status, detail(said)):
                raise WorkerError(f"{replica.name} {problem}.", dialects.advice(self.wanted))
            has = await self.look(replica, key)
        if error := self._lacking(replica, has):
            raise error
        return has

    def _lacking(self, replica: Replica, has: Stock) -> WorkerError | None:
        problems = dialects.lacks(self.wanted, has)
        return WorkerError(f"{replica.name} {', and it '.join(problems)}.", dialects.advice(self.wanted)) if problems else None

    async def _call(self, replica: Replica, path: str, key: str, body: bytes | None = None) -> tuple[int, bytes]:
        """(status, body) of a GET, or of a POST where there is a body, beside the replica's /v1."""
        headers: dict[str, Any] = HEADERS | ({"Authorization": f"Bearer {key}"} if key else {})
        target = prepare(replica.url.removesuffix("/v1") + path, headers, "GET" if body is None else "POST")
        response = await self._client.send(target, body or b"", silence_s=self._silence_s)
        found = b""
        try:
            while chunk := await response.read():
                found += chunk
                if len(found) > MOST:
                    raise WorkerError(f"{replica.name} answered {path} with more than {MOST >> 20} MiB.")
        finally:
            response.leave()
        return response.status, found
