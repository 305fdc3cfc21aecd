"""Commands that replay recorded answers: evaluate outcomes."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import click

from lmgraph.cli import settings
from lmgraph.cli.measuring import give, typed
from lmgraph.cli.run import JSON
from lmgraph.errors import DataError


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--models", "known", type=click.Path(path_type=Path), help="their parameters and costs  [default: models.json beside TABLE]")
@click.option("--only", multiple=True, metavar="MODEL", help="only these models (repeat)")
@click.option("--max-billions", type=float, help="only models of at most so many billion parameters")
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
@click.option("--reads", type=click.IntRange(8), default=96, show_default=True, help="tokens of a question that the master reads")
@click.option("--out", type=click.Path(path_type=Path), help="folder for the report, and for what the master read; the next run finds it")
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

    TABLE holds who was right (and with which letter) on which question: MMLU-Pro's, RouterBench's or your own (docs/outcomes.md).
    """
    import numpy as np

    from lmgraph.cli.show import Bars
    from lmgraph.evaluate import outcomes as recorded
    from lmgraph.evaluate import policies, replay

    found = _chosen(recorded.load(table, known), only, max_billions)
    training = len(found.ids)
    if test:
        found = recorded.joined(found, _chosen(recorded.load(test, known), [m.name for m in found.models], None))
        splits = [(np.arange(training), np.arange(training, len(found.ids)))]
    else:
        splits = replay.folds(training, parts, seed)
    with Bars() as bars:
        states = asyncio.run(_states(found.queries, bundle, reads, out, bars)) if any(found.queries) else None
        view = replay.view_of(found, states)
        plays = {}
        for policy in policies.usual(sorted(set(sizes)), sure, learnt=found.letters is not None):
            plays[policy.name] = replay.replay(policy, found, view, splits, partial(bars.progress, policy.name))
    metrics = replay.measure(found, plays, policies.Best.name, found.categories)
    give(replay.report(metrics, f"Recorded outcomes: {table.name}", typed()), out, as_json)


def _chosen(table: Any, only: Any, most: float | None) -> Any:
    names = list(only) or [model.name for model in table.models]
    if most is not None:
        sizes = {model.name: model.billions for model in table.models}
        names = [name for name in names if (size := sizes.get(name)) is not None and size <= most]
        if not names:
            smallest = min((size for size in sizes.values() if size is not None), default=None)
            raise DataError(f"No model has at most {most:g} billion parameters.", f"The smallest has {smallest}; sizes come from --models.")
    return table.select(names)


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
