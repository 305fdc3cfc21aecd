"""A worker behind any OpenAI-compatible server (vLLM, LoRAX, Ollama, llama.cpp, cloud APIs): chat completions, streamed.

What goes wrong on the way becomes WorkerError or WorkerTimeout here. Several URLs are replicas (replicas.py chooses): a call goes on
to another one when a replica fails before the first piece of its answer, and never after. It does not know how an answer is written
(reading.py does), nor how bytes travel (http.py does).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from lmgraph import quickjson
from lmgraph.errors import WorkerError, WorkerTimeout
from lmgraph.types import Delta, Message
from lmgraph.workers.http import BrokenOff, Client, Connection, NoConnection
from lmgraph.workers.reading import Reading, Refusal, refusal
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
MANY = 100
"""targets (a URL and a key) that are remembered"""
ELSEWHERE = {429, 500, 502, 503, 504}
"""statuses after which another replica may do better"""
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
    nobody needs in pieces is asked for whole, and that is its one piece. `pick(n)`: a random number below n.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        *,
        system: str = "",
        key_env: str = "",
        timeout_s: float = 120,
        temperature: float | None = None,
        always_stream: bool = True,
        environment: Mapping[str, str] = os.environ,
        pick: Callable[[int], int] = random.randrange,
    ) -> None:
        self._replicas = Replicas([url.rstrip("/") for url in urls], pick)
        self._model, self._system, self._temperature, self._timeout = model, system, temperature, timeout_s
        self._key_env, self._environment, self._always_stream = key_env, environment, always_stream
        self._client = Client(connect_s=min(timeout_s, CONNECT_S), idle_s=KEPT_S)
        self._targets: dict[tuple[str, str], Target] = {}

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
        body = self._body(messages, max_tokens, temperature, options or {}, streamed=self._always_stream or not whole)
        tried: list[Replica] = []
        last: Exception | None = None
        while (replica := self._replicas.choose(time.monotonic(), tried)) is not None:
            tried.append(replica)
            reading = Reading(replica.name)
            response: Connection | None = None
            begun = verdict = False
            since = time.monotonic()
            try:
                response = await self._post(replica, body, key)
                if response.status != 200:
                    raise await self._refusal(replica, response)
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
                verdict = True
                self._replicas.succeed(replica)
            except (WorkerError, asyncio.TimeoutError, OSError, ValueError) as caught:
                last = self._mapped(replica.name, caught, key)
                verdict = True
                again = self._judge(replica, last)
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
        return self._replicas.resting(time.monotonic())

    def states(self) -> list[dict[str, Any]]:
        """How each replica does: url, outstanding, failures, open_until (on the clock of time.monotonic)."""
        return self._replicas.states()

    async def close(self) -> None:
        self._client.close()

    async def _post(self, replica: Replica, body: bytes, key: str) -> Connection:
        target = self._targets.get((replica.url, key))
        if target is None:
            headers = {**HEADERS, "Authorization": f"Bearer {key}"} if key else HEADERS
            if len(self._targets) >= MANY:
                self._targets.clear()
            target = self._targets[replica.url, key] = prepare(f"{replica.url}/chat/completions", headers)
        connect_s = min(self._timeout, PROBE_S) if replica.probing else None
        return await self._client.post(target, body, silence_s=self._timeout, connect_s=connect_s)

    def _body(
        self, messages: Sequence[Message], max_tokens: int, temperature: float | None, options: Mapping[str, Any], streamed: bool
    ) -> bytes:
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
        return quickjson.dumpb(body)

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
        try:
            detail = json.loads(body)["error"]
        except (ValueError, KeyError, TypeError, RecursionError):
            detail = body[:2000].decode(errors="replace")
        return refusal(f"{replica.name} answered {response.status}: ", detail, response.status)

    def _judge(self, replica: Replica, error: Exception) -> bool:
        """Note what a failure says about the replica; whether another one may do better."""
        status, now = error.status if isinstance(error, Refusal) else 0, time.monotonic()
        if status == 429 and replica.paused_until > now:
            return True  # busy is not ill, and it said for how long
        if 300 <= status < 500 and status != 429:
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
        found = WorkerError(f"{url} cannot be reached: {words or type(error).__name__}.", REACH)
        found.again = not isinstance(error, NoConnection)  # it was waited for, long enough
        return found
