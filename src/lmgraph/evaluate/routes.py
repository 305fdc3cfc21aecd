"""Routing quality: ask the master every example, then measure accuracy, calibration, rewrites and latency.

It knows decisions and labels and is given the function that decides. It knows no engine, no files and no way to show numbers:
`measure` is pure and returns plain data (`report` writes it). Shares are between 0 and 1, intervals are 95 %, times are ms.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence, Set
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from lmgraph.errors import DataError, SettingsError
from lmgraph.train.examples import Example
from lmgraph.types import Decision

Decide = Callable[[str], Awaitable[Decision]]
Progress = Callable[[int, int], None]
"""(examples decided so far, examples in all)"""
BINS = 15
"""of the calibration error, as in Guo et al. (2017)"""
RESAMPLES = 1000
UNLABELLED = "(none)"
"""the group of rows without a language or style"""
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Row:
    """One decided example: the node it should go to, its language and style ('' where not labelled), what the master decided."""

    truth: str
    lang: str
    style: str
    decision: Decision


async def run(decide: Decide, examples: Sequence[Example], *, concurrency: int, progress: Progress | None = None) -> list[Row]:
    """Decide every example, at most `concurrency` at a time; rows come in the order of the examples.

    `progress(done, total)` is called after each. The first exception of `decide` cancels what still runs, starts nothing more
    and propagates as it is; so does a cancellation from outside. Raises SettingsError for a concurrency below 1.
    """
    if concurrency < 1:
        raise SettingsError(f"concurrency is {concurrency}, expected at least 1.")
    rows: list[Row | None] = [None] * len(examples)
    todo = iter(enumerate(examples))
    done = 0

    async def work() -> None:
        nonlocal done
        for index, example in todo:  # one iterator for all: each example is taken once, none waits in a queue
            rows[index] = Row(example.node, example.lang, example.style, await decide(example.query))
            done += 1
            if progress:
                progress(done, len(examples))

    tasks = [asyncio.create_task(work()) for _ in range(min(concurrency, len(examples)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [row for row in rows if row is not None]


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % score interval (low, high) of a share of `k` in `n` (E. B. Wilson, JASA 22, 1927); (0, 1) when n is 0.

    With p = k/n and z = 1.96: (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n). Raises ValueError unless 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"expected 0 <= k <= n, found k={k}, n={n}")
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, _Z * _Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # p itself always lies inside; min and max only take rounding errors away at k = 0 and k = n
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))


def measure(rows: Sequence[Row], nodes: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Everything that is reported, as plain data (JSON-ready; None where a share is undefined because its denominator is 0).

    `n`, `nodes`; `router`: the node with the highest probability against the truth (accuracy, interval, top-2, macro-F1 =
    unweighted mean F1 over the nodes present in the truth, with a percentile bootstrap interval, the only use of `seed`);
    `fallback`: accuracy of the node that really gets the query, share of fallbacks; `calibration`: see `calibration`;
    `confusion`: len(nodes) lists of len(nodes) counts, rows truth, columns chosen; `per_node`: n (truths), chosen, precision,
    recall, F1 = 2·hits / (truths + choices); `by_lang`, `by_style`; `baselines`: always the most frequent truth, and a uniform
    guess; `rewrites`: attempted (any token written), passed (attempted and used), notes by their first three words;
    `latency_ms`: median, p95, mean, all as recorded in the decisions, so with what waiting the concurrency brought;
    `shortened`: queries that the master did not see whole.

    Raises DataError for no rows, no or double nodes, a truth or choice that is no node (all named), a probability that is none.
    """
    _check(rows, nodes)
    n, index = len(rows), {name: i for i, name in enumerate(nodes)}
    counts = np.zeros((len(nodes), len(nodes)), dtype=np.int64)
    for row in rows:
        counts[index[row.truth], index[row.decision.chosen]] += 1
    hits, truths, choices = np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)
    correct = int(hits.sum())
    fallbacks = sum(row.decision.fallback for row in rows)
    attempted = [row for row in rows if row.decision.rewrite_tokens > 0]
    passed = sum(not row.decision.rewrite_note for row in attempted)
    notes = Counter(" ".join(row.decision.rewrite_note.split()[:3]) for row in rows if row.decision.rewrite_note)
    top = int(np.argmax(truths))
    return {
        "n": n,
        "nodes": list(nodes),
        "router": {
            **_share(correct, n),
            "top2": sum(row.truth in [name for name, _ in row.decision.alternatives[:2]] for row in rows) / n,
            "macro_f1": float(_macro_f1(hits, truths, choices)),
            "macro_f1_interval": _bootstrap(counts, seed),
            "seed": seed,
        },
        "fallback": {**_share(sum(row.decision.node == row.truth for row in rows), n), "fallbacks": fallbacks, "share": fallbacks / n},
        "calibration": calibration([row.decision.probability for row in rows], [row.decision.chosen == row.truth for row in rows]),
        "confusion": counts.tolist(),
        "per_node": {
            name: {
                "n": int(truths[i]),
                "chosen": int(choices[i]),
                "precision": _ratio(hits[i], choices[i]),
                "recall": _ratio(hits[i], truths[i]),
                "f1": _ratio(2 * hits[i], truths[i] + choices[i]),
            }
            for name, i in index.items()
        },
        "by_lang": _by([row.lang for row in rows], rows),
        "by_style": _by([row.style for row in rows], rows),
        "baselines": {"majority": int(truths[top]) / n, "majority_node": nodes[top], "random": 1 / len(nodes)},
        "rewrites": {
            "attempted": len(attempted),
            "passed": passed,
            "passed_share": _ratio(passed, len(attempted)),
            "notes": dict(sorted(notes.items(), key=lambda item: (-item[1], item[0]))),
        },
        "latency_ms": {
            "tokenise": _times([row.decision.tokenise_ms for row in rows]),
            "prefill": _times([row.decision.prefill_ms for row in rows]),
            "decode": _times([row.decision.decode_ms for row in rows]),
            "decision": _times([row.decision.tokenise_ms + row.decision.prefill_ms for row in rows]),
        },
        "shortened": sum(row.decision.shortened > 0 for row in rows),
    }


def calibration(probabilities: Sequence[float], right: Sequence[bool]) -> dict[str, Any]:
    """Expected calibration error (Guo et al., On Calibration of Modern Neural Networks, ICML 2017) and its bins.

    15 bins of equal width, (low, high], 0 belonging to the first; ece = sum over bins of count/n · |accuracy - mean probability|.
    An empty bin has None for both means. `mean_probability` minus the router's accuracy is how far it is overconfident in all.
    Both sequences have the same length, at least 1, and probabilities lie between 0 and 1.
    """
    p, hit = np.clip(np.asarray(probabilities, dtype=np.float64), 0.0, 1.0), np.asarray(right, dtype=bool)
    where = np.clip(np.ceil(p * BINS).astype(np.int64) - 1, 0, BINS - 1)
    bins: list[dict[str, Any]] = []
    error = 0.0
    for b in range(BINS):
        inside = where == b
        count = int(inside.sum())
        mean = float(p[inside].mean()) if count else None
        accuracy = float(hit[inside].mean()) if count else None
        if mean is not None and accuracy is not None:
            error += count / len(p) * abs(accuracy - mean)
        bins.append({"low": b / BINS, "high": (b + 1) / BINS, "count": count, "mean_probability": mean, "accuracy": accuracy})
    return {"ece": error, "mean_probability": float(p.mean()), "bins": bins}


def check_names(what: str, names: Set[str], nodes: Sequence[str]) -> None:
    """Raise DataError, which begins with `what` and names the strangers, unless every name is a node's."""
    if strangers := sorted(names - set(nodes)):
        raise DataError(f"{what} {', '.join(map(repr, strangers))}, which no node is called.", f"Valid nodes: {', '.join(nodes)}")


def _check(rows: Sequence[Row], nodes: Sequence[str]) -> None:
    if not rows:
        raise DataError("There is nothing to measure: no rows.", "Give a file with at least one example of query and node.")
    doubles = sorted(name for name, count in Counter(nodes).items() if count > 1)
    if not nodes or doubles:
        raise DataError(f"Nodes named twice: {', '.join(doubles)}." if doubles else "There are no nodes to measure against.")
    check_names("The examples are labelled with", {row.truth for row in rows}, nodes)
    check_names("The master chose", {row.decision.chosen for row in rows}, nodes)
    if bad := [p for row in rows if not -1e-6 <= (p := row.decision.probability) <= 1 + 1e-6]:  # written so that NaN is bad too
        raise DataError(f"{len(bad)} decisions have a probability that is none: found {bad[0]}, expected 0 to 1.")


def _share(k: int, n: int) -> dict[str, Any]:
    return {"correct": k, "accuracy": k / n, "interval": list(wilson(k, n))}


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part) / float(whole) if whole else None


def _by(labels: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    total, right = Counter[str](), Counter[str]()
    for label, row in zip(labels, rows, strict=True):
        total[label or UNLABELLED] += 1
        right[label or UNLABELLED] += row.decision.chosen == row.truth
    return {label: {"n": total[label], **_share(right[label], total[label])} for label in sorted(total)}


def _times(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "p95": float(np.percentile(values, 95)), "mean": float(np.mean(values))}


def _macro_f1(hits: Any, truths: Any, choices: Any) -> Any:
    """Mean F1 over nodes with truths; shapes (..., nodes) -> (...)."""
    present = truths > 0
    f1 = np.where(present, 2 * hits / np.maximum(truths + choices, 1), 0.0)
    return f1.sum(axis=-1) / present.sum(axis=-1)


def _bootstrap(counts: Any, seed: int) -> list[float]:
    """Percentile interval of macro-F1 (Efron 1979): rows drawn anew, which is a multinomial over the filled cells."""
    truth, chosen = np.nonzero(counts)
    cells = counts[truth, chosen]
    draws = np.random.default_rng(seed).multinomial(cells.sum(), cells / cells.sum(), size=RESAMPLES).astype(np.float64)
    one = np.eye(len(counts))
    hits = draws @ (one[truth] * (truth == chosen)[:, None])
    low, high = np.percentile(_macro_f1(hits, draws @ one[truth], draws @ one[chosen]), (2.5, 97.5))
    return [float(low), float(high)]
