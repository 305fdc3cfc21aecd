"""The Responses API: any JSON is either a call or a clear refusal; what is written is what the official client reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from lmgraph.errors import RequestError, WorkerError
from lmgraph.serve import responses
from lmgraph.types import Delta, Message

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
OPENING = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
CLOSING = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}

anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
                        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12)
FIELDS = ("model", "input", "instructions", "stream", "temperature", "top_p", "max_output_tokens", "store", "previous_response_id",
          "conversation", "metadata", "user", "text", "lmgraph", "tools", "reasoning", "include", "background", "truncation")
part = st.fixed_dictionaries({"type": st.sampled_from(("input_text", "output_text", "input_image", "input_audio")) | anything},
                             optional={"text": st.text(max_size=9) | anything, "image_url": anything, "input_audio": anything, "detail": anything})
message = st.fixed_dictionaries({"role": st.sampled_from(responses.ROLES) | anything, "content": st.text(max_size=9) | st.lists(part, max_size=3) | anything},
                                optional={"type": st.just("message") | anything})


def call(**fields: Any) -> responses.Call:
    return responses.parse(json.dumps({"model": "lmgraph", "input": "hi"} | fields).encode(), ["law", "math"])


def writer(given: responses.Call | None = None, name: str = "1") -> responses.Writer:
    return responses.Writer(name, "lmgraph/law", 7, given or call())


def events(stream: bytes) -> list[Any]:
    """Every event as the official client's types have it; `event:` and `type` say the same, the numbers go up by one."""
    found = []
    for i, block in enumerate(stream.decode().removesuffix("\n\n").split("\n\n")):
        name, data = block.split("\n")
        event = EVENT.validate_json(data.removeprefix("data: "))
        assert name == f"event: {event.type}" and event.sequence_number == i
        found.append(event)
    return found


# ---------------------------------------------------------------- bodies


@settings(deadline=None)  # pydantic builds its validators at the first call
@given(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=7), st.none() | st.text(max_size=9) | st.lists(message, max_size=4))
def test_any_object_is_a_call_or_a_refusal_that_names_a_field(fields: dict[str, Any], input: Any) -> None:
    if input is not None:
        fields["input"] = input
    try:
        found = responses.parse(json.dumps(fields).encode(), ["law"])
    except RequestError as error:
        assert error.status in (400, 404) and error.message and error.param
    else:
        assert any(m.role == "user" for m in found.ask.messages) and set(found.ask.options) <= {"top_p"}
        Response.model_validate_json(writer(found).completion([Delta(done=True)]))


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_an_object(body: bytes) -> None:
    with pytest.raises(RequestError):  # no bytes that short name an input
        responses.parse(body, ["law"])


def test_every_supported_field_arrives() -> None:
    found = call(model="lmgraph/law", instructions="be brief", stream=True, temperature=0, top_p=0.5, max_output_tokens=9, store=False, user="u",
                 metadata={"a": "b"}, text={"format": {"type": "text"}}, lmgraph={"trace": True, "conversation": "c1", "mode": "plan"})
    assert found.ask.messages == (Message("system", "be brief"), Message("user", "hi")) and found.ask.node == "law"
    assert (found.ask.temperature, found.ask.max_tokens, found.ask.options) == (0, 9, {"top_p": 0.5})
    assert (found.stream, found.trace, found.conversation, found.store) == (True, True, "c1", False)
    said = Response.model_validate_json(writer(found).completion([Delta("yes"), Delta(done=True)]))
    assert (said.instructions, said.temperature, said.top_p, said.max_output_tokens, said.metadata, said.user) == ("be brief", 0, 0.5, 9, {"a": "b"}, "u")
    assert said.conversation and said.conversation.id == "c1" and (said.model_extra or {})["store"] is False
    plain = call()
    assert (found.ask.mode, plain.ask.mode) == ("plan", "")
    assert (plain.stream, plain.trace, plain.conversation, plain.store, plain.ask.max_tokens, plain.ask.node) == (False, False, "", True, None, None)


def test_messages_of_text_parts_are_plain_and_an_earlier_output_can_be_sent_back() -> None:
    earlier = Response.model_validate_json(writer().completion([Delta("So it is."), Delta(done=True)])).output[0].model_dump(mode="json")
    ask = call(input=[{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
                      earlier, {"type": "message", "role": "user", "content": "c"}]).ask
    assert ask.messages == (Message("user", "a\nb"), Message("assistant", "So it is."), Message("user", "c")) and not ask.needs


def test_pictures_and_audio_become_parts_of_a_chat_and_are_needs() -> None:
    sound = {"data": "AA==", "format": "wav"}
    ask = call(input=[{"role": "user", "content": [
        {"type": "input_text", "text": "what is this"}, {"type": "input_image", "image_url": "data:image/png;base64,AA", "detail": "low"},
        {"type": "input_audio", "input_audio": sound}]}]).ask
    assert ask.needs == {"image", "audio"} and ask.query == "what is this"
    assert ask.messages[0].raw == {"role": "user", "content": [
        {"type": "text", "text": "what is this"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}},
        {"type": "input_audio", "input_audio": sound}]}


@pytest.mark.parametrize("fields", [{"previous_response_id": "resp_c1"}, {"conversation": "c1"}, {"conversation": {"id": "c1"}}, {"lmgraph": {"conversation": "c1"}}])
def test_a_conversation_has_four_spellings(fields: dict[str, Any]) -> None:
    found = call(**fields)
    said = Response.model_validate_json(writer(found).completion([Delta(done=True)]))
    assert found.conversation == "c1" and said.previous_response_id == fields.get("previous_response_id")


@pytest.mark.parametrize("fields", [
    {"tools": []}, {"tools": None, "tool_choice": "auto", "parallel_tool_calls": True, "max_tool_calls": 0}, {"include": []}, {"background": False},
    {"reasoning": {"effort": None}}, {"truncation": "disabled", "service_tier": "auto", "top_logprobs": 0}, {"stream_options": {"include_obfuscation": True}},
    {"safety_identifier": "x", "prompt_cache_key": "y"}, {"text": {"verbosity": "medium"}}, {"prompt": None, "anything": None},
])
def test_what_has_no_effect_is_taken(fields: dict[str, Any]) -> None:
    assert call(**fields).ask == call().ask


def user(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(("fields", "param", "words"), [
    ({"tools": [{"type": "web_search"}]}, "tools", "Supported: model, input"), ({"reasoning": {"effort": "low"}}, "reasoning", "not supported"),
    ({"background": True}, "background", "not supported"), ({"include": ["x"]}, "include", "not supported"), ({"truncation": "auto"}, "truncation", "not supported"),
    ({"text": {"format": {"type": "json_object"}}}, "text.format", "not supported"), ({"text": {"verbosity": "low"}}, "text.verbosity", "not supported"),
    ({"seed": 3}, "seed", "not supported"), ({"input": None}, "input", "input is missing"), ({"input": []}, "input", "at least one"),
    ({"input": 7}, "input", "a number, expected text"), ({"input": ["x"]}, "input[0]", "text, expected an object"),
    ({"input": [{"type": "function_call_output", "output": ""}]}, "input[0].type", "only messages"), ({"input": [{"role": "tool", "content": ""}]}, "input[0].role", "valid: system"),
    ({"input": [{"role": "assistant", "content": "x"}]}, "input", "no message with role user"), ({"input": [{"role": "user"}]}, "input[0].content", "missing"),
    ({"input": [{"role": "user", "content": "x"}] * 2049}, "input", "at most 2,048"), ({"input": "\ud800"}, "input", "surrogate"),
    ({"input": user({"type": "input_file"})}, "input[0].content[0].type", "valid: input_text"), ({"input": user(3)}, "input[0].content[0].type", "valid: input_text"),
    ({"input": user({"type": "input_text"})}, "input[0].content[0].text", "missing"), ({"input": user({"type": "input_text", "text": "\udfff"})}, "input[0].content[0].text", "surrogate"),
    ({"input": user({"type": "input_image", "file_id": "f"})}, "input[0].content[0].image_url", "missing"),
    ({"input": user({"type": "input_audio", "input_audio": "x"})}, "input[0].content[0].input_audio", "expected an object"),
    ({"instructions": ["x"]}, "instructions", "a list, expected text"), ({"metadata": {"a": 1}}, "metadata", "at most 16"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "at most 16"), ({"max_output_tokens": 0}, "max_output_tokens", "0, expected"),
    ({"previous_response_id": "chatcmpl-1"}, "previous_response_id", "begins with resp_"), ({"previous_response_id": "resp_"}, "previous_response_id", "names no"),
    ({"conversation": {}}, "conversation.id", "missing"), ({"conversation": ""}, "conversation", "names no"), ({"lmgraph": {"conversation": "x" * 129}}, "lmgraph.conversation", "names no"),
    ({"conversation": 3}, "conversation", "a number, expected text"), ({"conversation": "a/b"}, "conversation", "names no"), ({"lmgraph": {"progress": True}}, "lmgraph", "valid: trace, conversation, mode"),
    ({"lmgraph": {"mode": "stroll"}}, "lmgraph.mode", "valid: single, vote, auto, walk, plan"), ({"lmgraph": {"mode": 3}}, "lmgraph.mode", "a number, expected text"),
    ({"conversation": "a", "previous_response_id": "resp_a"}, "previous_response_id", "give one"), ({"lmgraph": {"trace": 1}}, "lmgraph.trace", "true or false"),
])
def test_a_bad_body_is_refused_with_the_field_and_what_was_expected(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        call(**fields)
    assert caught.value.param == param and words in caught.value.message and caught.value.status == 400


def test_an_unknown_model_is_a_404() -> None:
    with pytest.raises(RequestError, match="Valid: lmgraph, lmgraph/law") as caught:
        call(model="gpt-6")
    assert caught.value.status == 404


# ---------------------------------------------------------------- what is written


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), max_size=6), st.sampled_from(("stop", "length", "content_filter", "")))
def test_a_stream_has_the_documented_order_and_adds_up_to_the_whole_response(texts: list[str], finish: str) -> None:
    deltas = [*map(Delta, texts), Delta(done=True, finish=finish, usage=USAGE)]
    streaming, text = writer(), "".join(texts)
    found = events(b"".join(map(streaming.chunk, deltas)) + streaming.end(deltas[-1]))
    whole = Response.model_validate_json(writer().completion(deltas))
    status = "completed" if finish in ("stop", "") else "incomplete"
    assert [e.type for e in found] == [*OPENING, *["response.output_text.delta"] * len(texts), *CLOSING, f"response.{status}"]
    assert [e.delta for e in found if e.type == "response.output_text.delta"] == texts
    assert found[-1].response == whole and whole.status == status and whole.output_text == text
    assert found[-2].item == whole.output[0] and found[-3].part.text == found[-4].text == text and found[2].item.content == []
    assert found[0].response.status == "in_progress" and not found[0].response.output and found[0].response.usage is None
    assert whole.usage and (whole.usage.input_tokens, whole.usage.output_tokens, whole.usage.total_tokens) == (3, 2, 5)
    reason = whole.incomplete_details.reason if whole.incomplete_details else None
    assert reason == {"length": "max_output_tokens", "content_filter": "content_filter"}.get(finish)
    assert (whole.id, whole.output[0].id, whole.model, whole.created_at, whole.error) == ("resp_1", "msg_1", "lmgraph/law", 7, None)


def test_the_trace_and_what_went_wrong_with_memory_are_in_the_last_event_and_in_the_whole_response() -> None:
    last = Delta(done=True, finish="stop")
    found = events(writer().end(last, trace={"steps": []}, notes={"kept": False}))
    whole = Response.model_validate_json(writer().completion([last], {"steps": []}, {"kept": False}))
    assert found[-1].response.model_extra == whole.model_extra and (whole.model_extra or {})["lmgraph"] == {"trace": {"steps": []}, "kept": False}


def test_an_error_in_the_middle_is_an_error_event_and_a_failed_response_with_the_text_so_far() -> None:
    streaming = writer()
    found = events(streaming.chunk(Delta("half")) + streaming.fail(WorkerError("out of order", "Start it.")))
    assert [e.type for e in found] == [*OPENING, "response.output_text.delta", "error", "response.failed"]
    assert (found[-2].code, found[-2].message, found[-2].param) == ("worker_error", "out of order Start it.", None)
    failed = found[-1].response
    assert failed.status == "failed" and failed.error.code == "server_error" and failed.output_text == "half" and failed.output[0].status == "incomplete"
    early = events(writer().fail(RequestError("no", param="input", code="overloaded", status=429)))
    assert [e.type for e in early[-2:]] == ["error", "response.failed"] and early[-1].response.error.code == "rate_limit_exceeded"
    assert early[-2].param == "input"


# ---------------------------------------------------------------- over loopback


def ask_over_loopback(answer: Callable[[responses.Call], list[bytes]], ask: Callable[[openai.OpenAI], Any]) -> Any:
    """What `ask` gives with the official client against a server that parses bodies and sends what `answer` writes."""

    async def handle(request: web.Request) -> web.StreamResponse:
        found = responses.parse(await request.read(), ["law"])
        response = web.StreamResponse(headers={"content-type": "text/event-stream" if found.stream else "application/json"})
        await response.prepare(request)
        for piece in answer(found):
            await response.write(piece)
        return response

    async def run() -> Any:
        app = web.Application()
        app.router.add_post("/v1/responses", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site.name
        port = runner.addresses[0][1]

        def use() -> Any:
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
                return ask(client)

        try:
            return await asyncio.to_thread(use)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def echo(found: responses.Call) -> list[bytes]:
    """The query, word by word, the last one whole with its usage."""
    deltas = [*(Delta(word) for word in found.ask.query.split()), Delta(done=True, finish="stop", usage=USAGE)]
    written = writer(found)
    return [*(piece for d in deltas if (piece := written.chunk(d))), written.end(deltas[-1])] if found.stream else [written.completion(deltas)]


def test_the_official_client_reads_the_same_answer_whole_and_as_a_stream() -> None:
    def ask(client: openai.OpenAI) -> Any:
        whole = client.responses.create(model="lmgraph/law", input="ein Öl 🦆", instructions="be brief", store=False)
        return whole, list(client.responses.create(model="lmgraph/law", input="ein Öl 🦆", instructions="be brief", store=False, stream=True))

    whole, stream = ask_over_loopback(echo, ask)
    assert whole.output_text == "einÖl🦆" and whole.usage.total_tokens == 5 and whole.instructions == "be brief"
    assert [e.delta for e in stream if e.type == "response.output_text.delta"] == ["ein", "Öl", "🦆"]
    assert stream[-1].type == "response.completed" and stream[-1].response == whole


def test_the_official_clients_stream_helper_folds_our_events() -> None:
    def ask(client: openai.OpenAI) -> Any:
        with client.responses.stream(model="lmgraph/law", input="a b") as stream:
            return [e.type for e in stream], stream.get_final_response()

    kinds, final = ask_over_loopback(echo, ask)
    assert final.output_text == "ab" and kinds[-1] == "response.completed"


def test_the_official_client_sees_a_failure_in_the_middle() -> None:
    def fail(found: responses.Call) -> list[bytes]:
        written = writer(found)
        return [written.chunk(Delta("half")), written.fail(WorkerError("out of order"))]

    found = ask_over_loopback(fail, lambda client: list(client.responses.create(model="lmgraph", input="x", stream=True)))
    assert [e.type for e in found[-2:]] == ["error", "response.failed"] and found[-2].message == "out of order"
    assert found[-1].response.error.message == "out of order" and found[-1].response.output_text == "half"
