"""A causal LM with functional rows, in torch: what `tune` trains.

It knows how a GGUF becomes a trainable trunk and how extra ids are looked up and scored. It knows no data and no loop.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmgraph.errors import MissingExtra
from lmgraph.tokens import Vocabulary
from lmgraph.train import examples as data

try:
    import torch
    import torch.nn.functional as F
except ImportError as error:  # pragma: no cover - exercised by the test of missing extras in a subprocess
    raise MissingExtra("Training a master", "train") from error
if not all(importlib.util.find_spec(name) for name in ("transformers", "accelerate")):  # sentence-transformers brings torch without it
    raise MissingExtra("Training a master", "train")

STATE_TOKENS = 4096
"""padded tokens that are computed together for `states`"""
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Master(torch.nn.Module):
    """A causal LM with extra rows: ids >= base size are looked up in `input_rows`, scored with `output_rows`.

    With `half`, matrix products are computed in bfloat16 (autocast); weights that are learnt, and what comes out, are float32.
    """

    def __init__(self, trunk: Any, embeddings: torch.Tensor, rows: int, half: bool = False) -> None:
        super().__init__()
        self.trunk = trunk
        self.half = half
        if half:
            for parameter in trunk.parameters():
                if not parameter.requires_grad and parameter.ndim == 2:
                    parameter.data = parameter.data.bfloat16()  # once, instead of at each step
        self.register_buffer("embeddings", embeddings, persistent=False)
        mean = embeddings.mean(0)
        self.input_rows = torch.nn.Parameter(mean.repeat(rows, 1) + 0.02 * torch.randn(rows, embeddings.shape[1]))
        self.output_rows = torch.nn.Parameter(torch.zeros(rows, embeddings.shape[1]))

    def states(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Final hidden states (B, T, D) after the last norm, of ids (B, T) under a right-padding mask (B, T)."""
        base = self.embeddings.shape[0]
        extra = ids >= base
        embedded = F.embedding(ids.clamp(max=base - 1), self.embeddings)
        rows = F.embedding((ids - base).clamp(min=0), self.input_rows)
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.half):
            out = self.trunk(inputs_embeds=torch.where(extra.unsqueeze(-1), rows, embedded), attention_mask=mask, use_cache=False)
        return out.last_hidden_state.float()

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (N, V + rows) of hidden states (N, D)."""
        with torch.autocast(states.device.type, dtype=torch.bfloat16, enabled=self.half):
            known = states @ self.embeddings.T
        return torch.cat([known.float(), states @ self.output_rows.T], dim=-1)


def fast_bf16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32 (AVX-512 BF16 or AMX); twice as fast or more, in all."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def load_base(path: Path) -> tuple[Any, torch.Tensor, data.Encode]:
    """(trunk, embeddings (V, D), encode) of a GGUF file, dequantised to float32. The embeddings are tied or `lm_head`."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingExtra("Training a master", "train") from error
    kwargs = {"gguf_file": path.name}
    # eager attention: on short sequences its backward pass takes two thirds of the fused kernel's time on a CPU
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, attn_implementation="eager", **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **kwargs).backend_tokenizer
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def encode_text(text: str, special: bool) -> list[int]:
        tokenizer.encode_special_tokens = not special
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return model.model, model.get_input_embeddings().weight.detach().clone(), encode_text


@torch.no_grad()
def absorb(trunk: Any, tensors: Mapping[str, np.ndarray]) -> None:
    """Add a bundle's LoRA to the weights for good. A bundle of rows alone changes none."""
    for name, parameter in trunk.named_parameters():
        key = _adapted(name)
        if f"{key}.lora_a" in tensors:
            change = tensors[f"{key}.lora_b"].astype(np.float32) @ tensors[f"{key}.lora_a"].astype(np.float32)
            parameter += torch.from_numpy(change)


@torch.no_grad()
def states(
    base: Path,
    adapter: Mapping[str, np.ndarray] | None,
    vocabulary: Vocabulary,
    queries: Sequence[str],
    limit: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Hidden states (N, D) float32 at the last token of each query's prompt, computed here instead of in llama.cpp (`heads.states`).

    `adapter`: a bundle's tensors, or None for the base as it is. On a processor with bfloat16 several times as fast as llama.cpp's
    portable build; equal to its states but for rounding. Queries of similar length go together; they come back in their own order.
    """
    trunk, embeddings, encode_text = load_base(base)
    absorb(trunk, adapter or {})
    master = Master(trunk, embeddings, 1, half=fast_bf16()).eval()
    encoded = [data.encode(data.Example(query, next(iter(vocabulary.nodes))), vocabulary, encode_text, limit) for query in queries]
    prompts = [row.ids[: row.start] for row in encoded]
    out = np.zeros((len(queries), embeddings.shape[1]), dtype=np.float32)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    at = 0
    while at < len(order):
        count = max(1, STATE_TOKENS // len(prompts[order[min(at + 63, len(order) - 1)]]))
        batch = order[at : at + min(64, count)]
        longest = max(len(prompts[i]) for i in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, : len(prompts[i])] = torch.tensor(prompts[i])
            mask[row, : len(prompts[i])] = 1
        last = mask.sum(1) - 1
        out[batch] = master.states(ids, mask)[torch.arange(len(batch)), last].numpy()
        at += len(batch)
        progress(at, len(order))
    return out


def _adapted(name: str) -> str | None:
    """The name in a bundle of a trunk's weight that LoRA changes, None for others."""
    parts = name.split(".")
    kind = next((part for part in parts if part in LINEAR), None)
    return f"blk.{parts[parts.index('layers') + 1]}.{kind}" if kind and "layers" in parts and parts[-1] == "weight" else None
