"""Pictures of figures: confusion matrix, reliability, accuracy against cost, bars, curves. The one home of matplotlib beside train/plot.

Each function takes plain data and returns a matplotlib figure. Colours are told apart with any kind of colour vision (Okabe and
Ito 2008) and never carry a meaning alone: names, marks or numbers say it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from typing import Any

from lmgraph.evaluate import statistics
from lmgraph.evaluate.report import percent

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
LABEL = 24
"""characters of a name in a picture"""


def _figure(width: float, height: float) -> Any:
    """An empty figure whose letters stay text in an SVG, and whose SVG is the same for the same data."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "lmgraph"
    return Figure(figsize=(width, height), layout="constrained")


def _short(name: str) -> str:
    return name if len(name) <= LABEL else name[: LABEL - 1] + "…"


def confusion(nodes: Sequence[str], counts: Sequence[Sequence[int]], title: str) -> Any:
    """The confusion matrix: rows truth, columns chosen; colour is the share of the row, the number is the count."""
    shares = [[count / (sum(row) or 1) for count in row] for row in counts]
    side = min(max(4.5, 0.5 * len(nodes)), 40.0)
    figure = _figure(side + 2.6, side + 1.6)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)  # one hue, light to dark: reads in grey as well
    axes.set_title(title, loc="right" if len(nodes) < 6 else "center", fontsize=11)
    axes.set_xticks(range(len(nodes)), [_short(name) for name in nodes], rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(len(nodes)), [f"{_short(name)} ({sum(row):,})" for name, row in zip(nodes, counts, strict=True)], fontsize=9)
    axes.set_xlabel("chosen by the master")
    axes.set_ylabel("truth (queries)")
    for edge in range(1, len(nodes)):
        axes.axhline(edge - 0.5, color="#dddddd", linewidth=0.5)
        axes.axvline(edge - 0.5, color="#dddddd", linewidth=0.5)
    for t, row in enumerate(counts):
        for c, count in enumerate(row):
            if count:
                colour = "white" if shares[t][c] > 0.5 else "black"
                axes.text(c, t, f"{count}", ha="center", va="center", fontsize=8 if count < 1000 else 7, color=colour)
    figure.colorbar(image, ax=axes, label="share of the truth's queries", shrink=0.7, pad=0.02)
    return figure


def reliability(found: Mapping[str, Any], title: str, what: str = "probability of the chosen node") -> Any:
    """`statistics.calibration` as a picture: accuracy in each bin against the diagonal, and below how many queries lie there."""
    bins = [b for b in found["bins"] if b["count"]]
    figure = _figure(6.4, 6.8)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 1 / len(found["bins"])
    means, lows = [b["mean_probability"] for b in bins], [b["low"] for b in bins]
    bar = {"width": width, "align": "edge", "edgecolor": "white"}
    upper.bar(lows, [b["accuracy"] for b in bins], color=BLUE, label="accuracy in the bin", **bar)
    upper.plot(means, means, "o", color=ORANGE, markersize=6, label="mean probability in the bin")
    upper.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1.2, label="perfectly calibrated")
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    upper.set_title(f"{title}\nECE {percent(found['ece'])}, mean probability {percent(found['mean_probability'])}", fontsize=11)
    upper.legend(loc="upper left", frameon=False)
    lower.bar(lows, [b["count"] for b in bins], color=GREY, **bar)
    for b in bins:
        lower.annotate(f"{b['count']}", (b["low"] + width / 2, b["count"]), ha="center", va="bottom", fontsize=7)
    lower.margins(y=0.2)
    lower.set(xlabel=what, ylabel="queries")
    return figure


def frontier(points: Sequence[Mapping[str, Any]], cost: str, value: str, title: str, *, log: bool = False) -> Any:
    """Value (a share) against cost, with the Pareto front as a line.

    Each point has `name`, `cost`, `value` and may have `interval` (drawn as a bar) and `ours` (drawn as a filled diamond).
    """
    figure = _figure(8.4, 5.4)
    axes = figure.add_subplot()
    if log:
        axes.set_xscale("log")
    front = statistics.pareto([(p["cost"], p["value"]) for p in points])
    line = [points[i] for i in front]
    axes.plot([p["cost"] for p in line], [p["value"] * 100 for p in line], "-", color=GREY, linewidth=1, label="Pareto front", zorder=1)
    for p in points:
        colour, mark = (ORANGE, "D") if p.get("ours") else (BLUE, "o")
        if p.get("interval"):
            axes.plot([p["cost"]] * 2, [bound * 100 for bound in p["interval"]], "-", color=colour, alpha=0.5, zorder=2)
        axes.plot([p["cost"]], [p["value"] * 100], mark, color=colour, markersize=7, zorder=3)
    axes.margins(0.12)
    axes.grid(color="#eeeeee")
    axes.set(xlabel=cost, ylabel=f"{value} (%)")
    axes.set_title(title, fontsize=11)
    axes.legend(loc="lower right", frameon=False)
    _annotate(axes, [(p["cost"], p["value"] * 100, p["name"]) for p in points], [(p["cost"], p["value"] * 100) for p in line])
    return figure


def _annotate(axes: Any, points: Sequence[tuple[float, float, str]], line: Sequence[tuple[float, float]]) -> None:
    """Names as near to their points as they fit without lying on other names, on points or on the line; far ones with a pointer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure = axes.figure
    canvas: Any = FigureCanvasAgg(figure)  # untyped
    renderer = canvas.get_renderer()
    figure.draw_without_rendering()  # only now the axes lie where they will
    pixel, dot = axes.transData.transform, figure.dpi / 72

    def around(x: float, y: float, size: float) -> Any:
        return Bbox.from_bounds(x - size, y - size, 2 * size, 2 * size)

    spots = [pixel((x, y)) for x, y, _ in points]
    taken = [around(spot[0], spot[1], 5 * dot) for spot in spots]
    corners = [pixel(corner) for corner in line]
    for (x0, y0), (x1, y1) in pairwise(corners):
        steps = max(1, round(max(abs(x1 - x0), abs(y1 - y0)) / (6 * dot)))
        taken += [around(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps, 2 * dot) for i in range(1, steps)]
    beside = [("left", "center", 1, 0), ("right", "center", -1, 0), ("center", "bottom", 0, 1), ("center", "top", 0, -1)]
    beside += [(where, side, dx, dy) for where, dx in (("left", 1), ("right", -1)) for side, dy in (("bottom", 1), ("top", -1))]
    for x, y, name in sorted(points, key=lambda point: -point[1]):
        for away, (where, side, dx, dy) in product((7, 16, 28, 42, 60, 80), beside):
            pointer = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5} if away > 16 else None
            text = axes.annotate(
                name, (x, y), (dx * away, dy * away), textcoords="offset points", fontsize=8, ha=where, va=side, arrowprops=pointer
            )
            text.set_in_layout(False)  # else the axes would make room for it, and move
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # the name's alone, without its pointer
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:  # nowhere: better on something than not at all
            box = axes.annotate(name, (x, y), (7, 0), textcoords="offset points", fontsize=8, va="center").get_window_extent(renderer)
        taken.append(box)


def bars(groups: Mapping[str, Mapping[str, float | None]], value: str, title: str) -> Any:
    """Horizontal bars: for each group (a subject, a category) one bar a series (a policy), as shares; None leaves a gap."""
    series = list(dict.fromkeys(name for row in groups.values() for name in row))
    fills = ((BLUE, ""), (ORANGE, "//"), (GREEN, ".."), (GREY, "xx"))
    figure = _figure(8.4, max(3.0, 0.16 * len(groups) * (len(series) + 1) + 1.4))
    axes = figure.add_subplot()
    step = 0.8 / max(1, len(series))
    for number, name in enumerate(series):
        colour, hatch = fills[number % len(fills)]
        places = [i + number * step for i in range(len(groups))]
        widths = [(row.get(name) or 0.0) * 100 for row in groups.values()]
        axes.barh(places, widths, height=step, align="edge", color=colour, hatch=hatch, edgecolor="white", linewidth=0.4, label=name)
    axes.set_yticks([i + 0.4 for i in range(len(groups))], [_short(name) for name in groups], fontsize=8)
    axes.set_ylim(len(groups), -0.2)  # first group on top; a margin would grow with the number of groups
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.set(xlabel=f"{value} (%)", xlim=(0, 100))
    axes.set_title(title, fontsize=11)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.55 / figure.get_size_inches()[1]), ncols=min(4, len(series)), frameon=False, fontsize=8
    )
    return figure


def lines(panels: Sequence[Mapping[str, Any]], across: str, title: str, *, log: bool = False) -> Any:
    """Curves in panels one below the other, over the same x axis (`across`; `log`: logarithmic).

    Each panel has `value` (its axis) and `curves`: name -> points (x, y); `log` makes its own axis logarithmic, `steps` draws steps.
    """
    figure = _figure(9.6, 0.8 + 2.4 * len(panels))
    marks = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), (GREY, ":", "D"))
    every: Any = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    for (axes,), panel in zip(every, panels, strict=True):
        for number, (name, points) in enumerate(panel["curves"].items()):
            colour, stroke, mark = marks[number % len(marks)]
            style = {"drawstyle": "steps-post"} if panel.get("steps") else {}
            mark = mark if len(points) <= 30 else ""
            axes.plot(*zip(*points), stroke, marker=mark, markersize=4, color=colour, linewidth=1.3, label=name, **style)
        axes.set_ylabel(panel["value"], fontsize=9)
        axes.grid(color="#eeeeee")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
        if log:
            axes.set_xscale("log")
        if panel.get("log"):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
    every[-1][0].set_xlabel(across)
    every[0][0].set_title(title, fontsize=11)
    return figure
