"""OpenAI's Responses API in its plain-text core: bodies of POST /v1/responses into asks, deltas into responses and stream events.

Pure: bytes in, frozen things and bytes out; no I/O, no clock. It knows the format; `wire` has what it shares with chat completions. What
is not plain text and would have an effect is refused and named. What a conversation is, and what stands behind `resp_` in an id, is the
gateway's. (OpenAI API reference, responses and their streaming events.)
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmgraph.errors import LmgraphError, RequestError
from lmgraph.serve.wire import (
    CONVERSATION,
    MAX_MESSAGES,
    MODEL,
    Chat,
    Own,
    characters,
    kind_of,
    load,
    node_of,
    number,
    own_fields,
    own_of,
    status_of,
    take,
    usage_of,
)
from lmgraph.types import Ask, Delta, Message

ROLES = ("system", "developer", "user", "assistant")
TEXTS = ("input_text", "output_text")
PARTS = {"input_image": "image", "input_audio": "audio"}
"""type of a content part that is not text -> modality that a node must accept"""
PREFIX = "resp_"
FIELDS = (
    "model, input, instructions, stream, temperature, top_p, max_output_tokens, store, previous_response_id, conversation, metadata, user, "
    'text: {"format": {"type": "text"}}, lmgraph'
)
WITHOUT_EFFECT = ("safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "stream_options")
"""fields that change no plain text, whatever they hold"""
DEFAULTS = {
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
    "truncation": ("disabled",),
    "service_tier": ("auto", "default"),
}
"""field -> values besides nothing that ask for what is done anyhow"""
ENDS = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""why a worker stopped -> why the response is incomplete; all else is complete"""
CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}
"""HTTP status -> code of a failed response, which is one of OpenAI's own"""


@dataclass(frozen=True)
class Call(Chat):
    """A parsed body: what is asked, and how the answer is to be sent and kept.

    `conversation` is that of `conversation` or `lmgraph.conversation`, or what stands behind `resp_` in `previous_response_id`.
    """

    store: bool = True
    """whether the answer may be looked up or gone on with later"""
    echo: Mapping[str, Any] = field(default_factory=dict)
    """fields of the body that the response repeats"""


def parse(body: bytes, nodes: Collection[str]) -> Call:
    """A body of POST /v1/responses. Raises RequestError naming the field, what was found and what was expected."""
    given = load(body)
    node = node_of(take(given, "model", str, MODEL), nodes)
    needs: set[str] = set()
    turns = _turns(given, needs)
    instructions = take(given, "instructions", str, None)
    if instructions is not None:
        turns.insert(0, Message("system", characters(instructions, "instructions")))
    own = own_of(given, trace=bool, conversation=str, mode=str)
    conversation, echo = _conversation(given, own["conversation"] or None)
    echo |= {"instructions": instructions, "metadata": _metadata(given), "user": characters(take(given, "user", str, ""), "user") or None}
    echo |= {"store": take(given, "store", bool, True), "max_output_tokens": number(given, "max_output_tokens", 1, 1_000_000, whole=True)}
    echo |= {"temperature": number(given, "temperature", 0, 2), "top_p": number(given, "top_p", 0, 1)}
    stream = take(given, "stream", bool, False)
    _plain(take(given, "text", dict, {}))
    for name, value in given.items():
        nothing = not value or (isinstance(value, dict) and all(v is None for v in value.values()))
        if not nothing and name not in WITHOUT_EFFECT and value not in DEFAULTS.get(name, ()):
            raise _unsupported(name[:100])
    ask = Ask(
        tuple(turns),
        node=node,
        max_tokens=echo["max_output_tokens"],
        temperature=echo["temperature"],
        options={} if echo["top_p"] is None else {"top_p": echo["top_p"]},
        needs=frozenset(needs),
        mode=own["mode"],
    )
    return Call(ask, stream, True, own["trace"], conversation, store=echo["store"], echo=echo)


def _unsupported(name: str) -> RequestError:
    words = f"{name} is not supported as it is given: lmgraph has the plain-text core of the Responses API. Supported: {FIELDS}."
    return RequestError(words, param=name, code="unsupported_parameter")


def _turns(given: dict[str, Any], needs: set[str]) -> list[Message]:
    value = given.pop("input", None)
    if isinstance(value, str):
        return [Message("user", characters(value, "input"))]
    if not isinstance(value, list) or not value:
        raise RequestError(f"input is {kind_of(value)}, expected text or a list with at least one message.", param="input")
    if len(value) > MAX_MESSAGES:
        raise RequestError(f"{len(value):,} messages; at most {MAX_MESSAGES:,} are taken.", param="input")
    turns = [_message(item, f"input[{i}]", needs) for i, item in enumerate(value)]
    if not any(turn.role == "user" for turn in turns):
        raise RequestError("There is no message with role user.", param="input")
    return turns


def _message(value: Any, where: str, needs: set[str]) -> Message:
    if not isinstance(value, dict):
        raise RequestError(f"{where} is {kind_of(value)}, expected an object.", param=where)
    kind, role, content = value.get("type") or "message", value.get("role"), value.get("content")
    if kind != "message":
        words = f"{where}.type is {str(kind)[:40]!r}; only messages are supported."
        raise RequestError(words, param=f"{where}.type", code="unsupported_parameter")
    if role not in ROLES:
        raise RequestError(f"{where}.role is {str(role)[:40]!r}; valid: {', '.join(ROLES)}.", param=f"{where}.role")
    if isinstance(content, str):
        text, parts = characters(content, f"{where}.content"), None
    elif isinstance(content, list):
        found = [_part(part, f"{where}.content[{i}]", needs) for i, part in enumerate(content)]
        text = "\n".join(part["text"] for part in found if part["type"] == "text")
        parts = None if all(part["type"] == "text" for part in found) else found
    else:
        raise RequestError(f"{where}.content is {kind_of(content)}, expected text or a list of parts.", param=f"{where}.content")
    plain = parts is None and role != "developer"
    return Message(role, text, None if plain else {"role": role, "content": text if parts is None else parts})


def _part(value: Any, where: str, needs: set[str]) -> dict[str, Any]:
    """One content part as chat completions have it, which is what workers read."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in TEXTS:
        if not isinstance(value.get("text"), str):
            raise RequestError(f"{where}.text is {kind_of(value.get('text'))}, expected text.", param=f"{where}.text")
        return {"type": "text", "text": characters(value["text"], f"{where}.text")}
    if not isinstance(kind, str) or kind not in PARTS:
        raise RequestError(f"{where}.type is {str(kind)[:40]!r}; valid: {', '.join((*TEXTS, *PARTS))}.", param=f"{where}.type")
    needs.add(PARTS[kind])
    if kind == "input_audio":
        return {"type": kind, "input_audio": _required(value, "input_audio", dict, where)}
    picture = {"url": characters(_required(value, "image_url", str, where), f"{where}.image_url")}
    if detail := take(dict(value), "detail", str, None, f"{where}."):
        picture["detail"] = detail
    return {"type": "image_url", "image_url": picture}


def _required(value: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    found = take(dict(value), name, kind, None, f"{where}.")
    if found is None:
        raise RequestError(f"{where}.{name} is missing.", param=f"{where}.{name}")
    return found


def _conversation(given: dict[str, Any], ours: str | None) -> tuple[str, dict[str, Any]]:
    """(what is gone on with, '' for nothing; the fields that the response repeats about it)."""
    value = given.pop("conversation", None)
    theirs = _required(value, "id", str, "conversation") if isinstance(value, dict) else take({"": value}, "", str, None, "conversation")
    previous = take(given, "previous_response_id", str, None)
    named = {"conversation": theirs, f"{MODEL}.conversation": ours}
    if previous is not None:
        if not previous.startswith(PREFIX):
            words = f"previous_response_id is {previous[:40]!r}, expected the id of a response, which begins with {PREFIX}."
            raise RequestError(words, param="previous_response_id", code="previous_response_not_found")
        named["previous_response_id"] = previous.removeprefix(PREFIX)
    several = [name for name, id in named.items() if id is not None]
    if len(several) > 1:
        raise RequestError(f"{' and '.join(several)} say the same thing; give one of them.", param=several[-1])
    found = named[several[0]] if several else None
    if found is not None and not CONVERSATION.fullmatch(found):
        raise RequestError(f"{several[0]} names no conversation: up to 128 letters, digits and _ . : -", param=several[0])
    shown = None if previous is not None or found is None else {"id": found}
    return found or "", {"previous_response_id": previous, "conversation": shown}


def _metadata(given: dict[str, Any]) -> dict[str, str]:
    found: dict[str, Any] = take(given, "metadata", dict, {})
    if len(found) > 16 or any(len(n) > 64 or not isinstance(v, str) or len(v) > 512 for n, v in found.items()):
        raise RequestError("metadata is at most 16 texts of 512 characters, with names of 64 characters.", param="metadata")
    return {characters(name, "metadata"): characters(text, "metadata") for name, text in found.items()}


def _plain(text: Mapping[str, Any]) -> None:
    form = take(dict(text), "format", dict, {}, "text.")
    if form.get("type", "text") != "text":
        raise _unsupported("text.format")
    if text.get("verbosity") not in (None, "medium"):
        raise _unsupported("text.verbosity")


class Writer:
    """Writes one response. Its id is `resp_` + `id`, its message's `msg_` + `id`; `created` is in seconds since 1970.

    A stream is what `chunk` gives for each piece, then `end`; or `fail`, at any time. It has no [DONE].
    """

    def __init__(self, id: str, model: str, created: int, call: Call) -> None:
        self._item = f"msg_{id}"
        self._same: dict[str, Any] = {"id": PREFIX + id, "object": "response", "created_at": created, "model": model, **call.echo}
        self._place = f'"item_id":{json.dumps(self._item)},"output_index":0,"content_index":0,"logprobs":[]'
        self._count = 0
        self._texts: list[str] = []

    def chunk(self, delta: Delta) -> bytes:
        """A piece of a stream, behind the opening events where it is the first; b'' where there is nothing to say."""
        if delta.done or not delta.text:
            return b""
        opening = self._opening()
        self._texts.append(delta.text)
        return opening + self._text_event("delta", f'"delta":{json.dumps(delta.text)}')

    def end(self, last: Delta, *, include_usage: bool = True, trace: Own = None, notes: Own = None) -> bytes:
        """The last events of a stream: the text and what it is in, whole, then the response, with trace and notes where there are any.

        Usage is always in it: this format does not ask whether it is wanted.
        """
        opening, text = self._opening(), "".join(self._texts)
        whole = self._whole(text, last, trace, notes)
        part = {"item_id": self._item, "output_index": 0, "content_index": 0, "part": _output(text)}
        return b"".join(
            (
                opening,
                self._text_event("done", f'"text":{json.dumps(text)}'),
                self._event("response.content_part.done", part),
                self._event("response.output_item.done", {"output_index": 0, "item": whole["output"][0]}),
                self._event(f"response.{whole['status']}", {"response": whole}),
            )
        )

    def fail(self, failure: LmgraphError) -> bytes:
        """The last events of a stream that cannot go on: `error`, and `response.failed` with the text that there is."""
        opening, message = self._opening(), f"{failure.message} {failure.hint}".strip()
        told = {"code": failure.code, "message": message, "param": getattr(failure, "param", None)}
        error = {"code": CODES.get(status_of(failure), "server_error"), "message": message}
        output = [self._message("".join(self._texts), "incomplete")]
        response = self._response("failed", output, error)
        return opening + self._event("error", told) + self._event("response.failed", {"response": response})

    def completion(self, deltas: Sequence[Delta], trace: Own = None, notes: Own = None) -> bytes:
        """A whole response, folded out of its pieces (the last one closes it). `notes` are fields of lmgraph's own beside the trace."""
        text = "".join(delta.text for delta in deltas)
        return json.dumps(self._whole(text, deltas[-1], trace, notes), separators=(",", ":")).encode()

    def _opening(self) -> bytes:
        if self._count:
            return b""
        response = self._response("in_progress", [])
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        return b"".join(
            (
                self._event("response.created", {"response": response}),
                self._event("response.in_progress", {"response": response}),
                self._event("response.output_item.added", {"output_index": 0, "item": {**self._message("", "in_progress"), "content": []}}),
                self._event("response.content_part.added", {**place, "part": _output("")}),
            )
        )

    def _event(self, kind: str, fields: Mapping[str, Any]) -> bytes:
        data = json.dumps({"type": kind, "sequence_number": self._count, **fields}, separators=(",", ":"))
        self._count += 1
        return f"event: {kind}\ndata: {data}\n\n".encode()

    def _text_event(self, kind: str, text: str) -> bytes:
        """Written without an object in between: there is one for each piece of the answer."""
        kind, count = f"response.output_text.{kind}", self._count
        self._count += 1
        return f'event: {kind}\ndata: {{"type":"{kind}","sequence_number":{count},{self._place},{text}}}\n\n'.encode()

    def _message(self, text: str, status: str) -> dict[str, Any]:
        return {"type": "message", "id": self._item, "status": status, "role": "assistant", "content": [_output(text)]}

    def _whole(self, text: str, last: Delta, trace: Own, notes: Own) -> dict[str, Any]:
        reason = ENDS.get(last.finish)
        status = "incomplete" if reason else "completed"
        whole = self._response(status, [self._message(text, status)])
        whole["incomplete_details"] = {"reason": reason} if reason else None
        usage = usage_of(last)
        whole["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        return whole | own_fields(trace, notes)

    def _response(self, status: str, output: list[dict[str, Any]], error: Mapping[str, str] | None = None) -> dict[str, Any]:
        return {
            **self._same,
            "status": status,
            "error": error,
            "incomplete_details": None,
            "output": output,
            "usage": None,
            "background": False,
            "parallel_tool_calls": True,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": 0,
            "truncation": "disabled",
        }


def _output(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
