"""Commands about weights: pull, bundle."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import click

from lmgraph import assets
from lmgraph.cli import settings
from lmgraph.cli.run import GRAPH, JSON, PROFILE
from lmgraph.cli.training import OUT
from lmgraph.errors import AssetError, UserError


@click.command()
@click.argument("names", nargs=-1)
@GRAPH
@PROFILE
@click.option("--verify", is_flag=True, help="read every byte of the files that are there, and fetch damaged ones again")
@click.option("--accept-licence", "accepting", is_flag=True, help="accept the licence of each of NAMES that asks for it")
@click.option("--bundle", "only", metavar="NAME", help="only the master of this bundle (built-in, or a folder), merged")
def pull(names: tuple[str, ...], path: Path | None, profile: str | None, verify: bool, accepting: bool, only: str | None) -> None:
    """Fetch weights now: NAMES from the catalogue, or what the graph needs. Interrupted fetches go on where they stopped."""
    from lmgraph import files
    from lmgraph.cli.show import Bars, console

    using = settings(profile=profile)
    if only and names:
        raise UserError(f"--bundle fetches a master alone, and {', '.join(names)} was asked for too.", "Leave one of them out.")
    unknown = [name for name in names if name not in assets.CATALOGUE]
    if unknown:
        raise AssetError(f"Not in the catalogue: {', '.join(unknown)}.", f"Valid: {', '.join(assets.CATALOGUE)}")
    given, folder = files.read_graph(path or using.graph)
    given = files.with_profile(given, using.profile)
    wanted = (
        list(names)
        if names or only
        else sorted({n.worker.model for n in given.nodes.values() if n.worker.kind == "embedded" and n.worker.model in assets.CATALOGUE})
    )
    with Bars() as bars:
        for name in wanted:
            asset = assets.CATALOGUE[name]
            if accepting and name in names and asset.terms:
                assets.accept(asset, using.cache)
            if verify and assets.locate(asset, using.cache) and not assets.verify(asset, using.cache):
                bars.say(f"{asset.file} is damaged; fetching it again")
                (using.cache / "weights" / asset.file).unlink()
            found = files.model_file(name, using.cache, folder, bars)
            console.print(f"{name}: {found} ({asset.size / 1e6:,.0f} MB, {asset.licence})", markup=False, soft_wrap=True)
        if only or not (names or given.master.server):
            name = only or given.master.bundle
            master, _ = files.master_file(name, using.cache, None if only else folder, bars)
            console.print(f"master {name}: {master}", markup=False, soft_wrap=True)


@click.group()
def bundle() -> None:
    """Look at master bundles and join them: a bundle is a trained master without its base weights."""


@bundle.command("list")
@JSON
def list_(as_json: bool) -> None:
    """The bundles inside the package."""
    from lmgraph import bundles

    rows = [bundles.read(name) for name in bundles.builtin()]
    if as_json:
        print(json.dumps([{"name": b.name, "nodes": list(b.vocabulary.nodes), "metrics": dict(b.metrics)} for b in rows]))
        return
    for row in rows:
        size = sum(f.stat().st_size for f in row.folder.iterdir()) / 1e6
        click.echo(f"{row.name}: {len(row.vocabulary.nodes)} nodes of {row.vocabulary.size} tokens, {size:.1f} MB")


@bundle.command("show")
@click.argument("name")
@JSON
def show_bundle(name: str, as_json: bool) -> None:
    """The card of bundle NAME (built-in, or a folder): data, recipe, measured accuracy, nodes and their tokens."""
    from lmgraph import bundles

    found = bundles.read(name)
    if as_json:
        print(
            json.dumps(
                {
                    "name": found.name,
                    "vocabulary": {**found.vocabulary.to_json(), "digest": found.vocabulary.digest},
                    "digest": found.digest,
                    "metrics": dict(found.metrics),
                }
            )
        )
        return
    card = found.folder / "card.md"
    if card.exists():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(card.read_text(encoding="utf-8")))
    for node, token in found.vocabulary.nodes.items():
        click.echo(f"{found.vocabulary.name(token):10} {node}")
    click.echo(f"spare functional tokens: {found.vocabulary.size - len(found.vocabulary.nodes)}; digest {found.digest[:16]}")


@bundle.command()
@click.argument("first")
@click.argument("second")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True, help="of the adapter; a larger one holds more of SECOND")
@OUT
@JSON
def walk(first: str, second: str, rank: int, out: Path, as_json: bool) -> None:
    """Bundle FIRST, which puts on SECOND for walks: the one goes on choosing one expert, the other leads tasks that need several.

    Both by name or folder, of the same base and nodes: SECOND was trained on from FIRST with --tasks. What is between them becomes an
    adapter, put on by the engine that FIRST runs in. An ask that may become a walk costs one pass of SECOND before that of FIRST.
    """
    from lmgraph import adapters, bundles

    one, two = bundles.read(first), bundles.read(second)
    if out.exists():
        raise UserError(f"{out} is there already.", "Name a new folder: --out")
    tensors, held = adapters.between(one, two, rank)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made = bundles.copy(one, Path(scratch) / out.name, one.vocabulary, bundles.read_tensors(one.weights))
        bundles.write_tensors(tensors, made.walk)
        size = made.walk.stat().st_size
        os.replace(made.folder, out)
    if as_json:
        click.echo(json.dumps({"bundle": str(out), "rank": rank, "held": round(held, 4), "bytes": size}))
        return
    click.echo(f"{out}: {first}, along a walk {second} (rank {rank}, {held:.1%} of the least layer's difference, {size / 1e6:,.1f} MB)")
    click.echo(f"Use it: master: {{bundle: {out}}} in graph.yaml", err=True)
