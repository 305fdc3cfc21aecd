"""`graph assign`: a graph's workers chosen by what models were measured to do.

It knows which category of questions belongs to which node and how an assignment is written into a graph's text. Files of recorded
answers are evaluate/layouts.py's, the choice is evaluate/assign.py's.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmgraph import graphedit, graphfile
from lmgraph.assets import atomic
from lmgraph.cli import settings
from lmgraph.cli.run import GRAPH, JSON
from lmgraph.errors import DataError, GraphError, UserError

if TYPE_CHECKING:
    from lmgraph.evaluate.assign import Assignment, Scores
    from lmgraph.evaluate.outcomes import Model
    from lmgraph.graph import Graph

URL = "http://localhost:8000/v1"
ALIASES = {"engineering": "electrical_engineering", "other": "general"}
"""categories of MMLU-Pro whose node has another name in the built-in graph"""
MARK = "# lmgraph graph assign: "
"""begins every line that a later run replaces"""


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--models", "sizes", type=click.Path(path_type=Path), help="sizes, costs and workers (default: models.json beside TABLE)")
@GRAPH
@click.option("--only", multiple=True, metavar="MODEL", help="choose among these models (repeat)")
@click.option("--most", type=click.IntRange(1), help="use at most this many different models")
@click.option("--max-billions", type=click.FloatRange(0, min_open=True), help="only models with at most this many billion parameters")
@click.option("--max-cost", type=click.FloatRange(0), help="only models that cost at most this for 1,000 queries")
@click.option("--map", "maps", multiple=True, metavar="CATEGORY=NODE|FILE", help="node of a category, or a file of such lines (repeat)")
@click.option("--url", "urls", multiple=True, help=f"where the models are served (repeat for replicas; default: {URL})")
@click.option("--vote", type=click.IntRange(2, 9), help="let this many models answer and vote on nodes with recorded questions")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="write the graph to this file (default: to stdout)")
@click.option("--force", is_flag=True, help="write over a file that is there")
@JSON
def assign(
    table: Path,
    sizes: Path | None,
    path: Path | None,
    only: tuple[str, ...],
    most: int | None,
    max_billions: float | None,
    max_cost: float | None,
    maps: tuple[str, ...],
    urls: tuple[str, ...],
    vote: int | None,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Give every node the worker that answered its questions best, by the recorded answers in TABLE.

    TABLE is MMLU-Pro with predictions, RouterBench, or CSV or JSON Lines of your own (docs/outcomes.md). A category belongs to the
    node of the same name. Scores of few questions are drawn toward the model's overall score. Nodes without questions, and the
    fallback node, get the strongest overall. The graph goes to stdout or --out, the table of choices to stderr.
    """
    from lmgraph.cli import show
    from lmgraph.evaluate import assign as choosing
    from lmgraph.evaluate import outcomes
    from lmgraph.files import builtin_graph, graph_file

    if out and out.exists() and not force:
        raise UserError(f"{out} exists.", "Use another name, or --force to write over it.")
    if wrong := [url for url in urls if not url.startswith(("http://", "https://"))]:
        raise UserError(f"--url: found {wrong[0]!r}, expected http:// or https://.", f"For example: --url {URL}")
    path = graph_file(path or settings().graph)
    try:
        text = path.read_text(encoding="utf-8-sig") if path else builtin_graph()
    except (OSError, UnicodeDecodeError) as error:
        raise GraphError(f"{path} cannot be read: {error}.", f"Make one: lmgraph graph init {path}") from error
    given = graphfile.loads(text, str(path or "the built-in graph"))
    recorded = outcomes.load(table, sizes)
    recorded = recorded.select(only) if only else recorded
    node_of = place(recorded.categories, list(given.nodes), maps)
    scored = choosing.scores(recorded, [node_of[category] for category in recorded.categories])
    general = given.master.fallback or ("general" if "general" in given.nodes else "")
    made = choosing.assign(scored, recorded.models, most=most, billions=max_billions, cost=max_cost, general=general)
    workers = {name: made.worker.get(name, made.fallback) for name in given.nodes}
    general = general or next(name for model in made.chosen for name in given.nodes if workers[name] == model)
    plan = Plan(made, scored, workers, general, ballots(scored, workers, general, vote) if vote else {})
    head = [
        f"workers by measured score on {table.name}: {len(recorded.ids):,} questions, {len(recorded.models)} models",
        "behind a worker: score (95 % interval) on n questions, shrunk toward the model's overall score; the next best model",
    ]
    if not urls and any(model.name in made.chosen and not model.worker for model in recorded.models):
        head.append(f"set urls: {URL} is a guess at where the models are served")
    bundle = _bundle(given, path.parent, out.parent if out else Path()) if path else given.master.bundle
    written = render(text, plan, recorded.models, urls or (URL,), head, bundle)
    _show(plan)
    if out:
        with atomic(out) as part:
            part.write_text(written, encoding="utf-8")
        click.echo(f"Wrote {out}. Look whether its master knows every node: lmgraph graph check --graph {out}", err=True)
    if as_json:
        print(json.dumps(plan.to_json() | {"categories": node_of}, ensure_ascii=False))
    elif not out:
        show.out(written)


@dataclass(frozen=True)
class Plan:
    """What a graph gets: a model for every node, and where nodes vote, their `answer`."""

    made: Assignment
    scores: Scores
    workers: Mapping[str, str]
    """node -> model, for every node of the graph"""
    general: str
    """the node that answers when the master is unsure"""
    answers: Mapping[str, Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        made = self.made
        return {
            "nodes": {
                name: asdict(made.reasons[name]) if name in made.reasons else {"model": model, "n": 0}
                for name, model in self.workers.items()
            },
            "fallback": {"node": self.general, "model": self.workers[self.general]},
            "chosen": list(made.chosen),
            "expected": made.expected,
            "strength": self.scores.strength,
            "left_out": dict(made.left_out),
            "answers": dict(self.answers),
        }

    def remark(self, node: str) -> str:
        """Why the node has its model, in a line."""
        why = self.made.reasons.get(node)
        strongest = "the strongest overall" if self.workers[node] == self.made.fallback and (not why or node == self.general) else ""
        if not why or why.score is None:
            return f"{strongest or 'chosen'}, no answers recorded here"
        low, high = why.interval
        found = f"{why.score:.3f} ({low:.3f} to {high:.3f}) on n={why.n}, shrunk {why.shrunk:.3f}"
        if why.runner_up:
            found += f"; {'next' if why.runner_up_shrunk <= why.shrunk else 'best here'}: {why.runner_up} {why.runner_up_shrunk:.3f}"
        return f"{strongest}: {found}" if strongest else found


def place(categories: Sequence[str], nodes: Sequence[str], maps: Sequence[str] = ()) -> dict[str, str]:
    """Category -> node: as `maps` say ("category=node", or a file of such lines), else the node of the same name.

    Case does not matter and blanks are "_"; MMLU-Pro's engineering is electrical_engineering and its other is general. Raises
    UserError that names every category without a node.
    """
    from lmgraph.evaluate.outcomes import nearest

    known = list(dict.fromkeys(categories))
    told: dict[str, str] = {}
    for given in maps:
        lines = _lines(Path(given)) if Path(given).is_file() or "=" not in given else [("--map", given)]
        for where, line in lines:
            category, equals, node = (part.strip() for part in line.rpartition("="))  # a category may hold "=", a node's name cannot
            if not equals or node not in nodes:
                strange = f"{node!r}, which is no node" if equals else repr(line)
                raise UserError(f"{where}: found {strange}, expected CATEGORY=NODE.", f"Valid nodes: {', '.join(nearest(node, nodes))}")
            if where == "--map" and category not in known:
                raise UserError(f"--map: the table has no category {category!r}.", f"Valid: {', '.join(nearest(category, known))}")
            told[category] = node
    same = {node.casefold(): node for node in nodes}
    found: dict[str, str] = {}
    for category in known:
        name = category.casefold().replace(" ", "_")
        found[category] = told.get(category) or same.get(name) or same.get(ALIASES.get(name, ""), "")
    if lost := [category for category in known if not found[category]]:
        mend = " ".join(f"--map {shlex.quote(f'{category}={nearest(category, nodes)[0]}')}" for category in lost)
        listed = ", ".join(map(repr, lost))
        raise UserError(
            f"No node is called as these categories: {listed}. Valid nodes: {', '.join(nodes)}", f"Say where they belong, such as: {mend}"
        )
    return found


def _lines(path: Path) -> list[tuple[str, str]]:
    """(where, line) of a file of CATEGORY=NODE lines; empty ones and those that begin with # are passed over."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--map: {path} cannot be read: {error}.", "Expected CATEGORY=NODE, or a file of such lines.") from error
    return [(f"{path.name}:{number}", line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]


def ballots(scores: Scores, workers: Mapping[str, str], general: str, count: int) -> dict[str, dict[str, Any]]:
    """`answer` of every node with recorded questions: the `count` models most often right there, each by a node whose worker it is.

    That is the node itself, else `general`, else the first. Raises UserError where fewer than two models are workers.
    """
    from lmgraph.evaluate.assign import voters

    if len(set(workers.values())) < 2:
        raise UserError(
            "--vote: every node has the same worker, expected at least two models that can vote.", "Loosen the limits, or leave --vote out."
        )
    answers = {}
    for node in (name for name in workers if name in scores.groups):
        where = {model: name for name, model in (*reversed(list(workers.items())), (general, workers[general]), (node, workers[node]))}
        best = voters(scores, list(dict.fromkeys(workers.values())), node, count)
        shares = {where[model]: round(min(max(share, 0.001), 0.999), 4) for model, share in best.items()}
        answers[node] = {"mode": "vote", "workers": len(shares), "voters": shares}
    return answers


def render(text: str, plan: Plan, models: Sequence[Model], urls: Sequence[str], head: Sequence[str], bundle: str) -> str:
    """The graph's text with the plan's workers, each with its remark; comments and everything else stay. Raises GraphError."""
    own = {model.name: model.worker for model in models if model.worker}

    def change(data: Any) -> None:
        graphedit.unfold(data)
        data.setdefault("master", {}).update({"bundle": bundle, "fallback": plan.general})
        if "answer" in data:
            data["answer"].pop("voters", None)  # what they are worth was measured with other workers
        for name, model in plan.workers.items():
            worker = own.get(model) or {"kind": "openai", "urls": list(urls), "model": model}
            node = data["nodes"][name]
            graphedit.put(node, "worker", worker, plan.remark(name))
            if name in plan.answers:
                judge = (node.get("answer") or data.get("answer") or {}).get("judge")
                graphedit.put(node, "answer", {**plan.answers[name], **({"judge": judge} if judge else {})})
            elif "answer" in node:
                node["answer"].pop("voters", None)

    kept = [line for line in text.splitlines(keepends=True) if not line.startswith(MARK)]
    lines = ["".join(c if c.isprintable() else "?" for c in f"{MARK}{line}") + "\n" for line in head]
    return graphedit.edited("".join(lines + kept), change)


def _bundle(given: Graph, beside: Path, target: Path) -> str:
    """The master's bundle as it is called from another folder."""
    from lmgraph.bundles import builtin

    name = given.master.bundle
    own = name not in builtin() and not Path(name).is_absolute() and (beside / name).exists()
    moved = own and beside.resolve() != target.resolve()
    return Path(os.path.relpath(beside / name, target)).as_posix() if moved else name


def _show(plan: Plan) -> None:
    from lmgraph.cli import show
    from lmgraph.evaluate.report import Report, Section, table

    made = plan.made
    rows = []
    for node, model in plan.workers.items():
        why = made.reasons.get(node)
        score, bounds = ("-", "-") if why is None or why.score is None else (f"{why.score:.3f}", "{:.3f} to {:.3f}".format(*why.interval))
        second = f"{why.runner_up} {why.runner_up_shrunk:.3f}" if why and why.runner_up else "-"
        rows.append((node, model, f"{why.n if why else 0:,}", score, f"{why.shrunk:.3f}" if why else "-", bounds, second))
    head = ("node", "model", "n", "score", "shrunk", "95 % interval", "next")
    section = Section("Workers", head, rows, text=frozenset({"model", "next"}))
    show.console.print(table(Report("", "", {}, [section])))
    click.echo(f"Expected score {made.expected:.3f}. Fallback: {plan.general} ({plan.workers[plan.general]}).", err=True)
    for name, why_not in made.left_out.items():
        click.echo(f"Left out: {name} ({why_not}).", err=True)
