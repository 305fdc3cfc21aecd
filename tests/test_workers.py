"""Workers: OpenAI-compatible ones against a real llama.cpp server and a server that fails in every way; embedded; scripted."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import xllamacpp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmgraph import execute
from lmgraph.engine import Engine
from lmgraph.errors import EngineError, LmgraphError, QueryError, WorkerError, WorkerTimeout
from lmgraph.graph import Node, WorkerSpec
from lmgraph.types import Delta, Message
from lmgraph.workers.base import Worker
from lmgraph.workers.embedded import EmbeddedWorker, SharedEngine
from lmgraph.workers.openai import OpenAIWorker
from lmgraph.workers.reading import Reading, Refusal
from lmgraph.workers.scripted import ScriptedWorker

KEY = "sk-of-the-test"
HELLO = (Message("user", "hello there"),)
"""what the toy says to this cannot be seen"""
TALK = (Message("system", "from the user"), Message("user", "one"), Message("assistant", "two"), Message("user", "three"))


async def all_of(worker: Worker, messages: Sequence[Message] = HELLO, max_tokens: int = 8, **options: Any) -> list[Delta]:
    return [delta async for delta in worker.stream(messages, max_tokens=max_tokens, **options)]


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def first(n: int) -> int:
    """In place of chance: replicas are tried in the order of the graph."""
    return 0


def ask(*urls: str, messages: Sequence[Message] = HELLO, **options: Any) -> list[Delta]:
    """One answer of an OpenAIWorker."""
    async def work() -> list[Delta]:
        worker = OpenAIWorker(urls, "m", **{"timeout_s": 60, "pick": first, **options})
        try:
            return await all_of(worker, messages)
        finally:
            await worker.close()

    return asyncio.run(work())


# --- a real llama.cpp server ---


@pytest.fixture(scope="module")
def llama(toy_base: Path) -> Iterator[str]:
    """The base URL of a llama.cpp server with the toy model, guarded by KEY."""
    params = xllamacpp.CommonParams()
    params.model.path = str(toy_base)
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup, params.fit_params = 512, 1, -1, False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.api_keys = [KEY]
    server = xllamacpp.Server(params)
    yield server.listening_address + "/v1"
    del server


def test_a_real_server_streams_the_same_answer_as_the_embedded_model(llama: str, toy_base: Path) -> None:
    deltas = ask(llama + "/", messages=TALK, key_env="TOY_KEY", temperature=0.0, environment={"TOY_KEY": KEY})

    async def embedded() -> list[Delta]:
        worker = EmbeddedWorker(SharedEngine(lambda: Engine.open(toy_base, context=512, threads=2)))
        try:
            return await all_of(worker, TALK)
        finally:
            await worker.close()

    same = asyncio.run(embedded())
    assert text_of(deltas) and text_of(deltas) == text_of(same)
    assert [d.done for d in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].finish == same[-1].finish == "length"
    assert deltas[-1].usage["completion_tokens"] == same[-1].usage["completion_tokens"] == 8
    assert deltas[-1].usage["prompt_tokens"] == same[-1].usage["prompt_tokens"] > 0


def test_a_real_server_refuses_a_wrong_key_in_words_and_nobody_prints_the_key(llama: str) -> None:
    with pytest.raises(WorkerError, match=r"answered 401: .*API Key") as caught:
        ask(llama, key_env="TOY_KEY", environment={"TOY_KEY": "wrong-key"})
    assert "wrong-key" not in str(caught.value)


def test_a_key_that_was_read_with_its_line_end_is_still_the_key(llama: str) -> None:
    assert ask(llama, key_env="TOY_KEY", environment={"TOY_KEY": KEY + "\n"})[-1].done


def test_a_missing_key_variable_is_named_with_the_next_command(llama: str) -> None:
    with pytest.raises(WorkerError, match=r"TOY_KEY .* is not set") as caught:
        ask(llama, key_env="TOY_KEY", environment={"OTHER": KEY})
    assert caught.value.hint.startswith("export TOY_KEY=")


@pytest.mark.parametrize("key", ["sekret\nX-Other: 1", "sekret\x00", "sekrét"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_printed(key: str) -> None:
    with pytest.raises(WorkerError, match="TOY_KEY") as caught:
        ask("http://127.0.0.1:9/v1", key_env="TOY_KEY", environment={"TOY_KEY": key})
    assert "sekr" not in str(caught.value)


# --- a server that does what a test wants ---


class Post(BaseHTTPRequestHandler):
    server: Site

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, json.loads(body)))
        self.server.heard.append((self.client_address[1], dict(self.headers.items())))
        self.server.act(self)

    def status(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class KeptPost(Post):
    """Keeps connections; an answer needs a length or chunks."""

    protocol_version = "HTTP/1.1"


class Site(ThreadingHTTPServer):
    """Answers every POST with `act`."""

    daemon_threads = False

    def __init__(self, act: Callable[[Post], None], handler: type[Post]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.act = act
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.heard: list[tuple[int, dict[str, str]]] = []
        """the client's port (one a connection) and headers"""
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Site]]:
    """Start servers; they are stopped after the test."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ExitStack() as stack:
        def start(act: Callable[[Post], None], handler: type[Post] = Post) -> Site:
            site = Site(act, handler)
            thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            for step in (site.server_close, thread.join, site.shutdown):
                stack.callback(step)
            return site

        yield start


@pytest.fixture
def refused() -> str:
    """A base URL where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def event(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    data = {"choices": [{"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}], **more}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
GOOD = event("good ") + event("morning") + event(finish="stop") + DONE


def stream(*pieces: bytes) -> Callable[[Post], None]:
    return lambda post: post.status(200, b"".join(pieces), Content_Type="text/event-stream")


def test_text_usage_and_finish_are_passed_on(serve: Callable[..., Site]) -> None:
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 2, "details": {"cached": 1}, "note": null}}\n\n'
    site = serve(stream(b": ping\r\n\r\n", event(), event("good ", error=None), event("morning"), event(finish="length"), usage, DONE))
    assert ask(site.url) == [Delta("good morning"),
                             Delta(done=True, finish="length", usage={"prompt_tokens": 11, "completion_tokens": 2})]


def test_what_the_server_is_asked(serve: Callable[..., Site]) -> None:
    site = serve(stream(GOOD))
    ask(site.url, temperature=0.5)
    assert site.asked == [("/v1/chat/completions", {
        "model": "m", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 8, "stream": True,
        "stream_options": {"include_usage": True}, "temperature": 0.5})]
    ask(site.url)
    assert "temperature" not in site.asked[1][1]


def test_the_system_prompt_of_the_node_is_put_first_and_is_the_only_one(serve: Callable[..., Site]) -> None:
    site = serve(stream(GOOD))

    async def work() -> None:
        for system in ("of the node", ""):
            worker = OpenAIWorker([site.url], "m", system=system)
            await all_of(worker, TALK, temperature=0.0)
            await worker.close()

    asyncio.run(work())
    rest = [("user", "one"), ("assistant", "two"), ("user", "three")]
    heard = [[(m["role"], m["content"]) for m in body["messages"]] for _, body in site.asked]
    assert heard == [[("system", "of the node"), *rest], [("system", "from the user"), *rest]]


def test_letters_that_are_cut_between_packets_stay_whole(serve: Callable[..., Site]) -> None:
    raw = 'data: {"choices": [{"delta": {"content": "é法😀"}, "finish_reason": "stop"}]}\n\n'.encode()

    def act(post: Post) -> None:
        post.status(200)
        for i in range(len(raw)):
            post.wfile.write(raw[i:i + 1])
            post.wfile.flush()

    assert text_of(ask(serve(act).url)) == "é法😀"


@pytest.mark.parametrize("status, body, words", [
    (401, b'{"error": {"message": "Incorrect API key", "type": "auth"}}', "answered 401: Incorrect API key"),
    (404, b'{"error": "model not found"}', "answered 404: model not found"),
    (500, b"Internal Server Error", "answered 500: Internal Server Error"),
    (502, b"\xff\xfe", "answered 502"), (503, b"", "answered 503"), (400, b'{"error": {}}', "answered 400"), (400, b"[1]", "answered 400"),
    (307, b"", "answered 307")])
def test_a_status_that_is_no_success_is_said_with_the_servers_words(
        serve: Callable[..., Site], status: int, body: bytes, words: str) -> None:
    site = serve(lambda post: post.status(status, body))
    with pytest.raises(WorkerError) as caught:
        ask(site.url)
    assert caught.value.message.startswith(f"{site.url} {words}")


def test_a_refused_connection_names_the_url_and_a_hint(refused: str) -> None:
    with pytest.raises(WorkerError, match="cannot be reached: ") as caught:
        ask(refused)
    assert refused in caught.value.message and "/v1" in caught.value.hint


@pytest.mark.parametrize("url", ["http://127.0.0.1:port/v1", "http://[/v1", "http://"])
def test_a_url_that_is_no_address_is_a_worker_error(url: str) -> None:
    with pytest.raises(WorkerError, match="cannot be reached"):
        ask(url)


@pytest.mark.parametrize("before", [None, event("good ")], ids=["before the first byte", "in the middle"])
def test_a_slow_answer_is_a_timeout_that_names_the_limit(serve: Callable[..., Site], before: bytes | None) -> None:
    given_up = threading.Event()

    def act(post: Post) -> None:
        if before:
            stream(before)(post)
        given_up.wait(20)

    site = serve(act)
    try:
        with pytest.raises(WorkerTimeout, match=r"did not answer within 0\.3 s"):
            ask(site.url, timeout_s=0.3)
    finally:
        given_up.set()


@pytest.mark.parametrize("act, words", [
    (stream(event("good ")), "ended its stream before"),
    (stream(event("good "), DONE), "ended its stream before"),
    (stream(), "ended its stream before"),
    (stream(event("good "), b'data: {"error": {"message": "too long", "code": 400}}\n\n'), "answered with an error: too long"),
    (stream(event("good "), b'event: error\ndata: {"message": "out of memory"}\n\n'), "answered with an error: out of memory"),
    (stream(event("good "), b"event: error\ndata: out of memory\n\n"), "answered with an error: out of memory"),
    (stream(event("good "), event(finish="stop"), "data: {\"é".encode()[:-1]), "not JSON"),
    (stream(event("good "), event(finish="stop"), b"\xc3"), "not an event"),
    (stream(event("good "), event(finish="stop"), b"<html>\n"), "not an event: '<html>'"),
    (stream(b"<html>busy</html>"), "not an event"),
    (stream(b"data: {\ndata: 3\n\n"), "not JSON"),
    (stream(b'data: "\xff"\n\n'), "not JSON"),
    (stream(b"data: " + b"[" * 200_000 + b"\n\n"), "not JSON"),
    (stream((b"data: {" + b"x" * 1000 + b"\n") * 2000), "endless event"),
    (stream(b'{"error": {"message": "no such model"}}'), "answered with an error: no such model"),
    (stream(b'{"choices": ['), "not JSON"),
    (stream(b'{"id": 3}'), "ended its stream before"),
    (stream(event("a"), b'data: {"choices": [{"index": 1, "delta": {"content": "b"}}]}\n\n', event(finish="stop"), DONE), "ended its stream before"),
    (lambda post: post.status(200, event("good "), Content_Length="1000"), "cannot be reached: .*closed"),
    (lambda post: post.status(200, b"\x00\x01", Content_Encoding="gzip"), "cannot be reached: "),
    (stream(event("good "), b"data: <html>\n\n"), "not JSON: '<html>'"),
    (stream(event("good "), b'data: {"error": {"message": "out of memory", "code": 500}}\n\n'), "answered with an error: out of memory"),
    (stream(event("good "), b'data: {"error": "out of memory"}\n\n'), "answered with an error: out of memory")])
def test_a_stream_that_breaks_off_is_a_worker_error(serve: Callable[..., Site], act: Callable[[Post], None], words: str) -> None:
    with pytest.raises(WorkerError, match=words):
        ask(serve(act).url)


LINES = {"choices": [{"index": 0, "delta": {"content": "good "}, "finish_reason": None}]}


@pytest.mark.parametrize("raw", [
    GOOD.replace(b"\n", b"\r\n"),
    b"\xef\xbb\xbf" + GOOD,
    GOOD.replace(b"\n\n", b"\n"),
    GOOD.rstrip(b"\n"),
    GOOD.replace(DONE, b""),
    GOOD.replace(b"data: ", b"data:"),
    b": ping\n\n: ping\n" + GOOD.replace(b"data: ", b": ping\nid: 7\nevent: message\nretry: 5\nother\ndata: "),
    b"data:\n\ndata: " + json.dumps(LINES, indent=2).replace("\n", "\ndata: ").encode() + b"\n\n" + event("morning", "stop"),
    GOOD + b"data: <html>\n\n",
], ids=["CRLF", "byte order mark", "no blank lines", "no last line end", "no [DONE]", "no space", "comments and fields", "several lines", "after [DONE]"])
def test_a_stream_may_be_written_in_many_ways(serve: Callable[..., Site], raw: bytes) -> None:
    deltas = ask(serve(stream(raw)).url)
    assert text_of(deltas) == "good morning" and deltas[-1].finish == "stop"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40)
@given(st.data())
def test_where_packets_are_cut_makes_no_difference(data: st.DataObject) -> None:
    raw = b": ping\r\n\r\n" + event("gé法😀d ") + b'data: {"choices":\r\ndata: [{"delta": {"content": "x"}}]}\r\n\r\n' + event(finish="stop") + DONE
    cuts = sorted(data.draw(st.sets(st.integers(1, len(raw) - 1), max_size=12)))
    reading, deltas = Reading("u"), []
    for a, b in zip([0, *cuts], [*cuts, len(raw)]):
        assert not reading.over or a > len(raw) - 2
        deltas += reading.feed(raw[a:b])
    assert text_of(deltas) == "gé法😀d x" and not any(d.choices for d in deltas) and reading.over and reading.last().finish == "stop"


@settings(deadline=None)
@given(st.lists(st.text(max_size=8), max_size=12), st.integers(0, 3), st.booleans())
def test_chunks_that_differ_in_their_text_only_say_what_each_of_them_says(texts: list[str], other: int, ascii_only: bool) -> None:
    def chunk(text: str, **more: Any) -> bytes:
        said = {"id": "1", "choices": [{"index": 0, "delta": {"content": text, **more}, "finish_reason": None}]}
        return b"data: " + json.dumps(said, separators=(",", ":"), ensure_ascii=ascii_only).encode(errors="replace") + b"\n\n"

    texts = [t.encode(errors="replace").decode() for t in texts]
    strange = chunk("", content_2='","content":"not this') if other else b""
    raw = b"".join([*map(chunk, texts[:other]), strange, *map(chunk, texts[other:]), event(finish="stop"), DONE])
    reading = Reading("u")
    assert text_of([d for line in raw.splitlines(keepends=True) for d in reading.feed(line)]) == "".join(texts)
    assert reading.last().finish == "stop"


def test_half_a_surrogate_pair_is_nothing_that_can_be_passed_on(serve: Callable[..., Site]) -> None:
    raw = rb'data: {"choices": [{"delta": {"content": "\ud83d\ude00 \uD83d"}, "finish_reason": "stop"}]}' + b"\n\n"
    assert text_of(ask(serve(stream(raw)).url)) == "😀 ?"


def test_an_answer_that_is_not_streamed_is_understood(serve: Callable[..., Site]) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for message, finish, wanted in [
            ({"role": "assistant", "content": "hi", "refusal": None}, "length", [Delta("hi")]),
            ({"role": "assistant", "content": "hi"}, None, [Delta("hi")]),
            ({"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls", [Delta(choices=({
                "index": 0, "finish_reason": "tool_calls",
                "delta": {"role": "assistant", "content": None, "tool_calls": [{"index": 0, **call}]}},))])]:
        body = {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": {"prompt_tokens": 3}}
        site = serve(lambda post, body=body: post.status(200, json.dumps(body, indent=1).encode(), Content_Type="application/json"))
        assert ask(site.url) == [*wanted, Delta(done=True, finish=finish or "stop", usage={"prompt_tokens": 3})]


@pytest.mark.parametrize("choices, text", [
    ([{"index": 1, "delta": {"content": "b"}, "finish_reason": "stop"}], ""),
    ([{"index": 0, "delta": {"content": "a"}}, {"index": 1, "delta": {"content": "b"}, "finish_reason": "stop"}], "a"),
    ([{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]}}], ""),
    ([{"index": 0, "delta": {"function_call": {"name": "f"}}}], ""),
    ([{"index": 0, "delta": {"refusal": "no"}}], ""),
    ([{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [{"token": "a", "logprob": -0.1}]}}], "a")],
    ids=["second choice", "two choices", "tool calls", "function call", "refusal", "logprobs"])
def test_choices_are_passed_on_where_the_text_of_the_first_is_not_all(serve: Callable[..., Site], choices: list[Any], text: str) -> None:
    site = serve(stream(b"data: " + json.dumps({"choices": choices}).encode() + b"\n\n", event(finish="stop"), DONE))
    assert ask(site.url)[0] == Delta(text, choices=tuple(choices))


def test_choices_are_left_out_where_the_text_is_all(serve: Callable[..., Site]) -> None:
    plain = {"index": 0, "delta": {"role": "assistant", "content": "a", "refusal": None, "tool_calls": []}, "logprobs": None, "finish_reason": None}
    assert ask(serve(stream(b"data: " + json.dumps({"choices": [plain]}).encode() + b"\n\n", event(finish="stop"), DONE)).url)[0] == Delta("a")


def test_messages_that_are_more_than_text_and_options_go_to_the_server_as_they_are(serve: Callable[..., Site]) -> None:
    site = serve(stream(GOOD))
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}], "name": "me"}
    options = {"top_p": 0.5, "stop": ["x"], "tools": [{"type": "function"}], "n": 2, "model": "other", "stream": False, "messages": []}

    async def work() -> None:
        worker = OpenAIWorker([site.url], "m", system="of the node")
        messages = (Message("system", "s", {"role": "system", "content": "s", "name": "x"}), Message("user", "look", picture))
        await all_of(worker, messages, options=options)
        await all_of(worker, HELLO, options={"max_completion_tokens": 5})
        await worker.close()

    asyncio.run(work())
    assert site.asked[0][1] == {
        "model": "m", "messages": [{"role": "system", "content": "of the node"}, picture], "max_tokens": 8, "stream": True,
        "stream_options": {"include_usage": True}, "top_p": 0.5, "stop": ["x"], "tools": [{"type": "function"}], "n": 2}
    assert "max_tokens" not in site.asked[1][1] and site.asked[1][1]["max_completion_tokens"] == 5


def test_a_step_passes_options_on(serve: Callable[..., Site]) -> None:
    site = serve(stream(GOOD))
    node = Node("n", 0, "d", WorkerSpec("openai", model="m", urls=(site.url,)))

    async def work() -> None:
        worker = OpenAIWorker([site.url], "m")

        async def opened(node: Node) -> Worker:
            return worker

        assert [d async for d in execute.run(node, [], HELLO, opened, options={"seed": 7})]
        await worker.close()

    asyncio.run(work())
    assert site.asked[0][1]["seed"] == 7


# --- keys ---


def test_a_key_that_a_server_says_back_is_not_in_the_error(serve: Callable[..., Site]) -> None:
    key = {"key_env": "K", "environment": {"K": KEY}}
    said = f"Incorrect API key {KEY}"
    for act in (lambda post: post.status(401, json.dumps({"error": said}).encode()), stream(b"data: " + json.dumps({"error": said}).encode() + b"\n\n"),
                lambda post: post.wfile.write(f"{KEY}\r\n\r\n".encode())):
        with pytest.raises(WorkerError) as caught:
            ask(serve(act).url, **key)
        assert KEY not in "".join(traceback.format_exception(caught.value)) and KEY not in repr(caught.value.__cause__)


def test_a_redirect_is_not_followed_and_no_other_host_gets_the_key(serve: Callable[..., Site]) -> None:
    other = serve(stream(GOOD))
    site = serve(lambda post: post.status(308, Location=other.url + "/chat/completions"))
    with pytest.raises(WorkerError, match="answered 308"):
        ask(site.url, other.url, key_env="K", environment={"K": KEY})
    assert not other.asked and site.heard[0][1]["Authorization"] == f"Bearer {KEY}"


def test_a_password_in_a_url_is_neither_shown_nor_said(refused: str) -> None:
    with pytest.raises(WorkerError, match="cannot be reached") as caught:
        ask(refused.replace("//", "//me:secret@"))
    assert "secret" not in str(caught.value)


# --- connections ---


def test_a_connection_is_used_again(serve: Callable[..., Site]) -> None:
    def act(post: Post) -> None:
        post.send_response(200)
        post.send_header("Transfer-Encoding", "chunked")
        post.end_headers()
        post.wfile.write(b"%x\r\n%s\r\n" % (len(GOOD), GOOD))
        answered.wait(20)
        post.wfile.write(b"0\r\n\r\n")
        ended.set()

    answered, ended = threading.Event(), threading.Event()
    site = serve(act, KeptPost)

    async def work() -> None:
        worker = OpenAIWorker([site.url], "m")
        await all_of(worker)  # does not wait for the end of the body
        answered.set()
        assert await asyncio.to_thread(ended.wait, 20)
        await all_of(worker)
        await worker.close()

    asyncio.run(work())
    assert len(site.heard) == 2 and len({port for port, _ in site.heard}) == 1


@pytest.mark.parametrize(("always_stream", "whole", "streamed"), [(True, True, True), (True, False, True), (False, False, True), (False, True, False)])
def test_an_answer_is_asked_for_whole_only_where_the_graph_and_the_client_want_it_so(serve: Callable[..., Site], always_stream: bool,
                                                                                     whole: bool, streamed: bool) -> None:
    answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "good morning"}, "finish_reason": "length"}], "usage": {"prompt_tokens": 3}}
    site = serve(stream(GOOD) if streamed else stream(json.dumps(answer).encode()))

    async def work() -> list[Delta]:
        worker = OpenAIWorker([site.url], "m", always_stream=always_stream)
        try:
            return await all_of(worker, whole=whole)
        finally:
            await worker.close()

    deltas = asyncio.run(work())
    assert text_of(deltas) == "good morning" and deltas[-1].finish == ("stop" if streamed else "length")
    assert site.asked[0][1].get("stream", False) is streamed and ("stream_options" in site.asked[0][1]) is streamed


def test_a_proxy_of_the_environment_is_used_but_not_for_this_machine(serve: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, site = serve(stream(GOOD)), serve(stream(GOOD))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "inside.invalid")
    monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//me:pw@"))
    assert text_of(ask("http://worker.invalid/v1")) == text_of(ask(site.url)) == "good morning"
    assert [path for path, _ in proxy.asked] == ["http://worker.invalid/v1/chat/completions"] and len(site.asked) == 1
    assert proxy.heard[0][1]["Proxy-Authorization"].startswith("Basic ")
    with pytest.raises(WorkerError, match="cannot be reached"):
        ask("http://inside.invalid/v1")
    assert len(proxy.asked) == 1


def test_a_server_that_only_says_that_it_lives_runs_into_the_timeout(serve: Callable[..., Site]) -> None:
    left = threading.Event()

    def act(post: Post) -> None:
        post.status(200, b": ping\n\n")
        try:
            while not left.wait(0.02):
                post.wfile.write(b": ping\n\n")
        except OSError:
            left.set()

    with pytest.raises(WorkerTimeout, match="did not answer within"):
        ask(serve(act).url, timeout_s=0.4)
    assert left.wait(20)


def test_a_call_that_is_cancelled_before_its_first_piece_closes_its_connection(serve: Callable[..., Site]) -> None:
    came, closed = threading.Event(), threading.Event()

    def act(post: Post) -> None:
        came.set()
        if post.connection.recv(1) == b"":
            closed.set()

    site = serve(act)

    async def work() -> None:
        worker = OpenAIWorker([site.url], "m")
        task = asyncio.create_task(all_of(worker))
        assert await asyncio.to_thread(came.wait, 20)
        assert worker.states()[0]["outstanding"] == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(closed.wait, 20)
        assert worker.states() == [{"url": site.url, "outstanding": 0, "failures": 0, "open_until": 0.0}]
        await worker.close()

    asyncio.run(work())


def test_an_endless_line_is_refused_and_the_connection_is_closed(serve: Callable[..., Site]) -> None:
    closed = threading.Event()

    def act(post: Post) -> None:
        post.status(200, b"data: ")
        try:
            while True:
                post.wfile.write(b"x" * 65536)
        except OSError:
            closed.set()

    with pytest.raises(WorkerError, match="endless line"):
        ask(serve(act).url)
    assert closed.wait(20)


@pytest.mark.parametrize("odd", [
    b"null", b"[]", b"3", b'{"choices": null}', b'{"choices": 3}', b'{"choices": [null]}', b'{"choices": ["x"]}',
    b'{"choices": [{"delta": "x"}]}', b'{"choices": [{"delta": {"content": 3}}]}', b'{"choices": [{"delta": null, "finish_reason": null}]}',
    b'{"usage": [1]}', b'{"usage": null}'])
def test_an_event_of_an_odd_shape_is_passed_over(serve: Callable[..., Site], odd: bytes) -> None:
    assert text_of(ask(serve(stream(b"data: " + odd + b"\n\n", GOOD)).url)) == "good morning"


def test_leaving_a_stream_early_closes_its_connection(serve: Callable[..., Site]) -> None:
    closed = threading.Event()

    def act(post: Post) -> None:
        stream(event("good "))(post)
        if post.connection.recv(1) == b"":
            closed.set()

    site = serve(act)

    async def work() -> None:
        worker = OpenAIWorker([site.url], "m")
        answer = worker.stream(HELLO, max_tokens=8)
        assert await anext(answer) == Delta("good ")
        await answer.aclose()  # type: ignore[attr-defined]
        assert await asyncio.to_thread(closed.wait, 20)
        await worker.close()

    asyncio.run(work())


# --- replicas ---


def test_replicas_take_turns(serve: Callable[..., Site]) -> None:
    sites = [serve(stream(GOOD)) for _ in range(2)]

    async def work() -> None:
        worker = OpenAIWorker([s.url for s in sites], "m", pick=first)
        for counts in ((1, 0), (1, 1), (2, 1), (2, 2)):
            await all_of(worker)
            assert tuple(len(s.asked) for s in sites) == counts
        await worker.close()

    asyncio.run(work())


def test_a_replica_that_refuses_is_passed_over(serve: Callable[..., Site], refused: str) -> None:
    bad, good = serve(lambda post: post.status(503)), serve(stream(GOOD))
    assert text_of(ask(refused, bad.url, good.url)) == "good morning"
    assert len(bad.asked) == len(good.asked) == 1


def deafened(stack: ExitStack) -> str:
    """The URL of a listener that answers no call: its queue is full."""
    deaf = stack.enter_context(socket.socket())
    deaf.bind(("127.0.0.1", 0))
    deaf.listen(0)
    for _ in range(4):
        waiting = stack.enter_context(socket.socket())
        waiting.setblocking(False)
        waiting.connect_ex(deaf.getsockname())
    return f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a listener that answers no call: a full queue does that on Linux")
def test_a_replica_that_never_takes_the_call_is_passed_over(serve: Callable[..., Site]) -> None:
    good = serve(stream(GOOD))
    with ExitStack() as stack:
        url = deafened(stack)
        assert text_of(ask(url, good.url, timeout_s=1)) == "good morning"
        with pytest.raises(WorkerError, match="no connection in time") as caught:
            ask(url, timeout_s=1)
        assert not caught.value.again, "whoever waited that long need not wait again at once"
        (state,) = calls(OpenAIWorker([url], "m", timeout_s=0.5), 1)
        assert state["open_until"] > 0, "one such wait is enough"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a listener that answers no call: a full queue does that on Linux")
def test_the_call_that_tries_whether_a_replica_is_back_does_not_wait_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmgraph.workers.openai.CONNECT_S", 2.0)
    monkeypatch.setattr("lmgraph.workers.openai.PROBE_S", 0.1)
    monkeypatch.setattr("lmgraph.workers.replicas.OPEN_S", 0.0)

    async def work(url: str) -> list[float]:
        worker, times = OpenAIWorker([url], "m"), []
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(WorkerError, match="no connection in time"):
                await all_of(worker)
            times.append(time.monotonic() - began)
        await worker.close()
        return times

    with ExitStack() as stack:
        first_call, probe = asyncio.run(work(deafened(stack)))
    assert probe < 2 <= first_call


@pytest.mark.parametrize("status, again", [(400, False), (401, False), (403, False), (404, False), (422, False),
                                           (429, True), (500, True), (502, True), (503, True), (504, True)])
def test_a_status_decides_whether_another_replica_is_asked(serve: Callable[..., Site], status: int, again: bool) -> None:
    bad, good = serve(lambda post: post.status(status)), serve(stream(GOOD))
    if again:
        assert text_of(ask(bad.url, good.url)) == "good morning"
    else:
        with pytest.raises(Refusal) as caught:
            ask(bad.url, good.url)
        assert caught.value.status == status and not good.asked


@pytest.mark.parametrize("act, again", [
    (stream(), True), (lambda post: None, True), (stream(event(), DONE), True), (stream(b"data: {}}\n\n"), True),
    (stream(b'data: {"error": {"code": 500}}\n\n'), True), (stream(b'data: {"error": {"code": 400}}\n\n'), False)])
def test_an_answer_that_ends_before_its_first_piece_is_asked_for_elsewhere(
        serve: Callable[..., Site], act: Callable[[Post], None], again: bool) -> None:
    bad, good = serve(act), serve(stream(GOOD))
    if again:
        assert text_of(ask(bad.url, good.url)) == "good morning"
    else:
        with pytest.raises(WorkerError):
            ask(bad.url, good.url)
    assert len(good.asked) == again


def calls(worker: OpenAIWorker, count: int) -> list[dict[str, Any]]:
    async def work() -> list[dict[str, Any]]:
        for _ in range(count):
            with suppress(WorkerError):
                await all_of(worker)
        await worker.close()
        return worker.states()

    return asyncio.run(work())


def test_a_replica_that_fails_three_times_is_left_alone(serve: Callable[..., Site]) -> None:
    bad, good = serve(lambda post: post.status(503)), serve(stream(GOOD))
    states = calls(OpenAIWorker([bad.url, good.url], "m"), 40)
    assert states[0]["failures"] == len(bad.asked) >= 3 and states[0]["open_until"] > 0
    assert len(bad.asked) < 10 and len(good.asked) == 40


def test_a_worker_rests_while_all_its_replicas_are_left_alone(serve: Callable[..., Site]) -> None:
    async def work() -> list[bool]:
        worker = OpenAIWorker([serve(lambda post: post.status(503)).url for _ in range(2)], "m")
        rests = [worker.resting]
        for _ in range(3):
            with suppress(WorkerError):
                await all_of(worker)
            rests.append(worker.resting)
        await worker.close()
        return rests

    assert asyncio.run(work()) == [False, False, False, True]


@pytest.mark.parametrize("header", ["30", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_a_replica_that_says_when_to_come_back_is_left_alone_until_then(serve: Callable[..., Site], header: str) -> None:
    bad, good = serve(lambda post: post.status(429, Retry_After=header)), serve(stream(GOOD))
    began = time.monotonic()
    states = calls(OpenAIWorker([bad.url, good.url], "m"), 6)
    assert len(bad.asked) == 1 and len(good.asked) == 6
    assert states[0]["failures"] == 0 and began + 30 <= states[0]["open_until"] <= time.monotonic() + 30


def test_a_replica_whose_callers_lose_patience_counts_as_failing(serve: Callable[..., Site]) -> None:
    left = threading.Event()
    site = serve(lambda post: left.wait(20) and None)

    async def work() -> None:
        worker = OpenAIWorker([site.url], "m", timeout_s=0.3)
        with pytest.raises((asyncio.TimeoutError, WorkerTimeout)):
            await asyncio.wait_for(all_of(worker), 0.29)
        assert worker.states()[0]["failures"] == 1
        left.set()
        await worker.close()

    asyncio.run(work())


def test_when_every_replica_fails_the_last_error_is_raised(serve: Callable[..., Site], refused: str) -> None:
    bad = serve(lambda post: post.status(503, b'{"error": "loading"}'))
    with pytest.raises(WorkerError, match="answered 503: loading"):
        ask(refused, bad.url)


def test_an_answer_that_has_begun_is_not_begun_again_at_another_replica(serve: Callable[..., Site]) -> None:
    bad, good = serve(stream(event("good "))), serve(stream(GOOD))
    with pytest.raises(WorkerError, match="ended its stream before"):
        ask(bad.url, good.url)
    assert not good.asked


# --- embedded ---


def embedded(path: Path, work: Callable[[EmbeddedWorker, SharedEngine], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        shared = SharedEngine(lambda: Engine.open(path, context=512, slots=1, threads=2))
        worker = EmbeddedWorker(shared, **options)
        try:
            await work(worker, shared)
        finally:
            await worker.close()

    asyncio.run(main())


def test_an_embedded_worker_streams_until_its_limit(toy_base: Path) -> None:
    async def work(worker: EmbeddedWorker, shared: SharedEngine) -> None:
        deltas = await all_of(worker, TALK, 6)
        assert text_of(deltas) and len(deltas) > 2
        assert deltas[-1].done and deltas[-1].finish == "length" and deltas[-1].usage["completion_tokens"] == 6
        assert text_of(await all_of(worker, TALK, 6)) == text_of(deltas)

    embedded(toy_base, work)


def test_an_embedded_system_prompt_replaces_the_users(toy_base: Path) -> None:
    async def work(worker: EmbeddedWorker, shared: SharedEngine) -> None:
        engine = await shared.get()
        expected = await engine.render([("system", "of the node"), *((m.role, m.content) for m in TALK[1:])])
        assert (await all_of(worker, TALK, 1))[-1].usage["prompt_tokens"] == len(expected)

    embedded(toy_base, work, system="of the node")


def test_leaving_an_embedded_answer_early_frees_its_sequence(toy_base: Path) -> None:
    async def work(worker: EmbeddedWorker, shared: SharedEngine) -> None:
        answer = worker.stream(TALK, max_tokens=100_000)
        assert (await anext(answer)).text
        await answer.aclose()  # type: ignore[attr-defined]
        assert (await asyncio.wait_for(all_of(worker), 20))[-1].done

    embedded(toy_base, work)


def test_a_cancelled_embedded_answer_frees_its_sequence(toy_base: Path) -> None:
    async def work(worker: EmbeddedWorker, shared: SharedEngine) -> None:
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in worker.stream(TALK, max_tokens=100_000):
                begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await asyncio.wait_for(all_of(worker), 20))[-1].done

    embedded(toy_base, work)


def test_too_long_a_conversation_is_refused_and_the_next_is_answered(toy_base: Path) -> None:
    async def work(worker: EmbeddedWorker, shared: SharedEngine) -> None:
        with pytest.raises(EngineError, match="room for 512, its answer included") as caught:
            await all_of(worker, (Message("user", "x" * 2000),))
        assert caught.value.too_long and (await all_of(worker))[-1].done

    embedded(toy_base, work)


def test_a_conversation_that_leaves_no_room_for_an_answer_is_not_begun(toy_base: Path) -> None:
    async def work(worker: EmbeddedWorker, shared: SharedEngine) -> None:
        around = len(await (await shared.get()).render([("user", "")]))
        tight = (Message("user", "q" * (512 - 40 - around)),)
        deltas = await all_of(worker, tight, 8)
        assert deltas[-1].usage["prompt_tokens"] == 512 - 40 and deltas[-1].done
        with pytest.raises(EngineError, match=r"The text has 472 tokens; .* is loaded with room for 512, its answer included") as caught:
            await all_of(worker, tight, 100)
        assert caught.value.too_long and "longer context" in caught.value.hint

    embedded(toy_base, work)


def test_a_shared_engine_is_loaded_once_however_many_ask(toy_base: Path) -> None:
    loads: list[Path] = []

    async def load() -> Engine:
        loads.append(toy_base)
        return await Engine.open(toy_base, context=512, slots=2, threads=2)

    async def work() -> None:
        shared = SharedEngine(load)
        workers = [EmbeddedWorker(shared), EmbeddedWorker(shared, "another system prompt")]
        answers = await asyncio.gather(*(all_of(w, HELLO, 4) for w in workers for _ in range(3)))
        assert len(loads) == 1 and all(a[-1].done for a in answers)
        await workers[0].close()
        await workers[1].close()
        assert (await all_of(workers[1], HELLO, 2))[-1].done and len(loads) == 2
        await shared.close()

    asyncio.run(work())


def test_an_engine_that_cannot_be_loaded_is_tried_again_by_the_next_who_asks(toy_base: Path, tmp_path: Path) -> None:
    async def work(worker: EmbeddedWorker, shared: SharedEngine) -> None:
        for _ in range(2):
            with pytest.raises(EngineError, match="does not exist"):
                await all_of(worker)
        shutil.copyfile(toy_base, tmp_path / "late.gguf")
        assert (await all_of(worker))[-1].done

    embedded(tmp_path / "late.gguf", work)


@pytest.mark.parametrize("options, temperature, unknown", [
    ({"seed": 1, "top_p": 0.5, "user": "me", "n": 1, "stop": None, "tools": []}, 0.0, ""),
    ({"seed": 1}, 0.7, "seed"), ({"stop": ["x"]}, 0.0, "stop"), ({"n": 2}, 0.0, "n"), ({"tools": [{}]}, 0.0, "tools")])
def test_an_embedded_worker_refuses_options_that_it_cannot_follow(options: dict[str, Any], temperature: float, unknown: str) -> None:
    async def load() -> Engine:
        raise EngineError("asked for")

    worker = EmbeddedWorker(SharedEngine(load))
    with pytest.raises(QueryError if unknown else EngineError, match=repr(unknown) if unknown else "asked for") as caught:
        asyncio.run(all_of(worker, temperature=temperature, options=options))
    assert not unknown or "temperature" in str(caught.value)


# --- scripted ---


def test_a_scripted_worker_answers_from_its_table_word_by_word() -> None:
    async def work() -> None:
        worker = ScriptedWorker({"hello there": "hi", "*": "you said {}"})
        assert text_of(await all_of(worker, options={"n": 2})) == "hi"
        deltas = await all_of(worker, TALK)
        assert deltas == [Delta("you"), Delta(" said"), Delta(" three"),
                          Delta(done=True, finish="stop", usage={"prompt_tokens": 1, "completion_tokens": 3})]
        cut = await all_of(worker, TALK, 2)
        assert text_of(cut) == "you said" and cut[-1].finish == "length" and cut[-1].usage["completion_tokens"] == 2
        assert worker.asked == [HELLO, TALK, TALK]
        assert text_of(await all_of(ScriptedWorker({}))) == "hello there"
        await worker.close()

    asyncio.run(work())


@pytest.mark.parametrize("answer, words", [("! out of order", "out of order"), ("!", "scripted failure")])
def test_a_scripted_worker_fails_on_demand(answer: str, words: str) -> None:
    with pytest.raises(LmgraphError, match=words) as caught:
        asyncio.run(all_of(ScriptedWorker({"*": answer})))
    assert isinstance(caught.value, WorkerError)
