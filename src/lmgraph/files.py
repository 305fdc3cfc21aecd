"""Where a graph and its models are found: graph.yaml, the built-in graph, GGUF files, merged masters, the base of a bundle.

It knows names, folders and the profile, and shows long work (fetching, merging) to a watcher. It loads no model and asks none.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Protocol

from lmgraph import adapters, assets, bundles, graphfile
from lmgraph.errors import AssetError, GraphError
from lmgraph.graph import START, Graph
from lmgraph.tokens import Vocabulary

TINY = "smollm2-135m"


class Watcher(Protocol):
    """How long work is shown: a door draws bars, a test ignores them."""

    def progress(self, task: str, done: int, total: int) -> None:
        """`done` of `total` of a named piece of work."""
        ...

    def say(self, text: str) -> None:
        """One line worth knowing."""
        ...


class Quiet:
    """A watcher that shows nothing."""

    def progress(self, task: str, done: int, total: int) -> None: ...

    def say(self, text: str) -> None: ...


def builtin_graph() -> str:
    """The text of the built-in graph `mmlu`."""
    return (resources.files("lmgraph") / "data" / "mmlu.yaml").read_text(encoding="utf-8")


def graph_file(path: Path | None) -> Path | None:
    """The file of the graph: the one given, ./graph.yaml when there is one, None for the built-in graph."""
    return path or (Path("graph.yaml") if Path("graph.yaml").is_file() else None)


def read_graph(path: Path | None) -> tuple[Graph, Path | None]:
    """(graph, folder it lies in): the file when given, ./graph.yaml when there is one, else the built-in graph."""
    path = graph_file(path)
    if path is None:
        return graphfile.loads(builtin_graph(), "the built-in graph"), None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GraphError(f"{path} cannot be read: {error}.", f"Make one: lmgraph graph init {path}") from error
    return graphfile.loads(text, str(path)), path.parent


def with_profile(given: Graph, profile: str) -> Graph:
    """The graph as it runs under a profile: `tiny` puts SmolLM2-135M in place of every catalogue model."""
    if profile != "tiny":
        return given
    nodes = {
        name: replace(node, worker=replace(node.worker, model=TINY))
        if node.worker.kind == "embedded" and node.worker.model in assets.CATALOGUE
        else node
        for name, node in given.nodes.items()
    }
    return replace(given, nodes=nodes)


def model_file(model: str, cache: Path, beside: Path | None, watcher: Watcher) -> Path:
    """The GGUF of a catalogue name (fetched when missing) or of a path (relative ones: beside the graph)."""
    if model in assets.CATALOGUE:
        asset = assets.CATALOGUE[model]
        return assets.fetch(asset, cache, lambda done, total: watcher.progress(f"fetching {asset.name}", done, total), watcher.say)
    path = Path(model).expanduser()
    path = path if path.is_absolute() or beside is None else beside / path
    if not path.is_file():
        raise AssetError(
            f"Model {model!r} is neither in the catalogue nor a file.", f"Valid: {', '.join(assets.CATALOGUE)}, or a GGUF file."
        )
    return path


def base_of(vocabulary_base: str) -> assets.Asset:
    """The catalogue's asset with this sha256. Raises AssetError."""
    for asset in assets.CATALOGUE.values():
        if asset.sha256 == vocabulary_base:
            return asset
    raise AssetError(
        f"No base weights with sha256 {vocabulary_base[:16]}... in the catalogue.",
        "Use a bundle trained on a catalogue model, or a merged GGUF.",
    )


def master_file(name: str, cache: Path, beside: Path | None, watcher: Watcher) -> tuple[Path, Vocabulary]:
    """(GGUF, vocabulary) of a master: a .gguf file as it is, or a bundle merged into its base on first use."""
    if name.endswith(".gguf"):
        path = model_file(name, cache, beside, watcher)
        return path, bundles.vocabulary_of(path)
    bundle = bundles.read(name, beside)
    target = bundles.merged_path(bundle, cache)
    if not target.is_file():
        base = model_file(base_of(bundle.vocabulary.base).name, cache, beside, watcher)
        bundles.ready(bundle, base, cache, lambda done, total: watcher.progress(f"merging master {bundle.name}", done, total))
    adapters.ready(bundle, target, cache)
    return target, bundle.vocabulary


def adapter_files(given: Graph, beside: Path | None, cache: Path) -> dict[str, Path]:
    """Node (or START) -> what the master puts on there: a node's own adapter (relative ones: beside the graph), else its bundle's.

    Nodes' own are checked; the bundle's lies there after `master_file`. Raises AdapterError, VocabularyMismatch.
    """
    named = {name: Path(node.adapter).expanduser() for name, node in given.nodes.items() if node.adapter}
    bundle = None if given.master.bundle.endswith(".gguf") else bundles.read(given.master.bundle, beside)
    own = {name: path if path.is_absolute() or beside is None else beside / path for name, path in named.items()}
    for name, path in own.items() if not given.master.server else ():  # what a server has is seen when it is asked
        adapters.check(path, bundle.digest if bundle else "", name)
    walk = adapters.walk_path(bundle, cache) if bundle else None
    return {**(dict.fromkeys((START, *given.nodes), walk) if walk else {}), **own}
