"""The gateway's API as an OpenAPI 3.1 document: every path, what it takes, what it answers, every status that can come.

Pure. It says what `app` does; what the bodies are is `schemas`' business. tests/test_openapi.py holds both to what the gateway does.
(OpenAPI Specification 3.1.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmgraph.serve.schemas import FLAG, NUMBER, REPLICAS, TEXT, WHOLE, Schema, answered, record, ref, taken

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
    503: "No master, a dead store, or a worker that is being started.",
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
            "schemas": {**taken(nodes), **answered()},
            "responses": {str(status): _failure(status) for status in FAILURES},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "Made by `lmgraph keys create`: lmg-..."}},
        },
    }


# ---------------------------------------------------------------- paths


def _answers() -> dict[str, Any]:
    shown = ("x-lmgraph-node", "x-lmgraph-probability", "x-lmgraph-trace", "x-lmgraph-conversation", "x-lmgraph-cache")
    event = {**record({"event": TEXT}, data=TEXT), "description": "one event of the stream; its data is JSON, or [DONE]"}
    chat = _reply("The answer: whole, or with `stream` as chunks that end with [DONE].", ref("ChatCompletion"), shown)
    chat["content"][EVENTS] = {"schema": event}
    response = _reply("The response: whole, or with `stream` as its events.", ref("Response"), shown)
    response["content"][EVENTS] = {"schema": event}
    decided = _reply("One decision, or one for each query.", {"oneOf": [ref("Decision"), ref("DecisionList")]})
    return {
        "/v1/chat/completions": {"post": _operation("createChatCompletion", "An answer", chat, ANSWER, body=ref("ChatRequest"))},
        "/v1/responses": {
            "post": _operation("createResponse", "An answer, in the Responses API", response, ANSWER, body=ref("ResponseRequest"))
        },
        "/v1/route": {"post": _operation("route", "Only the master's decision", decided, (*BODY, 429, 502), body=ref("RouteRequest"))},
        "/v1/models": {"get": _operation("listModels", "The graph and its nodes", _reply("The models.", ref("Models")))},
    }


def _graph() -> dict[str, Any]:
    seen = _parameter("If-Match", "header", TEXT, "the version that the caller has seen")
    graph = _reply("The graph.", ref("GraphAnswer"), ("etag",))
    whole, patch = record(graph=ref("Graph")), {"type": "object", "description": 'e.g. {"nodes": {"law": null}} takes a node out'}

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
        "/v1/live": {"get": _operation("live", "How each node does; for polling", _reply("Counts since the start.", ref("Live")))},
    }


def _memory(nodes: Sequence[str]) -> dict[str, Any]:
    asked = (
        _parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": 500, "default": 50}, "most entries"),
        _parameter("before", "query", NUMBER, "conversations last used before this time, in seconds since 1970"),
        _parameter("node", "query", {"type": "string", "examples": list(nodes)[:1]}, "turns that this node answered instead"),
    )
    id = _parameter("id", "path", {"type": "string", "minLength": 1}, "a conversation")
    listed = _reply("Conversations; with `node`, turns. Newest first.", {"anyOf": [ref("ConversationList"), ref("TurnList")]})
    deleted = _reply("It is gone.", record(id=TEXT, deleted={"const": True}))
    return {
        "/v1/history": {"get": _operation("listHistory", "What was asked", listed, (400,), parameters=asked)},
        "/v1/history/{id}": {
            "parameters": [id],
            "get": _operation("getConversation", "The turns of a conversation", _reply("The turns.", ref("Conversation")), (404,)),
            "delete": _operation("deleteConversation", "Forget a conversation", deleted, (404,)),
        },
        "/v1/cache": {
            "delete": _operation("purgeCache", "Empty the cache", _reply("How many went.", record(purged=WHOLE)), security=ADMIN)
        },
    }


def _state() -> dict[str, Any]:
    ready = record(
        status={"enum": ["ready", "not ready"]}, master=FLAG, store=FLAG, nodes={"type": "object", "additionalProperties": REPLICAS}
    )
    alive = _operation("health", "Whether the process is there", _reply("It is.", record(status={"const": "ok"})), door=(), security=[])
    loaded = _operation("readiness", "Whether the master is loaded", _reply("It is.", ready), door=(), security=[])
    loaded["responses"]["503"] = _reply("Not yet.", ready)
    return {
        "/healthz": {"get": alive},
        "/readyz": {"get": loaded},
        "/metrics": {"get": _operation("metrics", "Figures for Prometheus", _reply("A page of them.", TEXT, kinds=("text/plain",)))},
        "/openapi.json": {"get": _operation("document", "This document", _reply("It.", record(openapi=TEXT, info={"type": "object"})))},
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


# ---------------------------------------------------------------- pieces


def _failure(status: int) -> Schema:
    return _reply(FAILURES[status], ref("Error"), {429: ("retry-after",), 401: ("www-authenticate",)}.get(status, ()))


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
