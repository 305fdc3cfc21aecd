"""How servers that put LoRAs on one base are spoken to: vLLM, LoRAX and llama.cpp. Pure: requests and answers are plain data.

It knows where each lists what it has, what of a listing matters, how a request names an adapter, and how vLLM loads one while it runs. It
does not know connections, nor when anything is asked (inventory.py does). Read from the servers' sources: vLLM's OpenAI server
(entrypoints/serve/lora, entrypoints/openai/models), LoRAX's router (router/src/server.rs, lib.rs), llama.cpp's tools/server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmgraph.graph import WorkerSpec

LISTINGS = {"vllm": ("/v1/models",), "lorax": ("/info",), "llamacpp": ("/props", "/v1/models", "/lora-adapters")}
"""dialect -> what is asked, in this order, to learn what a server has; beside /v1, not below it"""
NUMBERED = frozenset({"llamacpp"})
"""dialects whose requests name an adapter by a number, which is another one's after a new start, and which pass over an unknown number"""
LOADING = "/v1/load_lora_adapter"
SWITCH = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
RESERVED = frozenset({"model", "lora", "adapter_id", "adapter_source", "adapter_parameters", "merged_adapters"})
"""fields of a request that choose the weights: the graph's word, never a client's"""


@dataclass(frozen=True)
class Wanted:
    """What a node needs of its server: the `base`, and the `adapter` on it ('': the base alone). `path`, `source`: see WorkerSpec."""

    dialect: str
    base: str
    adapter: str = ""
    path: str = ""
    source: str = ""

    @classmethod
    def of(cls, spec: WorkerSpec) -> Wanted:
        """What a worker that names a dialect needs."""
        return cls(spec.dialect, spec.model, spec.adapter, spec.adapter_path, spec.adapter_source)


@dataclass(frozen=True)
class Stock:
    """What a server has. `bases`: every name its base goes by; `adapters`: their names (None: it does not list them)."""

    bases: tuple[str, ...]
    adapters: tuple[str, ...] | None
    numbers: tuple[int, ...] = ()
    """llama.cpp only: the number of each adapter"""


def stock(dialect: str, answers: Sequence[Any]) -> Stock:
    """What the answers to LISTINGS[dialect] say, in that order. Raises ValueError where one is no such listing."""
    if dialect == "vllm":
        cards = _rows(_field(answers[0], "data"))
        named = [(_text(card, "id"), bool(card.get("parent"))) for card in cards]
        return Stock(tuple(name for name, adapter in named if not adapter), tuple(name for name, adapter in named if adapter))
    if dialect == "lorax":
        return Stock((_text(answers[0], "model_id"),), None)
    props, models, loras = answers
    cards = _rows(_field(models, "data"))
    names = [_text(props, "model_path"), props.get("model_alias"), *(_text(card, "id") for card in cards)]
    for card in cards:
        names += card["aliases"] if isinstance(card.get("aliases"), list) else []
    rows = _rows(loras)
    numbers = tuple(row["id"] for row in rows if type(row.get("id")) is int)
    if len(numbers) != len(rows):
        raise ValueError("expected a number `id` in each row")
    bases = dict.fromkeys(name for name in names if name and isinstance(name, str))
    return Stock(tuple(bases), tuple(_text(row, "path") for row in rows), numbers)


def lacks(wanted: Wanted, has: Stock) -> list[str]:
    """What is wrong with a server for a node, a sentence without its subject each; []: nothing."""
    out = []
    if not _places(wanted.base, has.bases, files=wanted.dialect != "vllm"):
        out.append(f"serves {_list(has.bases)}, and not the base {wanted.base!r}")
    if wanted.adapter and has.adapters is not None:
        found = _places(wanted.adapter, has.adapters, files=wanted.dialect == "llamacpp")
        if not found:
            out.append(f"has no adapter {wanted.adapter!r}; it has {_list(has.adapters)}")
        elif len(found) > 1:
            out.append(f"has several adapters that {wanted.adapter!r} may mean: {_list([has.adapters[i] for i in found])}")
    return out


def loads(wanted: Wanted, has: Stock) -> bool:
    """Whether all that is missing is an adapter which the server may be told to load."""
    return bool(wanted.path and wanted.base in has.bases and has.adapters is not None and wanted.adapter not in has.adapters)


def advice(wanted: Wanted) -> str:
    """What to do about a server that lacks something."""
    return {
        "vllm": "In graph.yaml `model` is the name that the server serves its base by. Start it with --enable-lora --lora-modules "
        f"NAME=PATH, or give the node an adapter_path and the server the variable {SWITCH}.",
        "lorax": "In graph.yaml `model` is what the server was started with (--model-id), or the end of its path.",
        "llamacpp": "In graph.yaml `model` is the server's --alias or file, and `adapter` the file of one --lora, or the end of its path.",
    }[wanted.dialect]


def load(wanted: Wanted) -> dict[str, str]:
    """The body for LOADING that has a vLLM load the node's adapter."""
    return {"lora_name": wanted.adapter, "lora_path": wanted.path}


def loaded(wanted: Wanted, status: int, said: Any) -> str:
    """'' where the adapter is there after LOADING was answered (somebody else may have loaded it), else why it is not.

    `said` is what reading.detail gives of the body: an object where the server has words for it, else its bare text.
    """
    words = str(said.get("message", said)) if isinstance(said, dict) else str(said)
    if status == 200 or (status == 400 and "already been loaded" in words):
        return ""
    if status in (404, 405) and not isinstance(said, dict):
        return f"does not load adapters while it runs ({wanted.adapter!r} is wanted from {wanted.path}): start it with {SWITCH}"
    return f"did not load the adapter {wanted.adapter!r} from {wanted.path}: it answered {status}: {words[:300]}"


def shape(wanted: Wanted, has: Stock, body: Mapping[str, Any]) -> dict[str, Any]:
    """A chat completion's body as this server takes it for this node. `has` lacks nothing."""
    out = {name: value for name, value in body.items() if name not in RESERVED}
    if wanted.dialect == "vllm":
        return {"model": wanted.adapter or wanted.base, **out}
    if wanted.dialect == "llamacpp":
        # Also for the base alone: a request that names none gets every adapter that the server was started with.
        chosen = _places(wanted.adapter, has.adapters or (), files=True) if wanted.adapter else []
        scales = [{"id": number, "scale": float(i in chosen)} for i, number in enumerate(has.numbers)]
        return {"model": wanted.base, **out, "lora": scales}
    if isinstance(out.get("stop"), str):  # it takes a list only
        out["stop"] = [out["stop"]]
    if (most := out.pop("max_completion_tokens", None)) is not None:  # it passes over the newer name, and over what it stands for
        out["max_tokens"] = most
    source = {"adapter_source": wanted.source} if wanted.source else {}
    return {"model": wanted.adapter, **out, **source}  # '' is its base


def ended(dialect: str, finish: str) -> str:
    """Why an answer ended, in OpenAI's words. LoRAX says content_filter where one of the request's stop texts came."""
    return "stop" if dialect == "lorax" and finish == "content_filter" else finish


def _places(name: str, listed: Sequence[str], files: bool) -> list[int]:
    """Where a name stands in a list: the very same; among files else every path that ends in it, with or without .gguf."""
    for i, other in enumerate(listed):
        if other == name:
            return [i]
    end = _parts(name)
    return [i for i, other in enumerate(listed) if end and _parts(other)[-len(end) :] == end] if files else []


def _parts(path: str) -> list[str]:
    return [part for part in path.replace("\\", "/").removesuffix(".gguf").split("/") if part]


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:20])
    return (shown + (f" and {len(names) - 20} more" if len(names) > 20 else "")) or "none"


def _field(found: Any, name: str) -> Any:
    if not isinstance(found, dict) or name not in found:
        raise ValueError(f"expected an object with `{name}`")
    return found[name]


def _text(found: Any, name: str) -> str:
    value = _field(found, name)
    if not isinstance(value, str):
        raise ValueError(f"expected a text as `{name}`")
    return value


def _rows(found: Any) -> list[dict[str, Any]]:
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError("expected a list of objects")
    return found
