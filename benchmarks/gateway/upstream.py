"""A mock OpenAI-compatible server, as fast as Python can be: raw protocol, prepared bytes. It knows no HTTP beyond what clients here send.

    python benchmarks/gateway/upstream.py        # prints its address; any POST is a chat completion

A plain answer is one JSON object; a stream is 20 pieces of the same text, each written in a turn of its own of the event loop, so that they
travel one by one. The model `hold` streams three pieces and then stays silent until the client leaves.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
from collections.abc import Iterator
from typing import Any, cast

import uvloop

PIECES = tuple(f"{'' if i == 0 else ' '}piece-{i:02}" for i in range(20))
ANSWER = "".join(PIECES)
USAGE = {"prompt_tokens": 9, "completion_tokens": len(PIECES), "total_tokens": 9 + len(PIECES)}
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
STREAM = re.compile(rb'"stream": ?true')
COUNTED = re.compile(rb'"include_usage": ?true')
HOLD = re.compile(rb'"model": ?"hold"')


def _event(choices: list[Any], **more: Any) -> bytes:
    head = {"id": "chatcmpl-mock", "object": "chat.completion.chunk", "created": 1, "model": "mock"}
    return b"data: " + json.dumps({**head, "choices": choices, **more}, separators=(",", ":")).encode() + b"\n\n"


def _choice(delta: dict[str, str], finish: str | None = None) -> list[Any]:
    return [{"index": 0, "delta": delta, "finish_reason": finish}]


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _stream(counted: bool) -> tuple[bytes, ...]:
    """What is written, turn by turn."""
    texts = [_chunk(_event(_choice({"content": text} if i else {"role": "assistant", "content": text}))) for i, text in enumerate(PIECES)]
    usage = _event([], usage=USAGE) if counted else b""
    end = _chunk(_event(_choice({}, "stop")) + usage + b"data: [DONE]\n\n") + b"0\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    return (head + texts[0], *texts[1:], end)


def _plain() -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
    whole = {"id": "chatcmpl-mock", "object": "chat.completion", "created": 1, "model": "mock", "choices": [choice], "usage": USAGE}
    body = json.dumps(whole, separators=(",", ":")).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


PLAIN, STREAMS = _plain(), {counted: _stream(counted) for counted in (False, True)}


class Upstream(asyncio.Protocol):
    """One connection, one answer at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._soon = asyncio.get_running_loop().call_soon
        self._rest = b""
        self._writes: Iterator[bytes] | None = None

    def data_received(self, data: bytes) -> None:
        self._rest += data
        while self._writes is None:
            at = self._rest.find(b"\r\n\r\n")
            if at < 0:
                return
            length = LENGTH.search(self._rest, 0, at + 2)
            end = at + 4 + (int(length[1]) if length else 0)
            if len(self._rest) < end:
                return
            body, self._rest = self._rest[at + 4 : end], self._rest[end:]
            if not STREAM.search(body):
                self._transport.write(PLAIN)
                continue
            writes = STREAMS[COUNTED.search(body) is not None]
            if HOLD.search(body):
                self._writes = iter(())
                self._transport.write(b"".join(writes[:3]))
                return
            self._writes = iter(writes)
            self._next()

    def _next(self) -> None:
        assert self._writes is not None
        data = next(self._writes, None)
        if data is None:
            self._writes = None
            self.data_received(b"")  # what came meanwhile
        elif not self._transport.is_closing():
            self._transport.write(data)
            self._soon(self._next)


async def main() -> None:
    gc.disable()
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0, backlog=2048)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
