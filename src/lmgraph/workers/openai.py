"""A worker behind any OpenAI-compatible server (vLLM, LoRAX, Ollama, llama.cpp, cloud APIs): chat completions, streamed.

The one home of the HTTP client for workers. Foreign exceptions become WorkerError or WorkerTimeout here. Several URLs are
replicas: a call goes to the next one in turn, and on to another when a connection fails before anything was answered.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import httpx

from lmgraph.errors import WorkerError, WorkerTimeout
from lmgraph.types import Delta, Message

LINE_LIMIT = 1 << 20
"""characters of one event; a server that sends more without a line end is refused"""

REACH = "Is the server running, and is the URL in graph.yaml right (it ends in /v1)?"


class OpenAIWorker:
    """Talks to `urls` (each ending in /v1) about `model`; the key comes from the environment variable `key_env`."""

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
    ) -> None:
        self._urls = [url.rstrip("/") for url in urls]
        self._turn = itertools.count()
        self._model, self._system, self._temperature, self._timeout = model, system, temperature, timeout_s
        self._key_env, self._environment = key_env, environment
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10)))

    async def stream(self, messages: Sequence[Message], *, max_tokens: int, temperature: float | None = None) -> AsyncIterator[Delta]:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        if self._system:
            turns = [{"role": "system", "content": self._system}, *(t for t in turns if t["role"] != "system")]
        body: dict[str, Any] = {
            "model": self._model,
            "messages": turns,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        heat = temperature if temperature is not None else self._temperature
        if heat is not None:
            body["temperature"] = heat
        first = next(self._turn)
        last: WorkerError | None = None
        for i in range(len(self._urls)):
            url = self._urls[(first + i) % len(self._urls)]
            started = False
            try:
                async with aclosing(self._one(url, body)) as deltas:
                    async for delta in deltas:
                        started = True
                        yield delta
                return
            except WorkerError as error:
                if started:
                    raise
                last = error
        raise last or WorkerError("no URL is configured")

    async def _one(self, url: str, body: dict[str, Any]) -> AsyncGenerator[Delta, None]:
        usage: dict[str, int] = {}
        finish = ""
        try:
            async with self._client.stream("POST", f"{url}/chat/completions", json=body, headers=self._headers()) as response:
                if response.status_code != 200:
                    raise WorkerError(_complaint(url, response.status_code, (await response.aread())[:2000]))
                async with aclosing(_events(response)) as events:
                    async for event in events:
                        if event.get("error"):
                            raise WorkerError(f"{url} answered with an error: {_words(event['error'])}")
                        for name, value in _mapping(event.get("usage")).items():
                            if isinstance(value, int):
                                usage[name] = value
                        choices = event.get("choices")
                        choice = _mapping(choices[0]) if isinstance(choices, list) and choices else {}
                        finish = str(choice.get("finish_reason") or finish)
                        text = _mapping(choice.get("delta")).get("content")
                        if isinstance(text, str) and text:
                            yield Delta(text)
        except httpx.ConnectTimeout as error:  # nobody there: another replica may be
            raise WorkerError(f"{url} cannot be reached: no connection in time.", REACH) from error
        except httpx.TimeoutException as error:
            raise WorkerTimeout(f"{url} did not answer within {self._timeout:g} s.") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise WorkerError(f"{url} cannot be reached: {str(error) or type(error).__name__}.", REACH) from error
        if not finish:
            raise WorkerError(f"{url} ended its stream before the answer was finished.")
        yield Delta(done=True, finish=finish, usage=usage)

    def _headers(self) -> dict[str, str]:
        if not self._key_env:
            return {}
        key = self._environment.get(self._key_env, "").strip()  # a key read from a file often ends in a line end
        if not key:
            raise WorkerError(f"The environment variable {self._key_env} (key of this worker) is not set.", f"export {self._key_env}=...")
        if not (key.isascii() and key.isprintable()):  # never let the HTTP client complain: it would print the key
            raise WorkerError(f"The environment variable {self._key_env} (key of this worker) holds characters that no key has.")
        return {"Authorization": f"Bearer {key}"}

    async def close(self) -> None:
        await self._client.aclose()


def _complaint(url: str, status: int, body: bytes) -> str:
    try:
        detail = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        detail = body.decode(errors="replace")
    return f"{url} answered {status}: {_words(detail)}"


def _words(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


async def _events(response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    """Data events of a server-sent stream (WHATWG HTML section 9.2), as JSON objects, until [DONE]."""
    rest = ""
    async for chunk in response.aiter_text():
        rest += chunk
        *lines, rest = rest.split("\n")
        if len(rest) > LINE_LIMIT:
            raise WorkerError("the worker sent an endless line")
        for line in lines:
            line = line.strip("\r")
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError as error:
                raise WorkerError(f"the worker sent something that is not JSON: {data[:100]!r}") from error
            if isinstance(event, dict):
                yield event
