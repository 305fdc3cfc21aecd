"""Asking one worker one multiple-choice question: an embedded toy, servers on loopback of every kind, a script; and what words state."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmgraph.engine import Engine
from lmgraph.errors import EngineError, WorkerError
from lmgraph.evaluate.asking import Asker, Reply, letter, letter_ids
from lmgraph.evaluate.mmludata import LETTERS, Question, prompt
from lmgraph.workers.base import Worker
from lmgraph.workers.embedded import EmbeddedWorker, SharedEngine
from lmgraph.workers.openai import OpenAIWorker
from lmgraph.workers.scripted import ScriptedWorker

Body = dict[str, Any]
Act = Callable[[Body], tuple[int, Body]]
"""what a server was asked -> (status, what it answers)"""
QUESTION = Question("anatomy/test/0", "anatomy", "health", "What is a hand?", ("bone", "a limb's end", "a\nlimb", ""), 1)
SHOTS = [Question(f"anatomy/dev/{i}", "anatomy", "health", f"What is {i}?", ("one", "two", "three", "four"), i % 4) for i in range(5)]


@dataclass
class Site:
    """A server: its URL and what it was asked."""

    url: str
    asked: list[Body] = field(default_factory=list)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Act], Site]]:
    """Start OpenAI-compatible servers that answer whole, as `act` says; they are stopped after the test."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ExitStack() as stack:
        def start(act: Act) -> Site:
            class Handler(BaseHTTPRequestHandler):
                def do_POST(self) -> None:
                    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    site.asked.append(body)
                    status, answer = act(body)
                    data = json.dumps(answer).encode()
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

                def log_message(self, *args: object) -> None: ...

            server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            site = Site(f"http://127.0.0.1:{server.server_port}/v1")
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            for step in (server.server_close, thread.join, server.shutdown):
                stack.callback(step)
            return site

        yield start


def says(text: str, tops: dict[str, float] | None = None, prompt_tokens: int = 7) -> tuple[int, Body]:
    """An answer, with the probabilities of its first token where `tops` has them."""
    choice: Body = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if tops is not None:
        rows = [{"token": token, "logprob": value, "bytes": None} for token, value in tops.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": -9.0, "bytes": None, "top_logprobs": rows}]}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 1}}


def refuses(status: int, words: str = "no") -> tuple[int, Body]:
    return status, {"error": {"message": words}}


def ask(worker: Worker, times: int = 1, shots: Sequence[Question] = (), retries: int = 0, stem: str = QUESTION.question) -> list[Reply]:
    async def work() -> list[Reply]:
        asker = Asker(worker, retries)
        try:
            return [await asker.ask(QUESTION, stem, shots) for _ in range(times)]
        finally:
            await worker.close()

    return asyncio.run(work())


def on(site: Site, **options: Any) -> OpenAIWorker:
    return OpenAIWorker([site.url], "m", always_stream=False, **options)


# ---------------------------------------------------------------- servers


def test_a_server_that_tells_probabilities_is_asked_once_for_one_token(serve: Callable[[Act], Site]) -> None:
    site = serve(lambda body: says("The", {"The": -0.1, " C": -0.9, "B": -1.5, "AB": -0.2}))
    (reply,) = ask(on(site, system="be brief"), shots=SHOTS)
    assert (reply.choice, reply.how, reply.prompt_tokens, reply.shots) == (2, "likelihood", 7, 5) and reply.ms > 0
    assert site.asked == [{"model": "m", "max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": 20, "messages": [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": prompt(QUESTION, QUESTION.question, SHOTS)}]}]


@pytest.mark.parametrize("silence", [None, {}], ids=["no logprobs", "no top logprobs but of a word"])
def test_a_server_that_gives_no_letter_is_asked_for_words(serve: Callable[[Act], Site], silence: dict[str, float] | None) -> None:
    site = serve(lambda body: says("The", silence) if "logprobs" in body else says("The answer is (B)."))
    replies = ask(on(site), times=2)
    assert [(r.choice, r.how) for r in replies] == [(1, "parsed")] * 2
    kinds = [("logprobs" in body, body["max_tokens"]) for body in site.asked]
    # one that gives no probabilities at all is not asked for them again; one whose first token was no letter may do better next time
    assert kinds == ([(True, 1), (False, 64), (False, 64)] if silence is None else [(True, 1), (False, 64)] * 2)


def test_a_server_that_refuses_probabilities_is_asked_for_words_and_not_for_them_again(serve: Callable[[Act], Site]) -> None:
    site = serve(lambda body: refuses(400, "logprobs are not supported") if "logprobs" in body else says("D"))
    assert [(r.choice, r.how) for r in ask(on(site), times=3)] == [(3, "parsed")] * 3
    assert ["logprobs" in body for body in site.asked] == [True, False, False, False]


def test_words_without_a_choice_are_no_answer(serve: Callable[[Act], Site]) -> None:
    (reply,) = ask(on(serve(lambda body: says("A dog has paws."))))
    assert reply.choice is None and reply.how == "parsed"


def test_a_prompt_that_a_server_finds_too_long_is_asked_with_fewer_shots(serve: Callable[[Act], Site]) -> None:
    room = len(prompt(QUESTION, QUESTION.question, SHOTS[:2]))

    def act(body: Body) -> tuple[int, Body]:
        return refuses(400, "too long") if len(body["messages"][-1]["content"]) > room else says("B", {"B": -0.1})

    site = serve(act)
    one, two = ask(on(site), times=2, shots=SHOTS)
    assert one.shots == two.shots == 2 and one.choice == two.choice == 1
    assert one.how == two.how == "likelihood", "a refused length is no refused option"


def test_a_server_that_refuses_everything_says_why_in_the_end(serve: Callable[[Act], Site]) -> None:
    with pytest.raises(WorkerError, match="answered 400: never"):
        ask(on(serve(lambda body: refuses(400, "never"))), shots=SHOTS[:1])


def test_a_wrong_key_ends_it_at_once(serve: Callable[[Act], Site]) -> None:
    site = serve(lambda body: refuses(401, "Incorrect API key"))
    with pytest.raises(WorkerError, match="Incorrect API key"):
        ask(on(site), shots=SHOTS, retries=3)
    assert len(site.asked) == 1


def test_a_call_that_failed_is_made_again_as_often_as_the_node_says(serve: Callable[[Act], Site]) -> None:
    site = serve(lambda body: refuses(500) if len(site.asked) == 1 else says("A", {"A": -0.1}))
    assert ask(on(site), retries=1)[0].choice == 0 and len(site.asked) == 2
    other = serve(lambda body: refuses(500, "broken"))
    with pytest.raises(WorkerError, match="broken"):
        ask(on(other), retries=1)
    assert len(other.asked) == 2


# ---------------------------------------------------------------- scripted, embedded


def test_a_scripted_worker_is_asked_for_words() -> None:
    worker = ScriptedWorker({prompt(QUESTION, QUESTION.question, SHOTS): "I say: answer: (c)"})
    (reply,) = ask(worker, shots=SHOTS)
    assert (reply.choice, reply.how, reply.shots) == (2, "parsed", 5) and len(worker.asked) == 1


def embedded(path: Path, context: int = 2048) -> EmbeddedWorker:
    return EmbeddedWorker(SharedEngine(lambda: Engine.open(path, context=context, threads=1)), system="it is not used")


def test_an_embedded_worker_chooses_the_letter_that_it_would_write_if_it_might_only_write_letters(toy_base: Path) -> None:
    questions = [Question("", "anatomy", "health", f"What is {i * i}?", ("one", f"{i}", "three", "four" * i), 0) for i in range(12)]

    async def work() -> tuple[list[int | None], list[int | None]]:
        worker = embedded(toy_base)
        try:
            asker, engine = Asker(worker), await worker.engine()
            chosen = [(await asker.ask(q, q.question, SHOTS[:2])).choice for q in questions]
            letters = [(await engine.tokenise(name))[0] for name in LETTERS]
            others = [i for i in range(267) if i not in letters]
            written = []
            for q in questions:
                ids = await engine.tokenise(prompt(q, q.question, SHOTS[:2]) + " ")
                async with await engine.session() as session:
                    written.append("".join([piece.text async for piece in session.generate(ids, 1, forbidden=others)]))
            return chosen, [letter(text) for text in written]
        finally:
            await worker.close()

    chosen, written = asyncio.run(work())
    assert chosen == written and len(set(chosen)) > 1, "a toy that always says the same letter would show nothing"


def test_an_embedded_worker_drops_shots_until_the_prompt_fits(toy_base: Path) -> None:
    (reply,) = ask(embedded(toy_base, context=256), shots=SHOTS)
    (whole,) = ask(embedded(toy_base), shots=SHOTS)
    assert reply.shots < 5 and reply.prompt_tokens < 256 < whole.prompt_tokens and whole.shots == 5
    assert reply.choice is not None and reply.how == "likelihood"
    with pytest.raises(EngineError, match="room for"):
        ask(embedded(toy_base, context=256), shots=SHOTS, stem="what? " * 60)


def test_a_raw_prompt_begins_as_the_model_wants_a_text_to_begin(toy_base: Path, tmp_path: Path) -> None:
    flag = b"tokenizer.ggml.add_bos_token" + (7).to_bytes(4, "little")  # 7: a boolean
    data = toy_base.read_bytes()
    assert data.count(flag + b"\0") == 1
    (tmp_path / "bos.gguf").write_bytes(data.replace(flag + b"\0", flag + b"\1"))
    (plain,), (begun,) = ask(embedded(toy_base)), ask(embedded(tmp_path / "bos.gguf"))
    assert begun.prompt_tokens == plain.prompt_tokens + 1


class Spelling:
    """In place of an engine: a tokenizer only."""

    path = Path("odd.gguf")

    def __init__(self, spell: Callable[[str], list[int]]) -> None:
        self._spell = spell

    async def tokenise(self, text: str, special: bool = False, begin: bool = False) -> list[int]:
        return ([1] if begin else []) + self._spell(text)


@pytest.mark.parametrize(("spell", "found"), [
    (lambda text: [*map(ord, text)], ([32], [65, 66, 67, 68])),  # a token a letter: the blank stands between
    (lambda text: [9, *([ord(text[8]) + 1000] if len(text) > 7 else [])], ([], [1065, 1066, 1067, 1068])),  # blank and letter are one token
    (lambda text: [9, *([5, 6, ord(text[8]), 7] if len(text) > 7 else [])], ([5, 6], [65, 66, 67, 68]))])
def test_letters_are_the_first_ids_that_differ(spell: Callable[[str], list[int]], found: tuple[list[int], list[int]]) -> None:
    assert asyncio.run(letter_ids(Spelling(spell))) == found  # type: ignore[arg-type]


@pytest.mark.parametrize("spell", [lambda text: [9], lambda text: [9, *([5, 0] if len(text) > 7 else [])],
                                   lambda text: [9] if len(text) < 8 else [ord(text[8])], lambda text: [9, len(text), *text[8:].encode()]])
def test_a_model_whose_letters_do_not_differ_is_refused_with_what_to_do(spell: Callable[[str], list[int]]) -> None:
    with pytest.raises(EngineError, match=r"odd\.gguf do not tell A, B, C, D apart") as caught:
        asyncio.run(letter_ids(Spelling(spell)))  # type: ignore[arg-type]
    assert "kind openai" in caught.value.hint


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(("text", "choice"), [
    ("C", 2), (" C.", 2), ("(C)", 2), ("(c) because", 2), ("**C**", 2), ("B: Paris", 1), ("C) Paris", 2),
    ("Answer: C", 2), ("the answer is (C)", 2), ("The answer is **B**.", 1), ("ANSWER: d", None), ("answer: (d)", 3),
    ("The answer is \\boxed{D}", 3), ("The correct option is B", 1), ("the answer is A because it is", 0), ("Answer:\n\nC) x", 2),
    ("A. No, wait: the answer is D", 3), ("Answer: A. Then again, answer: B", 1), ("The answer is B. Option A is wrong.", 1),
    ("The answer is $\\boxed{C}$.", 2), ("The correct answer is option C.", 2), ("Answer: Option B", 1), ("The answer is choice (b)", 1),
    ("C\n\nWhat is next?\nAnswer: B", 2),  # a model that goes on and asks itself
    ("A dog barks", None), ("Answer: A dog", None), ("I think so", None), ("Because A and B are", None), ("Answers Differ", None),
    ("E", None), ("Answer: F", None), ("", None), ("no", None)])
def test_what_words_state(text: str, choice: int | None) -> None:
    assert letter(text) == choice


def test_more_options_have_more_letters() -> None:
    assert letter("Answer: F", 6) == 5 and letter("J", 10) == 9 and letter("the answer is (j)", 10) == 9 and letter("Answer: I think", 10) is None


@given(st.integers(0, 3), st.sampled_from(["Answer: {}", "the answer is ({}).", "**{}**", "{}", "So the answer is: {}.", "({}) is right"]))
def test_a_plain_statement_is_always_read(index: int, form: str) -> None:
    assert letter(form.format(LETTERS[index])) == index


@given(st.text(), st.integers(1, 26))
def test_any_words_state_an_option_that_there_is_or_none(text: str, count: int) -> None:
    found = letter(text, count)
    assert found is None or (0 <= found < count and (LETTERS + "EFGHIJKLMNOPQRSTUVWXYZ")[found].lower() in text.lower())
