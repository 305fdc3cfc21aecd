"""A picture of a training run from its log: losses and validation accuracy by step. It knows log.jsonl and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def plot(out: Path) -> None:
    """plot.png from log.jsonl: losses and validation accuracy by step. Skipped where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = list(_journal(out / "log.jsonl"))
    if not lines:
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for key in ("choice", "rewrite"):
        points = [(x["step"], x[key]) for x in lines if x[key]]  # a batch without rewrites has no rewrite loss
        window = max(1, len(points) // 40)
        smooth = [
            sum(v for _, v in points[max(0, k - window) : k + 1]) / len(points[max(0, k - window) : k + 1]) for k in range(len(points))
        ]
        left.plot([step for step, _ in points], smooth, label=f"{key} loss (running mean)")
    left.set_xlabel("step")
    left.set_ylim(0, 3)
    left.legend()
    checked = [x for x in lines if "validation" in x]
    for name in checked[0]["validation"] if checked else ():
        right.plot([x["step"] for x in checked], [x["validation"][name]["accuracy"] for x in checked], marker="o", label=name)
    right.set_xlabel("step")
    right.set_ylabel("router accuracy (validation)")
    if checked:
        right.legend()
    figure.savefig(out / "plot.png", dpi=110)
    pyplot.close(figure)


def _journal(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text().splitlines():
            yield json.loads(line)
