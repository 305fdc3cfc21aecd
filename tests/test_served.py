"""A master whose weights a llama.cpp server has: it decides as the same weights in this process do; what the server lacks is said."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import serving, toy_graph, toy_queries
from lmgraph import cli, graphfile
from lmgraph.errors import EngineError, GraphError, LmgraphError, VocabularyMismatch, WorkerError
from lmgraph.files import Quiet
from lmgraph.graph import Graph
from lmgraph.loopback import Loopback
from lmgraph.runtime import Runtime
from lmgraph.settings import Settings
from lmgraph.types import Ask, Decision, Message
from test_lora import llama_server, write_adapter

WORKER = Path(__file__).parent.parent / "benchmarks" / "hosts" / "worker.py"


def settings(folder: Path) -> Settings:
    return Settings(cache=folder)


def graph(master: Path, server: str = "", adapter: str = "", key_env: str = "") -> Graph:
    more = (f", server: '{server}'" if server else "") + (f", key_env: {key_env}" if key_env else "")
    text = toy_graph(master).replace(f"bundle: {master}", f"bundle: {master}{more}")
    if adapter:
        text = text.replace("description: about math,", f"description: about math, adapter: {adapter},")
    return graphfile.loads(text.replace("edges: {start: ['*']}", "edges: {start: ['*'], math: ['*', end], law: ['*', end], health: ['*', end]}"))


def shown(made: Decision) -> tuple[object, ...]:
    return (made.node, round(made.probability, 4), made.rewritten, made.written, made.rewrite_tokens, [name for name, _ in made.alternatives])


async def decisions(given: Graph, folder: Path) -> list[tuple[object, ...]]:
    """Of some queries, several at once, one of them a walk's second step."""
    async with Runtime.open(settings(folder), given=given, watcher=Quiet()) as runtime:
        found = [shown(made) for made in await runtime.decide_all([query for query, _ in toy_queries()[:12]])]
        master = await runtime.master()
        return [*found, shown(await master.decide("explain court law", "math", rewriting=True))]


def test_a_served_master_decides_and_writes_as_one_in_this_process_does(toy_master: Path, toy_base: Path, tmp_path: Path) -> None:
    lora = write_adapter(tmp_path / "math-next.gguf", toy_base, 1)
    with llama_server(toy_master, lora) as url:
        for adapter in ("", str(lora)):
            here = asyncio.run(decisions(graph(toy_master, adapter=adapter), tmp_path))
            assert asyncio.run(decisions(graph(toy_master, url.removesuffix("/v1"), adapter), tmp_path)) == here
            assert any(row[4] for row in here), "something was written"
        assert here[-1] != asyncio.run(decisions(graph(toy_master), tmp_path))[-1], "the adapter of the node was on"


def test_an_answer_through_a_served_master_is_streamed(toy_master: Path, tmp_path: Path) -> None:
    async def answer(url: str) -> str:
        async with Runtime.open(settings(tmp_path), given=graph(toy_master, url), watcher=Quiet()) as runtime:
            return "".join([delta.text async for delta in runtime.answer(Ask((Message("user", "explain court law"),)))])

    with llama_server(toy_master) as url:
        assert asyncio.run(answer(url)).startswith("answer to ")  # with /v1 at its end, as workers' URLs have it


@pytest.mark.parametrize(("lacking", "kind", "words"), [
    ("weights", VocabularyMismatch, "The master's server has toy.gguf, and this graph's master is toy-master.gguf"),
    ("adapter", EngineError, "lacks the adapter math-next.gguf; it has: none"),
    ("key", WorkerError, "The environment variable NO_SUCH_KEY, key of the master's server, is not set"),
])
def test_what_the_server_lacks_is_said(toy_master: Path, toy_base: Path, tmp_path: Path, lacking: str, kind: type[LmgraphError], words: str) -> None:
    with llama_server(toy_base if lacking == "weights" else toy_master) as url:
        given = graph(toy_master, url, "/there/math-next.gguf" if lacking == "adapter" else "", "NO_SUCH_KEY" if lacking == "key" else "")
        with pytest.raises(kind, match=words):
            asyncio.run(decisions(given, tmp_path))


def test_a_check_looks_at_the_masters_server_too(toy_master: Path, toy_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def check() -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["graph", "check", "--live", "-g", str(file)])
        return ended.value.code, *capsys.readouterr()

    file = tmp_path / "graph.yaml"
    for base, code, words in ((toy_master, 0, "nothing wrong"), (toy_base, 1, "The master's server has toy.gguf")):
        with llama_server(base) as url:
            file.write_text(graphfile.dumps(graph(toy_master, url)))
            status, out, err = check()
        assert status == code and words in out + err, (out, err)


def test_a_server_that_is_not_there_is_named(toy_master: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"llama.cpp at 127.0.0.1:9 does not answer \(/props\)"):
        asyncio.run(decisions(graph(toy_master, "http://127.0.0.1:9"), tmp_path))


def test_a_server_that_is_no_llama_cpp_is_named(toy_master: Path, tmp_path: Path) -> None:
    with serving(toy_graph(toy_master), tmp_path) as address, closing(Loopback(address, "")) as door, pytest.raises(EngineError, match="answered 404 to /props: There is no '/props'"):
        door.get("/props")


def test_a_server_must_be_a_url() -> None:
    with pytest.raises(GraphError, match=r"master.server: found 'master:8080', expected the URL of a llama.cpp server"):
        graph(Path("none.gguf"), "master:8080")


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@contextmanager
def worker(master: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """A llama.cpp server in a process of its own, which can be killed."""
    command = [sys.executable, str(WORKER), str(master), "--address", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline().startswith("ready")
            yield process
        finally:
            process.kill()


def test_a_gateway_waits_for_its_masters_server_says_when_it_is_gone_and_goes_on_when_it_is_back(toy_master: Path, tmp_path: Path, free_port: int) -> None:
    (tmp_path / "graph.yaml").write_text(graphfile.dumps(graph(toy_master, f"http://127.0.0.1:{free_port}")))
    command = [sys.executable, "-m", "lmgraph", "serve", "graph.yaml", "--port", "0"]
    body = {"model": "lmgraph", "messages": [{"role": "user", "content": "explain court law"}]}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            address = re.search(r"http://\S+(?=/v1)", process.stderr.readline())
            assert address
            assert "does not answer" in process.stderr.readline()
            with httpx.Client(base_url=address.group(), timeout=60) as client:
                assert client.get("/readyz").status_code == 503
                with worker(toy_master, free_port):
                    while client.get("/readyz").status_code != 200:
                        assert process.poll() is None
                    assert client.post("/v1/chat/completions", json=body).status_code == 200
                gone = client.post("/v1/chat/completions", json=body)
                assert gone.status_code == 502 and "does not answer" in gone.json()["error"]["message"]
                with worker(toy_master, free_port):
                    assert client.post("/v1/chat/completions", json=body).status_code == 200
        finally:
            process.terminate()
            _, said = process.communicate(timeout=60)
        assert "Traceback" not in said, said


def test_a_server_may_lie_below_a_path_of_its_host() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"asked": self.path}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for below, asked in (("", "/props"), ("/v1/", "/props"), ("/llama/v1", "/llama/props")):
            with closing(Loopback(f"http://127.0.0.1:{server.server_port}{below}", "")) as door:
                assert door.get("/props") == {"asked": asked}
        server.shutdown()
