"""Commands that measure: evaluate routes."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lmgraph.cli import Lazy, settings
from lmgraph.cli.run import GRAPH, JSON

if TYPE_CHECKING:
    from lmgraph.evaluate.report import Report


TABLE = {
    "routes": ("measuring", "How well the master routes: accuracy, calibration, confusions, rewrites, latency."),
    "compare": ("comparing", "Routers side by side: the master, embeddings, listings in the prompt and others."),
}


@click.group(cls=Lazy, table=TABLE)
def evaluate() -> None:
    """Measure routers on data that was not used for training."""


@click.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@GRAPH
@click.option("--bundle", help="another master than the graph's: built-in name, folder or GGUF")
@click.option("--rewrite/--no-rewrite", "rewriting", default=False, show_default=True, help="also write (and judge) rewritten queries")
@click.option("--style", "styles", multiple=True, help="only examples of this style (repeat)")
@click.option("--kept", is_flag=True, help="only the tenth of the examples that training keeps aside")
@click.option("--sample", type=click.IntRange(1), help="only this many examples, spread evenly over the files")
@click.option("--concurrency", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="folder for the report: JSON, Markdown, pictures")
@JSON
def routes(
    files: tuple[Path, ...],
    path: Path | None,
    bundle: str | None,
    rewriting: bool,
    styles: tuple[str, ...],
    kept: bool,
    sample: int | None,
    concurrency: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Router accuracy, macro-F1, top-2, calibration, confusions, rewrites and latency on FILES.

    FILES are JSON Lines (.gz too) with query or question, and node.
    """
    asyncio.run(_routes(files, path, bundle, rewriting, styles, kept, sample, concurrency, out, as_json))


async def _routes(
    files: tuple[Path, ...],
    path: Path | None,
    bundle: str | None,
    rewriting: bool,
    styles: tuple[str, ...],
    kept: bool,
    sample: int | None,
    concurrency: int,
    out: Path | None,
    as_json: bool,
) -> None:
    from dataclasses import replace

    from lmgraph.cli.show import Bars
    from lmgraph.errors import DataError
    from lmgraph.evaluate import routes as measuring
    from lmgraph.files import read_graph
    from lmgraph.runtime import Runtime
    from lmgraph.train import examples as data
    from lmgraph.types import Decision

    rows = [e for e in data.load(files) if (not styles or e.style in styles) and (not kept or data.held_out(e, 10))]
    if sample and sample < len(rows):
        rows = [rows[i * len(rows) // sample] for i in range(sample)]
    if not rows:
        raise DataError("No examples are left after --style and --kept.")
    using = settings()
    given, folder = read_graph(path or using.graph)
    measuring.check_names("The examples are labelled with", {e.node for e in rows}, list(given.nodes))
    if bundle:
        given = replace(given, master=replace(given.master, bundle=str(Path(bundle).resolve()) if Path(bundle).exists() else bundle))
    with Bars() as bars:
        runtime = Runtime(given, using, folder, bars)
        async with runtime:
            master = await runtime.master(slots=concurrency)

            async def decide(query: str) -> Decision:
                return await master.decide(query, rewriting=rewriting)

            found = await measuring.run(
                decide, rows, concurrency=concurrency, progress=lambda done, total: bars.progress("routing", done, total)
            )
    metrics = measuring.measure(found, list(given.nodes))
    made = measuring.report(metrics, f"Router accuracy on {', '.join(f.name for f in files)}", typed())
    give(made, out, as_json)


def typed() -> str:
    """What the user typed, for the report."""
    return "lmgraph " + shlex.join(sys.argv[1:])


def give(made: Report, out: Path | None, as_json: bool) -> None:
    """Write the report where asked for, and show it: JSON, or its brief tables."""
    from rich.console import Console

    from lmgraph.evaluate import report

    if out:
        for file in report.write(made, out):
            click.echo(f"wrote {file}", err=True)
    if as_json:
        print(json.dumps(made.metrics))
    else:
        Console().print(report.table(made))
