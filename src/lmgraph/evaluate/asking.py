"""Asks one worker one multiple-choice question: by the likelihood of each letter where the worker can tell it, else by its words.

An embedded worker reads the raw prompt and one forward pass says which letter is likeliest. A server is asked for the probabilities of
its first token; one that gives none, and a scripted worker, are asked for words, which `letter` reads. It keeps nothing and scores
nothing. A prompt too long for the worker is asked with fewer shots, as Hendrycks et al. (2021) do.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmgraph.engine import Engine
from lmgraph.errors import EngineError, WorkerError
from lmgraph.evaluate.mmludata import LETTERS, Question, prompt
from lmgraph.types import Message
from lmgraph.workers.base import Worker
from lmgraph.workers.embedded import EmbeddedWorker
from lmgraph.workers.openai import OpenAIWorker
from lmgraph.workers.reading import Refusal

WORDS = 64
"""tokens of an answer whose letter is read out of its words"""
PROBABILITIES: Mapping[str, Any] = {"logprobs": True, "top_logprobs": 20}
"""20: as many as OpenAI's API and vLLM give"""
UNFIT = (400, 413, 422)
"""statuses of a server that refuses this request (an option, its length) and not every request"""
BUSY = (0, 408, 429)
"""statuses after which the same request may do better, besides those from 500; 0: none was given"""


@dataclass(frozen=True)
class Reply:
    """`choice` is an index, None where no answer could be read; `how`: likelihood or parsed; `shots` that the prompt really had."""

    choice: int | None
    how: str
    ms: float
    """of the worker's own time: a wait for a free engine is not in it"""
    prompt_tokens: int
    shots: int


class Asker:
    """Asks one worker; it remembers what the worker can do. `retries`: how often a call that failed is made again."""

    def __init__(self, worker: Worker, retries: int = 0) -> None:
        self._worker, self._retries = worker, retries
        self._letters: tuple[list[int], list[int]] | None = None
        self._tells = isinstance(worker, OpenAIWorker)
        """whether it gives probabilities, as far as is known"""

    async def ask(self, question: Question, stem: str, shots: Sequence[Question]) -> Reply:
        """One reply. Raises WorkerError, WorkerTimeout or EngineError when the worker fails."""
        if isinstance(self._worker, EmbeddedWorker):
            return await self._likelihood(await self._worker.engine(), question, stem, shots)
        count = len(shots)
        while True:
            try:
                return await self._words(prompt(question, stem, shots[:count]), count)
            except Refusal as error:
                if error.status not in UNFIT or not count:
                    raise
                count -= 1

    async def _likelihood(self, engine: Engine, question: Question, stem: str, shots: Sequence[Question]) -> Reply:
        if self._letters is None:
            self._letters = await letter_ids(engine)
        between, letters = self._letters
        count = len(shots)
        while True:
            ids = [*await engine.tokenise(prompt(question, stem, shots[:count]), begin=True), *between]
            if len(ids) < engine.context or not count:
                break
            count -= 1
        async with await engine.session() as session:
            choice = await session.choose(ids, letters)
        best = choice.probabilities[0][0] if choice.probabilities else None
        return Reply(None if best is None else letters.index(best), "likelihood", choice.prefill_ms, len(ids), count)

    async def _words(self, text: str, shots: int) -> Reply:
        """A reply to a prompt as a user's message: by probabilities where the worker tells them, else by its words."""
        took, used, silent = 0.0, 0, False
        if self._tells:
            try:
                _, choices, used, took = await self._call(text, 1, PROBABILITIES)
            except Refusal as error:
                if error.status not in UNFIT:
                    raise
                silent = True
            else:
                tops = _tops(choices)
                if (best := _likeliest(tops)) is not None:
                    return Reply(best, "likelihood", took, used, shots)
                silent = not tops
        words, _, again, more = await self._call(text, WORDS, {})
        self._tells = self._tells and not silent  # only now: a prompt that is too long is refused in the same way as an option
        return Reply(letter(words), "parsed", took + more, used + again, shots)

    async def _call(self, text: str, max_tokens: int, options: Mapping[str, Any]) -> tuple[str, list[Mapping[str, Any]], int, float]:
        """(text, choices with more than text, prompt tokens, ms) of one answer; tried again as often as the node says."""
        attempt = 0
        while True:
            began = time.perf_counter()
            words: list[str] = []
            choices: list[Mapping[str, Any]] = []
            used = 0
            try:
                messages = (Message("user", text),)
                async for delta in self._worker.stream(messages, max_tokens=max_tokens, temperature=0.0, options=options, whole=True):
                    words.append(delta.text)
                    choices += delta.choices
                    used = delta.usage.get("prompt_tokens", used)
                return "".join(words), choices, used, (time.perf_counter() - began) * 1000
            except WorkerError as error:
                status = getattr(error, "status", 0)
                if attempt == self._retries or not (status in BUSY or status >= 500):
                    raise
                await asyncio.sleep(min(0.2 * 2**attempt, 2.0))
                attempt += 1


async def letter_ids(engine: Engine) -> tuple[list[int], list[int]]:
    """(ids between `Answer:` and the letter, the id that tells each letter from the others), as this model spells ` A` to ` D`.

    With most models a letter and its blank are one token, and nothing stands between. Raises EngineError where letters do not differ.
    """
    before = await engine.tokenise("Answer:", begin=True)
    spelt = [await engine.tokenise(f"Answer: {name}", begin=True) for name in LETTERS]
    same = 0
    while all(len(ids) > same for ids in spelt) and len({ids[same] for ids in spelt}) == 1:
        same += 1
    if same < len(before) or spelt[0][: len(before)] != before or len({tuple(ids[same : same + 1]) for ids in spelt}) < len(LETTERS):
        raise EngineError(
            f"The tokens of {engine.path.name} do not tell {', '.join(LETTERS)} apart after 'Answer:'.",
            "Serve this model with an OpenAI-compatible server and name it in graph.yaml as kind openai: its words are read then.",
        )
    return spelt[0][len(before) : same], [ids[same] for ids in spelt]


def _tops(choices: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """(token, logarithm of its probability) of what the first token could have been; [] where the server does not say."""
    found: list[tuple[str, float]] = []
    for choice in choices:
        logprobs = choice.get("logprobs")
        content = logprobs.get("content") if isinstance(logprobs, dict) else None
        if not isinstance(content, list) or not content or not isinstance(content[0], dict):
            continue
        tops = content[0].get("top_logprobs")
        for row in (content[0], *(tops if isinstance(tops, list) else ())):
            token, value = (row.get("token"), row.get("logprob")) if isinstance(row, dict) else (None, None)
            if isinstance(token, str) and isinstance(value, (int, float)) and not math.isnan(value):
                found.append((token, float(value)))
        break
    return found


def _likeliest(tops: Sequence[tuple[str, float]]) -> int | None:
    legal = [(value, token.strip()) for token, value in tops if token.strip() and token.strip() in [*LETTERS]]
    return LETTERS.index(max(legal)[1]) if legal else None


def letter(text: str, count: int = len(LETTERS)) -> int | None:
    """The index of the option that a text chooses among `count` options (at most 26), None where it states none.

    A first line that is nothing but a letter is the answer; else the last statement ("the answer is (C)", "Answer: C") is; else a
    letter that the text begins with as options do ("C.", "(c)", "**C**"). The word of a sentence ("A dog", "I think") is no option.
    """
    big, any_case = f"[A-{chr(64 + count)}]", f"[A-{chr(64 + count)}a-{chr(96 + count)}]"
    prose = r"(?!(?<=[AI])\s+(?!because\b|since\b|as\b)[a-z])"
    stated = r"(?i:answer(?:\s+(?:is|would\s+be))?[\s:=*\"'$]*(?:option|choice)?|(?:option|choice)\s+is)[\s:=*\"'$]*"
    statements = list(re.finditer(rf"{stated}(?:\(({any_case})\)|\\boxed\{{({big})\}}|({big})(?![\w'’]){prose})", text))
    found = (
        re.match(rf"\W*({big})\W*(?:\n|$)", text)
        or (statements[-1] if statements else None)
        or re.match(rf"\W*(?:\(({any_case})\)|({big})(?:[).:\]]|\*\*))", text)
    )
    return ord(next(group for group in found.groups() if group).upper()) - 65 if found else None
