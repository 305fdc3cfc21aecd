"""How far the labels of the natural queries kept aside can be trusted: an independent reader's labels against theirs.

    .venv/bin/python benchmarks/second_reader.py

The reader (a language model) saw the queries and what each node is for (docs/log.md), no labels. `also`: a second node that it found
equally right.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from lmgraph.train import examples

FILES = ("routes", "rewrites", "natural", "languages")
READER = Path("benchmarks/results/natural/second_reader.jsonl")


def main() -> None:
    read = {row["query"]: row for row in map(json.loads, READER.read_text(encoding="utf-8").splitlines())}
    kept = [e for e in examples.split(examples.load([Path(f"data/{name}.jsonl") for name in FILES]))[1] if e.style in ("casual", "tricky")]
    asked: Counter[str] = Counter()
    same: Counter[str] = Counter()
    second = 0
    for example in kept:
        row = read[example.query]
        second += example.node in (row["node"], row["also"])
        for group in ("all", example.style, example.lang if example.lang in ("en", "zh") else "other languages"):
            asked[group] += 1
            same[group] += example.node == row["node"]
    for group, count in asked.items():
        print(f"{group:16} {count:4}  {100 * same[group] / count:5.1f} % the same node")
    print(f"with a second choice: {100 * second / len(kept):.1f} %")


if __name__ == "__main__":
    main()
