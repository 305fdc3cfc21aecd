"""Commands that replay recorded answers: evaluate outcomes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmgraph.cli import settings
from lmgraph.cli.measuring import give, typed
from lmgraph.cli.run import JSON
from lmgraph.errors import DataError

if TYPE_CHECKING:
    from lmgraph.evaluate.outcomes import Table


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--models", "known", type=click.Path(path_type=Path), help="their parameters and costs  [default: models.json beside TABLE]")
@click.option("--only", multiple=True, metavar="MODEL", help="only these models (repeat)")
@click.option("--max-billions", type=click.FloatRange(min=0, min_open=True), help="only models with at most this many billion parameters")
@click.option(
    "--folds", "parts", type=click.IntRange(2), default=5, show_default=True, help="parts of the questions, each judged by the rest"
)
@click.option("--test", type=click.Path(path_type=Path), help="another table to judge on, instead of folds")
@click.option("--seed", type=int, default=0, show_default=True, help="which question is in which part")
@click.option(
    "--votes", "sizes", type=click.IntRange(2), multiple=True, default=(3, 5), show_default=True, help="workers that vote (repeat)"
)
@click.option("--sure", type=click.FloatRange(0, 1), default=0.6, show_default=True, help="probability at which a cascade asks nobody more")
@click.option("--bundle", default="mmlu", show_default=True, help="master that reads the questions: built-in name or folder")
@click.option("--reads", type=click.IntRange(8, 1000), default=96, show_default=True, help="tokens of a question that the master reads")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="folder for the report, and for what the master read; the next run finds it",
)
@JSON
def outcomes(
    table: Path,
    known: Path | None,
    only: tuple[str, ...],
    max_billions: float | None,
    parts: int,
    test: Path | None,
    seed: int,
    sizes: tuple[int, ...],
    sure: float,
    bundle: str,
    reads: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Replay routing policies on recorded answers of many models: one worker, votes, cascades, against best single, random and oracle.

    TABLE holds who was right (and with which letter) on which question: MMLU-Pro's, RouterBench's or your own (docs/outcomes.md). Every
    question is judged by policies that learnt from others. Learnt votes need scikit-learn: pip install 'lmgraph[compare]'.
    """
    import numpy as np

    from lmgraph.cli.show import Bars
    from lmgraph.evaluate import outcomes as recorded
    from lmgraph.evaluate import policies, replay, standings

    found = _chosen(recorded.load(table, known), only, max_billions)
    count = len(found.ids)
    if test:
        found = recorded.joined(found, recorded.load(test, known))
        splits = [(np.arange(count), np.arange(count, len(found.ids)))]
    else:
        splits = replay.folds(count, parts, seed, found.queries)
    _check_whole(found.rows(np.arange(count if test else 0, len(found.ids))))
    with Bars() as bars:
        states = asyncio.run(_states(found.queries, bundle, reads, out, bars)) if any(found.queries) else None
        view = replay.view_of(found, states)
        made, missing = policies.usual(found, view, sizes, sure)
        plays = replay.replay(made, found, view, splits, partial(bars.progress, "replaying"))
    metrics = standings.measure(found, plays, policies.Best.name, missing)
    title = f"Recorded outcomes: {table.name}" + (f", judged on {test.name}" if test else "")
    give(standings.report(metrics, title, typed()), out, as_json)


def _chosen(table: Table, only: Sequence[str], most: float | None) -> Table:
    """The table of the models asked for; says of which the size is not known."""
    chosen = table.select(only or [model.name for model in table.models])
    if most is None:
        return chosen
    if unknown := [model.name for model in chosen.models if model.billions is None]:
        click.echo(f"left out, size unknown: {', '.join(unknown)}", err=True)
    names = [model.name for model in chosen.models if model.billions is not None and model.billions <= most]
    if not names:
        sized = sorted((model.billions, model.name) for model in chosen.models if model.billions is not None)
        raise DataError(
            f"No model has at most {most:g} billion parameters: "
            + (f"the smallest is {sized[0][1]} with {sized[0][0]:g}." if sized else "no model's size is known."),
            "Raise --max-billions, or tell sizes in a models file (docs/outcomes.md): --models FILE",
        )
    return chosen.select(names)


def _check_whole(table: Table) -> None:
    """Every model's outcome is needed on every question that is judged: anybody may be asked."""
    import numpy as np

    gaps = np.isnan(table.right)
    if not gaps.any():
        return
    names = [model.name for model in table.models]
    lacking = np.flatnonzero(gaps.any(axis=1))
    listed = [f"{table.ids[q]!r} of {', '.join(name for name, gone in zip(names, gaps[q], strict=True) if gone)}" for q in lacking[:5]]
    more = f"; {len(lacking) - 5:,} more" if len(lacking) > 5 else ""
    worst = [f"{names[m]} ({gaps[:, m].sum():,})" for m in np.argsort(-gaps.sum(axis=0), kind="stable") if gaps[:, m].any()]
    raise DataError(
        f"{len(lacking):,} of {len(table.ids):,} questions to judge lack an outcome: {'; '.join(listed)}{more}.",
        f"Leave models out (--only MODEL, once for each that stays), or these questions. Outcomes missing of: {', '.join(worst)}",
    )


async def _states(queries: Any, bundle: str, reads: int, out: Path | None, bars: Any) -> Any:
    import tempfile

    from lmgraph import bundles
    from lmgraph.evaluate import masters
    from lmgraph.evaluate.journal import key_of
    from lmgraph.files import base_of, model_file

    using = settings()
    found = bundles.read(bundle)
    base = model_file(base_of(found.vocabulary.base).name, using.cache, None, bars)
    with tempfile.TemporaryDirectory() as scratch:
        keep = (out or Path(scratch)) / f"states-{key_of(found.digest, reads, list(queries))[:12]}.npy"
        return await masters.states_of(base, found.weights, found.vocabulary, queries, reads, using.threads, keep, bars.progress)
