"""Fit functional rows on frozen hidden states: numpy and the engine only, seconds instead of hours.

Used for three things: rows for a whole graph on an untouched base ("rows only"), one row for a node added later, and the
temperature that makes probabilities honest. The choice is a softmax over h . w_i (one row a node, no bias: llama.cpp has none),
so a fit is multinomial logistic regression on the state of the prompt's last token.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lmgraph import bundles, prompts
from lmgraph.bundles import Bundle
from lmgraph.engine import Engine
from lmgraph.errors import DataError
from lmgraph.tokens import Vocabulary
from lmgraph.train.examples import Example

Array = np.ndarray
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
ANCHORS = 30
"""queries a node whose states are kept in a bundle, so that a later row is fitted against them"""


async def states(
    engine: Engine,
    vocabulary: Vocabulary,
    queries: Sequence[str],
    limit: int,
    progress: Callable[[int, int], None] | None = None,
    keep: Path | None = None,
) -> Array:
    """Hidden states (N, D) float32 at the last token of each query's prompt; the engine was opened with states=True.

    With `keep`, each state is written to that file (.npy) as it comes, and a later call with the same queries and file goes on
    from there; the caller names the file after everything that decides a state (the weights, too) and removes it in the end.
    """
    head, _, tail = prompts.render("", vocabulary.dialect)
    before, after = await engine.tokenise(head.text, True), await engine.tokenise(tail.text, True)
    if not queries:
        return np.zeros((0, 0), dtype=np.float32)

    async def state(query: str) -> Array:
        ids, _ = prompts.shorten(await engine.tokenise(query), limit)
        return np.asarray(await engine.state(before + ids + after), dtype=np.float32)

    first = await state(queries[0])
    out = _table(keep, (len(queries), len(first)))
    out[0] = first
    missing = np.flatnonzero(np.isnan(out).any(axis=1))
    todo, done = iter(missing.tolist()), len(queries) - len(missing)
    if progress:
        progress(done, len(queries))

    async def work() -> None:
        nonlocal done
        for i in todo:
            out[i] = await state(queries[i])
            done += 1
            if progress:
                progress(done, len(queries))

    await asyncio.gather(*(work() for _ in range(engine.slots)))
    return np.array(out)


def _table(path: Path | None, shape: tuple[int, int]) -> Array:
    """A float32 table, in memory or in a file; what is not a number has not been computed yet (also a row cut off half way)."""
    if path is None:
        return np.full(shape, np.nan, dtype=np.float32)
    try:
        found = np.load(path, mmap_mode="r")  # unlike r+, does not lengthen a file that was cut off
        fits = found.shape == shape and found.dtype == np.float32
    except (FileNotFoundError, ValueError, EOFError):
        fits = False
    if not fits:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            np.save(file, np.full(shape, np.nan, dtype=np.float32))
        os.replace(part, path)
    return np.asarray(np.load(path, mmap_mode="r+"))


def softmax(logits: Array) -> Array:
    """Row-wise softmax (N, C)."""
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def log_loss(logits: Array, labels: Array) -> float:
    """Mean negative log probability of the labels."""
    top = logits.max(1, keepdims=True)
    return float((np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[np.arange(len(labels)), labels]).mean())


def fit(
    features: Array,
    labels: Array,
    classes: int,
    penalty: float,
    *,
    fixed: Array | None = None,
    weights: Array | None = None,
    iterations: int = 800,
) -> Array:
    """Rows (classes, D) that minimise weighted log loss + penalty/2 |rows|^2 (features scaled to unit root mean square).

    `fixed` logits (N, F) of rows that stay as they are come before the fitted ones in label numbering. Accelerated
    gradient descent with restarts (Nesterov 1983; O'Donoghue and Candes 2015), step from the largest eigenvalue.
    """
    scale = np.sqrt((features**2).mean(0)) + 1e-6
    x = (features / scale).astype(np.float64)
    share = np.full(len(x), 1 / len(x)) if weights is None else weights / weights.sum()
    offset = 0 if fixed is None else fixed.shape[1]
    largest = np.linalg.eigvalsh((x * share[:, None]).T @ x)[-1]
    step = 1 / (0.5 * largest + penalty)
    rows = np.zeros((classes, x.shape[1]))
    look, momentum, previous = rows.copy(), 1.0, np.inf
    hot = np.zeros((len(x), offset + classes))
    hot[np.arange(len(x)), labels] = 1
    for _ in range(iterations):
        logits = x @ look.T if fixed is None else np.concatenate([fixed, x @ look.T], axis=1)
        error = (softmax(logits) - hot)[:, offset:] * share[:, None]
        new = look - step * (error.T @ x + penalty * look)
        loss = (
            log_loss(logits, labels)
            if weights is None
            else float(-(share * np.log(softmax(logits)[np.arange(len(x)), labels] + 1e-12)).sum())
        )
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2 if loss <= previous else 1.0
        look = new + ((momentum - 1) / following if loss <= previous else 0) * (new - rows)
        rows, momentum, previous = new, following, loss
    return (rows / scale).astype(np.float32)


def temperature(logits: Array, labels: Array) -> float:
    """The temperature with the least log loss (Guo et al. 2017), by golden-section search between 0.2 and 5."""
    low, high, ratio = np.log(0.2), np.log(5.0), (np.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if log_loss(logits / np.exp(a), labels) < log_loss(logits / np.exp(b), labels):
            high = b
        else:
            low = a
    return round(float(np.exp((low + high) / 2)), 4)


@dataclass(frozen=True)
class Fitted:
    """Rows (one a node, in vocabulary order), the temperature, and what was measured on the part kept aside."""

    rows: Array
    temperature: float
    penalty: float
    accuracy: float
    loss: float


def fit_all(features: Array, labels: Array, classes: int, check_features: Array, check_labels: Array) -> Fitted:
    """Rows for all nodes at once; the penalty with the least log loss on the part kept aside wins."""
    best: Fitted | None = None
    for penalty in PENALTIES:
        rows = fit(features, labels, classes, penalty)
        logits = check_features @ rows.T
        heat = temperature(logits, check_labels)
        loss = log_loss(logits / heat, check_labels)
        if best is None or loss < best.loss:
            best = Fitted(rows, heat, penalty, float((logits.argmax(1) == check_labels).mean()), loss)
    assert best is not None
    return best


def fit_one(new: Array, anchors: Array, anchor_labels: Array, rows: Array, heat: float, penalty: float = 3e-4) -> Array:
    """The row (D,) of a node added to a trained graph: positives `new` (N, D) against the anchors of the old nodes, whose rows stay.

    New examples weigh a third of what the anchors weigh together: the old nodes must not pay for the new one.
    """
    if len(new) < 3:
        raise DataError(f"{len(new)} example queries are too few for a new node.", "Give at least 3; 20 or more are better.")
    features = np.concatenate([anchors, new])
    labels = np.concatenate([anchor_labels, np.full(len(new), len(rows))])
    weights = np.concatenate([np.ones(len(anchors)), np.full(len(new), 0.33 * len(anchors) / len(new))])
    fixed = features @ rows.T / heat
    return fit(features, labels, 1, penalty, fixed=fixed, weights=weights)[0] * heat


def save_anchors(path: Path, features: Array, labels: Sequence[str]) -> None:
    """States (N, D) as float16 and node names, compressed."""
    np.savez_compressed(path, states=features.astype(np.float16), nodes=np.array(labels))


def load_anchors(path: Path) -> tuple[Array, list[str]]:
    """(states (N, D) float32, node names). Raises DataError when the bundle has none."""
    if not path.exists():
        raise DataError(
            f"{path} is missing: this bundle keeps no anchor states.", "Make them again: lmgraph train tune, or use a bundle that has them."
        )
    with np.load(path, allow_pickle=False) as data:
        return data["states"].astype(np.float32), [str(n) for n in data["nodes"]]


def pick_anchors(examples: Sequence[Example], per_node: int = ANCHORS) -> list[Example]:
    """The same number of examples for each node, spread over its subjects in file order."""
    by_node: dict[str, list[Example]] = {}
    for example in examples:
        by_node.setdefault(example.node, []).append(example)
    picked: list[Example] = []
    for rows in by_node.values():
        stride = max(1, len(rows) // per_node)
        picked += rows[::stride][:per_node]
    return picked


def index(labels: Sequence[str], nodes: Mapping[str, int]) -> Array:
    """Labels as positions in the vocabulary's order. Raises DataError for unknown nodes."""
    order = {name: i for i, name in enumerate(nodes)}
    unknown = sorted(set(labels) - set(order))
    if unknown:
        raise DataError(f"Unknown nodes in the examples: {', '.join(unknown)}.", f"Valid: {', '.join(order)}")
    return np.array([order[name] for name in labels])


async def finish(
    folder: Path,
    base: Path,
    merged: Path,
    training: Sequence[Example],
    kept: Sequence[Example],
    limit: int,
    threads: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, float]:
    """After training: fit the temperature on the part kept aside and keep anchor states, both on the merged GGUF.

    Changes vocabulary.json (temperature) and writes anchors.npz. Returns what was measured.
    """
    bundle = bundles.read(str(folder))
    bundles.merge(bundle, base, merged)
    engine = await Engine.open(merged, context=1024, slots=2, threads=threads, states=True)
    try:
        anchors = pick_anchors(training)
        held = await states(
            engine, bundle.vocabulary, [e.query for e in kept], limit, lambda a, b: progress("states of the part kept aside", a, b)
        )
        found = await states(engine, bundle.vocabulary, [e.query for e in anchors], limit, lambda a, b: progress("anchor states", a, b))
    finally:
        await engine.close()
    rows = node_rows(bundle)
    labels = index([e.node for e in kept], bundle.vocabulary.nodes)
    logits = held @ rows.T
    heat = temperature(logits, labels)
    save_anchors(folder / "anchors.npz", found, [e.node for e in anchors])
    bundles.write_vocabulary(replace(bundle.vocabulary, temperature=heat), folder / "vocabulary.json")
    return {
        "temperature": heat,
        "accuracy": float((logits.argmax(1) == labels).mean()),
        "loss": log_loss(logits / heat, labels),
        "n": float(len(kept)),
    }


def node_rows(bundle: Bundle) -> Array:
    """Output rows (C, D) float32 of a bundle's nodes in vocabulary order, as the merged file holds them (Q8_0)."""
    from gguf import GGMLQuantizationType as Q
    from gguf import quants

    rows = bundles.read_tensors(bundle.weights)["output_rows"].astype(np.float32)
    rows = quants.dequantize(quants.quantize(rows, Q.Q8_0), Q.Q8_0)
    return np.stack([rows[token] for token in bundle.vocabulary.nodes.values()])


async def add_node(
    bundle: Bundle,
    merged: Path,
    node: str,
    token: int,
    queries: Sequence[str],
    folder: Path,
    limit: int,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> Bundle:
    """A new bundle in `folder` with one node more: its row fitted from example queries, everything else as it was.

    `merged` is the old bundle's GGUF. Raises DataError (too few queries, token taken).
    """
    if bundle.vocabulary.nodes.get(node) == token:
        raise DataError(f"This bundle knows {node} already (functional token {token}).", "Add it to the graph without examples.")
    if token in bundle.vocabulary.nodes.values():
        raise DataError(f"Functional token {token} is taken.", f"Next free token: {bundle.vocabulary.spare()}")
    if not 0 <= token < bundle.vocabulary.size:
        raise DataError(f"Functional token {token} is not reserved in this bundle.", f"Valid: 0 to {bundle.vocabulary.size - 1}")
    anchors, names = load_anchors(bundle.folder / "anchors.npz")
    engine = await Engine.open(merged, context=1024, slots=2, threads=threads, states=True)
    try:
        found = await states(engine, bundle.vocabulary, queries, limit, progress)
    finally:
        await engine.close()
    row = fit_one(found, anchors, index(names, bundle.vocabulary.nodes), node_rows(bundle), bundle.vocabulary.temperature)
    tensors = bundles.read_tensors(bundle.weights)
    tensors["output_rows"][token] = row.astype(tensors["output_rows"].dtype)
    made = bundles.copy(bundle, folder, bundle.vocabulary.with_node(node, token), tensors)
    keep = np.linspace(0, len(found) - 1, min(len(found), ANCHORS)).astype(int)
    save_anchors(folder / "anchors.npz", np.concatenate([anchors, found[keep]]), [*names, *[node] * len(keep)])
    return made


def rows_bundle(folder: Path, vocabulary: Vocabulary, fitted: Fitted, width: int) -> None:
    """Write a bundle that holds nothing but rows: no LoRA, the base stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.zeros((vocabulary.size + 1, width), dtype=np.float16)
    for position, token in enumerate(vocabulary.nodes.values()):
        rows[token] = fitted.rows[position]
    bundles.write_tensors({"input_rows": np.zeros_like(rows), "output_rows": rows}, folder / "weights.safetensors")
    bundles.write_vocabulary(replace(vocabulary, temperature=fitted.temperature), folder / "vocabulary.json")
