"""Commands that bring a graph to a cluster: manifests out of graph.yaml and values.yaml. Nothing here needs a cluster or a network.

It reads files and writes a folder; what becomes of a graph is kubernetes/'s.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmgraph.assets import ELSEWHERE
from lmgraph.cli import Lazy, settings
from lmgraph.cli.run import JSON
from lmgraph.errors import AssetError, DataError, UserError

if TYPE_CHECKING:
    from lmgraph.kubernetes.values import Values

TABLE = {
    "render": ("clusters", "Render a graph to plain manifests."),
    "values": ("clusters", "Print values.yaml with every default and what it means."),
    "size": ("sizing", "How many gateways, masters and workers a rate needs, and what it costs."),
    "simulate": ("sizing", "Play a scenario through: waiting times, failures, replicas, cost."),
}


@click.group(cls=Lazy, table=TABLE)
def kubernetes() -> None:
    """From a graph to a cluster: its manifests, how many of everything, a simulation."""


@click.command()
def values() -> None:
    """Print values.yaml with every default and what it means."""
    click.echo(defaults(), nl=False)


@click.command()
@click.argument("path", metavar="[GRAPH]", type=click.Path(path_type=Path), required=False)
@click.option("--values", "-f", "given", type=click.Path(path_type=Path), help="what differs from: lmgraph kubernetes values")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="write a folder with a kustomization (default: to stdout)")
@JSON
def render(path: Path | None, given: Path | None, out: Path | None, as_json: bool) -> None:
    """Render GRAPH (default: ./graph.yaml, else the built-in graph) to plain manifests.

    The same graph runs on a laptop: an embedded model becomes a llama.cpp server that all its nodes share, a server elsewhere stays where
    it is, and values say what else there is. Objects go to stdout as YAML (--json: as one List), or into a folder for kubectl apply -k.
    """
    from lmgraph.bundles import builtin
    from lmgraph.files import read_graph
    from lmgraph.kubernetes import decided, plan, reading, serving
    from lmgraph.kubernetes import render as rendering

    if out and as_json:
        raise UserError("--json writes to stdout, and --out a folder of YAML.", "Leave one of them out.")
    graph, beside = read_graph(path or settings().graph)
    draft = reading.read(_text(given) if given else "", given.name if given else "values.yaml")
    known = decided.Known(frozenset(builtin()), bases(draft.values, beside), masters(graph.master.bundle, beside))
    planned = plan.make(graph, draft, known)
    made = rendering.files(planned)
    if out:
        written = rendering.folder(made)
        write(out, written, rendering.MARK)
        click.echo(f"Wrote {len(written)} files to {out}. Look: kubectl kustomize {out}    Apply: kubectl apply -k {out}", err=True)
    else:
        click.echo(rendering.listed(made) if as_json else rendering.stream(made), nl=False)
    namespace = draft.values.namespace
    needed = ", ".join(f"{secret} ({', '.join(sorted(keys))})" for secret, keys in sorted(secrets(list(made.values())).items()))
    click.echo(f"Needed in the namespace {namespace} beforehand: " + (f"the Secrets {needed}." if needed else "nothing."), err=True)
    if features := sorted({feature for worker in planned.workers for feature in serving.features(draft.values, worker)}):
        click.echo(f"Needed in Knative's ConfigMap config-features, enabled: {', '.join(features)}.", err=True)


def defaults() -> str:
    """The text of values.yaml with all defaults."""
    return (resources.files("lmgraph") / "data" / "values.yaml").read_text(encoding="utf-8")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.", "Start with: lmgraph kubernetes values > values.yaml") from error


def masters(bundle: str, beside: Path | None) -> dict[str, tuple[str, ...]]:
    """A bundle -> names of the files that are made of it: its merged weights, and its adapter for walks."""
    from lmgraph import adapters, bundles

    if bundle.endswith(".gguf"):
        return {}
    found = bundles.read(bundle, beside)
    walk = adapters.walk_path(found, Path())
    return {bundle: (bundles.merged_path(found, Path()).name, *([walk.name] if walk else []))}


def bases(values: Values, beside: Path | None) -> dict[str, str]:
    """Adapter's path as values name it -> the base that it says it was trained on (PEFT's adapter_config.json), of those that lie here."""
    found = {}
    for adapter in (adapter for worker in values.workers.values() for adapter in worker.adapters.values()):
        config = (beside or Path()) / adapter.path / "adapter_config.json"
        if adapter.path.startswith("./") and config.is_file():
            try:
                found[adapter.path] = str(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{config} says no base_model_name_or_path ({error!r:.100}).", "Is it an adapter that PEFT wrote?"
                ) from error
    return found


def secrets(found: Any) -> dict[str, set[str]]:
    """Secret -> its keys, wherever objects refer to one."""
    out: dict[str, set[str]] = {}
    for reference in _references(found):
        out.setdefault(reference["name"], set()).add(reference["key"])
    return out


def _references(found: Any) -> Iterator[Mapping[str, str]]:
    for key, value in found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ():
        if key in ("secretKeyRef", "credentials"):
            yield value
        else:
            yield from _references(value)


def write(folder: Path, texts: Mapping[str, str], mark: str) -> None:
    """Make a folder of these files, or put it in the place of one that was made like this: whole, or not at all.

    Raises UserError where the folder holds anything that does not begin with `mark`, AssetError where it cannot be written.
    """
    if folder.exists():
        foreign = sorted(file.name for file in folder.iterdir() if not _ours(file, mark))
        if foreign:
            raise UserError(
                f"{folder} holds what was not rendered: {', '.join(foreign[:5])}.",
                "Choose another folder, and keep changes of your own in an overlay that names this one (kubectl kustomize).",
            )
    target = folder.resolve()
    new, old = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
        for name, content in texts.items():
            (new / name).write_text(content, encoding="utf-8")
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
    except OSError as error:
        raise AssetError(f"{folder} cannot be written: {error.strerror or error}.", ELSEWHERE) from error
    finally:
        with suppress(OSError):
            if old.exists() and not target.exists():  # stopped between the two: as it was
                os.replace(old, target)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def _ours(file: Path, mark: str) -> bool:
    try:
        return file.is_file() and file.read_text(encoding="utf-8").startswith(mark)
    except (OSError, UnicodeDecodeError):
        return False
