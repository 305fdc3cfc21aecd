"""The measure of a Python gateway: a bare ASGI application that passes bytes through, and nothing else.

    python benchmarks/gateway/bare.py http://127.0.0.1:9000        # the upstream; prints its own address

uvicorn on uvloop and httptools, aiohttp's client: what lmgraph stands on as well. No parsing, no keys, no metrics, no errors of its own.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import uvicorn


class Bare:
    """The application; `upstream` is scheme, host and port."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
        body, more = b"", True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            body, more = body + event.get("body", b""), event.get("more_body", False)
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(), cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
            )
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        async with self._session.post(self._upstream + scope["path"], data=body, headers=headers) as response:
            kind, length = response.headers.get("Content-Type", "").encode(), response.headers.get("Content-Length")
            own = [(b"content-type", kind)]
            if length is not None:
                own.append((b"content-length", length.encode()))
            await send({"type": "http.response.start", "status": response.status, "headers": own})
            if length is not None:
                await send({"type": "http.response.body", "body": await response.read()})
                return
            async for data in response.content.iter_any():
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        Bare(sys.argv[1]), loop="uvloop", http="httptools", lifespan="off", log_level="warning", access_log=False, server_header=False,
        date_header=False,
    )  # fmt: skip
    uvicorn.Server(config).run([listener])


if __name__ == "__main__":
    main()
