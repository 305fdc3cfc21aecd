"""Adapters of nodes: the small LoRA that a node brings to the master's next choice, as a GGUF that llama.cpp puts on and takes off.

"Each node has its own octopus model" (Octopus v4, section 3.2): one base, one LoRA a node, swapped from request to request in one engine.
It knows the form of the file and for which master it was made; numpy and gguf only. How it is trained is train/'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lmgraph.assets import atomic
from lmgraph.bundles import NAMES, flush, form, permute
from lmgraph.errors import AdapterError, VocabularyMismatch

MASTER = "lmgraph.master"
"""metadata: digest of the bundle that the adapter was trained on"""


def write(path: Path, tensors: Mapping[str, np.ndarray], base: Path, digest: str, node: str) -> None:
    """`blk.N.KIND.lora_a` (r, in) and `.lora_b` (out, r; scaled) -> the GGUF adapter of a node, written atomically.

    It is for the bundle of this digest, whose base weights are `base`.
    """
    import gguf

    architecture, heads, kv_heads = form(gguf.GGUFReader(base))
    with atomic(path) as part:
        writer = gguf.GGUFWriter(part, architecture)
        writer.add_type("adapter")
        writer.add_name(node)
        writer.add_string("adapter.type", "lora")
        writer.add_string(MASTER, digest)
        writer.add_float32("adapter.lora.alpha", float(next(value.shape[0] for key, value in tensors.items() if key.endswith("lora_a"))))
        for key, value in sorted(tensors.items()):
            _, layer, kind, half = key.split(".")
            data = value.astype(np.float32)
            if half == "lora_b" and kind in ("q_proj", "k_proj"):
                data = permute(data, heads if kind == "q_proj" else kv_heads)
            writer.add_tensor(f"blk.{layer}.{NAMES[kind]}.weight.{half}", np.ascontiguousarray(data))
        flush(writer)


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
