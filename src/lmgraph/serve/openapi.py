"""The gateway's API as an OpenAPI 3.1 document: every path, what it takes, what it answers, every status that can come.

Pure. It says what `app` does and `wire`, `responses` read; tests/test_openapi.py holds it to that. (OpenAPI Specification 3.1.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmgraph import graphschema
from lmgraph.serve import responses, wire

Schema = dict[str, Any]
TEXT, FLAG, NUMBER, WHOLE = {"type": "string"}, {"type": "boolean"}, {"type": "number"}, {"type": "integer", "minimum": 0}
SHARE = {"type": "number", "minimum": 0, "maximum": 1}
REPLICAS = {"type": "array", "items": {"type": "object"}}
JSON, EVENTS = "application/json", "text/event-stream"
FAILURES = {
    400: "The request cannot be used; `param` names the field. For a graph, `problems` has every one.",
    401: "An API key is needed, or the one shown is not known.",
    403: "Not for this key, or not for a page of another site.",
    404: "There is no such thing: path, model or conversation.",
    408: "The body did not arrive in time.",
    409: "It does not fit what is there: an unknown functional token, nothing to undo, a file that was changed.",
    412: "The graph is at another version than If-Match names.",
    413: "The body is too large.",
    429: "Too many answers in the making, or the key's rate is used up.",
    502: "No worker could answer.",
    503: "No master, or a dead store.",
    504: "No worker answered in time.",
}
DOOR = (401, 403, 503)
"""what any path that looks at keys can answer"""
BODY = (400, 408, 413)
ANSWER = (*BODY, 404, 429, 502, 504)
OPTIONAL: list[Schema] = [{}, {"key": []}]
ADMIN: list[Schema] = [{"key": []}]


def document(version: str, nodes: Sequence[str]) -> dict[str, Any]:
    """The document for a gateway of this version whose graph has these nodes. JSON."""
    about = "Many language models as one: OpenAI-compatible answers from a graph of experts."
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "lmgraph",
            "version": version,
            "description": about,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": OPTIONAL,
        "paths": {**_answers(), **_graph(), **_memory(nodes), **_state(), **_page()},
        "components": {
            "schemas": {**_requests(nodes), **_replies()},
            "responses": {str(status): _failure(status) for status in FAILURES},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "Made by `lmgraph keys create`: lmg-..."}},
        },
    }


# ---------------------------------------------------------------- paths


def _answers() -> dict[str, Any]:
    shown = ("x-lmgraph-node", "x-lmgraph-probability", "x-lmgraph-trace", "x-lmgraph-conversation", "x-lmgraph-cache")
    event = {**_object({"event": TEXT}, data=TEXT), "description": "one event of the stream; its data is JSON, or [DONE]"}
    chat = _reply("The answer: whole, or with `stream` as chunks that end with [DONE].", _ref("ChatCompletion"), shown)
    chat["content"][EVENTS] = {"schema": event}
    response = _reply("The response: whole, or with `stream` as its events.", _ref("Response"), shown)
    response["content"][EVENTS] = {"schema": event}
    decided = _reply("One decision, or one for each query.", {"oneOf": [_ref("Decision"), _ref("DecisionList")]})
    return {
        "/v1/chat/completions": {"post": _operation("createChatCompletion", "An answer", chat, ANSWER, body=_ref("ChatRequest"))},
        "/v1/responses": {
            "post": _operation("createResponse", "An answer, in the Responses API", response, ANSWER, body=_ref("ResponseRequest"))
        },
        "/v1/route": {"post": _operation("route", "Only the master's decision", decided, (*BODY, 429, 502), body=_ref("RouteRequest"))},
        "/v1/models": {"get": _operation("listModels", "The graph and its nodes", _reply("The models.", _ref("Models")))},
    }


def _graph() -> dict[str, Any]:
    seen = _parameter("If-Match", "header", TEXT, "the version that the caller has seen")
    graph = _reply("The graph.", _ref("GraphAnswer"), ("etag",))
    whole, patch = _object(graph=_ref("Graph")), {"type": "object", "description": 'e.g. {"nodes": {"law": null}} takes a node out'}

    def edit(id: str, summary: str, body: Schema | None, kinds: Sequence[str] = (JSON,)) -> Schema:
        return _operation(
            id, summary, graph, (*(BODY if body else (400,)), 409, 412), body=body, kinds=kinds, parameters=(seen,), security=ADMIN
        )

    return {
        "/v1/graph": {
            "get": _operation("getGraph", "The graph as it is", graph),
            "put": edit("putGraph", "Replace the graph", whole),
            "patch": edit("patchGraph", "Change parts of the graph (RFC 7396)", patch, (JSON, "application/merge-patch+json")),
        },
        "/v1/graph/undo": {"post": edit("undoGraph", "Go back to the version before", None)},
        "/v1/live": {"get": _operation("live", "How each node does; for polling", _reply("Counts since the start.", _ref("Live")))},
    }


def _memory(nodes: Sequence[str]) -> dict[str, Any]:
    asked = (
        _parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": 500, "default": 50}, "most entries"),
        _parameter("before", "query", NUMBER, "conversations last used before this time, in seconds since 1970"),
        _parameter("node", "query", {"type": "string", "examples": list(nodes)[:1]}, "turns that this node answered instead"),
    )
    id = _parameter("id", "path", {"type": "string", "minLength": 1}, "a conversation")
    listed = _reply("Conversations; with `node`, turns. Newest first.", {"anyOf": [_ref("ConversationList"), _ref("TurnList")]})
    deleted = _reply("It is gone.", _object(id=TEXT, deleted={"const": True}))
    return {
        "/v1/history": {"get": _operation("listHistory", "What was asked", listed, (400,), parameters=asked)},
        "/v1/history/{id}": {
            "parameters": [id],
            "get": _operation("getConversation", "The turns of a conversation", _reply("The turns.", _ref("Conversation")), (404,)),
            "delete": _operation("deleteConversation", "Forget a conversation", deleted, (404,)),
        },
        "/v1/cache": {
            "delete": _operation("purgeCache", "Empty the cache", _reply("How many went.", _object(purged=WHOLE)), security=ADMIN)
        },
    }


def _state() -> dict[str, Any]:
    ready = _object(
        status={"enum": ["ready", "not ready"]}, master=FLAG, store=FLAG, nodes={"type": "object", "additionalProperties": REPLICAS}
    )
    alive = _operation("health", "Whether the process is there", _reply("It is.", _object(status={"const": "ok"})), door=(), security=[])
    loaded = _operation("readiness", "Whether the master is loaded", _reply("It is.", ready), door=(), security=[])
    loaded["responses"]["503"] = _reply("Not yet.", ready)
    return {
        "/healthz": {"get": alive},
        "/readyz": {"get": loaded},
        "/metrics": {"get": _operation("metrics", "Figures for Prometheus", _reply("A page of them.", TEXT, kinds=("text/plain",)))},
        "/openapi.json": {"get": _operation("document", "This document", _reply("It.", _object(openapi=TEXT, info={"type": "object"})))},
    }


def _page() -> dict[str, Any]:
    name = _parameter("file", "path", {"type": "string", "minLength": 1}, "a file of the page")
    files = _reply("The file.", TEXT, kinds=("text/css", "text/javascript", "text/html", "image/svg+xml"))
    page = _operation("page", "The page", _reply("HTML.", TEXT, kinds=("text/html",)), door=(403,), security=[])
    return {
        "/": {"get": page},
        "/web/{file}": {
            "get": _operation("pageFile", "What the page is made of", files, (404,), parameters=(name,), door=(403,), security=[])
        },
    }


# ---------------------------------------------------------------- what is sent


def _requests(nodes: Sequence[str]) -> dict[str, Schema]:
    model = {"enum": [wire.MODEL, *(f"{wire.MODEL}/{name}" for name in nodes)], "default": wire.MODEL}
    question = {"type": "string", "pattern": r"\S"}
    count = {"type": ["integer", "null"], "minimum": 1, "maximum": 1_000_000}
    name = {"type": "string", "pattern": f"^{wire.CONVERSATION.pattern}$"}
    common = {"model": model, "stream": _or_null(FLAG), "temperature": _range(2), "top_p": _range(1)}
    texts = [_part(kind, text=TEXT) for kind in responses.TEXTS]
    pictures = [_part("input_image", image_url=TEXT), _part("input_audio", input_audio={"type": "object"})]
    parts = [
        _part("text", text=TEXT),
        _part("image_url", image_url={"type": "object"}),
        _part("input_audio", input_audio={"type": "object"}),
    ]
    asked = _object(role={"const": "user"}, content={"anyOf": [question, {"type": "array", "minItems": 1}]})
    said = {"type": "array", "minItems": 1, "maxItems": wire.MAX_MESSAGES, "contains": asked}
    own = {"trace": FLAG, "conversation": name}
    text = {"format": _object(type={"const": "text"}), "verbosity": {"const": "medium"}}
    metadata = {"maxProperties": 16, "propertyNames": {"maxLength": 64}, "additionalProperties": {"type": "string", "maxLength": 512}}
    return {
        "ChatRequest": _object(
            {
                **common,
                "max_tokens": count,
                "max_completion_tokens": count,
                "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 128},
                "stream_options": _or_null(_object({"include_usage": FLAG})),
                "lmgraph": {**_object({**own, "progress": FLAG}), "additionalProperties": False},
            },
            messages={**said, "items": _message(wire.ROLES, {"anyOf": [TEXT, {"type": "array", "items": {"oneOf": parts}}]})},
        ),
        "ResponseRequest": {
            **_object(
                {
                    **common,
                    "instructions": _or_null(TEXT),
                    "max_output_tokens": count,
                    "store": _or_null(FLAG),
                    "previous_response_id": {"type": ["string", "null"], "pattern": f"^{responses.PREFIX}{wire.CONVERSATION.pattern}$"},
                    "conversation": {"oneOf": [name, _object(id=name), {"type": "null"}]},
                    "metadata": _or_null({"type": "object", **metadata}),
                    "user": _or_null(TEXT),
                    "text": _or_null(_object(text)),
                    "lmgraph": {**_object(own), "additionalProperties": False},
                },
                input={
                    "oneOf": [
                        question,
                        {
                            **said,
                            "items": _message(
                                responses.ROLES, {"anyOf": [TEXT, {"type": "array", "items": {"oneOf": [*texts, *pictures]}}]}
                            ),
                        },
                    ]
                },
            ),
            "description": f"Supported: {responses.FIELDS}. Other fields are taken where they ask for nothing.",
        },
        "RouteRequest": {
            "oneOf": [
                {**_object(query=question), "additionalProperties": False},
                {**_object(queries=_list(question) | {"minItems": 1, "maxItems": wire.MAX_QUERIES}), "additionalProperties": False},
            ]
        },
        "Graph": {name: value for name, value in graphschema.schema().items() if name != "$schema"},
    }


def _message(roles: Sequence[str], content: Schema) -> Schema:
    return _object(role={"enum": list(roles)}, content=content)


def _part(kind: str, **fields: Schema) -> Schema:
    return _object(type={"const": kind}, **fields)


# ---------------------------------------------------------------- what is answered


def _replies() -> dict[str, Schema]:
    usage = _object(prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE)
    message = _object({"tool_calls": _list({"type": "object"})}, role={"const": "assistant"}, content=_or_null(TEXT))
    choice = _object(index=WHOLE, message=message, finish_reason=TEXT)
    step = _object(
        {"voter": FLAG}, node=TEXT, request=TEXT, ms=NUMBER, first_ms=NUMBER, attempts=WHOLE, error=TEXT, usage={"type": "object"}
    )
    vote = _object(votes=_list(_object(node=TEXT, key=_or_null(TEXT), weight=NUMBER)), winner=TEXT, share=SHARE, judge=TEXT)
    traced = _object({"decision": _or_null(_ref("Decision")), "steps": _list(step), "vote": vote, "cache": FLAG})
    decision: dict[str, Schema] = {
        **dict.fromkeys(("node", "query", "rewritten", "chosen", "rewrite_note"), TEXT),
        **{"token": WHOLE, "shortened": WHOLE, "fallback": FLAG, "stayed": FLAG, "probability": SHARE},
        "alternatives": _list(_object(node=TEXT, probability=SHARE)),
        "ms": _object(tokenise=NUMBER, prefill=NUMBER, decode=NUMBER),
        "tokens": _object(prompt=WHOLE, rewrite=WHOLE),
    }
    answer = _object(
        {"lmgraph": _object(trace=traced)},
        id=TEXT,
        object={"const": "chat.completion"},
        created=WHOLE,
        model=TEXT,
        choices=_list(choice),
        usage=usage,
    )
    response = _object(
        {"lmgraph": _object(trace=traced)},
        id={"type": "string", "pattern": f"^{responses.PREFIX}"},
        object={"const": "response"},
        created_at=WHOLE,
        status={"enum": ["completed", "incomplete"]},
        model=TEXT,
        output=_list(_object(type={"const": "message"}, role={"const": "assistant"}, content=_list(_part("output_text", text=TEXT)))),
        usage=_object(input_tokens=WHOLE, output_tokens=WHOLE, total_tokens=WHOLE),
        error={"type": "null"},
    )
    node = _object(active=WHOLE, answers=WHOLE, failures=WHOLE, replicas=REPLICAS)
    turn = _object(
        **dict.fromkeys(("id", "conversation", "answer", "node", "title"), TEXT),
        request={"type": "object"},
        trace={"type": "object"},
        created=NUMBER,
    )
    conversation = _object(id=TEXT, title=TEXT, turns=WHOLE, created=NUMBER, updated=NUMBER)
    shown = {"file": _or_null(TEXT), "undo": WHOLE, "editable": FLAG, "graph": _ref("Graph")}
    model = _object(id=TEXT, object={"const": "model"}, created=WHOLE, owned_by=TEXT, description=TEXT)
    told = _object({"problems": _list(TEXT)}, message=TEXT, type=TEXT, param=_or_null(TEXT), code=TEXT)
    return {
        "Error": _object(error=told),
        "ChatCompletion": answer,
        "Response": response,
        "Decision": _object({"scope": NUMBER}, **decision),
        "DecisionList": _listed(_ref("Decision")),
        "Models": _listed(model),
        "GraphAnswer": _object(object={"const": "graph"}, version={"type": "string", "pattern": "^[0-9a-f]{12}$"}, **shown),
        "Live": _object(version=TEXT, nodes={"type": "object", "additionalProperties": node}),
        "Turn": turn,
        "TurnList": _listed(_ref("Turn")),
        "ConversationList": _listed(conversation),
        "Conversation": _object(object={"const": "conversation"}, id=TEXT, data=_list(_ref("Turn"))),
    }


def _failure(status: int) -> Schema:
    return _reply(FAILURES[status], _ref("Error"), {429: ("retry-after",), 401: ("www-authenticate",)}.get(status, ()))


# ---------------------------------------------------------------- pieces


def _operation(
    id: str,
    summary: str,
    good: Schema,
    bad: Sequence[int] = (),
    *,
    body: Schema | None = None,
    kinds: Sequence[str] = (JSON,),
    parameters: Sequence[Schema] = (),
    door: Sequence[int] = DOOR,
    security: list[Schema] | None = None,
) -> Schema:
    replies = {"200": good, **{str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted({*bad, *door})}}
    found: Schema = {"operationId": id, "summary": summary, "responses": replies}
    if parameters:
        found["parameters"] = list(parameters)
    if body is not None:
        found["requestBody"] = {"required": True, "content": {kind: {"schema": body} for kind in kinds}}
    if security is not None:
        found["security"] = security
    return found


def _reply(description: str, schema: Schema, headers: Sequence[str] = (), kinds: Sequence[str] = (JSON,)) -> Schema:
    named = {name: {"schema": TEXT} for name in ("x-request-id", *headers)}
    return {"description": description, "headers": named, "content": {kind: {"schema": schema} for kind in kinds}}


def _parameter(name: str, place: str, schema: Schema, description: str) -> Schema:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": description}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(optional: Mapping[str, Schema] | None = None, /, **required: Schema) -> Schema:
    """An object with these fields; others may be there too."""
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _listed(items: Schema) -> Schema:
    return _object(object={"const": "list"}, data=_list(items))


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _range(high: float) -> Schema:
    return {"type": ["number", "null"], "minimum": 0, "maximum": high}
