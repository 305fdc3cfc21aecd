"""OpenAI's wire format: request bodies into asks, deltas into chunks and completions, errors into their shape.

Pure: bytes in, frozen things and bytes out; no I/O, no clock. It knows the fields of chat completions that lmgraph itself reads; all
others travel on to the worker in `Ask.options`. It does not know whether a node's worker supports them.
(OpenAI API reference, chat completions; error objects as in its "Error codes" page.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmgraph import errors, quickjson
from lmgraph.errors import LmgraphError, RequestError
from lmgraph.graph import MODES
from lmgraph.types import Ask, Delta, Message

MODEL = "lmgraph"
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PARTS = {"text": "", "image_url": "image", "input_audio": "audio"}
"""type of a content part -> modality that a node must accept"""
CONVERSATION = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
MAX_MESSAGES = 2048
MAX_QUERIES = 1000
"""queries in one call of /v1/route"""
AWAY = (errors.WorkerStarting, errors.StoreError, errors.AssetError, errors.MasterError)
FAULTS = ((errors.WorkerTimeout, 504), (AWAY, 503), (errors.OutsideError, 502), (errors.UserError, 400))
"""kind of error -> HTTP status; of several that fit, the first"""
Own = Mapping[str, Any] | None


@dataclass(frozen=True)
class Chat:
    """A parsed chat completion: what is asked, and how the answer is to be sent."""

    ask: Ask
    stream: bool = False
    include_usage: bool = False
    trace: bool = False
    conversation: str = ""
    """the client's name for it, '' for none"""
    progress: bool = False
    """a stream that begins at once, with the decision as its first piece and then every step of a walk"""


def load(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises RequestError for anything else: bad UTF-8, NaN, endless numbers, absurd depth."""
    try:
        value = _decode(body.decode("utf-8-sig"))
    except RecursionError:
        raise RequestError("The body is nested too deeply.") from None
    except ValueError as error:
        raise RequestError(f"The body is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise RequestError(f"The body is {kind_of(value)}, expected an object.")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


_decode = json.JSONDecoder(parse_constant=_no_constant).decode


def parse_chat(body: bytes, nodes: Collection[str]) -> Chat:
    """A body of POST /v1/chat/completions. Raises RequestError naming the field, what was found and what was expected."""
    given = load(body)
    model = take(given, "model", str, MODEL)
    messages = given.pop("messages", None)
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages is {kind_of(messages)}, expected a list with at least one message.", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"{len(messages):,} messages; at most {MAX_MESSAGES:,} are taken.", param="messages")
    needs: set[str] = set()
    turns = tuple(_message(m, f"messages[{i}]", needs) for i, m in enumerate(messages))
    if not any(m.role == "user" for m in turns):
        raise RequestError("There is no message with role user.", param="messages")
    stream_options = take(given, "stream_options", dict, {})
    own = own_of(given, trace=bool, progress=bool, conversation=str, mode=str)
    limits = [number(given, name, 1, 1_000_000, whole=True) for name in ("max_completion_tokens", "max_tokens")]
    stream = take(given, "stream", bool, False)
    for name, low, high, whole in (("top_p", 0, 1, False), ("n", 1, 128, True)):
        if (value := number(given, name, low, high, whole=whole)) is not None and not (name == "n" and value == 1):
            given[name] = value
    ask = Ask(
        turns,
        node=node_of(model, nodes),
        max_tokens=limits[0] or limits[1],
        temperature=number(given, "temperature", 0, 2),
        options={name: value for name, value in given.items() if value is not None},
        needs=frozenset(needs),
        whole=not stream,
        mode=own["mode"],
    )
    if (conversation := own["conversation"]) and not CONVERSATION.fullmatch(conversation):
        raise RequestError("A conversation's name has up to 128 letters, digits and _ . : -", param=f"{MODEL}.conversation")
    return Chat(ask, stream, stream_options.get("include_usage") is True, own["trace"], conversation, own["progress"] and stream)


def own_of(given: dict[str, Any], **kinds: type) -> dict[str, Any]:
    """Take what is lmgraph's own out of `given`: the fields of `kinds`, false or '' where they are missing.

    Raises RequestError for a field that is none of these, for a wrong type, and for a mode that there is not.
    """
    own = dict(take(given, MODEL, dict, {}))
    found = {name: take(own, name, kind, kind(), f"{MODEL}.") for name, kind in kinds.items()}
    if own:
        raise RequestError(f"{MODEL}.{next(iter(own))!s:.40} is unknown; valid: {', '.join(kinds)}.", param=MODEL)
    if found["mode"] not in ("", *MODES):
        raise RequestError(f"{MODEL}.mode is {found['mode']!r:.40}; valid: {', '.join(MODES)}.", param=f"{MODEL}.mode")
    return found


def node_of(model: str, nodes: Collection[str]) -> str | None:
    """The node that a `model` field pins, None for `lmgraph`. Raises RequestError (404) for a model that is none of ours."""
    if model == MODEL:
        return None
    name = model.removeprefix(f"{MODEL}/")
    if name == model or name not in nodes:
        valid = ", ".join([MODEL, *(f"{MODEL}/{n}" for n in nodes)])
        raise RequestError(f"The model {model[:100]!r} does not exist. Valid: {valid}", param="model", code="model_not_found", status=404)
    return name


def _message(value: Any, where: str, needs: set[str]) -> Message:
    if not isinstance(value, dict):
        raise RequestError(f"{where} is {kind_of(value)}, expected an object.", param=where)
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise RequestError(f"{where}.role is {str(role)[:40]!r}; valid: {', '.join(ROLES)}.", param=f"{where}.role")
    plain = value.keys() <= {"role", "content"} and role in ("system", "user", "assistant")
    if isinstance(content, str):
        text = content
    elif content is None and role == "assistant":
        text, plain = "", False
    elif isinstance(content, list):
        text, plain = _parts(content, f"{where}.content", needs), False
    else:
        raise RequestError(f"{where}.content is {kind_of(content)}, expected text or a list of parts.", param=f"{where}.content")
    return Message(role, characters(text, f"{where}.content"), None if plain else value)


def characters(text: str, where: str) -> str:
    """The text of field `where` as it is. Raises RequestError when it holds half of a surrogate pair, which no UTF-8 can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{where} holds half of a surrogate pair, which is no character.", param=where) from None
    return text


def _parts(parts: Sequence[Any], where: str, needs: set[str]) -> str:
    texts: list[str] = []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in PARTS:
            raise RequestError(f"{where}[{i}].type is {str(kind)[:40]!r}; valid: {', '.join(PARTS)}.", param=f"{where}[{i}]")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise RequestError(f"{where}[{i}].text is {kind_of(part.get('text'))}, expected text.", param=f"{where}[{i}].text")
            texts.append(part["text"])
        else:
            needs.add(PARTS[kind])
    return "\n".join(texts)


def parse_route(body: bytes) -> tuple[list[str], bool]:
    """(queries, whether a batch was asked for) of POST /v1/route: `{"query": text}` or `{"queries": [text, ...]}`."""
    given = load(body)
    batch = "queries" in given
    queries = given.get("queries") if batch else [given.get("query")]
    name = "queries" if batch else "query"
    if not isinstance(queries, list) or not queries or not all(isinstance(q, str) and q.strip() for q in queries):
        raise RequestError('Expected {"query": text} or {"queries": [text, ...]}, none of them empty.', param=name)
    if len(queries) > MAX_QUERIES:
        raise RequestError(f"{len(queries):,} queries; at most {MAX_QUERIES:,} in one call.", param=name)
    return queries, batch


def take(given: dict[str, Any], name: str, kind: type, default: Any, where: str = "") -> Any:
    """Take field `name` out of `given`; `default` where it is missing or null. `where` stands before its name in an error.

    Raises RequestError when it is not of `kind` (str, bool, dict or list).
    """
    value = given.pop(name, None)
    if value is None:
        return default
    if not isinstance(value, kind):
        words = {str: "text", bool: "true or false", dict: "an object", list: "a list"}[kind]
        raise RequestError(f"{where}{name} is {kind_of(value)}, expected {words}.", param=f"{where}{name}")
    return value


def number(given: dict[str, Any], name: str, low: float, high: float, *, whole: bool = False) -> Any:
    """Take the number `name` out of `given`, None where it is missing or null. Raises RequestError outside low..high."""
    value = given.pop(name, None)
    if value is None:
        return None
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not low <= value <= high:
        found = str(value)[:40] if right else kind_of(value)
        kind = "a whole number" if whole else "a number"
        raise RequestError(f"{name} is {found}, expected {kind} from {low:,} to {high:,}.", param=name)
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "missing"
    return {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}[type(value)]


class Writer:
    """Writes one answer in OpenAI's format: `id` and `model` are the same in every piece. `created` is in seconds since 1970."""

    def __init__(self, id: str, model: str, created: int) -> None:
        self._start = f'"id":{_dump(id)},"object":"chat.completion%s","created":{created},"model":{_dump(model)},"choices":'
        self._chunk = "data: {" + self._start % ".chunk"
        self._text = self._chunk + '[{"index":0,"delta":{"content":'
        self._first = True

    def news(self, kind: str, what: Mapping[str, Any]) -> bytes:
        """The decision, or what a walk is at (`kind`: decision, progress), as a piece of a stream before any piece of the answer."""
        return f'{self._chunk}[],"lmgraph":{{"{kind}":{_dump(what)}}}}}\n\n'.encode()

    def chunk(self, delta: Delta) -> bytes:
        """A piece of a stream, as a server-sent event; b'' where there is nothing to say."""
        if delta.choices:
            self._first = False
            return f"{self._chunk}{_dump(delta.choices)}}}\n\n".encode()
        if delta.done or not delta.text:
            return b""
        if self._first:
            self._first = False
            return f"{self._chunk}{_dump([_choice({'role': 'assistant', 'content': delta.text})])}}}\n\n".encode()
        return f'{self._text}{_dump(delta.text)}}},"finish_reason":null}}]}}\n\n'.encode()

    def end(self, last: Delta, *, include_usage: bool = False, trace: Own = None, notes: Own = None) -> bytes:
        """The last pieces of a stream: why it ended, with notes; usage and trace where they were asked for; [DONE]."""
        ending = [] if last.choices else [_choice({}, last.finish or "stop")]
        closing = f"{self._chunk}{_dump(ending)}{_own(None, notes)}}}\n\n" if ending or notes else ""
        if include_usage or trace is not None:
            closing += f'{self._chunk}[],"usage":{_dump(usage_of(last))}{_own(trace)}}}\n\n'
        return (closing + "data: [DONE]\n\n").encode()

    def completion(self, deltas: Sequence[Delta], trace: Own = None, notes: Own = None) -> bytes:
        """A whole answer, folded out of its pieces (the last one closes it). `notes` are fields of lmgraph's own beside the trace."""
        last = deltas[-1]
        return f'{{{self._start % ""}{_dump(_fold(deltas))},"usage":{_dump(usage_of(last))}{_own(trace, notes)}}}'.encode()


def _choice(delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish}


def own_fields(trace: Own, notes: Own) -> dict[str, Any]:
    """What an answer says of lmgraph's own: {"lmgraph": {...}}, or nothing."""
    own = {**({} if trace is None else {"trace": trace}), **(notes or {})}
    return {MODEL: own} if own else {}


def _own(trace: Own, notes: Own = None) -> str:
    own = own_fields(trace, notes)
    return f",{_dump(own)[1:-1]}" if own else ""


def _fold(deltas: Sequence[Delta]) -> list[dict[str, Any]]:
    """Choices of a whole answer. Pieces of tool calls with the same index are joined, as the API's clients do it."""
    choices: dict[int, dict[str, Any]] = {}

    def at(index: int) -> dict[str, Any]:
        return choices.setdefault(index, {"index": index, "message": {"role": "assistant", "content": None}, "finish_reason": None})

    def say(message: dict[str, Any], text: str) -> None:
        message["content"] = (message["content"] or "") + text

    for delta in deltas:
        if not delta.choices:
            if delta.text:
                say(at(0)["message"], delta.text)
            continue
        for piece in delta.choices:
            choice = at(piece.get("index") or 0)
            for name, value in (piece.get("delta") or {}).items():
                if name == "tool_calls":
                    _join_calls(choice["message"].setdefault("tool_calls", []), value or [])
                elif name == "content" and isinstance(value, str):
                    say(choice["message"], value)
                elif name != "content" and value is not None:
                    known = choice["message"].get(name)
                    choice["message"][name] = known + value if isinstance(known, str) and name != "role" else value
            if piece.get("logprobs"):
                for kind, values in piece["logprobs"].items():
                    if isinstance(values, list):
                        choice.setdefault("logprobs", {}).setdefault(kind, []).extend(values)
            choice["finish_reason"] = piece.get("finish_reason") or choice["finish_reason"]
    first = at(0)
    first["finish_reason"] = first["finish_reason"] or deltas[-1].finish or "stop"
    if first["message"]["content"] is None and "tool_calls" not in first["message"]:
        first["message"]["content"] = ""
    return [choices[i] for i in sorted(choices)]


def _join_calls(known: list[dict[str, Any]], pieces: Sequence[Mapping[str, Any]]) -> None:
    for piece in pieces:
        index = piece.get("index", len(known))
        while len(known) <= min(index, 127):
            known.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = known[min(index, 127)], piece.get("function") or {}
        call["id"] = piece.get("id") or call["id"]
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""


def usage_of(last: Delta) -> dict[str, int]:
    """OpenAI's usage object out of what the worker counted."""
    prompt, completion = last.usage.get("prompt_tokens", 0), last.usage.get("completion_tokens", 0)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def models(nodes: Mapping[str, str], created: int) -> bytes:
    """The list of GET /v1/models; `nodes` are names and descriptions."""
    rows = [(MODEL, "the graph: the master chooses"), *((f"{MODEL}/{name}", text) for name, text in nodes.items())]
    data = [{"id": id, "object": "model", "created": created, "owned_by": MODEL, "description": text} for id, text in rows]
    return _dump({"object": "list", "data": data}).encode()


def status_of(error: LmgraphError) -> int:
    """HTTP status of an error: whose fault it is."""
    if isinstance(error, RequestError):
        return error.status
    return next((status for kind, status in FAULTS if isinstance(error, kind)), 500)


def error(failure: LmgraphError) -> bytes:
    """The error object of an HTTP answer."""
    status = status_of(failure)
    kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    message = f"{failure.message} {failure.hint}".strip()
    shown: dict[str, Any] = {"message": message, "type": kind, "param": getattr(failure, "param", None), "code": failure.code}
    if (problems := getattr(failure, "problems", None)) is not None:
        shown["problems"] = list(problems)
    return _dump({"error": shown}).encode()


def error_event(failure: LmgraphError) -> bytes:
    """An error in the middle of a stream: an event, after which the stream is closed without [DONE]."""
    return b"data: " + error(failure) + b"\n\n"


_dump = quickjson.dumps
