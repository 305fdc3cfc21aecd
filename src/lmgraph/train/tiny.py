"""A toy model made on the spot, for tests: two layers of a llama, width 64, byte-level tokens, random weights. No torch.

Its GGUF has the shape of the real base (same architecture, tied embeddings, Q8_0, chat template, control tokens), so that
merging, tuning, the engine and the master run through the same code in a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmgraph.assets import atomic

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = ("Ġ t", "h e", "i n", "e r", "o n", "a n", "r e", "Ġ a")
WIDTH, HEADS, KV_HEADS, LAYERS, INNER = 64, 4, 2, 2, 96


def byte_tokens() -> list[str]:
    """The 256 byte symbols of GPT-2's byte-level alphabet, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = 0
    out = []
    for byte in range(256):
        if byte in printable:
            out.append(chr(byte))
        else:
            out.append(chr(256 + extra))
            extra += 1
    return out


def make(path: Path, seed: int = 0, control: Sequence[str] = (), scale: float = 0.4, context: int = 2048) -> int:
    """Write a toy GGUF; `control` are further control tokens at the end of the vocabulary. Returns the vocabulary's size.

    `context`: tokens that it says it was trained for; llama.cpp gives a sequence no more.
    """
    import gguf

    random = np.random.default_rng(seed)
    tokens = [*SPECIAL, *byte_tokens(), *(m.replace(" ", "") for m in MERGES), *control]
    size = len(tokens)
    types = [3] * len(SPECIAL) + [1] * (256 + len(MERGES)) + [3] * len(control)
    with atomic(path) as part:
        writer = gguf.GGUFWriter(part, "llama")
        writer.add_name("toy")
        writer.add_context_length(context)
        writer.add_embedding_length(WIDTH)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_rope_dimension_count(WIDTH // HEADS)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(size)
        writer.add_file_type(7)
        writer.add_quantization_version(2)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(list(MERGES))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_pad_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template(TEMPLATE)

        def matrix(name: str, rows: int, columns: int, spread: float) -> None:
            data = random.normal(0, spread / np.sqrt(columns), (rows, columns)).astype(np.float32)
            writer.add_tensor(name, gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)

        matrix("token_embd.weight", size, WIDTH, np.sqrt(WIDTH) * scale)
        writer.add_tensor("output_norm.weight", np.ones(WIDTH, dtype=np.float32))
        kv = WIDTH // HEADS * KV_HEADS
        for layer in range(LAYERS):
            writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(WIDTH, dtype=np.float32))
            writer.add_tensor(f"blk.{layer}.ffn_norm.weight", np.ones(WIDTH, dtype=np.float32))
            for name, rows, columns in (
                ("attn_q", WIDTH, WIDTH),
                ("attn_k", kv, WIDTH),
                ("attn_v", kv, WIDTH),
                ("attn_output", WIDTH, WIDTH),
                ("ffn_gate", INNER, WIDTH),
                ("ffn_up", INNER, WIDTH),
                ("ffn_down", WIDTH, INNER),
            ):
                matrix(f"blk.{layer}.{name}.weight", rows, columns, 1.0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return size
