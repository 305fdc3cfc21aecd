"""What happens when things die: workers that fail in every way behind the gateway, Redis, the gateway itself, silent clients."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import threading
from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from conftest import Address, say, serving, toy_graph
from lmgraph.serve import http as serve_http
from lmgraph.store import open_store
from lmgraph.store.base import ApiKey
from test_store import RedisServer

BEFORE = {"status 500": 502, "status 429": 502, "garbage": 502, "empty": 502, "silence": 504}
"""what a worker does before its first piece -> the gateway's status"""
AMID = ("break", "stall", "half a letter", "error event", "no end")
"""what a worker does after its first piece"""


class Worker(BaseHTTPRequestHandler):
    """Does what the last user message says."""

    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"][-1]["content"]
        self.close_connection = True
        with suppress(OSError):
            self.act(asked)

    def act(self, asked: str) -> None:
        if asked.startswith("status"):
            self.send_response(int(asked.split()[1]))
            self.send_header("content-length", "0")
            self.end_headers()
            return
        if asked == "silence":
            self.server.over.wait()
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        if asked in ("garbage", "empty"):
            self.wfile.write(b"\x00\xff<html>" * 3 if asked == "garbage" else b"")
            return
        self.say("first ")
        if asked == "half a letter":
            self.wfile.write(b'data: {"choices":[{"index":0,"delta":{"content":"\xf0\x9f')
        elif asked == "error event":
            self.wfile.write(b'data: {"error":{"message":"out of memory","code":500}}\n\n')
        elif asked == "stall":
            self.server.over.wait()
        elif asked == "drip for ever":
            while True:  # until the other side is gone
                try:
                    self.say("drop ")
                except OSError:
                    self.server.left.set()
                    return
                self.server.over.wait(0.01)
        elif asked not in AMID:
            for i in range(20):
                self.say(f"{i} ")
                if asked.startswith("slowly"):
                    self.server.over.wait(0.01)
            self.wfile.write(b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n')

    def say(self, text: str) -> None:
        chunk = {"choices": [{"index": 0, "delta": {"content": text}}]}
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, format: str, *arguments: Any) -> None: ...


class Upstream(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Worker)
        self.over, self.left = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    made = Upstream()
    yield made
    made.stop()


def faulty(master: Path, *urls: str, timeout_s: float = 1) -> str:
    """A graph whose node math is the faulty worker, law the same with a fallback to health, which is well."""
    worker = f"{{kind: openai, urls: [{', '.join(urls)}], model: m, retries: 0, timeout_s: {timeout_s}}}"
    text = toy_graph(master, worker)
    text = text.replace("{token: 1, description: about law,", "{token: 1, description: about law, fallback: health,")
    head, _, tail = text.rpartition(f"worker: {worker}")
    return head + "worker: {kind: scripted, answers: {'*': 'health answers'}}" + tail


@pytest.fixture(scope="module")
def address(toy_master: Path, upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    os.environ["LMGRAPH_THREADS"] = "2"
    with serving(faulty(toy_master, upstream.url), tmp_path_factory.mktemp("faults")) as found:
        yield found


@pytest.fixture
def well(address: Address) -> None:
    """Node law has just answered: what failed before is forgotten, and it is asked again before its fallback is."""
    while httpx.post(f"{address}/v1/chat/completions", json={"model": "lmgraph/law", "messages": say("hello")}, timeout=60).headers["x-lmgraph-node"] != "law":
        pass


@pytest.fixture
def client(address: Address) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


# ---------------------------------------------------------------- workers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fault", "status"), BEFORE.items())
def test_a_worker_that_fails_before_its_first_piece_is_a_status(client: openai.OpenAI, fault: str, status: int, stream: bool) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="lmgraph/math", messages=say(fault), stream=stream)
    assert caught.value.status_code == status and caught.value.code in ("worker_error", "worker_timeout") and "math" in caught.value.message


@pytest.mark.usefixtures("well")
@pytest.mark.parametrize("fault", BEFORE)
def test_its_fallback_answers_and_is_named(client: openai.OpenAI, fault: str) -> None:
    raw = client.chat.completions.with_raw_response.create(model="lmgraph/law", messages=say(fault), extra_body={"lmgraph": {"trace": True}})
    answer = raw.parse()
    assert raw.headers["x-lmgraph-node"] == "health" and answer.model == "lmgraph/health"
    assert answer.choices[0].message.content == "health answers"
    steps = (answer.model_extra or {})["lmgraph"]["trace"]["steps"]
    assert [s["node"] for s in steps] == ["law", "health"] and steps[0]["error"] and not steps[1]["error"]
    assert "left alone" not in steps[0]["error"]


def test_a_node_that_fails_again_and_again_is_left_alone_and_its_fallback_answers_at_once(address: Address) -> None:
    """Or each request would wait for what has failed before: the time of a connect, where a host is cut off."""
    with httpx.Client(base_url=address, timeout=60) as http:
        def ask(text: str) -> tuple[str, str]:
            body = {"model": "lmgraph/law", "messages": say(text), "lmgraph": {"trace": True}}
            told = http.post("/v1/chat/completions", json=body).json()
            return told["model"], told["lmgraph"]["trace"]["steps"][0]["error"]

        while "left alone" not in (said := ask("status 500"))[1]:
            assert said[0] == "lmgraph/health" and "answered 500" in said[1]
        assert said[0] == "lmgraph/health"
        while ask("hello") != ("lmgraph/law", ""):  # when its time is over it is tried again
            pass


@pytest.mark.usefixtures("well")
@pytest.mark.parametrize("node", ["math", "law"])
@pytest.mark.parametrize("fault", AMID)
def test_a_stream_that_breaks_ends_with_an_error_and_never_with_a_fake_end(address: Address, fault: str, node: str) -> None:
    body = {"model": f"lmgraph/{node}", "messages": say(fault), "stream": True, "lmgraph": {"conversation": "broken"}}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert answer.status_code == 200 and "[DONE]" not in events
    assert json.loads(events[0])["choices"][0]["delta"]["content"] == "first " and "middle of its answer" in json.loads(events[-1])["error"]["message"]
    assert all("finish_reason" not in e or json.loads(e)["choices"][0]["finish_reason"] is None for e in events[:-1])
    assert httpx.get(f"{address}/v1/history/broken").status_code == 404, "half an answer is no turn"
    with pytest.raises(openai.InternalServerError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0).chat.completions.create(model=f"lmgraph/{node}", messages=say(fault))


def test_a_client_that_leaves_stops_its_worker(address: Address, upstream: Upstream) -> None:
    body = {"model": "lmgraph/math", "messages": say("drip for ever"), "stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    assert upstream.left.wait(30), "the worker would have written for ever"
    while httpx.get(f"{address}/v1/live").json()["nodes"]["math"]["active"]:
        pass


@pytest.mark.parametrize("answered", [False, True])
def test_a_client_that_has_its_whole_answer_has_not_left(monkeypatch: pytest.MonkeyPatch, answered: bool) -> None:
    """ASGI says that the client is gone as soon as a response is over; what is left to do after it (keeping the answer) must be done."""
    monkeypatch.setattr(serve_http, "WATCH_S", 0.0)
    ended: list[str] = []

    async def main() -> None:
        gone = asyncio.Event()

        async def receive() -> dict[str, str]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(event: MutableMapping[str, Any]) -> None:
            if event["type"] == "http.response.body" and not event["more_body"]:
                gone.set()

        async def work() -> None:
            for _ in range(20):  # until the client is watched
                await asyncio.sleep(0)
            if answered:
                await request.respond(200, b"all")
            else:
                gone.set()
            for _ in range(20):
                await asyncio.sleep(0)
            ended.append("work")

        request = serve_http.Request({"method": "POST", "path": "/", "headers": []}, receive, send)
        try:
            await request.while_there(work())
        except serve_http.Gone:
            ended.append("gone")

    asyncio.run(main())
    assert ended == (["work"] if answered else ["gone"])


def test_all_replicas_die_and_come_back(toy_master: Path, tmp_path: Path) -> None:
    replicas = [Upstream(), Upstream()]
    ports = [r.server_address[1] for r in replicas]
    with ExitStack() as stack, serving(faulty(toy_master, *(r.url for r in replicas)), tmp_path) as found:
        http = stack.enter_context(httpx.Client(base_url=found, timeout=60))

        def status() -> int:
            return http.post("/v1/chat/completions", json={"model": "lmgraph/math", "messages": say("hello")}).status_code

        assert status() == 200
        for replica in replicas:
            replica.stop()
        assert status() == 502
        for port in ports:
            stack.callback(Upstream(port).stop)
        while status() != 200:
            pass
        states = http.get("/v1/live").json()["nodes"]["math"]["replicas"]
        assert len(states) == 2 and all("127.0.0.1" in s["url"] for s in states)


# ---------------------------------------------------------------- the gateway and its store


def test_a_gateway_that_is_killed_loses_no_answer_that_was_received_whole(toy_master: Path, upstream: Upstream, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/store.db"
    graph = faulty(toy_master, upstream.url, timeout_s=60)
    received: list[str] = []
    enough = threading.Event()
    with serving(graph, tmp_path, store=store) as found:
        def ask(i: int) -> None:
            body = {"model": "lmgraph/math", "messages": say(f"slowly {i}"), "stream": True, "lmgraph": {"conversation": f"c{i}"}}
            with suppress(httpx.HTTPError), httpx.stream("POST", f"{found}/v1/chat/completions", json=body, timeout=120) as answer:
                if "data: [DONE]" in list(answer.iter_lines()):
                    received.append(f"c{i}")
            if len(received) >= 40:
                enough.set()

        with ThreadPoolExecutor(50) as pool:
            asked = [pool.submit(ask, i) for i in range(200)]
            assert enough.wait(120)
            found.process.kill()
            for future in asked:
                future.result()
    assert 40 <= len(received) < 200, "it was killed while answers were under way"
    with serving(graph, tmp_path, store=store) as found, httpx.Client(base_url=found) as http:
        for name in received:
            turns = http.get(f"/v1/history/{name}").json()["data"]
            assert [t["answer"] for t in turns] == ["first " + "".join(f"{i} " for i in range(20))]
        assert http.post("/v1/chat/completions", json={"model": "lmgraph/math", "messages": say("hello")}).status_code == 200


def test_a_gateway_that_stops_tells_those_whose_answers_take_too_long(toy_master: Path, upstream: Upstream, tmp_path: Path) -> None:
    with serving(faulty(toy_master, upstream.url, timeout_s=600), tmp_path, "--grace", "1") as found, ThreadPoolExecutor(1) as pool:
        def ask() -> httpx.Response:
            return httpx.post(f"{found}/v1/chat/completions", json={"model": "lmgraph/math", "messages": say("silence")}, timeout=60)

        whole = pool.submit(ask)
        while httpx.get(f"{found}/v1/live").json()["nodes"]["math"]["active"] != 1:
            pass
        body = {"model": "lmgraph/math", "messages": say("drip for ever"), "stream": True}
        with httpx.stream("POST", f"{found}/v1/chat/completions", json=body, timeout=60) as answer:
            events = answer.iter_lines()
            assert next(events).startswith("data: ")
            found.process.send_signal(signal.SIGTERM)
            last = [line for line in events if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
        assert whole.result().status_code == 503 and whole.result().json()["error"]["code"] == "stopping"


def test_a_dead_redis_takes_no_answer_with_it_and_is_used_again_when_it_is_back(toy_master: Path, tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    with ExitStack() as stack:
        stack.callback(server.stop)
        http = httpx.Client(base_url=stack.enter_context(serving(toy_graph(toy_master), tmp_path, store=server.url)), timeout=60)
        stack.callback(http.close)

        def chat(name: str) -> httpx.Response:
            body = {"model": "lmgraph/math", "messages": say("hello"), "temperature": 0, "lmgraph": {"conversation": name}}
            return http.post("/v1/chat/completions", json=body)

        assert "lmgraph" not in chat("before").json() and http.get("/v1/history/before").status_code == 200
        assert chat("other").headers["x-lmgraph-cache"] == "hit"
        server.stop()
        during = chat("during")
        assert during.status_code == 200 and during.json()["lmgraph"] == {"recalled": False, "kept": False}
        assert http.get("/readyz").json()["store"] is False and "lmgraph_store_up 0.0" in http.get("/metrics").text
        for method, path in (("DELETE", "/before"), ("GET", "/before"), ("GET", ""), ("GET", "?node=math")):
            gone = http.request(method, f"/v1/history{path}")
            assert gone.status_code == 503 and gone.json()["error"]["code"] == "store_error", "a conversation that cannot be read is there all the same"
        server.start()
        while not http.get("/readyz").json()["store"]:
            pass
        assert "lmgraph" not in chat("after").json() and http.get("/v1/history/after").status_code == 200
        assert "lmgraph_turns_dropped 1.0" in http.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("messages", "notes"), [
    (say("new"), {"recalled": False, "kept": False}),
    ([*say("old"), {"role": "assistant", "content": "yes"}, *say("new")], {"kept": False}),
])
def test_an_answer_says_when_its_turn_is_not_kept_and_when_the_turns_before_are_missing(
        toy_master: Path, tmp_path: Path, messages: list[Any], notes: dict[str, bool], stream: bool) -> None:
    """A store that was never there. Whoever sends the whole conversation misses nothing of it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"redis://127.0.0.1:{free.getsockname()[1]}/0"
    with serving(toy_graph(toy_master), tmp_path, store=nobody) as found, openai.OpenAI(base_url=f"{found}/v1", api_key="x", max_retries=0) as client:
        def ask(**more: Any) -> Any:
            return client.chat.completions.create(model="lmgraph/math", messages=messages, stream=stream, **more)

        def own(answer: Any) -> list[Any]:
            pieces = list(answer) if stream else [answer]
            assert all(piece.choices for piece in pieces)
            return [piece.model_extra["lmgraph"] for piece in pieces if "lmgraph" in (piece.model_extra or {})]

        assert own(ask(extra_body={"lmgraph": {"conversation": "c"}})) == [notes]
        unkept = own(ask(extra_headers={"cache-control": "no-store"}, extra_body={"lmgraph": {"conversation": "c"}}))
        assert unkept == [{"recalled": False}] * ("recalled" in notes), "who wants nothing kept is not told that nothing is"
        with pytest.raises(openai.InternalServerError) as caught:
            client.get("/history/c", cast_to=object)
        assert caught.value.code == "store_error"


def test_a_keys_concurrent_requests_are_counted_over_all_gateways_of_a_redis(toy_master: Path, upstream: Upstream, tmp_path: Path) -> None:
    key, secret = ApiKey.make("ann", concurrent=1)
    server = RedisServer(tmp_path)
    graph = faulty(toy_master, upstream.url, timeout_s=60)
    with ExitStack() as stack:
        stack.callback(server.stop)

        async def add() -> None:
            store = open_store(server.url)
            await store.add_key(key)
            await store.close()

        asyncio.run(add())
        one, other = (
            stack.enter_context(httpx.Client(base_url=stack.enter_context(serving(graph, tmp_path, store=server.url)), timeout=60,
                                             headers={"authorization": f"Bearer {secret}"}))
            for _ in range(2)
        )

        def ask() -> int:
            return other.post("/v1/chat/completions", json={"model": "lmgraph/health", "messages": say("hello")}).status_code

        with one.stream("POST", "/v1/chat/completions", json={"model": "lmgraph/math", "messages": say("drip for ever"), "stream": True}) as answer:
            assert answer.status_code == 200
            assert ask() == 429
        while (status := ask()) != 200:  # until the first gateway has seen that its client left
            assert status == 429


@pytest.mark.parametrize("fault", ["hangs", "full"])
def test_a_redis_that_hangs_or_is_full_takes_no_answer_with_it(toy_master: Path, tmp_path: Path, fault: str) -> None:
    server = RedisServer(tmp_path)
    with ExitStack() as stack:
        stack.callback(server.stop)
        http = httpx.Client(base_url=stack.enter_context(serving(toy_graph(toy_master), tmp_path, store=server.url)), timeout=60)
        stack.callback(http.close)

        def chat(name: str) -> httpx.Response:
            body = {"model": "lmgraph/math", "messages": say("hello"), "lmgraph": {"conversation": name}}
            return http.post("/v1/chat/completions", json=body)

        assert chat("before").status_code == 200
        if fault == "hangs":
            server.process.send_signal(signal.SIGSTOP)
        else:
            with server.client() as redis:
                redis.config_set("maxmemory-policy", "noeviction")
                redis.config_set("maxmemory", 1)
        assert chat("during").status_code == 200
        assert "lmgraph_turns_dropped 1.0" in http.get("/metrics").text
        if fault == "hangs":
            server.process.send_signal(signal.SIGCONT)
        else:
            with server.client() as redis:
                redis.config_set("maxmemory", 0)
        while not http.get("/readyz").json()["store"]:
            pass
        assert chat("after").status_code == 200
        assert http.get("/v1/history/after").status_code == 200 and http.get("/v1/history/during").status_code == 404


def test_clients_that_connect_and_say_nothing_keep_nobody_out(address: Address) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    host, _, port = address.removeprefix("http://").rpartition(":")
    silent: list[socket.socket] = []
    try:
        for _ in range(2000):
            silent.append(socket.create_connection((host, int(port)), timeout=60))
        answer = httpx.post(f"{address}/v1/chat/completions", json={"model": "lmgraph/health", "messages": say("hello")}, timeout=60)
        assert answer.status_code == 200
    finally:
        for one in silent:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert httpx.get(f"{address}/healthz", timeout=60).status_code == 200
