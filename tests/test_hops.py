"""Walks over the wire: a real gateway, workers on loopback that answer, fail, wait or never end, the official client; what counts for whom."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from conftest import say, serving
from lmgraph import __version__
from lmgraph.errors import WorkerError
from lmgraph.graph import MODES
from lmgraph.serve import wire
from lmgraph.serve.answer import Answering
from lmgraph.serve.http import Request
from lmgraph.serve.memory import Flight, Talk
from lmgraph.serve.metrics import Metrics
from lmgraph.serve.openapi import document
from lmgraph.types import Decision, Delta, Progress, Step, Trace, Walk

WALK = {"lmgraph": {"mode": "walk", "trace": True}}
LAW, MATH = "the court says seven", "seven squared is forty-nine"
USED = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.close_connection = True
        with suppress(OSError):
            self.act(self.server.mood)

    def act(self, mood: str) -> None:
        self.server.asked.set()
        if mood == "hold":
            self.server.free.wait()
        self.send_response(500 if mood == "fail" else 200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        if mood == "fail":
            return
        if mood == "drip":
            try:
                while not self.server.over.wait(0.01):
                    self.say({"choices": [{"index": 0, "delta": {"content": "drop "}}]})
            except OSError:
                self.server.left.set()
            return
        for word in self.server.says.split(" "):
            self.say({"choices": [{"index": 0, "delta": {"content": word if word == self.server.says.split(" ")[0] else f" {word}"}}]})
        self.say({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self.say({"choices": [], "usage": USED})
        self.wfile.write(b"data: [DONE]\n\n")

    def say(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, format: str, *arguments: Any) -> None: ...


class Upstream(ThreadingHTTPServer):
    """A worker in one of these moods: answer, fail, hold (it waits until it is `free`), drip (it writes until the other side has `left`)."""

    daemon_threads = True

    def __init__(self, says: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.says, self.mood = says, "answer"
        self.asked, self.free, self.left, self.over = (threading.Event() for _ in range(4))
        self.worker = f"{{kind: openai, urls: ['http://127.0.0.1:{self.server_address[1]}/v1'], model: m, retries: 0}}"

    @contextmanager
    def running(self) -> Iterator[Upstream]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.over.set()
            self.free.set()
            self.shutdown()
            thread.join()
            self.server_close()

    @contextmanager
    def being(self, mood: str) -> Iterator[Upstream]:
        """In that mood as long as the block runs."""
        for event in (self.asked, self.free, self.left):
            event.clear()
        self.mood = mood
        try:
            yield self
        finally:
            self.mood = "answer"
            self.free.set()


def walking(master: Path, law: str, math: str) -> str:
    """graph.yaml of a walk that is the same whatever the master thinks: law, then math, then the limit of hops."""
    nodes = {"math": (0, math), "law": (1, law), "health": (2, "{kind: scripted, answers: {'*': 'health answers'}}")}
    listed = "\n".join(f"  {name}: {{token: {i}, description: about {name}, rewrite: never, worker: {worker}}}" for name, (i, worker) in nodes.items())
    edges = "{start: [law], law: [math], math: [law, health]}"
    return f"version: 1\nmaster: {{bundle: {master}}}\nanswer: {{mode: single, hops: 2}}\nnodes:\n{listed}\nedges: {edges}\n"


class House:
    """A gateway, and the workers of its nodes law and math."""

    def __init__(self, address: str, law: Upstream, math: Upstream) -> None:
        self.address, self.law, self.math = address, law, math
        self.http = httpx.Client(base_url=address, timeout=60)
        self.client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

    def ask(self, question: str, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json={"model": "lmgraph", "messages": say(question)} | WALK | fields)

    def stream(self, question: str, **own: Any) -> Any:
        """The open stream of a walk that tells its steps."""
        body = {"model": "lmgraph", "messages": say(question), "stream": True, "lmgraph": {"mode": "walk", "progress": True, "trace": True} | own}
        return self.http.stream("POST", "/v1/chat/completions", json=body)

    def live(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/v1/live").json()["nodes"]
        return found

    def active(self) -> dict[str, int]:
        return {name: node["active"] for name, node in self.live().items() if node["active"]}

    def counted(self, before: dict[str, Any]) -> dict[str, tuple[int, int]]:
        """(answers, failures) of each node since `before`, where there are any."""
        now = self.live()
        found = {name: (now[name]["answers"] - before[name]["answers"], now[name]["failures"] - before[name]["failures"]) for name in now}
        return {name: counts for name, counts in found.items() if any(counts)}


@pytest.fixture(scope="module")
def house(toy_master: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    os.environ["LMGRAPH_THREADS"] = "1"
    with ExitStack() as stack:
        law, math = (stack.enter_context(Upstream(says).running()) for says in (LAW, MATH))
        made = House(stack.enter_context(serving(walking(toy_master, law.worker, math.worker), tmp_path_factory.mktemp("hops"))), law, math)
        stack.enter_context(made.http)
        stack.enter_context(made.client)
        yield made


def events(answer: httpx.Response) -> list[Any]:
    """What came of a stream, in order: ("progress", {...}), ("decision", {...}), ("text", "..."), ("finish", "..."), ("trace", {...}), ("error", {...})."""
    out: list[Any] = []
    for line in answer.iter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            out += [("done", "")] if line else []
            continue
        chunk = json.loads(line.removeprefix("data: "))
        out += [("error", chunk["error"])] if "error" in chunk else list(chunk.get("lmgraph", {}).items())
        for choice in chunk.get("choices", []):
            out += [("text", choice["delta"]["content"])] if choice["delta"].get("content") else [("finish", choice["finish_reason"])]
    return out


# ---------------------------------------------------------------- answers


def test_a_walk_gives_the_last_hops_answer_and_its_trace_says_how_it_went(house: House) -> None:
    before = house.live()
    raw = house.client.chat.completions.with_raw_response.create(model="lmgraph", messages=say("how many, squared"), extra_body=WALK)
    answer = raw.parse()
    assert answer.choices[0].message.content == MATH and answer.model == "lmgraph/math" and raw.headers["x-lmgraph-node"] == "math"
    trace = (answer.model_extra or {})["lmgraph"]["trace"]
    walk, steps = trace["walk"], trace["steps"]
    assert walk["mode"] == "walk" and walk["stopped"] == "hops" and trace["decision"]["more"] == 1.0 and trace["decision"]["node"] == "law"
    assert [(hop["node"], hop["request"]) for hop in walk["hops"]][:1] == [("law", "how many, squared")] and walk["hops"][1]["node"] == "math"
    assert [(step["hop"], step["node"], step["request"]) for step in steps] == [(i, hop["node"], hop["request"]) for i, hop in enumerate(walk["hops"])]
    assert [step["answer"] for step in steps] == [LAW] + [MATH] * (len(steps) - 1)
    assert answer.usage and answer.usage.total_tokens == 8 * len(steps), "what all steps used"
    assert house.counted(before) == {"law": (1, 0), "math": (len(steps) - 1, 0)} and house.active() == {}
    schemas = document(__version__, ["law", "math", "health"])["components"]
    jsonschema.Draft202012Validator({"$ref": "#/components/schemas/ChatCompletion", "components": schemas}).validate(json.loads(raw.text))


def test_who_watches_hears_every_step_in_order_and_the_answer_as_it_comes(house: House) -> None:
    with house.stream("how many, squared") as answer:
        told = events(answer)
    assert answer.headers["content-type"].startswith("text/event-stream") and told[0][0] == "decision" and told[0][1]["node"] == "law"
    kinds = [kind for kind, _ in told]
    first, last = kinds.index("text"), len(kinds) - 1 - kinds[::-1].index("text")
    assert "".join(what for kind, what in told if kind == "text") == MATH and kinds[first:last + 1] == ["text"] * (last + 1 - first), "in pieces"
    assert kinds[last + 1:] == ["progress", "finish", "trace", "done"]
    steps = [what for kind, what in told if kind == "progress"]
    hops = told[-2][1]["walk"]["hops"]
    assert [(step["kind"], step["hop"]) for step in steps] == [(kind, i) for i in range(len(hops)) for kind in ("began", "ended")]
    for i, hop in enumerate(hops):
        began, ended = steps[2 * i:2 * i + 2]
        assert (began["node"], began["request"]) == (ended["node"], ended["request"]) == (hop["node"], hop["request"])
        assert ended["answer"] == (LAW if i == 0 else MATH) and ended["ms"] > 0 and ended["error"] == ""


def test_the_official_client_reads_a_stream_with_steps(house: House) -> None:
    body = {"lmgraph": {"mode": "walk", "progress": True}}
    chunks = list(house.client.chat.completions.create(model="lmgraph", messages=say("how many, squared"), stream=True, extra_body=body))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == MATH
    assert {c.model for c in chunks if c.choices} == {"lmgraph/math"} and [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    kinds = [next(iter((c.model_extra or {})["lmgraph"])) for c in chunks if not c.choices]
    assert kinds[0] == "decision" and len(kinds) >= 5 and set(kinds[1:]) == {"progress"}


def test_a_plan_is_told_before_its_first_step(house: House) -> None:
    with house.stream("how many, squared", mode="plan") as answer:
        told = [(kind, what) for kind, what in events(answer) if kind != "text"]
    steps = [what for kind, what in told if kind == "progress"]
    walk = told[-2][1]["walk"]
    assert [kind for kind, _ in told][:2] == ["decision", "progress"] and walk["mode"] == "plan"
    assert steps[0]["kind"] == "plan" and [hop["node"] for hop in steps[0]["hops"]] == ["law", "math"] == [hop["node"] for hop in walk["hops"]][:2]
    for number in range(len(walk["hops"])):
        assert [step["kind"] for step in steps[1:] if step["hop"] == number] == ["began", "ended"]


def test_the_mode_of_a_request_goes_before_the_graphs(house: House) -> None:
    for mode in (None, "single"):
        own = {"trace": True} | ({"mode": mode} if mode else {})
        answer = house.ask("how many, squared", lmgraph=own).json()
        assert answer["model"] == "lmgraph/law" and "walk" not in answer["lmgraph"]["trace"]
    for fields in ({"model": "lmgraph/law"}, {"tools": [{"type": "function", "function": {"name": "f"}}]}):
        assert "walk" not in house.ask("how many, squared", **fields).json()["lmgraph"]["trace"], "pinned, and with tools: one worker"


def test_the_responses_api_walks_too(house: House) -> None:
    answer = house.client.responses.create(model="lmgraph", input="how many, squared", store=False, extra_body=WALK)
    assert answer.output_text == MATH and answer.model == "lmgraph/math"
    walk = (answer.model_extra or {})["lmgraph"]["trace"]["walk"]
    assert [hop["node"] for hop in walk["hops"]][:2] == ["law", "math"]
    schemas = document(__version__, ["law", "math", "health"])["components"]
    raw = house.http.post("/v1/responses", json={"model": "lmgraph", "input": "how many, squared", "store": False} | WALK).json()
    jsonschema.Draft202012Validator({"$ref": "#/components/schemas/Response", "components": schemas}).validate(raw)


def test_a_mode_that_there_is_not_is_refused_with_those_that_there_are(house: House) -> None:
    body = {"lmgraph": {"mode": "stroll"}}
    for ask in (lambda: house.client.chat.completions.create(model="lmgraph", messages=say("x"), extra_body=body),
                lambda: house.client.responses.create(model="lmgraph", input="x", extra_body=body)):
        with pytest.raises(openai.BadRequestError) as caught:
            ask()
        assert caught.value.param == "lmgraph.mode" and "stroll" in caught.value.message and ", ".join(MODES) in caught.value.message


# ---------------------------------------------------------------- what is remembered


def test_the_cache_keeps_the_answers_of_each_mode_apart(house: House) -> None:
    def ask(**own: Any) -> httpx.Response:
        return house.ask("how many, cached", temperature=0, lmgraph={"trace": True} | own)

    first, other, again, single = ask(mode="walk"), ask(), ask(mode="walk"), ask(mode="single")
    assert [answer.headers["x-lmgraph-cache"] for answer in (first, other, again, single)] == ["miss", "miss", "hit", "miss"]
    assert again.json()["model"] == "lmgraph/math" and other.json()["model"] == single.json()["model"] == "lmgraph/law"
    assert again.json()["lmgraph"]["trace"] == first.json()["lmgraph"]["trace"] | {"cache": True}


def test_a_conversation_stays_with_the_node_that_gave_the_answer(house: House) -> None:
    own = {"mode": "walk", "conversation": "walked", "trace": True}
    assert house.ask("how many, squared", lmgraph=own).status_code == 200
    later = house.ask("and cubed", lmgraph=own).json()
    assert "walk" not in later["lmgraph"]["trace"], "a walk begins a conversation"
    turns = house.http.get("/v1/history/walked").json()["data"]
    assert [(turn["node"], turn["answer"]) for turn in turns] == [("math", MATH), ("law", LAW)] and turns[0]["trace"]["walk"]["hops"][0]["node"] == "law"


# ---------------------------------------------------------------- who is at work, and what fails


def test_each_hop_is_under_way_at_its_own_node(house: House) -> None:
    with house.law.being("hold"), house.math.being("hold"):
        with house.stream("how many, held") as answer:
            assert house.law.asked.wait(60)
            assert house.active() == {"law": 1} and not house.math.asked.is_set()
            house.law.free.set()
            assert house.math.asked.wait(60)
            assert house.active() == {"math": 1}
            house.math.free.set()
            assert "done" in [kind for kind, _ in events(answer)]
    assert house.active() == {}


@pytest.mark.parametrize("dripping", ["law", "math"])
def test_a_client_that_leaves_stops_the_worker_and_nothing_stays_under_way(house: House, dripping: str) -> None:
    before, worker = house.live(), getattr(house, dripping)
    with worker.being("drip"):
        with house.stream("how many, for ever") as answer:
            lines = answer.iter_lines()
            assert worker.asked.wait(60) and next(lines).startswith("data: ")
            assert house.active() == {dripping: 1}
        assert worker.left.wait(60), "the worker would have written for ever"
        while house.active():
            pass
    assert house.counted(before) == {}, "nobody failed"


def test_a_hop_that_fails_and_that_nothing_needs_is_left_out(house: House) -> None:
    before = house.live()
    with house.law.being("fail"):
        answer = house.ask("how many, failing").json()
    steps = answer["lmgraph"]["trace"]["steps"]
    assert answer["choices"][0]["message"]["content"] == MATH and [(step["node"], bool(step["error"])) for step in steps] == [("law", True), ("math", False)]
    assert house.counted(before) == {"law": (0, 1), "math": (1, 0)}
    page = house.http.get("/metrics").text
    assert 'lmgraph_hops_total{node="law",result="failed"}' in page and 'lmgraph_hops_total{node="math",result="answered"}' in page


def test_where_no_step_could_be_answered_the_error_says_what_was_done(house: House) -> None:
    before = house.live()
    with house.law.being("fail"), house.math.being("fail"):
        with pytest.raises(openai.InternalServerError) as caught:
            house.client.chat.completions.create(model="lmgraph", messages=say("how many, failing"), extra_body=WALK)
        assert caught.value.status_code == 502 and caught.value.code == "worker_error" and "law failed" in caught.value.message
        assert house.counted(before) == {"law": (0, 1), "math": (0, 1)}
        with house.stream("how many, failing") as answer:
            told = events(answer)
    assert answer.status_code == 200 and told[-1][0] == "error" and "law failed" in told[-1][1]["message"] and "done" not in dict(told)
    assert [what["error"] != "" for kind, what in told if kind == "progress" and what["kind"] == "ended"] == [True, True]
    assert house.active() == {}


# ---------------------------------------------------------------- several at once, beside a runtime that does what a test says

Play = Callable[[Callable[[Decision], None], Callable[[str], None], Callable[[Progress], None]], AsyncIterator[Delta]]
FIRST = Decision("q", "law", "law", 1, 0.9, rewritten="q")


class Played:
    """A runtime whose answer is a play."""

    def __init__(self, play: Play) -> None:
        self._play = play

    async def answer(self, ask: Any, decided: Any, answering: Any, progress: Any) -> AsyncGenerator[Delta, None]:
        async for delta in self._play(decided, answering, progress):
            yield delta


class Desk:
    """One answer and all that it touches; `sent` is what the client got."""

    def __init__(self, flight: Flight | None = None, **own: Any) -> None:
        self.sent: list[bytes] = []
        self.metrics = Metrics()
        body = {"messages": say("q"), "stream": True, "lmgraph": own}
        chat = wire.parse_chat(json.dumps(body).encode(), ["law", "math"])
        request = Request({"method": "POST", "path": "/", "headers": []}, self._receive, self._send)
        self.answering = Answering(self.metrics, request, chat, Talk(chat.ask), None, flight)

    async def _receive(self) -> MutableMapping[str, Any]:
        raise AssertionError("nobody asks whether the client is there")

    async def _send(self, event: MutableMapping[str, Any]) -> None:
        self.sent += [event["body"]] if "body" in event else []

    async def run(self, play: Play) -> None:
        await self.answering.run(Played(play))  # type: ignore[arg-type]

    def active(self) -> dict[str, int]:
        return {node: load.active for node, load in self.metrics.loads.items() if load.active}


def ended(hop: int, node: str, error: str = "") -> Progress:
    return Progress("ended", hop, node, "q", Step(node, "q", "" if error else "a", ms=1, error=error, usage=USED, hop=hop))


def test_steps_that_run_side_by_side_are_each_under_way_until_they_end() -> None:
    desk, seen = Desk(), []

    async def play(decided: Any, answering: Any, progress: Any) -> AsyncIterator[Delta]:
        decided(FIRST)
        seen.append(desk.active())
        for event in (Progress("plan"), Progress("began", 0, "law"), Progress("began", 1, "math"), Progress("began", 2, "law"), ended(1, "math")):
            progress(event)
            seen.append(desk.active())
        for event in (ended(2, "law"), ended(0, "law"), Progress("began", 3, "math")):
            progress(event)
            seen.append(desk.active())
        answering("health")  # its fallback
        yield Delta("a")
        seen.append(desk.active())
        steps = tuple(Step(node, "q", "a", hop=i, usage=USED) for i, node in enumerate(("law", "math", "law", "health")))
        progress(ended(3, "health"))
        yield Delta(done=True, finish="stop", trace=Trace(FIRST, steps, walk=Walk("plan", (), "end")))

    asyncio.run(desk.run(play))
    assert seen == [{"law": 1}, {"law": 1}, {"law": 1}, {"law": 1, "math": 1}, {"law": 2, "math": 1}, {"law": 2}, {"law": 1}, {}, {"math": 1}, {"health": 1}]
    loads = {node: (load.active, load.answers, load.failures) for node, load in desk.metrics.loads.items()}
    assert loads == {"law": (0, 2, 0), "math": (0, 1, 0), "health": (0, 1, 0)}
    assert desk.metrics.answers == {("health",): 1} and desk.metrics.tokens["law", "prompt"] == 10
    assert sorted(desk.answering.ended) == [0, 1, 2, 3]


@pytest.mark.parametrize("progress", [False, True])
def test_whoever_was_at_work_is_not_any_more_when_the_client_has_left(progress: bool) -> None:
    desk, working = Desk(progress=progress), asyncio.Event()

    async def play(decided: Any, answering: Any, progress: Any) -> AsyncIterator[Delta]:
        decided(FIRST)
        for event in (Progress("began", 0, "law"), Progress("began", 1, "math"), ended(0, "law"), Progress("began", 2, "law")):
            progress(event)
        working.set()
        try:
            await asyncio.Event().wait()
        finally:
            progress(ended(1, "math", "stopped"))
        yield Delta("never")

    async def main() -> None:
        task = asyncio.create_task(desk.run(play))
        await working.wait()
        assert desk.active() == {"law": 1, "math": 1}
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert desk.active() == {} and not any(load.failures or load.answers for load in desk.metrics.loads.values())


def test_a_walk_that_fails_counts_for_those_who_failed_and_those_who_answered() -> None:
    desk = Desk()

    async def play(decided: Any, answering: Any, progress: Any) -> AsyncIterator[Delta]:
        decided(FIRST)
        for event in (Progress("began", 0, "law"), Progress("began", 1, "math"), ended(0, "law"), ended(1, "math", "down")):
            progress(event)
        raise WorkerError("math is down")
        yield Delta()

    with pytest.raises(WorkerError):
        asyncio.run(desk.run(play))
    assert {node: (load.active, load.answers, load.failures) for node, load in desk.metrics.loads.items()} == {"law": (0, 1, 0), "math": (0, 0, 1)}


def test_what_was_told_before_the_first_piece_is_sent_before_it_even_where_all_comes_at_once() -> None:
    desk = Desk(progress=True)

    async def play(decided: Any, answering: Any, progress: Any) -> AsyncIterator[Delta]:
        decided(FIRST)
        for event in (Progress("began", 0, "law"), ended(0, "law"), Progress("began", 1, "math")):
            progress(event)
        answering("math")
        yield Delta("text")
        progress(ended(1, "math"))
        yield Delta(done=True, finish="stop", trace=Trace(FIRST, (), walk=Walk("walk", (), "end")))

    asyncio.run(desk.run(play))
    marks = [b'"decision"', b'"began","hop":0', b'"ended","hop":0', b'"began","hop":1', b"text", b'"ended","hop":1', b"[DONE]"]
    assert len(desk.sent) == len(marks) and all(mark in piece for mark, piece in zip(marks, desk.sent))


@pytest.mark.parametrize(("stopped", "error", "kept"), [
    ("end", "", True), ("hops", "", True), ("seconds", "", False), ("master", "", False), ("end", "the worker was down", False),
])
def test_an_answer_that_another_time_would_be_better_is_not_kept(stopped: str, error: str, kept: bool) -> None:
    flight = Flight(None)

    async def play(decided: Any, answering: Any, progress: Any) -> AsyncIterator[Delta]:
        decided(FIRST)
        yield Delta("a")
        yield Delta(done=True, finish="stop", trace=Trace(FIRST, (Step("law", "q", "a", 1.0, error=error),), walk=Walk("walk", (), stopped)))

    asyncio.run(Desk(flight).run(play))
    assert (flight.landed is not None) == kept
