"""Workers that are at zero replicas: nobody listens when they are asked, and a server comes, or does not."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from conftest import say, serving, toy_graph
from lmgraph import graphfile
from lmgraph.errors import GraphError, WorkerError, WorkerStarting
from lmgraph.types import Message
from lmgraph.workers.openai import OpenAIWorker

Start = Callable[[], None]
WORDS = b'data: {"choices":[{"index":0,"delta":{"content":"awake"}}]}\n\ndata: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


class Post(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        self.send_response(500 if asked == "fail" else 200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(WORDS)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Start]]:
    """(base URL at which nobody listens yet, what starts the server there)."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free, ExitStack() as stack:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port, and a connection is refused
        port = free.getsockname()[1]

        def start() -> None:
            free.close()
            server = ThreadingHTTPServer(("127.0.0.1", port), Post)
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            for step in (server.server_close, thread.join, server.shutdown):
                stack.callback(step)

        yield f"http://127.0.0.1:{port}/v1", start


def ask(url: str, query: str = "hello", wake: Start | None = None, **options: float) -> str:
    """The answer of one worker; `wake` is called when a connection has been refused."""
    async def work() -> str:
        worker = OpenAIWorker([url], "m", **options)  # type: ignore[arg-type]

        async def answer() -> str:
            return "".join([delta.text async for delta in worker.stream((Message("user", query),), max_tokens=8)])

        try:
            task = asyncio.ensure_future(answer())
            while wake and not worker.states()[0]["failures"]:
                assert not task.done()
                await asyncio.sleep(0)
            if wake:
                wake()
            return await task
        finally:
            await worker.close()

    return asyncio.run(work())


def test_a_worker_that_starts_in_time_answers_although_it_may_wait_less_for_an_answer(asleep: tuple[str, Start]) -> None:
    url, start = asleep
    assert ask(url, wake=start, timeout_s=10, start_timeout_s=60) == "awake"


def test_a_worker_that_does_not_come_is_said_to_be_starting_when_the_time_is_over(asleep: tuple[str, Start]) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerStarting, match=r"takes no connection, also not within the 1\.2 s") as caught:
        ask(asleep[0], start_timeout_s=1.2)
    assert time.monotonic() - began >= 1.2
    assert caught.value.retry_after_s >= 1 and asleep[0] in caught.value.message


def test_without_a_start_timeout_nobody_waits(asleep: tuple[str, Start]) -> None:
    with pytest.raises(WorkerError, match="cannot be reached") as caught:
        ask(asleep[0])
    assert not isinstance(caught.value, WorkerStarting)


def test_a_server_that_is_there_and_fails_is_not_waited_for(asleep: tuple[str, Start]) -> None:
    url, start = asleep
    start()
    began = time.monotonic()
    with pytest.raises(WorkerError, match="answered 500") as caught:
        ask(url, "fail", start_timeout_s=600)
    assert time.monotonic() - began < 60 and not isinstance(caught.value, WorkerStarting)


@pytest.mark.parametrize(("value", "words"), [("-1", "expected at least 0"), ("soon", "expected a whole number or a number")])
def test_a_start_timeout_that_is_no_time_is_refused_with_its_line(value: str, words: str) -> None:
    text = toy_graph(Path("m.gguf"), f"{{kind: openai, model: m, urls: ['http://h/v1'], start_timeout_s: {value}}}")
    with pytest.raises(GraphError, match=rf"line \d+: nodes\.math\.worker\.start_timeout_s: .*{words}"):
        graphfile.loads(text)


def test_a_start_timeout_is_written_back() -> None:
    graph = graphfile.loads(toy_graph(Path("m.gguf"), "{kind: openai, model: m, urls: ['http://h/v1'], start_timeout_s: 90}"))
    assert graphfile.loads(graphfile.dumps(graph)).nodes["math"].worker.start_timeout_s == 90


def test_through_the_gateway_a_sleeping_worker_is_counted_waited_for_and_else_a_503(
        toy_master: Path, tmp_path: Path, asleep: tuple[str, Start]) -> None:
    url, start = asleep
    worker = f"{{kind: openai, model: m, urls: ['{url}'], timeout_s: 20, start_timeout_s: WAIT}}"
    graph = toy_graph(toy_master, worker.replace("WAIT", "1")).replace("law: {token: 1, description: about law, worker: " + worker.replace("WAIT", "1"),
                                                                       "law: {token: 1, description: about law, worker: " + worker.replace("WAIT", "120"))
    assert "start_timeout_s: 120" in graph
    with serving(graph, tmp_path) as address, httpx.Client(base_url=address, timeout=120) as client, ThreadPoolExecutor() as pool:
        late = client.post("/v1/chat/completions", json={"model": "lmgraph/math", "messages": say("hello")})
        assert late.status_code == 503 and late.json()["error"]["code"] == "worker_starting"
        assert int(late.headers["retry-after"]) >= 1
        waiting = pool.submit(client.post, "/v1/chat/completions", json={"model": "lmgraph/law", "messages": say("hello")})
        while not re.search(r'lmgraph_node_active\{node="law"\} 1\.0', client.get("/metrics").text):
            assert not waiting.done(), waiting.result().text
        start()
        assert waiting.result().json()["choices"][0]["message"]["content"] == "awake"
        assert 'lmgraph_node_active{node="law"} 0.0' in client.get("/metrics").text


def test_a_node_with_a_fallback_is_answered_by_it_when_its_worker_does_not_come(
        toy_master: Path, tmp_path: Path, asleep: tuple[str, Start]) -> None:
    graph = toy_graph(toy_master).replace(
        "math: {token: 0, description: about math, worker: {kind: scripted, answers: {'*': 'answer to {}'}}",
        f"math: {{token: 0, description: about math, fallback: law, worker: {{kind: openai, model: m, urls: ['{asleep[0]}'], start_timeout_s: 1, retries: 3}}")
    assert "fallback: law" in graph
    with serving(graph, tmp_path) as address:
        answer = httpx.post(f"{address}/v1/chat/completions", json={"model": "lmgraph/math", "messages": say("hello"), "lmgraph": {"trace": True}}, timeout=60)
    assert answer.headers["x-lmgraph-node"] == "law"
    steps = answer.json()["lmgraph"]["trace"]["steps"]
    assert [step["node"] for step in steps] == ["math", "law"] and steps[0]["attempts"] == 1 and "takes no connection" in steps[0]["error"]
