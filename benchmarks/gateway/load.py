"""A load generator: N connections, each asks again as soon as it has its answer. Raw protocol, so that it is never the bottleneck.

    python benchmarks/gateway/load.py http://127.0.0.1:9000 --connections 16 --seconds 5 --stream        # one JSON object

Every answer is checked: status 200, every piece of the mock's text once and in order, [DONE] behind a stream; each hundredth is parsed
whole. A rate counts the answers that ended inside the time; a latency is from writing a request to its answer's last byte.
`--hold` opens that many streams, says `open` when all have begun, and leaves them when its standard input ends.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import re
import sys
import time
from array import array
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop
from upstream import ANSWER, LENGTH, PIECES

NUMBER = "@@@@@@@@@@@@"
"""stands in --extra for a number of each request's own, as long as this"""
PIECE = re.compile(rb"piece-(\d\d)")
NUMBERS = [f"{i:02}".encode() for i in range(len(PIECES))]
DONE = b"data: [DONE]\n\n"
THOROUGH = 100


class Load:
    """What all connections share: the request, and what became of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        address = urlsplit(options.url)
        self.host, self.port = address.hostname or "127.0.0.1", address.port or 80
        question = [{"role": "user", "content": "Which words do you know? Say all of them, in order."}]
        fields = {"model": options.model, "messages": question, "stream": options.stream or options.hold > 0, **json.loads(options.extra)}
        body = json.dumps(fields).encode()
        lines = [
            "POST /v1/chat/completions HTTP/1.1",
            f"Host: {address.netloc}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            *([f"Authorization: Bearer {options.key}"] if options.key else []),
        ]
        self._parts = ("\r\n".join(lines).encode() + b"\r\n\r\n" + body).split(NUMBER.encode())
        self._count = itertools.count(time.time_ns() // 1000 % 10**12)  # no two runs on one store use the same ones
        self.stream: bool = options.stream
        self.left: float = options.requests or float("inf")
        self.latencies = array("d")
        self.answers = 0
        self.wrong = ""
        self.begin, self.stop = 0.0, float("inf")
        self.over = asyncio.Event()

    def request(self) -> bytes:
        return self._parts[0] if len(self._parts) == 1 else (b"%012d" % next(self._count)).join(self._parts)

    def take(self, began: float, answer: bytearray, body: int) -> bool:
        """Count an answer; whether to ask again."""
        now = time.perf_counter()
        if problem := check(answer, body, self.stream, thorough=self.answers % THOROUGH == 0):
            self.fail(f"{problem}: {bytes(answer[:2000])!r}")
        self.answers += 1
        if self.begin <= now < self.stop:
            self.latencies.append(now - began)
        self.left -= 1
        if self.left <= 0 or now >= self.stop:
            self.over.set()
        return not self.over.is_set()

    def fail(self, problem: str) -> None:
        self.wrong = self.wrong or problem
        self.over.set()


class Connection(asyncio.Protocol):
    """One client: it asks, reads its answer to the end, and asks again."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._answer = bytearray()
        self._body = self._end = 0
        self._began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def _ask(self) -> None:
        self._began = time.perf_counter()
        self._transport.write(self._load.request())

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        answer += data
        if not self._body:
            self._body = answer.find(b"\r\n\r\n") + 4
            if self._body < 4:
                self._body = 0
                return
            length = LENGTH.search(answer, 0, self._body - 2)
            self._end = self._body + int(length[1]) if length else 0
        if len(answer) < self._end if self._end else not answer.endswith(b"\r\n0\r\n\r\n"):
            return
        again = self._load.take(self._began, answer, self._body)
        answer.clear()
        self._body = 0
        if again:
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._load.over.is_set():
            self._load.fail(f"the server closed a connection ({error})")


class Holder(asyncio.Protocol):
    """A client that reads the beginning of one stream and stays."""

    def __init__(self, load: Load, begun: asyncio.Future[None]) -> None:
        self._load, self._begun = load, begun
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._load.request())

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if not self._answer.startswith(b"HTTP/1.1 200"):
            self._load.fail(f"no stream: {self._answer[:500]!r}")
        if (self._load.wrong or b"piece-02" in self._answer) and not self._begun.done():
            self._begun.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._load.fail(f"the server closed a stream ({error})")
        if not self._begun.done():
            self._begun.set_result(None)


def check(answer: bytearray, body: int, stream: bool, *, thorough: bool = False) -> str:
    """What is wrong with an answer whose body begins at `body`; '' when nothing is."""
    if not answer.startswith(b"HTTP/1.1 200"):
        return "not 200"
    try:
        data = bytes(answer[body:]) if LENGTH.search(answer, 0, body - 2) else dechunk(answer, body)
        if PIECE.findall(data) != NUMBERS:
            return "not all pieces in order"
        if stream and not data.endswith(DONE):
            return "no [DONE] at the end"
        if thorough and text_of(data, stream) != ANSWER:
            return "another text"
    except (ValueError, LookupError, TypeError) as error:
        return f"unreadable ({error})"
    return ""


def dechunk(answer: bytearray, at: int) -> bytes:
    """The body of a chunked answer. Raises ValueError when it is not whole."""
    parts: list[bytearray] = []
    while True:
        end = answer.index(b"\r\n", at)
        size = int(answer[at:end], 16)
        at = end + 2 + size + 2
        if not size:
            if at != len(answer):
                raise ValueError("something behind the last chunk")
            return b"".join(parts)
        parts.append(answer[end + 2 : at - 2])


def text_of(data: bytes, stream: bool) -> str:
    """The text of an answer, read as a client would."""
    if not stream:
        choice = json.loads(data)["choices"][0]
        return str(choice["message"]["content"]) if choice["finish_reason"] == "stop" else ""
    events = [json.loads(event.removeprefix(b"data: ")) for event in data.removesuffix(DONE).split(b"\n\n") if event.startswith(b"data: ")]
    choices = [event["choices"][0] for event in events if event["choices"]]
    return "".join(c["delta"].get("content") or "" for c in choices) if choices[-1]["finish_reason"] == "stop" else ""


async def measure(load: Load, options: argparse.Namespace) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    load.begin = time.perf_counter() + options.warm
    if not options.requests:
        load.stop = load.begin + options.seconds
        loop.call_later(options.warm + options.seconds + options.patience, load.fail, "an answer did not come in time")
    began = time.perf_counter()
    made = [await loop.create_connection(lambda: Connection(load), load.host, load.port) for _ in range(options.connections)]
    await load.over.wait()
    took = options.seconds if not options.requests else time.perf_counter() - began
    for transport, _ in made:
        transport.abort()
    times = sorted(load.latencies)
    if not times and not load.wrong:
        load.wrong = "no answer inside the time"

    def at(share: float) -> float:
        return round(times[min(len(times) - 1, int(share * len(times)))] * 1000, 3) if times else 0.0

    found = {"rps": round(len(times) / took, 2), "p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": at(1)}
    return {**found, "counted": len(times), "answers": load.answers, "seconds": round(took, 2), "wrong": load.wrong}


async def hold(load: Load, options: argparse.Namespace) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    begun: list[asyncio.Future[None]] = []
    for _ in range(options.hold):
        begun.append(loop.create_future())
        await loop.create_connection(lambda: Holder(load, begun[-1]), load.host, load.port)
    await asyncio.wait_for(asyncio.gather(*begun), options.patience)
    print("open" if not load.wrong else load.wrong, flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    return {"streams": options.hold, "wrong": load.wrong}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="scheme, host and port")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--warm", type=float, default=0.0, help="seconds before that, not counted")
    parser.add_argument("--requests", type=int, default=0, help="this many instead of --seconds")
    parser.add_argument("--hold", type=int, default=0, help="this many open streams instead of either")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--model", default="mock")
    parser.add_argument("--key", default="")
    parser.add_argument("--extra", default="{}", help=f"JSON object: further fields of the body; {NUMBER} becomes a number")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds that the last answers may take")
    options = parser.parse_args()
    gc.disable()
    load = Load(options)
    result = await (hold(load, options) if options.hold else measure(load, options))
    print(json.dumps(result))


if __name__ == "__main__":
    uvloop.run(main())
