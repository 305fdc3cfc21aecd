"""Adapters: a small LoRA that the master puts on for a choice, as a GGUF for llama.cpp: a node's own, or a bundle's for all of a walk.

"Each node has its own octopus model" (Octopus v4, section 3.2): one base, one LoRA a node, swapped from request to request in one engine.
It knows the form of the file and for which master it was made; numpy and gguf only. How it is trained is train/'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lmgraph.assets import atomic, digest_of
from lmgraph.bundles import NAMES, Bundle, alike, flush, form, only, permute, read_tensors
from lmgraph.errors import AdapterError, VocabularyMismatch

MASTER = "lmgraph.master"
"""metadata: digest of the bundle that the adapter was trained on"""


def write(path: Path, tensors: Mapping[str, np.ndarray], base: Path, digest: str, name: str, first_id: int = 0) -> None:
    """`blk.N.KIND.lora_a` (r, in) and `.lora_b` (out, r; scaled) -> a GGUF adapter, written atomically.

    It is for the bundle of this digest; `base` are its base weights, or those merged. `input_rows`, `output_rows` (N, D), where there are
    any, are added to the rows of tokens `first_id` and on.
    """
    import gguf

    architecture, heads, kv_heads = form(gguf.GGUFReader(base))
    with atomic(path) as part:
        writer = gguf.GGUFWriter(part, architecture)
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        writer.add_string(MASTER, digest)
        rank = float(next(value.shape[0] for key, value in tensors.items() if key.endswith("lora_a")))
        writer.add_float32("adapter.lora.alpha", rank)
        for key, value in sorted(tensors.items()):
            if key.endswith("_rows"):
                for layer, data in _rows(key, value.astype(np.float32), first_id, rank).items():
                    writer.add_tensor(layer, data)
                continue
            _, layer, kind, half = key.split(".")
            data = value.astype(np.float32)
            if half == "lora_b" and kind in ("q_proj", "k_proj"):
                data = permute(data, heads if kind == "q_proj" else kv_heads)
            writer.add_tensor(f"blk.{layer}.{NAMES[kind]}.weight.{half}", np.ascontiguousarray(data))
        flush(writer)


def _rows(key: str, rows: np.ndarray, first_id: int, alpha: float) -> dict[str, np.ndarray]:
    """Differences of embeddings (N, D) as factors: llama.cpp looks up `lora_a` of the input (V, r), and divides by each layer's own r."""
    there = np.flatnonzero(np.any(rows, axis=1))
    picked = np.zeros((first_id + len(rows), len(there)), np.float16)
    picked[first_id + there, np.arange(len(there))] = 1
    scaled = rows[there] * (len(there) / alpha)
    if key == "input_rows":
        return {"token_embd.weight.lora_a": picked, "token_embd.weight.lora_b": np.ascontiguousarray(scaled.T)}
    return {"output.weight.lora_a": scaled, "output.weight.lora_b": picked}


def between(first: Bundle, second: Bundle, rank: int) -> tuple[dict[str, np.ndarray], float]:
    """(tensors of `walk.safetensors`, the least share of a layer's difference that they hold): what makes the second master of the first.

    Each layer's difference is cut to `rank` (singular values), float16; rows are those of nodes and of the end. Raises
    VocabularyMismatch where nodes or base differ.
    """
    alike(first, second)
    one, two = read_tensors(first.weights), read_tensors(second.weights)
    made, least = {}, 1.0
    for layer in sorted({key.removesuffix(".lora_a") for key in (*one, *two) if key.endswith(".lora_a")}):  # one of rows only has none
        there = [(sign, tensors) for sign, tensors in ((1, two), (-1, one)) if f"{layer}.lora_a" in tensors]
        a = np.concatenate([tensors[f"{layer}.lora_a"].astype(np.float32) for _, tensors in there])
        b = np.concatenate([sign * tensors[f"{layer}.lora_b"].astype(np.float32) for sign, tensors in there], axis=1)
        (left, inner), (right, outer) = np.linalg.qr(b), np.linalg.qr(a.T)
        u, values, v = np.linalg.svd(inner @ outer.T)
        root = np.sqrt(values[:rank])
        made[f"{layer}.lora_a"] = (root[:, None] * (v[:rank] @ right.T)).astype(np.float16)
        made[f"{layer}.lora_b"] = (left @ u[:, :rank] * root).astype(np.float16)
        whole = float(np.square(values).sum())
        least = min(least, float(np.square(values[:rank]).sum()) / whole if whole else 1.0)
    vocabulary = second.vocabulary
    named = [*vocabulary.nodes.values(), vocabulary.end_id - vocabulary.first_id]
    for key in ("input_rows", "output_rows"):
        made[key] = only((two[key].astype(np.float32) - one[key].astype(np.float32)).astype(np.float16), named)
    return made, least


def walk_path(bundle: Bundle, cache: Path) -> Path | None:
    """Where the GGUF of a bundle's walk lies (or will lie), named by digests; None for a bundle without one."""
    if not bundle.walk.is_file():
        return None
    return cache / "masters" / f"{bundle.name}-{bundle.digest[:16]}-walk-{digest_of(bundle.walk)[:16]}.gguf"


def ready(bundle: Bundle, merged: Path, cache: Path) -> Path | None:
    """That GGUF, made on first use."""
    path = walk_path(bundle, cache)
    if path is not None and not path.is_file():
        write(path, read_tensors(bundle.walk), merged, bundle.digest, f"{bundle.name} along a walk", bundle.vocabulary.first_id)
    return path


def check(path: Path, digest: str, node: str) -> None:
    """Raise AdapterError for what is no adapter, VocabularyMismatch where it was trained on another master (`digest` '': not known)."""
    import gguf

    again = f"Make one: lmgraph train tune --node {node} --tasks FILE --out FOLDER"
    if not path.is_file():
        raise AdapterError(f"The adapter of node {node!r}, {path}, does not exist.", again)
    try:
        fields = gguf.GGUFReader(path).fields
    except (OSError, ValueError) as error:
        raise AdapterError(f"The adapter of node {node!r}, {path}, cannot be read as GGUF: {error}.", again) from error
    if "adapter.type" not in fields:
        raise AdapterError(f"{path} (adapter of node {node!r}) is a GGUF, and no adapter.", again)
    made = str(fields[MASTER].contents()) if MASTER in fields else ""
    if made and digest and made != digest:
        raise VocabularyMismatch(f"The adapter of node {node!r}, {path.name}, was trained on another master than this graph has.", again)
