"""Toy models made on the spot, and a machine of one's own for every test: no LMGRAPH_* from outside, a cache of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmgraph import assets, bundles
from lmgraph.engine import Engine
from lmgraph.tokens import Vocabulary
from lmgraph.train import heads, tiny

WORDS = {"math": "sum integral matrix", "law": "court contract statute", "health": "doctor fever bone"}
signal.signal(signal.SIGINT, signal.default_int_handler)  # started in a shell's background, tests and all that they start would ignore Ctrl-C


@pytest.fixture(autouse=True)
def own_machine(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in list(os.environ):
        if name.startswith("LMGRAPH_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LMGRAPH_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("LMGRAPH_STORE", f"sqlite:///{tmp_path_factory.mktemp('store')}/store.db")
    monkeypatch.setenv("LMGRAPH_THREADS", "2")


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model: llama architecture, tied embeddings, random weights."""
    path = tmp_path_factory.mktemp("toy") / "toy.gguf"
    tiny.make(path)
    return path


def toy_queries(per_node: int = 12, salt: int = 0) -> list[tuple[str, str]]:
    """(query, node) pairs that a linear row can tell apart by their words."""
    fillers = ("what is", "explain", "tell me about", "why", "how does", "give an example of")
    rows = []
    for node, words in WORDS.items():
        for i in range(per_node):
            word = words.split()[(i + salt) % 3]
            rows.append((f"{fillers[(i * 5 + salt) % 6]} {word} {word} {fillers[(i + salt) % 6]}", node))
    return rows


@pytest.fixture(scope="session")
def toy_bundle(toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rows-only bundle for three nodes, fitted on the toy's hidden states, with anchors."""
    folder = tmp_path_factory.mktemp("bundles") / "toy"
    size = tiny.make(tmp_path_factory.mktemp("size") / "same.gguf")
    vocabulary = Vocabulary(size, 8, size + 8, {name: i for i, name in enumerate(WORDS)}, base=assets.digest_of(toy_base))

    async def fit() -> None:
        engine = await Engine.open(toy_base, context=256, slots=2, threads=2, states=True)
        rows = toy_queries()
        features = await heads.states(engine, vocabulary, [q for q, _ in rows], 128)
        await engine.close()
        labels = heads.index([n for _, n in rows], vocabulary.nodes)
        fitted = heads.fit_all(features, labels, 3, features, labels)
        heads.rows_bundle(folder, vocabulary, replace(fitted, temperature=1.0), features.shape[1])
        heads.save_anchors(folder / "anchors.npz", features, [n for _, n in rows])

    asyncio.run(fit())
    return folder


@pytest.fixture(scope="session")
def toy_master(toy_bundle: Path, toy_base: Path) -> Path:
    """The toy bundle merged to one GGUF."""
    return bundles.merge(bundles.read(str(toy_bundle)), toy_base, toy_bundle.parent / "toy-master.gguf")


def toy_graph(master: Path, worker: str = "{kind: scripted, answers: {'*': 'answer to {}'}}", extra: str = "") -> str:
    """graph.yaml text of three nodes around a master file."""
    nodes = "\n".join(f"  {name}: {{token: {i}, description: about {name}, worker: {worker}}}" for i, name in enumerate(WORDS))
    return f"version: 1\nmaster: {{bundle: {master}}}\nnodes:\n{nodes}\nedges: {{start: ['*']}}\n{extra}"


@pytest.fixture
def toy_graph_file(toy_master: Path, tmp_path: Path) -> Path:
    path = tmp_path / "graph.yaml"
    path.write_text(toy_graph(toy_master))
    return path


def say(text: str) -> list[Any]:
    """One user's message."""
    return [{"role": "user", "content": text}]


class Address(str):
    """Where a gateway listens (http://host:port), and its process."""

    process: subprocess.Popen[str]


@contextmanager
def serving(graph: str, folder: Path, *arguments: str, store: str = "sqlite://") -> Iterator[Address]:
    """Address of a gateway of its own, ready to answer; it must end by itself, without a traceback, when it is told to."""
    (folder / "graph.yaml").write_text(graph)
    command = [sys.executable, "-m", "lmgraph", "serve", "graph.yaml", "--port", "0", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "LMGRAPH_STORE": store}
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr
            first = process.stderr.readline()
            address = re.search(r"http://\S+(?=/v1)", first)
            assert address, first + process.stderr.read()
            with httpx.Client(base_url=address.group()) as client:
                while client.get("/readyz").status_code != 200:
                    assert process.poll() is None, process.stderr.read()
            found = Address(address.group())
            found.process = process
            yield found
        finally:
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
        assert "Traceback" not in said, said
