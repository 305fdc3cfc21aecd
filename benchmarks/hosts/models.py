"""The models of the run: a master, a base that all workers load, two LoRA adapters. Toys made on the spot, or real weights.

The toy's master has random rows: it chooses, and always the same for the same query, and means nothing by it. The adapters are random
too, also those of the real base: they are there to be told apart, not to be good at anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from lmgraph import adapters, assets, bundles, settings
from lmgraph.files import Quiet, builtin_graph, master_file, model_file
from lmgraph.graphfile import loads
from lmgraph.tokens import Vocabulary
from lmgraph.train import heads, tiny

NODES = ("math", "law", "health", "physics", "history")
RANK = 4
STRENGTH = {"toy": 0.5, "real": 0.05}
"""size of an adapter's change, over that of the weights which it changes"""


@dataclass(frozen=True)
class Models:
    """Files, and the functional token of each node."""

    kind: str
    master: Path
    base: Path
    adapters: tuple[Path, Path]
    tokens: Mapping[str, int]


def toy(folder: Path) -> Models:
    """Toys, in seconds."""
    base = folder / "base.gguf"
    size = tiny.make(base)
    tokens = {name: number for number, name in enumerate(NODES)}
    vocabulary = Vocabulary(size, 8, size + 8, tokens, base=assets.digest_of(base))
    rows = np.random.default_rng(0).normal(0, 1, (len(NODES), tiny.WIDTH)).astype(np.float32)
    heads.rows_bundle(folder / "bundle", vocabulary, heads.Fitted(rows, 1.0, 0.0, 0.0, 0.0), tiny.WIDTH)
    master = bundles.merge(bundles.read(str(folder / "bundle")), base, folder / "master.gguf")
    return Models("toy", master, base, _adapters(folder, base, "toy"), tokens)


def real(folder: Path) -> Models:
    """The built-in master and SmolLM2-135M, fetched when missing."""
    cache = settings.read().cache
    base = model_file("smollm2-135m", cache, None, Quiet())
    built_in = loads(builtin_graph(), "the built-in graph")
    master, _ = master_file(built_in.master.bundle, cache, None, Quiet())
    return Models("real", master, base, _adapters(folder, base, "real"), {name: built_in.nodes[name].token for name in NODES})


def _adapters(folder: Path, base: Path, kind: str) -> tuple[Path, Path]:
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(base).tensors}
    made = []
    for number in range(2):
        random = np.random.default_rng(number + 1)
        tensors = {}
        for name, tensor in found.items():
            if name.endswith(("attn_q.weight", "attn_v.weight", "ffn_up.weight")):
                weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                out, into = weight.shape
                key = f"{'.'.join(name.split('.')[:2])}.{next(ours for ours, theirs in bundles.NAMES.items() if theirs in name)}"
                tensors[f"{key}.lora_a"] = random.normal(0, 1, (RANK, into))
                tensors[f"{key}.lora_b"] = random.normal(0, STRENGTH[kind] * weight.std() / np.sqrt(RANK), (out, RANK))
        made.append(folder / f"adapter-{number + 1}.gguf")
        adapters.write(made[-1], tensors, base, "", f"adapter {number + 1}")
    return made[0], made[1]
