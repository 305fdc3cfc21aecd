"""Commands that make masters: train tune, train heads, train export."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click

from lmgraph.cli import settings
from lmgraph.cli.run import GRAPH
from lmgraph.errors import DataError, MissingExtra, UserError

DATA = click.option(
    "--data", "files", type=click.Path(path_type=Path), multiple=True, required=True, help="JSON Lines with query, node, rewrite (repeat)"
)
CHECK = click.option(
    "--check",
    "checks",
    type=click.Path(path_type=Path),
    multiple=True,
    help="more examples to validate on, never trained on (repeat); a tenth of --data is always kept aside",
)
OUT = click.option("--out", type=click.Path(path_type=Path), required=True, help="folder for the new bundle")
BASE = click.option("--base", default="smollm2-135m", show_default=True, help="catalogue name of the base weights, or a GGUF file")
TOKENS = click.option(
    "--tokens", "size", type=click.IntRange(1, 100_000), default=64, show_default=True, help="functional tokens to reserve"
)


@click.group()
def train() -> None:
    """Train a master, fit rows, export a GGUF."""


@train.command()
@click.option("--data", "files", type=click.Path(path_type=Path), multiple=True, help="JSON Lines with query, node, rewrite (repeat)")
@CHECK
@click.option(
    "--tasks",
    "walks",
    type=click.Path(path_type=Path),
    multiple=True,
    help="JSON Lines with query and steps (node, needs, rewrite): teaches walks of several steps (repeat); a fifth is kept aside",
)
@OUT
@BASE
@GRAPH
@TOKENS
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True)
@click.option("--learning-rate", type=float, default=5e-4, show_default=True)
@click.option("--rows-learning-rate", type=float, default=3e-3, show_default=True)
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True, help="rank of the LoRA")
@click.option("--batch-tokens", type=click.IntRange(64), default=1536, show_default=True)
@click.option("--rewrite-weight", type=click.FloatRange(0), default=0.5, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--start", type=click.Path(path_type=Path, exists=True, file_okay=False), help="bundle to go on from, instead of the bare base"
)
@click.option(
    "--replay",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="share of the first --data files to use (all but the last file)",
)
@click.option(
    "--rewrite-share",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="share of the rewrites that is taught; the other examples and tasks teach only the choices, at half the cost",
)
@click.option(
    "--node", help="learn only what follows this node in --tasks, as an adapter of its own for the graph's master (or for --start)"
)
@click.option("--threads", type=click.IntRange(0), default=0, show_default=True, help="0: what torch chooses")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="of the matrix products; auto: bf16 where the processor has instructions for it (less than half the time)",
)
@click.option(
    "--recipe", "recipe_file", type=click.Path(path_type=Path, exists=True), help="recipe.json of another run; options given here win"
)
def tune(
    files: tuple[Path, ...],
    checks: tuple[Path, ...],
    walks: tuple[Path, ...],
    out: Path,
    base: str,
    path: Path | None,
    size: int,
    recipe_file: Path | None,
    start: Path | None,
    replay: float,
    rewrite_share: float,
    node: str | None,
    **options: Any,
) -> None:
    """LoRA on the trunk and rows for the functional tokens of a graph. Goes on from the last checkpoint in --out.

    Leaves weights, vocabulary, recipe, log, plot, metrics and card in --out: a bundle that graph.yaml can name. With --node it leaves
    adapter.gguf: the node's `adapter:` in graph.yaml, which the master puts on for the choice that follows this node.
    """
    from lmgraph import bundles
    from lmgraph.cli.show import Bars
    from lmgraph.train import examples as data
    from lmgraph.train import heads, tasks

    using = settings()
    given, vocabulary, base_file = _ground(path, base, size)
    if node:
        start = _master_of(given, node, walks, start, path or using.graph)
        ground, vocabulary = vocabulary.base, bundles.read(str(start.resolve())).vocabulary
        if vocabulary.base != ground:
            raise UserError(f"The master in {start} was trained on another base than {base_file.name}.", "Name its base: --base")
    elif not files:
        raise UserError("Give --data, the examples to learn from.", "See: lmgraph train tune --help")
    training, kept = data.split(data.load(files)) if files else ([], [])
    if replay < 1 and files:
        fresh = {e.query for e in data.load(files[-1:])}
        training = [e for e in training if e.query in fresh or data.held_out(e, 10 + round(90 * replay))]
    walking, kept_walks = data.split(tasks.load(walks), tasks.KEPT) if walks else ([], [])
    if rewrite_share < 1:
        training = [e if data.held_out(e, 10 + round(90 * rewrite_share)) else replace(e, rewrite="") for e in training]
        most = tasks.KEPT + round((100 - tasks.KEPT) * rewrite_share)
        walking = [task if data.held_out(task, most) else tasks.bare(task) for task in walking]
    if files:
        enough(training, kept)
    validation: dict[str, Any] = {"kept": kept, **{file.stem.split(".")[0]: data.load([file]) for file in checks}, "tasks": kept_walks}
    validation = {name: rows for name, rows in validation.items() if rows}
    try:
        from lmgraph.train import tune as tuning
    except ImportError as error:
        raise MissingExtra("Training a master", "train") from error
    recipe = tuning.Recipe()
    if recipe_file:
        known = {f.name for f in fields(tuning.Recipe)}
        recipe = replace(recipe, **{k: v for k, v in json.loads(recipe_file.read_text()).items() if k in known})
    given_options = {
        k: v
        for k, v in options.items()
        if not recipe_file or click.get_current_context().get_parameter_source(k) == click.core.ParameterSource.COMMANDLINE
    }
    recipe = replace(recipe, **given_options)
    click.echo(f"{len(training)} examples, {len(kept)} kept aside, {len(given.nodes)} nodes, base {base_file.name}", err=True)
    metrics = tuning.main(
        base_file,
        training,
        validation,
        vocabulary,
        recipe,
        out,
        log=lambda line: click.echo(line, err=True),
        start=start,
        walks=walking,
        node=node or "",
    )
    if node:
        click.echo(json.dumps(metrics))
        click.echo(f"The adapter is {out / 'adapter.gguf'}. Use it: {node}: {{adapter: {out / 'adapter.gguf'}}} in graph.yaml", err=True)
        return
    with Bars() as bars:
        calibration = asyncio.run(
            heads.finish(out, base_file, out / "merged.gguf", training, kept, recipe.query_limit, using.threads, bars.progress)
        )
    (out / "merged.gguf").unlink()
    metrics["calibration"] = calibration
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    click.echo(json.dumps(metrics))
    click.echo(f"The bundle is in {out}. Use it: master: {{bundle: {out}}} in graph.yaml", err=True)


def _master_of(given: Any, node: str, walks: tuple[Path, ...], start: Path | None, path: Path | None) -> Path:
    """The bundle that an adapter of a node is trained for."""
    from lmgraph import bundles
    from lmgraph.files import graph_file

    if node not in given.nodes:
        raise UserError(f"There is no node {node!r} in the graph.", f"Valid: {', '.join(given.nodes)}")
    if not walks:
        raise UserError(
            "--node needs --tasks: what follows the node is learnt from tasks of several steps.", "See: lmgraph train tune --help"
        )
    if start is None and given.master.bundle.endswith(".gguf"):
        raise UserError("The master of this graph is a merged GGUF; adapters are trained on bundles.", "Name its bundle: --start FOLDER")
    beside = graph_file(path)
    return start or bundles.read(given.master.bundle, beside.parent if beside else None).folder


def enough(training: Sequence[Any], kept: Sequence[Any]) -> None:
    """Raise DataError where nothing is left to learn from, or to keep aside."""
    if not training or not kept:
        left = "learn from" if kept else "keep aside"
        raise DataError(f"Too few examples: nothing is left to {left}.", "Give at least 50 examples with different queries.")


def _ground(path: Path | None, base: str, size: int) -> tuple[Any, Any, Path]:
    """(graph, fresh vocabulary for it, base weights)."""
    from lmgraph import assets, bundles
    from lmgraph.cli.show import Bars
    from lmgraph.files import model_file, read_graph
    from lmgraph.tokens import Vocabulary

    using = settings()
    given, folder = read_graph(path or using.graph)
    with Bars() as bars:
        base_file = model_file(base, using.cache, folder, bars)
    known = assets.CATALOGUE[base].sha256 if base in assets.CATALOGUE else assets.digest_of(base_file)
    first = bundles.vocabulary_size(base_file)
    tokens = {name: node.token for name, node in given.nodes.items()}
    if max(tokens.values()) >= size:
        raise UserError(
            f"The graph uses functional token {max(tokens.values())}, only 0..{size - 1} are reserved.", "Reserve more with --tokens."
        )
    return given, Vocabulary(first, size, first + size, tokens, base=known), base_file


@train.command("heads")
@click.option("--node", help="fit only this node's row, against a trained bundle (20 example queries are enough)")
@click.option("--examples", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="with --node: JSON Lines with `query`")
@click.option(
    "--data",
    "files",
    type=click.Path(path_type=Path),
    multiple=True,
    help="without --node: JSON Lines with query and node, for every row of the graph",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="folder for the new bundle (default with --node: bundles/NAME beside the graph)"
)
@BASE
@TOKENS
@GRAPH
def heads_(
    node: str | None, examples: Path | None, files: tuple[Path, ...], out: Path | None, base: str, size: int, path: Path | None
) -> None:
    """Fit functional rows on frozen hidden states: no torch, no retraining.

    With --node: one row more on a trained bundle; graph.yaml is pointed at the new bundle. Without: all rows of a graph on an
    untouched base ("rows only"); stopped, it goes on from the states in --out when it is started again.
    """
    if node:
        if not examples:
            raise UserError("--node needs --examples.", "lmgraph train heads --node NAME --examples FILE")
        from lmgraph.cli.graphs import _edit
        from lmgraph.files import read_graph

        target = path or settings().graph or Path("graph.yaml")
        given, _ = read_graph(target)
        if node not in given.nodes:
            raise UserError(
                f"There is no node {node!r} in {target}.",
                f"Add it: lmgraph graph add {node} --graph {target} --description ... --examples {examples}",
            )
        made = asyncio.run(fit_node(target, node, given.nodes[node].token, examples, out))

        def change(data: Any) -> None:
            data.setdefault("master", {})["bundle"] = made

        _edit(target, change)
        click.echo(f"{node}: its row is in {made}; {target} uses it.")
        return
    if not files or not out:
        raise UserError("Give --node and --examples, or --data and --out.", "See: lmgraph train heads --help")
    asyncio.run(_all_rows(files, out, base, size, path))


async def fit_node(path: Path, node: str, token: int, examples: Path, out: Path | None) -> str:
    """Fit one row against the bundle of a graph file; the new bundle's name as the graph should write it."""
    from lmgraph import bundles
    from lmgraph.cli.run import queries_of
    from lmgraph.cli.show import Bars
    from lmgraph.files import master_file, read_graph
    from lmgraph.master import QUERY_LIMIT
    from lmgraph.train import heads

    using = settings()
    given, folder = read_graph(path)
    if given.master.bundle.endswith(".gguf"):
        raise UserError("The master of this graph is a merged GGUF; rows are fitted on bundles.", "Name the bundle's folder in graph.yaml.")
    queries = [row["query"] for row in queries_of(examples)]
    bundle = bundles.read(given.master.bundle, folder)
    began = time.perf_counter()
    beside = folder or Path()
    target = out or beside / "bundles" / f"{path.stem}-{node}"
    with Bars() as bars:
        merged, _ = await asyncio.to_thread(master_file, given.master.bundle, using.cache, folder, bars)
        made = await heads.add_node(
            bundle, merged, node, token, queries, target, QUERY_LIMIT, using.threads, lambda a, b: bars.progress("reading examples", a, b)
        )
        row = bundles.read_tensors(made.weights)["output_rows"][token]
        bundles.patch(merged, bundles.merged_path(made, using.cache), {token: row}, made.vocabulary, made.name)
    click.echo(f"{node}: token {token}, {len(queries)} examples, {time.perf_counter() - began:.1f} s", err=True)
    try:
        return str(target.resolve().relative_to(beside.resolve()))
    except ValueError:
        return str(target.resolve())


async def _all_rows(files: tuple[Path, ...], out: Path, base: str, size: int, path: Path | None) -> None:
    from lmgraph.cli.show import Bars
    from lmgraph.engine import Engine
    from lmgraph.master import QUERY_LIMIT
    from lmgraph.train import examples as data
    from lmgraph.train import heads

    using = settings()
    _, vocabulary, base_file = _ground(path, base, size)
    training, kept = data.split(data.load(files))
    enough(training, kept)
    labels = heads.index([e.node for e in [*training, *kept]], vocabulary.nodes)
    queries = [e.query for e in [*training, *kept]]
    keep = out / f"states-{hashlib.sha256(json.dumps([vocabulary.base, QUERY_LIMIT, queries]).encode()).hexdigest()[:12]}.npy"
    engine = await Engine.open(base_file, context=1024, slots=4, threads=using.threads, states=True)
    with Bars() as bars:
        try:
            features = await heads.states(engine, vocabulary, queries, QUERY_LIMIT, lambda a, b: bars.progress("hidden states", a, b), keep)
        finally:
            await engine.close()
    cut = len(training)
    fitted = heads.fit_all(features[:cut], labels[:cut], len(vocabulary.nodes), features[cut:], labels[cut:])
    heads.rows_bundle(out, vocabulary, fitted, features.shape[1])
    metrics = {
        "examples": cut,
        "kept": {"accuracy": fitted.accuracy, "loss": fitted.loss, "n": len(kept)},
        "penalty": fitted.penalty,
        "temperature": fitted.temperature,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    keep.unlink()
    click.echo(json.dumps(metrics))


@train.command()
@click.argument("name")
@click.argument("target", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--force", is_flag=True, help="write over a file that is there")
def export(name: str, target: Path, force: bool) -> None:
    """Write bundle NAME (built-in, or a folder), merged into its base, as one GGUF that plain llama.cpp loads."""
    from lmgraph import bundles
    from lmgraph.cli.show import Bars
    from lmgraph.files import base_of, model_file

    if target.exists() and not force:
        raise UserError(f"{target} exists.", "Use another name, or --force to write over it.")
    found = bundles.read(name)
    with Bars() as bars:
        base_file = model_file(base_of(found.vocabulary.base).name, settings().cache, None, bars)
        bundles.merge(found, base_file, target, lambda a, b: bars.progress("merging", a, b))
    click.echo(f"Wrote {target} ({target.stat().st_size / 1e6:.0f} MB). In graph.yaml: master: {{bundle: {target}}}")
