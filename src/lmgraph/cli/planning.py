"""Commands that measure plans: evaluate plans."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmgraph.cli import settings
from lmgraph.cli.measuring import BUNDLE, give, typed, with_master
from lmgraph.cli.run import GRAPH, JSON
from lmgraph.errors import AssetError, DataError, OutsideError, UserError

if TYPE_CHECKING:
    from lmgraph.evaluate.plans import Result
    from lmgraph.evaluate.taskbench import Bench
    from lmgraph.graph import Graph
    from lmgraph.train.tasks import Task

KINDS = {"master": "", "listing": "smollm2-135m", "listing-coder": "qwen2.5-coder-1.5b"}
"""contestant -> the model that reads the list"""
HELP = "See: lmgraph evaluate plans --help"


@click.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "--data", "folder", type=click.Path(path_type=Path, exists=True, file_okay=False), help="a folder of TaskBench instead of FILES"
)
@click.option(
    "--write",
    "target",
    type=click.Path(path_type=Path, file_okay=False),
    help="measure nothing: write the graph and the tasks of --data there, to train a master with",
)
@GRAPH
@BUNDLE
@click.option("--kept", is_flag=True, help="only the tasks that training keeps aside")
@click.option(
    "--percent",
    type=click.IntRange(1, 99),
    default=20,
    show_default=True,
    help="how many of 100 training kept aside: 20 of --tasks, 10 of --data",
)
@click.option(
    "--contestant", "kinds", type=click.Choice(list(KINDS)), multiple=True, metavar="NAME", help="only this one (repeat)  [default: all]"
)
@click.option("--sample", type=click.IntRange(1), help="only this many tasks, spread evenly")
@click.option("--listing-sample", type=click.IntRange(1), help="fewer tasks for the two that read all descriptions, which are slow")
@click.option("--out", type=click.Path(path_type=Path), help="folder for the report and every plan; the same command goes on from there")
@click.option("--fresh", is_flag=True, help="forget the plans that are in --out")
@JSON
def plans(
    files: tuple[Path, ...],
    folder: Path | None,
    target: Path | None,
    path: Path | None,
    bundle: str | None,
    kept: bool,
    percent: int,
    kinds: tuple[str, ...],
    sample: int | None,
    listing_sample: int | None,
    out: Path | None,
    fresh: bool,
    as_json: bool,
) -> None:
    """Plans of several steps: the master, node by node among neighbours, against all descriptions in the prompt.

    FILES are JSON Lines with query and steps (node, needs, rewrite), or with query and node where one step is enough. First node, node
    set (F1), order, exact nodes, number of steps, when to stop, hops and time.

    \b
    The contestants:
    master         the graph's master plans as it does in mode plan
    listing        SmolLM2-135M reads all descriptions and writes a plan as JSON, under a grammar
    listing-coder  Qwen2.5-Coder-1.5B does

    Those that read a list are shown two tasks with their steps: tasks that training may see with --kept, else two that are then not
    measured. --data FOLDER is TaskBench's layout (graph_desc.json, data.json, user_requests.json). Its nodes need a master of their own:
    with --write DIR its graph and tasks are written for training.
    """
    if bool(files) == bool(folder):
        raise UserError("Give FILES, or --data FOLDER.", HELP)
    if target and not folder:
        raise UserError("--write needs --data FOLDER.", HELP)
    from lmgraph.evaluate import planner, taskbench
    from lmgraph.evaluate import plans as planning
    from lmgraph.evaluate.routes import check_names
    from lmgraph.files import read_graph
    from lmgraph.train import tasks as data
    from lmgraph.train.examples import held_out

    chosen = list(dict.fromkeys(kinds)) or list(KINDS)
    if folder:
        bench = taskbench.load(folder)
        for reason, count in bench.left_out.items():
            click.echo(f"left out: {count:,} {'task' if count == 1 else 'tasks'} {reason}", err=True)
        if target:
            _written(bench, taskbench.write(bench, target), target, as_json)
            return
        if "master" in chosen and not path and not bundle:
            raise UserError(
                f"The nodes of {folder} need a master of their own.",
                f"Write what trains it: lmgraph evaluate plans --data {shlex.quote(str(folder))} --write DIR. Then name it: --graph "
                "DIR/graph.yaml, or --bundle. Without a master: --contestant listing",
            )
        given, beside = read_graph(path) if path else (bench.graph, None)
        every: Sequence[Task] = bench.tasks
    else:
        given, beside = read_graph(path or settings().graph)
        every = data.load(files)
    given = with_master(given, bundle)
    check_names("The tasks name", {step.node for task in every for step in task.steps}, list(given.nodes))
    rows = [task for task in every if not kept or held_out(task, percent)]
    shown: list[Task] = []
    if any(KINDS[kind] for kind in chosen):
        shown = planner.examples([task for task in every if not held_out(task, percent)] if kept else rows)
        rows = [task for task in rows if all(task.query != other.query for other in shown)]
    if not rows:
        without = [*(["after --kept"] if kept else []), *([f"without the {len(shown)} that are shown as examples"] if shown else [])]
        raise DataError(f"No tasks are left of {len(every):,} {', '.join(without)}.", "Give more tasks.")
    if sample and sample < len(rows):
        rows = [rows[i * len(rows) // sample] for i in range(sample)]
    again = "What was planned is kept; go on with the same command." if out else "Nothing was kept; with --out FOLDER it would be."
    try:
        results = asyncio.run(_run(rows, chosen, listing_sample, given, beside, shown, out, fresh))
    except KeyboardInterrupt:
        click.echo(f"\n{again}{' (without --fresh)' if out and fresh else ''}", err=True)
        raise
    except (AssetError, OutsideError) as error:
        error.hint = "\n".join(line for line in (error.hint, again) if line)
        raise
    off = sum(not planning.walkable(task, given, given.answer.hops) for task in rows)
    metrics = planning.measure(rows, results, planner.Served.name, off)
    give(planning.report(metrics, f"Plans on {folder.name if folder else ', '.join(f.name for f in files)}", typed()), out, as_json)


def _written(bench: Bench, written: Sequence[Path], target: Path, as_json: bool) -> None:
    """Say what was written, and what to do with it."""
    if as_json:
        counts = {"nodes": len(bench.graph.nodes), "tasks": len(bench.tasks), "left_out": dict(bench.left_out)}
        click.echo(json.dumps({**counts, "files": [str(file) for file in written]}))
        return
    for file in written:
        click.echo(f"wrote {file}")
    where = shlex.quote(str(target))
    reserve = f" --tokens {len(bench.graph.nodes)}" if len(bench.graph.nodes) > 64 else ""
    click.echo(
        f"{len(bench.tasks):,} tasks over {len(bench.graph.nodes)} nodes. Train a master and measure it:\n"
        f"  lmgraph train tune -g {where}/graph.yaml --data {where}/examples.jsonl --tasks {where}/tasks.jsonl "
        f"--out {where}/bundle{reserve}\n"
        f"  lmgraph evaluate plans {where}/tasks.jsonl -g {where}/graph.yaml --kept",
        err=True,
    )


async def _run(
    tasks: Sequence[Task],
    kinds: Sequence[str],
    listed: int | None,
    given: Graph,
    beside: Path | None,
    shown: Sequence[Task],
    out: Path | None,
    fresh: bool,
) -> list[Result]:
    from lmgraph.cli.show import Bars
    from lmgraph.evaluate import plans as planning
    from lmgraph.evaluate.journal import open_journal

    results = []
    with Bars() as bars, open_journal(out / "plans.jsonl" if out else None, planning.Plan, fresh=fresh) as journal:
        for kind in kinds:  # each is made when its turn comes: two large models are never in memory together
            planner = await _maker(kind, given, beside, shown, bars)()
            most = listed if KINDS[kind] and listed else len(tasks)
            results.append(await planning.run(planner, tasks, most, journal, bars.progress))
    return results


def _maker(kind: str, given: Graph, beside: Path | None, shown: Sequence[Task], bars: Any) -> Callable[[], Any]:
    """What makes a contestant."""
    from lmgraph import assets
    from lmgraph.engine import Engine
    from lmgraph.evaluate import listing as lists
    from lmgraph.evaluate import planner
    from lmgraph.files import model_file
    from lmgraph.runtime import Runtime

    using, most = settings(), given.answer.hops

    async def master() -> planner.Served:
        return planner.Served(await Runtime(given, using, beside, bars).master(slots=1), most)

    async def listing() -> planner.Listing:
        name = KINDS[kind]
        engine = await Engine.open(model_file(name, using.cache, None, bars), context=lists.CONTEXT, slots=1, threads=using.threads)
        described = {node: spec.description for node, spec in given.nodes.items()}
        return planner.Listing(f"list in the prompt, {name}", engine, assets.CATALOGUE[name].sha256, described, shown, most)

    return listing if KINDS[kind] else master
