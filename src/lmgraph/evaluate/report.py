"""What `routes.measure` found, for people: a table for the terminal, Markdown, JSON and two pictures.

It knows the shape of the metrics and how to show them. It measures nothing. matplotlib (extra `eval`) lives here only; without it
the pictures are left out and the Markdown says how to get them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lmgraph.assets import atomic
from lmgraph.errors import AssetError, MissingExtra

Metrics = Mapping[str, Any]
WORST = 5
LABEL = 24
"""characters of a node's name in a picture"""
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#595959"
"""told apart with any kind of colour vision (Okabe and Ito 2008)"""


def drawable() -> bool:
    """Whether pictures can be drawn here (matplotlib is installed)."""
    return importlib.util.find_spec("matplotlib") is not None


def confusions(metrics: Metrics, limit: int = WORST) -> list[tuple[str, str, int]]:
    """The most frequent mistakes: (truth, chosen, count), most first, at most `limit`."""
    nodes = metrics["nodes"]
    wrong = [(nodes[t], nodes[c], count) for t, row in enumerate(metrics["confusion"]) for c, count in enumerate(row) if count and t != c]
    return sorted(wrong, key=lambda item: -item[2])[:limit]


def table(metrics: Metrics) -> RenderableType:
    """Summary, nodes and the five worst confusions, for a rich console."""
    return Group(*(_rich(title, head, rows) for title, head, rows in _tables(metrics)))


def markdown(metrics: Metrics, title: str, command: str) -> str:
    """The report as Markdown: title, the command that made it, the tables of `table`, those by language, style, time and note, the
    pictures (as written by `write`, beside it) or how to get them."""
    parts = [f"# {' '.join(title.split())}", "Made by:", "\n".join(f"    {line}" for line in command.splitlines())]
    for heading, head, rows in _tables(metrics) + _more_tables(metrics):
        parts += [f"## {heading}", "\n".join(_line(cells) for cells in (head, ["---"] + ["---:"] * (len(head) - 1), *rows))]
    parts.append("## Pictures")
    if drawable():
        parts.append("![Confusion matrix: rows truth, columns chosen](confusion.png)")
        parts.append("![Reliability: accuracy by probability](calibration.png)")
    else:
        parts.append(f"Not drawn: matplotlib is not installed. {MissingExtra('Drawing', 'eval').hint}")
    parts.append(
        "Intervals are 95 %: Wilson (1927) for shares, percentile bootstrap for macro-F1. ECE: 15 equal bins (Guo et al. 2017). "
        "Precision is - where a node was never chosen, recall where it was never the truth."
    )
    return "\n\n".join(parts) + "\n"


def write(metrics: Metrics, folder: Path, title: str, command: str) -> list[Path]:
    """Write report.json and report.md, and confusion.png and calibration.png where matplotlib is installed; returns the paths.

    Each file takes its place only when whole. Without matplotlib, pictures of an earlier report in the folder are removed: they
    would show other numbers. Raises AssetError when the folder or a file cannot be written.
    """
    pictures = {folder / "confusion.png": _confusion, folder / "calibration.png": _calibration}
    data = json.dumps({"title": title, "command": command, "metrics": metrics}, indent=1, ensure_ascii=False, allow_nan=False)
    texts = {folder / "report.json": data + "\n", folder / "report.md": markdown(metrics, title, command)}
    draw = drawable()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(f"{folder} cannot be made: {error.strerror or error}.", "Name another folder for the report.") from error
    for path, picture in pictures.items():  # before the text that shows them
        if draw:
            with atomic(path) as part:
                picture(metrics).savefig(part, format="png", dpi=120, metadata={"Software": None})
        else:
            path.unlink(missing_ok=True)
    for path, text in texts.items():
        with atomic(path) as part:
            part.write_text(text, encoding="utf-8")
    return [*texts, *(pictures if draw else ())]


_Cells = Sequence[str]
_Table = tuple[str, _Cells, list[_Cells]]


def _tables(metrics: Metrics) -> list[_Table]:
    router, fallback, base, rewrites = (metrics[key] for key in ("router", "fallback", "baselines", "rewrites"))
    decision, found = metrics["latency_ms"]["decision"], metrics["calibration"]
    summary: list[_Cells] = [
        ("queries", f"{metrics['n']:,}", f"{metrics['shortened']:,} shortened"),
        ("router accuracy", _percent(router["accuracy"]), _interval(router["interval"])),
        (
            "accuracy after fallback",
            _percent(fallback["accuracy"]),
            f"{_interval(fallback['interval'])}, fallback for {_percent(fallback['share'])}",
        ),
        ("top-2 accuracy", _percent(router["top2"]), ""),
        ("macro-F1", _percent(router["macro_f1"]), _interval(router["macro_f1_interval"])),
        ("calibration error (ECE)", _percent(found["ece"]), f"mean probability {_percent(found['mean_probability'])}"),
        ("baseline: always one node", _percent(base["majority"]), base["majority_node"]),
        ("baseline: random", _percent(base["random"]), f"{len(metrics['nodes'])} nodes"),
        ("rewrites that passed", _percent(rewrites["passed_share"]), f"{rewrites['passed']:,} of {rewrites['attempted']:,}"),
        ("decision time, median", f"{decision['median']:.1f} ms", f"p95 {decision['p95']:.1f} ms"),
    ]
    nodes: list[_Cells] = [
        (name, f"{row['n']:,}", f"{row['chosen']:,}", *(_percent(row[key]) for key in ("precision", "recall", "f1")))
        for name, row in metrics["per_node"].items()
    ]
    worst: list[_Cells] = [
        (truth, chosen, f"{count:,}", _percent(count / metrics["per_node"][truth]["n"])) for truth, chosen, count in confusions(metrics)
    ]
    return [
        ("Summary", ("measure", "value", "detail"), summary),
        ("Nodes", ("node", "n", "chosen", "precision", "recall", "F1"), nodes),
        ("Worst confusions", ("truth", "chosen", "count", "of the truth"), worst or [("none", "", "", "")]),
    ]


def _more_tables(metrics: Metrics) -> list[_Table]:
    out: list[_Table] = []
    for key, label in (("by_lang", "language"), ("by_style", "style")):
        groups: list[_Cells] = [
            (name, f"{row['n']:,}", _percent(row["accuracy"]), _interval(row["interval"])) for name, row in metrics[key].items()
        ]
        out.append((f"By {label}", (label, "n", "accuracy", "interval"), groups))
    times: list[_Cells] = [(name, *(f"{row[k]:.1f}" for k in ("median", "p95", "mean"))) for name, row in metrics["latency_ms"].items()]
    notes: list[_Cells] = [(note, f"{count:,}") for note, count in metrics["rewrites"]["notes"].items()]
    return [
        *out,
        ("Latency in ms", ("part", "median", "p95", "mean"), times),
        ("Why the original query was passed on", ("note", "count"), notes or [("none", "0")]),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.1f} %"


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0] * 100:.1f} to {bounds[1] * 100:.1f} %"


def _line(cells: _Cells) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _rich(title: str, head: _Cells, rows: list[_Cells]) -> Table:
    out = Table(title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(head):
        text = number == 0 or (name in ("detail", "chosen") and title != "Nodes")
        out.add_column(name, justify="left" if text else "right", overflow="fold")
    for cells in rows:
        out.add_row(*(Text(cell) for cell in cells))  # Text: a name in square brackets is no markup
    return out


def _label(name: str) -> str:
    return name if len(name) <= LABEL else name[: LABEL - 1] + "…"


def _right(metrics: Metrics) -> str:
    # the user's title stays out of pictures: the font may lack its letters
    return f"{_percent(metrics['router']['accuracy'])} right ({_interval(metrics['router']['interval'])}), n = {metrics['n']:,}"


def _confusion(metrics: Metrics) -> Any:
    """The confusion matrix as a figure: colour is the share of the row, the number is the count; its size grows with the nodes."""
    from matplotlib.figure import Figure

    nodes, counts = metrics["nodes"], metrics["confusion"]
    shares = [[count / (sum(row) or 1) for count in row] for row in counts]
    side = min(max(4.5, 0.5 * len(nodes)), 40.0)
    figure = Figure(figsize=(side + 2.6, side + 1.6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)  # one hue, light to dark: reads in grey as well
    axes.set_title(f"Router: {_right(metrics)}", loc="right" if len(nodes) < 6 else "center", fontsize=11)
    axes.set_xticks(range(len(nodes)), [_label(name) for name in nodes], rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(len(nodes)), [f"{_label(name)} ({sum(row):,})" for name, row in zip(nodes, counts, strict=True)], fontsize=9)
    axes.set_xlabel("chosen by the master")
    axes.set_ylabel("truth (queries)")
    for edge in range(1, len(nodes)):
        axes.axhline(edge - 0.5, color="#dddddd", linewidth=0.5)
        axes.axvline(edge - 0.5, color="#dddddd", linewidth=0.5)
    for t, row in enumerate(counts):
        for c, count in enumerate(row):
            if count:
                axes.text(
                    c,
                    t,
                    f"{count}",
                    ha="center",
                    va="center",
                    fontsize=8 if count < 1000 else 7,
                    color="white" if shares[t][c] > 0.5 else "black",
                )
    figure.colorbar(image, ax=axes, label="share of the truth's queries", shrink=0.7, pad=0.02)
    return figure


def _calibration(metrics: Metrics) -> Any:
    """The reliability picture: accuracy in each bin of probability against the diagonal, and below how many queries lie there."""
    from matplotlib.figure import Figure

    found = metrics["calibration"]
    bins = [b for b in found["bins"] if b["count"]]
    figure = Figure(figsize=(6.4, 6.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 1 / len(found["bins"])
    means, lows = [b["mean_probability"] for b in bins], [b["low"] for b in bins]
    bar = {"width": width, "align": "edge", "edgecolor": "white"}
    upper.bar(lows, [b["accuracy"] for b in bins], color=BLUE, label="accuracy in the bin", **bar)
    upper.plot(means, means, "o", color=ORANGE, markersize=6, label="mean probability in the bin")
    upper.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1.2, label="perfectly calibrated")
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    upper.set_title(
        f"Router: {_right(metrics)}\nECE {_percent(found['ece'])}, mean probability {_percent(found['mean_probability'])}", fontsize=11
    )
    upper.legend(loc="upper left", frameon=False)
    lower.bar(lows, [b["count"] for b in bins], color=GREY, **bar)
    for b in bins:
        lower.annotate(f"{b['count']}", (b["low"] + width / 2, b["count"]), ha="center", va="bottom", fontsize=7)
    lower.margins(y=0.2)
    lower.set(xlabel="probability of the chosen node", ylabel="queries")
    return figure
