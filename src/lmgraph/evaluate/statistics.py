"""Figures about samples: shares with intervals, calibration, areas under curves, differences between two policies. Pure.

Shares are between 0 and 1, intervals are 95 %. It knows numbers; it knows no router, no worker and no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

BINS = 15
"""of the calibration error, as in Guo et al. (2017)"""
RESAMPLES = 1000
_Z = NormalDist().inv_cdf(0.975)


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


def share(k: int, n: int) -> dict[str, Any]:
    """`k` right of `n` (at least 1) as data: correct, accuracy, interval."""
    return {"correct": k, "accuracy": k / n, "interval": list(wilson(k, n))}


def ratio(part: Any, whole: Any) -> float | None:
    """part / whole, None where there is no whole."""
    return float(part) / float(whole) if whole else None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and mean of times."""
    return {"median": float(np.median(values)), "p95": float(np.percentile(values, 95)), "mean": float(np.mean(values))}


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


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """Probability that a positive scores above a negative, ties counting half (Hanley and McNeil, Radiology 143, 1982).

    None when either side is empty.
    """
    if not len(positive) or not len(negative):
        return None
    values = np.concatenate([np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)])
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mean rank of equal values, from 1
    n = len(positive)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * len(negative)))


def difference(one: Sequence[float], other: Sequence[float], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """(mean of one - other, its 95 % interval) on the same questions: paired percentile bootstrap (Efron 1979).

    Both have the same length, at least 1; each draw takes whole questions, so what two policies share cancels out.
    """
    gap = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    values, counts = np.unique(gap, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(gap), counts / len(gap), size=RESAMPLES) @ values / len(gap)
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(gap.mean()), (float(low), float(high))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, value) that no other beats, cheapest first.

    One beats another when it costs no more and is worth more, or costs less and is worth as much; of equal points the first stays.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front
