"""A worker with known delays: so many slots, a time before the first piece, a pause between pieces. Who has no slot waits in a line.

    python benchmarks/scale/worker.py --slots 8 --first-ms 40 --gap-ms 8        # prints its address; any POST is a chat completion

The answers are the mock's (benchmarks/gateway/upstream.py), so that benchmarks/gateway/load.py checks them as it does there. A plain answer
takes as long as the stream of its 20 pieces.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
from collections import deque
from functools import partial
from pathlib import Path
from typing import cast

import uvloop

sys.path.insert(0, str(Path(__file__).parent.parent / "gateway"))
from upstream import COUNTED, LENGTH, PIECES, PLAIN, STREAM, STREAMS


class Slots:
    """What all connections share."""

    def __init__(self, count: int, first_s: float, gap_s: float) -> None:
        self._free, self.first_s, self.gap_s = count, first_s, gap_s
        self._waiting: deque[Worker] = deque()

    def take(self, worker: Worker) -> None:
        if self._free:
            self._free -= 1
            worker.begin()
        else:
            self._waiting.append(worker)

    def give(self) -> None:
        while self._waiting:
            worker = self._waiting.popleft()
            if not worker.closed:
                worker.begin()
                return
        self._free += 1


class Worker(asyncio.Protocol):
    """One connection, one answer at a time. Pieces are due at times counted from the beginning: a late timer delays none after it."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._rest = b""
        self._writes: list[bytes] = []
        self._began = 0.0
        self._holds = self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self._rest += data
        at = self._rest.find(b"\r\n\r\n")
        if self._writes or at < 0:
            return
        length = LENGTH.search(self._rest, 0, at + 2)
        end = at + 4 + (int(length[1]) if length else 0)
        if len(self._rest) < end:
            return
        body, self._rest = self._rest[at + 4 : end], self._rest[end:]
        stream = STREAM.search(body)
        *pieces, last = STREAMS[COUNTED.search(body) is not None] if stream else (*[b""] * len(PIECES), PLAIN)
        self._writes = [*pieces[:-1], pieces[-1] + last]
        self._slots.take(self)

    def begin(self) -> None:
        """It has a slot."""
        self._holds = True
        self._began = self._loop.time()
        self._loop.call_later(self._slots.first_s, self._write, 0)

    def _write(self, number: int) -> None:
        if self.closed:
            return
        if self._writes[number]:
            self._transport.write(self._writes[number])
        if number + 1 < len(self._writes):
            self._loop.call_at(self._began + self._slots.first_s + (number + 1) * self._slots.gap_s, self._write, number + 1)
            return
        self._writes, self._holds = [], False
        self._slots.give()
        self.data_received(b"")  # what came meanwhile

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._holds:
            self._slots.give()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--first-ms", type=float, default=40.0)
    parser.add_argument("--gap-ms", type=float, default=8.0)
    options = parser.parse_args()
    gc.disable()
    slots = Slots(options.slots, options.first_ms / 1000, options.gap_ms / 1000)
    server = await asyncio.get_running_loop().create_server(partial(Worker, slots), "127.0.0.1", 0, backlog=2048)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
