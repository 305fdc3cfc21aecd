"""Two public intent sets that nobody here wrote, as graphs: BANKING77 (77 nodes) and CLINC150 (150 nodes and out-of-scope queries).

It knows their original layouts on the user's disk, how few examples a node are drawn, and how an intent becomes a node's name. It
fetches nothing and knows no router. BANKING77: Casanueva et al. 2020, CC BY 4.0. CLINC150: Larson et al. 2019, CC BY 3.0.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmgraph.errors import DataError
from lmgraph.train.examples import Example

NAMES = ("banking77", "clinc150")
EXPECTED = "Expected banking77_train.csv and banking77_test.csv (text,category), or clinc150_data_full.json (CLINC150's data_full.json)"


@dataclass(frozen=True)
class Intents:
    """Queries with their intent as node, as the set is split; `outside`: test queries that belong to no intent."""

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    outside: tuple[str, ...] = ()

    @property
    def nodes(self) -> tuple[str, ...]:
        """The intents' names as nodes, sorted."""
        return tuple(sorted({example.node for example in self.train}))

    def few(self, shots: int, seed: int = 0) -> list[Example]:
        """`shots` training examples a node (all where a node has fewer), drawn at random by `seed`, the nodes in order."""
        draw = random.Random(seed)
        by_node: dict[str, list[Example]] = {node: [] for node in self.nodes}
        for example in self.train:
            by_node[example.node].append(example)
        return [example for rows in by_node.values() for example in draw.sample(rows, min(shots, len(rows)))]


def load(name: str, folder: Path) -> Intents:
    """Read one of NAMES from a folder (files plain or .gz). Raises DataError naming file and line."""
    if name not in NAMES:
        raise DataError(f"There is no intent set {name!r}.", f"Valid: {', '.join(NAMES)}")
    return _banking(folder) if name == "banking77" else _clinc(folder)


def _banking(folder: Path) -> Intents:
    parts = {}
    for part in ("train", "test"):
        path = _find(folder, (f"banking77_{part}.csv", f"{part}.csv"))
        rows = csv.reader(io.StringIO(_text(path), newline=""))
        try:
            head = next(rows, [])
            if head != ["text", "category"]:
                raise DataError(f"{path.name}:1: found columns {', '.join(head) or 'none'}, expected text, category.", EXPECTED)
            parts[part] = tuple(_example(row, f"{path.name}:{rows.line_num}") for row in rows if row)
        except csv.Error as error:
            raise DataError(f"{path.name}:{rows.line_num}: not CSV ({error}).", EXPECTED) from error
    return _checked(Intents("banking77", parts["train"], parts["test"]))


def _clinc(folder: Path) -> Intents:
    path = _find(folder, ("clinc150_data_full.json", "data_full.json"))
    try:
        data = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name}: not JSON ({getattr(error, 'msg', error)}).", EXPECTED) from error
    wanted = ("train", "test", "oos_test")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in wanted):
        found = ", ".join(data) if isinstance(data, dict) else type(data).__name__
        raise DataError(f"{path.name}: found {found}, expected an object with lists {', '.join(wanted)}.", EXPECTED)
    train, test, outside = (tuple(_example(row, f"{path.name}: {key}[{number}]") for number, row in enumerate(data[key])) for key in wanted)
    return _checked(Intents("clinc150", train, test, tuple(example.query for example in outside)))


def _checked(found: Intents) -> Intents:
    if not found.train or not found.test:
        raise DataError(f"{found.name} has {len(found.train)} training and {len(found.test)} test queries.", EXPECTED)
    if strangers := sorted({example.node for example in found.test} - set(found.nodes)):
        raise DataError(f"{found.name}: test queries of intents without training queries: {', '.join(strangers)}.", EXPECTED)
    return found


def _example(row: Any, where: str) -> Example:
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != 2 or not all(isinstance(x, str) and x.strip() for x in row):
        raise DataError(f"{where}: found {str(row)[:80]!r}, expected a query and its intent.", EXPECTED)
    return Example(row[0], _node(row[1]))


def _node(intent: str) -> str:
    """An intent's name as a node may be called: letters, digits, - and _."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", intent.strip()).strip("_").lower() or "_"


def _find(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise DataError(f"{folder} holds none of {', '.join(names)} (plain or .gz).", EXPECTED)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} cannot be read: {error}.", EXPECTED) from error
