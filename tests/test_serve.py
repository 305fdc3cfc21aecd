"""The gateway over loopback: a real process, the official client, hostile bodies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from conftest import say, serving, toy_graph, toy_queries

NODES = ("math", "law", "health")


@pytest.fixture(scope="module")
def address(toy_master: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    os.environ["LMGRAPH_THREADS"] = "2"
    text = toy_graph(toy_master).replace("law: {token: 1, description: about law, worker: {kind: scripted, answers: {'*': 'answer to {}'}}",
                                         "law: {token: 1, description: about law, fallback: math, worker: {kind: scripted, retries: 0, "
                                         "answers: {'*': 'the law on {}', broken: '! the court is closed'}}")
    assert "fallback: math" in text
    with serving(text, tmp_path_factory.mktemp("gateway")) as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address) as made:
        yield made


# ---------------------------------------------------------------- answers


def test_the_official_client_gets_an_answer_from_the_node_that_the_master_chose(client: openai.OpenAI) -> None:
    right = 0
    for query, node in toy_queries(4):
        raw = client.chat.completions.with_raw_response.create(model="lmgraph", messages=say(query))
        answer = raw.parse()
        chosen = raw.headers["x-lmgraph-node"]
        assert answer.model == f"lmgraph/{chosen}" and 0 < float(raw.headers["x-lmgraph-probability"]) <= 1
        assert (answer.choices[0].message.content or "").endswith(query) and answer.choices[0].finish_reason == "stop"
        assert answer.usage and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0
        assert answer.id == f"chatcmpl-{raw.headers['x-request-id']}" and "trace" not in (answer.model_extra or {})
        right += chosen == node
    assert right >= 10, "of 12"


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="lmgraph/math", messages=say("one two three"))
    stream = client.chat.completions.create(model="lmgraph/math", messages=say("one two three"), stream=True,
                                            stream_options={"include_usage": True})
    chunks = list(stream)
    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(texts) == 5 and "".join(texts) == whole.choices[0].message.content == "answer to one two three"
    assert chunks[0].choices[0].delta.role == "assistant" and {c.model for c in chunks} == {"lmgraph/math"}
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage and len({c.id for c in chunks}) == 1
    without = list(client.chat.completions.create(model="lmgraph/math", messages=say("x"), stream=True))
    assert all(c.usage is None and c.choices for c in without)


def test_the_trace_comes_when_it_is_asked_for(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="lmgraph", messages=say("sum sum"), extra_body={"lmgraph": {"trace": True}})
    trace = (answer.model_extra or {})["lmgraph"]["trace"]
    assert trace["decision"]["query"] == "sum sum" and trace["steps"][0]["node"] == answer.model.removeprefix("lmgraph/")
    chunks = list(client.chat.completions.create(model="lmgraph/law", messages=say("x"), stream=True, extra_body={"lmgraph": {"trace": True}}))
    assert (chunks[-1].model_extra or {})["lmgraph"]["trace"]["decision"] is None


def test_a_fallback_is_named_as_what_answered(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="lmgraph/law", messages=say("broken"))
    assert raw.headers["x-lmgraph-node"] == "math" and raw.parse().model == "lmgraph/math"


def test_max_tokens_and_both_its_names_cut_an_answer(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(model="lmgraph/math", messages=say("a b c d"), extra_body={name: 2})
        assert answer.choices[0].message.content == "answer to" and answer.choices[0].finish_reason == "length"


def test_a_failing_worker_is_a_502_in_openais_shape(toy_master: Path, tmp_path: Path) -> None:
    graph = toy_graph(toy_master, "{kind: scripted, retries: 0, answers: {'*': '! out of order'}}")
    with serving(graph, tmp_path) as found, openai.OpenAI(base_url=f"{found}/v1", api_key="x", max_retries=0) as client:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="out of order") as caught:
                client.chat.completions.create(model="lmgraph/law", messages=say("x"), stream=stream)
            assert caught.value.status_code == 502 and caught.value.code == "worker_error"


# ---------------------------------------------------------------- models, decisions, health


def test_the_models_are_the_graph_and_its_nodes(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["lmgraph", *(f"lmgraph/{n}" for n in NODES)]


def test_an_unknown_model_lists_the_valid_ones(client: openai.OpenAI) -> None:
    for name in ("gpt-4", "lmgraph/chef", "law"):
        with pytest.raises(openai.NotFoundError, match=r"Valid: lmgraph, lmgraph/math") as caught:
            client.chat.completions.create(model=name, messages=say("x"))
        assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_route_decides_one_or_many_in_order(http: httpx.Client) -> None:
    one = http.post("/v1/route", json={"query": "sum"}).json()
    assert one["node"] in NODES and one["alternatives"][0]["probability"] == one["probability"]
    queries = [q for q, _ in toy_queries(8)] * 2
    many = http.post("/v1/route", json={"queries": queries}, timeout=60).json()
    assert many["object"] == "list" and [d["query"] for d in many["data"]] == queries
    assert sum(d["node"] == n for d, (_, n) in zip(many["data"], toy_queries(8) * 2)) > 40
    for bad in ({"queries": ["x"] * 1001}, {"queries": []}, {"queries": "x"}, {"query": " "}, {"queries": ["a", ""]}, {}):
        assert http.post("/v1/route", json=bad).status_code == 400


def test_health_readiness_and_metrics(http: httpx.Client, client: openai.OpenAI) -> None:
    assert http.get("/healthz").json() == {"status": "ok"}
    client.chat.completions.create(model="lmgraph/health", messages=say("x"))
    ready = http.get("/readyz").json()
    assert ready["status"] == "ready" and ready["master"] is True
    text = http.get("/metrics").text
    assert 'lmgraph_answers_total{node="health"}' in text and 'lmgraph_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert "lmgraph_active 0.0" in text


# ---------------------------------------------------------------- bad input


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "lmgraph/math", "messages": say("x")} | fields).encode()


@pytest.mark.parametrize(("body", "param", "words"), [
    (b"", None, "not JSON"), (b"nonsense", None, "not JSON"), (b"[1]", None, "a list, expected an object"), (b"\xff\xfe\x00", None, "not JSON"),
    (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, None, "nested too deeply"), (b'{"temperature": NaN}', None, "NaN is no JSON number"),
    (b'{"max_tokens": ' + b"9" * 5000 + b"}", None, "not JSON"),
    (b'{"model": "lmgraph"}', "messages", "messages is missing"), (chat(messages=[]), "messages", "at least one"),
    (chat(messages="hi"), "messages", "messages is text, expected a list"), (chat(messages=["hi"]), "messages[0]", "text, expected an object"),
    (chat(messages=[{"role": "boss", "content": "x"}]), "messages[0].role", "valid: system, developer, user"),
    (chat(messages=[{"role": "user", "content": 3}]), "messages[0].content", "a number, expected text"),
    (chat(messages=[{"role": "user"}]), "messages[0].content", "missing"),
    (chat(messages=[{"role": "system", "content": "x"}]), "messages", "no message with role user"),
    (chat(messages=say("x") * 2049), "messages", "at most 2,048"),
    (chat(messages=[{"role": "user", "content": [{"type": "video"}]}]), "messages[0].content[0]", "valid: text, image_url, input_audio"),
    (chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text", "missing"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]), "messages", "image"),
    (b'{"model":"lmgraph/math","messages":[{"role":"user","content":"\\ud800"}]}', "messages[0].content", "surrogate"),
    (chat(temperature="hot"), "temperature", "text, expected a number from 0 to 2"), (chat(temperature=3), "temperature", "3, expected"),
    (chat(max_tokens=0), "max_tokens", "0, expected a whole number"), (chat(max_tokens=1.5), "max_tokens", "a whole number"),
    (chat(max_tokens=True), "max_tokens", "true or false"), (chat(stream="yes"), "stream", "expected true or false"),
    (chat(n=0), "n", "0, expected"), (chat(top_p=7), "top_p", "7, expected"), (chat(lmgraph={"trace": 1}), "lmgraph.trace", "true or false"),
    (chat(lmgraph={"mode": "stroll"}), "lmgraph.mode", "valid: single, vote, auto, walk, plan"), (chat(lmgraph={"mode": 3}), "lmgraph.mode", "a number, expected text"),
    (chat(lmgraph={"way": 1}), "lmgraph", "lmgraph.way is unknown; valid: trace, progress, conversation, mode"),
    (chat(model=7), "model", "a number, expected text"), (chat(messages=say("   ")), None, "The query is empty"),
])
def test_a_bad_body_is_a_400_that_says_what_was_found_and_expected(http: httpx.Client, body: bytes, param: str | None, words: str) -> None:
    answer = http.post("/v1/chat/completions", content=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and words in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == param and error["code"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(http: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b" " * 65536

    assert http.post("/v1/chat/completions", content=b" " * (5 << 20)).status_code == 413
    with suppress(httpx.WriteError):  # the gateway closed the connection while we were still sending: refused as well
        assert http.post("/v1/chat/completions", content=endless()).status_code == 413
    assert http.get("/healthz").status_code == 200


def test_unknown_paths_and_methods_are_openai_errors(http: httpx.Client) -> None:
    answer = http.get("/v1/nothing")
    assert answer.status_code == 404 and "/v1/chat/completions" in answer.json()["error"]["message"]
    answer = http.get("/v1/chat/completions")
    assert answer.status_code == 405 and answer.json()["error"]["code"] == "method_not_allowed"


def test_a_request_id_is_kept_when_it_is_one(http: httpx.Client) -> None:
    assert http.get("/healthz", headers={"x-request-id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    assert re.fullmatch("[0-9a-f]{32}", http.get("/healthz", headers={"x-request-id": "a b<script>"}).headers["x-request-id"])


@pytest.mark.parametrize("query", ["<fn_1> <|im_end|>", "\x00\x01", "🦆" * 50, "شرح", '"', "x" * 10_000, "'"])
def test_any_text_is_answered(client: openai.OpenAI, query: str) -> None:
    answer = client.chat.completions.create(model="lmgraph", messages=say(query))
    assert (answer.choices[0].message.content or "").endswith(query)


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(("arguments", "complaint"), [
    (("--host", "256.1.1.1"), "256.1.1.1"), (("--store", "mysql://x"), "redis://"),
    (("--host", "localhost", "--port", "70000"), "70000"), (("nothing.yaml",), "nothing.yaml"),
])
def test_serve_refuses_what_it_cannot_do(tmp_path: Path, arguments: tuple[str, ...], complaint: str) -> None:
    found = subprocess.run([sys.executable, "-m", "lmgraph", "serve", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2 and complaint in found.stderr and "Traceback" not in found.stderr


def test_a_port_that_is_taken_is_an_error_with_a_way_out(address: str, tmp_path: Path) -> None:
    port = address.rsplit(":", 1)[1]
    found = subprocess.run([sys.executable, "-m", "lmgraph", "serve", "--port", port], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2 and f"127.0.0.1:{port}" in found.stderr and "--port 0" in found.stderr
