"""Workers that are a base and an adapter on a server: a real llama.cpp, and servers that speak as vLLM and LoRAX are written to."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import xllamacpp
from click.testing import CliRunner

from conftest import say, serving, toy_graph
from lmgraph import adapters, cli, graphfile
from lmgraph.errors import LmgraphError, WorkerError
from lmgraph.graph import WorkerSpec
from lmgraph.train import tiny
from lmgraph.types import Delta, Message
from lmgraph.workers.openai import OpenAIWorker
from lmgraph.workers.reading import Refusal
from lmgraph.workers.survey import Found, survey

HELLO = (Message("user", "hello there"),)
LETTERS = {"grammar": "root ::= [a-z]+"}
"""what the toy says freely are halves of letters, which a stream leaves out"""


@asynccontextmanager
async def opened(*specs: WorkerSpec) -> AsyncIterator[list[OpenAIWorker]]:
    """A worker of each spec."""
    workers = [OpenAIWorker.of(spec) for spec in specs]
    try:
        yield workers
    finally:
        for worker in workers:
            await worker.close()


def ask(*specs: WorkerSpec, **options: Any) -> list[str]:
    """What a worker of each spec answers, one after another in one event loop."""

    async def work() -> list[str]:
        async with opened(*specs) as workers:
            return [await one(worker, **options) for worker in workers]

    return asyncio.run(work())


async def deltas(worker: OpenAIWorker, messages: Sequence[Message] = HELLO, **options: Any) -> list[Delta]:
    return [delta async for delta in worker.stream(messages, **{"max_tokens": 8, "temperature": 0.0, "options": LETTERS, **options})]


async def one(worker: OpenAIWorker, **options: Any) -> str:
    return "".join(delta.text for delta in await deltas(worker, **options))


def spec(dialect: str, url: str | Sequence[str], adapter: str = "", model: str = "toy", **more: Any) -> WorkerSpec:
    urls = (url,) if isinstance(url, str) else tuple(url)
    return WorkerSpec("openai", model, urls=urls, dialect=dialect, adapter=adapter, **{"timeout_s": 60.0, "retries": 0, **more})


# --- a real llama.cpp server ---


def write_adapter(path: Path, base: Path, seed: int) -> Path:
    """A LoRA of the toy that changes what it says."""
    random = np.random.default_rng(seed)
    shapes = {"o_proj": (tiny.WIDTH, tiny.WIDTH), "down_proj": (tiny.INNER, tiny.WIDTH)}
    tensors = {}
    for layer in range(tiny.LAYERS):
        for kind, (inner, outer) in shapes.items():
            tensors[f"blk.{layer}.{kind}.lora_a"] = random.normal(0, 1, (4, inner))
            tensors[f"blk.{layer}.{kind}.lora_b"] = random.normal(0, 1, (outer, 4))
    path.parent.mkdir(parents=True, exist_ok=True)
    adapters.write(path, tensors, base, "", path.stem)
    return path


@contextmanager
def llama_server(base: Path, *loras: Path) -> Iterator[str]:
    """The base URL of a llama.cpp server that has put on every adapter, as it does unless it is told otherwise."""
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.model_alias = {"toy"}
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup, params.fit_params = 512, 1, -1, False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # two would wait for each other where cores are busy
    listed = []
    for path in loras:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = str(path), 1.0
        listed.append(info)
    params.lora_adapters = listed
    server = xllamacpp.Server(params)
    try:
        yield server.listening_address + "/v1"
    finally:
        del server


@pytest.fixture(scope="module")
def loras(toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Adapters math and law of the toy base, in folders of their own."""
    folder = tmp_path_factory.mktemp("loras")
    return write_adapter(folder / "a" / "math.gguf", toy_base, 1), write_adapter(folder / "b" / "law.gguf", toy_base, 2)


@pytest.fixture(scope="module")
def llama(toy_base: Path, loras: tuple[Path, Path]) -> Iterator[str]:
    with llama_server(toy_base, *loras) as url:
        yield url


def said(url: str, *scales: float) -> str:
    """What the server says when it is asked for these scales by hand."""
    body = {"messages": say("hello there"), "max_tokens": 8, "temperature": 0, **LETTERS, "lora": [{"id": i, "scale": scale} for i, scale in enumerate(scales)]}
    text: str = httpx.post(f"{url}/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]["content"]
    return text


def test_one_llama_cpp_server_answers_for_each_node_with_its_adapter_and_with_no_other(llama: str) -> None:
    math, law, base = said(llama, 1, 0), said(llama, 0, 1), said(llama, 0, 0)
    assert len({math, law, base, said(llama, 1, 1)}) == 4, "the adapters change what the toy says"
    nodes = spec("llamacpp", llama, "math"), spec("llamacpp", llama, "law"), spec("llamacpp", llama)
    assert ask(*nodes, *nodes) == [math, law, base] * 2


def test_many_answers_with_different_adapters_do_not_mix(llama: str) -> None:
    wanted = {"math": said(llama, 1, 0), "law": said(llama, 0, 1), "": said(llama, 0, 0)}

    async def work() -> list[tuple[str, str]]:
        async with opened(*(spec("llamacpp", llama, name) for name in wanted)) as workers:
            pairs = list(zip(wanted, workers)) * 4
            return list(zip([name for name, _ in pairs], await asyncio.gather(*(one(worker) for _, worker in pairs))))

    assert all(text == wanted[name] for name, text in asyncio.run(work()))


def test_replicas_that_number_their_adapters_differently_answer_alike(llama: str, toy_base: Path, loras: tuple[Path, Path]) -> None:
    with llama_server(toy_base, *reversed(loras)) as other:
        assert said(other, 1, 0) == said(llama, 0, 1)

        async def work() -> set[str]:
            async with opened(spec("llamacpp", (llama, other), "law")) as [worker]:
                found = {await one(worker) for _ in range(6)}
                assert {state["failures"] for state in worker.states()} == {0}
                return found

        assert asyncio.run(work()) == {said(llama, 0, 1)}


@pytest.mark.parametrize("model, adapter, words", [
    ("toy", "chem", r"has no adapter 'chem'; it has '.*a/math\.gguf', '.*b/law\.gguf'"),
    ("qwen", "law", r"serves '.*toy\.gguf', 'toy', and not the base 'qwen'"),
    ("qwen", "chem", r"serves .* and not the base 'qwen', and it has no adapter 'chem'"),
    ("toy", "gguf", "has no adapter 'gguf'")])
def test_what_a_llama_cpp_server_does_not_have_is_said_with_what_it_has(llama: str, model: str, adapter: str, words: str) -> None:
    with pytest.raises(WorkerError, match=words) as caught:
        ask(spec("llamacpp", llama, adapter, model))
    assert caught.value.message.startswith(llama) and "--alias" in caught.value.hint


def test_a_base_and_an_adapter_go_by_their_files_too(llama: str, toy_base: Path, loras: tuple[Path, Path]) -> None:
    for model, adapter in ((str(toy_base), str(loras[1])), (toy_base.name, "b/law"), (toy_base.stem, "law.gguf")):
        assert ask(spec("llamacpp", llama, adapter, model)) == [said(llama, 0, 1)]


# --- servers that speak as vLLM, LoRAX and llama.cpp are written to ---


class Handler(BaseHTTPRequestHandler):
    """One request: the server's `route` answers it."""

    server: Standin
    protocol_version = "HTTP/1.1"
    timeout = 20
    """seconds after which a connection that says nothing is closed"""

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            self.server.asked.append((self.command, self.path, json.loads(body) if body else None))
        self.server.route(self, *self.server.asked[-1])

    do_GET = do_POST = handle_any

    def answer(self, status: int, body: Any, kind: str = "application/json") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def events(self, *events: Any, done: bool = True) -> None:
        lines = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events] + [b"data: [DONE]\n\n"] * done
        self.answer(200, b"".join(lines), "text/event-stream")

    def log_message(self, *args: object) -> None:
        pass


class Standin(ThreadingHTTPServer):
    """A server on loopback; `asked` is everything it was asked: (method, path, body)."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str, Any]] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> Any:
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()

    def route(self, request: Handler, method: str, path: str, body: Any) -> None:
        raise NotImplementedError

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""

    def times(self, path: str) -> int:
        return sum(asked[1] == path for asked in self.asked)


def chunk(text: str | None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    delta = {} if text is None else {"role": "assistant", "content": text}
    return {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


def missing(words: str, kind: str, status: int) -> dict[str, Any]:
    """An error as vLLM writes it."""
    return {"error": {"message": words, "type": kind, "param": None, "code": status}}


class VLLM(Standin):
    """vLLM's OpenAI server with --enable-lora: `adapters` by name, `files` where adapters lie, `runtime`: it may load while it runs."""

    def __init__(self, base: str = "toy", adapters: Sequence[str] = (), files: Sequence[str] = (), runtime: bool = False, key: str = "") -> None:
        super().__init__()
        self.base, self.adapters, self.files, self.runtime, self.key = base, dict.fromkeys(adapters, "/at/start"), files, runtime, key
        self.loading, self.both = threading.Event(), threading.Event()
        """one is being loaded, has been asked for twice"""
        self.go = threading.Event()
        self.go.set()
        """cleared: loading waits"""

    def route(self, request: Handler, method: str, path: str, body: Any) -> None:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            request.answer(401, {"error": "Unauthorized"})
        elif (method, path) == ("GET", "/v1/models"):
            cards = [{"id": self.base, "root": "/models/base", "parent": None}] + [{"id": n, "root": p, "parent": self.base} for n, p in self.adapters.items()]
            request.answer(200, {"object": "list", "data": [card | {"object": "model", "owned_by": "vllm", "permission": []} for card in cards]})
        elif (method, path) == ("POST", "/v1/load_lora_adapter") and self.runtime:
            self.load(request, **body)
        elif (method, path) == ("POST", "/v1/chat/completions"):
            if body["model"] not in (self.base, *self.adapters):
                request.answer(404, missing(f"The model `{body['model']}` does not exist.", "NotFoundError", 404))
            else:
                usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}}
                request.events(chunk(f"{body['model']} on {self.base}"), chunk(None, "stop"), usage)
        else:
            request.answer(404, {"detail": "Not Found"})

    def load(self, request: Handler, lora_name: str, lora_path: str) -> None:
        if self.loading.is_set():
            self.both.set()
        self.loading.set()
        assert self.go.wait(20)
        with self.lock:
            there = lora_name in self.adapters
            if lora_path in self.files:
                self.adapters.setdefault(lora_name, lora_path)
        if there:
            words = f"The lora adapter '{lora_name}' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True."
            request.answer(400, missing(words, "InvalidUserInput", 400))
        elif lora_path not in self.files:
            request.answer(404, missing(f"Loading lora {lora_name} failed: No adapter found for {lora_path}", "NotFoundError", 404))
        else:
            request.answer(200, f"Success: LoRA adapter '{lora_name}' added successfully.".encode(), "text/plain")


class LoRAX(Standin):
    """LoRAX's router: adapters are fetched for a request; what is wrong with one is said in a stream that has begun, which has no [DONE]."""

    def __init__(self, base: str = "toy", hub: Sequence[str] = (), room: int = 100) -> None:
        super().__init__()
        self.base, self.hub, self.room = base, hub, room

    def route(self, request: Handler, method: str, path: str, body: Any) -> None:
        if (method, path) == ("GET", "/info"):
            request.answer(200, {"model_id": self.base, "model_dtype": "torch.float16", "max_input_length": self.room, "version": "0.1.0"})
        elif (method, path) != ("POST", "/v1/chat/completions"):
            request.answer(404, b"", "text/plain")
        elif not isinstance(body.get("stop", []), list):
            request.answer(422, b"Failed to deserialize the JSON body into the target type: stop: invalid type: string, expected a sequence", "text/plain")
        else:
            adapter, size = "" if body["model"] == self.base else body["model"], len(body["messages"][-1]["content"])
            status, error = 200, {}
            if size >= self.room:
                words = f"Input validation error: `inputs` must have less than {self.room} tokens. Given: {size}"
                status, error = 422, {"error": words, "error_type": "validation"}
            elif adapter and (body.get("adapter_source", "hub"), adapter) not in self.hub:
                words = f"Request failed during generation: Server error: {adapter} is no adapter of {body.get('adapter_source', 'hub')}"
                status, error = 424, {"error": words, "error_type": "generation"}
            text, finish = f"{adapter or 'nothing'} on {self.base}", "content_filter" if body.get("stop") else "length" if "max_tokens" in body else "stop"
            usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
            if not body.get("stream"):
                whole = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}], "usage": usage}
                request.answer(status, error or whole)
            elif error:
                request.events(error, done=False)
            else:
                request.events(chunk(text), chunk(None if finish == "stop" else "", finish, usage=usage), done=False)


class Llama(Standin):
    """llama.cpp's server as far as numbers of adapters go: it says which one it was asked for. `restart` starts it anew with others."""

    def __init__(self, *loras: str) -> None:
        super().__init__()
        self.loras = loras
        self.closing = False
        """the next request finds its connection closed"""

    def restart(self, *loras: str) -> None:
        self.loras, self.closing = loras, True

    def route(self, request: Handler, method: str, path: str, body: Any) -> None:
        if path == "/lora-adapters":
            request.answer(200, [{"id": i, "path": name, "scale": 1.0} for i, name in enumerate(self.loras)])
        elif path == "/props":
            request.answer(200, {"model_path": "/models/toy.gguf", "model_alias": "toy"})
        elif path == "/v1/models":
            request.answer(200, {"object": "list", "data": [{"id": "toy", "object": "model", "owned_by": "llamacpp"}]})
        elif self.closing:
            self.closing = False
            request.close_connection = True
        else:
            scales = {row["id"]: row["scale"] for row in body["lora"]}
            request.events(chunk(" ".join(name for i, name in enumerate(self.loras) if scales.get(i)) or "nothing"), chunk(None, "stop"))


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# --- vLLM ---


def test_a_vllm_is_asked_for_the_adapter_by_its_name() -> None:
    with VLLM(adapters=("law", "bio")) as server:
        assert ask(spec("vllm", server.url, "law"), spec("vllm", server.url, "bio"), spec("vllm", server.url)) == ["law on toy", "bio on toy", "toy on toy"]
        assert [body["model"] for _, path, body in server.asked if path.endswith("completions")] == ["law", "bio", "toy"]
        assert server.times("/v1/models") == 3 and not server.times("/v1/load_lora_adapter")


def test_a_server_is_asked_once_what_it_has() -> None:
    async def work(url: str) -> None:
        async with opened(spec("vllm", url, "law")) as [worker]:
            await asyncio.gather(*(one(worker) for _ in range(10)))
            for _ in range(3):
                await one(worker)

    with VLLM(adapters=("law",)) as server:
        asyncio.run(work(server.url))
        assert server.times("/v1/models") == 1 and server.times("/v1/chat/completions") == 13


def test_an_adapter_is_loaded_once_however_many_ask_for_it() -> None:
    async def work(url: str) -> list[str]:
        async with opened(spec("vllm", url, "law", adapter_path="/adapters/law")) as [worker]:
            return await asyncio.gather(*(one(worker) for _ in range(20)))

    with VLLM(files=("/adapters/law",), runtime=True) as server:
        assert asyncio.run(work(server.url)) == ["law on toy"] * 20
        assert server.times("/v1/load_lora_adapter") == 1
        assert ("POST", "/v1/load_lora_adapter", {"lora_name": "law", "lora_path": "/adapters/law"}) in server.asked


def test_two_gateways_that_load_an_adapter_at_once_both_answer() -> None:
    async def work(server: VLLM) -> list[str]:
        async with opened(*[spec("vllm", server.url, "law", adapter_path="/adapters/law")] * 2) as workers:
            tasks = [asyncio.create_task(one(worker)) for worker in workers]
            assert await asyncio.to_thread(server.both.wait, 20)
            server.go.set()
            return list(await asyncio.gather(*tasks))

    with VLLM(files=("/adapters/law",), runtime=True) as server:
        server.go.clear()
        assert asyncio.run(work(server)) == ["law on toy"] * 2


def test_who_loses_patience_while_an_adapter_is_loaded_does_not_stop_the_others() -> None:
    async def work(server: VLLM) -> str:
        async with opened(spec("vllm", server.url, "law", adapter_path="/adapters/law")) as [worker]:
            first, second = asyncio.create_task(one(worker)), asyncio.create_task(one(worker))
            assert await asyncio.to_thread(server.loading.wait, 20)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            server.go.set()
            return await second

    with VLLM(files=("/adapters/law",), runtime=True) as server:
        server.go.clear()
        assert asyncio.run(work(server)) == "law on toy"
        assert server.times("/v1/load_lora_adapter") == 1


def test_a_worker_that_is_closed_while_an_adapter_is_loaded_stops_waiting_for_it() -> None:
    async def work(server: VLLM) -> None:
        async with opened(spec("vllm", server.url, "law", adapter_path="/adapters/law")) as [worker]:
            answer = asyncio.create_task(one(worker))
            assert await asyncio.to_thread(server.loading.wait, 20)
        with pytest.raises((asyncio.CancelledError, WorkerError)):
            await answer
        server.go.set()

    with VLLM(files=("/adapters/law",), runtime=True) as server:
        server.go.clear()
        asyncio.run(work(server))


def test_an_adapter_that_a_server_lost_when_it_was_started_anew_is_loaded_again() -> None:
    async def work(server: VLLM) -> list[str]:
        async with opened(spec("vllm", server.url, "law", adapter_path="/adapters/law")) as [worker]:
            before = await one(worker)
            server.adapters.clear()
            return [before, await one(worker), await one(worker)]

    with VLLM(files=("/adapters/law",), runtime=True) as server:
        assert asyncio.run(work(server)) == ["law on toy"] * 3
        assert server.times("/v1/load_lora_adapter") == 2 and server.times("/v1/chat/completions") == 4


def test_a_server_that_lists_an_adapter_and_refuses_it_is_not_asked_for_ever() -> None:
    class Odd(VLLM):
        def route(self, request: Handler, method: str, path: str, body: Any) -> None:
            if path.endswith("completions"):
                request.answer(404, missing("The model `law` does not exist.", "NotFoundError", 404))
            else:
                super().route(request, method, path, body)

    with Odd(adapters=("law",)) as server:
        with pytest.raises(Refusal, match="answered 404: The model `law` does not exist"):
            ask(spec("vllm", server.url, "law"))
        assert server.times("/v1/chat/completions") == 2


@pytest.mark.parametrize("options, words", [
    ({}, r"does not load adapters while it runs \('law' is wanted from /adapters/law\): start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
    ({"runtime": True}, "did not load the adapter 'law' from /adapters/law: it answered 404: Loading lora law failed: No adapter found for /adapters/law")])
def test_why_an_adapter_cannot_be_loaded_is_said(options: dict[str, Any], words: str) -> None:
    with VLLM(**options) as server:
        with pytest.raises(WorkerError, match=words) as caught:
            ask(spec("vllm", server.url, "law", adapter_path="/adapters/law"))
        assert "--lora-modules" in caught.value.hint and not server.times("/v1/chat/completions")


def test_an_adapter_that_is_there_later_is_used_then() -> None:
    async def work(server: VLLM) -> str:
        async with opened(spec("vllm", server.url, "law")) as [worker]:
            with pytest.raises(WorkerError, match="has no adapter 'law'; it has none"):
                await one(worker)
            server.adapters["law"] = "/adapters/law"
            return await one(worker)

    with VLLM() as server:
        assert asyncio.run(work(server)) == "law on toy"


def test_a_replica_without_the_adapter_is_passed_over() -> None:
    with VLLM() as without, VLLM(adapters=("law",)) as having:
        assert ask(*[spec("vllm", (without.url, having.url), "law")] * 4) == ["law on toy"] * 4
        assert not without.times("/v1/chat/completions")


def test_the_key_is_shown_wherever_a_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_KEY", "sk-of-the-test")
    with VLLM(files=("/adapters/law",), runtime=True, key="sk-of-the-test") as server:
        assert ask(spec("vllm", server.url, "law", adapter_path="/adapters/law", key_env="TOY_KEY")) == ["law on toy"]
        monkeypatch.setenv("TOY_KEY", "wrong-key")
        with pytest.raises(Refusal, match=r"answered 401 to GET /v1/models: Unauthorized") as caught:
            ask(spec("vllm", server.url, "law", key_env="TOY_KEY"))
        assert "wrong-key" not in str(caught.value)


@pytest.mark.parametrize("body, words", [
    (b"<html>", "answered GET /v1/models with something that is not JSON: b'<html>'"),
    (b"[]", "does not list what it has as a server of dialect vllm does: expected an object with `data`"),
    (b'{"data": [3]}', "expected a list of objects"), (b" " * (5 << 20), "answered /v1/models with more than 4 MiB")])
def test_what_is_no_listing_is_refused_in_words(body: bytes, words: str) -> None:
    class Odd(Standin):
        def route(self, request: Handler, method: str, path: str, body_: Any) -> None:
            request.answer(200, body)

    with Odd() as server, pytest.raises(WorkerError, match=words):
        ask(spec("vllm", server.url, "law"))


def test_a_server_of_another_dialect_is_recognised() -> None:
    with LoRAX() as server, pytest.raises(Refusal, match="answered 404 to GET /v1/models") as caught:
        ask(spec("vllm", server.url, "law"))
    assert "dialect: vllm" in caught.value.hint


# --- LoRAX ---


def test_a_lorax_is_asked_for_the_adapter_as_its_model() -> None:
    with LoRAX(hub=(("hub", "org/law"), ("local", "/data/bio"))) as server:
        nodes = spec("lorax", server.url, "org/law"), spec("lorax", server.url, "/data/bio", adapter_source="local"), spec("lorax", server.url)
        assert ask(*nodes) == ["org/law on toy", "/data/bio on toy", "nothing on toy"]
        asked = [body for _, path, body in server.asked if path.endswith("completions")]
        assert [body["model"] for body in asked] == ["org/law", "/data/bio", ""] and [body.get("adapter_source") for body in asked] == [None, "local", None]


@pytest.mark.parametrize("whole", [False, True])
def test_options_reach_a_lorax_in_its_own_words(whole: bool) -> None:
    async def work(url: str) -> list[Delta]:
        async with opened(spec("lorax", url, "law", stream=False)) as [worker]:
            return await deltas(worker, options={"stop": "###", "max_completion_tokens": 5}, whole=whole)

    with LoRAX(hub=(("hub", "law"),)) as server:
        assert asyncio.run(work(server.url))[-1] == Delta(done=True, finish="stop", usage={"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5})
        assert server.asked[-1][2]["max_tokens"] == 5 and server.asked[-1][2].get("stream", False) is not whole


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_a_request_is_the_requests_fault_and_not_the_loraxs(stream: bool) -> None:
    async def work(url: str) -> None:
        async with opened(spec("lorax", url, stream=stream)) as [worker]:
            for _ in range(4):
                with pytest.raises(Refusal, match="must have less than 100 tokens") as caught:
                    await deltas(worker, (Message("user", "x" * 100),), whole=True)
                assert caught.value.status == 422 and caught.value.too_long
            assert worker.states()[0]["failures"] == 0
            assert await one(worker) == "nothing on toy"

    with LoRAX() as server:
        asyncio.run(work(server.url))


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_that_one_lorax_cannot_load_is_asked_of_another(stream: bool) -> None:
    with LoRAX() as without, LoRAX(hub=(("hub", "law"),)) as having:
        assert ask(*[spec("lorax", (without.url, having.url), "law", stream=stream)] * 3, whole=True) == ["law on toy"] * 3
        with pytest.raises(Refusal, match="law is no adapter of hub"):
            ask(spec("lorax", without.url, "law", stream=stream), whole=True)


def test_a_lorax_with_another_base_is_refused_before_it_is_asked() -> None:
    with LoRAX("mistral") as server:
        with pytest.raises(WorkerError, match="serves 'mistral', and not the base 'toy'"):
            ask(spec("lorax", server.url, "law"))
        assert not server.times("/v1/chat/completions")


# --- llama.cpp, started anew ---


@pytest.mark.parametrize("after, answer", [(("/a/math.gguf", "/a/law.gguf"), "/a/law.gguf"), (("/a/bio.gguf", "/a/math.gguf", "/b/law.gguf"), "/b/law.gguf"),
                                           (("/a/law.gguf", "/a/math.gguf"), "/a/law.gguf"), (("/a/math.gguf",), None)])
def test_a_llama_cpp_that_was_started_anew_answers_with_the_same_adapter_or_not_at_all(after: tuple[str, ...], answer: str | None) -> None:
    async def work(server: Llama) -> None:
        async with opened(spec("llamacpp", server.url, "law")) as [worker]:
            assert [await one(worker) for _ in range(3)] == ["/a/law.gguf"] * 3
            listed = server.times("/lora-adapters")
            assert listed <= 2, "a connection that is used again is to the same server"
            server.restart(*after)
            if answer is None:
                with pytest.raises(WorkerError, match=r"has no adapter 'law'; it has '/a/math\.gguf'"):
                    await one(worker)
            else:
                assert await one(worker) == answer == await one(worker)
                assert worker.states()[0]["failures"] == 0
            assert server.times("/lora-adapters") > listed

    with Llama("/a/law.gguf", "/a/math.gguf") as server:
        asyncio.run(work(server))


def test_a_llama_cpp_that_is_started_anew_again_and_again_is_given_up() -> None:
    class Restless(Llama):
        def route(self, request: Handler, method: str, path: str, body: Any) -> None:
            if path.endswith("completions"):
                self.loras = self.loras[::-1]
                request.close_connection = True
            super().route(request, method, path, body)

    with Restless("/a/law.gguf", "/a/math.gguf") as server:
        with pytest.raises(WorkerError, match="was started anew with other adapters"):
            ask(spec("llamacpp", server.url, "law"))
        assert server.times("/v1/chat/completions") == 2


# --- through the gateway ---


def worker_text(one: WorkerSpec) -> str:
    named = {"kind": "openai", "urls": list(one.urls), "model": one.model, "dialect": one.dialect, "adapter": one.adapter, "adapter_path": one.adapter_path, "retries": 0}
    return json.dumps({name: value for name, value in named.items() if value != ""})


def graph_of(master: Path, **workers: WorkerSpec) -> str:
    text = toy_graph(master, "WORKER")
    for name in ("math", "law", "health"):
        text = text.replace(f"about {name}, worker: WORKER", f"about {name}, worker: {worker_text(workers[name])}")
    return text


def test_every_node_answers_with_its_adapter_through_the_gateway(toy_master: Path, llama: str, tmp_path: Path) -> None:
    with VLLM(files=("/adapters/law",), runtime=True) as vllm, LoRAX(hub=(("hub", "org/health"),)) as lorax:
        text = graph_of(toy_master, math=spec("llamacpp", llama, "math"), law=spec("vllm", vllm.url, "law", adapter_path="/adapters/law"),
                        health=spec("lorax", lorax.url, "org/health"))
        wanted = {"math": said(llama, 1, 0), "law": "law on toy", "health": "org/health on toy"}
        with serving(text, tmp_path) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            for name, answer in [*wanted.items(), *wanted.items()]:
                options: dict[str, Any] = {"model": f"lmgraph/{name}", "messages": say("hello there"), "max_tokens": 8, "temperature": 0,
                                           "extra_headers": {"Cache-Control": "no-store"}, "extra_body": {**LETTERS, "lora": [{"id": 1, "scale": 1.0}]}}
                found = client.chat.completions.create(**options)
                assert (found.choices[0].message.content, found.model) == (answer, f"lmgraph/{name}")
                pieces = [part.choices[0].delta.content or "" for part in client.chat.completions.create(stream=True, **options) if part.choices]
                assert "".join(pieces) == answer
            routed = client.chat.completions.create(model="lmgraph", messages=say("why court court contract"), max_tokens=8)
            assert routed.choices[0].message.content == "law on toy"
            vllm.adapters.clear()
            vllm.files = ()
            with pytest.raises(openai.APIStatusError) as caught:
                client.chat.completions.create(model="lmgraph/law", messages=say("hello again"))
            assert caught.value.status_code == 502 and "No adapter found for /adapters/law" in caught.value.message
        assert vllm.times("/v1/load_lora_adapter") == 2


# --- looking before anybody asks ---


def given(**workers: WorkerSpec) -> Any:
    nodes = {name: {"token": i, "description": name, "worker": json.loads(worker_text(worker))} for i, (name, worker) in enumerate(workers.items())}
    return graphfile.of_dict({"version": 1, "nodes": nodes, "edges": {"start": ["*"]}})


@pytest.fixture
def nowhere() -> str:
    """A base URL where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def test_a_survey_says_of_every_server_what_it_lacks_and_changes_nothing(nowhere: str) -> None:
    class Waking(Standin):
        def route(self, request: Handler, method: str, path: str, body: Any) -> None:
            request.answer(503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}})

    with VLLM(adapters=("bio",), files=("/adapters/law",), runtime=True) as vllm, LoRAX() as lorax, Waking() as waking:
        found = asyncio.run(survey(given(
            good=spec("vllm", vllm.url, "bio"), bad=spec("vllm", vllm.url, "chem", "qwen"), later=spec("vllm", vllm.url, "law", adapter_path="/adapters/law"),
            down=spec("vllm", (nowhere, vllm.url), "bio"), waking=spec("llamacpp", waking.url, "law"), hub=spec("lorax", lorax.url, "org/law"),
            other=spec("llamacpp", lorax.url, "law"))))
        assert [(one.node, one.url) for one in found] == [
            ("good", vllm.url), ("bad", vllm.url), ("later", vllm.url), ("down", nowhere), ("down", vllm.url), ("waking", waking.url), ("hub", lorax.url), ("other", lorax.url)]
        good, bad, later, down, up, wakes, hub, other = found
        assert good == Found("good", vllm.url) and up == Found("down", vllm.url)
        assert bad.problem.startswith(f"{vllm.url} serves 'toy', and not the base 'qwen', and it has no adapter 'chem'; it has 'bio'.\n") and "--lora-modules" in bad.problem
        assert later.note == "the adapter 'law' is loaded from /adapters/law before the first answer" and not later.problem
        assert down.note.startswith(f"it is not up yet: {nowhere} cannot be reached: ") and wakes.note.endswith("Loading model")
        assert not down.problem and not wakes.problem
        assert hub.note == "whether it can load the adapter 'org/law' shows with the first answer" and not hub.problem
        assert other.problem.startswith(f"{lorax.url} answered 404 to GET /props") and not other.note
        assert {method for method, _, _ in (*vllm.asked, *lorax.asked)} == {"GET"}


def test_a_survey_names_a_missing_key_and_leaves_other_workers_alone() -> None:
    nodes = {"law": {"token": 0, "description": "d", "worker": json.loads(worker_text(spec("vllm", "http://127.0.0.1:9/v1", "law"))) | {"key_env": "NO_SUCH_KEY"}},
             "plain": {"token": 1, "description": "d", "worker": {"kind": "openai", "urls": "http://127.0.0.1:9/v1", "model": "m"}}}
    one, = asyncio.run(survey(graphfile.of_dict({"version": 1, "nodes": nodes, "edges": {"start": ["*"]}})))
    assert one.node == "law" and "NO_SUCH_KEY" in one.problem and "export NO_SUCH_KEY=" in one.problem


def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmgraph.workers.survey.LOOK_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        assert asyncio.run(survey(given(law=spec("vllm", url, "law")))) == [Found("law", url, note=f"it is not up yet: {url} did not answer within 0.3 s")]


def test_check_live_names_every_problem_and_fails(toy_master: Path, tmp_path: Path, nowhere: str) -> None:
    path = tmp_path / "graph.yaml"
    with VLLM(adapters=("bio",)) as server:
        path.write_text(graph_of(toy_master, math=spec("vllm", server.url, "chem"), law=spec("vllm", server.url, "bio"), health=spec("vllm", nowhere, "bio")))
        run = CliRunner().invoke(cli.lmgraph, ["graph", "check", "--graph", str(path), "--live"])
        assert isinstance(run.exception, LmgraphError)
        assert "1 of 3 servers do not have what the graph names:\n  - node math: " in str(run.exception) and "it has 'bio'" in str(run.exception)
        told = CliRunner().invoke(cli.lmgraph, ["graph", "check", "--graph", str(path), "--live", "--json"])
        assert told.exit_code == 2 and json.loads(told.stdout)["problems"][0].startswith(f"node math: {server.url} has no adapter 'chem'")
        server.adapters["chem"] = "/adapters/chem"
        run = CliRunner().invoke(cli.lmgraph, ["graph", "check", "--graph", str(path), "--live"])
        assert run.exit_code == 0 and f"note: node health: it is not up yet: {nowhere}" in run.stdout
        asked = len(server.asked)
        assert CliRunner().invoke(cli.lmgraph, ["graph", "check", "--graph", str(path)]).exit_code == 0
        assert len(server.asked) == asked, "without --live nothing is asked"
    path.write_text(toy_graph(toy_master))
    assert "note: no node names a dialect" in CliRunner().invoke(cli.lmgraph, ["graph", "check", "--graph", str(path), "--live"]).stdout


def test_serve_says_at_its_start_what_is_not_there_and_serves(toy_master: Path, tmp_path: Path, nowhere: str) -> None:
    with VLLM(adapters=("bio",)) as server:
        (tmp_path / "graph.yaml").write_text(
            graph_of(toy_master, math=spec("vllm", server.url, "chem"), law=spec("vllm", server.url, "bio"), health=spec("vllm", nowhere, "bio")))
        command = [sys.executable, "-m", "lmgraph", "serve", "graph.yaml", "--port", "0"]
        with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ | {"LMGRAPH_STORE": "sqlite://"}) as process:
            try:
                assert process.stderr
                lines = [process.stderr.readline() for _ in range(4)]
                with httpx.Client(base_url=lines[0].split(" at ")[1].split("/v1")[0]) as client:
                    assert client.get("/healthz", timeout=60).status_code == 200
            finally:
                process.send_signal(signal.SIGTERM)
                _, rest = process.communicate(timeout=60)
    assert lines[1].startswith(f"Node math cannot be answered by its server now: {server.url} has no adapter 'chem'; it has 'bio'.")
    assert lines[3].startswith(f"Node health: it is not up yet: {nowhere} cannot be reached") and "Traceback" not in rest


def test_add_writes_a_node_with_an_adapter(toy_graph_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["graph", "add", "extra", "--description", "d", "--token", "5", "--url", "http://a:1/v1", "--model", "base", "--dialect", "vllm", "--adapter", "law",
                 "--graph", str(toy_graph_file)]
    assert CliRunner().invoke(cli.lmgraph, arguments).exit_code == 0
    assert graphfile.loads(toy_graph_file.read_text()).nodes["extra"].worker == WorkerSpec("openai", "base", urls=("http://a:1/v1",), dialect="vllm", adapter="law")
    shown = CliRunner().invoke(cli.lmgraph, ["graph", "show", "--graph", str(toy_graph_file)]).stdout
    assert "base + law" in " ".join(shown.split())


