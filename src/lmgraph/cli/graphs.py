"""Commands about graph.yaml. Edits keep comments and order, and are checked as a whole before anything is written."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lmgraph import graphedit, graphfile, graphschema
from lmgraph.assets import atomic
from lmgraph.cli import settings
from lmgraph.cli.assigning import assign
from lmgraph.cli.run import GRAPH, JSON
from lmgraph.errors import GraphError, LmgraphError, UserError
from lmgraph.graph import DIALECTS, END, START, WALKS, Graph, notes

EDITED = click.option(
    "--graph",
    "-g",
    "path",
    type=click.Path(path_type=Path),
    help="graph.yaml to change (default: ./graph.yaml)",
    callback=lambda context, option, value: value or settings().graph or Path("graph.yaml"),
)


@click.group()
def graph() -> None:
    """Make, look at, check and edit graph.yaml."""


graph.add_command(assign)


@graph.command()
@click.argument("file", type=click.Path(path_type=Path), default=Path("graph.yaml"))
@click.option("--force", is_flag=True, help="write over a file that is there")
def init(file: Path, force: bool) -> None:
    """Write the built-in graph of 17 experts to FILE (default graph.yaml) as a start of your own, and a schema for editors beside it."""
    from lmgraph.files import builtin_graph

    if file.exists() and not force:
        raise UserError(f"{file} exists.", "Use another name, or --force to write over it.")
    _write(file, "# yaml-language-server: $schema=graph.schema.json\n" + builtin_graph())
    _write(file.with_name("graph.schema.json"), json.dumps(graphschema.schema(), indent=2) + "\n")
    click.echo(f"Wrote {file} and graph.schema.json. Look at it: lmgraph graph show --graph {file}")


@graph.command()
def schema() -> None:
    """Print the JSON Schema of graph.yaml."""
    click.echo(json.dumps(graphschema.schema(), indent=2))


@graph.command()
@GRAPH
@click.option("--svg", type=click.Path(path_type=Path, dir_okay=False), help="write a picture to this file instead")
@JSON
def show(path: Path | None, svg: Path | None, as_json: bool) -> None:
    """Draw the graph: nodes, functional tokens, workers, edges."""
    from rich.console import Console

    from lmgraph.cli.show import graph_svg, graph_tree
    from lmgraph.files import read_graph

    given, _ = read_graph(path or settings().graph)
    if as_json:
        print(json.dumps(graphfile.to_dict(given), ensure_ascii=False))
    elif svg:
        _write(svg, graph_svg(given))
        click.echo(f"Wrote {svg}.")
    else:
        Console().print(graph_tree(given))


@graph.command()
@GRAPH
@click.option(
    "--live",
    is_flag=True,
    help="also look at servers (the master's, and of nodes that name a dialect): are base and adapter there?",
)
@JSON
def check(path: Path | None, live: bool, as_json: bool) -> None:
    """Check the graph as a whole, and whether its master knows every node. Every problem is reported at once.

    With --live, a server that is not up yet is a note, not a problem.
    """
    from lmgraph import bundles
    from lmgraph.files import Quiet, adapter_files, model_file, read_graph
    from lmgraph.master import fits
    from lmgraph.workers.survey import survey

    seen: list[str] = []
    try:
        given, folder = read_graph(path or settings().graph)
        name = given.master.bundle
        if name.endswith(".gguf"):
            fits(given, bundles.vocabulary_of(model_file(name, settings().cache, folder, Quiet())))
        else:
            fits(given, bundles.read(name, folder).vocabulary)
        adapter_files(given, folder, settings().cache)
        if live:
            found = asyncio.run(survey(given))
            if given.master.server:
                asyncio.run(_look_at_master(given, folder))
            seen = [f"node {one.node}: {one.note}" for one in found if one.note]
            problems = tuple(f"node {one.node}: {one.problem}" for one in found if one.problem)
            if problems:
                listed = "\n".join(f"  - {problem}" for problem in problems)
                raise GraphError(f"{len(problems)} of {len(found)} servers do not have what the graph names:\n{listed}", problems=problems)
            if not found and not given.master.server:
                seen = ["no node names a dialect: there is no server to look at"]
    except LmgraphError as error:
        if as_json:
            print(json.dumps({"ok": False, "problems": list(getattr(error, "problems", ())) or [error.message]}))
            raise click.exceptions.Exit(2 if isinstance(error, UserError) else 1) from error
        raise
    if as_json:
        print(json.dumps({"ok": True, "problems": [], "notes": [*notes(given), *seen], "nodes": len(given.nodes)}))
    else:
        for note in (*notes(given), *seen):
            click.echo(f"note: {note}")
        click.echo(f"{len(given.nodes)} nodes, {sum(len(given.neighbours(n)) for n in (START, *given.nodes))} edges: nothing wrong.")


async def _look_at_master(given: Graph, folder: Path | None) -> None:
    """Raise what is wrong with the master's server."""
    from lmgraph.files import Quiet
    from lmgraph.runtime import Runtime

    async with Runtime(given, settings(), folder, Quiet()) as runtime:
        await runtime.master()


@graph.command()
@click.argument("name")
@click.option("--description", required=True, help="what this expert knows, in a sentence")
@click.option("--token", type=click.IntRange(0), help="functional token (default: the next one that is free)")
@click.option("--model", default="qwen2.5-coder-1.5b", show_default=True, help="catalogue name, GGUF file, or the model's name on a server")
@click.option("--url", "urls", multiple=True, help="base URL of an OpenAI-compatible server (repeat for replicas)")
@click.option("--key-env", default="", help="environment variable that holds the server's key")
@click.option("--dialect", type=click.Choice(DIALECTS), help="which server it is, where it puts adapters on its base")
@click.option("--adapter", default="", help="the adapter that the server puts on --model for this node")
@click.option("--system", default="", help="system prompt")
@click.option(
    "--examples",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="JSON Lines with `query`: fit this node's row from them (20 or more), so that the master knows it at once",
)
@EDITED
def add(
    name: str,
    description: str,
    token: int | None,
    model: str,
    urls: tuple[str, ...],
    key_env: str,
    dialect: str | None,
    adapter: str,
    system: str,
    examples: Path | None,
    path: Path,
) -> None:
    """Add node NAME; with --examples the master learns it in seconds, without retraining."""
    from lmgraph import bundles
    from lmgraph.files import read_graph

    given, folder = read_graph(path)
    if name in given.nodes:
        raise UserError(f"There is a node {name!r} already.")
    if token is None:
        used = {n.token for n in given.nodes.values()}
        if not given.master.bundle.endswith(".gguf"):
            vocabulary = bundles.read(given.master.bundle, folder).vocabulary
            token = vocabulary.nodes.get(name, None) if vocabulary.nodes.get(name) not in used else None
            used |= set(vocabulary.nodes.values())
        token = token if token is not None else next(i for i in range(100_000) if i not in used)
    worker: dict[str, Any] = {"kind": "openai", "urls": list(urls), "model": model} if urls else {"kind": "embedded", "model": model}
    worker.update({k: v for k, v in (("key_env", key_env), ("dialect", dialect), ("adapter", adapter), ("system", system)) if v})
    node = {"token": token, "description": description, "worker": worker}

    def change(data: Any) -> None:
        data["nodes"][name] = node
        start = data["edges"].setdefault(START, [])
        if "*" not in start:
            start.append(name)
        if given.answer.mode in WALKS:
            data["edges"][name] = ["*", END]

    if examples:
        from lmgraph.cli.training import fit_node

        graphedit.changed(path, change)  # checked before any work starts
        made = asyncio.run(fit_node(path, name, token, examples, None))

        def change_both(data: Any) -> None:
            change(data)
            data.setdefault("master", {})["bundle"] = made

        _edit(path, change_both)
        click.echo(f'Added {name} (token {token}); its row is in {made}. Try it: lmgraph route --graph {path} "..."')
    else:
        _edit(path, change)
        click.echo(f"Added {name} (token {token}). Teach the master: lmgraph train heads --graph {path} --node {name} --examples FILE")


@graph.command()
@click.argument("name")
@EDITED
def remove(name: str, path: Path) -> None:
    """Remove node NAME and its edges. Its functional token is not given to anybody else by itself."""

    _edit(path, lambda data: graphedit.remove(data, name))
    click.echo(f"Removed {name}.")


@graph.command()
@click.argument("source")
@click.argument("targets", nargs=-1, required=True)
@EDITED
def connect(source: str, targets: tuple[str, ...], path: Path) -> None:
    """Add edges SOURCE -> TARGETS (a node's name, end, or * for every node)."""

    def change(data: Any) -> None:
        row = data["edges"].setdefault(source, [])
        for target in targets:
            if target not in row:
                row.append(target)

    _edit(path, change)
    click.echo(f"{source} -> {', '.join(targets)}")


@graph.command()
@click.argument("source")
@click.argument("targets", nargs=-1, required=True)
@EDITED
def disconnect(source: str, targets: tuple[str, ...], path: Path) -> None:
    """Remove edges SOURCE -> TARGETS."""

    def change(data: Any) -> None:
        row = data["edges"].get(source) or []
        for target in targets:
            if target in row:
                row.remove(target)
            elif "*" in row and target in data["nodes"]:
                row[:] = [n for n in data["nodes"] if n != target and n != source] + ([END] if END in row else [])
            else:
                raise UserError(f"There is no edge {source} -> {target}.", f"Edges of {source}: {', '.join(row) or 'none'}")
        if not row:
            data["edges"].pop(source, None)

    _edit(path, change)
    click.echo(f"{source} -/-> {', '.join(targets)}")


def _edit(path: Path, change: Callable[[Any], None]) -> None:
    _write(path, graphedit.changed(path, change))


def _write(path: Path, text: str) -> None:
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")
