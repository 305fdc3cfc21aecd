"""A worker behind any OpenAI-compatible server (vLLM, LoRAX, Ollama, llama.cpp, cloud APIs): chat completions, streamed.

What goes wrong on the way becomes WorkerError or WorkerTimeout here. Several URLs are replicas (replicas.py chooses): a call goes on
to another one when a replica fails before the first piece of its answer, and never after. It does not know how an answer is written
(reading.py does), how bytes travel (http.py does), nor how adapters are asked for where the graph names a dialect (dialects.py does).
"""

from __future__ import annotations

import asyncio
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lmgraph import quickjson
from lmgraph.errors import WorkerError, WorkerStarting, WorkerTimeout
from lmgraph.graph import WorkerSpec
from lmgraph.types import Delta, Message
from lmgraph.workers import dialects
from lmgraph.workers.dialects import Wanted
from lmgraph.workers.http import BrokenOff, Client, Connection, NoConnection
from lmgraph.workers.inventory import Inventory, Seen
from lmgraph.workers.reading import Reading, Refusal, detail, refusal
from lmgraph.workers.replicas import Replica, Replicas, wait_of
from lmgraph.workers.target import Target, prepare

CONNECT_S = 5.0
"""a host that is there answers at once, and a packet that was lost is sent again after 1 and 3 s; this long everybody waits who finds that
a host is cut off"""
PROBE_S = 1.5
"""the same for the call that tries whether a replica is back: somebody waits for it"""
KEPT_S = 4.0
"""how long an idle connection is kept: less than the 5 s after which many servers close theirs, or calls would run into that"""
LINGER_S = 1.0
"""how long a finished answer may take to end its body, so that its connection can be used again; nobody waits for it"""
AGAIN_S = 1.0
"""between two tries of a server that is being started"""
MANY = 100
"""targets (a URL and a key) that are remembered"""
ELSEWHERE = {424, 429, 500, 502, 503, 504}
"""statuses after which another replica may do better (424: LoRAX could not generate)"""
REACH = "Is the server running, and is the URL in graph.yaml right (it ends in /v1)?"
HEADERS = {
    "Content-Type": "application/json",
    "Accept": "text/event-stream, application/json",
    "Accept-Encoding": "identity",
    "User-Agent": "lmgraph",
}
OWN = {"model", "messages", "stream", "stream_options", "max_tokens", "temperature"}
"""what no option may change"""


class OpenAIWorker:
    """Talks to `urls` (each ending in /v1) about `model`; the key comes from the environment variable `key_env`.

    `timeout_s` bounds the time until the first piece of an answer and between two pieces. Without `always_stream`, an answer that
    nobody needs in pieces is asked for whole, and that is its one piece. As long as no replica takes a connection, all are tried again
    until `start_timeout_s` is over: they may be starting. `wanted`: the base and the adapter that a replica must have, where
    the graph names a dialect; each is asked for them before its first answer. `pick(n)`: a random number below n.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        *,
        system: str = "",
        key_env: str = "",
        timeout_s: float = 120,
        start_timeout_s: float = 0,
        temperature: float | None = None,
        always_stream: bool = True,
        wanted: Wanted | None = None,
        environment: Mapping[str, str] = os.environ,
        pick: Callable[[int], int] = random.randrange,
    ) -> None:
        self._replicas = Replicas([url.rstrip("/") for url in urls], pick)
        self._model, self._system, self._temperature = model, system, temperature
        self._timeout, self._start_timeout = timeout_s, start_timeout_s
        self._key_env, self._environment, self._always_stream = key_env, environment, always_stream
        self._client = Client(connect_s=min(timeout_s, CONNECT_S), idle_s=KEPT_S)
        self._targets: dict[tuple[str, str], Target] = {}
        self._inventory = Inventory(wanted, self._client, silence_s=timeout_s) if wanted else None

    @classmethod
    def of(cls, spec: WorkerSpec, environment: Mapping[str, str] = os.environ) -> OpenAIWorker:
        """The worker of a node, as the graph describes it."""
        return cls(
            spec.urls,
            spec.model,
            system=spec.system,
            key_env=spec.key_env,
            timeout_s=spec.timeout_s,
            start_timeout_s=spec.start_timeout_s,
            temperature=spec.temperature,
            always_stream=spec.stream,
            wanted=Wanted.of(spec) if spec.dialect else None,
            environment=environment,
        )

    async def stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float | None = None,
        options: Mapping[str, Any] | None = None,
        whole: bool = False,
    ) -> AsyncIterator[Delta]:
        key = self._key()
        request = self._request(messages, max_tokens, temperature, options or {}, streamed=self._always_stream or not whole)
        body = b"" if self._inventory else quickjson.dumpb(request)
        tried: list[Replica] = []
        renewed: list[Replica] = []
        last: Exception | None = None
        until, absent = time.monotonic() + self._start_timeout, True
        while True:
            replica = self._replicas.choose(time.monotonic(), tried)
            if replica is None:
                left = until - time.monotonic()
                if not absent or left <= 0:
                    break
                await asyncio.sleep(min(AGAIN_S, left))
                tried.clear()
                continue
            tried.append(replica)
            reading = Reading(replica.name)
            response: Connection | None = None
            begun = verdict = False
            since = time.monotonic()
            try:
                if self._inventory:
                    has = await self._inventory.ready(replica, key)
                    body = quickjson.dumpb(dialects.shape(self._inventory.wanted, has, request))
                response = await self._post(replica, body, key)
                if response.status != 200:
                    raise await self._refusal(replica, response)
                if self._inventory and not await self._inventory.holds(replica, key, has, response.opened):
                    raise refusal(f"{replica.name} was started anew with other adapters.", "", 404)
                while not reading.over:
                    chunk = await response.read()
                    came = False
                    for delta in reading.feed(chunk) if chunk else reading.end():
                        if not begun:
                            self._replicas.begin(replica)
                        begun = came = True
                        yield delta
                    if came:  # counted from here: the time that the reader took is not the server's
                        since = time.monotonic()
                    elif not reading.over and time.monotonic() - since > self._timeout:  # it does send, but nothing of an answer
                        raise asyncio.TimeoutError
                final = reading.last()
                if self._inventory:
                    final = replace(final, finish=dialects.ended(self._inventory.wanted.dialect, final.finish))
                verdict = True
                self._replicas.succeed(replica)
            except (WorkerError, asyncio.TimeoutError, OSError, ValueError) as caught:
                last = self._mapped(replica.name, caught, key)
                absent = absent and isinstance(last, WorkerStarting)
                verdict = True
                again = self._judge(replica, last)
                if self._inventory and _doubtful(last):
                    self._inventory.forget(replica)
                    if getattr(last, "status", 0) == 404 and replica not in renewed:  # it was started anew, and has or numbers others
                        renewed.append(replica)
                        tried.remove(replica)
                        again = True
                if begun or not again:
                    raise last from (None if caught is last else caught)
                continue
            except asyncio.CancelledError:  # whoever gives up after that long says what a timeout says
                if time.monotonic() - since > 0.9 * self._timeout:
                    self._replicas.fail(replica, time.monotonic())
                raise
            finally:  # no await in here: it also runs when the stream is left early
                self._replicas.release(replica, given_up=not verdict)
                if response is not None:
                    response.leave(LINGER_S if reading.over else 0)
            yield final
            return
        raise last or WorkerError("no URL is configured")

    @property
    def resting(self) -> bool:
        return not self._start_timeout and self._replicas.resting(time.monotonic())  # one that may be starting is waited for

    def states(self) -> list[dict[str, Any]]:
        """How each replica does: url, outstanding, failures, open_until (on the clock of time.monotonic)."""
        return self._replicas.states()

    async def look(self) -> list[Seen]:
        """Whether each replica has what the graph names, in the order of the graph; [] where no dialect is named. Changes nothing.

        Raises WorkerError where the key is missing.
        """
        if not self._inventory:
            return []
        inventory, key = self._inventory, self._key()

        async def see(replica: Replica) -> Seen:
            try:
                return await inventory.see(replica, key)
            except (WorkerError, asyncio.TimeoutError, OSError, ValueError) as caught:
                error = self._mapped(replica.name, caught, key)
                away = isinstance(caught, (asyncio.TimeoutError, OSError)) or getattr(caught, "status", 0) in (502, 503, 504)
                return Seen(replica.name, note=f"it is not up yet: {error.args[0]}") if away else Seen(replica.name, str(error))

        return await asyncio.gather(*map(see, self._replicas))

    async def close(self) -> None:
        if self._inventory:
            await self._inventory.close()
        self._client.close()

    async def _post(self, replica: Replica, body: bytes, key: str) -> Connection:
        target = self._targets.get((replica.url, key))
        if target is None:
            headers = {**HEADERS, "Authorization": f"Bearer {key}"} if key else HEADERS
            if len(self._targets) >= MANY:
                self._targets.clear()
            target = self._targets[replica.url, key] = prepare(f"{replica.url}/chat/completions", headers)
        connect_s = min(self._timeout, PROBE_S) if replica.probing else None
        return await self._client.send(target, body, silence_s=self._timeout, connect_s=connect_s)

    def _request(
        self, messages: Sequence[Message], max_tokens: int, temperature: float | None, options: Mapping[str, Any], streamed: bool
    ) -> dict[str, Any]:
        turns = [dict(m.raw) if m.raw is not None else {"role": m.role, "content": m.content} for m in messages]
        if self._system:
            turns = [{"role": "system", "content": self._system}, *(t for t in turns if t.get("role") != "system")]
        body: dict[str, Any] = {name: value for name, value in options.items() if name not in OWN}
        body.update(model=self._model, messages=turns)
        if streamed:
            body.update(stream=True, stream_options={"include_usage": True})
        if body.get("max_completion_tokens") is None:  # the newer name of the same; servers refuse both together
            body["max_tokens"] = max_tokens
        heat = temperature if temperature is not None else self._temperature
        if heat is not None:
            body["temperature"] = heat
        return body

    def _key(self) -> str:
        if not self._key_env:
            return ""
        key = self._environment.get(self._key_env, "").strip()  # a key read from a file often ends in a line end
        if not key:
            raise WorkerError(f"The environment variable {self._key_env} (key of this worker) is not set.", f"export {self._key_env}=...")
        if not (key.isascii() and key.isprintable()):  # never let the HTTP client complain: it would print the key
            raise WorkerError(f"The environment variable {self._key_env} (key of this worker) holds characters that no key has.")
        return key

    async def _refusal(self, replica: Replica, response: Connection) -> Refusal:
        body = b""
        while len(body) < 2000 and (chunk := await response.read()):
            body += chunk
        seconds = wait_of(response.headers.get("retry-after", ""), time.time())
        if seconds is not None and response.status in ELSEWHERE:
            self._replicas.pause(replica, time.monotonic(), seconds)
        return refusal(f"{replica.name} answered {response.status}: ", detail(body), response.status)

    def _judge(self, replica: Replica, error: Exception) -> bool:
        """Note what a failure says about the replica; whether another one may do better."""
        status, now = error.status if isinstance(error, Refusal) else 0, time.monotonic()
        if status == 429 and replica.paused_until > now:
            return True  # busy is not ill, and it said for how long
        if 300 <= status < 500 and status not in ELSEWHERE:
            self._replicas.succeed(replica)  # it is well: it refuses this request
            return False
        self._replicas.fail(replica, now, gone=isinstance(error, WorkerError) and not error.again)
        return isinstance(error, WorkerError) and (not status or status in ELSEWHERE)

    def _mapped(self, url: str, error: Exception, key: str) -> Exception:
        """A foreign exception as one of ours; ours lose the key, where a server said it back to us."""
        if isinstance(error, WorkerError):
            if key and key in error.message:
                error.message = error.message.replace(key, "***")
                error.args = (error.message,)
            return error
        if isinstance(error, asyncio.TimeoutError):
            return WorkerTimeout(f"{url} did not answer within {self._timeout:g} s.")
        words = str(error).replace(key, "***") if key else str(error)
        if isinstance(error, (BrokenOff, ConnectionResetError, BrokenPipeError)):
            words = words if isinstance(error, BrokenOff) and words else "it closed the connection before its answer was finished"
        elif self._start_timeout and isinstance(error, OSError) and not isinstance(error, ssl.SSLError):  # there was no connection at all
            waited = f"also not within the {self._start_timeout:g} s for which it was tried again"
            return WorkerStarting(
                f"{url} takes no connection, {waited}: {words or type(error).__name__}.", "It may be starting: ask again."
            )
        found = WorkerError(f"{url} cannot be reached: {words or type(error).__name__}.", REACH)
        found.again = not isinstance(error, NoConnection)  # it was waited for, long enough
        return found


def _doubtful(error: Exception) -> bool:
    """Whether a failure leaves it open what the server has; not where it only refused a request."""
    status = getattr(error, "status", 0)
    return status == 404 or not 400 <= status < 500
