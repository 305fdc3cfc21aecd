"""Commands that run a graph: ask, route, chat."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmgraph.cli import settings
from lmgraph.errors import DataError, QueryError
from lmgraph.graph import MODES

if TYPE_CHECKING:
    from lmgraph.types import Trace

GRAPH = click.option(
    "--graph", "-g", "path", type=click.Path(path_type=Path), help="graph.yaml to use (default: ./graph.yaml, else the built-in graph)"
)
PROFILE = click.option(
    "--profile", type=click.Choice(["standard", "tiny"]), help="tiny: SmolLM2-135M in place of every catalogue model (98 MB)"
)
JSON = click.option("--json", "as_json", is_flag=True, help="write JSON for programs")
REWRITE = click.option("--rewrite/--no-rewrite", "rewriting", default=None, help="override the nodes' own rewrite setting")


@click.command()
@click.argument("query", nargs=-1, required=True)
@GRAPH
@PROFILE
@click.option("--node", help="skip the master: ask this node")
@click.option("--max-tokens", type=click.IntRange(1, 100_000), help="longest answer, in tokens")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 is greedy")
@click.option("--mode", type=click.Choice(MODES), help="how it is answered (default: as the graph says)")
@click.option("--trace", "show_trace", is_flag=True, help="show steps and times after the answer")
@JSON
def ask(
    query: tuple[str, ...],
    path: Path | None,
    profile: str | None,
    node: str | None,
    max_tokens: int | None,
    temperature: float | None,
    mode: str | None,
    show_trace: bool,
    as_json: bool,
) -> None:
    """Ask QUERY: the master picks an expert and rewrites the query; the expert's answer is streamed.

    Where one expert is not enough the query walks the graph, hop by hop (--mode walk) or by a plan (--mode plan); auto lets the master say.

    QUERY - reads the question from stdin.
    """
    text = read_stdin() if query == ("-",) else " ".join(query)
    asyncio.run(_ask(_characters(text), path, profile, node, max_tokens, temperature, mode or "", show_trace, as_json))


async def _ask(
    query: str,
    path: Path | None,
    profile: str | None,
    node: str | None,
    max_tokens: int | None,
    temperature: float | None,
    mode: str,
    show_trace: bool,
    as_json: bool,
) -> None:
    from lmgraph.cli.show import Bars, Steps, console, decision_lines, out, vote_lines, walk_line
    from lmgraph.runtime import Runtime
    from lmgraph.types import Ask, Decision, Message

    if not query.strip():
        raise QueryError("The query is empty.", 'Give a question: lmgraph ask "..."')
    steps = Steps()
    with Bars() as bars, ExitStack() as stack:
        stack.callback(steps.stop)
        async with Runtime.open(settings(profile=profile), path, bars) as runtime:
            vocabulary = None if node else (await runtime.master()).vocabulary

            def decided(decision: Decision) -> None:
                bars.stop()
                if not as_json and vocabulary:
                    console.print(decision_lines(decision, vocabulary.name(decision.token)))
                    console.print()

            question = Ask((Message("user", query),), node, max_tokens, temperature, mode=mode)
            stream = runtime.answer(question, decided, progress=None if as_json else steps)
            answer, trace = "", None
            async for delta in stream:
                answer += delta.text
                if not as_json:
                    bars.stop()
                    steps.stop()
                    out(delta.text)
                if delta.done:
                    trace = delta.trace
                    finish = delta.finish
            assert trace is not None
            if as_json:
                print(json.dumps({"answer": answer, "finish": finish, "trace": trace.to_json()}, ensure_ascii=False))
                return
            out("\n")
            if finish == "length" and not (trace.walk and trace.walk.stopped == "seconds"):
                console.print("(the answer was cut at --max-tokens)", style="yellow")
            if trace.vote:
                console.print(vote_lines(trace.vote))
            if trace.walk and (why := walk_line(trace.walk)):
                console.print(f"({why})", style="yellow", markup=False)
            for step in trace.steps:
                if step.error:
                    console.print(f"{step.node} failed: {step.error}", style="yellow", markup=False)
            if show_trace:
                console.print()
                for step in trace.steps:
                    console.print(
                        f"{step.node}: first piece {step.first_ms:.0f} ms, {step.ms:.0f} ms in all, "
                        f"attempt {step.attempts}, {dict(step.usage)}",
                        style="dim",
                        markup=False,
                    )


@click.command()
@click.argument("source")
@GRAPH
@REWRITE
@JSON
def route(source: str, path: Path | None, rewriting: bool | None, as_json: bool) -> None:
    """Decide without asking a worker. SOURCE is a query, a JSON Lines file of objects with `query`, or - for stdin.

    With --json, one object a line in the order of the input: node, token, probability, alternatives, query, rewritten, fallback.
    """
    file = Path(source) if source.endswith((".jsonl", ".json")) else None
    if source == "-":
        rows = read_queries(read_stdin(), "stdin")
    elif file is not None:
        rows = queries_of(file)
    else:
        rows = [{"query": _characters(source)}]
    asyncio.run(_route(rows, path, rewriting, as_json, single=source != "-" and file is None))


def read_stdin() -> str:
    """All of stdin. Raises DataError when it is not text."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not text in {error.encoding}: {error.reason} at byte {error.start}.") from error


def _characters(text: str) -> str:
    """The text itself. Raises QueryError where bytes that are no characters came in (Python carries them as lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise QueryError(f"The query is not text in UTF-8: character {error.start + 1} is none.") from error
    return text


def queries_of(file: Path) -> list[dict[str, Any]]:
    """Objects with a `query` out of a JSON Lines file."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}.") from error
    return read_queries(text, file.name)


def read_queries(text: str, name: str) -> list[dict[str, Any]]:
    """Objects with a non-empty `query`, one a line; every bad line is named before any work starts."""
    rows, bad = [], []
    lines = text.rstrip("\n").split("\n")  # not splitlines: JSON may hold U+2028 and its like as they are
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("query"), str) or not row["query"].strip():
                raise ValueError("needs a non-empty string `query`")
            json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no character
            rows.append(row)
        except (ValueError, RecursionError) as error:
            bad.append(f"{name}:{number}: {error}")
    if bad:
        more = f"\n  ... and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise DataError(
            f"{len(bad)} of {len(lines)} lines cannot be used:\n  " + "\n  ".join(bad[:10]) + more,
            'Each line is one object: {"query": "..."}',
        )
    if not rows:
        raise DataError(f"{name} holds no queries.", 'Each line is one object: {"query": "..."}')
    return rows


async def _route(rows: list[dict[str, Any]], path: Path | None, rewriting: bool | None, as_json: bool, single: bool) -> None:
    from rich.console import Console

    from lmgraph.cli.show import Bars, console, decision_lines
    from lmgraph.runtime import Runtime

    with Bars() as bars:
        async with Runtime.open(settings(), path, bars) as runtime:
            master = await runtime.master()
            began = time.perf_counter()
            done = 0
            async for row, decision in _in_order(master, rows, rewriting):
                done += 1
                if not single:
                    bars.progress("routing", done, len(rows))
                if as_json:
                    extra = {"id": row["id"]} if "id" in row else {}
                    print(json.dumps({**extra, **decision.to_json()}, ensure_ascii=False), flush=True)
                elif single:
                    bars.stop()
                    Console(highlight=False).print(decision_lines(decision, master.vocabulary.name(decision.token)))
                else:
                    request = (decision.query if decision.rewrite_note else decision.rewritten).replace("\n", " ")
                    print(f"{decision.node}\t{decision.probability:.3f}\t{request}")
            took = time.perf_counter() - began
            if not single:
                console.print(f"{done} queries in {took:.1f} s: {done / took:.1f} a second", style="dim")


async def _in_order(master: Any, rows: list[dict[str, Any]], rewriting: bool | None) -> AsyncIterator[tuple[dict[str, Any], Any]]:
    """Decide as many at once as the engine has sequences; hand out in the order of the input."""
    window: list[tuple[dict[str, Any], asyncio.Task[Any]]] = []
    todo = iter(rows)
    try:
        for row in todo:
            window.append((row, asyncio.ensure_future(master.decide(row["query"], rewriting=rewriting))))
            if len(window) >= 2 * master.engine.slots:
                first, task = window.pop(0)
                yield first, await task
        while window:
            first, task = window.pop(0)
            yield first, await task
    finally:
        for _, task in window:
            task.cancel()
        await asyncio.gather(*(task for _, task in window), return_exceptions=True)


@click.command()
@GRAPH
@PROFILE
@click.option("--node", help="skip the master: talk to this node")
def chat(path: Path | None, profile: str | None, node: str | None) -> None:
    """Talk in the terminal. A turn stays with its node unless it clearly belongs elsewhere. Ctrl-D or /exit ends, /new starts over."""
    asyncio.run(_chat(path, profile, node))


async def _chat(path: Path | None, profile: str | None, node: str | None) -> None:
    from lmgraph.cli.show import Bars, Steps, console, decision_lines, out, walk_line
    from lmgraph.errors import LmgraphError
    from lmgraph.runtime import Runtime
    from lmgraph.types import Ask, Decision, Message

    messages: list[Message] = []
    stay = ""
    with Bars() as bars:
        async with Runtime.open(settings(profile=profile), path, bars) as runtime:
            vocabulary = (await runtime.master()).vocabulary
            bars.stop()

            def decided(decision: Decision) -> None:
                bars.stop()
                console.print(decision_lines(decision, vocabulary.name(decision.token)))

            while True:
                try:
                    line = _characters(_line()).strip()
                except EOFError:
                    out("\n")
                    return
                except QueryError as error:
                    console.print(f"Error: {error}", style="red", markup=False)
                    continue
                if line in ("/exit", "/quit"):
                    return
                if line == "/new":
                    messages, stay = [], ""
                    continue
                if not line:
                    continue
                answer, steps = "", Steps()
                try:
                    async for delta in runtime.answer(Ask((*messages, Message("user", line)), node, stay=stay), decided, progress=steps):
                        answer += delta.text
                        stay = _home(delta.trace) if delta.trace else stay
                        bars.stop()
                        steps.stop()
                        out(delta.text)
                        if delta.trace and delta.trace.walk and (why := walk_line(delta.trace.walk)):
                            console.print(f"\n({why})", style="yellow", markup=False)
                    out("\n")
                    messages += [Message("user", line), Message("assistant", answer)]
                except LmgraphError as error:
                    console.print(f"Error: {error}", style="red", markup=False)
                finally:
                    steps.stop()


def _home(trace: Trace) -> str:
    """Where a conversation stays: with the node that answered, of a vote with the node that was decided."""
    return trace.decision.node if trace.vote and trace.decision else trace.steps[-1].node


def _line() -> str:
    """A line from the terminal, read on the main thread under Python's own Ctrl-C: asyncio's would wait for the line to end."""
    held = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return input("> ")
    except KeyboardInterrupt as error:
        raise click.Abort from error
    except UnicodeDecodeError as error:
        raise QueryError(f"The line is not text in {error.encoding}.") from error
    finally:
        signal.signal(signal.SIGINT, held)
