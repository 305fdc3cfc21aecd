"""The JSON Schema of graph.yaml, for editors. Pure; what no schema can say is checked by graphfile and graph."""

from __future__ import annotations

from typing import Any

from lmgraph.graph import DIALECTS, KINDS, MODALITIES, MODES, MOST_HOPS, REWRITE, SOURCES, VERSION, VOTERS


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of graph.yaml, for editors; `loads` checks more than a schema can say."""
    text, number = {"type": "string"}, {"type": "number"}
    worker = {
        "type": "object",
        "required": ["kind"],
        "additionalProperties": False,
        "properties": {
            "kind": {"enum": list(KINDS), "description": "embedded: llama.cpp in this process; openai: any OpenAI-compatible server"},
            "model": {**text, "description": "catalogue name or GGUF file (embedded), model name (openai)"},
            "system": {**text, "description": "system prompt put before every request"},
            "urls": {"oneOf": [text, {"type": "array", "items": text}], "description": "base URLs of replicas, e.g. http://host:8000/v1"},
            "key_env": {**text, "description": "environment variable that holds the API key"},
            "dialect": {
                "enum": ["", *DIALECTS],
                "description": "openai only: a server that puts adapters on its base, and is looked at for both",
            },
            "adapter": {**text, "description": "LoRA that the server puts on `model` for this node; needs a dialect"},
            "adapter_path": {**text, "description": "vllm only: where the server finds the adapter, to load it while it runs"},
            "adapter_source": {"enum": ["", *SOURCES], "description": "lorax only: where the server fetches the adapter from"},
            "stream": {"type": "boolean", "description": "openai only; false: whole answers are asked for whole, not as a stream"},
            "timeout_s": {**number, "exclusiveMinimum": 0},
            "start_timeout_s": {
                **number,
                "minimum": 0,
                "description": "openai only: seconds that a server which takes no connection (at zero replicas) is tried again",
            },
            "retries": {"type": "integer", "minimum": 0, "maximum": 10},
            "max_tokens": {"type": "integer", "minimum": 1},
            "temperature": {**number, "minimum": 0, "maximum": 2},
            "answers": {"type": "object", "description": "scripted only: request -> answer, '*' for any"},
            "price": {
                "type": "array",
                "items": {**number, "minimum": 0},
                "minItems": 2,
                "maxItems": 2,
                "description": "of a million tokens: [prompt, completion]",
            },
        },
    }
    competence = {**number, "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    answer = {
        "type": "object",
        "required": ["mode"],
        "additionalProperties": False,
        "description": "a node's own wins over the graph's",
        "properties": {
            "mode": {
                "enum": list(MODES),
                "description": "single: one worker answers; vote: several do, and their answers are weighed; walk: the master chooses "
                "hop by hop; plan: it writes all steps first; auto: a plan where one expert is not enough",
            },
            "hops": {"type": "integer", "minimum": 1, "maximum": MOST_HOPS, "description": "most steps of a walk"},
            "seconds": {**number, "exclusiveMinimum": 0, "description": "longest time of a walk"},
            "tokens": {"type": "integer", "minimum": 1, "description": "most tokens of all steps of a walk together"},
            "cost": {**number, "minimum": 0, "description": "greatest cost of a walk, by the workers' prices"},
            "compose": {**text, "description": "node whose worker makes one answer out of a walk's parts"},
            "workers": {"type": "integer", "minimum": VOTERS[0], "maximum": VOTERS[1], "description": "how many vote"},
            "voters": {
                "type": "object",
                "additionalProperties": competence,
                "description": "node -> measured probability that its worker is right; none named: the master's best nodes vote",
            },
            "judge": {**text, "description": "node whose worker makes one answer out of free texts, which no vote can compare"},
        },
    }
    node = {
        "type": "object",
        "required": ["token", "description", "worker"],
        "additionalProperties": False,
        "properties": {
            "token": {"type": "integer", "minimum": 0, "description": "number of the functional token; never re-used for another node"},
            "description": text,
            "worker": worker,
            "rewrite": {"enum": list(REWRITE)},
            "threshold": {**number, "minimum": 0, "maximum": 1},
            "accepts": {"oneOf": [text, {"type": "array", "items": {"enum": list(MODALITIES)}}]},
            "fallback": {**text, "description": "node that takes over when this worker fails"},
            "adapter": text,
            "answer": answer,
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lmgraph graph",
        "type": "object",
        "required": ["version", "nodes", "edges"],
        "additionalProperties": False,
        "properties": {
            "version": {"const": VERSION},
            "master": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "bundle": {**text, "description": "built-in bundle or folder"},
                    "server": {**text, "pattern": "^https?://", "description": "llama.cpp server that has the master's weights"},
                    "key_env": {**text, "description": "environment variable that holds that server's key"},
                    "threshold": {**number, "minimum": 0, "maximum": 1},
                    "fallback": {**text, "description": "node asked when the master's probability is below the threshold"},
                    "scope": {**number, "description": "log-odds against ordinary words below which the fallback answers: of no node"},
                    "margin": {
                        **number,
                        "minimum": 0,
                        "maximum": 1,
                        "description": "how much more probable another node must be to leave the one that a conversation is with",
                    },
                },
            },
            "answer": answer,
            "nodes": {"type": "object", "additionalProperties": node, "propertyNames": {"pattern": "^[A-Za-z0-9_-]{1,64}$"}},
            "edges": {"type": "object", "additionalProperties": {"oneOf": [text, {"type": "array", "items": text}]}},
        },
    }
