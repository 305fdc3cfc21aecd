"""A whole ask: the toy master, scripted workers, what happens when workers fail, and what comes out as trace."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from conftest import WORDS, toy_graph
from lmgraph import assets, execute, files, graphfile, runtime, settings
from lmgraph.engine import Engine
from lmgraph.errors import AssetError, EngineError, GraphError, OutsideError, QueryError, UserError, WorkerError, WorkerTimeout
from lmgraph.graph import Graph, Node, WorkerSpec
from lmgraph.runtime import Runtime
from lmgraph.types import Answer, Ask, Decision, Delta, Message, Step, Trace
from lmgraph.workers.embedded import EmbeddedWorker
from lmgraph.workers.scripted import ScriptedWorker

BROKEN = "{kind: scripted, retries: 0, answers: {'*': '! out of order'}}"


def asking(text: str, **options: Any) -> Ask:
    return Ask((Message("user", text),), **options)


def use(given: Graph | Path, work: Callable[[Runtime], Coroutine[Any, Any, None]]) -> None:
    """Run `work` on a runtime of a graph or of a graph file."""
    async def main() -> None:
        path, read = (given, None) if isinstance(given, Path) else (None, given)
        async with Runtime.open(settings.read(), path, given=read) as open_runtime:
            await work(open_runtime)

    asyncio.run(main())


def graph_of(workers: Mapping[str, str], master: str = "{bundle: no-such-master.gguf}") -> Graph:
    """Nodes named after their workers' keys; 'name>other' has a fallback."""
    rows = []
    for i, (key, worker) in enumerate(workers.items()):
        name, _, other = key.partition(">")
        rows.append(f"  {name}: {{token: {i}, description: d, worker: {worker}{f', fallback: {other}' if other else ''}}}\n")
    return graphfile.loads(f"version: 1\nmaster: {master}\nnodes:\n{''.join(rows)}edges: {{start: ['*']}}\n")


# --- one ask ---


def test_an_answer_streams_and_its_last_piece_carries_the_trace(toy_graph_file: Path) -> None:
    async def work(open_runtime: Runtime) -> None:
        told: list[Decision] = []
        deltas = []
        async for delta in open_runtime.answer(asking("court contract statute"), told.append):
            assert told  # before the worker starts
            deltas.append(delta)
        assert [d.text for d in deltas] == ["answer", " to", " court", " contract", " statute", ""]
        assert [d.done for d in deltas] == [False] * 5 + [True] and [d.trace for d in deltas[:-1]] == [None] * 5
        trace = deltas[-1].trace
        assert trace and trace.decision and [trace.decision] == told and deltas[-1].finish == "stop"
        assert trace.decision.query == "court contract statute" and 0 < trace.decision.probability <= 1
        [step] = trace.steps
        assert (step.node, step.request, step.answer) == (trace.decision.node, trace.decision.rewritten, "answer to court contract statute")
        assert step.ms >= step.first_ms > 0 and step.attempts == 1 and not step.error
        assert step.usage == deltas[-1].usage == {"prompt_tokens": 3, "completion_tokens": 5}

    use(toy_graph_file, work)


def test_asks_at_the_same_time_get_their_own_answers(toy_graph_file: Path) -> None:
    async def work(open_runtime: Runtime) -> None:
        queries = [f"{words} {i}" for i in range(3) for words in WORDS.values()]
        answers = await asyncio.gather(*(runtime.fold(open_runtime.answer(asking(q))) for q in queries))
        assert [a.text for a in answers] == [f"answer to {q}" for q in queries]
        assert len({id(await open_runtime.master()) for _ in range(2)}) == 1

    use(toy_graph_file, work)


def test_a_pinned_node_answers_without_the_master() -> None:
    async def work(open_runtime: Runtime) -> None:
        answer = await runtime.fold(open_runtime.answer(asking("hello", node="b")))  # the master's file does not exist
        assert answer.text == "b: hello" and answer.trace.decision is None
        assert [s.node for s in answer.trace.steps] == ["b"]
        with pytest.raises(AssetError, match=r"no-such-master\.gguf"):
            await runtime.fold(open_runtime.answer(asking("hello")))

    use(graph_of({"a": "{kind: scripted}", "b": "{kind: scripted, answers: {'*': 'b: {}'}}"}), work)


def test_an_unknown_node_is_refused_with_the_valid_ones() -> None:
    async def work(open_runtime: Runtime) -> None:
        with pytest.raises(UserError, match="There is no node 'c'") as caught:
            await runtime.fold(open_runtime.answer(asking("hello", node="c")))
        assert caught.value.hint == "Valid: a, b"

    use(graph_of({"a": "{kind: scripted}", "b": "{kind: scripted}"}), work)


@pytest.mark.parametrize("messages", [(), (Message("user", " \n"),), (Message("assistant", "hello"),)])
def test_an_ask_without_a_query_is_refused(messages: tuple[Message, ...]) -> None:
    async def work(open_runtime: Runtime) -> None:
        with pytest.raises(QueryError):
            await runtime.fold(open_runtime.answer(Ask(messages, node="a")))

    use(graph_of({"a": "{kind: scripted}"}), work)


def test_the_conversation_goes_to_the_worker_with_its_last_user_message_rewritten(toy_graph_file: Path) -> None:
    history = (Message("system", "be brief"), Message("user", "law?"), Message("assistant", "which?"),
               Message("user", "court contract statute"))

    async def work(open_runtime: Runtime) -> None:
        answer = await runtime.fold(open_runtime.answer(Ask((*history, Message("assistant", "begun")))))
        decision = answer.trace.decision
        assert decision and decision.query == "court contract statute"
        worker = await open_runtime.worker(open_runtime.graph.nodes[decision.node])
        assert isinstance(worker, ScriptedWorker)
        assert worker.asked == [(*history[:-1], Message("user", decision.rewritten))]

    use(toy_graph_file, work)


def test_limits_of_the_ask_win_over_those_of_the_node() -> None:
    async def work(open_runtime: Runtime) -> None:
        for limit, text in ((None, "one two"), (1, "one")):
            assert (await runtime.fold(open_runtime.answer(asking("one two three", node="a", max_tokens=limit)))).text == text

    use(graph_of({"a": "{kind: scripted, max_tokens: 2}"}), work)


# --- workers that fail ---


def test_retries_then_the_nodes_fallback_then_the_masters() -> None:
    given = graph_of({"a>b": "{kind: scripted, retries: 1, answers: {'*': '! a is broken'}}", "b": BROKEN,
                      "c": "{kind: scripted, answers: {'*': 'c: {}'}}"}, "{bundle: none.gguf, fallback: c}")

    async def work(open_runtime: Runtime) -> None:
        answer = await runtime.fold(open_runtime.answer(asking("hello", node="a")))
        assert answer.text == "c: hello"
        assert [(s.node, s.attempts, s.error, s.answer) for s in answer.trace.steps] == [
            ("a", 2, "a is broken", ""), ("b", 1, "out of order", ""), ("c", 1, "", "c: hello")]

    use(given, work)


def test_when_every_worker_fails_the_error_names_each() -> None:
    async def work(open_runtime: Runtime) -> None:
        with pytest.raises(WorkerError) as caught:
            await runtime.fold(open_runtime.answer(asking("hello", node="a")))
        assert caught.value.message == "No worker could answer (a: out of order, b: out of order, c: out of order)"

    use(graph_of({"a>b": BROKEN, "b>c": BROKEN, "c": BROKEN}, "{bundle: none.gguf, fallback: b}"), work)


def test_a_worker_that_cannot_be_opened_is_a_worker_that_fails(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"no model")
    given = graph_of({"a>b": "{kind: embedded, model: not-there.gguf, retries: 0}",
                      "b>c": f"{{kind: embedded, model: {tmp_path}/bad.gguf}}",
                      "c>d": "{kind: openai, model: m, urls: 'http://127.0.0.1:1/v1', key_env: LMGRAPH_TEST_NO_KEY, retries: 0}",
                      "d": "{kind: scripted}"})

    async def work(open_runtime: Runtime) -> None:
        answer = await runtime.fold(open_runtime.answer(asking("hello", node="a")))
        assert answer.text == "hello" and [s.node for s in answer.trace.steps] == ["a", "b", "c", "d"]
        for step, words in zip(answer.trace.steps, ("neither in the catalogue nor a file", "not a GGUF file", "LMGRAPH_TEST_NO_KEY", "")):
            assert words in step.error

    use(given, work)


class Acts:
    """A worker that streams texts, raises errors and waits (None) as told; notes how it was left."""

    def __init__(self, *acts: str | OutsideError | None) -> None:
        self.acts, self.asked, self.left = acts, 0, 0
        self.resting = False

    async def stream(self, messages: Sequence[Message], *, max_tokens: int, temperature: float | None = None,
                     options: Mapping[str, object] | None = None, whole: bool = False) -> AsyncIterator[Delta]:
        self.asked += 1
        try:
            for act in self.acts:
                if isinstance(act, OutsideError):
                    raise act
                if act is None:
                    await asyncio.Event().wait()
                yield Delta(act or "", done=act == "")
        finally:
            self.left += 1

    async def close(self) -> None:
        """Nothing to release."""


def steps_of(workers: Mapping[str, Acts], timeout_s: float = 20, retries: int = 2) -> list[Delta | Step]:
    """What `execute.run` gives when the nodes are tried in this order."""
    first, *chain = [Node(name, 0, "d", WorkerSpec("scripted", timeout_s=timeout_s, retries=retries)) for name in workers]

    async def work() -> list[Delta | Step]:
        async def open_worker(node: Node) -> Acts:
            return workers[node.name]

        return [item async for item in execute.run(first, chain, [Message("user", "hello")], open_worker)]

    return asyncio.run(work())


def test_an_answer_that_fails_in_the_middle_is_not_begun_again_elsewhere() -> None:
    workers = {"a": Acts("half", WorkerError("cut off", "look there")), "b": Acts("whole", "")}
    with pytest.raises(WorkerError, match="Node 'a' failed in the middle of its answer: cut off") as caught:
        steps_of(workers)
    assert caught.value.hint == "look there" and (workers["a"].asked, workers["b"].asked) == (1, 0)


def test_a_worker_that_takes_too_long_is_not_retried_but_replaced() -> None:
    workers = {"a": Acts(None), "b": Acts("whole", "")}
    items = steps_of(workers, timeout_s=0.1)
    assert [(s.node, s.attempts, s.error) for s in items if isinstance(s, Step)] == [("a", 1, "No answer within 0.1 s."), ("b", 1, "")]
    assert [d.text for d in items if isinstance(d, Delta)] == ["whole", ""]
    assert workers["a"].left == 1


def gone() -> WorkerError:
    error = WorkerError("no connection in time")
    error.again = False
    return error


@pytest.mark.parametrize("error", [WorkerTimeout("too slow"), EngineError("no memory"), gone()])
def test_an_error_that_trying_again_would_not_mend_goes_on_to_the_next_node(error: OutsideError) -> None:
    workers = {"a": Acts(error), "b": Acts("whole", "")}
    assert [s.error for s in steps_of(workers) if isinstance(s, Step)] == [error.message, ""]
    assert workers["a"].asked == 1


def test_a_worker_that_rests_is_passed_over_unless_nobody_else_is_left() -> None:
    workers = {"a": Acts("whole", ""), "b": Acts("whole", ""), "c": Acts(WorkerError("out of order"))}
    workers["a"].resting = workers["c"].resting = True
    items = steps_of(workers)
    assert [(s.node, "left alone" in s.error) for s in items if isinstance(s, Step)] == [("a", True), ("b", False)]
    assert (workers["a"].asked, workers["b"].asked) == (0, 1)
    with pytest.raises(WorkerError, match=r"a: It is left alone .*, c: out of order"):
        steps_of({name: workers[name] for name in "ac"})
    assert (workers["a"].asked, workers["c"].asked) == (0, 3), "an attempt is better than none"


def test_a_worker_that_begins_to_rest_is_not_tried_again() -> None:
    class Tires(Acts):
        async def stream(self, messages: Sequence[Message], **rest: Any) -> AsyncIterator[Delta]:
            self.resting = True
            async for delta in super().stream(messages, **rest):
                yield delta

    workers = {"a": Tires(WorkerError("out of order")), "b": Acts("whole", "")}
    assert [(s.node, s.attempts, s.error) for s in steps_of(workers) if isinstance(s, Step)] == [("a", 1, "out of order"), ("b", 1, "")]


def test_when_all_take_too_long_it_is_a_timeout_that_names_each() -> None:
    with pytest.raises(WorkerTimeout, match=r"No worker could answer \(a: No answer within 0\.1 s\., b: No answer within 0\.1 s\.\)"):
        steps_of({"a": Acts(None), "b": Acts(None)}, timeout_s=0.1)


def test_a_pause_in_the_middle_of_an_answer_that_takes_too_long_is_a_failure_in_the_middle() -> None:
    with pytest.raises(WorkerTimeout, match="in the middle of its answer: No answer within"):
        steps_of({"a": Acts("half", None), "b": Acts("whole", "")}, timeout_s=0.1)


def test_a_worker_that_says_nothing_at_all_has_failed() -> None:
    items = steps_of({"a": Acts(), "b": Acts("whole", "")}, retries=0)
    assert [s.error for s in items if isinstance(s, Step)] == ["The worker of node 'a' ended its answer without saying so.", ""]


def test_leaving_an_answer_early_leaves_the_worker_at_once() -> None:
    async def work() -> None:
        worker = Acts("half", "of", "it", "")

        async def open_worker(node: Node) -> Acts:
            return worker

        stream = execute.run(Node("a", 0, "d", WorkerSpec("scripted")), [], [Message("user", "hello")], open_worker)
        await anext(stream)
        await stream.aclose()
        assert worker.left == 1

    asyncio.run(work())


# --- models that nodes share ---


def test_two_nodes_that_name_one_model_share_its_engine(toy_base: Path) -> None:
    spec = f"{{kind: embedded, model: {toy_base}, max_tokens: 3, retries: 0}}"

    async def work(open_runtime: Runtime) -> None:
        one, two = [await open_runtime.worker(open_runtime.graph.nodes[n]) for n in "ab"]
        assert isinstance(one, EmbeddedWorker) and isinstance(two, EmbeddedWorker) and one is not two
        assert await open_runtime.worker(open_runtime.graph.nodes["a"]) is one
        answers = await asyncio.gather(*(runtime.fold(open_runtime.answer(asking("hello", node=n))) for n in "abab"))
        assert [a.usage["completion_tokens"] for a in answers] == [3] * 4
        engine = await one._shared.get()
        assert isinstance(engine, Engine) and await two._shared.get() is engine

    use(graph_of({"a": spec, "b": spec}), work)


class Counting(SimpleHTTPRequestHandler):
    """Serves a folder; its class attribute counts."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def toy_in_catalogue(toy_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The toy as catalogue model 'toy', fetched from a hub on loopback; gives the paths asked there."""
    content = toy_base.read_bytes()
    place = tmp_path / "hub" / "o" / "r" / "resolve" / "main" / "toy.gguf"
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    asked: list[str] = []
    handler = type("Here", (Counting,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=tmp_path / "hub")) as server:
        server.daemon_threads = False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setitem(assets.CATALOGUE, "toy", assets.Asset(
            "toy", "toy.gguf", hashlib.sha256(content).hexdigest(), len(content), "Apache-2.0", hub=assets.Hub("o/r", "toy.gguf")))
        yield asked
        server.shutdown()
        thread.join()


def test_nodes_that_need_a_model_at_the_same_time_fetch_it_once(toy_in_catalogue: list[str]) -> None:
    spec = "{kind: embedded, model: toy, max_tokens: 2, retries: 0}"

    async def work(open_runtime: Runtime) -> None:
        answers = await asyncio.gather(*(runtime.fold(open_runtime.answer(asking("hello", node=n))) for n in "abcabc"))
        assert all(not s.error for a in answers for s in a.trace.steps)
        assert toy_in_catalogue == ["/o/r/resolve/main/toy.gguf"]

    use(graph_of({"a": spec, "b": spec, "c": spec}), work)


# --- graphs ---


def test_the_tiny_profile_replaces_catalogue_models_only() -> None:
    given = graph_of({"a": "{kind: embedded, model: qwen2.5-coder-1.5b, system: s}", "b": "{kind: embedded, model: mine.gguf}",
                      "c": "{kind: openai, model: qwen2.5-coder-1.5b, urls: 'http://x/v1'}", "d": "{kind: scripted}"})
    tiny = files.with_profile(given, "tiny")
    assert [n.worker.model for n in tiny.nodes.values()] == ["smollm2-135m", "mine.gguf", "qwen2.5-coder-1.5b", ""]
    assert tiny.nodes["a"].worker.system == "s" and tiny.edges == given.edges
    assert files.with_profile(given, "standard") is given


def test_a_graph_is_the_named_file_or_the_one_here_or_the_built_in(
        toy_graph_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    built_in, folder = files.read_graph(None)
    assert built_in == graphfile.loads(files.builtin_graph()) and folder is None and len(built_in.nodes) > 3
    Path("graph.yaml").write_text(toy_graph(Path("here.gguf")))
    here, folder = files.read_graph(None)
    assert here.master.bundle == "here.gguf" and folder == Path()
    named, folder = files.read_graph(toy_graph_file)
    assert named.master.bundle != "here.gguf" and folder == toy_graph_file.parent
    assert Runtime.open(settings.read({"LMGRAPH_GRAPH": str(toy_graph_file), "HOME": "/"})).graph == named
    assert Runtime.open(settings.read({"LMGRAPH_GRAPH": "/not/there", "HOME": "/"}), toy_graph_file).graph == named


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["not there", "not text"])
def test_a_graph_file_that_cannot_be_read_names_the_next_command(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GraphError, match="cannot be read") as caught:
        files.read_graph(path)
    assert str(path) in caught.value.message and caught.value.hint == f"Make one: lmgraph graph init {path}"


def test_a_model_beside_the_graph_is_found_and_a_stranger_is_named_with_the_valid_ones(tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").touch()
    watcher = files.Quiet()
    assert files.model_file("mine.gguf", tmp_path / "cache", tmp_path, watcher) == tmp_path / "mine.gguf"
    with pytest.raises(AssetError, match=r"'other\.gguf' is neither") as caught:
        files.model_file("other.gguf", tmp_path / "cache", tmp_path, watcher)
    assert all(name in caught.value.hint for name in assets.CATALOGUE)
    with pytest.raises(AssetError, match="sha256 0123456789abcdef"):
        files.base_of("0123456789abcdef" * 4)
    assert files.base_of(assets.CATALOGUE["smollm2-135m"].sha256) is assets.CATALOGUE["smollm2-135m"]


# --- fold ---


async def deltas_of(*deltas: Delta) -> AsyncIterator[Delta]:
    for delta in deltas:
        yield delta


def test_a_fold_is_the_whole_answer_of_a_stream() -> None:
    trace = Trace(None, (Step("a", "hello"),))
    stream = deltas_of(Delta("good "), Delta("morning"), Delta(done=True, usage={"completion_tokens": 2}, trace=trace))
    assert asyncio.run(runtime.fold(stream)) == Answer("good morning", trace, {"completion_tokens": 2})
    assert asyncio.run(runtime.fold(deltas_of(Delta("x", done=True)))) == Answer("x", Trace())


def test_a_stream_without_its_last_piece_is_no_answer() -> None:
    with pytest.raises(WorkerError, match="without its last piece"):
        asyncio.run(runtime.fold(deltas_of(Delta("half"))))
