"""graph.yaml: text -> Graph with every problem named by its line, and Graph -> text.

Pure: text in, text out. It knows the form of the file; what a graph must be as a whole is graph.py's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml

from lmgraph.errors import GraphError
from lmgraph.graph import (
    END,
    KINDS,
    MODALITIES,
    MODES,
    REWRITE,
    START,
    VERSION,
    VOTERS,
    AnswerSpec,
    Graph,
    MasterSpec,
    Node,
    WorkerSpec,
    check,
)


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
    return yaml.dump(to_dict(graph), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


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
    try:
        if len(text) > 4_000_000:
            raise GraphError(f"{name} is too large to be a graph.")
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
    return _checked(data, lines, name)


def of_dict(data: Any, name: str = "the graph") -> Graph:
    """The graph of plain data in the file's form (`to_dict` reversed). Raises GraphError with every problem."""
    return _checked(data, _Lines(""), name)


def _checked(data: Any, lines: _Lines, name: str) -> Graph:
    reader = _Reader(lines)
    graph = reader.graph(data)
    problems = reader.problems or (check(graph, lines.at) if graph else [])
    if problems or graph is None:
        listed = "\n".join(f"  - {p}" for p in problems)
        raise GraphError(
            f"{name} has {len(problems)} problem{'s' if len(problems) != 1 else ''}:\n{listed}",
            "Mend them and run: lmgraph graph check",
            tuple(problems),
        )
    return graph


class _Reader:
    """Data -> Graph, gathering problems instead of stopping at the first."""

    def __init__(self, lines: _Lines) -> None:
        self.lines = lines
        self.problems: list[str] = []

    def say(self, path: tuple[str, ...], text: str) -> None:
        self.problems.append(self.lines.at(path) + (".".join(path) + ": " if path else "") + text)

    def take(self, data: Any, path: tuple[str, ...], fields: Mapping[str, tuple[Any, ...]], required: tuple[str, ...]) -> dict[str, Any]:
        """Known keys of the right types out of a mapping; everything else is a problem."""
        if not isinstance(data, dict):
            self.say(path, f"found {_kind(data)}, expected a mapping with {', '.join(fields)}")
            return {}
        out: dict[str, Any] = {}
        for key, value in data.items():
            if key not in fields:
                self.say((*path, str(key)), f"unknown key; valid: {', '.join(fields)}")
            elif (isinstance(value, bool) and bool not in fields[key]) or not isinstance(value, fields[key]):
                self.say((*path, str(key)), f"found {_kind(value)}, expected {' or '.join(_NAMES[t] for t in fields[key])}")
            elif isinstance(value, float) and not math.isfinite(value):
                self.say((*path, str(key)), f"found {value}, expected a finite number")
            else:
                out[key] = value
        for key in required:
            if key not in data:
                self.say((*path,), f"needs {key!r}")
        return out

    def strings(self, data: Any, path: tuple[str, ...]) -> tuple[str, ...]:
        items = [data] if isinstance(data, str) else data if isinstance(data, list) else []
        if not isinstance(data, (str, list)):
            self.say(path, f"found {_kind(data)}, expected a name or a list of names")
        for item in items:
            if not isinstance(item, str):
                self.say(path, f"found {_kind(item)} in the list, expected names")
        return tuple(item for item in items if isinstance(item, str))

    def one_of(self, value: str, choices: tuple[str, ...], path: tuple[str, ...]) -> None:
        if value not in choices:
            self.say(path, f"found {value!r}; valid: {', '.join(choices)}")

    def graph(self, data: Any) -> Graph | None:
        sections = {"version": (int,), "master": (dict,), "answer": (dict,), "nodes": (dict,), "edges": (dict,)}
        top = self.take(data, (), sections, ("version", "nodes", "edges"))
        if top.get("version", VERSION) != VERSION:
            self.say(("version",), f"found {top['version']}, this lmgraph reads version {VERSION}")
        known = {"bundle": (str,), "threshold": (int, float), "fallback": (str,), "margin": (int, float), "scope": (int, float)}
        spec = self.take(top.get("master", {}), ("master",), known, ())
        for name in ("threshold", "margin"):
            if not 0 <= spec.get(name, 0) <= 1:
                self.say(("master", name), f"found {spec[name]}, expected a probability from 0 to 1")
        answer = self.answer(top["answer"], ("answer",)) if "answer" in top else AnswerSpec()
        for section in ("nodes", "edges"):
            for name in top.get(section, {}):
                if not isinstance(name, str):  # YAML reads a bare `no` as false, and 1 and "1" would be one node
                    self.say((section, str(name)), f"found {_kind(name)} as a node's name, expected text; put it in quotes")
        nodes = {}
        for name, value in top.get("nodes", {}).items():
            node = self.node(str(name), value)
            if node:
                nodes[str(name)] = node
        edges = {str(at): self.strings(to, ("edges", str(at))) for at, to in top.get("edges", {}).items()}
        if self.problems or answer is None:
            return None
        return Graph(nodes, edges, MasterSpec(**spec), answer)

    def answer(self, data: Any, path: tuple[str, ...]) -> AnswerSpec | None:
        row = self.take(data, path, {"mode": (str,), "workers": (int,), "voters": (dict,), "judge": (str,)}, ("mode",))
        self.one_of(row.get("mode", MODES[0]), MODES, (*path, "mode"))
        fewest, most = VOTERS
        if not fewest <= row.get("workers", fewest) <= most:
            self.say((*path, "workers"), f"found {row['workers']}, expected {fewest} to {most}")
        for name, value in row.get("voters", {}).items():
            if not isinstance(name, str):
                self.say((*path, "voters", str(name)), f"found {_kind(name)} as a node's name, expected text; put it in quotes")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                self.say((*path, "voters", str(name)), f"found {_kind(value)}, expected a probability between 0 and 1, neither of them")
        return AnswerSpec(**row) if row.get("mode") else None

    def node(self, name: str, data: Any) -> Node | None:
        path = ("nodes", name)
        before = len(self.problems)
        if name in (START, END, "*") or not name.replace("_", "").replace("-", "").isalnum() or not name.isascii() or len(name) > 64:
            self.say(path, "a node's name has at most 64 letters, digits, '_' and '-', and is not start or end")
        row = self.take(
            data,
            path,
            {
                "token": (int,),
                "description": (str,),
                "worker": (dict,),
                "rewrite": (str,),
                "threshold": (int, float),
                "accepts": (str, list),
                "fallback": (str,),
                "adapter": (str,),
                "answer": (dict,),
            },
            ("token", "description", "worker"),
        )
        if row.get("token", 0) < 0:
            self.say((*path, "token"), f"found {row['token']}, expected 0 or more")
        self.one_of(row.get("rewrite", "auto"), REWRITE, (*path, "rewrite"))
        if not 0 <= row.get("threshold", 0) <= 1:
            self.say((*path, "threshold"), f"found {row['threshold']}, expected a probability from 0 to 1")
        accepts = self.strings(row.pop("accepts", "text"), (*path, "accepts"))
        for modality in accepts:
            self.one_of(modality, MODALITIES, (*path, "accepts"))
        worker = self.worker(row.pop("worker", {"kind": "embedded", "model": "-"}), (*path, "worker"))
        answer = self.answer(row.pop("answer"), (*path, "answer")) if "answer" in row else None
        if len(self.problems) > before or worker is None:
            return None
        return Node(name=name, worker=worker, accepts=accepts, answer=answer, **row)

    def worker(self, data: Any, path: tuple[str, ...]) -> WorkerSpec | None:
        row = self.take(
            data,
            path,
            {
                "kind": (str,),
                "model": (str,),
                "system": (str,),
                "urls": (str, list),
                "key_env": (str,),
                "stream": (bool,),
                "timeout_s": (int, float),
                "retries": (int,),
                "max_tokens": (int,),
                "temperature": (int, float),
                "answers": (dict,),
            },
            ("kind",),
        )
        kind = row.get("kind", KINDS[0])
        self.one_of(kind, KINDS, (*path, "kind"))
        urls = self.strings(row.pop("urls", []), (*path, "urls"))
        for url in urls:
            if not url.startswith(("http://", "https://")):
                self.say((*path, "urls"), f"found {url!r}, expected http:// or https://")
        if kind == "openai" and not urls:
            self.say(path, "kind openai needs urls: [http://host:port/v1]")
        if kind in ("openai", "embedded") and not row.get("model"):
            self.say(path, f"kind {kind} needs a model")
        for key, low in (("timeout_s", 0.001), ("retries", 0), ("max_tokens", 1)):
            if row.get(key, low) < low:
                self.say((*path, key), f"found {row[key]}, expected at least {low}")
        if row.get("retries", 0) > 10:
            self.say((*path, "retries"), f"found {row['retries']}, expected at most 10")
        if not 0 <= row.get("temperature", 0) <= 2:
            self.say((*path, "temperature"), f"found {row['temperature']}, expected 0 to 2")
        if "answers" in row:
            for key, value in row["answers"].items():
                if isinstance(value, (dict, list, tuple, set)):
                    self.say((*path, "answers", str(key)), f"found {_kind(value)}, expected text")
            row["answers"] = {str(k): str(v) for k, v in row["answers"].items() if not isinstance(v, (dict, list, tuple, set))}
        return WorkerSpec(urls=urls, **row) if row.get("kind") else None


_NAMES = {int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a mapping", bool: "true or false"}


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    name = _NAMES.get(type(value), type(value).__name__)
    return f"{name} ({value!r:.40})" if not isinstance(value, (dict, list, tuple, set)) else name
