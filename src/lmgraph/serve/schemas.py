"""What goes over the gateway's wire, as JSON Schemas: bodies that are taken, bodies that are answered.

Pure. It says what `wire` and `responses` read and write; which path takes or answers what is `openapi`'s business. (JSON Schema 2020-12,
as OpenAPI 3.1 has it.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmgraph import graphschema
from lmgraph.graph import MODES
from lmgraph.serve import responses, wire

Schema = dict[str, Any]
TEXT, FLAG, NUMBER, WHOLE = {"type": "string"}, {"type": "boolean"}, {"type": "number"}, {"type": "integer", "minimum": 0}
SHARE = {"type": "number", "minimum": 0, "maximum": 1}
NOTES = "kept: this turn is in no history, the store is down; recalled: the turns before could not be read"
REPLICAS = {"type": "array", "items": {"type": "object"}}


def taken(nodes: Sequence[str]) -> dict[str, Schema]:
    """Bodies that are taken, by name, for a graph with these nodes."""
    model = {"enum": [wire.MODEL, *(f"{wire.MODEL}/{name}" for name in nodes)], "default": wire.MODEL}
    question = {"type": "string", "pattern": r"\S"}
    count = {"type": ["integer", "null"], "minimum": 1, "maximum": 1_000_000}
    name = {"type": "string", "pattern": f"^{wire.CONVERSATION.pattern}$"}
    common = {"model": model, "stream": or_null(FLAG), "temperature": _range(2), "top_p": _range(1)}
    texts = [_part(kind, text=TEXT) for kind in responses.TEXTS]
    pictures = [_part("input_image", image_url=TEXT), _part("input_audio", input_audio={"type": "object"})]
    parts = [
        _part("text", text=TEXT),
        _part("image_url", image_url={"type": "object"}),
        _part("input_audio", input_audio={"type": "object"}),
    ]
    asked = record(role={"const": "user"}, content={"anyOf": [question, {"type": "array", "minItems": 1}]})
    said = {"type": "array", "minItems": 1, "maxItems": wire.MAX_MESSAGES, "contains": asked}
    how = {"enum": list(MODES), "description": "how it is answered, whatever the graph says; a walk begins with a conversation"}
    own: dict[str, Schema] = {"trace": FLAG, "conversation": name, "mode": how}
    watching = {**FLAG, "description": "a stream begins with the decision, then tells the steps of a walk as they begin and end"}
    text = {"format": record(type={"const": "text"}), "verbosity": {"const": "medium"}}
    metadata = {"maxProperties": 16, "propertyNames": {"maxLength": 64}, "additionalProperties": {"type": "string", "maxLength": 512}}
    return {
        "ChatRequest": record(
            {
                **common,
                "max_tokens": count,
                "max_completion_tokens": count,
                "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 128},
                "stream_options": or_null(record({"include_usage": FLAG})),
                "lmgraph": {**record({**own, "progress": watching}), "additionalProperties": False},
            },
            messages={**said, "items": _message(wire.ROLES, {"anyOf": [TEXT, {"type": "array", "items": {"oneOf": parts}}]})},
        ),
        "ResponseRequest": {
            **record(
                {
                    **common,
                    "instructions": or_null(TEXT),
                    "max_output_tokens": count,
                    "store": or_null(FLAG),
                    "previous_response_id": {"type": ["string", "null"], "pattern": f"^{responses.PREFIX}{wire.CONVERSATION.pattern}$"},
                    "conversation": {"oneOf": [name, record(id=name), {"type": "null"}]},
                    "metadata": or_null({"type": "object", **metadata}),
                    "user": or_null(TEXT),
                    "text": or_null(record(text)),
                    "lmgraph": {**record(own), "additionalProperties": False},
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
                {**record(query=question), "additionalProperties": False},
                {**record(queries=array(question) | {"minItems": 1, "maxItems": wire.MAX_QUERIES}), "additionalProperties": False},
            ]
        },
        "Graph": {name: value for name, value in graphschema.schema().items() if name != "$schema"},
    }


def _message(roles: Sequence[str], content: Schema) -> Schema:
    return record(role={"enum": list(roles)}, content=content)


def _part(kind: str, **fields: Schema) -> Schema:
    return record(type={"const": kind}, **fields)


# ---------------------------------------------------------------- what is answered


def answered() -> dict[str, Schema]:
    """Bodies that are answered, by name."""
    usage = record(prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE)
    message = record({"tool_calls": array({"type": "object"})}, role={"const": "assistant"}, content=or_null(TEXT))
    choice = record(index=WHOLE, message=message, finish_reason=TEXT)
    asked = {"node": TEXT, "request": TEXT}
    step = record(
        {"voter": FLAG, "hop": WHOLE, "answer": TEXT},
        **asked,
        ms=NUMBER,
        first_ms=NUMBER,
        attempts=WHOLE,
        error=TEXT,
        usage={"type": "object"},
    )
    vote = record(votes=array(record(node=TEXT, key=or_null(TEXT), weight=NUMBER)), winner=TEXT, share=SHARE, judge=TEXT)
    hop = record(**asked, needs=array(WHOLE), probability=SHARE)
    stopped = {"enum": ["end", "hops", "seconds", "tokens", "cost", "loop", "master"]}
    walk = record(mode={"enum": ["walk", "plan"]}, stopped=stopped, compose=TEXT, hops=array(hop))
    traced = record({"decision": or_null(ref("Decision")), "steps": array(step), "vote": vote, "walk": walk, "cache": FLAG})
    own = {**record({"kept": {"const": False}, "recalled": {"const": False}, "trace": traced}), "description": NOTES}
    decision: dict[str, Schema] = {
        **dict.fromkeys(("node", "query", "rewritten", "chosen", "rewrite_note"), TEXT),
        **{"token": WHOLE, "shortened": WHOLE, "fallback": FLAG, "stayed": FLAG, "probability": SHARE},
        "alternatives": array(record(node=TEXT, probability=SHARE)),
        "ms": record(tokenise=NUMBER, prefill=NUMBER, decode=NUMBER),
        "tokens": record(prompt=WHOLE, rewrite=WHOLE),
    }
    answer = record(
        {"lmgraph": own},
        id=TEXT,
        object={"const": "chat.completion"},
        created=WHOLE,
        model=TEXT,
        choices=array(choice),
        usage=usage,
    )
    response = record(
        {"lmgraph": own},
        id={"type": "string", "pattern": f"^{responses.PREFIX}"},
        object={"const": "response"},
        created_at=WHOLE,
        status={"enum": ["completed", "incomplete"]},
        model=TEXT,
        output=array(record(type={"const": "message"}, role={"const": "assistant"}, content=array(_part("output_text", text=TEXT)))),
        usage=record(input_tokens=WHOLE, output_tokens=WHOLE, total_tokens=WHOLE),
        error={"type": "null"},
    )
    node = record(active=WHOLE, answers=WHOLE, failures=WHOLE, replicas=REPLICAS)
    turn = record(
        **dict.fromkeys(("id", "conversation", "answer", "node", "title"), TEXT),
        request={"type": "object"},
        trace={"type": "object"},
        created=NUMBER,
    )
    conversation = record(id=TEXT, title=TEXT, turns=WHOLE, created=NUMBER, updated=NUMBER)
    shown = {"file": or_null(TEXT), "undo": WHOLE, "editable": FLAG, "graph": ref("Graph")}
    model = record(id=TEXT, object={"const": "model"}, created=WHOLE, owned_by=TEXT, description=TEXT)
    told = record({"problems": array(TEXT)}, message=TEXT, type=TEXT, param=or_null(TEXT), code=TEXT)
    return {
        "Error": record(error=told),
        "ChatCompletion": answer,
        "Response": response,
        "Decision": record({"scope": NUMBER, "more": SHARE}, **decision),
        "DecisionList": listed(ref("Decision")),
        "Models": listed(model),
        "GraphAnswer": record(object={"const": "graph"}, version={"type": "string", "pattern": "^[0-9a-f]{12}$"}, **shown),
        "Live": record(version=TEXT, nodes={"type": "object", "additionalProperties": node}),
        "Turn": turn,
        "TurnList": listed(ref("Turn")),
        "ConversationList": listed(conversation),
        "Conversation": record(object={"const": "conversation"}, id=TEXT, data=array(ref("Turn"))),
    }


# ---------------------------------------------------------------- pieces


def ref(name: str) -> Schema:
    """The schema of that name."""
    return {"$ref": f"#/components/schemas/{name}"}


def record(optional: Mapping[str, Schema] | None = None, /, **required: Schema) -> Schema:
    """An object with these fields; others may be there too."""
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def array(items: Schema) -> Schema:
    """A list of these."""
    return {"type": "array", "items": items}


def listed(items: Schema) -> Schema:
    """OpenAI's list object of these."""
    return record(object={"const": "list"}, data=array(items))


def or_null(schema: Schema) -> Schema:
    """This, or null, which is as if it were missing."""
    return {"anyOf": [schema, {"type": "null"}]}


def _range(high: float) -> Schema:
    return {"type": ["number", "null"], "minimum": 0, "maximum": high}
