"""The command that mixes two masters: bundle blend.

It reads bundles and examples; what is between two bundles is bundles.py's, temperature and anchors are train/heads.py's.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path

import click

from lmgraph.cli import settings
from lmgraph.cli.training import BASE, DATA, OUT, enough
from lmgraph.errors import UserError


@click.command()
@click.argument("first")
@click.argument("second")
@click.option(
    "--share", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="how far from FIRST (0) to SECOND (1) the weights lie"
)
@DATA
@OUT
@BASE
def blend(first: str, second: str, share: float, files: tuple[Path, ...], out: Path, base: str) -> None:
    """Weights between bundle FIRST and SECOND, which was trained on from it: it forgets less of what FIRST could.

    Both by name or folder, of the same base and nodes. Temperature and anchors are measured anew on --data, as after training.
    """
    from lmgraph import bundles
    from lmgraph.cli.show import Bars
    from lmgraph.files import model_file
    from lmgraph.master import QUERY_LIMIT
    from lmgraph.train import examples as data
    from lmgraph.train import heads

    using = settings()
    one, two = bundles.read(first), bundles.read(second)
    if out.exists():
        raise UserError(f"{out} is there already.", "Name a new folder: --out")
    tensors = bundles.blend(one, two, share)
    training, kept = data.split(data.load(files))
    enough(training, kept)
    out.parent.mkdir(parents=True, exist_ok=True)
    with Bars() as bars, tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made, merged = Path(scratch) / out.name, Path(scratch) / "merged.gguf"
        base_file = model_file(base, using.cache, None, bars)
        bundles.copy(two, made, two.vocabulary, tensors)
        for file in ("card.md", "recipe.json"):  # they tell of SECOND
            (made / file).unlink(missing_ok=True)
        calibration = asyncio.run(heads.finish(made, base_file, merged, training, kept, QUERY_LIMIT, using.threads, bars.progress))
        metrics = {"blend": {"first": one.digest, "second": two.digest, "share": share}, "calibration": calibration}
        (made / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        os.replace(made, out)
    click.echo(json.dumps(metrics))
    click.echo(f"The bundle is in {out}. Use it: master: {{bundle: {out}}} in graph.yaml", err=True)
