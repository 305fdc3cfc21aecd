"""Plain data in the form of graph.yaml -> Graph, with every problem named by its place. Pure; it knows no YAML.

It knows which keys there are, what they may hold and what is meant where they are left out. What a graph must be as a whole is graph.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lmgraph.graph import (
    DIALECTS,
    END,
    KINDS,
    MODALITIES,
    MODES,
    MOST_HOPS,
    REWRITE,
    SOURCES,
    START,
    VERSION,
    VOTERS,
    AnswerSpec,
    Graph,
    MasterSpec,
    Node,
    WorkerSpec,
)


class Reader:
    """Data -> Graph, gathering problems instead of stopping at the first. `at` names the line of a path, '' where there is none."""

    def __init__(self, at: Callable[[tuple[str, ...]], str]) -> None:
        self._at = at
        self.problems: list[str] = []

    def say(self, path: tuple[str, ...], text: str) -> None:
        self.problems.append(self._at(path) + (".".join(path) + ": " if path else "") + text)

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
        words, numbers = ("bundle", "server", "key_env", "fallback"), ("threshold", "margin", "scope")
        known = {**dict.fromkeys(words, (str,)), **dict.fromkeys(numbers, (int, float))}
        spec = self.take(top.get("master", {}), ("master",), known, ())
        if not spec.get("server", "http://").startswith(("http://", "https://")):
            self.say(("master", "server"), f"found {spec['server']!r}, expected the URL of a llama.cpp server, http://...")
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
        known = {
            "mode": (str,),
            "workers": (int,),
            "voters": (dict,),
            "judge": (str,),
            "hops": (int,),
            "seconds": (int, float),
            "tokens": (int,),
            "cost": (int, float),
            "compose": (str,),
        }
        row = self.take(data, path, known, ("mode",))
        self.one_of(row.get("mode", MODES[0]), MODES, (*path, "mode"))
        fewest, most = VOTERS
        if not fewest <= row.get("workers", fewest) <= most:
            self.say((*path, "workers"), f"found {row['workers']}, expected {fewest} to {most}")
        for name, low, high in (("hops", 1, MOST_HOPS), ("seconds", 0.001, 86_400), ("tokens", 1, 10**9), ("cost", 0, 10**6)):
            if not low <= row.get(name, low) <= high:
                self.say((*path, name), f"found {row[name]}, expected {low:,} to {high:,}")
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
                "dialect": (str,),
                "adapter": (str,),
                "adapter_path": (str,),
                "adapter_source": (str,),
                "stream": (bool,),
                "timeout_s": (int, float),
                "start_timeout_s": (int, float),
                "retries": (int,),
                "max_tokens": (int,),
                "temperature": (int, float),
                "answers": (dict,),
                "price": (list,),
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
        self.adapting(row, path)
        for key, low in (("timeout_s", 0.001), ("start_timeout_s", 0), ("retries", 0), ("max_tokens", 1)):
            if row.get(key, low) < low:
                self.say((*path, key), f"found {row[key]}, expected at least {low}")
        if row.get("retries", 0) > 10:
            self.say((*path, "retries"), f"found {row['retries']}, expected at most 10")
        if not 0 <= row.get("temperature", 0) <= 2:
            self.say((*path, "temperature"), f"found {row['temperature']}, expected 0 to 2")
        price = row.pop("price", [0, 0])
        if len(price) != 2 or not all(isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x < 1e9 for x in price):
            self.say((*path, "price"), f"found {price}, expected two prices per million tokens: [prompt, completion]")
            price = [0, 0]
        row["price"] = tuple(float(x) for x in price)
        if "answers" in row:
            for key, value in row["answers"].items():
                if isinstance(value, (dict, list, tuple, set)):
                    self.say((*path, "answers", str(key)), f"found {_kind(value)}, expected text")
            row["answers"] = {str(k): str(v) for k, v in row["answers"].items() if not isinstance(v, (dict, list, tuple, set))}
        return WorkerSpec(urls=urls, **row) if row.get("kind") else None

    def adapting(self, row: Mapping[str, Any], path: tuple[str, ...]) -> None:
        """What a worker says about its server's adapters."""
        dialect, adapter = row.get("dialect", ""), row.get("adapter", "")
        if dialect:
            self.one_of(dialect, DIALECTS, (*path, "dialect"))
        for key, needed in (("adapter_path", "vllm"), ("adapter_source", "lorax")):
            if row.get(key) and (dialect != needed or not adapter):
                self.say((*path, key), f"is only for an adapter of dialect {needed}")
        if row.get("adapter_source"):
            self.one_of(row["adapter_source"], SOURCES, (*path, "adapter_source"))
        if adapter and not dialect:
            self.say((*path, "adapter"), f"needs a dialect, which says how the server is asked for it; valid: {', '.join(DIALECTS)}")
        if adapter and adapter == row.get("model"):
            self.say((*path, "adapter"), f"found {adapter!r}, the name of its base; a server would take the base alone")
        if dialect and row.get("kind") != "openai":
            self.say((*path, "dialect"), f"kind {row.get('kind')} has none; it says which server a worker of kind openai has")


_NAMES = {int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a mapping", bool: "true or false"}


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    name = _NAMES.get(type(value), type(value).__name__)
    return f"{name} ({value!r:.40})" if not isinstance(value, (dict, list, tuple, set)) else name
