"""graph.yaml: text -> Graph with every problem named by its line, and Graph -> text.

Pure: text in, text out. It knows YAML and its lines; what may stand in a graph is graphread.py's, what a graph must be as a whole is
graph.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import yaml

from lmgraph.errors import GraphError
from lmgraph.graph import VERSION, AnswerSpec, Graph, check
from lmgraph.graphread import Reader


def to_dict(graph: Graph) -> dict[str, Any]:
    """Plain data in the file's form; defaults are left out."""
    master = _without_defaults(graph.master)
    nodes = {}
    for name, node in graph.nodes.items():
        row = _without_defaults(node, skip=("name", "worker", "answer"))
        row["token"] = node.token
        row["worker"] = {"kind": node.worker.kind, **_without_defaults(node.worker, skip=("kind",))}
        if node.answer is not None:
            row["answer"] = _answer(node.answer)
        nodes[name] = row
    return {
        "version": VERSION,
        "master": master or {"bundle": "mmlu"},
        **({"answer": _answer(graph.answer)} if graph.answer != AnswerSpec() else {}),
        "nodes": nodes,
        "edges": {name: list(targets) for name, targets in graph.edges.items()},
    }


def _answer(spec: AnswerSpec) -> dict[str, Any]:
    return {"mode": spec.mode, **_without_defaults(spec, skip=("mode",))}


def _without_defaults(value: Any, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    default = type(value).__dataclass_fields__
    out: dict[str, Any] = {}
    for name, spec in default.items():
        current = getattr(value, name)
        factory = spec.default_factory
        unset = factory() if callable(factory) else spec.default
        if name in skip or current == unset:
            continue
        out[name] = list(current) if isinstance(current, tuple) else dict(current) if isinstance(current, Mapping) else current
    return out


class _Dumper(yaml.SafeDumper):
    """Safe YAML that writes rare line breaks as escapes: outside double quotes PyYAML reads them back as blanks."""


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    style = '"' if any(mark in value for mark in "\r\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)


_Dumper.add_representer(str, _text)


def dumps(graph: Graph) -> str:
    """The YAML text of a graph; `loads(dumps(g)) == g`."""
    return dump(to_dict(graph))


def dump(data: Any) -> str:
    """Plain data in the form of graph.yaml as its text."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice and unfolds no merge keys (`<<`), which can grow without limit."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave `<<` as it is: no constructor knows it, so it is refused."""


def _unique_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (str, int)) and key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is written twice", key_node.start_mark)
        if isinstance(key, (str, int)):
            seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _ordinary_integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    value: int = loader.construct_yaml_int(node)
    if abs(value) >= 2**63:  # Python refuses to print a number of thousands of digits: no message could name it
        raise yaml.constructor.ConstructorError(None, None, "this whole number is too large", node.start_mark)
    return value


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _ordinary_integer)


class _Lines:
    """Line numbers of a YAML text by path, for messages."""

    def __init__(self, text: str) -> None:
        self._lines: dict[tuple[str, ...], int] = {}
        self._seen: set[yaml.Node] = set()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            self._walk(root, (), 0)

    def _walk(self, node: yaml.Node, path: tuple[str, ...], depth: int) -> None:
        self._lines.setdefault(path, node.start_mark.line + 1)
        if depth > 20 or node in self._seen:  # an alias is not walked again: aliases of aliases grow without limit
            return
        self._seen.add(node)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*path, str(key.value))
                self._lines[here] = key.start_mark.line + 1
                self._walk(value, here, depth + 1)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                self._walk(value, (*path, str(i)), depth + 1)

    def at(self, path: tuple[str, ...]) -> str:
        while path and path not in self._lines:
            path = path[:-1]
        return f"line {self._lines[path]}: " if path in self._lines else ""


def loads(text: str, name: str = "graph.yaml") -> Graph:
    """Read a graph. Raises GraphError with *every* problem found, each with its line."""
    data, at = parse(text, name)
    return _checked(data, at, name)


def parse(text: str, name: str) -> tuple[Any, Callable[[tuple[str, ...]], str]]:
    """(plain data of a YAML text, what names the line of a path in it). Raises GraphError where it is no YAML, or one that we refuse."""
    try:
        if len(text) > 4_000_000:
            raise GraphError(f"{name} is too large.")
        data = yaml.load(text, Loader=_Loader)
        lines = _Lines(text)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        # PyYAML lets the last five through for a value that does not suit its tag, such as `!!int ""` or `!!bool maybe`.
        where = getattr(error, "problem_mark", None)
        line = f"line {where.line + 1}: " if where else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise GraphError(
            f"{name} cannot be read as YAML: {line}{problem}", "See an example: lmgraph graph init --help", (f"{line}{problem}",)
        ) from error
    return data, lines.at


def of_dict(data: Any, name: str = "the graph") -> Graph:
    """The graph of plain data in the file's form (`to_dict` reversed). Raises GraphError with every problem."""
    return _checked(data, _Lines("").at, name)


def _checked(data: Any, at: Callable[[tuple[str, ...]], str], name: str) -> Graph:
    reader = Reader(at)
    graph = reader.graph(data)
    problems = reader.problems or (check(graph, at) if graph else [])
    if problems or graph is None:
        listed = "\n".join(f"  - {p}" for p in problems)
        raise GraphError(
            f"{name} has {len(problems)} problem{'s' if len(problems) != 1 else ''}:\n{listed}",
            "Mend them and run: lmgraph graph check",
            tuple(problems),
        )
    return graph
