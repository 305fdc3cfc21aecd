"""A worker behind any OpenAI-compatible server (vLLM, LoRAX, Ollama, llama.cpp, cloud APIs): chat completions, streamed.

The one home of the HTTP client for workers. Foreign exceptions become WorkerError or WorkerTimeout here. Several URLs are replicas
(replicas.py chooses): a call goes on to another one when a replica fails before the first piece of its answer, and never after.
It does not know how an answer is written: reading.py does.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from lmgraph.errors import WorkerError, WorkerTimeout
from lmgraph.types import Delta, Message
from lmgraph.workers.reading import Reading, Refusal, refusal
from lmgraph.workers.replicas import Replica, Replicas, wait_of

CONNECT_S = 10.0
KEPT_S = 4.0
"""how long an idle connection is kept: less than the 5 s after which many servers close theirs, or calls would run into that"""
LINGER_S = 1.0
"""how long a finished answer may take to end its body, so that its connection can be used again; nobody waits for it"""
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

    `timeout_s` bounds the time until the first piece of an answer and between two pieces. `pick(n)`: a random number below n.
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
        environment: Mapping[str, str] = os.environ,
        pick: Callable[[int], int] = random.randrange,
    ) -> None:
        self._replicas = Replicas([url.rstrip("/") for url in urls], pick)
        self._model, self._system, self._temperature, self._timeout = model, system, temperature, timeout_s
        self._key_env, self._environment = key_env, environment
        self._session: aiohttp.ClientSession | None = None
        self._proxies: dict[str, str | None] = {}
        self._ending: set[aiohttp.ClientResponse] = set()

    async def stream(
        self, messages: Sequence[Message], *, max_tokens: int, temperature: float | None = None, options: Mapping[str, Any] | None = None
    ) -> AsyncIterator[Delta]:
        key = self._key()
        body = self._body(messages, max_tokens, temperature, options or {})
        tried: list[Replica] = []
        last: Exception | None = None
        while (replica := self._replicas.choose(time.monotonic(), tried)) is not None:
            tried.append(replica)
            reading = Reading(replica.name)
            response: aiohttp.ClientResponse | None = None
            begun = verdict = False
            since = time.monotonic()
            try:
                response = await self._post(replica, body, key)
                if response.status != 200:
                    raise await self._refusal(replica, response)
                while not reading.over:
                    chunk = await response.content.readany()
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
            except (WorkerError, aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as caught:
                last = self._mapped(replica.name, caught, key)
                verdict = True
                again = self._judge(replica, last)
                if begun or not again:
                    # a ClientResponseError holds the headers that were sent, with the key, and a log might show it
                    raise last from (None if caught is last or isinstance(caught, aiohttp.ClientResponseError) else caught)
                continue
            except asyncio.CancelledError:  # whoever gives up after that long says what a timeout says
                if time.monotonic() - since > 0.9 * self._timeout:
                    self._replicas.fail(replica, time.monotonic())
                raise
            finally:  # no await in here: it also runs when the stream is left early
                self._replicas.release(replica, given_up=not verdict)
                if response is not None:
                    self._part(response, reading.over)
            yield final
            return
        raise last or WorkerError("no URL is configured")

    def states(self) -> list[dict[str, Any]]:
        """How each replica does: url, outstanding, failures, open_until (on the clock of time.monotonic)."""
        return self._replicas.states()

    async def close(self) -> None:
        for response in self._ending:
            response.close()
        self._ending.clear()
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _part(self, response: aiohttp.ClientResponse, over: bool) -> None:
        """Leave a response: at once, or (its answer is over, only the end of its body is to come) a moment after it."""
        if over and not response.content.at_eof():
            self._ending.add(response)
            asyncio.get_running_loop().call_later(LINGER_S, self._end, response)
        else:
            response.close()

    def _end(self, response: aiohttp.ClientResponse) -> None:
        response.close()
        self._ending.discard(response)

    async def _post(self, replica: Replica, body: bytes, key: str) -> aiohttp.ClientResponse:
        if self._session is None:  # here, because it belongs to the loop that runs now
            patience = aiohttp.ClientTimeout(total=None, connect=min(self._timeout, CONNECT_S), sock_read=self._timeout)
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_S)
            self._session = aiohttp.ClientSession(connector=connector, timeout=patience, cookie_jar=aiohttp.DummyCookieJar())
        if replica.url not in self._proxies:  # not aiohttp's trust_env: it asks a thread for every call, and reads ~/.netrc
            self._proxies[replica.url] = _proxy(replica.url)
        headers = {**HEADERS, "Authorization": f"Bearer {key}"} if key else HEADERS
        url, proxy = f"{replica.url}/chat/completions", self._proxies[replica.url]
        return await self._session.post(url, data=body, headers=headers, allow_redirects=False, proxy=proxy)

    def _body(self, messages: Sequence[Message], max_tokens: int, temperature: float | None, options: Mapping[str, Any]) -> bytes:
        turns = [dict(m.raw) if m.raw is not None else {"role": m.role, "content": m.content} for m in messages]
        if self._system:
            turns = [{"role": "system", "content": self._system}, *(t for t in turns if t.get("role") != "system")]
        body: dict[str, Any] = {name: value for name, value in options.items() if name not in OWN}
        body.update(model=self._model, messages=turns, stream=True, stream_options={"include_usage": True})
        if body.get("max_completion_tokens") is None:  # the newer name of the same; servers refuse both together
            body["max_tokens"] = max_tokens
        heat = temperature if temperature is not None else self._temperature
        if heat is not None:
            body["temperature"] = heat
        return json.dumps(body).encode()

    def _key(self) -> str:
        if not self._key_env:
            return ""
        key = self._environment.get(self._key_env, "").strip()  # a key read from a file often ends in a line end
        if not key:
            raise WorkerError(f"The environment variable {self._key_env} (key of this worker) is not set.", f"export {self._key_env}=...")
        if not (key.isascii() and key.isprintable()):  # never let the HTTP client complain: it would print the key
            raise WorkerError(f"The environment variable {self._key_env} (key of this worker) holds characters that no key has.")
        return key

    async def _refusal(self, replica: Replica, response: aiohttp.ClientResponse) -> Refusal:
        body = b""
        while len(body) < 2000 and (chunk := await response.content.read(2000 - len(body))):
            body += chunk
        seconds = wait_of(response.headers.get("Retry-After", ""), time.time())
        if seconds is not None and response.status in ELSEWHERE:
            self._replicas.pause(replica, time.monotonic(), seconds)
        try:
            detail = json.loads(body)["error"]
        except (ValueError, KeyError, TypeError, RecursionError):
            detail = body.decode(errors="replace")
        return refusal(f"{replica.name} answered {response.status}: ", detail, response.status)

    def _judge(self, replica: Replica, error: Exception) -> bool:
        """Note what a failure says about the replica; whether another one may do better."""
        status, now = error.status if isinstance(error, Refusal) else 0, time.monotonic()
        if status == 429 and replica.paused_until > now:
            return True  # busy is not ill, and it said for how long
        if 300 <= status < 500 and status != 429:
            self._replicas.succeed(replica)  # it is well: it refuses this request
            return False
        self._replicas.fail(replica, now)
        return isinstance(error, WorkerError) and (not status or status in ELSEWHERE)

    def _mapped(self, url: str, error: Exception, key: str) -> Exception:
        """A foreign exception as one of ours; ours lose the key, where a server said it back to us."""
        if isinstance(error, WorkerError):
            if key and key in error.message:
                error.message = error.message.replace(key, "***")
                error.args = (error.message,)
            return error
        if isinstance(error, aiohttp.ConnectionTimeoutError):  # nobody there: another replica may be
            return WorkerError(f"{url} cannot be reached: no connection in time.", REACH)
        if isinstance(error, asyncio.TimeoutError):
            return WorkerTimeout(f"{url} did not answer within {self._timeout:g} s.")
        words = str(error).replace(key, "***") if key else str(error)
        if isinstance(error, (aiohttp.ServerDisconnectedError, ConnectionResetError, BrokenPipeError)):
            words = "it closed the connection before its answer was finished"
        elif isinstance(error, aiohttp.ClientPayloadError):
            words = f"its answer broke off, the connection was closed ({words})"
        return WorkerError(f"{url} cannot be reached: {words or type(error).__name__}.", REACH)


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for this URL; none on the way to this machine itself."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:  # no URL: the call will say so
        return None
    if not host or host in ("localhost", "::1") or host.startswith("127.") or proxy_bypass(host):
        return None
    proxies = getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")
