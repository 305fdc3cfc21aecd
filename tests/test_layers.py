"""The architecture, held by walking imports: ranks, homes of heavy libraries, purity, size of rooms."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "lmgraph"
ORDER = [  # lowest first; a room imports only from rooms listed before it
    "errors", "types", "graph", "graphread", "graphfile", "graphschema", "tokens", "prompts", "rewrite", "vote", "plan", "quickjson", "settings", "abreast", "patience",
    "assets", "bundles", "adapters", "graphedit", "loopback", "engine", "workers.base", "workers.scripted", "workers.embedded",
    "workers.replicas", "workers.reading", "workers.target", "workers.liveness", "workers.http", "workers.dialects", "workers.inventory", "workers.openai", "workers.survey",
    "store.base", "store.sqlitefile", "store.sqlite", "store.redis", "store.shield", "store",
    "files", "master", "loading", "execute", "voting", "limits", "ahead", "walking", "runtime", "serve.wire", "serve.responses", "serve.schemas", "serve.openapi", "serve.metrics", "serve.tracing", "serve.http", "serve.guard", "serve.memory", "serve.editing", "serve.page", "serve.answer", "serve.app", "serve",
    "train.examples", "train.tasks", "train.tiny", "train.heads", "train.model", "train.loss", "train.plot", "train.tune", "evaluate.statistics", "evaluate.report", "evaluate.pictures", "evaluate.routes", "evaluate.journal", "evaluate.mmludata", "evaluate.asking", "evaluate.mmlu", "evaluate.marks", "evaluate.intents", "evaluate.contestants", "evaluate.listing", "evaluate.masters", "evaluate.compare", "evaluate.planner", "evaluate.plans", "evaluate.taskbench", "evaluate.layouts", "evaluate.outcomes", "evaluate.assign", "evaluate.facts", "evaluate.replay", "evaluate.competence", "evaluate.policies", "evaluate.standings",
    "kubernetes.names", "kubernetes.engines", "kubernetes.values", "kubernetes.reading", "kubernetes.decided", "kubernetes.plan", "kubernetes.pods", "kubernetes.memory", "kubernetes.gateway", "kubernetes.workers", "kubernetes.scaling", "kubernetes.serving", "kubernetes.traffic", "kubernetes.monitoring", "kubernetes.dashboard", "kubernetes.render",
    "simulate.load", "simulate.scenario", "simulate.engine", "simulate.parts", "simulate.figures", "simulate.run", "simulate.draft", "simulate.size", "simulate.advice",
    "cli", "cli.show", "cli.run", "cli.shell", "cli.training", "cli.weights", "cli.assigning", "cli.graphs", "cli.measuring", "cli.comparing", "cli.planning", "cli.replaying",
    "cli.keeping", "cli.serving", "cli.clusters", "cli.sizing",
]
HOMES = {
    "xllamacpp": {"engine"}, "torch": {"train.model", "train.loss", "train.tune"}, "transformers": {"train.model"}, "peft": {"train.tune"},
    "httpx": {"assets"}, "httptools": {"workers.http"}, "orjson": {"quickjson"}, "uvicorn": {"cli.serving"}, "prometheus_client": {"serve.metrics"}, "opentelemetry": {"serve.tracing"}, "gguf": {"bundles", "adapters", "train.tiny", "train.heads"}, "sklearn": {"evaluate.contestants", "evaluate.policies"}, "sentence_transformers": {"evaluate.contestants"}, "semantic_router": {"evaluate.contestants"}, "safetensors": {"bundles", "train.tune"},
    "redis": {"store.redis"}, "sqlite3": {"store.sqlite", "store.sqlitefile"}, "yaml": {"graphfile", "evaluate.outcomes", "kubernetes.render", "simulate.scenario"}, "simpy": {"simulate.engine", "simulate.parts", "simulate.run", "cli.sizing"}, "ruamel": {"graphedit"}, "click": {n for n in ORDER if n.startswith("cli")},
    "rich": {n for n in ORDER if n.startswith("cli")} | {"evaluate.report"}, "matplotlib": {"train.plot", "evaluate.pictures"}, "pyarrow": {"evaluate.mmludata"},
}
PURE = {"errors", "quickjson", "types", "graph", "graphread", "graphfile", "graphschema", "tokens", "prompts", "rewrite", "vote", "plan", "workers.replicas", "workers.reading", "workers.dialects", "serve.wire", "serve.responses", "serve.schemas", "serve.openapi", "evaluate.statistics", "evaluate.assign", "evaluate.facts", "simulate.scenario", "simulate.figures"} | {name for name in ORDER if name.startswith("kubernetes.")}
IMPURE = {"asyncio", "os", "pathlib", "time", "socket", "subprocess", "random", "http", "urllib", "threading"}
LOCAL_IMPORTS = {"graphedit", "engine", "bundles", "adapters", "assets", "store", "serve.tracing", "train.tiny", "train.heads", "train.model", "train.plot", "train.tune", "evaluate.pictures", "evaluate.contestants", "evaluate.masters", "evaluate.mmludata", "evaluate.policies"}
BUDGET = 360


def rooms() -> dict[str, ast.Module]:
    out = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        name = name.removesuffix(".__init__")
        out[name] = ast.parse(path.read_text(encoding="utf-8"))
    return out


ROOMS = rooms()
SKIPPED = {"__init__", "__main__", "workers", "train", "evaluate", "kubernetes", "simulate"}


def imports(tree: ast.Module) -> list[tuple[str, int, bool]]:
    """(module, line, at top level) of every import; `from a import b` counts as a.b too."""
    top = set(map(id, tree.body)) | {id(n) for t in tree.body if isinstance(t, ast.Try) for n in t.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(f"{node.module}.{alias.name}", node.lineno, id(node) in top) for alias in node.names]
    return found


def room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "lmgraph":
        return None
    for size in (3, 2):
        name = ".".join(parts[1:size])
        if name in ORDER:
            return name
    return None


def test_every_room_has_its_place_in_the_order() -> None:
    assert set(ROOMS) - SKIPPED == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_room_imports_only_what_lies_below_it(name: str) -> None:
    for module, line, top in imports(ROOMS[name]):
        other = room_of(module)
        if other and other != name and top:
            assert ORDER.index(other) < ORDER.index(name), f"{name}:{line} imports {other}, which lies above it"
        if other and not name.startswith("cli"):
            assert not other.startswith("cli"), f"{name}:{line} imports the door {other}"


def test_training_does_not_reach_into_serving() -> None:
    for name in ("train.examples", "train.tasks", "train.tiny", "train.model", "train.loss", "train.plot", "train.tune"):
        used = {room_of(m) for m, _, _ in imports(ROOMS[name])}
        assert not used & {"engine", "master", "runtime", "execute"}, name


def test_heavy_libraries_have_one_home() -> None:
    for name, tree in ROOMS.items():
        for module, line, _ in imports(tree):
            library = module.split(".")[0]
            if library in HOMES:
                assert name in HOMES[library], f"{name}:{line} imports {library}; its homes: {sorted(HOMES[library])}"


@pytest.mark.parametrize("name", sorted(PURE))
def test_a_pure_room_does_no_io_and_never_waits(name: str) -> None:
    for module, line, _ in imports(ROOMS[name]):
        assert module.split(".")[0] not in IMPURE or module.startswith("urllib.parse"), f"{name}:{line} imports {module}"
    assert not [n for n in ast.walk(ROOMS[name]) if isinstance(n, (ast.Await, ast.AsyncFunctionDef))]
    assert not [n for n in ast.walk(ROOMS[name]) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in ("open", "print")]


def test_imports_inside_functions_are_only_where_they_are_meant() -> None:
    for name, tree in ROOMS.items():
        if name.startswith("cli") or name in LOCAL_IMPORTS:
            continue
        inside = [(m, line) for m, line, top in imports(tree) if not top]
        assert not inside, f"{name}: {inside}"


@pytest.mark.parametrize("name", ORDER)
def test_a_room_says_what_it_knows_and_stays_one_room(name: str) -> None:
    assert ast.get_docstring(ROOMS[name]), name
    path = SOURCE / (name.replace(".", "/") + ".py")
    path = path if path.exists() else SOURCE / name.replace(".", "/") / "__init__.py"
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= BUDGET, f"{name} has {lines} lines: it is two rooms"


def test_public_functions_and_classes_have_docstrings() -> None:
    missing = [f"{name}:{node.name}" for name in ORDER for node in ROOMS[name].body
               if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not missing
