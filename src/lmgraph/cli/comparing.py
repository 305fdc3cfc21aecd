"""Commands that measure routers against each other: evaluate compare."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmgraph.cli import settings
from lmgraph.cli.measuring import give, typed, with_master
from lmgraph.cli.run import GRAPH, JSON
from lmgraph.errors import AssetError, DataError, OutsideError, UserError

if TYPE_CHECKING:
    from lmgraph.evaluate.compare import Contest, Result
    from lmgraph.evaluate.contestants import Contestant
    from lmgraph.graph import Graph
    from lmgraph.settings import Settings

KINDS = (
    "master",
    "rows",
    "semantic-router",
    "semantic-router-max",
    "minilm-regression",
    "minilm-knn",
    "tfidf",
    "listing",
    "listing-coder",
    "majority",
    "random",
)
Make = Callable[[], "Contestant"]
ONLY_FILES = {"examples": "--data", "path": "--graph", "bundle": "--bundle", "kept": "--kept", "styles": "--style"}
ONLY_INTENTS = {"folder": "--folder", "shots": "--shots", "seed": "--seed"}


@click.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "--data",
    "examples",
    type=click.Path(path_type=Path),
    multiple=True,
    help="JSON Lines that the contestants learn from, but for the tenth that training keeps aside (repeat)",
)
@click.option("--intents", type=click.Choice(["banking77", "clinc150"]), help="a public intent set instead of FILES")
@click.option(
    "--folder", type=click.Path(path_type=Path, exists=True, file_okay=False), help="where the intent set lies, in its original layout"
)
@click.option("--shots", type=click.IntRange(2), default=10, show_default=True, help="examples a node, with --intents")
@click.option("--seed", type=int, default=0, show_default=True, help="which examples are drawn, with --intents")
@GRAPH
@click.option("--bundle", help="another master than the graph's: built-in name, folder or GGUF")
@click.option("--kept", is_flag=True, help="of FILES, only the tenth that training keeps aside")
@click.option("--style", "styles", multiple=True, help="of FILES, only examples of this style (repeat)")
@click.option(
    "--contestant", "kinds", type=click.Choice(KINDS), multiple=True, metavar="NAME", help="only this one (repeat)  [default: all]"
)
@click.option("--sample", type=click.IntRange(1), help="only this many queries, spread evenly")
@click.option("--listing-sample", type=click.IntRange(1), help="fewer queries for the two that read all descriptions, which are slow")
@click.option(
    "--rows-examples", type=click.IntRange(10), default=3000, show_default=True, help="examples that rows only are fitted on, at most"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="folder for the report, what is trained and every decision; the same command goes on from there",
)
@click.option("--fresh", is_flag=True, help="forget the decisions that are in --out")
@JSON
def compare(
    files: tuple[Path, ...],
    examples: tuple[Path, ...],
    intents: str | None,
    folder: Path | None,
    shots: int,
    seed: int,
    path: Path | None,
    bundle: str | None,
    kept: bool,
    styles: tuple[str, ...],
    kinds: tuple[str, ...],
    sample: int | None,
    listing_sample: int | None,
    rows_examples: int,
    out: Path | None,
    fresh: bool,
    as_json: bool,
) -> None:
    """Routers side by side: same queries, same examples, one run; accuracy against decision time.

    Either FILES of queries (JSON Lines with query and node) and --data to learn from, with the graph's master; or --intents with
    --folder: a master is then trained on the few examples. What is not installed is left out: pip install 'lmgraph[compare]'.

    \b
    The contestants:
    master               the graph's master, or the one trained on the examples
    rows                 functional rows fitted on the untouched base
    semantic-router      similarity to examples, mean of the nearest (its default)
    semantic-router-max  the same, the nearest alone
    minilm-regression    logistic regression on sentence embeddings
    minilm-knn           nearest examples by sentence embedding
    tfidf                logistic regression on words
    listing              SmolLM2-135M reads all descriptions and answers with a name
    listing-coder        Qwen2.5-Coder-1.5B does
    majority, random     know nothing
    """
    if bool(intents) == bool(files):
        raise UserError("Give FILES and --data, or --intents and --folder.", "See: lmgraph evaluate compare --help")
    if intents and not folder:
        raise UserError(f"Where does {intents} lie?", f"lmgraph evaluate compare --intents {intents} --folder DIR")
    if files and not examples:
        raise UserError("What do the contestants learn from?", "Add --data FILE (JSON Lines with query and node); repeat it for more.")
    if misplaced := _given(ONLY_FILES if intents else ONLY_INTENTS):
        where = "FILES, not with --intents" if intents else "--intents, not with FILES"
        raise UserError(f"{', '.join(misplaced)}: only with {where}.", "See: lmgraph evaluate compare --help")
    from dataclasses import replace

    from lmgraph.evaluate import compare as comparing
    from lmgraph.evaluate import intents as sets
    from lmgraph.evaluate.routes import check_names
    from lmgraph.files import read_graph
    from lmgraph.train import examples as data

    given, beside = None, None
    if intents and folder:
        found = sets.load(intents, folder)
        few = found.few(shots, seed)
        first = {e.node: e.query for e in reversed(few)}
        contest = comparing.Contest({node: f"messages like: {first[node]}" for node in found.nodes}, few, found.test, found.outside)
        title = f"Routers on {intents}, {shots} examples a node"
    else:
        given, beside = read_graph(path or settings().graph)
        given = with_master(given, bundle)
        every = data.load(files)
        rows = [e for e in every if (not styles or e.style in styles) and (not kept or data.held_out(e, 10))]
        if not rows:
            raise DataError(
                "No queries are left after --style and --kept.",
                f"Styles in FILES: {', '.join(sorted({e.style or '(none)' for e in every}))}",
            )
        learnt, _ = data.split(data.load(examples))
        names = {name: node.description for name, node in given.nodes.items()}
        check_names("The examples are labelled with", {e.node for e in [*rows, *learnt]}, list(names))
        if doubles := len({e.query for e in rows} & {e.query for e in learnt}):
            raise DataError(
                f"{doubles:,} of {len(rows):,} queries are among the examples that the contestants learn from.",
                "Judge on other FILES, or on what training keeps aside: --kept",
            )
        contest = comparing.Contest(names, learnt, rows)
        title = f"Routers on {', '.join(f.name for f in files)}"
    queries, outside = contest.spread(sample or len(contest.queries))
    contest = replace(contest, queries=queries, outside=outside)
    again = "What was decided is kept; go on with the same command." if out else "Nothing was kept; with --out FOLDER it would be."
    try:
        results = asyncio.run(_run(contest, list(dict.fromkeys(kinds)) or KINDS, listing_sample, given, beside, out, fresh, rows_examples))
    except KeyboardInterrupt:
        click.echo(f"\n{again}{' (without --fresh)' if out and fresh else ''}", err=True)
        raise
    except (AssetError, OutsideError) as error:
        error.hint = "\n".join(line for line in (error.hint, again) if line)
        raise
    give(comparing.report(comparing.measure(results, contest, "lmgraph master"), title, typed()), out, as_json)


def _given(names: dict[str, str]) -> list[str]:
    """Those of some options that stand on the command line."""
    context = click.get_current_context()
    return [option for name, option in names.items() if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE]


async def _run(
    contest: Contest,
    kinds: Sequence[str],
    listed: int | None,
    given: Graph | None,
    beside: Path | None,
    out: Path | None,
    fresh: bool,
    rows: int,
) -> list[Result]:
    import tempfile

    from lmgraph.cli.show import Bars
    from lmgraph.evaluate import compare as comparing
    from lmgraph.evaluate.journal import open_journal

    results = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        Bars() as bars,
        open_journal(out / "verdicts.jsonl" if out else None, comparing.Decided, fresh=fresh) as journal,
    ):
        keep = out or Path(scratch)
        makers = _makers(given, beside, settings(), keep, bars, rows)
        for kind in kinds:
            contestant = await makers[kind]()
            most = listed if kind.startswith("listing") and listed else len(contest.queries)
            results.append(await comparing.run(contestant, contest, most, journal, bars.progress))
    return results


def _makers(given: Graph | None, beside: Path | None, using: Settings, keep: Path, bars: Any, rows_examples: int) -> dict[str, Any]:
    """What makes each kind of contestant, when its turn comes: two large models are never in memory together."""
    from lmgraph import assets, bundles
    from lmgraph.engine import Engine
    from lmgraph.evaluate import contestants, listing, masters
    from lmgraph.files import model_file
    from lmgraph.runtime import Runtime

    embedder = contestants.Embedder(keep / "embeddings.npz")
    small, coder = "smollm2-135m", "qwen2.5-coder-1.5b"

    def weights(name: str) -> Path:
        return model_file(name, using.cache, None, bars)

    async def master() -> Contestant:
        if given is None:
            start = bundles.builtin_folder() / masters.START
            return masters.Few(weights(small), assets.CATALOGUE[small].sha256, start, keep, using.threads, bars.progress)
        return masters.Served(await Runtime(given, using, beside, bars).master(slots=1))

    async def rows() -> Contestant:
        return masters.RowsOnly(weights(small), assets.CATALOGUE[small].sha256, keep, using.threads, bars.progress, rows_examples)

    async def listed(name: str) -> Contestant:
        engine = await Engine.open(weights(name), context=listing.CONTEXT, slots=1, threads=using.threads)
        return listing.Listing(f"listing in the prompt, {name}", engine)

    def simple(make: Make) -> Callable[[], Any]:
        async def made() -> Contestant:
            return make()

        return made

    return {
        "master": master,
        "rows": rows,
        "semantic-router": simple(lambda: contestants.SemanticRouter(embedder)),
        "semantic-router-max": simple(lambda: contestants.SemanticRouter(embedder, "max")),
        "minilm-regression": simple(lambda: contestants.EmbeddingRegression(embedder)),
        "minilm-knn": simple(lambda: contestants.EmbeddingNeighbours(embedder)),
        "tfidf": simple(contestants.TfIdf),
        "listing": lambda: listed(small),
        "listing-coder": lambda: listed(coder),
        "majority": simple(contestants.Majority),
        "random": simple(contestants.Random),
    }
