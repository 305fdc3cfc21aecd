"""OpenAI's wire format: any JSON is either a request or a clear refusal; streams and whole answers say the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmgraph.errors import LmgraphError, MasterError, QueryError, RequestError, StoreError, WorkerError, WorkerTimeout
from lmgraph.serve import wire
from lmgraph.types import Delta

anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
                        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12)
FIELDS = ("model", "messages", "stream", "stream_options", "temperature", "max_tokens", "n", "top_p", "lmgraph", "tools")
part = st.fixed_dictionaries({"type": st.sampled_from(tuple(wire.PARTS)) | anything}, optional={"text": anything, "image_url": anything})
content = st.text(max_size=9) | st.lists(part | anything, max_size=3) | anything
message = st.fixed_dictionaries({"role": st.sampled_from(wire.ROLES) | anything, "content": content})


@given(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=6), st.none() | st.lists(message, max_size=4))
def test_any_object_is_a_chat_or_a_refusal_that_names_a_field(fields: dict[str, Any], messages: list[Any] | None) -> None:
    if messages is not None:
        fields["messages"] = messages
    try:
        chat = wire.parse_chat(json.dumps(fields).encode(), ["law"])
    except RequestError as error:
        assert error.status in (400, 404) and error.message and error.param
    else:
        assert chat.ask.messages and any(m.role == "user" for m in chat.ask.messages)
        assert not {"model", "messages", "stream", "temperature", "max_tokens"} & set(chat.ask.options)


@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_or_refused(body: bytes) -> None:
    try:
        assert isinstance(wire.load(body), dict)
    except RequestError as error:
        assert error.status == 400


@pytest.mark.parametrize("kind", [["text"], {"text": 1}, None, 3, "video"])
def test_a_part_of_no_known_type_is_refused(kind: Any) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": kind}]}]}
    with pytest.raises(RequestError, match="valid: text, image_url") as caught:
        wire.parse_chat(json.dumps(body).encode(), ["law"])
    assert caught.value.param == "messages[0].content[0]"


@pytest.mark.parametrize(("failure", "status"), [
    (LmgraphError("a bug"), 500), (RequestError("x", status=409), 409), (QueryError("x"), 400), (MasterError("x"), 503), (StoreError("x"), 503),
    (WorkerTimeout("x"), 504), (WorkerError("x"), 502),
])
def test_a_status_says_whose_fault_it_is(failure: LmgraphError, status: int) -> None:
    assert wire.status_of(failure) == status
    assert json.loads(wire.error(failure))["error"]["type"] == ("server_error" if status >= 500 else "invalid_request_error")


def events(stream: bytes) -> list[dict[str, Any]]:
    lines = [line for line in stream.decode().split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines[:-1]]


@given(st.lists(st.text(min_size=1, max_size=12).filter(lambda t: t.isprintable()), max_size=6))
def test_the_pieces_of_a_stream_add_up_to_the_whole_answer(texts: list[str]) -> None:
    deltas = [*(Delta(t) for t in texts), Delta(done=True, finish="length", usage={"prompt_tokens": 3, "completion_tokens": 2})]
    writer = wire.Writer("chatcmpl-1", "lmgraph/law", 7)
    found = events(b"".join(map(writer.chunk, deltas)) + writer.end(deltas[-1], include_usage=True))
    whole = json.loads(wire.Writer("chatcmpl-1", "lmgraph/law", 7).completion(deltas))
    assert "".join(c["delta"].get("content", "") for e in found for c in e["choices"]) == "".join(texts)
    assert whole["choices"] == [{"index": 0, "message": {"role": "assistant", "content": "".join(texts)}, "finish_reason": "length"}]
    assert found[-1]["usage"] == whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert {(e["id"], e["model"], e["created"], e["object"]) for e in found} == {("chatcmpl-1", "lmgraph/law", 7, "chat.completion.chunk")}


@pytest.mark.parametrize("asked", [False, True])
def test_what_went_wrong_with_memory_rides_on_the_piece_that_ends_the_answer(asked: bool) -> None:
    """Not on a piece of its own: clients that asked for none expect a choice in every piece."""
    last, notes = Delta(done=True, finish="stop"), {"kept": False}
    trace = {"steps": []} if asked else None
    found = events(wire.Writer("i", "m", 1).end(last, include_usage=asked, trace=trace, notes=notes))
    assert found[0]["choices"][0]["finish_reason"] == "stop" and found[0]["lmgraph"] == notes
    assert [e["lmgraph"] for e in found[1:]] == ([{"trace": trace}] if asked else [])
    whole = json.loads(wire.Writer("i", "m", 1).completion([last], trace, notes))
    assert whole["lmgraph"] == ({"trace": trace} if asked else {}) | notes
    assert "lmgraph" not in json.loads(wire.Writer("i", "m", 1).completion([last], None, {}))


def test_tool_calls_and_several_choices_are_folded() -> None:
    def piece(*choices: dict[str, Any]) -> Delta:
        return Delta(choices=choices)

    def call(**function: str) -> dict[str, Any]:
        return {"index": 0, "delta": {"tool_calls": [{"index": 0, "function": function}]}}

    deltas = [
        piece({"index": 0, "delta": {"role": "assistant", "tool_calls": [{"index": 0, "id": "c1", "function": {"name": "look", "arguments": ""}}]}}),
        piece(call(arguments='{"a":'), {"index": 1, "delta": {"content": "he"}}), piece(call(arguments="1}"), {"index": 1, "delta": {"content": "llo"}}),
        piece({"index": 0, "delta": {}, "finish_reason": "tool_calls"}, {"index": 1, "delta": {}, "finish_reason": "stop"}),
        Delta(done=True, finish="tool_calls"),
    ]
    first, second = json.loads(wire.Writer("i", "m", 1).completion(deltas))["choices"]
    assert first["message"]["tool_calls"] == [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}}]
    assert first["message"]["content"] is None and first["finish_reason"] == "tool_calls"
    assert second == {"index": 1, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}


def test_the_text_of_parts_is_read_and_the_message_kept_as_it_is() -> None:
    parts = [{"type": "text", "text": "what is this"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    body = {"model": "lmgraph", "messages": [{"role": "user", "content": parts}], "tools": [], "seed": 3, "user": None}
    chat = wire.parse_chat(json.dumps(body).encode(), ["law"])
    assert chat.ask.query == "what is this" and chat.ask.messages[0].raw == body["messages"][0]
    assert chat.ask.needs == {"image"} and chat.ask.options == {"tools": [], "seed": 3}


@pytest.mark.parametrize(("model", "node"), [("lmgraph", None), ("lmgraph/law", "law")])
def test_the_model_field_pins_a_node(model: str, node: str | None) -> None:
    assert wire.node_of(model, ["law"]) == node


def test_a_body_may_begin_with_a_byte_order_mark() -> None:
    assert wire.load(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
