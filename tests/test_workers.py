"""Workers: OpenAI-compatible ones against a real llama.cpp server and a server that fails in every way; embedded; scripted."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import xllamacpp

from lmgraph.engine import Engine
from lmgraph.errors import EngineError, LmgraphError, WorkerError, WorkerTimeout
from lmgraph.types import Delta, Message
from lmgraph.workers.base import Worker
from lmgraph.workers.embedded import EmbeddedWorker, SharedEngine
from lmgraph.workers.openai import OpenAIWorker
from lmgraph.workers.scripted import ScriptedWorker

KEY = "sk-of-the-test"
HELLO = (Message("user", "hello there"),)
"""what the toy says to this cannot be seen"""
TALK = (Message("system", "from the user"), Message("user", "one"), Message("assistant", "two"), Message("user", "three"))


async def all_of(worker: Worker, messages: Sequence[Message] = HELLO, max_tokens: int = 8, **options: Any) -> list[Delta]:
    return [delta async for delta in worker.stream(messages, max_tokens=max_tokens, **options)]


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def ask(*urls: str, messages: Sequence[Message] = HELLO, **options: Any) -> list[Delta]:
    """One answer of an OpenAIWorker."""
    async def work() -> list[Delta]:
        worker = OpenAIWorker(urls, "m", **{"timeout_s": 60, **options})
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
        self.server.act(self)

    def status(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class Site(ThreadingHTTPServer):
    """Answers every POST with `act`."""

    daemon_threads = False

    def __init__(self, act: Callable[[Post], None]) -> None:
        super().__init__(("127.0.0.1", 0), Post)
        self.act = act
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Site]]:
    """Start servers; they are stopped after the test."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ExitStack() as stack:
        def start(act: Callable[[Post], None]) -> Site:
            site = Site(act)
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
    assert ask(site.url) == [Delta("good "), Delta("morning"),
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
    (stream(b'{"choices": [{"message": {"content": "not streamed"}}]}'), "ended its stream before"),
    (lambda post: post.status(200, event("good "), Content_Length="1000"), "cannot be reached: .*closed"),
    (lambda post: post.status(200, b"\x00\x01", Content_Encoding="gzip"), "cannot be reached: "),
    (stream(event("good "), b"data: <html>\n\n"), "not JSON: '<html>'"),
    (stream(event("good "), b'data: {"error": {"message": "out of memory", "code": 500}}\n\n'), "answered with an error: out of memory"),
    (stream(event("good "), b'data: {"error": "out of memory"}\n\n'), "answered with an error: out of memory")])
def test_a_stream_that_breaks_off_is_a_worker_error(serve: Callable[..., Site], act: Callable[[Post], None], words: str) -> None:
    with pytest.raises(WorkerError, match=words):
        ask(serve(act).url)


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
        worker = OpenAIWorker([s.url for s in sites], "m")
        for counts in ((1, 0), (1, 1), (2, 1), (2, 2)):
            await all_of(worker)
            assert tuple(len(s.asked) for s in sites) == counts
        await worker.close()

    asyncio.run(work())


def test_a_replica_that_refuses_is_passed_over(serve: Callable[..., Site], refused: str) -> None:
    bad, good = serve(lambda post: post.status(503)), serve(stream(GOOD))
    assert text_of(ask(refused, bad.url, good.url)) == "good morning"
    assert len(bad.asked) == len(good.asked) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs a listener that answers no call: a full queue does that on Linux")
def test_a_replica_that_never_takes_the_call_is_passed_over(serve: Callable[..., Site]) -> None:
    good = serve(stream(GOOD))
    with ExitStack() as stack:
        deaf = stack.enter_context(socket.socket())
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        assert text_of(ask(f"http://127.0.0.1:{deaf.getsockname()[1]}/v1", good.url, timeout_s=1)) == "good morning"


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
        with pytest.raises(EngineError, match="room for 512"):
            await all_of(worker, (Message("user", "x" * 2000),))
        assert (await all_of(worker))[-1].done

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


# --- scripted ---


def test_a_scripted_worker_answers_from_its_table_word_by_word() -> None:
    async def work() -> None:
        worker = ScriptedWorker({"hello there": "hi", "*": "you said {}"})
        assert text_of(await all_of(worker)) == "hi"
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
