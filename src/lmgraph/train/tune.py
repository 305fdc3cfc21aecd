"""Train a master: LoRA on the trunk, input and output rows for the functional tokens, one loss over choice and rewrite.

    setup -> main -> fit -> validate. Every run leaves its recipe, log, plot and metrics beside the weights, writes a
    checkpoint every few minutes and goes on from it. torch, transformers and peft live here and nowhere else.

The sequence is: prompt (prompts.py), functional token, rewritten query, end token; only what follows the prompt is learnt
(Octopus v2 section 3.4: LoRA, AdamW; equal token weights, section 4.6). New rows are trained explicitly, the base's are not.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lmgraph import adapters
from lmgraph.bundles import read, read_tensors, write_tensors, write_vocabulary
from lmgraph.errors import DataError, MissingExtra
from lmgraph.tokens import Vocabulary
from lmgraph.train import examples as data
from lmgraph.train import tasks
from lmgraph.train.loss import batches, loss_of, validate
from lmgraph.train.model import LINEAR, Master, absorb, fast_bf16, load_base
from lmgraph.train.plot import plot

try:
    import torch
except ImportError as error:  # pragma: no cover - exercised by the test of missing extras in a subprocess
    raise MissingExtra("Training a master", "train") from error


PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run does, but for the data."""

    epochs: float = 2.0
    batch_tokens: int = 1536
    """padded tokens in one step"""
    learning_rate: float = 5e-4
    rows_learning_rate: float = 3e-3
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    warmup: float = 0.05
    """share of all steps"""
    weight_decay: float = 0.01
    rewrite_weight: float = 0.5
    """weight of the mean rewrite-token loss beside the mean choice loss"""
    smoothing: float = 0.05
    """label smoothing over the nodes (against label noise)"""
    average: float = 0.98
    """decay of the running average of the trained weights; the average is what is kept"""
    query_limit: int = 192
    """query tokens; longer queries are shortened, head and tail"""
    seed: int = 0
    threads: int = 0
    """0: what torch chooses"""
    precision: str = "auto"
    """of the matrix products: fp32, bf16, or auto (bf16 where the processor has instructions for it); what is learnt stays fp32"""
    checkpoint_minutes: float = 4.0
    validate_every: int = 400


def setup(base: Path, vocabulary: Vocabulary, recipe: Recipe, start: Path | None = None, fixed: bool = False) -> tuple[Master, data.Encode]:
    """Base weights -> master with LoRA and rows; output rows start at the mean embedding of the node's name, or at `start`.

    `fixed`: the master of `start` stays as it is, rows and all, and a LoRA of its own is learnt on top.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtra("Training a master", "train") from error
    if recipe.precision not in PRECISIONS:
        raise DataError(f"precision is {recipe.precision!r}.", f"Valid: {', '.join(PRECISIONS)}")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    trunk, embeddings, encode_text = load_base(base)
    if start is not None and fixed:
        absorb(trunk, read_tensors(read(str(start.resolve())).weights))
    lora = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=list(LINEAR))
    with warnings.catch_warnings():  # peft's own use of transformers, nothing that a user could change
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        peft = get_peft_model(trunk, lora)
    half = recipe.precision == "bf16" or (recipe.precision == "auto" and fast_bf16())
    master = Master(peft.base_model.model, embeddings, vocabulary.size + 1, half=half)
    with torch.no_grad():
        for node, token in vocabulary.nodes.items():
            name = encode_text(" " + node.replace("_", " "), False)
            master.output_rows[token] = embeddings[name].mean(0)
        if start is not None:
            _start_from(master, start, vocabulary, recipe, fixed)
    return master, encode_text


def _start_from(master: Master, start: Path, vocabulary: Vocabulary, recipe: Recipe, rows_alone: bool) -> None:
    """Copy a bundle's tensors into a master (the reverse of `save`). Of the rows, those of nodes that both name by the same token."""
    bundle = read(str(start.resolve()))
    tensors, known = read_tensors(bundle.weights), bundle.vocabulary.nodes
    shared = [token for name, token in vocabulary.nodes.items() if known.get(name) == token]
    for name, parameter in trained(master).items():
        if rows_alone and not name.endswith("_rows"):
            continue
        key, scale = _bundle_name(name), 1.0
        rows = name.endswith("_rows")
        if key.endswith(".lora_b"):
            scale = recipe.rank / recipe.alpha
        found = tensors[key].shape if key in tensors else "nothing"
        if found == "nothing" or (found[1:] if rows else found) != tuple(parameter.shape[1 if rows else 0 :]):
            raise DataError(
                f"The bundle to start from does not fit: {key} is {found}, expected {tuple(parameter.shape)}.",
                "Use its rank (recipe.json) and the same base.",
            )
        value = torch.from_numpy(tensors[key].astype(np.float32)) * scale
        if rows:
            parameter[shared] = value[shared]
            parameter[-1] = value[-1]  # the end token's
            parameter.requires_grad_(not rows_alone)
        else:
            parameter.copy_(value)


def _bundle_name(name: str) -> str:
    """The name in a bundle of a trained parameter."""
    if name.endswith("_rows"):
        return name
    parts = name.split(".")
    layer, kind = parts[parts.index("layers") + 1], next(p for p in parts if p in LINEAR)
    return f"blk.{layer}.{kind}.{'lora_a' if 'lora_A' in name else 'lora_b'}"


def trained(master: Master) -> dict[str, torch.Tensor]:
    """The tensors that training changes, by name."""
    return {name: p for name, p in master.named_parameters() if p.requires_grad}


def main(
    base: Path,
    train: Sequence[data.Example],
    validation: Mapping[str, Sequence[data.Example | tasks.Task]],
    vocabulary: Vocabulary,
    recipe: Recipe,
    out: Path,
    log: Any = print,
    start: Path | None = None,
    walks: Sequence[tasks.Task] = (),
    node: str = "",
) -> dict[str, Any]:
    """Run the recipe, from the base or from another bundle (`start`).

    `walks`: tasks of several steps, taught beside the examples; then every example teaches that its walk ends, too, and every second one
    with a rewrite does so once more without it: whether more is needed may be asked before a request is written.
    `node`: only what follows this node is learnt, as its adapter for the master of `start`; adapter.gguf is left instead of a bundle.

    Leaves weights.safetensors, vocabulary.json, recipe.json, metrics.json, log.jsonl and plot.png in `out`.
    """
    unknown = sorted({e.node for e in train}.union(step.node for task in walks for step in task.steps) - set(vocabulary.nodes))
    if unknown:
        raise DataError(f"Examples name nodes without a functional token: {', '.join(unknown)}.")
    if node and start is None:
        raise DataError(f"The adapter of node {node!r} needs the master that it belongs to.", "Name its bundle: --start FOLDER")
    out.mkdir(parents=True, exist_ok=True)
    master, encode_text = setup(base, vocabulary, recipe, start, fixed=bool(node))

    def encode(example: data.Example | tasks.Task, form: int = tasks.PLAN) -> data.Encoded:
        if isinstance(example, tasks.Task):
            return tasks.encode(example, vocabulary, encode_text, recipe.query_limit, form)
        return data.encode(example, vocabulary, encode_text, recipe.query_limit, ends=bool(walks))

    def learnt(rows: list[data.Encoded]) -> list[data.Encoded]:
        return [short for row in rows if (short := row.after(vocabulary.id_of(node))).choices] if node else rows

    encoded = [encode(example) for example in train]
    told = [task for task in walks if any(step.text for step in task.steps)]
    encoded += [encode(task, form) for task, form in zip(told, tasks.forms(told), strict=True)]
    encoded += [encode(task, tasks.BARE) for task in walks]
    encoded += [encode(replace(example, rewrite="")) for example in [e for e in train if e.rewrite][::2]] if walks else []
    encoded = learnt(encoded)
    checks = {name: kept for name, rows in validation.items() if (kept := learnt([encode(example) for example in rows]))}
    if not encoded:
        raise DataError(f"No task goes on from node {node!r}, or ends there.", "Give tasks whose steps name it: --tasks FILE")
    average = fit(master, encoded, checks, vocabulary, recipe, out, log)
    with torch.no_grad():
        for name, tensor in trained(master).items():
            tensor.copy_(average[name])
    metrics: dict[str, Any] = {name: validate(master, rows, vocabulary) for name, rows in checks.items()}
    if node and start is not None:
        adapters.write(out / "adapter.gguf", tensors_of(master, recipe), base, read(str(start.resolve())).digest, node)
    else:
        save(master, vocabulary, recipe, out)
    metrics["examples"] = len(train)
    metrics["walks"] = len(walks)
    metrics["rewrites"] = sum(bool(e.rewrite) for e in train)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    plot(out)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")  # last: where it lies, the rest is whole
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return metrics


def _schedule(step: int, total: int, warmup: float) -> float:
    rise = max(1, int(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _plan(encoded: Sequence[data.Encoded], recipe: Recipe) -> list[list[int]]:
    rng = random.Random(recipe.seed)
    plan: list[list[int]] = []
    for _ in range(math.ceil(recipe.epochs)):
        plan += batches(encoded, recipe.batch_tokens, rng)
    return plan[: max(1, round(len(plan) * recipe.epochs / math.ceil(recipe.epochs)))]


def fit(
    master: Master,
    encoded: Sequence[data.Encoded],
    checks: dict[str, list[data.Encoded]],
    vocabulary: Vocabulary,
    recipe: Recipe,
    out: Path,
    log: Any,
) -> dict[str, torch.Tensor]:
    """The loop. Returns the averaged weights. Goes on from `out/checkpoint.pt` where one of the same recipe lies."""
    plan = _plan(encoded, recipe)
    rows = [p for n, p in trained(master).items() if n.endswith("_rows")]
    lora = [p for n, p in trained(master).items() if not n.endswith("_rows")]
    optimizer = torch.optim.AdamW(
        [{"params": lora, "lr": recipe.learning_rate}, {"params": rows, "lr": recipe.rows_learning_rate, "weight_decay": 0.0}],
        weight_decay=recipe.weight_decay,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    average = {name: p.detach().clone() for name, p in trained(master).items()}
    start, key = 0, json.dumps([asdict(recipe), len(plan), vocabulary.to_json()], sort_keys=True)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["key"] == key:
            for name, p in trained(master).items():
                p.data.copy_(saved["weights"][name])
            average, start = saved["average"], saved["step"]
            optimizer.load_state_dict(saved["optimizer"])
            log(f"going on from step {start} of {len(plan)}")
    master.train()
    began = saved_at = time.monotonic()
    seen = 0
    with open(out / "log.jsonl", "a") as journal:
        for step in range(start, len(plan)):
            torch.manual_seed(recipe.seed * 1_000_003 + step)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _schedule(step, len(plan), recipe.warmup)
            batch = [encoded[i] for i in plan[step]]
            loss, choice, rewrite = loss_of(master, batch, vocabulary, recipe.smoothing, recipe.rewrite_weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*lora, *rows], 1.0)
            optimizer.step()
            decay = min(recipe.average, (step + 1) / (step + 10))
            with torch.no_grad():
                for name, p in trained(master).items():
                    average[name].lerp_(p, 1 - decay)
            seen += sum(len(row.ids) for row in batch)
            line: dict[str, Any] = {
                "step": step + 1,
                "of": len(plan),
                "choice": round(choice, 4),
                "rewrite": round(rewrite, 4),
                "tokens_per_s": round(seen / (time.monotonic() - began), 1),
            }
            if (step + 1) % recipe.validate_every == 0:
                line["validation"] = {name: validate(master, rows_, vocabulary) for name, rows_ in checks.items()}
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            if (step + 1) % 20 == 0 or "validation" in line:
                log(json.dumps(line))
            if time.monotonic() - saved_at > recipe.checkpoint_minutes * 60:
                saved_at = time.monotonic()
                _write(
                    checkpoint,
                    {
                        "key": key,
                        "step": step + 1,
                        "average": average,
                        "optimizer": optimizer.state_dict(),
                        "weights": {n: p.detach() for n, p in trained(master).items()},
                    },
                )
    return average


def _write(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    torch.save(value, part)
    os.replace(part, path)


def save(master: Master, vocabulary: Vocabulary, recipe: Recipe, out: Path) -> None:
    """weights.safetensors and vocabulary.json."""
    write_tensors(tensors_of(master, recipe), out / "weights.safetensors")
    write_vocabulary(vocabulary, out / "vocabulary.json")


def tensors_of(master: Master, recipe: Recipe) -> dict[str, np.ndarray]:
    """What was trained, float16: `blk.N.NAME.lora_a` (r, in), `.lora_b` (out, r) scaled, `input_rows`, `output_rows`."""
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in trained(master).items():
        key, value = _bundle_name(name), tensor.detach().float()
        if key.endswith(".lora_b"):
            value = value * (recipe.alpha / recipe.rank)
        tensors[key] = value.numpy().astype(np.float16)
    return tensors
