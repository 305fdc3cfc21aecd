"""A worker behind any OpenAI-compatible server (vLLM, LoRAX, Ollama, llama.cpp, cloud APIs): chat completions, streamed.

The one home of the HTTP client for workers. Foreign exceptions become WorkerError or WorkerTimeout here. Several URLs are
replicas: a call goes to the next one in turn, and on to another when a connection fails before anything was answered.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import httpx

from lmgraph.errors import WorkerError, WorkerTimeout
from lmgraph.types import Delta, Message

LINE_LIMIT = 1 << 20
"""characters of one event; a server that sends more without a line end is refused"""


class OpenAIWorker:
    """Talks to `urls` (each ending in /v1) about `model`; the key comes from the environment variable `key_env`."""

    def __init__(self, urls: Sequence[str], model: str, *, system: str = "", key_env: str = "", timeout_s: float = 120,
                 temperature: float | None = None, environment: Mapping[str, str] = os.environ) -> None:
        self._urls = [url.rstrip("/") for url in urls]
        self._turn = itertools.count()
        self._model, self._system, self._temperature, self._timeout = model, system, temperature, timeout_s
        self._key_env, self._environment = key_env, environment
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10)))

    async def stream(self, messages: Sequence[Message], *, max_tokens: int, temperature: float | None = None) -> AsyncIterator[Delta]:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        if self._system:
            turns = [{"role": "system", "content": self._system}, *(t for t in turns if t["role"] != "system")]
        body: dict[str, Any] = {"model": self._model, "messages": turns, "max_tokens": max_tokens, "stream": True,
                                "stream_options": {"include_usage": True}}
        heat = temperature if temperature is not None else self._temperature
        if heat is not None:
            body["temperature"] = heat
        first = next(self._turn)
        last: WorkerError | None = None
        for i in range(len(self._urls)):
            url = self._urls[(first + i) % len(self._urls)]
            started = False
            try:
                async for delta in self._one(url, body):
                    started = True
                    yield delta
                return
            except WorkerError as error:
                if started:
                    raise
                last = error
        raise last or WorkerError("no URL is configured")

    async def _one(self, url: str, body: dict[str, Any]) -> AsyncIterator[Delta]:
        usage: dict[str, int] = {}
        finish = ""
        try:
            async with self._client.stream("POST", f"{url}/chat/completions", json=body, headers=self._headers()) as response:
                if response.status_code != 200:
                    raise WorkerError(_complaint(url, response.status_code, (await response.aread())[:2000]))
                async for event in _events(response):
                    if "error" in event:
                        raise WorkerError(f"{url} answered with an error: {str(event['error'])[:300]}")
                    for name, value in (event.get("usage") or {}).items():
                        if isinstance(value, int):
                            usage[name] = value
                    for choice in event.get("choices") or ():
                        finish = choice.get("finish_reason") or finish
                        text = (choice.get("delta") or {}).get("content")
                        if isinstance(text, str) and text:
                            yield Delta(text)
        except httpx.TimeoutException as error:
            raise WorkerTimeout(f"{url} did not answer within {self._timeout:g} s.") from error
        except httpx.HTTPError as error:
            raise WorkerError(f"{url} cannot be reached: {error or type(error).__name__}.",
                              "Is the server running, and is the URL in graph.yaml right (it ends in /v1)?") from error
        if not finish:
            raise WorkerError(f"{url} ended its stream before the answer was finished.")
        yield Delta(done=True, finish=finish, usage=usage)

    def _headers(self) -> dict[str, str]:
        if not self._key_env:
            return {}
        key = self._environment.get(self._key_env, "")
        if not key:
            raise WorkerError(f"The environment variable {self._key_env} (key of this worker) is not set.", f"export {self._key_env}=...")
        return {"Authorization": f"Bearer {key}"}

    async def close(self) -> None:
        await self._client.aclose()


def _complaint(url: str, status: int, body: bytes) -> str:
    try:
        detail = json.loads(body)["error"]
        detail = detail.get("message", detail) if isinstance(detail, dict) else detail
    except (ValueError, KeyError, TypeError):
        detail = body.decode(errors="replace")
    return f"{url} answered {status}: {str(detail)[:300]}"


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
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
