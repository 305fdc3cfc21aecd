"""Edits of graph.yaml that keep its comments and order, checked as a whole before anything is written.

It knows the text of the file and how a change is put into it; what a graph must be is graphfile's and graph's. The one home of
ruamel.yaml, which is slow and therefore imported only when something is edited.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmgraph import graphfile
from lmgraph.errors import GraphError, UserError


def changed(path: Path, change: Callable[[Any], None]) -> str:
    """The file's text after a change of its data; raises GraphError when it cannot be read, or the changed graph has problems."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise GraphError(f"{path} cannot be read: {error.strerror}.", f"Make one: lmgraph graph init {path}") from error
    return edited(text, change, str(path))


def edited(text: str, change: Callable[[Any], None], name: str = "graph.yaml") -> str:
    """A graph's text after a change of its data. Raises GraphError when the graph has problems, before or after."""
    from ruamel.yaml import YAML

    graphfile.loads(text, name)
    yaml = YAML()
    yaml.width = 150
    yaml.preserve_quotes = True
    data = yaml.load(text)
    for source, targets in data["edges"].items():
        if isinstance(targets, str):  # short for a list of one
            data["edges"][source] = [targets]
    change(data)
    buffer = io.StringIO()
    yaml.dump(data, buffer)
    graphfile.loads(buffer.getvalue(), f"{name} after this change")
    return buffer.getvalue()


def remove(data: Any, name: str) -> None:
    """Take a node out, with its edges and the fallbacks to it. Raises UserError when there is none."""
    if name not in data["nodes"]:
        raise UserError(f"There is no node {name!r}.", f"Valid: {', '.join(data['nodes'])}")
    drop(data["nodes"], name, data)
    if name in data["edges"]:
        drop(data["edges"], name, data)
    for targets in data["edges"].values():
        while name in targets:
            targets.remove(name)
    if (data.get("master") or {}).get("fallback") == name:
        del data["master"]["fallback"]
    for node in data["nodes"].values():
        if node.get("fallback") == name:
            del node["fallback"]


def merge(data: Any, patch: Mapping[str, Any], whole: Any = None) -> None:
    """Put a JSON merge patch (RFC 7396) into a graph's data; a node that goes takes its edges and the fallbacks to it along."""
    whole = data if whole is None else whole
    for key, value in patch.items():
        if value is None:
            if data is whole.get("nodes") and key in data:
                remove(whole, key)
            elif key in data:
                del data[key]
        elif isinstance(value, Mapping):
            if not isinstance(data.get(key), Mapping):
                data[key] = {}
            merge(data[key], value, whole)
        else:
            data[key] = value


def difference(old: Any, new: Any) -> Any:
    """The merge patch that makes `new` out of `old` (both plain data)."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    gone = {key: None for key in old if key not in new}
    return gone | {key: difference(old.get(key), value) for key, value in new.items() if key not in old or old[key] != value}


def drop(rows: Any, name: str, whole: Any) -> None:
    """Take a key out of a mapping. The YAML library hangs the comment above the *next* key on this one: it is moved there."""
    text = ""
    if behind := _behind(rows, name):
        width = rows.lc.key(name)[1]
        lines = [line for line in behind.value.split("\n")[1:] if line.strip() and len(line) - len(line.lstrip()) <= width]
        text = "\n".join(line.strip().removeprefix("#").strip() for line in lines)
    keys = list(rows)
    following = next(iter(keys[keys.index(name) + 1 :]), None)
    owner = rows
    if following is None:
        top = list(whole)
        section = next(key for key in top if whole[key] is rows)
        owner, following = whole, next(iter(top[top.index(section) + 1 :]), None)
    del rows[name]
    if text and following is not None:
        owner.yaml_set_comment_before_after_key(following, before=text, indent=0 if owner is whole else width)


def put(rows: Any, name: str, value: Any, comment: str = "") -> None:
    """Put plain data at a key, on one line with a comment behind it.

    The comment behind the old value and those inside it go with it. What stands below it (above the next key) stays there, also
    where the key is new and comes last.
    """
    from ruamel.yaml.error import CommentMark
    from ruamel.yaml.tokens import CommentToken

    behind = _behind(rows, name if name in rows else list(rows)[-1])
    here, _, below = behind.value.partition("\n") if behind else ("", "", "")
    if behind and name not in rows:
        behind.value = here + "\n"
    rows[name] = _flow(value)
    rows.ca.items.pop(name, None)
    if comment or below:
        text = f"{'# ' + comment if comment else ''}\n{below}"
        rows.ca.items[name] = [None, None, CommentToken(text, CommentMark(0), None), None]


def unfold(data: Any) -> None:
    """Write a graph's nodes one key a line where they stand in braces: behind a key there is room for a comment."""
    nodes = data["nodes"]
    for mapping in (data, nodes):
        mapping.fa.set_block_style()
    for name, node in nodes.items():
        if node.fa.flow_style():
            node.fa.set_block_style()
            if token := nodes.ca.items.pop(name, None):  # the comment behind the braces
                node.ca.comment = None
                node.ca.items[list(node)[-1]] = token


def _behind(rows: Any, name: str) -> Any:
    """The comment (a token of the YAML library) that begins behind the last word of a value and goes on to the next key, or None."""
    node = rows
    place: Any = name
    while True:
        token = (node.ca.items.get(place) or [None] * 3)[2 if isinstance(node, dict) else 0]
        if token is not None:
            return token
        node = node[place]
        if not node or not hasattr(node, "ca"):
            return None
        place = list(node)[-1] if isinstance(node, dict) else len(node) - 1


def _flow(value: Any) -> Any:
    """Plain data that is written on one line."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    if isinstance(value, Mapping):
        made: Any = CommentedMap((key, _flow(item)) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        made = CommentedSeq(_flow(item) for item in value)
    else:
        return value
    made.fa.set_flow_style()
    return made
