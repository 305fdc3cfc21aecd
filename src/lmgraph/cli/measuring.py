"""Commands that measure: evaluate routes, evaluate mmlu."""

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
    from lmgraph.graph import Graph

BUNDLE = click.option("--bundle", help="another master than the graph's: built-in name, folder or GGUF")
CONCURRENCY = click.option("--concurrency", type=click.IntRange(1, 64), default=4, show_default=True)


TABLE = {
    "routes": ("measuring", "How well the master routes: accuracy, calibration, confusions, rewrites, latency."),
    "mmlu": ("measuring", "MMLU end to end: routed, by subject, each worker alone, at random."),
    "outcomes": ("replaying", "Replay routing policies on recorded answers of many models."),
    "compare": ("comparing", "Routers side by side: the master, embeddings, listings in the prompt and others."),
    "plans": ("planning", "Plans of several steps: the master against all descriptions in the prompt."),
}


@click.group(cls=Lazy, table=TABLE)
def evaluate() -> None:
    """Measure routers on data that was not used for training."""


@click.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@GRAPH
@BUNDLE
@click.option("--rewrite/--no-rewrite", "rewriting", default=False, show_default=True, help="also write (and judge) rewritten queries")
@click.option("--style", "styles", multiple=True, help="only examples of this style (repeat)")
@click.option("--kept", is_flag=True, help="only the tenth of the examples that training keeps aside")
@click.option("--sample", type=click.IntRange(1), help="only this many examples, spread evenly over the files")
@CONCURRENCY
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
    given = with_master(given, bundle)
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


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@GRAPH
@BUNDLE
@click.option("--shots", type=click.IntRange(0, 5), default=5, show_default=True, help="questions shown with their answers before each")
@click.option("--sample", type=click.IntRange(1), help="only this many questions, spread evenly over the subjects")
@click.option("--rewrite/--no-rewrite", "rewriting", default=False, show_default=True, help="also ask what the master rewrites")
@CONCURRENCY
@click.option("--out", type=click.Path(path_type=Path), help="folder for the report and every answer; the same command goes on from there")
@click.option("--fresh", is_flag=True, help="forget the answers that are in --out")
@JSON
def mmlu(
    data: Path,
    path: Path | None,
    bundle: str | None,
    shots: int,
    sample: int | None,
    rewriting: bool,
    concurrency: int,
    out: Path | None,
    fresh: bool,
    as_json: bool,
) -> None:
    """MMLU with the whole graph: routed by the master, by subject, each worker alone, at random.

    DATA is a folder with MMLU's dev and test questions (the original CSV files, Hugging Face's cais/mmlu as Parquet or JSON Lines, or
    dev.jsonl and test.jsonl), or one file of test questions for --shots 0.
    """
    from lmgraph.errors import AssetError, OutsideError

    again = "What was answered is kept; go on with the same command." if out else "Nothing was kept; with --out FOLDER it would be."
    try:
        asyncio.run(_mmlu(data, path, bundle, shots, sample, rewriting, concurrency, out, fresh, as_json))
    except KeyboardInterrupt:
        click.echo(f"\n{again}{' (without --fresh)' if out and fresh else ''}", err=True)
        raise
    except (AssetError, OutsideError) as error:
        error.hint = "\n".join(line for line in (error.hint, again) if line)
        raise


async def _mmlu(
    data: Path,
    path: Path | None,
    bundle: str | None,
    shots: int,
    sample: int | None,
    rewriting: bool,
    concurrency: int,
    out: Path | None,
    fresh: bool,
    as_json: bool,
) -> None:
    from lmgraph.assets import CATALOGUE, digest_of
    from lmgraph.cli.show import Bars
    from lmgraph.evaluate import marks, mmludata
    from lmgraph.evaluate import mmlu as exam
    from lmgraph.evaluate.asking import Reply
    from lmgraph.evaluate.journal import open_journal
    from lmgraph.evaluate.routes import check_names
    from lmgraph.files import model_file, read_graph, with_profile
    from lmgraph.graph import WorkerSpec
    from lmgraph.runtime import Runtime

    sheets = mmludata.load(data)
    questions = mmludata.spread(sheets.test, sample or len(sheets.test))
    shown = mmludata.few_shots(sheets.dev, questions, shots)
    using = settings()
    given, folder = read_graph(path or using.graph)
    given = with_profile(with_master(given, bundle), using.profile)
    check_names("The questions belong to", {question.node for question in questions}, list(given.nodes))
    with (
        Bars() as bars,
        open_journal(out / "decisions.jsonl" if out else None, exam.Routed, fresh=fresh) as decisions,
        open_journal(out / "answers.jsonl" if out else None, Reply, fresh=fresh) as answers,
    ):
        digests: dict[str, str] = {name: known.sha256 for name, known in CATALOGUE.items()}

        def weights(spec: WorkerSpec) -> str:
            if spec.model not in digests:
                digests[spec.model] = digest_of(model_file(spec.model, using.cache, folder, bars))
            return digests[spec.model]

        those = exam.candidates(given, weights)
        if len(answers):
            bars.say(f"{len(answers):,} answers are in {out}: going on from there")
        async with Runtime(given, using, folder, bars) as runtime:
            master = await runtime.master(slots=concurrency)
            routed = await exam.route(
                lambda query: runtime.decide(query, rewriting=None if rewriting else False),
                questions,
                exam.master_key(given, digest_of(master.engine.path), rewriting),
                decisions,
                concurrency=concurrency,
                progress=bars.progress,
            )
            results = await exam.sit(
                questions,
                shown,
                routed,
                those,
                lambda candidate: runtime.worker(given.nodes[candidate.nodes[0]]),
                answers,
                concurrency=concurrency,
                progress=bars.progress,
            )
    first = [name for name in given.neighbours() if name in given.nodes]
    metrics = marks.measure(questions, results, those, first, shots=shots, rewriting=rewriting)
    give(marks.report(metrics, f"MMLU, {shots}-shot, {len(questions):,} questions of {data.name}", typed()), out, as_json)


def with_master(given: Graph, bundle: str | None) -> Graph:
    """The graph with another master, where one is named; a path is taken from here, not from the graph's folder."""
    from dataclasses import replace

    if not bundle:
        return given
    return replace(given, master=replace(given.master, bundle=str(Path(bundle).resolve()) if Path(bundle).exists() else bundle))


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
