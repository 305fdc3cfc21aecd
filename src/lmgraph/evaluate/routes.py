"""Routing quality: ask the master every example, then measure accuracy, calibration, rewrites and latency.

It knows decisions and labels and is given the function that decides. It knows no engine and no files: `measure` is pure and returns
plain data, `report` says how to show it. Shares are between 0 and 1, intervals are 95 %, times are ms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmgraph.abreast import abreast
from lmgraph.errors import DataError
from lmgraph.evaluate import pictures
from lmgraph.evaluate.report import Cells, Picture, Report, Section, interval, percent
from lmgraph.evaluate.statistics import RESAMPLES, calibration, ratio, share, spread
from lmgraph.train.examples import Example
from lmgraph.types import Decision

Decide = Callable[[str], Awaitable[Decision]]
Progress = Callable[[int, int], None]
"""(examples decided so far, examples in all)"""
WORST = 5
UNLABELLED = "(none)"
"""the group of rows without a language or style"""


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
    rows: list[Row | None] = [None] * len(examples)
    done = 0

    async def work(index: int) -> None:
        nonlocal done
        example = examples[index]
        rows[index] = Row(example.node, example.lang, example.style, await decide(example.query))
        done += 1
        if progress:
            progress(done, len(examples))

    await abreast(work, range(len(examples)), concurrency)
    return [row for row in rows if row is not None]


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
            **share(correct, n),
            "top2": sum(row.truth in [name for name, _ in row.decision.alternatives[:2]] for row in rows) / n,
            "macro_f1": float(_macro_f1(hits, truths, choices)),
            "macro_f1_interval": _bootstrap(counts, seed),
            "seed": seed,
        },
        "fallback": {**share(sum(row.decision.node == row.truth for row in rows), n), "fallbacks": fallbacks, "share": fallbacks / n},
        "calibration": calibration([row.decision.probability for row in rows], [row.decision.chosen == row.truth for row in rows]),
        "confusion": counts.tolist(),
        "per_node": {
            name: {
                "n": int(truths[i]),
                "chosen": int(choices[i]),
                "precision": ratio(hits[i], choices[i]),
                "recall": ratio(hits[i], truths[i]),
                "f1": ratio(2 * hits[i], truths[i] + choices[i]),
            }
            for name, i in index.items()
        },
        "by_lang": _by([row.lang for row in rows], rows),
        "by_style": _by([row.style for row in rows], rows),
        "baselines": {"majority": int(truths[top]) / n, "majority_node": nodes[top], "random": 1 / len(nodes)},
        "rewrites": {
            "attempted": len(attempted),
            "passed": passed,
            "passed_share": ratio(passed, len(attempted)),
            "notes": dict(sorted(notes.items(), key=lambda item: (-item[1], item[0]))),
        },
        "latency_ms": {
            "tokenise": spread([row.decision.tokenise_ms for row in rows]),
            "prefill": spread([row.decision.prefill_ms for row in rows]),
            "decode": spread([row.decision.decode_ms for row in rows]),
            "decision": spread([row.decision.tokenise_ms + row.decision.prefill_ms for row in rows]),
        },
        "shortened": sum(row.decision.shortened > 0 for row in rows),
    }


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


def _by(labels: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    total, right = Counter[str](), Counter[str]()
    for label, row in zip(labels, rows, strict=True):
        total[label or UNLABELLED] += 1
        right[label or UNLABELLED] += row.decision.chosen == row.truth
    return {label: {"n": total[label], **share(right[label], total[label])} for label in sorted(total)}


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


def confusions(metrics: Mapping[str, Any], limit: int = WORST) -> list[tuple[str, str, int]]:
    """The most frequent mistakes: (truth, chosen, count), most first, at most `limit`."""
    nodes = metrics["nodes"]
    wrong = [(nodes[t], nodes[c], count) for t, row in enumerate(metrics["confusion"]) for c, count in enumerate(row) if count and t != c]
    return sorted(wrong, key=lambda item: -item[2])[:limit]


def report(metrics: Mapping[str, Any], title: str, command: str) -> Report:
    """`measure`'s figures for people."""
    right = metrics["router"]
    # the user's title stays out of pictures: the font may lack its letters
    line = f"Router: {percent(right['accuracy'])} right ({interval(right['interval'])}), n = {metrics['n']:,}"
    drawn = (
        Picture(
            "confusion",
            "Confusion matrix: rows truth, columns chosen",
            lambda: pictures.confusion(metrics["nodes"], metrics["confusion"], line),
        ),
        Picture("calibration", "Reliability: accuracy by probability", lambda: pictures.reliability(metrics["calibration"], line)),
    )
    note = (
        "Intervals are 95 %: Wilson (1927) for shares, percentile bootstrap for macro-F1. ECE: 15 equal bins (Guo et al. 2017). "
        "Precision is - where a node was never chosen, recall where it was never the truth."
    )
    return Report(title, command, metrics, _sections(metrics), drawn, note)


def _sections(metrics: Mapping[str, Any]) -> list[Section]:
    router, fallback, base, rewrites = (metrics[key] for key in ("router", "fallback", "baselines", "rewrites"))
    decision, found = metrics["latency_ms"]["decision"], metrics["calibration"]
    summary: list[Cells] = [
        ("queries", f"{metrics['n']:,}", f"{metrics['shortened']:,} shortened"),
        ("router accuracy", percent(router["accuracy"]), interval(router["interval"])),
        (
            "accuracy after fallback",
            percent(fallback["accuracy"]),
            f"{interval(fallback['interval'])}, fallback for {percent(fallback['share'])}",
        ),
        ("top-2 accuracy", percent(router["top2"]), ""),
        ("macro-F1", percent(router["macro_f1"]), interval(router["macro_f1_interval"])),
        ("calibration error (ECE)", percent(found["ece"]), f"mean probability {percent(found['mean_probability'])}"),
        ("baseline: always one node", percent(base["majority"]), base["majority_node"]),
        ("baseline: random", percent(base["random"]), f"{len(metrics['nodes'])} nodes"),
        ("rewrites that passed", percent(rewrites["passed_share"]), f"{rewrites['passed']:,} of {rewrites['attempted']:,}"),
        ("decision time, median", f"{decision['median']:.1f} ms", f"p95 {decision['p95']:.1f} ms"),
    ]
    nodes: list[Cells] = [
        (name, f"{row['n']:,}", f"{row['chosen']:,}", *(percent(row[key]) for key in ("precision", "recall", "f1")))
        for name, row in metrics["per_node"].items()
    ]
    worst: list[Cells] = [
        (truth, chosen, f"{count:,}", percent(count / metrics["per_node"][truth]["n"])) for truth, chosen, count in confusions(metrics)
    ]
    out = [
        Section("Summary", ("measure", "value", "detail"), summary),
        Section("Nodes", ("node", "n", "chosen", "precision", "recall", "F1"), nodes),
        Section(
            "Worst confusions", ("truth", "chosen", "count", "of the truth"), worst or [("none", "", "", "")], text=frozenset({"chosen"})
        ),
    ]
    for key, label in (("by_lang", "language"), ("by_style", "style")):
        groups: list[Cells] = [
            (name, f"{row['n']:,}", percent(row["accuracy"]), interval(row["interval"])) for name, row in metrics[key].items()
        ]
        out.append(Section(f"By {label}", (label, "n", "accuracy", "interval"), groups, brief=False))
    times: list[Cells] = [(name, *(f"{row[k]:.1f}" for k in ("median", "p95", "mean"))) for name, row in metrics["latency_ms"].items()]
    notes: list[Cells] = [(note, f"{count:,}") for note, count in metrics["rewrites"]["notes"].items()]
    return [
        *out,
        Section("Latency in ms", ("part", "median", "p95", "mean"), times, brief=False),
        Section("Why the original query was passed on", ("note", "count"), notes or [("none", "0")], brief=False),
    ]
