"""What a request costs Redis, and what asking Redis costs a gateway: processor time, which a busy machine disturbs least.

    .venv/bin/python benchmarks/scale/store_time.py --requests 3000        # starts a redis-server of its own, prints one JSON object

A request of a key with limits, in a conversation, at temperature 0: what the gateway asks for it is done with the gateway's own store
(`lmgraph.store.redis`), in order. Redis' time is its main thread's, system and user, over the requests; the gateway's is this process's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from redis.asyncio import Redis

from lmgraph.errors import StoreError
from lmgraph.store.base import Turn
from lmgraph.store.redis import RedisStore

CALLS = ("take", "hold", "turns", "cached", "keep", "append", "let_go")
"""round trips of a request; turns are two commands, one after another, when the conversation has some"""


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """URL of a Redis of its own, ended afterwards."""
    program = shutil.which("redis-server")
    if program is None:
        raise SystemExit("redis-server is not installed.")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


async def request(store: RedisStore, number: int, answer: str) -> None:
    """What the gateway asks for one request (serve/guard.py, serve/memory.py)."""
    now, holder = time.time(), secrets.token_hex(16)
    conversation = f"conversation-{number // 4}"  # of four turns
    await store.take("key:bench", 1e9, 10**6, now)
    await store.hold("key:bench", holder, 10**6, now + 60, now)
    await store.turns(conversation, 50)
    await store.cached(f"key-{number}")
    await store.keep(f"key-{number}", answer.encode(), 86_400)
    asked = {"messages": [{"role": "user", "content": answer[:300]}]}
    await store.append(Turn(conversation, asked, answer, "math", {"decision": None, "steps": []}, title="bench"))
    await store.let_go("key:bench", holder)


async def used_us(client: Redis) -> float:
    """Processor time of Redis' main thread so far."""
    info = await client.info("cpu")
    return (float(info["used_cpu_sys_main_thread"]) + float(info["used_cpu_user_main_thread"])) * 1e6


async def measure(url: str, requests: int, concurrent: int) -> dict[str, float]:
    store, client = RedisStore(url), Redis.from_url(url)
    while True:
        try:
            await store.ping()
            break
        except StoreError:  # it is starting
            await asyncio.sleep(0.05)
    answer = "A sentence of an answer that is as long as answers are. " * 18  # about 1,000 characters, 250 tokens
    todo = iter(range(requests * 2))

    async def work(until: int) -> None:
        for number in todo:
            await request(store, number, answer)
            if number >= until:
                return

    await asyncio.gather(*(work(requests // 2) for _ in range(concurrent)))  # scripts are loaded, connections are open
    before, own = await used_us(client), time.process_time()
    began = next(todo)
    await asyncio.gather(*(work(requests * 2) for _ in range(concurrent)))
    count = requests * 2 - began
    own_us, redis_us = (time.process_time() - own) * 1e6, await used_us(client) - before
    await store.close()
    await client.aclose()
    return {"redis_us": round(redis_us / count, 1), "gateway_us": round(own_us / count, 1), "requests": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--concurrent", type=int, default=16)
    options = parser.parse_args()
    with redis_server() as url:
        found = asyncio.run(measure(url, options.requests, options.concurrent))
    machine = {"cores": len(os.sched_getaffinity(0)), "load_before": round(os.getloadavg()[0], 2)}
    print(json.dumps({"command": shlex.join(sys.argv), "machine": machine, "calls": list(CALLS), **found}, indent=2))


if __name__ == "__main__":
    main()
