"""The command line as people and programs use it: run, graphs, weights, shell, measuring. Most calls run in this process, some are
a process of their own: what a signal, a closed pipe or a terminal does cannot be seen otherwise."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import pytest

from conftest import WORDS, toy_graph, toy_queries
from lmgraph import __version__, bundles, cli, graphfile, graphschema
from lmgraph.types import Hop, Progress, Step

HEAVY = {"numpy", "torch", "xllamacpp", "httpx", "transformers", "gguf", "matplotlib", "rich"}
SCRIPTED = "{kind: scripted, answers: {'*': 'answer to {}'}}"


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """stdout as one JSON value."""
        return json.loads(self.out)

    @property
    def rows(self) -> list[Any]:
        """stdout as JSON Lines."""
        return [json.loads(line) for line in self.out.splitlines()]


Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMGRAPH_THREADS", "1")  # two threads of llama.cpp wait for each other where other work runs beside them
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[2]))  # a process of its own starts in another folder


@pytest.fixture
def lmgraph(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process."""

    def run(*arguments: str, stdin: str | bytes = "") -> Result:
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err and "Internal error" not in err
        return Result(int(caught.value.code or 0), out, err)

    return run


def process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """The real program."""
    return subprocess.Popen([sys.executable, "-m", "lmgraph", *arguments], text=True, stdin=subprocess.PIPE, **options)


def write(path: str, text: str) -> Path:
    Path(path).write_text(text, encoding="utf-8")
    return Path(path)


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-compatible server that says how many messages it got: (its URL, the bodies it was sent)."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            event = {"choices": [{"delta": {"content": f"answer {len(asked)}"}, "finish_reason": "stop"}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode())

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}/v1", asked
        made.shutdown()
        thread.join()


# ---------------------------------------------------------------- ask


def test_an_answer_goes_to_stdout_and_the_decision_to_stderr(lmgraph: Command, toy_graph_file: Path) -> None:
    found = lmgraph("ask", "court", "contract", "statute")
    assert found.code == 0
    assert found.out == "answer to court contract statute\n"
    assert "<fn_" in found.err and any(name in found.err for name in WORDS) and "original query kept" in found.err


def test_ask_json_is_one_object_with_answer_finish_and_trace(lmgraph: Command, toy_graph_file: Path) -> None:
    data = lmgraph("ask", "--json", "court contract statute").data
    assert list(data) == ["answer", "finish", "trace"]
    assert data["answer"] == "answer to court contract statute" and data["finish"] == "stop"
    decision, (step,) = data["trace"]["decision"], data["trace"]["steps"]
    assert decision["node"] == step["node"] and step["request"] == decision["rewritten"] == "court contract statute"
    assert step["error"] == "" and step["usage"] == {"prompt_tokens": 3, "completion_tokens": 5}


def test_ask_reads_the_question_from_stdin(lmgraph: Command, toy_graph_file: Path) -> None:
    assert lmgraph("ask", "--node", "law", "-", stdin="first line\nsecond: ça va?").out == "answer to first line\nsecond: ça va?\n"


def test_a_pinned_node_needs_no_master(lmgraph: Command) -> None:
    write("graph.yaml", toy_graph(Path("no-such-master.gguf")))
    found = lmgraph("ask", "--node", "math", "--json", "sum")
    assert found.data["answer"] == "answer to sum" and found.data["trace"]["decision"] is None and found.err == ""
    found = lmgraph("ask", "sum")
    assert found.code == 1 and "no-such-master.gguf" in found.err and found.out == ""


def test_an_unknown_node_is_refused_and_the_valid_ones_are_named(lmgraph: Command, toy_graph_file: Path) -> None:
    found = lmgraph("ask", "--node", "chef", "sum")
    assert found.code == 2 and "no node 'chef'" in found.err and "math, law, health" in found.err


@pytest.mark.parametrize("arguments", [("ask", ""), ("ask", " \t"), ("ask", "-"), ("route", " ")])
def test_an_empty_query_is_refused(lmgraph: Command, toy_graph_file: Path, arguments: tuple[str, ...]) -> None:
    found = lmgraph(*arguments, stdin="\n")
    assert found.code == 2 and "The query is empty." in found.err and found.out == ""


@pytest.mark.parametrize("arguments", [("ask", "\udcff court"), ("route", "\udcff court")])
def test_bytes_that_are_no_characters_are_refused(lmgraph: Command, toy_graph_file: Path, arguments: tuple[str, ...]) -> None:
    found = lmgraph(*arguments)
    assert found.code == 2 and "not text in UTF-8" in found.err


@pytest.mark.parametrize("command", ["ask", "route"])
def test_a_stdin_that_is_no_text_is_refused(lmgraph: Command, toy_graph_file: Path, command: str) -> None:
    found = lmgraph(command, "-", stdin=b"{\"query\": \"caf\xe9\"}")
    assert found.code == 2 and "stdin is not text in utf-8" in found.err and "byte 14" in found.err


def test_an_answer_cut_at_max_tokens_says_so_and_trace_shows_the_steps(lmgraph: Command, toy_graph_file: Path) -> None:
    found = lmgraph("ask", "--node", "law", "--max-tokens", "2", "--trace", "a b c d")
    assert found.out == "answer to\n" and "cut at --max-tokens" in found.err and "law: first piece" in found.err


def test_the_fallback_answers_where_a_worker_fails_and_it_is_said(lmgraph: Command, toy_graph_file: Path) -> None:
    text = toy_graph_file.read_text().replace("law: {token: 1, description: about law, worker: " + SCRIPTED,
                                              "law: {token: 1, description: x, fallback: math, "
                                              "worker: {kind: scripted, retries: 0, answers: {'*': '! no judge'}}")
    toy_graph_file.write_text(text)
    found = lmgraph("ask", "--node", "law", "sue")
    assert found.code == 0 and found.out == "answer to sue\n" and "law failed: no judge" in found.err
    toy_graph_file.write_text(text.replace("fallback: math, ", ""))
    found = lmgraph("ask", "--node", "law", "sue")
    assert found.code == 1 and "no judge" in found.err


# ---------------------------------------------------------------- ask --mode


PATH = "edges: {start: [math], math: [law], law: [health], health: [end]}"


@pytest.fixture
def walking(toy_graph_file: Path) -> Path:
    """A graph in which a walk goes from math by law to health."""
    toy_graph_file.write_text(toy_graph_file.read_text().replace("edges: {start: ['*']}", PATH))
    return toy_graph_file


@pytest.mark.parametrize("mode", ["walk", "plan", "auto"])
def test_a_walk_is_shown_hop_by_hop_on_stderr_and_its_answer_on_stdout(lmgraph: Command, walking: Path, mode: str) -> None:
    found = lmgraph("ask", "--mode", mode, "--trace", "court contract statute")
    assert found.code == 0 and found.out.startswith("answer to")
    shown = [re.match(r"(\d) (math|law|health)  \d+\.\d s( \.\.\.)?  \S", line) for line in found.err.splitlines()]
    seen = [(match[1], match[2], not match[3]) for match in shown if match]
    assert sorted(seen) == sorted((str(i + 1), node, ended) for i, node in enumerate(("math", "law", "health")) for ended in (False, True))
    assert all(seen.index((number, node, False)) < seen.index((number, node, True)) for number, node, _ in seen)
    assert all(f"{node}: first piece" in found.err for node in WORDS), "--trace shows every step"


def test_json_of_a_walk_is_one_object_and_nothing_else(lmgraph: Command, walking: Path) -> None:
    found = lmgraph("ask", "--mode", "walk", "--json", "court contract statute")
    trace = found.data["trace"]
    assert [hop["node"] for hop in trace["walk"]["hops"]] == ["math", "law", "health"] and trace["walk"]["stopped"] == "end" and found.err == ""
    assert [(step["node"], step["hop"]) for step in trace["steps"]] == [("math", 0), ("law", 1), ("health", 2)]
    assert trace["steps"][-1]["answer"] == found.data["answer"]


def test_why_a_walk_stopped_and_what_failed_on_it_is_said(lmgraph: Command, walking: Path) -> None:
    text = walking.read_text()
    walking.write_text("answer: {mode: walk, hops: 2}\n" + text)
    found = lmgraph("ask", "court contract statute")
    assert found.code == 0 and "(the limit of hops is reached (answer: hops))" in found.err
    walking.write_text("answer: {mode: walk, tokens: 1}\n" + text)
    assert "(the limit of tokens is reached (answer: tokens): the best answer so far)" in lmgraph("ask", "court contract statute").err
    broken = text.replace("about math, worker: " + SCRIPTED, "x, worker: {kind: scripted, retries: 0, answers: {'*': '! no sums'}}")
    walking.write_text("answer: {mode: plan}\n" + broken)
    found = lmgraph("ask", "court contract statute")
    assert found.code == 0 and "math failed: no sums" in found.err and found.out.startswith("answer to")
    walking.write_text("answer: {mode: walk}\n" + text.replace(SCRIPTED, "{kind: scripted, retries: 0, answers: {'*': '! no more'}}"))
    found = lmgraph("ask", "court contract statute")
    assert found.code == 1 and found.out == "" and "Done so far: math failed, law failed" in found.err


def test_an_unknown_mode_is_refused_with_the_valid_ones(lmgraph: Command, walking: Path) -> None:
    found = lmgraph("ask", "--mode", "run", "x")
    assert found.code == 2 and all(f"'{mode}'" in found.err for mode in ("single", "vote", "auto", "walk", "plan"))
    assert lmgraph("ask", "--mode", "single", "--json", "court").data["trace"].keys() == {"decision", "steps"}


def test_a_chat_in_a_graph_that_walks_walks_with_its_first_turn_and_stays_where_it_ended(lmgraph: Command, walking: Path) -> None:
    walking.write_text("answer: {mode: walk}\n" + walking.read_text())
    found = lmgraph("chat", stdin="court?\nand then?\n")
    assert found.code == 0 and found.out.count("answer to") >= 2


def hops(*nodes: str) -> tuple[Hop, ...]:
    return tuple(Hop(node, f"{node}'s request") for node in nodes)


def test_on_a_terminal_a_walk_is_a_tree_that_grows_and_ends_where_the_answer_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from lmgraph.cli import show

    screen = io.StringIO()
    monkeypatch.setattr(show, "console", Console(file=screen, force_terminal=True, width=100, highlight=False, color_system=None))
    steps = show.Steps()
    steps(Progress("plan", hops=hops("math", "law", "health")))

    def lines() -> list[str]:
        plain = Console(file=io.StringIO(), width=100, color_system=None)
        plain.print(steps.tree())
        return plain.file.getvalue().splitlines()  # type: ignore[attr-defined]

    assert [line[4:] for line in lines()[1:]] == [f"{i + 1} {node}  waits  {node}'s request" for i, node in enumerate(("math", "law", "health"))]
    steps(Progress("began", 0, "math", "sum\n it"))
    steps(Progress("began", 1, "law", "sue"))
    steps(Progress("ended", 1, "law", "sue", Step("health", "sue", "so", 1500.0)))
    steps(Progress("ended", 0, "math", "sum\n it", Step("math", "sum\n it", "", 300.0, error="no sums")))
    steps(Progress("began", 2, "health", "heal"))
    assert lines()[0] == "start" and lines()[1].endswith("1 math  0.3 s  sum it  no sums") and lines()[2].endswith("2 health  1.5 s  sue")
    assert re.search(r"3 health  0\.\d s \.\.\.  heal$", lines()[3])
    steps.stop()
    drawn = screen.getvalue()
    assert "1 math  0.3 s" in drawn and "3 health" in drawn
    steps(Progress("ended", 2, "health", "heal", Step("health", "heal", "well", 10.0)))
    steps.stop()
    assert screen.getvalue() == drawn, "nothing is drawn over the answer"


# ---------------------------------------------------------------- route


def test_route_shows_one_decision(lmgraph: Command, toy_graph_file: Path) -> None:
    found = lmgraph("route", "why court court why")
    assert found.code == 0 and found.out.startswith("<fn_") and "why court court why" in found.out and "a second" not in found.err
    assert lmgraph("route", "--json", "--no-rewrite", "why court court why").data["query"] == "why court court why"


def test_route_writes_a_line_for_each_query_of_a_file(lmgraph: Command, toy_graph_file: Path) -> None:
    queries = [q for q, _ in toy_queries(3)]
    write("q.jsonl", jsonl(*({"query": q} for q in queries)))
    found = lmgraph("route", "--no-rewrite", "q.jsonl")
    cells = [line.split("\t") for line in found.out.splitlines()]
    assert [c[2] for c in cells] == queries and all(c[0] in WORDS and 0 <= float(c[1]) <= 1 for c in cells)


def test_route_json_keeps_the_order_of_the_input_and_only_stderr_tells_the_throughput(lmgraph: Command, toy_graph_file: Path) -> None:
    queries = [q for q, _ in toy_queries(6)] + ["line\nbreak", "U+2028 \u2028 inside"]
    text = "\n".join(json.dumps({"query": q, "id": i, "other": 1}, ensure_ascii=False) for i, q in enumerate(queries)) + "\n\n"
    found = lmgraph("route", "-", "--json", "--no-rewrite", stdin=text)
    rows = [json.loads(line) for line in found.out.rstrip("\n").split("\n")]
    assert [r["query"] for r in rows] == queries and [r["id"] for r in rows] == list(range(len(queries)))
    for row in rows:
        assert {"node", "token", "probability", "alternatives", "query", "rewritten", "fallback"} <= set(row)
        assert row["node"] in WORDS and row["token"] == list(WORDS).index(row["node"]) and row["fallback"] is False
        assert row["probability"] == row["alternatives"][0]["probability"] and len(row["alternatives"]) == 3
    assert f"{len(queries)} queries in" in found.err and "a second" in found.err and "a second" not in found.out


def test_every_bad_line_is_named_before_any_work_starts(lmgraph: Command) -> None:
    write("graph.yaml", toy_graph(Path("no-such-master.gguf")))
    bad = ["not json", "[]", "{}", '{"query": 3}', '{"query": " "}', '{"query": "\\ud800"}', '{"query": "' + "[" * 3 + '"', "[" * 200_000]
    found = lmgraph("route", "-", "--json", stdin="\n".join(['{"query": "fine"}', *bad, ""]))
    assert found.code == 2 and found.out == "" and "no-such-master" not in found.err
    assert f"{len(bad)} of {len(bad) + 1} lines" in found.err
    assert all(f"stdin:{number}: " in found.err for number in range(2, len(bad) + 2))
    assert '{"query": "..."}' in found.err


def test_only_the_first_ten_bad_lines_are_spelt_out(lmgraph: Command) -> None:
    write("q.jsonl", "x\n" * 12)
    found = lmgraph("route", "q.jsonl")
    assert found.code == 2 and "12 of 12 lines" in found.err and "and 2 more" in found.err
    assert "q.jsonl:10:" in found.err and "q.jsonl:11:" not in found.err


@pytest.mark.parametrize(("content", "complaint"), [
    (b"", "holds no queries"), (b"\n \n", "holds no queries"), (b"\xff", "cannot be read"), (None, "cannot be read")])
def test_a_file_without_queries_is_refused(lmgraph: Command, content: bytes | None, complaint: str) -> None:
    if content is not None:
        Path("q.jsonl").write_bytes(content)
    found = lmgraph("route", "q.jsonl")
    assert found.code == 2 and complaint in found.err and "q.jsonl" in found.err


def test_results_on_their_way_to_a_file_do_not_land_on_the_terminal(toy_graph_file: Path) -> None:
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    write("q.jsonl", jsonl(*({"query": q} for q, _ in toy_queries(2))))
    with process("route", "q.jsonl", "--json", "--no-rewrite", stdout=subprocess.PIPE, stderr=slave) as running:
        out, _ = running.communicate(timeout=300)
    os.close(slave)
    os.close(master)
    assert running.returncode == 0 and len([json.loads(line) for line in out.splitlines()]) == 6


# ---------------------------------------------------------------- chat


def test_a_chat_takes_the_conversation_along_and_new_starts_over(lmgraph: Command, toy_master: Path,
                                                                 server: tuple[str, list[dict[str, Any]]]) -> None:
    url, asked = server
    text = toy_graph(toy_master, f"{{kind: openai, urls: ['{url}'], model: stub}}")
    write("graph.yaml", text.replace("description:", "rewrite: never, description:"))
    found = lmgraph("chat", stdin="court?\n\n  and a contract?  \n/new\nfever?\n/exit\nnever sent\n")
    assert found.code == 0
    assert [[(m["role"], m["content"]) for m in body["messages"]] for body in asked] == [
        [("user", "court?")],
        [("user", "court?"), ("assistant", "answer 1"), ("user", "and a contract?")],
        [("user", "fever?")]]
    assert "answer 2\n" in found.out and found.err.count("<fn_") == 3


def test_a_failing_turn_does_not_end_a_chat_and_the_end_of_stdin_does(lmgraph: Command, toy_master: Path) -> None:
    write("graph.yaml", toy_graph(toy_master, "{kind: scripted, retries: 0, answers: {boom: '! broken', '*': 'fine'}}"))
    found = lmgraph("chat", "--node", "law", stdin=b"\xff\xfe\n")
    assert found.code == 0 and "The line is not text in utf-8" in found.err
    found = lmgraph("chat", "--node", "law", stdin="boom\nhello\n")
    assert found.code == 0 and "broken" in found.err and "fine" in found.out and found.out.endswith("\n")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process")
def test_ctrl_c_ends_a_chat_that_waits_for_a_line(toy_graph_file: Path) -> None:
    with process("chat", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout and running.stdout.read(2) == "> "
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "Interrupted." in err and "Traceback" not in out + err


@pytest.mark.parametrize("arguments", [("route", "-", "--json", "--no-rewrite"), ("route", "-", "--no-rewrite"),
                                       ("graph", "schema"), ("graph", "show"), ("graph", "show", "--json")])
def test_a_reader_that_went_away_is_no_reason_for_a_traceback(toy_graph_file: Path, arguments: tuple[str, ...]) -> None:
    with process(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout and running.stdin and running.stderr
        running.stdout.close()
        running.stdin.write(jsonl(*({"query": q} for q, _ in toy_queries(3))) if "-" in arguments else "")
        running.stdin.close()
        err = running.stderr.read()
    said = re.sub(r"routing \.\.\.|\d+ queries in .* a second", "", err)  # the second where all was routed before the first line went out
    assert said.strip() == "" and running.returncode in (1, 141), (running.returncode, err)


# ---------------------------------------------------------------- help, usage, environment, completion


def commands(command: click.Command = cli.lmgraph, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from commands(found, (*path, name))


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_command_has_help(lmgraph: Command, path: tuple[str, ...]) -> None:
    long, short = lmgraph(*path, "--help"), lmgraph(*path, "-h")
    assert long == short and long.code == 0 and long.err == ""
    first, _, rest = long.out.partition("\n")
    assert first.startswith(" ".join(["Usage: lmgraph", *path])) and len(rest.strip()) > 40


def test_the_table_of_commands_says_what_the_commands_say(lmgraph: Command) -> None:
    out = lmgraph("--help").out
    assert all(f"  {name} " in out for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        found = cli.lmgraph.get_command(click.Context(cli.lmgraph), name)
        assert found is not None and found.name == name


def test_help_loads_nothing_heavy() -> None:
    code = ("import sys, json\nfrom lmgraph.cli import main\n"
            "for arguments in (['--help'], ['--version'], ['nonsense']):\n"
            "    try: main(arguments)\n    except SystemExit: pass\n"
            "print(json.dumps(sorted(m.split('.')[0] for m in sys.modules)))")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert not HEAVY & set(json.loads(run.stdout.splitlines()[-1]))


def test_python_m_lmgraph_is_lmgraph() -> None:
    with process("--version", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        out, err = running.communicate(timeout=300)
    assert (running.returncode, out, err) == (0, f"lmgraph, version {__version__}\n", "")


@pytest.mark.parametrize(("arguments", "complaint"), [
    (("nonsense",), "No such command 'nonsense'"), (("graph", "nonsense"), "No such command 'nonsense'"),
    (("--nonsense",), "No such option"), (("ask", "--nonsense", "x"), "No such option"), (("ask",), "Missing argument 'QUERY"),
    (("ask", "--max-tokens", "0", "x"), "--max-tokens"), (("ask", "--temperature", "3", "x"), "--temperature"),
    (("ask", "--profile", "huge", "x"), "'huge' is not one of"), (("route",), "Missing argument"),
    (("completion", "cmd"), "'cmd' is not one of"), (("evaluate", "routes"), "Missing argument"), (("graph", "add", "x"), "--description"),
    (("graph", "connect", "a"), "TARGETS"), (("train", "heads", "--tokens", "0"), "--tokens"), (("train", "export", "x"), "TARGET"),
])
def test_wrong_usage_is_said_and_exits_with_2(lmgraph: Command, arguments: tuple[str, ...], complaint: str) -> None:
    found = lmgraph(*arguments)
    assert found.code == 2 and complaint in found.err and found.out == "" and "Usage: lmgraph" in found.err


@pytest.mark.parametrize(("name", "value", "complaint"), [
    ("LMGRAPH_CASHE", "x", "Did you mean LMGRAPH_CACHE?"), ("LMGRAPH_X", "1", "Unknown environment variable LMGRAPH_X"),
    ("LMGRAPH_PROFILE", "huge", "standard, tiny"), ("LMGRAPH_THREADS", "0", "from 1 to 1024"),
    ("LMGRAPH_GRAPH", "none.yaml", "none.yaml cannot be read"),
])
def test_a_variable_that_cannot_be_used_is_refused(lmgraph: Command, toy_graph_file: Path, monkeypatch: pytest.MonkeyPatch,
                                                   name: str, value: str, complaint: str) -> None:
    monkeypatch.setenv(name, value)
    for arguments in (("route", "x"), ("graph", "check"), ("graph", "connect", "math", "end")):
        found = lmgraph(*arguments)
        assert found.code == 2 and complaint in found.err and found.out == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_printed_for_each_shell(lmgraph: Command, shell: str) -> None:
    found = lmgraph("completion", shell)
    assert found.code == 0 and "_LMGRAPH_COMPLETE" in found.out and "lmgraph" in found.out


def test_completion_offers_commands_and_their_options(lmgraph: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_LMGRAPH_COMPLETE", "bash_complete")
    for words, offered in (("lmgraph gr", {"graph"}), ("lmgraph graph dis", {"disconnect"}), ("lmgraph route --re", {"--rewrite"})):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        assert {line.split(",")[1] for line in lmgraph().out.splitlines()} == offered


# ---------------------------------------------------------------- graph


COMMENTED = """# my graph
version: 1
master: {bundle: MASTER}   # the master
nodes:
  # numbers
  math:
    token: 0  # zero
    description: about math
    worker: {kind: scripted}   # a dry run
  # the courts
  law:
    token: 1
    description: about law
    worker:
      kind: scripted
  # doctors
  health: {token: 2, description: about health, worker: {kind: scripted}}

# who may follow whom
edges:
  start: ['*']  # anybody
  # after numbers
  math: [law, end]
"""


@pytest.fixture
def commented(toy_bundle: Path) -> Path:
    return write("graph.yaml", COMMENTED.replace("MASTER", str(toy_bundle)))


def test_init_writes_the_built_in_graph_and_a_schema_and_overwrites_only_when_forced(lmgraph: Command) -> None:
    found = lmgraph("graph", "init", "mine/graph.yaml")
    assert found.code == 0 and "lmgraph graph show" in found.out
    text = Path("mine/graph.yaml").read_text()
    assert len(graphfile.loads(text).nodes) == 17 and text.startswith("# yaml-language-server: $schema=graph.schema.json\n")
    assert json.loads(Path("mine/graph.schema.json").read_text()) == graphschema.schema()
    write("mine/graph.yaml", "mine")
    found = lmgraph("graph", "init", "mine/graph.yaml")
    assert found.code == 2 and "exists" in found.err and "--force" in found.err and Path("mine/graph.yaml").read_text() == "mine"
    assert lmgraph("graph", "init", "--force", "mine/graph.yaml").code == 0 and Path("mine/graph.yaml").read_text() == text


def test_a_place_that_cannot_be_written_is_an_error_with_its_name(lmgraph: Command, toy_graph_file: Path) -> None:
    write("file", "")
    for arguments in (("graph", "init", "file/graph.yaml"), ("graph", "show", "--svg", "file/graph.svg")):
        found = lmgraph(*arguments)
        assert found.code == 1 and f"{arguments[-1]} cannot be written" in found.err


def test_schema_is_the_schema(lmgraph: Command) -> None:
    assert lmgraph("graph", "schema").data == graphschema.schema()


def test_show_draws_nodes_tokens_workers_and_edges(lmgraph: Command, commented: Path) -> None:
    out = lmgraph("graph", "show").out
    assert all(text in out for text in ("<fn_0> math", "<fn_2> health", "scripted", "about law", "then: law, end", "threshold 0"))
    assert lmgraph("graph", "show", "--json").data == graphfile.to_dict(graphfile.loads(commented.read_text()))


def test_without_a_graph_file_the_built_in_graph_is_shown(lmgraph: Command) -> None:
    assert len(lmgraph("graph", "show", "--json").data["nodes"]) == 17


def test_the_picture_is_valid_svg_whatever_a_model_is_called(lmgraph: Command, commented: Path) -> None:
    worker = "worker: {kind: embedded, model: 'models/<a>-long-name&more.gguf'}   #"
    commented.write_text(commented.read_text().replace("worker: {kind: scripted}   #", worker))
    found = lmgraph("graph", "show", "--svg", "graph.svg")
    assert found.code == 0 and found.out == "Wrote graph.svg.\n"
    root = xml.parse("graph.svg").getroot()
    words = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and {"<fn_0>", "<fn_1>", "<fn_2>", "models/<a>-long-name&mor"} <= set(words)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) == 1 + 3 + 1, "the arrow's tip, three edges from start, math to law"


def test_a_graph_that_fits_its_master_has_nothing_wrong(lmgraph: Command, commented: Path) -> None:
    found, data = lmgraph("graph", "check").out, lmgraph("graph", "check", "--json").data
    assert found.splitlines()[-1] == "3 nodes, 5 edges: nothing wrong." and found.count("note: ") == len(data["notes"])
    assert (data["ok"], data["problems"], data["nodes"]) == (True, [], 3)


def test_check_notes_dead_ends_and_cycles_of_a_graph_that_walks(lmgraph: Command, toy_graph_file: Path) -> None:
    text = toy_graph_file.read_text().replace("['*']}", "['*'], math: [law, end], law: [math]}")
    toy_graph_file.write_text(text)
    assert lmgraph("graph", "check").out.count("note") == 2, "a request may ask for a walk"
    toy_graph_file.write_text("answer: {mode: auto, hops: 5}\n" + text)
    found = lmgraph("graph", "check")
    assert found.code == 0 and found.out.splitlines() == [
        "note: dead ends: after health a walk is over, whatever is left to do; connect: lmgraph graph connect health NODE end",
        "note: 2 nodes lie on cycles, such as math -> law -> math: a walk there goes on until the master chooses the end, or to the limit of 5 hops",
        "3 nodes, 6 edges: nothing wrong."]
    assert len(lmgraph("graph", "check", "--json").data["notes"]) == 2
    toy_graph_file.write_text(text.replace("law: [math]", "law: [law]"))
    found = lmgraph("graph", "check")
    assert found.code == 2 and "from 'law' the walk can never end (a cycle to nowhere); connect it: lmgraph graph connect law end" in found.err


def test_check_looks_for_the_adapters_that_nodes_bring(lmgraph: Command, toy_graph_file: Path) -> None:
    toy_graph_file.write_text(toy_graph_file.read_text().replace("law: {token", "law: {adapter: runs/law.gguf, token"))
    found = lmgraph("graph", "check")
    assert found.code == 1 and "adapter of node 'law'" in found.err and "does not exist" in found.err and "train tune --node law" in found.err


def test_a_node_that_is_added_to_a_graph_that_walks_may_be_followed_by_any_other(lmgraph: Command, toy_graph_file: Path) -> None:
    add = ("graph", "add", "{}", "--description", "d", "--url", "http://127.0.0.1:9/v1")
    assert lmgraph(*(part.format("art") for part in add)).code == 0
    toy_graph_file.write_text("answer: {mode: auto}\n" + toy_graph_file.read_text())
    assert lmgraph(*(part.format("cooking") for part in add)).code == 0
    edges = lmgraph("graph", "show", "--json").data["edges"]
    assert "art" not in edges and edges["cooking"] == ["*", "end"]


def test_check_lists_every_problem_with_its_line(lmgraph: Command) -> None:
    write("graph.yaml", "version: 2\nmaster: {bundle: x, threshold: 7}\nnodes:\n"
                        "  math: {token: -1, description: d, worker: {kind: magic}}\n"
                        "  law: {description: d, worker: {kind: scripted}}\nedges: {start: ['*']}\nextra: 1\n")
    found = lmgraph("graph", "check")
    assert found.code == 2 and found.out == "" and "graph.yaml has 6 problems" in found.err
    for line in ("line 1: version", "line 2: master.threshold", "line 4: nodes.math.token", "line 4: nodes.math.worker.kind",
                 "line 5: nodes.law: needs 'token'", "line 7: extra"):
        assert line in found.err
    found = lmgraph("graph", "check", "--json")
    assert found.code == 2 and found.data["ok"] is False and len(found.data["problems"]) == 6


@pytest.mark.parametrize("kind", ["bundle", "merged"])
def test_check_finds_a_node_that_the_master_never_learnt(lmgraph: Command, toy_bundle: Path, toy_master: Path, kind: str) -> None:
    text = toy_graph(toy_bundle if kind == "bundle" else toy_master)
    write("graph.yaml", text.replace("nodes:\n", "nodes:\n  chef: {token: 6, description: food, worker: {kind: scripted}}\n"))
    found = lmgraph("graph", "check")
    assert found.code == 1 and "not trained for chef (token 6)" in found.err and "lmgraph train heads" in found.err
    found = lmgraph("graph", "check", "--json")
    assert found.code == 1 and found.data["ok"] is False and "chef (token 6)" in found.data["problems"][0]


def test_check_names_a_master_that_is_not_there(lmgraph: Command) -> None:
    write("graph.yaml", toy_graph(Path("nowhere")))
    assert "'nowhere' not found" in lmgraph("graph", "check").err
    assert "'nowhere' not found" in lmgraph("graph", "check", "--json").data["problems"][0]


def test_comments_survive_every_edit(lmgraph: Command, commented: Path) -> None:
    before = [line.strip() for line in commented.read_text().splitlines() if line.strip().startswith("#")]
    for arguments in (("add", "chef", "--description", "food: salt, and pepper"), ("connect", "math", "health", "chef"),
                      ("disconnect", "math", "law"), ("disconnect", "start", "health"), ("connect", "start", "health"), ("remove", "law")):
        found = lmgraph("graph", *arguments)
        assert found.code == 0, found.err
        text = commented.read_text()
        assert [line.strip() for line in text.splitlines() if line.strip().startswith("#")] == before
        assert "# the master" in text and "token: 0  # zero" in text
    made = graphfile.loads(commented.read_text())
    assert list(made.nodes) == ["math", "health", "chef"]
    assert made.nodes["chef"].token == 3 and made.nodes["chef"].description == "food: salt, and pepper"
    assert made.neighbours("math") == ("end", "health", "chef") and set(made.neighbours()) == {"math", "health", "chef"}


@pytest.mark.parametrize("name", ["math", "health"])
def test_a_removed_node_takes_no_comment_of_the_next_one_along(lmgraph: Command, commented: Path, name: str) -> None:
    commented.write_text(commented.read_text().replace("worker: {kind: scripted}}\n\n#", "worker: {kind: scripted}} # last\n\n#"))
    assert lmgraph("graph", "remove", name).code == 0
    text = commented.read_text()
    assert "  # the courts\n  law:" in text and "# who may follow whom\nedges:" in text and "  start: ['*']  # anybody" in text
    assert name not in graphfile.loads(text).nodes


def test_an_added_node_takes_a_free_token_or_the_one_it_was_trained_with(lmgraph: Command, commented: Path) -> None:
    lmgraph("graph", "remove", "law")
    found = lmgraph("graph", "add", "chef", "--description", "food", "--url", "http://a/v1", "--url", "http://b/v1",
                    "--key-env", "KEY", "--model", "m", "--system", "s")
    assert found.code == 0 and "lmgraph train heads" in found.out
    assert "Added chef (token 3)" in found.out, "token 1 belongs to law, which the master knows"
    lmgraph("graph", "add", "law", "--description", "back again")
    made = graphfile.loads(commented.read_text())
    assert made.nodes["law"].token == 1
    worker = made.nodes["chef"].worker
    assert worker.kind == "openai" and worker.urls == ("http://a/v1", "http://b/v1")
    assert (worker.model, worker.key_env, worker.system) == ("m", "KEY", "s")


def test_an_edge_written_as_one_word_can_be_edited(lmgraph: Command, commented: Path) -> None:
    commented.write_text(commented.read_text().replace("start: ['*']", "start: '*'").replace("math: [law, end]", "math: law"))
    assert lmgraph("graph", "connect", "math", "end").code == 0
    assert lmgraph("graph", "disconnect", "math", "law").code == 0
    assert lmgraph("graph", "remove", "law").code == 0
    assert graphfile.loads(commented.read_text()).edges == {"start": ("*",), "math": ("end",)}


@pytest.mark.parametrize(("arguments", "complaint"), [
    (("add", "law", "--description", "d"), "There is a node 'law' already"),
    (("add", "chef", "--description", "d", "--token", "1"), "share functional token 1"),
    (("add", "start", "--description", "d"), "is not start or end"),
    (("add", "a b", "--description", "d"), "at most 64 letters"),
    (("add", "chef", "--description", "d", "--url", "ftp://a"), "expected http://"),
    (("remove", "chef"), "Valid: math, law, health"),
    (("connect", "math", "chef"), "'chef' is no node"),
    (("connect", "chef", "math"), "'chef', which is no node"),
    (("connect", "start", "end"), "a walk needs at least one node"),
    (("disconnect", "start", "*"), "no edge leaves start"),
    (("disconnect", "math", "health"), "There is no edge math -> health"),
    (("disconnect", "law", "end"), "Edges of law: none"),
])
def test_an_edit_that_would_break_the_graph_changes_nothing(lmgraph: Command, commented: Path, arguments: tuple[str, ...],
                                                            complaint: str) -> None:
    before = commented.read_text()
    found = lmgraph("graph", *arguments)
    assert found.code == 2 and complaint in found.err and found.out == ""
    assert commented.read_text() == before and [p.name for p in Path().iterdir()] == ["graph.yaml"]


def test_edits_go_to_the_graph_that_the_environment_names(lmgraph: Command, commented: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write("other.yaml", commented.read_text())
    monkeypatch.setenv("LMGRAPH_GRAPH", "other.yaml")
    before = commented.read_text()
    assert lmgraph("graph", "connect", "law", "health").code == 0
    assert commented.read_text() == before and graphfile.loads(other.read_text()).neighbours("law") == ("health",)
    assert lmgraph("graph", "remove", "health", "--graph", "graph.yaml").code == 0
    assert list(graphfile.loads(commented.read_text()).nodes) == ["math", "law"]


@pytest.mark.parametrize("arguments", [("show",), ("check",), ("connect", "a", "b"), ("remove", "a"), ("add", "a", "--description", "d")])
def test_a_graph_file_that_is_not_there_is_named_with_the_command_that_makes_one(lmgraph: Command, arguments: tuple[str, ...]) -> None:
    found = lmgraph("graph", *arguments, "--graph", "none.yaml")
    assert found.code == 2 and "none.yaml cannot be read" in found.err and "lmgraph graph init none.yaml" in found.err


# ---------------------------------------------------------------- weights


def test_bundle_list_is_what_lies_in_the_package(lmgraph: Command) -> None:
    assert [row["name"] for row in lmgraph("bundle", "list", "--json").data] == bundles.builtin()
    assert len(lmgraph("bundle", "list").out.splitlines()) == len(bundles.builtin())


def test_bundle_show_prints_the_card_the_nodes_and_the_digest(lmgraph: Command, toy_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_bundle, tmp_path / "mine")
    write("mine/card.md", "# Card of mine\n\nMeasured: 12 %.\n")
    write("mine/metrics.json", '{"accuracy": 0.12}')
    found = lmgraph("bundle", "show", "mine")
    assert found.code == 0
    assert all(text in found.out for text in ("Card of mine", "Measured: 12 %.", "<fn_1>     law", "spare functional tokens: 5"))
    bundle = bundles.read("mine")
    assert bundle.digest[:16] in found.out
    data = lmgraph("bundle", "show", "mine", "--json").data
    assert data["metrics"] == {"accuracy": 0.12} and data["digest"] == bundle.digest
    assert data["vocabulary"]["nodes"] == {n: i for i, n in enumerate(WORDS)}


def test_an_unknown_bundle_is_an_error_with_a_hint(lmgraph: Command) -> None:
    found = lmgraph("bundle", "show", "nonsense")
    assert found.code == 1 and "'nonsense' not found" in found.err and "lmgraph train tune" in found.err


def test_pull_of_an_unknown_name_lists_the_catalogue(lmgraph: Command) -> None:
    found = lmgraph("pull", "smollm2-135m", "nonsense", "other")
    assert found.code == 1 and "nonsense, other" in found.err and "qwen2.5-coder-1.5b" in found.err


def test_pull_of_a_bundle_takes_no_names_beside_it(lmgraph: Command, toy_bundle: Path) -> None:
    found = lmgraph("pull", "--bundle", str(toy_bundle), "smollm2-135m")
    assert found.code != 0 and "--bundle fetches a master alone" in found.err


def test_pull_fetches_no_master_that_a_server_has(lmgraph: Command, toy_graph_file: Path) -> None:
    toy_graph_file.write_text(re.sub(r"bundle: \S+}", "bundle: not-here.gguf, server: 'http://127.0.0.1:9'}", toy_graph_file.read_text()))
    found = lmgraph("pull")
    assert (found.code, found.out) == (0, ""), found


def test_pull_without_names_says_where_the_master_of_the_graph_lies(lmgraph: Command, toy_graph_file: Path, toy_master: Path) -> None:
    found = lmgraph("pull")
    assert found.code == 0 and f"master {toy_master}: {toy_master}" in found.err


# ---------------------------------------------------------------- measuring


@pytest.fixture
def examples(toy_graph_file: Path) -> Path:
    rows = [{"query": q, "node": n, "style": "exam" if i % 2 else "talk"} for i, (q, n) in enumerate(toy_queries(4, salt=1))]
    return write("examples.jsonl", jsonl(*rows))


def test_evaluate_routes_json_holds_n_and_accuracy(lmgraph: Command, examples: Path) -> None:
    data = lmgraph("evaluate", "routes", "examples.jsonl", "--json").data
    assert data["n"] == 12 and data["nodes"] == list(WORDS) and data["router"]["accuracy"] > 0.5
    assert data["by_style"]["exam"]["n"] == 6 and data["rewrites"]["attempted"] == 0
    data = lmgraph("evaluate", "routes", "examples.jsonl", "examples.jsonl", "--json", "--style", "exam", "--sample", "8").data
    assert data["n"] == 8 and list(data["by_style"]) == ["exam"]


def test_evaluate_routes_writes_a_report_and_shows_a_table(lmgraph: Command, examples: Path) -> None:
    found = lmgraph("evaluate", "routes", "examples.jsonl", "--out", "report", "--concurrency", "2")
    assert found.code == 0 and "law" in found.out and "wrote report/report.md" in found.err.replace("\\", "/")
    assert {"report.json", "report.md"} <= {p.name for p in Path("report").iterdir()}
    report = json.loads(Path("report/report.json").read_text())
    assert report["metrics"]["n"] == 12 and "examples.jsonl" in report["title"]


def test_evaluate_finds_an_unknown_label_before_any_work(lmgraph: Command, examples: Path) -> None:
    examples.write_text(examples.read_text() + '{"query": "x", "node": "astrology"}\n')
    found = lmgraph("evaluate", "routes", "examples.jsonl", "--bundle", "nowhere")  # a bundle that would be missed later
    assert found.code == 2 and "astrology" in found.err and "Valid nodes" in found.err and found.out == ""


def test_evaluate_measures_another_master_than_the_graphs(lmgraph: Command, examples: Path, toy_master: Path) -> None:
    write("graph.yaml", toy_graph(Path("no-such-master.gguf")))
    assert lmgraph("evaluate", "routes", "examples.jsonl", "--json").code == 1
    assert lmgraph("evaluate", "routes", "examples.jsonl", "--json", "--bundle", str(toy_master)).data["n"] == 12


@pytest.mark.parametrize(("row", "arguments", "complaint"), [
    ({"query": "salt?", "node": "chef"}, (), "'chef'"), ({"query": "salt?"}, (), "examples.jsonl:13: needs"), ({}, (), "examples.jsonl:13"),
    ({"query": "salt?", "node": "law"}, ("--style", "nonsense"), "No examples are left")])
def test_examples_that_cannot_be_used_are_refused(lmgraph: Command, examples: Path, row: dict[str, str], arguments: tuple[str, ...],
                                                  complaint: str) -> None:
    examples.write_text(examples.read_text() + json.dumps(row) + "\n")
    found = lmgraph("evaluate", "routes", "examples.jsonl", *arguments, "--json")
    assert found.code == 2 and complaint in found.err and found.out == ""
